"""Rows of chat and preference folders, as training reads them, in place of dataset/dataloader.py's rows of
text.

    rows = ChatRows(DataFolder("data/chats"), "train", block_size=256)
    batch = chat_batch(rows.read(np.arange(8)))

Nothing is trained on but the assistant's words (formats/chat_format.py), and no conversation sees another. A
conversation that is longer than block_size is cut there; one that so loses all answers, and a preference that
does not fit, are left out, and counted in `left_out`. Shapes: n rows, T block_size.
"""

from typing import Any

import numpy as np
import torch

from configurator import UserError
from dataset.dataloader import IGNORE, text_batch
from dataset.shards import DataFolder
from formats.tokenizer import Tokenizer


class Documents:
    """The rows of one split of a masked folder: where each begins, and where its answers are."""

    def __init__(self, data: DataFolder, split: str, last: int):
        """last: the mask's value whose last token ends a row; what is behind it teaches nothing."""
        self.data, self.shards, self.masks = data, data.shards[split], data.masks[split]
        eot_id = Tokenizer.load(data.folder).eot_id
        shard, begin, first_target, ones, end = [], [], [], [], []
        for number, (ids, mask) in enumerate(zip(self.shards, self.masks, strict=True)):
            ends = np.flatnonzero(ids == eot_id)  # (rows,)
            begins = np.concatenate(([0], ends[:-1] + 1))
            at = np.arange(len(ids))
            shard.append(np.full(len(ends), number))
            begin.append(begins)
            first_target.append(np.minimum.reduceat(np.where(mask > 0, at, len(ids)), begins))
            ones.append(np.add.reduceat(mask == 1, begins, dtype=np.int64))
            end.append(np.maximum.reduceat(np.where(mask == last, at, -1), begins) + 1)
        self.shard, self.begin, self.first_target, self.ones, self.end = (
            np.concatenate(each) if each else np.empty(0, np.int64)
            for each in (shard, begin, first_target, ones, end))

    def tokens(self, row: int, length: int) -> tuple[np.ndarray, np.ndarray]:
        """The first so many ids of a row, and their mask: (length,) int64 each."""
        at = slice(self.begin[row], self.begin[row] + length)
        ids = self.shards[self.shard[row]][at].astype(np.int64)
        if ids.max() >= self.data.meta["vocab_size"]:
            place = f"{self.shards[self.shard[row]].filename}: token {at.start + ids.argmax()}"
            raise UserError(f"{place} is {ids.max()}, the vocabulary has {self.data.meta['vocab_size']} ids")
        return ids, self.masks[self.shard[row]][at].astype(np.int64)


class ChatRows:
    """One split of a chat folder as rows of T tokens, each of one conversation or, packed, of several whole
    ones. Packing fits them once, the long ones first, each into the fullest row that has room."""

    kind = "chat"

    def __init__(self, data: DataFolder, split: str, block_size: int, packing: bool = True):
        """Raises UserError where no conversation can be used."""
        self.data, self.split, self.T = data, split, block_size
        self.documents = Documents(data, split, last=1)
        docs = self.documents
        self.lengths = np.minimum(docs.end - docs.begin - 1, block_size)  # of inputs, which are one less
        usable = np.flatnonzero(docs.first_target - docs.begin <= block_size)
        self.left_out = len(self.lengths) - len(usable)
        if not len(usable):
            hint = " (prepare.py --val_fraction= makes more)" if split == "val" else ""
            raise UserError(f"{data.folder}: none of {len(self.lengths)} {split} conversations has an answer "
                            f"in its first block_size={block_size} tokens{hint}")
        self.rows = pack_rows(self.lengths[usable], block_size) if packing else [[i] for i in range(len(usable))]
        self.rows = [usable[row] for row in self.rows]

    def __len__(self) -> int:
        return len(self.rows)

    def read(self, indices: np.ndarray) -> np.ndarray:
        """Rows by number: (n,) -> (n, 3, T) int64: inputs, targets (IGNORE where nothing is trained), and the
        number of the conversation within the row. What is left of a row counts as one more conversation."""
        out = np.zeros((len(indices), 3, self.T), dtype=np.int64)
        out[:, 1] = IGNORE
        for row, index in zip(out, indices, strict=True):
            at = 0
            for number, document in enumerate(self.rows[index]):
                length = self.lengths[document]
                ids, mask = self.documents.tokens(document, length + 1)
                row[0, at:at + length] = ids[:-1]
                row[1, at:at + length] = np.where(mask[1:] == 1, ids[1:], IGNORE)
                row[2, at:at + length] = number
                at += length
            row[2, at:] = len(self.rows[index])
        return out


class UnpackedChatRows(ChatRows):
    """A conversation a row."""

    def __init__(self, data: DataFolder, split: str, block_size: int):
        super().__init__(data, split, block_size, packing=False)


