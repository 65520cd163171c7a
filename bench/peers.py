"""The peers (nanoGPT from a folder of the user, transformers from PyPI) and our models at the same size.

    models, notes = make_models(cfg)
    models["nanoGPT"]        # the GPT of its model.py, with its own initialisation
    models["our GPT-2"]      # our class in GPT-2's settings, with nanoGPT's weights
    models["our Llama"]      # our class with its default settings
    models["transformers"]   # the same model, as transformers loads it

No code of a peer is copied here. nanoGPT's GELU is the exact one; GPT-2's, and so ours, is the tanh
approximation. Checks give nanoGPT the tanh form (`tanh_gelu`), timings leave it unchanged. nanoGPT's
LayerNorm has no bias; ours has one, which is 0.
"""

import contextlib
import importlib.util
import io
import math
import os
import pickle
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from types import ModuleType
from typing import Any, Literal

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bench.measure import PeerConfig
from configurator import UserError
from dataset.shards import DataFolder
from formats.hf import VOCABULARY_TABLES
from formats.names import from_hf
from model import GPT, GPTConfig

# nanoGPT's README for a CPU; about 4 M parameters; GPT-2, with the padded vocabulary of nanoGPT's train.py;
# config/train_nanollama_1b.py
SIZES = {
    "readme": dict(n_layer=4, n_head=4, n_embd=128, block_size=64, vocab_size=65, batch_size=12),
    "4m": dict(n_layer=4, n_head=4, n_embd=256, block_size=512, vocab_size=4096, batch_size=1),
    "124m": dict(n_layer=12, n_head=12, n_embd=768, block_size=1024, vocab_size=50304, batch_size=12),
    "1.1b": dict(n_layer=22, n_head=32, n_kv_head=4, n_embd=2048, block_size=4096, vocab_size=32000,
                 intermediate_size=5632, tie_embeddings=False, batch_size=4)}
TWINS = {"nanoGPT": "our GPT-2", "transformers": "our Llama"}  # {peer: our model with its weights}


@dataclass(frozen=True, kw_only=True)
class Shape:
    """The sizes of a model that our class and the peers share."""

    n_layer: int
    n_head: int
    n_embd: int
    block_size: int
    vocab_size: int
    n_kv_head: int | None = None  # None: n_head
    intermediate_size: int | None = None  # None: our Llama gets the same number of parameters as nanoGPT
    tie_embeddings: bool = True

    @property
    def has_twin(self) -> bool:
        """True if nanoGPT can have this size: it ties its tables, and its MLP is 4 n_embd wide."""
        grouped = self.n_kv_head not in (None, self.n_head)
        return self.tie_embeddings and not grouped and self.intermediate_size is None


@dataclass(frozen=True, kw_only=True)
class ModelConfig(PeerConfig):
    """The keys of the subjects that compare models with nanoGPT and transformers."""

    nanogpt: str | None = None  # folder with nanoGPT's model.py; None leaves nanoGPT out
    transformers: bool = True  # compare with transformers; False saves a minute with a large model
    size: Literal["readme", "4m", "124m", "1.1b"] = "readme"  # sets the defaults of the next seven keys
    n_layer: int | None = None  # number of blocks
    n_head: int | None = None  # number of query heads
    n_kv_head: int | None = None  # number of key and value heads; fewer than n_head leaves nanoGPT out
    n_embd: int | None = None  # width
    block_size: int | None = None  # context length in tokens
    vocab_size: int | None = None  # number of token ids
    batch_size: int | None = None  # rows or prompts at a time
    compile: bool | None = None  # also time compiled arms; None: on cuda

    def sizes(self) -> dict[str, Any]:
        """The sizes that the user set, and the defaults of `size` for the others."""
        user_sizes = {key: value for key, value in vars(self).items()
                      if key in SIZES["1.1b"] and value is not None}
        return SIZES[self.size] | user_sizes

    def shape(self) -> Shape:
        return Shape(**{key: value for key, value in self.sizes().items() if key != "batch_size"})

    def compiles(self, device: torch.device) -> bool:
        return device.type == "cuda" if self.compile is None else self.compile


def nanogpt_parameters(shape: Shape) -> int:
    """Parameters of nanoGPT's GPT without biases: 12 C^2 + 2 C per layer, two tables, and a last norm."""
    C = shape.n_embd
    return shape.n_layer * (12 * C * C + 2 * C) + (shape.vocab_size + shape.block_size + 1) * C


