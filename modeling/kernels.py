"""Two Triton kernels for GPUs, where torch's own operations read the memory too often or too slowly.

    log_z = softmax_gradient_(logits, targets, weights, vocab_size, z_loss)   # training/losses.py
    outputs = row_products(row, [q_proj.weight, k_proj.weight], [None, None])  # modeling/linear.py

Import this file only where there is a GPU: torch's CUDA builds bring Triton, its CPU builds do not. Both
kernels compute in float32. softmax_gradient_ reads the logits twice and writes the gradient over them;
row_products reads every matrix once.
"""

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

SOFTMAX_COLUMNS = 2048  # logits of a row that a program handles at a time


@triton.jit
def softmax_kernel(logits, targets, weights, log_z, stride, V, P, z_loss,
                   WITH_GRADIENT: tl.constexpr, COLUMNS: tl.constexpr):
    """One program per row of logits. The first loop computes logsumexp, the second one the gradient."""
    row = tl.program_id(0).to(tl.int64)
    start_of_row = logits + row * stride
    numbers = tl.arange(0, COLUMNS)
    # Each lane keeps the maximum of its columns, and the sum of exp(logit - maximum).
    maximum = tl.full((COLUMNS,), -1e30, tl.float32)
    total = tl.zeros((COLUMNS,), tl.float32)
    for start in range(0, V, COLUMNS):
        columns = start + numbers
        x = tl.load(start_of_row + columns, mask=columns < V, other=-float("inf")).to(tl.float32)
        larger = tl.maximum(maximum, x)
        total = total * tl.exp(maximum - larger) + tl.exp(x - larger)
        maximum = larger
    top = tl.max(maximum, 0)
    z = top + tl.log(tl.sum(total * tl.exp(maximum - top), 0))
    tl.store(log_z + row, z)
    if WITH_GRADIENT:
        target, weight = tl.load(targets + row), tl.load(weights + row)
        scale = weight * (1 + 2 * z_loss * z)
        for start in range(0, P, COLUMNS):
            columns = start + numbers
            x = tl.load(start_of_row + columns, mask=columns < V, other=-float("inf")).to(tl.float32)
            gradient = tl.exp(x - z) * scale - tl.where(columns == target, weight, 0.0)
            tl.store(start_of_row + columns, gradient.to(logits.dtype.element_ty), mask=columns < P)


def softmax_gradient_(logits: Tensor, targets: Tensor | None, weights: Tensor | None, vocab_size: int,
                      z_loss: float = 0.0) -> Tensor:
    """Return logsumexp of each row, (n,) float32, and replace the logits by the gradient of the loss.

    The loss is the sum of weight * (log_z - logit of the target + z_loss * log_z^2) over the rows.
    logits: (n, P), any float dtype; columns from vocab_size on are padding, with a gradient of 0. targets:
    (n,) int64 below vocab_size. weights: (n,) float32. Both None: the logits stay as they are.
    """
    log_z = torch.empty(len(logits), device=logits.device, dtype=torch.float32)
    if len(logits):
        softmax_kernel[(len(logits),)](
            logits, log_z if targets is None else targets, log_z if weights is None else weights, log_z,
            logits.stride(0), vocab_size, logits.shape[1], z_loss, weights is not None, SOFTMAX_COLUMNS,
            num_warps=8)
    return log_z


@triton.autotune(configs=[triton.Config({"ROWS": rows, "COLUMNS": columns}, num_warps=warps)
                          for rows, columns, warps in ((2, 1024, 4), (1, 2048, 4), (4, 2048, 8))],
                 key=["N", "K"])
@triton.jit
def row_kernel(x, weight_1, weight_2, weight_3, bias_1, bias_2, bias_3, y, end_1, end_2, N, K,
               WITH_BIAS: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """One program per ROWS entries of y. Entries up to end_1 belong to the first matrix, up to end_2 to the
    second one, and the others to the third one."""
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    first = tl.program_id(0) * ROWS
    if first < end_1:
        weight, bias, begin = weight_1, bias_1, 0
    elif first < end_2:
        weight, bias, begin = weight_2, bias_2, end_1
    else:
        weight, bias, begin = weight_3, bias_3, end_2
    own = (rows - begin).to(tl.int64)  # row numbers within this matrix
    total = tl.zeros((ROWS, COLUMNS), tl.float32)
    for start in range(0, K, COLUMNS):
        columns = start + tl.arange(0, COLUMNS)
        values = tl.load(x + columns, mask=columns < K, other=0.0).to(tl.float32)
        block = tl.load(weight + own[:, None] * K + columns[None, :],
                        mask=(rows < N)[:, None] & (columns < K)[None, :], other=0.0,
                        eviction_policy="evict_first")  # no weight is read twice in a step
        total += block.to(tl.float32) * values[None, :]
    result = tl.sum(total, 1)
    if WITH_BIAS:
        result += tl.load(bias + own, mask=rows < N, other=0.0).to(tl.float32)
    tl.store(y + rows, result.to(y.dtype.element_ty), mask=rows < N)


def row_products(x: Tensor, weights: Sequence[Tensor], biases: Sequence[Tensor | None]) -> list[Tensor]:
    """Multiply one row by up to three matrices in one kernel; all have biases, or none.

    x: K numbers in any shape (..., K). weights: (n, K) each, contiguous, in the dtype of x. Every n except
    the last one must be a multiple of 16, so that no program has ROWS of two matrices. Returns one tensor
    (..., n) for each matrix.
    """
    sizes = [len(weight) for weight in weights]
    N, K = sum(sizes), x.shape[-1]
    y = x.new_empty(*x.shape[:-1], N)
    three = [*weights, *weights[-1:] * 2][:3]
    with_bias = biases[0] is not None
    vectors = [*biases, *biases[-1:] * 2][:3] if with_bias else three
    ends = [sizes[0], N if len(sizes) < 3 else sizes[0] + sizes[1]]

    def grid(config: dict) -> tuple[int]:
        return (triton.cdiv(N, config["ROWS"]),)

    row_kernel[grid](x, *three, *vectors, y, *ends, N, K, with_bias)
    return list(y.split(sizes, dim=-1))
