"""Which documents are worth training on: published rules about form, and near-duplicates within a corpus.

    rules = chosen_rules("gopher,fineweb", off="long_document")
    first_failure("a text", rules)                       # ("short_document", 2), or None for a good text
    seen = SeenDocuments(threshold=0.8)
    seen.add(places, document_signatures(texts))         # per text: None, or what it is a near-duplicate of

"gopher" is the quality filter and the repetition filter of Rae et al., "Scaling Language Models", arXiv
2112.11446, A1.1 and table A1. "fineweb" is the filter that Penedo et al. add to Gopher's, "The FineWeb
Datasets", arXiv 2406.17557, 3.6, and the rule "newlines", which only their code has. The rules were made for
English web pages. Other text needs some of them switched off: a book is a long_document.

A word is what white space delimits. Blank lines, and white space at the end of a line, do not count. The
characters of a top_n_gram include the spaces between its words; those of duplicate_n_grams do not.

Near-duplicates are documents whose sets of five consecutive words have an estimated Jaccard similarity of at
least the threshold (dataset/minhash.py). Documents of fewer than five words are not compared. Left out:
equal passages within different documents, and classifiers.
"""

import re
from collections import Counter
from collections.abc import Iterator

import numpy as np

from configurator import UserError
from dataset.minhash import PERMUTATIONS, NearDuplicates, band_keys, signatures
from dataset.words import GOLDEN_RATIO_64, mixed, runs, words_of

ANY = float("inf")
# {rule: (least, greatest value of a good document)}. Values are shares unless the rule counts something.
GOPHER = {"short_document": (50, ANY), "long_document": (0, 100_000),  # words with a letter or digit
          "word_length": (3, 10),  # characters, the mean of these words
          "hashes": (0, 0.1), "ellipses": (0, 0.1),  # per word
          "bullet_lines": (0, 0.9), "ellipsis_lines": (0, 0.3),
          "alphabetic_words": (0.8, 1), "stop_words": (2, ANY),  # different stop words
          "duplicate_paragraphs": (0, 0.3), "duplicate_paragraph_characters": (0, 0.2),
          "duplicate_lines": (0, 0.3), "duplicate_line_characters": (0, 0.2),
          "top_2_gram": (0, 0.2), "top_3_gram": (0, 0.18), "top_4_gram": (0, 0.16),
          "duplicate_5_grams": (0, 0.15), "duplicate_6_grams": (0, 0.14), "duplicate_7_grams": (0, 0.13),
          "duplicate_8_grams": (0, 0.12), "duplicate_9_grams": (0, 0.11), "duplicate_10_grams": (0, 0.1)}
FINEWEB = {"punctuated_lines": (0.12, 1), "short_lines": (0, 0.67), "repeated_line_characters": (0, 0.1),
           "newlines": (0, 0.3)}  # per word
STOP_WORDS = {"the", "be", "to", "of", "and", "that", "have", "with"}
ELLIPSES = ("...", "\u2026")
# C4's: a period, an exclamation mark, a question mark, or a closing quotation mark; here, also full-width.
SENTENCE_ENDS = tuple(".!?\"'\u201d\u2019\u00bb\u2026\u3002\uff01\uff1f")
SHORT_LINE = 30  # characters
SHINGLE = 5  # words, as in FineWeb

Limits = dict[str, tuple[float, float]]


# ---- Rules ------------------------------------------------------------------------------------------------

def chosen_rules(names: str | None, off: str = "") -> Limits:
    """The rules of the sets in `names` without those in `off`. Raises UserError for an unknown rule."""
    rules = (GOPHER if "gopher" in (names or "") else {}) | (FINEWEB if "fineweb" in (names or "") else {})
    left_out = off.split(",") if off else []
    for rule in left_out:
        if rule not in rules:
            raise UserError(f"quality_off={off}: no rule {rule!r} in quality={names}: {', '.join(rules)}")
    return {rule: limits for rule, limits in rules.items() if rule not in left_out}


