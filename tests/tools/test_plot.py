"""tools.plot: the picture of one or more runs, and its refusals."""

import json
import sys

import pytest

from configurator import UserError
from tests.conftest import DRAW
from tests.runs import EVENTS
from tools import plot


@pytest.fixture
def run(tmp_path, monkeypatch):
    monkeypatch.setattr(plot, "draw", DRAW)
    (tmp_path / "run").mkdir()
    lines = [json.dumps(event) for event in EVENTS] + ['{"step": 30, "lo']  # a line that a kill cut
    (tmp_path / "run" / "metrics.jsonl").write_text("\n".join(lines))
    return tmp_path / "run"


def test_the_picture_is_written_into_the_run(run, tmp_path, capsys):
    pytest.importorskip("matplotlib")
    plot.main([str(run)])
    assert (run / "curves.png").read_bytes().startswith(b"\x89PNG")
    assert capsys.readouterr().out == f"curves    {run / 'curves.png'}\n"
    plot.main([str(run), str(run), f"--out={tmp_path / 'two.png'}"])
    assert (tmp_path / "two.png").is_file()


def test_mistakes_are_one_line(tmp_path, monkeypatch, run):
    with pytest.raises(UserError, match="name a run folder"):
        plot.main([])
    with pytest.raises(UserError, match=r"out=a.xyz: must be the name of a picture"):
        plot.main([str(run), "--out=a.xyz"])
    with pytest.raises(UserError, match="no run here"):
        plot.main([str(tmp_path / "nothing")])
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(UserError, match="matplotlib"):
        plot.main([str(run)])
