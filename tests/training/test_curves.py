"""training/curves.py: the right numbers in the right panel; a picture never stops a run; curves as text."""

import json
import sys
import types

import pytest
import torch

from tests.runs import EVENTS
from training import curves
from training.metrics import duration, log_line, time_left
from training.run import Run

pytestmark = pytest.mark.usefixtures("pictures")


@pytest.fixture
def run(tmp_path):
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(event) + "\n" for event in EVENTS))
    return Run(tmp_path, torch.device("cpu"))


def test_curves_are_the_logged_numbers():
    assert curves.curve(EVENTS, "loss") == ([10, 20], [4.0, 3.0])
    assert curves.curve(EVENTS, "val_loss") == ([20], [3.5])
    loss, rate, speed = curves.draw({"a": EVENTS, "b": EVENTS[:1]}).axes
    assert [line.get_xydata().tolist() for line in loss.lines] == [
        [[10, 4], [20, 3]], [[20, 3.5]], [[10, 4]], []]
    assert rate.lines[0].get_xydata().tolist() == [[10, 0.1], [20, 0.05]]
    assert speed.lines[0].get_xydata().tolist() == [[10, 100], [20, 120]]


def test_a_run_redraws_its_picture(run, capsys):
    curves.redraw(run)
    before = (run.out_dir / "loss.png").read_bytes()
    assert before.startswith(b"\x89PNG")
    run.log({"step": 30, "loss": 1.0})
    curves.redraw(run)
    assert (run.out_dir / "loss.png").read_bytes() != before
    assert capsys.readouterr().out == ""
    (run.out_dir / "loss.png").unlink()
    run.rank = 1
    curves.redraw(run)
    assert not (run.out_dir / "loss.png").exists()


def test_a_picture_that_fails_is_one_line(run, capsys, monkeypatch):
    def full_disk(*arguments):
        raise OSError(28, "No space\nleft")

    monkeypatch.setattr(curves, "write_bytes", full_disk)
    curves.redraw(run)
    assert capsys.readouterr().out == "note      loss.png was not drawn (OSError: [Errno 28] No space left)\n"
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    curves.redraw(run)
    assert "pip install matplotlib" in capsys.readouterr().out


def test_text_curves_by_hand(monkeypatch):
    events = [{"step": step, "loss": loss} for step, loss in ((10, 8.0), (20, 4.5), (30, 1.0), (40, 1.0))]
    events += [{"step": 20, "val_loss": 8.0}, {"step": 40, "val_loss": 2.0}]
    assert curves.text_curves(events) == ["training    █▅▁▁  8.0000 to 1.0000",
                                          "validation   █ ▂  8.0000 to 2.0000"]
    assert curves.text_curves([{"step": 1, "loss": 2.0}]) == ["training    ▁  2.0000 to 2.0000"]
    assert curves.text_curves([{"step": 1, "lr": 2.0}]) == []
    diverged = [{"step": 1, "loss": 2.0}, {"step": 2, "loss": 1.0}, {"step": 2, "val_loss": float("nan")}]
    assert curves.text_curves(diverged) == ["training    █▁  2.0000 to 1.0000", "validation      nan to nan"]
    long = [{"step": step, "loss": 1.0 + step % 2} for step in range(1, 961)]  # 20 steps per character
    assert curves.text_curves(long) == [f"training    {'▁' * 48}  2.0000 to 1.0000".replace("▁", "▅")]
    monkeypatch.setattr(sys, "stdout", types.SimpleNamespace(encoding="ascii"))
    assert curves.text_curves(events)[0] == "training    #=__  8.0000 to 1.0000"


def test_the_end_of_a_run(run, capsys):
    curves.print_end(run, "python sft.py", "python eval.py")
    assert capsys.readouterr().out == f"""\
curves      training    █▁  4.0000 to 3.0000
            validation   ▅  3.5000 to 3.5000
            {run.out_dir / 'loss.png'}

next        python sft.py
            python eval.py
"""


def test_commands_are_quoted():
    run = Run("out/my run", torch.device("cpu"))
    assert run.quoted == "'out/my run'"
    assert run.next_stage("sft.py", "out/base") == (
        "python sft.py --init_from='out/my run' --out_dir='out/my run_sft'")
    assert Run("out/base", torch.device("cpu")).next_stage("sft.py", "out/base") == "python sft.py"


def test_the_time_left():
    event = {"step": 500, "loss": 3.0382, "lr": 1.11e-5, "grad_norm": 0.814, "tokens": 1_024_000,
             "tokens_per_second": 4096.0, "mfu": None, "memory_gb": 0.77, "seconds": 253.0}
    assert time_left(event, 550) == pytest.approx(50 * 2048 / 4096)
    assert [duration(seconds) for seconds in (0, 299.4, 300, 7199, 7200, 1e6)] == [
        "0 s", "299 s", "5 min", "120 min", "2.0 h", "277.8 h"]
    line = log_line(event, 550)
    assert line == ("step 500/550  loss  3.0382  lr 1.11e-05  norm  0.814      4,096 tok/s   0.77 GB  253 s"
                    "  eta 25 s")
    assert len(log_line(event | {"step": 19_000, "seconds": 1e5}, 19_073)) <= 110
