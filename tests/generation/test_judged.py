"""Judged answers on disk: what they are, and that a stopped run continues as if it had not been stopped."""

import dataclasses
import itertools
import json

import pytest

from configurator import UserError
from dataset.problems import is_right, problems
from formats.chat_format import encode_prompt
from formats.files import lock_path
from formats.tokenizer import Tokenizer
from generation import judged
from generation.judged import Request, cache_path, family_names, make_answers
from generation.rollouts import Limits, RolloutSampler
from model import GPT

LIMITS = Limits(max_new_tokens=6, block_size=64, temperature=1.0, seed=4)
REQUEST = Request(("add", "copy"), count=5, samples=3)


@pytest.fixture
def sampler(chat_folder):
    return RolloutSampler(GPT.from_pretrained(chat_folder).eval(), Tokenizer.load(chat_folder), LIMITS)


def test_rows(sampler, chat_folder, tmp_path, monkeypatch):
    """Half of the answers are called right, so that both kinds are seen."""
    monkeypatch.setattr(judged, "is_right", lambda problem, message: len(message["content"]) % 2 == 0)
    rows = make_answers(tmp_path, chat_folder, sampler, REQUEST, batch_size=6)
    asked = list(itertools.islice(problems("train", 4, ("add", "copy")), 5))
    assert [row["key"] for row in rows] == [problem.key for problem in asked]
    assert [row["family"] for row in rows] == [problem.family for problem in asked]
    for row, problem in zip(rows, asked, strict=True):
        assert row["prompt"] == [{"role": "user", "content": problem.question}] and len(row["answers"]) == 3
        prompt = encode_prompt(sampler.tokenizer, row["prompt"])
        for answer in row["answers"]:
            assert answer["ids"][:len(prompt)] == prompt and len(answer["sampled"]) == len(answer["ids"])
            assert answer["sampled"] == [0] * len(prompt) + [1] * (len(answer["ids"]) - len(prompt))
            assert answer["right"] == (len(answer["messages"][-1]["content"]) % 2 == 0)
    assert len({tuple(answer["ids"]) for answer in rows[0]["answers"]}) == 3, "samples differ"


def test_the_checker_judges(sampler, chat_folder, tmp_path, monkeypatch):
    asked = next(problems("train", 4, ("add",)))
    rollouts = sampler.sample([[1, 2]], [0], 1, [False])
    rollouts[0].messages[-1]["content"] = asked.answer
    assert is_right(asked, rollouts[0].messages[-1])
    monkeypatch.setattr(sampler, "sample", lambda *rest: rollouts)
    (row,) = make_answers(tmp_path, chat_folder, sampler, Request(("add",), 1, 1), batch_size=4)
    assert [answer["right"] for answer in row["answers"]] == [True]


def test_a_stopped_run_continues(sampler, chat_folder, tmp_path, monkeypatch):
    """A kill leaves two rows and a half. What is missing is made, and is what an undisturbed run makes."""
    whole = make_answers(tmp_path / "a", chat_folder, sampler, REQUEST, batch_size=6)
    path = cache_path(tmp_path / "b", chat_folder, sampler, REQUEST)
    path.parent.mkdir()
    lines = [json.dumps(row) for row in whole]
    path.write_text("\n".join([*lines[:2], lines[2][:40]]))
    assert make_answers(tmp_path / "b", chat_folder, sampler, REQUEST, batch_size=3) == whole
    assert path.read_text() == "".join(line + "\n" for line in lines)
    # Nothing is made twice, and a larger count adds rows to the same file.
    monkeypatch.setattr(sampler, "sample", None)
    assert make_answers(tmp_path / "b", chat_folder, sampler, REQUEST, batch_size=3) == whole
    assert make_answers(tmp_path / "b", chat_folder, sampler, REQUEST._replace(count=2), 3) == whole[:2]
    assert cache_path(tmp_path / "b", chat_folder, sampler, REQUEST._replace(count=99)) == path


def test_the_file_is_keyed_by_model_and_data(sampler, chat_folder, tmp_path):
    other = tmp_path / "other"
    GPT(sampler.model.config, seed=5).save_pretrained(other)
    names = {cache_path(tmp_path, folder, sampler, request) for folder, request in (
        (chat_folder, REQUEST), (other, REQUEST), (chat_folder, REQUEST._replace(samples=4)),
        (chat_folder, REQUEST._replace(calculator=True)), (chat_folder, REQUEST._replace(families=("add",))))}
    for change in (dict(temperature=0.5), dict(seed=5), dict(max_new_tokens=7)):
        sampler.limits = dataclasses.replace(LIMITS, **change)
        names.add(cache_path(tmp_path, chat_folder, sampler, REQUEST))
    assert len(names) == 8


def test_mistakes(sampler, chat_folder, tmp_path):
    with pytest.raises(UserError, match="families=add,nosuch: no family 'nosuch'"):
        family_names("add,nosuch")
    lock = lock_path(cache_path(tmp_path, chat_folder, sampler, REQUEST).with_suffix(".lock"))
    assert lock is not None
    with pytest.raises(UserError, match="another process is writing it"):
        make_answers(tmp_path, chat_folder, sampler, REQUEST, batch_size=6)
