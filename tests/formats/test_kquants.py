"""K-quants: blocks computed by hand, the values that the package gguf reads, and the rounding error."""

import gguf
import numpy as np
import pytest

from formats.kquants import BYTES, quantize

KINDS = list(BYTES)


def read(blocks, kind):
    return gguf.quants.dequantize(blocks, gguf.GGMLQuantizationType[kind])


def error(values, x):
    return float(((values - x) ** 2).sum() / (x**2).sum())


def rounded(x, kind):
    return read(quantize(x, kind), kind)


def normal(*shape, seed=0):
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def test_a_block_of_q4_k_by_hand():
    """d = m = 1/64. Group g has step d s[g] and depth m t[g]. Its weights take each of the 16 codes twice."""
    s = np.array([63, 32, 16, 8, 4, 2, 1, 48])
    t = np.array([0, 63, 1, 2, 3, 40, 50, 60])
    q = np.tile(np.arange(16), 2)
    x = (s[:, None] * q - t[:, None]) / 64
    blocks = quantize(x.reshape(1, 256).astype(np.float32), "Q4_K")
    assert read(blocks, "Q4_K").reshape(8, 32).tolist() == x.tolist()
    block = blocks[0].tolist()
    assert block[:4] == [0x00, 0x24, 0x00, 0x24]  # float16's 1/64, exponent 15 - 6 = 9: 9 << 10, twice
    upper = [4 >> 4, 2 >> 4, 1 >> 4, 48 >> 4], [3 >> 4, 40 >> 4, 50 >> 4, 60 >> 4]  # of the last four groups
    assert block[4:8] == [63 | upper[0][0] << 6, 32 | upper[0][1] << 6, 16 | upper[0][2] << 6,
                          8 | upper[0][3] << 6]
    assert block[8:12] == [0 | upper[1][0] << 6, 63 | upper[1][1] << 6, 1 | upper[1][2] << 6,
                           2 | upper[1][3] << 6]
    assert block[12:16] == [4 | 3 << 4, 2 | (40 & 15) << 4, 1 | (50 & 15) << 4, 0 | (60 & 15) << 4]
    assert block[16:] == [0x11 * code for code in range(16)] * 8  # a byte has the codes of two groups


def test_a_block_of_q5_k_by_hand():
    """The same with 32 codes: the fifth bits have bytes of their own, with one bit per group."""
    s, q = np.array([63, 32, 16, 8, 4, 2, 1, 48]), np.arange(32)
    x = (s[:, None] * q) / 64
    blocks = quantize(x.reshape(1, 256).astype(np.float32), "Q5_K")
    assert read(blocks, "Q5_K").reshape(8, 32).tolist() == x.tolist()
    block = blocks[0].tolist()
    assert block[16:48] == [0] * 16 + [255] * 16
    assert block[48:] == [0x11 * (code % 16) for code in range(32)] * 4


def test_a_block_of_q6_k_by_hand():
    """The largest step is 128/64. A signed byte can hold -128 but not 128, so d = -1/64."""
    steps = np.array([128, 64, 32, 16, 8, 4, 2, 1, 100, 50, 25, 12, 6, 3, 127, 7])
    q = np.r_[-32:-24, 24:32]
    x = steps[:, None] * q / 64
    blocks = quantize(x.reshape(1, 256).astype(np.float32), "Q6_K")
    assert read(blocks, "Q6_K").reshape(16, 16).tolist() == x.tolist()
    block = blocks[0]
    assert block[208:].tolist() == [0x00, 0xA4]  # float16's -1/64
    assert block[192:208].view(np.int8).tolist() == (-steps).tolist()
    codes = (q + 32).tolist()
    assert block[:16].tolist() == [code & 15 | (code & 15) << 4 for code in codes]
    assert block[128:144].tolist() == [0x55 * (code >> 4) for code in codes]


def test_a_block_of_q8_0_by_hand():
    """The package gguf makes it: d = 127/127 = 1 as float16, then the weights as signed bytes."""
    x = np.r_[-127:-95].astype(np.float32)
    block = gguf.quants.quantize(x, gguf.GGMLQuantizationType.Q8_0)
    assert block[:2].tolist() == [0x00, 0x3C]
    assert block[2:].view(np.int8).tolist() == list(range(-127, -95))


@pytest.mark.parametrize("kind, most", [("Q4_K", 0.09), ("Q5_K", 0.05), ("Q6_K", 0.02)])
def test_gguf_reads_what_is_close_to_awkward_rows(kind, most):
    """most: the largest error in a block of 256, as a part of its largest weight."""
    x = 0.02 * normal(60, 1024)
    x[:10] = [[0.0], [1.0], [-1.0], [1e-6], [-1e-9], [3e4], [-3e4], [1e-30], [0.5], [-0.5]]  # constant rows
    x[10] *= 1e6
    x[11] *= 1e-6
    x[12, 7] = 30.0
    x[13], x[14] = abs(x[13]), -abs(x[14])
    x[15, :300] = 0.0
    x[16] = np.random.default_rng(1).standard_t(1.5, 1024)
    with np.errstate(all="raise", under="ignore"):
        blocks = quantize(x, kind)
    assert blocks.shape == (60, 4 * BYTES[kind]) and blocks.dtype == np.uint8
    theirs = read(blocks, kind)
    errors, largest = (abs(each.reshape(-1, 256)).max(1) for each in (theirs - x, x))
    assert (errors <= most * largest + 1.1e-6).all()  # smaller rows have steps below float16's range


@pytest.mark.parametrize("kind, most", [("Q4_K", 0.0052), ("Q5_K", 0.0013), ("Q6_K", 0.00033)])
def test_the_error_on_normal_weights(kind, most):
    """One more bit quarters the squared error. Scaling the weights does not change the relative error."""
    x = normal(200, 256)
    assert most / 2 < error(rounded(x, kind), x) < most
    scaled = error(rounded(1e-2 * x, kind), 1e-2 * x)
    assert scaled == pytest.approx(error(rounded(x, kind), x), rel=0.02)


def test_searching_pays():
    """Compared with the simplest quantiser, which divides the range of each group into equal steps."""
    x = normal(200, 256).reshape(-1, 32)
    low, high = x.min(1, keepdims=True), x.max(1, keepdims=True)
    step = (high - low) / 15
    plain = np.rint((x - low) / step) * step + low  # and scales in float32
    assert error(rounded(x.reshape(-1, 256), "Q4_K").reshape(-1, 32), x) < 0.92 * error(plain, x)


@pytest.mark.parametrize("kind", KINDS)
def test_chunks_do_not_change_the_result(kind, monkeypatch):
    x = normal(7, 512)
    whole = quantize(x, kind)
    monkeypatch.setattr("formats.kquants.CHUNK", 3)
    parts = quantize(x, kind)
    assert np.array_equal(whole, parts)
