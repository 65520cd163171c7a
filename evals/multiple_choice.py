"""Multiple choice: the model's answer is the choice that it finds most likely after the question.

    examples, rows = splits(source, "mmlu", {"dev": "cais/mmlu:all:dev", "test": "cais/mmlu:all:test"})
    before = shots_text(convert(examples, question_of), 5)    # the text of five worked examples
    result = score_by_log_prob(lm, questions)                 # accuracy and one answer per question

A choice follows its question after one space. A worked example is a question with its answer, and a blank
line separates examples: the form of lm-evaluation-harness (github.com/EleutherAI/lm-evaluation-harness).
There are two differences, so that neither the order of the choices nor chance helps. Choices with equal
scores share the point, where the harness takes the first of them. And all questions have the same worked
examples, the first ones of the split.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from configurator import UserError
from evals.benchmarks import read
from evals.likelihood import Likelihood
from evals.lm import LM
from evals.results import Result, mean, truncated

LETTERS = "ABCDEFGHIJ"  # of choices; no benchmark has more
# Splits to take worked examples from, in this order, after those that the protocol names.
EXAMPLE_SPLITS = ("train", "dev", "val", "validation")
# Splits to take questions from, in this order, for each split that a protocol names. None: rows whose split
# is unknown. "test" comes late in the other lists because a test split may have no answers.
QUESTION_SPLITS = {
    "test": ("test", None, "validation", "val", "dev", "train"),
    "validation": ("validation", "val", None, "test", "dev", "train"),
    "dev": ("dev", "validation", "val", None, "test", "train")}


@dataclass(frozen=True)
class Question:
    """A question and its choices. Raises ValueError if no choice is right."""

    prompt: str  # up to where the answer begins
    choices: tuple[str, ...]  # each follows the prompt after a space
    gold: tuple[int, ...]  # indices of the right choices
    shots: str = ""  # text before the prompt: instructions, worked examples
    group: str = ""  # a subject
    ending: str = ""  # is scored after each choice (WinoGrande); without it, the choices are scored
    value: float = 0.0  # a right answer that is a number (STS-B)

    def __post_init__(self) -> None:
        if not self.gold or not all(0 <= gold < len(self.choices) for gold in self.gold):
            raise ValueError("no right answer")

    def scored(self, index: int) -> tuple[str, str]:
        """(text before, text that is scored) of a choice."""
        if self.ending:
            return self.prompt + self.choices[index], f" {self.ending}"
        return self.prompt, f" {self.choices[index]}"


def lettered(question: str, choices: Sequence[str], gold: int, group: str = "") -> Question:
    """A question that lists its choices as "A. ..", one per line; the answer is a letter."""
    lines = [f"{letter}. {choice}" for letter, choice in zip(LETTERS, choices, strict=False)]
    return Question("\n".join([question, *lines, "Answer:"]), tuple(LETTERS[:len(choices)]), (gold,),
                    group=group)


# ---- Questions --------------------------------------------------------------------------------------------

def split_of(row: dict[str, Any]) -> str | None:
    """The split that the row names, or a word of its file's name that is a split, or None."""
    if isinstance(row.get("split"), str):
        return row["split"]
    words = [word for word in re.split(r"[^a-z]+", row["file"].lower()) if word in QUESTION_SPLITS["test"]]
    return words[-1] if words else None


def splits(source: str | None, name: str,
           hub: dict[str, str]) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """The rows of a benchmark for worked examples, and the rows for questions.

    source: a file or a folder; None reads the hub. hub: {split: its name on the hub}; questions come from the
    last split. In files, the split of a row is its key "split" or a word in the file's name. There are no
    examples if all rows are in one split.
    """
    if source is None:
        rows = [row | {"split": split} for split, place in hub.items() for row in read(None, name, place)]
    else:
        rows = read(source, name, "")
    by_split: dict[str | None, list[dict[str, Any]]] = {}
    for row in rows:
        by_split.setdefault(split_of(row), []).append(row)
    chosen = next((split for split in QUESTION_SPLITS[list(hub)[-1]] if split in by_split), split_of(rows[0]))
    examples = next((by_split[split] for split in (*hub, *EXAMPLE_SPLITS)
                     if split in by_split and split != chosen), [])
    return examples, by_split[chosen]