def lines_of(text: str) -> list[str]:
    """The lines that are not blank, without the white space at their ends."""
    return [line for line in map(str.rstrip, text.split("\n")) if line]


def repeats(parts: list[str]) -> tuple[int, int]:
    """(number of parts that are equal to an earlier one, their characters)."""
    counts = Counter(parts)
    return len(parts) - len(counts), sum((count - 1) * len(part) for part, count in counts.items())


def fineweb_values(text: str) -> Iterator[tuple[str, float]]:
    """(rule, value) for each of FINEWEB."""
    lines = lines_of(text)
    yield "punctuated_lines", sum(line.endswith(SENTENCE_ENDS) for line in lines) / len(lines)
    yield "short_lines", sum(len(line) <= SHORT_LINE for line in lines) / len(lines)
    yield "repeated_line_characters", repeats(lines)[1] / sum(map(len, lines))
    yield "newlines", text.count("\n") / len(text.split())


def repeated_characters(at: np.ndarray, grams: np.ndarray, characters: np.ndarray, n: int) -> int:
    """The characters of the grams that occurred before, each character counted once.

    A gram that overlaps a counted one is skipped. Example with pairs, in "a a a a a a": the pair at word 0 is
    new, the pairs at words 1 and 3 are counted, and those at words 2 and 4 overlap them.
    """
    total, end, seen = 0, 0, set()
    for begin, gram, size in zip(at.tolist(), grams.tolist(), characters.tolist(), strict=True):
        if begin >= end and gram in seen:
            total, end = total + size, begin + n
        elif begin >= end:
            seen.add(gram)
    return total


def gram_values(ids: np.ndarray, lengths: np.ndarray) -> Iterator[tuple[str, int]]:
    """(rule, characters) for 2 to 10 words in a row, until no such gram occurs twice.

    ids, lengths: (W,) int64, which word each is and how many characters it has.
    """
    ends = np.append(0, np.cumsum(lengths))  # (W + 1,) characters before each word
    at, grams = np.arange(len(ids)), ids.astype(np.uint64)  # first word and hash of each gram
    for n in range(2, 11):
        # A gram can only occur twice where its first n - 1 words do, so few grams are left from n = 5 on.
        at = at[:np.searchsorted(at, len(ids) - n, "right")]
        grams = mixed(grams[:len(at)] * GOLDEN_RATIO_64 + ids[at + n - 1].astype(np.uint64))
        _, which, counts = np.unique(grams, return_inverse=True, return_counts=True)
        counts = counts[which]  # (grams,) of each gram
        at, grams, counts = at[counts > 1], grams[counts > 1], counts[counts > 1]
        if not len(at):
            return
        characters = ends[at + n] - ends[at]
        if n < 5:
            first = counts.argmax()  # of equally frequent grams, the first in the text
            yield f"top_{n}_gram", counts[first] * (characters[first] + n - 1)
        else:
            yield f"duplicate_{n}_grams", repeated_characters(at, grams, characters, n)


def gopher_values(text: str) -> Iterator[tuple[str, float]]:
    """(rule, value) for each of GOPHER; `gram_values` may leave out zeros."""
    words, lines = text.split(), lines_of(text)
    numbers = {word: number for number, word in enumerate(dict.fromkeys(words))}  # of each different word
    ids = np.array([numbers[word] for word in words])  # (W,)
    lengths = np.array([*map(len, numbers)])[ids]  # (W,) characters
    counted = np.array([any(map(str.isalnum, word)) for word in numbers])[ids]  # (W,) bool: not only signs
    yield "short_document", counted.sum()
    yield "long_document", counted.sum()
    yield "word_length", lengths[counted].sum() / max(counted.sum(), 1)
    yield "hashes", text.count("#") / len(words)
    yield "ellipses", sum(map(text.count, ELLIPSES)) / len(words)
    yield "bullet_lines", sum(line.lstrip().startswith(("\u2022", "-")) for line in lines) / len(lines)
    yield "ellipsis_lines", sum(line.endswith(ELLIPSES) for line in lines) / len(lines)
    yield "alphabetic_words", np.array([any(map(str.isalpha, word)) for word in numbers])[ids].mean()
    yield "stop_words", len(STOP_WORDS & numbers.keys())
    paragraphs = re.split(r"(?:\r?\n){2,}", text.strip())  # Windows ends lines with \r\n
    for name, parts in ("paragraph", paragraphs), ("line", lines):
        count, characters = repeats(parts)
        yield f"duplicate_{name}s", count / len(parts)
        yield f"duplicate_{name}_characters", characters / len(text)
    for rule, characters in gram_values(ids, lengths):
        yield rule, characters / len(text)


