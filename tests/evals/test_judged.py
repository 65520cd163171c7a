"""Judged answers: what a row is, and that a stopped run continues as if it had not been stopped."""

from dataclasses import dataclass, replace

import pytest
import torch

from configurator import UserError
from dataset.prompts import PromptSource
from evals import judged
from evals.judged import AnswerKeys, stored_answers
from formats.chat_format import encode_prompt
from formats.tokenizer import Tokenizer
from generation.rollouts import Rollout, RolloutSampler
from model import GPT


@dataclass(frozen=True, kw_only=True)
class Keys(AnswerKeys):
    families: str = "add,copy"
    num_problems: int = 5
    num_samples: int = 3
    max_new_tokens: int = 6
    answers_batch_size: int = 6


def make(cache, path, dataset="problems", seed=4, task=None, **changes):
    keys, device = replace(Keys(), **changes), torch.device("cpu")
    return stored_answers(cache, keys, str(path), dataset, seed, device, task)


def test_rows(chat_folder, tmp_path, monkeypatch):
    """Half of the answers are called right, so that both kinds are seen."""
    monkeypatch.setattr(judged, "is_right", lambda row, message: len(message["content"]) % 2 == 0)
    rows, tokenizer = make(tmp_path, chat_folder), Tokenizer.load(chat_folder)
    source = PromptSource("problems", tokenizer, 64, 4)
    asked = [source.prompt(number, "add,copy", 0.0) for number in range(5)]
    assert [row["row"] for row in rows] == [prompt.row for prompt in asked]
    assert {row["row"]["family"] for row in rows} == {"add", "copy"}
    for row, prompt in zip(rows, asked, strict=True):
        assert row["prompt"] == prompt.messages and len(row["answers"]) == 3
        ids = encode_prompt(tokenizer, row["prompt"])
        for answer in row["answers"]:
            assert answer["ids"][:len(ids)] == ids and len(answer["sampled"]) == len(answer["ids"])
            assert answer["sampled"] == [0] * len(ids) + [1] * (len(answer["ids"]) - len(ids))
            assert answer["right"] == (len(answer["messages"][-1]["content"]) % 2 == 0)
    assert len({tuple(answer["ids"]) for answer in rows[0]["answers"]}) == 3, "samples differ"


def test_the_checker_judges(chat_folder, tmp_path, monkeypatch):
    asked = PromptSource("problems", Tokenizer.load(chat_folder), 64, 4).prompt(0, "add", 0.0)
    answers = [Rollout(asked.ids, [1], [True], [0.0], [{"content": text}])
               for text in (asked.row["answer"], "x")]
    monkeypatch.setattr(RolloutSampler, "sample", lambda *rest: answers)
    (row,) = make(tmp_path, chat_folder, num_problems=1, num_samples=2, answers_batch_size=2, families="add")
    assert [answer["right"] for answer in row["answers"]] == [True, False]


def test_a_stopped_run_continues(chat_folder, tmp_path, monkeypatch):
    """What is missing is made, and is what an undisturbed run makes. Nothing is made twice."""
    whole, more = make(tmp_path, chat_folder), make(tmp_path, chat_folder, num_problems=6)
    files = sorted(tmp_path.glob("*/*.jsonl"))
    assert [file.name for file in files] == ["0000000.jsonl", "0000002.jsonl", "0000004.jsonl"]
    assert more[:5] == whole and len(more) == 6, "a larger number adds rows"
    files[1].unlink()
    assert make(tmp_path, chat_folder) == whole
    monkeypatch.setattr(RolloutSampler, "sample", None)
    assert make(tmp_path, chat_folder) == whole and make(tmp_path, chat_folder, num_problems=2) == whole[:2]


def test_files_are_keyed_by_model_and_data(chat_folder, tmp_path, monkeypatch):
    monkeypatch.setattr(judged, "judged_rows", lambda *rest: [])
    other = tmp_path / "other"
    GPT(GPT.from_pretrained(chat_folder).config, seed=5).save_pretrained(other)
    Tokenizer.load(chat_folder).save(other)
    own = tmp_path / "own.jsonl"
    own.write_text('{"question": "1", "answer": "1"}\n{"question": "2", "answer": "2"}\n')
    for path, changes in ((chat_folder, {}), (other, {}), (chat_folder, dict(num_samples=4)),
                          (chat_folder, dict(calculator=0.5)), (chat_folder, dict(families="add")),
                          (chat_folder, dict(temperature=0.5)), (chat_folder, dict(seed=5)),
                          (chat_folder, dict(max_new_tokens=7)), (chat_folder, dict(dataset=str(own))),
                          (chat_folder, dict(dataset=str(own), task="gsm8k")),
                          (chat_folder, dict(num_problems=9))):  # the last one has the first one's folder
        make(tmp_path / "cache", path, **changes)
    assert len(list((tmp_path / "cache").iterdir())) == 10


@pytest.mark.parametrize("key, value", [("families", "add,nosuch"), ("temperature", 0.0), ("num_samples", 0),
                                        ("calculator", 1.5)])
def test_mistakes(key, value):
    with pytest.raises(UserError, match=f"{key}={value}: "):
        Keys(**{key: value})
