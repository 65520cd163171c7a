"""Hugging Face's layout on disk: config.json, tensor names and safetensors, for the architectures we know.

    folder = find_folder("out/base")            # a model folder, an out_dir, a GGUF file, or a hub id
    fields = read_config(folder)                # GPTConfig's fields; UserError names what is not supported
    for name, tensor in read_tensors(folder):   # our parameter names, one tensor at a time
    save_folder(folder, config, state, ids)     # what transformers' from_pretrained reads

In memory all parameters have Llama's names. Files of GPT-2 and Mixtral have other names (formats/names.py),
and GPT-2's matrices are transposed. A model that no architecture of transformers computes is saved under our
own model_type, with a note that says why; only this project loads it. The same is true of a ternary model
that is packed to 2 bits per weight (export.py): its matrices are uint8, and each has a scale in a tensor of
its own.
"""

import dataclasses
import hashlib
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, TypeAlias

import torch
from safetensors import safe_open
from torch import Tensor

from configurator import UserError
from formats import checkpoint, gguf_reader, peft
from formats.files import content_errors, file_sha256, read_json, require_utf8_name, write_json, write_tensors
from formats.names import MIXTRAL_NAMES, from_hf, to_gpt2
from modeling import ternary

GPTConfig: TypeAlias = Any  # model.GPTConfig, which this folder must not import: model.py imports this folder
EndIds: TypeAlias = int | list[int] | None  # the EOS ids of a model: none, one or several

# The two tables whose rows are token ids: padded in memory, cut to vocab_size rows when saved.
VOCABULARY_TABLES = ("model.embed_tokens.weight", "lm_head.weight")
# {GPTConfig's field: its value in a Llama without biases}. SETTINGS has what sets other architectures apart.
USUAL = {"position": "rope", "norm": "rmsnorm", "mlp": "swiglu", "bias": "none", "qk_norm": False,
         "ternary": False}
# {GPTConfig's field: the key in config.json}
LLAMA_KEYS = {"vocab_size": "vocab_size", "n_layer": "num_hidden_layers", "n_head": "num_attention_heads",
              "n_kv_head": "num_key_value_heads", "n_embd": "hidden_size", "head_dim": "head_dim",
              "intermediate_size": "intermediate_size", "block_size": "max_position_embeddings",
              "norm_eps": "rms_norm_eps", "dropout": "attention_dropout",
              "tie_embeddings": "tie_word_embeddings"}
GPT2_KEYS = {"vocab_size": "vocab_size", "n_layer": "n_layer", "n_head": "n_head", "n_embd": "n_embd",
             "intermediate_size": "n_inner", "block_size": "n_positions", "norm_eps": "layer_norm_epsilon",
             "dropout": "resid_pdrop", "tie_embeddings": "tie_word_embeddings"}
# {model_type of a mixture of experts: {GPTConfig's field: the key in config.json}}
SHARED_EXPERT_KEYS = {"n_expert_per_token": "num_experts_per_tok", "balance_weight": "router_aux_loss_coef"}
EXPERT_KEYS = {"mixtral": SHARED_EXPERT_KEYS | {"n_expert": "num_local_experts"},
               "qwen3_moe": SHARED_EXPERT_KEYS | {
                   "n_expert": "num_experts", "expert_size": "moe_intermediate_size",
                   "norm_topk": "norm_topk_prob", "dense_layers": "mlp_only_layers"}}
