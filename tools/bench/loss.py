"""The loss head: chunks with their gradient in the forward pass, beside all logits at once; time and memory.

N = 2048 positions, C = 512, V = 32,000, forward and backward. Memory is what the head needs above its inputs,
each arm in a process of its own on the CPU.
"""

import multiprocessing
import re
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from configurator import UserError
from parts.losses import linear_cross_entropy
from tools.bench.config import BenchConfig
from tools.bench.machine import matmul_flops, timed

N, C, V = 2048, 512, 32_000


def inputs(device: torch.device, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """hidden (N, C), weight (V, C), targets (N,)."""
    generator = torch.Generator().manual_seed(0)
    hidden, weight = (torch.randn(rows, C, generator=generator).to(device, dtype).requires_grad_() for rows in (N, V))
    with torch.no_grad():
        weight *= 0.05
    return hidden, weight, torch.randint(V, (N,), generator=generator).to(device)


def full(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    loss = F.cross_entropy((hidden @ weight.T).float(), targets, reduction="sum")
    loss.backward()
    return loss.detach()


def ours(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    loss = linear_cross_entropy(hidden, weight, targets, V)[0]
    loss.backward()
    return loss.detach()


HEADS = {"ours, in chunks": ours, "all logits at once": full}


def check() -> None:
    """UserError unless both give the same loss and gradients."""
    results = []
    for head in HEADS.values():
        hidden, weight, targets = inputs(torch.device("cpu"), torch.float32)
        results.append((head(hidden, weight, targets), hidden.grad, weight.grad))
    if not all((a - b).norm() <= 1e-5 * b.norm() for a, b in zip(*results, strict=True)):
        raise UserError("the heads disagree: nothing to compare")


def extra_memory(name: str, device: str, dtype: torch.dtype) -> float:
    """Bytes at the peak above those of the inputs and their gradients' absence; called in a fresh process."""
    torch.set_num_threads(1)
    place = torch.device(device)
    arguments = inputs(place, dtype)
    if place.type == "cuda":
        torch.cuda.reset_peak_memory_stats(place)
        before = torch.cuda.memory_allocated(place)
        HEADS[name](*arguments)
        return torch.cuda.max_memory_allocated(place) - before
    small = [each[:64].detach().clone().requires_grad_(each.is_floating_point()) for each in arguments]
    HEADS[name](small[0], arguments[1], small[2])  # libraries load, and the weight has its gradient
    Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
    before = memory("VmRSS")
    HEADS[name](*arguments)
    return memory("VmHWM") - before


def memory(key: str) -> float:
    """Bytes of this process as Linux counts them: VmRSS now, VmHWM at the peak."""
    return 1024 * float(re.search(rf"{key}:\s+(\d+)", Path("/proc/self/status").read_text())[1])


def measure(cfg: BenchConfig) -> dict[str, Any]:
    check()
    device = torch.device(cfg.device)
    dtype = torch.float32 if device.type == "cpu" else torch.bfloat16
    arguments = inputs(device, dtype)
    figures = timed({name: lambda head=head: head(*arguments) for name, head in HEADS.items()}, cfg.rounds,
                    1 if device.type == "cpu" else cfg.steps, device)
    with multiprocessing.get_context("spawn").Pool(1, maxtasksperchild=1) as pool:
        extra = {name: pool.apply(extra_memory, (name, cfg.device, dtype)) for name in HEADS}
    floor = 3 * 2 * N * C * V / matmul_flops([(512, C, V)], dtype, device)  # three products of that size
    arms = {name: {"dtype": str(dtype).removeprefix("torch."), "values": [1e3 * s for s in seconds],
                   "of_peak": floor / sorted(seconds)[len(seconds) // 2], "extra_bytes": extra[name]}
            for name, seconds in figures.items()}
    ratio = extra["ours, in chunks"] / extra["all logits at once"]
    notes = {f"extra MB, {name}": value / 1e6 for name, value in extra.items()} | {"extra memory, ratio": ratio}
    return {"unit": "ms", "peer": "all logits at once", "arms": arms, "notes": notes}
