"""The loss head, forward and backward: ours, chunk by chunk, beside full logits and torch's cross_entropy.

    python -m bench loss
    python -m bench loss --device=cuda --n=16384 --d=768 --v=50257

Checked first: the same loss and the same gradients for the hidden states and the output matrix. "extra"
memory is what a forward and backward pass needs beyond its inputs, the gradients included: the peak of a
fresh process for each arm on the CPU (VmHWM of /proc/self/status, so Linux only), torch's own count on a GPU.

"of peak" is the three products' FLOPs (2 n d v each) a second, beside the best of those products alone.
"""

import re
import statistics
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from bench.measure import (
    PeerConfig,
    baselines,
    interleaved,
    matmul_arms,
    matmul_peak,
    milliseconds,
    row,
    start,
    table,
)
from configurator import UserError
from loop import DTYPES
from training.losses import linear_cross_entropy


@dataclass(frozen=True, kw_only=True)
class Config(PeerConfig):
    n: int = 2048  # positions
    d: int = 512  # width of the hidden states
    v: int = 32000  # token ids

    def __post_init__(self) -> None:
        PeerConfig.__post_init__(self)
        if min(self.n, self.d, self.v) <= 0:
            raise UserError(f"n={self.n}, d={self.d}, v={self.v}: must be positive")


def problem(n: int, d: int, v: int, dtype: str, device: str | torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """Hidden states (n, d) and matrix (v, d), both to be trained, and targets (n,)."""
    generator = torch.Generator().manual_seed(0)
    hidden, weight = torch.randn(n, d, generator=generator), torch.randn(v, d, generator=generator) * 0.02
    targets = torch.randint(v, (n,), generator=generator).to(device)
    return (hidden.to(device, DTYPES[dtype]).requires_grad_(),
            weight.to(device, DTYPES[dtype]).requires_grad_(), targets)


def full_logits(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    """The peer: all logits at once, (n, v), and torch's own loss, in float32."""
    return F.cross_entropy(F.linear(hidden, weight).float(), targets, reduction="sum")


def our_head(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    return linear_cross_entropy(hidden, weight, targets, len(weight))[0]


ARMS = {"full logits": full_logits, "our head": our_head}


def step(arm: str, hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    """One forward and backward pass; returns the loss. Gradients are in the inputs, and only this step's."""
    hidden.grad = weight.grad = None
    loss = ARMS[arm](hidden, weight, targets)
    loss.backward()
    return loss.detach()


def measure(cfg: Config) -> dict[str, Any]:
    """Check, then measure time and memory. UserError where values or gradients differ."""
    device, dtype = start(cfg)
    inputs = problem(cfg.n, cfg.d, cfg.v, dtype, device)
    checks = check(inputs)
    products = {(cfg.n, cfg.d, cfg.v), (cfg.n, cfg.v, cfg.d), (cfg.v, cfg.n, cfg.d)}
    arms = {name: lambda name=name: step(name, *inputs) for name in ARMS}
    timings = interleaved(arms | matmul_arms(products, dtype, device), cfg.rounds, device, cfg.seconds)
    if device.type == "cuda":
        memory = {name: [timings[name].extra_megabytes] for name in ARMS}
    else:
        memory = {name: [] for name in ARMS}
        for _ in range(min(cfg.rounds, 3)):
            for name in ARMS:
                memory[name].append(fresh_megabytes(name, cfg, dtype))
    peak = matmul_peak(timings, dtype)
    beside = baselines(timings, "full logits")
    rows = [row(name, dtype, timings[name], beside, 6 * cfg.n * cfg.d * cfg.v / timings[name].median / peak,
                memory_megabytes=memory[name]) for name in ARMS]
    return {"sizes": {"n": cfg.n, "d": cfg.d, "v": cfg.v}, "checks": checks, "peak_flops": peak,
            "arms": rows}


def check(inputs: tuple[Tensor, Tensor, Tensor]) -> dict[str, float]:
    """Relative differences of the loss and the two gradients, or UserError where they are too large."""
    limit = 1e-5 if inputs[0].dtype == torch.float32 else 2e-2  # bfloat16 has 8 bits, and each side rounds
    found = {}
    for name in ARMS:
        loss = step(name, *inputs)
        found[name] = {"loss": loss, "gradient of hidden": inputs[0].grad,
                       "gradient of weight": inputs[1].grad}
    differences = {}
    for what, theirs in found["full logits"].items():
        ours = found["our head"][what].float()
        differences[what] = ((ours - theirs.float()).norm() / theirs.float().norm()).item()
        if not differences[what] <= limit:
            raise UserError(f"{what}: ours is off by {differences[what]:.1e} of its size: nothing to compare")
    return differences


def fresh_megabytes(arm: str, cfg: Config, dtype: str) -> float:
    """`extra_megabytes` in a process of its own."""
    code = ("import sys; from bench import loss; "
            "print(loss.extra_megabytes(sys.argv[1], *map(int, sys.argv[2:6]), sys.argv[6]))")
    words = [arm, cfg.n, cfg.d, cfg.v, cfg.threads, dtype]
    done = subprocess.run([sys.executable, "-c", code, *map(str, words)], check=True, capture_output=True,
                          text=True)
    return float(done.stdout)


def extra_megabytes(arm: str, n: int, d: int, v: int, threads: int, dtype: str) -> float:
    """This process's peak beyond its inputs, after a small pass that loads what the libraries load once."""
    torch.set_num_threads(threads)
    step(arm, *problem(64, 64, 64, dtype, "cpu"))
    inputs = problem(n, d, v, dtype, "cpu")
    before = status_megabytes("VmRSS")
    step(arm, *inputs)
    return status_megabytes("VmHWM") - before


def status_megabytes(key: str) -> float:
    """A figure of /proc/self/status, in 10^6 bytes."""
    return int(re.search(rf"{key}:\s+(\d+)", Path("/proc/self/status").read_text())[1]) * 1024 / 1e6


def report(figures: dict[str, Any]) -> str:
    """The table, then the memory."""
    memory = {each["arm"]: statistics.median(each["memory_megabytes"]) for each in figures["arms"]}
    full = memory["full logits"]
    notes = [f"extra memory, {name}: {megabytes:,.0f} MB ({megabytes / full:.2f} x full logits)"
             for name, megabytes in memory.items()]
    notes.append(f"best matrix product: {figures['peak_flops'] / 1e9:,.1f} GFLOP/s")
    return table(figures["arms"], "ms a pass", milliseconds, notes)
