"""A curriculum in stages: longer rows, a rotary base that rises, other data."""

import json
import shutil

import numpy as np
import pytest
import torch
import torch.nn.functional as F

import train
from configurator import UserError, configure
from dataset.dataloader import Rows
from dataset.shards import DataFolder
from formats import checkpoint
from formats.files import write_json
from loop import plan_stages
from model import GPT
from modeling.rope import rope_frequencies
from tests.conftest import ROOT, tiny_config
from tests.runs import assert_close, assert_same_run, events, losses, run, stop_at_step

# The stages of config/train_tiny_curriculum.py in small: rows of 16, 32, 64 and 16 again.
STAGES = """
schedule = "wsd"
decay_steps = 4
dropout = 0.1
stages = [dict(steps=4, block_size=16, global_batch_size=16),
          dict(steps=5, block_size=32, rope_theta=(10_000, 500_000), document_mask=True),
          dict(steps=4, block_size=64, global_batch_size=4, rope_theta=500_000, document_mask=True),
          dict(steps=4, block_size=16, global_batch_size=16, rope_theta=500_000)]
"""


@pytest.fixture(scope="module")
def curriculum(tmp_path_factory, data):
    """A run of the four stages that was never stopped, all its checkpoints, and its config file."""
    folder = tmp_path_factory.mktemp("curriculum")
    (folder / "c.py").write_text(STAGES)
    run(data, folder / "out", str(folder / "c.py"), "--save_interval=1", "--keep_checkpoints=99")
    return folder


def thetas(out):
    """The rotary base in each checkpoint's config.json."""
    return [json.loads((folder / "config.json").read_text())["rope_theta"]
            for folder in checkpoint.step_folders(out)]


def test_the_rotary_base_rises_geometrically_to_the_next_stages(curriculum):
    rise = [10_000 * 50 ** (k / 5) for k in range(1, 6)]  # 21,867  47,818  104,564  228,653  500,000
    found = thetas(curriculum / "out")
    assert found == pytest.approx([10_000] * 4 + rise + [500_000] * 8)
    assert found[8:] == [500_000] * 9  # exact at the ramp's last step, and no jump after it


@pytest.mark.parametrize("start, end", [(611_721, 934_974), (500_000, 7), (3, 3), (1e-3, 1e9)])
def test_a_ramp_reaches_its_end_exactly(start, end):
    """611,721 (934,974 / 611,721) is not 934,974 in floating point."""
    cfg = train.TrainConfig(stages=[dict(steps=7), dict(steps=3, rope_theta=(start, end))])
    first, second = plan_stages(cfg)
    middle = start ** (1 / 3) * end ** (2 / 3)
    assert [second.rope_theta_at(step) for step in (8, 9)] == [pytest.approx(middle), end]
    assert [first.rope_theta_at(step) for step in (0, 6)] == [10_000, 10_000]


def test_the_planned_stages_of_the_large_run():
    cfg = configure(train.TrainConfig, [str(ROOT / "config" / "train_nanollama_1b.py")])[0]
    stages = plan_stages(cfg)
    assert [stage.last for stage in stages] == [184_000, 194_000, 207_000, 230_000]
    assert [stage.cfg.block_size for stage in stages] == [4096, 8192, 16_384, 4096]
    assert all(stage.cfg.block_size * stage.cfg.global_batch_size == 131_072 for stage in stages)
    assert all((stage.begin, stage.end) == (0, 230_000) for stage in stages)
    assert [stage.rope_theta_at(stage.last - 1) for stage in stages] == [10_000, 500_000, 500_000, 500_000]
    assert stages[1].rope_theta_at(184_000) == pytest.approx(10_000 * 50**1e-4)
    assert stages[1].rope_theta_at(188_999) == pytest.approx(10_000 * 50**0.5)
    assert cfg.z_loss == 1e-4 and cfg.schedule == "wsd"
    assert train.context_length(cfg, None) == 16_384
    assert [stage.cfg.dataset for stage in stages] == ["web", "web", "books:0.5,code:0.5",
                                                      "maths:0.4,qa:0.3,stem:0.3"]
    assert [stage.cfg.document_mask for stage in stages] == [False, True, True, False]
    text = (ROOT / "config" / "train_nanollama_1b.py").read_text()
    for name in ("books", "code", "maths", "qa", "stem"):  # how each folder is made, with one tokenizer
        assert f"--out=data/{name} " in text
    assert text.count("--tokenizer=data/web") == 5


