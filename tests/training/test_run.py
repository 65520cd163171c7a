"""training/run.py: stages, a run's folder, its log, and what it refuses."""

import contextlib
import json
import re
import shutil
import signal
import sys
import types
from pathlib import Path
from unittest.mock import Mock

import numpy as np
import pytest
import torch

import loop
import modeling.devices
import train
import training.run
from configurator import UserError, configure, version
from formats import checkpoint, hf
from formats.files import write_json
from formats.peft import AdapterSpec
from formats.tokenizer import Tokenizer
from loop import RunConfig, plan_stages, start_run
from model import GPT
from tests.conftest import ROOT, TINY_RUN
from tests.runs import events, losses, run, signal_in_step, stop_at_step
from training.lora import AdaptedGPT
from training.stages import with_steps


def test_plan_by_hand():
    cfg = RunConfig(
        stages=[
            dict(steps=3),
            dict(epochs=0.5, learning_rate=1.0),
            dict(steps=2, restart=True),
            dict(steps=1),
        ]
    )
    stages = plan_stages(with_steps(cfg, lambda stage: 10))
    assert [(s.first, s.last, s.begin, s.end) for s in stages] == [
        (0, 3, 0, 8),
        (3, 8, 0, 8),
        (8, 10, 8, 11),
        (10, 11, 8, 11),
    ]
    assert stages[1].cfg.learning_rate == 1.0 and stages[2].cfg.learning_rate == cfg.learning_rate


@pytest.mark.parametrize(
    "stages, message",
    [
        (["x"], r"stages\[0\]: must be a dict"),
        ([dict(learning_rate=1)], "a dict with steps or epochs"),
        ([dict(steps=0)], "steps=0: must be a positive"),
        ([dict(steps=True)], "steps=True: must be a positive"),
        ([{1: 2, "steps": 2}], "must be a dict"),
        ([dict(steps=1, epochs=1)], "steps or epochs"),
        ([dict(steps=1, learning_rat=1)], r"stages\[0\]: unknown key 'learning_rat'"),
        ([dict(steps=1), dict(steps=1, seed=3)], r"stages\[1\]: seed cannot"),
        ([dict(steps=1, n_layer=3)], r"stages\[0\]: n_layer cannot"),
        ([dict(steps=1, micro_batch_size="a")], "expected int"),
        ([dict(steps=1, learning_rate=-1)], "learning_rate=-1"),
    ],
)
def test_stages_that_make_no_sense(stages, message):
    with pytest.raises(UserError, match=message):
        plan_stages(RunConfig(stages=stages))


def test_the_log_has_every_field(trained):
    found = events(trained)
    assert losses(found)[0] > 6 > 5.3 > losses(found)[-1]
    assert found[0].keys() == {
        "step",
        "loss",
        "lr",
        "grad_norm",
        "tokens",
        "tokens_per_second",
        "mfu",
        "memory_gb",
        "seconds",
    }
    assert found[-1].keys() == {"step", "seconds", "eval_seconds", "memory_gb", "val_loss", "val_perplexity",
                                "val_bits_per_byte"}
    assert found[-1]["seconds"] == pytest.approx(found[-2]["seconds"], abs=0.5)
    assert found[-1]["eval_seconds"] > 0 and found[-1]["memory_gb"] >= found[-2]["memory_gb"] > 0.01
    assert [event["step"] for event in found if "loss" in event] == list(range(1, 61))
    assert found[-1]["val_perplexity"] == pytest.approx(np.exp(found[-1]["val_loss"]))


def test_a_finished_run_prints_so_and_can_grow(data, tmp_path, capsys):
    words = ["--schedule=constant", "--warmup_steps=0"]
    run(data, tmp_path, *words, "--max_steps=4")
    before = events(tmp_path)
    capsys.readouterr()
    assert run(data, tmp_path, *words, "--max_steps=4") == before
    assert "finished" in capsys.readouterr().out
    grown = run(data, tmp_path, *words, "--max_steps=8")
    assert losses(grown)[:4] == losses(before) and len(losses(grown)) == 8
    with pytest.raises(UserError, match="max_steps was 8, is 4"):
        run(data, tmp_path, *words, "--max_steps=4")


