"""Configuration: a frozen dataclass <- config/x.py <- --key=value, each later one wins.

    cfg, given = configure(TrainConfig, ["config/train_shakespeare.py", "--max_steps=200"])

The dataclass is the whole schema: its annotations are the types, its defaults the defaults, and the comment
that trails each field is the --help text. A config file is plain assignments, run in a namespace of its own.
Values from the command line are parsed, never executed. Whatever a user can get wrong ends in a UserError:
one line that names the place and the nearest right name. `run_script` turns it into exit code 2.

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


class UserError(ValueError):
    """A fault of the input, not of the program: shown as one line, never as a traceback."""


def configure(schema: type, argv: list[str], usage: str = "") -> tuple[typing.Any, dict[str, str]]:
    """Build `schema` from config files and `--key=value` words.

    Returns the frozen instance and `provenance`: the place each explicitly set key came from (`config/x.py:3` or
    `command line`). Prints the keys and exits 0 on --help. Raises UserError for an unknown key, a wrong type,
    a value outside a Literal, an unreadable config file, or whatever the schema's own __post_init__ refuses.
    """
    if {"--help", "-h"} & set(argv):
        print(help_text(schema, usage))
        raise SystemExit(0)
    values, provenance = {}, {}
    for word in argv:
        if word.startswith("--"):
            key, equals, text = word[2:].partition("=")
            if not equals:
                raise UserError(f"command line: {word}: write --{key}=value")
            hint = field_types(schema, key, "command line")[key]
            if not text and getattr(schema, key, None) != "":
                raise UserError(f"command line: {word}: no value (an empty variable?)")
            values[key] = parse(text, hint, f"command line: --{key}")
            provenance[key] = "command line"
        else:
            for key, (value, place) in read_config_file(word).items():
                values[key] = coerce_field(schema, key, value, place)
                provenance[key] = place
    return schema(**values), provenance


def read_config_file(path: str) -> dict[str, tuple[typing.Any, str]]:
    """Run a file of assignments; returns {name: (value, "path:line")} of the public names it binds."""
    try:
        tree = ast.parse(Path(path).read_text(encoding="utf-8"), path)
    except FileNotFoundError:
        near = difflib.get_close_matches(path, map(str, Path("config").glob("*.py")), n=1)
        hint = f"no such config file{did_you_mean(near)} (options are written --key=value)"
        raise UserError(f"{path}: {hint}") from None
    except (SyntaxError, UnicodeDecodeError, IsADirectoryError) as error:
        raise UserError(f"{path}:{getattr(error, 'lineno', 1) or 1}: not a config file: {error}") from None
    lines = {n.id: node.lineno for node in ast.walk(tree) if isinstance(node, ast.Assign | ast.AnnAssign)
             for n in ast.walk(node) if isinstance(n, ast.Name) and isinstance(n.ctx, ast.Store)}
    names: dict[str, typing.Any] = {"__file__": path}
    try:
        exec(compile(tree, path, "exec"), names)  # the user's own file, as in nanoGPT; never a stranger's
    except (Exception, SystemExit) as error:
        raise UserError(f"{path}: {type(error).__name__}: {error}") from None
    return {name: (value, f"{path}:{lines.get(name, 1)}") for name, value in names.items()
            if not name.startswith("_") and not isinstance(value, types.ModuleType)}


def override(config: typing.Any, changes: dict, place: str) -> typing.Any:
    """A copy of `config` with `changes`, each checked like a config file's assignment at `place`."""
    return dataclasses.replace(config, **{k: coerce_field(type(config), k, v, place) for k, v in changes.items()})


def require(config: typing.Any, key: str, fits: bool, rule: str) -> None:
    """UserError "key=value: must be <rule>" unless `fits`."""
    if not fits:
        raise UserError(f"{key}={getattr(config, key)}: must be {rule}")


def require_positive(config: typing.Any, *keys: str) -> None:
    """UserError for the first of these keys whose value is 0 or less; None passes."""
    for key in keys:
        require(config, key, getattr(config, key) is None or getattr(config, key) > 0, "positive")


def require_not_negative(config: typing.Any, *keys: str) -> None:
    """UserError for the first of these keys whose value is below 0; None passes."""
    for key in keys:
        require(config, key, getattr(config, key) is None or getattr(config, key) >= 0, "not negative")


def field_types(schema: type, key: str, place: str) -> dict[str, typing.Any]:
    """The schema's annotations by field name; raises UserError if `key` is not one of them."""
    hints = typing.get_type_hints(schema)
    hints = {field.name: hints[field.name] for field in dataclasses.fields(schema)}
    if key not in hints:
        near = difflib.get_close_matches(key, hints, n=1, cutoff=0.5)
        raise UserError(f"{place}: unknown key {key!r}{did_you_mean(near)} (--help lists them all)")
    return hints


def did_you_mean(near: list[str]) -> str:
    return f", did you mean {near[0]!r}?" if near else ""


