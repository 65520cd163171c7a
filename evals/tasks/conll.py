"""CoNLL-2003: the names of persons, organizations and places in a sentence (arXiv cs/0306050), as BIO tags.

    {"tokens": ["EU", "rejects", "German", "call"], "ner_tags": [3, 0, 7, 0]}         or "B-ORG", "O", ..

Five worked examples come first (--shots=0 for none): the last rows of the file, which are not asked.

    Sentence: EU rejects German call
    Names: EU = ORG; German = MISC

    Sentence: Peter Blackburn
    Names:

A sentence without names has "none". Each name of the generated line tags the first place in the sentence
where it fits and is not tagged yet. The figures are those of the package seqeval in its default mode, over
all sentences: a name counts if its kind, its first and its last word are right; f1 is 2 right / (said +
needed). A name that is not in the sentence counts as said and wrong. Files: conll2003*; hub: see HUB.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

from evals.benchmarks import Questions, label_of, read, texts_of, with_last_as_shots
from evals.lm import LM
from evals.results import Figure, Result, ratio, truncated

HUB = "jacobmitchinson/colln2003::test"
SHOTS = 5
MAX_NEW_TOKENS = 96
KINDS = ("PER", "ORG", "LOC", "MISC")
TAGS = ["O", *(f"{begin}-{kind}" for kind in KINDS for begin in "BI")]  # in the order of the numbers

Name = tuple[str, int, int]  # kind, first word, the word after the last one


class Sentence(NamedTuple):
    words: list[str]
    names: set[Name]


def names_of(tags: Sequence[str]) -> set[Name]:
    """The names in BIO tags. An I- tag begins a name if the tag before it is not of the same kind."""
    found, kind, first = set[Name](), "", 0
    for place, tag in enumerate([*tags, "O"]):
        if not kind or tag != f"I-{kind}":
            if kind:
                found.add((kind, first, place))
            kind, first = tag[2:], place  # "" for O
    return found


def tags_of(row: dict[str, Any]) -> list[str]:
    """The tags of a row, which has them as texts or, on the hub, as numbers."""
    return [TAGS[label_of(tag, TAGS)] for tag in row["ner_tags"]]


def sentence_of(row: dict[str, Any]) -> Sentence:
    words, tags = texts_of(row["tokens"]), tags_of(row)
    if len(words) != len(tags) or not words:
        raise ValueError(f"{len(words)} words and {len(tags)} tags")
    return Sentence(words, names_of(tags))


def prompt_of(sentence: Sentence) -> str:
    return f"Sentence: {' '.join(sentence.words)}\nNames:"


def answer_of(sentence: Sentence) -> str:
    names = [f"{' '.join(sentence.words[first:end])} = {kind}"
             for kind, first, end in sorted(sentence.names, key=lambda name: name[1])]
    return "; ".join(names) or "none"


def read_names(text: str, words: list[str]) -> tuple[set[Name], int]:
    """The names of a generated line, and how many of its names are not in the sentence."""
    tags, missing = ["O"] * len(words), 0
    for part in text.split(";"):
        name, _, kind = (each.strip() for each in part.rpartition("="))
        said = name.split()
        if not said or kind not in KINDS:
            continue  # "none", or no name at all
        size = len(said)
        fits = [place for place in range(len(words) - size + 1)
                if words[place:place + size] == said and {*tags[place:place + size]} == {"O"}]
        if fits:
            tags[fits[0]:fits[0] + size] = [f"B-{kind}"] + [f"I-{kind}"] * (size - 1)
        missing += not fits
    return names_of(tags), missing


def load(source: str | None, limit: int, shots: int | None) -> Questions:
    """The first `limit` sentences, and the last `shots` as worked examples."""
    return with_last_as_shots(read(source, "conll2003", HUB), limit, SHOTS if shots is None else shots,
                              sentence_of)


def share(sums: list[int], counts: list[int]) -> Figure:
    """sum(sums) / sum(counts) over sentences, 0 if nothing counts."""
    figure = ratio(sums, counts) if any(counts) else Figure(0.0, 0.0, 0)
    return figure._replace(n=len(counts))


def score(lm: LM, questions: Questions) -> Result:
    """F1, precision and recall of names."""
    shots = "".join(f"{prompt_of(each)} {answer_of(each)}\n\n" for each in questions.shots)
    prompts = [shots + prompt_of(sentence) for sentence in questions.asked]
    texts = lm.generate_until(prompts, ["\n"], MAX_NEW_TOKENS)
    answers = []
    for sentence, text in zip(questions.asked, texts, strict=True):
        found, missing = read_names(text, sentence.words)
        answers.append({"prompt": prompt_of(sentence), "answer": answer_of(sentence), "said": text.strip(),
                        "right": len(found & sentence.names), "names": len(found) + missing,
                        "needed": len(sentence.names)})
    right, said, needed = ([answer[key] for answer in answers] for key in ("right", "names", "needed"))
    both = [a + b for a, b in zip(said, needed, strict=True)]
    return Result({"f1": share([2 * each for each in right], both), "precision": share(right, said),
                   "recall": share(right, needed)} | truncated(lm.truncated), answers,
                  {"shots": len(questions.shots), "first_prompt": prompts[0]})
