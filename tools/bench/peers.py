"""The models that are measured: ours, nanoGPT's from the user's folder, and transformers', with equal weights.

nanoGPT computes what our GPT does with GPT-2's settings, without biases; a Llama of ours and transformers'
share a folder on disk. So each pair has the same weights, and can be checked before it is timed.
"""

import contextlib
import importlib.util
import io
from pathlib import Path
from types import ModuleType
from typing import Any

import torch

from configurator import UserError
from model import GPT, GPTConfig
from tools.bench.config import SIZES, BenchConfig


def our_config(size: str, **changes: Any) -> GPTConfig:
    """A Llama of that size; mlp="gelu" gives the GPT-2 of equal parameters."""
    n_layer, n_head, n_kv_head, n_embd, intermediate_size, _, block_size, vocab_size = SIZES[size]
    return GPTConfig(**dict(n_layer=n_layer, n_head=n_head, n_kv_head=n_kv_head, n_embd=n_embd,
                            intermediate_size=intermediate_size, block_size=block_size,
                            vocab_size=vocab_size) | changes)


def our_gpt2(size: str) -> GPTConfig:
    width = SIZES[size][3]
    return our_config(size, n_kv_head=None, intermediate_size=4 * width, position="learned", norm="layernorm",
                      mlp="gelu", bias="all")


def nanogpt_module(folder: str) -> ModuleType:
    """The model.py of the user's own nanoGPT. UserError where there is none."""
    path = Path(folder) / "model.py"
    if not path.is_file():
        raise UserError(f"nanogpt={folder}: no model.py there")
    spec = importlib.util.spec_from_file_location("nanogpt_model", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def nanogpt_pair(cfg: BenchConfig, size: str, device: torch.device) -> tuple[Any, GPT]:
    """nanoGPT's model and ours with GPT-2's settings, with the same weights (ours has biases, all 0)."""
    module = nanogpt_module(cfg.nanogpt)
    n_layer, n_head, _, n_embd, _, _, block_size, vocab_size = SIZES[size]
    torch.manual_seed(1)
    with contextlib.redirect_stdout(io.StringIO()):  # it tells how many parameters it has
        theirs = module.GPT(module.GPTConfig(n_layer=n_layer, n_head=n_head, n_embd=n_embd, block_size=block_size,
                                             vocab_size=vocab_size, dropout=0.0, bias=False))
    ours = GPT(our_gpt2(size))
    weights = {name: tensor for name, tensor in theirs.state_dict().items()}
    with torch.no_grad():
        for name, parameter in ours.named_parameters():
            parameter.copy_(nanogpt_tensor(weights, name, parameter))
    return theirs.to(device), ours.to(device)


def nanogpt_tensor(weights: dict[str, torch.Tensor], name: str, parameter: torch.Tensor) -> torch.Tensor:
    """nanoGPT's tensor of one of our parameters: its names are GPT-2's, its matrices torch's (out, in)."""
    if name.endswith(".bias"):
        return torch.zeros_like(parameter)
    layer, _, rest = name.removeprefix("model.layers.").partition(".")
    plain = {"model.embed_tokens.weight": "transformer.wte.weight", "model.norm.weight": "transformer.ln_f.weight",
             "model.embed_positions.weight": "transformer.wpe.weight"}
    if name in plain:
        tensor = weights[plain[name]]
        missing = len(parameter) - len(tensor)  # padding rows
        return torch.nn.functional.pad(tensor, (0, 0, 0, missing)) if missing else tensor
    part = {"input_layernorm": "ln_1", "post_attention_layernorm": "ln_2", "self_attn.o_proj": "attn.c_proj",
            "mlp.up_proj": "mlp.c_fc", "mlp.down_proj": "mlp.c_proj"}
    module = rest.removesuffix(".weight")
    if module in part:
        return weights[f"transformer.h.{layer}.{part[module]}.weight"]
    number = ["q", "k", "v"].index(module.removeprefix("self_attn.")[0])
    return weights[f"transformer.h.{layer}.attn.c_attn.weight"].chunk(3)[number]


def transformers_twin(model: GPT, folder: Path, device: torch.device) -> Any:
    """transformers' model of the folder that ours saves."""
    from transformers import AutoModelForCausalLM
    model.save_pretrained(folder)
    return AutoModelForCausalLM.from_pretrained(folder).to(device)
