"""The text for perplexity: files, a prepared data folder, or the validation split of the model's own data.

    texts = read_texts("book.txt", "out/base", limit=500 * 1024)       # Texts(["..."], place="book.txt")

Documents are strings, even if they come from token ids, so that models with different tokenizers read the
same text.
"""

import codecs
import itertools
import json
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from configurator import UserError
from dataset.dataloader import parse_mix
from dataset.shards import DataFolder
from dataset.sources import TEXT_KINDS, document, file_kind, files_under, find_files, read_rows, usable_rows
from formats import hf
from formats.tokenizer import Tokenizer


class Texts(NamedTuple):
    documents: list[str]
    place: str  # the file or folder they come from


def file_documents(files: list[Path], limit: int) -> Iterator[str]:
    """Documents of files: the value of the key "text" in each row, or a whole text file.

    A text file of more than 2 * limit bytes comes in pieces, of which the first has at least `limit` bytes.
    """
    rows = read_rows(files, "text", piece=2 * limit)  # pieces are at least half as long as `piece`
    for _, text in usable_rows(rows, lambda row: document(row, "text")):
        yield text


def validation_documents(folder: Path) -> Iterator[str]:
    """The documents of a prepared folder's validation split. Raises UserError if it holds chats or pairs."""
    data = DataFolder(folder)
    if data.meta["kind"] != "text":
        raise UserError(f"data={folder}: holds {data.meta['kind']} rows, not text")
    tokenizer = Tokenizer.load(folder)
    token_bytes, document_bytes = tokenizer.token_bytes(), []
    for index in itertools.chain(*data.shards["val"]):  # a document may go on in the next shard
        if index == tokenizer.eot_id:
            yield b"".join(document_bytes).decode("utf-8", "replace")
            document_bytes = []
        else:
            document_bytes.append(token_bytes[index])
    if document_bytes:
        yield b"".join(document_bytes).decode("utf-8", "replace")


def own_data(model: str) -> Path:
    """The data folder with text that a model was trained on, or else the one of its base (init_from).

    Raises UserError if run.json names no such folder on this machine.
    """
    step = model
    while step:
        try:
            config = json.loads((hf.find_folder(step).parent / "run.json").read_text("utf-8"))["config"]
            for folder, _ in parse_mix(config["dataset"]):
                if (folder / "meta.json").is_file() and DataFolder(folder).meta["kind"] == "text":
                    return folder
            step = config.get("init_from")
        except (ValueError, OSError, KeyError, TypeError):  # no checkpoint, or no run.json that can be read
            break
    raise UserError(f"the text that {model} was trained on is not here: give --data=perplexity=FILE, a text "
                    "file or a data folder, and --data=context_length=FILE likewise")


def read_texts(source: str | None, model: str, limit: int) -> Texts:
    """The first `limit` bytes of a source's documents; the last document is cut.

    source: a file, a glob, a prepared data folder (its validation split), or another folder, of which the
    text files named perplexity* are read. If source is None or the folder has no such file, the text is the
    validation split of `own_data(model)`. Raises UserError if there is no text.
    """
    files: list[Path] = []
    prepared = Path(source) if source and (Path(source) / "meta.json").is_file() else None
    if source and prepared is None:
        files = find_files(source, "data")[0] if not Path(source).is_dir() else [
            path for path in files_under(Path(source), lambda part: part.startswith("."))[0]
            if path.name.lower().startswith("perplexity") and file_kind(path) in TEXT_KINDS]
    if not files:
        prepared = prepared or own_data(model)
    documents, left = [], limit
    for text in file_documents(files, limit) if files else validation_documents(prepared):
        piece = text.encode("utf-8")[:left]
        # The incremental decoder drops a character that the limit has cut in two.
        documents.append(codecs.getincrementaldecoder("utf-8")().decode(piece))
        left -= len(piece)
        if left <= 0:
            break
    if not any(documents):
        raise UserError(f"data={source or prepared}: no text in it")
    return Texts(documents, str(source if files else prepared))
