"""Hugging Face's layout on disk: config.json, tensor names, safetensors, for the architectures we know.

    folder = find_folder("out/base")            # a model folder, an out_dir of ours, or a hub id
    fields = read_config(folder)                # GPTConfig's fields; UserError names what is not supported
    for name, tensor in read_tensors(folder):   # our parameter names, one tensor at a time
    save_folder(folder, config, state, ids)     # what transformers' from_pretrained reads

In memory all parameters have Llama's names; only GPT-2 needs renaming (and its Conv1D matrices transposing).
What fits no architecture of transformers is saved under our own model_type, with the reason beside it, and
loads here only. So does a ternary model packed to 2 bits a weight (export.py), whose matrices are uint8 with
a scale beside each.
"""

import dataclasses
import hashlib
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from configurator import UserError
from formats import checkpoint
from formats import peft as adapters
from formats.files import file_sha256
from formats.peft import CONFIG, is_adapter, weights_sha256
from modeling import ternary

# The two tables whose rows are token ids: padded in memory, cut when saved.
VOCABULARY_TABLES = ("model.embed_tokens.weight", "lm_head.weight")
LLAMA_KEYS = {"vocab_size": "vocab_size", "n_layer": "num_hidden_layers", "n_head": "num_attention_heads",
              "n_kv_head": "num_key_value_heads", "n_embd": "hidden_size", "head_dim": "head_dim",
              "intermediate_size": "intermediate_size", "block_size": "max_position_embeddings",
              "norm_eps": "rms_norm_eps", "dropout": "attention_dropout",
              "tie_embeddings": "tie_word_embeddings"}
GPT2_KEYS = {"vocab_size": "vocab_size", "n_layer": "n_layer", "n_head": "n_head", "n_embd": "n_embd",
             "intermediate_size": "n_inner", "block_size": "n_positions", "norm_eps": "layer_norm_epsilon",
             "dropout": "resid_pdrop", "tie_embeddings": "tie_word_embeddings"}
EndIds = int | list[int] | None  # of a text: none, one or several
# What transformers assumes where a config.json leaves the key out.
LLAMA_DEFAULTS = {"hidden_act": "silu", "attention_dropout": 0.0, "rms_norm_eps": 1e-6}
# Sizes without which transformers derives others from the rest; all other sizes have to be there.
DERIVED = {"llama": {"num_key_value_heads", "head_dim"}, "mistral": {"head_dim"}, "qwen2": {"head_dim"}}
GPT2_DEFAULTS = {"activation_function": "gelu_new", "tie_word_embeddings": True, "n_inner": None,
                 "layer_norm_epsilon": 1e-5, "resid_pdrop": 0.1}
TIED_BY_DEFAULT = {"llama": False, "mistral": False, "qwen2": False, "qwen3": False, "gpt2": True}


def find_folder(path: str | Path) -> Path:
    """The folder of a model: that itself, the best (else last) checkpoint of an out_dir, or a download."""
    path = Path(path)
    if is_model(path):
        return path
    if (path / "checkpoints.json").is_file():
        pointers = checkpoint.read_pointers(path)
        name = pointers.get("best") or pointers.get("last")
        if not isinstance(name, str) or not is_model(path / name):
            raise UserError(f"{path / 'checkpoints.json'}: points to no checkpoint; give a step's folder")
        return path / name
    nested_here = path.parent != Path(".") and path.parent.exists()
    if path.exists() or nested_here or not re.fullmatch(r"[\w.-]+(/[\w.-]+)?", str(path)):
        raise UserError(f"{path}: no model here (config.json is missing)")
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError
    try:
        return Path(snapshot_download(str(path), allow_patterns=["*.json", "*.jinja", "*.safetensors"]))
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError) as error:
        reason = str(error).splitlines()[0]
        raise UserError(f"{path}: no such folder, and the hub does not give it: {reason}") from None


def is_model(folder: Path) -> bool:
    return (folder / "config.json").is_file() or adapters.is_adapter(folder)


