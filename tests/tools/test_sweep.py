"""Tools for distillation: a sweep with its picture, the table of bench/teach.py."""

import json

import pytest

import distill
from bench import teach
from configurator import UserError
from tests.test_distill import TINY
from tools import sweep

ONE = [word for word in TINY if "max_steps" not in word]


def test_a_grid_is_run_once_and_drawn(trained, data, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("tools.arms.run_process", lambda script, argv, threads: distill.main(argv))
    run_args = " ".join([*ONE, f"--teacher={trained}", f"--dataset={data}", "--max_steps=2"])
    argv = ["--grid=alpha=0,1 temperature=2", f"--words={run_args}", f"--out_dir={tmp_path / 'sweep'}",
            f"--json={tmp_path / 'sweep.json'}", f"--png={tmp_path / 'sweep.png'}"]  # fmt: skip
    sweep.main(argv)
    points = json.loads((tmp_path / "sweep.json").read_text())["points"]
    assert [p["temperature"] + p["alpha"] for p in points] == ["20", "21"]
    assert points[0]["value"] != points[1]["value"] < 6.3
    assert (tmp_path / "sweep.png").stat().st_size > 10_000
    before = (tmp_path / "sweep" / "alpha=0_temperature=2" / "metrics.jsonl").stat().st_mtime_ns
    sweep.main(argv)
    assert (tmp_path / "sweep" / "alpha=0_temperature=2" / "metrics.jsonl").stat().st_mtime_ns == before
    assert "alpha=0  temperature=2  val_loss" in capsys.readouterr().out


def test_words_are_split_as_by_a_shell(tmp_path, monkeypatch):
    """A value may have spaces, as in --base of tools/ablate.py."""
    def run_once(script, argv, out_dir, metric):
        seen.append(argv)
        return [{metric: 1.0}]

    seen = []
    monkeypatch.setattr(sweep, "run_once", run_once)
    sweep.main(["--grid=seed=1", "--words=--dataset='my data' --max_steps=2", f"--out_dir={tmp_path}"])
    assert seen == [["--dataset=my data", "--max_steps=2", "--seed=1", "--eval_interval=0"]]
    with pytest.raises(UserError, match="--dataset='my: No closing quotation"):
        sweep.main(["--grid=seed=1", "--words=--dataset='my", f"--out_dir={tmp_path}"])


def test_a_line_for_each_choice_of_the_other_keys():
    [axes] = sweep.draw({"a": ["1", "2"], "b": ["x", "y"], "c": ["z"]}, [3.0, 4.0, 5.0, 6.0], "val_loss").axes
    assert {line.get_label(): line.get_ydata().tolist() for line in axes.lines} == {
        "b x, c z": [3.0, 5.0], "b y, c z": [4.0, 6.0]}


@pytest.mark.parametrize("grid", ["a", "a=", "a=1 a=2", "a=1 b=2 c=3 d=4"])
def test_a_malformed_grid_is_refused(grid):
    with pytest.raises(UserError, match="write one to three keys"):
        sweep.main([f"--grid={grid}"])
    with pytest.raises(UserError, match="a.xyz: must be the name of a .png file"):
        sweep.main([f"--grid={grid}", "--png=a.xyz"])


def test_a_table_of_what_a_teacher_brings():
    arms = {
        "text alone": {"bits": [2.0, 2.2], "speeds": [10.0], "agreement": []},
        "teacher": {"bits": [1.7, 1.9], "speeds": [5.0], "agreement": [0.5]},
        "the teacher itself": {"bits": [1.5], "speeds": [], "agreement": []},
    }
    row = teach.report({"arms": arms}).splitlines()[2]
    assert " ".join(row.split()) == "teacher 1.800 (1.700 - 1.900) 50 % 50.0 % 5"
