"""A data folder on disk: raw shards of token ids, and meta.json, which describes them.

    writers = open_writers(folder, tokenizer.vocab_size, masked=False)     # {"train": ShardWriter, "val": ..}
    writers["train"].write(ids, byte_count)                                # one document
    describe(writers, "text", tokenizer, "gpt2")                           # closes them; for meta.json
    data = DataFolder("data/pystdlib")                                     # checks names and sizes
    data.shards["train"][0]                                                # np.memmap of ids
    data.verify()                                                          # checks every byte, by sha256

A shard such as train_00000.bin holds little-endian ids without a header, so np.memmap alone reads it. Every
document ends with an end-of-text token. In a folder of chats or preferences, each shard has a second file
that ends in .mask, with one uint8 per token:

    kind          0                  1                      2                   3
    chat          not trained on     an assistant's token                       after a document
    preference    prompt             chosen answer          rejected answer     after a document

meta.json is written last, by rename. A folder without it is not a data set.
"""

import json
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from configurator import UserError
from formats.files import append, close_new, content_errors, file_sha256
from formats.tokenizer import Tokenizer

FORMAT_VERSION = 1
SPLITS = ("train", "val")
SEPARATOR = 3  # in masks: the end-of-text token after a document
SHARD_NAME = re.compile(r"(train|val)_\d+\.bin")
SHARD_TOKENS = 2**27  # a shard is closed once it holds this many: 256 MiB of uint16


def mask_path(shard: Path) -> Path:
    return shard.with_suffix(".mask")


def token_dtype(vocab_size: int) -> np.dtype:
    """The smallest of uint16 and uint32 that holds every id of a vocabulary, little-endian."""
    return np.dtype("<u2" if vocab_size <= 2**16 else "<u4")


# ---- Writing ----------------------------------------------------------------------------------------------

class ShardWriter:
    """Appends ids to <folder>/<split>_00000.bin, _00001.bin, ... and counts what it writes."""

    def __init__(self, folder: Path, split: str, dtype: np.dtype, masked: bool):
        self.folder, self.split, self.dtype, self.masked = folder, split, dtype, masked
        self.documents, self.tokens, self.bytes = 0, 0, 0
        self.shards: list[dict[str, Any]] = []  # meta.json's entry of each closed shard
        self.files: list[BinaryIO] = []  # of the open shard: its ids and, if masked, its mask

    def write(self, ids: np.ndarray, byte_count: int, mask: np.ndarray | None = None) -> None:
        """Append a document: ids (tokens,), bytes of UTF-8 and, if the shards are masked, mask (tokens,)."""
        if not self.files:
            self.name, self.size = f"{self.split}_{len(self.shards):05d}.bin", 0
            path = self.folder / self.name
            self.files = [open(each, "wb", buffering=2**20)  # documents may be short
                          for each in ([path, mask_path(path)] if self.masked else [path])]
        for file, values in zip(self.files, (ids.astype(self.dtype, copy=False), mask), strict=False):
            append(file, values)
        self.size += len(ids)
        self.documents += 1
        self.tokens += len(ids)
        self.bytes += byte_count
        if self.size >= SHARD_TOKENS:
            self.close()

    def close(self) -> None:
        """Force the open shard, if there is one, to disk."""
        if self.files:
            hashes = [close_new(file) for file in self.files]
            self.shards.append({"name": self.name, "tokens": self.size,
                                **dict(zip(("sha256", "mask_sha256"), hashes, strict=False))})
            self.files = []


def open_writers(folder: Path, vocab_size: int, masked: bool = False) -> dict[str, ShardWriter]:
    """A writer for each split of a new data folder. masked: it will hold chats or preferences."""
    return {split: ShardWriter(folder, split, token_dtype(vocab_size), masked) for split in SPLITS}


def describe(writers: dict[str, ShardWriter], kind: str, tokenizer: Tokenizer, name: str) -> dict[str, Any]:
    """Close the writers and save the tokenizer next to the shards; returns what meta.json holds about both.

    kind: of the rows. name: what the user calls the tokenizer.
    """
    for writer in writers.values():
        writer.close()
    folder = writers["train"].folder
    tokenizer.save(folder)
    counts = {key: {split: getattr(writer, key) for split, writer in writers.items()}
              for key in ("documents", "tokens", "bytes")}
    return {"format_version": FORMAT_VERSION, "kind": kind, "tokenizer": name,
            "tokenizer_sha256": file_sha256(folder / "tokenizer.json"), "vocab_size": tokenizer.vocab_size,
            "dtype": token_dtype(tokenizer.vocab_size).name, **counts,
            "shards": [shard for writer in writers.values() for shard in writer.shards]}


# ---- Reading ----------------------------------------------------------------------------------------------

