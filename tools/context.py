"""Does a model use its context? Loss against position, for the checkpoints of a run side by side.

    python -m tools.context --run=out/tiny_curriculum --dataset=books --block_size=512
    python -m tools.context --run=a/step_000600,a/step_000800 --dataset=books --png=context.png

A token at position p of a row has p tokens before it. The rows are those validation rows that lie within one
document, so that all of those tokens are about the same thing, and every checkpoint reads the same ones. A
model that uses its context has a lower loss at later positions; one that was not trained on such positions, a
higher one.
"""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

from configurator import UserError, configure, run_script
from model import GPT
from parts.checkpoint import step_folders
from parts.data import Rows, dataset_folder
from parts.run import pick_device
from parts.shards import DataFolder, write_json
from parts.tokenizer import Tokenizer


@dataclass(frozen=True, kw_only=True)
class ContextConfig:
    run: str = "out/tiny_curriculum"  # an out_dir, whose checkpoints are all read, or folders with commas
    dataset: str = "books"  # folder under data/ (or path) whose validation text is read
    block_size: int = 512  # tokens a row
    rows: int = 200  # rows, at the most
    device: str | None = None  # cpu, cuda, ...; None: the best there is
    json: str | None = None  # also write the figures here
    png: str | None = None  # also draw them here (needs matplotlib)

    def __post_init__(self) -> None:
        if self.block_size < 1 or self.rows < 1:
            raise UserError(f"block_size={self.block_size}, rows={self.rows}: must be positive")


def rows_within_documents(data: DataFolder, block_size: int, limit: int) -> np.ndarray:
    """The first `limit` validation rows within one document, (rows, T + 1). UserError if there is none."""
    rows = Rows(data, "val", block_size)
    everything = rows.read(np.arange(len(rows)))
    inside = ~(everything == Tokenizer.load(data.folder).eot_id).any(axis=1)
    if not inside.any():
        raise UserError(f"{data.folder}: no document has {block_size} validation tokens")
    return everything[inside][:limit]


def loss_by_position(model: GPT, rows: np.ndarray) -> torch.Tensor:
    """Mean loss in nats of the targets at each position: (rows, T + 1) int64 -> (T,) float64."""
    total = torch.zeros(rows.shape[1] - 1, dtype=torch.float64)
    with torch.no_grad():
        for part in torch.from_numpy(rows).to(model.head_weight.device).split(4):
            logits = model(part[:, :-1])  # (B, T, V)
            nll = F.cross_entropy(logits.float().transpose(1, 2), part[:, 1:], reduction="none")  # (B, T)
            total += nll.sum(dim=0).double().cpu()
    return total / len(rows)


def buckets(T: int) -> list[tuple[int, int]]:
    """Positions 0-31, 32-63, 64-127, ... as (first, last + 1), each twice as wide, up to T."""
    ends = [0, *(32 * 2**k for k in range(32) if 32 * 2**k < T), T]
    return list(zip(ends, ends[1:], strict=False))


def main(argv: list[str]) -> int:
    cfg, _ = configure(ContextConfig, argv, usage=__doc__)
    folders = step_folders(Path(cfg.run)) or [Path(name) for name in cfg.run.split(",")]
    rows = rows_within_documents(DataFolder(dataset_folder(cfg.dataset)), cfg.block_size, cfg.rows)
    places, figures = buckets(cfg.block_size), {}
    print(f"loss in nats of {len(rows)} rows at positions ...\n" + " " * 24
          + "".join(f"{f'{first}-{last - 1}':>11}" for first, last in places))
    for folder in folders:
        model = GPT.from_pretrained(folder, pick_device(cfg.device)).eval()
        if cfg.block_size > model.config.block_size:
            model.reconfigure(block_size=cfg.block_size)
        losses = loss_by_position(model, rows)
        figures[str(folder)] = {f"{first}-{last - 1}": losses[first:last].mean().item()
                                for first, last in places}
        print(f"{folder.name:24}" + "".join(f"{loss:11.4f}" for loss in figures[str(folder)].values()))
    if cfg.json:
        write_json(Path(cfg.json), {"command": f"python -m tools.context {' '.join(argv)}", "rows": len(rows),
                                    "torch": torch.__version__, "loss": figures})
    if cfg.png:
        draw(figures, Path(cfg.png))
    return 0


def draw(figures: dict[str, dict[str, float]], path: Path) -> None:
    """A line a checkpoint: loss against position."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise UserError("png: needs matplotlib (pip install matplotlib)") from None
    axes = (figure := Figure(figsize=(7, 4.5), layout="constrained")).add_subplot()
    for name, losses in figures.items():
        axes.plot(list(losses), list(losses.values()), marker="o", label=Path(name).name)
    axes.set(xlabel="position in the row", ylabel="validation loss (nats a token)")
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(path, dpi=130)


if __name__ == "__main__":
    run_script(main)
