"""Which sets are nearly equal, without comparing each with each: MinHash signatures and their bands.

    known = NearDuplicates(signatures(elements, lengths), group)   # a set is its elements' hashes, uint32
    known.find(signatures(others, lengths), threshold=0.8)         # which others are like one of each group

A signature is the least element under each of 128 permutations. The share of equal entries of two signatures
estimates the Jaccard similarity J = |A & B| / |A | B| of their sets (Broder, "On the resemblance and
containment of documents", 1997) with a standard error of sqrt(J (1 - J) / 128): 0.035 at J = 0.8. Only sets
that agree in all 4 rows of one of 32 bands are compared (locality-sensitive hashing: Leskovec, Rajaraman and
Ullman, "Mining of Massive Datasets", 3.4). Two sets do so with a probability of

    1 - (1 - J^4)^32       J = 0.8: 1 - (1 - 0.4096)^32 = 1 - 4.7e-8       J = 0.3: 23 %       J = 0.1: 0.3 %

Fewer, longer bands compare fewer pairs in vain and miss more: 16 bands of 8 rows miss 5.3 % at J = 0.8. What
is compared in vain costs microseconds; what is missed stays.
"""

from collections.abc import Iterator

import numpy as np

from dataset.words import GOLDEN_RATIO_64, mixed, runs

PERMUTATIONS = 128
BANDS = 32  # of PERMUTATIONS / BANDS = 4 rows each
BLOCK = 2**15  # elements that are permuted at a time: they stay in the nearest cache
PAIRS = 2**16  # signatures that are compared at a time, a kilobyte each
# x -> x * multiplier mod 2^32 is a permutation where the multiplier is odd.
MULTIPLIERS = np.random.default_rng(1997).integers(2**32, size=PERMUTATIONS, dtype=np.uint32) | np.uint32(1)


def signatures(elements: np.ndarray, lengths: np.ndarray) -> np.ndarray:
    """The least element of each set under each permutation, as the permutation has it.

    elements: (sum of lengths,) uint32, hashes, set after set, equal ones count once; lengths: (sets,), none
    0. Returns (sets, PERMUTATIONS) uint32.
    """
    result = np.empty((len(lengths), PERMUTATIONS), np.uint32)
    ends = np.cumsum(lengths)
    for sets in blocks(lengths, BLOCK):
        begins = ends[sets] - lengths[sets]
        block = elements[begins[0]:ends[sets][-1]]
        permuted = np.empty_like(block)
        for column, multiplier in enumerate(MULTIPLIERS):
            np.multiply(block, multiplier, out=permuted)
            result[sets, column] = np.minimum.reduceat(permuted, begins - begins[0])
    return result


def band_keys(signature: np.ndarray) -> np.ndarray:
    """(sets, PERMUTATIONS) uint32 -> (sets, BANDS) uint64, equal where all rows of a band are."""
    rows = signature.reshape(len(signature), BANDS, PERMUTATIONS // BANDS)
    keys = np.broadcast_to(np.arange(BANDS, dtype=np.uint64), rows.shape[:2])
    for row in range(rows.shape[2]):
        keys = mixed(keys * GOLDEN_RATIO_64 + rows[:, :, row])
    return keys


class NearDuplicates:
    """Sets to be found again, 900 bytes each: a signature, and for each band its key and the set's number."""

    def __init__(self, signature: np.ndarray, group: np.ndarray):
        """signature: (sets, PERMUTATIONS); group: (sets,) what each belongs to, numbered from 0."""
        self.signature, self.group = signature, group
        keys = band_keys(signature).T
        order = np.argsort(keys, axis=1)  # (BANDS, sets)
        self.keys, self.sets = np.take_along_axis(keys, order, axis=1), order.astype(np.int32)

    def find(self, signature: np.ndarray, threshold: float) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """(rows of `signature`, sets, estimated similarities): for each row and group a set that shares a
        band with the row and is as similar as the threshold at least, the most similar one of that band."""
        found = [np.empty((3, 0))]
        done = np.zeros((len(signature), self.group.max(initial=0) + 1), dtype=bool)
        for band, keys in enumerate(band_keys(signature).T):
            places, begins, counts = lookup(self.keys[band], keys)
            for at in blocks(counts, PAIRS):
                rows = np.repeat(places[at], counts[at])
                sets = self.sets[band][runs(begins[at], counts[at])]
                new = ~done[rows, self.group[sets]]
                rows, sets = rows[new], sets[new]
                equal = (signature[rows] == self.signature[sets]).mean(axis=1)
                best = np.argsort(-equal, kind="stable")[:(equal >= threshold).sum()]
                first = np.unique(rows[best] * done.shape[1] + self.group[sets[best]], return_index=True)[1]
                rows, sets, equal = rows[best][first], sets[best][first], equal[best][first]
                done[rows, self.group[sets]] = True
                found.append(np.stack((rows, sets, equal)))
        rows, sets, similarity = np.concatenate(found, axis=1)
        return rows.astype(np.int64), sets.astype(np.int64), similarity


def lookup(known: np.ndarray, keys: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(which keys there are, where in the sorted `known` each begins, how often it stands there)."""
    order = np.argsort(keys)  # from neighbour to neighbour, the search stays in the cache
    begins = np.empty_like(order)
    begins[order] = np.searchsorted(known, keys[order])
    there = np.flatnonzero(begins < len(known))
    there = there[known[begins[there]] == keys[there]]
    return there, begins[there], np.searchsorted(known, keys[there], "right") - begins[there]


def blocks(sizes: np.ndarray, limit: int) -> Iterator[slice]:
    """Consecutive entries whose sizes sum to `limit` at the most, or one that is larger by itself."""
    ends, first = np.cumsum(sizes), 0
    while first < len(sizes):
        before = ends[first] - sizes[first]
        last = max(first + 1, int(np.searchsorted(ends, before + limit, "right")))
        yield slice(first, last)
        first = last
