"""K-quants: 256 weights in 144, 176 or 210 bytes, laid out as llama.cpp and the package gguf read them.

    blocks, values = quantize(rows, "Q4_K")       # (n, 256 k) float32 -> (n, 144 k) uint8, (n, 256 k) float32

    Q4_K  4.5 bits a weight     8 groups of 32    weight = d s q - m t     q 4 bits, s and t 6 bits, unsigned
    Q5_K  5.5                   the same                                   q 5 bits
    Q6_K  6.5625               16 groups of 16    weight = d s q           q 6 bits and s 8 bits, signed

d and m are float16, one of each a block; q is one a weight, s and t one a group. `values` is what the blocks
stand for, to the last bit. The formats are llama.cpp's (ggml-quants.h describes them). How to choose the
numbers is left open there; here it is a search for the step of each group, and then least squares for d and m
with everything else fixed. Left out: weights by how large the activations are (an importance matrix).
"""

import numpy as np
from numpy import ndarray

BLOCK = 256  # weights in a block
BYTES = {"Q4_K": 144, "Q5_K": 176, "Q6_K": 210}  # of a block
CHUNK = 1024  # blocks at a time: 1 MB of float32, which a cache holds
# Steps that are tried, as the number of levels that the group's range is divided into, less the nominal one.
# A step a bit too small for the outermost weights often suits the others better.
SHIFTS = np.linspace(-1, 1, 21, dtype=np.float32)


def quantize(rows: ndarray, kind: str) -> tuple[ndarray, ndarray]:
    """Blocks of (n, 256 k) float32 as (n, k * BYTES[kind]) uint8, and the values that they stand for."""
    blocks = np.ascontiguousarray(rows, dtype=np.float32).reshape(-1, BLOCK)
    packed = np.empty((len(blocks), BYTES[kind]), dtype=np.uint8)
    values = np.empty_like(blocks)
    for first in range(0, len(blocks), CHUNK):
        part = slice(first, first + CHUNK)
        x = blocks[part]
        packed[part], values[part] = q6_k(x) if kind == "Q6_K" else q45_k(x, bits=int(kind[1]))
    return packed.reshape(len(rows), -1), values.reshape(rows.shape)


def divided(a: ndarray, b: ndarray) -> ndarray:
    """a / b, and 0 where b is not positive."""
    return np.where(b > 0, a / np.where(b > 0, b, 1), 0)


def rounded(x: ndarray, low: int, high: int) -> ndarray:
    """The nearest whole numbers from low to high; zero is positive, as it will be read."""
    return np.clip(np.rint(x), low, high) + np.float32(0)


def as_float16(x: ndarray) -> ndarray:
    """x as float16 can hold it, in float32: the arithmetic of whoever reads the blocks."""
    return x.astype(np.float16).astype(np.float32)


def total(x: ndarray) -> ndarray:
    return x.sum(-1, keepdims=True)


# ---- Q4_K and Q5_K ----------------------------------------------------------------------------------------

def q45_k(blocks: ndarray, bits: int) -> tuple[ndarray, ndarray]:
    """(n, 256) -> packed (n, 144 or 176) and values (n, 256)."""
    x, levels = blocks.reshape(-1, 8, 32), 2**bits - 1
    # Large weights count more, as in llama.cpp: alone, they decide what a product with them is.
    weight = np.sqrt(total(x * x) / 32) + abs(x)  # (n, 8, 32)
    step, depth = affine_step(x, weight, levels)  # (n, 8, 1) both
    d, s = in_fixed_point(step)  # (n, 1, 1), (n, 8, 1)
    m, t = in_fixed_point(depth)
    q = codes(x, d * s, m * t, levels)  # (n, 8, 32)
    new_d, new_m = least_squares(x, weight, s * q, t)
    new_q = codes(x, new_d * s, new_m * t, levels)
    old, new = (total((weight * (d * s * q - m * t - x) ** 2).reshape(-1, 1, BLOCK))
                for d, m, q in ((d, m, q), (new_d, new_m, new_q)))
    d, m, q = (np.where(new < old, *pair) for pair in ((new_d, d), (new_m, m), (new_q, q)))
    values = (d * s) * q - (m * t)
    return pack_q45(d, m, s, t, q.astype(np.uint8), bits), values.reshape(-1, BLOCK)


def affine_step(x: ndarray, weight: ndarray, levels: int) -> tuple[ndarray, ndarray]:
    """step and depth (n, 8, 1), neither negative, for which step * q - depth, with the best q from 0 to
    `levels`, is closest to x (n, 8, 32) in weighted squares. A step of each shift gives q, and q by least
    squares a step and a depth; the best so far wins, and the next starts from its depth."""
    depth, top = np.maximum(-x.min(-1, keepdims=True), 0), x.max(-1, keepdims=True)
    step = (top + depth) / levels
    sum_w, sum_x = total(weight), total(weight * x)
    error = total(weight * (step * codes(x, step, depth, levels) - depth - x) ** 2)
    for shift in SHIFTS:
        q = codes(x, (top + depth) / (levels + shift), depth, levels)
        wq = weight * q
        sum_q, sum_qq, sum_qx = total(wq), total(wq * q), total(wq * x)
        determinant = sum_w * sum_qq - sum_q * sum_q
        new_depth = divided(sum_q * sum_qx - sum_qq * sum_x, determinant)
        new_step = divided(sum_w * sum_qx - sum_q * sum_x, determinant)
        above = new_depth < 0  # it cannot be written: the best step without a depth, then
        new_step, new_depth = np.where(above, divided(sum_qx, sum_qq), new_step), np.maximum(new_depth, 0)
        new_error = total(weight * (new_step * q - new_depth - x) ** 2)
        better = (new_error < error) & (determinant > 0)
        step, depth, error = (np.where(better, *pair) for pair in
                              ((new_step, step), (new_depth, depth), (new_error, error)))
    return step, depth


