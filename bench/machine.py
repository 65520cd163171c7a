"""This machine: its limits, and the memory of this process.

    timings = time_in_turns(arms | matmul_arms({(4096, 512, 2048)}, "float32", device), ...)
    peak = matmul_peak(timings, "float32")                                     # FLOP/s

The limits are arms like any others, so they are timed in the same turns as what is compared with them.
"""

import functools
import math
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F

from bench.measure import Timing
from model import GPT
from modeling.devices import DTYPES

COPY_BYTES = 2**26  # larger than every cache of a CPU; a GPU gets four times as much
Product = tuple[int, int, int]  # (rows, in, out) of a product (rows, in) x (in, out)


def matmul_arms(shapes: set[Product], dtype: str, device: torch.device) -> dict[str, Callable[[], Any]]:
    """One arm per product, computed as a linear layer does: the rate that the layers could reach."""
    arms = {}
    for rows, inner, outer in sorted(shapes):
        x = torch.randn(rows, inner, device=device, dtype=DTYPES[dtype])
        weight = torch.randn(outer, inner, device=device, dtype=DTYPES[dtype])
        arms[f"matmul {rows} x {inner} x {outer}, {dtype}"] = functools.partial(F.linear, x, weight)
    return arms


def matmul_peak(timings: dict[str, Timing], dtype: str) -> float:
    """FLOP/s of the fastest product of `matmul_arms` with this dtype, in its best round."""
    rates = []
    for name, timing in timings.items():
        if name.startswith("matmul") and name.endswith(dtype):
            flops = 2 * math.prod(map(int, re.findall(r"\d+", name)[:3]))
            rates.append(flops / min(timing.seconds))
    return max(rates)


def gemv_arm(model: GPT, batch_size: int) -> Callable[[], Any]:
    """Multiply every matrix of the model by `batch_size` vectors: the least that one new token can cost."""
    matrices = [(parameter.detach(), parameter.new_ones(batch_size, parameter.shape[1]))
                for name, parameter in model.named_parameters()
                if parameter.ndim == 2 and "embed_" not in name]
    table = model.head_weight.detach()
    if model.config.tie_embeddings:
        matrices.append((table, table.new_ones(batch_size, table.shape[1])))

    @torch.no_grad()
    def all_matrices() -> None:
        for matrix, vectors in matrices:
            F.linear(vectors, matrix)

    return all_matrices


def copy_arm(device: torch.device) -> tuple[Callable[[], Any], int]:
    """A copy from memory to memory, and the number of bytes that it reads and writes."""
    size = COPY_BYTES * (4 if device.type == "cuda" else 1)
    source = torch.ones(size, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    return lambda: target.copy_(source), 2 * size


def status_megabytes(key: str) -> float:
    """A memory value of this process from /proc/self/status (VmRSS or VmHWM), in 10^6 bytes. Linux only."""
    # Not getrusage: its peak starts at the peak of the parent process.
    return int(re.search(rf"{key}:\s+(\d+)", Path("/proc/self/status").read_text())[1]) * 1024 / 1e6
