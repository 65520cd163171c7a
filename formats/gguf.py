"""A model as a GGUF file, which llama.cpp and all that is built on it load.

    require_supported(config)                                   # UserError, by name, for what cannot be said
    placed = write(path, config, state, described, "q4_k_m")    # state: by our names; described: metadata
    for name, tensor in read_tensors(path, config): ...         # our names again, in float32

GGUF (docs/gguf.md of ggml) is metadata, then tensors by name, in blocks of one type each; the package gguf
writes the container. An architecture is a way to read them: llama.cpp's `llama` turns neighbouring rows of q
and k by an angle, where ours, as Hugging Face's, turns row i with row i + D/2, so its rows change places.
formats/gguf_tokenizer.py has the tokenizer, formats/kquants.py the types of 4 to 6 bits.

    f32, f16, bf16, q8_0, q6_k    all matrices in that type
    q4_k_m                        Q4_K; but Q6_K the table that makes the logits, half of attn_v and ffn_down

Norms and biases are float32. Where a row's length is no multiple of a type's block (256, or 32), the matrix
takes the next larger type with shorter blocks, as llama.cpp's own quantiser has it; at last float16.
Left out: importance matrices, splitting into several files.
"""

import re
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from configurator import UserError
from formats import hf, kquants
from formats.files import path_in_errors
from modeling.rope import rope_frequencies, yarn_factor

KINDS = {"f32": "ALL_F32", "f16": "MOSTLY_F16", "bf16": "MOSTLY_BF16", "q8_0": "MOSTLY_Q8_0",
         "q6_k": "MOSTLY_Q6_K", "q4_k_m": "MOSTLY_Q4_K_M"}  # and the file type that a header says
FALLBACK = {"Q4_K": "Q5_0", "Q5_K": "Q5_1", "Q6_K": "Q8_0"}  # from blocks of 256 to blocks of 32
NAMES = {"model.embed_tokens": "token_embd", "model.embed_positions": "position_embd",
         "model.norm": "output_norm", "lm_head": "output"}
LAYER_NAMES = {"input_layernorm": "attn_norm", "post_attention_layernorm": "ffn_norm",
               "self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k", "self_attn.v_proj": "attn_v",
               "self_attn.o_proj": "attn_output", "self_attn.q_norm": "attn_q_norm",
               "self_attn.k_norm": "attn_k_norm", "mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up",
               "mlp.down_proj": "ffn_down"}
FUSED = ("attn_q", "attn_k", "attn_v")  # one tensor, attn_qkv, in gpt2


def require_supported(config: Any) -> None:
    """UserError for a model that no architecture of llama.cpp computes, or not with this rotary scaling."""
    kind, scaling = hf.architecture(config), config.rope_scaling or {}
    if kind == "nanollama":
        raise UserError(f"format=gguf: llama.cpp has no architecture with {hf.unusual(config)}")
    if kind == "qwen2" and config.n_head * config.head_dim != config.n_embd:
        raise UserError(f"format=gguf: llama.cpp's qwen2 needs n_embd = n_head * head_dim, this model has "
                        f"{config.n_embd} and {config.n_head} * {config.head_dim}")
    if scaling.get("rope_type") == "llama3" and kind != "llama":
        raise UserError(f"format=gguf: rope_scaling: llama.cpp's {kind} does not know llama3")
    usual = {"beta_fast": 32, "beta_slow": 1, "truncate": True}
    if scaling.get("rope_type") == "yarn":
        for key, value in usual.items():
            if scaling.get(key) not in (None, value):
                raise UserError(f"format=gguf: rope_scaling: llama.cpp's {kind} has no {key}={scaling[key]}")


def metadata(config: Any, kind: str) -> dict[str, Any]:
    """What the header says of the model: sizes, positions, the type that most tensors have."""
    import gguf
    arch = hf.architecture(config)
    sizes = {"vocab_size": config.vocab_size, "context_length": config.block_size,
             "embedding_length": config.n_embd, "block_count": config.n_layer,
             "feed_forward_length": config.intermediate_size, "attention.head_count": config.n_head,
             "attention.head_count_kv": config.n_kv_head}
    if arch == "gpt2":
        sizes["attention.layer_norm_epsilon"] = config.norm_eps
    else:
        sizes |= {"attention.layer_norm_rms_epsilon": config.norm_eps, "rope.freq_base": config.rope_theta,
                  "rope.dimension_count": config.head_dim, "attention.key_length": config.head_dim,
                  "attention.value_length": config.head_dim}
    if config.rope_scaling and config.rope_scaling["rope_type"] == "yarn":
        factor = float(config.rope_scaling["factor"])
        usual = yarn_factor({"factor": factor})  # which llama.cpp computes itself
        sizes |= {"rope.scaling.type": "yarn", "rope.scaling.factor": factor,
                  "rope.scaling.original_context_length":
                      int(config.rope_scaling["original_max_position_embeddings"]),
                  "rope.scaling.attn_factor": yarn_factor(config.rope_scaling) / usual}
    return {"general.file_type": int(gguf.LlamaFileType[KINDS[kind]]),
            "general.quantization_version": gguf.GGML_QUANT_VERSION,
            **{f"{arch}.{key}": value for key, value in sizes.items()}}


