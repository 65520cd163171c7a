"""Between whole tensors and this rank's shards of them (FSDP2's DTensors). On one process both are the same.

    full = whole(parameter)                  # all ranks call it; each gets everything
    parameter.copy_(like(parameter, full))   # each keeps its part
"""

from torch import Tensor
from torch.distributed.tensor import DTensor, distribute_tensor


def whole(tensor: Tensor) -> Tensor:
    """All of a tensor that may be sharded; every rank must call it, since it gathers."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def like(parameter: Tensor, value: Tensor) -> Tensor:
    """A whole `value`, the same on all ranks, cut as `parameter` is, if that is sharded; nothing is sent."""
    if not isinstance(parameter, DTensor):
        return value
    value = value.to(parameter.device)
    return distribute_tensor(value, parameter.device_mesh, parameter.placements, src_data_rank=None)
