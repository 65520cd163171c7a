"""Which cached teacher teaches the truth? The gradient of the student's logits, averaged over many draws.

    python -m bench.cache_bias --teacher=out/teacher --student=out/distilled --png=docs/results/cache_bias.png

For positions of validation text, the gradient that the whole teacher gives, and what caches of it give: k
likeliest tokens renormalised to 1, the same with all others as one more outcome
(distillation/teacher_cache.py's topk), and samples (its sample). Samples of one epoch are noisy; over
epochs, positions or seeds their mean goes to the whole teacher's gradient as 1 / sqrt(draws), where a bias
stays (arXiv 2503.16870)."""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from configurator import UserError, configure, run_script
from dataset.dataloader import Rows, dataset_folder
from dataset.shards import DataFolder
from distillation.divergences import DenseTeacher, Objective, SparseTeacher, soft_loss
from formats import hf
from formats.files import write_json
from model import GPT


@dataclass(frozen=True, kw_only=True)
class BiasConfig:
    teacher: str = "out/teacher"  # model folder or out_dir
    student: str = "out/distilled"  # model folder or out_dir
    dataset: str = "pystdlib"  # folder under data/ (or path) whose validation text is read
    block_size: int = 128  # tokens a row
    rows: int = 2  # rows of text
    k: int = 32  # tokens kept, or drawn
    draws: int = 256  # times that samples are drawn anew
    json: str | None = None  # also write the figures here
    png: str | None = None  # also draw them here (needs matplotlib)


@torch.no_grad()
def errors(cfg: BiasConfig) -> dict[str, list[float]]:
    """{name: relative error of the mean gradient after 1, 2, 4, ... draws}."""
    folder = DataFolder(dataset_folder(cfg.dataset))
    V = folder.meta["vocab_size"]
    read = Rows(folder, "val", cfg.block_size).read(np.arange(cfg.rows))
    ids = torch.from_numpy(read[:, :-1])
    y, z = (GPT.from_pretrained(hf.find_folder(path)).eval()(ids)[..., :V].flatten(0, 1).float()  # (N, V)
            for path in (cfg.teacher, cfg.student))
    log_q = y.log_softmax(-1)

    def gradient(teacher: DenseTeacher | SparseTeacher) -> Tensor:
        return soft_loss(z, teacher, slice(None), Objective(1.0))[1]

    top, kept = log_q.topk(cfg.k, dim=-1)  # (N, k) both
    rest = log_q.exp().scatter(1, kept, 0.0).sum(-1)  # (N,)
    whole = gradient(DenseTeacher(y, None))
    counts = [2**i for i in range(cfg.draws.bit_length()) if 2**i <= cfg.draws]

    def error(mean: Tensor) -> float:
        return ((mean - whole).norm() / whole.norm()).item()

    found = {"draws": [float(count) for count in counts],
             f"{cfg.k} likeliest, renormalised": [
                 error(gradient(SparseTeacher(kept, top.softmax(-1))))] * len(counts),
             f"{cfg.k} likeliest and the rest": [
                 error(gradient(SparseTeacher(kept, top.exp(), rest)))] * len(counts),
             f"{cfg.k} samples": []}
    generator, total = torch.Generator().manual_seed(0), torch.zeros_like(whole)
    for draw in range(1, cfg.draws + 1):
        drawn = torch.multinomial(log_q.exp(), cfg.k, replacement=True, generator=generator)
        total += gradient(SparseTeacher(drawn, torch.full(drawn.shape, 1 / cfg.k)))
        if draw in counts:
            found[f"{cfg.k} samples"].append(error(total / draw))
    return found


def draw(found: dict[str, list[float]], path: Path) -> None:
    """A line a kind of cache. UserError where matplotlib is missing."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise UserError("png: needs matplotlib (pip install matplotlib)") from None
    figure = Figure(figsize=(7, 4.5), layout="constrained")
    axes = figure.add_subplot()
    for name, values in found.items():
        if name != "draws":
            axes.plot(found["draws"], values, marker="o", markersize=4, label=name)
    axes.set(xscale="log", yscale="log", xlabel="draws averaged",
             ylabel="distance from the whole teacher's gradient\n(relative)")
    axes.grid(alpha=0.3, which="both")
    axes.legend()
    figure.savefig(path, dpi=150)


def main(argv: list[str]) -> int:
    cfg, _ = configure(BiasConfig, argv, usage=__doc__)
    found = errors(cfg)
    for name, values in found.items():
        print(f"{name:32}" + "".join(f"{value:9.3g}" for value in values))
    if cfg.json:
        write_json(Path(cfg.json), {"command": "python -m bench.cache_bias", **found})
    if cfg.png:
        draw(found, Path(cfg.png))
    return 0


if __name__ == "__main__":
    run_script(main)
