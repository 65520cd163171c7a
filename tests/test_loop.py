"""loop.py, parts/run.py, parts/checkpoint.py through train.py: the same run however it is cut, shared out or
stopped."""

import json
import os
import shutil
import signal
import sys
import types
from pathlib import Path

import numpy as np
import pytest
import torch

import loop
import train
from configurator import UserError, configure
from loop import RunConfig, fit, plan, start_run, with_steps
from model import GPT
from parts import checkpoint
from parts.data import Mix, text_batch
from parts.losses import IGNORE
from parts.shards import write_json
from tests.conftest import TINY_RUN, tiny_config

ADAMW = ["--optimizer=adamw", "--max_steps=20"]


def run(data, out, *words):
    """Train, and return the events of metrics.jsonl."""
    train.main([*TINY_RUN, f"--dataset={data}", f"--out_dir={out}", *words])
    return events(out)


def events(out):
    return [json.loads(line) for line in (Path(out) / "metrics.jsonl").read_text().splitlines()]


def losses(found):
    return [event["loss"] for event in found if "loss" in event]


def weights(out):
    """Every parameter of the last checkpoint, by its name in the file."""
    from safetensors.torch import load_file

    return load_file(checkpoint.step_folders(Path(out))[-1] / "model.safetensors")


def state(out):
    return torch.load(checkpoint.step_folders(Path(out))[-1] / "trainer" / "state.pt", weights_only=True)


def assert_same_run(one, two):
    """Losses, weights and optimizer state equal to the last bit."""
    assert losses(events(one)) == losses(events(two))
    for first, second in (
        (weights(one), weights(two)),
        (flat(state(one)["optimizer"]), flat(state(two)["optimizer"])),
    ):
        assert first.keys() == second.keys()
        assert all(torch.equal(first[name], second[name]) for name in first)


def flat(states):
    return {
        f"{name}.{key}": torch.as_tensor(value)
        for name, entry in states.items()
        for key, value in entry.items()
    }


def assert_close(found, expected, tolerance=1e-6):
    assert len(found) == len(expected) > 0
    assert max(abs(a / b - 1) for a, b in zip(found, expected, strict=True)) <= tolerance


# ---- The same run, shared out differently -----------------------------------------------------------------


@pytest.fixture(scope="module")
def reference(tmp_path_factory, data):
    """20 steps on one process, eight rows at a time, with document masks."""
    out = tmp_path_factory.mktemp("reference") / "out"
    run(data, out, *ADAMW, "--document_mask=True", "--micro_batch_size=8", "--save_interval=10")
    return out


@pytest.mark.parametrize("micro", [4, 1])
def test_micro_batches_change_nothing(data, reference, tmp_path, micro):
    found = run(data, tmp_path, *ADAMW, "--document_mask=True", f"--micro_batch_size={micro}")
    assert_close(losses(found), losses(events(reference)))


@pytest.mark.parametrize("parallel", ["ddp", "fsdp"])
def test_two_ranks_change_nothing(data, reference, tmp_path, two_ranks, parallel):
    two_ranks(
        run, data, tmp_path, *ADAMW, "--document_mask=True", "--micro_batch_size=2", f"--parallel={parallel}"
    )
    assert_close(losses(events(tmp_path)), losses(events(reference)))
    last, expected = events(tmp_path)[-1], events(reference)[-1]
    assert last["val_loss"] == pytest.approx(expected["val_loss"], rel=1e-5)
    assert last["val_bits_per_byte"] == pytest.approx(expected["val_bits_per_byte"], rel=1e-5)
    theirs = weights(reference)
    assert weights(tmp_path).keys() == theirs.keys()  # no prefix of a wrapper
    assert all((value - theirs[name]).abs().max() < 1e-4 for name, value in weights(tmp_path).items())