def llama_config(shape: Shape) -> GPTConfig:
    """Our Llama of this shape.

    If the width of its MLP is not set, it is chosen to match nanoGPT's number of parameters. It is rounded to
    the largest power of two (at most 256) that keeps the numbers within 1 %: matrix kernels like round
    widths.
    """
    fields = asdict(shape)
    if shape.intermediate_size is not None:
        return GPTConfig(**fields)
    goal, unit = nanogpt_parameters(shape), 3 * shape.n_layer * shape.n_embd  # parameters of one more column
    with torch.device("meta"):
        without = GPT(GPTConfig(**fields | {"intermediate_size": 1})).num_parameters() - unit
    exact = (goal - without) / unit
    for multiple in (256, 128, 64, 32, 16, 8, 4, 2, 1):
        width = max(1, round(exact / multiple)) * multiple
        if abs(without + width * unit - goal) <= 0.01 * goal:
            break
    return GPTConfig(**fields | {"intermediate_size": width})


# ---- nanoGPT ----------------------------------------------------------------------------------------------

def load_nanogpt(folder: str | Path) -> ModuleType:
    """The module model.py of a folder. UserError if there is no such file."""
    path = Path(folder) / "model.py"
    if not path.is_file():
        raise UserError(f"nanogpt={folder}: no model.py here (git clone https://github.com/karpathy/nanoGPT)")
    spec = importlib.util.spec_from_file_location("nanogpt_model", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def nanogpt_model(module: ModuleType, shape: Shape) -> nn.Module:
    """Its GPT without biases, as in its train.py. Its messages are not printed."""
    torch.manual_seed(0)
    with contextlib.redirect_stdout(io.StringIO()):
        return module.GPT(module.GPTConfig(
            n_layer=shape.n_layer, n_head=shape.n_head, n_embd=shape.n_embd, block_size=shape.block_size,
            vocab_size=shape.vocab_size, dropout=0.0, bias=False))


def run_nanogpt(source: str | Path, data: DataFolder, argv: list[str], vocab_size: int | None = None,
                seed: int = 1337) -> tuple[str, nn.Module]:
    """Run nanoGPT's own train.py in a copy that differs in the seed only.

    Returns what it printed, and the model of its checkpoint on the CPU. It reads the shards of `data` as
    --dataset=same. vocab_size: the number of ids in its meta.pkl; None writes no such file. Raises UserError
    if it fails.
    """
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch) / "nanoGPT"
        shutil.copytree(source, folder, ignore=lambda _, names: {"data", ".git", "assets"} & set(names))
        same = folder / "data" / "same"
        same.mkdir(parents=True)
        for split, shards in data.shards.items():
            np.concatenate(shards).astype(np.uint16).tofile(same / f"{split}.bin")
        if vocab_size:
            (same / "meta.pkl").write_bytes(pickle.dumps({"vocab_size": vocab_size}))
        script = folder / "train.py"
        code = script.read_text(encoding="utf-8").replace("manual_seed(1337", f"manual_seed({seed}")
        script.write_text(code, encoding="utf-8")
        process = subprocess.run([sys.executable, "train.py", *argv, "--dataset=same", "--out_dir=out"],
                                 cwd=folder, capture_output=True, text=True,
                                 env=os.environ | {"OMP_NUM_THREADS": "1"})
        if process.returncode:
            raise UserError(f"nanoGPT's train.py: exit code {process.returncode}: {process.stderr[-500:]}")
        saved = torch.load(folder / "out" / "ckpt.pt", map_location="cpu", weights_only=True)
        module = load_nanogpt(folder)
    model = module.GPT(module.GPTConfig(**saved["model_args"])).eval()
    # A compiled model's names begin with a prefix.
    model.load_state_dict({name.removeprefix("_orig_mod."): value for name, value in saved["model"].items()})
    return process.stdout, model


@contextlib.contextmanager
def tanh_gelu(model: nn.Module) -> Iterator[None]:
    """Inside, nn.GELU computes GPT-2's tanh approximation."""
    layers = [module for module in model.modules() if isinstance(module, nn.GELU)]
    for layer in layers:
        layer.approximate = "tanh"
    yield
    for layer in layers:
        layer.approximate = "none"


