"""Configuration: a dataclass's defaults, then config files and --key=value in the order given. The last wins.

    cfg, provenance = configure(TrainConfig, ["config/train_shakespeare.py", "--max_steps=200"])

The dataclass is the whole schema. Its annotations are the types and its defaults are the defaults. The
comment at the end of a field's line is its --help text. --help reads these comments from the source code, so
the source must be there at run time; a test checks that every field has a comment.

A config file is Python: plain assignments, which run in their own namespace. Values from the command line
are parsed, never executed. `--key` without a value means True.

A user's mistake raises UserError, with a one-line message that names the place and the closest valid name.
`run_script` prints the message and exits with code 2. A key of another tool, such as --lr, is never accepted;
the message has our name for it (config/other_names.toml).

Left out on purpose: nested keys, environment variables, YAML, and `--key value` with a space.
"""

import ast
import dataclasses
import difflib
import functools
import importlib
import inspect
import os
import re
import signal
import sys
import time
import tomllib
import types
import typing
from pathlib import Path
from typing import Any

from tqdm import tqdm


class UserError(ValueError):
    """A mistake in the input, not in the program. It is shown as one line, never as a traceback."""


def did_you_mean(matches: list[str]) -> str:
    return f", did you mean {matches[0]!r}?" if matches else ""


def version() -> str:
    """The version of nanollama, from pyproject.toml."""
    # From the file: there is no installed package whose metadata importlib could read.
    text = (Path(__file__).parent / "pyproject.toml").read_text(encoding="utf-8")
    return tomllib.loads(text)["project"]["version"]


# ---- Names ------------------------------------------------------------------------------------------------

@functools.cache
def other_names() -> dict[str, str]:
    """{our key, perhaps with an explanation: names that other tools have for it}."""
    return tomllib.loads((Path(__file__).parent / "config/other_names.toml").read_text(encoding="utf-8"))


def other_name(key: str, names: list[str]) -> str:
    """Our answer to another tool's spelling of a key: "learning_rate" for "lr"; "" if there is none."""
    if key in names:  # it was written with dashes or in capitals
        return key
    if key.startswith("no_") and key[3:] in names:
        return f"{key[3:]}=False"
    return next((answer for answer, others in other_names().items()
                 if key in others.split() and answer.split()[0] in names), "")


def close_names(key: str, names: list[str]) -> list[str]:
    """[the name that `key` misspells], or []. Every word must be close: min_lr is not taken for max_lr."""
    if any(key in others.split() for others in other_names().values()):
        return []  # another tool's key, for which this script has no counterpart
    similar = [name for name in names if all(difflib.get_close_matches(word, [name, *name.split("_")], 1, 0.7)
                                             for word in key.split("_"))]
    return difflib.get_close_matches(key, similar, n=1, cutoff=0.75)


# ---- Types ------------------------------------------------------------------------------------------------

def alternatives(hint: Any) -> tuple:
    """The members of a union: `int | None` -> (int, NoneType). Any other annotation -> (itself,)."""
    # `int | None` and typing.Optional[int] have different origins.
    return typing.get_args(hint) if typing.get_origin(hint) in (typing.Union, types.UnionType) else (hint,)


def type_name(hint: Any) -> str:
    """The spelling of an annotation in messages and in --help: `int`, `True|False`, `float or None`."""
    if typing.get_origin(hint) is typing.Literal:
        return "|".join(str(choice) for choice in typing.get_args(hint))
    if hint in (bool, types.NoneType):
        return "True|False" if hint is bool else "None"  # the values, as they are written
    names = [type_name(kind) if kind != hint else str(getattr(kind, "__name__", kind))
             for kind in alternatives(hint)]
    return " or ".join(names)


