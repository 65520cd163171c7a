"""Read a GGUF file that anyone wrote: configuration, tokenizer, chat template and weights, from one file.

    fields = read_config(path)                  # GPTConfig's fields
    definition, settings = tokenizer(path)      # what tokenizer.json and tokenizer_config.json would contain
    for name, tensor in read_tensors(path): ... # our names, float32

Architectures: llama, qwen2, qwen3 and gpt2. The package gguf decodes the quantisation types, all that it
knows. Tokenizers: byte-level BPE and the sentencepiece kind, with the ids of llama.cpp. docs/gguf.md of ggml
describes the layout: metadata, then names and places of the tensors, then the tensors. Our own parser stops
at the end of a cut file, whatever lengths a damaged one claims. Left out: big-endian files, models that are
split into several files, and mixtures of experts. formats/gguf.py writes such files.
"""

import functools
import json
import math
import mmap
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import tokenizers
import torch
from tokenizers import decoders, models, normalizers, processors
from torch import Tensor

from configurator import UserError
from formats.files import content_errors
from formats.names import split_name
from formats.splits import LLAMA3_NAMES, SPLITS, byte_level_bpe
from modeling.rope import rope_frequencies

# {key of a file, after its architecture: GPTConfig's field}
SIZES = {"context_length": "block_size", "embedding_length": "n_embd", "block_count": "n_layer",
         "feed_forward_length": "intermediate_size", "attention.head_count": "n_head",
         "attention.head_count_kv": "n_kv_head"}
GPT2_KEYS = SIZES | {"attention.layer_norm_epsilon": "norm_eps"}
LLAMA_KEYS = SIZES | {"attention.layer_norm_rms_epsilon": "norm_eps", "rope.freq_base": "rope_theta",
                      "attention.key_length": "head_dim"}
# {architecture: what sets it apart from a Llama without biases}
SETTINGS: dict[str, dict[str, Any]] = {
    "llama": {}, "qwen2": {"bias": "qkv"}, "qwen3": {"qk_norm": True},
    "gpt2": {"position": "learned", "norm": "layernorm", "mlp": "gelu", "bias": "all"}}
# {our module: GGUF's}
NAMES = {"model.embed_tokens": "token_embd", "model.embed_positions": "position_embd",
         "model.norm": "output_norm", "lm_head": "output", "input_layernorm": "attn_norm",
         "post_attention_layernorm": "ffn_norm", "self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k",
         "self_attn.v_proj": "attn_v", "self_attn.o_proj": "attn_output", "self_attn.q_norm": "attn_q_norm",
         "self_attn.k_norm": "attn_k_norm", "mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up",
         "mlp.down_proj": "ffn_down"}
OUR_NAMES = {theirs: ours for ours, theirs in NAMES.items()}
FUSED = ("attn_q", "attn_k", "attn_v")  # in gpt2 these are one tensor, attn_qkv
# {type of a value: its code for struct}; besides these there are texts and lists
SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
TEXT, LIST = 8, 9
NORMAL, CONTROL, USER_DEFINED, UNUSED, BYTE = 1, 3, 4, 5, 6  # gguf.TokenType
SPECIAL = {"bos": "bos", "eos": "eos", "unk": "unknown", "pad": "padding"}  # transformers' and GGUF's names
SPACE = "\u2581"  # how a token of the sentencepiece kind spells a space


def is_gguf(path: Path) -> bool:
    """True for a GGUF file. It is read alone: no config.json or tokenizer.json next to it counts."""
    return path.suffix == ".gguf" and path.is_file()


# Turns what damaged content raises into a UserError of one line.
file_errors = functools.partial(content_errors, what="not a GGUF file that can be read")


# ---- Header -----------------------------------------------------------------------------------------------

def read_bytes(data: mmap.mmap, size: int) -> bytes:
    """The next `size` bytes. Raises ValueError if the file is shorter."""
    content = data.read(size)
    if len(content) < size:
        raise ValueError("cut: it ends within its header")
    return content


