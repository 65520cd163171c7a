"""A teacher's predictions for every training token, stored next to the data set.

    data/pystdlib/teacher_1f0c9a7be2d4/   meta.json   train_00000.cache ...

    CacheWriter(rows, spec, identity).fill(run_teacher, batch_size)              # tools/cache_teacher.py
    cache = TeacherCache(rows, identity, "sample", temperature=1.0, hint="the command that makes it")
    batch |= decode(np.concatenate([cache.read(row) for row in numbers]))

A record holds the prediction at one input position of one row. All records have the same numpy dtype, so a
shard is a memory-mapped array (rows, T), and a row is found by its number. The two methods:

topk    the ids of the k most likely tokens, their log-probabilities, and the log-probability of all other
        tokens together, which sparse_kl in distillation/divergences.py needs.
sample  the ids of k tokens drawn from the teacher, 2 bytes each (4 for more than 65,536 ids). The share of a
        token among the samples is an unbiased estimate of its probability (Random Sampling KD, arXiv
        2503.16870).

For a teacher with another tokenizer (--align=bytes; topk only), a record begins with one byte: 0 if nothing
is compared here, 1 for groups of the student's tokens, 2 if the target's group is split into its tokens
(distillation/alignment.py). The ids are then the student's.

A cache belongs to one teacher, data set, row length and temperature. The name of its folder is the hash of
these, so a cache is never used for anything else.
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
from distillation.alignment import AlignedRows
from distillation.divergences import DenseTeacher
from formats.files import append, close_new, content_errors, file_sha256, lock_path, sync_folder, write_json
from training.losses import chunk_rows

VERSION = 1
SHARD_BYTES = 2**28  # about 256 MiB

# Row numbers (n,) -> the teacher at the n T positions of these rows.
RunTeacher = Callable[[np.ndarray], DenseTeacher | AlignedRows]


@dataclass(frozen=True)
class CacheSpec:
    """The format of a record."""

    method: Literal["topk", "sample"]
    temperature: float
    k: int = 64  # tokens kept (topk) or drawn (sample)
    values: Literal["float32", "float16"] = "float16"  # dtype of the log-probabilities of topk


def identity_of(rows: Any, teacher_hash: str, document_mask: bool, align: str = "ids") -> dict[str, Any]:
    """What a cache depends on besides its spec: the teacher, the data, and how the data is cut into rows."""
    identity = {"version": VERSION, "teacher": teacher_hash,
                "data": file_sha256(rows.data.folder / "meta.json"),
                "rows": type(rows).__name__, "block_size": rows.T, "document_mask": document_mask}
    # The value names the format of the records, so that older caches of align=bytes do not match.
    return identity | ({} if align == "ids" else {"align": f"{align}, parts"})


# ---- Records ----------------------------------------------------------------------------------------------

def record_type(identity: dict[str, Any], vocab_size: int) -> np.dtype:
    """The dtype of a cache's records: "kind" (only for align=bytes), "ids" (k,) and, for topk, "values"
    (k + 1,)."""
    is_topk = identity["method"] == "topk"
    k = min(identity["k"], vocab_size) if is_topk else identity["k"]
    fields: list[tuple] = [("ids", "<u2" if vocab_size <= 2**16 else "<u4", (k,))]
    if "align" in identity:
        fields.insert(0, ("kind", "u1"))
    if is_topk:
        fields.append(("values", {"float16": "<f2", "float32": "<f4"}[identity["values"]], (k + 1,)))
    return np.dtype(fields)


def encode(log_probs: Tensor, dtype: np.dtype, generator: torch.Generator | None = None) -> np.ndarray:
    """The teacher's log-probabilities, (n, V) float32 at the cache's temperature -> n records, "kind" 0."""
    records = np.zeros(len(log_probs), dtype)
    k = dtype["ids"].shape[0]
    if "values" in (dtype.names or ()):
        top, ids = log_probs.topk(k, dim=-1)  # (n, k) each
        tail = log_probs.exp().scatter(1, ids, 0.0).sum(-1, keepdim=True).log()  # (n, 1), -inf if k = V
        records["values"] = torch.cat((top, tail), dim=1).cpu().numpy()  # (n, k + 1)
    else:
        ids = torch.multinomial(log_probs.exp(), k, replacement=True, generator=generator)  # (n, k)
    records["ids"] = ids.cpu().numpy()
    return records


def decode(records: np.ndarray) -> dict[str, Tensor]:
    """Records (n,) -> {"teacher_ids": (n, k) int64, "teacher_probs": (n, k) float32} and, for topk,
    "teacher_tail": (n,) float32, the probability of all other tokens."""
    ids = torch.from_numpy(records["ids"].astype(np.int64))
    if "values" not in (records.dtype.names or ()):
        return {"teacher_ids": ids, "teacher_probs": torch.full(ids.shape, 1 / ids.shape[1])}
    probs = torch.from_numpy(records["values"].astype(np.float32)).exp()  # (n, k + 1)
    return {"teacher_ids": ids, "teacher_probs": probs[:, :-1].contiguous(),
            "teacher_tail": probs[:, -1].contiguous()}


# ---- meta.json --------------------------------------------------------------------------------------------

def rows_done(meta: dict[str, Any]) -> int:
    return sum(shard["rows"] for shard in meta["shards"])


def read_meta(folder: Path) -> dict[str, Any]:
    """The meta.json of a cache. Raises UserError if it is damaged, or if a shard has another size than it
    states."""
    with content_errors(folder / "meta.json", f"damaged; delete {folder} and cache again"):
        meta = json.loads((folder / "meta.json").read_text(encoding="utf-8"))
        record_type(meta["identity"], 2)
        row_bytes = meta["identity"]["block_size"] * meta["bytes_a_token"]
        for shard in meta["shards"]:
            path, size = folder / shard["name"], shard["rows"] * row_bytes
            if not path.is_file() or path.stat().st_size != size:
                raise UserError(f"{path}: missing, or not {size:,} bytes long; delete {folder} and cache "
                                "again")
    return meta


def verify(folder: Path) -> None:
    """Raises UserError if the content of a shard does not match its sha256."""
    for shard in read_meta(folder)["shards"]:
        if file_sha256(folder / shard["name"]) != shard["sha256"]:
            raise UserError(f"{folder / shard['name']}: content does not match its sha256; delete {folder} "
                            "and cache again")


# ---- Writing ----------------------------------------------------------------------------------------------

class CacheWriter:
    """Makes the cache of a data folder's training rows, shard by shard.

    meta.json is replaced after each shard. So a writer that is killed loses one shard at most, and a new one
    with the same arguments continues after the last complete shard.
    """

    def __init__(self, rows: Any, spec: CacheSpec, identity: dict[str, Any]):
        """Locks the cache's folder until `fill` returns. Raises UserError if another process has locked it,
        or if the disk has too little space."""
        self.rows, self.spec = rows, spec
        identity = identity | asdict(spec)
        digest = hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()
        self.folder = rows.data.folder / f"teacher_{digest[:12]}"
        self.V = rows.data.meta["vocab_size"]
        self.dtype = record_type(identity, self.V)
        row_bytes = rows.T * self.dtype.itemsize
        self.rows_per_shard = max(1, SHARD_BYTES // row_bytes)
        self.folder.mkdir(exist_ok=True)
        self.meta: dict[str, Any] = {"identity": identity, "rows": len(rows),
                                     "bytes_a_token": self.dtype.itemsize, "shards": []}
        if (self.folder / "meta.json").is_file():
            self.meta["shards"] = read_meta(self.folder)["shards"]
        lock = lock_path(self.folder)
        if lock is None:
            raise UserError(f"{self.folder}: another process is writing this cache")
        self.lock = lock
        free = shutil.disk_usage(self.folder).free
        self.need = (len(rows) - self.done) * row_bytes  # bytes
        if self.need > free:
            raise UserError(f"{self.folder}: needs {self.need / 1e9:,.1f} GB, the disk has {free / 1e9:,.1f} "
                            "free")

    @property
    def done(self) -> int:
        """Rows in complete shards."""
        return rows_done(self.meta)

    def fill(self, run_teacher: RunTeacher, batch_size: int,
             progress: Callable[[int], None] = lambda rows: None) -> None:
        """Write all shards that are missing, and release the lock.

        run_teacher: row numbers (n,) -> the teacher at the n T positions of these rows. progress is called
        after each batch with its number of rows.
        """
        try:
            while self.done < len(self.rows):
                self.write_shard(run_teacher, batch_size, progress)
        finally:
            os.close(self.lock)

    def write_shard(self, run_teacher: RunTeacher, batch_size: int, progress: Callable[[int], None]) -> None:
        """Write the next shard under a temporary name, rename it, and enter it in meta.json."""
        first, last = self.done, min(len(self.rows), self.done + self.rows_per_shard)
        name = f"train_{len(self.meta['shards']):05d}.cache"
        temporary = self.folder / f"{name}.tmp"
        file = open(temporary, "wb")
        for begin in range(first, last, batch_size):
            numbers = np.arange(begin, min(begin + batch_size, last))
            teacher = run_teacher(numbers)
            for place, number in enumerate(numbers):
                for records in self.encode_row(teacher, place, int(number)):
                    append(file, records)
            progress(len(numbers))
        digest = close_new(file)
        temporary.replace(self.folder / name)
        sync_folder(self.folder)
        self.meta["shards"].append({"name": name, "rows": last - first, "sha256": digest})
        write_json(self.folder / "meta.json", self.meta)

    def encode_row(self, teacher: DenseTeacher | AlignedRows, place: int,
                   number: int) -> Iterator[np.ndarray]:
        """The records of row `number`, chunk by chunk; the row is at index `place` of the teacher's batch."""
        # The samples depend on the row alone, so a cache has the same bytes for any batch and shard size.
        generator = torch.Generator(teacher.hidden.device).manual_seed(number)
        end, step = (place + 1) * self.rows.T, chunk_rows(teacher.hidden, self.V)
        for start in range(place * self.rows.T, end, step):
            chunk = slice(start, min(start + step, end))
            log_probs = teacher.log_probs(chunk, self.V, self.spec.temperature)  # (n, V), never (B T, V)
            records = encode(log_probs, self.dtype, generator)
            if isinstance(teacher, AlignedRows):
                records["kind"] = teacher.kinds[chunk]
            yield records


