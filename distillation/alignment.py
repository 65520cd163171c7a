"""A teacher with another tokenizer: which of its tokens cover the same bytes as which of the student's.

    aligner = Aligner(student_tokenizer, folder_of_the_teacher, context=8192, device=device)
    batch = aligner.align(batch)          # adds the teacher's ids, and orders the targets by their spans

The teacher reads the text of each row in its own tokens. A span is a smallest byte range at whose ends both
tokenizations have a boundary:

    student   | def | _main | () :  |          spans   "def" (1 token and 1 token), "_main" (1 and 2),
    teacher   | def | _ma | in | () | : |              "() :" (1 and 2)

A span of one token on both sides is compared over the student's vocabulary: each token of the teacher counts
for the student's first token of its text ("];" for "]", if the student reads "]" and ";"). The student's
tokens that no token of the teacher begins with are one class. Any other span has two outcomes: its text, or
any other text. The probability of a span's text is the product of its tokens' probabilities. `divergence` in
distillation/divergences.py compares both kinds. With equal tokenizers, every span is one token, and the loss
is that of ordinary distillation.

What is approximate: a text has many tokenizations, and each model's probability of a text is the one of its
own tokenization only. The student's first token may depend on what follows: "_ma" counts for its "_" or
"_ma", also where the text goes on as "_main", which it reads as one token. A row may begin or end within a
word, which the teacher then reads as a whole word.

Special tokens have no bytes. A special token means the teacher's token of the same name, and the end-of-text
token means the teacher's. The teacher reads any other special token as the text of its name, and its own BOS
at the beginning of rows and documents; neither is compared. Text that the teacher's tokenizer does not
reproduce byte for byte is trained on without the teacher. The log counts the targets that were `aligned`.

Shapes: B rows, T positions of the student, E exact spans (one token on both sides), S longer spans.
"""

import math
import re
from itertools import groupby
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from configurator import UserError
from dataset.dataloader import IGNORE
from distillation.divergences import AlignedTeacher, DenseTeacher, FirstTokens, token_log_probs
from formats.tokenizer import Tokenizer
from modeling.devices import to_device

PROBE = "It's a naïve 日本 test: x = 10;\n\tA  b"  # accents, capitals, digits and blanks must survive


def match_spans(ours: np.ndarray, theirs: np.ndarray) -> np.ndarray:
    """The spans of two tokenizations, (S, 4): first token and end of ours, first token and end of theirs.

    ours, theirs: (n, 3), id, first byte and end of each token, in order. Tokens without bytes are in no span,
    and so are bytes that the teacher has no token for.
    """
    edges = np.intersect1d(ours[:, 1:], theirs[:, 1:])  # sorted bytes
    begin, end = edges[:-1], edges[1:]
    columns, fits = [], np.ones(len(begin), dtype=bool)
    for tokens in (ours, theirs):
        sizes = np.append(0, np.cumsum(tokens[:, 2] - tokens[:, 1]))
        first = np.searchsorted(tokens[:, 2], begin, "right")
        last = np.searchsorted(tokens[:, 2], end, "left")
        # A gap in the tokens: the first one begins later, or their bytes are too few.
        fits &= (tokens[first, 1] == begin) & (sizes[last + 1] - sizes[first] == end - begin)
        columns += [first, last + 1]
    return np.stack(columns, axis=1)[fits]


