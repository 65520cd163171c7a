"""CoNLL-2003: names in BIO tags as seqeval finds them, by hand; generated lines; figures; bad rows."""

import random

import pytest

from configurator import UserError
from evals.benchmarks import Questions, convert
from evals.lm import LM
from evals.tasks import conll
from evals.tasks.conll import TAGS, answer_of, names_of, prompt_of, read_names, sentence_of, share

WORDS = "EU rejects German call to boycott British lamb".split()
ROW = {"tokens": WORDS, "ner_tags": [3, 0, 7, 0, 0, 0, 7, 0], "file": "f"}


@pytest.mark.parametrize("tags, names", [
    ("B-PER I-PER O B-LOC", {("PER", 0, 2), ("LOC", 3, 4)}),
    ("B-PER B-PER", {("PER", 0, 1), ("PER", 1, 2)}),
    ("I-PER I-PER O", {("PER", 0, 2)}),  # IOB1: an I- after O begins a name
    ("B-PER I-LOC", {("PER", 0, 1), ("LOC", 1, 2)}),  # and one of another kind
    ("O B-ORG I-ORG I-ORG", {("ORG", 1, 4)}),
    ("O O", set()), ("", set()),
])
def test_names_by_hand(tags, names):
    assert names_of(tags.split()) == names


def test_f1_by_hand():
    """Two sentences: 2 of 3 said names are right, 2 of 4 needed ones are found: F1 is 4 / 7."""
    gold = [names_of("B-PER I-PER O B-LOC".split()), names_of("B-ORG O B-MISC".split())]
    said = [names_of("B-PER I-PER O O".split()), names_of("B-ORG O B-LOC".split())]
    right = [len(a & b) for a, b in zip(gold, said, strict=True)]
    assert right == [1, 1]
    sizes = [[len(each) for each in side] for side in (said, gold)]
    both = [a + b for a, b in zip(*sizes, strict=True)]
    assert share([2 * each for each in right], both).value == pytest.approx(4 / 7)
    assert share(right, sizes[0]).value == pytest.approx(2 / 3) and share(right, sizes[1]).value == 0.5
    assert share([0, 0], [0, 0]) == (0, 0, 2)


def test_names_and_f1_are_seqevals():
    """Random tags, with I- tags that follow anything."""
    seqeval = pytest.importorskip("seqeval.metrics")
    labeling = pytest.importorskip("seqeval.metrics.sequence_labeling")
    draw = random.Random(1)
    for _ in range(300):
        gold, said = ([draw.choices(TAGS, k=12) for _ in range(3)] for _ in range(2))
        for tags in gold:
            assert names_of(tags) == {(kind, first, last + 1)
                                      for kind, first, last in labeling.get_entities(tags)}
        a, b = [list(map(names_of, side)) for side in (gold, said)]
        right = [2 * len(one & two) for one, two in zip(a, b, strict=True)]
        assert share(right, [len(one) + len(two) for one, two in zip(a, b, strict=True)]).value == \
            pytest.approx(seqeval.f1_score(gold, said))


def test_generated_lines():
    assert read_names("EU = ORG; German = MISC; British = MISC", WORDS) == (sentence_of(ROW).names, 0)
    assert read_names("none", WORDS) == (set(), 0) and read_names("", WORDS) == (set(), 0)
    assert read_names("British lamb = MISC", WORDS) == ({("MISC", 6, 8)}, 0)
    assert read_names("Paris = LOC; EU = TOWN; = ORG; EU=ORG", WORDS) == ({("ORG", 0, 1)}, 1)
    twice = ["Rome", "to", "Rome"]
    assert read_names("Rome = LOC; Rome = LOC; Rome = LOC", twice) == ({("LOC", 0, 1), ("LOC", 2, 3)}, 1)


def test_the_task(trained, monkeypatch):
    strings = ROW | {"ner_tags": [TAGS[tag] for tag in ROW["ner_tags"]]}
    assert sentence_of(strings) == sentence_of(ROW)
    lm, sentence = LM(str(trained), device="cpu"), sentence_of(ROW)
    empty = sentence_of({"tokens": ["No", "."], "ner_tags": [0, 0]})
    assert answer_of(empty) == "none" and answer_of(sentence) == "EU = ORG; German = MISC; British = MISC"
    prompts = []

    def generate(asked, stops, max_new_tokens):
        prompts.extend(asked)
        lm.truncated = [False] * len(asked)
        return [" EU = ORG; Berlin = LOC", " none"]

    monkeypatch.setattr(lm, "generate_until", generate)
    result = conll.score(lm, Questions([sentence, empty], [sentence]))
    assert prompts[1] == f"{prompt_of(sentence)} {answer_of(sentence)}\n\nSentence: No .\nNames:"
    assert {key: figure.value for key, figure in result.figures.items()} == {
        "f1": pytest.approx(2 / 5), "precision": 0.5, "recall": pytest.approx(1 / 3)}
    assert all(figure.n == 2 for figure in result.figures.values())


@pytest.mark.parametrize("change", [
    {"ner_tags": [0]}, {"ner_tags": [9] * 8}, {"ner_tags": ["B-CITY"] * 8}, {"tokens": [], "ner_tags": []},
    {"tokens": "EU rejects"}])
def test_bad_rows(change):
    with pytest.raises(UserError, match="f: row 1 does not fit"):
        convert([ROW | change], sentence_of)
