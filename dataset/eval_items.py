"""Evaluation sets -> texts, whatever the form of their rows. (Decontamination, file 1 of 4.)

    for benchmark in find_benchmarks("eval/,gsm8k_test.jsonl,hf:openai/gsm8k:main:test")[0]:
        benchmark.name, benchmark.digest()
        for place, text in benchmark.items(): ...         # "gsm8k_test.jsonl:1", "Janet's ducks lay ..."

What an item is:

    source               item
    .jsonl .tsv          a line
    .json                an element of the array; or of each list in an object: {"dev": [..], "test": [..]}
    .parquet, hf:NAME    a row
    .txt .md .py         the file, in pieces of a MiB

An item's text is every string in the row, at any depth, in the row's order, with blank lines between them:
question, choices, answers, descriptions of functions. A key of several words is text, too (TruthfulQA's
choices are keys). A value of one word is not: it is an id, a subject, a role, a label, or "yes".
"""

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from configurator import UserError
from dataset.conversations import is_list_of_dicts
from dataset.sources import KINDS, Row, file_kind, find_files, hub_rows, read_rows, row_value, usable_rows
from dataset.words import normalised
from formats.files import file_sha256

KEY = "decontaminate"  # the config key that names evaluation sets, for error messages


# ---- A row's text -----------------------------------------------------------------------------------------

def has_several_words(text: str) -> bool:
    # Chinese and Japanese have no spaces, so `normalised` splits them.
    return len(text.split(None, 1)) > 1 or (not text.isascii() and len(normalised(text).split()) > 1)


def strings(value: Any) -> Iterator[str]:
    """All strings of a list; the keys and values of a dict that have several words; at any depth."""
    if isinstance(value, dict):
        for key, inside in value.items():
            for text in (key, inside):
                if isinstance(text, str) and has_several_words(text):
                    yield text
            yield from strings(inside)
    elif isinstance(value, list):
        for inside in value:
            if isinstance(inside, str):
                yield inside
            yield from strings(inside)


def item_text(value: Any) -> str:
    """The text of a row: itself, or all its strings with blank lines between them."""
    return value if isinstance(value, str) else "\n\n".join(strings(value))


# ---- Items ------------------------------------------------------------------------------------------------

def split_items(value: dict[str, Any], row: Row) -> Iterator[tuple[str, str]]:
    """The items of a .json object: each element of its lists of objects, and everything else as one more."""
    splits = {name: rows for name, rows in value.items() if is_list_of_dicts(rows)}
    if text := item_text({name: other for name, other in value.items() if name not in splits}):
        yield row.place, text
    for name, rows in splits.items():
        for number, each in enumerate(rows):
            yield f"{row.place.removesuffix(':1')} {name}[{number}]", item_text(each)


# ---- Evaluation sets --------------------------------------------------------------------------------------

class Benchmark(NamedTuple):
    """An evaluation set: a file, or hf:NAME[:CONFIG[:SPLIT]]."""

    name: str
    source: str

    def digest(self) -> str:
        """What decides if the items are the same: a hash of the file, or the name of a set on the hub."""
        return self.source if self.source.startswith("hf:") else file_sha256(Path(self.source))

    def items(self) -> Iterator[tuple[str, str]]:
        """(place, text) of every item. Raises UserError if a row cannot be read, or if no item has text."""
        is_hub, path, empty = self.source.startswith("hf:"), Path(self.source), True
        rows = hub_rows(self.source.removeprefix("hf:"), None, KEY) if is_hub else read_rows([path])
        for row, value in usable_rows(rows, row_value, f"{KEY}="):
            has_splits = file_kind(path) == ".json" and isinstance(value, dict) and row.place == f"{path}:1"
            items = split_items(value, row) if has_splits else [(row.place, item_text(value))]
            for place, text in items:
                empty = empty and not text
                yield place, text
        if empty:
            raise UserError(f"{KEY}={self.source}: no text in it")


def find_benchmarks(spec: str) -> tuple[list[Benchmark], int]:
    """(evaluation sets, number of ignored files and folders) of a comma-separated list.

    An entry is a file, folder or glob (one set per file), or hf:NAME. Sets are named after their files, or by
    their paths if two have the same name. Raises UserError if an entry does not exist, or is a data folder.
    """
    names: list[str] = []
    ignored = 0
    for name in [spec] if os.path.exists(spec) else spec.split(","):  # Path raises where a name is too long
        if name.startswith("hf:"):
            names.append(name)
        elif os.path.isfile(os.path.join(name, "meta.json")):
            raise UserError(f"{KEY}={name}: is a data folder; give the file that it was made from")
        else:
            files, others = find_files(name, KEY, KINDS | {".tsv"})
            names += map(str, files)
            ignored += others
    names = list(dict.fromkeys(names))  # each once, in order
    short = [name.removeprefix("hf:") if name.startswith("hf:") else Path(name).name.split(".")[0]
             for name in names]
    return [Benchmark(each if short.count(each) == 1 else name, name)
            for each, name in zip(short, names, strict=True)], ignored