# ---- Tensors ----------------------------------------------------------------------------------------------

def rename_tensors(config: Any, state: dict[str, Tensor]) -> Iterator[tuple[str, Tensor]]:
    """(their name, tensor) of each parameter, in order: rows of q and k in their order, padding cut, q, k and
    v of gpt2 fused; and the factors of llama3's rotary scaling, which are a tensor there."""
    arch = hf.architecture(config)
    for name, tensor in state.items():
        module, _, part = name.rpartition(".")
        layer, theirs = their_name(module)
        if name in hf.VOCABULARY_TABLES:
            tensor = tensor[:config.vocab_size]
        if arch == "gpt2" and theirs in FUSED:
            if theirs != "attn_q":
                continue
            tensor = torch.cat([state[name.replace("q_proj", f"{letter}_proj")] for letter in "qkv"])
            theirs = "attn_qkv"
        elif arch == "llama" and theirs in ("attn_q", "attn_k"):
            tensor = interleaved(tensor, config.head_dim)
        yield f"{layer}{theirs}.{part}", tensor
    if config.rope_scaling and config.rope_scaling["rope_type"] == "llama3":
        plain, _ = rope_frequencies(config.head_dim, config.rope_theta, None)
        scaled, _ = rope_frequencies(config.head_dim, config.rope_theta, config.rope_scaling)
        yield "rope_freqs.weight", plain / scaled  # (D/2,)


def their_name(module: str) -> tuple[str, str]:
    """"model.layers.3.mlp.up_proj" -> ("blk.3.", "ffn_up"); "model.norm" -> ("", "output_norm")."""
    found = re.fullmatch(r"model\.layers\.(\d+)\.(.+)", module)
    return (f"blk.{found[1]}.", LAYER_NAMES[found[2]]) if found else ("", NAMES[module])


