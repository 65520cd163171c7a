"""loop.py through train.py: the same numbers whether a run is split over ranks, stopped, or cut into stages.
"""

import json
import os
import shutil
import signal
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch

import loop
import train
from configurator import UserError, configure
from dataset.dataloader import IGNORE, Mix, text_batch
from formats import checkpoint
from formats.files import write_json
from loop import RunConfig, fit, start_run
from model import GPT
from modeling.devices import gather_full
from tests.conftest import TINY_RUN, tiny_config
from tests.runs import (
    ADAMW,
    assert_close,
    assert_same_run,
    events,
    losses,
    norms,
    run,
    state,
    stop_at_step,
    weights,
)
from training import optim

# ---- The same run, split differently ----------------------------------------------------------------------


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
    assert_close(norms(events(tmp_path)), norms(events(reference)), 1e-5)
    last, expected = events(tmp_path)[-1], events(reference)[-1]
    assert last["val_loss"] == pytest.approx(expected["val_loss"], rel=1e-5)
    assert last["val_bits_per_byte"] == pytest.approx(expected["val_bits_per_byte"], rel=1e-5)
    theirs = weights(reference)
    assert weights(tmp_path).keys() == theirs.keys()  # no prefix of a wrapper
    assert all((value - theirs[name]).abs().max() < 1e-4 for name, value in weights(tmp_path).items())


def test_options_of_fsdp(data, reference, tmp_path, two_ranks):
    """Weights that stay gathered change nothing; gradients that are summed in bfloat16 change little."""
    words = [*ADAMW, "--document_mask=True", "--micro_batch_size=2", "--parallel=fsdp"]
    for option, tolerance in (("--reshard_after_forward=False", 1e-6), ("--reduce_dtype=bfloat16", 1e-2)):
        out = tmp_path / option[2:9]
        two_ranks(run, data, out, *words, option)
        assert_close(losses(events(out)), losses(events(reference)), tolerance)
    assert losses(events(out)) != losses(events(reference))


@pytest.mark.parametrize("first, second", [("single", "fsdp"), ("fsdp", "single"), ("ddp", "fsdp")])
def test_a_run_resumes_with_another_number_of_ranks(data, reference, tmp_path, two_ranks, first, second):
    """Ten steps one way, ten the other way: no sample is lost or read twice, and nothing is reset."""
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


def ragged_run(data, out, parallel, micro):
    """Three steps whose rows have 0 to 64 targets, one micro-batch with none. Returns (losses, gradients of
    step 1)."""
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
    process = start_run(cfg)
    mix = Mix(cfg.dataset, 64, seed=0)
    share = 8 // process.world_size

    def batches_at(step):
        rows = mix.samples(step * 8 + process.rank * share, share)
        batches = []
        for begin in range(0, share, micro):
            batch = text_batch(rows[begin : begin + micro])
            for row in range(micro):
                number = process.rank * share + begin + row  # in the global batch; 0 and 1 keep none
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
    """The gradient equals that of one big batch: sum over count, never a mean of means."""
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


def warnings_of_a_run(data, out):
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        run(data, out, "--max_steps=1", "--micro_batch_size=2")
    return [str(warning.message) for warning in caught if issubclass(warning.category, FutureWarning)]


def test_two_ranks_warn_of_nothing(data, tmp_path, two_ranks):
    assert two_ranks(warnings_of_a_run, data, tmp_path) == [[], []]


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


def test_stages_change_what_they_list(staged, data):
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
    assert rates[15] < rates[10] and rates[16] > rates[15]  # a new schedule began

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
    """Freezing and unfreezing under a wrapper, and evaluations at the ends of stages. The tolerance is Muon's
    own noise, which amplifies the last digits."""
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
    """The model has the longest context from the start, and every evaluation reads the last stage's rows."""
    (tmp_path / "c.py").write_text(
        "stages = [dict(steps=2, block_size=16, z_loss=1e-2), dict(steps=2)]\neval_interval = 1"
    )
    words = [word for word in TINY_RUN if not word.startswith("--eval_i")]
    words += [str(tmp_path / "c.py"), f"--dataset={data}", f"--position={position}"]
    train.main([*words, f"--out_dir={tmp_path / 'out'}", "--norm=layernorm", "--mlp=gelu"])
    assert len([event for event in events(tmp_path / "out") if "val_loss" in event]) == 4
    assert GPT.from_pretrained(tmp_path / "out").config.block_size == 64


