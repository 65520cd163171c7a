"""Helpers for tests of whole runs: train, stop or kill a run, and compare two runs."""

import json
import os
import signal
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import loop
import train
from formats import checkpoint
from tests.conftest import TINY_RUN

# Lines of a small metrics.jsonl.
EVENTS = [
    {"step": 10, "loss": 4.0, "lr": 0.1, "tokens_per_second": 100.0},
    {"step": 20, "loss": 3.0, "lr": 0.05, "tokens_per_second": 120.0},
    {"step": 20, "val_loss": 3.5},
]
ADAMW = ["--optimizer=adamw", "--max_steps=20"]


def run(data, out, *argv):
    """Train, and return the events of metrics.jsonl."""
    train.main([*TINY_RUN, f"--dataset={data}", f"--out_dir={out}", *argv])
    return events(out)


def events(out):
    return [json.loads(line) for line in (Path(out) / "metrics.jsonl").read_text().splitlines()]


def losses(log):
    """The training losses of a list of events."""
    return [event["loss"] for event in log if "loss" in event]


def norms(log):
    """The gradient norms of a list of events, one per step."""
    return [event["grad_norm"] for event in log if "grad_norm" in event]


def weights(out):
    """Every parameter of the last checkpoint, by its name in the file."""
    return load_file(checkpoint.step_folders(Path(out))[-1] / "model.safetensors")


def state(out):
    """What trainer/state.pt of the last checkpoint holds."""
    return torch.load(checkpoint.step_folders(Path(out))[-1] / "trainer" / "state.pt", weights_only=True)


def assert_same_run(one, two):
    """Losses, weights and optimizer state are bit-identical."""
    assert losses(events(one)) == losses(events(two))
    for first, second in (
        (weights(one), weights(two)),
        (flat(state(one)["optimizer"]), flat(state(two)["optimizer"])),
    ):
        assert first.keys() == second.keys()
        assert all(torch.equal(first[name], second[name]) for name in first)


def flat(optimizer_state):
    """{parameter: {key: value}} as {"parameter.key": tensor}."""
    return {
        f"{name}.{key}": torch.as_tensor(value)
        for name, entry in optimizer_state.items()
        for key, value in entry.items()
    }


def assert_close(results, expected, tolerance=1e-6):
    """Lists of the same length, with relative differences of at most `tolerance`."""
    assert len(results) == len(expected) > 0
    assert max(abs(a / b - 1) for a, b in zip(results, expected, strict=True)) <= tolerance


# ---- Stopping a run ---------------------------------------------------------------------------------------


def signal_in_step(received, step):
    """A loop.backward that sends `received` to this process in the `step`-th step that it computes."""
    original, calls = loop.backward, []

    def backward(*args):
        calls.append(None)
        if len(calls) == step:
            os.kill(os.getpid(), received)
        return original(*args)

    return backward


def kill_in_step(step, main, argv):
    """Run a stage in a fork of this process. SIGKILL ends the fork in the `step`-th step that it computes."""
    child = os.fork()
    if child == 0:
        loop.backward = signal_in_step(signal.SIGKILL, step)
        main(argv)
        os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL


def stopped_in_step(step, monkeypatch, run):
    """Call run(). SIGTERM arrives while it computes its `step`-th step: it must save that step and exit."""
    with monkeypatch.context() as patched, pytest.raises(SystemExit):
        patched.setattr(loop, "backward", signal_in_step(signal.SIGTERM, step))
        run()


def stop_at_step(data, out, step, *argv):
    """Train until SIGTERM arrives in step `step` (from 0, over the whole run); to the end if step is None."""
    original = loop.backward
    folder = checkpoint.newest_verified(Path(out), print) if Path(out).exists() else None
    start = checkpoint.folder_step(folder) if folder else 0
    if step is not None:
        loop.backward = signal_in_step(signal.SIGTERM, step + 1 - start)
    try:
        run(data, out, *argv)
        assert step is None
    except SystemExit as leaving:
        assert leaving.code == 0 and step is not None
    finally:
        loop.backward = original