def base_folder(folder: Path, verify: bool = False) -> Path:
    """The model that an adapter is for. UserError if it is not there, is an adapter too, or, to `verify`, has
    other weights by now."""
    base = adapters.base_of(folder)
    try:
        path = find_folder(base["path"])
    except UserError as error:
        raise UserError(f"{folder}: an adapter of {base['path']}: {error}") from None
    if adapters.is_adapter(path):
        raise UserError(f"{folder}: an adapter of {path}, which is an adapter, too")
    if verify and base.get("sha256") not in (None, adapters.weights_sha256(path)):
        raise UserError(f"{folder}: an adapter of {path}, whose weights are others by now")
    return path


def read_config(folder: Path) -> dict[str, Any]:
    """GPTConfig's fields from config.json. Raises UserError naming the first thing that is not supported.

    Of an adapter: those of its base, with the vocabulary of the tables that it brings.
    """
    if adapters.is_adapter(folder):
        tables = [len(tensor) for name, tensor in adapters.read_adapter(folder)[0].items()
                  if name in VOCABULARY_TABLES]
        fields = read_config(base_folder(folder))
        return fields | {"vocab_size": max(tables, default=fields["vocab_size"])}
    place = folder / "config.json"
    try:
        config = json.loads(place.read_text(encoding="utf-8"))
        kind = config["model_type"]
        hash(kind)
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"{place}: not a model's config ({type(error).__name__}: {error})") from None
    if kind == "nanollama" and isinstance(config.get("gpt_config"), dict):
        return config["gpt_config"]
    if kind not in TIED_BY_DEFAULT:
        known = ", ".join(TIED_BY_DEFAULT)
        raise UserError(f"{place}: model_type {kind!r} is not supported ({known} are)")
    defaults = GPT2_DEFAULTS if kind == "gpt2" else LLAMA_DEFAULTS
    if kind == "mistral":
        defaults = defaults | {"sliding_window": 4096}
    config = {"tie_word_embeddings": TIED_BY_DEFAULT[kind]} | defaults | config
    refuse_unsupported(config, place)
    try:
        return gpt2_fields(config) if kind == "gpt2" else llama_fields(config)
    except KeyError as error:
        raise UserError(f"{place}: needs the key {error}") from None
    except (TypeError, ValueError, AttributeError) as error:
        raise UserError(f"{place}: {error}") from None


def end_ids(folder: Path) -> list[int]:
    """The end-of-text ids that generation_config.json, else config.json, names: none, one or several."""
    for name in ("generation_config.json", "config.json"):
        if (folder / name).is_file():
            try:
                ids = json.loads((folder / name).read_text(encoding="utf-8")).get("eos_token_id")
                ids = ids if isinstance(ids, list) else [] if ids is None else [ids]
                if ids and all(type(each) is int for each in ids):
                    return ids
            except (ValueError, AttributeError) as error:
                raise UserError(f"{folder / name}: damaged ({type(error).__name__}: {error})") from None
            if ids:
                raise UserError(f"{folder / name}: eos_token_id={ids}: must be a whole number, or several")
    return []


def refuse_unsupported(config: dict[str, Any], place: Path) -> None:
    """UserError for every known setting that our model does not compute; silence would give wrong logits."""
    kind, window = config["model_type"], config.get("sliding_window")
    if kind in ("qwen2", "qwen3") and not config.get("use_sliding_window"):
        window = None
    biases = config.get("attention_bias", False), config.get("mlp_bias", False)
    faults = {
        "quantization_config": config.get("quantization_config") is not None,
        "hidden_act": kind != "gpt2" and config["hidden_act"] != "silu",
        "activation_function": kind == "gpt2" and config["activation_function"] != "gelu_new",
        "sliding_window": window is not None and window < config.get("max_position_embeddings", 0),
        "partial_rotary_factor": config.get("partial_rotary_factor", 1.0) != 1.0,
        "attention_bias": biases[0] != biases[1] or (any(biases) and kind != "llama"),
        "scale_attn_by_inverse_layer_idx": config.get("scale_attn_by_inverse_layer_idx", False),
        "scale_attn_weights": not config.get("scale_attn_weights", True),
        "add_cross_attention": config.get("add_cross_attention", False),
    }
    for key, fault in faults.items():
        if fault:
            raise UserError(f"{place}: {key}={config.get(key)} is not supported")


