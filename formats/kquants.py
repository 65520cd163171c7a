"""K-quants: 256 weights in 144, 176 or 210 bytes, in the layout that llama.cpp and the package gguf read.

    blocks = quantize(rows, "Q4_K")       # (n, 256 k) float32 -> (n, 144 k) uint8

    Q4_K  4.5 bits per weight    8 groups of 32    weight = d s q - m t     q 4 bits, s and t 6 bits, unsigned
    Q5_K  5.5                    the same                                   q 5 bits
    Q6_K  6.5625                16 groups of 16    weight = d s q           q 6 bits and s 8 bits, signed

A block has one d and one m, both float16. A group has one s and one t, and a weight has one q. ggml-quants.h
of llama.cpp describes the formats and leaves open how to choose the numbers. We search for the step of each
group, then find d and m by least squares with everything else fixed. Left out: weighting the errors by the
size of the activations (an importance matrix).
"""

import numpy as np
from numpy import ndarray

BLOCK = 256  # weights per block
BYTES = {"Q4_K": 144, "Q5_K": 176, "Q6_K": 210}  # per block
CHUNK = 1024  # blocks at a time: 1 MB of float32, which fits into a CPU's cache
# The steps that are tried divide a group's range into `levels + shift` parts, for each of these shifts.
# A step that is a bit too small for the outermost weights often fits the others better.
SHIFTS = np.linspace(-1, 1, 21, dtype=np.float32)


def divide(a: ndarray, b: ndarray) -> ndarray:
    """a / b, or 0 where b is 0."""
    return np.where(b != 0, a / np.where(b != 0, b, 1), 0)


def rounded(x: ndarray, low: int, high: int) -> ndarray:
    """The nearest integers from low to high, as float32."""
    return np.clip(np.rint(x), low, high)


def as_float16(x: ndarray) -> ndarray:
    """x rounded to float16, in float32: a reader of the blocks computes with these values."""
    return x.astype(np.float16).astype(np.float32)


def total(x: ndarray) -> ndarray:
    """The sum over the last axis, which is kept: (.., n) -> (.., 1)."""
    return x.sum(-1, keepdims=True)


def block_total(x: ndarray) -> ndarray:
    """The sum over a block: (n, 8, 32) -> (n, 1, 1)."""
    return total(x.reshape(-1, 1, BLOCK))


def bytes_of(x: ndarray) -> ndarray:
    """(n, 1, 1) as float16: (n, 2) uint8."""
    return x.reshape(-1, 1).astype("<f2").view(np.uint8)


# ---- Q4_K and Q5_K ----------------------------------------------------------------------------------------

def codes(x: ndarray, step: ndarray, depth: ndarray, levels: int) -> ndarray:
    """The integers q from 0 to `levels` for which step * q - depth is closest to x."""
    return rounded(divide(x + depth, step), 0, levels)


def affine_step(x: ndarray, weight: ndarray, levels: int) -> tuple[ndarray, ndarray]:
    """step and depth, both (n, 8, 1) and not negative, for which step * q - depth is closest to x (n, 8, 32).

    "Closest" is in weighted squares, with the best q from 0 to `levels`. Each shift gives a step, the step
    gives q, and least squares for this q give a new step and depth. The best pair so far wins, and the next
    shift starts from its depth.
    """
    depth, top = np.maximum(-x.min(-1, keepdims=True), 0), x.max(-1, keepdims=True)
    step = (top + depth) / levels
    sum_w, sum_x = total(weight), total(weight * x)
    error = total(weight * (step * codes(x, step, depth, levels) - depth - x) ** 2)
    for shift in SHIFTS:
        q = codes(x, (top + depth) / (levels + shift), depth, levels)
        wq = weight * q
        sum_q, sum_qq, sum_qx = total(wq), total(wq * q), total(wq * x)
        determinant = np.maximum(sum_w * sum_qq - sum_q * sum_q, 0)  # rounding may make it negative
        new_depth = divide(sum_q * sum_qx - sum_qq * sum_x, determinant)
        new_step = divide(sum_w * sum_qx - sum_q * sum_x, determinant)
        # A negative depth cannot be stored: take the best step for depth 0 instead.
        new_step = np.where(new_depth < 0, divide(sum_qx, sum_qq), new_step)
        new_depth = np.maximum(new_depth, 0)
        new_error = total(weight * (new_step * q - new_depth - x) ** 2)
        better = (new_error < error) & (determinant > 0)
        step, depth, error = (np.where(better, *pair) for pair in
                              ((new_step, step), (new_depth, depth), (new_error, error)))
    return step, depth


def in_fixed_point(values: ndarray) -> tuple[ndarray, ndarray]:
    """Split values (n, 8, 1), not negative, into a float16 unit (n, 1, 1) and integers from 0 to 63."""
    unit = values.max(1, keepdims=True) / 63
    return as_float16(unit), rounded(divide(values, unit), 0, 63)


def least_squares(x: ndarray, weight: ndarray, a: ndarray, b: ndarray) -> tuple[ndarray, ndarray]:
    """d and m (n, 1, 1) for which d a - m b is closest to x over a block: float16 values, not negative.

    Both are 0 if a and b are linearly dependent.
    """
    aa, ab, bb, ax, bx = (block_total(weight * y) for y in (a * a, a * b, b * b, a * x, b * x))
    determinant = np.maximum(aa * bb - ab * ab, 0)
    d, m = (as_float16(np.maximum(divide(part, determinant), 0))
            for part in (bb * ax - ab * bx, ab * ax - aa * bx))
    return d, m