def interleaved(tensor: Tensor, head_dim: int) -> Tensor:
    """Rows (heads * D, ..) of half-rotation pairs (i, i + D/2), head by head, as neighbours (2i, 2i + 1)."""
    return tensor.unflatten(0, (-1, 2, head_dim // 2)).transpose(1, 2).reshape(tensor.shape)


def halved(tensor: Tensor, head_dim: int) -> Tensor:
    """The inverse of `interleaved`."""
    return tensor.unflatten(0, (-1, head_dim // 2, 2)).transpose(1, 2).reshape(tensor.shape)


# ---- Types ------------------------------------------------------------------------------------------------

def wanted_type(name: str, config: Any, kind: str) -> str:
    """The type of a matrix, whatever its shape. q4_k_m: as llama.cpp's llama_tensor_get_type has it."""
    if kind != "q4_k_m":
        return kind.upper()
    if name == ("token_embd.weight" if config.tie_embeddings else "output.weight"):
        return "Q6_K"
    layer, n = re.search(r"blk\.(\d+)", name), config.n_layer
    if layer and ("attn_v." in name or "ffn_down." in name):
        i = int(layer[1])
        return "Q6_K" if i < n // 8 or i >= 7 * n // 8 or (i - n // 8) % 3 == 2 else "Q4_K"
    return "Q5_K" if "attn_qkv." in name else "Q4_K"


def fitting_type(wanted: str, columns: int) -> str:
    """That type, or what stands in for it where its blocks do not divide a row."""
    for each in (wanted, FALLBACK.get(wanted)):
        if each and columns % block_size(each) == 0:
            return each
    return "F16"


def tensor_type(name: str, shape: tuple[int, ...], config: Any, kind: str) -> str:
    if len(shape) == 1 or name == "position_embd.weight":
        return "F32"
    return fitting_type(wanted_type(name, config, kind), shape[-1])


def block_size(each: str) -> int:
    """Weights in a block of a type."""
    import gguf
    return gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[each]][0]


def encoded(values: np.ndarray, each: str) -> np.ndarray:
    """float32 (.., n) as the bytes of a type, uint8 (.., m)."""
    import gguf
    if each in kquants.BYTES:
        return kquants.quantize(values, each)[0]
    if each == "F16":
        return np.ascontiguousarray(values, dtype="<f2").view(np.uint8)
    return gguf.quants.quantize(values, gguf.GGMLQuantizationType[each]).view(np.uint8)


# ---- Files ------------------------------------------------------------------------------------------------

class Placed(NamedTuple):
    """A tensor as it stands in a file."""

    name: str
    wanted: str
    type: str
    columns: int
    weights: int
    bytes: int


def plan_tensors(config: Any, state: dict[str, Tensor], kind: str) -> list[Placed]:
    """What `write` will put where, without doing it."""
    import gguf
    placed = []
    for name, tensor in rename_tensors(config, state):
        each = tensor_type(name, tuple(tensor.shape), config, kind)
        wanted = each if each == "F32" else wanted_type(name, config, kind)
        shape = gguf.quant_shape_to_byte_shape(tuple(tensor.shape), gguf.GGMLQuantizationType[each])
        placed.append(Placed(name, wanted, each, tensor.shape[-1], tensor.numel(), int(np.prod(shape))))
    return placed


def write(path: Path, config: Any, state: dict[str, Tensor], described: dict[str, Any],
          kind: str) -> list[Placed]:
    """Write the file; returns what stands in it. OSError for a full disk.

    state: float32 tensors by our names. described: further metadata, of the tokenizer and of the origin.
    """
    import gguf
    placed = plan_tensors(config, state, kind)
    writer = gguf.GGUFWriter(None, hf.architecture(config))
    for key, value in (metadata(config, kind) | described).items():
        add_value(writer, key, value)
    for (_, tensor), each in zip(rename_tensors(config, state), placed, strict=True):
        type_ = gguf.GGMLQuantizationType[each.type]
        shape = gguf.quant_shape_to_byte_shape(tuple(tensor.shape), type_)
        writer.add_tensor_info(each.name, shape, np.dtype(np.uint8), each.bytes, raw_dtype=type_)
    with path_in_errors(path):
        try:
            writer.write_header_to_file(path)
            writer.write_kv_data_to_file()
            writer.write_ti_data_to_file()
            tensors = zip(rename_tensors(config, state), placed, strict=True)
            for (_, tensor), each in tqdm(tensors, path.name, len(placed), leave=False,
                                          disable=not sys.stderr.isatty()):
                writer.write_tensor_data(encoded(tensor.float().cpu().contiguous().numpy(), each.type))
        finally:
            writer.close()
    return placed


def add_value(writer: Any, key: str, value: Any) -> None:
    """One entry of the header: whole numbers are uint32, others float32."""
    add = {bool: writer.add_bool, int: writer.add_uint32, float: writer.add_float32, str: writer.add_string,
           list: writer.add_array}
    add[type(value)](key, value)


def read_tensors(path: Path, config: Any) -> Iterator[tuple[str, Tensor]]:
    """(our name, float32 tensor) of all that a file of ours holds: the inverse of `write`, but for what its
    types have rounded. config: that of the model it was made from. UserError for a file that is no GGUF."""
    import gguf
    ours = {theirs: name for name, theirs in (NAMES | LAYER_NAMES).items()}
    try:
        stored = gguf.GGUFReader(path).tensors
    except (ValueError, KeyError, IndexError) as error:
        raise UserError(f"{path}: not a GGUF file ({error})") from None
    for each in stored:
        if each.name == "rope_freqs.weight":
            continue
        values = gguf.quants.dequantize(each.data, each.tensor_type).reshape(tuple(reversed(each.shape)))
        tensor = torch.from_numpy(np.array(values, dtype=np.float32))
        layer, theirs, part = re.fullmatch(r"(?:blk\.(\d+)\.)?(\w+)\.(\w+)", each.name).groups()
        if theirs == "attn_qkv":
            pieces = list(zip(FUSED, tensor.chunk(3), strict=True))
        elif hf.architecture(config) == "llama" and theirs in ("attn_q", "attn_k"):
            pieces = [(theirs, halved(tensor, config.head_dim))]
        else:
            pieces = [(theirs, tensor)]
        for piece, values in pieces:
            yield f"model.layers.{layer}.{ours[piece]}.{part}" if layer else f"{ours[piece]}.{part}", values


def mix(placed: list[Placed]) -> str:
    """The types in a file as a table, and a line for each kind of matrix that could not have its type."""
    total = sum(each.bytes for each in placed)
    lines = [f"  {'type':6} {'tensors':>8} {'weights':>14} {'bytes':>14} {'bits':>6}"]
    for name in sorted({each.type for each in placed}, key=lambda name: [p.type for p in placed].index(name)):
        found = [each for each in placed if each.type == name]
        weights, size = sum(each.weights for each in found), sum(each.bytes for each in found)
        lines.append(f"  {name:6} {len(found):8} {weights:14,} {size:14,} {8 * size / weights:6.2f}")
    weights = sum(each.weights for each in placed)
    lines.append(f"  {'all':6} {len(placed):8} {weights:14,} {total:14,} {8 * total / weights:6.2f}")
    fallen = Counter((re.sub(r"blk\.\d+\.", "", each.name), each.columns, each.wanted, each.type)
                     for each in placed if each.type != each.wanted)
    lines += [f"  {name} ({times} x): rows of {columns} do not divide into blocks of {wanted}, so {other}"
              for (name, columns, wanted, other), times in fallen.items()]
    return "\n".join(lines)
