"""Three tasks of GLUE (arXiv 1804.07461): SST-2, is a review good; CoLA, is a sentence English; RTE, does one
sentence follow from another. Each is asked with no worked examples, and with a few.

    {"sentence": "one long string of cliches", "label": 0}                                      sst2
    {"sentence": "The sailors rode the breeze clear of the rocks.", "label": 1}                 cola
    {"sentence1": "No Weapons of Mass Destruction Found in Iraq Yet.",
     "sentence2": "Weapons of Mass Destruction Found in Iraq.", "label": 1}                     rte

    one long string of cliches
    Question: Is this sentence positive or negative?
    Answer:

followed by " negative" or " positive"; of CoLA "Does this sentence make sense?" and " no" or " yes"; of RTE

    No Weapons of Mass Destruction Found in Iraq Yet.
    Question: Weapons of Mass Destruction Found in Iraq. True or False?
    Answer:

and " True" or " False". Measured are accuracy, and of CoLA first Matthews' correlation, which is 0 for
whoever always says the same. Protocol: prompts as in lm-evaluation-harness (tasks sst2, cola, rte), on the
validation split. The examples are the first of the train split, of each answer in turn. On the hub:
nyu-mll/glue. Lines of tab-separated values are read as GLUE's files have them: sentence, label of SST-2;
source, label, mark, sentence of CoLA; index, two sentences, entailment or not_entailment of RTE.
"""

import itertools
import math
from typing import Any

from evals.lm import LM
from evals.multiple_choice import (
    Question,
    accuracy,
    ask,
    choice_log_probs,
    questions_of,
    result,
    shots_text,
    splits,
)
from evals.results import Figure, Result, mean

PROMPTS = {"sst2": "{sentence}\nQuestion: Is this sentence positive or negative?\nAnswer:",
           "cola": "{sentence}\nQuestion: Does this sentence make sense?\nAnswer:",
           "rte": "{sentence1}\nQuestion: {sentence2} True or False?\nAnswer:"}
ANSWERS = {"sst2": ("negative", "positive"), "cola": ("no", "yes"), "rte": ("True", "False")}  # labels 0, 1
COLUMNS = {"sst2": ("sentence", "label"), "cola": ("source", "label", "mark", "sentence"),
           "rte": ("index", "sentence1", "sentence2", "label")}
LABELS = {"0": 0, "1": 1, "entailment": 0, "not_entailment": 1}


def load(source: str | None, limit: int, shots: int | None, name: str, few: int = 0) -> list[Question]:
    """The first questions behind `shots` examples, or `few` where that is None."""
    shots = few if shots is None else shots
    hub = {"train": f"nyu-mll/glue:{name}:train", "dev": f"nyu-mll/glue:{name}:validation"}
    examples, asked = splits(source, name, hub if shots else {"dev": hub["dev"]})
    before = shots_text(in_turns(questions_of(glue_rows(examples, name), lambda row: question_of(row, name)))
                        if shots else [], shots)
    return [Question(each.prompt, each.choices, each.gold, before)
            for each in questions_of(glue_rows(asked, name)[:limit], lambda row: question_of(row, name))]


def glue_rows(rows: list[dict[str, Any]], name: str) -> list[dict[str, Any]]:
    """With the columns of a .tsv by their names, and without a line that only names them."""
    named = [row | dict(zip(COLUMNS[name], row["fields"], strict=False)) if "fields" in row else row
             for row in rows]
    return [row for row in named if row.get("label") != "label"]


def question_of(row: dict[str, Any], name: str) -> Question:
    return Question(PROMPTS[name].format_map(row), ANSWERS[name], (LABELS[str(row["label"])],))


def in_turns(examples: list[Question]) -> list[Question]:
    """The examples in their order, but of each answer in turn."""
    kinds = [[each for each in examples if each.gold == (gold,)] for gold in (0, 1)]
    return [each for pair in itertools.zip_longest(*kinds) for each in pair if each is not None]


def score(lm: LM, questions: list[Question], name: str, few: int = 0) -> Result:
    found = ask(lm, questions)
    scores = list(map(choice_log_probs, found))
    right = accuracy(questions, scores)
    figures = {"accuracy": mean(right)}
    if name == "cola":
        said = [score.index(max(score)) for score in scores]
        figures = {"matthews": matthews([question.gold[0] for question in questions], said)} | figures
    return result(questions, found, figures, right, scores)


def matthews(gold: list[int], said: list[int]) -> Figure:
    """Matthews' correlation of two columns of 0 and 1, and its jackknife standard error."""
    n = len(gold)
    counts = {pair: 0 for pair in itertools.product((0, 1), repeat=2)}
    for pair in zip(gold, said, strict=True):
        counts[pair] += 1
    without = {pair: correlation(counts | {pair: count - 1}) for pair, count in counts.items() if count}
    average = sum(counts[pair] * value for pair, value in without.items()) / n
    spread = sum(counts[pair] * (value - average) ** 2 for pair, value in without.items())
    return Figure(correlation(counts), math.sqrt(spread * (n - 1) / n), n)


def correlation(counts: dict[tuple[int, int], int]) -> float:
    """Of the counts of (gold, said). 0 where one of them is always the same."""
    tn, fp, fn, tp = (counts[pair] for pair in ((0, 0), (0, 1), (1, 0), (1, 1)))
    size = math.sqrt((tp + fp) * (tp + fn) * (tn + fp) * (tn + fn))
    return (tp * tn - fp * fn) / size if size else 0.0
