"""Students trained in several ways: which runs there are, and the table of their results."""

import pytest

from bench import teach
from bench.teach import ARMS, TeachConfig, report, steps_of, summarize
from configurator import configure
from distill import DistillConfig


def test_runs_are_arms_and_seeds(monkeypatch, tmp_path):
    runs = []

    def run_once(script, argv, out, steps):
        runs.append((out.name, steps, argv[2]))
        return [{"val_bits_per_byte": 1.0, "val_loss": 1.0}]

    monkeypatch.setattr(teach, "run_once", run_once)
    teach.main([f"--out_dir={tmp_path}", "--students=half", "--seeds=1,2", "--arms=0,1", "--steps=100",
                "--equal_time=1.7"])
    assert runs == [(f"{name}_{seed}", steps, f"--seed={seed}") for seed in (1, 2)
                    for name, steps in (("text-alone_equal-time", 170), ("teacher", 100))]
    assert steps_of(TeachConfig(), "as large, teacher, 5 x the steps") == 1500
    assert steps_of(TeachConfig(), "batch of 64, a quarter of the steps") == 75


@pytest.mark.parametrize("students", ARMS)
def test_distill_accepts_the_arguments_of_every_arm(students):
    for argv in ARMS[students].values():
        assert configure(DistillConfig, argv.split())[0]


def test_the_share_of_the_gap_by_hand():
    """From 2 bits to the teacher's 1: a student at 1.25 closes three quarters of the gap."""
    def log(bits, speed):
        return [{"step": 20, "tokens_per_second": speed},
                {"step": 20, "val_loss": 4 * bits, "val_teacher_loss": 4.0, "val_bits_per_byte": bits,
                 "val_agreement": 0.5}]

    arms = summarize({"text alone": [log(2.0, 10.0)], "teacher": [log(1.25, 5.0)]})
    rows = [" ".join(line.split()) for line in report({"arms": arms}).split("\n")]
    assert rows[1:] == ["text alone 2.000 0 % 50.0 % 10", "the teacher itself 1.000 100 %",
                        "teacher 1.250 75 % 50.0 % 5"]
