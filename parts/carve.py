"""A student cut out of its teacher: some of the layers, and of each the part that matters most.

    config = GPTConfig(..., n_layer=2, n_embd=128, n_head=2, intermediate_size=256)
    student = carve(teacher, config, kept_layers("every:2", 4), calibration_ids)

Layers are copied, as DistilGPT-2's were. Where the student is narrower, what a pass over some text shows to
be the most active is kept (Minitron, arXiv 2407.14679, section 2.2): channels of the residual stream by what
stands there behind the norms, heads by the size of their output, MLP neurons by theirs. Grouped queries stay
with their keys: a key/value head is kept or left with all its queries.
"""

import re

import torch
from torch import Tensor, nn

from configurator import UserError
from model import GPT, GPTConfig

WIDTHS = ("n_embd", "n_head", "n_kv_head", "intermediate_size")  # what may be less than the teacher's


def kept_layers(choice: str, depth: int) -> list[int]:
    """"0,2,5", "every:2" (the first of each two), "first:3" or "last:3" -> numbers of the layers kept."""
    kind, _, number = choice.partition(":")
    try:
        if kind in ("every", "first", "last"):
            count = int(number)
            layers = {"every": range(0, depth, count), "first": range(count),
                      "last": range(depth - count, depth)}[kind]
        else:
            layers = [int(each) for each in choice.split(",")]
    except ValueError:
        layers = []
    layers = list(layers)
    if not layers or layers != sorted(set(layers)) or not 0 <= layers[0] <= layers[-1] < depth:
        raise UserError(f"student_layers={choice}: write every:2, first:3, last:3 or rising numbers of "
                        f"layers as 0,2,5; the teacher has the layers 0 to {depth - 1}")
    return layers


def carved_config(teacher: GPTConfig, layers: list[int], widths: dict[str, int]) -> GPTConfig:
    """The teacher's, with these layers and widths. UserError for one that is wider than the teacher's."""
    from dataclasses import replace
    for key, value in widths.items():
        if value > getattr(teacher, key):
            raise UserError(f"{key}={value}: wider than the teacher, which has {getattr(teacher, key)}")
    if "n_head" in widths and "n_kv_head" not in widths:
        widths = widths | {"n_kv_head": max(1, widths["n_head"] * teacher.n_kv_head // teacher.n_head)}
    config = replace(teacher, n_layer=len(layers), **widths)
    if config.n_head * teacher.n_kv_head != config.n_kv_head * teacher.n_head:
        raise UserError(f"n_head={config.n_head}, n_kv_head={config.n_kv_head}: each key and value head has "
                        f"to keep its {teacher.n_head // teacher.n_kv_head} query heads")
    return config


@torch.no_grad()
def carve(teacher: GPT, config: GPTConfig, layers: list[int], ids: Tensor) -> GPT:
    """The student on the CPU, in float32. ids: (B, T) int64, text that shows what is active."""
    activity = measure_activity(teacher, ids)
    channels = strongest(activity["channels"], config.n_embd)
    full = teacher.config
    state = {name: tensor.float().cpu() for name, tensor in teacher.state_dict().items()}
    student = GPT(config)
    D, group = config.head_dim, full.n_head // full.n_kv_head
    for name, parameter in student.named_parameters():
        match = re.fullmatch(r"model\.layers\.(\d+)\.(.+)\.(weight|bias)", name)
        source = name if match is None else name.replace(f".{match[1]}.", f".{layers[int(match[1])]}.", 1)
        tensor, module = state[source], match[2] if match else ""
        if match:
            at = layers[int(match[1])]
            kv = strongest(activity[f"heads.{at}"].view(-1, group).sum(1), config.n_kv_head)  # (K,)
            queries = (kv[:, None] * group + torch.arange(group)).flatten()  # (H,)
            inner = {"q_proj": rows_of(queries, D), "k_proj": rows_of(kv, D), "v_proj": rows_of(kv, D),
                     "o_proj": rows_of(queries, D)}.get(module.rpartition(".")[2])
            if module.startswith("mlp."):
                inner = strongest(activity[f"neurons.{at}"], config.intermediate_size)
        if module.endswith(("_norm",)):  # of q and k: as wide as a head
            kept = tensor
        elif match is None or module.endswith("layernorm"):  # tables, norms
            kept = tensor[..., channels]
        elif module.endswith(("o_proj", "down_proj")):
            kept = tensor[channels]
            kept = kept[:, inner] if tensor.ndim == 2 else kept
        else:
            kept = tensor[inner]
            kept = kept[:, channels] if tensor.ndim == 2 else kept
        parameter.copy_(kept)
    return student


def strongest(activity: Tensor, count: int) -> Tensor:
    """The numbers of the `count` largest entries, rising."""
    return activity.topk(count).indices.sort().values


def rows_of(heads: Tensor, D: int) -> Tensor:
    """The rows of a projection that make these heads: (heads * D,)."""
    return (heads[:, None] * D + torch.arange(D)).flatten()


def measure_activity(teacher: GPT, ids: Tensor) -> dict[str, Tensor]:
    """What a pass over `ids` shows: "channels" (C,), "heads.<layer>" (H,), "neurons.<layer>" (inner,)."""
    found: dict[str, Tensor] = {"channels": torch.zeros(teacher.config.n_embd)}
    hooks = []

    def note_norm(module: nn.Module, _: tuple, output: Tensor) -> None:
        found["channels"] += output.float().abs().mean((0, 1)).cpu()  # (C,)

    def note_heads(layer: int) -> nn.Module:
        def hook(module: nn.Module, inputs: tuple) -> None:
            heads = inputs[0].float().unflatten(-1, (teacher.config.n_head, -1))  # (B, T, H, D)
            found[f"heads.{layer}"] = heads.norm(dim=-1).mean((0, 1)).cpu()  # (H,)
        return hook

    def note_neurons(layer: int) -> nn.Module:
        def hook(module: nn.Module, inputs: tuple) -> None:
            found[f"neurons.{layer}"] = inputs[0].float().abs().mean((0, 1)).cpu()  # (inner,)
        return hook

    for layer, block in enumerate(teacher.model["layers"]):
        for norm in (block.input_layernorm, block.post_attention_layernorm):
            hooks.append(norm.register_forward_hook(note_norm))
        hooks.append(block.self_attn.o_proj.register_forward_pre_hook(note_heads(layer)))
        hooks.append(block.mlp.down_proj.register_forward_pre_hook(note_neurons(layer)))
    teacher(ids.to(teacher.head_weight.device), head=lambda hidden, weight: None)
    for hook in hooks:
        hook.remove()
    return found