@pytest.mark.parametrize("first, second", [("single", "fsdp"), ("fsdp", "single"), ("ddp", "fsdp")])
def test_a_run_goes_on_with_another_number_of_ranks(data, reference, tmp_path, two_ranks, first, second):
    """Ten steps one way, ten the other: no sample is lost or read twice, and nothing is reset."""
    words = [*ADAMW, "--document_mask=True", "--micro_batch_size=2", "--save_interval=10"]
    for number, kind in enumerate((first, second)):
        arguments = (
            data,
            tmp_path,
            9 if number == 0 else None,
            *words,
            f"--parallel={'ddp' if kind == 'single' else kind}",
        )
        stop_at_step(*arguments) if kind == "single" else two_ranks(stop_at_step, *arguments)
    assert_close(losses(events(tmp_path)), losses(events(reference)))


def stop_at_step(data, out, step, *words):
    """Train until SIGTERM comes while step `step` (from 0) runs; to the end if None."""
    original = loop.backward
    done = []

    def backward(*arguments):
        done.append(None)
        if step is not None and len(done) + start == step + 1:
            os.kill(os.getpid(), signal.SIGTERM)
        return original(*arguments)

    folder = checkpoint.newest_verified(Path(out), print) if Path(out).exists() else None
    start = checkpoint.folder_step(folder) if folder else 0
    loop.backward = backward
    try:
        run(data, out, *words)
        assert step is None
    except SystemExit as leaving:
        assert leaving.code == 0 and step is not None
    finally:
        loop.backward = original


def ragged_run(data, out, parallel, micro):
    """Three steps whose rows have 0 ... 64 targets, one micro-batch without any; returns (losses, first
    gradients)."""
    words = [
        *TINY_RUN,
        f"--dataset={data}",
        f"--out_dir={out}",
        "--optimizer=adamw",
        "--max_steps=3",
        "--save_interval=1",
        f"--micro_batch_size={micro}",
        f"--parallel={parallel}",
        "--grad_clip=0",
        "--keep_checkpoints=9",
    ]
    cfg = configure(train.TrainConfig, words)[0]
    process = start_run(cfg, {})
    mix = Mix(cfg.dataset, 64, seed=0)
    share = 8 // process.world_size

    def batches_at(step):
        rows = mix.samples(step * 8 + process.rank * share, share)
        batches = []
        for begin in range(0, share, micro):
            batch = text_batch(rows[begin : begin + micro])
            for row in range(micro):
                number = process.rank * share + begin + row  # of the global batch: rows 0 and 1 keep nothing
                batch["targets"][row, [0, 0, 1, 5, 20, 40, 63, 64][number] :] = IGNORE
            batches.append(batch | {"count": int((batch["targets"] != IGNORE).sum())})
        return batches

    model = GPT(tiny_config(), seed=1)
    fit(
        cfg,
        model,
        batches_at,
        lambda m, b: train.next_token_loss(m, b | {"z_loss": 1e-3}, 500),
        lambda m, last: {},
        process,
    )
    process.__exit__()
    first = torch.load(Path(out) / "step_000001" / "trainer" / "state.pt", weights_only=True)["optimizer"]
    return losses(events(out)), {name: entry["exp_avg"] for name, entry in first.items()}


def test_uneven_targets_weigh_the_same_everywhere(data, tmp_path, two_ranks):
    """The gradient is that of one big batch: sums over counts, never means of means."""
    expected, gradients = ragged_run(data, tmp_path / "a", "ddp", 8)
    ways = {
        "micro 4": ragged_run(data, tmp_path / "b", "ddp", 4),
        "micro 1": ragged_run(data, tmp_path / "c", "ddp", 1),
        "ddp": two_ranks(ragged_run, data, tmp_path / "d", "ddp", 2)[0],
        "fsdp": two_ranks(ragged_run, data, tmp_path / "e", "fsdp", 2)[0],
    }
    for name, (found, other) in ways.items():
        assert_close(found, expected)
        for key, gradient in gradients.items():
            assert (other[key] - gradient).norm() <= 1e-6 * gradient.norm(), (name, key)


# ---- The same run, stopped and resumed --------------------------------------------------------------------

STAGED = """
optimizer = "muon"
dropout = 0.1
stages = [dict(steps=8, block_size=32, global_batch_size=16),
          dict(steps=8, rope_theta=50000.0, lr_multipliers={"embed": 0.0, "layers.0": 0.5}),
          dict(steps=8, restart=True, schedule="cosine", learning_rate=1e-3)]
"""