def shots_text(examples: Sequence[Question], count: int) -> str:
    """The first `count` examples with their answers, as text. Raises UserError if there are fewer."""
    if count > len(examples):
        place = f" of {examples[0].group}" if examples and examples[0].group else ""
        raise UserError(f"shots={count}: there are {len(examples)} examples{place}")
    return "".join("".join(each.scored(each.gold[0])) + "\n\n" for each in examples[:count])


# ---- Answers ----------------------------------------------------------------------------------------------

def ask(lm: LM, questions: list[Question]) -> list[list[Likelihood]]:
    """The likelihood of each choice of each question."""
    requests = [(question.shots + before, scored) for question in questions
                for before, scored in map(question.scored, range(len(question.choices)))]
    likelihoods = iter(lm.loglikelihood(requests))
    return [[next(likelihoods) for _ in question.choices] for question in questions]


def log_probs_of(likelihoods: list[list[Likelihood]]) -> list[list[float]]:
    return [[each.log_prob for each in row] for row in likelihoods]


def per_character(likelihoods: list[Likelihood], choices: Sequence[str]) -> list[float]:
    """The log-probability per character of each choice, which the metric acc_norm compares."""
    return [each.log_prob / max(len(choice), 1) for each, choice in zip(likelihoods, choices, strict=True)]


def credit(scores: Sequence[float], gold: Sequence[int]) -> float:
    """1 if a right choice has the highest score, else 0. If k choices tie, each counts 1 / k."""
    best = [index for index, score in enumerate(scores) if score == max(scores)]
    return len(set(best) & set(gold)) / len(best)


def result_of(questions: list[Question], likelihoods: list[list[Likelihood]], right: dict[str, list[float]],
              said: list[int]) -> Result:
    """The mean of each list of points, and one answer per question, with the points of the first list.

    The details have the first prompt, and the number of questions whose context lost its beginning. If there
    are any, their share is a figure as well.
    """
    answers = [{"prompt": question.prompt, "choices": list(question.choices), "gold": list(question.gold),
                "log_probs": log_probs, "said": choice, "right": points}
               for question, log_probs, choice, points in zip(questions, log_probs_of(likelihoods), said,
                                                              next(iter(right.values())), strict=True)]
    cut = [any(each.truncated for each in row) for row in likelihoods]
    return Result({name: mean(points) for name, points in right.items()} | truncated(cut), answers, {
        "truncated": sum(cut), "first_prompt": questions[0].shots + questions[0].prompt})


def grade(questions: list[Question], likelihoods: list[list[Likelihood]],
          scores: dict[str, list[list[float]]]) -> Result:
    """The accuracy of the choice with the highest score, for each kind of score, and one answer per question.

    scores: {figure: the scores of each question's choices}; the answers are those of the first figure. The
    details have the accuracy of guessing ("chance"), and those of `result_of`.
    """
    right = {name: [credit(row, question.gold) for row, question in zip(rows, questions, strict=True)]
             for name, rows in scores.items()}
    first = next(iter(scores))
    result = result_of(questions, likelihoods, right, [row.index(max(row)) for row in scores[first]])
    result.details["chance"] = mean([len(each.gold) / len(each.choices) for each in questions]).value
    return result


def grade_greedy(questions: list[Question], likelihoods: list[list[Likelihood]]) -> Result:
    """The share of questions whose one choice greedy decoding would write, and one answer per question."""
    return result_of(questions, likelihoods, {"accuracy": [float(row[0].greedy) for row in likelihoods]},
                     [0] * len(questions))


def score_by_log_prob(lm: LM, questions: list[Question]) -> Result:
    """Accuracy by log-probability."""
    likelihoods = ask(lm, questions)
    return grade(questions, likelihoods, {"accuracy": log_probs_of(likelihoods)})


def score_by_character(lm: LM, questions: list[Question]) -> Result:
    """Accuracy by log-probability per character ("accuracy_norm"), and by log-probability ("accuracy")."""
    likelihoods = ask(lm, questions)
    scores = [per_character(row, question.choices)
              for row, question in zip(likelihoods, questions, strict=True)]
    return grade(questions, likelihoods, {"accuracy_norm": scores, "accuracy": log_probs_of(likelihoods)})
