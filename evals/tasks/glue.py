"""Three tasks of GLUE (arXiv 1804.07461), each without worked examples and with a few.

SST-2: is a review positive? CoLA: is a sentence acceptable English? RTE: does one sentence follow from
another?

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

followed by " True" or " False". The figures are accuracy and F1 of the second answer. CoLA has Matthews'
correlation first, which is 0 for a model that always gives the same answer. The prompts (dataset/tasks.py)
are those of lm-evaluation-harness (tasks sst2, cola, rte), the questions those of the validation split. The
examples are the first ones of the train split, taking the two answers in turn. On the hub: nyu-mll/glue.
Lines of tab-separated values have the columns of GLUE's files: sentence, label (SST-2); source, label,
mark, sentence (CoLA); index, two sentences, entailment or not_entailment (RTE).
"""

import functools
import itertools
import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

from dataset.tasks import ANSWERS, COLUMNS, LABELS, PROMPTS
from evals.benchmarks import convert, label_number, text_of
from evals.lm import LM
from evals.multiple_choice import Question, score_by_log_prob, shots_text, splits
from evals.results import Figure, Result

Statistic = Callable[[dict[tuple[int, int], int]], float]


def named_columns(rows: list[dict[str, Any]], name: str) -> list[dict[str, Any]]:
    """The rows, with the columns of a .tsv under their names, and without a .tsv's line of headers."""
    named = [row | dict(zip(COLUMNS[name], row["fields"], strict=False)) if "fields" in row else row
             for row in rows]
    return [row for row in named if not ("fields" in row and row.get("label") == "label")]


def question_of(row: dict[str, Any], name: str) -> Question:
    sentences = {key: text_of(row[key]) for key in COLUMNS[name] if key.startswith("sentence")}
    label = row["label"]
    gold = label_number(label, 2) if isinstance(label, int) else LABELS[name][label]
    return Question(PROMPTS[name].format_map(sentences), ANSWERS[name], (gold,))


def in_turns(examples: list[Question]) -> list[Question]:
    """The examples, taking the two answers in turn, each answer's examples in their order."""
    answers = [[each for each in examples if each.gold == (gold,)] for gold in (0, 1)]
    return [each for pair in itertools.zip_longest(*answers) for each in pair if each is not None]


def load(source: str | None, limit: int, shots: int | None, name: str, few: int = 0) -> list[Question]:
    """The first `limit` questions, each after `shots` examples; None takes `few` examples."""
    shots = few if shots is None else shots
    hub = {"train": f"nyu-mll/glue:{name}:train", "dev": f"nyu-mll/glue:{name}:validation"}
    examples, rows = splits(source, name, hub if shots else {"dev": hub["dev"]})
    convert_row = functools.partial(question_of, name=name)
    shown = convert(named_columns(examples, name), convert_row) if shots else []
    before = shots_text(in_turns(shown), shots)
    return [replace(each, shots=before) for each in convert(named_columns(rows, name)[:limit], convert_row)]


def correlation(counts: dict[tuple[int, int], int]) -> float:
    """Matthews' correlation from the counts of (gold, said); 0 if either column is constant."""
    tn, fp, fn, tp = (counts[pair] for pair in ((0, 0), (0, 1), (1, 0), (1, 1)))
    size = math.sqrt((tp + fp) * (tp + fn) * (tn + fp) * (tn + fn))
    return (tp * tn - fp * fn) / size if size else 0.0


def f1(counts: dict[tuple[int, int], int]) -> float:
    """F1 of the label 1 from the counts of (gold, said): 2 tp / (2 tp + fp + fn), 0 if there is none."""
    total = 2 * counts[1, 1] + counts[0, 1] + counts[1, 0]
    return 2 * counts[1, 1] / total if total else 0.0


def jackknife(gold: list[int], said: list[int], statistic: Statistic) -> Figure:
    """A statistic of two columns of 0 and 1, `correlation` or `f1`, with its jackknife standard error.

    The jackknife leaves out each question once. Questions with the same pair (gold, said) have the same
    statistic without them, so there are four values at most.
    """
    n = len(gold)
    counts = {pair: 0 for pair in itertools.product((0, 1), repeat=2)}
    for pair in zip(gold, said, strict=True):
        counts[pair] += 1
    without = {pair: statistic(counts | {pair: count - 1}) for pair, count in counts.items() if count}
    average = sum(counts[pair] * value for pair, value in without.items()) / n
    spread = sum(counts[pair] * (value - average) ** 2 for pair, value in without.items())
    return Figure(statistic(counts), math.sqrt(spread * (n - 1) / n), n)


def score(lm: LM, questions: list[Question], name: str, few: int = 0) -> Result:
    result = score_by_log_prob(lm, questions)
    columns = [question.gold[0] for question in questions], [answer["said"] for answer in result.answers]
    if name == "cola":
        result.figures = {"matthews": jackknife(*columns, correlation)} | result.figures
    result.figures["f1"] = jackknife(*columns, f1)
    return result