@pytest.mark.parametrize("flags, emulated", [
    ("fma avx2 avx512f", True), ("avx512f avx512_bf16 amx_int8", False), ("asimd bf16", False), ("", True)
])
def test_a_cpu_without_bfloat16_units_is_named(tmp_path, monkeypatch, capsys, flags, emulated):
    cpuinfo = tmp_path / "cpuinfo"
    cpuinfo.write_text(f"model name : a CPU\nflags : {flags}\n")
    monkeypatch.setattr(
        modeling.devices, "Path", lambda path: cpuinfo if path == "/proc/cpuinfo" else Path(path)
    )
    for dtype in ("bfloat16", "float32"):
        with start_run(RunConfig(out_dir=str(tmp_path / dtype), device="cpu", dtype=dtype)):
            assert ("no bfloat16 units" in capsys.readouterr().out) == (emulated and dtype == "bfloat16")
    cpuinfo.unlink()
    assert not training.run.emulates_bfloat16(torch.device("cpu"))  # unknown, so no warning


def test_changed_settings_and_data_are_refused_with_the_difference(data, tmp_path):
    copy = tmp_path / "copy"
    shutil.copytree(data, copy)
    out = tmp_path / "out"
    run(copy, out, "--max_steps=2")
    for word, message in (
        ("--learning_rate=1e-3", "learning_rate was 0.003, is 0.001"),
        ("--n_layer=3", "n_layer was 2, is 3"),
        ("--seed=5", "seed was 1337, is 5"),
        ("--dtype=bfloat16", "dtype was None, is bfloat16"),
    ):
        with pytest.raises(UserError, match=message):
            run(copy, out, "--max_steps=2", word)
    meta = json.loads((copy / "meta.json").read_text())
    write_json(copy / "meta.json", meta | {"source": "elsewhere"})
    with pytest.raises(UserError, match="data was"):
        run(copy, out, "--max_steps=2")
    assert len(losses(run(copy, out, "--max_steps=3", "--overwrite=True", "--seed=5"))) == 3


def test_a_new_run_has_no_event_of_the_old_one(data, tmp_path):
    """Also none at step 0, which a run of max_steps=0 has: it would be taken for the new run's evaluation."""
    (old,) = run(data, tmp_path / "out", "--max_steps=0")
    (new,) = run(data, tmp_path / "out", "--max_steps=0", "--overwrite=True", "--seed=5")
    (expected,) = run(data, tmp_path / "other", "--max_steps=0", "--seed=5")
    assert new["val_loss"] == expected["val_loss"] != old["val_loss"]
    log = run(data, tmp_path / "out", "--max_steps=1", "--overwrite=True", "--seed=5")
    assert [event["step"] for event in log] == [1, 1]


def test_a_run_without_a_checkpoint_may_still_change(data, tmp_path, monkeypatch):
    with monkeypatch.context() as patch, pytest.raises(MemoryError):
        patch.setattr("loop.place", Mock(side_effect=MemoryError))
        run(data, tmp_path, "--max_steps=2", "--beta2=0.5")
    assert len(losses(run(data, tmp_path, "--max_steps=2"))) == 2


@pytest.mark.parametrize("content", ["", "{", "[]", "3", "null", "{}", '{"config": 3, "identity": 4}'])
def test_damaged_files_of_a_run_are_one_line(data, tmp_path, content):
    run(data, tmp_path, "--max_steps=2")
    for name in ("run.json", "checkpoints.json"):
        before = (tmp_path / name).read_text()
        (tmp_path / name).write_text(content)
        if name == "run.json" or content in ("", "{", "3", "null"):
            with pytest.raises(UserError, match=f"{name}: damaged"):
                run(data, tmp_path, "--max_steps=3")
        (tmp_path / name).write_text(before)
    (tmp_path / "metrics.jsonl").write_text(content + '\n{"step": "x"}\n{"a":}\n')  # not needed
    assert [event["step"] for event in run(data, tmp_path, "--max_steps=2")] == [2]  # it evaluates again
    assert [event["step"] for event in run(data, tmp_path, "--max_steps=3")] == [2, 3, 3]


