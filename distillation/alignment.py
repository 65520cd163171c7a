"""A teacher with another tokenizer: which of its tokens cover the same bytes as which of the student's.

    aligner = Aligner(student_tokenizer, folder_of_the_teacher, context=8192, device=device)
    batch = aligner.align(batch)          # adds the teacher's ids, and orders the targets by their spans

The teacher reads the text of each row in its own tokens. A span is a smallest byte range at whose ends both
tokenizations have a boundary:

    student   | def | _main | () :  |          spans   "def" (1 token and 1 token), "_main" (1 and 2),
    teacher   | def | _ma | in | () | : |              "() :" (1 and 2)

A span of one token on both sides is compared over the pieces that both vocabularies have, with all other
pieces as one class. Any other span has two outcomes: its text, or any other text. The probability of a span's
text is the product of its tokens' probabilities. `divergence` in distillation/divergences.py compares both
kinds. With equal tokenizers, every span is one token, and the loss is that of ordinary distillation.

What is approximate: a text has many tokenizations, and each model's probability of a text is the one of its
own tokenization only. A row may begin or end within a word, which the teacher then reads as a whole word.

Special tokens have no bytes. A special token means the teacher's token of the same name, and the end-of-text
token means the teacher's. The teacher reads any other special token as the text of its name, and its own BOS
at the beginning of rows and documents; neither is compared. Text that the teacher's tokenizer does not
reproduce byte for byte is trained on without the teacher. The log counts the targets that were `aligned`.
"""

import math
import re
from itertools import groupby, pairwise
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from configurator import UserError
from dataset.dataloader import IGNORE
from distillation.divergences import AlignedTeacher, DenseTeacher, SharedPieces, token_log_probs
from formats.tokenizer import Tokenizer
from modeling.devices import to_device

PROBE = "It's a naïve 日本 test: x = 10;\n\tA  b"  # accents, capitals, digits and blanks must survive
Tokens = list[tuple[int, int, int]]  # (id, first byte, end) of the tokens of a text


def match_spans(ours: Tokens, theirs: Tokens) -> list[tuple[int, int, int, int]]:
    """The spans of two tokenizations: (first token, end) of ours, then of theirs, as indices into the lists.

    Tokens without bytes bound no span, and bytes that the teacher has no token for are in none.
    """
    begins, ends = [], []
    for tokens in (ours, theirs):
        filled = [(k, begin, end) for k, (_, begin, end) in enumerate(tokens) if end > begin]
        begins.append({begin: k for k, begin, _ in filled})
        ends.append({end: k + 1 for k, _, end in filled})
    common = sorted((begins[0].keys() | ends[0].keys()) & (begins[1].keys() | ends[1].keys()))
    spans = []
    for begin, end in pairwise(common):
        if all(begin in first and end in last for first, last in zip(begins, ends, strict=True)):
            span = (begins[0][begin], ends[0][end], begins[1][begin], ends[1][end])
            if sum(stop - start for _, start, stop in theirs[span[2]:span[3]]) == end - begin:  # no gap
                spans.append(span)
    return spans


