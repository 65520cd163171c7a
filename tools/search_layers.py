"""Search which layers of a teacher each layer of a student should learn from, for --layer_map=.

    python -m tools.search_layers --teacher=out/base --student=out/small --dataset=pystdlib
    python distill.py --init_from=out/small --layer_map=0:1,1:3 --hidden_weight=0.5

First, both models read the same rows, and every pair of layers is compared by linear CKA (arXiv 1905.00414),
a similarity from 0 to 1 that no rotation and no scale of the hidden states changes. The most similar teacher
layer of each student layer makes the first candidate. The strategies of distillation/layer_maps.py are the
others. Then each candidate is distilled for a few steps, and the one with the lowest validation loss is
printed. A finished run in out_dir is kept. Left out: pairs that only runs could find.
"""

import contextlib
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from configurator import UserError, configure, require_not_negative, require_positive, run_script
from dataset.dataloader import Mix, Rows, text_batch
from distillation.layer_maps import STRATEGIES, layer_map
from distillation.student import ActivationHooks
from distillation.teacher import load_teacher
from model import GPT
from modeling.devices import pick_device
from tools.arms import run_once, split

ROWS = 16  # rows on which layers are compared


@dataclass(frozen=True, kw_only=True)
class SearchConfig:
    teacher: str = "out/base"  # model folder, out_dir or hub id
    student: str = "out/distilled"  # the model that is to be distilled
    dataset: str = "pystdlib"  # folder of text under data/ (or path)
    block_size: int = 128  # tokens per row
    steps: int = 50  # steps of each short run; 0 compares similarities only
    words: str = "--hidden_weight=0.5"  # more arguments of the short runs of distill.py
    out_dir: str = "out/search_layers"  # gets one folder per short run

    def __post_init__(self) -> None:
        require_positive(self, "block_size")
        require_not_negative(self, "steps")


def linear_cka(a: Tensor, b: Tensor) -> float:
    """The similarity of two sets of n vectors, (n, C) and (n, D): 0 to 1, in float64 (arXiv 1905.00414)."""
    a, b = (x.double() - x.double().mean(0) for x in (a, b))
    return float((a.T @ b).square().sum() / ((a.T @ a).norm() * (b.T @ b).norm()).clamp(min=1e-30))


@torch.no_grad()
def similarities(student: GPT, teacher: GPT, ids: Tensor) -> Tensor:
    """`linear_cka` of the outputs of all pairs of layers on ids (B, T): (student layers, teacher layers)."""
    hidden = []
    for model in (student, teacher):
        depth = model.config.n_layer
        hooks = ActivationHooks(model, list(range(depth)))
        model(ids, head=lambda *_: None)
        hidden.append([hooks.hidden[layer].flatten(0, 1) for layer in range(depth)])  # (B T, C) each
    return torch.tensor([[linear_cka(ours, theirs) for theirs in hidden[1]] for ours in hidden[0]])


def candidates(table: Tensor) -> dict[str, str]:
    """{name: --layer_map=} of the most similar pairs and of every strategy that allows the depths."""
    maps = {"similar": ",".join(f"{s}:{t}" for s, t in enumerate(table.argmax(1).tolist()))}
    for strategy in STRATEGIES:
        with contextlib.suppress(UserError):  # a strategy for other depths
            layer_map(strategy, *table.shape)
            maps[strategy] = strategy
    return maps


def short_run(cfg: SearchConfig, name: str, pairs: str) -> float:
    """The validation loss after cfg.steps steps with a layer map."""
    argv = [f"--teacher={cfg.teacher}", f"--init_from={cfg.student}", f"--dataset={cfg.dataset}",
            f"--block_size={cfg.block_size}", f"--layer_map={pairs}", f"--max_steps={cfg.steps}",
            "--eval_interval=0", "--save_interval=0", *split(cfg.words)]
    return run_once("distill.py", argv, Path(cfg.out_dir) / name, steps=cfg.steps)[-1]["val_loss"]


def main(argv: list[str]) -> None:
    cfg, _ = configure(SearchConfig, argv, usage=__doc__)
    mix, device = Mix(cfg.dataset, cfg.block_size, 0, Rows), pick_device(None)
    student, teacher = (load_teacher(name, mix.tokenizer, device, torch.float32, cfg.block_size, key)
                        for key, name in (("student", cfg.student), ("teacher", cfg.teacher)))
    if not (isinstance(student, GPT) and isinstance(teacher, GPT)):
        raise UserError("search_layers: model.py must have both architectures")
    table = similarities(student, teacher, text_batch(mix.samples(0, ROWS))["input_ids"].to(device))
    for layer, row in enumerate(table.tolist()):
        print(f"student {layer}  similarity {' '.join(f'{value:.3f}' for value in row)}")
    maps = candidates(table)
    losses = {name: short_run(cfg, name, pairs) for name, pairs in maps.items()} if cfg.steps else {}
    for name, loss in losses.items():
        print(f"{name:20} val_loss {loss:.4f}")
    print(f"--layer_map={maps[min(losses, key=losses.__getitem__, default='similar')]}")


if __name__ == "__main__":
    run_script(main)
