"""Preparing text: tokens from our encoder and prepare.py, and the cost of searching for evaluation items.

    python -m bench prepare --rounds=9 --json=docs/results/bench_prepare.json
    python -m bench decontaminate --source=novels.jsonl.xz --sets=gsm8k_test.jsonl,mmlu.jsonl.gz \\
        --documents=gsm8k_train.jsonl

`prepare` encodes the same texts with tokenizers' encode_batch_fast on one core, with our encoder, and with
prepare.py from start to end. It first checks that the ids are equal.

`decontaminate` times prepare.py without and with --decontaminate. It then times the search by itself on the
short texts of --documents: the near-duplicate search for whole documents, and the complete search.
"""

import functools
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from bench.measure import BenchConfig, in_turns, text_table, value_range, write_jsonl
from configurator import UserError
from dataset.decontaminate import THRESHOLD, Index, passage_signatures
from dataset.eval_items import find_benchmarks
from dataset.sources import Skip, document, find_files, read_rows
from dataset.words import chained, words_of
from formats.tokenizer import Tokenizer

BATCH = 2000  # documents per search, about what prepare.py has in a batch
Clocks = dict[str, list[float]]  # {"wall": seconds, "cpu": seconds}, one value per round


@dataclass(frozen=True, kw_only=True)
class Config(BenchConfig):
    source: str = "pystdlib"  # the text, in any form that prepare.py reads
    copies: int = 4  # copies of the text; each copy has its own first line in every document
    vocab_size: int = 4096  # size of the BPE trained on the text


@dataclass(frozen=True, kw_only=True)
class SearchConfig(BenchConfig):
    source: str = "pystdlib"  # the text, in any form that prepare.py reads
    megabytes: float = 25.0  # use at most this much of the text
    sets: str = ""  # evaluation sets, as in prepare.py --decontaminate; "" takes paragraphs of the source
    documents: str = ""  # short documents, in any form of an evaluation set; "" takes those paragraphs
    vocab_size: int = 4096  # size of the BPE trained on the text


def read_texts(source: str, megabytes: float = float("inf")) -> Iterator[str]:
    """Documents of the source, up to a number of 10^6 bytes."""
    size = 0
    for row in read_rows(find_files(source)[0], "text", piece=2**20):
        try:
            text = document(row, "text")
        except Skip:
            continue
        size += len(text.encode())
        if size > 1e6 * megabytes:
            return
        yield text


def run_prepare(folder: str, *argv: str) -> None:
    """prepare.py on folder/texts.jsonl with the tokenizer in the folder."""
    with tempfile.TemporaryDirectory(dir=folder) as out:
        subprocess.run([sys.executable, "prepare.py", f"--source={folder}/texts.jsonl",
                        f"--tokenizer={folder}", f"--out={out}", *argv], check=True, capture_output=True)


def time_both_clocks(arms: dict[str, Callable[[], Any]], rounds: int) -> dict[str, Clocks]:
    """Wall and CPU seconds of each arm, child processes included. A first round is a warm-up."""
    def timed(arm: Callable[[], Any]) -> tuple[float, float]:
        begin, begin_cpu = time.perf_counter(), cpu_seconds()
        arm()
        return time.perf_counter() - begin, cpu_seconds() - begin_cpu

    seconds = in_turns({name: functools.partial(timed, arm) for name, arm in arms.items()}, rounds + 1)
    return {name: {"wall": [wall for wall, _ in pairs[1:]], "cpu": [cpu for _, cpu in pairs[1:]]}
            for name, pairs in seconds.items()}


def cpu_seconds() -> float:
    times = os.times()
    return times.user + times.system + times.children_user + times.children_system


def rates(work: float, seconds: Clocks) -> Clocks:
    """Work per second."""
    return {clock: [work / value for value in values] for clock, values in seconds.items()}


def rate_cells(rate: Clocks, digits: int) -> list[str]:
    """Cells of a table: median and range by the wall clock, median by CPU time."""
    return [f"{statistics.median(rate['wall']):,.{digits}f}", value_range(rate["wall"], digits),
            f"{statistics.median(rate['cpu']):,.{digits}f}"]


# ---- Preparing --------------------------------------------------------------------------------------------

