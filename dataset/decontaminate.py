"""Which texts overlap an evaluation item: by 13 equal words in a row, or as a near-duplicate.

    index = Index([("gsm8k_test", [("gsm8k_test.jsonl:1", "Janet's ducks lay 16 eggs per day. ...")])])
    index.find(["some text", "another"])    # [[], [{"benchmark", "item", "ngram": "the 13 words"}]]

Reading order of the decontamination files: eval_items.py (evaluation sets -> texts), words.py (texts -> words
and hashes), minhash.py (near-duplicate sets), and this file (the two rules, the index, the report).

Rule 1, equal words, is exact. An item of 14 words has two grams of 13, and one of them in a text is enough:

    item        w1 w2 w3 ... w13 w14
                [---- gram 1 ----]
                   [---- gram 2 ----]
    text    ... x  w2 w3 ... w13 w14 x ...        gram 2 is in the text: they overlap

A hash of the gram's first 8 and last 8 words proposes the match; then the words themselves are compared.

Rule 2, near-duplicates, compares passages: whole texts, paragraphs and, in the text that is searched, lines.

    item    [----------- whole -----------]
            [- paragraph -] [- paragraph -]
    text    [---------------- whole ---------------]
            [-- paragraph ---] [---- paragraph ----]
            [ line ] [ line  ] [ line ] [   line   ]

A passage is the set of its words and of its pairs of neighbouring words. Two passages are near-duplicates if
the Jaccard similarity J of their sets is at least 0.8, as MinHash estimates it. Example: a passage of 15
different words has 15 + 14 = 29 elements. Replace one word in its middle: one word and two pairs change, so
26 elements are shared, 32 are in either set, and J = 26 / 32 = 0.81.

Which rule finds an item depends on the length of the item, or of one of its paragraphs:

    words           13 or more         10 to 12             8 or 9         fewer
    equal words     any 13 in a row    all of them          no             no
    near-duplicate  yes                yes                  yes            no: `too_short` counts the items

Why these numbers. GPT-3 matches from 8 words on, but then four of 98 novels hold an item by chance ("Is there
anything I can do for you"); from 10 words on none does. If 2 % of the words of a passage are replaced, J is
0.94. Sets of five words in a row, which are common in the search for duplicates, are at 0.82 then, and the
estimate misses a quarter. Sets of single words find more, but also any text of the same words.

What is not found: an edited copy inside a longer line, if the edits leave no 13 words in a row (in 27 words
or more, that takes more than 2 %); translations; paraphrases. GPT-3 cut matches out of a text, and ignored 13
words that many texts share. Here the whole row is dropped, so one quotation costs a book.
"""

from collections.abc import Iterator
from typing import Any

import numpy as np

from dataset.minhash import BANDS, PERMUTATIONS, NearDuplicates, band_keys, lookup, signatures
from dataset.words import GOLDEN_RATIO_64, Words, chained, distinct, mixed, passages, runs, words_of

NGRAM = 13  # equal words in a row
WHOLE = 10  # words of the shortest item or paragraph that is searched as a whole; the longest has NGRAM - 1
PASSAGE = 8  # words of the shortest passage that is compared with others
THRESHOLD = 0.8  # Jaccard similarity of near-duplicates
KNOWN = 0.7  # share of a passage's pairs that must be in some item, before a signature is computed
SETTINGS = {"words": "lower case, no punctuation or symbols", "ngram": NGRAM, "whole": WHOLE,
            "shingles": "words and pairs of neighbours", "passage": PASSAGE, "threshold": THRESHOLD,
            "permutations": PERMUTATIONS, "bands": BANDS}
OVERLAPS = "overlaps an evaluation item"  # why a row is left out


# ---- Hashes of spans --------------------------------------------------------------------------------------

class Filter:
    """A Bloom filter of uint64 hashes: holds all of them, and about one in a hundred others. 16 to 32 bytes
    per hash."""

    def __init__(self, hashes: np.ndarray):
        """hashes: (n,) uint64. Their first and their last bits are two independent keys."""
        self.bits = min(32, max(10, (16 * len(hashes)).bit_length()))
        self.table = np.zeros(2**self.bits, dtype=bool)
        self.table[hashes >> (64 - self.bits)] = True
        self.table[hashes << 32 >> (64 - self.bits)] = True

    def may_hold(self, hashes: np.ndarray) -> np.ndarray:
        """(n,) uint64 -> (n,) bool."""
        result = self.table[hashes >> (64 - self.bits)]
        result[result] = self.table[hashes[result] << 32 >> (64 - self.bits)]  # where the first matched
        return result


