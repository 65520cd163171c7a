"""What every comparison shares: its keys, its clock, turns of the arms, what the machine can do, the table.

    timings = interleaved({"ours": step, "peer": their_step}, rounds=5, device=device, seconds=0.5)
    print(table(rows, unit, notes))

The clock is the process's CPU time on the CPU, where neighbours do not count, and wall time on a GPU, read
once the GPU has finished. What the machine can do is measured in the same turns: matrix products at the
model's own shapes, matrix-vector products, copies.
"""

import math
import os
import platform
import re
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal

import torch
import torch.nn.functional as F

from configurator import UserError
from loop import DTYPES
from modeling.devices import pick_device

COPY_BYTES = 2**26  # beyond every cache of a CPU; on a GPU four times as much


@dataclass(frozen=True, kw_only=True)
class BenchConfig:
    """The keys of every subject."""

    rounds: int = 5  # times each arm takes its turn; base: seeds
    json: str | None = None  # also write the figures here

    def __post_init__(self) -> None:
        if self.rounds <= 0:
            raise UserError(f"rounds={self.rounds}: must be positive")


@dataclass(frozen=True, kw_only=True)
class PeerConfig(BenchConfig):
    """The keys of the subjects that compute with torch."""

    device: str = "cpu"  # cpu or cuda
    threads: int = 1  # of torch on the CPU: with one, CPU time is what a quiet machine would take
    dtype: Literal["float32", "bfloat16"] | None = None  # of computing; None: bfloat16 on cuda
    seconds: float = 0.5  # an arm's turn repeats its work for about so long
    nanogpt: str | None = None  # a folder with nanoGPT's model.py; None: without it

    def __post_init__(self) -> None:
        BenchConfig.__post_init__(self)
        if self.threads <= 0 or self.seconds <= 0:
            raise UserError(f"threads={self.threads}, seconds={self.seconds}: must be positive")


def start(cfg: PeerConfig) -> tuple[torch.device, str]:
    """Set the number of threads; returns the device and the dtype. UserError where the device is missing."""
    torch.set_num_threads(cfg.threads)
    device = pick_device(cfg.device)
    return device, cfg.dtype or ("bfloat16" if device.type == "cuda" else "float32")


# ---- Time -------------------------------------------------------------------------------------------------

@dataclass
class Timing:
    """Seconds of one call of an arm, a figure a round."""

    seconds: list[float] = field(default_factory=list)
    first_call: float = 0.0  # wall seconds, compiling included
    repeats: int = 1  # calls in a turn
    extra_megabytes: float | None = None  # on a GPU: memory a call allocates beyond what there was before it

    @property
    def median(self) -> float:
        return statistics.median(self.seconds)


