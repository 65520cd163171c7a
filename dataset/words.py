"""Texts -> words and 64-bit hashes, for millions of words at a time. (Decontamination, file 2 of 4.)

    words = words_of(["It's 3.5 \u00d7 2.", "No, 7!"])
    words.spelled(0, 3), words.bounds          # b"its 35 2", [0, 3, 5]

Words are those of GPT-3's filter ("Language Models are Few-Shot Learners", arXiv 2005.14165, appendix C):
lower case, delimited by white space, without punctuation. Here symbols and control characters are dropped,
too, and each Chinese or Japanese character is a word by itself. Thai, Lao and Khmer have no spaces either but
are not cut: there, a phrase is one word.

Everything is a numpy array over all words of all texts, because a Python loop over words would be ten times
slower. Positions are int64 and hashes are uint64; a product or sum of uint64 arrays wraps around modulo 2^64,
as hashes need. One text of three words:

    position   0  1  2  3  4  5  6  7  8  9
    data       i  t  s  _  3  5  _  _  2  \\n     _ is a space
    begins     0           4           8         first byte of each word
    ends                3        6        9      byte after each word
"""

import functools
import re
import string
import unicodedata
from collections.abc import Iterable
from typing import NamedTuple

import numpy as np

ASCII = [chr(code) for code in range(128)]
# Punctuation and control characters are deleted. White space becomes a space, except line ends: they delimit
# lines and paragraphs.
PRINTED = [c for c in ASCII if c.isspace() or c.isprintable()]
DELETED = bytes(ord(c) for c in ASCII if c in string.punctuation or c not in PRINTED)
SPACES = "".join(c for c in ASCII if c.isspace() and c != "\n").encode()
FOLDED = bytes(range(256)).lower().translate(bytes.maketrans(SPACES, b" " * len(SPACES)))
IDEOGRAPH = re.compile("[\u2e80-\u9fff\uf900-\ufaff\U00020000-\U0003ffff]")  # includes kana
GOLDEN_RATIO_64 = 0x9E3779B97F4A7C15  # 2^64 / golden ratio, an odd number: a * it + b spreads small a and b
WEIGHTS = np.random.default_rng(13).integers(2**64, size=1024, dtype=np.uint64)  # by byte, for long words


class Words(NamedTuple):
    """Texts as their W words, text after text."""

    data: bytes  # the normalised texts, a line end after each
    begins: np.ndarray  # (W,) int64, position in data of each word's first byte
    ends: np.ndarray  # (W,) int64, position after its last byte
    bounds: np.ndarray  # (texts + 1,) int64; text i has the words bounds[i] ... bounds[i + 1] - 1
    hashes: np.ndarray | None  # (W,) uint64, `word_hashes`

    def spelled(self, begin: int, count: int) -> bytes:
        """`count` words from word `begin` on, with a space between them."""
        return b" ".join(self.data[self.begins[begin]:self.ends[begin + count - 1]].split())

    def texts(self) -> np.ndarray:
        """(W,) int64: the number of each word's text."""
        return np.repeat(np.arange(len(self.bounds) - 1), np.diff(self.bounds))

    def left(self) -> np.ndarray:
        """(W,) int64: the number of words from each word to the end of its text, itself included."""
        return np.repeat(self.bounds[1:], np.diff(self.bounds)) - np.arange(len(self.begins))


# ---- Arrays -----------------------------------------------------------------------------------------------

def runs(begins: np.ndarray, counts: np.ndarray) -> np.ndarray:
    """begins [3, 10], counts [2, 3] -> [3, 4, 10, 11, 12]."""
    ends = np.cumsum(counts)
    return np.repeat(begins - (ends - counts), counts) + np.arange(ends[-1] if len(ends) else 0)


def distinct(values: np.ndarray) -> np.ndarray:
    """Each value once, sorted. np.unique hashes instead (numpy 2.4), which takes ten times as long here."""
    values = np.sort(values)
    return values[np.append(True, values[1:] != values[:-1])[:len(values)]]


def mixed(values: np.ndarray) -> np.ndarray:
    """uint64 -> uint64, one to one, so that every bit of a result depends on all bits of its value.

    This is one of the two rounds of the mixer degski64, with its multiplier.
    """
    values = (values ^ (values >> 32)) * 0xD6E8FEB86659FD93
    return values ^ (values >> 32)


# ---- Texts -> words ---------------------------------------------------------------------------------------

@functools.lru_cache(2**16)
def folded(data: bytes) -> bytes:
    """`normalised` for the UTF-8 of characters beyond ASCII."""
    kept = []
    for character in data.decode("utf-8", "surrogatepass").lower():
        kind = unicodedata.category(character)[0]
        if kind in "LMN":  # letters, marks, numbers
            kept.append(f" {character} " if IDEOGRAPH.match(character) else character)
        elif kind == "Z" or character.isspace():  # separators
            kept.append(" ")
    return "".join(kept).encode()