def test_overwriting_comes_last(data, tmp_path):
    """A mistake in a command with --overwrite=True deletes nothing; and a run cannot be in a data folder."""
    run(data, tmp_path / "out", "--max_steps=2")
    kept = json.loads((tmp_path / "out" / "run.json").read_text())
    for words in ([f"--dataset={tmp_path / 'typo'}"], ["--vocab_size=10"], ["--block_size=100000"],
                  ["--lr_multipliers={'nothing': 2.0}"]):
        with pytest.raises(UserError):
            run(data, tmp_path / "out", "--max_steps=2", "--overwrite=True", *words)
    assert (tmp_path / "out" / "step_000002").is_dir()
    assert json.loads((tmp_path / "out" / "run.json").read_text()) == kept
    with pytest.raises(UserError, match="holds a data set"):
        run(data, data, "--max_steps=2")


def test_two_runs_in_one_folder(data, tmp_path):
    cfg = configure(train.TrainConfig, [f"--out_dir={tmp_path}"])[0]
    with start_run(cfg):
        with pytest.raises(UserError, match="another process is training here"):
            start_run(cfg)
    start_run(cfg).__exit__()


def test_the_last_line_of_a_killed_log_may_be_incomplete(data, tmp_path):
    stop_at_step(data, tmp_path, 3, "--max_steps=9")
    with open(tmp_path / "metrics.jsonl", "a") as file:
        file.write('{"step": 5, "loss": 1.0}\n{"step": 6, "lo')
    found = run(data, tmp_path, "--max_steps=9")
    assert [event["step"] for event in found if "loss" in event] == list(range(1, 10))


@pytest.mark.parametrize(
    "words, message",
    [
        (["--vocab_size=100"], "has 500 ids"),
        (["--global_batch_size=6"], "multiple of micro_batch_size x ranks = .*_batch_size=2 fits"),
        (["--dataset=nowhere"], "no data set here"),
        (["--n_head=3"], "n_head|n_embd"),
        (["--learning_rate=0"], "positive"),
        (["--device=cuda:7"], "not on this machine"),
        (["--init_from=nowhere/at/all"], "no model here"),
        (["--parallel=zero"], "none|ddp|fsdp"),
        (["--z_loss=-1"], "z_loss=-1.0: must be at least 0"),
        (["--out_dir="], "no value"),
        (["--dataset=,"], "write folders and their weights"),
        (["--dataset=a:1e308,b:1e308"], "write folders and their weights"),
        (["--learning_rate=1e400"], "expected float"),
        (["--max_steps=1" + "0" * 400], "expected int"),
        (["--block_size=10000000"], "make no row"),
    ],
)
def test_mistakes_are_one_line(data, tmp_path, words, message):
    with pytest.raises(UserError, match=message):
        run(data, tmp_path, "--max_steps=1", *words)


def test_bad_validation_text_is_found_before_training(data, tmp_path, two_ranks):
    copy = tmp_path / "copy"
    shutil.copytree(data, copy)
    ids = np.memmap(copy / "val_00000.bin", np.uint16, "r+")
    ids[1000] = 60_000
    ids.flush()
    for message in two_ranks(refusal, copy, tmp_path / "out", "--micro_batch_size=2", "--eval_tokens=4096"):
        assert "val_00000.bin: token 1000 is 60000, the vocabulary has 500 ids" in message
    assert not (tmp_path / "out" / "metrics.jsonl").exists()
    with pytest.raises(UserError, match="tokens make no row of block_size=40000"):
        run(data, tmp_path / "long", "--block_size=40000", "--max_steps=1")


def test_two_ranks_refuse_together(data, tmp_path, two_ranks):
    for message in two_ranks(refusal, data, tmp_path, "--parallel=none"):
        assert "torchrun started 2 processes" in message
    for message in two_ranks(refusal, data, tmp_path, "--micro_batch_size=8"):
        assert "= 8 x 2" in message


def refusal(data, out, *words):
    try:
        run(data, out, *words)
    except UserError as error:
        return str(error)


def test_run_json_says_what_made_the_run(data, trained):
    content = json.loads((trained / "run.json").read_text())
    meta = json.loads((data / "meta.json").read_text())
    assert content["dataset_tokens"] == {str(data): meta["tokens"]["train"]}
    assert content["version"] == version()
    assert re.fullmatch("[0-9a-f]{40}(, modified)?|not in a git checkout", content["commit"])
    assert "wandb" not in content


