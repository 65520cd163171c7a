"""Which texts overlap an evaluation item: as 13 equal words in a row, or as a near-duplicate.

    index = Index([("gsm8k_test", [("gsm8k_test.jsonl:1", "Janet's ducks lay 16 eggs per day. ...")])])
    index.find(["some text", "another"])    # [[], [{"benchmark", "item", "ngram": "the 13 words"}]]

Words are those of GPT-3's filter: lower case, no punctuation (dataset/words.py).

N-grams, exact. 13 words in a row of an item, anywhere in a text. A paragraph of an item, or a whole item, of
10 to 12 words counts where all of it stands in a row. (GPT-3 goes down to 8: four of 98 novels then hold an
item by chance, as "Is there anything I can do for you"; from 10 on none does.) Hashes only propose: what is
found has been compared word by word.

Near-duplicates. The sets of words and of pairs of neighbours, together, have a Jaccard similarity of 0.8,
as MinHash estimates it (dataset/minhash.py). A long text as a whole is like no short item, so the whole
text, each of its paragraphs and each of its lines, if they have 8 words, are held against the whole and
each paragraph of each item. A word that is replaced takes itself and two pairs along: where 2 % of the
words are, J is 0.94, and one word of 15 leaves 0.81. (Five words in a row, as is usual in the search for
duplicates, leave 0.82 at 2 %, and the estimate misses a quarter; single words find more, but any text of
the same words.)

What is not found: items of fewer than 8 words, such as a choice "yes" (`too_short` counts them); those of 8
and 9, unless they are a line by themselves; an edited copy inside a longer line whose edits leave no 13 words
in a row, which in 27 words or more takes more than 2 %; translations, paraphrases. GPT-3 cut matches out of
a text, and ignored 13 words that many texts share; here the whole text goes: one quotation costs a book.
"""

from collections.abc import Iterator
from typing import Any

import numpy as np

from dataset.minhash import BANDS, PERMUTATIONS, NearDuplicates, band_keys, lookup, signatures
from dataset.words import GOLDEN_RATIO_64, Words, chained, distinct, mixed, passages, runs, words_of

NGRAM = 13  # equal words in a row
WHOLE = 10  # words of the shortest paragraph or item that is looked for as a whole; the longest has NGRAM - 1
PASSAGE = 8  # words of the shortest passage that is compared with others
THRESHOLD = 0.8  # Jaccard similarity of near-duplicates
KNOWN = 0.7  # share of a passage's pairs that some item must have, before it is compared with any
SETTINGS = {"words": "lower case, no punctuation or symbols", "ngram": NGRAM, "whole": WHOLE,
            "shingles": "words and pairs of neighbours", "passage": PASSAGE, "threshold": THRESHOLD,
            "permutations": PERMUTATIONS, "bands": BANDS}
OVERLAPS = "overlaps an evaluation item"  # why a row is left out


class Filter:
    """Which hashes there may be: all that there are, and one of a hundred others. 16 to 32 bytes a hash."""

    def __init__(self, hashes: np.ndarray):
        """hashes: uint64, of which the first and the last 32 bits serve as two."""
        self.bits = min(32, max(10, (16 * len(hashes)).bit_length()))
        self.table = np.zeros(2**self.bits, dtype=bool)
        self.table[hashes >> (64 - self.bits)] = True
        self.table[hashes << 32 >> (64 - self.bits)] = True

    def may_hold(self, hashes: np.ndarray) -> np.ndarray:
        result = self.table[hashes >> (64 - self.bits)]
        result[result] = self.table[hashes[result] << 32 >> (64 - self.bits)]
        return result


