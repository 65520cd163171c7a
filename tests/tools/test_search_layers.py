"""The search for pairs of layers: CKA by hand, and a planted permutation."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from configurator import UserError
from formats import hf
from model import GPT
from tools import search_layers
from tools.search_layers import candidates, linear_cka, similarities


def test_cka_by_hand():
    """1 for a rotated and scaled copy, and the formula for two sets in float64."""
    g = torch.Generator().manual_seed(0)
    a, b = torch.randn(50, 6, generator=g), torch.randn(50, 4, generator=g)
    rotation = torch.linalg.qr(torch.randn(6, 6, generator=g))[0]
    assert linear_cka(a, 3 * a @ rotation + 5) == pytest.approx(1)
    center = torch.eye(50).double() - 1 / 50
    K, L = (center @ x.double() @ x.double().T @ center for x in (a, b))
    assert linear_cka(a, b) == pytest.approx(float((K * L).sum() / (K.norm() * L.norm())))


def test_a_planted_permutation_is_recovered():
    """A student layer whose output is that of another teacher layer, rotated."""
    g = torch.Generator().manual_seed(1)
    hidden = torch.randn(4, 200, 16, generator=g)
    order = [2, 0, 3, 1]
    rotation = torch.linalg.qr(torch.randn(16, 16, generator=g))[0]
    ours = [hidden[t] @ rotation + 0.3 * torch.randn(200, 16, generator=g) for t in order]
    table = torch.tensor([[linear_cka(a, b) for b in hidden] for a in ours])
    assert candidates(table)["similar"] == "0:2,1:0,2:3,3:1"


def test_the_layers_of_a_pruned_student_are_found(trained, data, tmp_path, capsys):
    """The teacher begins with the student's two layers, and has two more."""
    source, folder = hf.find_folder(trained), tmp_path / "teacher"
    shutil.copytree(source, folder, ignore=shutil.ignore_patterns("manifest.json"))
    tensors = load_file(source / "model.safetensors")
    for layer in (2, 3):
        tensors |= {name.replace(f"layers.{layer - 2}.", f"layers.{layer}."): 2 * tensor.clone()
                    for name, tensor in load_file(source / "model.safetensors").items()
                    if f"layers.{layer - 2}." in name}
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"num_hidden_layers": 4, "layer_types": None}))
    model = GPT.from_pretrained(folder)
    ids = torch.arange(64)[None] % 500
    assert similarities(model, model, ids).argmax(1).tolist() == [0, 1, 2, 3]
    argv = [f"--teacher={folder}", f"--student={source}", f"--dataset={data}", "--block_size=64",
            f"--out_dir={tmp_path / 'runs'}"]
    search_layers.main([*argv, "--steps=0"])
    assert "--layer_map=0:0,1:1\n" in capsys.readouterr().out


def test_short_runs_choose_the_map(monkeypatch, trained, data, tmp_path, capsys):
    def run_once(script, argv, out, steps):
        chosen = next(word for word in argv if word.startswith("--layer_map="))
        return [{"val_loss": 1.0 if chosen == "--layer_map=last" else 2.0}]

    monkeypatch.setattr(search_layers, "run_once", run_once)
    search_layers.main([f"--teacher={trained}", f"--student={trained}", f"--dataset={data}",
                        "--block_size=64"])
    assert capsys.readouterr().out.endswith("--layer_map=last\n")


def test_a_student_with_other_token_ids_is_named(trained, data, chat_folder):
    argv = [f"--teacher={trained}", f"--student={chat_folder}", f"--dataset={data}", "--block_size=64"]
    with pytest.raises(UserError, match=f"^student={chat_folder}: .* token ids mean something else"):
        search_layers.main(argv)