def llama_fields(config: dict[str, Any]) -> dict[str, Any]:
    """Llama, Mistral, Qwen2, Qwen3. Rotary keys are top-level in older files, in rope_parameters in newer."""
    derived = DERIVED.get(config["model_type"], set()) - config.keys()
    fields = {ours: config[theirs] for ours, theirs in LLAMA_KEYS.items() if theirs not in derived}
    rope = config.get("rope_parameters") or config.get("rope_scaling") or {}
    kind = rope.get("rope_type", rope.get("type", "default"))
    theta = rope.get("rope_theta", config.get("rope_theta", 10000.0))
    scaling = {"rope_type": kind} | {k: v for k, v in rope.items() if k not in ("type", "rope_theta")}
    if kind == "yarn":  # transformers' default where the file does not say
        scaling.setdefault("original_max_position_embeddings", config["max_position_embeddings"])
    bias = "qkv" if config["model_type"] == "qwen2" else "all" if config.get("mlp_bias") else "none"
    return fields | {"rope_theta": float(theta), "rope_scaling": None if kind == "default" else scaling,
                     "qk_norm": config["model_type"] == "qwen3", "bias": bias}


def gpt2_fields(config: dict[str, Any]) -> dict[str, Any]:
    fields = {ours: config[theirs] for ours, theirs in GPT2_KEYS.items()}
    fields["intermediate_size"] = fields["intermediate_size"] or 4 * fields["n_embd"]
    return fields | {"position": "learned", "norm": "layernorm", "mlp": "gelu", "bias": "all"}


def architecture(config: Any) -> str:
    """transformers' model_type that computes exactly this GPTConfig, or "nanollama" where there is none."""
    if config.ternary:
        return "nanollama"
    shape = (config.position, config.norm, config.mlp)
    if shape == ("learned", "layernorm", "gelu") and config.bias == "all" and not config.qk_norm:
        plain = config.n_kv_head == config.n_head and config.head_dim * config.n_head == config.n_embd
        return "gpt2" if plain else "nanollama"
    if shape == ("rope", "rmsnorm", "swiglu"):
        kinds = {("none", False): "llama", ("all", False): "llama", ("qkv", False): "qwen2",
                 ("none", True): "qwen3"}
        return kinds.get((config.bias, config.qk_norm), "nanollama")
    return "nanollama"