def coerce(value: Any, kind: Any) -> Any:
    """Return `value` as `kind`: 3 is a valid float and 1e9 a valid int. Raises TypeError if it does not fit.

    Booleans, nan and magnitudes of 2**63 or more are not valid numbers.
    """
    origin = typing.get_origin(kind)
    # bool is a subclass of int, so it is excluded by hand. The comparison is False for nan.
    is_number = isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < 2**63
    if origin is typing.Literal:
        fits = isinstance(value, str) and value in typing.get_args(kind)
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
    """Parse one command-line value: "1e-3" as float is 0.001, "true" as bool is True, "None" is None."""
    kinds = alternatives(hint)
    if text == "None" and types.NoneType in kinds:
        return None
    for kind in kinds:  # in the order of the annotation: `list | str` tries a list first
        try:
            if kind is str or typing.get_origin(kind) is typing.Literal:
                return coerce(text, kind)
            # literal_eval knows literals only: no names, no calls. Booleans may be written true and TRUE.
            return coerce(ast.literal_eval(text.capitalize() if kind is bool else text), kind)
        except (ValueError, TypeError, SyntaxError, MemoryError, RecursionError):
            continue  # thousands of open brackets raise one of the last two
    raise UserError(f"{place}={text}: expected {type_name(hint)}")


def field_type(schema: type, key: str, place: str) -> Any:
    """The annotation of the field `key`. Raises UserError with the right name if there is no such field."""
    # get_type_hints would also list class attributes, which are not keys.
    names = [field.name for field in dataclasses.fields(schema)]
    if key not in names:
        spelling = key.replace("-", "_").lower()
        if answer := other_name(spelling, names):
            raise UserError(f"{place}: unknown key {key!r}: here it is {answer}")
        raise UserError(f"{place}: unknown key {key!r}{did_you_mean(close_names(spelling, names))} "
                        "(--help lists them all)")
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
        tree = ast.parse(Path(path).read_text(encoding="utf-8-sig"), path)  # Notepad writes a BOM
    except FileNotFoundError:
        matches = difflib.get_close_matches(path, map(str, Path("config").glob("*.py")), n=1)
        hint = f"no such config file{did_you_mean(matches)} (options are written --key=value)"
        raise UserError(f"{path}: {hint}") from None
    except (SyntaxError, ValueError, RecursionError, MemoryError, IsADirectoryError) as error:
        # Only a SyntaxError has a line number, and it may be None.
        raise UserError(f"{path}:{getattr(error, 'lineno', 1) or 1}: not a config file: {error}") from None
    # The line of each assignment, for messages such as "config/x.py:3: unknown key".
    lines = {name.id: node.lineno for node in ast.walk(tree) if isinstance(node, ast.Assign | ast.AnnAssign)
             for name in ast.walk(node) if isinstance(name, ast.Name) and isinstance(name.ctx, ast.Store)}
    names: dict[str, Any] = {"__file__": path}
    try:
        exec(compile(tree, path, "exec"), names)  # runs code, as in nanoGPT: pass only your own files
    except (Exception, SystemExit) as error:
        raise UserError(f"{path}: {type(error).__name__}: {error}") from None
    # A file may import math and keep private helpers: neither is a key.
    return {name: (value, f"{path}:{lines.get(name, 1)}") for name, value in names.items()
            if not name.startswith("_") and not isinstance(value, types.ModuleType)}


def default_value(field: dataclasses.Field) -> Any:
    return field.default if field.default_factory is dataclasses.MISSING else field.default_factory()


def field_comments(schema: type) -> dict[str, tuple[str, str]]:
    """{field: (section of --help, comment at the end of its line)}, read from a dataclass's source code.

    Each base class is a section, named after the first sentence of its docstring. A line `# ---- Name` in the
    class body begins another section.
    """
    comments: dict[str, tuple[str, str]] = {}
    for cls in filter(dataclasses.is_dataclass, reversed(schema.__mro__)):
        section = "This script only" if cls is schema else str(cls.__doc__).partition(".")[0]
        for line in inspect.getsource(cls).splitlines():
            if match := re.match(r" {4}# ---- (.*)", line):
                section = match[1].strip(" -")
            # Four spaces, a name, a colon: a field. The comment is what follows the first # of the line.
            elif match := re.match(r" {4}(\w+):[^#]*#\s*(.*)", line):
                # A redefined field has its own comment, in the section of its base.
                comments[match[1]] = comments.get(match[1], (section, ""))[0], match[2]
    return comments


