"""A needle in a haystack: exact lengths and depths, one needle; an oracle that reads the prompt."""

import re
from collections import Counter

import pytest

from configurator import UserError
from evals.lm import LM
from evals.tasks import needle
from formats.hf import find_folder
from formats.tokenizer import Tokenizer
from tests.conftest import busy_model, tiny_config


@pytest.fixture(scope="module")
def base(trained):
    lm = LM(str(trained), device="cpu")
    lm.model.reconfigure(block_size=300)
    return lm


@pytest.fixture(scope="module")
def chat(chat_folder):
    lm = LM(str(chat_folder), device="cpu", chat=True)
    lm.model.reconfigure(block_size=300)
    return lm


@pytest.fixture(scope="module")
def tests():
    return needle.load(None, 500, None, None, 100)


def reader(lm, asked, wrong=0):
    """An oracle that reads the number in the prompt; the first `wrong` answers are 9."""
    def generate_until(prompts, stops, max_new_tokens):
        asked.extend(prompts)
        numbers = [re.search(r"secret number is (\d{7})\.\n", lm.tokenizer.decode(ids))[1] for ids in prompts]
        return [f" {'9' if i < wrong else number}. And" for i, number in enumerate(numbers)]
    return generate_until


def test_the_grid_of_tests(tests):
    assert tests.side == 5 and len({test.number for test in tests.tests}) == 100
    assert set(Counter((test.row, test.column) for test in tests.tests).values()) == {4}
    assert all(len(test.number) == 7 for test in tests.tests)
    for count, side in ((3, 1), (20, 2), (37, 3), (400, 10), (1000, 10)):
        found = needle.load(None, 10**6, None, None, count)
        assert found.side == side and len(found.tests) == count
        assert min(Counter((test.row, test.column) for test in found.tests).values()) >= min(count, 4)
    assert len(needle.load(None, 20, None, None, 100).tests) == 20, "--limit limits the tests as well"
    assert len(tests.text) > 2**20 and "import" in tests.text


