"""On-policy rows: the length of the prompts, what the student writes, and which tokens are targets."""

import shutil

import numpy as np
import pytest
import torch

import distill
import sft
from configurator import UserError
from dataset.chat_rows import UnpackedChatRows
from dataset.dataloader import IGNORE
from dataset.shards import DataFolder
from distillation.on_policy import prompt_lengths, rollout_batch
from tests.conftest import busy_model, tiny_config
from tests.runs import events
from tests.test_distill import TINY


def test_the_prompt_of_text_is_a_quarter_of_the_row():
    assert prompt_lengths(np.zeros((2, 65))) == ([16, 16], [49, 49])
    assert prompt_lengths(np.zeros((1, 3))) == ([1], [2])


def test_the_prompt_of_a_chat_is_everything_before_its_last_answer():
    """By hand. First row: targets at positions 2, 3 and 5, 6, 7 of eight. Second row: at 0 and 1 only."""
    rows = np.zeros((2, 3, 8), dtype=np.int64)
    rows[:, 1] = IGNORE
    rows[0, 1, [2, 3, 5, 6, 7]] = 9
    rows[1, 1, [0, 1]] = 9
    assert prompt_lengths(rows) == ([6, 1], [3, 2])  # the target at position 5 is token 6


def test_the_prompt_of_a_real_chat_ends_where_the_assistant_begins(chats):
    data = DataFolder(chats)
    rows = UnpackedChatRows(data, "train", 64)
    read = rows.read(np.arange(len(rows)))
    for row, prompt, length in zip(read, *prompt_lengths(read), strict=True):
        tokens = [*row[0], 0]
        assert row[1][prompt - 2] == IGNORE or prompt == 1
        answer = row[1][prompt - 1:prompt - 1 + length]
        assert (answer != IGNORE).all() and (row[1][prompt - 1 + length:] == IGNORE).all()
        assert tokens[prompt:prompt + length - 1] == answer[:-1].tolist()


def batch_for(model, lengths, numbers):
    ids = torch.randint(500, (len(lengths), 20), generator=torch.Generator().manual_seed(0))
    prompts = [5, 9, 7][:len(lengths)]
    return {"input_ids": ids, "prompts": prompts, "lengths": lengths, "numbers": numbers, "count": 1}


def test_only_the_students_tokens_are_targets():
    model = busy_model(tiny_config())
    batch = batch_for(model, [6, 11, 3], [0, 1, 2])
    new = rollout_batch(model, batch, 1, 500, set())
    assert new["input_ids"].shape == (3, 19) and len(new["targets"]) == 20
    flat = torch.cat((new["input_ids"], torch.zeros(3, 1, dtype=torch.int64)), 1)  # (3, T + 1)
    expected, places = [], []
    for row, (prompt, length) in enumerate(zip(batch["prompts"], batch["lengths"], strict=True)):
        assert torch.equal(new["input_ids"][row, :prompt], batch["input_ids"][row, :prompt])
        places += [row * 19 + prompt - 1 + k for k in range(length)]
        expected += flat[row, prompt:prompt + length - 1].tolist()
    assert new["positions"].tolist() == places
    last = {5, 16, 19}  # the last token of each row is a target, but not an input
    assert [t for k, t in enumerate(new["targets"].tolist()) if k not in last] == expected
    assert model.training


def test_a_rollout_ends_at_an_end_token():
    """It ends at the first id of `end_ids`, and depends on the row number only, not on the other rows."""
    model = busy_model(tiny_config())
    batch = batch_for(model, [11, 11, 11], [4, 5, 6])
    whole = rollout_batch(model, batch, 1, 500, set())["targets"].view(3, 11)
    end = int(whole[1, 4])
    ended = rollout_batch(model, batch, 1, 500, {end})["targets"].tolist()
    expected = []
    for row in whole.tolist():
        expected += row[:row.index(end) + 1] if end in row else row
    assert ended == expected and len(ended) < 33
    one = {key: value[1:2] for key, value in batch.items() if key != "count"}
    assert torch.equal(rollout_batch(model, one, 1, 500, set())["targets"], whole[1])


@pytest.fixture(scope="module")
def teacher(trained, chats, tmp_path_factory):
    """A teacher that knows the chat tokens, and a copy of the chats."""
    folder = tmp_path_factory.mktemp("own")
    data = shutil.copytree(chats, folder / "chats")
    argv = [arg for arg in TINY if not arg.startswith(("--n_", "--inter"))]
    sft.main([*argv, "--sample_answers=0", f"--init_from={trained}", f"--dataset={data}",
              f"--out_dir={folder / 'teacher'}"])
    return folder / "teacher", data


def run(teacher, out, *more):
    distill.main([*TINY, f"--teacher={teacher[0]}", f"--dataset={teacher[1]}", f"--out_dir={out}", *more])
    return events(out)


def test_the_student_answers_chats(teacher, tmp_path):
    """The loss is the divergence alone, and the log names it so. The micro-batch size changes nothing in the
    first step; later its rounding may change a sampled token."""
    more = ["--packing=False", "--on_policy=1", "--optimizer=adamw", "--max_steps=4"]
    log = run(teacher, tmp_path / "a", *more)
    own = [event["own_divergence"] for event in log if "own_divergence" in event]
    assert len(own) == 4 and np.isfinite(own).all()
    assert not any("loss" in event or "divergence" in event for event in log)
    assert log[-1]["val_kl"] > 0
    small = run(teacher, tmp_path / "b", *more[:-1], "--micro_batch_size=1", "--max_steps=2")
    np.testing.assert_allclose(small[0]["own_divergence"], own[0], rtol=1e-5)


@pytest.mark.slow
def test_half_of_the_steps_are_on_policy(teacher, tmp_path):
    """The log averages a metric over the steps of an interval that have it."""
    more = ["--packing=False", "--on_policy=0.5", "--max_steps=12"]
    each = run(teacher, tmp_path / "a", *more)[:12]
    together = run(teacher, tmp_path / "b", *more, "--log_interval=12")[0]
    text = [event["loss"] for event in each if "loss" in event]
    assert 0 < len(text) < 12 and len(text) + sum("entropy" in event for event in each) == 12
    assert min(text) <= together["loss"] <= max(text)
    assert together["loss"] == pytest.approx(np.mean(text), rel=0.02)  # the steps differ in their counts


def test_packed_chats_are_refused(teacher, tmp_path):
    with pytest.raises(UserError, match="one conversation per row; add --packing=False"):
        run(teacher, tmp_path / "a", "--on_policy=1")
