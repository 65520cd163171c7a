"""Configuration: the defaults of a frozen dataclass, then config files, then --key=value. Later values win.

    cfg, provenance = configure(TrainConfig, ["config/train_shakespeare.py", "--max_steps=200"])

The dataclass is the whole schema. Its annotations are the types and its defaults are the defaults. The
comment at the end of a field's line is its --help text. --help reads these comments from the source code, so
the source must be there at run time; a test checks that every field has a comment.

A config file is Python: plain assignments, which run in their own namespace. Values from the command line
are parsed, never executed. A user's mistake raises UserError, with a one-line message that names the place
and the closest valid name. `run_script` prints the message and exits with code 2.

Left out on purpose: nested keys, environment variables, YAML, and `--key value` with a space.
"""

import ast
import dataclasses
import difflib
import inspect
import os
import re
import signal
import sys
import types
import typing
from pathlib import Path
from typing import Any


class UserError(ValueError):
    """A mistake in the input, not in the program. It is shown as one line, never as a traceback."""


def did_you_mean(matches: list[str]) -> str:
    return f", did you mean {matches[0]!r}?" if matches else ""


# ---- Types ------------------------------------------------------------------------------------------------

def alternatives(hint: Any) -> tuple:
    """The members of a union: `int | None` -> (int, NoneType). Any other annotation -> (itself,)."""
    # `int | None` and typing.Optional[int] have different origins.
    return typing.get_args(hint) if typing.get_origin(hint) in (typing.Union, types.UnionType) else (hint,)


def type_name(hint: Any) -> str:
    """The spelling of an annotation in messages and in --help: `int`, `adamw|muon`, `float or None`."""
    if typing.get_origin(hint) is typing.Literal:
        return "|".join(str(choice) for choice in typing.get_args(hint))
    if hint is types.NoneType:
        return "None"  # its own name is NoneType
    names = [type_name(kind) if kind != hint else str(getattr(kind, "__name__", kind))
             for kind in alternatives(hint)]
    return " or ".join(names)


def coerce(value: Any, kind: Any) -> Any:
    """Return `value` as `kind`: 3 is a valid float and 1e9 a valid int. Raises TypeError if it does not fit.

    True, nan and numbers of 2**63 and more in magnitude are not valid numbers.
    """
    origin = typing.get_origin(kind)
    # bool is a subclass of int, so it is excluded by hand. The comparison is False for nan.
    is_number = isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < 2**63
    if origin is typing.Literal:
        fits = value in typing.get_args(kind)
    elif kind is float and is_number:
        return float(value)
    elif kind is int and is_number and value == value // 1:  # 1e9 is a float, but a whole number
        return int(value)
    else:
        # list[str] has the origin list: only the container's type is checked, not its elements.
        fits = type(value) is (origin or kind) and kind not in (int, float)
    if not fits:
        raise TypeError
    return value


def parse(text: str, hint: Any, place: str) -> Any:
    """Parse one command-line value: "1e-3" as float is 0.001, "None" as `str | None` is None."""
    kinds = alternatives(hint)
    if text == "None" and types.NoneType in kinds:
        return None
    for kind in kinds:  # in the order of the annotation: `list | str` tries a list first
        if kind is str or (typing.get_origin(kind) is typing.Literal and text in typing.get_args(kind)):
            return text
        if (typing.get_origin(kind) or kind) in (bool, int, float, list, dict):
            try:
                return coerce(ast.literal_eval(text), kind)  # literals only: no names, no calls
            except (ValueError, TypeError, SyntaxError, MemoryError, RecursionError):
                continue  # thousands of open brackets raise one of the last two
    raise UserError(f"{place}={text}: expected {type_name(hint)}")


