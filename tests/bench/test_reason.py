"""bench/reason.py: its arms are settings that exist, and its test problems are those of eval.py."""

import pytest

from bench import reason
from configurator import UserError, configure
from evals.tasks import problems
from formats.tokenizer import Tokenizer
from grpo import GRPOConfig
from model import GPT
from sft import SFTConfig


def test_arms_are_settings_of_the_scripts():
    for argv in reason.GRPO.values():
        assert configure(GRPOConfig, [*reason.SHARED, *argv])[0].max_steps >= 30
    assert configure(SFTConfig, [*reason.SHARED, *reason.SFT])[0].max_steps == 400
    assert set(reason.ReasonConfig().arms.split(",")) == {*reason.GRPO, *reason.OTHERS}
    with pytest.raises(UserError, match="no arm 'x'; there are tools"):
        reason.ReasonConfig(arms="tools,x")


def test_the_problems_are_those_of_eval():
    for name, found in (("problems", problems.load(None, 40, None)),
                        ("calculator", problems.load(None, 40, None, calculator=True)),
                        ("products", problems.load(None, 40, None, calculator=True, family="hard"))):
        assert reason.test_problems(reason.TASKS[name][0], 40) == found


def test_measuring_counts_exact_answers(chat_folder, monkeypatch):
    """A sampler that is right in the first half of every group."""
    questions = reason.test_problems(("add",), 6)

    class Sampler:
        def __init__(self, model, tokenizer, limits):
            assert limits.temperature == 1.0

        def sample(self, prompts, rows, group_size, tools):
            assert group_size == 4 and list(rows) == list(range(4 * len(prompts))) and tools == [True] * 6
            return [type("R", (), {"messages": [{"content": problem.answer if place < 2 else "x"}]})
                    for problem in questions for place in range(4)]

    monkeypatch.setattr(reason, "RolloutSampler", Sampler)
    model, tokenizer = GPT.from_pretrained(chat_folder), Tokenizer.load(chat_folder)
    found = reason.right_answers(model, tokenizer, questions, True, 4, 1.0)
    assert found == [[True, True, False, False]] * 6


def test_the_table():
    runs = [{"seed": 1, "cpu_seconds": 100.0, "problems": 80.0},
            {"seed": 2, "cpu_seconds": 120.0, "problems": 84.0}]
    text = reason.report({"start": {"problems": 79.0}, "arms": {"tools": runs}})
    assert "82.0 (80.0 - 84.0)" in text and " 110 " in text and "79.0" in text