def normalised(text: str) -> bytes:
    """UTF-8 of a text in lower case without punctuation and symbols: "It's 3.5 \u00d7 2" -> b"its 35  2"."""
    data = text.encode("utf-8", "surrogatepass")
    if not text.isascii():
        beyond = np.frombuffer(data, np.uint8) > 127  # (bytes,) bool
        edges = np.flatnonzero(np.diff(beyond, prepend=False, append=False))  # begin and end of each run
        pieces, at = [], 0
        for begin, end in edges.reshape(-1, 2).tolist():
            pieces += (data[at:begin], folded(data[begin:end]))
            at = end
        data = b"".join((*pieces, data[at:]))
    return data.translate(FOLDED, DELETED)


def word_hashes(data: bytes, begins: np.ndarray, ends: np.ndarray) -> np.ndarray:
    """(W,) uint64: a hash of each word's length, first eight bytes and last eight bytes.

    A word of more than 16 bytes adds the sum of its bytes, each times a random weight for its position.
    """
    # An overlapping view: eight[i] is the 8 bytes before data[i], as a little-endian number.
    eight = np.ndarray(len(data) + 9, "<u8", bytes(8) + data + bytes(8), strides=1)  # (bytes + 9,) uint64
    lengths = ends - begins  # (W,) int64
    others = 8 * np.maximum(8 - lengths, 0).astype(np.uint64)  # (W,) bits that are not of a short word
    first, last = eight[begins + 8] << others, eight[ends] >> others << others  # (W,) uint64, shifted out
    hashes = mixed(mixed(first * GOLDEN_RATIO_64 + lengths.astype(np.uint64)) * GOLDEN_RATIO_64 + last)
    long = np.flatnonzero(lengths > 16)  # (L,)
    if len(long):
        places = runs(np.zeros(len(long), np.int64), lengths[long])  # (letters,) 0 1 2 .. in each long word
        letters = np.frombuffer(data, np.uint8)[runs(begins[long], lengths[long])]  # (letters,) uint8
        starts = np.cumsum(lengths[long]) - lengths[long]  # (L,) where each word begins in letters
        hashes[long] = mixed(hashes[long] + np.add.reduceat(letters * WEIGHTS[places % len(WEIGHTS)], starts))
    return hashes


def words_of(texts: Iterable[str]) -> Words:
    """The words of some texts."""
    pieces = [normalised(text) for text in texts]
    data = b"\n".join([*pieces, b""])
    outside = np.frombuffer(data, np.uint8) <= ord(" ")  # (bytes,) bool: spaces and line ends
    edges = np.flatnonzero(np.diff(outside, prepend=True))  # begin, end, begin, end, ...
    begins, ends = edges[::2], edges[1::2]
    bounds = np.searchsorted(begins, np.cumsum([0] + [len(piece) + 1 for piece in pieces]))
    return Words(data, begins, ends, bounds, word_hashes(data, begins, ends))


# ---- Words -> spans of words ------------------------------------------------------------------------------

def passages(words: Words, shortest: int, lines: bool) -> tuple[np.ndarray, np.ndarray]:
    """(first words, words after the last), (P,) int64 each, of all passages of at least `shortest` words.

    A passage is a whole text, one of its paragraphs or, if `lines`, one of its lines. Each span of words is
    returned once, in order: a paragraph of one line is one passage.
    """
    line_ends = np.flatnonzero(np.frombuffer(words.data, np.uint8) == ord("\n"))
    breaks = np.diff(np.searchsorted(line_ends, words.begins), prepend=-2)  # (W,) line ends before each word
    breaks[words.bounds[:-1][np.diff(words.bounds) > 0]] = 2  # a text begins a paragraph
    begins, ends = [words.bounds[:-1]], [words.bounds[1:]]
    for least in (2, 1) if lines else (2,):
        starts = np.flatnonzero(breaks >= least)
        begins.append(starts)
        ends.append(np.append(starts, len(breaks))[1:])
    begins, ends = np.concatenate(begins), np.concatenate(ends)
    long = ends - begins >= shortest
    spans = distinct(begins[long] << 32 | ends[long])  # one int64 per span sorts faster than pairs
    return spans >> 32, spans & (2**32 - 1)


def chained(hashes: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(W,) uint64 of words -> (W,) uint64 of the two words and of the eight words from each word on.

    Doubling: a hash of n words is that of n / 2 words, combined with the one n / 2 words later. At the end of
    the array, missing words count as zeros.
    """
    by, results = hashes, []
    for step in (1, 2, 4):
        by = mixed(by * GOLDEN_RATIO_64 + np.append(by, np.zeros(step, np.uint64))[step:])
        results.append(by)  # of 2, 4, 8 words
    return results[0], results[2]
