"""A model as a GGUF file, the format of llama.cpp and of the programs built on it.

    require_supported(config)                                # UserError names what llama.cpp cannot compute
    infos = write(path, config, state, metadata, "q4_k_m")   # state: by our names; metadata: of the tokenizer

A GGUF file (docs/gguf.md of ggml) contains metadata, then named tensors, each in blocks of one type. The
package gguf writes the container. An architecture says how to read the tensors. For example, llama.cpp's
`llama` rotates neighbouring rows of q and k, where ours, like Hugging Face's, rotates row i with row i + D/2.
So these rows are reordered. formats/gguf_reader.py reads files, formats/gguf_tokenizer.py has the tokenizer,
and formats/kquants.py the types of 4 to 6 bits.

    f32, f16, bf16, q8_0, q6_k    all matrices have that type
    q4_k_m                        Q4_K; Q6_K for the table that makes the logits and for half of the layers'
                                  attn_v and ffn_down

Norms, biases and GPT-2's position table are float32. If a row's length is not a multiple of a type's block
(256, or 32), the matrix takes the next larger type with shorter blocks, as in llama.cpp's own quantiser, and
float16 if none fits.
Left out: importance matrices, and models split into several files.
"""

import math
import re
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from configurator import ProgressBar, UserError
from formats import hf, kquants
from formats.files import path_in_errors
from formats.gguf_reader import FUSED, GPT2_KEYS, LLAMA_KEYS, NAMES
from formats.hf import GPTConfig
from formats.names import QKV, split_name
from modeling.rope import rope_frequencies

# {our name of a file's type: gguf.LlamaFileType's}
KINDS = {"f32": "ALL_F32", "f16": "MOSTLY_F16", "bf16": "MOSTLY_BF16", "q8_0": "MOSTLY_Q8_0",
         "q6_k": "MOSTLY_Q6_K", "q4_k_m": "MOSTLY_Q4_K_M"}
# {type of a tensor: weights in one block}; 1 for all others
BLOCKS = {"Q8_0": 32, "Q5_0": 32, "Q5_1": 32} | dict.fromkeys(kquants.BYTES, kquants.BLOCK)
FALLBACK = {"Q4_K": "Q5_0", "Q5_K": "Q5_1", "Q6_K": "Q8_0"}  # from blocks of 256 to blocks of 32


# ---- Header -----------------------------------------------------------------------------------------------

def require_supported(config: GPTConfig) -> None:
    """Raise UserError for a model or a rotary scaling that no architecture of llama.cpp computes."""
    arch, scaling = hf.architecture(config), config.rope_scaling or {}
    if arch == "nanollama":
        raise UserError(f"format=gguf: llama.cpp has no architecture with {hf.unusual(config)}")
    if config.n_expert:
        raise UserError(f"format=gguf: models with experts (n_expert={config.n_expert}) are not written")
    if arch == "qwen2" and config.n_head * config.head_dim != config.n_embd:
        raise UserError(f"format=gguf: llama.cpp's qwen2 needs n_embd = n_head * head_dim, this model has "
                        f"{config.n_embd} and {config.n_head} * {config.head_dim}")
    if scaling and (scaling["rope_type"] != "llama3" or arch != "llama"):
        raise UserError(f"format=gguf: rope_scaling of type {scaling['rope_type']} is not written for {arch} "
                        "(only llama3 for llama)")


def model_metadata(config: GPTConfig, kind: str) -> dict[str, Any]:
    """The header entries of the model: its sizes, its positions, and the type of most tensors."""
    import gguf
    arch = hf.architecture(config)
    keys = GPT2_KEYS if arch == "gpt2" else LLAMA_KEYS
    sizes = {key: getattr(config, ours) for key, ours in keys.items()} | {"vocab_size": config.vocab_size}
    if arch != "gpt2":
        sizes |= {"rope.dimension_count": config.head_dim, "attention.value_length": config.head_dim}
    return {"general.file_type": int(gguf.LlamaFileType[KINDS[kind]]),
            "general.quantization_version": gguf.GGML_QUANT_VERSION,
            **{f"{arch}.{key}": value for key, value in sizes.items()}}


# ---- Tensors ----------------------------------------------------------------------------------------------

