"""The loss head, forward and backward: our chunked head compared with full logits and F.cross_entropy.

    python -m bench loss
    python -m bench loss --device=cuda --n=16384 --d=768 --v=50257

First checks that both sides have the same loss and the same gradients of hidden states and output matrix.
"extra memory" is what one forward and backward pass needs on top of its inputs, gradients included. On the
CPU it is the peak of a new process per arm (Linux only), on a GPU torch's own count.

"of peak" is the FLOP rate of the three matrix products (2 n d v each), relative to the rate of the fastest of
these products by itself.
"""

import functools
import statistics
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from bench.machine import matmul_arms, matmul_peak, status_megabytes
from bench.measure import PeerConfig, baselines, in_turns, row, run_child, start, time_in_turns, timing_table
from configurator import UserError, require_positive
from modeling.devices import DTYPES
from training.losses import linear_cross_entropy

Inputs = tuple[Tensor, Tensor, Tensor]  # hidden states (n, d), output matrix (v, d), targets (n,)


@dataclass(frozen=True, kw_only=True)
class Config(PeerConfig):
    n: int = 2048  # number of positions
    d: int = 512  # width of the hidden states
    v: int = 32000  # vocabulary size

    def __post_init__(self) -> None:
        super().__post_init__()
        require_positive(self, "n", "d", "v")


def problem(n: int, d: int, v: int, dtype: str, device: str | torch.device) -> Inputs:
    """Random inputs; hidden states and matrix require gradients."""
    generator = torch.Generator().manual_seed(0)
    hidden, weight = torch.randn(n, d, generator=generator), torch.randn(v, d, generator=generator) * 0.02
    targets = torch.randint(v, (n,), generator=generator).to(device)
    return (hidden.to(device, DTYPES[dtype]).requires_grad_(),
            weight.to(device, DTYPES[dtype]).requires_grad_(), targets)


def full_logits(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    """The peer: all logits at once, (n, v), and torch's own loss in float32."""
    return F.cross_entropy(F.linear(hidden, weight).float(), targets, reduction="sum")


def our_head(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    return linear_cross_entropy(hidden, weight, targets, len(weight))[0]


ARMS = {"full logits": full_logits, "our head": our_head}


def step(arm: str, hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    """One forward and backward pass; returns the loss. The inputs then hold the gradients of this pass."""
    hidden.grad = weight.grad = None
    loss = ARMS[arm](hidden, weight, targets)
    loss.backward()
    return loss.detach()


def measure(cfg: Config) -> dict[str, Any]:
    """Check, then measure time and memory. UserError if losses or gradients differ."""
    device, dtype = start(cfg)
    inputs = problem(cfg.n, cfg.d, cfg.v, dtype, device)
    checks = check(inputs)
    products = {(cfg.n, cfg.d, cfg.v), (cfg.n, cfg.v, cfg.d), (cfg.v, cfg.n, cfg.d)}
    arms = {name: functools.partial(step, name, *inputs) for name in ARMS}
    timings = time_in_turns(arms | matmul_arms(products, dtype, device), cfg.rounds, device, cfg.seconds)
    if device.type == "cuda":
        memory = {name: [timings[name].extra_megabytes] for name in ARMS}
    else:
        memory = in_turns({name: functools.partial(run_child, extra_megabytes, name, cfg.n, cfg.d, cfg.v,
                                                   dtype, threads=cfg.threads) for name in ARMS},
                          min(cfg.rounds, 3))
    peak = matmul_peak(timings, dtype)
    peers = baselines(timings, "full logits")
    rows = [row(name, dtype, timings[name], peers, 6 * cfg.n * cfg.d * cfg.v / timings[name].median / peak,
                memory_megabytes=memory[name]) for name in ARMS]
    return {"sizes": {"n": cfg.n, "d": cfg.d, "v": cfg.v}, "checks": checks, "peak_flops": peak,
            "arms": rows}


def check(inputs: Inputs) -> dict[str, float]:
    """Relative differences of the loss and the two gradients. UserError if one is too large."""
    limit = 1e-5 if inputs[0].dtype == torch.float32 else 2e-2  # bfloat16 has 8 bits, and each side rounds
    results = {name: {"loss": step(name, *inputs), "gradient of hidden": inputs[0].grad,
                      "gradient of weight": inputs[1].grad} for name in ARMS}
    differences = {}
    for what, theirs in results["full logits"].items():
        ours = results["our head"][what].float()
        differences[what] = ((ours - theirs.float()).norm() / theirs.float().norm()).item()
        if not differences[what] <= limit:
            raise UserError(f"{what}: our head differs by {differences[what]:.1e} (relative), more than "
                            f"{limit:.0e}; nothing was timed")
    return differences


def extra_megabytes(arm: str, n: int, d: int, v: int, dtype: str) -> float:
    """Peak memory of this process on top of the inputs, after a small pass that loads the libraries."""
    step(arm, *problem(64, 64, 64, dtype, "cpu"))
    inputs = problem(n, d, v, dtype, "cpu")
    before = status_megabytes("VmRSS")
    step(arm, *inputs)
    return status_megabytes("VmHWM") - before


def report(results: dict[str, Any]) -> str:
    """The table, then the memory."""
    memory = {arm["arm"]: statistics.median(arm["memory_megabytes"]) for arm in results["arms"]}
    full = memory["full logits"]
    notes = [f"extra memory, {name}: {megabytes:,.0f} MB ({megabytes / full:.2f} x full logits)"
             for name, megabytes in memory.items()]
    notes.append(f"fastest matrix product: {results['peak_flops'] / 1e9:,.1f} GFLOP/s")
    return timing_table(results["arms"], "ms per pass", lambda seconds: 1e3 * seconds, notes)
