"""Does a model use its context, and how far? Loss against position, perplexity against context length.

    "CHAPTER I. .."                                            (documents as long as the curve shall be)

The text of evals/tasks/perplexity.py is cut into rows that lie within one document each, as long as
--context_length says, or twice the model's context (models with learned positions: once). The loss of the
tokens at a position is what so much context leaves unknown; the perplexity of a context length is that of
rows of that length. A model that uses its context falls as far as it was trained, and one that was never
trained on further positions rises behind. context_length.png draws both. --shots and --chat do not apply.
"""

import math
from typing import Any

import numpy as np

from configurator import UserError
from evals.likelihood import nats
from evals.lm import LM
from evals.results import Figure, Result, mean
from evals.texts import Texts, read_texts


def load(source: str | None, limit: int, shots: int | None, model: str,
         context_length: int | None = None) -> Texts:
    """The first `limit` KiB of the text."""
    return read_texts(source, model, 1024 * limit)


def score(lm: LM, texts: Texts, model: str, context_length: int | None = None) -> Result:
    """The perplexity of the model's own context, and of the longest one; the curves among the details."""
    config = lm.model.config
    longest = context_length or config.block_size * (1 if config.position == "learned" else 2)
    rows = cut_rows(lm, texts, longest)
    if longest > config.block_size:
        lm.model.reconfigure(block_size=longest)
    try:
        losses = np.array(nats(lm.model, rows, [longest] * len(rows)))  # (rows, longest)
    finally:
        if lm.model.config.block_size != config.block_size:
            lm.model.reconfigure(block_size=config.block_size)
    lengths = sorted({2**power for power in range(3, longest.bit_length())} | {config.block_size, longest})
    perplexities = {length: perplexity(losses[:, :length]) for length in lengths if length <= longest}
    edges = sorted({0, *(round(2 ** (step / 3)) for step in range(3 * longest.bit_length())), longest})
    edges = [edge for edge in edges if edge <= longest]
    places = list(zip(edges, edges[1:], strict=False))
    figures = {f"perplexity_{length}": perplexities[length]
               for length in sorted({min(config.block_size, longest), longest})}
    return Result(figures, details={
        "text": texts.place, "rows": len(rows), "trained_context": config.block_size,
        "loss_by_position": [{"first": first, "last": end - 1, **mean(losses[:, first:end].mean(1))._asdict()}
                             for first, end in places],
        "perplexity_by_length": {length: each._asdict() for length, each in perplexities.items()}})


def cut_rows(lm: LM, texts: Texts, length: int) -> list[np.ndarray]:
    """Rows of length + 1 ids within one document. UserError where no document is so long."""
    rows = []
    for document in texts.documents:
        ids = np.array(lm.tokenizer.encode(document), np.int32)
        rows += [ids[at:at + length + 1] for at in range(0, len(ids) - length, length)]
    if not rows:
        raise UserError(f"{texts.place}: no document of {length + 1:,} tokens (give --context_length=, or "
                        "--data=context_length=FILE with longer ones)")
    return rows


def perplexity(losses: np.ndarray) -> Figure:
    """(rows, T) nats -> e^mean; rows are independent."""
    loss = mean(losses.mean(1))
    value = math.exp(loss.value)
    return Figure(value, value * loss.stderr, losses.size)


def draw(models: dict[str, dict[str, Any]]) -> Any:
    """The details of some models as a picture of two curves each: a matplotlib Figure."""
    from matplotlib.figure import Figure as Picture
    picture = Picture(figsize=(10, 4.5), layout="constrained")
    left, right = picture.subplots(1, 2)
    for number, (name, details) in enumerate(models.items()):
        color, places = f"C{number}", details["loss_by_position"]
        left.plot([(place["first"] + place["last"]) / 2 + 1 for place in places],
                  [place["value"] for place in places], color=color, marker=".", label=name)
        lengths = {int(length): each["value"] for length, each in details["perplexity_by_length"].items()}
        right.plot(list(lengths), list(lengths.values()), color=color, marker="o")
    left.set(xlabel="position (tokens)", ylabel="loss (nats a token)", title="Loss against position")
    low, high = right.dataLim.intervaly
    right.set(xlabel="context length (tokens)", ylabel="perplexity",
              title="Perplexity against context length", yscale="log" if high > 10 * low else "linear")
    trained = {details["trained_context"] for details in models.values()}
    for axes in (left, right):
        for context in sorted(trained):
            axes.axvline(context, color="gray", linestyle="--", label=f"trained context: {context:,}")
        axes.set_xscale("log", base=2)
        axes.xaxis.set_major_formatter(lambda value, _: f"{value:,.0f}")
        axes.grid(alpha=0.3, which="both")
    left.legend()
    return picture
