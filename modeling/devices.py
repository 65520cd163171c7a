"""Devices, dtypes, shards of parameters, and seeded random generators.

    device = pick_device(None)                     # cuda, mps or cpu; under torchrun this rank's GPU
    batch = to_device(batch, device)
    full = gather_full(parameter)                  # all ranks call it; each gets the full tensor
    parameter.copy_(shard_like(parameter, full))   # each rank keeps its own shard
    generator = named_generator(seed, name)        # the same numbers on any number of processes

A shard is a rank's part of a parameter, an FSDP2 DTensor. Without FSDP a parameter is a plain tensor, and
gather_full and shard_like return their argument.
"""

import contextlib
import math
import os
import re
import sys
import time
import zlib
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from configurator import UserError

# The dtypes that configuration keys may name.
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
MOST_THREADS = 1024  # more cores than a machine has; torch would start any number of threads


def gather_full(tensor: Tensor) -> Tensor:
    """Return the full tensor of a parameter that may be sharded. Every rank must call this function."""
    # Only a DTensor has this method. Importing the class for isinstance would cost every process a second.
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor


def shard_like(parameter: Tensor, value: Tensor) -> Tensor:
    """Return this rank's shard of `value`, a full tensor that every rank has; no data is sent.

    If `parameter` is not sharded, return `value`.
    """
    if not hasattr(parameter, "full_tensor"):
        return value
    from torch.distributed.tensor import distribute_tensor

    value = value.to(parameter.device)
    return distribute_tensor(value, parameter.device_mesh, parameter.placements, src_data_rank=None)


def pick_device(name: str | None) -> torch.device:
    """Return the named device, or the best available one for None; under torchrun this rank's GPU.

    Raises UserError for a device that this machine does not have.
    """
    available = {"cuda": torch.cuda.device_count(), "mps": int(torch.backends.mps.is_available()), "cpu": 1}
    name = name or next(kind for kind, count in available.items() if count)
    try:
        device = torch.device(name)
    except RuntimeError:
        raise UserError(f"device={name}: no such device; use cpu, cuda, cuda:N or mps") from None
    if device.type == "cuda" and "LOCAL_RANK" in os.environ:
        if int(os.environ["LOCAL_WORLD_SIZE"]) > available["cuda"]:
            raise UserError(f"torchrun started {os.environ['LOCAL_WORLD_SIZE']} processes, but this machine "
                            f"has {available['cuda']} CUDA devices; lower --nproc-per-node")
        device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
    if (device.index or 0) >= available.get(device.type, 0):
        raise UserError(f"device={device}: not on this machine ({available['cuda']} CUDA devices)")
    if device.type == "cuda" and device.index is not None:
        torch.cuda.set_device(device)  # Triton and new streams use the current device
    return device


def pick_dtype(name: str | None, device: torch.device) -> torch.dtype:
    """Return the named dtype; None is bfloat16 on a GPU, else float32."""
    return DTYPES[name or ("bfloat16" if device.type == "cuda" else "float32")]


def device_name(device: torch.device) -> str:
    """Return the name for the log: the GPU's, or "cpu (2 threads)"."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{device.type} ({torch.get_num_threads()} threads)"


def cgroup_cores(root: Path = Path("/sys/fs/cgroup"), own: Path = Path("/proc/self/cgroup")) -> float:
    """Return the number of cores that this process's cgroups (a container) allow; inf without a limit."""
    lines = own.read_text().splitlines() if own.is_file() else []
    folder = root / next((line[4:] for line in lines if line.startswith("0::/")), "")
    quotas = [[path / "cpu.max"] for path in (folder, *folder.parents) if path.is_relative_to(root)]  # v2
    quotas.append([root / "cpu" / "cpu.cfs_quota_us", root / "cpu" / "cpu.cfs_period_us"])  # version 1
    limit = math.inf
    for files in quotas:
        with contextlib.suppress(OSError, ValueError):  # no such file, or "max 100000": no limit
            quota, period = (int(word) for path in files for word in path.read_text().split())
            limit = min(limit, quota / period if quota > 0 else math.inf)
    return limit


def busy_cores(cores: set[int], seconds: float = 0.2) -> float:
    """Return how many of the cores other programs keep busy, measured while this process sleeps (Linux)."""
    def ticks() -> tuple[int, int]:
        lines = [line.split() for line in Path("/proc/stat").read_text().splitlines()]
        mine = [[int(word) for word in words[1:9]] for words in lines
                if re.fullmatch(r"cpu\d+", words[0]) and int(words[0][3:]) in cores]
        return sum(map(sum, mine)), sum(times[3] + times[4] for times in mine)  # all, idle and iowait

    try:
        total, idle = ticks()
        time.sleep(seconds)
        more_total, more_idle = ticks()
    except OSError:
        return 0.0
    return len(cores) * (1 - (more_idle - idle) / max(more_total - total, 1))


def use_threads(threads: int | None) -> str:
    """Set the number of CPU threads; None keeps OMP_NUM_THREADS, else lowers it to the cores we may use.

    Raises UserError for an impossible number. Returns a note if other programs are using those cores: on a
    busy machine two threads can be five times slower than one. The number is not chosen by the load, because
    it decides the last bits of a sum.
    """
    if threads is not None:
        if not 1 <= threads <= MOST_THREADS:
            raise UserError(f"threads={threads}: must be from 1 to {MOST_THREADS}")
        torch.set_num_threads(threads)
    if threads or "OMP_NUM_THREADS" in os.environ:
        return ""
    cores = os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else set(range(os.cpu_count() or 1))
    limit = min(len(cores), cgroup_cores())
    threads = min(torch.get_num_threads(), max(1, int(limit)))
    torch.set_num_threads(threads)
    busy = busy_cores(cores) if threads > 1 else 0.0
    if threads == 1 or threads + busy < limit + 0.5:
        return ""
    return (f"other programs keep {busy:.1f} of {len(cores)} cores busy, so threads wait for each other; "
            f"--threads={max(1, round(limit - busy))} may be several times faster")


def open_device(name: str | None, threads: int | None, dtype: str | None) -> tuple[torch.device, torch.dtype]:
    """Return the device of a program that only runs a model, and the dtype of the weights; print a note of
    `use_threads`."""
    device = pick_device(name)
    if device.type == "cpu" and (note := use_threads(threads)):
        print(note, file=sys.stderr)
    return device, pick_dtype(dtype, device)


def emulates_bfloat16(device: torch.device) -> bool:
    """Return True for a CPU without bfloat16 units. Only Linux lists them; elsewhere the answer is False."""
    info = Path("/proc/cpuinfo")
    units = r"\b(avx512_bf16|amx_bf16|bf16)\b"
    return device.type == "cpu" and info.is_file() and not re.search(units, info.read_text())


def autocast_dtype(tensor: Tensor) -> torch.dtype:
    """Return the dtype of matrix products with `tensor`: autocast's if it is on, else the tensor's own."""
    device = tensor.device.type
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else tensor.dtype


def to_device(batch: dict[str, Any], device: torch.device | str) -> dict[str, Any]:
    """Return the batch with its tensors on `device`; other values stay as they are. Copies to a GPU do not
    block; a tensor on the CPU may be read at once."""
    is_gpu = torch.device(device).type != "cpu"
    return {key: value.to(device, non_blocking=is_gpu) if isinstance(value, Tensor) else value
            for key, value in batch.items()}


def named_generator(seed: int, name: str) -> torch.Generator:
    """Return a CPU generator for one named tensor, so that its numbers do not depend on other tensors."""
    return torch.Generator().manual_seed(zlib.crc32(f"{seed}/{name}".encode()))
