"""Names of tensors on disk. Ours are those of Hugging Face's Llama; GPT-2's and Mixtral's differ.

    for name, tensor in from_hf(name, tensor): ...      # our names; GPT-2's c_attn becomes q, k and v
    state = to_gpt2(state)                              # the inverse, for all tensors of a GPT-2
    adapter = adapter_to_gpt2(adapter)                  # the same for a LoRA adapter
    adapter = adapter_from_gpt2(adapter, rank)

GPT-2 fuses q, k and v into one matrix and stores matrices as (in, out), where ours are (out, in). C is
n_embd, r the rank of an adapter.
"""

import re
from collections.abc import Iterator

import torch
from torch import Tensor

# {our module: GPT-2's}. GPT-2 fuses QKV into c_attn.
GPT2_NAMES = {"model.embed_tokens": "wte", "model.embed_positions": "wpe", "model.norm": "ln_f",
              "input_layernorm": "ln_1", "post_attention_layernorm": "ln_2",
              "self_attn.q_proj": "attn.c_attn", "self_attn.o_proj": "attn.c_proj",
              "mlp.up_proj": "mlp.c_fc", "mlp.down_proj": "mlp.c_proj"}
GPT2_TO_OURS = {theirs: ours for ours, theirs in GPT2_NAMES.items()}
QKV = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")
# {a part of Mixtral's names: ours}
MIXTRAL_NAMES = {".block_sparse_moe.": ".mlp.", ".w1.": ".gate_proj.", ".w2.": ".down_proj.",
                 ".w3.": ".up_proj."}


# ---- Models -----------------------------------------------------------------------------------------------

def split_name(name: str) -> tuple[str, str, str]:
    """Split a name of ours, GPT-2's or GGUF's into layer, module and kind.

    "model.layers.3.mlp.up_proj.weight" -> ("3", "mlp.up_proj", "weight"), and so are "h.3..." and "blk.3...".
    "model.norm.weight" -> ("", "model.norm", "weight").
    """
    match = re.match(r"(?:model\.layers|h|blk)\.(\d+)\.", name)
    module, _, kind = name[match.end() if match else 0:].rpartition(".")
    return match[1] if match else "", module, kind


def from_hf(name: str, tensor: Tensor) -> Iterator[tuple[str, Tensor]]:
    """Yield one stored tensor under our names: three for GPT-2's c_attn."""
    name = name.removeprefix("transformer.")
    if ".block_sparse_moe." in name:
        for theirs, mine in MIXTRAL_NAMES.items():
            name = name.replace(theirs, mine)
    layer, module, kind = split_name(name)
    if not name.startswith("h."):
        yield f"{GPT2_TO_OURS[module]}.{kind}" if module in GPT2_TO_OURS else name, tensor
        return
    tensor = tensor.T if tensor.ndim == 2 else tensor  # GPT-2's Conv1D stores (in, out)
    parts = {GPT2_TO_OURS.get(module, module): tensor}
    if module == "attn.c_attn":
        parts = dict(zip(QKV, tensor.chunk(3), strict=True))  # (3 C, ..) -> three (C, ..)
    for part, values in parts.items():
        yield f"model.layers.{layer}.{part}.{kind}", values


def to_gpt2(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Rename our tensors to GPT-2's names: the inverse of `from_hf`."""
    result = {}
    for name, tensor in state.items():
        layer, module, kind = split_name(name)
        if not layer:
            root = "" if module == "lm_head" else "transformer."
            result[f"{root}{GPT2_NAMES.get(module, module)}.{kind}"] = tensor
            continue
        if module in QKV[1:]:
            continue  # fused into c_attn
        if module == QKV[0]:
            tensor = torch.cat([state[name.replace(module, part)] for part in QKV])  # (3 C, ..)
        tensor = tensor.T.contiguous() if tensor.ndim == 2 else tensor
        result[f"transformer.h.{layer}.{GPT2_NAMES[module]}.{kind}"] = tensor
    return result


# ---- Adapters ---------------------------------------------------------------------------------------------

def adapter_to_gpt2(adapter: dict[str, Tensor]) -> dict[str, Tensor]:
    """The tensors of an adapter by GPT-2's names, where q, k and v share one adapter of c_attn, of rank 3 r.

        A = [A_q]  (3 r, C)        B = [B_q  0   0 ]  (3 C, 3 r)        B A = [B_q A_q]  (3 C, C)
            [A_k]                      [ 0  B_k  0 ]                          [B_k A_k]
            [A_v]                      [ 0   0  B_v]                          [B_v A_v]

    A matrix without an adapter has zeros in both.
    """
    result: dict[str, Tensor] = {}
    for name, tensor in adapter.items():
        layer, module, kind = split_name(name)
        if not layer:  # a table
            result |= to_gpt2({name: tensor})
            continue
        if module in QKV:
            parts = [adapter.get(name.replace(module, part), torch.zeros_like(tensor)) for part in QKV]
            tensor = torch.cat(parts) if kind == "lora_A" else torch.block_diag(*parts)
        result[f"transformer.h.{layer}.{GPT2_NAMES.get(module, 'attn.c_attn')}.{kind}"] = tensor
    return result


def split_c_attn(A: Tensor, B: Tensor, rank: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield A and B of q, k and v, from an adapter of c_attn: (r', C) and (3 C, r').

    Where B is block-diagonal, they have the given rank. Otherwise, as in an adapter that PEFT trained, they
    share A.
    """
    for i, block in enumerate(B.unflatten(0, (3, -1))):  # (C, r')
        own = slice(i * rank, (i + 1) * rank)
        is_shared = block[:, :own.start].any() or block[:, own.stop:].any()
        yield (A, block) if is_shared else (A[own], block[:, own])


def adapter_from_gpt2(adapter: dict[str, Tensor], rank: int) -> dict[str, Tensor]:
    """The inverse of `adapter_to_gpt2`. Tensors by the names of other architectures stay as they are."""
    result: dict[str, Tensor] = {}
    for name, tensor in adapter.items():
        if name.endswith("attn.c_attn.lora_A"):
            layer = name.split(".")[-4]
            parts = split_c_attn(tensor, adapter[name[:-1] + "B"], rank)
            for module, (A, B) in zip(QKV, parts, strict=True):
                if A.any():
                    result |= {f"model.layers.{layer}.{module}.lora_{x}": y for x, y in (("A", A), ("B", B))}
        elif not name.endswith("attn.c_attn.lora_B"):
            is_stored_transposed = ".h." in name  # from_hf expects Conv1D's layout
            result |= dict(from_hf(name, tensor.T if is_stored_transposed else tensor))
    return result
