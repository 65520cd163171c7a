"""What all benchmarks share: arms timed in turn, the machine's own peaks, and the table.

    figures = timed({"ours": step, "peer": step}, rounds=7, steps=20, device=device)   # seconds a step
    peak = matmul_flops([(768, 128, 128)], torch.float32, device)                      # FLOP/s
    print(table(result))

A result is a dict: "unit", "peer" (the arm that ratios are taken to), and "arms": {name: {"dtype", "values" (one a
round), "of_peak" (a share, or None)}}. Times are of the processor on a CPU (all threads; a neighbour cannot
spoil them), by the wall clock behind a synchronisation on a GPU.
"""

import os
import platform
import re
import statistics
import time
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

Arms = dict[str, Callable[[], Any]]


def clock(device: torch.device) -> float:
    """Seconds: of this process's processor time on a CPU, of the wall clock on a GPU, all work done."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        return time.perf_counter()
    return time.process_time()


def timed(arms: Arms, rounds: int, steps: int, device: torch.device) -> dict[str, list[float]]:
    """Seconds a call, one figure a round, the arms in turn; a first round warms up and does not count."""
    figures: dict[str, list[float]] = {name: [] for name in arms}
    for number in range(rounds + 1):
        for name, arm in arms.items():
            begin = clock(device)
            for _ in range(steps):
                arm()
            if number:
                figures[name].append((clock(device) - begin) / steps)
    return figures


def matmul_flops(shapes: list[tuple[int, int, int]], dtype: torch.dtype, device: torch.device) -> float:
    """FLOP/s of the fastest of some matrix products (n, k) x (k, m), each timed for a while."""
    best = 0.0
    for n, k, m in shapes:
        one, two = (torch.randn(shape, device=device).to(dtype) for shape in ((n, k), (k, m)))
        seconds = fastest(lambda one=one, two=two: one @ two, device)
        best = max(best, 2 * n * k * m / seconds)
    return best


def copy_bytes(device: torch.device, size: int = 2**28) -> float:
    """Bytes read and written a second by a copy that fits no cache."""
    source = torch.ones(size // 4, device=device)
    target = torch.empty_like(source)
    return 2 * size / fastest(lambda: target.copy_(source), device)


def gemv_bytes(rows: int, columns: int, dtype: torch.dtype, device: torch.device) -> float:
    """Bytes of matrix a second in a product of a matrix and a vector: what bounds decoding at batch 1."""
    matrix, vector = torch.randn(rows, columns, device=device).to(dtype), torch.randn(columns, device=device).to(dtype)
    return matrix.numel() * matrix.element_size() / fastest(lambda: matrix @ vector, device)


def fastest(work: Callable[[], Any], device: torch.device, seconds: float = 0.3) -> float:
    """The least seconds a call needs, over repetitions of about `seconds` in all."""
    work()
    begin = clock(device)
    work()
    once = max(clock(device) - begin, 1e-7)
    calls = max(1, min(1000, int(seconds / 5 / once)))
    best = float("inf")
    for _ in range(5):
        begin = clock(device)
        for _ in range(calls):
            work()
        best = min(best, (clock(device) - begin) / calls)
    return best


def table(result: dict[str, Any]) -> str:
    """A line an arm: median, lowest to highest, how often the peer's figure, and the share of the machine's."""
    more_is_better = result["unit"].endswith("/s")
    base = statistics.median(result["arms"][result["peer"]]["values"])
    lines = [f"{result['unit']:40} {'precision':>9} {'median':>11} {'(min - max)':>23} {'x peer':>7} {'of peak':>8}"]
    for name, arm in result["arms"].items():
        median, low, high = statistics.median(arm["values"]), min(arm["values"]), max(arm["values"])
        ratio = median / base if more_is_better else base / median
        share = f"{arm['of_peak']:8.1%}" if arm.get("of_peak") else " " * 8
        spread = f"({number(low)} - {number(high)})"
        lines.append(f"{name:40} {arm['dtype']:>9} {number(median):>11} {spread:>23} {ratio:7.2f} {share}")
    lines += [f"{key}: {value if isinstance(value, str) else number(value)}"
              for key, value in result.get("notes", {}).items()]
    return "\n".join([*lines, f"x peer: how much better than {result['peer']}"])


def number(value: float) -> str:
    """Four figures, thousands separated."""
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"


def versions(device: torch.device | None = None) -> dict[str, str]:
    """The machine, and the packages whose versions the figures depend on."""
    packages = ("torch", "numpy", "tiktoken", "tokenizers", "transformers")
    gpu = {"gpu": torch.cuda.get_device_name(device)} if device and device.type == "cuda" else {}
    return {"python": platform.python_version(), "machine": f"{processor()}, {os.cpu_count()} cores", **gpu,
            "threads": str(torch.get_num_threads()), **{name: version(name) for name in packages}}


def processor() -> str:
    """The processor's name as Linux gives it, else its architecture."""
    info = Path("/proc/cpuinfo")
    names = re.findall(r"model name\s*: (.+)", info.read_text()) if info.is_file() else []
    return names[0] if names else platform.machine()