def measure(cfg: Config) -> dict[str, Any]:
    """MB of text per second, wall and CPU. UserError if the encoders disagree."""
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # the peer, too, gets one core
    texts = list(read_texts(cfg.source))
    tokenizer = Tokenizer.train(texts, cfg.vocab_size)
    texts = [f"# {copy}\n{text}" for copy in range(cfg.copies) for text in texts]  # no two are equal
    theirs = tokenizer.plain.encode_batch_fast(texts[::cfg.copies], add_special_tokens=False)
    if [encoding.ids for encoding in theirs] != [tokenizer.encode(text) for text in texts[::cfg.copies]]:
        raise UserError("the encoders disagree; nothing was timed")
    with tempfile.TemporaryDirectory() as folder:
        tokenizer.save(folder)
        write_jsonl(Path(folder) / "texts.jsonl", [{"text": text} for text in texts])
        seconds = time_both_clocks({
            "tokenizers encode_batch_fast": lambda: tokenizer.plain.encode_batch_fast(texts),
            "our encode": lambda: [tokenizer.encode(text) for text in texts],
            "prepare.py, 1 process": lambda: run_prepare(folder, "--num_proc=1"),
            "prepare.py, 2 processes": lambda: run_prepare(folder, "--num_proc=2")}, cfg.rounds)
    megabytes = sum(len(text.encode()) for text in texts) / 1e6
    return {"megabytes": megabytes, "arms": {name: rates(megabytes, both) for name, both in seconds.items()}}


def report(results: dict[str, Any]) -> str:
    """One line per arm: MB/s by both clocks, and the ratio to the first arm by the wall clock."""
    wall = {name: statistics.median(arm["wall"]) for name, arm in results["arms"].items()}
    peer = next(iter(wall.values()))
    return text_table(["MB/s", "wall", "(min - max)", "cpu", "x peer"],
                      [[name, *rate_cells(arm, 1), f"{wall[name] / peer:.2f}"]
                       for name, arm in results["arms"].items()])


# ---- Searching for evaluation items -----------------------------------------------------------------------

def near_duplicates(index: Index, documents: list[str]) -> int:
    """The number of documents that are near-duplicates of an evaluation item."""
    words = words_of(documents)
    lengths = np.diff(words.bounds)
    begins, pairs = words.bounds[:-1], chained(words.hashes)[0]
    signature = passage_signatures(words, pairs, begins[lengths > 0], lengths[lengths > 0])
    return len(np.unique(index.near.find(signature, THRESHOLD)[0]))


def measure_search(cfg: SearchConfig) -> dict[str, Any]:
    """Seconds of prepare.py with and without the evaluation sets, and of the search in the documents."""
    texts = list(read_texts(cfg.source, cfg.megabytes))
    paragraphs = [part for text in texts for part in text.split("\n\n") if len(part.split()) > 30][:5000]
    documents = [text for benchmark in find_benchmarks(cfg.documents)[0] for _, text in benchmark.items()] \
        if cfg.documents else paragraphs
    batches = [documents[at:at + BATCH] for at in range(0, len(documents), BATCH)]
    with tempfile.TemporaryDirectory() as folder:
        write_jsonl(Path(folder) / "texts.jsonl", [{"text": text} for text in texts])
        write_jsonl(Path(folder) / "held.jsonl", [{"text": text} for text in paragraphs[::10]])
        Tokenizer.train(texts, cfg.vocab_size).save(folder)
        sets = cfg.sets or f"{folder}/held.jsonl"
        begin = time.process_time()
        index = Index([(benchmark.name, list(benchmark.items())) for benchmark in find_benchmarks(sets)[0]])
        index_seconds = time.process_time() - begin
        plain = ("--num_proc=1", "--val_fraction=0")
        seconds = time_both_clocks({
            "prepare.py": lambda: run_prepare(folder, *plain),
            "prepare.py, decontaminated": lambda: run_prepare(folder, *plain, f"--decontaminate={sets}"),
            "MinHash of whole documents": lambda: [near_duplicates(index, batch) for batch in batches],
            "all of the search": lambda: [index.find(batch) for batch in batches]}, cfg.rounds)
    return {"megabytes": sum(len(text.encode()) for text in texts) / 1e6, "documents": len(documents),
            "words_a_document": len(words_of(documents).begins) / len(documents),
            "items": len(index.places), "index_seconds": index_seconds,
            "index_megabytes": index.megabytes(), "arms": seconds}


def report_search(results: dict[str, Any]) -> str:
    """The index; MB/s of the two ways to prepare; documents per second of the two searches."""
    lines = []
    for name, seconds in results["arms"].items():
        prepares = name.startswith("prepare.py")
        work, unit = (results["megabytes"], "MB/s") if prepares else (results["documents"], "documents/s")
        lines.append([name, *rate_cells(rates(work, seconds), 1 if prepares else 0), unit])
    return (f"{results['items']:,} items indexed in {results['index_seconds']:.1f} s of CPU time, "
            f"{results['index_megabytes']:,.0f} MB\n"
            f"{text_table(['', 'wall', '(min - max)', 'cpu', 'unit'], lines)}\n"
            f"a document has {results['words_a_document']:.0f} words on average")
