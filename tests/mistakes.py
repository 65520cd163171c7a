"""Plausible mistakes in the embedded problems: what tools/errors.py sorts, and preferences to learn from."""

import random
from collections.abc import Iterator
from itertools import islice
from typing import Any

from dataset.problems import DAYS, Problem, assistant, is_right, problems, prompt_of, solution, work


def slipped(answer: str, draw: random.Random) -> str:
    """The answer with one digit, or the day, changed."""
    if answer in DAYS:
        return draw.choice([day for day in DAYS if day != answer])
    at = draw.choice([i for i, character in enumerate(answer) if character.isdigit()])
    return answer[:at] + draw.choice([d for d in "0123456789" if d != answer[at]]) + answer[at + 1:]


def mistake_kinds(problem: Problem) -> list[str]:
    """The kinds of mistakes that fit the problem."""
    if problem.expression is None:
        return ["slip", "format"]
    return ["slip", "format", "operator"] + ["missing"] * (len(problem.steps) > 1)


def mistake(problem: Problem, draw: random.Random, kind: str | None = None) -> dict[str, Any]:
    """A plausible answer that is nearly always wrong, of this kind or of one that is drawn."""
    kind = kind or draw.choice(mistake_kinds(problem))
    if kind == "format":  # the steps are in the content, where only the answer belongs
        return assistant("; ".join([*problem.steps, f"so {problem.answer}"]))
    if kind == "operator":  # the right steps of another operation
        a, operator, b = problem.expression.split()
        steps, result = work(int(a), int(b), draw.choice(sorted({*"+-*"} - {operator})))
        return assistant(str(result), steps)
    if kind == "missing":  # one step is left out; the answer is what the step before it leaves
        at = draw.randrange(len(problem.steps) - 1)
        steps = problem.steps[:at] + problem.steps[at + 1:]
        return assistant(steps[at - 1].split(" = ")[1] if at else steps[0].split()[0], steps)
    wrong = slipped(problem.answer, draw)  # one digit is wrong, in the last step too
    last = [step.replace(f"= {problem.answer}", f"= {wrong}") for step in problem.steps[-1:]]
    return assistant(wrong, problem.steps[:-1] + last)


def mistaken(problem: Problem, draw: random.Random) -> dict[str, Any]:
    """A plausible wrong answer: a wrong digit, a missing step, another operation, or steps in the content."""
    while True:
        message = mistake(problem, draw)
        if not is_right(problem, message):  # 2 + 2 is right for 2 * 2
            return message


def mistake_rows(count: int, seed: int) -> Iterator[dict[str, Any]]:
    """Preferences: right steps before wrong ones, without the calculator."""
    draw = random.Random(f"rows/mistakes/{seed}")
    for problem in islice(problems("train", seed), count):
        yield {"prompt": prompt_of(problem), "chosen": solution(problem),
               "rejected": [mistaken(problem, draw)]}