# {model_type: the values that transformers assumes for keys that a config.json leaves out}. None is derived
# from other sizes. All other sizes are required.
QWEN3_DEFAULTS = {"attention_dropout": 0.0, "rms_norm_eps": 1e-6, "tie_word_embeddings": False}
LLAMA_DEFAULTS: dict[str, Any] = QWEN3_DEFAULTS | {"head_dim": None}
DEFAULTS: dict[str, dict[str, Any]] = {
    "llama": LLAMA_DEFAULTS | {"num_key_value_heads": None}, "qwen2": LLAMA_DEFAULTS, "qwen3": QWEN3_DEFAULTS,
    "mistral": LLAMA_DEFAULTS | {"sliding_window": 4096},
    "mixtral": LLAMA_DEFAULTS | {"rms_norm_eps": 1e-5, "num_local_experts": 8, "num_experts_per_tok": 2,
                                 "router_aux_loss_coef": 0.001},
    "qwen3_moe": QWEN3_DEFAULTS | {"num_experts": 128, "num_experts_per_tok": 8, "mlp_only_layers": [],
                                   "norm_topk_prob": False, "router_aux_loss_coef": 0.001},
    "gpt2": {"tie_word_embeddings": True, "n_inner": None, "layer_norm_epsilon": 1e-5, "resid_pdrop": 0.1}}
SIZES = {"vocab_size", "n_layer", "n_head", "n_kv_head", "n_embd", "head_dim", "intermediate_size",
         "block_size"}
DERIVED_SIZES = {"n_kv_head", "head_dim", "intermediate_size"}  # may be None
# {key: the only value that our model computes}; a config.json that leaves the key out has this value.
ONLY = {"quantization_config": None, "hidden_act": "silu", "activation_function": "gelu_new",
        "decoder_sparse_step": 1, "partial_rotary_factor": 1.0, "scale_attn_by_inverse_layer_idx": False,
        "scale_attn_weights": True, "add_cross_attention": False}
MAX_SIZE = 2**24  # no model has a larger one; a damaged file may have one for which no memory is enough
# The masks and tables that old files of transformers contain.
BUFFER = re.compile(r"\.attn\.(masked_)?bias$|rotary_emb\.inv_freq$")

# {out_dir: the script that writes it by default}, for the message to a user who left out a step.
MADE_BY = {"out/base": "train.py", "out/sft": "sft.py", "out/dpo": "dpo.py", "out/grpo": "grpo.py",
           "out/distilled": "distill.py", "out/verifier": "verifier.py"}


# ---- Folders ----------------------------------------------------------------------------------------------

def is_model(folder: Path) -> bool:
    return (folder / "config.json").is_file() or peft.is_adapter(folder)


def home(model: Path) -> Path:
    """The folder that contains a model: the model itself or, for a GGUF file, its folder."""
    return model.parent if model.is_file() else model


def find_folder(path: str | Path) -> Path:
    """The folder of a model: `path` itself, the best checkpoint of an out_dir, or a download from the hub.

    A GGUF file is returned as it is. For a folder whose weights are a GGUF file, that file is returned:
    functions that take a model's folder take it too, and read everything from it.
    """
    path = Path(path)
    require_utf8_name(str(path), "rename the folder")
    if file := gguf_of(path):
        return file
    if is_model(path):
        return path
    if pointers := checkpoint.read_pointers(path):
        name = pointers.get("best") or pointers.get("last")
        if name is None or not is_model(path / name):
            raise UserError(f"{path / 'checkpoints.json'}: names no checkpoint that exists; give a step")
        return path / name
    if script := MADE_BY.get(str(path)):
        raise UserError(f"{path}: no model here yet; python {script} trains it")
    # A hub id is "name" or "owner/name". If the parent folder exists, the path is a typing mistake instead.
    parent_exists = path.parent != Path(".") and path.parent.exists()
    if path.exists() or parent_exists or not re.fullmatch(r"[\w.-]+(/[\w.-]+)?", str(path)):
        raise UserError(f"{path}: no model here (config.json is missing)")
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError
    try:
        return Path(snapshot_download(str(path), allow_patterns=["*.json", "*.jinja", "*.safetensors"]))
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError, ValueError) as error:
        reason = str(error).splitlines()[0]
        raise UserError(f"{path}: no such folder, and the hub does not give it: {reason}") from None


