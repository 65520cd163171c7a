"""From data folders to batches: which row of which folder a step reads, as a pure function of the step.

    mix = Mix("code:0.7,books:0.3", block_size=256, seed=1337, kind=Rows)
    rows = mix.samples(first=step * batch_size, count=batch_size)       # (count, T + 1) int64
    batch = text_batch(rows, mix.eot_id)

What a row is, its kind says. Rows, of text: T + 1 consecutive tokens, T inputs, and T targets one further on.
dataset/chat_rows.py has those of chats and preferences. An epoch walks all rows of a folder once, in a
permutation seeded by (seed, folder, epoch). There is no state to save: sample number k is always the same
row. `StagedData` says which samples are a step's, on a rank, in the stages of a run.
"""

import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch

from configurator import UserError
from dataset.shards import DataFolder
from formats.files import file_sha256
from formats.tokenizer import Tokenizer

IGNORE = -100  # target of a position that is not trained on, as in torch's and Hugging Face's losses


def parse_mix(spec: str) -> list[tuple[Path, float]]:
    """"a:0.7,b:0.3" -> [(path, 0.7), (path, 0.3)], scaled to sum 1. Raises UserError for a bad weight."""
    entries = []
    for entry in spec.split(","):
        name, _, text = entry.rpartition(":")
        try:
            weight = float(text) if name else 1.0
        except ValueError:
            name, weight = "", 1.0
        if not (weight > 0 and math.isfinite(weight)):
            raise UserError(f"dataset={spec}: the weight of {name} must be positive")
        entries.append((name or entry, weight))
    total = sum(weight for _, weight in entries)
    if not math.isfinite(total) or not all(name.strip(":") for name, _ in entries):
        raise UserError(f"dataset={spec}: write folders and their weights as a:0.7,b:0.3")
    return [(dataset_folder(name), weight / total) for name, weight in entries]


def dataset_folder(name: str) -> Path:
    """data/<name> for a bare name, else the path itself."""
    return Path("data") / name if (Path("data") / name).is_dir() or not Path(name).is_dir() else Path(name)


