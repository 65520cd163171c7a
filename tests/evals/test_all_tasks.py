"""Tasks that are measured while a model trains: the figures of eval.py, and the same training."""

import json

import pytest

import eval as evaluation
import verifier
from configurator import UserError
from tests.conftest import TINY_RUN
from tests.runs import assert_same_run, events, run

COPA = {"premise": "The man turned on the faucet.", "question": "effect", "label": 1,
        "choice1": "The toilet filled with water.", "choice2": "Water flowed from the spout."}
WORDS = ["--max_steps=6", "--eval_interval=3", "--dropout=0.1"]


@pytest.fixture(scope="module")
def copa(tmp_path_factory):
    path = tmp_path_factory.mktemp("rows") / "copa.jsonl"
    path.write_text("".join(json.dumps(COPA | {"label": label}) + "\n" for label in (0, 1, 1)))
    return path


def of_tasks(event):
    return {key: value for key, value in event.items() if key.startswith(("val_copa", "val_problems"))}


def test_training_stays_the_same_and_figures_are_those_of_eval(data, copa, tmp_path, capsys):
    plain = run(data, tmp_path / "a", *WORDS)
    found = run(data, tmp_path / "b", *WORDS, "--eval_tasks=problems,copa", f"--eval_data={copa.parent}",
                "--eval_limit=2")
    assert_same_run(tmp_path / "a", tmp_path / "b")
    results = [event for event in found if "val_loss" in event]
    assert [event["val_loss"] for event in results] == [event["val_loss"] for event in plain
                                                        if "val_loss" in event]
    assert len(results) == 2 and all(of_tasks(event).keys() == {
        "val_copa_accuracy", "val_problems_accuracy", "val_problems_well_formed"} for event in results)
    assert "val_copa_accuracy" in capsys.readouterr().out
    evaluation.main([f"--model={tmp_path / 'b'}", "--tasks=problems,copa", f"--data={copa.parent}",
                     "--limit=2", "--device=cpu", f"--out_dir={tmp_path / 'e'}"])
    tasks = json.loads((tmp_path / "e" / "results.json").read_text())["models"][0]["tasks"]
    assert of_tasks(results[-1]) == {f"val_{name}_{key}": figure["value"] for name, task in tasks.items()
                                     for key, figure in task["figures"].items()}
    # The keys may change when a run continues.
    more = run(data, tmp_path / "b", *WORDS[1:], "--max_steps=7", "--eval_tasks=copa",
               f"--eval_data=copa={copa}")
    assert of_tasks(more[-1]).keys() == {"val_copa_accuracy"}


def test_one_of_two_ranks_asks(data, copa, tmp_path, two_ranks):
    words = ["--max_steps=2", "--micro_batch_size=2", "--eval_tasks=copa", f"--eval_data={copa.parent}"]
    two_ranks(run, data, tmp_path, *words)
    assert 0 <= events(tmp_path)[-1]["val_copa_accuracy"] <= 1


def test_a_task_that_the_model_cannot_do_is_left_out(data, copa, tmp_path, capsys):
    """The model has no chat tokens: tool calls are reported at each evaluation, and training goes on."""
    function = {"name": "area", "parameters": {"type": "dict", "required": [], "properties": {}}}
    call = {"id": "simple_python_0", "question": [[{"role": "user", "content": "Area?"}]],
            "function": [function | {"description": ""}]}
    rows = [call, {"id": "simple_python_0", "ground_truth": [{"area": {}}]}]
    (tmp_path / "bfcl_v4_simple_python.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    found = run(data, tmp_path / "a", "--max_steps=1", "--eval_tasks=bfcl_simple,copa",
                f"--eval_data=bfcl_simple={tmp_path / 'bfcl_v4_simple_python.jsonl'},copa={copa}")
    assert not [key for key in found[-1] if "bfcl" in key] and "val_copa_accuracy" in found[-1]
    note = "note      eval_tasks: bfcl_simple: the model: its tokenizer has no chat"
    assert note in capsys.readouterr().out


@pytest.mark.parametrize("words, message", [
    ("--eval_tasks=helaswag", "eval_tasks=helaswag: unknown task 'helaswag', did you mean 'hellaswag'"),
    ("--eval_tasks=copa --eval_data=cop=x", "eval_data=cop=x: unknown task 'cop', did you mean 'copa'"),
    ("--eval_tasks=copa --eval_data=/nowhere", "eval_tasks: data=/nowhere: no such file or folder"),
    ("--eval_tasks=perplexity", "eval_tasks: the training text of this model is not here: give "
                                "--eval_data=perplexity=FILE"),
    ("--eval_tasks=humaneval", "eval_tasks: humaneval needs settings that only eval.py has"),
    ("--eval_tasks=problems --parallel=fsdp", "eval_tasks: does not work with parallel=fsdp"),
    ("--eval_limit=0", "eval_limit=0: must be positive"),
])
def test_mistakes_are_found_before_training(data, tmp_path, words, message):
    with pytest.raises(UserError, match=message):
        run(data, tmp_path, *TINY_RUN, *words.split())
    assert not (tmp_path / "run.json").exists()


def test_the_verifier_refuses_tasks():
    with pytest.raises(UserError, match="eval_tasks=problems: must be '' in verifier.py"):
        verifier.VerifierConfig(eval_tasks="problems")
