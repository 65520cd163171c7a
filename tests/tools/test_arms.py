"""Runs of every arm with every seed: each once, in order; and the mean with its range."""

import dataclasses
import importlib
import json

import pytest

from configurator import UserError, configure
from eval import EvalConfig
from formats.files import write_json
from formats.peft import weights_sha256
from tools import arms


def write_model(folder, weights):
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text("{}")
    (folder / "model.safetensors").write_bytes(weights)


def test_every_arm_runs_once_per_seed_and_results_keep_their_order():
    calls = []

    def arm(seed):
        calls.append(seed)
        return 10 * seed

    assert arms.run_arms({"a": arm, "b": lambda seed: -seed}, [1, 2, 3]) == {"a": [10, 20, 30],
                                                                              "b": [-1, -2, -3]}
    assert calls == [1, 2, 3]
    assert arms.run_arms({"a": lambda seed: seed}, range(8), jobs=4)["a"] == list(range(8))


def test_a_finished_run_is_read_and_an_unfinished_one_is_run(tmp_path, monkeypatch):
    script = tmp_path / "stage.py"
    script.write_text(
        "import sys, pathlib\n"
        "out = pathlib.Path(sys.argv[-1].removeprefix('--out_dir='))\n"
        "with open(out / 'metrics.jsonl', 'a') as file:\n"
        "    file.write('{\"step\": 5, \"val_loss\": 2.0}\\n')\n")  # fmt: skip
    log = tmp_path / "metrics.jsonl"
    log.write_text(json.dumps({"step": 5, "val_loss": 1.0}) + "\n")
    # The end of one of several stages looks like the end of a run, so the script decides once.
    assert arms.run_once(str(script), [], tmp_path)[-1]["val_loss"] == 2.0
    log.write_text(json.dumps({"step": 5, "val_loss": 1.0}) + "\n")
    assert arms.run_once(str(script), [], tmp_path, steps=5)[-1]["val_loss"] == 1.0
    assert arms.run_once(str(script), ["--a=1"], tmp_path)[-1]["val_loss"] == 2.0  # other arguments
    log.write_text(json.dumps({"step": 2, "loss": 3.0}) + "\n")
    assert [event["step"] for event in arms.run_once(str(script), [], tmp_path, steps=5)] == [2, 5]
    write_model(tmp_path / "base", b"1")
    argv = [f"--init_from={tmp_path / 'base'}"]
    arms.run_once(str(script), argv, tmp_path)
    for weights, loss in ((b"1", 1.0), (b"2", 2.0)):  # the script is asked about other weights
        write_model(tmp_path / "base", weights)
        log.write_text(json.dumps({"step": 5, "val_loss": 1.0}) + "\n")
        assert arms.run_once(str(script), argv, tmp_path)[-1]["val_loss"] == loss
    with pytest.raises(UserError, match="the last event has no accuracy"):
        arms.run_once(str(script), [], tmp_path, "accuracy")


def test_results_of_other_settings_are_measured_again(tmp_path, monkeypatch):
    ran = []

    def run_process(script, argv, threads):
        ran.append(argv)
        settings = dataclasses.asdict(configure(EvalConfig, argv)[0])
        write_json(tmp_path / "results.json", {"settings": settings, "complete": True, "models": [
            {"weights_sha256": weights_sha256(tmp_path / "model"),
             "tasks": {"problems": {"figures": {"limit": settings["limit"]}}}}]})

    monkeypatch.setattr(arms, "run_process", run_process)
    write_model(tmp_path / "model", b"1")
    model = f"--model={tmp_path / 'model'}"
    asked = [model, "--tasks=problems", "--limit=1_000", "--chat"], [model, "--tasks=problems"]
    for argv in (asked[0], asked[0], asked[1]):
        found = arms.run_eval(argv, tmp_path)
    assert len(ran) == 2 and found == {"problems": {"limit": 500}}
    write_model(tmp_path / "model", b"2")
    arms.run_eval(asked[1], tmp_path)
    assert len(ran) == 3


def test_after_an_error_no_other_run_starts():
    ran = []

    def arm(seed):
        ran.append(seed)
        raise UserError("wrong")

    with pytest.raises(UserError, match="wrong"):
        arms.run_arms({"a": arm}, range(9))
    assert ran == [0]


def test_a_run_that_fails_names_its_exit_code_and_error(tmp_path):
    script = tmp_path / "stage.py"
    script.write_text("import sys\nprint('no such key', file=sys.stderr)\nsys.exit(2)\n")
    with pytest.raises(UserError, match=r"stage.py --a=1 .*: exit code 2: no such key"):
        arms.run_once(str(script), ["--a=1"], tmp_path)


def test_mean_and_range():
    assert arms.mean_and_range([2.0]) == "2.000"
    assert arms.mean_and_range([1.0, 1.5, 2.0], digits=2) == "1.50 (1.00 - 2.00)"


@pytest.mark.parametrize("tool", ["ablate", "sweep"])
def test_a_result_that_cannot_be_written_is_refused_before_the_training(tool, tmp_path, monkeypatch):
    main = importlib.import_module(f"tools.{tool}").main
    monkeypatch.setattr(arms.subprocess, "run", lambda *args, **options: pytest.fail("it trains"))
    for key, path in (("json", tmp_path / "absent/a.json"), ("png", tmp_path)):
        with pytest.raises(UserError, match="cannot be written; name a file in a folder that exists"):
            main([f"--{key}={path}", f"--out_dir={tmp_path / 'out'}"])
    arms.require_writable(str(tmp_path / "a.json"), None)