@pytest.fixture(scope="module")
def staged(tmp_path_factory, data):
    """A run of three stages that was never stopped, and its config file."""
    folder = tmp_path_factory.mktemp("staged")
    (folder / "c.py").write_text(STAGED)
    run(data, folder / "out", str(folder / "c.py"), "--save_interval=1", "--keep_checkpoints=99")
    return folder


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_stopped_and_resumed_equals_never_stopped(data, tmp_path, optimizer):
    words = [f"--optimizer={optimizer}", "--max_steps=24", "--dropout=0.1"]
    run(data, tmp_path / "whole", *words)
    for step in (0, 9, 22, None):
        stop_at_step(data, tmp_path / "cut", step, *words)
    assert_same_run(tmp_path / "whole", tmp_path / "cut")


@pytest.mark.parametrize("step", [1, 4, 8, 11, 16, 20, 23])
def test_resumed_inside_stages_and_across_their_borders(data, staged, tmp_path, step):
    """From the checkpoint of each step, as if the run had been killed there."""
    out = tmp_path / "out"
    shutil.copytree(staged / "out", out)
    for folder in checkpoint.step_folders(out):
        if checkpoint.folder_step(folder) > step:
            shutil.rmtree(folder)
    write_json(out / "checkpoints.json", {"last": f"step_{step:06d}"})
    run(data, out, str(staged / "c.py"), "--save_interval=1", "--keep_checkpoints=99")
    assert_same_run(staged / "out", out)


def test_stages_do_what_they_say(staged, data):
    found = [event for event in events(staged / "out") if "loss" in event]
    assert [event["tokens"] for event in found][7::8] == [
        8 * 16 * 32,
        8 * 16 * 32 + 8 * 8 * 64,
        8 * 16 * 32 + 16 * 8 * 64,
    ]
    config = json.loads((staged / "out" / "step_000024" / "config.json").read_text())
    assert config["rope_theta"] == 10000.0 and config["max_position_embeddings"] == 64
    assert json.loads((staged / "out" / "step_000012" / "config.json").read_text())["rope_theta"] == 50000.0
    rates = [event["lr"] for event in found]
    assert max(rates[:16]) == pytest.approx(3e-3) and max(rates[16:]) == pytest.approx(1e-3)
    assert rates[15] < rates[10] and rates[16] > rates[15]  # the schedule began anew

    def saved(step):
        return torch.load(staged / "out" / f"step_{step:06d}" / "trainer" / "state.pt", weights_only=True)[
            "optimizer"
        ]

    table = json.loads((staged / "out" / "lr_multipliers_2.json").read_text())
    assert (
        table["model.embed_tokens.weight"] == 0
        and table["model.layers.0.mlp.up_proj.weight"] == 0.5
        and table["model.norm.weight"] == 1
    )
    assert "model.embed_tokens.weight" in saved(8) and "model.embed_tokens.weight" not in saved(12)
    assert saved(17)["model.embed_tokens.weight"]["step"] == 1
    from safetensors.torch import load_file

    table = [
        load_file(staged / "out" / f"step_{step:06d}" / "model.safetensors")["model.embed_tokens.weight"]
        for step in (8, 12, 16, 20)
    ]
    assert (
        torch.equal(table[0], table[1])
        and torch.equal(table[0], table[2])
        and not torch.equal(table[2], table[3])
    )


def test_stages_on_two_ranks(data, staged, tmp_path, two_ranks):
    """Freezing and unfreezing under a wrapper, evaluations at the borders; Muon's own noise (its last digits
    are amplified) is the tolerance."""
    text = STAGED.replace("dropout = 0.1", "dropout = 0.0")
    (tmp_path / "c.py").write_text(text + "eval_interval = 8\nsave_interval = 8\n")
    words = [word for word in TINY_RUN if not word.startswith(("--eval_i", "--save"))]
    words += [str(tmp_path / "c.py"), f"--dataset={data}"]
    train.main([*words, f"--out_dir={tmp_path / 'one'}"])
    expected = events(tmp_path / "one")
    assert len([event for event in expected if "val_loss" in event]) == 3
    for parallel in ("ddp", "fsdp"):
        out = tmp_path / parallel
        two_ranks(train.main, [*words, f"--out_dir={out}", "--micro_batch_size=2", f"--parallel={parallel}"])
        for key in ("loss", "val_loss"):
            found, wanted = ([e[key] for e in those if key in e] for those in (events(out), expected))
            assert_close(found, wanted, tolerance=1e-5)


