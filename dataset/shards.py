"""A data folder on disk: raw token shards and the meta.json that says what they are.

    writer = ShardWriter(folder, "train", np.uint16)
    writer.write(ids, documents, byte_count); writer.close()
    data = DataFolder("data/pystdlib");  data.shards["train"][0]           # np.memmap of ids
    data.verify()                                                          # every byte, by sha256

Shards are little-endian ids without a header, so np.memmap alone reads them too. In a folder of chats or
preferences a file of the shard's name that ends in .mask has a uint8 for each token: of a chat, 1 where the
assistant speaks; of a preference, 0 in the prompt, 1 in the chosen answer, 2 in the rejected one. There, too,
an end-of-text token stands behind every row. meta.json is written last, by rename: a folder without it does
not exist.
"""

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np

from configurator import UserError
from formats.files import HashedFile, file_sha256

FORMAT_VERSION = 1
SHARD_KEYS = {"name": str, "tokens": int, "sha256": str}  # of a shard in meta.json
SHARD_TOKENS = 2**27  # a new shard begins once one holds so many: 256 MiB of uint16


class ShardWriter:
    """Appends ids to <folder>/<split>_00000.bin, _00001.bin, ... and keeps count of what it wrote."""

    def __init__(self, folder: Path, split: str, dtype: Any, masked: bool = False):
        self.folder, self.split, self.dtype = folder, split, np.dtype(dtype).newbyteorder("<")
        self.masked = masked
        self.documents, self.tokens, self.bytes = 0, 0, 0
        self.shards: list[dict[str, Any]] = []  # SHARD_KEYS of each closed shard, and mask_sha256 if masked
        self.files: list[HashedFile] = []  # of the open shard: ids and, if masked, their mask

    def write(self, ids: np.ndarray, documents: int, byte_count: int, mask: np.ndarray | None = None) -> None:
        """Append the ids (tokens,) of some whole documents that have so many bytes of UTF-8; with them, if
        the shards are masked, their mask (tokens,)."""
        if not len(ids):
            return
        if not self.files:
            self.name, self.size = f"{self.split}_{len(self.shards):05d}.bin", 0
            self.files = [HashedFile(self.folder / self.name)]
            if self.masked:
                self.files.append(HashedFile(mask_path(self.folder / self.name)))
        self.files[0].write(ids.astype(self.dtype, copy=False))
        if self.masked:
            self.files[1].write(mask.astype(np.uint8, copy=False))
        self.size += len(ids)
        self.documents += documents
        self.tokens += len(ids)
        self.bytes += byte_count
        if self.size >= SHARD_TOKENS:
            self.close()

    def close(self) -> None:
        """Force the open shard, if any, to disk."""
        if self.files:
            shard = {"name": self.name, "tokens": self.size}
            for key, file in zip(("sha256", "mask_sha256"), self.files, strict=False):
                shard[key] = file.close()
            self.shards.append(shard)
            self.files = []


def mask_path(shard: Path) -> Path:
    return shard.with_suffix(".mask")


class DataFolder:
    """An opened data folder: meta.json as `meta`, and the memory-mapped shards of each split."""

    def __init__(self, folder: str | Path):
        """Check names and sizes (contents: `verify`) and map the shards. Raises UserError for any fault."""
        self.folder = Path(folder)
        try:
            self.meta = json.loads((self.folder / "meta.json").read_text(encoding="utf-8"))
            version, dtype = self.meta["format_version"], np.dtype(self.meta["dtype"]).newbyteorder("<")
            masked = self.meta["kind"] != "text"
            keys = SHARD_KEYS | ({"mask_sha256": str} if masked else {})
            self.meta["shards"] = [{key: kind(shard[key]) for key, kind in keys.items()}
                                   for shard in self.meta["shards"]]
            sizes = {shard["name"]: shard["tokens"] * dtype.itemsize for shard in self.meta["shards"]}
            masks = {mask_path(Path(shard["name"])).name: shard["tokens"] for shard in self.meta["shards"]}
            listed = sizes | masks if masked else sizes
            for key, kind in (("kind", str), ("vocab_size", int), ("bytes", dict), ("inputs", dict)):
                if type(self.meta[key]) is not kind:
                    raise TypeError(f"{key} is {self.meta[key]!r}")
            self.meta["bytes"] = {split: int(self.meta["bytes"][split]) for split in ("train", "val")}
        except FileNotFoundError:
            raise UserError(f"{self.folder}: no data set here (no meta.json); prepare.py makes one") from None
        except (ValueError, KeyError, TypeError) as error:
            reason = f"{type(error).__name__}: {error}"
            raise UserError(f"{self.folder / 'meta.json'}: not a data set's ({reason})") from None
        if version != FORMAT_VERSION:
            raise UserError(f"{self.folder}: format version {version}, this program reads {FORMAT_VERSION}")
        found = {path.name: path.stat().st_size for pattern in ("*.bin", "*.mask")
                 for path in self.folder.glob(pattern)}
        for name in sorted(listed.keys() | found.keys()):
            if name not in found:
                raise UserError(f"{self.folder / name}: shard is missing")
            if name not in listed:
                raise UserError(f"{self.folder / name}: shard is not in meta.json")
            if found[name] != listed[name]:
                difference = f"{found[name]:,} bytes, meta.json says {listed[name]:,}"
                raise UserError(f"{self.folder / name}: {difference}")
        self.shards = self.mapped(sizes, dtype)
        self.masks = self.mapped(masks if masked else {}, np.uint8)

    def mapped(self, names: Iterable[str], dtype: Any) -> dict[str, list[np.memmap]]:
        """{"train": the mapped files whose names begin so, "val": ..}."""
        return {split: [np.memmap(self.folder / name, dtype, "r") for name in names if name.startswith(split)]
                for split in ("train", "val")}

    def verify(self) -> None:
        """Compare every shard's content with its sha256. Raises UserError for the first that differs."""
        for shard in self.meta["shards"]:
            path = self.folder / shard["name"]
            for file, key in ((path, "sha256"), (mask_path(path), "mask_sha256")):
                if key in shard and file_sha256(file) != shard[key]:
                    raise UserError(f"{file}: content does not match its sha256 in meta.json")