def first_failure(text: str, rules: Limits) -> tuple[str, float] | None:
    """(rule, value) of the first rule that the text violates, or None."""
    for values, own in (fineweb_values, FINEWEB), (gopher_values, GOPHER):
        for rule, value in values(text) if own.keys() & rules.keys() else ():
            least, greatest = rules.get(rule, (-ANY, ANY))
            if not least <= value <= greatest:
                return rule, round(float(value), 4)
    return None


# ---- Near-duplicates --------------------------------------------------------------------------------------

def document_signatures(texts: list[str]) -> np.ndarray:
    """(texts, PERMUTATIONS) uint32: the MinHash signature of each text; zeros if it is too short for one."""
    words = words_of(texts)
    count = max(len(words.begins) - SHINGLE + 1, 0)
    grams = words.hashes[:count]  # (count,) uint64
    for later in range(1, SHINGLE):
        grams = mixed(grams * GOLDEN_RATIO_64 + words.hashes[later:later + count])
    lengths = np.maximum(np.diff(words.bounds) - SHINGLE + 1, 0)  # (texts,) grams within each text
    long = np.flatnonzero(lengths)
    chosen = grams[runs(words.bounds[long], lengths[long])]
    result = np.zeros((len(texts), PERMUTATIONS), np.uint32)
    result[long] = signatures((chosen >> 32).astype(np.uint32), lengths[long])
    return result


class SeenDocuments:
    """The documents that were kept, searchable for near-duplicates. One takes 900 bytes and its place."""

    def __init__(self, threshold: float):
        """threshold: the least estimated similarity of near-duplicates, 0.5 to 1."""
        self.threshold = threshold
        self.places: list[str] = []
        self.parts: list[NearDuplicates] = []  # consecutive documents; each part is much larger than the next

    def add(self, places: list[str], signature: np.ndarray) -> list[str | None]:
        """Add documents that are no near-duplicates of documents added before, in this call or earlier.

        signature: (documents, PERMUTATIONS) uint32. Returns None for each document that was added; for the
        others, the place of the earlier document and the similarity. How documents are split into calls does
        not matter.
        """
        found: list[str | None] = [None] * len(places)
        begin = 0
        for part in self.parts:
            for row, known, similarity in zip(*part.find(signature, self.threshold), strict=True):
                found[row] = f"{self.places[begin + known]} ({similarity:.2f})"
            begin += len(part.signature)
        recent: dict[int, list[int]] = {}  # {key of a band: documents of this call that were added}
        for row, keys in enumerate(band_keys(signature).tolist()):
            others = sorted({other for key in keys for other in recent.get(key, ())})
            similar = (signature[others] == signature[row]).mean(axis=1)  # (others,) float64
            if found[row] is None and similar.max(initial=0) >= self.threshold:
                found[row] = f"{places[others[similar.argmax()]]} ({similar.max():.2f})"
            elif found[row] is None:
                for key in keys:
                    recent.setdefault(key, []).append(row)
        new = [row for row in range(len(places)) if found[row] is None]
        self.places += [places[row] for row in new]
        self.append(signature[new])
        return found

    def append(self, signature: np.ndarray) -> None:
        """Index added documents. Merging parts of similar size keeps their number logarithmic."""
        while self.parts and len(self.parts[-1].signature) < 2 * len(signature):
            signature = np.concatenate((self.parts.pop().signature, signature))
        if len(signature):
            self.parts.append(NearDuplicates(signature, np.zeros(len(signature), np.int64)))