@pytest.mark.parametrize("folders, first, third", [
    (["books", "docs"], "books", "books:0.5,docs:0.5"),
    (["books"], "pystdlib", "pystdlib")])
def test_the_planned_stages_of_the_tiny_run(tmp_path, monkeypatch, folders, first, third):
    for folder in folders:
        (tmp_path / "data" / folder).mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    stages = plan_stages(configure(train.TrainConfig, [str(ROOT / "config" / "train_tiny_curriculum.py")])[0])
    assert [stage.last for stage in stages] == [500, 600, 800, 1000]
    assert [stage.cfg.block_size for stage in stages] == [128, 256, 512, 128]
    assert all(stage.cfg.block_size * stage.cfg.global_batch_size == 2048 for stage in stages)
    assert (stages[0].cfg.dataset, stages[2].cfg.dataset) == (first, third)


@pytest.mark.parametrize("step", [2, 4, 6, 8, 9, 11, 13, 15])
def test_a_resumed_run_is_the_same_run(data, curriculum, tmp_path, step):
    """Inside each stage, in the middle of the ramp and at the end of each stage, as if killed there."""
    out = tmp_path / "out"
    shutil.copytree(curriculum / "out", out)
    for folder in checkpoint.step_folders(out)[step:]:
        shutil.rmtree(folder)
    write_json(out / "checkpoints.json", {"last": f"step_{step:06d}"})
    run(data, out, str(curriculum / "c.py"), "--save_interval=1", "--keep_checkpoints=99")
    assert_same_run(curriculum / "out", out)
    assert thetas(out) == thetas(curriculum / "out")
    found, expected = (
        [{key: event[key] for key in event if key == "step" or key.startswith("val_")}
         for event in events(each) if "val_loss" in event] for each in (out, curriculum / "out"))
    assert found == expected and [event["step"] for event in found] == [4, 9, 13, 17]  # each stage's end


def test_stopped_in_each_stage_and_at_each_border(data, curriculum, tmp_path):
    """The same with signals. The only checkpoints are those of a stop and of the end of a stage."""
    for step in (1, 3, 5, 8, 10, 14, None):  # 3 and 8: the last step of a stage
        stop_at_step(data, tmp_path / "out", step, str(curriculum / "c.py"))
    assert_same_run(curriculum / "out", tmp_path / "out")


def test_the_ends_of_stages_stay(data, curriculum, tmp_path):
    run(data, tmp_path, str(curriculum / "c.py"), "--save_interval=1", "--keep_checkpoints=1")
    pointers = checkpoint.read_pointers(tmp_path)
    ends = {f"stage_{number}": f"step_{step:06d}" for number, step in enumerate((4, 9, 13, 17), 1)}
    assert {key: pointers[key] for key in ends} == ends and pointers["last"] == ends["stage_4"]
    assert [folder.name for folder in checkpoint.step_folders(tmp_path)] == list(ends.values())


def test_a_kill_before_the_pointers_move(data, curriculum, tmp_path, monkeypatch):
    """The checkpoint at a stage's end is whole, but checkpoints.json does not name it yet."""
    argv = [data, tmp_path, str(curriculum / "c.py"), "--save_interval=1", "--keep_checkpoints=1"]
    update = checkpoint.update_pointers

    def killed(out_dir, keep, **pointers):
        if "stage_1" in pointers:
            raise RuntimeError("killed")
        update(out_dir, keep, **pointers)

    with monkeypatch.context() as patch:
        patch.setattr(checkpoint, "update_pointers", killed)
        with pytest.raises(RuntimeError, match="killed"):
            run(*argv)
    run(*argv)
    pointers = checkpoint.read_pointers(tmp_path)
    assert pointers["stage_1"] == "step_000004" and pointers["last"] == "step_000017"


def test_a_run_of_epochs_goes_on(data, tmp_path, capsys):
    """The same arguments continue the run, though its stages count epochs and the loop counts steps."""
    config = tmp_path / "epochs.py"
    config.write_text("stages = [dict(epochs=0.01), dict(epochs=0.01)]\n")
    run(data, tmp_path / "whole", str(config))
    stop_at_step(data, tmp_path / "cut", 3, str(config))
    stop_at_step(data, tmp_path / "cut", None, str(config))
    assert_same_run(tmp_path / "whole", tmp_path / "cut")
    run(data, tmp_path / "cut", str(config))
    assert "finished" in capsys.readouterr().out


