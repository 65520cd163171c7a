"""Devices, dtypes, shards of parameters, and seeded random generators.

    device = pick_device(None)                     # cuda, mps or cpu; under torchrun this rank's GPU
    batch = to_device(batch, device)
    full = gather_full(parameter)                  # all ranks call it; each gets the full tensor
    parameter.copy_(shard_like(parameter, full))   # each rank keeps its own shard
    generator = named_generator(seed, name)        # the same numbers on any number of processes

A shard is a rank's part of a parameter, an FSDP2 DTensor. Without FSDP a parameter is a plain tensor, and
gather_full and shard_like return their argument.
"""

import os
import re
import zlib
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor, distribute_tensor

from configurator import UserError

# The dtypes that configuration keys may name.
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def gather_full(tensor: Tensor) -> Tensor:
    """Return the full tensor of a parameter that may be sharded. Every rank must call this function."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def shard_like(parameter: Tensor, value: Tensor) -> Tensor:
    """Return this rank's shard of `value`, a full tensor that every rank has; no data is sent.

    If `parameter` is not sharded, return `value`.
    """
    if not isinstance(parameter, DTensor):
        return value
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
    return device


def device_name(device: torch.device) -> str:
    """Return the name for the log: the GPU's, or "cpu (2 threads)"."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{device.type} ({torch.get_num_threads()} threads)"


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
    """Return the batch with its tensors on `device`; other values stay as they are. Copies do not block."""
    return {key: value.to(device, non_blocking=True) if isinstance(value, Tensor) else value
            for key, value in batch.items()}


def named_generator(seed: int, name: str) -> torch.Generator:
    """Return a CPU generator for one named tensor, so that its numbers do not depend on other tensors."""
    return torch.Generator().manual_seed(zlib.crc32(f"{seed}/{name}".encode()))
