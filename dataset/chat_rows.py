"""Rows and batches of chat and preference folders, for SFT, distillation and DPO.

    rows = ChatRows(DataFolder("data/chats"), "train", block_size=256)     # several conversations per row
    batch = chat_batch(rows.read(np.arange(8)))
    pairs = PairRows(DataFolder("data/pairs"), "train", block_size=256)    # prompt, chosen, rejected
    batch = pair_batch([pairs.pair(number) for number in range(8)])

Only the assistant's tokens are trained on (formats/chat_format.py), and no conversation sees another. A
conversation that is longer than block_size is cut (`cut` counts these) or, with overlong="drop", left out. A
conversation that loses all its answers to the cut, and a preference that does not fit, are left out, too;
`left_out` counts them.

Shapes: n rows, T block_size.
"""

from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from configurator import UserError
from dataset.dataloader import IGNORE, Rows, mean_document, more_rows_hint, text_batch
from dataset.shards import SEPARATOR, DataFolder

# ---- Rows -------------------------------------------------------------------------------------------------

class Documents:
    """Where the documents of one split begin and end, and where their answers are: (documents,) int64 each.

    shard: number of the document's shard. begin, first_target, end: positions in it, of the first token, of
    the first token of an answer, and after the last one of an answer. ones: tokens whose mask is 1.
    """

    def __init__(self, data: DataFolder, split: str, last: int):
        """last: the mask value of the answer that ends a document: 1 in chats, 2 in preferences. The tokens
        after it are not trained on."""
        self.data, self.shards, self.masks = data, data.shards[split], data.masks[split]
        tables = [np.empty((5, 0), np.int64)]
        for number, (ids, mask) in enumerate(zip(self.shards, self.masks, strict=True)):
            ends = np.flatnonzero(mask == SEPARATOR)  # (documents of this shard,)
            begins = np.append(0, ends[:-1] + 1)
            at = np.arange(len(ids))  # (tokens,) positions; reduceat then takes one document at a time
            # (5, documents of this shard)
            tables.append(np.stack((np.full(len(ends), number), begins,
                                    np.minimum.reduceat(np.where(mask % SEPARATOR > 0, at, len(ids)), begins),
                                    np.add.reduceat(mask == 1, begins, dtype=np.int64),
                                    np.maximum.reduceat(np.where(mask == last, at, -1), begins) + 1)))
        self.shard, self.begin, self.first_target, self.ones, self.end = np.concatenate(tables, axis=1)

    def tokens(self, document: int, length: int) -> tuple[np.ndarray, np.ndarray]:
        """The first `length` ids of a document and their mask, (length,) int64 each.

        Raises UserError for an id outside the vocabulary.
        """
        shard, begin = self.shard[document], self.begin[document]
        ids = self.shards[shard][begin:begin + length]
        self.data.check_ids(ids, self.shards[shard], begin)
        return ids.astype(np.int64), self.masks[shard][begin:begin + length].astype(np.int64)

    def prompt(self, document: int) -> list[int]:
        """The ids of a document before its first answer."""
        return self.tokens(document, self.first_target[document] - self.begin[document])[0].tolist()


def pack_rows(lengths: np.ndarray, size: int) -> list[list[int]]:
    """Which documents share a row, so that the lengths in each row sum to at most `size`.

    Best fit, longest first: each document goes into the fullest row that has room, else into a new row.

        lengths 3 9 6 4 1, size 10        rows [9, 1], [6, 4], [3] = documents [1, 4], [2, 3], [0]
    """
    size = min(size, int(lengths.sum()))  # so that a huge size takes no memory
    rows: list[list[int]] = []
    with_room: list[list[int]] = [[] for _ in range(size + 1)]  # with_room[r]: the rows that have room for r
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


