"""Preparing text: megabytes per second of our encoder and of prepare.py, compared with tokenizers.

    python -m bench prepare --rounds=9 --json=docs/results/bench_prepare.json
    python -m bench prepare --source=novels.jsonl.xz --copies=1 --sets=gsm8k_test.jsonl,mmlu.jsonl.gz

Encodes the same texts with tokenizers' encode_batch_fast on one core, with our encoder, and with prepare.py
from start to end: plain, with the quality rules, and without near-duplicates. With --sets, one more arm
removes the documents that hold items of these evaluation sets. First checks that the ids are equal.
"""

import functools
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

from bench.measure import BenchConfig, in_turns, text_table, value_range, write_jsonl
from configurator import UserError
from dataset.sources import document, find_files, read_rows, usable_rows
from formats.tokenizer import Tokenizer


@dataclass(frozen=True, kw_only=True)
class Config(BenchConfig):
    source: str = "pystdlib"  # the text, in any form that prepare.py reads
    copies: int = 4  # copies of the text; the first line of each document tells them apart
    sets: str | None = None  # evaluation sets, as in prepare.py --decontaminate; None leaves this arm out
    vocab_size: int = 4096  # size of the BPE trained on the text


def run_prepare(folder: str, *argv: str) -> None:
    """prepare.py on folder/texts.jsonl with the tokenizer in the folder."""
    with tempfile.TemporaryDirectory(dir=folder) as out:
        subprocess.run([sys.executable, "prepare.py", f"--source={folder}/texts.jsonl",
                        f"--tokenizer={folder}", f"--out={out}", *argv], check=True, capture_output=True)


def time_both_clocks(arm: Callable[[], Any]) -> tuple[float, float]:
    """Wall and CPU seconds of an arm, child processes included."""
    begin, begin_cpu = time.perf_counter(), cpu_seconds()
    arm()
    return time.perf_counter() - begin, cpu_seconds() - begin_cpu


def cpu_seconds() -> float:
    return sum(os.times()[:4])  # user and system time, of this process and of its children


def measure(cfg: Config) -> dict[str, Any]:
    """MB of text per second, wall and CPU. UserError if the encoders disagree."""
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # the peer, too, gets one core
    rows = read_rows(find_files(cfg.source)[0], "text")
    texts = [text for _, text in usable_rows(rows, lambda row: document(row, "text"))]
    tokenizer = Tokenizer.train(texts, cfg.vocab_size)
    theirs = tokenizer.plain.encode_batch_fast(texts, add_special_tokens=False)
    if [encoding.ids for encoding in theirs] != [tokenizer.encode(text) for text in texts]:
        raise UserError("the encoders disagree; nothing was timed")
    texts = [f"# {copy}\n{text}" for copy in range(cfg.copies) for text in texts]  # no two are equal
    with tempfile.TemporaryDirectory() as folder:
        tokenizer.save(folder)
        write_jsonl(Path(folder) / "texts.jsonl", [{"text": text} for text in texts])
        arms = {"tokenizers encode_batch_fast": lambda: tokenizer.plain.encode_batch_fast(texts),
                "our encode": lambda: [tokenizer.encode(text) for text in texts],
                "prepare.py, 1 process": lambda: run_prepare(folder, "--num_proc=1"),
                "prepare.py, 2 processes": lambda: run_prepare(folder, "--num_proc=2"),
                "prepare.py, 1 process, quality": lambda: run_prepare(
                    folder, "--num_proc=1", "--quality=gopher,fineweb"),
                "prepare.py, 1 process, dedup": lambda: run_prepare(folder, "--num_proc=1", "--dedup=0.8")}
        if cfg.sets:
            arms["prepare.py, 1 process, decontaminated"] = lambda: run_prepare(
                folder, "--num_proc=1", f"--decontaminate={cfg.sets}")
        seconds = in_turns({name: functools.partial(time_both_clocks, arm) for name, arm in arms.items()},
                           cfg.rounds + 1)  # the first round is a warm-up
    megabytes = sum(len(text.encode()) for text in texts) / 1e6
    return {"megabytes": megabytes, "arms": {name: {
        "wall": [megabytes / wall for wall, _ in pairs[1:]],
        "cpu": [megabytes / cpu for _, cpu in pairs[1:]]} for name, pairs in seconds.items()}}


def report(results: dict[str, Any]) -> str:
    """One line per arm: MB/s by both clocks, and the ratio to the first arm by the wall clock."""
    medians = {name: {clock: statistics.median(rates) for clock, rates in arm.items()}
               for name, arm in results["arms"].items()}
    peer = next(iter(medians.values()))["wall"]
    return text_table(["MB/s", "wall", "(min - max)", "cpu", "x peer"],
                      [[name, f"{medians[name]['wall']:,.1f}", value_range(arm["wall"], 1),
                        f"{medians[name]['cpu']:,.1f}", f"{medians[name]['wall'] / peer:.2f}"]
                       for name, arm in results["arms"].items()])
