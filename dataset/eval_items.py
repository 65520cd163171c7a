"""Evaluation sets as texts: what training text is held against, whatever form their rows have.

    for benchmark in find_benchmarks("eval/,gsm8k_test.jsonl,hf:openai/gsm8k:main:test,held_out")[0]:
        benchmark.name, benchmark.digest()
        for place, text in benchmark.items(): ...         # "gsm8k_test.jsonl:1", "Janet's ducks lay ..."

An item is a row: a line of .jsonl or .tsv, a record of .csv, an element of a .json array or of the arrays in
a .json object (its splits), a row of a .parquet or of the hub; a text file, in pieces of a MiB; or a document
of a data folder that prepare.py made, from both sides of its split.

Its text is every string in the row, at whatever depth, in the row's order, with blank lines between them:
question, choices, answers, descriptions of functions. A key of several words is text as well (TruthfulQA's
choices are keys). A single word under a key is none: it is an id, a subject, a role, a label, "yes".
"""

import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from configurator import UserError
from dataset.conversations import is_list_of_dicts
from dataset.shards import DataFolder
from dataset.sources import (
    KINDS,
    TABLE_KINDS,
    Row,
    file_kind,
    find_files,
    hub_rows,
    read_rows,
    row_value,
    usable_rows,
)
from dataset.words import normalised
from formats.chat_format import ROLES
from formats.files import file_sha256
from formats.tokenizer import Tokenizer

KEY = "decontaminate"  # the key that names evaluation sets: what a message begins with
ROLE = re.compile(rf"(?:{'|'.join(ROLES)})\n")  # with what a turn of a chat begins, behind its special token


class Benchmark(NamedTuple):
    """An evaluation set: a file, a data folder, or hf:NAME[:CONFIG[:SPLIT]]."""

    name: str
    source: str

    def digest(self) -> str:
        """What its items follow from: a hash, or of a set on the hub the name."""
        if self.source.startswith("hf:"):
            return self.source
        path = Path(self.source)
        return file_sha256(path / "meta.json" if path.is_dir() else path)

    def items(self) -> Iterator[tuple[str, str]]:
        """(place, text) of every item. UserError for a row that cannot be read, or if no item has text."""
        if self.source.startswith("hf:"):
            items = hub_items(self.source.removeprefix("hf:"))
        else:
            items = (folder_items if Path(self.source).is_dir() else file_items)(Path(self.source))
        empty = True
        for place, text in items:
            empty = empty and not text
            yield place, text
        if empty:
            raise UserError(f"{KEY}={self.source}: no text in it")


def find_benchmarks(spec: str) -> tuple[list[Benchmark], int]:
    """What a comma-separated list names: files, folders and globs of files, each file of which is a benchmark
    by itself; data folders, also by their names below data/; and hf: names. And how many files of other kinds
    are ignored. UserError for what is not there.
    """
    sources: list[str] = []
    ignored = 0
    for name in [spec] if os.path.exists(spec) else spec.split(","):  # Path raises where a name is too long
        path = Path(name) if os.path.exists(name) else Path("data") / name
        if name.startswith("hf:"):
            sources.append(name)
        elif (path / "meta.json").is_file():
            sources.append(str(path))
        else:
            files, others = find_files(name, KEY, KINDS | TABLE_KINDS)
            sources += map(str, files)
            ignored += others
    sources = list(dict.fromkeys(sources))
    names = [source.removeprefix("hf:") if source.startswith("hf:") else Path(source).name.split(".")[0]
             for source in sources]
    return [Benchmark(name if names.count(name) == 1 else source, source)
            for name, source in zip(names, sources, strict=True)], ignored


# ---- Items ------------------------------------------------------------------------------------------------

def hub_items(name: str) -> Iterator[tuple[str, str]]:
    return ((row.place, item_text(row.content)) for row in hub_rows(name, None, KEY))


def file_items(path: Path) -> Iterator[tuple[str, str]]:
    for row, value in usable_rows(read_rows([path], None, 2**20), row_value, f"{KEY}="):
        if file_kind(path) == ".json" and isinstance(value, dict) and row.place == f"{path}:1":
            yield from split_items(value, row)
        else:
            yield row.place, item_text(value)


def split_items(value: dict[str, Any], row: Row) -> Iterator[tuple[str, str]]:
    """A .json object's lists of objects, each of them an item, and whatever else it says as one more."""
    splits = {name: rows for name, rows in value.items() if is_list_of_dicts(rows)}
    if text := item_text({name: other for name, other in value.items() if name not in splits}):
        yield row.place, text
    for name, rows in splits.items():
        for number, each in enumerate(rows):
            yield f"{row.place.removesuffix(':1')} {name}[{number}]", item_text(each)


def folder_items(folder: Path) -> Iterator[tuple[str, str]]:
    """The documents of a data folder; of chats and preferences what is said, message by message."""
    data, tokenizer = DataFolder(folder), Tokenizer.load(folder)
    special = np.array(sorted(tokenizer.special_ids))
    for split, shards in data.shards.items():
        number = 0
        for shard in shards:
            ends = np.flatnonzero(shard == tokenizer.eot_id)
            for document in np.split(shard, ends + 1)[:len(ends)]:
                cuts = np.flatnonzero(np.isin(document, special))
                texts = [tokenizer.decode(part[~np.isin(part, special)].tolist())
                         for part in np.split(document, cuts)]
                if data.meta["kind"] != "text":
                    texts = [ROLE.sub("", text, count=1) if ROLE.match(text) else text for text in texts]
                yield f"{folder}/{split}[{number}]", "\n\n".join(filter(None, map(str.strip, texts)))
                number += 1


# ---- A row's text -----------------------------------------------------------------------------------------

def item_text(value: Any) -> str:
    """All strings of a row that are text, with blank lines between them."""
    return value if isinstance(value, str) else "\n\n".join(strings(value))


def strings(value: Any) -> Iterator[str]:
    """Those of lists, all; keys and their values, if they are of several words."""
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


def has_several_words(text: str) -> bool:
    return len(text.split(None, 1)) > 1 or (not text.isascii() and len(normalised(text).split()) > 1)
