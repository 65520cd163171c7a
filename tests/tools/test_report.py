"""The report: its numbers come from the files, and a changed number changes the text there only."""

import json
import shlex
import shutil
from dataclasses import asdict

import pytest

import eval
from configurator import UserError
from prepare import PrepareConfig
from tests.conftest import DRAW, ROOT, config_of
from tools import report
from train import TrainConfig

COSTS = {"speed": 100.0, "memory_gb": 0.5, "parameters": 1000, "active": 1000}
STUDY = {"base": ["train.py"], "commands": {"base": ["train.py"], "wide": ["train.py --n_embd=512"]},
         "runs": {name: [{"metrics": {"val_loss": loss}, **COSTS} for loss in losses]
                  for name, losses in {"base": [3.5, 3.7], "wide": [3.25, 3.55]}.items()}}


@pytest.fixture(autouse=True)
def real_curves(monkeypatch):
    monkeypatch.setattr(report, "draw", DRAW)  # conftest.py replaces it for the runs of tests


@pytest.fixture(scope="module")
def run(trained, tmp_path_factory):
    """A run with results of eval.py, some of them of sampled answers."""
    folder = shutil.copytree(trained, tmp_path_factory.mktemp("report") / "base")
    eval.main([f"--model={folder}", "--tasks=problems,context_length", "--limit=2", "--num_samples=2",
               f"--data=context_length={ROOT / 'eval.py'}", "--threads=1"])
    return folder


@pytest.fixture(scope="module")
def studies(tmp_path_factory):
    """A folder with one study of tools/ablate.py, and JSON files of other kinds."""
    folder = tmp_path_factory.mktemp("studies")
    (folder / "width.json").write_text(json.dumps(STUDY))
    (folder / "base.json").write_text('{"runs": []}')
    (folder / "list.json").write_text("[1]")
    return folder


def text_of(folder, studies, out):
    report.main([str(folder), f"--results={studies}", f"--out={out}", "--pdf=False"])
    return (out / "report.md").read_text()


def change(path, value, *keys):
    """Replace one value in a JSON file; returns the old one."""
    content = entry = json.loads(path.read_text())
    for key in keys[:-1]:
        entry = entry[key]
    old, entry[keys[-1]] = entry[keys[-1]], value
    path.write_text(json.dumps(content))
    return old


def test_every_section_has_its_data(run, studies, tmp_path):
    text = text_of(run, studies, tmp_path)
    titles = [line[3:] for line in text.splitlines() if line.startswith("## ")]
    assert titles == [*(title for title in report.SOURCES if title != "Alignment"),
                      "Limitations", "Reproduction"]
    assert "Alignment: no data (`sft.py, dpo.py, grpo.py` makes it)" in text
    assert "- pre-training: one run, so the spread between seeds is unknown." in text
    results = json.loads((run / "results.json").read_text())["models"][0]
    assert f"{results['parameters']:,} parameters" in text
    greedy = results["tasks"]["problems"]["details"]["methods"]["maj@2"]
    assert f"| {greedy['accuracy']:.4f} ± {greedy['stderr']:.4f} | {greedy['gain']:+.4f} ±" in text
    # Differences of -0.25 and -0.15: their mean is -0.2, their standard deviation 0.0707.
    assert "| wide | 3.400 (3.250 - 3.550) | -0.200 | 2.8 | 100 | 0.50 | 1,000 |" in text
    pictures = [line.split("](")[1][:-1] for line in text.splitlines() if line.startswith("![")]
    assert len(pictures) == 5 and all((tmp_path / name).read_bytes()[:4] == b"\x89PNG" for name in pictures)
    assert all(f"**Figure {number}.**" in text for number in range(1, 6)) and "**Figure.**" not in text
    assert str(run.parent) not in text  # no path of this machine


