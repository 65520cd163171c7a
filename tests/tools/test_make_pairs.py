"""Preference pairs of a model's own answers."""

from dataset.conversations import preference
from tools.make_pairs import make_pair


def answer(content, right, **keys):
    return {"messages": [{"role": "assistant", "content": content, **keys}], "right": right}


def row(*answers):
    return {"prompt": [{"role": "user", "content": "1 + 1 = ?"}], "row": {"family": "add"},
            "answers": list(answers)}


def test_the_first_right_and_the_first_wrong_answer():
    (pair,) = make_pair(row(answer("3", False), answer("2", True), answer("4", False)))
    assert pair == {"prompt": [{"role": "user", "content": "1 + 1 = ?"}], "family": "add",
                    "chosen": [{"role": "assistant", "content": "2"}],
                    "rejected": [{"role": "assistant", "content": "3"}]}
    prompt, chosen, rejected = preference(pair)
    assert (prompt[-1]["content"], chosen["content"], rejected["content"]) == ("1 + 1 = ?", "2", "3")


def test_no_pair_without_both():
    assert make_pair(row(answer("2", True), answer("2", True))) == []
    assert make_pair(row(answer("3", False))) == []


def test_answers_that_are_no_whole_message_are_not_used():
    called = answer("", False, tool_calls=[{"name": "calculator", "arguments": {}}])
    for unusable in (answer("3", False, cut=True), answer("3", False, malformed=["x"]), called):
        assert make_pair(row(answer("2", True), unusable)) == []