def gram_keys(eights: np.ndarray, starts: np.ndarray, counts: np.ndarray) -> np.ndarray:
    """(n,) uint64: a hash of `counts` words (8 to 16) from each word of `starts` on.

    eights: (W,) uint64, of eight words from each word on. The first and the last eight of a gram overlap.
    """
    last = eights[starts + counts - 8]
    return mixed(mixed(eights[starts] + counts.astype(np.uint64)) * GOLDEN_RATIO_64 + last)


def passage_signatures(words: Words, pairs: np.ndarray, begins: np.ndarray,
                       lengths: np.ndarray) -> np.ndarray:
    """(P, PERMUTATIONS) uint32: the signatures of passages, as sets of words and of pairs of neighbours.

    pairs: (W,) uint64, of two words from each word on. begins, lengths: (P,) int64, in words.
    """
    # w0 w0w1 w1 w1w2 w2 ...: a passage of n words is 2n - 1 elements in a row
    elements = np.stack((words.hashes, pairs), axis=1).ravel()  # (2 W,) uint64
    chosen = elements[runs(2 * begins, 2 * lengths - 1)]
    return signatures((chosen >> 32).astype(np.uint32), 2 * lengths - 1)


# ---- Index ------------------------------------------------------------------------------------------------

class Index:
    """The items of some benchmarks, searchable. It does not change, so forked processes share its memory:
    about 50 bytes per word of the items, and 900 per passage."""

    def __init__(self, benchmarks: list[tuple[str, list[tuple[str, str]]]]):
        """benchmarks: (name, items) of each; an item is (place, text)."""
        self.names = [name for name, _ in benchmarks]
        self.places = [place for _, items in benchmarks for place, _ in items]
        # (items,) int64: the number of each item's benchmark
        self.benchmark = np.repeat(np.arange(len(benchmarks)), [len(items) for _, items in benchmarks])
        words = words_of(text for _, items in benchmarks for _, text in items)
        self.words = words._replace(hashes=None)
        pairs, eights = chained(words.hashes)  # (W,) uint64 each
        begins, ends = passages(words, PASSAGE, lines=False)  # (P,) int64 each
        self.add_grams(eights, begins, ends - begins)
        self.add_passages(words, pairs, begins, ends - begins)

    def add_grams(self, eights: np.ndarray, begins: np.ndarray, lengths: np.ndarray) -> None:
        """Index every gram of an item for rule 1, once per benchmark: NGRAM words, and its short passages."""
        short = (lengths >= WHOLE) & (lengths < NGRAM)
        starts = np.concatenate((np.flatnonzero(self.words.left() >= NGRAM), begins[short]))  # (G,) int64
        counts = np.append(np.full(len(starts) - short.sum(), NGRAM), lengths[short])  # (G,) words of each
        keys, owner = gram_keys(eights, starts, counts), self.benchmark_of(starts)
        order = np.lexsort((starts, owner, keys))
        keys, owner, starts = keys[order], owner[order], starts[order]
        # (G,) bool: the first gram with this key in this benchmark
        new = np.append(True, (np.diff(keys) != 0) | (np.diff(owner) != 0))[:len(keys)]
        self.keys, self.starts = keys[new], starts[new]  # sorted uint64; the first word of each gram
        self.counts = np.unique(counts)[::-1].tolist()  # the lengths that occur, longest first
        self.eights = Filter(eights[self.starts])

    def add_passages(self, words: Words, pairs: np.ndarray, begins: np.ndarray, lengths: np.ndarray) -> None:
        """Index every passage of an item for rule 2, once per benchmark."""
        signature, owner = passage_signatures(words, pairs, begins, lengths), self.benchmark_of(begins)
        # Equal signatures have equal band keys, so the sum of a passage's band keys stands for its signature.
        keys = np.stack((band_keys(signature).sum(axis=1), owner.astype(np.uint64)))  # (2, P) uint64
        new = np.sort(np.unique(keys, axis=1, return_index=True)[1])
        self.near, self.near_starts = NearDuplicates(signature[new], owner[new]), begins[new]
        self.pairs = Filter(distinct(pairs[runs(begins, lengths - 1)]))

    def item_of(self, starts: np.ndarray) -> np.ndarray:
        """The number of the item that each of these words is in, int64."""
        return np.searchsorted(self.words.bounds, starts, "right") - 1

    def benchmark_of(self, starts: np.ndarray) -> np.ndarray:
        """The number of the benchmark that each of these words is in, int64."""
        return self.benchmark[self.item_of(starts)]

    def find(self, texts: list[str]) -> list[list[dict[str, Any]]]:
        """The overlaps of each text: at most two per benchmark, one per rule.

        {"benchmark", "item": its place, "ngram": the equal words} and {"benchmark", "item", "minhash": the
        estimated similarity}.
        """
        words = words_of(texts)
        pairs, eights = chained(words.hashes)  # (W,) uint64 each
        overlaps: list[list[dict[str, Any]]] = [[] for _ in texts]
        for rule, matches in (("ngram", self.equal_grams(words, eights)),
                              ("minhash", self.near_duplicates(words, pairs))):
            for text, item, value in matches:
                name = self.names[self.benchmark[item]]
                overlaps[text].append({"benchmark": name, "item": self.places[item], rule: value})
        return overlaps

    def equal_grams(self, words: Words, eights: np.ndarray) -> Iterator[tuple[int, int, str]]:
        """Rule 1: (text, item, the equal words), the first match of each text and benchmark."""
        left, texts, seen = words.left(), words.texts(), set()
        at = np.flatnonzero(left >= WHOLE)  # words from which a gram can begin
        at = at[self.eights.may_hold(eights[at])]
        for count in self.counts:
            begins = at[left[at] >= count]
            there, first, repeats = lookup(self.keys, gram_keys(eights, begins, np.array(count)))
            begins, starts = np.repeat(begins[there], repeats), self.starts[runs(first, repeats)]
            items = self.item_of(starts)
            columns = (begins, starts, items, texts[begins], self.benchmark[items])
            for begin, start, item, text, owner in zip(*(column.tolist() for column in columns), strict=True):
                if (text, owner) not in seen:
                    equal = words.spelled(begin, count)
                    if equal == self.words.spelled(start, count):  # equal hashes are no proof
                        seen.add((text, owner))
                        yield text, item, equal.decode()

    def near_duplicates(self, words: Words, pairs: np.ndarray) -> Iterator[tuple[int, int, float]]:
        """Rule 2: (text, item, estimated similarity), the most similar item of each text and benchmark."""
        begins, ends = passages(words, PASSAGE, lines=True)  # (P,) int64 each
        lengths = ends - begins
        # At J = 0.8 most pairs of a passage are in the item. Passages with too few pairs of any item need no
        # signature, which saves nearly all of the work in unrelated text.
        known = np.cumsum(np.append(False, self.pairs.may_hold(pairs)))  # (W + 1,) known pairs before a word
        chosen = known[ends - 1] - known[begins] >= KNOWN * (lengths - 1)
        begins, lengths = begins[chosen], lengths[chosen]
        rows, sets, similarity = self.near.find(passage_signatures(words, pairs, begins, lengths), THRESHOLD)
        items, texts, seen = self.item_of(self.near_starts[sets]), words.texts()[begins[rows]], set()
        for i in np.argsort(-similarity, kind="stable").tolist():
            text, item = int(texts[i]), int(items[i])
            if (text, self.benchmark[item]) not in seen:
                seen.add((text, self.benchmark[item]))
                yield text, item, round(float(similarity[i]), 3)