def test_a_late_evaluation_has_the_stages_context(data, staged, tmp_path):
    """Stopped between saving and evaluating, in a stage whose rotary base is not the run's."""
    words = [str(staged / "c.py"), "--save_interval=4", "--keep_checkpoints=9"]
    (tmp_path / "a").mkdir()
    train.main([*TINY_RUN, f"--dataset={data}", f"--out_dir={tmp_path / 'a'}", *words, "--eval_interval=12"])
    out = tmp_path / "b"
    shutil.copytree(tmp_path / "a", out)
    shutil.rmtree(out / "step_000024")
    for folder in checkpoint.step_folders(out):
        if checkpoint.folder_step(folder) > 12:
            shutil.rmtree(folder)
    whole = events(out)
    kept = [event for event in whole if event["step"] < 12 or event["step"] == 12 and "val_loss" not in event]
    (out / "metrics.jsonl").write_text("".join(json.dumps(event) + "\n" for event in kept))
    write_json(out / "checkpoints.json", {"last": "step_000012"})
    train.main([*TINY_RUN, f"--dataset={data}", f"--out_dir={out}", *words, "--eval_interval=12"])
    times = {"seconds", "eval_seconds", "memory_gb"}
    found, expected = ([{key: e[key] for key in e.keys() - times} for e in each if "val_loss" in e]
                       for each in (events(out), whole))
    assert found == expected and [event["step"] for event in found] == [8, 12, 16, 24]


# ---- Signals and evaluations ------------------------------------------------------------------------------


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
    """The signal arrives while step 3 is saved."""
    original, written = checkpoint.write_checkpoint, []

    def write(out_dir, step, work):
        os.kill(os.getpid(), signal.SIGTERM)
        written.append(step)
        return original(out_dir, step, work)

    monkeypatch.setattr(checkpoint, "write_checkpoint", write)
    with pytest.raises(SystemExit):
        run(data, tmp_path, "--max_steps=9", "--save_interval=3")
    assert written == [3]


def test_float16_skips_a_step_that_overflows_and_continues(data, tmp_path, monkeypatch):
    """The scaler doubles its scale every second step, so some steps overflow; losses stay finite."""
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
    optimizers = optim.make_optimizers(model, RunConfig(optimizer="muon"))
    optim.set_learning_rate(optimizers, 1e-2)
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


def test_a_run_stopped_before_its_evaluation_evaluates_on_resume(data, tmp_path, monkeypatch):
    def fails(self, model, last):
        raise RuntimeError("out of memory, say")

    with monkeypatch.context() as patch:
        patch.setattr(train.TextEvaluation, "__call__", fails)
        with pytest.raises(RuntimeError):
            run(data, tmp_path, "--max_steps=3")
    assert [folder.name for folder in checkpoint.step_folders(tmp_path)] == [
        "step_000003"
    ]  # saved before it was evaluated
    assert run(data, tmp_path, "--max_steps=3")[-1].keys() >= {"val_loss"}
    assert checkpoint.read_pointers(tmp_path)["best"] == "step_000003"


# ---- What a step does -------------------------------------------------------------------------------------


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
    assert first < losses(events(trained))[0] - 1  # the model was trained already
    with pytest.raises(UserError, match="n_layer comes with init_from"):
        train.main([*words, "--n_layer=2"])
    words[words.index(f"--out_dir={tmp_path}")] = f"--out_dir={tmp_path / 'short'}"
    train.main([*words, "--block_size=16"])  # shorter rows, the same model
    assert events(tmp_path / "short")[0]["tokens"] == 8 * 16
    assert GPT.from_pretrained(tmp_path / "short").config.block_size == 64


def first_gradients(data, out, words):
    """(the full gradients of the first step before clipping, by name; the losses of the run)."""
    gradients, original = {}, loop.update

    def update(model, *others):
        if not gradients:
            gradients.update({name: gather_full(p.grad).clone() for name, p in model.named_parameters()})
        return original(model, *others)

    loop.update = update
    try:
        run(data, out, *words)
    finally:
        loop.update = original
    return gradients, losses(events(out))


def test_muon_on_two_ranks(data, tmp_path, two_ranks):
    """Gradients of step 1, losses and norms over 20 steps: within 1e-6 of a single process."""
    words = ["--optimizer=muon", "--max_steps=20", "--micro_batch_size=2"]
    gradients, expected = first_gradients(data, tmp_path / "one", words)
    for parallel in ("ddp", "fsdp"):
        out = tmp_path / parallel
        found, _ = two_ranks(first_gradients, data, out, [*words, f"--parallel={parallel}"])[0]
        assert found.keys() == gradients.keys()
        for name, gradient in gradients.items():
            assert (found[name] - gradient).norm() <= 1e-6 * gradient.norm(), name
        assert_close(losses(events(out)), expected)
        assert_close(norms(events(out)), norms(events(tmp_path / "one")))
