"""Read the rows of a benchmark, from local files or from the Hugging Face hub.

    rows = read("../data", "mmlu", hub="cais/mmlu:all:test")
    questions = convert(rows, question_of)

The name of a local file begins with the benchmark's name, in any case: mmlu*.jsonl.gz anywhere below the
folder. Formats: JSON lines, JSON (a list, or an object of lists, which are its splits), Parquet and
tab-separated values, each also compressed (.gz .xz .zst).
"""

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

from configurator import UserError
from dataset.conversations import is_list_of_dicts
from dataset.sources import file_kind, files_under, find_files, hub_rows, read_rows, row_value, usable_rows

ROW_KINDS = {".jsonl", ".json", ".parquet", ".tsv"}
LONGER_NAMES = ("mmlu_pro",)  # tasks whose names begin with the name of another task


class Questions(NamedTuple):
    """What load() of a task with worked examples passes to its score()."""

    asked: list[Any]  # the questions
    shots: list[Any]  # the worked examples before each


# ---- Values of a row --------------------------------------------------------------------------------------
# A benchmark with one wrong label measures something else, so these functions guess nothing. `convert` turns
# what they raise into a UserError with the file and the row.

def text_of(value: Any) -> str:
    """The value, if it is a text. Raises TypeError for null, a number, a list or an object."""
    if not isinstance(value, str):
        raise TypeError(f"{value!r} is not a text")
    return value


def texts_of(values: Any) -> list[str]:
    """A list of texts. Raises TypeError for anything else; a single text is not a list of letters."""
    if not isinstance(values, list):
        raise TypeError(f"{values!r} is not a list")
    return [text_of(value) for value in values]


def answer_text(value: Any) -> str:
    """A right answer as text. Raises ValueError for a blank one, which an empty answer would match."""
    if not text_of(value).strip():
        raise ValueError("the right answer is blank")
    return value


def label_number(value: Any, count: int) -> int:
    """A label that is a number from 0 to count - 1. Raises ValueError for True, 1.0 and "1"."""
    if type(value) is not int or not 0 <= value < count:
        raise ValueError(f"the label {value!r} is not a whole number from 0 to {count - 1}")
    return value


def label_index(value: Any, labels: list[str]) -> int:
    """The index of a label in a list of labels. Raises ValueError unless the list has it exactly once."""
    if labels.count(value) != 1:
        raise ValueError(f"the label {value!r} is not one of {', '.join(labels)}")
    return labels.index(value)


def label_of(value: Any, labels: list[str]) -> int:
    """The index of a label, which some files have as a number, and others as one of `labels`."""
    return label_number(value, len(labels)) if isinstance(value, int) else label_index(value, labels)


def convert(rows: list[dict[str, Any]], convert_row: Callable[[dict[str, Any]], Any]) -> list[Any]:
    """convert_row(row) for each row. Raises UserError with file and row number if that fails."""
    results = []
    for number, row in enumerate(rows, 1):
        try:
            results.append(convert_row(row))
        except (KeyError, IndexError, TypeError, ValueError, AttributeError) as error:
            reason = f"{type(error).__name__}: {error}"
            raise UserError(f"{row['file']}: row {number} does not fit this benchmark ({reason})") from None
    return results


def with_last_as_shots(rows: list[dict[str, Any]], limit: int, shots: int,
                       convert_row: Callable[[dict[str, Any]], Any]) -> Questions:
    """The first `limit` rows as questions, and the last `shots`, which are not asked, as worked examples."""
    first_shot = len(rows) - shots
    if first_shot <= 0:
        raise UserError(f"shots={shots}: there are {len(rows)} rows, so none is left to ask")
    return Questions(convert(rows[:min(first_shot, limit)], convert_row),
                     convert(rows[first_shot:], convert_row))


def find(source: str, name: str, kinds: set[str] = ROW_KINDS) -> list[Path]:
    """Files of a benchmark: `source` itself if it is a file, else the files named `name`* below it, sorted.

    Raises UserError if there are none, or if a file is there twice, compressed and not.
    """
    root = Path(source)
    if not root.exists():
        raise UserError(f"data={source}: no such file or folder")
    if root.is_file():
        return [root]
    # eval.py writes its own output to answers/.
    candidates, _ = files_under(root, lambda part: part.startswith(".") or part == "answers")
    others = tuple(longer for longer in LONGER_NAMES if longer.startswith(name) and longer != name)
    files = [path for path in candidates if path.name.lower().startswith(name.lower())
             and not path.name.lower().startswith(others) and file_kind(path) in kinds]
    if not files:
        raise UserError(f"data={source}: no file {name}*; give --data=TASK=PLACE (without --data: the hub)")
    unpacked = {path.with_name(path.name.lower().partition(file_kind(path))[0]): path for path in files}
    if twice := sorted(set(files) - set(unpacked.values())):
        raise UserError(f"{twice[0]}: the folder has another file of this name; give --data=TASK=FILE")
    return files


def benchmark_rows(path: Path) -> Iterator[dict[str, Any]]:
    """The rows of a file. Raises UserError with the place of a row that cannot be read."""
    files, _ = find_files(str(path), "data", ROW_KINDS)
    rows = list(read_rows(files))
    for row, value in usable_rows(rows, row_value):
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


def read(source: str | None, name: str, hub: str) -> list[dict[str, Any]]:
    """All rows of a benchmark. Raises UserError if there are none, or if a row is not valid text.

    source: a local file or folder; None reads the hub's data set `hub`, which is NAME:CONFIG:SPLIT. Rows keep
    their own keys. Added are "file", the name of the file, and "split", if a row is in one of several named
    lists. A line of a .tsv becomes {"fields": [..]}.
    """
    if source is None:
        try:
            rows = [{**row.content, "file": hub} for row in hub_rows(hub)]
        except UserError as error:
            raise UserError(f"{name}: {error}; local files: --data=FOLDER or --data={name}=FILE") from None
    else:
        rows = [row for path in find(source, name) for row in benchmark_rows(path)]
    if not rows:
        raise UserError(f"{source or 'hf:' + hub}: no rows in it")
    for number, row in enumerate(rows, 1):
        try:
            json.dumps(row, ensure_ascii=False, default=str).encode()
        except UnicodeEncodeError:
            raise UserError(f"{row['file']}: row {number} has a lone surrogate") from None
    return rows