def ranges(begin: np.ndarray, length: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(numbers, which): the numbers begin[s] ... begin[s] + length[s] - 1 of all s in a row, and their s."""
    which = np.repeat(np.arange(len(begin)), length)
    return np.arange(len(which)) + (begin - np.cumsum(length) + length)[which], which


def by_span(batch: dict[str, Any], begin: np.ndarray, length: np.ndarray,
            exact: np.ndarray) -> dict[str, Any]:
    """A batch's "positions" and "targets" in the order of `AlignedTeacher`, "span_of" and "borders".

    begin, length, exact: of each span, (S,): the student's first slot, its number of tokens, and whether the
    span is one token on both sides. A slot is a position in the flattened input ids, whose prediction is for
    the next token.
    """
    targets = full_targets(batch).flatten().numpy()  # (B T,)
    members, span_of = ranges(begin[~exact], length[~exact])
    compared = np.concatenate((begin[exact], members))
    rest = np.setdiff1d(np.flatnonzero(targets != IGNORE), compared)
    positions = torch.from_numpy(np.concatenate((compared, rest)).astype(np.int64))
    borders = exact.sum() + np.cumsum([0, *length[~exact]])
    return {"positions": positions, "targets": torch.from_numpy(targets)[positions],
            "span_of": torch.from_numpy(span_of), "borders": borders.tolist()}


def full_targets(batch: dict[str, Any]) -> Tensor:
    """The targets of a batch at all positions, (B, T), IGNORE where there is none."""
    if "positions" not in batch:
        return batch["targets"]
    full = torch.full_like(batch["input_ids"], IGNORE)
    full.view(-1)[batch["positions"]] = batch["targets"]
    return full


def cached_spans(batch: dict[str, Any], lengths: np.ndarray, cached: dict[str, Tensor]) -> dict[str, Any]:
    """The keys of `by_span` and the teacher's predictions, from the records of all B T slots of a batch.

    lengths: (B T,), the first number of each record (distillation/teacher_cache.py). cached: the predictions.
    Returns also "span_log_q" (S,), and the entries of `cached` for the E exact spans.
    """
    begin = np.flatnonzero(lengths)
    exact = lengths[begin] == 1
    first, longer = torch.from_numpy(begin[exact]), torch.from_numpy(begin[~exact])
    spans = by_span(batch, begin, np.where(exact, 1, lengths[begin] - 1), exact)
    return (spans | {key: values[first] for key, values in cached.items()}
            | {"span_log_q": cached["teacher_probs"][longer, 0].log()})


class AlignedRows(NamedTuple):
    """A teacher's predictions in the student's vocabulary, at all B T slots of the student: for a cache."""

    exact: DenseTeacher  # at the E exact spans
    pieces: SharedPieces
    span_log_q: Tensor  # (S,) of the longer spans
    slots: Tensor  # (E + S,): the first slot of every span, exact ones first
    targets: Tensor  # (E + S,): the student's first token of every span
    lengths: np.ndarray  # (B T,): 0, 1, or 1 + the tokens of the longer span that begins here
    temperature: float

    @classmethod
    def of(cls, teacher: AlignedTeacher, batch: dict[str, Any], temperature: float) -> "AlignedRows":
        """batch: as `Aligner.align` returns it."""
        assert isinstance(teacher.exact, DenseTeacher) and teacher.pieces is not None
        first, borders = teacher.borders[0], np.array(teacher.borders)
        begins = torch.tensor([*range(first), *borders[:-1]], dtype=torch.int64)  # (E + S,)
        positions = batch["positions"].cpu().numpy()
        lengths = np.zeros(batch["input_ids"].numel(), dtype=np.int64)
        lengths[positions[:first]] = 1
        lengths[positions[borders[:-1]]] = 1 + np.diff(borders)
        return cls(teacher.exact, teacher.pieces, teacher.span_log_q, batch["positions"][begins],
                   batch["targets"][begins], lengths, temperature)

    @property
    def hidden(self) -> Tensor:
        return self.exact.hidden

    def log_probs(self, chunk: slice) -> Tensor:
        """(n, V + 1) at a chunk of slots. The last column is all that is no token of the student."""
        pieces, E = self.pieces, len(self.exact.hidden)
        V = len(pieces.ours) + len(pieces.our_rest)
        out = self.hidden.new_full((chunk.stop - chunk.start, V + 1), -math.inf, dtype=torch.float32)
        here = ((self.slots >= chunk.start) & (self.slots < chunk.stop)).nonzero()[:, 0]
        exact, longer = here[here < E], here[here >= E]
        log_q = self.exact.take(exact).logits(slice(None), pieces.teacher_size) / self.temperature
        classes = pieces.teacher_classes(log_q.log_softmax(-1))  # (exact, K or K + 1)
        columns = torch.cat((pieces.ours, pieces.ours.new_tensor([V])))[:classes.shape[1]]
        out[(self.slots[exact] - chunk.start)[:, None], columns] = classes
        rows, text = self.slots[longer] - chunk.start, self.span_log_q[longer - E]
        out[rows, self.targets[longer]], out[rows, V] = text, (-torch.expm1(text)).log()
        return out


class Aligner:
    """Translates batches of the student's tokens for a teacher with another tokenizer."""

    def __init__(self, student: Tokenizer, folder: Path, context: int, device: torch.device):
        """folder: of the teacher. context: most tokens that it reads; what follows is not compared. Raises
        UserError if its tokenizer changes the text."""
        teacher = Tokenizer.load(folder)
        self.student, self.teacher, self.context = student, teacher, context
        self.same = student.definition == teacher.definition
        self.ours, self.theirs = student.token_bytes(), teacher.token_bytes()
        self.adds_space = self.bytes_of(teacher.encode("a", inside=True)) == b" a"
        theirs = teacher.hf.get_vocab()
        self.names = {index: name for name, index in student.hf.get_vocab().items()
                      if index in student.special_ids}
        self.special = {student.eot_id: teacher.eot_id}
        self.special |= {index: theirs[name] for index, name in self.names.items()
                         if theirs.get(name) in teacher.special_ids}
        # The teacher's BOS, unless the student's own BOS stands for it.
        has_bos = student.prefix_ids and self.special.keys() >= set(student.prefix_ids)
        self.prefix = [] if self.same or has_bos else teacher.prefix_ids
        read = self.bytes_of(teacher.encode(PROBE, inside=True)).decode(errors="replace")
        if read.removeprefix(" ") != PROBE:
            raise UserError(f"teacher={folder}: reads {PROBE!r} as {read!r}, so its bytes cannot be aligned")
        self.pieces = self.shared_pieces(device)

    def bytes_of(self, ids: list[int]) -> bytes:
        return b"".join(self.theirs[index] for index in ids)

    def shared_pieces(self, device: torch.device) -> SharedPieces:
        """The pieces that both vocabularies have. The n-th id of some bytes is the n-th of the other side."""
        table: dict[bytes, list[int]] = {}
        for index, text in reversed([*enumerate(self.theirs)]):
            table.setdefault(text, []).append(index)
        pairs = self.special | {index: table[text].pop() for index, text in enumerate(self.ours)
                                if text and table.get(text)}
        if self.same:
            pairs = {index: index for index in range(len(self.ours))}
        ours, theirs = [*pairs], [*pairs.values()]
        rests = (np.setdiff1d(np.arange(size), ids) for size, ids in
                 ((self.student.vocab_size, ours), (self.teacher.vocab_size, theirs)))
        return SharedPieces(*(torch.as_tensor(ids, device=device) for ids in (ours, theirs, *rests)))

    def encode(self, data: bytes, begin: int) -> Tokens:
        """The teacher's tokens of a text that begins at byte `begin`. Bytes that are no UTF-8 have none."""
        tokens: Tokens = []
        for part in re.split("([\udc80-\udcff]+)", data.decode("utf-8", "surrogateescape")):
            size = len(part.encode("utf-8", "surrogateescape"))
            if part and not "\udc80" <= part[0] <= "\udcff":
                # Some tokenizers of the sentencepiece kind put a space before every text.
                drops = self.adds_space and part[0] == " " and len(part) > 1
                ids = self.teacher.encode(part[1:] if drops else part, inside=True)
                ends = np.cumsum([len(self.theirs[index]) for index in ids])
                read = self.bytes_of(ids)
                if read == b" " + part.encode():
                    ends -= 1
                elif read != part.encode():
                    ends[:] = 0  # the tokenizer changes this text: the teacher reads it, and has no span
                edges = [0, *ends.tolist()]
                tokens += [(index, begin + first, begin + end)
                           for index, first, end in zip(ids, edges, edges[1:], strict=False)]
            begin += size
        return tokens

    def tokens(self, ids: list[int]) -> tuple[Tokens, Tokens]:
        """The student's and the teacher's tokens of one document. A special token counts as one byte."""
        if self.same:
            both = [(index, k, k + 1) for k, index in enumerate(ids)]
            return both, both
        ours: Tokens = []
        theirs: Tokens = [(index, 0, 0) for index in self.prefix]
        text, at = b"", 0  # the text since the last special token, and its end
        for index in ids:
            if index not in self.student.special_ids:
                ours.append((index, at, at := at + len(self.ours[index])))
                text += self.ours[index]
                continue
            theirs += self.encode(text, at - len(text))
            if index in self.special:
                theirs.append((self.special[index], at, at + 1))
                theirs += [(k, at, at) for k in self.prefix if index == self.student.eot_id]
            elif index not in self.student.prefix_ids:
                theirs += [(k, at, at) for k in self.teacher.encode(self.names[index], inside=True)]
            ours.append((index, at, at := at + 1))
            text = b""
        return ours, theirs + self.encode(text, at - len(text))

    def document(self, ids: list[int], trained: list[bool]) -> tuple[list[int], np.ndarray]:
        """The teacher's ids of one document, and its spans, (S, 4): first slot and number of tokens, of the
        student and of the teacher.

        ids: the document's inputs and its last target. trained: whether each of the ids is a target.
        """
        ours, theirs = self.tokens(ids)
        spans = [(a - 1, b - a, c - 1, d - c) for a, b, c, d in match_spans(ours, theirs)
                 if a > 0 and c > 0 and all(trained[a:b])]  # nothing predicts the first token
        return [index for index, _, _ in theirs], np.array(spans, dtype=np.int64).reshape(-1, 4)

    def row(self, inputs: list[int], targets: list[int],
            documents: list[int]) -> tuple[np.ndarray, np.ndarray]:
        """The teacher's (ids, documents) of one row, (2, n), and the spans of `document` in the whole row."""
        parts, spans, length = [], [], 0
        for number, group in groupby(range(len(inputs)), documents.__getitem__):
            places = list(group)
            is_target = [targets[k] != IGNORE for k in places]
            if any(is_target):  # else it is padding
                size = max(k for k, yes in enumerate(is_target, 1) if yes)
                first, last = places[0], places[size - 1]
                ids, found = self.document([*inputs[first:last + 1], targets[last]], [False, *is_target])
                parts += [[index, number] for index in ids]
                spans.append(found + [first, 0, length, 0])
                length += len(ids)
        return np.array(parts).reshape(-1, 2).T, np.concatenate([np.zeros((0, 4), dtype=np.int64), *spans])

    def align(self, batch: dict[str, Any]) -> dict[str, Any]:
        """The batch with the keys of `by_span` and of the teacher, all int64 on the CPU.

        "teacher_input_ids" (B, T') and, for documents, "teacher_document_ids" (B, T'). Teacher's slots
        that are compared: "exact_slots" (E,), one per exact span, and "longer_slots" (M,), their
        "longer_targets", and the numbers of their spans, "longer_span" (M,).
        """
        batch = to_device(batch, "cpu")
        B, T = batch["input_ids"].shape
        documents = batch.get("document_ids", torch.zeros_like(batch["input_ids"]))
        rows = [self.row(*lists) for lists in zip(batch["input_ids"].tolist(), full_targets(batch).tolist(),
                                                  documents.tolist(), strict=True)]
        longest = max(2, *(ids.shape[1] for ids, _ in rows))
        table = np.zeros((2, B, longest), dtype=np.int64)  # padding is one more document
        table[1] = T
        for number, (ids, _) in enumerate(rows):
            table[:, number, :ids.shape[1]] = ids
        spans = np.concatenate([found + [number * T, 0, number * longest, 0]
                                for number, (_, found) in enumerate(rows)])
        begin, length, slot, theirs = spans[spans[:, 2] % longest + spans[:, 3] <= self.context].T
        exact = (length == 1) & (theirs == 1)
        longer, which = ranges(slot[~exact], theirs[~exact])
        width = min(longest - 1, self.context)  # the last token of the longest row is no input
        arrays = {"teacher_input_ids": table[0, :, :width].copy(),
                  "longer_targets": table[0].flat[longer + 1],
                  "exact_slots": slot[exact] - slot[exact] // longest * (longest - width),
                  "longer_slots": longer - longer // longest * (longest - width), "longer_span": which}
        if "document_ids" in batch:
            arrays["teacher_document_ids"] = table[1, :, :width].copy()
        tensors = {name: torch.from_numpy(array) for name, array in arrays.items()}
        return batch | by_span(batch, begin, length, exact) | tensors

    def teacher_of(self, batch: dict[str, Any], teacher: DenseTeacher, temperature: float) -> AlignedTeacher:
        """What the loss needs to know of a teacher that has read "teacher_input_ids".

        teacher: at all slots. temperature: that of the divergence.
        """
        log_q = token_log_probs(teacher.take(batch["longer_slots"]), batch["longer_targets"],
                                self.teacher.vocab_size, temperature)  # (M,)
        spans = log_q.new_zeros(len(batch["borders"]) - 1).index_add(0, batch["longer_span"], log_q)  # (S,)
        return AlignedTeacher(teacher.take(batch["exact_slots"]), batch["span_of"], spans, batch["borders"],
                              self.pieces)