def now(device: torch.device) -> float:
    """The clock: CPU seconds of all threads of this process, or wall seconds once the GPU has finished."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        return time.perf_counter()
    return time.process_time()


def interleaved(arms: dict[str, Callable[[], Any]], rounds: int, device: torch.device,
                seconds: float) -> dict[str, Timing]:
    """Time the arms in turn, once a round, so that a machine whose speed drifts drifts for all of them.

    Each arm is called three times before that: to compile, to settle, and to choose how often a turn repeats
    it, which is for about `seconds`.
    """
    timings = {name: Timing() for name in arms}
    for name, arm in arms.items():
        warm_up(arm, timings[name], device, seconds)
    for _ in range(rounds):
        for name, arm in arms.items():
            timing, begin = timings[name], now(device)
            for _ in range(timing.repeats):
                arm()
            timing.seconds.append((now(device) - begin) / timing.repeats)
    return timings


def warm_up(arm: Callable[[], Any], timing: Timing, device: torch.device, seconds: float) -> None:
    """Fill in what a Timing knows before the rounds."""
    begin = time.perf_counter()
    arm()
    now(device)  # waits
    timing.first_call = time.perf_counter() - begin
    arm()
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
    begin = now(device)
    arm()
    timing.repeats = max(1, min(10_000, math.ceil(seconds / max(now(device) - begin, 1e-6))))
    if device.type == "cuda":
        timing.extra_megabytes = (torch.cuda.max_memory_allocated(device) - before) / 1e6


# ---- What the machine can do ------------------------------------------------------------------------------

Product = tuple[int, int, int]  # (rows, in, out) of a product (rows, in) x (in, out)


def matmul_arms(shapes: set[Product], dtype: str, device: torch.device) -> dict[str, Callable[[], Any]]:
    """An arm for each product, as a linear layer computes it: its rate is what the layers could reach."""
    arms = {}
    for rows, inner, outer in sorted(shapes):
        x = torch.randn(rows, inner, device=device, dtype=DTYPES[dtype])
        weight = torch.randn(outer, inner, device=device, dtype=DTYPES[dtype])
        arms[f"matmul {rows} x {inner} x {outer}, {dtype}"] = lambda x=x, weight=weight: F.linear(x, weight)
    return arms


def matmul_peak(timings: dict[str, Timing], dtype: str) -> float:
    """FLOP/s of the best product in its best round, of those that `matmul_arms` made for this dtype."""
    rates = []
    for name, timing in timings.items():
        if name.startswith("matmul") and name.endswith(dtype):
            flops = 2 * math.prod(map(int, re.findall(r"\d+", name)[:3]))
            rates.append(flops / min(timing.seconds))
    return max(rates)


def gemv_arm(model: torch.nn.Module, batch_size: int) -> Callable[[], Any]:
    """Every matrix of the model once with `batch_size` vectors: the least that a new token can cost."""
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
    """A copy from memory to memory, and the bytes it reads and writes."""
    size = COPY_BYTES * (4 if device.type == "cuda" else 1)
    source = torch.ones(size, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    return lambda: target.copy_(source), 2 * size


# ---- The report -------------------------------------------------------------------------------------------

def row(name: str, dtype: str, timing: Timing, peers: dict[str, float], share: float | None = None,
        **more: Any) -> dict[str, Any]:
    """An arm's entry in the JSON. peers: {peer: its median seconds}; share: of what the machine can do."""
    return {"arm": name, "dtype": dtype, "median_seconds": timing.median, "min_seconds": min(timing.seconds),
            "max_seconds": max(timing.seconds), "seconds": timing.seconds,
            "speed_of": {peer: seconds / timing.median for peer, seconds in peers.items()},
            "share_of_peak": share, "first_call_seconds": timing.first_call,
            "extra_megabytes": timing.extra_megabytes, **more}


def baselines(timings: dict[str, Timing], *peers: str) -> dict[str, float]:
    """{arm: median seconds} of each peer's first arm, as far as there is one: what ratios are taken to."""
    firsts = [next((name for name in timings if name.startswith(peer)), None) for peer in peers]
    return {name: timings[name].median for name in firsts if name}


def table(rows: list[dict[str, Any]], title: str, value: Callable[[float], float],
          notes: list[str] = ()) -> str:
    """A line an arm: median and spread as `value` makes them of seconds; how many times as fast as each peer
    it is; its share of what the machine can do; the wall seconds of its first call, compiling included."""
    peers = list(rows[0]["speed_of"])
    width = max(len(title), *(len(each["arm"]) for each in rows))
    columns = [f"{'x ' + peer:>{len(peer) + 2}}" for peer in peers]
    lines = [f"{title:{width}}  {'dtype':8} {'median':>10} {'(min - max)':>21} {' '.join(columns)} "
             f"{'of peak':>8} {'first call':>11}"]
    for each in rows:
        low, high = sorted((value(each["min_seconds"]), value(each["max_seconds"])))
        ratios = [f"{each['speed_of'][peer]:{len(peer) + 2}.2f}" for peer in peers]
        share = f"{each['share_of_peak']:8.1%}" if each["share_of_peak"] is not None else " " * 8
        lines.append(f"{each['arm']:{width}}  {each['dtype']:8} {value(each['median_seconds']):10,.2f} "
                     f"{f'({low:,.2f} - {high:,.2f})':>21} {' '.join(ratios)} {share} "
                     f"{each['first_call_seconds']:9.2f} s")
    return "\n".join([*lines, *notes])


def milliseconds(seconds: float) -> float:
    return 1e3 * seconds


def versions(device: str | None = None, threads: int | None = None) -> dict[str, Any]:
    """The machine, and the packages whose versions the figures depend on."""
    packages = ("torch", "transformers", "numpy", "tiktoken", "tokenizers")
    described = {"python": platform.python_version(), "machine": f"{processor()}, {os.cpu_count()} cores",
                 **{name: version(name) for name in packages}}
    if device is not None:
        place = pick_device(device)
        name = torch.cuda.get_device_name(place) if place.type == "cuda" else "cpu"
        described |= {"device": name, "threads": threads,
                      "clock": "wall" if place.type == "cuda" else "process CPU time"}
    return described


def processor() -> str:
    """The processor's name as Linux gives it, else its architecture."""
    info = Path("/proc/cpuinfo")
    names = re.findall(r"model name\s*: (.+)", info.read_text()) if info.is_file() else []
    return names[0] if names else platform.machine()
