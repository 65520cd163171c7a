"""The text that a model's perplexity is measured on: files, a prepared folder, or what the model never saw of
its own data.

    texts = read_texts("book.txt", "out/base", limit=500 * 1024)       # Texts(["..."], place="book.txt")

Documents are text, whatever ids they were stored as, so that models with different tokenizers read the same.
"""

import codecs
import itertools
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from configurator import UserError
from dataset.dataloader import parse_mix
from dataset.shards import DataFolder
from dataset.sources import (
    TEXT_KINDS,
    Blank,
    Skip,
    document,
    file_kind,
    files_under,
    find_files,
    open_packed,
    read_rows,
)
from formats import hf
from formats.tokenizer import Tokenizer
from training.run import read_run


class Texts(NamedTuple):
    documents: list[str]
    place: str  # where they come from


def read_texts(source: str | None, model: str, limit: int) -> Texts:
    """The first `limit` bytes of a source's documents; the last one is cut. UserError where there are none.

    source: a file, a glob, a prepared folder (its validation split), or a folder with text files whose names
    begin with perplexity. None, or a folder without any: the validation split of the text that the model, or
    its base, was trained on.
    """
    files: list[Path] = []
    prepared = Path(source) if source and (Path(source) / "meta.json").is_file() else None
    if source and prepared is None:
        files = find_files(source)[0] if not Path(source).is_dir() else [
            path for path in files_under(Path(source), lambda part: part.startswith("."))
            if path.name.lower().startswith("perplexity") and file_kind(path) in TEXT_KINDS]
    if not files:
        prepared = prepared or own_data(model)
    documents, left = [], limit
    for text in of_files(files, limit) if files else of_folder(prepared):
        piece = text.encode("utf-8")[:left]
        documents.append(codecs.getincrementaldecoder("utf-8")().decode(piece))  # not half a character
        left -= len(piece)
        if left <= 0:
            break
    if not any(documents):
        raise UserError(f"data={source or prepared}: no text in it")
    return Texts(documents, str(source if files else prepared))


def of_files(files: list[Path], limit: int) -> Iterator[str]:
    """A document a text file, of which not much more than `limit` bytes are read; else a row's key "text"."""
    for path in files:
        if file_kind(path) in TEXT_KINDS:
            with open(path, "rb") as raw:
                stream = open_packed(path, raw)
                mebibytes = iter(lambda stream=stream: stream.read(2**20), b"")
                data = b"".join(itertools.islice(mebibytes, 1 + limit // 2**20))
            try:
                yield codecs.getincrementaldecoder("utf-8-sig")().decode(data)
            except UnicodeDecodeError as error:
                raise UserError(f"{path}: not UTF-8 ({error.reason} at byte {error.start})") from None
        else:
            for row in read_rows([path], "text", piece=2**20):
                try:
                    yield document(row, "text")
                except Blank:
                    continue
                except Skip as reason:
                    raise UserError(f"{row.place}: {reason}") from None


def of_folder(folder: Path) -> Iterator[str]:
    """The documents of a prepared folder's validation split."""
    data = DataFolder(folder)
    if data.meta["kind"] != "text":
        raise UserError(f"data={folder}: holds {data.meta['kind']} rows, not text")
    tokenizer = Tokenizer.load(folder)
    table, ids = tokenizer.token_bytes(), []
    for shard in data.shards["val"]:
        for index in shard:
            if index == tokenizer.eot_id:
                yield b"".join(ids).decode("utf-8", "replace")
                ids = []
            else:
                ids.append(table[index])
    if ids:
        yield b"".join(ids).decode("utf-8", "replace")


def own_data(model: str) -> Path:
    """The data folder that a model was trained on, or the one of its base where it learned from chats."""
    step = model
    while step:
        try:
            config = read_run(hf.find_folder(step).parent / "run.json")["config"]
            for folder, _ in parse_mix(config["dataset"]):
                if (folder / "meta.json").is_file() and DataFolder(folder).meta["kind"] == "text":
                    return folder
            step = config.get("init_from")
        except (UserError, OSError, KeyError):
            break
    raise UserError(f"no text is given, and that which {model} was trained on is not here: give "
                    "--data=perplexity=FILE (a text, or a folder of prepare.py), and so of context_length")
