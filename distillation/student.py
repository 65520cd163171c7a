"""The student: a GPT that can also learn from the teacher's layers, by the losses of layer_losses.py.

    student = Student(config, pairs=[(0, 1), (1, 3)], teacher_width=256)
    hooks = ActivationHooks(student, [0, 1]), ActivationHooks(teacher, [1, 3])
    ... a forward pass of each model, which fills the hooks ...
    losses = feature_loss(student, *hooks, batch, "cosine", None)         # (2,)

Student adds projections to a GPT. Where the student is narrower than the teacher, a trained matrix per layer
maps the student's hidden states to the teacher's width before they are compared. The matrices are trained and
resumed with the student. A checkpoint keeps them in projections.safetensors, which other programs ignore.

ActivationHooks records the hidden states and the q, k, v of chosen blocks. feature_loss averages the layer
losses over the mapped pairs of layers.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from dataset.dataloader import IGNORE
from distillation import layer_losses
from formats import hf
from formats.files import write_tensors
from formats.weights import state_of
from model import GPT, GPTConfig
from modeling.devices import named_generator

PROJECTIONS = "projections.safetensors"
# The temperature 0.1 of info_nce is that of SimCLR, arXiv 2002.05709.
HIDDEN_LOSSES: dict[str, Callable[[Tensor, Tensor, Tensor], Tensor]] = {
    "mse": layer_losses.hidden_mse, "cosine": layer_losses.hidden_cosine,
    "sinkhorn": layer_losses.sinkhorn_loss, "info_nce": partial(layer_losses.info_nce, temperature=0.1)}
Heads = tuple[Tensor, Tensor, Tensor]  # q, k, v of a block: (B, heads, T, D) each, after the rotary embedding


class Student(GPT):
    """A GPT with a projection for each mapped layer whose width differs from the teacher's."""

    def __init__(self, config: GPTConfig, pairs: Sequence[tuple[int, int]] = (),
                 teacher_width: int | None = None, seed: int = 0):
        """pairs: (student layer, teacher layer). teacher_width: None if no hidden states are compared."""
        super().__init__(config)
        self.pairs, self.seed = pairs, seed
        self.projections = nn.ModuleDict()
        if teacher_width not in (None, config.n_embd):
            for layer in sorted({layer for layer, _ in pairs}):
                self.projections[str(layer)] = nn.Linear(config.n_embd, teacher_width, bias=False)
        if not self.head_weight.is_meta:
            self.init_weights(seed)

    def projected(self, layer: int, hidden: Tensor) -> Tensor:
        """The output of a layer, (B, T, C), mapped to the teacher's width."""
        return self.projections[str(layer)](hidden) if str(layer) in self.projections else hidden

    def num_parameters(self, active: bool = False) -> int:
        """The parameters of the GPT, without the projections."""
        return super().num_parameters(active) - sum(p.numel() for p in self.projections.parameters())

    def num_saved(self) -> int:
        """The parameters that a checkpoint stores, with the projections."""
        return super().num_parameters()

    def tensors_of(self, folder: Path) -> Iterator[tuple[str, Tensor]]:
        """The weights in a folder. A projection that is missing there, or has another shape, is redrawn."""
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
        """Save the GPT as `GPT.save_pretrained` does, and the projections in a file of their own."""
        state = state or state_of(self)
        own = {name: tensor.cpu() for name, tensor in state.items() if name.startswith("projections.")}
        super().save_pretrained(path, {name: state[name] for name in state.keys() - own.keys()}, eos_token_id)
        if own:
            write_tensors(Path(path) / PROJECTIONS, own)


def record_hidden(module: Any, inputs: tuple, output: Tensor) -> None:
    module.recorded = output


def record_heads(module: Any, q: Tensor, k: Tensor, v: Tensor) -> None:
    module.recorded = (q, k, v)


