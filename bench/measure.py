"""What all benchmarks share: config keys, turns, child processes, clocks, tables.

    runs = in_turns({"ours": run, "peer": run_peer}, rounds=5)    # {"ours": [5 results], "peer": [5 results]}
    result = run_child(train_arm, "ours", 3)                      # train_arm("ours", 3) in a new process
    timings = time_in_turns({"ours": step, "peer": peer_step}, rounds=5, device=device, seconds=0.5)
    print(timing_table(rows, "ms per step", lambda seconds: 1e3 * seconds))

The arms of a comparison take turns: each runs once per round, so a machine that slows down slows all of them.
On the CPU the clock is the CPU time of the process, which other processes do not disturb; on a GPU it is wall
time after the GPU has finished.
"""

import functools
import json
import math
import os
import platform
import re
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from importlib.metadata import distributions
from pathlib import Path
from typing import Any, Literal, TypeVar

import torch

from configurator import UserError, configure, require, require_positive
from formats.files import write_json
from modeling.devices import device_name, pick_device

Result = TypeVar("Result")


@dataclass(frozen=True, kw_only=True)
class BenchConfig:
    """The keys of every subject."""

    rounds: int = 5  # turns of each arm; for base: number of seeds
    json: str | None = None  # also write the results to this file

    def __post_init__(self) -> None:
        require_positive(self, "rounds")


@dataclass(frozen=True, kw_only=True)
class DeviceConfig(BenchConfig):
    """The keys of the subjects that run models."""

    device: str = "cpu"  # cpu or cuda
    threads: int = 1  # CPU threads of every arm; with one, CPU time is the wall time of an idle machine

    def __post_init__(self) -> None:
        super().__post_init__()
        require_positive(self, "threads")


@dataclass(frozen=True, kw_only=True)
class PeerConfig(DeviceConfig):
    """The keys of the subjects that time torch code in this process."""

    dtype: Literal["float32", "bfloat16"] | None = None  # dtype of the computation; None: bfloat16 on cuda
    seconds: float = 0.5  # approximate length of one turn; the work is repeated to fill it

    def __post_init__(self) -> None:
        super().__post_init__()
        require_positive(self, "seconds")


def numbers(cfg: BenchConfig, key: str) -> list[int]:
    """The numbers of a key such as "1,4,16". UserError if they are not positive whole numbers."""
    texts = getattr(cfg, key).split(",")
    valid = all(text.isdecimal() and int(text) for text in texts)
    require(cfg, key, valid, "positive whole numbers separated by commas")
    return [int(text) for text in texts]


def start(cfg: PeerConfig) -> tuple[torch.device, str]:
    """Set the number of threads; returns the device and the dtype. UserError if the device is missing."""
    torch.set_num_threads(cfg.threads)
    device = pick_device(cfg.device)
    return device, cfg.dtype or ("bfloat16" if device.type == "cuda" else "float32")


# ---- Turns and child processes ----------------------------------------------------------------------------

def in_turns(arms: Mapping[str, Callable[[], Result]], rounds: int) -> dict[str, list[Result]]:
    """Call every arm once per round: {arm: one result per round}."""
    results: dict[str, list[Result]] = {name: [] for name in arms}
    for _ in range(rounds):
        for name, arm in arms.items():
            results[name].append(arm())
    return results


def run_child(function: Callable, *arguments: Any, threads: int = 1) -> Any:
    """Call a module-level function in a new Python process; returns its result.

    Arguments and result must be JSON. The function may print: only the last line of stdout is read. Raises
    UserError with the end of stderr if the process fails.
    """
    code = (f"import json, sys; from {function.__module__} import {function.__name__} as function; "
            "print(json.dumps(function(*json.loads(sys.argv[1]))))")
    environment = os.environ | {"OMP_NUM_THREADS": str(threads), "HF_HUB_OFFLINE": "1"}
    process = subprocess.run([sys.executable, "-c", code, json.dumps(arguments)], env=environment,
                             capture_output=True, text=True)
    if process.returncode:
        raise UserError(f"{function.__name__}{arguments[:1]} failed: {process.stderr.strip()[-800:]}")
    return json.loads(process.stdout.splitlines()[-1])


def children_in_turns(function: Callable, arms: Iterable[str], *arguments: Any, rounds: int,
                      threads: int) -> dict[str, list[Any]]:
    """Call function(arm, *arguments) in a new process for every arm, once per round."""
    return in_turns({arm: functools.partial(run_child, function, arm, *arguments, threads=threads)
                     for arm in arms}, rounds)


