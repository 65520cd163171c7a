"""Rewards: right answers of every kind, hostile answers, and hostile functions of a user."""

import pytest

from configurator import UserError
from dataset.prompts import Prompt
from dataset.sources import Skip
from evals.rewards import Reward, is_right, is_well_formed, require_reference

PROMPT = Prompt([{"role": "user", "content": "2 + 2?"}], [1], {"answer": "4", "list": [1]}, False)


def said(text, **more):
    return {"role": "assistant", "content": text} | more


GSM = {"answer": "3 * 4 = 12\n#### 1,200"}
CHOICE = {"choices": ["iron", "wood"], "answer": 1}


@pytest.mark.parametrize("row, text, expected", [
    ({"answer": "4"}, "4", True), ({"answer": " 4 "}, "4", True), ({"answer": 4}, "4", True),
    ({"answer": "4"}, "44", False), ({"answer": "4"}, "4 or 5", False), ({"answer": "4"}, "", False),
    (GSM, "so it is #### 1200", True), (GSM, "1,200.00", True), (GSM, "1200 or 7", False), (GSM, "", False),
    (GSM, "no number", False),
    (CHOICE, "B", True), (CHOICE, "(B) wood", True), (CHOICE, "A", False), (CHOICE, "AB", False),
    (CHOICE, "A or B", False), (CHOICE, "Because", False),
    ({"choices": ["x", "y"], "answer": "y"}, "B.", True), ({"choices": ["x", "y"], "answer": "A"}, "A", True),
    ({"regex": "2|3|5"}, "3", True), ({"regex": "2|3|5"}, "35", False), ({"regex": "2|3|5"}, "3\n", False),
])  # fmt: skip
def test_right_answers(row, text, expected):
    require_reference(row)
    assert is_right(row, said(text)) is expected
    assert not is_right(row, said(text, cut=True)) and not is_right(row, said(text, malformed=["x"]))


def test_well_formed_answers():
    assert is_well_formed(said("12")) and not is_well_formed(said(""))
    assert not is_well_formed(said("5", cut=True)) and not is_well_formed(said("5", malformed=["x"]))


@pytest.mark.parametrize("row", [{}, {"answer": ""}, {"answer": None}, {"answer": [4]}, {"answer": "#### x"},
                                 {"regex": "("}, {"regex": 3}, {"choices": ["x"], "answer": 1},
                                 {"choices": ["x"], "answer": "z"}, {"choices": ["x", "y"], "answer": ""},
                                 {"choices": ["x", "y"], "answer": "AB"},
                                 {"choices": 3, "answer": 0}])  # fmt: skip
def test_rows_without_a_reference(row):
    with pytest.raises(Skip, match="no reference answer"):
        require_reference(row)


def reward_of(tmp_path, body, seconds=10.0):
    path = tmp_path / "mine.py"
    path.write_text(body)
    return Reward(f"{path}:score", seconds)


@pytest.mark.parametrize("value, terms", [("0.5", {"custom": 0.5}), ("True", {"custom": 1.0}),
                                          ("{'a': 1, 'b': -2.0}", {"a": 1.0, "b": -2.0}),
                                          ("len(prompt) + row['list'][0]", {"custom": 2.0}),
                                          ("row['list'].append(3) or row['answer'] == answer['content']",
                                           {"custom": 1.0})])  # fmt: skip
def test_a_users_function(tmp_path, value, terms):
    """It gets copies, so it cannot change the data; a cut answer is worth nothing and is not shown to it."""
    reward = reward_of(tmp_path, f"def score(prompt, answer, row): return {value}")
    assert reward.terms(PROMPT, said("4")) == terms and PROMPT.row["list"] == [1]
    assert reward.terms(PROMPT, said("4", cut=True)) == {}
    assert len(reward.identity) == 64 and Reward().identity == ""


@pytest.mark.parametrize("body, message", [
    ("def score(p, a, r): raise KeyError('x\\ny')", "reward=.*mine.py:score: KeyError: 'x.*prompt: 2 . 2"),
    ("def score(p, a, r): return float('nan')", "TypeError: returned nan, which is no finite number"),
    ("def score(p, a, r): return float('inf')", "returned inf"),
    ("def score(p, a, r): return 'good'", "returned 'good'"),
    ("def score(p, a, r): return None", "returned None"),
    ("def score(p, a, r): return {1: 2.0}", "returned {1: 2.0}"),
    ("def score(p, a, r): return {'a': [1]}", "returned"),
    ("def score(p, a, r): raise SystemExit(0)", "SystemExit"),
    ("import asyncio\ndef score(p, a, r): raise asyncio.CancelledError('stop')", "CancelledError: stop"),
    ("def score(p, a): return 1", "TypeError: score"),
    ("def score(p, a, r): return {'a': 1.0, 'b': float('nan')}", "returned {'a': 1.0, 'b': nan}"),
    ("import torch\ndef score(p, a, r): return torch.ones(1)", "returned tensor"),
    ("def score(p, a, r): return score(p, a, r)", "RecursionError"),
    ("def score(p, a, r):\n    while True: pass", "RewardTimeout: took longer than reward_seconds=0.05"),
    ("import time\ndef score(p, a, r): time.sleep(60)", "RewardTimeout"),
    ("import time\ndef score(p, a, r):\n    try: time.sleep(60)\n    except Exception: return 0.0",
     "RewardTimeout"),
])  # fmt: skip
def test_hostile_functions_are_one_line(tmp_path, body, message):
    reward = reward_of(tmp_path, body, 0.05)
    with pytest.raises(UserError, match=message) as fault:
        reward.terms(PROMPT, said("4"))
    assert "\n" not in str(fault.value)


def test_a_slow_pattern_is_one_line():
    """Twice the time for each letter: 40 would take hours."""
    prompt = PROMPT._replace(row={"regex": "(a+)+b"})
    assert Reward(seconds=60).terms(prompt, said("aab")) == {"answer": 1.0}
    with pytest.raises(UserError, match="reward=answer: RewardTimeout: took longer than reward_seconds=0.05"):
        Reward(seconds=0.05).terms(prompt, said("a" * 40))


@pytest.mark.parametrize("spec, message", [("wrong", "must be answer or an existing file.py:function"),
                                           ("nowhere.py:f", "must be answer or an existing"),
                                           ("{}:other", "no function 'other'"), ("{}:number", "no function"),
                                           ("{}:", "no function ''")])  # fmt: skip
def test_functions_that_are_not_there(tmp_path, spec, message):
    path = tmp_path / "mine.py"
    path.write_text("number = 3")
    with pytest.raises(UserError, match=message):
        Reward(spec.format(path))
    path.write_text("raise ValueError('broken')")
    with pytest.raises(UserError, match="ValueError: broken"):
        Reward(f"{path}:score")