def ranges(begin: np.ndarray, length: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(numbers, which): the numbers begin[s] ... begin[s] + length[s] - 1 of all s in a row, and their s."""
    which = np.repeat(np.arange(len(begin)), length)
    return np.arange(len(which)) + (begin - np.cumsum(length) + length)[which], which


def full_targets(batch: dict[str, Any]) -> Tensor:
    """The targets of a batch at all positions, (B, T), IGNORE where there is none."""
    if "positions" not in batch:
        return batch["targets"]
    full = torch.full_like(batch["input_ids"], IGNORE)
    full.view(-1)[batch["positions"]] = batch["targets"]
    return full


def by_span(batch: dict[str, Any], lengths: np.ndarray) -> dict[str, Any]:
    """A batch's "positions" and "targets" in the order of `AlignedTeacher`, "span_of", and S as "spans".

    lengths: (B T,), what begins at each position of the flattened input ids, whose prediction is for the next
    token: 0 no span, 1 an exact span, 1 + n a longer span of n tokens of the student.
    """
    targets, exact, begin = full_targets(batch).flatten(), lengths == 1, np.flatnonzero(lengths > 1)
    members, span_of = ranges(begin, lengths[begin] - 1)
    compared = np.append(np.flatnonzero(exact), members)
    rest = np.setdiff1d(np.flatnonzero(targets.numpy() != IGNORE), compared)
    positions = torch.from_numpy(np.append(compared, rest))
    return {"positions": positions, "targets": targets[positions], "span_of": torch.from_numpy(span_of),
            "spans": len(begin)}


def cached_spans(batch: dict[str, Any], lengths: np.ndarray, cached: dict[str, Tensor]) -> dict[str, Any]:
    """The keys of `by_span`, "span_log_q" (S,), and the entries of `cached` for the E exact spans.

    lengths: (B T,), the first number of each record (distillation/teacher_cache.py). cached: the predictions
    of all records.
    """
    spans = by_span(batch, lengths) | {key: values[lengths == 1] for key, values in cached.items()}
    return spans | {"span_log_q": cached["teacher_probs"][lengths > 1, 0].log()}


class AlignedRows(NamedTuple):
    """A teacher's predictions in the student's vocabulary at all B T positions, for a cache."""

    teacher: AlignedTeacher
    lengths: np.ndarray  # (B T,), the argument of `by_span`
    targets: np.ndarray  # (B T,)

    @property
    def hidden(self) -> Tensor:
        return self.teacher.exact[0]

    def log_probs(self, chunk: slice, vocab_size: int, temperature: float) -> Tensor:
        """(n, V + 1) at a chunk of positions. The last column is all that is no token of the student.

        At the beginning of a longer span, the column of its first token has the probability of its text.
        """
        assert isinstance(self.teacher.exact, DenseTeacher)
        here, before = self.lengths[chunk], self.lengths[:chunk.start]
        exact, longer = np.flatnonzero(here == 1), np.flatnonzero(here > 1)
        first, first_longer = int((before == 1).sum()), int((before > 1).sum())
        out = self.hidden.new_full((len(here), vocab_size + 1), -math.inf, dtype=torch.float32)
        out[exact] = self.teacher.exact.log_probs(slice(first, first + len(exact)), vocab_size, temperature)
        text = self.teacher.span_log_q[first_longer:first_longer + len(longer)]
        out[longer, self.targets[chunk][longer]], out[longer, vocab_size] = text, (-text.expm1()).log()
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
        names, vocab = student.hf.get_vocab(), teacher.hf.get_vocab()
        self.special: dict[int, int] = {student.eot_id: teacher.eot_id}
        self.special |= {index: vocab[name] for name, index in names.items()
                         if index in student.special_ids and vocab.get(name) in teacher.special_ids}
        self.first = self.first_tokens(device)
        self.unknown = [index for index in names.values()
                        if index in student.special_ids and index not in self.special]
        for name, index in names.items():
            if index in self.unknown and index not in student.prefix_ids:
                self.ours[index] = name.encode()
        # The teacher's BOS, unless the student's own BOS stands for it.
        has_bos = student.prefix_ids and self.special.keys() >= set(student.prefix_ids)
        self.prefix = [] if self.same or has_bos else teacher.prefix_ids
        read = self.bytes_of(teacher.encode(PROBE, inside=True)).decode(errors="replace")
        if read.removeprefix(" ") != PROBE:
            raise UserError(f"teacher={folder}: reads {PROBE!r} as {read!r}, so its bytes cannot be aligned")

    def bytes_of(self, ids: list[int]) -> bytes:
        return b"".join(self.theirs[index] for index in ids)

    def first_tokens(self, device: torch.device) -> FirstTokens:
        """The student's first token of the text of each token of the teacher."""
        if self.same:
            ids = torch.arange(len(self.ours), device=device)
            return FirstTokens(ids, ids[:0])
        known = {text: index for index, text in enumerate(self.ours) if text}
        first = np.full(len(self.theirs), len(self.ours))
        for index, text in enumerate(self.theirs):
            if text not in known and text.decode(errors="ignore").encode() == text:
                begin = self.student.encode(text.decode(), inside=True)[:1]
                # A tokenizer may change the text, or put a space before it.
                known[text] = next((id for id in begin if text.startswith(self.ours[id])), len(self.ours))
            first[index] = known.get(text, len(self.ours))
        first[[*self.special.values()]] = [*self.special]
        unreached = np.setdiff1d(np.arange(len(self.ours)), first)
        return FirstTokens(*(torch.as_tensor(ids, device=device) for ids in (first, unreached)))

    def encode(self, data: bytes, begin: int) -> list[tuple[int, int, int]]:
        """The teacher's tokens of a text that begins at byte `begin`. Bytes that are no UTF-8 have none."""
        tokens: list[tuple[int, int, int]] = []
        text = data.decode("utf-8", "surrogateescape")
        for part in re.finditer("[^\udc80-\udcff]+", text):
            ids, known = self.teacher.encode(part[0], inside=True), part[0].encode()
            read, ends = self.bytes_of(ids), np.cumsum([len(self.theirs[index]) for index in ids])
            if read == b" " + known:  # a sentencepiece tokenizer may put a space before every text
                ends -= 1
            elif read != known:  # the tokenizer changes this text: the teacher reads it, and has no span
                ends[:] = 0
            first = begin + len(text[:part.start()].encode("utf-8", "surrogateescape"))
            edges = [first, *(first + ends).tolist()]
            tokens += zip(ids, edges, edges[1:], strict=False)
        return tokens

    def tokens(self, ids: list[int]) -> tuple[np.ndarray, np.ndarray]:
        """The student's and the teacher's tokens of one document, as `match_spans` takes them. A special
        token that both have counts as one byte."""
        sizes = [1 if self.same or index in self.special else len(self.ours[index]) for index in ids]
        ends = np.cumsum(sizes)
        ours = np.stack((ids, ends - sizes, ends), axis=1)
        if self.same:
            return ours, ours
        theirs, at = [(index, 0, 0) for index in self.prefix], 0
        for is_special, group in groupby(ids, self.special.__contains__):
            if not is_special:
                data = b"".join(self.ours[index] for index in group)
                theirs += self.encode(data, at)
                at += len(data)
                continue
            for index in group:
                theirs.append((self.special[index], at, at := at + 1))
                theirs += [(each, at, at) for each in self.prefix if index == self.student.eot_id]
        return ours, np.array(theirs, dtype=np.int64).reshape(-1, 3)

    def document(self, ids: np.ndarray, trained: np.ndarray) -> tuple[list[int], np.ndarray]:
        """The teacher's ids of one document, and the spans, (spans, 4): first position and number of tokens,
        of the student and of the teacher.

        ids: the document's inputs and its last target, (n,). trained: which of them are targets, (n,) bool.
        """
        ours, theirs = self.tokens(ids.tolist())
        a, b, c, d = match_spans(ours, theirs).T
        before = np.append(0, np.cumsum(trained & ~np.isin(ids, self.unknown)))  # targets before each token
        keep = (before[b] - before[a] == b - a) & (c > 0)  # nothing predicts the teacher's first token
        return theirs[:, 0].tolist(), np.stack((a - 1, b - a, c - 1, d - c), axis=1)[keep]

    def align(self, batch: dict[str, Any]) -> dict[str, Any]:
        """The batch with the keys of `by_span` and of the teacher, all int64 on the CPU.

        "teacher_input_ids" (B, T') and, for documents, "teacher_document_ids" (B, T'). The positions that
        are compared, in the flattened B T': "exact_slots" (E,), one per exact span, and "longer_slots" (M,),
        their "longer_targets", and the numbers of their spans, "longer_span" (M,).
        """
        batch = to_device(batch, "cpu")
        B, T = batch["input_ids"].shape
        inputs, targets = (each.flatten().numpy() for each in (batch["input_ids"], full_targets(batch)))
        documents = batch.get("document_ids", torch.zeros_like(batch["input_ids"])).numpy()
        rows: list[list[tuple[int, int]]] = [[] for _ in range(B)]  # (id, document) of the teacher
        spans = [np.zeros((0, 5), dtype=np.int64)]  # row, and the columns of `document`
        begins = np.flatnonzero(np.diff(documents, prepend=-1))  # of the documents in the flattened B T
        for places in np.split(np.arange(B * T), begins[1:]):
            is_target = targets[places] != IGNORE
            if is_target.any():  # else it is padding
                row, first, last = places[0] // T, places[0], places[is_target][-1]
                ids, found = self.document(np.append(inputs[first:last + 1], targets[last]),
                                           np.append(False, is_target[:last + 1 - first]))
                spans.append(np.insert(found + [first, 0, len(rows[row]), 0], 0, row, axis=1))
                rows[row] += [(index, int(documents.flat[first])) for index in ids]
        # Each row is padded with two zeros at least, so that the teacher has an input. Nothing sees padding.
        table = pad_sequence([torch.tensor([*row, (0, 0), (0, 0)]) for row in rows], batch_first=True)
        table = table[:, :self.context + 1]  # (B, T' + 1, 2)
        width = table.shape[1] - 1  # T'
        found = np.concatenate(spans)
        row, begin, length, slot, count = found[found[:, 3] + found[:, 4] <= width].T
        exact, slot = (length == 1) & (count == 1), row * width + slot
        lengths = np.zeros(B * T, dtype=np.int64)
        lengths[begin] = np.where(exact, 1, 1 + length)
        longer, which = (torch.from_numpy(each) for each in ranges(slot[~exact], count[~exact]))
        batch |= {"teacher_input_ids": table[:, :-1, 0], "exact_slots": torch.from_numpy(slot[exact]),
                  "longer_slots": longer, "longer_targets": table[:, 1:, 0].flatten()[longer],
                  "longer_span": which, "lengths": lengths}
        if "document_ids" in batch:
            batch["teacher_document_ids"] = table[:, :-1, 1]
        return batch | by_span(batch, lengths)

    def teacher_of(self, batch: dict[str, Any], hidden: Tensor, weight: Tensor | None,
                   temperature: float) -> AlignedTeacher:
        """What the loss needs to know of a teacher that has read "teacher_input_ids".

        hidden, weight: what the teacher's head is called with, (B, T', C) and its output matrix or None.
        temperature: that of the divergence.
        """
        teacher = DenseTeacher(hidden.flatten(0, 1), weight, self.first)  # (B T', C)
        log_q = token_log_probs(teacher.take(batch["longer_slots"]), batch["longer_targets"],
                                self.teacher.vocab_size, temperature)  # (M,)
        spans = log_q.new_zeros(batch["spans"]).index_add(0, batch["longer_span"], log_q)  # (S,)
        return AlignedTeacher(teacher.take(batch["exact_slots"]), batch["span_of"], spans)
