"""A curriculum in stages: longer rows, a rotary base that rises, other data; and tools/context.py."""

import json
import shutil

import numpy as np
import pytest
import torch
import torch.nn.functional as F

import train
from configurator import UserError, configure
from loop import plan
from model import GPT
from parts import checkpoint
from parts.rope import rope_frequencies
from parts.shards import DataFolder, write_json
from tests.conftest import ROOT, tiny_config
from tests.runs import assert_close, assert_same_run, events, losses, run
from tools import context

# The tiny curriculum's stages, tinier: rows of 16, 32, 64 and 16 again.
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


def test_the_base_rises_geometrically_and_meets_the_next_stage(curriculum):
    rise = [10_000 * 50 ** (k / 5) for k in range(1, 6)]  # 21,867  47,818  104,564  228,653  500,000
    assert thetas(curriculum / "out") == pytest.approx([10_000] * 4 + rise + [500_000] * 8)


def test_the_planned_stages_of_the_large_run():
    cfg = configure(train.TrainConfig, [str(ROOT / "config" / "train_nanollama_1b.py")])[0]
    stages = plan(cfg)
    assert [stage.last for stage in stages] == [184_000, 194_000, 207_000, 230_000]
    assert [stage.cfg.block_size for stage in stages] == [4096, 8192, 16_384, 4096]
    assert all(stage.cfg.block_size * stage.cfg.global_batch_size == 131_072 for stage in stages)
    assert all((stage.begin, stage.end) == (0, 230_000) for stage in stages)
    assert [stage.rope_theta_at(stage.last - 1) for stage in stages] == [10_000, 500_000, 500_000, 500_000]
    assert stages[1].rope_theta_at(184_000) == pytest.approx(10_000 * 50**1e-4)
    assert stages[1].rope_theta_at(188_999) == pytest.approx(10_000 * 50**0.5)
    assert cfg.z_loss == 1e-4 and cfg.schedule == "wsd"
    assert train.context_length(cfg) == 16_384


@pytest.mark.parametrize("step", range(1, 17))
def test_resumed_after_every_step_it_is_the_same_run(data, curriculum, tmp_path, step):
    """Inside each stage, in the middle of the ramp and at every border, as if it had been killed there."""
    out = tmp_path / "out"
    shutil.copytree(curriculum / "out", out)
    for folder in checkpoint.step_folders(out)[step:]:
        shutil.rmtree(folder)
    write_json(out / "checkpoints.json", {"last": f"step_{step:06d}"})
    run(data, out, str(curriculum / "c.py"), "--save_interval=1", "--keep_checkpoints=99")
    assert_same_run(curriculum / "out", out)
    assert thetas(out) == thetas(curriculum / "out")
    found, expected = ([event for event in events(each) if "val_loss" in event]
                       for each in (out, curriculum / "out"))
    assert found == expected and [event["step"] for event in found] == [4, 9, 13, 17]  # each stage's end


@pytest.mark.parametrize("parallel", ["ddp", "fsdp"])
def test_two_ranks_ramp_alike(data, tmp_path, two_ranks, parallel):
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
    """What was compiled against them, or wrapped around them, stays right."""
    model = GPT(tiny_config())
    before = model.rope_cos
    model.reconfigure(rope_theta=123.0)
    assert model.rope_cos is before
    angles = torch.arange(64)[:, None] * rope_frequencies(16, 123.0, None)[0]
    assert torch.equal(model.rope_cos, torch.cat((angles.cos(), angles.cos()), dim=-1))
    assert torch.equal(model.rope_sin, torch.cat((-angles.sin(), angles.sin()), dim=-1))


@pytest.mark.parametrize("theta", ["(1, 2, 3)", "(0, 5)", "(10, -5)", "('a', 2)", "[]"])
def test_ramps_that_make_no_sense(data, tmp_path, theta):
    (tmp_path / "c.py").write_text(f"stages = [dict(steps=1, rope_theta={theta})]")
    with pytest.raises(UserError, match=r"stages\[0\]: rope_theta=.*: a ramp is two positive numbers"):
        run(data, tmp_path / "out", str(tmp_path / "c.py"))


def test_learned_positions_have_no_base(data, tmp_path):
    (tmp_path / "c.py").write_text("stages = [dict(steps=1), dict(steps=1, rope_theta=5e5)]")
    with pytest.raises(UserError, match=r"stages\[1\]: position=learned has no rotary base"):
        run(data, tmp_path / "out", str(tmp_path / "c.py"), "--position=learned")


def test_only_a_stage_may_say_a_ramp(data, tmp_path):
    (tmp_path / "c.py").write_text("rope_theta = (10_000, 500_000)")
    with pytest.raises(UserError, match="c.py:1: rope_theta = .*: expected float"):
        run(data, tmp_path / "out", str(tmp_path / "c.py"))


def test_loss_by_position(data, curriculum, tmp_path, capsys):
    """The table's figures, computed once more in another way."""
    words = [f"--dataset={data}", "--block_size=64", "--rows=8", f"--json={tmp_path / 'j'}",
             f"--png={tmp_path / 'p.png'}"]
    assert context.main([f"--run={curriculum / 'out'}", *words]) == 0
    printed = capsys.readouterr().out.splitlines()
    assert printed[1].split() == ["0-31", "32-63"] and len(printed) == 2 + 17
    figures = json.loads((tmp_path / "j").read_text())["loss"]
    folder = str(curriculum / "out" / "step_000013")
    rows = context.rows_within_documents(DataFolder(data), 64, 8)
    assert rows.shape == (8, 65) and not (rows == 499).any()
    model = GPT.from_pretrained(folder).eval()
    with torch.no_grad():
        log_probs = F.log_softmax(model(torch.from_numpy(rows[:, :-1])).double(), dim=-1).numpy()
    nll = -np.take_along_axis(log_probs, rows[:, 1:, None], axis=2)[..., 0]
    assert list(figures[folder].values()) == pytest.approx([nll[:, :32].mean(), nll[:, 32:].mean()], rel=1e-6)
    assert (tmp_path / "p.png").stat().st_size > 5000


def test_buckets_by_hand():
    assert context.buckets(512) == [(0, 32), (32, 64), (64, 128), (128, 256), (256, 512)]
    assert context.buckets(100) == [(0, 32), (32, 64), (64, 100)]
    assert context.buckets(20) == [(0, 20)]
