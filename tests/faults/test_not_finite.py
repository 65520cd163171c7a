"""Fault 11: a loss or a gradient is not finite."""

import json
import os
import signal

import pytest
import torch

import loop
from configurator import UserError
from dataset.dataloader import Mix
from formats import checkpoint
from tests.runs import assert_same_run, events, losses, run

WORDS = ["--max_steps=16", "--save_interval=4", "--log_interval=4", "--schedule=constant", "--warmup_steps=0"]


def train_with_a_bad_step(data, out, *words, bad=6, rank=0, times=1, stop_at=None):
    """Train with a loss that is nan in step `bad` (from 0) of one rank, the first `times` it is computed.

    SIGTERM arrives in step `stop_at`. Returns the message of the run's UserError, or its losses.
    """
    original, left = loop.backward, [times]

    def backward(state, batches, loss_fn, scale):
        step = state.progress.step
        if step == stop_at:
            os.kill(os.getpid(), signal.SIGTERM)
        is_bad = step == bad and left[0] > 0 and state.run.rank == rank
        left[0] -= is_bad

        def broken(model, batch):
            loss, metrics = loss_fn(model, batch)
            return loss * float("nan"), metrics

        return original(state, batches, broken if is_bad else loss_fn, scale)

    loop.backward = backward
    try:
        run(data, out, *WORDS, *words)
        return losses(events(out))
    except UserError as error:
        return str(error)
    finally:
        loop.backward = original


def rates(out):
    return [event["lr"] for event in events(out) if "lr" in event]


def test_it_stops_the_run_and_keeps_the_checkpoint(data, tmp_path):
    message = train_with_a_bad_step(data, tmp_path)
    assert "not finite in step 6" in message and "--max_rollbacks=3" in message
    assert [folder.name for folder in checkpoint.step_folders(tmp_path)] == ["step_000004"]
    assert [event["step"] for event in events(tmp_path)] == [4]  # noticed at the log line of step 8
    dump = json.loads((tmp_path / "not_finite_000006.json").read_text())
    rows = torch.tensor([row for batch in dump["batches_of_ranks"][0] for row in batch["input_ids"]])
    assert dump["step"] == 6 and rows.shape == (8, 64)
    assert str(tmp_path / "not_finite_000006.json") in message
    expected = Mix(str(data), 64, seed=1337).samples(6 * 8, 8)[:, :-1]  # the samples of step 6
    assert torch.equal(rows, torch.from_numpy(expected))


def test_a_rollback_continues_at_half_the_rate(data, tmp_path):
    found = train_with_a_bad_step(data, tmp_path, "--max_rollbacks=1")
    assert len(found) == 4 and found[-1] < found[0]
    assert rates(tmp_path) == pytest.approx([3e-3, 1.5e-3, 1.5e-3, 1.5e-3])
    logged = [event for event in events(tmp_path) if "rollbacks" in event]
    assert logged == [{"step": 4, "rollbacks": 1, "not_finite_step": 6}]
    folder = checkpoint.step_folders(tmp_path)[-1]
    saved = torch.load(folder / "trainer" / "state.pt", weights_only=True)["progress"]
    assert saved["rollbacks"] == 1 and saved["step"] == 16 and saved["tokens"] == 16 * 8 * 64


def test_rollbacks_are_bounded_and_each_halves_the_rate(data, tmp_path):
    message = train_with_a_bad_step(data, tmp_path, "--max_rollbacks=2", times=3)
    assert "not finite in step 6" in message
    found = train_with_a_bad_step(data, tmp_path, "--max_rollbacks=2", times=2)  # may roll back again
    assert len(found) == 4 and rates(tmp_path) == pytest.approx([3e-3, 0.75e-3, 0.75e-3, 0.75e-3])


def test_a_run_stopped_after_a_rollback_resumes_bit_identically(data, tmp_path):
    train_with_a_bad_step(data, tmp_path / "whole", "--max_rollbacks=1", "--log_interval=1")
    with pytest.raises(SystemExit):
        train_with_a_bad_step(data, tmp_path / "cut", "--max_rollbacks=1", "--log_interval=1", stop_at=9)
    train_with_a_bad_step(data, tmp_path / "cut", "--max_rollbacks=1", "--log_interval=1", times=0)
    assert rates(tmp_path / "cut") == rates(tmp_path / "whole")
    assert_same_run(tmp_path / "cut", tmp_path / "whole")


def test_without_a_checkpoint_there_is_nothing_to_return_to(data, tmp_path):
    assert "not finite in step 2" in train_with_a_bad_step(data, tmp_path, "--max_rollbacks=3", bad=2)
    assert checkpoint.step_folders(tmp_path) == []


@pytest.mark.parametrize("parallel", ["ddp", "fsdp"])
def test_all_ranks_stop_and_roll_back_together(data, tmp_path, two_ranks, parallel):
    """The loss is nan on the second rank only."""
    words = ["--micro_batch_size=2", f"--parallel={parallel}"]
    messages = two_ranks(on_the_second_rank, data, tmp_path / "stop", *words)
    assert messages[0] == messages[1] and "not finite in step 6" in messages[0]
    dump = json.loads((tmp_path / "stop" / "not_finite_000006.json").read_text())
    assert [[len(batch["input_ids"]) for batch in rank] for rank in dump["batches_of_ranks"]] == [[2, 2]] * 2
    found = two_ranks(on_the_second_rank, data, tmp_path / "back", *words, "--max_rollbacks=1")
    expected = train_with_a_bad_step(data, tmp_path / "one", "--max_rollbacks=1")
    assert found[0] == found[1] == pytest.approx(expected, rel=1e-4)
    assert rates(tmp_path / "back") == rates(tmp_path / "one")


def on_the_second_rank(*arguments):
    return train_with_a_bad_step(*arguments, rank=1)


def test_without_a_checkpoint_none_is_promised(data, tmp_path):
    message = train_with_a_bad_step(data, tmp_path, "--save_interval=0", "--max_rollbacks=3")
    assert "there is no checkpoint to return to" in message and "intact" not in message


def test_the_lower_rate_and_clip_last_rollback_steps(data, tmp_path, monkeypatch):
    """Bad step 6, rollback_steps=3: steps 4 to 9 have half the rate and the other clip."""
    clips, original = {}, loop.update

    def update(model, optimizers, scaler, clip):
        step = int(optimizers[0].param_groups[0]["lr"] < 3e-3)
        clips.setdefault(step, set()).add(clip)
        return original(model, optimizers, scaler, clip)

    monkeypatch.setattr(loop, "update", update)
    words = ["--max_rollbacks=1", "--rollback_grad_clip=0.5", "--rollback_steps=3", "--log_interval=1"]
    train_with_a_bad_step(data, tmp_path, *words)
    assert rates(tmp_path) == pytest.approx([3e-3] * 4 + [1.5e-3] * 6 + [3e-3] * 6)
    assert clips == {0: {1.0}, 1: {0.5}}


def test_rollback_steps_survive_a_stop(data, tmp_path):
    words = ["--max_rollbacks=1", "--rollback_steps=4", "--rollback_grad_clip=0.1", "--log_interval=1"]
    train_with_a_bad_step(data, tmp_path / "whole", *words)
    with pytest.raises(SystemExit):
        train_with_a_bad_step(data, tmp_path / "cut", *words, stop_at=8)
    train_with_a_bad_step(data, tmp_path / "cut", *words, times=0)
    assert rates(tmp_path / "cut") == rates(tmp_path / "whole")
    assert_same_run(tmp_path / "cut", tmp_path / "whole")