def read_scalar(data: mmap.mmap, code: str) -> Any:
    return struct.unpack(f"<{code}", read_bytes(data, struct.calcsize(f"<{code}")))[0]


def read_value(data: mmap.mmap, kind: int) -> Any:
    """The next value: a text, a list of values of one kind, or one of SCALARS. KeyError for another kind."""
    if kind == TEXT:
        return read_bytes(data, read_scalar(data, "Q")).decode()
    if kind == LIST:
        kind, count = read_scalar(data, "I"), read_scalar(data, "Q")
        return [read_value(data, kind) for _ in range(count)]
    return read_scalar(data, SCALARS[kind])


class Stored(NamedTuple):
    """A tensor in a file."""

    shape: tuple[int, ...]  # in weights; rows first
    kind: Any  # gguf.GGMLQuantizationType
    begin: int  # of its bytes
    size: int


def parse(data: mmap.mmap) -> tuple[dict[str, Any], dict[str, Stored]]:
    """The metadata and the tensors of a file's bytes. Any error means damaged content."""
    import gguf
    if (magic := data.read(4)) != b"GGUF":
        raise ValueError(f"begins with {magic!r}")
    if (version := read_scalar(data, "I")) not in (2, 3):
        raise ValueError("big-endian" if version % 2**16 == 0 else f"version {version}")
    count, fields_count = read_scalar(data, "Q"), read_scalar(data, "Q")
    fields = {read_value(data, TEXT): read_value(data, read_scalar(data, "I")) for _ in range(fields_count)}
    tensors = {}
    for _ in range(count):
        name, dimensions = read_value(data, TEXT), read_scalar(data, "I")
        shape = tuple(reversed([read_scalar(data, "Q") for _ in range(dimensions)]))
        kind = gguf.GGMLQuantizationType(read_scalar(data, "I"))
        weights, size = gguf.GGML_QUANT_SIZES[kind]
        tensors[name] = Stored(shape, kind, read_scalar(data, "Q"), math.prod(shape) // weights * size)
    align = fields.get("general.alignment", 32)
    start = math.ceil(data.tell() / align) * align
    tensors = {name: each._replace(begin=start + each.begin) for name, each in tensors.items()}
    if (end := max((each.begin + each.size for each in tensors.values()), default=0)) > len(data):
        raise ValueError(f"cut: {len(data):,} of {end:,} bytes")
    return fields, tensors


@functools.lru_cache(maxsize=2)
def parse_file(path: Path, size: int, time: int) -> tuple[dict[str, Any], dict[str, Stored]]:
    """`parse`, once for each version of a file."""
    with open(path, "rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
        return parse(data)


def read_header(path: Path) -> tuple[dict[str, Any], dict[str, Stored]]:
    """The metadata and the tensors. UserError for a damaged file and for an architecture not computed."""
    with file_errors(path):
        fields, tensors = parse_file(path, path.stat().st_size, path.stat().st_mtime_ns)
        arch = fields["general.architecture"]
        if arch not in SETTINGS:
            raise UserError(f"{path}: architecture {arch!r} is not supported (use {', '.join(SETTINGS)})")
        return fields, tensors


def read_tensor(path: Path, name: str) -> Tensor:
    """A tensor of a file in float32. Raises UserError for a type that the package gguf does not decode."""
    import gguf
    shape, kind, begin, size = read_header(path)[1][name]
    data = np.fromfile(path, np.uint8, size, offset=begin).reshape(math.prod(shape[:-1]), -1)  # (rows, bytes)
    with file_errors(path):
        values = gguf.quants.dequantize(data, kind)
        return torch.from_numpy(np.array(values, dtype=np.float32)).reshape(shape)


# ---- Configuration ----------------------------------------------------------------------------------------

def llama3_scaling(ratios: Tensor, head_dim: int, theta: float) -> dict[str, Any]:
    """The rope_scaling of Llama 3 that divides the frequencies by `ratios`, (D/2,), which a file stores.

    Raises ValueError if there is none with Llama 3's low_freq_factor and high_freq_factor.
    """
    plain, _ = rope_frequencies(head_dim, theta, None)
    for length in (2**n for n in range(3, 21)):
        scaling = {"rope_type": "llama3", "factor": round(ratios.max().item(), 4), "low_freq_factor": 1.0,
                   "high_freq_factor": 4.0, "original_max_position_embeddings": length}
        if torch.allclose(plain / rope_frequencies(head_dim, theta, scaling)[0], ratios, rtol=1e-4):
            return scaling
    raise ValueError("rope_freqs.weight is not the rotary scaling of Llama 3")


def read_config(path: Path) -> dict[str, Any]:
    """GPTConfig's fields. Raises UserError for what our model does not compute."""
    header, tensors = read_header(path)
    arch = header["general.architecture"]
    keys = {key.removeprefix(f"{arch}."): value for key, value in header.items()}
    with file_errors(path):
        names = GPT2_KEYS if arch == "gpt2" else LLAMA_KEYS
        fields = {ours: keys[theirs] for theirs, ours in names.items() if theirs in keys} | SETTINGS[arch]
        fields |= {"vocab_size": tensors["token_embd.weight"].shape[0],
                   "tie_embeddings": "output.weight" not in tensors}
        D = fields.setdefault("head_dim", fields["n_embd"] // fields["n_head"])
        for key, plain in (("rope.dimension_count", D), ("attention.value_length", D), ("expert_count", 0),
                           ("attention.sliding_window", 0), ("rope.scale_linear", 1), ("split.count", 1),
                           ("rope.scaling.type", "none")):
            if keys.get(key, plain) not in (plain, 0):
                raise UserError(f"{path}: {key}={keys[key]} is not supported")
        if arch == "llama" and "blk.0.attn_output.bias" in tensors:
            fields["bias"] = "all"
        if "rope_freqs.weight" in tensors:
            ratios = read_tensor(path, "rope_freqs.weight")
            fields["rope_scaling"] = llama3_scaling(ratios, D, fields.get("rope_theta", 10000.0))
    return fields


def end_ids(path: Path) -> list[int]:
    """The ids that end a turn or a text: none, one or two."""
    fields, _ = read_header(path)
    ids = [fields.get(f"tokenizer.ggml.{name}_token_id") for name in ("eot", "eos")]
    return [index for index in dict.fromkeys(ids) if index is not None]


# ---- Weights ----------------------------------------------------------------------------------------------

def separate_pairs(tensor: Tensor, head_dim: int) -> Tensor:
    """The inverse of formats/gguf.py's `interleave_pairs`."""
    return tensor.unflatten(0, (-1, head_dim // 2, 2)).transpose(1, 2).reshape(tensor.shape)


def our_tensors(name: str, tensor: Tensor, head_dim: int) -> Iterator[tuple[str, Tensor]]:
    """Yield one tensor under our names: the inverse of `rename_tensors` in formats/gguf.py.

    head_dim: 0 for an architecture whose q and k have Hugging Face's order of rows.
    """
    layer, theirs, kind = split_name(name)
    prefix = f"model.layers.{layer}." if layer else ""
    parts = {theirs: tensor}
    if theirs == "attn_qkv":
        parts = dict(zip(FUSED, tensor.chunk(3), strict=True))  # (3 C, ..) -> three (C, ..)
    elif head_dim and theirs in ("attn_q", "attn_k"):
        parts = {theirs: separate_pairs(tensor, head_dim)}
    for part, values in parts.items():
        yield f"{prefix}{OUR_NAMES.get(part, part)}.{kind}", values  # loading refuses an unknown name


def read_tensors(path: Path) -> Iterator[tuple[str, Tensor]]:
    """Yield (our name, float32 tensor) for every weight, one at a time."""
    header, tensors = read_header(path)
    head_dim = read_config(path)["head_dim"] if header["general.architecture"] == "llama" else 0
    for name in tensors:
        if name != "rope_freqs.weight":  # follows from the configuration
            yield from our_tensors(name, read_tensor(path, name), head_dim)


# ---- Tokenizer --------------------------------------------------------------------------------------------

def byte_level(fields: dict[str, Any], vocab: dict[str, int]) -> tokenizers.Tokenizer:
    """A byte-level BPE. Raises ValueError for a way of splitting text that is not known here."""
    name = fields.get("pre", "default")
    if name not in SPLITS:
        raise ValueError(f"tokenizer.ggml.pre={name} is not supported, only {', '.join(SPLITS)}")
    merges = [tuple(merge.split(" ")) for merge in fields["merges"]]
    return byte_level_bpe(models.BPE(vocab, merges, ignore_merges=name in LLAMA3_NAMES), SPLITS[name])


def sentencepiece(fields: dict[str, Any], vocab: dict[str, int]) -> tokenizers.Tokenizer:
    """A tokenizer of the sentencepiece kind, which has scores instead of merges.

    Two neighbours are merged if their union is a token, and the union with the highest score comes first.
    """
    scores = dict(zip(fields["tokens"], fields["scores"], strict=True))
    merges = [(token[:i], token[i:]) for token in sorted(vocab, key=scores.__getitem__, reverse=True)
              for i in range(1, len(token)) if token[:i] in vocab and token[i:] in vocab]
    unknown = fields["tokens"][fields.get("unknown_token_id", 0)]
    hf = tokenizers.Tokenizer(models.BPE(vocab, merges, unk_token=unknown, fuse_unk=True, byte_fallback=True))
    has_prefix = fields.get("add_space_prefix", True)
    hf.normalizer = normalizers.Sequence([*[normalizers.Prepend(SPACE)] * has_prefix,
                                          normalizers.Replace(" ", SPACE)])
    hf.decoder = decoders.Sequence([decoders.Replace(SPACE, " "), decoders.ByteFallback(), decoders.Fuse(),
                                    *[decoders.Strip(" ", 1, 0)] * has_prefix])
    return hf


def tokenizer(path: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """The content of the tokenizer.json and tokenizer_config.json that this model would have.

    The unused tokens that pad the table are left out. Raises UserError for other kinds of tokenizers, and
    what the package tokenizers raises for merges that do not fit the tokens.
    """
    fields = {key.removeprefix("tokenizer.ggml."): value for key, value in read_header(path)[0].items()}
    with file_errors(path):
        texts, kinds = fields["tokens"], fields.get("token_type", [NORMAL] * len(fields["tokens"]))
        count = 1 + max(index for index, kind in enumerate(kinds) if kind != UNUSED)
        vocab = {text: index for index, text in enumerate(texts[:count])}
        if fields["model"] not in ("gpt2", "llama"):
            raise ValueError(f"tokenizer.ggml.model={fields['model']} is not supported, only gpt2 and llama")
        is_byte_level = fields["model"] == "gpt2"
        hf = byte_level(fields, vocab) if is_byte_level else sentencepiece(fields, vocab)
        hf.add_tokens([tokenizers.AddedToken(text, special=kind != USER_DEFINED, normalized=False)
                       for text, kind in zip(vocab, kinds, strict=False) if kind not in (NORMAL, BYTE)])
        ids = ({} if is_byte_level else {"bos": 1, "eos": 2}) | {
            name: fields[f"{key}_token_id"] for name, key in SPECIAL.items() if f"{key}_token_id" in fields}
        settings = {f"{name}_token": texts[index] for name, index in ids.items()}
        begins = not is_byte_level or fields.get("pre") in LLAMA3_NAMES
        if fields.get("add_bos_token", begins):
            hf.post_processor = processors.TemplateProcessing(
                single=[settings["bos_token"], "$A"], special_tokens=[(settings["bos_token"], ids["bos"])])
    if "tokenizer.chat_template" in fields:
        settings["chat_template"] = fields["tokenizer.chat_template"]
    settings |= {"tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": False}
    return json.loads(hf.to_str()), settings