def write_jsonl(path: Path, rows: list[dict[str, Any]]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


# ---- Time -------------------------------------------------------------------------------------------------

@dataclass
class Timing:
    """How long one call of an arm takes."""

    first_call: float  # wall seconds of the first call, compilation included
    repeats: int  # calls per turn
    extra_megabytes: float | None = None  # GPU only: memory that a call allocates on top of its inputs
    seconds: list[float] = field(default_factory=list)  # per call, one value per round

    @property
    def median(self) -> float:
        return statistics.median(self.seconds)


def now(device: torch.device) -> float:
    """The clock: CPU seconds of all threads of this process, or wall seconds once the GPU has finished."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        return time.perf_counter()
    return time.process_time()


def time_in_turns(arms: dict[str, Callable[[], Any]], rounds: int, device: torch.device,
                  seconds: float) -> dict[str, Timing]:
    """Time every arm once per round, after three warm-up calls each. A turn takes about `seconds`."""
    timings = {name: warm_up(arm, device, seconds) for name, arm in arms.items()}

    for _ in range(rounds):
        for name, timing in timings.items():
            begin = now(device)
            for _ in range(timing.repeats):
                arms[name]()
            timing.seconds.append((now(device) - begin) / timing.repeats)
    return timings


def warm_up(arm: Callable[[], Any], device: torch.device, seconds: float) -> Timing:
    """Call an arm three times: to compile, to settle, and to choose how many calls make a turn.

    There is no third call if one takes longer than a turn.
    """
    on_gpu = device.type == "cuda"
    begin = time.perf_counter()
    arm()
    now(device)  # waits for a GPU
    first_call = time.perf_counter() - begin
    if on_gpu:
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
    begin = now(device)
    arm()
    call = now(device) - begin
    if call < seconds:
        begin = now(device)
        arm()
        call = now(device) - begin
    repeats = max(1, min(10_000, math.ceil(seconds / max(call, 1e-6))))
    extra = (torch.cuda.max_memory_allocated(device) - before) / 1e6 if on_gpu else None
    return Timing(first_call, repeats, extra)


# ---- The report -------------------------------------------------------------------------------------------

def row(name: str, dtype: str, timing: Timing, peers: dict[str, float], share: float,
        **more: Any) -> dict[str, Any]:
    """An arm's entry in the JSON. peers: {peer: its median seconds}; share: fraction of the machine's
    limit."""
    return {"arm": name, "dtype": dtype, "median_seconds": timing.median, "min_seconds": min(timing.seconds),
            "max_seconds": max(timing.seconds), "seconds": timing.seconds,
            "speed_of": {peer: seconds / timing.median for peer, seconds in peers.items()},
            "share_of_peak": share, "first_call_seconds": timing.first_call,
            "extra_megabytes": timing.extra_megabytes, **more}


def baselines(timings: dict[str, Timing], *peers: str) -> dict[str, float]:
    """{arm: median seconds} of the first arm of each peer that was timed. Speeds are relative to these."""
    firsts = [next((name for name in timings if name.startswith(peer)), None) for peer in peers]
    return {name: timings[name].median for name in firsts if name}


def timing_table(rows: list[dict[str, Any]], title: str, value: Callable[[float], float],
                 notes: Iterable[str] = ()) -> str:
    """One line per arm: median and range of `value(seconds)`, speed relative to each peer, share of the
    machine's limit, and wall seconds of the first call, compilation included."""
    peers = rows[0]["speed_of"]
    lines = [[arm["arm"], arm["dtype"], f"{value(arm['median_seconds']):,.2f}",
              value_range([value(arm["min_seconds"]), value(arm["max_seconds"])], 2),
              *(f"{arm['speed_of'][peer]:.2f}" for peer in peers), f"{arm['share_of_peak']:.1%}",
              f"{arm['first_call_seconds']:.2f} s"] for arm in rows]
    headers = [title, "dtype", "median", "(min - max)", *(f"x {peer}" for peer in peers), "of peak",
               "first call"]
    return "\n".join([text_table(headers, lines), *notes])


def text_table(headers: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A table for the terminal: the first column is aligned left, the others right."""
    columns = []
    for number, column in enumerate(zip(headers, *rows, strict=True)):
        width = max(map(len, column))
        columns.append([cell.rjust(width) if number else cell.ljust(width) for cell in column])
    return "\n".join(map("  ".join, zip(*columns, strict=True)))


def value_range(values: Sequence[float], digits: int) -> str:
    """ "(lowest - highest)". """
    return f"({min(values):,.{digits}f} - {max(values):,.{digits}f})"


# ---- The command ------------------------------------------------------------------------------------------

def run_benchmark(name: str, config: type, measure: Callable, report: Callable, argv: list[str],
                  usage: str) -> dict[str, Any]:
    """Configure, measure, print the report, and write the JSON. Returns the results.

    name: what comes after `python -m`, for the JSON; measure: config -> results; report: results -> text.
    """
    cfg, _ = configure(config, argv, usage=usage)
    results = measure(cfg)
    print(report(results))
    if cfg.json:
        command = f"python -m {name} {' '.join(argv)}"
        write_json(Path(cfg.json), {"command": command, "versions": versions(cfg), **results})
    return results


def versions(cfg: Any) -> dict[str, Any]:
    """The machine, the versions of the packages that the results depend on, and the clock."""
    packages = {"torch", "transformers", "numpy", "tiktoken", "tokenizers", "trl", "lm_eval", "xllamacpp",
                "llama_cpp_python"}
    described = {"python": platform.python_version(), "machine": f"{processor()}, {os.cpu_count()} cores",
                 **{each.name: each.version for each in distributions() if each.name in packages}}
    if isinstance(cfg, DeviceConfig):
        device = pick_device(cfg.device)
        described |= {"device": device_name(device), "threads": cfg.threads,
                      "clock": "wall" if device.type == "cuda" else "process CPU time"}
    return described


def processor() -> str:
    """The name of the processor on Linux, elsewhere its architecture."""
    info = Path("/proc/cpuinfo")
    names = re.findall(r"model name\s*: (.+)", info.read_text()) if info.is_file() else []
    return names[0] if names else platform.machine()