@pytest.mark.parametrize("out_dir", ["/", "~", ROOT, ROOT.parent, __file__, f"{__file__}/more", "/proc/run"])
def test_impossible_out_dirs_are_refused(out_dir, data):
    with pytest.raises(UserError, match="out_dir=.*(a folder of its own|cannot be made)") as error:
        run(data, Path(out_dir).expanduser(), "--max_steps=1")
    assert "\n" not in str(error.value)


class FakeWandb(types.ModuleType):
    """Records how a run uses wandb. `log` takes no step of its own: wandb drops events if that goes back."""

    Error = type("Error", (Exception,), {})

    def __init__(self):
        super().__init__("wandb")
        self.runs, self.logged, self.metrics = [], [], []

    def init(self, **options):
        self.runs.append(options)
        return types.SimpleNamespace(
            id=options["id"], offline=False, url=f"https://wandb.example/{options['id']}",
            log=self.logged.append,
            define_metric=lambda *names, **options: self.metrics.append((*names, options)))


def test_wandb_has_one_run_per_folder(data, tmp_path, monkeypatch):
    fake = FakeWandb()
    monkeypatch.setitem(sys.modules, "wandb", fake)
    found = run(data, tmp_path, "--max_steps=2", "--schedule=constant", "--wandb=True")
    assert fake.logged == found and fake.metrics == [("step", {}), ("*", {"step_metric": "step"})]
    entry = json.loads((tmp_path / "run.json").read_text())["wandb"]
    assert entry == {"id": fake.runs[0]["id"], "url": f"https://wandb.example/{fake.runs[0]['id']}"}
    # A resume, also after one without wandb, is the same run.
    run(data, tmp_path, "--max_steps=3", "--schedule=constant")
    found = run(data, tmp_path, "--max_steps=4", "--schedule=constant", "--wandb=True")
    assert [options["id"] for options in fake.runs] == [entry["id"]] * 2
    assert all(options["resume"] == "allow" for options in fake.runs)
    assert json.loads((tmp_path / "run.json").read_text())["wandb"] == entry
    assert fake.logged[-2:] == found[-2:]
    # A run that starts over is another one, and so is one in another folder.
    run(data, tmp_path, "--max_steps=1", "--wandb=True", "--overwrite=True")
    run(data, tmp_path / "b", "--max_steps=1", "--wandb=True")
    assert len({options["id"] for options in fake.runs}) == 3


def test_wandb_mistakes_are_one_line(data, tmp_path, monkeypatch):
    fake = FakeWandb()
    monkeypatch.setitem(sys.modules, "wandb", fake)

    def without_key(**options):
        raise fake.Error("api_key not configured\nmore")

    fake.init = without_key
    run(data, tmp_path, "--max_steps=2")
    with pytest.raises(UserError, match="api_key not configured .WANDB_MODE=offline"):
        run(data, tmp_path, "--max_steps=2", "--wandb=True", "--overwrite=True")
    assert (tmp_path / "step_000002").is_dir()  # nothing was deleted


def test_tensorboard_mirrors_the_log(data, tmp_path, monkeypatch):
    writers = []

    class Writer:
        def __init__(self, folder, purge_step):
            self.folder, self.purge_step, self.scalars = folder, purge_step, []
            writers.append(self)

        def add_scalar(self, key, value, step):
            self.scalars.append((key, value, step))

        def flush(self):
            pass

    fake = types.ModuleType("torch.utils.tensorboard")
    fake.SummaryWriter = Writer
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", fake)
    found = run(data, tmp_path, "--max_steps=2", "--schedule=constant", "--tensorboard=True")
    assert writers[0].scalars == [(key, value, event["step"]) for event in found
                                  for key, value in event.items() if key != "step" and value is not None]
    run(data, tmp_path, "--max_steps=3", "--schedule=constant", "--tensorboard=True")
    assert [(writer.folder, writer.purge_step) for writer in writers] == [
        (str(tmp_path / "tensorboard"), 0), (str(tmp_path / "tensorboard"), 3)]
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    with pytest.raises(UserError, match="pip install tensorboard"):
        run(data, tmp_path / "b", "--max_steps=2", "--tensorboard=True")