@pytest.mark.parametrize("position", ["rope", "learned"])
def test_early_stages_may_have_shorter_rows(data, tmp_path, position):
    """The model has the longest context from the start, and every evaluation that of the last stage."""
    (tmp_path / "c.py").write_text(
        "stages = [dict(steps=2, block_size=16, z_loss=1e-2), dict(steps=2)]\neval_interval = 1"
    )
    words = [word for word in TINY_RUN if not word.startswith("--eval_i")]
    words += [str(tmp_path / "c.py"), f"--dataset={data}", f"--position={position}"]
    train.main([*words, f"--out_dir={tmp_path / 'out'}", "--norm=layernorm", "--mlp=gelu"])
    assert len([event for event in events(tmp_path / "out") if "val_loss" in event]) == 4
    assert GPT.from_pretrained(tmp_path / "out").config.block_size == 64


def test_an_evaluation_made_up_for_has_the_stages_context(data, staged, tmp_path):
    """Stopped between saving and evaluating, in a stage whose rotary base is not the run's."""
    words = [str(staged / "c.py"), "--save_interval=4"]
    (tmp_path / "a").mkdir()
    train.main([*TINY_RUN, f"--dataset={data}", f"--out_dir={tmp_path / 'a'}", *words, "--eval_interval=12"])
    out = tmp_path / "b"
    shutil.copytree(tmp_path / "a", out)
    shutil.rmtree(out / "step_000024")
    for folder in checkpoint.step_folders(out):
        if checkpoint.folder_step(folder) > 12:
            shutil.rmtree(folder)
    whole = events(out)
    kept = [event for event in whole if event["step"] <= 12 and "val_loss" not in event]
    (out / "metrics.jsonl").write_text("".join(json.dumps(event) + "\n" for event in kept))
    write_json(out / "checkpoints.json", {"last": "step_000012"})
    train.main([*TINY_RUN, f"--dataset={data}", f"--out_dir={out}", *words, "--eval_interval=12"])
    found, expected = ([e for e in each if "val_loss" in e] for each in (events(out), whole))
    assert found == expected and [event["step"] for event in found] == [12, 24]


def test_the_best_checkpoint_is_that_of_the_lowest_loss_on_the_same_text(data, tmp_path):
    words = ["--max_steps=6", "--eval_tokens=256", "--save_interval=1", "--eval_interval=1"]
    found = run(data, tmp_path, *words)
    best = min((event["val_loss"], event["step"]) for event in found if "val_loss" in event)[1]
    assert json.loads((tmp_path / "checkpoints.json").read_text())["best"] == f"step_{best:06d}"


def test_plan_by_hand():
    cfg = RunConfig(
        stages=[
            dict(steps=3),
            dict(epochs=0.5, learning_rate=1.0),
            dict(steps=2, restart=True),
            dict(steps=1),
        ]
    )
    stages = plan(with_steps(cfg, lambda stage: 10))
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
        plan(RunConfig(stages=stages))


# ---- The folder of a run ----------------------------------------------------------------------------------


