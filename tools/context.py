"""Does a model use its context? Validation loss against position, for checkpoints side by side.

    python -m tools.context --model=out/x/step_000300 --dataset=data/books --block_size=512
    python -m tools.context --model=out/x/step_000600,out/x/step_000800 --dataset=data/books --png=context.png

A token at position p of a row has p tokens before it. The rows are validation rows that lie within one
document, spread evenly over all that do, so that those p tokens are about the same thing; every model reads
the same ones. A model that uses its context has a lower loss at later positions; one that was never trained
on such positions often has a higher one.

A second table compares targets with themselves: the last eighth of each row's, read behind all that the row
has before them, and behind less.
"""

import math
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

from configurator import UserError, configure, run_script
from dataset.dataloader import Rows, dataset_folder
from dataset.shards import DataFolder
from formats.files import write_json
from formats.hf import find_folder
from formats.tokenizer import Tokenizer
from model import GPT
from modeling.devices import pick_device

FORWARD_TOKENS = 4096  # at a time: their logits are 0.5 GB in float32 at 32,000 ids


@dataclass(frozen=True, kw_only=True)
class ContextConfig:
    model: str = "out/tiny_curriculum"  # model folder, out_dir or hub id; several with commas between
    dataset: str = "data/books"  # folder under data/ (or path) whose validation text is read
    block_size: int = 512  # tokens a row
    rows: int = 1000  # rows, at the most
    device: str | None = None  # cpu, cuda, ...; None: the best there is
    json: str | None = None  # also write the figures here
    png: str | None = None  # also draw them here (needs matplotlib)

    def __post_init__(self) -> None:
        if self.block_size < 1 or self.rows < 1:
            raise UserError(f"block_size={self.block_size}, rows={self.rows}: must be positive")


# ---- What is read -----------------------------------------------------------------------------------------

def rows_within_documents(data: DataFolder, block_size: int, limit: int) -> tuple[np.ndarray, int, int]:
    """At most `limit` validation rows within one document, evenly spread over all of those.

    Returns the rows, (n, T + 1) int64, from how many documents they come, and how many rows there were to
    choose from. UserError if there are none.
    """
    rows = Rows(data, "val", block_size)
    everything = rows.read(np.arange(len(rows)))  # (all, T + 1)
    broken = (everything == Tokenizer.load(data.folder).eot_id).any(axis=1)  # (all,)
    whole = np.flatnonzero(~broken)
    if not len(whole):
        raise UserError(f"{data.folder}: no validation document holds a row of block_size={block_size} + 1 "
                        "tokens; a smaller --block_size or longer documents would do")
    chosen = whole[np.linspace(0, len(whole) - 1, min(limit, len(whole))).astype(np.int64)]
    # Between rows of two documents stands a broken row, or the end of a shard: so these sums tell them apart.
    document = np.cumsum(broken) + np.searchsorted(rows.ends, np.arange(len(rows)), side="right")
    return everything[chosen], len(np.unique(document[chosen])), len(whole)


def load(name: str, data: DataFolder, block_size: int, device: torch.device) -> GPT:
    """A model, with a context of at least block_size. UserError if it has another tokenizer than the data."""
    folder = find_folder(name)
    if Tokenizer.load(folder).definition != Tokenizer.load(data.folder).definition:
        raise UserError(f"{name}: its tokenizer is not that of {data.folder}")
    model = GPT.from_pretrained(folder, device).eval()
    if block_size > model.config.block_size:
        model.reconfigure(block_size=block_size)
    return model


# ---- What is measured -------------------------------------------------------------------------------------

@torch.no_grad()
def losses_of(model: GPT, rows: np.ndarray) -> torch.Tensor:
    """The loss in nats of each target: (n, T + 1) int64 -> (n, T) float64."""
    T, found = rows.shape[1] - 1, []
    for part in torch.from_numpy(rows).split(max(1, FORWARD_TOKENS // T)):
        part = part.to(model.head_weight.device)  # (B, T + 1)
        logits = model(part[:, :-1]).float().flatten(0, 1)  # (B T, V)
        found.append(F.cross_entropy(logits, part[:, 1:].flatten(), reduction="none").view(-1, T).cpu())
    return torch.cat(found).double()


def loss_by_context(model: GPT, rows: np.ndarray) -> dict[int, tuple[float, float]]:
    """{tokens before the last eighth of a row's targets: how many nats a token these cost more than
    behind all of the row, and the standard error of that}."""
    T = rows.shape[1] - 1
    asked = max(1, T // 8)
    contexts = sorted({*(2**k for k in range(4, 32) if 2**k < T - asked), T - asked})
    found = {context: losses_of(model, rows[:, -(context + asked + 1):])[:, -asked:].mean(dim=1)
             for context in contexts}  # (n,) each
    more = {context: each - found[T - asked] for context, each in found.items()}
    return {context: (each.mean().item(), each.std(correction=0).item() / math.sqrt(len(rows)))
            for context, each in more.items()}


def buckets(T: int) -> dict[str, slice]:
    """Positions 0-31, 32-63, 64-127, ..., each as wide as all before it, up to T."""
    ends = [0, *(32 * 2**k for k in range(32) if 32 * 2**k < T), T]
    return {f"{first}-{end - 1}": slice(first, end) for first, end in zip(ends, ends[1:], strict=False)}


def main(argv: list[str]) -> int:
    cfg, _ = configure(ContextConfig, argv, usage=__doc__)
    data, names = DataFolder(dataset_folder(cfg.dataset)), cfg.model.split(",")
    rows, documents, available = rows_within_documents(data, cfg.block_size, cfg.rows)
    places, width = buckets(cfg.block_size), max(map(len, names))
    figures, more = {}, {}
    print(f"loss in nats a token; {len(rows):,} of {available:,} validation rows of {cfg.block_size:,} tokens"
          f" that lie within one document, from {documents:,} documents")
    print(" " * width + "".join(f"{place:>12}" for place in places))
    for name in names:
        model = load(name, data, cfg.block_size, pick_device(cfg.device))
        losses = losses_of(model, rows).mean(dim=0)  # (T,)
        figures[name] = {place: losses[part].mean().item() for place, part in places.items()}
        print(f"{name:{width}}" + "".join(f"{loss:12.4f}" for loss in figures[name].values()))
        more[name] = loss_by_context(model, rows)
    print(f"nats a token that the last {max(1, cfg.block_size // 8):,} targets of a row cost more behind so"
          " many tokens than behind all, and the standard error")
    print(" " * width + "".join(f"{context:>18,}" for context in more[names[0]]))
    for name, found in more.items():
        print(f"{name:{width}}" + "".join(f"{value:+10.4f} +-{error:.4f}" for value, error in found.values()))
    if cfg.json:
        write_json(Path(cfg.json), {"command": f"python -m tools.context {' '.join(argv)}", "rows": len(rows),
                                    "documents": documents, "torch": torch.__version__, "loss": figures,
                                    "more_behind_less": more})
    if cfg.png:
        draw(figures, Path(cfg.png))
    return 0


def draw(figures: dict[str, dict[str, float]], path: Path) -> None:
    """A line a model: loss against position. UserError where matplotlib is missing."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise UserError("png: needs matplotlib (pip install matplotlib)") from None
    axes = (figure := Figure(figsize=(7, 4.5), layout="constrained")).add_subplot()
    for name, losses in figures.items():
        axes.plot(list(losses), list(losses.values()), marker="o", label=name)
    axes.set(xlabel="position in the row", ylabel="validation loss (nats a token)")
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(path, dpi=130)


if __name__ == "__main__":
    run_script(main)