def field_type(schema: type, key: str, place: str) -> Any:
    """The annotation of the field `key`. Raises UserError with the closest name if there is no such field."""
    names = [field.name for field in dataclasses.fields(schema)]
    if key not in names:
        # get_type_hints would also list class attributes, which are not keys.
        matches = difflib.get_close_matches(key, names, n=1, cutoff=0.5)
        raise UserError(f"{place}: unknown key {key!r}{did_you_mean(matches)} (--help lists them all)")
    return typing.get_type_hints(schema)[key]  # resolves annotations that are written as strings


def coerce_field(schema: type, key: str, value: Any, place: str) -> Any:
    """Return `value` with the type of the field `key`; an int may become a float. Raises UserError."""
    hint = field_type(schema, key, place)
    for kind in alternatives(hint):
        try:
            return coerce(value, kind)
        except TypeError:
            continue
    raise UserError(f"{place}: {key} = {value!r}: expected {type_name(hint)}")


# ---- Sources of values ------------------------------------------------------------------------------------

def read_config_file(path: str) -> dict[str, tuple[Any, str]]:
    """Run a file of assignments. Returns {name: (value, "path:line")} for the public names that it binds."""
    try:
        tree = ast.parse(Path(path).read_text(encoding="utf-8"), path)
    except FileNotFoundError:
        matches = difflib.get_close_matches(path, map(str, Path("config").glob("*.py")), n=1)
        hint = f"no such config file{did_you_mean(matches)} (options are written --key=value)"
        raise UserError(f"{path}: {hint}") from None
    except (SyntaxError, UnicodeDecodeError, IsADirectoryError) as error:
        # Only a SyntaxError has a line number, and it may be None.
        raise UserError(f"{path}:{getattr(error, 'lineno', 1) or 1}: not a config file: {error}") from None
    # The line of each assignment, for messages such as "config/x.py:3: unknown key".
    lines = {name.id: node.lineno for node in ast.walk(tree) if isinstance(node, ast.Assign | ast.AnnAssign)
             for name in ast.walk(node) if isinstance(name, ast.Name) and isinstance(name.ctx, ast.Store)}
    names: dict[str, Any] = {"__file__": path}
    try:
        exec(compile(tree, path, "exec"), names)  # the user's own file, as in nanoGPT; never a stranger's
    except (Exception, SystemExit) as error:
        raise UserError(f"{path}: {type(error).__name__}: {error}") from None
    # A file may import math and keep private helpers: neither is a key.
    return {name: (value, f"{path}:{lines.get(name, 1)}") for name, value in names.items()
            if not name.startswith("_") and not isinstance(value, types.ModuleType)}


def default_value(field: dataclasses.Field) -> Any:
    return field.default if field.default_factory is dataclasses.MISSING else field.default_factory()


def field_comments(schema: type) -> dict[str, str]:
    """{field: comment at the end of its line} for a dataclass and its bases, read from their source code."""
    comments: dict[str, str] = {}
    for cls in reversed(schema.__mro__):  # bases first, so that a redefined field has its own comment
        if dataclasses.is_dataclass(cls):
            # Four spaces, a name, a colon: a field. The comment is what follows the first # of the line.
            comments |= re.findall(r"^ {4}(\w+):[^#\n]*#\s*(.*)$", inspect.getsource(cls), re.MULTILINE)
    return comments


def help_text(schema: type, usage: str) -> str:
    """The --help page: `usage`, then one line per key with its default, its type and its comment."""
    comments, hints = field_comments(schema), typing.get_type_hints(schema)
    # Column 40: almost every --key=default is shorter.
    lines = [f"  --{field.name}={default_value(field)}".ljust(40)
             + f" {type_name(hints[field.name])}: {comments[field.name]}"
             for field in dataclasses.fields(schema)]
    return f"{usage.strip()}\n\nkeys (--key=value, or `key = value` in a config file):\n" + "\n".join(lines)