def test_a_checkpoint_is_a_hugging_face_folder(trained):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder = trained / "step_000060"
    assert sorted(str(p.relative_to(folder)) for p in folder.rglob("*") if p.is_file()) == [
        "config.json",
        "generation_config.json",
        "manifest.json",
        "model.safetensors",
        "tokenizer.json",
        "tokenizer_config.json",
        "trainer/state.pt",
    ]
    theirs, ours = AutoModelForCausalLM.from_pretrained(folder).eval(), GPT.from_pretrained(trained).eval()
    ids = torch.randint(500, (2, 64), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        assert (theirs(ids).logits - ours(ids)).abs().max() <= 1e-5
    assert AutoTokenizer.from_pretrained(folder).eos_token_id == theirs.config.eos_token_id == 499
    saved = torch.load(folder / "trainer" / "state.pt", weights_only=True)
    assert saved["progress"]["step"] == 60 and saved["progress"]["tokens"] == 60 * 8 * 64
    assert checkpoint.fault(folder) is None
    pointers = json.loads((trained / "checkpoints.json").read_text())
    assert pointers["last"] == pointers["best"] == "step_000060"


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
    assert found[-1].keys() == {"step", "val_loss", "val_perplexity", "val_bits_per_byte"}
    assert [event["step"] for event in found if "loss" in event] == list(range(1, 61))
    assert found[-1]["val_perplexity"] == pytest.approx(np.exp(found[-1]["val_loss"]))


def test_a_finished_run_says_so_and_grows(data, tmp_path, capsys):
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


def test_a_run_without_a_checkpoint_may_still_change(data, tmp_path):
    with pytest.raises(UserError, match="decides over no parameter"):
        run(data, tmp_path, "--max_steps=2", "--lr_multipliers={'nothing': 0.1}")
    assert len(losses(run(data, tmp_path, "--max_steps=2"))) == 2


def test_two_runs_in_one_folder(data, tmp_path):
    cfg = configure(train.TrainConfig, [f"--out_dir={tmp_path}"])[0]
    with start_run(cfg, {}):
        with pytest.raises(UserError, match="another process is training here"):
            start_run(cfg, {})
    start_run(cfg, {}).__exit__()


@pytest.mark.parametrize("received, code", [(signal.SIGINT, 130), (signal.SIGTERM, 0)])
def test_signals_save_and_leave(data, tmp_path, monkeypatch, received, code):
    original = loop.backward

    def backward(*arguments):
        os.kill(os.getpid(), received)
        return original(*arguments)

    monkeypatch.setattr(loop, "backward", backward)
    with pytest.raises(SystemExit) as leaving:
        run(data, tmp_path, "--max_steps=9")
    assert leaving.value.code == code
    assert [folder.name for folder in checkpoint.step_folders(tmp_path)] == ["step_000001"]


def test_a_checkpoint_that_was_just_written_is_not_written_again(data, tmp_path, monkeypatch):
    """The signal comes while step 3 is saved."""
    original, written = checkpoint.write_checkpoint, []

    def write(out_dir, step, work):
        os.kill(os.getpid(), signal.SIGTERM)
        written.append(step)
        return original(out_dir, step, work)

    monkeypatch.setattr(checkpoint, "write_checkpoint", write)
    with pytest.raises(SystemExit):
        run(data, tmp_path, "--max_steps=9", "--save_interval=3")
    assert written == [3]


def test_float16_loses_a_step_that_overflows_and_goes_on(data, tmp_path, monkeypatch):
    """The scaler doubles its scale every second step, so that some steps overflow; losses stay finite."""
    scaler = torch.amp.GradScaler
    monkeypatch.setattr(
        torch.amp, "GradScaler", lambda *a, **k: scaler(*a, **k, init_scale=2.0**20, growth_interval=2)
    )
    found = losses(run(data, tmp_path, "--dtype=float16", "--max_steps=30"))
    assert len(found) == 30 and found[-1] < found[0] - 0.5
    assert state(tmp_path)["scaler"]["scale"] < 2.0**30


@pytest.mark.parametrize("scale", [1.0, 1024.0])
def test_one_bad_gradient_stops_every_optimizer(scale):
    model = GPT(tiny_config())
    optimizers = loop.make_optimizers(model, RunConfig(optimizer="muon"))
    loop.set_learning_rate(optimizers, 1e-2)
    scaler = torch.amp.GradScaler("cpu", init_scale=scale, enabled=scale > 1)
    for bad in (False, True):
        before = [parameter.detach().clone() for parameter in model.parameters()]
        scaler.scale(model(torch.arange(8)[None]).square().mean()).backward()
        if bad:
            model.model["embed_tokens"].weight.grad[0, 0] = np.inf
        loop.update(model, optimizers, scaler, 1.0)
        same = [torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True)]
        assert all(same) if bad else not any(same)


