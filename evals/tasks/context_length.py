"""Does a model use its context, and how far? Loss by position, perplexity by context length, loss by context.

    "CHAPTER I. .."                                     (documents at least as long as the longest context)

    python eval.py --model=out/x/step_000600 --compare=out/x/step_000800 --tasks=context_length \\
        --data=context_length=data/books --context_length=512
    python eval.py --model=out/x --tasks=context_length --context_length=2048 --sinks=4 --window=124

The text is the one of evals/tasks/perplexity.py. It is cut into rows of --context_length tokens, each within
one document, so that all tokens of a row are about the same thing. The default length is twice the model's
context (for learned positions: the context itself). --shots and --chat have no effect. Three measurements:

- loss_by_position: the mean loss at each position of a row. It falls as long as more context helps. In a
  model that was never trained on further positions, it rises after the trained ones.
- perplexity_by_length: the perplexity of rows of that length. context_length.png draws both curves.
- loss_by_context: the loss of the last eighth of each row's targets, after 16, 32, 64, .. tokens before them
  and after all of them. The targets are the same each time, so "extra_loss", the mean difference from the
  loss after all tokens, has a small standard error. The figure extra_loss_after_N is the one for the largest
  N of at most a quarter of the row: above 0 means that the model uses more context than N tokens.

With --sinks or --window the rows are read one token at a time through a cache of that size
(modeling/sinks.py), at the same positions as in generation. loss_by_context is then left out.
"""

import contextlib
import itertools
from typing import Any

import numpy as np
import torch

from configurator import UserError
from evals.likelihood import token_losses
from evals.lm import LM
from evals.results import Figure, Result, mean
from evals.tasks.perplexity import Texts, after_sinks, perplexity_of, read_texts
from model import GPT
from modeling.devices import autocast_dtype
from modeling.sinks import SinkCache, cache_limits
from training.losses import linear_log_probs

STREAMED_ROWS = 64  # rows that are read together through a cache of sinks and a window


def load(source: str | None, limit: int, shots: int | None, model: str = "",
         context_length: int | None = None, sinks: int = 0, window: int | None = None) -> Texts:
    """The first `limit` KiB of the text."""
    return read_texts(source, model, 1024 * limit)


def cut_rows(lm: LM, texts: Texts, length: int) -> list[np.ndarray]:
    """Rows of length + 1 ids, each within one document. Raises UserError if no document is long enough."""
    rows = []
    for document in texts.documents:
        ids = np.array(lm.tokenizer.encode(document), np.int32)
        # A row starts at the last target of the row before it: every id but the first is a target once.
        rows += [ids[at:at + length + 1] for at in range(0, len(ids) - length, length)]
    if not rows:
        raise UserError(f"{texts.place}: no document of {length + 1:,} tokens (give a smaller "
                        "--context_length, or longer documents with --data=context_length=FILE)")
    return rows


@torch.inference_mode()
def streamed_losses(model: GPT, rows: list[np.ndarray], limits: tuple[int, int]) -> np.ndarray:
    """As `token_losses`, but for all targets of rows of one length, with a SinkCache: (rows, T) float64."""
    ids = torch.from_numpy(np.stack(rows)).long().to(model.head_weight.device)  # (rows, T + 1)
    V, size, losses = model.config.vocab_size, min(sum(limits), ids.shape[1] - 1), []
    for part in ids.split(STREAMED_ROWS):
        cache = SinkCache(model.config, len(part), limits, model.rope, autocast_dtype(model.head_weight))
        row = []  # (B, tokens of a step) each
        # The first tokens fit the cache and are read at once, the others one at a time.
        for begin, end in [(0, size), *((n, n + 1) for n in range(size, ids.shape[1] - 1))]:
            targets = part[:, begin + 1:end + 1]  # (B, tokens of the step)
            values = model(part[:, begin:end], cache=cache, head=lambda hidden, weight, targets=targets:
                           linear_log_probs(hidden.flatten(0, 1), weight, targets.flatten(), V))
            row.append(-values.view(targets.shape))
            cache.set_lengths([end] * len(part))
        losses.append(torch.cat(row, dim=1).double().cpu().numpy())  # (B, T)
    return np.concatenate(losses)