class ActivationHooks:
    """Records what chosen blocks of a GPT computed in its latest forward pass.

    hidden[layer] is the output of a block, (B, T, C). heads[layer] is its (q, k, v). Each block stores its
    own record: torch.compile would compile a hook that knows the number of its layer once per block.
    """

    def __init__(self, model: GPT, layers: list[int]):
        self.blocks = {layer: model.model["layers"][layer] for layer in layers}
        for block in self.blocks.values():
            block.register_forward_hook(record_hidden)
            block.self_attn.register_qkv_hook(record_heads)

    @property
    def hidden(self) -> dict[int, Tensor]:
        return {layer: block.recorded for layer, block in self.blocks.items()}

    @property
    def heads(self) -> dict[int, Heads]:
        return {layer: block.self_attn.recorded for layer, block in self.blocks.items()}


def gradient_cosine(losses: tuple[Tensor, Tensor], parameters: list[nn.Parameter]) -> Tensor:
    """The cosine of the angle between the gradients of two losses, a scalar; 0 if one of them is 0.

    The graphs of the losses are kept.
    """
    gradients = [torch.autograd.grad(loss, parameters, retain_graph=True, materialize_grads=True)
                 for loss in losses]
    # (all parameters,) both
    a, b = (torch.cat([gradient.flatten() for gradient in each]).double() for each in gradients)
    return a @ b / (a.norm() * b.norm()).clamp(min=1e-30)


def noise_term(parameters: list[nn.Parameter], norm: float, seed: int) -> Tensor:
    """A term of the loss whose gradient is Gaussian noise of about this norm, the same for equal seeds.

    It is like the noise of a smaller batch, but equally large in every direction (arXiv 1511.06807).
    """
    size = sum(parameter.numel() for parameter in parameters)
    generator = torch.Generator(parameters[0].device).manual_seed(seed)
    draws = (torch.randn(p.shape, generator=generator, device=p.device) for p in parameters)
    return torch.stack([(draw * p).sum() for draw, p in zip(draws, parameters, strict=True)]).sum() * (
        norm / size**0.5)


def attention_loss(ours: Heads, theirs: Heads, weights: Tensor, document_ids: Tensor | None,
                   kind: str) -> Tensor:
    """The loss between the attention of two layers; relations are averaged over q, k and v."""
    if kind == "mse":
        return layer_losses.attention_mse(ours[0], ours[1], theirs[0], theirs[1], weights, document_ids)
    total = weights.new_zeros(())
    for student, teacher in zip(ours, theirs, strict=True):
        heads = math.gcd(student.shape[1], teacher.shape[1])
        student, teacher = (x.transpose(1, 2).flatten(2) for x in (student, teacher))  # (B, T, heads * D)
        total = total + layer_losses.relation_loss(student, teacher, heads, weights, document_ids,
                                                   squared=kind == "relations_mse")
    return total / 3


def feature_loss(student: Student, ours: ActivationHooks, theirs: ActivationHooks, batch: dict[str, Any],
                 hidden_kind: str | None, attention_kind: str | None) -> Tensor:
    """(2,): the loss of the hidden states and the loss of the attention, neither multiplied by its weight.

    Each loss is a mean over the mapped pairs, summed over the positions of the targets. hidden_kind: a key of
    HIDDEN_LOSSES. attention_kind: relations, relations_mse or mse. With None, that loss is 0.
    Call this inside the student's forward pass, where FSDP has gathered the projections.
    """
    B, T = batch["input_ids"].shape
    if "positions" in batch:
        weights = torch.zeros(B * T, device=batch["input_ids"].device)
        weights = weights.index_fill(0, batch["positions"], 1.0).view(B, T)  # 1 at the targets
    else:
        weights = (batch["targets"] != IGNORE).float()  # (B, T)
    hidden = attention = weights.new_zeros(())
    for layer, teacher_layer in student.pairs:
        if hidden_kind:
            projected = student.projected(layer, ours.hidden[layer])  # (B, T, width of the teacher)
            hidden = hidden + HIDDEN_LOSSES[hidden_kind](projected, theirs.hidden[teacher_layer], weights)
        if attention_kind:
            attention = attention + attention_loss(ours.heads[layer], theirs.heads[teacher_layer], weights,
                                                   batch.get("document_ids"), attention_kind)
    return torch.stack((hidden, attention)) / len(student.pairs)
