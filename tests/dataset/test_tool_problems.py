"""Generated conversations about functions: the leaderboard's scorer accepts the right calls only."""

import copy
import json

import pytest

from dataset.conversations import conversation
from dataset.tool_problems import NO_FUNCTION, offer, offered_functions, tool_rows
from evals.tasks.bfcl import ToolQuestion, judge_message, question_of, wrong_argument

ROWS = list(tool_rows(600, seed=2))


def question(function, call):
    """The row as a question of BFCL, with the arguments of the call as the only possible ones."""
    possible = {name: [call["arguments"][name]] if name in call["arguments"] else [""]
                for name in function["parameters"]["properties"]}
    return question_of({"id": "0", "question": [[{"role": "user", "content": "?"}]], "function": [function]},
                       [{function["name"]: possible}])


def test_every_call_is_right_by_the_leaderboards_scorer():
    calls, silent = 0, ToolQuestion("0", [], {}, [])
    for row in ROWS:
        system, user, answer = conversation(row)
        functions = {each["name"]: each for each in offered_functions([system])}
        for call in answer.get("tool_calls", []):
            calls += 1
            asked = question(functions[call["name"]], call)
            assert judge_message(asked, answer | {"tool_calls": [call]})["accuracy"]
            wrong = copy.deepcopy(call)
            name = next(iter(wrong["arguments"]))
            wrong["arguments"][name] = "no such value" if isinstance(wrong["arguments"][name], int) else 10**9
            assert not judge_message(asked, answer | {"tool_calls": [wrong]})["accuracy"]
        if not answer.get("tool_calls"):
            assert answer["content"] == NO_FUNCTION and judge_message(silent, answer)["accuracy"]
    assert calls > 500


def test_one_two_or_no_call_is_right_in_their_shares():
    counts = [len(row["messages"][-1].get("tool_calls", [])) for row in ROWS]
    assert [counts.count(n) / len(ROWS) for n in (0, 1, 2)] == pytest.approx([0.25, 0.5, 0.25], abs=0.05)
    assert {len(offered_functions(row["messages"])) for row in ROWS} == {1, 2, 3}


def test_the_question_has_all_that_the_call_needs():
    """Each argument stands in the question; without a call, no offered function does what is asked for."""
    for row in ROWS:
        system, user, answer = row["messages"]
        for call in answer.get("tool_calls", []):
            for name, value in call["arguments"].items():
                text = value if isinstance(value, str) else json.dumps(value).strip("[]")
                assert f"{name} {text}".lower() in user["content"].lower()
        if "tool_calls" not in answer:
            wishes = [each["description"][:-1].lower() for each in offered_functions([system])]
            assert not any(wish in user["content"].lower() for wish in wishes)


def test_offers_are_read_back():
    function = {"name": "f", "description": "d", "parameters": {"properties": {"a": {"type": "any"}}}}
    text = f"Be brief.\n{offer(function)}\nYou can call calculator(expression)."
    found = offered_functions([{"role": "system", "content": text},
                               {"role": "user", "content": offer(function)}])
    assert found[0] == function and [each["name"] for each in found] == ["f", "calculator"]
    assert wrong_argument({"expression": 2}, found[1]["parameters"], {"expression": ["2"]})
    assert offered_functions([{"role": "system", "content": "You can call it a day (or not)."}]) == []
    assert list(tool_rows(3, seed=2)) == ROWS[:3], "a seed decides everything"