def base_folder(folder: Path, verify: bool = False) -> Path:
    """The folder of the model that an adapter belongs to.

    Raises UserError if it is missing or an adapter itself. verify: also if its weights or its config have
    changed.
    """
    base = peft.read_base(folder)
    try:
        path = find_folder(base["path"])
    except UserError as error:
        raise UserError(f"{folder}: an adapter of {base['path']}: {error}") from None
    if peft.is_adapter(path):
        raise UserError(f"{folder}: an adapter of {path}, which is an adapter too")
    if verify and base.get("sha256") not in (None, peft.weights_sha256(path)):
        raise UserError(f"{folder}: an adapter of {path}, whose weights have changed since")
    if verify and base.get("config_sha256") not in (None, config_sha256(path)):
        raise UserError(f"{folder}: an adapter of {path}, whose config.json has changed since")
    return path


def require_intact(folder: Path) -> None:
    """Raise UserError if the folder has a manifest and a file does not match it."""
    folder = home(folder)
    has_manifest = (folder / "manifest.json").is_file()
    if has_manifest and (problem := checkpoint.find_corruption(folder, model_only=True)):
        raise UserError(f"{folder}: damaged: {problem} (if you changed it on purpose, delete manifest.json)")


def is_packed(folder: Path) -> bool:
    """True if a folder holds the rounded ternary weights only, without the weights they were rounded from."""
    return "packing" in read_json(folder / "config.json")


def config_sha256(folder: Path) -> str:
    """The hash of what decides a model's outputs besides its own weights.

    That is config.json, with the rotary settings for example. For an adapter it is its settings, which
    include the scale, and the whole base model.
    """
    if not peft.is_adapter(folder):
        return file_sha256(folder if folder.is_file() else folder / "config.json")
    parts = file_sha256(folder / peft.CONFIG) + model_sha256(base_folder(folder))
    return hashlib.sha256(parts.encode()).hexdigest()


def model_sha256(folder: Path) -> str:
    """The hash of everything that decides a model's outputs: its weights and `config_sha256`."""
    return hashlib.sha256((peft.weights_sha256(folder) + config_sha256(folder)).encode()).hexdigest()


# ---- config.json -> GPTConfig's fields --------------------------------------------------------------------

def refuse_unsupported(config: dict[str, Any], path: Path) -> None:
    """Raise UserError for a known setting that our model does not compute: its logits would be wrong."""
    kind, window = config["model_type"], config.get("sliding_window")
    if kind in ("qwen2", "qwen3", "qwen3_moe") and not config.get("use_sliding_window"):
        window = None  # these state a window even where it is not used
    biases = config.get("attention_bias", False), config.get("mlp_bias", False)
    unsupported = {key: config.get(key, value) != value for key, value in ONLY.items()} | {
        "sliding_window": window is not None and window < config.get("max_position_embeddings", 0),
        "attention_bias": biases[0] != biases[1] or (any(biases) and kind != "llama")}
    for key, is_set in unsupported.items():
        if is_set:
            raise UserError(f"{path}: {key}={config.get(key)} is not supported")


def llama_fields(config: dict[str, Any]) -> dict[str, Any]:
    """GPTConfig's fields for Llama, Mistral, Qwen2, Qwen3, Mixtral and Qwen3-MoE."""
    kind = config["model_type"]
    # Qwen's own files say num_experts; transformers 5 writes num_local_experts in its place.
    config = config | {"num_experts": config.get("num_local_experts", config.get("num_experts"))}
    fields = {ours: config[theirs] for ours, theirs in (LLAMA_KEYS | EXPERT_KEYS.get(kind, {})).items()}
    # Newer files keep all rotary keys in rope_parameters; older files have rope_theta at the top level.
    rope = config.get("rope_scaling") or config.get("rope_parameters") or {}
    rope_type = rope.get("rope_type", rope.get("type", "default"))
    theta = rope.get("rope_theta", config.get("rope_theta", 10000.0))
    scaling = {"rope_type": rope_type} | {k: v for k, v in rope.items() if k not in ("type", "rope_theta")}
    if rope_type == "yarn":  # transformers' default
        scaling.setdefault("original_max_position_embeddings", config["max_position_embeddings"])
    bias = "all" if config.get("mlp_bias") else "none"
    return fields | {"rope_theta": float(theta), "rope_scaling": None if rope_type == "default" else scaling,
                     "qk_norm": kind in ("qwen3", "qwen3_moe"), "bias": "qkv" if kind == "qwen2" else bias}


