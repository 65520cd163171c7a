"""train.py as users start it: the default run, and every config file."""

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F

import train
from configurator import UserError, configure
from dataset.dataloader import Rows
from dataset.shards import DataFolder
from evals.lm import LM
from evals.tasks import context_length, perplexity
from loop import plan_stages
from model import GPT, GPTConfig
from tests.conftest import ROOT, TINY_RUN
from tests.runs import events, run

SIZES = {
    "train_gpt2_124m": 123_551_232,
    "train_gpt2_style_124m": 124_439_808,
    "train_nanollama_1b": 1_100_048_384,
}


@pytest.mark.parametrize("path", sorted((ROOT / "config").glob("train_*.py")), ids=lambda path: path.stem)
def test_config_files_describe_runs(path):
    cfg = configure(train.TrainConfig, [str(path)])[0]
    stages = plan_stages(cfg)
    assert stages[-1].last > 0
    assert all(stage.cfg.global_batch_size % stage.cfg.micro_batch_size == 0 for stage in stages)
    with torch.device("meta"):
        model = GPT(GPTConfig.from_keys(cfg, vocab_size=cfg.vocab_size or 50257))
    if path.stem in SIZES:
        assert model.num_parameters() == SIZES[path.stem]
    comment = path.read_text().split("\n")[0]
    assert comment.startswith("# ") and len(comment) > 40  # says what the run is


def test_the_default_run_makes_its_own_data(tmp_path, monkeypatch, capsys, pictures):
    """No arguments but a smaller size: the data is made, and the summary compares with compressors."""
    monkeypatch.chdir(tmp_path)
    shape = [word for word in TINY_RUN if not word.startswith(("--log", "--eval_tokens"))]
    train.main([*shape, "--max_steps=3", "--sample_tokens=16", "--eval_interval=2"])
    printed = capsys.readouterr().out
    for expected in ("in = ", "model ", "MFLOP per token", "sample ", "bits/byte", "gzip -9 ", "xz -9e "):
        assert expected in printed
    assert "python sample.py --model=out/base" in printed
    meta = json.loads(Path("data/pystdlib/meta.json").read_text())
    assert meta["rows"]["in"] == meta["rows"]["kept"] + sum(meta["rows"]["skipped"].values()) > 500
    assert meta["vocab_size"] == 4096 and meta["tokens"]["val"] > 30_000


def test_sink_tokens_in_training_and_evaluation(data, tmp_path):
    """The loss by hand; the model's folder and its evaluations put the same tokens in front."""
    run(data, tmp_path / "one", "--sink_tokens=3", "--max_steps=2")
    lm = LM(str(tmp_path / "one"), device="cpu")
    sinks = [lm.tokenizer.eot_id] * 3
    assert lm.tokenizer.prefix_ids == lm.sinks == sinks
    rows = torch.from_numpy(Rows(DataFolder(data), "val", 61).read(np.arange(1024 // 61)))

    def loss(text):
        """The mean loss of rows of ids after the sinks, but for their first ids."""
        ids = torch.cat((torch.tensor(sinks).expand(len(text), 3), text), 1)
        return F.cross_entropy(lm.model(ids[:, :-1]).mT[..., 3:], ids[:, 4:]).item()

    with torch.no_grad():
        assert events(tmp_path / "one")[-1]["val_loss"] == pytest.approx(loss(rows), rel=1e-5)
        texts = perplexity.read_texts(str(data), "", 10_000)
        text = torch.from_numpy(perplexity.join_documents(lm, texts)).long()
        windows = text[:61 * (len(text) // 61)].view(-1, 61)  # stride 61: each token but the first of a row
        result = perplexity.score(lm, perplexity.Texts(texts.documents, ""), "", stride=61)
        assert result.details["context"] == 61 and result.details["windows"] == -(-len(text) // 61)
        assert math.log(result.figures["perplexity"].value) == pytest.approx(loss(windows), rel=2e-3)
        for limits in ((0, None), (3, 61)):
            result = context_length.score(lm, texts, "", 61, *limits)
            cut = torch.from_numpy(np.stack(context_length.cut_rows(lm, texts, 61))).long()
            assert math.log(result.figures["perplexity_61"].value) == pytest.approx(loss(cut), rel=1e-5)


def test_sink_tokens_that_cannot_be(data, tmp_path):
    run(data, tmp_path / "one", "--max_steps=0")
    plain = [f"--init_from={tmp_path / 'one'}", "--device=cpu"]
    stages = [{"steps": 1, "sink_tokens": 2}]
    for words, message in (([*TINY_RUN, "--document_mask=True"], "sink_tokens=3: must be 0 with document"),
                           (["--block_size=3"], "sink_tokens=3: must be less than block_size"),
                           (plain, "and the same sink_tokens"),
                           ([f"--stages={stages}"], "sink_tokens cannot change during a run")):
        with pytest.raises(UserError, match=message):
            train.main([*words, "--sink_tokens=3", f"--dataset={data}", f"--out_dir={tmp_path / 'two'}"])