def codes(x: ndarray, step: ndarray, depth: ndarray, levels: int) -> ndarray:
    """The whole numbers q for which step * q - depth is closest to x."""
    return rounded(divided(x + depth, step), 0, levels)


def in_fixed_point(values: ndarray) -> tuple[ndarray, ndarray]:
    """values (n, 8, 1), not negative, as unit (n, 1, 1), float16's, times whole numbers from 0 to 63."""
    unit = values.max(1, keepdims=True) / 63
    return as_float16(unit), rounded(divided(values, unit), 0, 63)


def least_squares(x: ndarray, weight: ndarray, a: ndarray, b: ndarray) -> tuple[ndarray, ndarray]:
    """d and m (n, 1, 1), float16's and not negative, that bring d a - m b closest to x over a block; both 0
    where a and b do not tell them apart."""
    def sums(y: ndarray) -> ndarray:
        return total((weight * y).reshape(-1, 1, BLOCK))

    aa, ab, bb, ax, bx = sums(a * a), sums(a * b), sums(b * b), sums(a * x), sums(b * x)
    determinant = aa * bb - ab * ab
    return tuple(as_float16(np.maximum(divided(part, determinant), 0))
                 for part in (bb * ax - ab * bx, ab * ax - aa * bx))


def pack_q45(d: ndarray, m: ndarray, s: ndarray, t: ndarray, q: ndarray, bits: int) -> ndarray:
    """The block: d, m, s and t in 12 bytes, of Q5_K the fifth bits in 32, the lower four bits in 128.

    s and t of the first four groups take the lower six bits of a byte each; of the last four, the lower four
    bits of s and t share a byte, and their upper two stand in the free bits of the first eight bytes.
    """
    s, t = s[:, :, 0].astype(np.uint8), t[:, :, 0].astype(np.uint8)  # (n, 8)
    scales = [s[:, :4] | (s[:, 4:] >> 4) << 6, t[:, :4] | (t[:, 4:] >> 4) << 6, s[:, 4:] & 15 | t[:, 4:] << 4]
    fifths = [np.packbits(q >> 4, axis=1, bitorder="little")[:, 0]] if bits == 5 else []  # (n, 32)
    q = q & 15
    lower = q[:, 0::2] | q[:, 1::2] << 4  # (n, 4, 32): of two groups, one above the other
    return np.concatenate([bytes_of(d), bytes_of(m), *scales, *fifths, lower.reshape(-1, 128)], axis=1)


def bytes_of(x: ndarray) -> ndarray:
    """(n, 1, 1) as float16, (n, 2) uint8."""
    return x.reshape(-1, 1).astype("<f2").view(np.uint8)


# ---- Q6_K -------------------------------------------------------------------------------------------------

def q6_k(blocks: ndarray) -> tuple[ndarray, ndarray]:
    """(n, 256) -> packed (n, 210) and values (n, 256)."""
    x = blocks.reshape(-1, 16, 16)
    step = symmetric_step(x)  # (n, 16, 1)
    largest = np.take_along_axis(step, abs(step).argmax(1, keepdims=True), axis=1)  # (n, 1, 1)
    d = as_float16(largest / -128)
    s = rounded(quotient(step, largest / -128), -128, 127)
    q = rounded(quotient(x, d * s), -32, 31)
    values = (d * s) * q
    return pack_q6(d, s, (q + 32).astype(np.uint8)), values.reshape(-1, BLOCK)


def symmetric_step(x: ndarray) -> ndarray:
    """The step (n, 16, 1), of either sign, for which step * q, with the best q of -32 to 31, is closest to x
    (n, 16, 16), in squares weighted by x^2. The largest weight is negative or made so: there is a level more.
    """
    outermost = np.take_along_axis(x, abs(x).argmax(-1, keepdims=True), axis=-1)
    step, gain = np.zeros_like(outermost), np.zeros_like(outermost)
    for shift in SHIFTS:
        q = rounded(quotient(x, outermost / -(32 + shift)), -32, 31)
        qx, qq = total(x * x * q * x), total(x * x * q * q)
        new_gain = divided(qx * qx, qq)  # by how much q, with the best step for it, reduces the error
        step = np.where(new_gain > gain, divided(qx, qq), step)
        gain = np.maximum(new_gain, gain)
    return step


def quotient(a: ndarray, b: ndarray) -> ndarray:
    """a / b, and 0 where b is 0."""
    return np.where(b != 0, a / np.where(b != 0, b, 1), 0)


def pack_q6(d: ndarray, s: ndarray, q: ndarray) -> ndarray:
    """The block: the lower four bits of q in 128 bytes, the upper two in 64, s in 16, d.

    Of each 128 weights, in four quarters, the first shares its bytes with the third and the second with the
    fourth; the upper bits of all four share a byte.
    """
    q = q.reshape(-1, 2, 4, 32)
    lower = (q & 15)[:, :, :2] | (q & 15)[:, :, 2:] << 4  # (n, 2, 2, 32)
    upper = q >> 4
    upper = upper[:, :, 0] | upper[:, :, 1] << 2 | upper[:, :, 2] << 4 | upper[:, :, 3] << 6  # (n, 2, 32)
    return np.concatenate([lower.reshape(-1, 128), upper.reshape(-1, 64),
                           s[:, :, 0].astype(np.int8).view(np.uint8), bytes_of(d)], axis=1)