# ---- Report -----------------------------------------------------------------------------------------------

def contamination(index: Index, removed: list[dict[str, Any]]) -> dict[str, Any]:
    """The content of contaminated.json: counts per benchmark, the removed rows, and the settings.

    removed: {"row": its place, "overlaps": as `Index.find` returns them} of each row that was left out.
    """
    lengths, counts = np.diff(index.words.bounds), {}  # (items,) words of each
    for number, name in enumerate(index.names):
        mine = index.benchmark == number  # (items,) bool
        rows = [[each for each in row["overlaps"] if each["benchmark"] == name] for row in removed]
        counts[name] = {"items": int(mine.sum()), "too_short": int((lengths[mine] < PASSAGE).sum()),
                        "documents": sum(map(bool, rows)),
                        "ngram": sum("ngram" in each for overlaps in rows for each in overlaps),
                        "minhash": sum("minhash" in each for overlaps in rows for each in overlaps)}
    return {"benchmarks": counts, "removed": removed, "settings": SETTINGS}


def report(counts: dict[str, dict[str, int]]) -> str:
    """One line per benchmark. counts: "benchmarks" of `contamination`."""
    lines = []
    for name, count in counts.items():
        note = f"; {count['too_short']:,} of its {count['items']:,} items are too short to be found"
        lines.append(f"overlap   {count['documents']:,} rows with {name}: {count['ngram']:,} by equal "
                     f"words, {count['minhash']:,} as near-duplicates{note if count['too_short'] else ''}")
    return "\n".join(lines)