def test_a_second_interrupt_does_not_wait_for_the_step(data, tmp_path, monkeypatch):
    def backward(*arguments):
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGINT)
        raise AssertionError("the step went on")

    with monkeypatch.context() as patch:
        patch.setattr(loop, "backward", backward)
        with pytest.raises(KeyboardInterrupt):
            run(data, tmp_path, "--max_steps=2")
    assert checkpoint.step_folders(tmp_path) == []
    assert len(losses(run(data, tmp_path, "--max_steps=2"))) == 2  # the lock and the signals are free again


def test_the_last_line_of_a_killed_log_may_be_half(data, tmp_path):
    stop_at_step(data, tmp_path, 3, "--max_steps=9")
    with open(tmp_path / "metrics.jsonl", "a") as file:
        file.write('{"step": 5, "loss": 1.0}\n{"step": 6, "lo')
    found = run(data, tmp_path, "--max_steps=9")
    assert [event["step"] for event in found if "loss" in event] == list(range(1, 10))


def test_a_run_stopped_before_its_evaluation_makes_it_up(data, tmp_path, monkeypatch):
    def fails(self, model, last):
        raise RuntimeError("out of memory, say")

    with monkeypatch.context() as patch:
        patch.setattr(train.Evaluation, "__call__", fails)
        with pytest.raises(RuntimeError):
            run(data, tmp_path, "--max_steps=3")
    assert [folder.name for folder in checkpoint.step_folders(tmp_path)] == [
        "step_000003"
    ]  # saved before it was evaluated
    assert run(data, tmp_path, "--max_steps=3")[-1].keys() >= {"val_loss"}
    assert checkpoint.read_pointers(tmp_path)["best"] == "step_000003"


def test_old_checkpoints_go_but_not_the_best(data, tmp_path, monkeypatch):
    values = iter([3.0, 1.0, 2.0, 2.0, 2.0])
    monkeypatch.setattr(train.Evaluation, "__call__", lambda self, model, last: {"val_loss": next(values)})
    monkeypatch.setattr(train, "print_summary", lambda *arguments: None)
    run(data, tmp_path, "--max_steps=5", "--save_interval=1", "--eval_interval=1", "--keep_checkpoints=2")
    assert [folder.name for folder in checkpoint.step_folders(tmp_path)] == [
        "step_000002",
        "step_000004",
        "step_000005",
    ]
    assert checkpoint.read_pointers(tmp_path) == {
        "last": "step_000005",
        "best": "step_000002",
        "best_val_loss": 1.0,
    }
    from parts.hf import find_folder

    assert find_folder(tmp_path) == tmp_path / "step_000002"


@pytest.mark.parametrize("name", ["model.safetensors", "trainer/state.pt", "config.json", "manifest.json"])
def test_a_damaged_checkpoint_is_passed_over(data, tmp_path, capsys, name):
    words = ["--max_steps=6", "--save_interval=2", "--optimizer=adamw"]
    whole = losses(run(data, tmp_path, *words))
    path = tmp_path / "step_000006" / name
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 4
    path.write_bytes(content)
    capsys.readouterr()
    assert losses(run(data, tmp_path, *words)) == whole
    printed = capsys.readouterr().out
    assert "step_000006: passed over" in printed and "resumed   from" in printed and "step_000004" in printed


def test_nothing_half_stays_when_a_write_fails(tmp_path):
    def write(folder):
        (folder / "a").write_text("a")
        raise OSError(28, "No space left on device", "a")

    checkpoint.write_checkpoint(tmp_path, 1, lambda folder: (folder / "a").write_text("a"))
    with pytest.raises(OSError, match="No space left"):
        checkpoint.write_checkpoint(tmp_path, 2, write)
    assert [path.name for path in tmp_path.iterdir()] == ["step_000001"]


# ---- What a step does -------------------------------------------------------------------------------------


def test_a_loss_that_is_not_finite_stops_and_spares_the_checkpoint(data, tmp_path, monkeypatch):
    original = loop.backward
    calls = []

    def backward(forward, batches, loss_fn, *rest):
        calls.append(None)
        broken = (
            (lambda m, b: (loss_fn(m, b)[0] * float("nan"), loss_fn(m, b)[1])) if len(calls) == 6 else loss_fn
        )
        return original(forward, batches, broken, *rest)

    monkeypatch.setattr(loop, "backward", backward)
    with pytest.raises(UserError, match="no longer finite; the last checkpoint is intact"):
        run(data, tmp_path, "--max_steps=20", "--save_interval=4", "--log_interval=10")
    assert [folder.name for folder in checkpoint.step_folders(tmp_path)] == ["step_000004"]
    assert len(calls) == 8  # seen where it is read: before the next save