def alternatives(hint: typing.Any) -> tuple:
    """`int | None` -> (int, NoneType); anything else -> (itself,)."""
    return typing.get_args(hint) if typing.get_origin(hint) in (typing.Union, types.UnionType) else (hint,)


def type_name(hint: typing.Any) -> str:
    """How a message and --help spell an annotation: `int`, `adamw|muon`, `float or None`."""
    if typing.get_origin(hint) is typing.Literal:
        return "|".join(str(choice) for choice in typing.get_args(hint))
    if hint is types.NoneType:
        return "None"
    names = [type_name(h) if h != hint else str(getattr(h, "__name__", h)) for h in alternatives(hint)]
    return " or ".join(names)


def parse(text: str, hint: typing.Any, place: str) -> typing.Any:
    """One command-line value by its annotation: "1e-3" as float is 0.001, "None" as `str | None` is None."""
    kinds = alternatives(hint)
    if text == "None" and types.NoneType in kinds:
        return None
    for kind in kinds:
        if kind is str:
            return text
        if typing.get_origin(kind) is typing.Literal and text in typing.get_args(kind):
            return text
        if (typing.get_origin(kind) or kind) in (bool, int, float, list, dict):
            try:
                return coerce(ast.literal_eval(text), kind)
            except (ValueError, TypeError, SyntaxError, MemoryError, RecursionError):
                continue
    raise UserError(f"{place}={text}: expected {type_name(hint)}")


def coerce_field(schema: type, key: str, value: typing.Any, place: str) -> typing.Any:
    """`value` as the field `key` of `schema` has it (an int may become a float). Raises UserError."""
    hint = field_types(schema, key, place)[key]
    for kind in alternatives(hint):
        try:
            return coerce(value, kind)
        except TypeError:
            continue
    raise UserError(f"{place}: {key} = {value!r}: expected {type_name(hint)}")


def coerce(value: typing.Any, kind: typing.Any) -> typing.Any:
    """`value` as `kind`: 3 is a float, 1e9 is an int; True, nan and 1e19 are no numbers. Raises TypeError."""
    origin = typing.get_origin(kind)
    is_number = isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < 2**63
    if origin is typing.Literal:
        fits = value in typing.get_args(kind)
    elif kind is float and is_number:
        return float(value)
    elif kind is int and is_number and value == value // 1:
        return int(value)
    else:
        fits = type(value) is (origin or kind) and kind not in (int, float)
    if not fits:
        raise TypeError
    return value


def field_comments(schema: type) -> dict[str, str]:
    """{field: trailing comment} of a dataclass and its bases, read from their source."""
    comments: dict[str, str] = {}
    for cls in reversed(schema.__mro__):
        if dataclasses.is_dataclass(cls):
            comments |= re.findall(r"^ {4}(\w+):[^#\n]*#\s*(.*)$", inspect.getsource(cls), re.MULTILINE)
    return comments


def help_text(schema: type, usage: str) -> str:
    """The --help page: the script's docstring, then one line a key with type, default and comment."""
    comments, hints = field_comments(schema), typing.get_type_hints(schema)
    lines = [f"  --{f.name}={default(f)}".ljust(40) + f" {type_name(hints[f.name])}: {comments[f.name]}"
             for f in dataclasses.fields(schema)]
    return f"{usage.strip()}\n\nkeys (--key=value, or `key = value` in a config file):\n" + "\n".join(lines)


def differences(config: typing.Any) -> dict[str, typing.Any]:
    """The fields of `config` that are not at their defaults."""
    return {f.name: getattr(config, f.name) for f in dataclasses.fields(config)
            if getattr(config, f.name) != default(f)}


def default(field: dataclasses.Field) -> typing.Any:
    return field.default if field.default_factory is dataclasses.MISSING else field.default_factory()


def run_script(main: typing.Callable[[list[str]], int | None]) -> None:
    """Run `main(argv)` as a program. Exit codes: its own, or 2 for the user's fault, in one line, or 130.

    Files that are missing, unreadable or do not fit the disk (OSError) are the user's to mend as well. Every
    other exception is ours and keeps its traceback (exit code 1).
    """
    first_rank = os.environ.get("RANK", "0") == "0"  # of torchrun's processes one speaks
    for name in ("stdout", "stderr"):
        if getattr(sys, name) is None:  # closed by the shell
            setattr(sys, name, open(os.devnull, "w"))
        getattr(sys, name).reconfigure(errors="backslashreplace")  # whatever the terminal can show
    try:
        sys.exit(main(sys.argv[1:]))
    except BrokenPipeError:  # `... | head`: the reader has gone, and so may we
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(128 + signal.SIGPIPE)
    except (UserError, OSError) as error:
        if first_rank or not isinstance(error, UserError):
            print(f"{Path(sys.argv[0]).name}: {' '.join(str(error).split())}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        sys.exit(130)
