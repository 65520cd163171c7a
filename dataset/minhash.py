"""Which sets are nearly equal, without comparing all pairs: MinHash. (Decontamination, file 3 of 4.)

    known = NearDuplicates(signatures(elements, lengths), group)   # a set is the uint32 hashes of elements
    known.find(signatures(others, lengths), threshold=0.8)         # which of the others are like a known set

A signature has 128 numbers: the least element of the set under each of 128 permutations. The share of equal
numbers of two signatures estimates the Jaccard similarity J = |A & B| / |A | B| of their sets (Broder, "On
the resemblance and containment of documents", 1997) with a standard error of sqrt(J (1 - J) / 128), which is
0.035 at J = 0.8.

    signature    s0 s1 s2 s3 | s4 s5 s6 s7 | ... | s124 s125 s126 s127
    bands          band 0    |   band 1    | ... |       band 31

Only sets whose signatures agree in all 4 rows of at least one of 32 bands are compared (locality-sensitive
hashing: Leskovec, Rajaraman and Ullman, "Mining of Massive Datasets", 3.4). The probability of that is

    1 - (1 - J^4)^32       J = 0.8: 1 - (1 - 0.4096)^32 = 1 - 4.7e-8       J = 0.3: 23 %       J = 0.1: 0.3 %

Fewer, longer bands compare fewer unlike sets, but miss more: 16 bands of 8 rows miss 5.3 % at J = 0.8. A
needless comparison costs microseconds; a missed item stays in the data.
"""

from collections.abc import Iterator

import numpy as np

from dataset.words import GOLDEN_RATIO_64, mixed, runs

PERMUTATIONS = 128
BANDS = 32  # of PERMUTATIONS / BANDS = 4 rows each
BLOCK = 2**15  # elements that are permuted at a time: 128 KiB stay in the nearest cache
PAIRS = 2**16  # pairs of signatures that are compared at a time, a kilobyte per pair
# x -> x * multiplier mod 2^32 is a permutation of the uint32 numbers if the multiplier is odd.
MULTIPLIERS = np.random.default_rng(1997).integers(2**32, size=PERMUTATIONS, dtype=np.uint32) | np.uint32(1)


def blocks(sizes: np.ndarray, limit: int) -> Iterator[slice]:
    """Slices of consecutive entries whose sizes sum to at most `limit`; a larger entry is alone."""
    ends, first = np.cumsum(sizes), 0
    while first < len(sizes):
        before = ends[first] - sizes[first]
        last = max(first + 1, int(np.searchsorted(ends, before + limit, "right")))
        yield slice(first, last)
        first = last


def lookup(known: np.ndarray, keys: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Find keys in a sorted array of uint64, which may hold a value several times.

    Returns (positions in `keys` of those that are there, where each begins in `known`, how often it is
    there), int64 of equal lengths.
    """
    order = np.argsort(keys)  # sorted, each search lands near the last one, in the cache
    begins = np.empty_like(order)
    begins[order] = np.searchsorted(known, keys[order])
    there = np.flatnonzero(begins < len(known))
    there = there[known[begins[there]] == keys[there]]
    return there, begins[there], np.searchsorted(known, keys[there], "right") - begins[there]


def signatures(elements: np.ndarray, lengths: np.ndarray) -> np.ndarray:
    """(sets, PERMUTATIONS) uint32: the least permuted element of each set under each permutation.

    elements: (sum of lengths,) uint32, set after set; repeats within a set do not matter. lengths: (sets,)
    int64, none 0.
    """
    result = np.empty((len(lengths), PERMUTATIONS), np.uint32)
    ends = np.cumsum(lengths)
    for sets in blocks(lengths, BLOCK):
        begins = ends[sets] - lengths[sets]
        block = elements[begins[0]:ends[sets][-1]]  # (elements of these sets,) uint32
        permuted = np.empty_like(block)
        for column, multiplier in enumerate(MULTIPLIERS):
            np.multiply(block, multiplier, out=permuted)  # modulo 2^32
            result[sets, column] = np.minimum.reduceat(permuted, begins - begins[0])
    return result


def band_keys(signature: np.ndarray) -> np.ndarray:
    """(sets, PERMUTATIONS) uint32 -> (sets, BANDS) uint64, equal where all rows of a band are equal."""
    rows = signature.reshape(len(signature), BANDS, PERMUTATIONS // BANDS)  # (sets, BANDS, 4)
    keys = np.broadcast_to(np.arange(BANDS, dtype=np.uint64), rows.shape[:2])  # (sets, BANDS)
    for row in range(rows.shape[2]):
        keys = mixed(keys * GOLDEN_RATIO_64 + rows[:, :, row])
    return keys


class NearDuplicates:
    """Known sets. A set takes 900 bytes: 512 for its signature, and 12 per band for the band's key and the
    set's number."""

    def __init__(self, signature: np.ndarray, group: np.ndarray):
        """signature: (sets, PERMUTATIONS) uint32. group: (sets,) int64, the group of each set, from 0 on."""
        self.signature, self.group = signature, group
        keys = band_keys(signature).T  # (BANDS, sets) uint64
        order = np.argsort(keys, axis=1)  # (BANDS, sets)
        self.keys, self.sets = np.take_along_axis(keys, order, axis=1), order.astype(np.int32)

    def find(self, signature: np.ndarray, threshold: float) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """For each row of `signature`, (rows, PERMUTATIONS) uint32, at most one known set per group.

        The set shares a band with the row, and its estimated similarity is at least the threshold; it is the
        most similar one of the first such band. Returns (rows, sets, similarities), int64, int64, float64.
        """
        matches = [np.empty((3, 0))]
        done = np.zeros((len(signature), self.group.max(initial=0) + 1), dtype=bool)  # (rows, groups)
        for band, keys in enumerate(band_keys(signature).T):  # keys: (rows,) uint64
            places, begins, counts = lookup(self.keys[band], keys)
            for at in blocks(counts, PAIRS):  # a block bounds the memory where thousands of sets share a band
                rows = np.repeat(places[at], counts[at])  # (pairs,) int64
                sets = self.sets[band][runs(begins[at], counts[at])]  # (pairs,) int32
                new = ~done[rows, self.group[sets]]
                rows, sets = rows[new], sets[new]
                equal = (signature[rows] == self.signature[sets]).mean(axis=1)  # (pairs,) float64
                best = np.argsort(-equal, kind="stable")[:(equal >= threshold).sum()]
                # np.unique returns the first position of each (row, group): the most similar pair.
                first = np.unique(rows[best] * done.shape[1] + self.group[sets[best]], return_index=True)[1]
                rows, sets, equal = rows[best][first], sets[best][first], equal[best][first]
                done[rows, self.group[sets]] = True
                matches.append(np.stack((rows, sets, equal)))
        rows, sets, similarity = np.concatenate(matches, axis=1)
        return rows.astype(np.int64), sets.astype(np.int64), similarity