def interleave_pairs(tensor: Tensor, head_dim: int) -> Tensor:
    """Reorder rows (heads * D, ..) so that the rotary pair (i, i + D/2) of a head becomes (2i, 2i + 1).

    With D = 4, rows 0 1 2 3 | 4 5 6 7 of two heads become 0 2 1 3 | 4 6 5 7.
    """
    # (heads D, ..) -> (heads, 2, D/2, ..) -> (heads, D/2, 2, ..) -> (heads D, ..)
    return tensor.unflatten(0, (-1, 2, head_dim // 2)).transpose(1, 2).reshape(tensor.shape)


def rename_tensors(config: GPTConfig, state: dict[str, Tensor]) -> Iterator[tuple[str, Tensor]]:
    """Yield (GGUF's name, tensor) for each parameter, in order.

    Rows of q and k are reordered if the architecture needs it, padding is cut, and gpt2's q, k and v are
    fused. The factors of llama3's rotary scaling become a tensor of their own.
    """
    arch = hf.architecture(config)
    for name, tensor in state.items():
        layer, module, kind = split_name(name)
        theirs = NAMES[module]
        if name in hf.VOCABULARY_TABLES:
            tensor = tensor[:config.vocab_size]  # (P, C) -> (V, C)
        if arch == "gpt2" and theirs in FUSED:
            if theirs != "attn_q":
                continue
            tensor = torch.cat([state[name.replace(module, part)] for part in QKV])  # (3 C, ..)
            theirs = "attn_qkv"
        elif arch == "llama" and theirs in ("attn_q", "attn_k"):
            tensor = interleave_pairs(tensor, config.head_dim)
        yield f"blk.{layer}.{theirs}.{kind}" if layer else f"{theirs}.{kind}", tensor
    if config.rope_scaling:  # of type llama3
        plain, _ = rope_frequencies(config.head_dim, config.rope_theta, None)
        scaled, _ = rope_frequencies(config.head_dim, config.rope_theta, config.rope_scaling)
        yield "rope_freqs.weight", plain / scaled  # (D/2,)


# ---- Types ------------------------------------------------------------------------------------------------

def wanted_type(name: str, config: GPTConfig, kind: str) -> str:
    """The type of a matrix if its shape allows it. q4_k_m follows llama.cpp's llama_tensor_get_type."""
    if kind != "q4_k_m":
        return kind.upper()
    if name == ("token_embd.weight" if config.tie_embeddings else "output.weight"):
        return "Q6_K"
    layer, n = re.search(r"blk\.(\d+)", name), config.n_layer
    if layer and ("attn_v." in name or "ffn_down." in name):
        i = int(layer[1])  # more bits for the first and last eighth of the layers and every third between
        return "Q6_K" if i < n // 8 or i >= 7 * n // 8 or (i - n // 8) % 3 == 2 else "Q4_K"
    return "Q5_K" if "attn_qkv." in name else "Q4_K"


def fitting_type(wanted: str, columns: int) -> str:
    """The wanted type, or its replacement if its blocks do not divide a row of `columns` weights."""
    candidates = (wanted, FALLBACK.get(wanted, "F16"), "F16")
    return next(type_name for type_name in candidates if columns % BLOCKS.get(type_name, 1) == 0)


def encode(values: np.ndarray, type_name: str) -> np.ndarray:
    """float32 (.., n) -> the bytes of a type, uint8 (.., m)."""
    import gguf
    if type_name in kquants.BYTES:
        return kquants.quantize(values, type_name)
    return gguf.quants.quantize(values, gguf.GGMLQuantizationType[type_name]).view(np.uint8)


# ---- Files ------------------------------------------------------------------------------------------------

class TensorInfo(NamedTuple):
    """A tensor of a file, and the type that it should have had."""

    name: str
    wanted: str
    type: str
    shape: tuple[int, ...]  # in weights
    bytes: int


def write(path: Path, config: GPTConfig, state: dict[str, Tensor], metadata: dict[str, Any],
          kind: str) -> list[TensorInfo]:
    """Write a file and return its tensors' infos. Raises OSError for a full disk.

    state: float32 tensors by our names. metadata: further header entries, such as those of the tokenizer. All
    tensors are encoded before the file is written, so it needs the file's size in memory.
    """
    import gguf
    writer = gguf.GGUFWriter(None, hf.architecture(config))
    for key, value in (model_metadata(config, kind) | metadata).items():
        value_type = gguf.GGUFValueType.get_type(value)
        writer.add_key_value(key, value, gguf.GGUFValueType.UINT32 if type(value) is int else value_type)
    infos = []
    for name, tensor in ProgressBar(rename_tensors(config, state), path.name):
        is_float32 = tensor.ndim == 1 or name == "position_embd.weight"
        wanted = "F32" if is_float32 else wanted_type(name, config, kind)
        actual = fitting_type(wanted, tensor.shape[-1])
        data = encode(tensor.float().cpu().contiguous().numpy(), actual)
        writer.add_tensor(name, data, raw_dtype=gguf.GGMLQuantizationType[actual])
        infos.append(TensorInfo(name, wanted, actual, tuple(tensor.shape), data.nbytes))
    with path_in_errors(path):
        try:
            writer.write_header_to_file(path)
            writer.write_kv_data_to_file()
            writer.write_tensors_to_file()
        finally:
            writer.close()
    return infos


def type_table(infos: list[TensorInfo]) -> str:
    """The types in a file as a table, and one line per kind of matrix that could not have its wanted type."""
    lines = [f"  {'type':6} {'tensors':>8} {'weights':>14} {'bytes':>14} {'bits':>6}"]
    for name in [*dict.fromkeys(info.type for info in infos), "all"]:
        group = [info for info in infos if name in (info.type, "all")]
        weights, size = sum(math.prod(info.shape) for info in group), sum(info.bytes for info in group)
        lines.append(f"  {name:6} {len(group):8} {weights:14,} {size:14,} {8 * size / weights:6.2f}")
    replaced = Counter((re.sub(r"blk\.\d+\.", "", info.name), info.shape[-1], info.wanted, info.type)
                       for info in infos if info.type != info.wanted)
    lines += [f"  {name} ({count} x): rows of {columns} do not divide into blocks of {wanted}, so {actual}"
              for (name, columns, wanted, actual), count in replaced.items()]
    return "\n".join(lines)
