"""formats/checkpoint.py: a checkpoint is complete or absent; verification; pointers."""

import json

import pytest
import torch

import train
from configurator import UserError
from formats import checkpoint
from formats.hf import find_folder
from model import GPT
from tests.runs import losses, run


def test_a_checkpoint_is_a_hugging_face_folder(trained):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder = trained / "step_000060"
    assert sorted(str(p.relative_to(folder)) for p in folder.rglob("*") if p.is_file()) == [
        "config.json",
        "generation_config.json",
        "manifest.json",
        "model.safetensors",
        "tokenizer.json",
        "tokenizer_config.json",
        "trainer/state.pt",
    ]
    theirs, ours = AutoModelForCausalLM.from_pretrained(folder).eval(), GPT.from_pretrained(trained).eval()
    ids = torch.randint(500, (2, 64), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        assert (theirs(ids).logits - ours(ids)).abs().max() <= 1e-5
    assert AutoTokenizer.from_pretrained(folder).eos_token_id == theirs.config.eos_token_id == 499
    saved = torch.load(folder / "trainer" / "state.pt", weights_only=True)
    assert saved["progress"]["step"] == 60 and saved["progress"]["tokens"] == 60 * 8 * 64
    assert checkpoint.find_corruption(folder) is None
    pointers = json.loads((trained / "checkpoints.json").read_text())
    assert pointers["last"] == pointers["best"] == "step_000060"


def test_old_checkpoints_are_deleted_but_not_the_best(data, tmp_path, monkeypatch):
    values = iter([3.0, 1.0, 2.0, 2.0, 2.0])
    monkeypatch.setattr(train.TextEvaluation, "__call__",
                        lambda self, model, last: {"val_loss": next(values)})
    monkeypatch.setattr(train, "print_summary", lambda *arguments: None)
    run(data, tmp_path, "--max_steps=5", "--save_interval=1", "--eval_interval=1", "--keep_checkpoints=2")
    assert [folder.name for folder in checkpoint.step_folders(tmp_path)] == [
        "step_000002",
        "step_000004",
        "step_000005",
    ]
    assert checkpoint.read_pointers(tmp_path) == {
        "last": "step_000005",
        "best": "step_000002",
        "best_val_loss": 1.0,
    }
    assert find_folder(tmp_path) == tmp_path / "step_000002"


@pytest.mark.parametrize("name", ["model.safetensors", "trainer/state.pt", "config.json", "manifest.json"])
def test_a_damaged_checkpoint_is_skipped(data, tmp_path, capsys, name):
    args = ["--max_steps=6", "--save_interval=2", "--optimizer=adamw"]
    expected = losses(run(data, tmp_path, *args))
    path = tmp_path / "step_000006" / name
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 4
    path.write_bytes(content)
    capsys.readouterr()
    assert losses(run(data, tmp_path, *args)) == expected
    printed = capsys.readouterr().out
    assert "step_000006: skipped" in printed and "resumed   from" in printed and "step_000004" in printed


def test_a_failed_write_leaves_nothing(tmp_path):
    def write(folder):
        (folder / "a").write_text("a")
        raise OSError(28, "No space left on device", "a")

    checkpoint.write_checkpoint(tmp_path, 1, lambda folder: (folder / "a").write_text("a"))
    with pytest.raises(UserError, match="step_000002: could not be written.*No space left"):
        checkpoint.write_checkpoint(tmp_path, 2, write)
    assert [path.name for path in tmp_path.iterdir()] == ["step_000001"]


def test_a_checkpoint_of_the_same_step_stays_until_the_new_one_is_whole(tmp_path):
    def fails(folder):
        (folder / "trainer").mkdir()
        raise OSError("No space left on device")

    folder = checkpoint.write_checkpoint(tmp_path, 1, lambda folder: (folder / "a").write_text("old"))
    with pytest.raises(UserError, match="could not be written .No space left on device."):
        checkpoint.write_checkpoint(tmp_path, 1, fails)
    assert (folder / "a").read_text() == "old" and checkpoint.find_corruption(folder) is None
    (tmp_path / ".step_000001.tmp" / "trainer").mkdir(parents=True)  # of a process that was killed
    checkpoint.write_checkpoint(tmp_path, 1, lambda folder: (folder / "a").write_text("new"))
    assert (folder / "a").read_text() == "new" and [*tmp_path.iterdir()] == [folder]
    folder.rename(tmp_path / ".step_000001.old")  # a process was killed between the two renames
    checkpoint.clean_tmp(tmp_path)
    assert not [*tmp_path.iterdir()]


def test_the_best_checkpoint_has_the_lowest_validation_loss(data, tmp_path):
    args = ["--max_steps=6", "--eval_tokens=256", "--save_interval=1", "--eval_interval=1"]
    events = run(data, tmp_path, *args)
    best = min((event["val_loss"], event["step"]) for event in events if "val_loss" in event)[1]
    assert json.loads((tmp_path / "checkpoints.json").read_text())["best"] == f"step_{best:06d}"
