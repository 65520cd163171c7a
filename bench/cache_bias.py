"""Which cached teacher is unbiased? The gradient of the student's logits, averaged over many draws.

    python -m bench.cache_bias --teacher=out/teacher --student=out/distilled --png=docs/results/cache_bias.png

At positions of validation text, compares the gradient of the full teacher with the gradients of caches: the k
most likely tokens, renormalised to 1; the same with all other tokens as one more outcome (the topk method of
distillation/teacher_cache.py); and k samples (its sample method). The samples of one epoch are noisy. Over
epochs, positions or seeds their mean approaches the full teacher's gradient as 1 / sqrt(draws), whereas a
bias remains (arXiv 2503.16870).
"""

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
    dataset: str = "pystdlib"  # folder under data/ (or path) with the validation text
    block_size: int = 128  # tokens per row
    rows: int = 2  # number of rows
    k: int = 32  # number of tokens kept or sampled per position
    draws: int = 256  # number of times that samples are drawn
    json: str | None = None  # also write the results to this file
    png: str | None = None  # also draw the results to this file (needs matplotlib)


@torch.no_grad()
def errors(cfg: BiasConfig) -> dict[str, list[float]]:
    """{cache: relative error of the mean gradient after 1, 2, 4, ... draws}; "draws" has these numbers."""
    folder = DataFolder(dataset_folder(cfg.dataset))
    V = folder.meta["vocab_size"]
    ids = torch.from_numpy(Rows(folder, "val", cfg.block_size).read(np.arange(cfg.rows))[:, :-1])
    y, z = (GPT.from_pretrained(hf.find_folder(path)).eval()(ids)[..., :V].flatten(0, 1).float()  # (N, V)
            for path in (cfg.teacher, cfg.student))
    log_q = y.log_softmax(-1)
    top, kept = log_q.topk(cfg.k, dim=-1)  # (N, k) both
    rest = log_q.exp().scatter(1, kept, 0.0).sum(-1)  # (N,)

    def gradient(teacher: DenseTeacher | SparseTeacher) -> Tensor:
        return soft_loss(z, teacher, slice(None), Objective(1.0))[1]

    full = gradient(DenseTeacher(y, None))

    def error(mean: Tensor) -> float:
        return ((mean - full).norm() / full.norm()).item()

    counts = [2**i for i in range(cfg.draws.bit_length()) if 2**i <= cfg.draws]
    samples = []
    generator, total = torch.Generator().manual_seed(0), torch.zeros_like(full)
    for draw in range(1, cfg.draws + 1):
        drawn = torch.multinomial(log_q.exp(), cfg.k, replacement=True, generator=generator)
        total += gradient(SparseTeacher(drawn, torch.full(drawn.shape, 1 / cfg.k)))
        if draw in counts:
            samples.append(error(total / draw))
    renormalised = error(gradient(SparseTeacher(kept, top.softmax(-1))))
    with_rest = error(gradient(SparseTeacher(kept, top.exp(), rest)))
    return {"draws": list(map(float, counts)),
            f"{cfg.k} likeliest, renormalised": [renormalised] * len(counts),
            f"{cfg.k} likeliest and the rest": [with_rest] * len(counts), f"{cfg.k} samples": samples}


def draw_png(results: dict[str, list[float]], path: Path) -> None:
    """One line per cache. UserError if matplotlib is missing."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise UserError("png: needs matplotlib (pip install matplotlib)") from None
    figure = Figure(figsize=(7, 4.5), layout="constrained")
    axes = figure.add_subplot()
    for name, values in results.items():
        if name != "draws":
            axes.plot(results["draws"], values, marker="o", markersize=4, label=name)
    axes.set(xscale="log", yscale="log", xlabel="number of draws averaged",
             ylabel="relative distance from\nthe full teacher's gradient")
    axes.grid(alpha=0.3, which="both")
    axes.legend()
    figure.savefig(path, dpi=150)


def main(argv: list[str]) -> int:
    cfg, _ = configure(BiasConfig, argv, usage=__doc__)
    results = errors(cfg)
    for name, values in results.items():
        print(f"{name:32}" + "".join(f"{value:9.3g}" for value in values))
    if cfg.json:
        write_json(Path(cfg.json), {"command": "python -m bench.cache_bias", **results})
    if cfg.png:
        draw_png(results, Path(cfg.png))
    return 0


if __name__ == "__main__":
    run_script(main)
