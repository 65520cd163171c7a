"""A teacher's cache on disk: our shards beside HDF5 with gzip, in bytes a token and in time.

    pip install h5py==3.16.0
    python -m bench cache --teacher=out/base --json=docs/results/bench_cache.json

The k likeliest tokens at every position of some rows, once as distillation/teacher_cache.py writes and
reads them, once as two HDF5 arrays, ids and log-probabilities, with a chunk a row: plain, with gzip, and
with gzip behind HDF5's byte shuffle, which compresses best. That all give back the same bytes is checked
first. Reading is a batch of random rows, decoded as training needs it, from the page cache; writing ends
with the file closed, of ours also hashed and on the disk. Our two smaller formats, 8 bits and samples, have
no twin."""

import shutil
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from bench.measure import PeerConfig, baselines, interleaved, row, start, table
from configurator import UserError
from dataset.dataloader import Rows, dataset_folder, text_batch
from dataset.shards import DataFolder
from distillation.divergences import DenseTeacher
from distillation.teacher import load_teacher
from distillation.teacher_cache import CacheSpec, CacheWriter, TeacherCache, identity_of
from formats.files import HashedFile
from formats.tokenizer import Tokenizer

GZIP = {"HDF5": {}, "HDF5, gzip": {"compression": "gzip"},  # level 4, h5py's default
        "HDF5, shuffle, gzip": {"compression": "gzip", "shuffle": True}}


@dataclass(frozen=True, kw_only=True)
class Config(PeerConfig):
    teacher: str = "out/base"  # model folder or out_dir
    dataset: str = "pystdlib"  # folder of text under data/ (or path)
    block_size: int = 128  # tokens a row
    rows: int = 256  # rows that are cached
    batch_size: int = 16  # rows that are read together
    k: int = 64  # tokens kept


def measure(cfg: Config) -> dict[str, Any]:
    """Make the caches, check that they agree, then write and read in turn."""
    try:
        import h5py
    except ImportError:
        raise UserError("cache: the peer needs h5py (pip install h5py)") from None
    device = start(cfg)[0]
    with tempfile.TemporaryDirectory() as scratch:
        caches = our_caches(cfg, Path(scratch))
        whole = np.stack([caches["ours"].read(each) for each in range(cfg.rows)])  # (rows, T, width) uint8
        arrays = split(whole, caches["ours"])
        files = {name: Path(scratch) / f"{number}.h5" for number, name in enumerate(GZIP)}
        for name, path in files.items():
            write_hdf5(path, arrays, GZIP[name])
        opened = {name: h5py.File(path) for name, path in files.items()}
        check(opened, arrays)
        timings = {"reading": interleaved(reading(cfg, caches, opened), cfg.rounds, device, cfg.seconds),
                   "writing": interleaved(writing(Path(scratch) / "again", whole, arrays), cfg.rounds, device,
                                          cfg.seconds)}
        tokens = cfg.rows * cfg.block_size
        size = {name: cache.records.width for name, cache in caches.items()}
        size |= {name: path.stat().st_size / tokens for name, path in files.items()}
    return {"rows": cfg.rows, "block_size": cfg.block_size, "batch_size": cfg.batch_size, "k": cfg.k,
            "h5py": h5py.__version__, "bytes_a_token": size,
            **{kind: [row(name, "float16", timing, baselines(found, "HDF5, gzip"))
                      for name, timing in found.items()] for kind, found in timings.items()}}


def check(opened: dict[str, Any], arrays: dict[str, np.ndarray]) -> None:
    """UserError unless every HDF5 file gives back our bytes."""
    for name, file in opened.items():
        if not all(np.array_equal(file[key][:], array) for key, array in arrays.items()):
            raise UserError(f"{name}: does not give back what was written: nothing to compare")


def reading(cfg: Config, caches: dict[str, TeacherCache], opened: dict[str, Any]) -> dict[str, Callable]:
    """An arm a format: a batch of random rows, decoded."""
    draw = np.random.default_rng(0)

    def numbers() -> np.ndarray:
        return draw.integers(cfg.rows, size=cfg.batch_size)

    arms = {name: lambda cache=cache: read_ours(cache, numbers()) for name, cache in caches.items()}
    return arms | {name: lambda file=file: read_hdf5(file, numbers(), caches["ours"])
                   for name, file in opened.items()}


