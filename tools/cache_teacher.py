"""Store a teacher's predictions for every training token of a data set, for distill.py --cache=.

    python -m tools.cache_teacher --teacher=out/base --dataset=pystdlib --method=sample
    python -m tools.cache_teacher --teacher=Qwen/Qwen3-1.7B --dataset=books --block_size=1024 --method=topk
    python distill.py --cache=sample

The teacher reads the data once, for any number of students. Writes data/<name>/teacher_<hash>/
(distillation/teacher_cache.py). If it is killed, the same command continues and loses one shard at most. If
the cache is complete, the same command verifies it.
"""

import shutil
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import torch

from configurator import ProgressBar, UserError, configure, require, require_positive, run_script
from dataset.chat_rows import ChatRows, row_class
from dataset.dataloader import Rows, parse_mix, text_batch
from dataset.shards import DataFolder
from distillation.alignment import AlignedRows, Aligner
from distillation.divergences import DenseTeacher
from distillation.teacher import context_of, load_teacher
from distillation.teacher_cache import CacheSpec, CacheWriter, RunTeacher, identity_of, verify
from formats import hf
from formats.hf import model_sha256
from formats.tokenizer import Tokenizer
from modeling.devices import pick_device, pick_dtype, to_device


@dataclass(frozen=True, kw_only=True)
class CacheConfig:
    teacher: str = "out/base"  # model folder, out_dir (its best checkpoint, else the last) or hub id
    dataset: str = "pystdlib"  # folders under data/ (or paths), separated by commas
    block_size: int = 128  # tokens per row, as in distill.py
    method: Literal["topk", "sample"] = "sample"  # store the most likely tokens, or samples from the teacher
    k: int | None = None  # tokens stored per position; None is 64 for topk, 32 for sample
    values: Literal["float32", "float16"] = "float16"  # dtype of the log-probabilities of topk
    temperature: float = 1.0  # of the teacher, as in distill.py
    packing: bool = True  # chats: several conversations per row, as in distill.py
    document_mask: bool = False  # text: attend within documents only, as in distill.py
    align: Literal["ids", "bytes"] = "ids"  # bytes: the teacher has another tokenizer, as in distill.py
    batch_size: int = 16  # rows that the teacher reads together
    device: str | None = None  # cpu, cuda, mps; None is the best one available
    dtype: Literal["float32", "bfloat16"] | None = None  # of the teacher's weights; None is bfloat16 on cuda

    def __post_init__(self) -> None:
        require_positive(self, "block_size", "k", "temperature", "batch_size")
        require(self, "k", (self.k or 0) <= 1024 or self.method == "topk",
                "at most 1,024 with method=sample (32 are enough; they cost time and disk)")
        if self.align == "bytes" and self.method == "sample":
            raise UserError("align=bytes: does not work with method=sample; use --method=topk")

    @property
    def spec(self) -> CacheSpec:
        if self.method == "sample":
            return CacheSpec(self.method, self.temperature, self.k or 32)
        return CacheSpec(self.method, self.temperature, self.k or 64, self.values)


def teacher_of_rows(cfg: CacheConfig, rows: Rows | ChatRows) -> RunTeacher:
    """Load the teacher. Returns a function that lets it read rows, by their numbers."""
    tokenizer, folder = Tokenizer.load(rows.data.folder), hf.find_folder(cfg.teacher)
    device, aligner = pick_device(cfg.device), None
    own_tokenizer = Tokenizer.load(folder) if cfg.align == "bytes" else tokenizer
    teacher = load_teacher(cfg.teacher, own_tokenizer, device, pick_dtype(cfg.dtype, device), cfg.block_size)
    if cfg.align == "bytes":
        aligner = Aligner(tokenizer, folder, context_of(teacher), device)
    eot_id, prefix = tokenizer.eot_id if cfg.document_mask else None, "teacher_" if aligner else ""

    @torch.inference_mode()
    def run_teacher(numbers: np.ndarray) -> DenseTeacher | AlignedRows:
        values = rows.read(numbers)
        if values.ndim == 3:  # chats, (n, 3, T): inputs, targets, conversations
            batch = dict(zip(("input_ids", "targets", "document_ids"), torch.from_numpy(values).unbind(1),
                             strict=True))
            if not cfg.packing:
                del batch["document_ids"]
        else:  # text, (n, T + 1)
            batch = text_batch(values, eot_id)
        batch = to_device(aligner.align(batch) if aligner else batch, device)
        hidden, weight = teacher(batch[f"{prefix}input_ids"], head=lambda *result: result,
                                 document_ids=batch.get(f"{prefix}document_ids"))
        if aligner is None:
            return DenseTeacher(hidden.flatten(0, 1), weight)  # (n T, C)
        return AlignedRows(aligner.translated(batch, hidden, weight), batch["kinds"])

    return run_teacher


def write_cache(cfg: CacheConfig, path: Path) -> None:
    """Write the cache of one data folder, or verify it if it is complete."""
    data = DataFolder(path)
    rows = row_class(data, cfg.packing)(data, "train", cfg.block_size)
    identity = identity_of(rows, model_sha256(hf.find_folder(cfg.teacher)), cfg.document_mask, cfg.align)
    writer = CacheWriter(rows, cfg.spec, identity)
    done, start = writer.done, time.perf_counter()
    free = shutil.disk_usage(writer.folder).free
    print(f"disk      needs {writer.need / 1e6:,.1f} MB, {free / 1e6:,.0f} MB are free")
    text = f"{writer.folder}: {len(rows) * rows.T:,} tokens, {writer.dtype.itemsize} bytes each"
    if done == len(rows):
        verify(writer.folder)
        print(f"{text}; verified")
        return
    with ProgressBar(total=len(rows), initial=done, unit="row") as bar:
        writer.fill(teacher_of_rows(cfg, rows), cfg.batch_size, bar.update)
    tokens, seconds = (len(rows) - done) * rows.T, time.perf_counter() - start
    print(f"{text}, {tokens / seconds:,.0f} tokens/s")


def main(argv: list[str]) -> None:
    cfg, _ = configure(CacheConfig, argv, usage=__doc__)
    for path, _ in parse_mix(cfg.dataset):
        write_cache(cfg, path)


if __name__ == "__main__":
    run_script(main)
