"""Perplexity of running text, and bits per byte, by a sliding window.

    "def merge(a, b):\n    ..."

All documents together are one row of tokens, with an end-of-text token between two documents. A window as
long as the model's context moves over the row by `stride` tokens (default: half the context). In each window
the tokens that were in no earlier window are scored, except the first token of a window, which has no
context. That is the recipe of transformers' guide (huggingface.co/docs/transformers/perplexity). Bits per
byte compare models with different tokenizers: the same nats, divided by the bytes of the scored tokens.
Standard errors take the windows as independent.

The text is a file or a prepared data folder (--data=perplexity=FILE). In any other folder it is the text
files named perplexity*. Without --data it is the validation split of the model's own data. --limit=500 reads
the first 500 KiB; --shots and --chat have no effect. The task wikitext reads the test split of WikiText-2
(arXiv 1609.07843); on the hub: Salesforce/wikitext.
"""

import math
from pathlib import Path

import numpy as np

from configurator import UserError
from dataset.sources import file_kind
from evals.benchmarks import ROW_KINDS, convert, find, read, text_of
from evals.likelihood import token_losses
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
    rows = read(source, "wikitext", WIKITEXT)  # one row per line of the text
    text = "\n\n".join(convert(rows, lambda row: text_of(row["text"]))).encode()[:1024 * limit]
    return Texts([text.decode("utf-8", "ignore")], source or WIKITEXT)  # the limit may cut a character in two


def join_documents(lm: LM, texts: Texts) -> np.ndarray:
    """The ids of all documents in one row, (T,) int32. Raises UserError for fewer than two ids."""
    ids = list(lm.tokenizer.prefix_ids)
    for number, document in enumerate(texts.documents):
        ids += ([lm.tokenizer.eot_id] if number else []) + lm.tokenizer.encode(document)
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


def score(lm: LM, texts: Texts, model: str, stride: int | None = None, wikitext: bool = False) -> Result:
    ids, context = join_documents(lm, texts), lm.model.config.block_size
    stride = context // 2 if stride is None else stride
    if not 0 < stride <= context:
        raise UserError(f"stride={stride}: must be positive, and at most the context of {context}")
    spans = windows(len(ids), context, stride)
    losses = token_losses(lm.model, [ids[begin:end] for begin, end, _ in spans], [new for *_, new in spans])
    sums, counts = [sum(each) for each in losses], [new for *_, new in spans]  # nats and tokens per window
    token_bytes = np.array([len(token) for token in lm.tokenizer.token_bytes()])  # bytes of each id, (V,)
    sizes = [int(token_bytes[ids[end - new:end]].sum()) for _, end, new in spans]  # bytes per window
    per_token, per_byte = ratio(sums, counts), ratio(sums, sizes)  # nats
    perplexity = math.exp(per_token.value)
    bits = Figure(per_byte.value / math.log(2), per_byte.stderr / math.log(2), per_byte.n)
    return Result({"perplexity": Figure(perplexity, perplexity * per_token.stderr, per_token.n),
                   "bits_per_byte": bits},
                  details={"text": texts.place, "documents": len(texts.documents), "context": context,
                           "stride": stride, "windows": len(spans), "loss": per_token._asdict()})
