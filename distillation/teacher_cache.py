"""What a teacher says of each training token, on disk beside the data: read instead of asked.

    data/pystdlib/teacher_1f0c9a7be2d4/   meta.json   train_00000.cache ...

    writer = CacheWriter(rows, spec, identity); writer.fill(ask)        # tools/cache_teacher.py
    cache = TeacherCache(rows, identity, "sample", temperature=1.0, hint="how to make it")
    found = cache.decoded(np.stack([cache.read(row) for row in indices]))

A record belongs to an input position of a row and has a fixed width, so a row is found by its number: a
memory-mapped array (rows, T, bytes). topk: the k likeliest ids, their log-probabilities, and that of all
others together; renormalising k probabilities without the others would teach too much certainty. sample: ids
drawn from the teacher, 2 bytes each; their shares estimate its probabilities without bias (Random Sampling
KD, arXiv 2503.16870). A cache is for one teacher, one data set, one row length and one temperature, and is
named by the hash of them: another is not found.
"""

import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from configurator import UserError
from distillation.divergences import DenseTeacher
from formats.files import HashedFile, file_sha256, lock_path, sync_folder, write_json
from training.losses import chunk_rows

VERSION = 1
STEPS_A_NAT = 16  # of a log-probability in 8 bits: from 0 to -15.9 nats


@dataclass(frozen=True)
class CacheSpec:
    """How a position's record is made."""

    method: Literal["topk", "sample"]
    temperature: float
    k: int = 64  # tokens kept, or drawn
    values: Literal["float32", "float16", "uint8"] = "float16"  # of log-probabilities; samples have none


def identity_of(rows: Any, teacher_hash: str, document_mask: bool) -> dict[str, Any]:
    """What a cache follows from, besides its spec: the teacher's weights, the data, and how rows are cut."""
    return {"version": VERSION, "teacher": teacher_hash, "data": file_sha256(rows.data.folder / "meta.json"),
            "rows": type(rows).__name__, "block_size": rows.T, "document_mask": document_mask}


def cache_folder(rows: Any, identity: dict[str, Any]) -> Path:
    digest = hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()
    return rows.data.folder / f"teacher_{digest[:12]}"


class Records:
    """The layout of a record: ids, and what belongs to them, as bytes."""

    def __init__(self, spec: CacheSpec, vocab_size: int):
        self.spec, self.k = spec, min(spec.k, vocab_size) if spec.method == "topk" else spec.k
        self.ids = np.dtype("<u2" if vocab_size <= 2**16 else "<u4")
        self.values = np.dtype(spec.values).newbyteorder("<")
        self.width = self.k * self.ids.itemsize
        if spec.method == "topk":
            self.width += (self.k + 1) * self.values.itemsize

    def encode(self, log_probs: Tensor, generator: torch.Generator | None) -> np.ndarray:
        """The teacher's log-probabilities (n, V) float32 at the cache's temperature -> (n, width) uint8."""
        if self.spec.method == "sample":
            drawn = torch.multinomial(log_probs.exp(), self.k, replacement=True, generator=generator)
            return as_bytes(drawn.cpu().numpy().astype(self.ids))
        top, ids = log_probs.topk(self.k, dim=-1)  # (n, k) both
        rest = log_probs.exp().scatter(1, ids, 0.0).sum(-1, keepdim=True).log()  # (n, 1), -inf for k = V
        logs = torch.cat((top, rest), dim=1).cpu().numpy()
        if self.spec.values == "uint8":
            logs = np.clip(np.round(-STEPS_A_NAT * logs), 0, 255)
        return np.concatenate((as_bytes(ids.cpu().numpy().astype(self.ids)),
                               as_bytes(logs.astype(self.values))), axis=1)

    def decode(self, records: np.ndarray) -> dict[str, Tensor]:
        """(n, width) -> {"teacher_ids": (n, k) int64, "teacher_probs": (n, k) float32}, and of topk
        "teacher_tail": (n,) float32."""
        split = self.k * self.ids.itemsize
        ids = np.ascontiguousarray(records[:, :split]).view(self.ids).astype(np.int64)
        if self.spec.method == "sample":
            return {"teacher_ids": torch.from_numpy(ids),
                    "teacher_probs": torch.full(ids.shape, 1 / self.k)}
        logs = np.ascontiguousarray(records[:, split:]).view(self.values).astype(np.float32)
        probs = torch.from_numpy(logs / -STEPS_A_NAT if self.spec.values == "uint8" else logs).exp()
        if self.spec.values == "uint8":
            probs = probs / probs.sum(-1, keepdim=True)  # steps of 1/16 nat do not sum to 1; all k + 1 do now
        return {"teacher_ids": torch.from_numpy(ids), "teacher_probs": probs[:, :-1].contiguous(),
                "teacher_tail": probs[:, -1].contiguous()}


