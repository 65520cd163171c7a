"""Texts as words that can be compared by the million: normalised, and each with its hash.

    words = words_of(["It's 3.5 \u00d7 2.", "No, 7!"])
    words.spelled(0, 3), words.bounds          # b"its 35 2", [0, 3, 5]

Words are those of GPT-3's filter ("Language Models are Few-Shot Learners", arXiv 2005.14165, appendix C):
lower case, delimited by white space, without punctuation. Here symbols and control characters go as well, and
a Chinese or Japanese character is a word by itself. (Thai, Lao and Khmer, which have no spaces either, are
not cut: there, a phrase is a word.) Everything is an array over the words of many texts: a text at a time, or
a word, Python would be ten times slower.
"""

import functools
import re
import string
import unicodedata
from collections.abc import Iterable
from typing import NamedTuple

import numpy as np

# Of ASCII: what is deleted, and what the rest becomes. Line ends stay: they delimit lines and paragraphs.
DELETED = bytes(code for code in range(128) if chr(code) in string.punctuation or not (
    chr(code).isspace() or chr(code).isprintable()))
FOLDED = bytes(code if code == ord("\n") or code > 127 else ord(" ") if chr(code).isspace() else
               ord(chr(code).lower()) for code in range(256))
IDEOGRAPH = re.compile("[\u2e80-\u9fff\uf900-\ufaff\U00020000-\U0003ffff]")  # kana are among them
GOLDEN_RATIO_64 = 0x9E3779B97F4A7C15  # 2^64 over the golden ratio: multiplies sums apart
WEIGHTS = np.random.default_rng(13).integers(2**64, size=1024, dtype=np.uint64)  # of the bytes of a long word


class Words(NamedTuple):
    """Texts as their W words, one text behind the other."""

    data: bytes  # the normalised texts, a line end behind each
    begins: np.ndarray  # (W,) where each word begins in data
    ends: np.ndarray  # (W,)
    bounds: np.ndarray  # (texts + 1,) a text's words are those from its bound to the next
    hashes: np.ndarray | None  # (W,) uint64

    def spelled(self, begin: int, count: int) -> bytes:
        """Some words in a row, a space between them."""
        return b" ".join(self.data[self.begins[begin]:self.ends[begin + count - 1]].split())

    def texts(self) -> np.ndarray:
        """(W,) the number of each word's text."""
        return np.repeat(np.arange(len(self.bounds) - 1), np.diff(self.bounds))

    def left(self) -> np.ndarray:
        """(W,) how many words its text has from each one on."""
        return np.repeat(self.bounds[1:], np.diff(self.bounds)) - np.arange(len(self.begins))


def normalised(text: str) -> bytes:
    """UTF-8 of a text in lower case without punctuation and symbols: "It's 3.5 \u00d7 2" -> b"its 35  2"."""
    data = text.encode("utf-8", "surrogatepass")
    if not text.isascii():
        inside = np.frombuffer(data, np.uint8) > 127
        edges = np.flatnonzero(np.diff(inside, prepend=False, append=False))  # of runs beyond ASCII
        pieces, at = [], 0
        for begin, end in edges.reshape(-1, 2).tolist():
            pieces += (data[at:begin], folded(data[begin:end]))
            at = end
        data = b"".join((*pieces, data[at:]))
    return data.translate(FOLDED, DELETED)


@functools.lru_cache(2**16)
def folded(data: bytes) -> bytes:
    """The same for a run of characters beyond ASCII."""
    kept = []
    for character in data.decode("utf-8", "surrogatepass").lower():
        kind = unicodedata.category(character)[0]  # letters, marks, numbers; separators; and the rest
        if kind in "LMN":
            kept.append(f" {character} " if IDEOGRAPH.match(character) else character)
        elif kind == "Z" or character.isspace():
            kept.append(" ")
    return "".join(kept).encode()