class Rows:
    """One split of a data folder as rows of T + 1 tokens; a row never spans two shards."""

    kind = "text"

    def __init__(self, data: DataFolder, split: str, block_size: int):
        """Raises UserError where no shard holds a whole row."""
        self.data, self.T, self.shards = data, block_size, data.shards[split]
        counts = [(len(shard) - 1) // block_size for shard in self.shards]
        self.ends = np.cumsum(counts, dtype=np.int64)  # number of rows up to and with each shard
        if not counts or self.ends[-1] < 1:
            tokens = sum(map(len, self.shards))
            hint = " (prepare.py --val_fraction= makes more)" if split == "val" else ""
            raise UserError(f"{data.folder}: {tokens:,} {split} tokens make no row of "
                            f"block_size={block_size} + 1{hint}")

    def __len__(self) -> int:
        return int(self.ends[-1])

    def read(self, indices: np.ndarray) -> np.ndarray:
        """Rows by number: (n,) -> (n, T + 1) int64. UserError for an id the tokenizer does not have."""
        which = np.searchsorted(self.ends, indices, side="right")  # (n,) shard of each row
        begins = (indices - np.where(which > 0, self.ends[which - 1], 0)) * self.T
        rows = np.stack([self.shards[shard][begin:begin + self.T + 1]
                         for shard, begin in zip(which, begins, strict=True)])
        if rows.max() >= self.data.meta["vocab_size"]:
            bad = int(np.argmax(rows.max(axis=1)))
            place = f"{self.shards[which[bad]].filename}: token {begins[bad] + rows[bad].argmax()}"
            known = self.data.meta["vocab_size"]
            raise UserError(f"{place} is {rows[bad].max()}, the vocabulary has {known} ids")
        return rows.astype(np.int64)


class Mix:
    """The training rows of several folders, in fixed proportions at every moment of the run."""

    def __init__(self, spec: str, block_size: int, seed: int, kind: Callable = Rows):
        """kind: what makes rows of (an opened folder, "train", block_size), and whose `kind` folders must be.
        """
        entries = parse_mix(spec)
        self.folders = [DataFolder(path) for path, _ in entries]
        self.weights = [weight for _, weight in entries]
        tokenizers = {file_sha256(folder.folder / "tokenizer.json") for folder in self.folders}
        for data in self.folders:
            if data.meta["kind"] != kind.kind:
                raise UserError(f"{data.folder}: holds {data.meta['kind']} rows, not {kind.kind}; prepare.py "
                                f"--kind={kind.kind} makes those")
            if data.meta.get("tokenizer_sha256") not in (None, file_sha256(data.folder / "tokenizer.json")):
                raise UserError(f"{data.folder}: its tokenizer.json is not the one it was made with")
        if len(tokenizers) > 1:
            raise UserError(f"dataset={spec}: the folders were made with different tokenizers")
        self.tokenizer = Tokenizer.load(self.folders[0].folder)
        self.rows = [kind(folder, "train", block_size) for folder in self.folders]
        self.seed = seed
        self.permutations: dict[tuple[int, int], np.ndarray] = {}  # of the latest epochs only

    def hashes(self) -> dict[str, str]:
        """{folder: sha256 of its meta.json}, which holds those of the shards: what must stay during a run."""
        return {str(folder.folder): file_sha256(folder.folder / "meta.json") for folder in self.folders}

    def epoch_samples(self) -> int:
        """Samples of the mix after which the folder that is used up first has been read once."""
        ends = [len(rows) / weight for rows, weight in zip(self.rows, self.weights, strict=True)]
        return math.ceil(min(ends))

    def interleave(self, first: int, count: int) -> tuple[np.ndarray, np.ndarray]:
        """(folder, number within it) of the samples first ... first + count - 1, (count,) int64 each.

        Folder d takes its j-th turn at time (j + 1/2) / weight[d]; the samples are all turns in order of
        time. So after any k samples each folder has had k * weight of them, give or take one a folder, and
        nothing needs remembering.
        """
        reach = len(self.weights) + 1  # turns by which a sample's number and its time can differ
        numbers, owners, times, before = [], [], [], 0
        for folder, weight in enumerate(self.weights):
            low = max(0, math.ceil((first - reach) * weight - 0.5))
            turns = np.arange(low, math.ceil((first + count + reach) * weight) + 1)
            numbers.append(turns)
            owners.append(np.full(len(turns), folder))
            times.append((turns + 0.5) / weight)
            before += low
        owner, number = np.concatenate(owners), np.concatenate(numbers)
        order = np.lexsort((owner, np.concatenate(times)))[first - before:first - before + count]
        return owner[order], number[order]

    def locate(self, first: int, count: int) -> tuple[np.ndarray, np.ndarray]:
        """(folder, row in it) of the run's samples first ... first + count - 1, (count,) int64 each."""
        owner, number = self.interleave(first, count)
        for folder in np.unique(owner):
            mine = owner == folder
            epoch, place = np.divmod(number[mine], len(self.rows[folder]))
            number[mine] = [self.permutation(int(folder), int(e))[p]
                            for e, p in zip(epoch, place, strict=True)]
        return owner, number

    def samples(self, first: int, count: int) -> np.ndarray:
        """The rows of these samples, (count, ...) int64, whatever shape a row has: (T + 1,) of text."""
        owner, index = self.locate(first, count)
        parts = {int(folder): self.rows[folder].read(index[owner == folder]) for folder in np.unique(owner)}
        out = np.empty((count, *next(iter(parts.values())).shape[1:]), dtype=np.int64)
        for folder, rows in parts.items():
            out[owner == folder] = rows
        return out

    def permutation(self, folder: int, epoch: int) -> np.ndarray:
        """The order in which an epoch walks a folder's rows, (rows,) int64."""
        key = (folder, epoch)
        if key not in self.permutations:
            while len(self.permutations) >= 2 * len(self.rows):
                self.permutations.pop(next(iter(self.permutations)))
            generator = np.random.default_rng((self.seed, folder, epoch))
            self.permutations[key] = generator.permutation(len(self.rows[folder]))
        return self.permutations[key]






def text_batch(rows: np.ndarray, eot_id: int | None = None) -> dict[str, Any]:
    """(B, T + 1) ids -> {"input_ids", "targets": (B, T) int64, "count": targets}.

    eot_id: also give "document_ids" (B, T), a new one at each end-of-text token. That token so opens the
    document behind it: it is the target of the one before, and the only context of the first token of the one
    after.
    """
    batch = {"input_ids": torch.from_numpy(rows[:, :-1].copy()),
             "targets": torch.from_numpy(rows[:, 1:].copy())}
    if eot_id is not None:
        batch["document_ids"] = (batch["input_ids"] == eot_id).cumsum(dim=1)
    return batch | {"count": batch["targets"].numel()}


def validation_batches(make_batch: Callable[[np.ndarray], dict[str, Any]], total: int, batch_size: int,
                       rank: int, world_size: int) -> Iterator[dict[str, Any]]:
    """This rank's validation batches of the rows 0 ... total - 1; make_batch(row numbers) makes one.

    Every rank gets the same number of batches, because all ranks must take part in each forward pass. A rank
    that runs out of rows gets row 0 with a "count" of 0: run it, and do not add its sums.
    """
    for numbers in shares(total, batch_size, rank, world_size):
        batch = make_batch(numbers if len(numbers) else np.zeros(1, dtype=np.int64))
        yield batch if len(numbers) else batch | {"count": 0}


def validation_rows(rows: Any, limit_tokens: int | None) -> int:
    """The number of rows that hold the first `limit_tokens` tokens, at least 1; all rows for None."""
    return len(rows) if limit_tokens is None else min(len(rows), max(1, limit_tokens // rows.T))


def shares(total: int, batch_size: int, rank: int, world_size: int) -> Iterator[np.ndarray]:
    """This rank's batches of the numbers 0 ... total - 1, as many on each rank, so that some may be empty."""
    for begin in range(0, total, batch_size * world_size):
        yield np.arange(begin + rank * batch_size, min(begin + (rank + 1) * batch_size, total))