def unusual(config: Any) -> str:
    """The settings by which a model of ours is none of these architectures, as a message says them."""
    usual = {"position": "rope", "norm": "rmsnorm", "mlp": "swiglu", "bias": "none", "qk_norm": False,
             "ternary": False}
    if config.position == "learned":  # GPT-2's heads have no choice
        usual |= {"n_kv_head": config.n_head, "head_dim": config.n_embd // config.n_head}
    return ", ".join(f"{key}={getattr(config, key)}" for key, value in usual.items()
                     if getattr(config, key) != value)


def write_config(config: Any, ids: dict[str, Any], dtype: torch.dtype = torch.float32) -> dict[str, Any]:
    """config.json's contents for a GPTConfig. ids: `special_token_ids`."""
    kind = architecture(config)
    common = {"model_type": kind, **ids, "torch_dtype": str(dtype).rpartition(".")[2]}
    if kind == "nanollama":
        return common | {"gpt_config": dataclasses.asdict(config),
                         "note": "transformers has no architecture like this: only nanollama loads it"}
    names = {"llama": "LlamaForCausalLM", "qwen2": "Qwen2ForCausalLM", "qwen3": "Qwen3ForCausalLM",
             "gpt2": "GPT2LMHeadModel"}
    common["architectures"] = [names[kind]]
    if kind == "gpt2":
        return common | {theirs: getattr(config, ours) for ours, theirs in GPT2_KEYS.items()} | {
            "activation_function": "gelu_new", "attn_pdrop": config.dropout, "embd_pdrop": config.dropout}
    return common | {theirs: getattr(config, ours) for ours, theirs in LLAMA_KEYS.items()} | {
        "hidden_act": "silu", "attention_bias": config.bias == "all", "mlp_bias": config.bias == "all",
        "rope_theta": config.rope_theta, "rope_scaling": config.rope_scaling}


def from_hf(name: str, tensor: Tensor) -> Iterator[tuple[str, Tensor]]:
    """One stored tensor under our names: none for an old file's buffers, three for GPT-2's fused q, k, v."""
    name = name.removeprefix("transformer.")
    if name.endswith((".attn.bias", ".attn.masked_bias", "rotary_emb.inv_freq")):
        return
    match = re.fullmatch(r"h\.(\d+)\.(\w+)(?:\.(\w+))?\.(weight|bias)", name)
    if match is None:
        plain = {"wte": "model.embed_tokens", "wpe": "model.embed_positions", "ln_f": "model.norm"}
        head, _, tail = name.rpartition(".")
        yield f"{plain.get(head, head)}.{tail}", tensor
        return
    layer, module, part, kind = match.groups()
    if part is None:
        norm = {"ln_1": "input_layernorm", "ln_2": "post_attention_layernorm"}[module]
        yield f"model.layers.{layer}.{norm}.{kind}", tensor
        return
    if kind == "weight":
        tensor = tensor.T  # Conv1D stores (in, out)
    if part == "c_attn":
        for letter, piece in zip("qkv", tensor.chunk(3), strict=True):
            yield f"model.layers.{layer}.self_attn.{letter}_proj.{kind}", piece
        return
    ours = {("attn", "c_proj"): "self_attn.o_proj", ("mlp", "c_fc"): "mlp.up_proj",
            ("mlp", "c_proj"): "mlp.down_proj"}
    yield f"model.layers.{layer}.{ours[module, part]}.{kind}", tensor


def to_gpt2(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Our names -> GPT-2's: the inverse of `from_hf`."""
    plain = {"input_layernorm": "ln_1", "post_attention_layernorm": "ln_2", "self_attn.o_proj": "attn.c_proj",
             "mlp.up_proj": "mlp.c_fc", "mlp.down_proj": "mlp.c_proj", "model.embed_tokens": "wte",
             "model.embed_positions": "wpe", "model.norm": "ln_f"}
    result = {}
    for name, tensor in state.items():
        head, _, kind = name.rpartition(".")
        match = re.fullmatch(r"model\.layers\.(\d+)\.(.+)", head)
        prefix, module = (f"h.{match[1]}.", match[2]) if match else ("", head)
        if module == "self_attn.q_proj":
            module = "attn.c_attn"
            tensor = torch.cat([tensor] + [state[name.replace("q_proj", p)] for p in ("k_proj", "v_proj")])
        elif module in ("self_attn.k_proj", "self_attn.v_proj"):
            continue
        else:
            module = plain.get(module, module)
        is_matrix = prefix and tensor.ndim == 2
        root = "" if module == "lm_head" else "transformer."
        result[f"{root}{prefix}{module}.{kind}"] = tensor.T.contiguous() if is_matrix else tensor
    return result


def read_tensors(folder: Path) -> Iterator[tuple[str, Tensor]]:
    """(our name, tensor) of every stored weight, one by one; UserError for a missing or damaged file.

    Of an adapter: its base's weights with the adapter added.
    """
    require_intact(folder)
    if adapters.is_adapter(folder):
        yield from adapters.merged(folder, read_tensors(base_folder(folder, verify=True)))
        return
    index = folder / "model.safetensors.index.json"
    files = ["model.safetensors"]
    if index.is_file():
        try:
            files = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise UserError(f"{index}: not an index ({type(error).__name__}: {error})") from None
    for file in files:
        if Path(file).name != file:
            raise UserError(f"{index}: {file}: a file of another folder is not read")
        if not (folder / file).is_file():
            raise UserError(f"{folder / file}: missing (only safetensors are read, never pickle)")
        try:
            with safe_open(folder / file, framework="pt") as stored:
                for name in stored.keys():
                    if name.endswith(".weight_scale"):
                        continue
                    tensor = stored.get_tensor(name)
                    if tensor.dtype == torch.uint8:
                        tensor = ternary.unpack_codes(tensor) * stored.get_tensor(f"{name}_scale")
                    yield from from_hf(name, tensor)
        except SafetensorError as error:
            raise UserError(f"{folder / file}: damaged: {error}") from None


def require_intact(folder: Path) -> None:
    """UserError where a file is not the one that the manifest, if there is any, tells of."""
    if (folder / "manifest.json").is_file() and (problem := checkpoint.find_corruption(folder, model_only=True)):
        raise UserError(f"{folder}: damaged: {problem} (if it was changed on purpose, delete manifest.json)")


def gguf_of(folder: Path) -> Path | None:
    """The GGUF file of a folder whose weights are one and nothing else. UserError where there are several."""
    files = sorted(folder.glob("*.gguf"))
    if not files or any(folder.glob("*.safetensors")):
        return None
    if len(files) > 1:
        raise UserError(f"{folder}: holds several .gguf files; export each to a folder of its own to load it")
    require_intact(folder)
    return files[0]


def special_token_ids(eos_token_id: EndIds, bos_token_id: int | None = None) -> dict[str, Any]:
    """What config.json and generation_config.json say of the ids that open and end a text. Where several end
    one, as in chats, the last is that between texts; it opens one where no other does."""
    ends = eos_token_id if isinstance(eos_token_id, list) else [eos_token_id]
    return {"bos_token_id": ends[-1] if bos_token_id is None else bos_token_id,
            "eos_token_id": eos_token_id, "pad_token_id": None}


def write_generation_config(folder: Path, ids: dict[str, Any]) -> None:
    text = json.dumps(ids, indent=2) + "\n"
    (folder / "generation_config.json").write_text(text, encoding="utf-8")


def describe(folder: Path, config: Any, ids: dict[str, Any], dtype: torch.dtype = torch.float32,
             packing: str | None = None) -> dict[str, Any]:
    """Write config.json, which is returned, and generation_config.json."""
    described = write_config(config, ids, dtype) | ({"packing": packing} if packing else {})
    (folder / "config.json").write_text(json.dumps(described, indent=2) + "\n", encoding="utf-8")
    write_generation_config(folder, ids)
    return described


def save_folder(folder: Path, config: Any, state: dict[str, Tensor], ids: dict[str, Any],
                dtype: torch.dtype = torch.float32, packing: str | None = None) -> None:
    """Write the three files of a model folder. state: by our names; padding rows are cut, all is `dtype`.
    ids: `special_token_ids`.

    packing: how uint8 tensors of the state, which stay as they are, hold the weights (`is_packed`).
    """
    folder.mkdir(parents=True, exist_ok=True)
    described = describe(folder, config, ids, dtype, packing)
    state = {name: tensor[:config.vocab_size] if name in VOCABULARY_TABLES else tensor
             for name, tensor in state.items()}
    state = to_gpt2(state) if described["model_type"] == "gpt2" else state
    state = {name: tensor.to("cpu", None if tensor.dtype == torch.uint8 else dtype).contiguous()
             for name, tensor in state.items()}
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})


def is_packed(folder: Path) -> bool:
    """Whether a folder holds ternary weights as they are computed with, not those they are rounded from."""
    config = folder / "config.json"
    return config.is_file() and "packing" in json.loads(config.read_text(encoding="utf-8"))


def teacher_sha256(folder: Path) -> str:
    """The hash of what a teacher computes: of its weights and its configuration."""
    config = folder / (CONFIG if is_adapter(folder) else "config.json")
    return hashlib.sha256((weights_sha256(folder) + file_sha256(config)).encode()).hexdigest()
