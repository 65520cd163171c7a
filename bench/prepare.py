"""Text -> shards: tokenizers' encode_batch_fast on one core, our encoder, and prepare.py from start to end.

    python -m bench prepare --rounds=9 --json=docs/results/bench_prepare.json

All of them encode the same texts; that the ids are equal is checked first.
"""

import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bench.measure import BenchConfig
from configurator import UserError
from dataset.sources import Skip, document, find_files, read_rows
from formats.tokenizer import Tokenizer


@dataclass(frozen=True, kw_only=True)
class Config(BenchConfig):
    source: str = "pystdlib"  # the text
    copies: int = 4  # times it is taken, each document then with a first line of its own
    vocab_size: int = 4096  # ids of the BPE trained on it


def interleaved(arms: dict[str, Callable[[], None]], rounds: int) -> dict[str, dict[str, list[float]]]:
    """Wall and CPU seconds (children's too) of each arm, one figure a round; a first round does not count."""
    figures: dict[str, dict[str, list[float]]] = {name: {"wall": [], "cpu": []} for name in arms}
    for number in range(rounds + 1):
        for name, arm in arms.items():
            begin, begin_cpu = time.perf_counter(), cpu_seconds()
            arm()
            if number:
                figures[name]["wall"].append(time.perf_counter() - begin)
                figures[name]["cpu"].append(cpu_seconds() - begin_cpu)
    return figures


def cpu_seconds() -> float:
    times = os.times()
    return times.user + times.system + times.children_user + times.children_system


def measure(cfg: Config) -> dict[str, Any]:
    """MB of text a second: encode_batch_fast on one core, our encoder, and prepare.py, start to end."""
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # one core for the peer, too
    texts = []
    for row in read_rows(find_files(cfg.source)[0], "text", piece=2**20):
        try:
            texts.append(document(row, "text"))
        except Skip:
            continue
    tokenizer = Tokenizer.train(texts, cfg.vocab_size)
    texts = [f"# {copy}\n{text}" for copy in range(cfg.copies) for text in texts]  # no two are equal
    theirs = tokenizer.plain.encode_batch_fast(texts[::cfg.copies], add_special_tokens=False)
    if [encoding.ids for encoding in theirs] != [tokenizer.encode(text) for text in texts[::cfg.copies]]:
        raise UserError("the encoders disagree: nothing to compare")
    with tempfile.TemporaryDirectory() as folder:
        tokenizer.save(folder)
        source = Path(folder) / "texts.jsonl"
        source.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts), encoding="utf-8")

        def whole(num_proc: int) -> None:
            with tempfile.TemporaryDirectory(dir=folder) as out:
                subprocess.run([sys.executable, "prepare.py", f"--source={source}", f"--tokenizer={folder}",
                                f"--out={out}", f"--num_proc={num_proc}"], check=True, capture_output=True)

        figures = interleaved({
            "tokenizers encode_batch_fast": lambda: tokenizer.plain.encode_batch_fast(texts),
            "our encode": lambda: [tokenizer.encode(text) for text in texts],
            "prepare.py, 1 process": lambda: whole(1),
            "prepare.py, 2 processes": lambda: whole(2)}, cfg.rounds)
    megabytes = sum(len(text.encode()) for text in texts) / 1e6
    return {"megabytes": megabytes, "arms": {
        name: {clock: [megabytes / value for value in values] for clock, values in both.items()}
        for name, both in figures.items()}}


def report(figures: dict[str, Any]) -> str:
    """A line an arm: median MB/s by the wall clock, lowest to highest, and its ratio to the first arm."""
    baseline = next(iter(figures["arms"]))
    lines = [f"{'MB/s':32} {'wall':>7} {'(min - max)':>15} {'cpu':>7} {'x peer':>7}"]
    median = {name: {clock: statistics.median(values) for clock, values in arm.items()}
              for name, arm in figures["arms"].items()}
    for name, arm in figures["arms"].items():
        wall, cpu = median[name]["wall"], median[name]["cpu"]
        spread = f"({min(arm['wall']):.1f} - {max(arm['wall']):.1f})"
        lines.append(f"{name:32} {wall:7.1f} {spread:>15} {cpu:7.1f} {wall / median[baseline]['wall']:7.2f}")
    return "\n".join(lines)