def help_text(schema: type, usage: str) -> str:
    """The --help page: `usage`, then the keys by section, each with its default, its type and its comment."""
    comments, hints = field_comments(schema), typing.get_type_hints(schema)
    sections: dict[str, str] = {}
    for field in dataclasses.fields(schema):
        section, comment = comments[field.name]
        line = f"  --{field.name}={default_value(field)}".ljust(40)  # almost every --key=default is shorter
        line += f" {type_name(hints[field.name])}: {comment}"
        sections[section] = sections.get(section, f"\n{section}:") + f"\n{line}"
    pages = list(sections.values())
    if len(pages) == 1:  # a single section needs no name
        pages = pages[0].split("\n", 2)[2:]  # without the empty line and the line of the name
    return f"{usage.strip()}\n\nkeys (--key=value, or `key = value` in a config file):\n" + "\n".join(pages)


def parse_argument(schema: type, arg: str) -> tuple[str, Any]:
    """("max_steps", 200) for "--max_steps=200". Raises UserError for an unknown key or a wrong value."""
    key, equals, text = arg[2:].partition("=")  # the first = only: a value may contain more of them
    if key == "config":
        raise UserError(f"command line: {arg}: write the name of the file alone, without --config=")
    hint = field_type(schema, key, "command line")
    if not equals:
        if bool not in alternatives(hint):
            raise UserError(f"command line: {arg}: write --{key}=value")
        return key, True
    # `--out_dir=$OUT` with OUT unset is a mistake, unless the default is the empty string too.
    if not text and getattr(schema, key, None) != "":
        raise UserError(f"command line: {arg}: no value (an empty variable?)")
    return key, parse(text, hint, f"command line: --{key}")


def configure(schema: type, argv: list[str], usage: str = "") -> tuple[Any, dict[str, str]]:
    """Build an instance of `schema` from config files and `--key=value` arguments.

    Returns the frozen instance and `provenance`: the place where each explicitly set key was set
    (`config/x.py:3` or `command line`). --help prints the keys and exits with code 0. Raises UserError for an
    unknown key, a wrong type, a value outside a Literal, an unreadable config file, and anything that the
    schema's __post_init__ refuses. --version prints the version.
    """
    if {"--help", "-h"} & set(argv):
        print(help_text(schema, usage))
        raise SystemExit(0)
    if "--version" in argv:
        print(f"nanollama {version()}")
        raise SystemExit(0)
    # provenance records what the user has set, even if the value equals the default.
    values, provenance = {}, {}
    for arg in argv:  # in order, so that a file after an option overrides the option
        if arg.startswith("--"):
            key, value = parse_argument(schema, arg)
            values[key], provenance[key] = value, "command line"
            continue
        for key, (value, place) in read_config_file(arg).items():
            values[key], provenance[key] = coerce_field(schema, key, value, place), place
    # An argument that is not UTF-8 arrives with lone surrogates, which no tokenizer and no JSON file takes.
    for key, value in values.items():
        if isinstance(value, str) and value.encode("utf-8", "ignore").decode() != value:
            raise UserError(f"{provenance[key]}: {key} is not UTF-8 (rename the file, or set PYTHONUTF8=1)")
    source = values.get("init_from")
    if source in ("scratch", "resume") and not Path(source).exists():  # values of nanoGPT
        raise UserError(f"{provenance['init_from']}: init_from={source}: leave the key out; a new run starts "
                        "from random weights, and the same command again resumes a run")
    try:
        return schema(**values), provenance  # __post_init__ checks ranges and combinations
    except UserError as error:
        # If a config file set the key, "max_steps=0: must be positive" needs the file's name, too.
        place = provenance.get(str(error).partition("=")[0], "command line")
        raise UserError(str(error) if place == "command line" else f"{place}: {error}") from None


