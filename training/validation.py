"""Validation on several ranks: each rank runs its share of the batches, and every rank gets the sums."""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from torch import Tensor

from dataset.dataloader import validation_batches
from modeling.devices import to_device
from training.run import Run


def validation_sums(run: Run, total: int, batch_size: int, make_batch: Callable[[np.ndarray], dict[str, Any]],
                    measure: Callable[[dict[str, Any]], Sequence[Tensor | int]]) -> list[float]:
    """The numbers that measure(batch) returns, summed over the rows 0 to total - 1 and over all ranks.

    make_batch(row numbers) makes a batch of CPU tensors; measure gets it on the run's device. Its numbers are
    scalars, and stay on the device until the end.
    """
    sums: list[Tensor | int] = []
    for batch in validation_batches(make_batch, total, batch_size, run.rank, run.world_size):
        values = measure(to_device(batch, run.device))
        # A count of 0 marks a filler: all ranks must run the same number of forward passes.
        if batch["count"]:
            sums = [a + b for a, b in zip(sums or [0] * len(values), values, strict=True)]
    return run.sum([float(value) for value in sums or [0] * len(values)])
