"""LoRA adapters on disk, in PEFT's format: two small matrices for each adapted matrix of a model.

    out/sft/step_000300/  adapter_model.safetensors  adapter_config.json      what peft.PeftModel loads
                          base.json                 {"path", "sha256", "config_sha256"} of its base model

    write_adapter(folder, state, spec, base)                # state: our names, `...q_proj.lora_A`, `.lora_B`
    for name, tensor in merge_adapter(folder, tensors): ... # the base's tensors with the adapter added

An adapted matrix is W + scale * B A (arXiv 2106.09685), with A (rank, in) and B (out, rank). scale is
alpha / rank, or alpha / sqrt(rank) for rsLoRA (arXiv 2312.03732). If tokens were added, the adapter also
contains the complete embedding tables. An adapter folder can be used wherever a model folder can:
formats/hf.py merges it while reading.
"""

import hashlib
import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from configurator import UserError
from formats import names as tensor_names
from formats.files import content_errors, file_sha256, read_json, write_json, write_tensors

CONFIG, WEIGHTS, BASE = "adapter_config.json", "adapter_model.safetensors", "base.json"
FLOATS = ("float32", "bfloat16", "float16", "float64")  # the dtypes of weights that are read
PREFIX = "base_model.model."  # PEFT puts it before every name
# Settings of PEFT that change what an adapter computes. We support none of them.
UNSUPPORTED = ("use_dora", "rank_pattern", "alpha_pattern", "layer_replication", "layers_to_transform",
               "exclude_modules", "use_qalora", "alora_invocation_tokens")


@dataclass(frozen=True)
class AdapterSpec:
    """The settings of an adapter: all of it except its weights."""

    rank: int
    alpha: float
    dropout: float
    targets: tuple[str, ...]  # names of the adapted linear modules, such as "q_proj"
    rslora: bool
    tables: tuple[str, ...] = ()  # modules that are trained and saved completely, such as "embed_tokens"

    @property
    def scale(self) -> float:
        return self.alpha / (math.sqrt(self.rank) if self.rslora else self.rank)


def c_attn_settings(rank: int, alpha: float, rslora: bool) -> dict[str, Any]:
    """PEFT's settings for GPT-2's fused q, k and v: three times the rank, and the same scale."""
    return {"rank_pattern": {"c_attn": 3 * rank},
            "alpha_pattern": {"c_attn": alpha * (math.sqrt(3) if rslora else 3)}}


def is_adapter(folder: Path) -> bool:
    return (folder / CONFIG).is_file()


def weights_sha256(folder: Path) -> str:
    """The hash of a model's weights: of all its safetensors files or, if it has none, of its GGUF files."""
    files = sorted(folder.glob("*.safetensors")) or sorted(folder.glob("*.gguf"))
    files = [folder] if folder.is_file() else files  # the path of a GGUF file
    return hashlib.sha256("".join(map(file_sha256, files)).encode()).hexdigest()


def write_adapter(folder: Path, state: dict[str, Tensor], spec: AdapterSpec, base: dict[str, str],
                  is_gpt2: bool = False) -> None:
    """Write the three files. state: every tensor of the adapter by our name. base: content of base.json."""
    folder.mkdir(parents=True, exist_ok=True)
    targets, tables = list(spec.targets), list(spec.tables)
    if is_gpt2:
        state = tensor_names.adapter_to_gpt2(state)
        targets = sorted({name.partition(".lora_")[0].split(".", 3)[3] for name in state if ".lora_" in name})
        tables = [tensor_names.GPT2_NAMES.get(f"model.{table}", table) for table in spec.tables]
    config = {"peft_type": "LORA", "task_type": "CAUSAL_LM", "base_model_name_or_path": base["path"],
              "r": spec.rank, "lora_alpha": spec.alpha, "lora_dropout": spec.dropout, "bias": "none",
              "target_modules": targets, "use_rslora": spec.rslora, "inference_mode": True,
              "modules_to_save": tables or None, "fan_in_fan_out": is_gpt2}
    if "attn.c_attn" in targets:
        config |= c_attn_settings(spec.rank, spec.alpha, spec.rslora)
    write_json(folder / CONFIG, config)
    write_json(folder / BASE, base)
    stored = {f"{PREFIX}{name}.weight" if name.endswith(("lora_A", "lora_B")) else PREFIX + name:
              tensor.to("cpu", torch.float32).contiguous() for name, tensor in state.items()}
    write_tensors(folder / WEIGHTS, stored)


def require_float(file: Path, name: str, tensor: Tensor) -> None:
    """Raise UserError for a tensor that is not a plain float: it would be read without its scale."""
    dtype = str(tensor.dtype).removeprefix("torch.")
    if dtype not in FLOATS:
        raise UserError(f"{file}: {name} is stored as {dtype}; only {', '.join(FLOATS)} are read, so convert "
                        "a quantized model first")


