"""Greedy decoding: ours with its static cache, transformers' generate, and nanoGPT's, which has no cache.

Tokens a second after a prompt of 16 tokens, which everyone reads in the measured time. The share is that of the
fastest matrix-vector product of this machine at reading all weights once a token: the bound at batch 1.
"""

import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from configurator import UserError
from model import GPT
from parts.generate import Sampling, generate
from tools.bench.config import SIZES, BenchConfig
from tools.bench.machine import gemv_bytes, timed
from tools.bench.peers import nanogpt_pair, our_config, transformers_twin

PROMPT = 16


def our_tokens(model: GPT, prompts: list[list[int]], count: int) -> list[list[int]]:
    """The greedy continuation of each prompt."""
    return [list(row) for row in zip(*generate(model, prompts, count, Sampling(temperature=0.0)), strict=True)]


def transformers_tokens(model: Any, prompts: list[list[int]], count: int) -> list[list[int]]:
    ids = torch.tensor(prompts, device=model.device)
    out = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=count, min_new_tokens=count,
                         do_sample=False, pad_token_id=0)
    return out[:, len(prompts[0]):].tolist()


def nanogpt_tokens(model: Any, prompts: list[list[int]], count: int) -> list[list[int]]:
    ids = torch.tensor(prompts, device=next(model.parameters()).device)
    return model.generate(ids, count, top_k=1)[:, len(prompts[0]):].tolist()


def require_same(ours: list[list[int]], theirs: list[list[int]], name: str) -> None:
    """UserError unless the tokens are the same; one in a hundred may fall to a tie of rounding and all behind it."""
    same = sum(a == b for one, two in zip(ours, theirs, strict=True) for a, b in zip(one, two, strict=True))
    if same < 0.99 * sum(map(len, ours)):
        raise UserError(f"{name} continues otherwise than ours with the same weights: nothing to compare")


def spread_out(model: GPT) -> GPT:
    """Ten times larger weights: a fresh model's logits are so close together that rounding decides."""
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 2:
                parameter *= 3
    return model


def measure(cfg: BenchConfig) -> dict[str, Any]:
    size, device = cfg.size or "4m", torch.device(cfg.device)
    *_, T, V = SIZES[size]
    dtype = torch.float32 if device.type == "cpu" else torch.bfloat16
    count = min(cfg.new_tokens, T - PROMPT)
    rows = torch.randint(V, (cfg.batch_size, PROMPT), generator=torch.Generator().manual_seed(0)).tolist()
    ours = spread_out(GPT(our_config(size))).to(device).eval()
    arms: dict[str, Callable[[], Any]] = {"ours, Llama": lambda: our_tokens(ours, rows, count)}
    with tempfile.TemporaryDirectory() as folder:
        twin = transformers_twin(ours, Path(folder), device).eval()
    require_same(our_tokens(ours, rows, count), transformers_tokens(twin, rows, count), "transformers")
    arms["transformers, Llama"] = lambda: transformers_tokens(twin, rows, count)
    if cfg.nanogpt:
        theirs, gpt2 = nanogpt_pair(cfg, size, device)
        theirs.eval(), gpt2.eval()
        require_same(our_tokens(gpt2, rows, count), nanogpt_tokens(theirs, rows, count), "nanoGPT")
        arms |= {"ours, GPT-2": lambda: our_tokens(gpt2, rows, count),
                 "nanoGPT": lambda: nanogpt_tokens(theirs, rows, count)}
        theirs.to(dtype), gpt2.to(dtype)
    ours.to(dtype), twin.to(dtype)
    figures = timed(arms, cfg.rounds, 1, device)
    weights = ours.num_parameters() * dtype.itemsize
    bound = gemv_bytes(ours.config.intermediate_size * 8, ours.config.n_embd, dtype, device) / weights
    result = {}
    for name, seconds in figures.items():
        values = [count * len(rows) / value for value in seconds]
        share = sorted(values)[len(values) // 2] / bound if len(rows) == 1 else None
        result[name] = {"dtype": str(dtype).removeprefix("torch."), "values": values, "of_peak": share}
    return {"unit": "tokens/s", "peer": "transformers, Llama", "arms": result,
            "notes": {"tokens a prompt": count, "prompts at a time": len(rows), "parameters": ours.num_parameters(),
                      "tokens/s if weights were all to read": bound}}