def gpt2_fields(config: dict[str, Any]) -> dict[str, Any]:
    fields = {ours: config[theirs] for ours, theirs in GPT2_KEYS.items()}
    fields["intermediate_size"] = fields["intermediate_size"] or 4 * fields["n_embd"]
    return fields | gguf_reader.SETTINGS["gpt2"]


def with_sizes(fields: dict[str, Any], path: Path) -> dict[str, Any]:
    """The fields, if every size is an integer that a model can have, or None. Raises UserError.

    path: of config.json or a GGUF file. If weights are next to it, sizes that they cannot fill are refused
    too, so that no memory is allocated for them.
    """
    for key in sorted(SIZES):
        value = fields.get(key)
        is_derived = value is None and key in DERIVED_SIZES
        if not is_derived and not (type(value) is int and 0 < value <= MAX_SIZE):
            raise UserError(f"{path}: {key}={str(value)[:40]}: must be an integer from 1 to {MAX_SIZE:,}")
    size = {key: fields.get(key) or 1 for key in SIZES}
    rows = size["vocab_size"] + (size["block_size"] if fields.get("position") == "learned" else 0)
    layer = size["n_head"] * size["head_dim"] + 2 * size["intermediate_size"]
    weights = size["n_embd"] * (rows + size["n_layer"] * layer)  # at least
    files = [file for kind in ("*.safetensors", "*.gguf") for file in path.parent.glob(kind)]
    stored = sum(file.stat().st_size for file in files)
    # The smallest type that the package gguf decodes, IQ1_S, has 256 weights in 50 bytes: 5.1 per byte.
    if files and weights > 6 * stored:
        raise UserError(f"{path}: describes {weights:,} weights or more, but its files have {stored:,} bytes")
    return fields


def read_config(folder: Path) -> dict[str, Any]:
    """GPTConfig's fields from config.json. Raises UserError that names the first unsupported setting.

    For an adapter: the fields of its base, with the vocabulary size of the tables that it contains.
    """
    if peft.is_adapter(folder):
        tables = [len(tensor) for name, tensor in peft.read_adapter(folder)[0].items()
                  if name in VOCABULARY_TABLES]
        fields = read_config(base_folder(folder))
        return fields | {"vocab_size": max(tables, default=fields["vocab_size"])}
    if gguf_reader.is_gguf(folder):
        return with_sizes(gguf_reader.read_config(folder), folder)
    path = folder / "config.json"
    config = read_json(path)
    kind = config.get("model_type")
    if kind == "nanollama" and isinstance(config.get("gpt_config"), dict):
        return with_sizes(config["gpt_config"], path)
    if kind not in list(DEFAULTS):  # a list, because a damaged file may have an unhashable value here
        raise UserError(f"{path}: model_type {kind!r} is not supported (use {', '.join(DEFAULTS)})")
    config = DEFAULTS[kind] | config
    with content_errors(path):
        refuse_unsupported(config, path)
        return with_sizes(gpt2_fields(config) if kind == "gpt2" else llama_fields(config), path)


def end_ids(folder: Path) -> list[int]:
    """The EOS ids in generation_config.json or, if it has none, in config.json: none, one or several."""
    if gguf_reader.is_gguf(folder):
        return gguf_reader.end_ids(folder)
    for name in ("generation_config.json", "config.json"):
        ids = read_json(folder / name).get("eos_token_id")
        ids = [each for each in (ids if isinstance(ids, list) else [ids]) if each is not None]
        if not all(type(each) is int for each in ids):
            raise UserError(f"{folder / name}: eos_token_id={str(ids)[:40]}: must be integers")
        if ids:
            return ids
    return []


