"""The default run, once a seed, beside gzip and xz: bits per byte of the validation text.

    python -m bench base --rounds=3 --json=docs/results/base.json

Trains on data/pystdlib, each seed in an out_dir of its own that is deleted afterwards: minutes a seed.
"""

import json
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from bench.measure import BenchConfig
from dataset.shards import DataFolder
from formats.tokenizer import Tokenizer
from train import compressed_bits

Config = BenchConfig


def measure(cfg: BenchConfig) -> dict[str, Any]:
    """The default run once a seed, each in a process and an out_dir of its own; data/pystdlib is shared."""
    runs = []
    for seed in range(1, cfg.rounds + 1):
        with tempfile.TemporaryDirectory() as out:
            subprocess.run([sys.executable, "train.py", f"--seed={seed}", f"--out_dir={out}"], check=True)
            events = [json.loads(line) for line in (Path(out) / "metrics.jsonl").read_text().splitlines()]
        trained = [event for event in events if "loss" in event][-1]
        runs.append({"seed": seed, "val_bits_per_byte": events[-1]["val_bits_per_byte"],
                     "val_loss": events[-1]["val_loss"], "tokens": trained["tokens"],
                     "seconds": trained["seconds"]})
    folder = DataFolder("data/pystdlib")
    return {"runs": runs, "bits_per_byte": compressed_bits(folder, Tokenizer.load(folder.folder))}


def report(figures: dict[str, Any]) -> str:
    """Mean and spread of the bits per byte over the seeds, and those of the compressors."""
    bits = [run["val_bits_per_byte"] for run in figures["runs"]]
    seconds = min(run["seconds"] for run in figures["runs"])
    lines = [f"{'this model':12} {statistics.mean(bits):.3f}   ({min(bits):.3f} - {max(bits):.3f} over "
             f"{len(bits)} seeds; {figures['runs'][0]['tokens']:,} tokens in {seconds:.0f} s at best)"]
    lines += [f"{name:12} {value:.3f}" for name, value in figures["bits_per_byte"].items()]
    return "bits per byte of the validation text\n" + "\n".join(lines)
