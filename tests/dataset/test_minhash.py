"""dataset/minhash.py: estimates against exact similarities, bands against their probability, and the search
against comparing all pairs."""

import numpy as np
import pytest

from dataset.minhash import BANDS, PERMUTATIONS, NearDuplicates, band_keys, blocks, lookup, signatures


def pair_of(draw, similarity, size):
    """(a set, another set, their exact similarity): random hashes, `size` of them in the union."""
    union = draw.choice(2**32, size, replace=False).astype(np.uint32) if size < 100 else np.unique(
        draw.integers(2**32, size=size, dtype=np.uint32))  # fmt: skip
    draw.shuffle(union)
    shared = round(similarity * len(union))
    cut = shared + (len(union) - shared) // 2
    return union[:cut], np.concatenate((union[:shared], union[cut:])), shared / len(union)


def signed(sets):
    return signatures(np.concatenate(sets), np.array([len(each) for each in sets]))


@pytest.mark.parametrize("similarity", [0.1, 0.5, 0.8, 0.92])
@pytest.mark.parametrize("size", [20, 400])
def test_an_estimate_has_the_expected_mean_and_variance(similarity, size):
    """Mean of 2,000 estimates: within 4 standard errors of J. Variance: within 15 % of J (1 - J) / 128."""
    draw = np.random.default_rng(size)
    pairs = [pair_of(draw, similarity, size) for _ in range(2000)]
    left, right = signed([a for a, _, _ in pairs]), signed([b for _, b, _ in pairs])
    exact = np.array([exact for _, _, exact in pairs])
    error, variance = (left == right).mean(axis=1) - exact, exact[0] * (1 - exact[0]) / PERMUTATIONS
    assert abs(error.mean()) < 4 * np.sqrt(variance / 2000)
    assert error.var() == pytest.approx(variance, rel=0.15)


def test_a_signature_is_of_the_set(monkeypatch):
    """Order, repeats and the block size do not matter; a naive loop computes the same."""
    draw = np.random.default_rng(1)
    sets = [draw.integers(2**32, size=n, dtype=np.uint32) for n in (1, 7, 300, 2, 50)]
    expected = signed(sets)
    assert expected.shape == (5, PERMUTATIONS) and expected.dtype == np.uint32
    assert np.array_equal(signed([np.concatenate((each[::-1], each[:3])) for each in sets]), expected)
    monkeypatch.setattr("dataset.minhash.BLOCK", 8)
    assert np.array_equal(signed(sets), expected)
    from dataset.minhash import MULTIPLIERS
    for each, row in zip(sets, expected, strict=True):
        naive = [min(int(x) * int(a) % 2**32 for x in each) for a in MULTIPLIERS]
        assert naive == row.tolist()
    assert len(signatures(np.empty(0, np.uint32), np.empty(0, np.int64))) == 0


def test_sets_share_a_band_with_the_documented_probability():
    """1 - (1 - J^4)^32: J = 0.8 gives J^4 = 0.4096 and 0.5904^32 = 4.7e-8; 0.3, 0.0081 and 0.9919^32 = 0.771.
    """
    assert (BANDS, PERMUTATIONS // BANDS) == (32, 4)
    assert 0.8**4 == pytest.approx(0.4096) and (1 - 0.4096) ** 32 == pytest.approx(4.7e-8, rel=0.02)
    assert 1 - (1 - 0.3**4) ** 32 == pytest.approx(0.229, abs=0.001)
    draw = np.random.default_rng(2)
    for similarity, expected in ((0.8, 1.0), (0.5, 1 - (1 - 1 / 16) ** 32), (0.3, 0.229), (0.1, 0.0032)):
        pairs = [pair_of(draw, similarity, 500) for _ in range(1000)]
        left, right = band_keys(signed([a for a, _, _ in pairs])), band_keys(signed([b for _, b, _ in pairs]))
        share = (left == right).any(axis=1).mean()
        assert share == pytest.approx(expected, abs=4 * np.sqrt(expected * (1 - expected) / 1000) + 0.002)


def test_bands_are_equal_where_their_rows_are():
    draw = np.random.default_rng(3)
    one = draw.integers(2**32, size=(1, PERMUTATIONS), dtype=np.uint32)
    other = one.copy()
    other[0, 4 * 5 + 2] += 1  # of band 5
    assert np.flatnonzero(band_keys(one) != band_keys(other)).tolist() == [5]
    assert len(np.unique(band_keys(np.zeros((1, PERMUTATIONS), np.uint32)))) == BANDS  # bands differ


@pytest.mark.parametrize("pairs_at_a_time", [2**16, 5])
def test_finding_equals_comparing_all(monkeypatch, pairs_at_a_time):
    """Each set has at most one match in each of three groups, exactly where comparing all pairs has one."""
    monkeypatch.setattr("dataset.minhash.PAIRS", pairs_at_a_time)
    draw = np.random.default_rng(4)
    pairs = [pair_of(draw, similarity, 120) for similarity in np.linspace(0.5, 1, 60)]
    left, right = signed([a for a, _, _ in pairs] * 3), signed([b for _, b, _ in pairs])
    group = np.arange(180) % 7 % 3
    similarity = (right[:, None] == left[None]).mean(axis=2)  # (60, 180)
    expected = {(i, group[j]) for i, j in np.argwhere(similarity >= 0.8).tolist()}
    rows, sets, estimates = NearDuplicates(left, group).find(right, 0.8)
    assert set(zip(rows.tolist(), group[sets], strict=True)) == expected and len(rows) == len(expected) > 40
    assert estimates.tolist() == similarity[rows, sets].tolist() and estimates.min() >= 0.8
    for some, others in ((slice(0), slice(None)), (slice(None), slice(0))):
        assert not any(map(len, NearDuplicates(left[some], group[some]).find(right[others], 0.8)))


def test_the_most_similar_is_named():
    """The equal set is found among a hundred that are nearly equal and share most of its bands."""
    draw = np.random.default_rng(5)
    base = draw.integers(2**32, size=200, dtype=np.uint32)
    sets = [np.append(base, draw.integers(2**32, size=20, dtype=np.uint32)) for _ in range(100)]
    rows, found, similarity = NearDuplicates(signed(sets), np.zeros(100, int)).find(signed(sets[::-1]), 0.8)
    assert found.tolist() == (99 - rows).tolist() and similarity.tolist() == [1.0] * 100


def test_lookup_and_blocks_by_hand():
    known = np.array([1, 3, 3, 7], np.uint64)
    there, begins, counts = lookup(known, np.array([7, 2, 3, 9, 1], np.uint64))
    assert (there.tolist(), begins.tolist(), counts.tolist()) == ([0, 2, 4], [3, 1, 0], [1, 2, 1])
    sizes = np.array([2, 3, 9, 1, 1])
    assert [sizes[each].tolist() for each in blocks(sizes, 5)] == [[2, 3], [9], [1, 1]]
