"""Data folders -> batches: which row of which folder a step reads, as a pure function of the step.

    mix = Mix("code:0.7,books:0.3", block_size=256, seed=1337, kind=Rows)
    rows = mix.samples(first=step * batch_size, count=batch_size)       # (count, T + 1) int64
    batch = text_batch(rows, mix.tokenizer.eot_id)

`kind` decides what a row is. A row of `Rows` is T + 1 consecutive tokens of text: T inputs, and T targets one
position later. dataset/chat_rows.py has the rows of chats and preferences. Each epoch of a folder reads all
its rows once, in a permutation seeded by (seed, folder, epoch). Sample number k is always the same row, so a
resumed run has no loader state to restore. training/staged_data.py decides which samples a step reads.

Shapes: B rows, T block_size.
"""

import functools
import math
import os
import shlex
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from configurator import UserError
from dataset.shards import DataFolder
from dataset.sources import TEXT_KINDS, file_kind
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
        except ValueError:  # a path with a colon and no weight
            name, weight = "", 1.0
        if not (weight > 0 and math.isfinite(weight)):
            raise UserError(f"dataset={spec}: the weight of {name} must be positive")
        entries.append((name or entry, weight))
    total = sum(weight for _, weight in entries)
    if not math.isfinite(total) or not all(name.strip(":") for name, _ in entries):
        raise UserError(f"dataset={spec}: write folders and their weights as a:0.7,b:0.3")
    return [(dataset_folder(name), weight / total) for name, weight in entries]


def dataset_folder(name: str) -> Path:
    """data/<name> if it exists or if no folder `name` does, else the path itself. UserError for a file."""
    if os.path.isfile(name):
        folder = Path("data") / Path(name).name.split(".")[0]
        rows = "" if file_kind(Path(name)) in TEXT_KINDS else (
            " (chats and preferences: add --kind= and --tokenizer=MODEL)")
        raise UserError(f"dataset={name}: is a file; first run: python prepare.py "
                        f"--source={shlex.quote(name)} --out={shlex.quote(str(folder))}{rows}")
    folder = Path("data") / name
    return folder if folder.is_dir() or not Path(name).is_dir() else Path(name)


# ---- Rows -------------------------------------------------------------------------------------------------

