"""The default run with several seeds, compared with gzip and xz: bits per byte of the validation text.

    python -m bench base --rounds=3 --json=docs/results/base.json

Trains on data/pystdlib, which takes some minutes per seed. The runs are deleted afterwards.
"""

import tempfile
from pathlib import Path
from typing import Any

from bench.measure import BenchConfig, text_table
from dataset.shards import DataFolder
from formats.tokenizer import Tokenizer
from tools.arms import mean_and_range, run_arms, run_once
from train import compressed_bits

Config = BenchConfig


def measure(cfg: BenchConfig) -> dict[str, Any]:
    """Run train.py once for each of the seeds 1 to cfg.rounds."""
    with tempfile.TemporaryDirectory() as scratch:
        def default_run(seed: int) -> list[dict[str, Any]]:
            return run_once("train.py", [f"--seed={seed}"], Path(scratch) / str(seed))

        logs = run_arms({"base": default_run}, range(1, cfg.rounds + 1))["base"]
    folder = DataFolder("data/pystdlib")
    return {"runs": [run_results(seed, log) for seed, log in enumerate(logs, 1)],
            "bits_per_byte": compressed_bits(folder, Tokenizer.load(folder.folder))}


def run_results(seed: int, log: list[dict[str, Any]]) -> dict[str, Any]:
    trained = [event for event in log if "loss" in event][-1]
    return {"seed": seed, "val_bits_per_byte": log[-1]["val_bits_per_byte"], "val_loss": log[-1]["val_loss"],
            "tokens": trained["tokens"], "seconds": trained["seconds"]}


def report(results: dict[str, Any]) -> str:
    """Mean and range of the bits per byte over the seeds, then the compressors."""
    runs = results["runs"]
    lines = [["this model", mean_and_range([run["val_bits_per_byte"] for run in runs])],
             *([name, f"{bits:.3f}"] for name, bits in results["bits_per_byte"].items())]
    return (f"{text_table(['', 'bits per byte of the validation text'], lines)}\n{len(runs)} seeds of "
            f"{runs[0]['tokens']:,} tokens; the fastest took {min(run['seconds'] for run in runs):.0f} s")