def test_a_changed_number_changes_the_text_there_only(run, studies, tmp_path, monkeypatch):
    monkeypatch.setattr("matplotlib.figure.Figure.savefig", lambda *args, **options: None)  # takes a second
    folder = shutil.copytree(run, tmp_path / "base")
    before = text_of(folder, studies, tmp_path / "one")
    figure = ["models", 0, "tasks", "problems", "figures", "well_formed"]
    old = change(folder / "results.json", 0.123456, *figure, "value")
    after = text_of(folder, studies, tmp_path / "two")
    line = next(line for line in before.splitlines() if line.startswith("| problems | well_formed | 2 |"))
    assert before.count(line) == 1 and f"{old:.4f} ±" in line
    assert after == before.replace(line, line.replace(f"{old:.4f} ±", "0.1235 ±"))
    change(folder / "results.json", old, *figure, "value")
    # A setting is in the table of settings and in the command that repeats the run.
    change(folder / "run.json", 0.00789, "config", "learning_rate")
    assert text_of(folder, studies, tmp_path / "three") == before.replace(
        "| learning_rate | 0.003 |", "| learning_rate | 0.00789 |").replace(
        "--learning_rate=0.003", "--learning_rate=0.00789")


def test_the_commands_repeat_the_runs(run, studies, tmp_path, monkeypatch):
    monkeypatch.setattr(report, "public", str)  # with absolute paths, as this test has no others
    lines = text_of(run, studies, tmp_path).split("## Reproduction\n\n```text\n")[1].splitlines()
    (_, prepare, *words), _, (_, train, *more), (_, measure, *rest) = map(shlex.split, lines[:4])
    assert (prepare, train, measure) == ("prepare.py", "train.py", "eval.py")
    config = json.loads((run / "run.json").read_text())["config"]
    settings = json.loads((run / "results.json").read_text())["settings"]
    assert json.loads(json.dumps(asdict(config_of(TrainConfig, *more)))) == config
    assert asdict(config_of(eval.EvalConfig, *rest)) == settings
    data = config_of(PrepareConfig, *words)
    assert (data.out, data.vocab_size, data.val_fraction) == (config["dataset"], 500, 0.1)


def test_a_run_alone_and_results_alone(trained, run, studies, tmp_path):
    alone = text_of(trained, studies, tmp_path / "one")
    assert "## Evaluation" not in alone and "- Evaluation: no data (`eval.py` makes it)." in alone
    results = tmp_path / "exports"
    results.mkdir()
    shutil.copy(run / "results.json", results)
    text = text_of(results, tmp_path, tmp_path / "two")
    assert "## Evaluation" in text and "- Training: no data" in text and "- Ablations: no data" in text


def test_wrong_folders(tmp_path):
    for argv in ([], [str(tmp_path)], [str(tmp_path / "absent")]):
        with pytest.raises(UserError, match="neither a run nor results of eval.py"):
            report.main(argv)


def test_two_folders_of_one_name(run, studies, trained, tmp_path):
    """Their pictures would have one name, and so would their columns."""
    other = shutil.copytree(trained, tmp_path / "base")
    with pytest.raises(UserError, match="base: two folders have this name"):
        report.main([str(run), str(other), f"--results={studies}", f"--out={tmp_path / 'out'}"])


def test_the_pdf(run, studies, tmp_path):
    for package in ("pypandoc", "typst"):
        pytest.importorskip(package)
    report.main([str(run), f"--results={studies}", f"--out={tmp_path}"])
    content = (tmp_path / "report.pdf").read_bytes()
    assert content.startswith(b"%PDF-") and content.count(b"/Image") >= 5
    odd = shutil.copytree(run, tmp_path / "my run (1)`<b>")  # its name is in names of pictures
    report.main([str(odd), f"--results={studies}", f"--out={tmp_path / 'odd'}"])
    assert (tmp_path / "odd" / "report.pdf").read_bytes().count(b"/Image") == content.count(b"/Image")


def test_without_the_packages_of_the_pdf(run, studies, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(report, "find_spec", lambda name: None)
    report.main([str(run), f"--results={studies}", f"--out={tmp_path}"])
    assert (tmp_path / "report.md").is_file() and not (tmp_path / "report.pdf").exists()
    assert "pip install pypandoc_binary typst" in capsys.readouterr().out