class PairRows:
    """One split of a preference folder: prompts, each with a chosen and a rejected answer."""

    kind = "preference"

    def __init__(self, data: DataFolder, split: str, block_size: int):
        """Raises UserError where no pair fits."""
        self.data, self.split, self.T = data, split, block_size
        self.documents = Documents(data, split, last=2)
        docs = self.documents
        self.prompt, self.chosen = docs.first_target - docs.begin, docs.ones  # (rows,) lengths, in tokens
        self.rejected = docs.end - docs.first_target - docs.ones
        longest = self.prompt + np.maximum(self.chosen, self.rejected) - 1  # inputs of the longer side
        self.usable = np.flatnonzero(longest <= block_size)
        self.left_out = len(longest) - len(self.usable)
        if not len(self.usable):
            hint = " (prepare.py --val_fraction= makes more)" if split == "val" else ""
            raise UserError(f"{data.folder}: none of {len(longest)} {split} preferences fits "
                            f"block_size={block_size}{hint}")

    def __len__(self) -> int:
        return len(self.usable)

    def pair(self, number: int) -> tuple[np.ndarray, int, int]:
        """The ids of a pair's prompt, chosen and rejected answer behind one another, int64, and how many of
        them are the prompt's, and the chosen answer's."""
        document = self.usable[number]
        prompt, chosen, rejected = (each[document] for each in (self.prompt, self.chosen, self.rejected))
        return self.documents.tokens(document, prompt + chosen + rejected)[0], prompt, chosen


def pack_rows(lengths: np.ndarray, size: int) -> list[list[int]]:
    """Which numbers share a row: best fit, longest first. Each row's lengths sum to `size` at the most."""
    rows: list[list[int]] = []
    with_room: list[list[int]] = [[] for _ in range(size + 1)]  # the rows that have so much room
    for number in np.argsort(-lengths, kind="stable"):
        length = int(lengths[number])
        room = next((room for room in range(length, size + 1) if with_room[room]), None)
        if room is None:
            rows.append([])
            row, room = len(rows) - 1, size
        else:
            row = with_room[room].pop()
        rows[row].append(int(number))
        with_room[room - length].append(row)
    return rows


def batch_of(rows: np.ndarray, cfg: Any, eot_id: int) -> dict[str, Any]:
    """A batch of text rows (n, T + 1) or of chat rows (n, 3, T). cfg: has packing and document_mask."""
    if rows.ndim == 2:
        return text_batch(rows, eot_id if cfg.document_mask else None)
    batch = chat_batch(rows)
    if not cfg.packing:  # one conversation a row, padded behind: causal attention needs no mask
        del batch["document_ids"]
    return batch


def chat_batch(rows: np.ndarray) -> dict[str, Any]:
    """(n, 3, T) of ChatRows -> {"input_ids", "document_ids": (n, T'), "positions", "targets": (targets,), all
    int64, "count": targets}, cut behind the last target of them all.

    positions: where in the flattened (n T') the targets are, so that logits are computed there alone.
    """
    ids, targets, documents = torch.from_numpy(rows[:, :, :until_last_target(rows[:, 1])].copy()).unbind(1)
    positions = (targets.flatten() != IGNORE).nonzero()[:, 0]
    return {"input_ids": ids, "document_ids": documents, "positions": positions,
            "targets": targets.flatten()[positions], "count": len(positions)}


def until_last_target(targets: np.ndarray) -> int:
    """How many columns hold all targets of (..., T): at least 1."""
    return int(np.max(np.where(targets != IGNORE, np.arange(1, targets.shape[-1] + 1), 1)))


def pair_batch(pairs: list[tuple[np.ndarray, int, int]]) -> dict[str, Any]:
    """n pairs of PairRows -> {"input_ids": (1, N), "paths": (2n, S), "positions", "targets": (targets,),
    "lengths": (n, 2), all int64, "count": n}: one row without padding of prompts, each with both its answers
    behind it. lengths: the targets of either answer.

    paths: from each prompt's first token through one answer, then through the other, as the model wants them.
    """
    inputs, targets, paths, positions, begin = [], [], [], [], 0
    for ids, prompt, chosen in pairs:
        middle = prompt + chosen - 1  # an answer's last token is no input, so here the rejected one begins
        inputs.append(np.delete(ids, [middle, -1]))
        places = np.arange(begin, begin + len(ids) - 2)
        both = places[:middle], np.concatenate((places[:prompt], places[middle:]))
        paths += both
        positions += [path[prompt - 1:] for path in both]  # the prompt's last token has two targets
        targets.append(ids[prompt:])
        begin += len(places)
    longest = max(map(len, paths))
    batch = {"input_ids": np.concatenate(inputs)[None],
             "paths": np.stack([np.pad(path, (0, longest - len(path)), mode="edge") for path in paths]),
             "positions": np.concatenate(positions), "targets": np.concatenate(targets),
             "lengths": np.array([len(each) for each in positions]).reshape(-1, 2)}
    return {key: torch.from_numpy(array) for key, array in batch.items()} | {"count": len(pairs)}