def test_every_evaluation_reads_the_last_stages_rows_with_the_base_of_its_step(data, curriculum, tmp_path):
    """At the ends of stages and inside the ramp, computed again from the checkpoints."""
    found = run(data, tmp_path, str(curriculum / "c.py"), "--save_interval=1", "--keep_checkpoints=99",
                "--eval_interval=7")
    figures = {event["step"]: event["val_loss"] for event in found if "val_loss" in event}
    assert list(figures) == [4, 7, 9, 13, 14, 17]
    rows = Rows(DataFolder(data), "val", 16).read(np.arange(1024 // 16))  # TINY_RUN's eval_tokens
    for step, figure in figures.items():
        model = GPT.from_pretrained(tmp_path / f"step_{step:06d}").eval()
        with torch.no_grad():
            logits = model(torch.from_numpy(rows[:, :-1])).flatten(0, 1)
            loss = F.cross_entropy(logits, torch.from_numpy(rows[:, 1:]).flatten())
        assert loss.item() == pytest.approx(figure)


@pytest.mark.parametrize("parallel", ["ddp", "fsdp"])
def test_two_ranks_have_the_same_ramp(data, tmp_path, two_ranks, parallel):
    (tmp_path / "c.py").write_text(STAGES.replace("dropout = 0.1", 'optimizer = "adamw"'))
    words = [str(tmp_path / "c.py"), "--micro_batch_size=2"]
    expected = losses(run(data, tmp_path / "one", *words))
    two_ranks(run, data, tmp_path / "two", *words, f"--parallel={parallel}")
    assert_close(losses(events(tmp_path / "two")), expected)
    assert thetas(tmp_path / "two") == thetas(tmp_path / "one")


def test_transformers_reads_a_checkpoint_inside_the_ramp(curriculum):
    from transformers import AutoModelForCausalLM

    folder = checkpoint.step_folders(curriculum / "out")[6]
    theirs, ours = AutoModelForCausalLM.from_pretrained(folder).eval(), GPT.from_pretrained(folder).eval()
    assert 100_000 < ours.config.rope_theta < 110_000
    ids = torch.randint(500, (2, 64), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        assert (theirs(ids).logits - ours(ids)).abs().max() <= 1e-5


def test_tables_are_rewritten_in_place():
    """So compiled code and wrappers that hold the tables stay valid."""
    model = GPT(tiny_config())
    before = model.rope.cos
    model.reconfigure(rope_theta=123.0)
    assert model.rope.cos is before
    angles = torch.arange(64)[:, None] * rope_frequencies(16, 123.0, None)[0]
    assert torch.equal(model.rope.cos, torch.cat((angles.cos(), angles.cos()), dim=-1))
    assert torch.equal(model.rope.sin, torch.cat((-angles.sin(), angles.sin()), dim=-1))


@pytest.mark.parametrize("theta", ["(1, 2, 3)", "(1,)", "(0, 5)", "(10, -5)", "('a', 2)", "[]", "(True, 2)",
                                   "(float('inf'), 2)", "(2, float('nan'))"])
def test_ramps_that_make_no_sense(data, tmp_path, theta):
    (tmp_path / "c.py").write_text(f"stages = [dict(steps=1, rope_theta={theta})]")
    with pytest.raises(UserError, match=r"stages\[0\]: rope_theta=.*: a ramp is two positive numbers"):
        run(data, tmp_path / "out", str(tmp_path / "c.py"))


@pytest.mark.parametrize("position", ["learned", "none"])
def test_other_positions_have_no_rotary_base(data, tmp_path, position):
    (tmp_path / "c.py").write_text("stages = [dict(steps=1), dict(steps=1, rope_theta=5e5)]")
    with pytest.raises(UserError, match=rf"stages\[1\]: position={position} has no rotary base"):
        run(data, tmp_path / "out", str(tmp_path / "c.py"), f"--position={position}")


def test_only_a_stage_may_have_a_ramp(data, tmp_path):
    (tmp_path / "c.py").write_text("rope_theta = (10_000, 500_000)")
    with pytest.raises(UserError, match="c.py:1: rope_theta = .*: expected float"):
        run(data, tmp_path / "out", str(tmp_path / "c.py"))