class Index:
    """The items of some benchmarks, to be found in texts. It is made once and does not change, so processes
    that are forked share it: about 40 bytes a word of the items, and 900 a passage."""

    def __init__(self, benchmarks: list[tuple[str, list[tuple[str, str]]]]):
        """benchmarks: (name, its items: (place, text) each) of each."""
        self.names = [name for name, _ in benchmarks]
        self.places = [place for _, items in benchmarks for place, _ in items]
        self.benchmark = np.repeat(np.arange(len(benchmarks)), [len(items) for _, items in benchmarks])
        words = words_of(text for _, items in benchmarks for _, text in items)
        self.words = words._replace(begins=compact(words.begins), ends=compact(words.ends), hashes=None)
        pairs, eights = chained(words.hashes)
        begins, ends = passages(words, PASSAGE, lines=False)
        self.add_grams(eights, begins, ends - begins)
        self.add_passages(words, pairs, begins, ends - begins)

    def add_grams(self, eights: np.ndarray, begins: np.ndarray, lengths: np.ndarray) -> None:
        """Every NGRAM words in a row of an item, and its short passages: each once a benchmark."""
        short = (lengths >= WHOLE) & (lengths < NGRAM)
        starts = np.concatenate((np.flatnonzero(self.words.left() >= NGRAM), begins[short]))
        counts = np.append(np.full(len(starts) - short.sum(), NGRAM), lengths[short])
        keys, owner = gram_keys(eights, starts, counts), self.benchmark_of(starts)
        order = np.lexsort((starts, owner, keys))
        keys, owner, starts = keys[order], owner[order], starts[order]
        new = np.append(True, (np.diff(keys) != 0) | (np.diff(owner) != 0))[:len(keys)]
        self.keys, self.starts = keys[new], compact(starts[new])
        self.counts = np.unique(counts)[::-1].tolist()  # the lengths of grams that there are
        self.eights = Filter(eights[self.starts])

    def add_passages(self, words: Words, pairs: np.ndarray, begins: np.ndarray, lengths: np.ndarray) -> None:
        """Every passage, each once a benchmark."""
        signature = signed(words, pairs, begins, lengths)
        owner = self.benchmark_of(begins)
        names = np.stack((band_keys(signature).sum(axis=1), owner.astype(np.uint64)))
        new = np.sort(np.unique(names, axis=1, return_index=True)[1])
        self.near, self.near_starts = NearDuplicates(signature[new], owner[new]), begins[new]
        self.pairs = Filter(distinct(pairs[runs(begins, lengths - 1)]))

    def megabytes(self) -> float:
        """Of the arrays, which are nearly all of it."""
        parts = (*self.words, *(array for part in (self, self.near, self.eights, self.pairs)
                                for array in vars(part).values()))
        return sum(part.nbytes for part in parts if isinstance(part, np.ndarray)) / 1e6

    def item_of(self, starts: np.ndarray) -> np.ndarray:
        """The number of the item that each of these words is in."""
        return np.searchsorted(self.words.bounds, starts, "right") - 1

    def benchmark_of(self, starts: np.ndarray) -> np.ndarray:
        return self.benchmark[self.item_of(starts)]

    def find(self, texts: list[str]) -> list[list[dict[str, Any]]]:
        """The overlaps of each text, none or at most two with a benchmark: {"benchmark", "item": its place,
        "ngram": the words that are equal} and {"benchmark", "item", "minhash": the estimated similarity}."""
        words = words_of(texts)
        pairs, eights = chained(words.hashes)
        found: list[list[dict[str, Any]]] = [[] for _ in texts]
        for how, overlaps in (("ngram", self.equal_grams(words, eights)),
                              ("minhash", self.near_duplicates(words, pairs))):
            for text, item, value in overlaps:
                name = self.names[self.benchmark[item]]
                found[text].append({"benchmark": name, "item": self.places[item], how: value})
        return found

    def equal_grams(self, words: Words, eights: np.ndarray) -> Iterator[tuple[int, int, str]]:
        """(text, item, the words that are equal), the first of each text and benchmark."""
        left, texts, seen = words.left(), words.texts(), set()
        at = np.flatnonzero(left >= WHOLE)
        at = at[self.eights.may_hold(eights[at])]
        for count in self.counts:
            begins = at[left[at] >= count]
            keys = gram_keys(eights, begins, np.array(count))
            there, first, repeats = lookup(self.keys, keys)
            begins, starts = np.repeat(begins[there], repeats), self.starts[runs(first, repeats)]
            items = self.item_of(starts)
            columns = (begins, starts, items, texts[begins], self.benchmark[items])
            for begin, start, item, text, name in zip(*(column.tolist() for column in columns), strict=True):
                equal = (text, name) not in seen and words.spelled(begin, count)
                if equal and equal == self.words.spelled(start, count):
                    seen.add((text, name))
                    yield text, item, equal.decode()

    def near_duplicates(self, words: Words, pairs: np.ndarray) -> Iterator[tuple[int, int, float]]:
        """(text, item, estimated similarity), the most similar of each text and benchmark. Passages most of
        whose pairs no item has cannot be like one and cost no signature: nearly all of an unrelated text."""
        begins, ends = passages(words, PASSAGE, lines=True)
        known = np.cumsum(np.append(False, self.pairs.may_hold(pairs)))
        lengths = ends - begins
        chosen = known[ends - 1] - known[begins] >= KNOWN * (lengths - 1)
        begins, lengths = begins[chosen], lengths[chosen]
        rows, sets, similarity = self.near.find(signed(words, pairs, begins, lengths), THRESHOLD)
        items, texts = self.item_of(self.near_starts[sets]), words.texts()[begins[rows]]
        seen = set()
        for i in np.argsort(-similarity, kind="stable").tolist():
            text, item = int(texts[i]), int(items[i])
            if (text, self.benchmark[item]) not in seen:
                seen.add((text, self.benchmark[item]))
                yield text, item, round(float(similarity[i]), 3)


