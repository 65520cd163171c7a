"""LoRA adapters on disk, in PEFT's format: two small matrices for each of some of a model's matrices.

    out/sft/step_000300/  adapter_model.safetensors  adapter_config.json      what peft.PeftModel loads
                          base.json                                           {"path", "sha256"} of its model

    write_adapter(folder, state, spec, base)         # state: our names, `...q_proj.lora_A` and `...lora_B`
    for name, tensor in merged(folder, tensors): ... # the base's tensors, with the adapter added to them

An adapter W + scale * B A (arXiv 2106.09685) has A (rank, in) and B (out, rank); scale is alpha / rank, or
alpha / sqrt(rank) (rsLoRA, arXiv 2312.03732). Where tokens were added, the tables are in the adapter as well,
whole. A folder like this may stand wherever a model folder may: formats/hf.py reads it merged.
"""

import hashlib
import json
import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from configurator import UserError
from formats.files import file_sha256

CONFIG, WEIGHTS, BASE = "adapter_config.json", "adapter_model.safetensors", "base.json"
PREFIX = "base_model.model."  # PEFT's, before every name


@dataclass(frozen=True)
class AdapterSpec:
    """What an adapter is, but for its numbers."""

    rank: int
    alpha: float
    dropout: float
    targets: tuple[str, ...]  # names of the linear modules that have one, as "q_proj"
    rslora: bool
    tables: tuple[str, ...] = ()  # modules that are trained and saved whole, as "embed_tokens"

    @property
    def scale(self) -> float:
        return self.alpha / (math.sqrt(self.rank) if self.rslora else self.rank)


def is_adapter(folder: Path) -> bool:
    return (folder / CONFIG).is_file()


def weights_sha256(folder: Path) -> str:
    """The hash of a model's weights: of all its safetensors files, or of its GGUF file."""
    files = sorted(folder.glob("*.safetensors")) or sorted(folder.glob("*.gguf"))
    return hashlib.sha256("".join(map(file_sha256, files)).encode()).hexdigest()


def write_adapter(folder: Path, state: dict[str, Tensor], spec: AdapterSpec, base: dict[str, str]) -> None:
    """Write the three files. state: every tensor of the adapter by our name; base: {"path", "sha256"}."""
    folder.mkdir(parents=True, exist_ok=True)
    config = {"peft_type": "LORA", "task_type": "CAUSAL_LM", "base_model_name_or_path": base["path"],
              "r": spec.rank, "lora_alpha": spec.alpha, "lora_dropout": spec.dropout, "bias": "none",
              "target_modules": list(spec.targets), "use_rslora": spec.rslora, "inference_mode": True,
              "modules_to_save": list(spec.tables) or None, "fan_in_fan_out": False}
    for name, content in ((CONFIG, config), (BASE, base)):
        (folder / name).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    save_file({PREFIX + peft_name(name): tensor.to("cpu", torch.float32).contiguous()
               for name, tensor in state.items()}, folder / WEIGHTS, metadata={"format": "pt"})


def peft_name(name: str) -> str:
    return f"{name}.weight" if name.endswith(("lora_A", "lora_B")) else name


def read_adapter(folder: Path) -> tuple[dict[str, Tensor], AdapterSpec]:
    """An adapter's tensors by our names, and what it is. UserError for a file that cannot be read."""
    try:
        config = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
        others = [key for key in ("use_dora", "rank_pattern", "alpha_pattern", "fan_in_fan_out",
                                  "layer_replication") if config.get(key)]
        if config["peft_type"] != "LORA" or config.get("bias", "none") != "none" or others:
            raise UserError(f"{folder / CONFIG}: only plain LoRA adapters are read"
                            + f", not with {', '.join(others)}" * bool(others))
        spec = AdapterSpec(config["r"], config["lora_alpha"], config.get("lora_dropout", 0.0),
                           tuple(config["target_modules"]), bool(config.get("use_rslora")),
                           tuple(config.get("modules_to_save") or ()))
        stored = load_file(folder / WEIGHTS)
    except (OSError, ValueError, KeyError, TypeError, SafetensorError) as error:
        if isinstance(error, UserError):
            raise
        raise UserError(f"{folder}: not an adapter ({type(error).__name__}: {error})") from None
    names = {name: name.removeprefix(PREFIX) for name in stored}
    return {ours.removesuffix(".weight") if ".lora_" in ours else ours: stored[name]
            for name, ours in names.items()}, spec


def base_of(folder: Path) -> dict[str, str]:
    """{"path", and perhaps "sha256"} of the model that an adapter is for. UserError where neither file says.
    """
    try:
        name = BASE if (folder / BASE).is_file() else CONFIG
        base = json.loads((folder / name).read_text(encoding="utf-8"))
        path = base["path" if name == BASE else "base_model_name_or_path"]
        return {"path": str(Path(path))} | ({"sha256": base["sha256"]} if "sha256" in base else {})
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{folder}: its base cannot be told ({type(error).__name__}: {error})") from None


def merged(folder: Path, tensors: Iterable[tuple[str, Tensor]]) -> Iterator[tuple[str, Tensor]]:
    """The base's (name, tensor) pairs with the adapter in `folder` added, in float32."""
    adapter, spec = read_adapter(folder)
    for name, tensor in tensors:
        module = name.removesuffix(".weight")
        if f"{module}.lora_A" in adapter:
            A, B = adapter.pop(f"{module}.lora_A"), adapter.pop(f"{module}.lora_B", torch.empty(0, 0))
            if (len(B), len(A), A.shape[-1]) != (len(tensor), B.shape[-1], tensor.shape[-1]):
                raise UserError(f"{folder}: {module}.lora_A {tuple(A.shape)} and lora_B {tuple(B.shape)} do "
                                f"not fit {tuple(tensor.shape)}")
            tensor = tensor.float() + spec.scale * (B.float() @ A.float())  # (out, in)
        yield name, adapter.pop(name, tensor)
    if adapter:
        raise UserError(f"{folder}: {min(adapter)} has no place in its base")
