"""A model of which only an adapter is trained: LoRA beside some matrices, everything else frozen.

    with torch.device("meta"):
        model = AdaptedGPT(config, spec, base)     # spec: AdapterSpec; base: {"path", "sha256"}
    model.load(base_folder)                        # the adapter at its start: what the base computes
    model.save_pretrained(folder)                  # the adapter alone, in PEFT's format

arXiv 2106.09685; with the adapted matrices frozen in 4 bits, QLoRA, arXiv 2305.14314, where the package
bitsandbytes has the numbers (NF4, blocks of 64, scales in 8 bits). formats/peft.py has the files. Whoever
only uses the model needs none of this: the folder of an adapter loads merged, as a plain GPT.
"""

import math
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from configurator import UserError
from formats import hf
from formats.peft import AdapterSpec, is_adapter, read_adapter, write_adapter
from model import GPT, GPTConfig
from modeling.devices import named_generator


class LoRALinear(nn.Linear):
    """x W^T + b + scale * (x A^T) B^T, with W and b meant to be frozen. (..., in) -> (..., out)."""

    def __init__(self, linear: nn.Linear, spec: AdapterSpec):
        super().__init__(linear.in_features, linear.out_features, bias=linear.bias is not None)
        self.lora_A = nn.Parameter(torch.empty(spec.rank, linear.in_features))
        self.lora_B = nn.Parameter(torch.empty(linear.out_features, spec.rank))
        self.scale, self.dropout, self.adapted = spec.scale, nn.Dropout(spec.dropout), True

    def forward(self, x: Tensor) -> Tensor:
        y = self.base(x)
        if not self.adapted:
            return y
        return y + self.scale * F.linear(F.linear(self.dropout(x), self.lora_A), self.lora_B)

    def base(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight, self.bias)


class QuantizedLoRALinear(LoRALinear):
    """The same with W in 4 bits. W is no parameter: `quantize` gives it."""

    def __init__(self, linear: nn.Linear, spec: AdapterSpec):
        super().__init__(linear, spec)
        self.weight = None

    def quantize(self, weight: Tensor) -> None:
        """Keep a weight (out, in) in 4 bits, on the device of the adapter."""
        import bitsandbytes
        self.packed, self.scales = bitsandbytes.functional.quantize_4bit(
            weight.to(self.lora_A.device), blocksize=64, quant_type="nf4", compress_statistics=True)

    def base(self, x: Tensor) -> Tensor:
        import bitsandbytes
        return bitsandbytes.matmul_4bit(x, self.packed.t(), bias=self.bias, quant_state=self.scales)

    def num_bytes(self) -> int:
        """What the weight takes: 4 bits each, an 8-bit scale for 64, and a float32 scale for 256 of those."""
        tensors = (self.packed, self.scales.absmax, self.scales.state2.absmax)
        return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


class AdaptedGPT(GPT):
    """A GPT with an adapter. Parameters keep the names they have without it."""

    def __init__(self, config: GPTConfig, spec: AdapterSpec, base: dict[str, str], seed: int = 0,
                 quantize: bool = False):
        """quantize: keep the adapted matrices in 4 bits, from when they are loaded."""
        super().__init__(config)
        self.spec, self.base, self.seed = spec, base, seed
        kind = QuantizedLoRALinear if quantize else LoRALinear
        self.quantized: dict[str, QuantizedLoRALinear] = {}  # by the name of the parameter that it lacks
        for name, module in list(self.named_modules()):
            parent, _, last = name.rpartition(".")
            if isinstance(module, nn.Linear) and last in spec.targets:
                setattr(self.get_submodule(parent), last, kind(module, spec))
                if quantize:
                    self.quantized[f"{name}.weight"] = self.get_submodule(name)

    def is_adapter(self, name: str) -> bool:
        """Whether a parameter, by its name, belongs to what is trained and saved."""
        return ".lora_" in name or any(f"{table}.weight" in name for table in self.spec.tables)

    def tensors_of(self, folder: Path) -> Iterator[tuple[str, Tensor]]:
        """The base's tensors, and then the adapter's: those in `folder`, or those that change nothing."""
        adapter = read_adapter(folder)[0] if is_adapter(folder) else {}
        for name, tensor in hf.read_tensors(Path(self.base["path"])):
            if name in self.quantized:
                self.quantized[name].quantize(tensor)
            else:
                yield name, adapter.pop(name, tensor)
        yield from adapter.items()
        if not is_adapter(folder):
            for name, parameter in self.named_parameters():
                if name.endswith("lora_A"):  # as nn.Linear begins, drawn from (seed, name)
                    generator = named_generator(self.seed, name)
                    bound = 1 / math.sqrt(parameter.shape[1])
                    yield name, torch.empty(parameter.shape).uniform_(-bound, bound, generator=generator)
                elif name.endswith("lora_B"):
                    yield name, torch.zeros(parameter.shape)

    def load(self, folder: str | Path) -> None:
        super().load(folder)
        if missing := [name for name, module in self.quantized.items() if not hasattr(module, "packed")]:
            raise UserError(f"{folder}: {min(missing)} is missing ({len(missing)} parameters are)")

    def save_pretrained(self, path: str | Path, state: dict[str, Tensor] | None = None,
                        eos_token_id: Any = None) -> None:
        """Write the adapter, as PEFT does. Tables lose their padding."""
        state = {name: parameter.detach() for name, parameter in self.named_parameters()} if state is None \
            else state
        chosen = {name: tensor[:self.config.vocab_size] if name in hf.VOCABULARY_TABLES else tensor
                  for name, tensor in state.items() if self.is_adapter(name)}
        write_adapter(Path(path), chosen, self.spec, self.base)
        hf.write_generation_config(Path(path), hf.special_token_ids(eos_token_id))

    def num_parameters(self) -> int:
        return super().num_parameters() + self.num_quantized()

    def num_quantized(self) -> int:
        return sum(module.in_features * module.out_features for module in self.quantized.values())

    def num_saved(self) -> int:
        return sum(parameter.numel() for name, parameter in self.named_parameters() if self.is_adapter(name))

    def flops_per_token(self, T: int) -> float:
        """4 for each frozen weight: no gradient is computed for it, only for what enters it."""
        frozen = sum(module.weight.numel() for module in self.modules()
                     if isinstance(module, LoRALinear) and module.weight is not None)
        return super().flops_per_token(T) - 2 * frozen + 4 * self.num_quantized()

    def use_adapter(self, on: bool) -> None:
        """Compute with the adapter, or as the base does (its tables excepted)."""
        for module in self.modules():
            if isinstance(module, LoRALinear):
                module.adapted = on


def targets_of(model: nn.Module, pattern: str) -> tuple[str, ...]:
    """The last names of the blocks' linear modules that a regular expression matches. UserError for none."""
    names = {name.rpartition(".")[2] for name, module in model.named_modules()
             if isinstance(module, nn.Linear) and ".layers." in name}
    try:
        found = sorted(name for name in names if re.search(pattern, name))
    except re.error as error:
        raise UserError(f"lora_targets={pattern}: no regular expression: {error}") from None
    if not found:
        raise UserError(f"lora_targets={pattern}: matches none of {', '.join(sorted(names))}")
    return tuple(found)