def as_bytes(values: np.ndarray) -> np.ndarray:
    """(n, m) of any dtype -> (n, bytes) uint8."""
    return np.ascontiguousarray(values).view(np.uint8)


class CacheWriter:
    """Makes the cache of one split's rows, shard by shard; begun anew, it goes on behind the last one."""

    def __init__(self, rows: Any, spec: CacheSpec, identity: dict[str, Any], rows_a_shard: int | None = None):
        """rows_a_shard: None: some 256 MiB. Raises UserError where the disk has not the room."""
        self.rows, self.spec = rows, spec
        self.identity = identity | asdict(spec)
        self.folder = cache_folder(rows, self.identity)
        self.records = Records(spec, rows.data.meta["vocab_size"])
        self.row_bytes = rows.T * self.records.width
        self.rows_a_shard = rows_a_shard or max(1, 2**28 // self.row_bytes)
        self.folder.mkdir(exist_ok=True)
        self.meta = {"identity": self.identity, "rows": len(rows), "bytes_a_token": self.records.width,
                     "shards": []}
        if (self.folder / "meta.json").is_file():
            self.meta["shards"] = read_meta(self.folder)["shards"]
            require_shards(self.folder, self.meta)
        self.done = sum(shard["rows"] for shard in self.meta["shards"])
        self.lock = lock_path(self.folder)
        if self.lock is None:
            raise UserError(f"{self.folder}: another process is caching there")
        need, free = (len(rows) - self.done) * self.row_bytes, shutil.disk_usage(self.folder).free
        if need > free:
            raise UserError(f"{self.folder}: needs {need / 1e9:,.1f} GB, the disk has {free / 1e9:,.1f} free")

    def fill(self, ask: Callable[[np.ndarray], DenseTeacher], batch_size: int,
             progress: Callable[[int], None] = lambda rows: None) -> None:
        """ask(row numbers (n,)) -> the teacher at the n T positions of those rows. progress: told of rows
        done."""
        try:
            self.write(ask, batch_size, progress)
        finally:
            os.close(self.lock)

    def write(self, ask: Callable[[np.ndarray], DenseTeacher], batch_size: int,
              progress: Callable[[int], None]) -> None:
        """`fill`, in the folder that this process holds."""
        while self.done < len(self.rows):
            last = min(len(self.rows), self.done + self.rows_a_shard)
            name = f"train_{len(self.meta['shards']):05d}.cache"
            beside = self.folder / f"{name}.tmp"
            file = HashedFile(beside)
            for begin in range(self.done, last, batch_size):
                numbers = np.arange(begin, min(begin + batch_size, last))
                teacher = ask(numbers)
                for place, number in enumerate(numbers):
                    for part in self.encoded(teacher, place, int(number)):
                        file.write(part)
                progress(len(numbers))
            digest = file.close()
            beside.replace(self.folder / name)
            sync_folder(self.folder)
            self.meta["shards"].append({"name": name, "rows": last - self.done, "sha256": digest})
            write_json(self.folder / "meta.json", self.meta)
            self.done = last


    def encoded(self, teacher: DenseTeacher, place: int, number: int) -> Iterator[np.ndarray]:
        """The records of row `number`, which is the place-th that the teacher has read, chunk by chunk."""
        generator = torch.Generator(teacher.hidden.device).manual_seed(number)
        V, end = self.rows.data.meta["vocab_size"], (place + 1) * self.rows.T
        step = chunk_rows(teacher.hidden, V)
        for start in range(place * self.rows.T, end, step):
            logits = teacher.logits(slice(start, min(start + step, end)), V)  # (n, V), never (B T, V)
            log_probs = (logits / self.spec.temperature).log_softmax(-1)
            yield self.records.encode(log_probs, generator)


def read_meta(folder: Path) -> dict[str, Any]:
    """A cache's meta.json. UserError for one that is damaged."""
    try:
        meta = json.loads((folder / "meta.json").read_text(encoding="utf-8"))
        shard_sizes(folder, meta)
        Records(spec_of(meta), 2)
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"{folder / 'meta.json'}: damaged ({type(error).__name__}: {error}); delete {folder} "
                        "and cache anew") from None
    return meta