# ---- Help for schemas -------------------------------------------------------------------------------------

def override(config: Any, changes: dict, place: str) -> Any:
    """A copy of `config` with `changes`. Each is checked like a config file's assignment at `place`."""
    # replace() runs __post_init__ again, so ranges and combinations are checked as well.
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
    for key in keys:  # nan > 0 is False, so nan is refused as well
        require(config, key, getattr(config, key) is None or getattr(config, key) > 0, "positive")


def require_not_negative(config: Any, *keys: str) -> None:
    """Raise UserError for the first of these keys whose value is below 0. None passes."""
    for key in keys:
        require(config, key, getattr(config, key) is None or getattr(config, key) >= 0, "at least 0")


def optional_import(module: str, key: str, package: str = "") -> Any:
    """Import a module of an optional package. Raises UserError, which names the key, if it is missing."""
    # Not only ModuleNotFoundError: a package may be there without a part that it needs.
    try:
        return importlib.import_module(module)
    except ImportError:
        package = package or module.partition(".")[0]
        raise UserError(f"{key}: needs the package {package} (pip install {package})") from None


# ---- Programs ---------------------------------------------------------------------------------------------

class ProgressBar(tqdm):
    """tqdm's bar on a terminal. In a log file, it is a line of text that follows at most every 30 seconds."""

    def __init__(self, *args: Any, **options: Any):
        self.is_log = not sys.stderr.isatty()
        rare = {"delay": 30, "mininterval": 30, "miniters": 1} if self.is_log else {}
        super().__init__(*args, leave=False, **rare, **options)

    def display(self, msg: str | None = None, pos: int | None = None) -> None:
        if not self.is_log:
            super().display(msg, pos)
        elif msg is None:  # "" erases the bar at its end
            print(self, file=sys.stderr, flush=True)


def run_script(main: typing.Callable[[list[str]], int | None]) -> None:
    """Run `main(argv)` as a program and exit with its return code; None is 0.

    Other exit codes: 2 for a user's mistake (one line on stderr), 130 for Ctrl-C, 1 for a bug of ours (with
    its traceback). An OSError is a user's mistake too: a missing or unreadable file, or a full disk. So is a
    model or a batch that does not fit into memory.
    """
    first_rank = os.environ.get("RANK", "0") == "0"  # only one of torchrun's processes prints the message
    for name in ("stdout", "stderr"):
        if getattr(sys, name) is None:  # the shell closed it (`>&-`), and print would raise
            setattr(sys, name, open(os.devnull, "w"))
        # A model may write any character; a terminal that cannot show one gets its escape, not a crash.
        getattr(sys, name).reconfigure(errors="backslashreplace")
    try:
        sys.exit(main(sys.argv[1:]) or 0)
    except BrokenPipeError:  # `... | head`: the reader is gone
        # Python flushes stdout at exit, which would raise once more.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(128 + signal.SIGPIPE)  # the code that a shell reports for this signal
    except (UserError, OSError) as error:
        # torchrun stops all processes as soon as one ends. So a UserError of all ranks is printed by the
        # first alone, and one that another rank raises alone (its reward has failed) 10 seconds later.
        if not first_rank and isinstance(error, UserError):
            time.sleep(10)
        print(f"{Path(sys.argv[0]).name}: {' '.join(str(error).split())}", file=sys.stderr)
        sys.exit(2)
    except (MemoryError, RuntimeError) as error:  # torch's RuntimeError: only its text names the memory
        reason = str(error).split("\n")[0]
        if isinstance(error, RuntimeError) and not re.search("out of memory|can't allocate memory", reason):
            raise
        print(f"{Path(sys.argv[0]).name}: out of memory: use smaller sizes or batches ({reason})",
              file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        sys.exit(130)  # 128 + SIGINT
