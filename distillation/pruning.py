"""A student cut out of its teacher: some of the layers, and of each the part that matters most.

    config = carved_config(teacher.config, [0, 2], {"n_embd": 128, "n_head": 2, "intermediate_size": 256})
    student = carve(teacher, config, [0, 2], calibration_ids)

Layers are copied, as DistilGPT-2's were. Where the student is narrower, a pass over some text shows what to
keep. Heads and MLP neurons: the most active (Minitron, arXiv 2407.14679, section 2.2); a key/value head is
kept or left with all its queries. The residual stream: with RMSNorm, which does not mind a rotation, its
first principal components (SliceGPT, arXiv 2401.15024, here one rotation for all layers), else its most
active channels.
"""

import math
import re
from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from configurator import UserError
from model import GPT, GPTConfig

WRITERS = ("o_proj", "down_proj")  # the matrices that write to the residual stream
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


def pruned_config(teacher: GPTConfig, layers: list[int], widths: dict[str, int]) -> GPTConfig:
    """The teacher's, with these layers and widths. UserError for one that is wider than the teacher's."""
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
def prune(teacher: GPT, config: GPTConfig, layers: list[int], ids: Tensor) -> GPT:
    """The student on the CPU, in float32. ids: (B, T) int64, text that shows what is active."""
    activity, full = measure_activity(teacher, ids), teacher.config
    state = {name: tensor.float().cpu() for name, tensor in teacher.state_dict().items()}
    channels = strongest(activity["channels"], config.n_embd)
    if config.n_embd < full.n_embd and full.norm == "rmsnorm" and not full.ternary:
        components = torch.linalg.eigh(activity["covariance"]).eigenvectors.flip(1)  # (C, C), largest first
        state, channels = rotated(state, components, config.n_embd), torch.arange(config.n_embd)
    student, D, group = GPT(config), config.head_dim, full.n_head // full.n_kv_head
    for name, parameter in student.named_parameters():
        match = re.fullmatch(r"model\.layers\.(\d+)\.(.+)\.(weight|bias)", name)
        if match is None:  # tables, the last norm
            parameter.copy_(state[name][..., channels])
            continue
        at, module = layers[int(match[1])], match[2].rpartition(".")[2]
        tensor = state[f"model.layers.{at}.{match[2]}.{match[3]}"]
        kv = strongest(activity[f"heads.{at}"].view(-1, group).sum(1), config.n_kv_head)  # (K,)
        queries = (kv[:, None] * group + torch.arange(group)).flatten()  # (H,)
        neurons = strongest(activity[f"neurons.{at}"], config.intermediate_size)
        inner = {"q_proj": head_rows(queries, D), "k_proj": head_rows(kv, D), "v_proj": head_rows(kv, D),
                 "o_proj": head_rows(queries, D), "gate_proj": neurons, "up_proj": neurons,
                 "down_proj": neurons}.get(module)
        if module in ("q_norm", "k_norm"):  # as wide as a head
            kept = tensor
        elif inner is None:  # the block's norms
            kept = tensor[channels]
        else:
            rows, columns = (channels, inner) if module in WRITERS else (inner, channels)
            kept = tensor[rows][:, columns] if tensor.ndim == 2 else tensor[rows]
        parameter.copy_(kept)
    return student


def rotated(state: dict[str, Tensor], basis: Tensor, width: int) -> dict[str, Tensor]:
    """The weights of the same function with the residual stream in another basis, (C, C) orthonormal columns.

    RMSNorm commutes with a rotation once its weights are multiplied into the matrices that read behind it;
    they then are 1, here times what keeps the norm of the first `width` coordinates. Only a tied output
    matrix, which is the input's, cannot take the last norm's weights in: their mean stays there.
    """
    rescale = math.sqrt(len(basis) / width)
    result = {}
    for name, tensor in state.items():
        norm = {"q_proj": "input_layernorm", "k_proj": "input_layernorm", "v_proj": "input_layernorm",
                "gate_proj": "post_attention_layernorm", "up_proj": "post_attention_layernorm"}
        module, _, kind = name.rpartition(".")
        last = module.rpartition(".")[2]
        if last in norm and kind == "weight":
            layer = re.match(r"model\.layers\.\d+\.", name)[0]
            tensor = tensor * state[f"{layer}{norm[last]}.weight"] @ basis
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


def strongest(activity: Tensor, count: int) -> Tensor:
    """The numbers of the `count` largest entries, rising."""
    return activity.topk(count).indices.sort().values


def head_rows(heads: Tensor, D: int) -> Tensor:
    """The rows of a projection that make these heads: (heads * D,)."""
    return (heads[:, None] * D + torch.arange(D)).flatten()


def measure_activity(teacher: GPT, ids: Tensor) -> dict[str, Tensor]:
    """What a pass over `ids` shows: "channels" (C,), of the residual stream behind the norms; "covariance"
    (C, C), of what enters them, each token of length 1; "heads.<layer>" (H,); "neurons.<layer>" (inner,)."""
    C = teacher.config.n_embd
    found: dict[str, Tensor] = {"channels": torch.zeros(C), "covariance": torch.zeros(C, C)}
    hooks = []

    def note_norm(module: nn.Module, inputs: tuple, output: Tensor) -> None:
        found["channels"] += output.float().abs().mean((0, 1)).cpu()  # (C,)
        stream = F.normalize(inputs[0].float().flatten(0, 1), dim=-1)  # (B T, C)
        found["covariance"] += (stream.T @ stream).cpu()

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
    hooks.append(teacher.model["norm"].register_forward_hook(note_norm))
    teacher(ids.to(teacher.head_weight.device), head=lambda hidden, weight: None)
    for hook in hooks:
        hook.remove()
    return found
