"""Prune a student from its teacher: keep some of the layers, and the most useful part of each.

    config = pruned_config(teacher.config, [0, 2], {"n_embd": 128, "n_head": 2, "intermediate_size": 256})
    student = prune(teacher, config, [0, 2], calibration_ids)

The kept layers are copied, as in DistilGPT-2. If the student is narrower than the teacher, one forward pass
over some text measures what to keep:

attention   the key/value heads with the largest outputs, each with all of its query heads
MLP         the most active neurons (both: Minitron, arXiv 2407.14679, section 2.2)
residual    with RMSNorm, the first principal components of the residual stream: RMSNorm commutes with a
            rotation, so the stream can be rotated onto them first (SliceGPT, arXiv 2401.15024; here one
            rotation for all layers). With LayerNorm, and with ternary weights, the most active channels.

Shapes: C width of the residual stream, H query heads, K key/value heads, D width of a head.
"""

import math
import re
from dataclasses import replace
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from configurator import UserError
from model import GPT, GPTConfig

WIDTHS = ("n_embd", "n_head", "n_kv_head", "intermediate_size")  # keys that may be smaller than the teacher's
WRITERS = ("o_proj", "down_proj")  # matrices that write to the residual stream
READER_NORMS = {"q_proj": "input_layernorm", "k_proj": "input_layernorm", "v_proj": "input_layernorm",
                "gate_proj": "post_attention_layernorm", "up_proj": "post_attention_layernorm"}


def kept_layers(choice: str, depth: int) -> list[int]:
    """The numbers of the kept layers. With depth 6: "every:2" is [0, 2, 4], "first:3" [0, 1, 2], "last:3"
    [3, 4, 5], and "0,2,5" [0, 2, 5]. Raises UserError for anything else."""
    kind, _, number = choice.partition(":")
    try:
        if kind in ("every", "first", "last"):
            count = int(number)
            layers = list({"every": range(0, depth, count), "first": range(count),
                           "last": range(depth - count, depth)}[kind])
        else:
            layers = [int(each) for each in choice.split(",")]
    except ValueError:
        layers = []
    if not layers or layers != sorted(set(layers)) or not 0 <= layers[0] <= layers[-1] < depth:
        raise UserError(f"student_layers={choice}: write every:2, first:3, last:3 or increasing numbers such "
                        f"as 0,2,5; the teacher has the layers 0 to {depth - 1}")
    return layers


