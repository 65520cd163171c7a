"""LoRA: a model whose weights are frozen, with a small trained adapter next to some of its matrices.

    with torch.device("meta"):
        model = AdaptedGPT(config, spec, base)     # spec: AdapterSpec; base: {"path", "sha256"}
    model.load(base_folder)                        # a new adapter is a no-op: B starts at 0
    model.save_pretrained(folder)                  # writes the adapter only, in PEFT's format

LoRA is arXiv 2106.09685. QLoRA (arXiv 2305.14314) keeps the frozen matrices in 4 bits; the package
bitsandbytes does the arithmetic (NF4, blocks of 64 weights, scales in 8 bits). formats/peft.py reads and
writes the files. Using an adapter needs none of this: GPT.from_pretrained(folder) loads it merged, as a plain
GPT.
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
from formats.files import write_json
from formats.peft import AdapterSpec, is_adapter, read_adapter, write_adapter
from formats.weights import state_of
from model import GPT, GPTConfig
from modeling.devices import named_generator
from modeling.linear import Linear


class LoRALinear(Linear):
    """y = x W^T + b + scale * (x A^T) B^T with frozen W and b. (..., in) -> (..., out)."""

    def __init__(self, linear: nn.Linear, spec: AdapterSpec):
        super().__init__(linear.in_features, linear.out_features, bias=linear.bias is not None)
        self.lora_A = nn.Parameter(torch.empty(spec.rank, linear.in_features))
        self.lora_B = nn.Parameter(torch.empty(linear.out_features, spec.rank))
        self.scale, self.dropout, self.adapted = spec.scale, nn.Dropout(spec.dropout), True

    def forward(self, x: Tensor) -> Tensor:
        y = self.base(x)  # (..., out)
        if not self.adapted:
            return y
        return y + self.scale * F.linear(F.linear(self.dropout(x), self.lora_A), self.lora_B)

    def base(self, x: Tensor) -> Tensor:
        """The frozen part, x W^T + b."""
        return F.linear(x, self.weight, self.bias)


class QuantizedLoRALinear(LoRALinear):
    """LoRALinear with W in 4 bits. W is not a parameter; `quantize` sets it when the model is loaded."""

    def __init__(self, linear: nn.Linear, spec: AdapterSpec):
        super().__init__(linear, spec)
        self.register_parameter("weight", None)
        self.packed: Tensor | None = None  # two weights per byte
        self.scales: Any = None  # bitsandbytes' scales of the blocks

    def quantize(self, weight: Tensor) -> None:
        """Store a weight (out, in) in 4 bits, on the adapter's device."""
        import bitsandbytes
        self.packed, self.scales = bitsandbytes.functional.quantize_4bit(
            weight.to(self.lora_A.device), blocksize=64, quant_type="nf4", compress_statistics=True)

    def base(self, x: Tensor) -> Tensor:
        import bitsandbytes
        assert self.packed is not None
        return bitsandbytes.matmul_4bit(x, self.packed.t(), bias=self.bias, quant_state=self.scales)


