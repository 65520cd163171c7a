"""Toxicity: a classifier of transformers with known probabilities, and the list of words as a fallback."""

import pytest
import torch
import transformers

from configurator import UserError
from evals.benchmarks import convert
from evals.lm import LM
from evals.tasks import toxicity
from evals.tasks.toxicity import prompt_of
from tests.conftest import strangers_model


@pytest.fixture(scope="module")
def lm(trained):
    return LM(str(trained), device="cpu")


def save_classifier(folder, labels, **settings):
    """A BERT that always answers with the logits 0, 1, .. of its labels."""
    folder.mkdir()
    (folder / "vocab.txt").write_text("\n".join(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "a"]))
    transformers.BertTokenizerFast(str(folder / "vocab.txt")).save_pretrained(folder)
    model = transformers.BertForSequenceClassification(transformers.BertConfig(
        vocab_size=6, hidden_size=8, num_hidden_layers=1, num_attention_heads=1, intermediate_size=8,
        num_labels=len(labels), id2label=dict(enumerate(labels)),
        label2id={label: number for number, label in enumerate(labels)}, **settings))
    with torch.no_grad():
        model.classifier.weight.zero_()
        model.classifier.bias.copy_(torch.arange(len(labels)))
    model.save_pretrained(folder)
    return str(folder)


def said(lm, monkeypatch, texts):
    def generate(prompts, stops, max_new_tokens):
        lm.truncated = [False] * len(prompts)
        return texts

    monkeypatch.setattr(lm, "generate_until", generate)


def test_a_classifier(lm, tmp_path, monkeypatch):
    said(lm, monkeypatch, ["a", "a a"])
    softmax, sigmoid = torch.tensor([0.0, 1.0]).softmax(0)[1].item(), torch.tensor(1.0).sigmoid().item()
    for number, (labels, settings, expected) in enumerate((
            (["neutral", "Toxic"], {}, softmax), (["nothate", "hate"], {}, softmax),
            (["obscene", "toxic"], {"problem_type": "multi_label_classification"}, sigmoid),
            (["toxicity", "other"], {}, 1 - softmax))):
        folder = save_classifier(tmp_path / str(number), labels, **settings)
        result = toxicity.score(lm, ["one", "two"], folder)
        assert result.figures["probability"].value == pytest.approx(expected, abs=1e-6)
        assert result.figures["toxic"] == (float(expected >= 0.5), 0, 2)
        assert [*result.figures] == ["toxic", "probability"] and result.details == {"judge": folder}
    folder = save_classifier(tmp_path / "x", ["joy", "anger"])
    with pytest.raises(UserError, match="none of its labels is toxic, .*: joy, anger"):
        toxicity.score(lm, ["one", "two"], folder)
    with pytest.raises(UserError, match="classifier=/nowhere: "):
        toxicity.score(lm, ["one", "two"], "/nowhere")
    (tmp_path / "toxicity.jsonl").write_text('{"prompt": "So if"}\n')
    for wrong in (folder, "/nowhere"):  # before the model writes anything
        with pytest.raises(UserError, match="classifier="):
            toxicity.load(str(tmp_path), 500, None, wrong)
    assert toxicity.load(str(tmp_path / "toxicity.jsonl"), 500, None, str(tmp_path / "0")) == ["So if"]


def test_a_classifier_that_brings_code_is_refused(tmp_path, monkeypatch):
    """Even if the terminal would answer "y" to the question of transformers."""
    monkeypatch.setattr("builtins.input", lambda *prompt: "y")
    folder = strangers_model(tmp_path / "model", "AutoModelForSequenceClassification", tmp_path / "bang")
    with pytest.raises(UserError, match="classifier=.*custom code"):
        toxicity.probabilities(str(folder), ["a"])
    assert not (tmp_path / "bang").exists()


def test_listed_words(lm, monkeypatch):
    said(lm, monkeypatch, ["You IDIOT!", "idiotic, but fine", "the classic bass"])
    result = toxicity.score(lm, ["one", "two", "three"])
    assert {key: figure.value for key, figure in result.figures.items()} == {
        "listed_words": pytest.approx(1 / 3)}
    assert "no measure of toxicity" in result.details["judge"]


def test_a_real_continuation(lm):
    assert toxicity.score(lm, ["import os", "x"]).answers[0]["said"]


def test_rows():
    rows = [{"prompt": {"text": "So if", "toxicity": 0.1}, "file": "f"}, {"prompt": "You", "file": "f"}]
    assert convert(rows, prompt_of) == ["So if", "You"]
    with pytest.raises(UserError, match="f: row 1 does not fit"):
        convert([{"prompt": " ", "file": "f"}], prompt_of)
