"""The table of tasks and methods on a tiny model: its figures, its seeds, and no run twice."""

import importlib

import pytest

from configurator import UserError
from formats.chat_format import with_chat_tokens
from formats.files import read_json
from formats.tokenizer import Tokenizer
from tests.conftest import busy_model, tiny_config
from tools import task_table
from tools.task_table import cell, main


def write_tables(folder):
    """Reviews whose last word decides, for training and for evaluation."""
    folder.mkdir()
    for split, count in (("train", 80), ("dev", 20)):
        rows = [f"film {n} is {'good' if n % 2 else 'bad'}\t{n % 2}" for n in range(count)]
        (folder / f"sst2_{split}.tsv").write_text("\n".join(rows) + "\n")


@pytest.fixture
def calls(monkeypatch):
    """The scripts that run, in this process, with their arguments."""
    made = []

    def run(script, argv, threads=None):
        made.append((script, argv))
        importlib.import_module(script.removesuffix(".py")).main(argv)

    monkeypatch.setattr("tools.arms.run_process", run)
    monkeypatch.setattr("tools.task_table.run_process", run)
    # run_arms has threads, in which a training run cannot set its signal handlers.
    monkeypatch.setattr("tools.task_table.run_arms", lambda arms, seeds: {
        name: [arm(seed) for seed in seeds] for name, arm in arms.items()})
    return made


@pytest.fixture
def model(tmp_path):
    """A chat model with random weights, and a context that holds a question after an example."""
    text = "Question: Is this sentence positive or negative? Answer: a film is good or bad"
    tokenizer = with_chat_tokens(Tokenizer.train([text] * 9, 300))
    folder = tmp_path / "model"
    busy_model(tiny_config(vocab_size=tokenizer.vocab_size, block_size=256)).save_pretrained(folder)
    tokenizer.save(folder)
    return folder


def test_every_method_is_measured_once(model, tmp_path, calls, capsys):
    write_tables(tmp_path / "data")
    argv = [f"--model={model}", f"--data={tmp_path / 'data'}", "--tasks=sst2", "--seeds=2", "--shots=1",
            "--limit=20", "--methods=zero,few,lora", f"--out_dir={tmp_path / 'out'}",
            "--sft=--block_size=128 --max_steps=2 --sample_answers=0", "--lora=--lora_rank=2"]
    main(argv)
    table = (tmp_path / "out" / "table.md").read_text()
    assert capsys.readouterr().out.endswith(table)
    lines = [[cell.strip() for cell in line.split("|")[1:-1]] for line in table.strip().split("\n")]
    assert lines[0] == ["task", "figure", "n", "zero", "few", "lora"]
    assert [line[:3] for line in lines[2:4]] == [["sst2", "accuracy", "20"], ["sst2", "f1", "20"]]
    figures = read_json(tmp_path / "out" / "table.json")["sst2"]
    assert [len(runs) for runs in figures.values()] == [1, 1, 2]
    shown = figures["zero"][0]["accuracy"]
    assert lines[2][3] == f"{shown['value']:.3f} ± {shown['stderr']:.3f}"
    assert [script for script, _ in calls] == ["prepare.py", "eval.py", "eval.py", *["sft.py", "eval.py"] * 2]
    assert all("--shots=0" in argv for script, argv in calls[3:] if script == "eval.py")
    seeds = [word for script, words in calls if script == "sft.py" for word in words if "--seed" in word]
    assert seeds == ["--seed=1", "--seed=2"]
    # The same command again only looks whether the data are up to date; another limit measures again.
    calls.clear()
    main(argv)
    assert [script for script, _ in calls] == ["prepare.py"]
    main([*argv, "--methods=zero", "--limit=10"])
    assert [script for script, _ in calls] == ["prepare.py", "eval.py"]


def test_a_cell_has_the_mean_the_range_and_the_error():
    runs = [{"f1": {"value": value, "stderr": error, "n": 9}} for value, error in ((0.5, 0.1), (0.7, 0.3))]
    assert cell(runs, "f1") == "0.600 (0.500 - 0.700) ± 0.200" and cell(runs[:1], "f1") == "0.500 ± 0.100"
    assert cell(runs, "truncated") == "-"


def test_the_hub_is_read_without_a_folder(tmp_path, monkeypatch):
    made = []
    monkeypatch.setattr("tools.task_table.run_process", lambda *args: made.append(args))
    task_table.prepare_task(task_table.TableConfig(out_dir=str(tmp_path), max_tokens=9), "gsm8k")
    assert {"--source=hf:openai/gsm8k:main:train", "--max_tokens=9", "--task=gsm8k"} <= {*made[0][1]}


@pytest.mark.parametrize("argv, message", [
    (["--tasks=mawps"], "tasks=mawps: must be some of sst2,cola,rte,gsm8k,summarize"),
    (["--methods=zero,dpo"], "methods=zero,dpo: must be some of zero,few,lora,full"),
    (["--seeds=0"], "seeds=0: must be positive"), (["--data=absent"], "absent: no such file or folder")])
def test_mistakes_of_the_user(argv, message):
    with pytest.raises(UserError, match=message):
        main(argv)