def check_spec(spec: AdapterSpec, path: Path) -> None:
    """Raise UserError for settings that no adapter has."""
    checks = {"r": type(spec.rank) is int and 0 < spec.rank < 2**20,
              "lora_alpha": type(spec.alpha) in (int, float) and abs(spec.alpha) < 2**20,
              "lora_dropout": type(spec.dropout) in (int, float) and 0 <= spec.dropout < 1,
              "target_modules": all(isinstance(name, str) for name in spec.targets),
              "modules_to_save": all(isinstance(name, str) for name in spec.tables)}
    if wrong := [key for key, fits in checks.items() if not fits]:
        raise UserError(f"{path}: {wrong[0]} is not a setting that an adapter can have")


def by_our_names(stored: dict[str, Tensor], spec: AdapterSpec, place: Path | None) -> dict[str, Tensor]:
    """An adapter's tensors by our names.

    PEFT's "base_model.model.model.layers.0..q_proj.lora_A.weight" is our "model.layers.0..q_proj.lora_A".
    place: the file whose target_modules is a list. Raises UserError if the list leaves out a module that has
    weights. None if target_modules is a regular expression, which is not checked.
    """
    names = [name.removeprefix(PREFIX) for name in stored]
    names = [name.removesuffix(".weight") if ".lora_" in name else name for name in names]
    # PEFT ignores the weights of modules that target_modules does not list.
    ends = tuple(f".{target}" for target in spec.targets)
    for module in {name.partition(".lora_")[0] for name in names if ".lora_" in name}:
        if place and not f".{module}".endswith(ends):
            raise UserError(f"{place}: target_modules does not list {module}, which has weights")
    return tensor_names.adapter_from_gpt2(dict(zip(names, stored.values(), strict=True)), spec.rank)


def read_adapter(folder: Path) -> tuple[dict[str, Tensor], AdapterSpec]:
    """An adapter's tensors by our names, and its settings. Raises UserError for files it cannot read."""
    with content_errors(folder, "not an adapter"):
        config = read_json(folder / CONFIG)
        # The patterns that `write_adapter` writes for GPT-2's fused q, k and v are supported: drop them.
        if config.get("rank_pattern"):
            settings = c_attn_settings(config["r"], config["lora_alpha"], bool(config.get("use_rslora")))
            config |= dict.fromkeys(settings) if settings.items() <= config.items() else {}
        problems = [key for key in UNSUPPORTED if config.get(key)]
        if config["peft_type"] != "LORA" or config.get("bias", "none") != "none" or problems:
            raise UserError(f"{folder / CONFIG}: only plain LoRA adapters are supported: peft_type=LORA, "
                            f"bias=none, and no {', '.join(problems or UNSUPPORTED)}")
        targets = config["target_modules"]
        spec = AdapterSpec(config["r"], config["lora_alpha"], config.get("lora_dropout", 0.0),
                           (targets,) if isinstance(targets, str) else tuple(targets),
                           bool(config.get("use_rslora")), tuple(config.get("modules_to_save") or ()))
        check_spec(spec, folder / CONFIG)
        stored = load_file(folder / WEIGHTS)
        for name, tensor in stored.items():
            require_float(folder / WEIGHTS, name, tensor)
        adapter = by_our_names(stored, spec, None if isinstance(targets, str) else folder / CONFIG)
    return adapter, spec


def read_base(folder: Path) -> dict[str, str]:
    """{"path", and if known "sha256" and "config_sha256"} of the model that an adapter belongs to.

    base.json is ours. PEFT's own adapter_config.json names a path, but no hash. Raises UserError without a
    path.
    """
    base = read_json(folder / BASE) or read_json(folder / CONFIG)
    path = base.get("path", base.get("base_model_name_or_path"))
    if not isinstance(path, str):
        raise UserError(f"{folder}: {BASE} and {CONFIG} name no base model")
    return {"path": str(Path(path))} | {k: base[k] for k in ("sha256", "config_sha256") if k in base}


def merge_adapter(folder: Path, tensors: Iterable[tuple[str, Tensor]]) -> Iterator[tuple[str, Tensor]]:
    """Yield the base's (name, tensor) pairs with the adapter in `folder` added, in float32.

    Raises UserError for a tensor of the adapter that fits no tensor of the base.
    """
    adapter, spec = read_adapter(folder)
    for name, tensor in tensors:
        module = name.removesuffix(".weight")
        if f"{module}.lora_A" in adapter:
            A, B = adapter.pop(f"{module}.lora_A"), adapter.pop(f"{module}.lora_B", torch.empty(0, 0))
            if (len(B), len(A), A.shape[-1]) != (len(tensor), B.shape[-1], tensor.shape[-1]):
                raise UserError(f"{folder}: {module}.lora_A {tuple(A.shape)} and lora_B {tuple(B.shape)} do "
                                f"not fit {tuple(tensor.shape)}")
            tensor = tensor.float() + spec.scale * (B.float() @ A.float())  # (out, in)
        yield name, adapter.pop(name, tensor)  # a complete table replaces the base's
    if adapter:
        raise UserError(f"{folder}: {min(adapter)} has no place in its base model")