def check_meta(meta: Any) -> None:
    """Raises ValueError, TypeError or KeyError if meta.json cannot be that of a data folder."""
    names = {shard["name"] for shard in meta["shards"]}
    hashes = {"sha256"} if meta["kind"] == "text" else {"sha256", "mask_sha256"}
    sizes = [meta["vocab_size"], *(shard["tokens"] for shard in meta["shards"])]
    sizes += [1 + meta["bytes"][split] for split in SPLITS]  # a split may be empty
    checks = {"kind": meta["kind"] in ("text", "chat", "preference"),
              "dtype": meta["dtype"] in ("uint16", "uint32"), "inputs": type(meta["inputs"]) is dict,
              "vocab_size, bytes or tokens": all(type(size) is int and 0 < size < 2**63 for size in sizes),
              "shards": len(names) == len(meta["shards"]) and all(map(SHARD_NAME.fullmatch, names))
              and all(hashes <= shard.keys() for shard in meta["shards"])}
    if wrong := [key for key, fits in checks.items() if not fits]:
        raise ValueError(f"{wrong[0]} cannot be right")


def read_meta(folder: Path) -> dict[str, Any]:
    """The content of meta.json, checked. Raises UserError if it is missing or not ours."""
    path = folder / "meta.json"
    if not path.is_file():
        names = ", ".join(sorted(each.parent.name for each in Path("data").glob("*/meta.json")))
        here = f"; data/ has {names}" if names else ""
        raise UserError(f"{folder}: no data set here (no meta.json); prepare.py makes one{here}")
    with content_errors(path, "not a data set's"):
        meta = json.loads(path.read_text(encoding="utf-8"))
        check_meta(meta)
        if meta["format_version"] != FORMAT_VERSION:
            raise UserError(f"{folder}: format version {meta['format_version']}; this program reads version "
                            f"{FORMAT_VERSION}")
    return meta


def check_files(folder: Path, expected: dict[str, int]) -> None:
    """UserError unless the .bin and .mask files of a folder are the expected ones: {name: bytes}."""
    sizes = {path.name: path.stat().st_size for path in folder.iterdir() if path.suffix in (".bin", ".mask")}
    for name in sorted(expected.keys() | sizes.keys()):
        if name not in sizes:
            raise UserError(f"{folder / name}: shard is missing")
        if name not in expected:
            raise UserError(f"{folder / name}: shard is not in meta.json")
        if sizes[name] != expected[name]:
            raise UserError(f"{folder / name}: {sizes[name]:,} bytes, meta.json says {expected[name]:,}")


class DataFolder:
    """An opened data folder: `meta` is meta.json, `shards` and `masks` map each split to its files."""

    def __init__(self, folder: str | Path):
        """Check names and sizes, and map the files (`verify` checks contents). UserError for any fault."""
        self.folder = Path(folder)
        self.meta = read_meta(self.folder)
        dtype, masked = np.dtype(self.meta["dtype"]).newbyteorder("<"), self.meta["kind"] != "text"
        tokens = {Path(shard["name"]): shard["tokens"] for shard in self.meta["shards"]}
        ids = {path.name: count * dtype.itemsize for path, count in tokens.items()}  # {name: bytes}
        masks = {mask_path(path).name: count for path, count in tokens.items() if masked}
        check_files(self.folder, ids | masks)
        self.shards = self.mapped(ids, dtype)
        self.masks = self.mapped(masks, np.dtype(np.uint8))

    def mapped(self, names: Iterable[str], dtype: np.dtype) -> dict[str, list[np.memmap]]:
        """{"train": the memory-mapped files whose names begin with train, "val": ..}."""
        return {split: [np.memmap(self.folder / name, dtype, "r") for name in names if name.startswith(split)]
                for split in SPLITS}

    def require_kind(self, kind: str) -> None:
        """UserError unless the folder holds rows of this kind: text, chat or preference."""
        if self.meta["kind"] != kind:
            raise UserError(f"{self.folder}: holds {self.meta['kind']} rows, not {kind}; prepare.py "
                            f"--kind={kind} makes those")

    def check_ids(self, ids: np.ndarray, shard: np.memmap, begin: int) -> None:
        """UserError if an id is outside the vocabulary. ids: (n,), read from position `begin` of a shard."""
        if ids.max() >= self.meta["vocab_size"]:
            at = ids.argmax()
            raise UserError(f"{shard.filename}: token {begin + at} is {ids[at]}, the vocabulary has "
                            f"{self.meta['vocab_size']} ids")

    def verify(self) -> None:
        """Compare every file's content with its sha256. Raises UserError for the first one that differs."""
        for shard in self.meta["shards"]:
            path = self.folder / shard["name"]
            for file, key in ((path, "sha256"), (mask_path(path), "mask_sha256")):
                if key in shard and file_sha256(file) != shard[key]:
                    raise UserError(f"{file}: content does not match its sha256 in meta.json")