def loss_by_position(losses: np.ndarray) -> list[dict[str, Any]]:
    """Losses, (rows, T) -> the mean of each range of positions. Each power of two has three ranges."""
    T = losses.shape[1]
    edges = sorted({0, T, *(round(2 ** (step / 3)) for step in range(3 * T.bit_length()))})
    return [{"first": first, "last": end - 1, **mean(losses[:, first:end].mean(1))._asdict()}
            for first, end in itertools.pairwise(edges) if end <= T]


def loss_by_context(lm: LM, rows: list[np.ndarray], losses: np.ndarray) -> list[dict[str, Any]]:
    """The loss of the last eighth of each row's targets, after the last 16, 32, .. tokens before them.

    rows: T + 1 ids each; losses: (rows, T), in nats. "extra_loss" is the mean over the rows of how much more
    the targets cost than after all tokens before them.
    """
    T = losses.shape[1]
    count = max(1, T // 8)
    whole = losses[:, -count:].mean(1)  # (rows,)
    results = []
    for context in [*(2**power for power in range(4, T.bit_length()) if 2**power < T - count), T - count]:
        loss = whole
        if context < T - count:
            short = [row[-(context + count + 1):] for row in rows]
            loss = np.array(token_losses(lm.model, after_sinks(lm, short), [count] * len(rows))).mean(1)
        results.append({"context": context, "loss": float(loss.mean()),
                        "extra_loss": mean(loss - whole)._asdict()})
    return results


def score(lm: LM, texts: Texts, model: str = "", context_length: int | None = None, sinks: int = 0,
          window: int | None = None) -> Result:
    """The perplexity of the trained context and of the longest one; the three measurements as details."""
    limits = cache_limits(lm.model.config, sinks, window)
    config, first = lm.model.config, len(lm.sinks)  # first: position of a row's first token
    trained = config.block_size - first
    longest = context_length or (trained if config.position == "learned" else 2 * trained)
    rows = cut_rows(lm, texts, longest)
    read = after_sinks(lm, rows)
    with lm.extended_context(first + longest) if limits is None else contextlib.nullcontext():
        losses = (np.array(token_losses(lm.model, read, [longest] * len(rows))) if limits is None else
                  streamed_losses(lm.model, read, limits)[:, first:])  # (rows, longest)
        contexts = loss_by_context(lm, rows, losses) if limits is None else []
    lengths = sorted({2**power for power in range(3, longest.bit_length())} | {trained, longest})
    # The standard error takes the rows as independent.
    perplexities = {length: perplexity_of(mean(losses[:, :length].mean(1))._replace(n=length * len(rows)))
                    for length in lengths if length <= longest}
    shown = sorted({min(trained, longest), longest})
    figures = {f"perplexity_{length}": perplexities[length] for length in shown}
    if short := [each for each in contexts if each["context"] <= longest // 4]:
        figures[f"extra_loss_after_{short[-1]['context']}"] = Figure(**short[-1]["extra_loss"])
    return Result(figures, details={
        "text": texts.place, "rows": len(rows), "trained_context": trained,
        "loss_by_position": loss_by_position(losses),
        "perplexity_by_length": {length: each._asdict() for length, each in perplexities.items()},
        "loss_by_context": contexts})


def draw(models: dict[str, dict[str, Any]]) -> Any:
    """Two curves per model, from {model: details}, as a matplotlib Figure."""
    from matplotlib.figure import Figure as Picture
    picture = Picture(figsize=(10, 4.5), layout="constrained")
    left, right = picture.subplots(1, 2)
    for number, (name, details) in enumerate(models.items()):
        ranges, lengths = details["loss_by_position"], details["perplexity_by_length"]
        left.plot([(each["first"] + each["last"]) / 2 + 1 for each in ranges],
                  [each["value"] for each in ranges], color=f"C{number}", marker=".", label=name)
        right.plot([int(length) for length in lengths], [each["value"] for each in lengths.values()],
                   color=f"C{number}", marker="o")
    left.set(xlabel="position (tokens)", ylabel="loss (nats per token)", title="Loss by position")
    low, high = right.dataLim.intervaly
    right.set(xlabel="context length (tokens)", ylabel="perplexity", title="Perplexity by context length",
              yscale="log" if high > 10 * low else "linear")
    for axes in (left, right):
        for context in sorted({details["trained_context"] for details in models.values()}):
            axes.axvline(context, color="gray", linestyle="--", label=f"trained context: {context:,}")
        axes.set_xscale("log", base=2)
        axes.xaxis.set_major_formatter(lambda value, _: f"{value:,.0f}")
        axes.grid(alpha=0.3, which="both")
    left.legend()
    return picture
