"""The nine tasks of GLUE (arXiv 1804.07461) without worked examples; three of them also with a few.

SST-2: is a review positive? CoLA: is a sentence acceptable English? RTE, WNLI: does one sentence follow from
another? MNLI: does it follow, or its opposite, or neither? MRPC, QQP: do two sentences or two questions mean
the same? QNLI: does a sentence answer a question? STS-B: how similar are two sentences?

    {"sentence": "one long string of cliches", "label": 0}                                      sst2
    {"sentence": "The sailors rode the breeze clear of the rocks.", "label": 1}                 cola
    {"sentence1": "No Weapons of Mass Destruction Found in Iraq Yet.",
     "sentence2": "Weapons of Mass Destruction Found in Iraq.", "label": 1}                     rte

    one long string of cliches
    Question: Is this sentence positive or negative?
    Answer:

followed by " negative" or " positive". The prompt of CoLA asks "Does this sentence make sense?", followed by
" no" or " yes". The prompt of RTE:

    No Weapons of Mass Destruction Found in Iraq Yet.
    Question: Weapons of Mass Destruction Found in Iraq. True or False?
    Answer:

followed by " True" or " False". The figures are accuracy and, for two answers, F1 of the second one. CoLA has
Matthews' correlation first, which is 0 for a model that always gives the same answer. The prompts
(dataset/tasks.py) are those of lm-evaluation-harness, the questions those of the validation split (MNLI: of
the same genres as the training rows). The examples are the first ones of the train split, taking the answers
in turn.

lm-evaluation-harness has no STS-B. Here the choices are " 0" to " 5", and the model's answer is their mean,
weighted by the probabilities:

    Sentence 1: A plane is taking off.
    Sentence 2: An air plane is taking off.
    Question: How similar are the two sentences in meaning, from 0 to 5?
    Answer:

The figures are Pearson's and Spearman's correlation with the label, such as 3.8. On the hub: nyu-mll/glue.
Lines of tab-separated values have the columns of GLUE's files (dataset/tasks.py), without those of MNLI and
STS-B.
"""

import functools
import itertools
import math
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np

from dataset.tasks import ANSWERS, COLUMNS, PROMPTS, glue_question
from evals.benchmarks import convert, text_of
from evals.lm import LM
from evals.multiple_choice import Question, score_by_log_prob, shots_text, splits
from evals.results import Figure, Result

NAMES = (*PROMPTS, "stsb")
SIMILARITY = ("Sentence 1: {sentence1}\nSentence 2: {sentence2}\n"
              "Question: How similar are the two sentences in meaning, from 0 to 5?\nAnswer:")
GRADES = tuple("012345")
HEADERS = ("label", "Quality", "is_duplicate")  # what stands above the column of labels
Counts = Counter[tuple[int, int]]  # of the pairs (gold, said), each 0 or 1


def named_columns(rows: list[dict[str, Any]], name: str) -> list[dict[str, Any]]:
    """The rows, with the columns of a .tsv under their names, and without a .tsv's line of headers."""
    named = [row | dict(zip(COLUMNS.get(name, ()), row["fields"], strict=False))
             if isinstance(row.get("fields"), list) else row for row in rows]
    return [row for row in named if not ("fields" in row and row.get("label") in HEADERS)]


def question_of(row: dict[str, Any], name: str) -> Question:
    if name == "stsb":
        sentences = {key: text_of(row[key]) for key in ("sentence1", "sentence2")}
        if not (type(row["label"]) in (int, float) and 0 <= row["label"] <= 5):
            raise ValueError(f"the label {row['label']!r} is not a number from 0 to 5")
        return Question(SIMILARITY.format_map(sentences), GRADES, (round(row["label"]),), value=row["label"])
    prompt, gold = glue_question(name, row)
    return Question(prompt, ANSWERS[name], (gold,))


def in_turns(examples: list[Question]) -> list[Question]:
    """The examples, taking the answers in turn, each answer's examples in their order."""
    answers = [[each for each in examples if each.gold == (gold,)] for gold in range(len(GRADES))]
    return [each for turn in itertools.zip_longest(*answers) for each in turn if each is not None]


