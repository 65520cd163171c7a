"""Fault 26: nothing from a stranger is executed or reads outside its folder, and no secret is written."""

import json
import os
import pickle
import shutil

import pytest
import torch

import train
from configurator import UserError
from formats import checkpoint
from formats.files import file_sha256, write_json
from model import GPT
from tests.conftest import TINY_RUN, busy_model, tiny_config
from tests.runs import run


class Bomb:
    """An object that makes a folder when it is unpickled."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


def test_pickles_are_never_loaded(trained, tmp_path):
    folder = tmp_path / "model"
    busy_model(tiny_config()).save_pretrained(folder)
    (folder / "model.safetensors").unlink()
    (folder / "pytorch_model.bin").write_bytes(pickle.dumps(Bomb(tmp_path / "bang")))
    with pytest.raises(UserError, match="only safetensors are read, never pickle"):
        GPT.from_pretrained(folder)
    assert not (tmp_path / "bang").exists()


def test_a_checkpoint_that_holds_code_is_refused(data, tmp_path):
    """Even if the manifest matches."""
    out = tmp_path / "out"
    run(data, out, "--max_steps=2")
    folder = checkpoint.step_folders(out)[-1]
    torch.save({"progress": Bomb(tmp_path / "bang")}, folder / "trainer" / "state.pt")
    manifest = json.loads((folder / "manifest.json").read_text())
    manifest["files"]["trainer/state.pt"] = file_sha256(folder / "trainer" / "state.pt")
    write_json(folder / "manifest.json", manifest)
    with pytest.raises(UserError, match="state.pt: holds more than numbers"):
        run(data, out, "--max_steps=3")
    assert not (tmp_path / "bang").exists()


def test_an_index_cannot_reach_another_folder(tmp_path):
    folder = tmp_path / "model"
    busy_model(tiny_config()).save_pretrained(folder)
    shutil.move(folder / "model.safetensors", tmp_path / "secret.safetensors")
    write_json(folder / "model.safetensors.index.json", {"weight_map": {"a": "../secret.safetensors"}})
    with pytest.raises(UserError, match="a file of another folder is not read"):
        GPT.from_pretrained(folder)


def test_no_output_holds_a_secret_of_the_environment(data, tmp_path, monkeypatch, capfd):
    canary = "canary-5d41402abc4b2a76"
    for name in ("WANDB_API_KEY", "HF_TOKEN", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.setenv(name, canary)
    train.main([*TINY_RUN, f"--dataset={data}", f"--out_dir={tmp_path}", "--max_steps=2"])
    written = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert len(written) > 8
    assert not any(canary.encode() in path.read_bytes() for path in written)
    assert canary not in "".join(capfd.readouterr())