def pruned_config(teacher: GPTConfig, layers: list[int], widths: dict[str, Any]) -> GPTConfig:
    """The teacher's config with these layers and widths. widths: {key of WIDTHS: its value}.

    Raises UserError if the widths do not fit the teacher.
    """
    if teacher.n_expert or teacher.sink_logits:
        raise UserError("n_expert, sink_logits: a model with experts or sink logits cannot be pruned")
    for key, value in widths.items():
        if value > getattr(teacher, key):
            raise UserError(f"{key}={value}: wider than the teacher, which has {getattr(teacher, key)}")
    if "n_head" in widths and "n_kv_head" not in widths:
        widths = widths | {"n_kv_head": max(1, widths["n_head"] * teacher.n_kv_head // teacher.n_head)}
    config = replace(teacher, n_layer=len(layers), **widths)
    if config.n_head * teacher.n_kv_head != config.n_kv_head * teacher.n_head:
        raise UserError(f"n_head={config.n_head}, n_kv_head={config.n_kv_head}: each key/value head must "
                        f"keep its {teacher.n_head // teacher.n_kv_head} query heads")
    return config


def measure_activity(teacher: GPT, ids: Tensor) -> dict[str, Tensor]:
    """Run `ids`, (B, T) int64, through the teacher and measure how active its parts are.

    Returns "channels" (C,), the mean size of the norms' outputs, summed over the norms; "covariance" (C, C),
    that of the norms' inputs, each token scaled to length 1; and "heads.<layer>" (H,) and "neurons.<layer>"
    (inner,), the mean size of the outputs of each head and neuron.
    """
    C, H = teacher.config.n_embd, teacher.config.n_head
    activity: dict[str, Tensor] = {"channels": torch.zeros(C), "covariance": torch.zeros(C, C)}

    def record_norm(module: nn.Module, inputs: tuple, output: Tensor) -> None:
        activity["channels"] += output.float().abs().mean((0, 1)).cpu()  # (C,)
        stream = F.normalize(inputs[0].float().flatten(0, 1), dim=-1)  # (B T, C)
        activity["covariance"] += (stream.T @ stream).cpu()

    def record_heads(layer: int, module: nn.Module, inputs: tuple) -> None:
        heads = inputs[0].float().unflatten(-1, (H, -1))  # (B, T, H, D)
        activity[f"heads.{layer}"] = heads.norm(dim=-1).mean((0, 1)).cpu()  # (H,)

    def record_neurons(layer: int, module: nn.Module, inputs: tuple) -> None:
        activity[f"neurons.{layer}"] = inputs[0].float().abs().mean((0, 1)).cpu()  # (inner,)

    hooks = [teacher.model["norm"].register_forward_hook(record_norm)]
    for layer, block in enumerate(teacher.model["layers"]):
        hooks += [norm.register_forward_hook(record_norm)
                  for norm in (block.input_layernorm, block.post_attention_layernorm)]
        hooks += [block.self_attn.o_proj.register_forward_pre_hook(partial(record_heads, layer)),
                  block.mlp.down_proj.register_forward_pre_hook(partial(record_neurons, layer))]
    teacher(ids.to(teacher.head_weight.device), head=lambda hidden, weight: None)
    for hook in hooks:
        hook.remove()
    return activity


@torch.no_grad()
def copy_tables(student: GPT, tensors: dict[str, Tensor]) -> None:
    """Give the student the teacher's tables of tokens. tensors: the teacher's, by name.

    A narrower student gets the first principal components of the input table's rows, scaled to the same mean
    square per entry. Raises UserError if the student is wider.
    """
    table = tensors["model.embed_tokens.weight"].float()  # (V, C of the teacher)
    C, width = student.config.n_embd, table.shape[1]
    if C > width:
        raise UserError(f"student_embeddings=teacher: n_embd={C} is wider than the teacher's {width}")
    # (C of the teacher, C): the eigenvectors with the largest eigenvalues, which eigh lists last
    basis = torch.linalg.eigh(table.T @ table).eigenvectors.flip(1)[:, :C] if C < width else torch.eye(C)
    scale = table.norm() / (table @ basis).norm() * math.sqrt(C / width)
    for name, parameter in student.named_parameters():
        if name in ("model.embed_tokens.weight", "lm_head.weight"):
            rows = tensors.get(name, table).float() @ basis * scale  # (V, C)
            parameter[:len(rows)] = rows[:len(parameter)]


def strongest(activity: Tensor, count: int) -> Tensor:
    """The indices of the `count` largest entries, in increasing order."""
    return activity.topk(count).indices.sort().values


def head_rows(heads: Tensor, D: int) -> Tensor:
    """The rows of a projection that belong to these heads: (heads * D,)."""
    return (heads[:, None] * D + torch.arange(D)).flatten()


def rotated(state: dict[str, Tensor], basis: Tensor, width: int) -> dict[str, Tensor]:
    """The weights of the same function, with the residual stream expressed in another basis.

    basis: (C, C), orthonormal columns; the first `width` coordinates will be kept. RMSNorm commutes with a
    rotation once its weights are multiplied into the matrices that read its output. All weights of the norm
    are then sqrt(C / width): keeping `width` of C coordinates shortens the vectors little, but raises their
    root mean square by about this factor. A tied output matrix is also the input table, so it cannot absorb
    the last norm's weights; their mean stays in the norm, which is exact only if they are all equal.
    """
    rescale = math.sqrt(len(basis) / width)
    result = {}
    for name, tensor in state.items():
        module, _, kind = name.rpartition(".")
        last = module.rpartition(".")[2]
        if last in READER_NORMS and kind == "weight":
            block = ".".join(name.split(".")[:3])  # model.layers.<number>
            tensor = tensor * state[f"{block}.{READER_NORMS[last]}.weight"] @ basis
        elif last in WRITERS:
            tensor = basis.T @ tensor
        elif name == "lm_head.weight":
            tensor = tensor * state["model.norm.weight"] @ basis
        elif last in ("embed_tokens", "embed_positions"):
            tensor = tensor @ basis
        elif last in ("input_layernorm", "post_attention_layernorm", "norm"):
            mean = tensor.mean() if last == "norm" and "lm_head.weight" not in state else 1.0
            tensor = torch.ones_like(tensor) * mean * rescale
        result[name] = tensor
    return result


@torch.no_grad()
def prune(teacher: GPT, config: GPTConfig, layers: list[int], ids: Tensor) -> GPT:
    """The student, on the CPU in float32. ids: (B, T) int64, text to measure the activity on."""
    activity, full = measure_activity(teacher, ids), teacher.config
    state = {name: tensor.float().cpu() for name, tensor in teacher.state_dict().items()}
    channels = strongest(activity["channels"], config.n_embd)
    if config.n_embd < full.n_embd and full.norm == "rmsnorm" and not full.ternary:
        components = torch.linalg.eigh(activity["covariance"]).eigenvectors.flip(1)  # (C, C), largest first
        state, channels = rotated(state, components, config.n_embd), torch.arange(config.n_embd)
    student, D, group = GPT(config), config.head_dim, full.n_head // full.n_kv_head
    for name, parameter in student.named_parameters():
        match = re.fullmatch(r"model\.layers\.(\d+)\.(.+)\.(weight|bias)", name)
        if match is None:  # the tables and the last norm
            parameter.copy_(state[name][..., channels])
            continue
        layer, module = layers[int(match[1])], match[2].rpartition(".")[2]
        tensor = state[f"model.layers.{layer}.{match[2]}.{match[3]}"]
        kv = strongest(activity[f"heads.{layer}"].view(-1, group).sum(1), config.n_kv_head)  # (K,)
        queries = (kv[:, None] * group + torch.arange(group)).flatten()  # (H,)
        neurons = strongest(activity[f"neurons.{layer}"], config.intermediate_size)
        inner = {"q_proj": head_rows(queries, D), "k_proj": head_rows(kv, D), "v_proj": head_rows(kv, D),
                 "o_proj": head_rows(queries, D), "gate_proj": neurons, "up_proj": neurons,
                 "down_proj": neurons}.get(module)
        if inner is not None:
            rows, columns = (channels, inner) if module in WRITERS else (inner, channels)
            tensor = tensor[rows][:, columns] if tensor.ndim == 2 else tensor[rows]  # a bias has rows only
        elif module not in ("q_norm", "k_norm"):  # the block's norms; those of q and k are as wide as a head
            tensor = tensor[channels]
        parameter.copy_(tensor)
    return student
