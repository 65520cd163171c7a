"""Data: the time to fetch a batch, and its share of an optimizer step; the time to open a large data set."""

import json
import shutil
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch

from model import GPT
from parts.data import Mix, text_batch
from parts.shards import SHARD_TOKENS, DataFolder, write_json
from tools.bench.config import SIZES, BenchConfig
from tools.bench.machine import timed
from tools.bench.peers import our_config
from tools.bench.train import our_step, small_data


def large_data(small: Path, folder: Path, gigabytes: float) -> Path:
    """A data folder of that size whose shards are holes: they take no room, and are mapped as others are."""
    shutil.copytree(small, folder)
    meta = json.loads((folder / "meta.json").read_text())
    shards = [shard for shard in meta["shards"] if shard["name"].startswith("val")]
    for path in folder.glob("train_*.bin"):
        path.unlink()
    tokens = int(gigabytes * 1e9 / 2)
    for number in range(-(-tokens // SHARD_TOKENS)):
        name, size = f"train_{number:05d}.bin", min(SHARD_TOKENS, tokens - number * SHARD_TOKENS)
        with open(folder / name, "wb") as file:
            file.truncate(2 * size)
        shards.append({"name": name, "tokens": size, "sha256": "0" * 64})
    write_json(folder / "meta.json", meta | {"shards": shards})
    return folder


def measure(cfg: BenchConfig) -> dict[str, Any]:
    """Microseconds a batch of both, and notes: the share of our step, seconds to open the large folder."""
    size, device = cfg.size or "readme", torch.device("cpu")
    *_, B, T, _ = SIZES[size]
    with tempfile.TemporaryDirectory() as name:
        data = small_data(Path(name), size)
        mix, turn = Mix(str(data), T, seed=0), iter(range(10**9))
        ids = np.memmap(data / "train_00000.bin", np.uint16, "r")

        def nanogpts() -> tuple[torch.Tensor, torch.Tensor]:
            """As its get_batch does it, written anew."""
            starts = torch.randint(len(ids) - T, (B,))
            return tuple(torch.stack([torch.from_numpy(ids[i + shift:i + shift + T].astype(np.int64))
                                      for i in starts]) for shift in (0, 1))

        arms = {"ours": lambda: text_batch(mix.samples(next(turn) * B, B)), "as nanoGPT does it": nanogpts}
        figures = timed(arms, cfg.rounds, 20 * cfg.steps, device)
        step = timed({"step": our_step(GPT(our_config(size)), data, size, "float32")}, 3, cfg.steps, device)["step"]
        large = large_data(data, Path(name) / "large", cfg.gigabytes)
        begin = time.perf_counter()
        tokens = sum(len(shard) for shard in DataFolder(large).shards["train"])
        seconds = time.perf_counter() - begin
    fetch = sorted(figures["ours"])[cfg.rounds // 2]
    return {"unit": "us", "peer": "as nanoGPT does it",
            "arms": {name: {"dtype": "int64", "values": [1e6 * s for s in values]} for name, values in figures.items()},
            "notes": {"share of a step of ours": fetch / sorted(step)[1], "tokens of the large data set": tokens,
                      "seconds to open it": seconds}}