class ChatRows:
    """One split of a chat folder as rows of T tokens.

    A row holds one or more conversations, none of them split: they are packed into rows once, by `pack_rows`,
    and one that is longer than T is cut (see `overlong`). Two conversations a and b in a row of T = 8:

        inputs      a0  a1  a2  a3  b0  b1   0   0
        targets      -  a2   -  a4   -  b2   -   -      "-" is IGNORE; a2, a4 and b2 are the assistant's
        document     0   0   0   0   1   1   2   2      padding counts as one more conversation
    """

    kind = "chat"
    packing = True

    def __init__(self, data: DataFolder, split: str, block_size: int,
                 overlong: Literal["cut", "drop"] = "cut"):
        """overlong: what happens to a conversation of more than block_size tokens. Raises UserError if the
        folder is of another kind, or if no conversation can be used."""
        data.require_kind(self.kind)
        self.data, self.split, self.T, self.overlong = data, split, block_size, overlong
        self.documents = docs = Documents(data, split, last=1)
        lengths = docs.end - docs.begin - 1  # (conversations,) inputs: the last token is no input
        self.lengths = np.minimum(lengths, block_size)
        # A template may leave a conversation without an answer: its end is 0.
        has_answer = (docs.end > 0) & (docs.first_target - docs.begin <= block_size)
        fits = lengths <= block_size
        self.usable = usable = np.flatnonzero(has_answer if overlong == "cut" else has_answer & fits)
        self.cut = int((~fits[usable]).sum())  # conversations that are trained on without their end
        self.left_out = len(lengths) - len(usable)
        if not len(usable):
            missing = "has an answer in its first" if overlong == "cut" else "is whole in"
            raise UserError(f"{data.folder}: none of {len(lengths)} {split} conversations {missing} "
                            f"block_size={block_size} tokens{more_rows_hint(split)}")
        alone = [[number] for number in range(len(usable))]
        packed = pack_rows(self.lengths[usable], block_size) if self.packing else alone
        self.rows = [usable[row] for row in packed]  # the documents of each row

    def __len__(self) -> int:
        return len(self.rows)

    def read(self, indices: np.ndarray) -> np.ndarray:
        """Rows by number: (n,) -> (n, 3, T) int64: inputs, targets, number of the conversation in the row."""
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
    """One conversation per row."""

    packing = False


def row_class(data: DataFolder, packing: bool) -> type[Rows] | type[ChatRows]:
    """The class of the rows of a folder of texts or chats. That class raises UserError for preferences."""
    if data.meta["kind"] == "text":
        return Rows
    return ChatRows if packing else UnpackedChatRows


class PairRows:
    """One split of a preference folder: prompts, each with a chosen and a rejected answer."""

    kind = "preference"

    def __init__(self, data: DataFolder, split: str, block_size: int):
        """Raises UserError if the folder is of another kind, or if no pair fits."""
        data.require_kind(self.kind)
        self.data, self.split, self.T = data, split, block_size
        self.documents = docs = Documents(data, split, last=2)
        self.prompt, self.chosen = docs.first_target - docs.begin, docs.ones  # (pairs,) lengths in tokens
        self.rejected = docs.end - docs.first_target - docs.ones
        longest = self.prompt + np.maximum(self.chosen, self.rejected) - 1  # inputs of the longer side
        self.usable = np.flatnonzero(longest <= block_size)
        self.left_out = len(longest) - len(self.usable)
        if not len(self.usable):
            raise UserError(f"{data.folder}: none of {len(longest)} {split} preferences fits "
                            f"block_size={block_size}{more_rows_hint(split)}")

    def __len__(self) -> int:
        return len(self.usable)

    def pair(self, number: int) -> tuple[np.ndarray, int, int]:
        """(ids, prompt length, chosen length). ids: prompt, chosen and rejected answer in a row, int64."""
        document = self.usable[number]
        prompt, chosen, rejected = (each[document] for each in (self.prompt, self.chosen, self.rejected))
        return self.documents.tokens(document, prompt + chosen + rejected)[0], prompt, chosen


