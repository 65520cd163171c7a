"""Measure ourselves beside named peers on this machine, and print one table.

    python -m tools.bench prepare                     # text -> shards, against tokenizers' encode_batch_fast
    python -m tools.bench prepare --rounds=9 --json=docs/results/bench_prepare.json
    python -m tools.bench base --rounds=3             # the default run, seeds 1 to 3, beside gzip and xz

Arms that are timed run in turn, once a round, so that a machine whose speed drifts drifts for all of them;
medians and spreads are over rounds. That both sides do the same work is checked before anything is timed.
"""

import json
import os
import platform
import re
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

from configurator import UserError, configure, run_script
from parts.shards import DataFolder, write_json
from parts.sources import Skip, document, find_files, read_rows
from parts.tokenizer import Tokenizer


@dataclass(frozen=True, kw_only=True)
class BenchConfig:
    source: str = "pystdlib"  # prepare: the text
    copies: int = 4  # prepare: times it is taken, each document then with a first line of its own
    vocab_size: int = 4096  # prepare: ids of the BPE trained on it
    rounds: int = 5  # times each arm is run; base: seeds
    json: str | None = None  # also write the figures here


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


def bench_prepare(cfg: BenchConfig) -> dict[str, Any]:
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


def report_prepare(result: dict[str, Any]) -> str:
    """A line an arm: median MB/s by the wall clock, lowest to highest, and its ratio to the first arm."""
    baseline = next(iter(result["arms"]))
    lines = [f"{'MB/s':32} {'wall':>7} {'(min - max)':>15} {'cpu':>7} {'x peer':>7}"]
    median = {name: {clock: statistics.median(values) for clock, values in arm.items()}
              for name, arm in result["arms"].items()}
    for name, arm in result["arms"].items():
        wall, cpu = median[name]["wall"], median[name]["cpu"]
        spread = f"({min(arm['wall']):.1f} - {max(arm['wall']):.1f})"
        lines.append(f"{name:32} {wall:7.1f} {spread:>15} {cpu:7.1f} {wall / median[baseline]['wall']:7.2f}")
    return "\n".join(lines)


def bench_base(cfg: BenchConfig) -> dict[str, Any]:
    """The default run once a seed, each in a process and an out_dir of its own; data/pystdlib is shared."""
    from train import compressed_bits  # here, so that prepare's processes are not forked with all of torch
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


def report_base(result: dict[str, Any]) -> str:
    """Mean and spread of the bits per byte over the seeds, and those of the compressors."""
    bits = [run["val_bits_per_byte"] for run in result["runs"]]
    seconds = min(run["seconds"] for run in result["runs"])
    lines = [f"{'this model':12} {statistics.mean(bits):.3f}   ({min(bits):.3f} - {max(bits):.3f} over "
             f"{len(bits)} seeds; {result['runs'][0]['tokens']:,} tokens in {seconds:.0f} s at best)"]
    lines += [f"{name:12} {value:.3f}" for name, value in result["bits_per_byte"].items()]
    return "bits per byte of the validation text\n" + "\n".join(lines)


def versions() -> dict[str, str]:
    """The machine, and the packages whose versions the figures depend on."""
    packages = ("torch", "numpy", "tiktoken", "tokenizers")
    return {"python": platform.python_version(), "machine": f"{processor()}, {os.cpu_count()} cores",
            **{name: version(name) for name in packages}}


def processor() -> str:
    """The processor's name as Linux gives it, else its architecture."""
    info = Path("/proc/cpuinfo")
    names = re.findall(r"model name\s*: (.+)", info.read_text()) if info.is_file() else []
    return names[0] if names else platform.machine()


BENCHES = {"prepare": (bench_prepare, report_prepare), "base": (bench_base, report_base)}


def main(argv: list[str]) -> int:
    if not argv or argv[0] not in BENCHES:
        raise UserError(f"say what to measure: python -m tools.bench {'|'.join(BENCHES)}")
    cfg, _ = configure(BenchConfig, argv[1:], usage=__doc__)
    measure, report = BENCHES[argv[0]]
    result = measure(cfg)
    print(report(result))
    if cfg.json:
        command = f"python -m tools.bench {' '.join(argv)}"
        write_json(Path(cfg.json), {"command": command, "versions": versions(), **result})
    return 0


if __name__ == "__main__":
    run_script(main)
