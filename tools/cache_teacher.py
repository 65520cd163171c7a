"""Write down what a teacher says of every training token of a data set, for distill.py --cache=.

    python -m tools.cache_teacher --teacher=out/base --dataset=pystdlib --method=sample
    python -m tools.cache_teacher --teacher=Qwen/Qwen3-1.7B --dataset=books --block_size=1024 --method=topk
    python distill.py --cache=sample

One pass of the teacher over the data, once, for any number of students. Writes data/<name>/teacher_<hash>/
(distillation/teacher_cache.py); killed, the same command goes on and loses one shard at the most; finished,
it verifies what is there."""

import sys
import time
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from tqdm import tqdm

from configurator import UserError, configure, require_positive, run_script
from dataset.chat_rows import ChatRows, UnpackedChatRows
from dataset.dataloader import Rows, parse_mix, text_batch
from dataset.shards import DataFolder
from distillation.divergences import DenseTeacher
from distillation.teacher import load_teacher
from distillation.teacher_cache import CacheSpec, CacheWriter, identity_of, verify
from formats import hf
from formats.hf import teacher_sha256
from formats.tokenizer import Tokenizer
from modeling.devices import DTYPES, pick_device


@dataclass(frozen=True, kw_only=True)
class CacheConfig:
    teacher: str = "out/base"  # model folder, out_dir (its best checkpoint, else the last) or hub id
    dataset: str = "pystdlib"  # folders under data/ (or paths), with commas between
    block_size: int = 128  # tokens of a row, as distill.py will read them
    method: Literal["topk", "sample"] = "sample"  # the likeliest tokens and the rest's mass, or samples
    k: int | None = None  # tokens kept, or drawn; None: 64 kept, 32 drawn
    values: Literal["float32", "float16", "uint8"] = "float16"  # topk: of the log-probabilities
    temperature: float = 1.0  # that of the distillation
    packing: bool = True  # of chats, as distill.py will
    document_mask: bool = False  # of text, as distill.py will
    batch_size: int = 16  # rows the teacher reads together
    device: str | None = None  # cpu, cuda, mps; None: the best there is
    dtype: Literal["float32", "bfloat16"] | None = None  # of the teacher's weights; None: bfloat16 on cuda

    def __post_init__(self) -> None:
        require_positive(self, "block_size", "k", "temperature", "batch_size")

    @property
    def spec(self) -> CacheSpec:
        k = self.k or {"topk": 64, "sample": 32}[self.method]
        values = self.values if self.method == "topk" else "float16"  # samples have none
        return CacheSpec(self.method, self.temperature, k, values)


def write_cache(cfg: CacheConfig, folder: DataFolder) -> None:
    """The cache of one data folder, made or verified."""
    kind = {"text": Rows, "chat": ChatRows if cfg.packing else UnpackedChatRows}.get(folder.meta["kind"])
    if kind is None:
        raise UserError(f"{folder.folder}: holds {folder.meta['kind']} rows; a teacher reads text or chats")
    rows, tokenizer = kind(folder, "train", cfg.block_size), Tokenizer.load(folder.folder)
    hash_ = teacher_sha256(hf.find_folder(cfg.teacher))
    identity = identity_of(rows, hash_, cfg.document_mask)
    writer = CacheWriter(rows, cfg.spec, identity)
    begun, start = writer.done, time.perf_counter()
    if begun < len(rows):
        device = pick_device(cfg.device)
        dtype = cfg.dtype or ("bfloat16" if device.type == "cuda" else "float32")
        teacher = load_teacher(cfg.teacher, tokenizer, device, DTYPES[dtype], cfg.block_size)
        eot_id = tokenizer.eot_id if cfg.document_mask else None

        @torch.inference_mode()
        def ask(numbers: np.ndarray) -> DenseTeacher:
            read = rows.read(numbers)
            if read.ndim == 3:  # (n, 3, T): inputs, targets, conversations
                ids, documents = torch.from_numpy(read[:, 0]), torch.from_numpy(read[:, 2])
                documents = documents if cfg.packing else None
            else:
                batch = text_batch(read, eot_id)
                ids, documents = batch["input_ids"], batch.get("document_ids")
            documents = None if documents is None else documents.to(device)
            return teacher(ids.to(device), document_ids=documents,
                           head=lambda hidden, weight: DenseTeacher(hidden.flatten(0, 1), weight))

        with tqdm(total=len(rows), initial=begun, unit="row", disable=not sys.stderr.isatty()) as bar:
            writer.fill(ask, cfg.batch_size, bar.update)
    else:
        verify(writer.folder)
    tokens, seconds = (len(rows) - begun) * rows.T, time.perf_counter() - start
    print(f"{writer.folder}: {len(rows) * rows.T:,} tokens, {writer.records.width} bytes each"
          + (f", {tokens / seconds:,.0f} tokens/s" if tokens else "; verified"))


def main(argv: list[str]) -> int:
    cfg, _ = configure(CacheConfig, argv, usage=__doc__)
    for path, _ in parse_mix(cfg.dataset):
        write_cache(cfg, DataFolder(path))
    return 0


if __name__ == "__main__":
    run_script(main)
