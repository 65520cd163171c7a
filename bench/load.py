"""Reading data: a batch beside nanoGPT's get_batch and our own training step, and opening 10 GB.

    python -m bench load
    python -m bench load --device=cuda --block_size=1024 --batch_size=12 --n_layer=12 --n_embd=768

Our batch is what fit fetches (train.batches_at: Mix.samples and text_batch); nanoGPT's is its get_batch
written again, so no --nanogpt is needed. Checked first: our rows are the file's tokens, in the places that
the permutation says. The step is that of `python -m bench train`, by the same clock. Opened are sparse
files: names and sizes are read, as for full ones. "of peak" is a batch's bytes as the model gets them, a
second, beside a copy's bandwidth.
"""

import json
import math
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from bench import train
from bench.measure import baselines, copy_arm, interleaved, row, table
from bench.peers import nanogpt_batch
from configurator import UserError
from dataset.shards import FORMAT_VERSION, SHARD_TOKENS, DataFolder
from train import batches_at
from training.staged_data import StagedData


@dataclass(frozen=True, kw_only=True)
class Config(train.Config):
    gigabytes: float = 10.0  # size of the folder to open


def measure(cfg: Config) -> dict[str, Any]:
    """Check, then time batches, a step, and opening. UserError where a row is not the file's."""
    with tempfile.TemporaryDirectory() as scratch:
        bench = train.StepBench(cfg, train.start(cfg)[0], Path(scratch))
        data, steps = StagedData(bench.train_config("adamw")), iter(range(10**9))
        checks = check(data, bench.data)
        big = sparse_folder(Path(scratch) / "big", round(cfg.gigabytes * 1e9))
        copy, copied = copy_arm(bench.device)
        file, T = bench.data / "train_00000.bin", bench.shape.block_size
        dtype = "bfloat16" if bench.device.type == "cuda" else "float32"
        timings = interleaved({
            "nanoGPT get_batch": lambda: nanogpt_batch(file, bench.batch_size, T, torch.device("cpu")),
            "our batch": lambda: batches_at(data, next(steps)),
            "our step": bench.our_arm(bench.llama, "adamw", dtype, compiled=False).step,
            f"opening {cfg.gigabytes:g} GB": lambda: DataFolder(big),
            "copy": copy}, cfg.rounds, bench.device, cfg.seconds)
    beside = baselines(timings, "nanoGPT")
    batch_bytes = 2 * 8 * bench.batch_size * T  # inputs and targets, int64
    bandwidth = copied / min(timings["copy"].seconds)
    rows = [row(name, "int64", timings[name], beside, batch_bytes / timings[name].median / bandwidth)
            for name in ("nanoGPT get_batch", "our batch")]
    return {"sizes": cfg.sizes(), "checks": checks, "copy_bytes_per_second": bandwidth,
            "step_seconds": timings["our step"].median, "step_dtype": dtype,
            "share_of_step": timings["our batch"].median / timings["our step"].median,
            "open_gigabytes": cfg.gigabytes,
            "open_seconds": timings[f"opening {cfg.gigabytes:g} GB"].median, "arms": rows}


def report(figures: dict[str, Any]) -> str:
    """The table of batches, their share of a step, and the time to open a folder."""
    notes = [f"our batch is {figures['share_of_step']:.2%} of our eager {figures['step_dtype']} step of "
             f"{1e3 * figures['step_seconds']:,.1f} ms",
             f"opening a folder of {figures['open_gigabytes']:g} GB takes {figures['open_seconds']:.4f} s",
             f"copy: {figures['copy_bytes_per_second'] / 1e9:,.1f} GB/s"]
    return table(figures["arms"], "us a batch", lambda seconds: 1e6 * seconds, notes)


def check(data: StagedData, folder: Path) -> dict[str, int]:
    """The first step's inputs and targets, from the file and the seeded permutation alone, or UserError."""
    batch, seed = batches_at(data, 0)[0], data.last_mix.seed
    B, T = batch["input_ids"].shape
    tokens = np.fromfile(folder / "train_00000.bin", dtype="<u2")
    order = np.random.default_rng((seed, 0, 0)).permutation((len(tokens) - 1) // T)
    expected = np.stack([tokens[place * T:place * T + T + 1] for place in order[:B]])  # (B, T + 1)
    if not (np.array_equal(batch["input_ids"], expected[:, :-1])
            and np.array_equal(batch["targets"], expected[:, 1:])):
        raise UserError("the first batch is not what the file holds: nothing to compare")
    return {"rows": B, "tokens": B * T}


def sparse_folder(folder: Path, size: int) -> Path:
    """A data folder of `size` bytes of uint16 zeros, in shards of the usual length, that takes no space."""
    folder.mkdir()
    tokens, shards = size // 2, []
    for number in range(math.ceil(tokens / SHARD_TOKENS)):
        shard = {"name": f"train_{number:05d}.bin", "sha256": "",
                 "tokens": min(SHARD_TOKENS, tokens - number * SHARD_TOKENS)}
        with open(folder / shard["name"], "wb") as file:
            file.truncate(2 * shard["tokens"])
        shards.append(shard)
    meta = {"format_version": FORMAT_VERSION, "kind": "text", "dtype": "uint16", "vocab_size": 65_536,
            "bytes": {"train": 0, "val": 0}, "inputs": {}, "shards": shards}
    (folder / "meta.json").write_text(json.dumps(meta), encoding="utf-8")
    return folder
