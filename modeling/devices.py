"""Between whole tensors and this rank's shards of them (FSDP2's DTensors). On one process both are the same.

    full = whole(parameter)                  # all ranks call it; each gets everything
    parameter.copy_(like(parameter, full))   # each keeps its part
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

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def gather_full(tensor: Tensor) -> Tensor:
    """All of a tensor that may be sharded; every rank must call it, since it gathers."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def shard_like(parameter: Tensor, value: Tensor) -> Tensor:
    """A whole `value`, the same on all ranks, cut as `parameter` is, if that is sharded; nothing is sent."""
    if not isinstance(parameter, DTensor):
        return value
    value = value.to(parameter.device)
    return distribute_tensor(value, parameter.device_mesh, parameter.placements, src_data_rank=None)


def pick_device(name: str | None) -> torch.device:
    """The named device, or the best there is; under torchrun this rank's GPU. UserError if it is missing."""
    best = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    name = name or best
    try:
        device = torch.device(name)
    except RuntimeError:
        raise UserError(f"device={name}: torch knows no such device") from None
    if device.type == "cuda" and "LOCAL_RANK" in os.environ:
        if int(os.environ["LOCAL_WORLD_SIZE"]) > torch.cuda.device_count():  # all ranks see it, and one tells
            raise UserError(f"torchrun started {os.environ['LOCAL_WORLD_SIZE']} processes here, this machine "
                            f"has {torch.cuda.device_count()} CUDA devices")
        device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
    available = {"cpu": 1, "cuda": torch.cuda.device_count(), "mps": int(torch.backends.mps.is_available())}
    if (device.index or 0) >= available.get(device.type, 0):
        raise UserError(f"device={device}: not on this machine ({available['cuda']} CUDA devices)")
    return device


def device_name(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{device.type} ({torch.get_num_threads()} threads)"


def emulates_bfloat16(device: torch.device) -> bool:
    """Whether this is a CPU without units for it; one that does not say, as outside Linux, is taken to have
    them."""
    info = Path("/proc/cpuinfo")
    units = r"\b(avx512_bf16|amx_bf16|bf16)\b"
    return device.type == "cpu" and info.is_file() and not re.search(units, info.read_text())


def autocast_dtype(tensor: Tensor) -> torch.dtype:
    """The dtype of matrix products with `tensor`: autocast's where it is on, else the tensor's own."""
    device = tensor.device.type
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else tensor.dtype


def to_device(batch: dict[str, Any], device: torch.device | str) -> dict[str, Any]:
    """The batch with its tensors on `device`; other values stay as they are. Copies do not block a GPU."""
    return {key: value.to(device, non_blocking=True) if isinstance(value, Tensor) else value
            for key, value in batch.items()}


def named_generator(seed: int, name: str) -> torch.Generator:
    """A CPU generator for one named tensor: its numbers do not depend on which other tensors there are."""
    return torch.Generator().manual_seed(zlib.crc32(f"{seed}/{name}".encode()))