# ---- Reading ----------------------------------------------------------------------------------------------

def find_cache(rows: Any, wanted: dict[str, Any], hint: str) -> tuple[Path, dict[str, Any]]:
    """The folder and the meta.json of the complete cache that has the `wanted` identity.

    Raises UserError if there is none, or more than one. The message names up to three caches that do not fit.
    """
    matches, others = [], []
    for folder in sorted(path.parent for path in rows.data.folder.glob("teacher_*/meta.json")):
        try:
            meta = read_meta(folder)
        except UserError as error:  # a damaged cache matters only if no other one matches
            others.append(str(error))
            continue
        identity, done = meta["identity"], rows_done(meta)
        if differs := [key for key in (*wanted, "align") if identity.get(key) != wanted.get(key)]:
            others.append(f"{folder.name} has another {', '.join(differs)}")
        elif done < len(rows):
            others.append(f"{folder.name} (--k={identity['k']} --values={identity['values']}) has {done:,} "
                          f"of {len(rows):,} rows")
        else:
            matches.append((folder, meta))
    if not matches:
        notes = "; ".join([f"none in {rows.data.folder}", *others[:3]])
        raise UserError(f"cache={wanted['method']}: {notes}. Make it: {hint}")
    if len(matches) > 1:
        names = ", ".join(str(folder) for folder, _ in matches)
        raise UserError(f"cache={wanted['method']}: {names} all match; delete all but one")
    return matches[0]


class TeacherCache:
    """A complete cache of one data folder's training rows."""

    def __init__(self, rows: Any, identity: dict[str, Any], method: str, temperature: float, hint: str):
        """identity: `identity_of` the rows. hint: the command that makes the cache, for the error message.

        Raises UserError if no cache matches.
        """
        wanted = identity | {"method": method, "temperature": temperature}
        self.folder, meta = find_cache(rows, wanted, hint)
        self.dtype = record_type(meta["identity"], rows.data.meta["vocab_size"])
        # (rows of the shard, T) each
        self.shards = [np.memmap(self.folder / shard["name"], self.dtype, "r").reshape(-1, rows.T)
                       for shard in meta["shards"]]
        self.ends = np.cumsum([len(shard) for shard in self.shards])  # rows up to the end of each shard

    def read(self, row: int) -> np.ndarray:
        """The records of a row, (T,)."""
        shard = int(np.searchsorted(self.ends, row, side="right"))
        return self.shards[shard][row - (self.ends[shard - 1] if shard else 0)]
