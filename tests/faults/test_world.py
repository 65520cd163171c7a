"""Faults 8 to 10: a change of the number of processes, wrappers, and a fault on only one rank."""

import os
import subprocess
import sys

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

import loop
import train
from configurator import UserError, configure
from dataset.dataloader import Mix
from formats import checkpoint
from loop import start_run
from model import GPT, GPTConfig
from tests.conftest import ROOT, TINY_RUN
from tests.runs import flat, run, state, weights
from training.staged_data import StagedData


@pytest.fixture(scope="module", params=["adamw", "muon"])
def single(request, tmp_path_factory, data):
    out = tmp_path_factory.mktemp("single") / "out"
    run(data, out, f"--optimizer={request.param}", "--max_steps=3", "--micro_batch_size=2")
    return out


def saved_again(source, out, parallel):
    """Load a run's newest checkpoint as a resuming run does, on all ranks, and save it under `out`."""
    is_muon = any("momentum_buffer" in entry for entry in state(source)["optimizer"].values())
    optimizer = "muon" if is_muon else "adamw"
    words = ["--micro_batch_size=2", f"--parallel={parallel}", f"--optimizer={optimizer}"]
    cfg = configure(train.TrainConfig, [*TINY_RUN, *words, f"--out_dir={out}"])[0]
    with start_run(cfg) as process:
        folder = checkpoint.newest_verified(source, print)
        with torch.device("meta"):
            model = GPT(GPTConfig.from_keys(cfg, vocab_size=500, block_size=64))
        loop.place(model, cfg, process, folder)
        resumed = loop.resume(cfg, model, process, folder, loop.Progress())
        loop.enter_stage(resumed)
        loop.save(resumed)


def test_weights_and_optimizer_survive_every_change_of_ranks(single, tmp_path, two_ranks):
    """1 -> FSDP x 2 -> DDP x 2 -> FSDP x 2 -> 1, each loading what the last one saved: bit-identical."""
    source = single
    for number, parallel in enumerate(["fsdp", "ddp", "fsdp", "single"]):
        out = tmp_path / f"{number}_{parallel}"
        if parallel == "single":
            saved_again(source, out, "ddp")
        else:
            two_ranks(saved_again, source, out, parallel)
        source = out
    before, after = flat(state(single)["optimizer"]), flat(state(source)["optimizer"])
    assert before.keys() == after.keys() and all(torch.equal(before[key], after[key]) for key in before)
    before, after = weights(single), weights(source)
    assert before.keys() == after.keys() and all(torch.equal(before[key], after[key]) for key in before)


def test_no_sample_is_lost_or_read_twice(data):
    """The shards of all ranks together are the step's samples, in order, for 1, 2 and 4 ranks."""
    cfg = configure(train.TrainConfig, [*TINY_RUN, f"--dataset={data}", "--micro_batch_size=1",
                                        "--max_steps=9999"])[0]

    places = {world_size: [StagedData(cfg, rank=rank, world_size=world_size) for rank in range(world_size)]
              for world_size in (1, 2, 4)}

    def samples(step, world_size):
        return torch.cat([batch["input_ids"] for place in places[world_size]
                          for batch in train.batches_at(place, step)])

    for step in (0, 5, 80, 700):  # several epochs
        expected = samples(step, 1)
        assert expected.shape == (8, 64)
        assert all(torch.equal(samples(step, world_size), expected) for world_size in (2, 4))
    rows = Mix(cfg.dataset, 64, cfg.seed).rows[0]
    steps = -(-len(rows) // 8)
    seen = torch.cat([samples(step, 2) for step in range(steps)])[:len(rows)].numpy()
    every = rows.read(np.arange(len(rows)))[:, :-1]
    assert np.array_equal(sorted(seen.tolist()), sorted(every.tolist()))  # an epoch is every row once


@pytest.mark.parametrize("words", [["--parallel=ddp"], ["--parallel=fsdp"], ["--compile=True"]])
def test_no_wrappers_name_is_in_a_file(data, single, tmp_path, two_ranks, words, monkeypatch):
    words = ["--max_steps=1", "--micro_batch_size=2", *words]
    if "--compile=True" in words:
        monkeypatch.setattr(torch.nn.Module, "compile", compile_eagerly)
        run(data, tmp_path, *words)
    else:
        two_ranks(run, data, tmp_path, *words)
    folder = checkpoint.step_folders(tmp_path)[-1]
    expected = load_file(checkpoint.step_folders(single)[-1] / "model.safetensors").keys()
    assert load_file(folder / "model.safetensors").keys() == expected
    assert state(tmp_path)["optimizer"].keys() == set(expected)
    GPT.from_pretrained(folder)


def compile_eagerly(module):
    """torch.compile's wrapper, without the minute that its compiler takes."""
    module._compiled_call_impl = torch.compile(module._call_impl, backend="eager")


def test_a_fault_in_one_ranks_data_is_raised_by_all(data, tmp_path, two_ranks):
    messages = two_ranks(bad_row_on_the_second_rank, data, tmp_path)
    assert messages[0] == messages[1] and "token 7 is 60000" in messages[0]


def bad_row_on_the_second_rank(data, out):
    original = train.batches_at

    def batches_at(place, step):
        if step == 2 and place.rank == 1:
            raise UserError("train_00000.bin: token 7 is 60000, the vocabulary has 500 ids")
        return original(place, step)

    train.batches_at = batches_at
    try:
        run(data, out, "--max_steps=4", "--micro_batch_size=2")
    except UserError as error:
        return str(error)
    finally:
        train.batches_at = original


def test_torchrun_prints_a_users_mistake_once(tmp_path):
    """From the command line: one line, not one per process, and no traceback of ours.

    All scripts end in run_script; this one starts in the least time.
    """
    result = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", "prepare.py",
         "--vocab_siz=1", f"--out={tmp_path / 'd'}"],
        cwd=ROOT, capture_output=True, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"},
    )
    lines = [line for line in result.stderr.splitlines() if "vocab_size" in line]
    assert lines == ["prepare.py: command line: unknown key 'vocab_siz', did you mean 'vocab_size'? "
                    "(--help lists them all)"]
    assert 'File "' not in result.stderr.split("torch/distributed")[0]
