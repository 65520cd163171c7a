"""dataset/problems.py: solutions are right, train and test are disjoint, mistakes are wrong. Also the
calculator (generation/calculator.py)."""

import hashlib
import itertools
import json
import random
import re

import pytest

from dataset.problems import (
    DAYS,
    FAMILIES,
    REFUSAL,
    ROWS_VERSION,
    Problem,
    is_right,
    is_well_formed,
    places,
    problem_rows,
    problems,
    prompt_of,
    solution,
    work,
)
from generation.calculator import calculate
from tests.mistakes import mistaken


def some(split, seed, count):
    return list(itertools.islice(problems(split, seed), count))


def test_worked_by_hand():
    assert places(407) == [400, 7]
    assert work(15, 4, "*") == (["10 * 4 = 40", "5 * 4 = 20", "40 + 20 = 60"], 60)
    assert work(12, 30, "*") == (["10 * 30 = 300", "2 * 30 = 60", "300 + 60 = 360"], 360)
    assert work(347, 20, "*") == (["347 * 20 = 6940"], 6940)
    assert work(347, 206, "+") == (["347 + 200 = 547", "547 + 6 = 553"], 553)
    assert work(553, 206, "-") == (["553 - 200 = 353", "353 - 6 = 347"], 347)


def test_every_answer_and_every_step_is_right():
    """Arithmetic is checked by the calculator; lists and days are worked out again."""
    seen = set()
    for problem in some("train", 3, 5000):
        seen.add(problem.family)
        for left, equals, right in (step.partition(" = ") for step in problem.steps):
            assert not equals or calculate(left) == right
        words = problem.question.rstrip(".?").split()
        if problem.expression:
            assert calculate(problem.expression) == problem.answer
            assert re.findall(r"\d+", problem.question) == problem.expression.split()[::2]
        elif problem.family == "date":
            day = next(day for day in DAYS if day in problem.question)
            ahead = int(re.search(r"\d+", problem.question)[0])
            assert DAYS[(DAYS.index(day) + ahead) % 7] == problem.answer
        elif problem.family == "count":
            assert words[5:].count(words[3]) == int(problem.answer)
            assert problem.steps[-1].split()[1] == problem.answer
        else:
            numbers = words[1:]
            wanted = {"copy": numbers, "reverse": numbers[::-1], "sort": sorted(numbers, key=int)}
            assert problem.answer.split() == wanted[problem.family]
    assert seen == set(FAMILIES)


def test_train_and_test_share_no_problem_in_any_wording():
    train = {problem.key for problem in some("train", 1, 20_000)}
    test = {problem.key for problem in some("test", 1, 5000)}
    assert len(train) > 10_000 and len(test) > 2000 and not train & test
    questions = {str(row["prompt"][-1]["content"]) for row in problem_rows("preference", 2000, seed=9)}
    assert not questions & {problem.question for problem in some("test", 2, 5000)}


def test_the_same_seed_gives_the_same_rows():
    for kind in ("text", "chat", "preference"):
        assert list(problem_rows(kind, 50, 4)) == list(problem_rows(kind, 50, 4))
        assert list(problem_rows(kind, 50, 4)) != list(problem_rows(kind, 50, 5))


def test_other_rows_need_another_version():
    """If this fails, the rows have changed: change ROWS_VERSION, then this digest."""
    digest = hashlib.sha256()
    for kind in ("text", "chat", "preference"):
        for row in problem_rows(kind, 500, 1):
            digest.update(json.dumps(row, sort_keys=True).encode())
    assert digest.hexdigest() == "2ba66c45b5600e939b82504c5347aa77d61ecff202b694028124d521ba0916a8"
    assert ROWS_VERSION.startswith("38e5fd87")


def test_solutions_are_right_and_mistakes_are_wrong():
    draw = random.Random(0)
    kinds = set()
    for problem in some("train", 5, 3000):
        answers = [solution(problem)[-1]]
        if problem.expression:
            answers.append(solution(problem, calculate=True)[-1])
        for answer in answers:
            assert is_right(problem, answer) and is_well_formed(problem, answer)
        wrong = mistaken(problem, draw)
        assert not is_right(problem, wrong)
        kinds.add((is_well_formed(problem, wrong), "thought" in wrong))
    assert kinds == {(True, True), (True, False), (False, False)}


def test_preferences_are_about_the_calculator():
    """A call is better than a refusal; a copied result is better than one with a digit missing or doubled."""
    kinds = []
    for row in problem_rows("preference", 400, seed=3):
        (chosen,), (rejected,) = row["chosen"], row["rejected"]
        kinds.append(row["prompt"][-1]["role"])
        assert row["prompt"][0]["role"] == "system"
        if kinds[-1] == "tool":
            assert chosen["content"] == row["prompt"][-1]["content"] != rejected["content"]
            assert abs(len(chosen["content"]) - len(rejected["content"])) == 1
        else:
            assert chosen["tool_calls"] and rejected["content"] == REFUSAL
    assert 80 < kinds.count("tool") <= 100 and kinds.count("user") > 250


def test_what_counts_as_right():
    problem = Problem("add", "1 + 2?", ["1 + 2 = 3"], "3", "1 + 2", "1 + 2")
    assert is_right(problem, {"content": "3"})
    assert not is_right(problem, {"content": "3."}) and not is_right(problem, {"content": "so 3"})
    assert not is_right(problem, {"content": "3", "malformed": ["1 +"]})
    assert is_well_formed(problem, {"content": "4"}) and not is_well_formed(problem, {"content": "four"})
    assert prompt_of(problem, True)[0]["role"] == "system" and len(prompt_of(problem)) == 1


@pytest.mark.parametrize(
    "expression, value",
    [
        ("347 * (20 + 6)", "9022"),
        ("-7 // 2", "-4"),
        ("7 / 2", "3.5"),
        ("6 / 2", "3"),
        ("2 ** 10 % 1000", "24"),
        (" 1 + 1 ", "2"),
        ("1 / 3", "0.333333333333"),
        ("1 / 0", "error: division by zero"),
        ("2 **", "error: not an expression"),
        ("", "error: not an expression"),
        ("__import__('os')", "error: only numbers, + - * / // % ** and brackets"),
        ("x + 1", "error: only numbers, + - * / // % ** and brackets"),
        ("True", "error: only numbers, + - * / // % ** and brackets"),
        ("9 ** 9 ** 9", "error: the exponent is too large"),
        ("10 ** 29 * 11", "error: the number is too large"),
        ("1e400 - 1e400", "error: the number is too large"),
        ("(-8) ** 0.5", "error: the number is too large"),
        ("1 << 99", "error: only numbers, + - * / // % ** and brackets"),
        ("(" * 100 + "1" + ")" * 101, "error: give an expression of at most 200 characters"),
        (None, "error: give an expression of at most 200 characters"),
    ],
)
def test_the_calculator(expression, value):
    assert calculate(expression) == value


def test_a_deep_expression_does_not_crash():
    assert calculate("-" * 199 + "1") == "-1"
    assert calculate("\0").startswith("error")
