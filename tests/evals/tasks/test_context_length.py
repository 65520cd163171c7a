"""Loss by position and by context: each figure computed again in another way, rows by hand, the command."""

import io
import json
import types

import numpy as np
import pytest
import torch
import torch.nn.functional as F

import eval as evaluation
from configurator import UserError
from evals.lm import LM
from evals.tasks import context_length
from evals.tasks.perplexity import Texts, read_texts


@pytest.fixture(scope="module")
def lm(trained):
    return LM(str(trained), device="cpu")


def test_loss_against_position(lm, data):
    texts = read_texts(str(data), "", 60_000)
    result = context_length.score(lm, texts, "")
    assert lm.model.config.block_size == 64, "as it was"
    rows = np.stack(context_length.cut_rows(lm, texts, 128)).astype(np.int64)
    peer = LM(str(lm.folder), device="cpu").model
    peer.reconfigure(block_size=128)
    with torch.no_grad():
        ids = torch.from_numpy(rows)
        losses = F.cross_entropy(peer(ids[:, :-1]).transpose(1, 2), ids[:, 1:], reduction="none")
    ranges = result.details["loss_by_position"]
    assert ranges[0]["first"] == 0 and ranges[-1]["last"] == 127 and result.details["rows"] == len(rows) > 20
    for each in ranges:
        expected = losses[:, each["first"]:each["last"] + 1].mean().item()
        assert each["value"] == pytest.approx(expected, abs=1e-4)
    lengths = result.details["perplexity_by_length"]
    assert [*lengths] == [8, 16, 32, 64, 128]
    for length, each in lengths.items():
        assert each["value"] == pytest.approx(losses[:, :length].mean().exp().item(), rel=1e-4)
    assert [*result.figures] == ["perplexity_64", "perplexity_128", "extra_loss_after_32"]
    shorter = context_length.score(lm, texts, "", 48)
    assert [*shorter.figures] == ["perplexity_48"], "no context of at most 12 tokens is measured"
    assert shorter.details["perplexity_by_length"].keys() == {8, 16, 32, 48}
    with pytest.raises(UserError, match="no document of 50,001 tokens .give a smaller --context_length"):
        context_length.score(lm, texts, "", 50_000)
    pytest.importorskip("matplotlib")
    picture = context_length.draw({"one": result.details, "two": shorter.details})
    axes = picture.axes
    assert [each.get_xlabel() for each in axes] == ["position (tokens)", "context length (tokens)"]
    assert [each.get_ylabel() for each in axes] == ["loss (nats per token)", "perplexity"]
    assert "trained context: 64" in axes[0].get_legend_handles_labels()[1]
    picture.savefig(file := io.BytesIO())
    assert file.getvalue().startswith(b"\x89PNG")


def test_loss_after_shorter_contexts(lm, data):
    """Rows of 64: the last 8 targets after 16, 32 and 56 tokens, with float64 probabilities."""
    texts = read_texts(str(data), "", 20_000)
    result = context_length.score(lm, texts, "", 64)
    rows = np.stack(context_length.cut_rows(lm, texts, 64)).astype(np.int64)

    def losses(rows):
        with torch.no_grad():
            log_probs = F.log_softmax(lm.model(torch.from_numpy(rows[:, :-1])).double(), dim=-1).numpy()
        return -np.take_along_axis(log_probs, rows[:, 1:, None], axis=2)[:, -8:, 0].mean(axis=1)

    whole, found = losses(rows), result.details["loss_by_context"]
    assert [each["context"] for each in found] == [16, 32, 56]
    for each in found[:2]:
        short = losses(rows[:, -(each["context"] + 9):])
        extra = short - whole
        assert each["loss"] == pytest.approx(short.mean(), rel=1e-6)
        assert each["extra_loss"]["value"] == pytest.approx(extra.mean(), rel=1e-4)
        assert each["extra_loss"]["stderr"] == pytest.approx(extra.std(ddof=1) / len(rows)**0.5, rel=1e-4)
        assert each["extra_loss"]["n"] == len(rows) > 20
    assert found[2] == {"context": 56, "loss": pytest.approx(whole.mean(), rel=1e-6),
                        "extra_loss": {"value": 0, "stderr": 0, "n": len(rows)}}
    assert result.figures["extra_loss_after_16"]._asdict() == found[0]["extra_loss"]


def test_through_a_cache_of_sinks_and_a_window(lm, data):
    """Up to the size of the cache nothing changes; after that the loss stays near that of the context."""
    texts = read_texts(str(data), "", 30_000)
    plain = context_length.score(lm, texts, "", 192)
    sinks = context_length.score(lm, texts, "", 192, sinks=4, window=44)
    assert lm.model.config.block_size == 64, "as it was"
    pairs = list(zip(plain.details["loss_by_position"], sinks.details["loss_by_position"], strict=True))
    for each, other in pairs:
        assert other["value"] == pytest.approx(each["value"], abs=1e-4) or other["last"] >= 48
    assert any(abs(each["value"] - other["value"]) > 1e-3 for each, other in pairs)
    assert [*sinks.figures] == ["perplexity_64", "perplexity_192"] and not sinks.details["loss_by_context"]
    with pytest.raises(UserError, match="only work with --tasks=context_length"):
        evaluation.EvalConfig(tasks="context_length,problems", sinks=4)


def test_rows_by_hand():
    """Documents of 9, 5, 12 and 4 tokens as rows of 4 + 1: no row holds two documents."""
    lm = types.SimpleNamespace(tokenizer=types.SimpleNamespace(encode=lambda text: list(map(int, text))))
    texts = Texts(["012345678", "01234", "012345678901", "0123"], "somewhere")
    rows = context_length.cut_rows(lm, texts, 4)
    assert ["".join(map(str, row)) for row in rows] == ["01234", "45678", "01234", "01234", "45678"]
    with pytest.raises(UserError, match="somewhere: no document of 13 tokens"):
        context_length.cut_rows(lm, texts, 12)


def test_two_models_on_a_data_folder(trained, chat_folder, data, tmp_path, capsys):
    """The command: all models read the same text of a prepared folder, longer than their contexts."""
    argv = [f"--model={trained}", f"--compare={chat_folder}", "--tasks=context_length", "--limit=20",
            f"--data=context_length={data}", "--context_length=100", "--device=cpu", f"--out_dir={tmp_path}"]
    assert evaluation.main(argv) == 0
    lines = [line.split()[:3] for line in capsys.readouterr().out.splitlines()]
    assert ["context_length", "extra_loss_after_16"] in [line[:2] for line in lines]
    tasks = [model["tasks"]["context_length"]
             for model in json.loads((tmp_path / "results.json").read_text())["models"]]
    for task in tasks:
        assert task["details"]["text"] == str(data)
        assert [each["context"] for each in task["details"]["loss_by_context"]] == [16, 32, 64, 88]
    texts = read_texts(str(data), "", 20 * 1024)
    rows = context_length.cut_rows(LM(str(trained), device="cpu"), texts, 100)
    assert tasks[0]["details"]["rows"] == len(rows)
