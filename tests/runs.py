"""What tests of whole runs share: train, stop, and compare."""

import json
import os
import signal
from pathlib import Path

import pytest
import torch

import loop
import train
from formats import checkpoint
from tests.conftest import TINY_RUN

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


def kill_in_step(step, main, words):
    """Run a stage in a fork of this process, which SIGKILL ends in the `step`-th step that it computes."""
    child = os.fork()
    if child == 0:
        original, done = loop.backward, []

        def backward(*arguments):
            done.append(None)
            if len(done) == step:
                os.kill(os.getpid(), signal.SIGKILL)
            return original(*arguments)

        loop.backward = backward
        main(words)
        os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL


def stopped_in_step(step, monkeypatch, run):
    """run(), which SIGTERM reaches while it computes its `step`-th step: it must save that step and leave."""
    original, done = loop.backward, []

    def backward(*arguments):
        done.append(None)
        if len(done) == step:
            os.kill(os.getpid(), signal.SIGTERM)
        return original(*arguments)

    with monkeypatch.context() as patched, pytest.raises(SystemExit):
        patched.setattr(loop, "backward", backward)
        run()


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