def compact(places: np.ndarray) -> np.ndarray:
    """As int32 where that will do."""
    return places.astype(np.int32) if places.max(initial=0) < 2**31 else places


def gram_keys(eights: np.ndarray, starts: np.ndarray, counts: np.ndarray) -> np.ndarray:
    """uint64 of `counts` words, 8 to 16, from each of `starts` on: its first eight and its last eight."""
    last = eights[starts + counts - 8]
    return mixed(mixed(eights[starts] + counts.astype(np.uint64)) * GOLDEN_RATIO_64 + last)


def signed(words: Words, pairs: np.ndarray, begins: np.ndarray, lengths: np.ndarray) -> np.ndarray:
    """The signatures of passages, as sets of words and of pairs of neighbours."""
    elements = np.stack((words.hashes, pairs), axis=1).ravel()  # (2 W,) a word, its pair with the next, ...
    chosen = elements[runs(2 * begins, 2 * lengths - 1)]
    return signatures((chosen >> 32).astype(np.uint32), 2 * lengths - 1)


class Removed:
    """What was left out for its overlaps, row by row, and how much of it for each benchmark."""

    def __init__(self, index: Index):
        lengths = np.diff(index.words.bounds)
        self.rows: list[dict[str, Any]] = []
        self.counts = {name: {"items": int((index.benchmark == number).sum()),
                              "too_short": int((lengths[index.benchmark == number] < PASSAGE).sum()),
                              "documents": 0, "ngram": 0, "minhash": 0}
                       for number, name in enumerate(index.names)}

    def count(self, place: str, overlaps: list[dict[str, Any]]) -> None:
        """A row by its place, and its overlaps as `Index.find` gives them."""
        self.rows.append({"row": place, "overlaps": overlaps})
        for name in {each["benchmark"] for each in overlaps}:
            self.counts[name]["documents"] += 1
        for each in overlaps:
            self.counts[each["benchmark"]]["ngram" if "ngram" in each else "minhash"] += 1

    def content(self) -> dict[str, Any]:
        """contaminated.json."""
        return {"benchmarks": self.counts, "removed": self.rows, "settings": SETTINGS}

    def report(self) -> str:
        """A line a benchmark."""
        return "\n".join(
            f"overlap {count['documents']:,} rows with {name}: {count['ngram']:,} by equal words, "
            f"{count['minhash']:,} as near-duplicates"
            + f"; {count['too_short']:,} of its {count['items']:,} items are too short to be found"
            * (count["too_short"] > 0) for name, count in self.counts.items())
