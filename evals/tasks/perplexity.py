"""Perplexity of running text: how many tokens a model wavers between, and how many bits a byte costs it.

    "def merge(a, b):\n    ..."

The documents, with an end-of-text token between two, are one row of tokens. A window as long as the model's
context moves over it by `stride` tokens (half a context unless said otherwise); of each window the tokens
that no earlier one held are counted, all alike, but never its first one. That is the recipe of transformers'
guide (huggingface.co/docs/transformers/perplexity). Models with different tokenizers compare in bits per
byte: the same nats over the bytes of the tokens. Standard errors take windows as independent.

The text: a file or a prepared folder (--data=perplexity=FILE), or of another folder the text files whose
names begin with perplexity; else the validation split of the model's own data. A limit of 500 reads the first
500 KiB; --shots and --chat do not apply. wikitext is the test split of WikiText-2 (arXiv 1609.07843), on the
hub Salesforce/wikitext.
"""

import math
from pathlib import Path

import numpy as np

from configurator import UserError
from dataset.sources import file_kind
from evals.benchmarks import ROW_KINDS, convert, find, read
from evals.likelihood import nats
from evals.lm import LM
from evals.results import Figure, Result, ratio
from evals.texts import Texts, read_texts

WIKITEXT = "Salesforce/wikitext:wikitext-2-raw-v1:test"


def load(source: str | None, limit: int, shots: int | None, model: str, stride: int | None = None,
         wikitext: bool = False) -> Texts:
    """The first `limit` KiB of the text."""
    if wikitext and source is not None:
        source = str(find(source, "wikitext", ROW_KINDS | {".txt"})[0])
    if not wikitext or source is not None and file_kind(Path(source)) == ".txt":
        return read_texts(source, model, 1024 * limit)
    rows = read(source, "wikitext", WIKITEXT)  # a line each
    text = "\n\n".join(convert(rows, lambda row: row["text"])).encode()[:1024 * limit]
    return Texts([text.decode("utf-8", "ignore")], source or WIKITEXT)  # not half a character


def score(lm: LM, texts: Texts, model: str, stride: int | None = None, wikitext: bool = False) -> Result:
    ids, context = row_of(lm, texts), lm.model.config.block_size
    stride = context // 2 if stride is None else stride
    if not 0 < stride <= context:
        raise UserError(f"stride={stride}: must be positive, and at most the context of {context}")
    lengths = np.array([len(token) for token in lm.tokenizer.token_bytes()])  # bytes of each id
    found, counts, sizes = [], [], []
    for begin, end, new in windows(len(ids), context, stride):
        found.append(ids[begin:end])
        counts.append(new)
        sizes.append(int(lengths[ids[end - new:end]].sum()))
    sums = [sum(each) for each in nats(lm.model, found, counts)]
    loss, cost = ratio(sums, counts), ratio(sums, sizes)
    perplexity = math.exp(loss.value)
    return Result({"perplexity": Figure(perplexity, perplexity * loss.stderr, loss.n),
                   "bits_per_byte": Figure(cost.value / math.log(2), cost.stderr / math.log(2), cost.n)},
                  details={"text": texts.place, "documents": len(texts.documents), "context": context,
                           "stride": stride, "windows": len(found), "loss": loss._asdict()})


def row_of(lm: LM, texts: Texts) -> np.ndarray:
    """The ids of all documents, behind one another. UserError for fewer than two."""
    ids = list(lm.tokenizer.prefix_ids)
    for number, document in enumerate(texts.documents):
        ids += ([lm.tokenizer.eot_id] if number else []) + lm.tokenizer.encode(document)
    if len(ids) < 2:
        raise UserError(f"{texts.place}: too short a text to be measured")
    return np.array(ids, np.int32)


def windows(length: int, context: int, stride: int) -> list[tuple[int, int, int]]:
    """(begin, end, how many tokens at the end count) of each window over `length` tokens."""
    found, counted = [], 1  # the first token has nothing before it
    for begin in range(0, length, stride):
        end = min(begin + context, length)
        if new := min(end - counted, end - begin - 1):  # nor has a window's first token
            found.append((begin, end, new))
        counted = end
        if end == length:
            break
    return found