def load(source: str | None, limit: int, shots: int | None, name: str, few: int = 0) -> list[Question]:
    """The first `limit` questions, each after `shots` examples; None takes `few` examples."""
    shots = few if shots is None else shots
    asked = "validation_matched" if name == "mnli" else "validation"
    hub = {"train": f"nyu-mll/glue:{name}:train", "dev": f"nyu-mll/glue:{name}:{asked}"}
    examples, rows = splits(source, name, hub if shots else {"dev": hub["dev"]})
    convert_row = functools.partial(question_of, name=name)
    shown = convert(named_columns(examples, name), convert_row) if shots else []
    before = shots_text(in_turns(shown), shots)
    return [replace(each, shots=before) for each in convert(named_columns(rows, name)[:limit], convert_row)]


def correlation(counts: Counts) -> float:
    """Matthews' correlation; 0 if either column is constant."""
    tn, fp, fn, tp = (counts[pair] for pair in ((0, 0), (0, 1), (1, 0), (1, 1)))
    size = math.sqrt((tp + fp) * (tp + fn) * (tn + fp) * (tn + fn))
    return (tp * tn - fp * fn) / size if size else 0.0


def f1(counts: Counts) -> float:
    """F1 of the label 1: 2 tp / (2 tp + fp + fn), 0 if there is none."""
    total = 2 * counts[1, 1] + counts[0, 1] + counts[1, 0]
    return 2 * counts[1, 1] / total if total else 0.0


def jackknife(gold: list[int], said: list[int], statistic: Callable[[Counts], float]) -> Figure:
    """A statistic of two columns of 0 and 1, `correlation` or `f1`, with its jackknife standard error.

    The jackknife leaves out each question once. Questions with the same pair (gold, said) have the same
    statistic without them, so there are four values at most.
    """
    n, counts = len(gold), Counter(zip(gold, said, strict=True))
    without = {pair: statistic(counts - Counter([pair])) for pair in sorted(counts)}
    average = sum(counts[pair] * value for pair, value in without.items()) / n
    spread = sum(counts[pair] * (value - average) ** 2 for pair, value in without.items())
    return Figure(statistic(counts), math.sqrt(spread * (n - 1) / n), n)


def ranks(values: np.ndarray) -> np.ndarray:
    """The rank of each value, from 1; equal values share the mean of their ranks. (n,) -> (n,) float64."""
    _, place, counts = np.unique(values, return_inverse=True, return_counts=True)
    return (np.cumsum(counts) - (counts - 1) / 2)[place]


def pearson(one: np.ndarray, two: np.ndarray) -> Figure:
    """Pearson's correlation of two columns, 0 if one is constant; its standard error is that of normal
    values."""
    r = 0.0 if one.std() == 0 or two.std() == 0 else float(np.corrcoef(one, two)[0, 1])
    return Figure(r, math.sqrt((1 - r * r) / max(len(one) - 2, 1)), len(one))


def similarity(questions: list[Question], result: Result) -> Result:
    """The result of STS-B: the mean grade of each answer, correlated with the labels."""
    log_probs = np.array([answer["log_probs"] for answer in result.answers])  # (n, 6)
    likely = np.exp(log_probs - log_probs.max(axis=1, keepdims=True))
    grades = likely @ np.arange(len(GRADES)) / likely.sum(axis=1)  # (n,)
    labels = np.array([question.value for question in questions])
    for answer, grade, label in zip(result.answers, grades.tolist(), labels.tolist(), strict=True):
        answer |= {"grade": grade, "label": label}
    result.figures = {"pearson": pearson(grades, labels), "spearman": pearson(ranks(grades), ranks(labels)),
                      **{key: figure for key, figure in result.figures.items() if key == "truncated"}}
    return result


def score(lm: LM, questions: list[Question], name: str, few: int = 0) -> Result:
    result = score_by_log_prob(lm, questions)
    if name == "stsb":
        return similarity(questions, result)
    columns = [question.gold[0] for question in questions], [answer["said"] for answer in result.answers]
    if name == "cola":
        result.figures = {"matthews": jackknife(*columns, correlation)} | result.figures
    if len(ANSWERS[name]) == 2:
        result.figures["f1"] = jackknife(*columns, f1)
    return result
