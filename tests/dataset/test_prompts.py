"""Prompts by number: a pure function, every row counted, and the forms of rows."""

import json
from collections import Counter
from datetime import date

import numpy as np
import pytest

from configurator import UserError
from dataset.prompts import VALIDATION, PromptSource
from evals.rewards import is_right, require_reference
from evals.tasks import word_problems
from formats.tokenizer import Tokenizer


@pytest.fixture
def tokenizer(chat_folder):
    return Tokenizer.load(chat_folder)


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def test_embedded_prompts_are_a_function_of_the_number(tokenizer):
    one, two = (PromptSource("problems", tokenizer, 200, seed=3) for _ in range(2))
    backwards = [two.prompt(number, "", 0.5) for number in reversed(range(50))]
    assert [one.prompt(number, "", 0.5) for number in range(50)] == backwards[::-1]
    assert PromptSource("problems", tokenizer, 200, seed=4).prompt(0, "", 0.5) != one.prompt(0, "", 0.5)
    found = [one.prompt(n, "", 0.5) for n in range(1000)]
    offered = [prompt for prompt in found if prompt.has_tools]
    assert 450 < len(offered) < 550 and all("calculator(" in p.messages[0]["content"] for p in offered)
    families = Counter(prompt.row["family"] for prompt in offered)
    assert 0.4 < families["hard"] / len(offered) < 0.6 and families["add"] and not families["sort"]
    assert all(prompt.row["family"] != "hard" for prompt in found if not prompt.has_tools)
    assert not any(one.prompt(n, "", 0.0).has_tools for n in range(20))
    assert {one.prompt(n, "sort,date", 0.0).row["family"] for n in range(20)} == {"sort", "date"}
    with pytest.raises(UserError, match="block_size=10: a prompt has"):
        PromptSource("problems", tokenizer, 10, seed=3).prompt(0, "", 0.5)


def test_rows_of_a_file(tokenizer, tmp_path):
    """Every epoch reads all training rows once, validation rows are apart, and long rows are counted."""
    rows = [{"question": f"What is {n}?", "answer": str(n)} for n in range(39)]
    source = PromptSource(write(tmp_path / "a.jsonl", [*rows, {"question": "x y " * 99, "answer": "1"}]),
                          tokenizer, 60, 1, require_reference)
    assert (len(source.train), len(source.val), source.left_out) == (36, 3, 1) and source.epoch_size == 36
    epochs = [[source.prompt(n + 36 * epoch, "", 0.5).row["answer"] for n in range(36)] for epoch in (0, 1)]
    assert sorted(epochs[0]) == sorted(epochs[1]) and epochs[0] != epochs[1]
    for epoch, answers in enumerate(epochs):
        order = np.random.default_rng((1, epoch)).permutation(36)
        assert answers == [source.train[place].row["answer"] for place in order]
    held_out = [source.prompt(VALIDATION + n, "", 0.5).row["answer"] for n in range(3)]
    assert sorted([*epochs[0], *held_out], key=int) == [str(n) for n in range(39)]
    assert list(source.hashes) == [str(tmp_path / "a.jsonl")]
    with pytest.raises(UserError, match="have no epochs; count steps"):
        PromptSource("problems", tokenizer, 60, 1).epoch_size  # noqa: B018


def test_an_epoch_is_shuffled_once(tokenizer, tmp_path, monkeypatch):
    rows = [{"question": f"What is {n}?", "answer": str(n)} for n in range(39)]
    source, seeds = PromptSource(write(tmp_path / "a.jsonl", rows), tokenizer, 60, seed=7), []
    make = np.random.default_rng
    monkeypatch.setattr(np.random, "default_rng", lambda seed: seeds.append(seed) or make(seed))
    for number in (0, 1, 35, 36, 2, 37):
        source.prompt(number, "", 0.5)
    assert seeds == [(7, 0), (7, 1)]


def test_rows_of_a_benchmark_are_asked_as_eval_asks_them(tokenizer, tmp_path):
    """The prompt that a model learns with prepare.py --task=, and that eval.py --chat=True asks."""
    rows = [{"question": f"What is {n} + 1?", "answer": f"{n} + 1 = {n + 1}\n#### {n + 1}"} for n in range(9)]
    path = write(tmp_path / "gsm8k_test.jsonl", rows)
    source = PromptSource(path, tokenizer, 99, 1, require_reference, task="gsm8k")
    found = {prompt.messages[-1]["content"]: prompt.row for prompt in (*source.train, *source.val)}
    problems = word_problems.load(path, 9, 0).asked
    assert found.keys() == {problem.prompt for problem in problems}, "Question: ...\nAnswer:"
    assert all(is_right(found[each.prompt], {"role": "assistant", "content": f"So {each.number}"})
               for each in problems)
    with pytest.raises(UserError, match=r"gsm8k_test.jsonl:1: not a row of sst2 \(KeyError: 'label'\)"):
        PromptSource(path, tokenizer, 99, 1, task="sst2")
    with pytest.raises(UserError, match="task=gsm8k: needs files of this task's rows as --dataset="):
        PromptSource("problems", tokenizer, 99, 1, task="gsm8k")


def test_equal_rows_are_on_one_side_of_the_split(tokenizer, tmp_path):
    for n in range(10):
        rows = [{"question": f"What is {n} + {i}?", "answer": str(n + i)} for i in range(25)] * 2
        source = PromptSource(write(tmp_path / f"{n}.jsonl", rows), tokenizer, 60, 1)
        train, val = ({prompt.row["question"] for prompt in part} for part in (source.train, source.val))
        assert len(train | val) == 25 and not train & val


def test_a_column_of_dates_is_no_obstacle(tokenizer, tmp_path):
    import pyarrow
    import pyarrow.parquet

    rows = [{"question": f"{n}?", "answer": "1", "day": date(2026, 1, 1 + n)} for n in range(4)]
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "a.parquet")
    assert len(PromptSource(str(tmp_path / "a.parquet"), tokenizer, 60, 1).train) == 3


def test_forms_of_rows(tokenizer, tmp_path):
    rows = [{"question": "Which?", "choices": ["x", "y"], "answer": 0},
            {"system": "You can call calculator(expression).", "prompt": "2 * 3?", "answer": "6"},
            {"messages": [{"role": "user", "content": "Hi"}], "regex": "h.*"}]
    source = PromptSource(write(tmp_path / "a.jsonl", rows), tokenizer, 200, 1, require_reference)
    found = {prompt.messages[-1]["content"]: prompt for prompt in source.train + source.val}
    assert set(found) == {"Which?\nA. x\nB. y", "2 * 3?", "Hi"}
    assert found["2 * 3?"].has_tools and not found["Hi"].has_tools


@pytest.mark.parametrize("rows, message", [
    ([{"question": "x", "answer": "1"}, {"question": "y"}], "a.jsonl:2: no reference answer"),
    ([{"text": "x"}], "a.jsonl:1: no question"), ([3], "a.jsonl:1: no question"), ([], "0 of 0 prompts fit"),
    ([{"question": "x", "answer": "1"}], "1 of 1 prompts fit block_size=200; at least 2 are needed"),
    ([{"messages": [{"role": "assistant", "content": "x"}], "answer": "1"}], "a.jsonl:1: no question"),
])  # fmt: skip
def test_bad_rows_are_one_line(tokenizer, tmp_path, rows, message):
    with pytest.raises(UserError, match=message):
        PromptSource(write(tmp_path / "a.jsonl", rows), tokenizer, 200, 1, require_reference)
