"""What it costs to look for evaluation items: prepare.py without and with it, and documents a second.

    python -m bench decontaminate --source=novels.jsonl.xz --sets=gsm8k_test.jsonl,mmlu.jsonl.gz \\
        --documents=gsm8k_train.jsonl

Documents a second are those of `documents`, which are short: signatures and bands of every one of them as a
whole, from its text to the items that it is like; and all that prepare.py looks for.
"""

import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from bench.measure import BenchConfig
from bench.prepare import interleaved
from dataset.decontaminate import THRESHOLD, Index, signed
from dataset.eval_items import find_benchmarks
from dataset.sources import Skip, document, find_files, read_rows
from dataset.words import chained, words_of
from formats.tokenizer import Tokenizer

BATCH = 2000  # documents at a time, which is about what prepare.py has in a batch


@dataclass(frozen=True, kw_only=True)
class Config(BenchConfig):
    source: str = "pystdlib"  # the text that is prepared
    megabytes: float = 25.0  # of it, at the most
    sets: str = ""  # evaluation sets, as --decontaminate has them; "": some paragraphs of the source
    documents: str = ""  # short documents, in any form that an evaluation set may have; "": those paragraphs
    vocab_size: int = 4096  # ids of the BPE trained on the text


def texts_of(cfg: Config) -> Iterator[str]:
    """Documents of the source, up to cfg.megabytes."""
    size = 0
    for row in read_rows(find_files(cfg.source)[0], "text", piece=2**20):
        try:
            text = document(row, "text")
        except Skip:
            continue
        size += len(text.encode())
        if size > 1e6 * cfg.megabytes:
            return
        yield text


def by_minhash(index: Index, documents: list[str]) -> int:
    """How many documents are, as a whole, like an item."""
    words = words_of(documents)
    lengths = np.diff(words.bounds)
    signature = signed(words, chained(words.hashes)[0], words.bounds[:-1][lengths > 0], lengths[lengths > 0])
    return len(np.unique(index.near.find(signature, THRESHOLD)[0]))


def measure(cfg: Config) -> dict[str, Any]:
    """MB of text a second of prepare.py without and with the sets, and documents a second of the search."""
    texts = list(texts_of(cfg))
    paragraphs = [part for text in texts for part in text.split("\n\n") if len(part.split()) > 30][:5000]
    documents = [text for each in find_benchmarks(cfg.documents)[0] for _, text in each.items()] \
        if cfg.documents else paragraphs
    with tempfile.TemporaryDirectory() as folder:
        source, held = Path(folder) / "texts.jsonl", Path(folder) / "held.jsonl"
        for path, content in ((source, texts), (held, paragraphs[::10])):
            path.write_text("".join(json.dumps({"text": text}) + "\n" for text in content), encoding="utf-8")
        Tokenizer.train(texts, cfg.vocab_size).save(folder)
        sets = cfg.sets or str(held)
        begin = time.process_time()
        index = Index([(each.name, list(each.items())) for each in find_benchmarks(sets)[0]])
        seconds = time.process_time() - begin

        def whole(*words: str) -> None:
            with tempfile.TemporaryDirectory(dir=folder) as out:
                subprocess.run([sys.executable, "prepare.py", f"--source={source}", f"--tokenizer={folder}",
                                f"--out={out}", "--num_proc=1", "--val_fraction=0", *words],
                               check=True, capture_output=True)

        batches = [documents[at:at + BATCH] for at in range(0, len(documents), BATCH)]
        figures = interleaved({
            "prepare.py": whole,
            "prepare.py, decontaminated": lambda: whole(f"--decontaminate={sets}"),
            "MinHash of whole documents": lambda: [by_minhash(index, batch) for batch in batches],
            "all of the search": lambda: [index.find(batch) for batch in batches]}, cfg.rounds)
    return {"megabytes": sum(len(text.encode()) for text in texts) / 1e6, "documents": len(documents),
            "words_a_document": len(words_of(documents).begins) / len(documents),
            "items": len(index.places), "index_seconds": seconds, "index_megabytes": index.megabytes(),
            "arms": figures}


def report(figures: dict[str, Any]) -> str:
    """The index; a line for each way to prepare, in MB/s; a line for each search, in documents a second."""
    lines = [f"{figures['items']:,} items indexed in {figures['index_seconds']:.1f} s of CPU time, "
             f"{figures['index_megabytes']:,.0f} MB", f"{'':32} {'wall':>10} {'(min - max)':>21} {'cpu':>10}"]
    for number, (name, arm) in enumerate(figures["arms"].items()):
        work, unit = (figures["megabytes"], "MB/s") if number < 2 else (figures["documents"], "documents/s")
        rates = {clock: [work / value for value in values] for clock, values in arm.items()}
        digits = 1 if number < 2 else 0
        spread = f"({min(rates['wall']):,.{digits}f} - {max(rates['wall']):,.{digits}f})"
        lines.append(f"{name:32} {statistics.median(rates['wall']):10,.{digits}f} {spread:>21} "
                     f"{statistics.median(rates['cpu']):10,.{digits}f} {unit}")
    return "\n".join([*lines, f"a document has {figures['words_a_document']:.0f} words on average"])