@pytest.mark.parametrize("how", ["out_dir", "step", "best step of a link", "linked step", "relative", "base"])
def test_a_model_to_start_from_is_never_removed(trained, data, tmp_path, monkeypatch, how):
    """With overwrite=True too. init_from is the out_dir, a step in it, a link, or an adapter of its model."""
    own = shutil.copytree(trained, tmp_path / "own", symlinks=True)
    step = checkpoint.step_folders(own)[-1]
    source, out = str(own), str(own)
    if how == "step":
        source = str(step)
    if how == "best step of a link":
        source = str(tmp_path / "link")
        Path(source).symlink_to(own)
    if how == "linked step":  # the step itself is a link to a folder elsewhere
        step.rename(tmp_path / "elsewhere")
        step.symlink_to(tmp_path / "elsewhere")
        source = str(step)
    if how == "relative":
        (tmp_path / "below").mkdir()
        monkeypatch.chdir(tmp_path / "below")
        source, out = f"../own/{step.name}", "../below/../own"
    if how == "base":
        source = str(tmp_path / "adapter")
        model = GPT.from_pretrained(step)
        spec = AdapterSpec(2, 4.0, 0.0, ("q_proj",), False)
        AdaptedGPT(model.config, spec, {"path": str(step)}).save_pretrained(source)
        Tokenizer.load(step).save(Path(source))
    before = {path.relative_to(own): path.read_bytes() for path in own.rglob("*") if path.is_file()}
    words = [word for word in TINY_RUN if not word.startswith(("--n_", "--inter"))]
    with pytest.raises(UserError, match=f"out_dir={re.escape(out)}: holds the model of init_from="):
        train.main([*words, f"--dataset={data}", f"--init_from={source}", f"--out_dir={out}",
                    "--overwrite=True"])
    after = {path.relative_to(own): path.read_bytes() for path in own.rglob("*") if path.is_file()}
    after.pop(Path(".lock"), None), before.pop(Path(".lock"), None)
    assert after == before


def test_a_run_needs_a_folder_that_is_no_model(trained, data):
    folder = hf.find_folder(trained)
    words = [word for word in TINY_RUN if not word.startswith(("--n_", "--inter"))]
    for more in ([], ["--overwrite=True"]):
        with pytest.raises(UserError, match="holds a model; a run needs a folder of its own"):
            train.main([*words, f"--dataset={data}", f"--init_from={folder}", f"--out_dir={folder}", *more])
    assert checkpoint.find_corruption(folder) is None


# ---- Run control ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("entry, message", [
    (dict(steps=3, restart="no"), "restart='no': must be True or False"),
    (dict(steps=3, restart=1), "restart=1: must be True or False"),
    (dict(epochs=True), "epochs=True: must be a positive number"),
    (dict(steps=True), "steps=True: must be a positive whole number"),
    (dict(steps=1, min_lr=1.0), "min_lr=1.0: must be at most learning_rate=0.006"),
])
def test_values_of_a_stage_that_cannot_be_right(entry, message):
    with pytest.raises(UserError, match=re.escape(message)):
        plan_stages(with_steps(RunConfig(stages=[entry]), lambda stage: 10))


def test_a_lowest_rate_above_the_peak_is_refused():
    with pytest.raises(UserError, match="min_lr=0.01: must be at most learning_rate=0.006"):
        configure(train.TrainConfig, ["--min_lr=0.01"])


def test_max_steps_overrides_a_single_stage(data, tmp_path):
    """Its steps or epochs; a larger one continues the run. Several stages, or both in a file, are refused."""
    one, two, both = (tmp_path / name for name in ("one.py", "two.py", "both.py"))
    one.write_text("stages = [dict(epochs=3, learning_rate=1e-3)]\n")
    two.write_text("stages = [dict(steps=1), dict(steps=1)]\n")
    both.write_text("stages = [dict(steps=1)]\nmax_steps = 3\n")
    found = run(data, tmp_path / "a", str(one), "--max_steps=2", "--schedule=constant", "--warmup_steps=0")
    assert [event["step"] for event in found if "lr" in event] == [1, 2] and found[0]["lr"] == 1e-3
    found = run(data, tmp_path / "a", str(one), "--max_steps=4", "--schedule=constant", "--warmup_steps=0")
    assert found[-1]["step"] == 4
    with pytest.raises(UserError, match="max_steps was 4, is 3"):
        run(data, tmp_path / "a", str(one), "--max_steps=3", "--schedule=constant", "--warmup_steps=0")
    for words in ([str(two), "--max_steps=2"], [str(both)]):
        with pytest.raises(UserError, match="max_steps is the sum of the stages' steps; remove it"):
            run(data, tmp_path / "b", *words)