@torch.no_grad()
def gpt2_twin(peer: nn.Module | None, shape: Shape) -> GPT:
    """Our GPT in GPT-2's settings, with the weights of a nanoGPT model if there is one.

    Raises UserError if a weight of the peer has no place in our model.
    """
    gpt2 = dict(position="learned", norm="layernorm", mlp="gelu", bias="none",
                intermediate_size=4 * shape.n_embd)
    ours = GPT(GPTConfig(**asdict(shape) | gpt2))
    mine = dict(ours.named_parameters())
    for name, tensor in peer.named_parameters() if peer else ():
        if name == "lm_head.weight":
            name = "transformer.wte.weight"  # tied: torch lists it only once, by this name
        is_linear = tensor.ndim == 2 and ".h." in name
        for own, value in from_hf(name, tensor.T if is_linear else tensor):  # from_hf expects Conv1D's layout
            if own in VOCABULARY_TABLES:
                value = F.pad(value, (0, 0, 0, ours.config.padded_vocab_size - len(value)))
            if own not in mine or mine[own].shape != value.shape:
                raise UserError(f"nanogpt: {name} {tuple(tensor.shape)} has no place in our GPT-2")
            mine[own].copy_(value)
    return ours


def nanogpt_batch(path: Path, batch_size: int, block_size: int,
                  device: torch.device) -> tuple[Tensor, Tensor]:
    """Inputs and targets, (B, T) each, at random places of a file of uint16, as nanoGPT's train.py reads."""
    data, T = np.memmap(path, dtype=np.uint16, mode="r"), block_size  # nanoGPT, too, opens it for each batch
    starts = torch.randint(len(data) - T, (batch_size,))
    x = torch.stack([torch.from_numpy(data[i:i + T].astype(np.int64)) for i in starts])
    y = torch.stack([torch.from_numpy(data[i + 1:i + 1 + T].astype(np.int64)) for i in starts])
    if device.type == "cuda":
        x, y = x.pin_memory(), y.pin_memory()
    return x.to(device, non_blocking=True), y.to(device, non_blocking=True)


# ---- transformers -----------------------------------------------------------------------------------------

def load_transformers(folder: Path, device: torch.device | str) -> nn.Module:
    """The model that AutoModelForCausalLM loads, in float32."""
    from transformers import AutoModelForCausalLM
    from transformers.utils import logging
    logging.disable_progress_bar()
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).to(device)


def transformers_twin(ours: GPT) -> nn.Module:
    """The transformers model of the folder that our model saves."""
    with tempfile.TemporaryDirectory() as folder:
        ours.save_pretrained(Path(folder))
        return load_transformers(Path(folder), "cpu")


# ---- All models -------------------------------------------------------------------------------------------

def make_models(cfg: ModelConfig) -> tuple[dict[str, nn.Module], list[str]]:
    """{name: model} on the CPU in float32, with random weights, and notes on what is left out."""
    models: dict[str, nn.Module] = {}
    notes, shape = [], cfg.shape()
    if cfg.nanogpt is None:
        notes.append("nanoGPT is left out: --nanogpt=DIR sets its folder")
    elif not shape.has_twin:
        notes.append("nanoGPT is left out: it has no grouped heads, untied tables or other MLPs")
    else:
        models["nanoGPT"] = nanogpt_model(load_nanogpt(cfg.nanogpt), shape)
    llama = GPT(llama_config(shape))
    if cfg.transformers:
        models["transformers"] = transformers_twin(llama)
    models["our Llama"] = llama
    if shape.has_twin:
        models["our GPT-2"] = gpt2_twin(models.get("nanoGPT"), shape)
    return models, notes


def count_parameters(model: nn.Module) -> int:
    """The number of parameters. Rows that only fill up our vocabulary table do not count."""
    return model.num_parameters() if isinstance(model, GPT) else sum(p.numel() for p in model.parameters())


# ---- Checks -----------------------------------------------------------------------------------------------

def require_close(what: str, ours: float, theirs: float, limit: float = 1e-5) -> dict[str, float]:
    """Both values and their difference (relative if above 1), for the JSON. UserError if over `limit`."""
    difference = abs(ours - theirs) / max(1.0, abs(theirs))
    if not difference <= limit or not math.isfinite(theirs):
        raise UserError(f"{what}: ours is {ours:.7g}, theirs is {theirs:.7g}; nothing was timed")
    return {"ours": ours, "theirs": theirs, "difference": difference}


def require_equal_tokens(what: str, ours: list[list[int]], theirs: list[list[int]]) -> dict[str, Any]:
    """The number of tokens and of distinct ones, for the JSON. UserError names the first that differs."""
    for row, (one, two) in enumerate(zip(ours, theirs, strict=True)):
        if one != two:
            place = [mine == token for mine, token in zip(one, two, strict=True)].index(False)
            raise UserError(f"{what}: token {place} of row {row} differs from ours; nothing was timed")
    return {"tokens": sum(map(len, ours)), "distinct": len(set(sum(ours, [])))}
