"""A GPT that is taught from inside as well: its layers meet a teacher's.

    student = Student(config, pairs=[(0, 1), (1, 3)], teacher_width=256)
    taps = Taps(student, [0, 1]), Taps(teacher, [1, 3])       # what the blocks of a forward pass gave
    hidden, attention = inside_loss(student, *taps, batch, cfg)

Where a loss compares outputs of unequal width, a learned matrix takes the student's to the teacher's. Those
matrices are trained and resumed with the student, and stand in projections.safetensors beside its weights,
where no other program looks.
"""

import math
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from dataset.dataloader import IGNORE
from distillation.layer_losses import (
    attention_mse,
    hidden_cosine,
    hidden_mse,
    info_nce,
    relation_loss,
    sinkhorn_loss,
)
from formats import hf
from model import GPT, GPTConfig
from modeling.devices import named_generator

PROJECTIONS = "projections.safetensors"


class Student(GPT):
    """A GPT, and a projection for each of its layers that learns from one of another width."""

    def __init__(self, config: GPTConfig, pairs: list[tuple[int, int]] = (), teacher_width: int | None = None,
                 seed: int = 0):
        """pairs: (layer, teacher's layer). teacher_width: where outputs of blocks are compared."""
        super().__init__(config)
        self.pairs, self.seed = pairs, seed
        self.projections = nn.ModuleDict()
        if teacher_width not in (None, config.n_embd):
            for layer in sorted({layer for layer, _ in pairs}):
                self.projections[str(layer)] = nn.Linear(config.n_embd, teacher_width, bias=False)
        if not self.head_weight.is_meta:
            self.init_weights(seed)

    def projected(self, layer: int, hidden: Tensor) -> Tensor:
        """A layer's output (B, T, C), as wide as the teacher's."""
        return self.projections[str(layer)](hidden) if str(layer) in self.projections else hidden

    def num_parameters(self) -> int:
        return super().num_parameters() - sum(p.numel() for p in self.projections.parameters())

    def tensors_of(self, folder: Path) -> Iterator[tuple[str, Tensor]]:
        """The folder's weights; projections that it does not have in this width start anew."""
        yield from hf.read_tensors(folder)
        stored = load_file(folder / PROJECTIONS) if (folder / PROJECTIONS).is_file() else {}
        for name, parameter in self.named_parameters():
            if name.startswith("projections."):
                generator = named_generator(self.seed, name)
                new = 0.02 * torch.randn(parameter.shape, generator=generator)
                fits = name in stored and stored[name].shape == new.shape
                yield name, stored[name] if fits else new

    def save_pretrained(self, path: str | Path, state: dict[str, Tensor] | None = None,
                        eos_token_id: hf.EndIds = None) -> None:
        if state is None:
            state = {name: parameter.detach() for name, parameter in self.named_parameters()}
        own = {name: tensor.cpu() for name, tensor in state.items() if name.startswith("projections.")}
        super().save_pretrained(path, {name: state[name] for name in state.keys() - own.keys()}, eos_token_id)
        if own:
            save_file(own, Path(path) / PROJECTIONS)


class ActivationHooks:
    """What some blocks of a GPT gave in its latest forward pass."""

    def __init__(self, model: GPT, layers: list[int]):
        """hidden[layer]: (B, T, C), a block's output. heads[layer]: its q, k, v, (B, heads, T, D) each."""
        self.hidden: dict[int, Tensor] = {}
        self.heads: dict[int, tuple[Tensor, Tensor, Tensor]] = {}
        for layer in set(layers):
            block = model.model["layers"][layer]
            block.register_forward_hook(self.note(layer))
            block.self_attn.attn_hook = lambda q, k, v, layer=layer: self.heads.__setitem__(layer, (q, k, v))

    def note(self, layer: int) -> Any:
        def hook(module: nn.Module, inputs: tuple, output: Tensor) -> None:
            self.hidden[layer] = output
        return hook


def feature_loss(student: Student, ours: ActivationHooks, theirs: ActivationHooks, batch: dict[str, Any], cfg: Any) -> Tensor:
    """(2,): the losses of hidden states and of attention, each the mean over the mapped pairs, summed over
    the positions of the targets; 0 for one whose weight is 0.

    cfg: has hidden_loss, hidden_weight, attention_loss, attention_weight. Call it inside the student's
    forward pass, where its projections are gathered.
    """
    B, T = batch["input_ids"].shape
    if "positions" in batch:
        weights = torch.zeros(B * T, device=batch["input_ids"].device)
        weights = weights.index_fill(0, batch["positions"], 1.0).view(B, T)
    else:
        weights = (batch["targets"] != IGNORE).float()  # (B, T)
    documents = batch.get("document_ids")
    hidden = attention = weights.new_zeros(())
    for layer, teacher_layer in student.pairs:
        if cfg.hidden_weight:
            loss = {"mse": hidden_mse, "cosine": hidden_cosine, "sinkhorn": sinkhorn_loss,
                    "info_nce": partial(info_nce, temperature=0.1)}[cfg.hidden_loss]
            hidden = hidden + loss(student.projected(layer, ours.hidden[layer]), theirs.hidden[teacher_layer],
                                   weights)
        if cfg.attention_weight:
            attention = attention + attention_loss(ours.heads[layer], theirs.heads[teacher_layer], weights,
                                                   documents, cfg.attention_loss)
    return torch.stack((hidden, attention)) / len(student.pairs)


def attention_loss(ours: tuple[Tensor, ...], theirs: tuple[Tensor, ...], weights: Tensor,
                   documents: Tensor | None, kind: str) -> Tensor:
    """Between two layers' q, k and v, (B, heads, T, D) each. relations: the mean over the three."""
    if kind == "mse":
        return attention_mse(*ours[:2], *theirs[:2], weights=weights, document_ids=documents)
    total = weights.new_zeros(())
    for mine, other in zip(ours, theirs, strict=True):
        heads = math.gcd(mine.shape[1], other.shape[1])
        flat = [each.transpose(1, 2).flatten(2) for each in (mine, other)]  # (B, T, heads * D)
        total = total + relation_loss(*flat, heads, weights=weights, document_ids=documents)
    return total / 3