def pack_q45(d: ndarray, m: ndarray, s: ndarray, t: ndarray, q: ndarray, bits: int) -> ndarray:
    """Lay out the blocks: d, m, 12 bytes of s and t, for Q5_K 32 bytes of fifth bits, 128 of lower bits.

    The 12 bytes of s and t, which have 6 bits each:

        bytes 0 to 3     s of groups 0 to 3 in bits 0 to 5; bits 4, 5 of s of groups 4 to 7 in bits 6, 7
        bytes 4 to 7     the same for t
        bytes 8 to 11    bits 0 to 3 of s of groups 4 to 7 in bits 0 to 3, the same of t in bits 4 to 7
    """
    s, t = s[:, :, 0].astype(np.uint8), t[:, :, 0].astype(np.uint8)  # (n, 8)
    # (n, 4) each: bytes 0 to 3, 4 to 7 and 8 to 11
    scales = [s[:, :4] | (s[:, 4:] >> 4) << 6, t[:, :4] | (t[:, 4:] >> 4) << 6, s[:, 4:] & 15 | t[:, 4:] << 4]
    fifths = [np.packbits(q >> 4, axis=1, bitorder="little")[:, 0]] if bits == 5 else []  # (n, 32)
    q = q & 15
    lower = q[:, 0::2] | q[:, 1::2] << 4  # (n, 4, 32): two groups share their bytes
    return np.concatenate([bytes_of(d), bytes_of(m), *scales, *fifths, lower.reshape(-1, 128)], axis=1)


def q45_k(blocks: ndarray, bits: int) -> ndarray:
    """(n, 256) -> packed (n, 144 or 176)."""
    x, levels = blocks.reshape(-1, 8, 32), 2**bits - 1  # (n, 8, 32)
    # Large weights count more, as in llama.cpp: they contribute most to a product.
    weight = np.sqrt(total(x * x) / 32) + abs(x)  # (n, 8, 32)
    step, depth = affine_step(x, weight, levels)  # (n, 8, 1) both
    d, s = in_fixed_point(step)  # (n, 1, 1), (n, 8, 1)
    m, t = in_fixed_point(depth)
    q = codes(x, d * s, m * t, levels)  # (n, 8, 32)
    new_d, new_m = least_squares(x, weight, s * q, t)
    new_q = codes(x, new_d * s, new_m * t, levels)
    # Rounding d and m to float16 can make a block worse: keep the better version of each block.
    old, new = (block_total(weight * (d * s * q - m * t - x) ** 2)
                for d, m, q in ((d, m, q), (new_d, new_m, new_q)))
    d, m, q = (np.where(new < old, *pair) for pair in ((new_d, d), (new_m, m), (new_q, q)))
    return pack_q45(d, m, s, t, q.astype(np.uint8), bits)


# ---- Q6_K -------------------------------------------------------------------------------------------------

def symmetric_step(x: ndarray) -> ndarray:
    """The step (n, 16, 1), of either sign, for which step * q is closest to x (n, 16, 16).

    "Closest" is in squares weighted by x^2, with the best q from -32 to 31. The sign of the step makes the q
    of the largest weight negative, because there is one more level below zero.
    """
    outermost = np.take_along_axis(x, abs(x).argmax(-1, keepdims=True), axis=-1)
    step, gain = np.zeros_like(outermost), np.zeros_like(outermost)
    for shift in SHIFTS:
        q = rounded(divide(x, outermost / -(32 + shift)), -32, 31)
        qx, qq = total(x * x * q * x), total(x * x * q * q)
        new_gain = divide(qx * qx, qq)  # how much q, with its best step, reduces the error
        step = np.where(new_gain > gain, divide(qx, qq), step)
        gain = np.maximum(new_gain, gain)
    return step


def pack_q6(d: ndarray, s: ndarray, q: ndarray) -> ndarray:
    """Lay out the blocks: lower four bits of q in 128 bytes, upper two in 64, s in 16, d in 2.

    Each 128 weights are four quarters of 32. Quarters 0 and 2 share the bytes of their lower bits, and so do
    quarters 1 and 3. The upper bits of all four share a byte.
    """
    q = q.reshape(-1, 2, 4, 32)
    lower = (q & 15)[:, :, :2] | (q & 15)[:, :, 2:] << 4  # (n, 2, 2, 32)
    upper = q >> 4
    upper = upper[:, :, 0] | upper[:, :, 1] << 2 | upper[:, :, 2] << 4 | upper[:, :, 3] << 6  # (n, 2, 32)
    return np.concatenate([lower.reshape(-1, 128), upper.reshape(-1, 64),
                           s[:, :, 0].astype(np.int8).view(np.uint8), bytes_of(d)], axis=1)


def q6_k(blocks: ndarray) -> ndarray:
    """(n, 256) -> packed (n, 210)."""
    x = blocks.reshape(-1, 16, 16)  # (n, 16, 16)
    step = symmetric_step(x)  # (n, 16, 1)
    largest = np.take_along_axis(step, abs(step).argmax(1, keepdims=True), axis=1)  # (n, 1, 1)
    d = as_float16(largest / -128)
    s = rounded(divide(step, largest / -128), -128, 127)
    q = rounded(divide(x, d * s), -32, 31)
    return pack_q6(d, s, (q + 32).astype(np.uint8))


def quantize(rows: ndarray, kind: str) -> ndarray:
    """(n, 256 k) float32 -> blocks (n, k * BYTES[kind]) uint8."""
    blocks = np.ascontiguousarray(rows, dtype=np.float32).reshape(-1, BLOCK)
    chunks = (blocks[first:first + CHUNK] for first in range(0, len(blocks), CHUNK))
    packed = [q6_k(x) if kind == "Q6_K" else q45_k(x, bits=int(kind[1])) for x in chunks]
    return np.concatenate(packed).reshape(len(rows), -1)
