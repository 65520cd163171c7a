"""Where the questions of a benchmark come from: local files, as they are passed around, or the hub.

    rows = read("../shared/data", "mmlu", hub="cais/mmlu:all:test")

A local file is known by the beginning of its name, in any case: mmlu*.jsonl.gz below the given folder. JSON
lines, JSON (a list, or an object of lists: its splits), Parquet and tab-separated values are read, also
packed (.gz .xz .zst).
"""

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

from configurator import UserError
from dataset.conversations import is_list_of_dicts
from dataset.sources import Blank, Skip, file_kind, files_under, find_files, hub_rows, read_rows, row_value

ROW_KINDS = {".jsonl", ".json", ".parquet", ".tsv"}


class Questions(NamedTuple):
    """What a task's load() hands to its score()."""

    asked: list[Any]
    shots: list[Any]  # the worked examples before each


def convert(rows: list[dict[str, Any]], how: Callable[[dict[str, Any]], Any]) -> list[Any]:
    """Each row as how(row) makes it. UserError, with file and number, for one that it cannot read."""
    found = []
    for number, row in enumerate(rows, 1):
        try:
            found.append(how(row))
        except (KeyError, IndexError, TypeError, ValueError, AttributeError) as error:
            reason = f"{type(error).__name__}: {error}"
            raise UserError(f"{row['file']}: row {number} is not of this benchmark ({reason})") from None
    return found


def find(source: str, name: str, kinds: set[str] = ROW_KINDS) -> list[Path]:
    """The files of a benchmark: source itself where it is a file, else those below the folder whose names
    begin with `name`, sorted. UserError where there are none, or one is there packed, too."""
    root = Path(source)
    if root.is_file():
        return [root]
    inside = files_under(root, lambda part: part.startswith(".") or part == "answers")  # eval.py's own
    files = [path for path in inside
             if path.name.lower().startswith(name.lower()) and file_kind(path) in kinds]
    if not files:
        raise UserError(f"data={source}: no file {name}*; give --data=TASK=PLACE (without --data: the hub)")
    unpacked = {path.with_name(path.name.lower().partition(file_kind(path))[0]): path for path in files}
    if twice := sorted(set(files) - set(unpacked.values())):
        raise UserError(f"{twice[0]}: there is another file of this name beside it; give --data=TASK=FILE")
    return files


def read(source: str | None, name: str, hub: str) -> list[dict[str, Any]]:
    """Every row of a benchmark. UserError where there is none, or one is not text.

    source: a file or a folder of the user's; None: the hub's `hub`, which is NAME:CONFIG:SPLIT. Each row has
    the file's own keys; "split" is added where an object of lists names one, and "file" tells the file's
    name. A line of a .tsv is {"fields": [..]}.
    """
    if source is None:
        try:
            rows = [{**row.content, "file": hub} for row in hub_rows(hub, None)]
        except UserError as error:
            raise UserError(f"{name}: {error}; local files: --data=FOLDER or --data={name}=FILE") from None
    else:
        rows = [row for path in find(source, name) for row in file_rows(path)]
    if not rows:
        raise UserError(f"{source or 'hf:' + hub}: no rows in it")
    for number, row in enumerate(rows, 1):
        try:
            json.dumps(row, ensure_ascii=False, default=str).encode()
        except UnicodeEncodeError:
            raise UserError(f"{row['file']}: row {number} has a lone surrogate") from None
    return rows


def file_rows(path: Path) -> Iterator[dict[str, Any]]:
    """The rows of a file. UserError for one that cannot be read, with its place."""
    files, _ = find_files(str(path), "data", ROW_KINDS)
    rows = list(read_rows(files, None, piece=2**20))
    for row in rows:
        try:
            value = row_value(row)
        except Blank:
            continue
        except Skip as reason:
            raise UserError(f"{row.place}: {reason}") from None
        if not isinstance(value, dict):
            raise UserError(f"{row.place}: not a JSON object")
        splits = {key: items for key, items in value.items() if is_list_of_dicts(items) and items}
        if file_kind(path) == ".tsv":
            if any(value.values()):
                yield {"fields": list(value.values()), "file": path.name}
        elif file_kind(path) == ".json" and splits and len(rows) == 1:
            yield from ({**item, "split": split, "file": path.name}
                        for split, items in splits.items() for item in items)
        else:
            yield {**value, "file": path.name}
