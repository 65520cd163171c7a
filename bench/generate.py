"""Greedy generation: ours beside nanoGPT's and transformers', about four million parameters each.

    python -m bench generate --nanogpt=../nanoGPT
    python -m bench generate --nanogpt=../nanoGPT --batch_size=16 --compile=True
    python -m bench generate --device=cuda --n_layer=12 --n_embd=768 --n_head=12 --vocab_size=50257

A call reads the prompts and writes max_new_tokens to each. Checked first, in float32: transformers writes
our tokens from the folder we save, and nanoGPT, with GPT-2's GELU, those of our GPT-2 settings with its
weights. The weights are random and larger than a fresh model's, so that the tokens vary.

"of peak" is the time that the model's matrices take, each once with batch_size vectors (GEMV), beside the
time of a token. Left out: sampling, and the peers compiled.
"""

import copy
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from bench import peers
from bench.measure import PeerConfig, baselines, copy_arm, gemv_arm, interleaved, row, start, table
from bench.peers import Shape, llama_config, require_equal_tokens
from configurator import UserError
from generation.generate import Sampling, generate
from loop import DTYPES
from model import GPT

COMPILED = "our Llama, compiled"


@dataclass(frozen=True, kw_only=True)
class Config(PeerConfig):
    n_layer: int = 4  # blocks
    n_head: int = 4  # heads
    n_embd: int = 256  # width
    vocab_size: int = 4096  # token ids
    block_size: int = 512  # context
    batch_size: int = 1  # prompts at a time
    prompt_tokens: int = 16  # of each prompt
    max_new_tokens: int = 256  # written behind each
    compile: bool | None = None  # also our Llama with its step compiled; None: on cuda

    def __post_init__(self) -> None:
        PeerConfig.__post_init__(self)
        if self.prompt_tokens + self.max_new_tokens > self.block_size:
            raise UserError(f"block_size={self.block_size}: the prompt and the new tokens do not fit")


def measure(cfg: Config) -> dict[str, Any]:
    """Check, then time every arm. UserError where the tokens differ."""
    device, dtype = start(cfg)
    shape = Shape(n_layer=cfg.n_layer, n_head=cfg.n_head, n_embd=cfg.n_embd, block_size=cfg.block_size,
                  vocab_size=cfg.vocab_size)
    llama = enlarge(GPT(llama_config(shape))).to(device).eval()
    prompts = torch.randint(cfg.vocab_size, (cfg.batch_size, cfg.prompt_tokens),
                            generator=torch.Generator().manual_seed(0)).to(device)
    nanogpt = peers.load_nanogpt(cfg.nanogpt)
    models: dict[str, nn.Module] = {}
    if nanogpt:
        models["nanoGPT"] = enlarge(peers.nanogpt_model(nanogpt, shape)).to(device).eval()
    with tempfile.TemporaryDirectory() as folder:
        models["transformers"] = peers.transformers_twin(llama, Path(folder), device).eval()
    models["our Llama"] = llama
    models["our GPT-2"] = peers.gpt2_twin(models.get("nanoGPT"), shape).to(device).eval()
    if cfg.compile or (cfg.compile is None and device.type == "cuda"):
        models[COMPILED] = copy.deepcopy(llama)
        models[COMPILED].compiled_steps = True
    checks = check(models, prompts, cfg.max_new_tokens)

    for model in models.values():
        model.to(DTYPES[dtype])
    copying, copied = copy_arm(device)
    arms = {name: lambda name=name, model=model: write(name, model, prompts, cfg.max_new_tokens)
            for name, model in models.items()}
    arms |= {"gemv": gemv_arm(llama, cfg.batch_size), "copy": copying}
    timings = interleaved(arms, cfg.rounds, device, cfg.seconds)
    beside = baselines(timings, "nanoGPT", "transformers")
    limit = cfg.max_new_tokens * min(timings["gemv"].seconds)
    rows = [row(name, dtype, timings[name], beside, limit / timings[name].median, parameters=count(model))
            for name, model in models.items()]
    notes = [] if nanogpt else ["nanoGPT is left out: --nanogpt=DIR names its folder"]
    if COMPILED in checks:
        notes.append(f"{COMPILED}: {checks[COMPILED]['first_call_seconds']:.0f} s at first, with what "
                     "the compiler keeps of earlier ones")
    return {"tokens_per_call": cfg.batch_size * cfg.max_new_tokens, "batch_size": cfg.batch_size,
            "checks": checks, "gemv_seconds_per_step": min(timings["gemv"].seconds),
            "weight_bytes": count(llama) * DTYPES[dtype].itemsize,
            "copy_bytes_per_second": copied / min(timings["copy"].seconds), "notes": notes, "arms": rows}


def report(figures: dict[str, Any]) -> str:
    """Tokens a second of all rows together, and what matrices and memory allow."""
    tokens, rows = figures["tokens_per_call"], figures["batch_size"]
    limits = (rows / figures["gemv_seconds_per_step"],
              rows * figures["copy_bytes_per_second"] / figures["weight_bytes"])
    notes = [f"limits: {limits[0]:,.0f} tokens/s by matrix-vector products, {limits[1]:,.0f} by reading the "
             f"weights at a copy's {figures['copy_bytes_per_second'] / 1e9:,.1f} GB/s",
             "parameters: " + "; ".join(f"{each['arm']} {each['parameters']:,}" for each in figures["arms"])]
    return table(figures["arms"], f"tokens/s, batch {rows}", lambda seconds: tokens / seconds,
                 notes + figures["notes"])


@torch.no_grad()
def enlarge(model: nn.Module) -> nn.Module:
    """Make the blocks' matrices four times as large: a fresh model with tied tables repeats a few tokens."""
    for name, parameter in model.named_parameters():
        if parameter.ndim == 2 and (".layers." in name or ".h." in name):
            parameter *= 4
    return model


def write(name: str, model: nn.Module, prompts: Tensor, length: int) -> list[list[int]]:
    """The greedy tokens behind each prompt, (B, length), by the model's own means."""
    T = prompts.shape[1]
    if name == "nanoGPT":
        return model.generate(prompts, length, top_k=1)[:, T:].tolist()
    if name == "transformers":
        ids = model.generate(prompts, attention_mask=torch.ones_like(prompts), max_new_tokens=length,
                             min_new_tokens=length, do_sample=False, pad_token_id=0)
        return ids[:, T:].tolist()
    steps = list(generate(model, prompts.tolist(), length, Sampling(temperature=0)))
    return [list(tokens) for tokens in zip(*steps, strict=True)]


def check(models: dict[str, nn.Module], prompts: Tensor, length: int) -> dict[str, Any]:
    """Each peer's tokens are those of our model with its weights; figures for the JSON, or UserError."""
    checks = {}
    if COMPILED in models:
        begin = time.perf_counter()
        found = write(COMPILED, models[COMPILED], prompts, length)
        seconds = time.perf_counter() - begin
        eager = write("our Llama", models["our Llama"], prompts, length)
        checks[COMPILED] = require_equal_tokens(COMPILED, found, eager) | {"first_call_seconds": seconds}
    for peer, ours in (("nanoGPT", "our GPT-2"), ("transformers", "our Llama")):
        if peer in models:
            with peers.tanh_gelu(models[peer]):
                theirs = write(peer, models[peer], prompts, length)
            checks[peer] = require_equal_tokens(f"{peer}'s greedy tokens",
                                                write(ours, models[ours], prompts, length), theirs)
    return checks


def count(model: nn.Module) -> int:
    return model.num_parameters() if isinstance(model, GPT) else sum(p.numel() for p in model.parameters())