def writing(path: Path, whole: np.ndarray, arrays: dict[str, np.ndarray]) -> dict[str, Callable]:
    """An arm a format: all rows, into one file."""
    arms: dict[str, Callable] = {"ours": lambda: write_ours(path, whole)}
    return arms | {name: lambda words=words: write_hdf5(path, arrays, words) for name, words in GZIP.items()}


def our_caches(cfg: Config, scratch: Path) -> dict[str, TeacherCache]:
    folder = Path(shutil.copytree(dataset_folder(cfg.dataset), scratch / "data",
                                  ignore=shutil.ignore_patterns("teacher_*")))
    specs = {"ours": CacheSpec("topk", 1.0, cfg.k), "ours, 8 bits": CacheSpec("topk", 1.0, cfg.k, "uint8"),
             "ours, samples": CacheSpec("sample", 1.0, 32)}
    return {name: our_cache(cfg, folder, spec, number) for number, (name, spec) in enumerate(specs.items())}


def our_cache(cfg: Config, folder: Path, spec: CacheSpec, number: int) -> TeacherCache:
    """The first rows of the data set, as tools/cache_teacher.py would cache them."""
    rows, tokenizer = Rows(DataFolder(folder), "train", cfg.block_size), Tokenizer.load(folder)
    rows.ends = np.minimum(rows.ends, cfg.rows)
    if len(rows) < cfg.rows:
        raise UserError(f"rows={cfg.rows}: {cfg.dataset} has {len(rows)} of block_size={cfg.block_size}")
    teacher = load_teacher(cfg.teacher, tokenizer, cfg.device, torch.float32, cfg.block_size)
    identity = identity_of(rows, str(number), False)

    @torch.inference_mode()
    def ask(numbers: np.ndarray) -> DenseTeacher:
        ids = text_batch(rows.read(numbers))["input_ids"].to(cfg.device)
        return teacher(ids, head=lambda hidden, weight: DenseTeacher(hidden.flatten(0, 1), weight))

    CacheWriter(rows, spec, identity).fill(ask, cfg.batch_size)
    return TeacherCache(rows, identity, spec.method, spec.temperature, "")


def split(records: np.ndarray, cache: TeacherCache) -> dict[str, np.ndarray]:
    """Records (..., width) uint8 of the k likeliest -> {"ids": (..., k), "logs": (..., k + 1)}."""
    at = cache.records.k * cache.records.ids.itemsize
    return {"ids": np.ascontiguousarray(records[..., :at]).view(cache.records.ids),
            "logs": np.ascontiguousarray(records[..., at:]).view(cache.records.values)}


def write_ours(path: Path, records: np.ndarray) -> None:
    file = HashedFile(path)
    for each in records:
        file.write(each)
    file.close()


def write_hdf5(path: Path, arrays: dict[str, np.ndarray], words: dict[str, Any]) -> None:
    import h5py
    with h5py.File(path, "w") as file:
        for name, array in arrays.items():
            made = file.create_dataset(name, array.shape, array.dtype, chunks=(1, *array.shape[1:]), **words)
            for number, each in enumerate(array):
                made[number] = each


def read_ours(cache: TeacherCache, numbers: np.ndarray) -> dict[str, torch.Tensor]:
    """As distill.py does."""
    records = np.stack([cache.read(number) for number in numbers])
    return cache.decoded(records.reshape(-1, records.shape[-1]))


def read_hdf5(file: Any, numbers: np.ndarray, cache: TeacherCache) -> dict[str, torch.Tensor]:
    """Row by row, because HDF5's own lists of rows have to be sorted and are slower; decoded as ours."""
    ids, logs = (np.stack([file[key][number] for number in numbers]) for key in ("ids", "logs"))
    flat = [each.reshape(-1, each.shape[-1]).view(np.uint8) for each in (ids, logs)]
    return cache.decoded(np.concatenate(flat, axis=1))


def report(figures: dict[str, Any]) -> str:
    """A table of reading, one of writing, and the bytes."""
    tokens = figures["rows"] * figures["block_size"]
    rows = figures["batch_size"]
    read = table(figures["reading"], "reading, us a row", lambda seconds: 1e6 * seconds / rows)
    write = table(figures["writing"], "writing, ns a token", lambda seconds: 1e9 * seconds / tokens)
    sizes = "   ".join(f"{name} {size:,.1f}" for name, size in figures["bytes_a_token"].items())
    return f"{read}\n\n{write}\n\nbytes a token   {sizes}"
