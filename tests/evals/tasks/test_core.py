"""CORE: which tokens count, by hand; means and greedy words equal transformers'; centring; missing tasks."""

import dataclasses
import json
import random

import numpy as np
import pytest
import torch

from configurator import UserError
from evals.lm import LM
from evals.results import Figure
from evals.tasks import core
from evals.tasks.core import SETTINGS, centre, examples, question_of, scored_texts
from formats.tokenizer import Tokenizer
from tests.conftest import CODE, busy_model, tiny_config

CHOICE = {"query": "He turned on the tap, so", "choices": ["the cup filled.", "the dog slept."], "gold": 0}
SCHEMA = {"context_options": ["Ann met Eve because Ann", "Ann met Eve because Eve"],
          "continuation": "ran off.", "gold": 1}
WORD = {"context": "The capital of France is ", "continuation": "Paris"}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A random model with a tokenizer, as a folder."""
    path = tmp_path_factory.mktemp("core_model")
    tokenizer = Tokenizer.train([CODE], 400)
    model = busy_model(tiny_config(vocab_size=tokenizer.vocab_size, block_size=256))
    model.save_pretrained(path, eos_token_id=tokenizer.eot_id)
    tokenizer.save(path)
    return path


@pytest.fixture
def data(tmp_path):
    rows = {"copa": [CHOICE | {"gold": number % 2} for number in range(6)], "winograd_wsc": [SCHEMA] * 4,
            "lambada_openai": [WORD | {"continuation": f"word {number}"} for number in range(5)],
            "bigbench_operators": [{"context": f"{number} + 1 =", "continuation": f"{number + 1}"}
                                   for number in range(12)]}
    for name, each in rows.items():
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in each))
    return tmp_path


def test_the_tokens_that_count(folder):
    """After the text that all choices share; the end that they share; the word that is missing: by hand."""
    tokenizer = Tokenizer.load(folder)

    def scored(row, shots=""):
        texts = scored_texts(tokenizer, dataclasses.replace(question_of(row, ""), shots=shots))
        assert all(text.ids[0] == tokenizer.eot_id for text in texts)
        return [tokenizer.decode(text.ids[-text.num_targets:].tolist(), inside=True) for text in texts], texts

    words, texts = scored(CHOICE, "Example\n\n")
    assert words[0].endswith("cup filled.") and words[1].endswith("dog slept.")
    assert " so" not in words[0] and len(texts) == 2
    whole = tokenizer.decode(texts[0].ids[1:].tolist())
    assert whole == "Example\n\nHe turned on the tap, so the cup filled."
    assert scored(SCHEMA)[0] == [" ran off.", " ran off."]
    assert scored(WORD)[0] == [" Paris"]
    words, texts = scored({"query": "Q", "choices": ["x", "x y"], "gold": 0})
    assert texts[0].num_targets == 1, "a choice that begins another one keeps a token"


def test_worked_examples_are_other_rows():
    rows = [{"context": f"c{number} ", "continuation": str(number)} for number in range(8)]
    questions = [question_of(row, "\nAnswer:") for row in rows]
    text = examples(questions, 3, 7)
    assert sorted(text.split("\n\n")[:-1]) == [f"c{n}\nAnswer: {n}" for n in range(8) if n != 3]
    order = random.Random(1234 + 3).sample([0, 1, 2, 4, 5, 6, 7], 7)
    assert text.startswith(f"c{order[0]}\nAnswer: {order[0]}\n\nc{order[1]}")
    assert examples(questions, 3, 0) == ""


def test_scores_equal_transformers(folder, data):
    import transformers
    peer, lm = transformers.AutoModelForCausalLM.from_pretrained(folder), LM(str(folder), "cpu")
    tasks = core.load(str(data), 100, None)
    assert list(tasks) == ["copa", "lambada_openai", "winograd", "bigbench_operators"]
    result, answers = core.score(lm, tasks), iter(core.score(lm, tasks).answers)
    for name, questions in tasks.items():
        for question in questions:
            answer = next(answers)
            assert answer["task"] == name and question.shots.count("\n\n") == SETTINGS[name].shots
            means, greedy = [], []
            for ids, count in scored_texts(lm.tokenizer, question):
                ids = torch.from_numpy(ids.astype(np.int64))
                with torch.inference_mode():
                    rows = peer(ids[None, :-1]).logits[0, -count:].log_softmax(-1)
                means.append(rows[torch.arange(count), ids[-count:]].mean().item())
                greedy.append(torch.equal(rows.argmax(-1), ids[-count:]))
            if len(question.choices) == 1:
                assert answer["right"] == greedy[0]
            else:
                assert answer["log_probs"] == pytest.approx(means, abs=1e-4)
                assert answer["said"] == means.index(max(means))
    figures = result.figures
    shares = {name: figures[name].value for name in tasks}
    expected = sum((shares[name] - chance) / (1 - chance) for name, chance in
                   (("copa", 0.5), ("winograd", 0.5), ("lambada_openai", 0), ("bigbench_operators", 0))) / 4
    assert figures["core"].value == pytest.approx(expected) and figures["core"].n == 4
    assert len(result.details["missing"]) == 18 and "piqa" in result.details["missing"]


def test_long_texts_lose_their_beginning(folder, data):
    (data / "copa.jsonl").write_text(json.dumps(CHOICE | {"query": "word " * 400 + "so"}) + "\n")
    result = core.score(LM(str(folder), "cpu"), {"copa": core.load(str(data), 99, None)["copa"]})
    assert result.details["truncated"] == 1


def test_centring():
    assert centre(Figure(0.625, 0.03, 9), 0.25) == Figure(0.5, 0.04, 9)
    assert centre(Figure(0.2, 0.1, 9), 0.0) == Figure(0.2, 0.1, 9)
    assert centre(Figure(0.25, 0.0, 9), 0.25).value == 0 and centre(Figure(1.0, 0.0, 9), 0.62).value == 1
    assert len(SETTINGS) == 22 and len({each.file for each in SETTINGS.values()}) == 21


def test_what_is_refused(folder, data, tmp_path_factory):
    with pytest.raises(UserError, match="no file of CORE"):
        core.load(str(tmp_path_factory.mktemp("empty")), 9, None)
    with pytest.raises(UserError, match="no file of CORE"):
        core.load(None, 9, None)
    with pytest.raises(UserError, match="bigbench_operators.jsonl: 10 rows, with limit=10; CORE takes 10"):
        core.load(str(data), 10, None)
    (data / "copa.jsonl").write_text(json.dumps(CHOICE | {"gold": -1}) + "\n")
    with pytest.raises(UserError, match="copa.jsonl: row 1 does not fit this benchmark .*label -1"):
        core.load(str(data), 100, None)