@pytest.mark.parametrize(
    "words",
    [
        ["--dtype=bfloat16"],
        ["--dtype=float16"],
        ["--activation_checkpointing=True"],
        ["--optimizer=adamw", "--z_loss=1e-4"],
        ["--position=learned", "--norm=layernorm", "--mlp=gelu", "--bias=all", "--n_kv_head=4"],
    ],
)
def test_every_kind_of_run_learns(data, tmp_path, words):
    found = losses(run(data, tmp_path, "--max_steps=30", *words))
    assert found[0] > 6.1 and found[-1] < 5.6 and all(map(np.isfinite, found))


def test_activation_checkpointing_changes_no_loss(data, tmp_path):
    words = ["--max_steps=4", "--dropout=0.1"]
    assert losses(run(data, tmp_path / "a", *words)) == losses(
        run(data, tmp_path / "b", *words, "--activation_checkpointing=True")
    )


def test_mixed_data_is_evaluated_by_weight(data, tmp_path):
    copy = tmp_path / "other"
    shutil.copytree(data, copy)
    last = run(f"{data}:3,{copy}:1", tmp_path / "out", "--max_steps=2")[-1]
    assert last["val_loss"] == pytest.approx(last["val_loss/tiny"]) == last["val_loss/other"]


def test_a_run_starts_from_another_model(data, trained, tmp_path):
    shape = ("--n_", "--inter", "--block")
    words = [word for word in TINY_RUN if not word.startswith(shape)] + [
        f"--dataset={data}",
        f"--out_dir={tmp_path}",
        f"--init_from={trained}",
        "--max_steps=2",
    ]
    train.main(words)
    first = losses(events(tmp_path))[0]
    assert first < losses(events(trained))[0] - 1  # it had learned something
    with pytest.raises(UserError, match="n_layer comes with init_from"):
        train.main([*words, "--n_layer=2"])
    words[words.index(f"--out_dir={tmp_path}")] = f"--out_dir={tmp_path / 'short'}"
    train.main([*words, "--block_size=16"])  # shorter rows, the same model
    assert events(tmp_path / "short")[0]["tokens"] == 8 * 16
    assert GPT.from_pretrained(tmp_path / "short").config.block_size == 64


@pytest.mark.parametrize(
    "words, message",
    [
        (["--vocab_size=100"], "has 500 ids"),
        (["--global_batch_size=6"], "multiple of micro_batch_size x ranks"),
        (["--dataset=nowhere"], "no data set here"),
        (["--n_head=3"], "n_head|n_embd"),
        (["--learning_rate=0"], "positive"),
        (["--device=cuda:7"], "not on this machine"),
        (["--init_from=nowhere/at/all"], "no model here"),
        (["--parallel=zero"], "none|ddp|fsdp"),
        (["--z_loss=-1"], "negative"),
        (["--block_size=10000000"], "make no row"),
    ],
)
def test_wrong_words_are_one_line(data, tmp_path, words, message):
    with pytest.raises(UserError, match=message):
        run(data, tmp_path, "--max_steps=1", *words)


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


def test_wandb_mirrors_the_log(data, tmp_path, monkeypatch):
    logged = []
    fake = types.ModuleType("wandb")
    fake.Error = type("Error", (Exception,), {})
    fake.init = lambda **options: types.SimpleNamespace(
        log=lambda event, step: logged.append((step, event)), **options
    )
    monkeypatch.setitem(sys.modules, "wandb", fake)
    found = run(data, tmp_path, "--max_steps=2", "--wandb=True")
    assert [{"step": step, **event} for step, event in logged] == found

    def without_key(**options):
        raise fake.Error("api_key not configured\nmore")

    fake.init = without_key
    with pytest.raises(UserError, match="api_key not configured .WANDB_MODE=offline"):
        run(data, tmp_path / "b", "--max_steps=2", "--wandb=True")
