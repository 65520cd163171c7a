"""Perplexity of running text, and bits per byte, by a sliding window.

    "def merge(a, b):\n    ..."

All documents together are one row of tokens, with an end-of-text token between two documents. A window as
long as the model's context moves over the row by `stride` tokens (default: half the context). In each window
the tokens that were in no earlier window are scored, except the first token of a window, which has no
context. That is the recipe of transformers' guide (huggingface.co/docs/transformers/perplexity). The sink
tokens that a model was trained with come before each window. Bits per byte compare models with different
tokenizers: the same nats, divided by the bytes of the scored tokens. Standard errors take the windows as
independent.

The text is a file or a prepared data folder (--data=perplexity=FILE). In any other folder it is the text
files named perplexity*. Without --data it is the validation split of the model's own data. --limit=500 reads
the first 500 KiB; --shots and --chat have no effect. The task wikitext reads the test split of WikiText-2
(arXiv 1609.07843); on the hub: Salesforce/wikitext.
"""

import math
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np

from configurator import UserError
from dataset.dataloader import parse_mix
from dataset.shards import DataFolder
from dataset.sources import TEXT_KINDS, document, file_kind, files_under, find_files, read_rows, usable_rows
from evals.benchmarks import ROW_KINDS, convert, find, read, text_of
from evals.likelihood import token_losses
from evals.lm import LM
from evals.results import Figure, Result, ratio
from formats import hf
from formats.checkpoint import read_run
from formats.tokenizer import Tokenizer

WIKITEXT = "Salesforce/wikitext:wikitext-2-raw-v1:test"


# ---- The text: files, a prepared data folder, or the validation split of the model's own data -------------
# Documents are strings, even if they come from token ids, so that models with different tokenizers read the
# same text.

class Texts(NamedTuple):
    documents: list[str]
    place: str  # the file or folder they come from


def validation_documents(folder: Path) -> Iterator[str]:
    """The documents of a prepared folder's validation split. Raises UserError if it holds chats or pairs."""
    data = DataFolder(folder)
    data.require_kind("text")
    tokenizer = Tokenizer.load(folder)
    token_bytes = tokenizer.token_bytes()
    for shard in data.shards["val"]:
        ends = np.flatnonzero(shard == tokenizer.eot_id)
        for ids in np.split(shard, ends + 1)[:len(ends)]:  # each ends with the end-of-text token
            yield b"".join(token_bytes[index] for index in ids[:-1]).decode("utf-8", "replace")


def own_data(model: str) -> Path:
    """The data folder with text that a model was trained on, or else the one of its base (init_from).

    Raises UserError if run.json names no such folder on this machine.
    """
    step = model
    while step:
        try:
            config = read_run(hf.find_folder(step).parent)["config"]
            for folder, _ in parse_mix(config["dataset"]):
                if (folder / "meta.json").is_file() and DataFolder(folder).meta["kind"] == "text":
                    return folder
            step = config.get("init_from")
        except (ValueError, OSError, KeyError, TypeError):  # no checkpoint, or no run.json that can be read
            break
    raise UserError(f"the training text of {model or 'this model'} is not here: give --data=perplexity=FILE, "
                    "a text file or a data folder, and --data=context_length=FILE likewise")


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
    if files:  # a long text file comes in pieces, which are at least half as long as `piece`
        rows = read_rows(files, "text", piece=2 * limit)
        texts: Iterator[str] = (text for _, text in usable_rows(rows, lambda row: document(row, "text")))
    else:
        prepared = prepared or own_data(model)
        texts = validation_documents(prepared)
    documents, left = [], limit
    for text in texts:
        piece = text.encode("utf-8")[:left]
        documents.append(piece.decode("utf-8", "ignore"))  # without a character that the limit cuts in two
        left -= len(piece)
        if left <= 0:
            break
    if not any(documents):
        raise UserError(f"data={source or prepared}: no text in it")
    return Texts(documents, str(source if files else prepared))


# ---- The task ---------------------------------------------------------------------------------------------

def after_sinks(lm: LM, rows: list[np.ndarray]) -> list[np.ndarray]:
    """Rows of ids, int32, each after the sink tokens that the model was trained with."""
    return [np.concatenate((np.array(lm.sinks, np.int32), row)) for row in rows]


def load(source: str | None, limit: int, shots: int | None, model: str = "", stride: int | None = None,
         wikitext: bool = False) -> Texts:
    """The first `limit` KiB of the text."""
    if wikitext and source is not None:
        source = str(find(source, "wikitext", ROW_KINDS | {".txt"})[0])
    if not wikitext or source is not None and file_kind(Path(source)) == ".txt":
        return read_texts(source, model, 1024 * limit)
    rows = read(source, "wikitext", WIKITEXT)  # one row per line of the text
    text = "\n\n".join(convert(rows, lambda row: text_of(row["text"]))).encode()[:1024 * limit]
    return Texts([text.decode("utf-8", "ignore")], source or WIKITEXT)


def join_documents(lm: LM, texts: Texts) -> np.ndarray:
    """The ids of all documents in one row, (T,) int32. Raises UserError for fewer than two ids."""
    ids = [] if lm.sinks else list(lm.tokenizer.prefix_ids)
    for number, text in enumerate(texts.documents):
        ids += ([lm.tokenizer.eot_id] if number else []) + lm.tokenizer.encode(text)
    if len(ids) < 2:
        raise UserError(f"{texts.place}: the text is too short to be measured")
    return np.array(ids, np.int32)


def windows(length: int, context: int, stride: int) -> list[tuple[int, int, int]]:
    """(begin, end, number of scored tokens at the end) of each window over `length` tokens.

    >>> windows(10, context=4, stride=2)
    [(0, 4, 3), (2, 6, 2), (4, 8, 2), (6, 10, 2)]
    """
    spans, counted = [], 1  # the first token of the text is never scored
    for begin in range(0, length, stride):
        end = min(begin + context, length)
        if new := min(end - counted, end - begin - 1):  # nor is the first token of a window
            spans.append((begin, end, new))
        counted = end
        if end == length:
            break
    return spans


def perplexity_of(loss: Figure) -> Figure:
    """e^loss, for a mean loss in nats per token."""
    value = math.exp(min(loss.value, 700))  # a larger exponent overflows
    return Figure(value, value * loss.stderr, loss.n)


def score(lm: LM, texts: Texts, model: str = "", stride: int | None = None, wikitext: bool = False) -> Result:
    ids, context = join_documents(lm, texts), lm.model.config.block_size - len(lm.sinks)
    stride = context // 2 if stride is None else stride
    if not 0 < stride <= context:
        raise UserError(f"stride={stride}: must be positive, and at most the context of {context}")
    spans = windows(len(ids), context, stride)
    rows = after_sinks(lm, [ids[begin:end] for begin, end, _ in spans])
    losses = token_losses(lm.model, rows, [new for *_, new in spans])
    sums, counts = [sum(each) for each in losses], [new for *_, new in spans]  # nats and tokens per window
    token_bytes = np.array([len(token) for token in lm.tokenizer.token_bytes()])  # bytes of each id, (V,)
    sizes = [int(token_bytes[ids[end - new:end]].sum()) for _, end, new in spans]  # bytes per window
    per_token, per_byte = ratio(sums, counts), ratio(sums, sizes)  # nats
    bits = Figure(per_byte.value / math.log(2), per_byte.stderr / math.log(2), per_byte.n)
    return Result({"perplexity": perplexity_of(per_token), "bits_per_byte": bits},
                  details={"text": texts.place, "documents": len(texts.documents), "context": context,
                           "stride": stride, "windows": len(spans), "loss": per_token._asdict()})
