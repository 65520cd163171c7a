"""train.py as users start it: the default run, and every config file."""

import json
from pathlib import Path

import pytest
import torch

import train
from configurator import configure
from loop import plan_stages
from model import GPT, GPTConfig
from tests.conftest import ROOT, TINY_RUN

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
    assert train.main([*shape, "--max_steps=3", "--sample_tokens=16", "--eval_interval=2"]) == 0
    printed = capsys.readouterr().out
    for expected in ("in = ", "model ", "MFLOP per token", "sample ", "bits/byte", "gzip -9 ", "xz -9e "):
        assert expected in printed
    assert "python sample.py --model=out/base" in printed
    meta = json.loads(Path("data/pystdlib/meta.json").read_text())
    assert meta["rows"]["in"] == meta["rows"]["kept"] + sum(meta["rows"]["skipped"].values()) > 500
    assert meta["vocab_size"] == 4096 and meta["tokens"]["val"] > 30_000