class Rows:
    """One split of a text folder as rows of T + 1 tokens. A row never spans two shards."""

    kind = "text"

    def __init__(self, data: DataFolder, split: str, block_size: int, sink_tokens: int = 0):
        """sink_tokens: how many positions of a row `text_batch` fills; T is what is left of block_size.

        Raises UserError if the folder is of another kind, or if no shard holds a whole row.
        """
        data.require_kind(self.kind)
        self.data, self.T, self.shards = data, block_size - sink_tokens, data.shards[split]
        counts = [(len(shard) - 1) // self.T for shard in self.shards]
        self.ends = np.cumsum(counts, dtype=np.int64)  # (shards,) rows up to the end of each shard
        if sum(counts) < 1:
            tokens = sum(map(len, self.shards))
            raise UserError(f"{data.folder}: {tokens:,} {split} tokens make no row of "
                            f"block_size={self.T} + 1{more_rows_hint(split)}")

    def __len__(self) -> int:
        return int(self.ends[-1])

    def read(self, indices: np.ndarray) -> np.ndarray:
        """Rows by number: (n,) -> (n, T + 1) int64. Raises UserError for an id outside the vocabulary."""
        which = np.searchsorted(self.ends, indices, side="right")  # (n,) shard of each row
        begins = (indices - np.where(which > 0, self.ends[which - 1], 0)) * self.T  # (n,) position in it
        rows = []
        for shard, begin in zip(which, begins, strict=True):
            # One token more than T: the last position's target. Consecutive rows share that token.
            rows.append(self.shards[shard][begin:begin + self.T + 1])
            self.data.check_ids(rows[-1], self.shards[shard], begin)
        return np.stack(rows).astype(np.int64)


def more_rows_hint(split: str) -> str:
    """The remedy for a split that holds no usable row, as the end of an error message."""
    return " (prepare.py --val_fraction= makes more)" if split == "val" else ""


# ---- Mix --------------------------------------------------------------------------------------------------

class Mix:
    """The training rows of several folders, in fixed proportions at every moment of the run."""

    def __init__(self, spec: str, block_size: int, seed: int, kind: Callable[..., Any] = Rows):
        """kind: the class of the rows, or a functools.partial of it; called as kind(DataFolder, "train",
        block_size). Raises UserError if a folder is of another kind, or if the folders' tokenizers differ."""
        entries = parse_mix(spec)
        self.folders = [DataFolder(path) for path, _ in entries]
        self.weights = [weight for _, weight in entries]
        tokenizers = [file_sha256(data.folder / "tokenizer.json") for data in self.folders]
        for data, tokenizer in zip(self.folders, tokenizers, strict=True):
            if data.meta.get("tokenizer_sha256") not in (None, tokenizer):
                raise UserError(f"{data.folder}: its tokenizer.json is not the one it was made with")
        if len(set(tokenizers)) > 1:
            raise UserError(f"dataset={spec}: the folders were made with different tokenizers (prepare.py "
                            f"--tokenizer={self.folders[0].folder} makes data with the first one's)")
        self.tokenizer = Tokenizer.load(self.folders[0].folder)
        self.rows = [kind(folder, "train", block_size) for folder in self.folders]
        self.seed = seed
        # A batch may span two epochs of each folder.
        self.permutation = functools.lru_cache(2 * len(self.rows))(self.draw_permutation)

    def hashes(self) -> dict[str, str]:
        """{folder: sha256 of its meta.json}, which lists the shards' hashes: fixed during a run."""
        return {str(data.folder): file_sha256(data.folder / "meta.json") for data in self.folders}

    def epoch_samples(self) -> int:
        """The number of samples after which the first of the folders has been read completely."""
        ends = [len(rows) / weight for rows, weight in zip(self.rows, self.weights, strict=True)]
        return math.ceil(min(ends))

    def interleave(self, first: int, count: int) -> tuple[np.ndarray, np.ndarray]:
        """(folder, number within it) of the samples first ... first + count - 1, (count,) int64 each.

        Folder d takes its turn j at time (j + 1/2) / weight[d]. The samples are all turns in order of time;
        of two turns at the same time, that of the first folder comes first. For "a:0.7,b:0.3":

            turn j         0      1      2      3      4      5      6
            time of a    0.71   2.14   3.57   5.00   6.43   7.86   9.29        (j + 1/2) / 0.7
            time of b    1.67   5.00   8.33                                    (j + 1/2) / 0.3

            sample      0   1   2   3   4   5   6   7   8   9
            folder      a   b   a   a   a   b   a   a   b   a
            number      0   0   1   2   3   1   4   5   2   6

        After any k samples, each folder has had k * weight of them, give or take one per folder. The order
        follows from the weights alone, so any range of samples can be computed by itself.
        """
        slack = len(self.weights) + 1  # turns by which a sample's number and its time can differ
        turns, owners, times, skipped = [], [], [], 0
        for folder, weight in enumerate(self.weights):
            low = max(0, math.ceil((first - slack) * weight - 0.5))  # turns before it come before `first`
            turns.append(np.arange(low, math.ceil((first + count + slack) * weight) + 1))
            owners.append(np.full(len(turns[-1]), folder))
            times.append((turns[-1] + 0.5) / weight)
            skipped += low
        owner, turn = np.concatenate(owners), np.concatenate(turns)
        order = np.lexsort((owner, np.concatenate(times)))[first - skipped:first - skipped + count]
        return owner[order], turn[order]  # (count,) each

    def locate(self, first: int, count: int) -> tuple[np.ndarray, np.ndarray]:
        """(folder, row in it) of the samples first ... first + count - 1 of the run, (count,) int64 each."""
        owner, number = self.interleave(first, count)
        for folder in np.unique(owner):
            mine = owner == folder
            epoch, place = np.divmod(number[mine], len(self.rows[folder]))
            number[mine] = [self.permutation(int(folder), int(e))[p]
                            for e, p in zip(epoch, place, strict=True)]
        return owner, number

    def samples(self, first: int, count: int) -> np.ndarray:
        """The rows of these samples, (count, ...) int64. A row of text is (T + 1,), one of chats (3, T)."""
        owner, index = self.locate(first, count)
        parts = {int(folder): self.rows[folder].read(index[owner == folder]) for folder in np.unique(owner)}
        out = np.empty((count, *next(iter(parts.values())).shape[1:]), dtype=np.int64)
        for folder, rows in parts.items():
            out[owner == folder] = rows
        return out

    def draw_permutation(self, folder: int, epoch: int) -> np.ndarray:
        """The order in which an epoch reads a folder's rows, (rows,) int64."""
        generator = np.random.default_rng((self.seed, folder, epoch))
        return generator.permutation(len(self.rows[folder]))


# ---- Batches ----------------------------------------------------------------------------------------------

def mean_document(document_ids: np.ndarray) -> float:
    """The mean over all tokens of the length of their document: [[5, 5, 5, 6, 6]] -> (9 + 4) / 5."""
    is_first = np.ones(document_ids.shape, bool)
    is_first[:, 1:] = document_ids[:, 1:] != document_ids[:, :-1]
    lengths = np.diff(np.flatnonzero(is_first), append=is_first.size)
    return float(lengths @ lengths / is_first.size)


def text_batch(rows: np.ndarray, eot_id: int | None = None, sinks: Sequence[int] = ()) -> dict[str, Any]:
    """(B, T + 1) ids -> {"input_ids", "targets": (B, T) int64, "count": number of targets, "context": T}.

    sinks: n ids that are put before each row. They are read, but predict nothing, so only the T - n tokens
    that follow the first one of `rows`, which is then (B, T + 1 - n), are targets.

    With eot_id, the batch also has "document_ids" (B, T), which go up by one at each end-of-text token. That
    token opens the next document: it is the target of the document before it, and the only context of the
    first token after it. "context" is then `mean_document`.
    """
    n = len(sinks)
    rows = np.concatenate((np.tile(np.array(sinks, np.int64), (len(rows), 1)), rows), axis=1)  # (B, T + 1)
    batch = {"input_ids": torch.from_numpy(rows[:, :-1].copy()),  # (B, T)
             "targets": torch.from_numpy(rows[:, 1:].copy())}  # (B, T)
    batch["targets"][:, :n] = IGNORE
    batch |= {"count": batch["targets"][:, n:].numel(), "context": rows.shape[1] - 1}
    if eot_id is not None:
        document_ids = (batch["input_ids"] == eot_id).cumsum(dim=1)  # (B, T)
        batch |= {"document_ids": document_ids, "context": mean_document(document_ids.numpy())}
    return batch


def rank_batches(total: int, batch_size: int, rank: int, world_size: int) -> Iterator[np.ndarray]:
    """This rank's batches of the numbers 0 ... total - 1.

    Each rank gets the same number of batches. The last one may be smaller, or empty.
    """
    for begin in range(0, total, batch_size * world_size):
        yield np.arange(begin + rank * batch_size, min(begin + (rank + 1) * batch_size, total))


def validation_rows(rows: Any, limit_tokens: int | None) -> int:
    """The number of rows that hold the first `limit_tokens` tokens, at least 1; all rows for None."""
    return len(rows) if limit_tokens is None else min(len(rows), max(1, limit_tokens // rows.T))
