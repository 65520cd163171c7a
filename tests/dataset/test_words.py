"""dataset/words.py: what a word is, against plain Python; hashes are equal exactly where words are."""

import random
import unicodedata

import numpy as np
import pytest

from dataset.words import chained, normalised, passages, runs, word_hashes, words_of


def plain_words(text):
    """The definition of words, one character at a time."""
    kept = []
    for character in text.lower():
        kind = unicodedata.category(character)[0]
        if character.isspace() or kind == "Z":
            kept.append(" ")
        elif kind in "LMN":
            wide = "\u2e80" <= character <= "\u9fff"
            kept.append(f" {character} " if wide else character)
    return "".join(kept).split()


@pytest.mark.parametrize(
    "text, words",
    [
        ("It's 3.5 \u00d7 2 = 7!", "its 35 2 7"),
        ("a\tb\r\nc\u00a0d\u2028e\x0bf", "a b c d e f"),
        ("well-known, yes/no; x_1 <<48/2=24>>24 a * b", "wellknown yesno x1 4822424 a b"),
        ("\u201cJanet\u2019s\u201d ducks \u2014 16", "janets ducks 16"),
        ("\u00c4RGER na\u00efve \u0414\u0410 \ufb01t", "\u00e4rger na\u00efve \u0434\u0430 \ufb01t"),
        ("\u4ed6\u6709 5 \u4e2a\u82f9\u679c\u3002", "\u4ed6 \u6709 5 \u4e2a \u82f9 \u679c"),
        ("a\x00b\u200bc\u00ad \ud800 .", "abc"),
        ("... !? \u2026", ""),
        ("", ""),
    ],
)
def test_words_by_hand(text, words):
    assert normalised(text).decode().split() == words.split() == plain_words(text)


def test_words_are_those_of_the_definition():
    draw = random.Random(0)
    alphabet = ("abcXYZ 019 \n\n\t.,'-_=<\x07\u00a0\u2028\u00e9\u00c9\u2019\u201c\u4e2d\u3042\u0414\u0301"
                "\u20ac\U0001f600\u0e01")
    texts = ["".join(draw.choices(alphabet, k=draw.randrange(60))) for _ in range(3000)] + ["", "x", "x" * 70]
    words = words_of(texts)
    expected = [plain_words(text) for text in texts]
    assert np.diff(words.bounds).tolist() == [len(each) for each in expected]
    flat = [word.encode() for each in expected for word in each]
    found = [words.data[b:e] for b, e in zip(words.begins, words.ends, strict=True)]
    assert found == flat and len(set(words.hashes.tolist())) == len(set(flat))
    assert words.texts().tolist() == [number for number, each in enumerate(expected) for _ in each]
    assert words.left().tolist() == [len(each) - i for each in expected for i in range(len(each))]
    at = words.bounds[7]
    assert words.spelled(at, 3) == b" ".join(flat[at : at + 3])


def test_hashes_are_equal_where_words_are_and_nowhere_else():
    """Also for words of equal beginning, end and length that differ in one byte or the order of two."""
    base = b"0123456789abcdefghijklmnopqrstuv"
    words = {base[:length] for length in range(1, 33)}
    words |= {base[:i] + b"_" + base[i + 1 :] for i in range(32)}
    words |= {base[:i] + base[i + 1 : i + 2] + base[i : i + 1] + base[i + 2 :] for i in range(31)}
    words |= {b"%d" % number for number in range(20_000)}
    words = sorted(words)
    for begin in (b"", b"before "):
        data = begin + b" ".join([*words, *words]) + b"\n"
        edges = np.cumsum([len(begin)] + [len(word) + 1 for word in [*words, *words]])
        hashes = word_hashes(data, edges[:-1], edges[1:] - 1)
        assert (hashes[: len(words)] == hashes[len(words) :]).all()
        assert len(np.unique(hashes)) == len(words)


def test_passages_by_hand():
    texts = ["one two\nthree four five\n\nsix seven\n \n- -\neight nine ten\neleven", "", "a b c\nd"]
    words = words_of(texts)

    def found(shortest, lines):
        spans = zip(*passages(words, shortest, lines), strict=True)
        return [words.spelled(begin, end - begin).decode() for begin, end in spans]

    assert found(1, False) == ["one two three four five",
                               "one two three four five six seven eight nine ten eleven", "six seven",
                               "eight nine ten eleven", "a b c d"]  # fmt: skip
    assert found(3, True) == ["one two three four five",
                              "one two three four five six seven eight nine ten eleven", "three four five",
                              "eight nine ten", "eight nine ten eleven", "a b c", "a b c d"]  # fmt: skip
    assert found(50, True) == []
    for nothing in ([], [""], ["", "..."]):
        assert [len(each) for each in passages(words_of(nothing), 1, True)] == [0, 0]


def test_chained_hashes_are_of_two_and_of_eight_words():
    draw = np.random.default_rng(0)
    words = words_of([" ".join(draw.choice(["a", "b", "c"], 5000))])
    spelled = words.data.split()
    for count, hashes in zip((2, 8), chained(words.hashes), strict=True):
        names = [tuple(spelled[i : i + count]) for i in range(len(spelled) - count + 1)]
        assert len(set(names)) == len(np.unique(hashes[: len(names)])) == len(
            set(zip(names, hashes.tolist(), strict=False)))  # fmt: skip


def test_runs_by_hand():
    assert runs(np.array([3, 10, 7]), np.array([2, 3, 0])).tolist() == [3, 4, 10, 11, 12]
    assert runs(np.array([], int), np.array([], int)).tolist() == []