def configure(schema: type, argv: list[str], usage: str = "") -> tuple[Any, dict[str, str]]:
    """Build an instance of `schema` from config files and `--key=value` arguments.

    Returns the frozen instance and `provenance`: the place where each explicitly set key was set
    (`config/x.py:3` or `command line`). --help prints the keys and exits with code 0. Raises UserError for an
    unknown key, a wrong type, a value outside a Literal, an unreadable config file, and anything that the
    schema's __post_init__ refuses.
    """
    if {"--help", "-h"} & set(argv):
        print(help_text(schema, usage))
        raise SystemExit(0)
    values, provenance = {}, {}
    for arg in argv:  # in order, so that a file after an option overrides the option
        if not arg.startswith("--"):
            for key, (value, place) in read_config_file(arg).items():
                values[key], provenance[key] = coerce_field(schema, key, value, place), place
            continue
        key, equals, text = arg[2:].partition("=")  # the first = only: a value may contain more of them
        if not equals:
            raise UserError(f"command line: {arg}: write --{key}=value")
        hint = field_type(schema, key, "command line")
        # `--out_dir=$OUT` with OUT unset is a mistake, unless the default is the empty string too.
        if not text and getattr(schema, key, None) != "":
            raise UserError(f"command line: {arg}: no value (an empty variable?)")
        values[key], provenance[key] = parse(text, hint, f"command line: --{key}"), "command line"
    return schema(**values), provenance  # __post_init__ checks ranges and combinations


# ---- Help for schemas -------------------------------------------------------------------------------------

def override(config: Any, changes: dict, place: str) -> Any:
    """A copy of `config` with `changes`. Each is checked like a config file's assignment at `place`."""
    checked = {key: coerce_field(type(config), key, value, place) for key, value in changes.items()}
    return dataclasses.replace(config, **checked)


def differences(config: Any) -> dict[str, Any]:
    """The fields of `config` whose value is not the default."""
    return {field.name: getattr(config, field.name) for field in dataclasses.fields(config)
            if getattr(config, field.name) != default_value(field)}


def require(config: Any, key: str, fits: bool, rule: str) -> None:
    """Raise UserError "key=value: must be <rule>" unless `fits`."""
    if not fits:
        raise UserError(f"{key}={getattr(config, key)}: must be {rule}")


# In the next two functions None passes: it means that the value is derived later.

def require_positive(config: Any, *keys: str) -> None:
    """Raise UserError for the first of these keys whose value is 0 or less. None passes."""
    for key in keys:
        require(config, key, getattr(config, key) is None or getattr(config, key) > 0, "positive")


def require_not_negative(config: Any, *keys: str) -> None:
    """Raise UserError for the first of these keys whose value is below 0. None passes."""
    for key in keys:
        require(config, key, getattr(config, key) is None or getattr(config, key) >= 0, "at least 0")


# ---- Programs ---------------------------------------------------------------------------------------------

def run_script(main: typing.Callable[[list[str]], int | None]) -> None:
    """Run `main(argv)` as a program and exit with its return code.

    Other exit codes: 2 for a user's mistake (one line on stderr), 130 for Ctrl-C, 1 for a bug of ours (with
    its traceback). An OSError is a user's mistake too: a missing or unreadable file, or a full disk.
    """
    first_rank = os.environ.get("RANK", "0") == "0"  # only one of torchrun's processes prints the message
    for name in ("stdout", "stderr"):
        if getattr(sys, name) is None:  # the shell closed it (`>&-`), and print would raise
            setattr(sys, name, open(os.devnull, "w"))
        # A model may write any character; a terminal that cannot show one gets its escape, not a crash.
        getattr(sys, name).reconfigure(errors="backslashreplace")
    try:
        sys.exit(main(sys.argv[1:]))
    except BrokenPipeError:  # `... | head`: the reader is gone
        # Python flushes stdout at exit, which would raise once more.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(128 + signal.SIGPIPE)  # the code that a shell reports for this signal
    except (UserError, OSError) as error:
        # All ranks raise the same UserError, but an OSError may concern one rank's machine only.
        if first_rank or not isinstance(error, UserError):
            print(f"{Path(sys.argv[0]).name}: {' '.join(str(error).split())}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        sys.exit(130)  # 128 + SIGINT