class AdaptedGPT(GPT):
    """A GPT with an adapter. Its parameters have the same names as without the adapter."""

    def __init__(self, config: GPTConfig, spec: AdapterSpec, base: dict[str, str], seed: int = 0,
                 quantize: bool = False):
        """quantize: keep the adapted matrices in 4 bits, from the moment they are loaded."""
        super().__init__(config)
        self.spec, self.base, self.seed = spec, base, seed
        self.quantized: dict[str, QuantizedLoRALinear] = {}  # by the name of the weight that it has in 4 bits
        for name, module in list(self.named_modules()):
            parent, _, last = name.rpartition(".")
            if isinstance(module, nn.Linear) and last in spec.targets:
                adapted = QuantizedLoRALinear(module, spec) if quantize else LoRALinear(module, spec)
                setattr(self.get_submodule(parent), last, adapted)
                if isinstance(adapted, QuantizedLoRALinear):
                    self.quantized[f"{name}.weight"] = adapted

    def is_trained(self, name: str) -> bool:
        """Whether the parameter of this name belongs to the adapter, which is trained and saved."""
        return ".lora_" in name or any(f"{table}.weight" in name for table in self.spec.tables)

    def tensors_of(self, folder: Path) -> Iterator[tuple[str, Tensor]]:
        """The base's tensors, then the adapter's: from `folder` if it holds an adapter, else a new one."""
        adapter = read_adapter(folder)[0] if is_adapter(folder) else {}
        for name, tensor in hf.read_tensors(Path(self.base["path"])):
            if name in self.quantized:
                self.quantized[name].quantize(tensor)
            else:
                yield name, adapter.pop(name, tensor)  # trained tables replace the base's
        yield from adapter.items()
        if not is_adapter(folder):
            yield from self.new_adapter()

    def new_adapter(self) -> Iterator[tuple[str, Tensor]]:
        """A new adapter, which is a no-op: B is 0; A is drawn like nn.Linear's weight, from (seed, name)."""
        for name, parameter in self.named_parameters():
            if name.endswith("lora_A"):
                bound = 1 / math.sqrt(parameter.shape[1])
                generator = named_generator(self.seed, name)
                yield name, torch.empty(parameter.shape).uniform_(-bound, bound, generator=generator)
            elif name.endswith("lora_B"):
                yield name, torch.zeros(parameter.shape)

    def load(self, folder: str | Path) -> None:
        super().load(folder)
        if missing := [name for name, module in self.quantized.items() if module.packed is None]:
            raise UserError(f"{folder}: {min(missing)} is missing ({len(missing)} parameters are missing)")

    def save_pretrained(self, path: str | Path, state: dict[str, Tensor] | None = None,
                        eos_token_id: hf.EndIds = None) -> None:
        """Write the adapter as PEFT does, without the padding rows of trained tables."""
        adapter = {name: tensor[:self.config.vocab_size] if name in hf.VOCABULARY_TABLES else tensor
                   for name, tensor in (state or state_of(self)).items() if self.is_trained(name)}
        write_adapter(Path(path), adapter, self.spec, self.base, hf.architecture(self.config) == "gpt2")
        write_json(Path(path) / "generation_config.json", hf.special_token_ids(eos_token_id))

    def num_parameters(self, active: bool = False) -> int:
        return super().num_parameters(active) + self.num_quantized()

    def num_quantized(self) -> int:
        """The number of weights that are stored in 4 bits."""
        return sum(module.in_features * module.out_features for module in self.quantized.values())

    def num_saved(self) -> int:
        """The number of trained parameters, which a checkpoint holds."""
        return sum(parameter.numel() for name, parameter in self.named_parameters() if self.is_trained(name))

    def flops_per_token(self, T: float) -> float:
        """GPT's count, with 4 FLOPs per frozen weight: only the gradient of its input is computed."""
        tied = self.config.tie_embeddings  # then the token table is also the output matrix, which counts
        frozen = sum(parameter.numel() for name, parameter in self.named_parameters()
                     if parameter.ndim == 2 and not self.is_trained(name)
                     and ("embed_" not in name or tied and "embed_tokens" in name))
        return super().flops_per_token(T) - 2 * frozen + 4 * self.num_quantized()

    def use_adapter(self, on: bool) -> None:
        """Switch the adapter on or off. Off, the model computes what its base does, except trained tables."""
        for module in self.modules():
            if isinstance(module, LoRALinear):
                module.adapted = on


def targets_of(model: nn.Module, pattern: str) -> tuple[str, ...]:
    """Names of the blocks' linear modules, such as "q_proj", that match a regular expression.

    Raises UserError if none matches.
    """
    names = {name.rpartition(".")[2] for name, module in model.named_modules()
             if isinstance(module, nn.Linear) and ".layers." in name}
    try:
        targets = sorted(name for name in names if re.search(pattern, name))
    except re.error as error:
        raise UserError(f"lora_targets={pattern}: not a regular expression: {error}") from None
    if not targets:
        raise UserError(f"lora_targets={pattern}: matches none of {', '.join(sorted(names))}")
    return tuple(targets)