def test_a_longer_schedule_says_that_the_rate_rises(data, tmp_path, capsys):
    """Linear decay, finished at step 6 with 1/6 of the peak; at step 12 of 12 steps it is half the peak."""
    words = ["--warmup_steps=0", "--schedule=linear"]
    run(data, tmp_path / "a", *words, "--max_steps=6")
    run(data, tmp_path / "a", *words, "--max_steps=6")
    assert "rises again" not in capsys.readouterr().out
    run(data, tmp_path / "a", *words, "--max_steps=12")
    assert ("the schedule now ends at step 12: the learning rate rises again, from 5.00e-04 to 1.50e-03"
            in capsys.readouterr().out)
    run(data, tmp_path / "b", *words, "--max_steps=6", "--save_interval=3")
    shutil.rmtree(tmp_path / "b" / "step_000006")  # as if killed: the same schedule goes on
    run(data, tmp_path / "b", *words, "--max_steps=6", "--save_interval=3")
    assert "rises again" not in capsys.readouterr().out


def test_patience_ends_a_run(data, tmp_path, monkeypatch, capsys):
    """val_loss 5, 4, 6, 4, ..: the second evaluation is the best, and two without a lower one end the run."""
    losses_of = iter([5.0, 4.0, 6.0, 4.0, 3.0, 2.0, 1.0])
    monkeypatch.setattr(train.TextEvaluation, "__call__", lambda self, model, last: {
        "val_loss": next(losses_of), "val_perplexity": 1.0, "val_bits_per_byte": 1.0})
    words = ["--max_steps=12", "--eval_interval=2", "--save_interval=4", "--patience=2"]
    found = run(data, tmp_path, *words)
    assert [event["val_loss"] for event in found if "val_loss" in event] == [5, 4, 6, 4]
    assert found[-1]["step"] == 8 and checkpoint.step_folders(tmp_path)[-1].name == "step_000008"
    assert "stopped   early, at step 8: no lower val_loss in 2 evaluations" in capsys.readouterr().out
    assert checkpoint.read_pointers(tmp_path)["best"] == "step_000004"
    assert run(data, tmp_path, *words) == found  # the same command again trains no further
    found = run(data, tmp_path, *words[:-1], "--patience=3")
    assert found[-1]["step"] == 12


def outcome(data, out, *words):
    """What the on_end command sees: the values of NANOLLAMA_*."""
    path = out.with_suffix(".txt")
    names = ("OUTCOME", "OUT_DIR", "STEP", "VAL_LOSS", "ERROR")
    command = " ".join(["printf '%s\\n'", *(f'"$NANOLLAMA_{name}"' for name in names), f"> '{path}'"])
    with contextlib.suppress(UserError, SystemExit):
        run(data, out, "--max_steps=4", *words, f"--on_end={command}")
    return dict(zip(names, path.read_text().splitlines(), strict=True))


def test_on_end_gets_the_outcome(data, tmp_path, monkeypatch):
    found = outcome(data, tmp_path / "a")
    val_loss = str(events(tmp_path / "a")[-1]["val_loss"])
    assert found == {"OUTCOME": "finished", "OUT_DIR": str(tmp_path / "a"), "STEP": "4", "VAL_LOSS": val_loss,
                     "ERROR": ""}
    with monkeypatch.context() as patched:
        patched.setattr(loop, "backward", signal_in_step(signal.SIGTERM, 2))
        found = outcome(data, tmp_path / "b")
    assert (found["OUTCOME"], found["STEP"]) == ("stopped", "2")
    found = outcome(data, tmp_path / "c", "--lr_multipliers={'xyz': 2.0}")
    assert found["OUTCOME"] == "failed" and "'xyz' matches no parameter" in found["ERROR"]


def test_a_command_that_fails_is_named(data, tmp_path, capsys):
    run(data, tmp_path / "a", "--max_steps=1", "--on_end=exit 7")
    assert "on_end: the command ended with exit code 7" in capsys.readouterr().out
