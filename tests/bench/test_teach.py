"""Students taught in several ways: which runs there are, and the table of what came out."""

import json

import pytest

from bench.teach import TeachConfig, folder_of, is_finished, measured, steps_of, table
from configurator import configure
from distill import DistillConfig


def test_runs_are_arms_and_seeds():
    cfg = TeachConfig(students="half", seeds="1,2", arms="0,1", steps=100, equal_time=1.7)
    assert cfg.runs == [(name, seed) for seed in (1, 2) for name in ("text alone, equal time", "teacher")]
    assert [steps_of(cfg, name) for name, _ in cfg.runs[:2]] == [170, 100]
    assert folder_of(cfg, "cut out, teacher", 3).name == "cut-out_teacher_3"


@pytest.mark.parametrize("students", ["quarter", "half"])
def test_every_arm_is_a_run_that_distill_takes(students):
    for words in TeachConfig(students=students).words.values():
        assert configure(DistillConfig, words.split())[0]


def test_the_share_of_the_gap_by_hand(tmp_path):
    """From 2 bits to the teacher's 1: a student at 1.25 closes three quarters of it."""
    cfg = TeachConfig(students="half", seeds="1", arms="0,1", out_dir=str(tmp_path), steps=10, equal_time=2.0)
    for (name, seed), bits in zip(cfg.runs, (2.0, 1.25), strict=True):
        out = folder_of(cfg, name, seed)
        out.mkdir()
        event = {"step": steps_of(cfg, name), "val_loss": 4 * bits, "val_teacher_loss": 4.0,
                 "val_bits_per_byte": bits, "val_agreement": 0.5}  # fmt: skip
        (out / "metrics.jsonl").write_text(json.dumps(event) + "\n")
        assert is_finished(out, steps_of(cfg, name)) and not is_finished(out, 11)
    lines = table(measured(cfg)).split("\n")
    assert lines[2:] == [
        "| text alone, equal time | 2.000 | 0 % | 50.0 % |  |",
        "| the teacher itself | 1.000 | 100 % |  |  |",
        "| teacher | 1.250 | 75 % | 50.0 % |  |",
    ]