def words_of(texts: Iterable[str]) -> Words:
    """The words of some texts."""
    pieces = [normalised(text) for text in texts]
    data = b"\n".join([*pieces, b""])
    outside = np.frombuffer(data, np.uint8) <= ord(" ")
    edges = np.flatnonzero(np.diff(outside, prepend=True))  # the last text ends in white space, too
    begins, ends = edges[::2], edges[1::2]
    bounds = np.searchsorted(begins, np.cumsum([0] + [len(piece) + 1 for piece in pieces]))
    return Words(data, begins, ends, bounds, word_hashes(data, begins, ends))


def word_hashes(data: bytes, begins: np.ndarray, ends: np.ndarray) -> np.ndarray:
    """(W,) uint64 of each word: of its length and its first and last eight bytes, and if these are not all of
    it, of the sum of its bytes, each times a weight for its place."""
    eight = np.ndarray(len(data) + 9, "<u8", bytes(8) + data + bytes(8), strides=1)  # i: the 8 bytes before i
    lengths = ends - begins
    others = 8 * np.maximum(8 - lengths, 0).astype(np.uint64)  # bits that belong to a short word's neighbours
    first, last = eight[begins + 8] << others, eight[ends] >> others << others
    hashes = mixed(mixed(first * GOLDEN_RATIO_64 + lengths.astype(np.uint64)) * GOLDEN_RATIO_64 + last)
    long = np.flatnonzero(lengths > 16)
    if len(long):
        places = runs(np.zeros(len(long), np.int64), lengths[long])
        letters = np.frombuffer(data, np.uint8)[runs(begins[long], lengths[long])]
        starts = np.cumsum(lengths[long]) - lengths[long]
        hashes[long] = mixed(hashes[long] + np.add.reduceat(letters * WEIGHTS[places % len(WEIGHTS)], starts))
    return hashes


def passages(words: Words, shortest: int, lines: bool) -> tuple[np.ndarray, np.ndarray]:
    """(first words, words behind the last) of every text, paragraph and, if asked, line of so many words at
    least, in order."""
    ends_of_lines = np.flatnonzero(np.frombuffer(words.data, np.uint8) == ord("\n"))
    breaks = np.diff(np.searchsorted(ends_of_lines, words.begins), prepend=-2)  # (W,) line ends before a word
    breaks[words.bounds[:-1][np.diff(words.bounds) > 0]] = 2  # as many as end a paragraph
    begins, ends = [words.bounds[:-1]], [words.bounds[1:]]
    for least in (2, 1)[:1 + lines]:
        starts = np.flatnonzero(breaks >= least)
        begins.append(starts)
        ends.append(np.append(starts, len(breaks))[1:])
    begins, ends = np.concatenate(begins), np.concatenate(ends)
    long = ends - begins >= shortest
    spans = distinct(begins[long] << 32 | ends[long])  # a paragraph of one line is one passage
    return spans >> 32, spans & (2**32 - 1)


def chained(hashes: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(W,) words -> (W,) hashes of two and of eight words from each on; the last ones see zeros."""
    by, results = hashes, []
    for step in (1, 2, 4):
        by = mixed(by * GOLDEN_RATIO_64 + np.append(by, np.zeros(step, np.uint64))[step:])
        results.append(by)
    return results[0], results[2]


def distinct(values: np.ndarray) -> np.ndarray:
    """Each value once, sorted: what np.unique does by hashing (numpy 2.4), in a tenth of its time."""
    values = np.sort(values)
    return values[np.append(True, values[1:] != values[:-1])[:len(values)]]


def mixed(values: np.ndarray) -> np.ndarray:
    """uint64 -> uint64, one to one, every bit depending on all: makes hashes of sums and products."""
    values = (values ^ (values >> 32)) * 0xD6E8FEB86659FD93
    return values ^ (values >> 32)


def runs(begins: np.ndarray, counts: np.ndarray) -> np.ndarray:
    """begins [3, 10], counts [2, 3] -> [3, 4, 10, 11, 12]."""
    ends = np.cumsum(counts)
    return np.repeat(begins - (ends - counts), counts) + np.arange(ends[-1] if len(ends) else 0)