# ---- GPTConfig -> config.json -----------------------------------------------------------------------------

def architecture(config: GPTConfig) -> str:
    """transformers' model_type that computes exactly this model, or "nanollama" if there is none."""
    settings = {key: getattr(config, key) for key in USUAL}
    known = [*gguf_reader.SETTINGS.items(), ("llama", {"bias": "all"})]
    arch = next((name for name, own in known if settings == USUAL | own), "nanollama")
    if config.n_expert:
        has_one_width = not config.dense_layers and config.expert_size == config.intermediate_size
        mixtral = "mixtral" if has_one_width and config.norm_topk else "nanollama"
        arch = {"llama": mixtral, "qwen3": "qwen3_moe"}.get(arch, "nanollama")
    if config.sink_logits or (config.n_expert and config.balance == "bias"):
        return "nanollama"
    has_plain_heads = config.n_kv_head == config.n_head and config.head_dim * config.n_head == config.n_embd
    return "nanollama" if arch == "gpt2" and not has_plain_heads else arch


def unusual(config: GPTConfig) -> str:
    """The settings that keep a "nanollama" model from being one of the other architectures, for a message."""
    usual = USUAL | {"sink_logits": False, "n_expert": 0}
    if config.position == "learned":  # GPT-2 has no choice of heads
        usual |= {"n_kv_head": config.n_head, "head_dim": config.n_embd // config.n_head}
    if config.n_expert:
        usual["balance"] = "aux"
        if not config.qk_norm:  # Mixtral has no choice of these; Qwen3-MoE has
            usual |= {"expert_size": config.intermediate_size, "dense_layers": [], "norm_topk": True}
    return ", ".join(f"{key}={getattr(config, key)}" for key, value in usual.items()
                     if getattr(config, key) != value)


def special_token_ids(eos_token_id: EndIds, bos_token_id: int | None = None) -> dict[str, Any]:
    """The entries of config.json and generation_config.json for the ids that begin and end a text.

    If there are several EOS ids (chat models), the last one separates documents. It is also the BOS id if the
    model has none.
    """
    ends = eos_token_id if isinstance(eos_token_id, list) else [eos_token_id]
    return {"bos_token_id": ends[-1] if bos_token_id is None else bos_token_id,
            "eos_token_id": eos_token_id, "pad_token_id": None}


def config_content(config: GPTConfig, ids: dict[str, Any], dtype: torch.dtype) -> dict[str, Any]:
    """The content of config.json. ids: `special_token_ids`."""
    arch = architecture(config)
    common = {"model_type": arch, **ids, "torch_dtype": str(dtype).rpartition(".")[2]}
    if arch == "nanollama":
        return common | {"gpt_config": dataclasses.asdict(config),
                         "note": "transformers has no architecture like this: only nanollama loads it"}
    if arch == "gpt2":
        name, keys, fixed = "GPT2LMHeadModel", GPT2_KEYS, {
            "activation_function": "gelu_new", "attn_pdrop": config.dropout, "embd_pdrop": config.dropout}
    else:
        name = f"{arch.title().replace('_', '')}ForCausalLM"
        keys, fixed = LLAMA_KEYS | EXPERT_KEYS.get(arch, {}), {
            "hidden_act": "silu", "attention_bias": config.bias == "all", "mlp_bias": config.bias == "all",
            "rope_theta": config.rope_theta, "rope_scaling": config.rope_scaling}
    sizes = {theirs: getattr(config, ours) for ours, theirs in keys.items()}
    return common | {"architectures": [name]} | sizes | fixed


def write_config(folder: Path, config: GPTConfig, ids: dict[str, Any], dtype: torch.dtype = torch.float32,
                 packing: str | None = None) -> None:
    """Write config.json and generation_config.json. ids: `special_token_ids`."""
    content = config_content(config, ids, dtype) | ({"packing": packing} if packing else {})
    write_json(folder / "config.json", content)
    write_json(folder / "generation_config.json", ids)


# ---- Weights ----------------------------------------------------------------------------------------------

def weight_files(folder: Path) -> list[Path]:
    """The safetensors files of a model folder. Raises UserError if one is missing or lies elsewhere."""
    index = folder / "model.safetensors.index.json"
    names = ["model.safetensors"]
    if index.is_file() and not (folder / names[0]).is_file():  # transformers prefers the single file
        with content_errors(index):
            names = sorted(set(read_json(index)["weight_map"].values()))
    for name in names:
        if Path(str(name)).name != name:  # "../x" in a stranger's index
            raise UserError(f"{index}: {name}: a file of another folder is not read")
        if not (folder / name).is_file():
            raise UserError(f"{folder / name}: missing (only safetensors are read, never pickle)")
    return [folder / name for name in names]


def read_file(file: Path, packed: bool) -> Iterator[tuple[str, Tensor]]:
    """Yield (our name, tensor) for every weight of one safetensors file.

    packed: the matrices of uint8 are packed ternary weights, each with a scale; they are unpacked.
    """
    with content_errors(file), safe_open(file, framework="pt") as stored:
        for name in stored.keys():
            if BUFFER.search(name) or (packed and name.endswith(".weight_scale")):
                continue  # a buffer of an old file; a scale is read together with its matrix
            tensor = stored.get_tensor(name)
            if packed and tensor.dtype == torch.uint8:
                tensor = ternary.unpack_codes(tensor) * stored.get_tensor(f"{name}_scale")
            peft.require_float(file, name, tensor)
            yield from from_hf(name, tensor)


def read_tensors(folder: Path) -> Iterator[tuple[str, Tensor]]:
    """Yield (our name, tensor) for every stored weight, one at a time.

    For an adapter: its base's weights with the adapter added. Raises UserError for a missing or damaged file.
    """
    require_intact(folder)
    if peft.is_adapter(folder):
        yield from peft.merge_adapter(folder, read_tensors(base_folder(folder, verify=True)))
        return
    if file := gguf_of(folder):
        yield from gguf_reader.read_tensors(file)
        return
    for file in weight_files(folder):
        yield from read_file(file, is_packed(folder))


def gguf_of(folder: Path) -> Path | None:
    """A GGUF file itself, that of a folder without safetensors, or None. UserError if there are several."""
    files = [folder] if gguf_reader.is_gguf(folder) else sorted(folder.glob("*.gguf"))
    if not files or any(folder.glob("*.safetensors")):
        return None
    if len(files) > 1:
        raise UserError(f"{folder}: holds several .gguf files; give the path of one, such as {files[0]}")
    return files[0]


def save_folder(folder: Path, config: GPTConfig, state: dict[str, Tensor], ids: dict[str, Any],
                dtype: torch.dtype = torch.float32, packing: str | None = None) -> None:
    """Write config.json, generation_config.json and model.safetensors.

    state: tensors by our names, saved as `dtype` without padding rows. ids: `special_token_ids`. packing: how
    the uint8 tensors of the state hold ternary weights (`is_packed`); they are saved unchanged.
    """
    folder.mkdir(parents=True, exist_ok=True)
    write_config(folder, config, ids, dtype, packing)
    state = {name: tensor[:config.vocab_size] if name in VOCABULARY_TABLES else tensor  # (P, C) -> (V, C)
             for name, tensor in state.items()}
    state = to_gpt2(state) if architecture(config) == "gpt2" else state
    if architecture(config) == "mixtral":
        for theirs, ours in MIXTRAL_NAMES.items():
            state = {name.replace(ours, theirs): tensor for name, tensor in state.items()}
    state = {name: tensor.to("cpu", None if tensor.dtype == torch.uint8 else dtype).contiguous()
             for name, tensor in state.items()}
    write_tensors(folder / "model.safetensors", state)