# ---- Batches ----------------------------------------------------------------------------------------------

def chat_batch(rows: np.ndarray) -> dict[str, Any]:
    """Rows (n, 3, T) of ChatRows as a batch, cut after the last target of them all, at T' <= T.

    Returns {"input_ids", "document_ids": (n, T'), "positions", "targets": (targets,)}, all int64, with
    "count", the number of targets, and "context", `mean_document`. positions: where the targets are in the
    flattened (n T'), so that logits are computed only there.
    """
    last = int(np.max(np.where(rows[:, 1] != IGNORE, np.arange(1, rows.shape[2] + 1), 1)))  # T', at least 1
    rows = rows[:, :, :last]  # (n, 3, T')
    ids, targets, documents = torch.from_numpy(rows.copy()).unbind(1)  # (n, T') each
    positions = (targets.flatten() != IGNORE).nonzero()[:, 0]  # (targets,)
    return {"input_ids": ids, "document_ids": documents, "positions": positions,
            "targets": targets.flatten()[positions], "count": len(positions),
            "context": mean_document(rows[:, 2])}


def batch_of(rows: np.ndarray, eot_id: int, packing: bool, document_mask: bool) -> dict[str, Any]:
    """The batch of text rows (n, T + 1) or of chat rows (n, 3, T)."""
    if rows.ndim == 2:
        return text_batch(rows, eot_id if document_mask else None)
    batch = chat_batch(rows)
    if not packing:  # one conversation per row, padded at the end: causal attention needs no mask
        del batch["document_ids"]
    return batch


def prefix_batch(groups: list[tuple[np.ndarray, list[np.ndarray]]]) -> dict[str, Tensor]:
    """Prompts with several answers each as one row without padding: every prompt, then its answers.

    groups: (ids of a prompt, ids of its answers). Returns {"input_ids": (1, N), "paths": (answers, S),
    "positions", "targets": (targets,), "lengths": (answers,)}, all int64. A path lists the slots of a prompt
    and of one answer. GPT attends along paths, so the prompt is computed once. One prompt p with the answers
    c and r:

        slot         0   1   2   3   4
        input_ids   p0  p1  c0  r0  r1     an answer's last token is no input
        paths       0 1 2 2                the shorter path repeats its last slot
                    0 1 3 4
        positions   1 2   1 3 4            slots whose next token is a target; p1 has two
        targets    c0 c1  r0 r1 r2
        lengths       2      3             targets of each answer
    """
    inputs, targets, paths, positions, end = [], [], [], [], 0
    for prompt, answers in groups:
        inputs.append(prompt)
        shared = np.arange(end, end + len(prompt))
        end += len(prompt)
        for answer in answers:
            inputs.append(answer[:-1])
            targets.append(answer)
            paths.append(np.append(shared, np.arange(end, end + len(answer) - 1)))
            positions.append(paths[-1][len(prompt) - 1:])  # the token before predicts it
            end += len(answer) - 1
    longest = max(map(len, paths))
    batch = {"input_ids": np.concatenate(inputs)[None],  # (1, N)
             "paths": np.stack([np.pad(path, (0, longest - len(path)), mode="edge") for path in paths]),
             "positions": np.concatenate(positions), "targets": np.concatenate(targets),
             "lengths": np.array([len(each) for each in positions])}
    return {key: torch.from_numpy(array) for key, array in batch.items()}


def pair_batch(pairs: list[tuple[np.ndarray, int, int]]) -> dict[str, Any]:
    """n pairs of `PairRows.pair` as a `prefix_batch`, chosen before rejected, with "lengths" (n, 2), "count"
    n, and "context" S."""
    batch = prefix_batch([(ids[:prompt], [ids[prompt:prompt + chosen], ids[prompt + chosen:]])
                          for ids, prompt, chosen in pairs])
    return batch | {"lengths": batch["lengths"].view(-1, 2), "count": len(pairs),
                    "context": batch["paths"].shape[1]}
