"""Multiple choice: the choice that a model finds likeliest behind the question is its answer.

    examples, asked = splits(source, "mmlu", {"dev": "cais/mmlu:all:dev", "test": "cais/mmlu:all:test"})
    found = ask(lm, questions)                                    # [[Likelihood, ..] a question]
    right = accuracy(questions, list(map(log_probs, found)))      # [1.0, 0.0, 0.5, ..]: the mean counts

A choice follows the question behind one space, a worked example is a question with its answer, and a blank
line parts them: the form of lm-evaluation-harness (github.com/EleutherAI/lm-evaluation-harness). Two things
differ, so that neither order nor chance helps: choices that are equally likely share the point, where the
first of them would have it there; and the examples are the same before every question, the first ones.
"""

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from configurator import UserError
from evals.benchmarks import convert, read
from evals.likelihood import Likelihood
from evals.lm import LM
from evals.results import Figure, Result, mean

EXAMPLES = ("train", "dev", "val", "validation")  # the first that there is, behind the protocol's own
ASKED = {  # the first that there is, by the one that the protocol asks; a test split may have no answers
    "test": ("test", None, "validation", "val", "dev", "train"),
    "validation": ("validation", "val", None, "test", "dev", "train"),
    "dev": ("dev", "validation", "val", None, "test", "train")}


@dataclass(frozen=True)
class Question:
    prompt: str  # up to where the answer begins
    choices: tuple[str, ...]  # what may follow, behind a space
    gold: tuple[int, ...]  # which of them are right
    shots: str = ""  # what stands before: instructions, worked examples
    group: str = ""  # a subject, or a kind


# ---- Questions --------------------------------------------------------------------------------------------

def splits(source: str | None, name: str,
           hub: dict[str, str]) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """The rows of which a benchmark takes its examples, and those that it asks.

    source: a file or a folder; None: the hub's. hub: {split: its name on the hub}, of which the last is
    asked. In files, a row's split is its key "split", or stands in the name of the file. Where all rows are
    of one, the examples are empty.
    """
    if source is None:
        rows = [row | {"split": split} for split, place in hub.items() for row in read(None, name, place)]
    else:
        rows = read(source, name, "")
    found: dict[str | None, list[dict[str, Any]]] = {}
    for row in rows:
        found.setdefault(split_of(row), []).append(row)
    asked = next((split for split in ASKED[list(hub)[-1]] if split in found), split_of(rows[0]))
    examples = next((found[split] for split in (*hub, *EXAMPLES) if split in found and split != asked), [])
    return examples, found[asked]


def split_of(row: dict[str, Any]) -> str | None:
    """What the row says, or a word of its file's name; None where neither does."""
    if isinstance(row.get("split"), str):
        return row["split"]
    words = [word for word in re.split(r"[^a-z]+", row["file"].lower()) if word in ASKED["test"]]
    return words[-1] if words else None


def questions_of(rows: list[dict[str, Any]], how: Callable[[dict[str, Any]], Question]) -> list[Question]:
    """Each row as how(row) makes it. UserError, with file and number, for one that it cannot read."""
    def question_of(row: dict[str, Any]) -> Question:
        question = how(row)
        if not question.gold or not all(0 <= gold < len(question.choices) for gold in question.gold):
            raise ValueError("no right answer")
        return question
    return convert(rows, question_of)


def shots_text(examples: Sequence[Question], count: int) -> str:
    """The first `count` of them with their answers, as they stand before a question. UserError for fewer."""
    if count > len(examples):
        place = f" of {examples[0].group}" if examples and examples[0].group else ""
        raise UserError(f"shots={count}: there are {len(examples)} examples{place}")
    return "".join(f"{each.prompt} {each.choices[each.gold[0]]}\n\n" for each in examples[:count])


# ---- Answers ----------------------------------------------------------------------------------------------

def ask(lm: LM, questions: list[Question]) -> list[list[Likelihood]]:
    """How likely each choice of each question is."""
    return lm.loglikelihood([(question.shots + question.prompt, [f" {choice}" for choice in question.choices])
                             for question in questions])


def choice_log_probs(found: list[Likelihood]) -> list[float]:
    return [each.log_prob for each in found]


def per_character(found: list[Likelihood], choices: Sequence[str]) -> list[float]:
    """Log-probabilities a character of the choice: what is called acc_norm compares these."""
    return [each.log_prob / max(len(choice), 1) for each, choice in zip(found, choices, strict=True)]


def credit(scores: Sequence[float], gold: Sequence[int]) -> float:
    """1 where a right choice scores highest, 0 where none does; of k that are equal each brings 1 / k."""
    best = [index for index, score in enumerate(scores) if score == max(scores)]
    return len(set(best) & set(gold)) / len(best)


def accuracy(questions: list[Question], scores: list[list[float]]) -> list[float]:
    """A point, none or a part of one for each question."""
    return [credit(row, question.gold) for question, row in zip(questions, scores, strict=True)]


def result(questions: list[Question], found: list[list[Likelihood]], figures: dict[str, Figure],
           right: list[float], scores: list[list[float]]) -> Result:
    """Figures with what was said to each question: the choice with the highest of `scores`. Among the
    details are the first prompt, what guessing would bring, and of how many questions a context lost its
    beginning; if any did, that is a figure, too."""
    cut = [any(each.cut for each in row) for row in found]
    answers = [{"prompt": question.prompt, "choices": list(question.choices), "gold": list(question.gold),
                "log_probs": choice_log_probs(row), "said": score.index(max(score)), "right": each}
               for question, row, score, each in zip(questions, found, scores, right, strict=True)]
    if any(cut):
        figures = figures | {"truncated": mean(cut)}
    chance = mean([len(question.gold) / len(question.choices) for question in questions]).value
    return Result(figures, answers, {"chance": chance, "truncated": sum(cut),
                                     "first_prompt": questions[0].shots + questions[0].prompt})


def score_by_character(lm: LM, questions: list[Question]) -> Result:
    """Accuracy by log-probability a character, and by log-probability."""
    found = ask(lm, questions)
    scores = [per_character(row, question.choices) for question, row in zip(questions, found, strict=True)]
    right = accuracy(questions, scores)
    figures = {"accuracy_norm": mean(right),
               "accuracy": mean(accuracy(questions, list(map(choice_log_probs, found))))}
    return result(questions, found, figures, right, scores)