def shard_sizes(folder: Path, meta: dict[str, Any]) -> dict[Path, int]:
    """{shard: its bytes}."""
    row_bytes = meta["identity"]["block_size"] * meta["bytes_a_token"]
    return {folder / shard["name"]: shard["rows"] * row_bytes for shard in meta["shards"]}


def require_shards(folder: Path, meta: dict[str, Any]) -> None:
    """UserError for a shard that is missing, or has another size."""
    for path, size in shard_sizes(folder, meta).items():
        if not path.is_file() or path.stat().st_size != size:
            raise UserError(f"{path}: missing, or not of {size:,} bytes; delete {folder} and cache anew")


def spec_of(meta: dict[str, Any]) -> CacheSpec:
    return CacheSpec(**{key: meta["identity"][key] for key in CacheSpec.__dataclass_fields__})


class TeacherCache:
    """A finished cache of one data folder's training rows."""

    def __init__(self, rows: Any, identity: dict[str, Any], method: str, temperature: float, hint: str):
        """identity: `identity_of` the rows. hint: the command that would make it. UserError if there is none.
        """
        wanted = identity | {"method": method, "temperature": temperature}
        found, others, damaged = [], [], ""
        for folder in sorted(rows.data.folder.glob("teacher_*")):
            if not (folder / "meta.json").is_file():
                continue
            try:
                meta = read_meta(folder)
            except UserError as error:  # which matters only where it may be the one that is looked for
                damaged += f"; {error}"
                continue
            differs = [key for key, value in wanted.items() if meta["identity"].get(key) != value]
            (others if differs else found).append((folder, meta, differs))
        whole = [each for each in found if sum(shard["rows"] for shard in each[1]["shards"]) == len(rows)]
        if len(whole) > 1:
            raise UserError(f"cache={method}: {', '.join(str(folder) for folder, *_ in whole)} all fit; "
                            "delete those that are not meant")
        if not found:
            near = "".join(f"; {folder.name} is of another {', '.join(differs)}"
                           for folder, _, differs in others[:3])
            raise UserError(f"cache={method}: none in {rows.data.folder} for this teacher, data, block_size "
                            f"and temperature{near}{damaged}. Make it: {hint}")
        self.folder, meta, _ = (whole or found)[0]
        require_shards(self.folder, meta)
        spec = spec_of(meta)
        if not whole:
            done = sum(shard["rows"] for shard in meta["shards"])
            raise UserError(f"{self.folder}: has {done:,} of {len(rows):,} rows; the same command goes on: "
                            f"{hint} --k={spec.k} --values={spec.values}")
        self.records = Records(spec, rows.data.meta["vocab_size"])
        width = self.records.width
        self.shards = [np.memmap(self.folder / shard["name"], np.uint8, "r").reshape(-1, rows.T, width)
                       for shard in meta["shards"]]
        self.ends = np.cumsum([len(shard) for shard in self.shards])

    def read(self, row: int) -> np.ndarray:
        """A row's records, (T, width) uint8."""
        shard = int(np.searchsorted(self.ends, row, side="right"))
        return self.shards[shard][row - (self.ends[shard - 1] if shard else 0)]

    def decoded(self, records: np.ndarray) -> dict[str, Tensor]:
        return self.records.decode(records)


def verify(folder: Path) -> None:
    """Compare every shard of a cache with its sha256. UserError for the first that differs."""
    meta = read_meta(folder)
    require_shards(folder, meta)
    for shard in meta["shards"]:
        if file_sha256(folder / shard["name"]) != shard["sha256"]:
            raise UserError(f"{folder / shard['name']}: content does not match its sha256; delete {folder} "
                            "and cache anew")
