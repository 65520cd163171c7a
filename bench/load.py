"""Reading data: a batch compared with nanoGPT's get_batch and with our training step; and opening 10 GB.

    python -m bench load
    python -m bench load --device=cuda --block_size=1024 --batch_size=12 --n_layer=12 --n_embd=768

Our batch is what fit fetches (train.batches_at: Mix.samples and text_batch). nanoGPT's batch is its
get_batch, written again in bench/peers.py, so --nanogpt is not needed. First checks that our rows are the
tokens of the file at the places that the seeded permutation gives. The step is that of `python -m bench
train`, with the same clock. The files that are opened are sparse; opening reads names and sizes only, as with
full files. "of peak" is the bytes of a batch per second, as the model receives them, relative to the rate of
a copy.
"""

import functools
import itertools
import math
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from bench import train
from bench.machine import copy_arm
from bench.measure import baselines, row, start, time_in_turns, timing_table
from bench.peers import nanogpt_batch
from configurator import UserError
from dataset.shards import FORMAT_VERSION, SHARD_TOKENS, DataFolder
from formats.files import write_json
from train import batches_at
from training.staged_data import StagedData


@dataclass(frozen=True, kw_only=True)
class Config(train.Config):
    gigabytes: float = 10.0  # size of the data folder to open, in 10^9 bytes


def check(data: StagedData, folder: Path) -> dict[str, int]:
    """Compare the first step's batch with the file and the seeded permutation. UserError if they differ."""
    batch, seed = batches_at(data, 0)[0], data.last_mix.seed
    B, T = batch["input_ids"].shape
    tokens = np.fromfile(folder / "train_00000.bin", dtype="<u2")
    order = np.random.default_rng((seed, 0, 0)).permutation((len(tokens) - 1) // T)
    expected = np.stack([tokens[place * T:place * T + T + 1] for place in order[:B]])  # (B, T + 1)
    if not (np.array_equal(batch["input_ids"], expected[:, :-1])
            and np.array_equal(batch["targets"], expected[:, 1:])):
        raise UserError("the first batch does not hold the tokens of the file; nothing was timed")
    return {"rows": B, "tokens": B * T}


def sparse_folder(folder: Path, size: int) -> Path:
    """A data folder of `size` bytes of uint16 zeros, in shards of the usual length. It takes no disk
    space."""
    folder.mkdir()
    tokens, shards = size // 2, []
    for number in range(math.ceil(tokens / SHARD_TOKENS)):
        shard = {"name": f"train_{number:05d}.bin", "sha256": "",
                 "tokens": min(SHARD_TOKENS, tokens - number * SHARD_TOKENS)}
        with open(folder / shard["name"], "wb") as file:
            file.truncate(2 * shard["tokens"])
        shards.append(shard)
    write_json(folder / "meta.json", {
        "format_version": FORMAT_VERSION, "kind": "text", "dtype": "uint16", "vocab_size": 65_536,
        "bytes": {"train": 0, "val": 0}, "inputs": {}, "shards": shards})
    return folder


def measure(cfg: Config) -> dict[str, Any]:
    """Check, then time batches, a step, and opening. UserError if a row is not that of the file."""
    with tempfile.TemporaryDirectory() as scratch:
        setup = train.Setup(cfg, start(cfg)[0], Path(scratch))
        data, steps = StagedData(setup.train_config("adamw")), itertools.count()
        checks = check(data, setup.data)
        big = sparse_folder(Path(scratch) / "big", round(cfg.gigabytes * 1e9))
        copy, copied = copy_arm(setup.device)
        B, T = setup.batch_size, setup.shape.block_size
        dtype = "bfloat16" if setup.device.type == "cuda" else "float32"
        timings = time_in_turns({
            "nanoGPT get_batch": functools.partial(nanogpt_batch, setup.data / "train_00000.bin", B, T,
                                                   torch.device("cpu")),
            "our batch": lambda: batches_at(data, next(steps)),
            "our step": train.our_arm(setup, setup.llama, "adamw", dtype, compiled=False).step,
            "opening": lambda: DataFolder(big), "copy": copy}, cfg.rounds, setup.device, cfg.seconds)
    peers, ours = baselines(timings, "nanoGPT"), timings["our batch"].median
    bandwidth = copied / min(timings["copy"].seconds)
    batch_bytes = 2 * 8 * B * T  # inputs and targets, int64
    rows = [row(name, "int64", timings[name], peers, batch_bytes / timings[name].median / bandwidth)
            for name in ("nanoGPT get_batch", "our batch")]
    return {"sizes": cfg.sizes(), "checks": checks, "copy_bytes_per_second": bandwidth,
            "step_seconds": timings["our step"].median, "step_dtype": dtype,
            "share_of_step": ours / timings["our step"].median, "open_gigabytes": cfg.gigabytes,
            "open_seconds": timings["opening"].median, "arms": rows}


def report(results: dict[str, Any]) -> str:
    """The table of batches, their share of a step, and the time to open a folder."""
    notes = [f"our batch takes {results['share_of_step']:.2%} of our eager {results['step_dtype']} step of "
             f"{1e3 * results['step_seconds']:,.1f} ms",
             f"opening a folder of {results['open_gigabytes']:g} GB takes {results['open_seconds']:.4f} s",
             f"copy: {results['copy_bytes_per_second'] / 1e9:,.1f} GB/s"]
    return timing_table(results["arms"], "us per batch", lambda seconds: 1e6 * seconds, notes)