@pytest.mark.parametrize("chatting", [False, True])
def test_lengths_and_depths_are_exact(base, chat, tests, chatting):
    lm = chat if chatting else base
    lengths, prompts = needle.prompts_of(lm, tests, 300)
    steps = [b - a for a, b in zip(lengths, lengths[1:], strict=False)]
    assert lengths[0] < 150 and lengths[-1] == 300 and max(steps) - min(steps) <= 1
    question = needle.QUESTION_CHAT if chatting else needle.QUESTION
    lm.truncated = []
    for test, ids in zip(tests.tests, prompts, strict=True):
        whole, text = lm.prompt_ids(ids, needle.ANSWER), lm.tokenizer.decode(ids)
        assert len(whole) + needle.ANSWER == lengths[test.column]
        line = f"The secret number is {test.number}.\n"
        before, after = text.removesuffix(question).split(line)
        assert before == "" or before.endswith("\n"), "the needle is a line of its own"
        if test.row in (0, 4):
            assert (before, after)[test.row // 4] == ""
        else:
            depth = len(lm.tokenizer.encode(before)) / len(lm.tokenizer.encode(before + after))
            widest = max(map(len, re.split("(?<=\n)", before + after))) / len(before + after)
            assert abs(depth - test.row / 4) < widest + 0.1
    assert lm.truncated == [False] * 100


def test_oracle_wrong_answers_and_random_weights(base, chat, tests, monkeypatch):
    for lm in (base, chat):
        asked = []
        monkeypatch.setattr(lm, "generate_until", reader(lm, asked))
        result = needle.score(lm, tests, None, 100)
        assert result.figures == {"accuracy": (1, 0, 100)} and len(asked) == 100
        assert result.details["found"] == [[1] * 5] * 5 and result.details["trained_context"] == 300
        monkeypatch.setattr(lm, "generate_until", lambda prompts, *words: [" 1234567890"] * len(prompts))
        assert needle.score(lm, tests, None, 100).figures == {"accuracy": (0, 0, 100)}
        monkeypatch.undo()
        few = needle.load(None, 12, None, None, 100)
        assert needle.score(lm, few, None, 100).figures == {"accuracy": (0, 0, 12)}, "random weights"
    monkeypatch.setattr(base, "generate_until", reader(base, [], wrong=5))  # one test per length, depth 0
    result = needle.score(base, tests, None, 100)
    assert result.details["found"] == [[0.75] * 5] + [[1] * 5] * 4
    assert [answer["right"] for answer in result.answers] == [False] * 5 + [True] * 95
    assert {answer["depth"] for answer in result.answers[:5]} == {0}
    assert sorted({answer["length"] for answer in result.answers}) == result.details["lengths"]


def test_positions_are_extended_beyond_the_context_and_restored(base, tests):
    assert needle.score(base, needle.load(None, 8, None, None, 8), 500, 8).details["lengths"][-1] == 500
    assert base.model.config.block_size == 300 and len(base.model.rope.cos) == 300
    with pytest.raises(UserError, match="context_length=40: needle, question and answer alone are"):
        needle.score(base, tests, 40, 100)
    assert base.model.config.block_size == 300


def test_learned_positions_cannot_be_extended(trained, tmp_path):
    tokenizer = Tokenizer.load(find_folder(trained))
    config = tiny_config(vocab_size=tokenizer.vocab_size, block_size=200, n_kv_head=4, position="learned",
                         norm="layernorm", mlp="gelu", bias="all")
    busy_model(config).save_pretrained(tmp_path, eos_token_id=tokenizer.end_ids)
    tokenizer.save(tmp_path)
    lm, few = LM(str(tmp_path), device="cpu"), needle.load(None, 3, None, None, 3)
    assert needle.score(lm, few, None, 3).details["lengths"] == [200]
    with pytest.raises(UserError, match="context_length=201: .* has learned positions, at most 200"):
        needle.score(lm, few, 201, 3)


def test_a_file_of_the_user(base, tmp_path):
    path = tmp_path / "mine.txt"
    path.write_text("one two three\n" * 5)
    mine = needle.load(str(path), 8, None, None, 8)
    assert mine.text == "one two three\n" * 5
    _, prompts = needle.prompts_of(base, mine, 300)
    assert base.tokenizer.decode(prompts[-1]).count("one two three\n") > 10, "a short text is repeated"
    path.write_text("one two three " * 10)
    _, prompts = needle.prompts_of(base, needle.load(str(path), 8, None, None, 8), 300)
    assert all(" three \nThe secret" in base.tokenizer.decode(ids) for ids in prompts), "at the only line end"
    assert needle.load(str(tmp_path), 8, None, None, 8).text == needle.load(None, 8, None, None, 8).text
    for name, content, message in (("no.txt", None, "no such file"), ("bad.txt", b"\xff", "not UTF-8")):
        if content:
            (tmp_path / name).write_bytes(content)
        with pytest.raises(UserError, match=message):
            needle.load(str(tmp_path / name), 8, None, None, 8)


def test_the_picture():
    pytest.importorskip("matplotlib")
    details = {"lengths": [100, 2000], "depths": [0, 100], "trained_context": 1024,
               "found": [[1, 0], [0.5, 0.25]]}
    picture = needle.draw({"out/a": details, "out/b": details | {"trained_context": 4096}})
    left, right, bar = picture.axes
    assert [text.get_text() for text in left.texts] == ["100", "0", "50", "25"]
    assert [label.get_text() for label in left.get_xticklabels()] == ["100", "2,000"]
    assert left.get_legend().texts[0].get_text() == "trained context: 1,024 tokens"
    assert [axes.lines[0].get_xdata()[0] for axes in (left, right)] == [0.5, 1.5], "right of trained lengths"
    assert (left.get_xlabel(), bar.get_ylabel()) == ("prompt and answer (tokens)", "needles found (%)")
