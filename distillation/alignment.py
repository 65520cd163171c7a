"""A teacher with another tokenizer: what it predicts, in the student's tokens.

    aligner = Aligner(student_tokenizer, folder_of_the_teacher, context=8192, device=device)
    batch = aligner.align(batch)          # adds the teacher's ids, and where it predicts which target

The teacher reads the text of each row in its own tokens:

    student   | def | _main | () | :  |
    teacher   | def | _ma | in | ():  |

**Groups.** Where a token of the student and one of the teacher begin together, as at "_main", each token of
the teacher counts for the student's first token of its text. Here "_ma" counts for "_ma", if the student has
that token; but the text may go on as "_main". So the student's tokens are put into groups: "_main" is in the
group of "_ma", because the teacher reads its text as "_ma" and "in". The teacher predicts groups.

**Within a group.** If the teacher's token here is the text of the group, as "_ma", its next prediction says
how the text goes on: "in..." means "_main", anything else "_ma". Then the tokens of this group are compared
one by one. Otherwise the text says which token of the group it is: the loss is its cross-entropy.

**Within a token of the teacher.** The student's ":" begins inside the teacher's "():", after the bytes "()",
and does not end beyond it. There, only the teacher's tokens count that begin with "()" and go on, each for
the student's first token of the rest.

The other targets are learned from the text alone: those that begin within a token of the teacher and end
beyond it. Which case applies depends on the text, and so on the target. In each case, the teacher's
probabilities are those given this case, and the text teaches how often each case happens. With equal
tokenizers every group is one token, and the loss is that of ordinary distillation.

What is approximate: a text has many tokenizations, and the teacher's probability of a text is the one of its
own tokenization only. The student's first token of a text may depend on what follows, and the groups know
only the case where the teacher's token ends. A row may begin or end within a word, which the teacher then
reads as a whole word.

Special tokens have no bytes. A special token means the teacher's token of the same name, and the end-of-text
token means the teacher's. The teacher reads any other special token as the text of its name, and its own BOS
at the beginning of rows and documents; neither is compared. Text that the teacher's tokenizer does not
reproduce byte for byte is trained on without the teacher. The log counts the targets that were `aligned`.

Shapes: B rows, T positions of the student, T' of the teacher, E targets that are compared, V the student's
vocabulary, V' the teacher's.
"""

import re
from bisect import bisect_left
from collections import defaultdict
from collections.abc import Iterable
from itertools import groupby
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from configurator import UserError
from dataset.dataloader import IGNORE
from distillation.divergences import AlignedTeacher, DenseTeacher
from formats.tokenizer import Tokenizer
from modeling.devices import to_device

PROBE = "It's a naïve 日本 test: x = 10;\n\tA  b"  # accents, capitals, digits and blanks must survive
NO_RULE = -1


class Rule(NamedTuple):
    """Which tokens of the teacher count, and each for which token of the student."""

    teacher: Tensor  # (n,) int64
    student: Tensor  # (n,) int64

    def translate(self, q: Tensor, vocab_size: int) -> Tensor:
        """Probabilities (m, V') -> (m, V)."""
        return q.new_zeros(len(q), vocab_size).index_add_(1, self.student, q.index_select(1, self.teacher))


class TranslatedTeacher(NamedTuple):
    """A teacher's predictions of E targets."""

    teacher: DenseTeacher  # at its B T' positions
    size: int  # V'
    rules: list[Rule]
    slots: Tensor  # (E,) int64, which of the B T' positions predicts the target
    rule: Tensor  # (E,) int64, number of the rule for this prediction
    split: Tensor  # (E,) int64, number of the rule for the next prediction, within the group; or NO_RULE
    group: Tensor  # (E,) int64, of the target

    def translated(self, slots: Tensor, numbers: Tensor, vocab_size: int, temperature: float) -> Tensor:
        """The predictions at `slots` (n,), each by the rule of its number: probabilities (n, V)."""
        logits = self.teacher.take(slots).logits(slice(None), self.size)  # (n, V')
        q = (logits / temperature).softmax(-1)
        out = q.new_zeros(len(q), vocab_size)
        for number in numbers.unique().tolist():
            rows = (numbers == number).nonzero()[:, 0]
            out[rows] = self.rules[number].translate(q[rows], vocab_size)
        return out

    def log_probs(self, chunk: slice, vocab_size: int, temperature: float) -> Tensor:
        """The log-probabilities of groups at a chunk of targets, and of the tokens of a split group: (n, V).

        Each group has the column of one of its tokens.
        """
        out = self.translated(self.slots[chunk], self.rule[chunk], vocab_size, temperature)
        # Given that a token of the teacher counts at all.
        out /= out.sum(-1, keepdim=True).clamp(min=torch.finfo(torch.float32).tiny)
        rows = (self.split[chunk] != NO_RULE).nonzero()[:, 0]  # (m,)
        if len(rows):
            group = self.group[chunk][rows, None]  # (m, 1)
            within = self.translated(self.slots[chunk][rows] + 1, self.split[chunk][rows], vocab_size,
                                     temperature)  # (m, V)
            # What begins no other token of the group leaves the text where the group's own token ends.
            within.scatter_(1, group, (1 - within.sum(-1, keepdim=True)).clamp(min=0))
            whole = out[rows].gather(1, group)  # (m, 1)
            out[rows] = out[rows].scatter(1, group, 0) + whole * within
        return out.log_()


class AlignedRows(NamedTuple):
    """A teacher's predictions at all B T positions of the student, for a cache."""

    teacher: TranslatedTeacher
    kinds: np.ndarray  # (B T,), as in `compared_first`

    @property
    def hidden(self) -> Tensor:
        return self.teacher.teacher.hidden

    def log_probs(self, chunk: slice, vocab_size: int, temperature: float) -> Tensor:
        """(n, V) at a chunk of positions; -inf at those that are not compared."""
        here, first = np.flatnonzero(self.kinds[chunk]), np.count_nonzero(self.kinds[:chunk.start])
        out = self.hidden.new_full((len(self.kinds[chunk]), vocab_size), -torch.inf, dtype=torch.float32)
        out[here] = self.teacher.log_probs(slice(first, first + len(here)), vocab_size, temperature)
        return out


def full_targets(batch: dict[str, Any]) -> Tensor:
    """The targets of a batch at all positions, (B, T), IGNORE where there is none."""
    if "positions" not in batch:
        return batch["targets"]
    full = torch.full_like(batch["input_ids"], IGNORE)
    full.view(-1)[batch["positions"]] = batch["targets"]
    return full


def compared_first(batch: dict[str, Any], kinds: np.ndarray) -> dict[str, Any]:
    """A batch's "positions" and "targets", the E that are compared first, and "is_split" (E,).

    kinds: (B T,), for the target of each position: 0 not compared, 1 by groups, 2 also within its group.
    """
    targets = full_targets(batch).flatten()
    compared = np.flatnonzero(kinds)
    rest = np.setdiff1d(np.flatnonzero(targets.numpy() != IGNORE), compared)
    positions = torch.from_numpy(np.append(compared, rest))
    return {"positions": positions, "targets": targets[positions],
            "is_split": torch.from_numpy(kinds[compared] == 2)}


class Aligner:
    """Translates batches of the student's tokens for a teacher with another tokenizer."""

    def __init__(self, student: Tokenizer, folder: Path, context: int, device: torch.device):
        """folder: of the teacher. context: most tokens that it reads; what follows is not compared. Raises
        UserError if its tokenizer changes the text."""
        teacher = Tokenizer.load(folder)
        self.student, self.teacher, self.context, self.device = student, teacher, context, device
        self.same = student.definition == teacher.definition
        self.ours, self.theirs = student.token_bytes(), teacher.token_bytes()
        names, vocab = student.hf.get_vocab(), teacher.hf.get_vocab()
        self.special: dict[int, int] = {student.eot_id: teacher.eot_id}
        self.special |= {index: vocab[name] for name, index in names.items()
                         if index in student.special_ids and vocab.get(name) in teacher.special_ids}
        self.unknown = [index for index in names.values()
                        if index in student.special_ids and index not in self.special]
        self.make_groups()
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

    # ---- Groups and rules ---------------------------------------------------------------------------------

    def make_groups(self) -> None:
        """Put each token of the student into a group, and make the rule for targets that begin with a token
        of the teacher."""
        # The teacher's tokens in the order of their bytes: those that begin with a text are neighbours.
        self.order = sorted((i for i, text in enumerate(self.theirs) if text), key=self.theirs.__getitem__)
        self.texts = [self.theirs[index] for index in self.order]
        self.known: dict[bytes, int | None] = {text: index for index, text in enumerate(self.ours) if text}
        self.groups = np.arange(len(self.ours))  # (V,)
        self.rules, self.numbers = list[Rule](), dict[Any, int]()
        self.too_long = set[int]()  # tokens that end beyond the teacher's next token, too
        if self.same:
            self.numbers[b""] = self.add_rule(range(len(self.ours)), range(len(self.ours)))
            self.members: dict[int, list[int]] = {}
            return
        reached = {self.first_token(text) for text in self.texts}
        for index, text in enumerate(self.ours):
            token, begin, end = next(iter(self.encode(text, 0)), (0, 0, 0))
            if index not in reached and begin == 0 < end:  # the teacher reads the beginning of the text
                first = self.first_token(self.theirs[token][-end:])  # without a space that it puts before
                self.groups[index] = index if first is None else first
        members = defaultdict(list)
        for index, group in enumerate(self.groups.tolist()):
            members[group].append(index)
        self.members = {group: tokens for group, tokens in members.items() if len(tokens) > 1}
        rule = self.group_rule(range(len(self.order)), b"") | {b: a for a, b in self.special.items()}
        self.numbers[b""] = self.add_rule(rule.keys(), rule.values())

    def first_token(self, text: bytes) -> int | None:
        """The student's first token of a text; None if the text is none, as the end of a character."""
        if text not in self.known:
            ids = []
            if text.decode(errors="ignore").encode() == text:
                ids = self.student.encode(text.decode(), inside=True)[:1]
            # A tokenizer may change the text, or put a space before it.
            fits = [index for index in ids if self.ours[index] and text.startswith(self.ours[index])]
            self.known[text] = fits[0] if fits else None
        return self.known[text]

    def add_rule(self, *columns: Iterable[int]) -> int:
        """Add a rule of these tokens of the teacher and of the student, and return its number."""
        self.rules.append(Rule(*(torch.tensor([*ids], dtype=torch.int64, device=self.device)
                                 for ids in columns)))
        return len(self.rules) - 1

    def group_rule(self, places: range, prefix: bytes) -> dict[int, int]:
        """{token of the teacher: group of the student's first token of its rest after `prefix`}."""
        firsts = {self.order[place]: self.first_token(self.texts[place][len(prefix):]) for place in places}
        return {token: int(self.groups[first]) for token, first in firsts.items() if first is not None}

    def beginning_with(self, text: bytes) -> range:
        """Where in `order` the teacher's tokens are that begin with a text. UTF-8 has no byte 255."""
        return range(bisect_left(self.texts, text), bisect_left(self.texts, text + b"\xff"))

    def prefix_rule(self, prefix: bytes) -> int:
        """The number of the rule for targets that follow `prefix` within a token of the teacher."""
        if prefix not in self.numbers:
            rule = self.group_rule(self.beginning_with(prefix), prefix)
            self.numbers[prefix] = self.add_rule(rule.keys(), rule.values()) if rule else NO_RULE
        return self.numbers[prefix]

    def split_rule(self, group: int) -> int:
        """The number of the rule for what follows the text of a group: the tokens of the group."""
        if group not in self.numbers:
            base, rule = self.ours[group], dict[int, int]()
            # A longer token comes later, and takes what begins with it.
            for index in sorted(self.members[group], key=lambda index: len(self.ours[index])):
                if index != group and self.ours[index].startswith(base):
                    places = self.beginning_with(self.ours[index][len(base):])
                    rule |= {self.order[place]: index for place in places}
            self.numbers[group] = self.add_rule(rule.keys(), rule.values())
            self.too_long |= {*self.members[group]} - {group, *rule.values()}
        return self.numbers[group]

    # ---- Texts --------------------------------------------------------------------------------------------

    def encode(self, data: bytes, begin: int) -> list[tuple[int, int, int]]:
        """The teacher's tokens of a text that begins at byte `begin`. Bytes that are no UTF-8 have none."""
        tokens: list[tuple[int, int, int]] = []
        text = data.decode("utf-8", "surrogateescape")
        for part in re.finditer("[^\udc80-\udcff]+", text):
            ids, known = self.teacher.encode(part[0], inside=True), part[0].encode()
            read, ends = self.bytes_of(ids), np.cumsum([len(self.theirs[index]) for index in ids])
            if read == b" " + known:  # a sentencepiece tokenizer may put a space before every text
                ends -= 1
            elif read != known:  # the tokenizer changes this text: the teacher reads it, and predicts nothing
                ends[:] = 0
            first = begin + len(text[:part.start()].encode("utf-8", "surrogateescape"))
            edges = [first, *(first + ends).tolist()]
            tokens += zip(ids, edges, edges[1:], strict=False)
        return tokens

    def tokens(self, ids: list[int]) -> tuple[np.ndarray, np.ndarray]:
        """The student's and the teacher's tokens of one document, (n, 3) each: id, first byte and end.

        A special token that both have counts as one byte.
        """
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
        """The teacher's ids of one document, and its targets that are compared, (e, 4): the position of each,
        the slot of the teacher that predicts it, and the numbers of its two rules.

        ids: the document's inputs and its last target, (n,). trained: which of them are targets, (n,) bool.
        """
        ours, theirs = self.tokens(ids.tolist())
        found = []
        covering = np.searchsorted(theirs[:, 2], ours[:, 1], "right")  # the token where each of ours begins
        for place in np.flatnonzero(trained & (covering > 0) & (covering < len(theirs))):
            (index, begin, end), slot = ours[place].tolist(), int(covering[place])
            token, first, last = theirs[slot].tolist()
            if first > begin or index in self.unknown:
                continue  # bytes that the teacher has no token for, or a name that it reads as a text
            text, split = self.theirs[token], NO_RULE
            # A sentencepiece tokenizer may put a space before a text: the prefix then begins with it.
            prefix = b"" if self.same or index in self.special else text[:len(text) - (last - begin)]
            if prefix and end > last:
                continue
            group = int(self.groups[index])
            if not prefix and group in self.members and text == self.ours[group]:
                split = self.split_rule(group)
                split = NO_RULE if index in self.too_long else split
            if (rule := self.prefix_rule(prefix)) != NO_RULE:
                found.append((place - 1, slot - 1, rule, split))
        return theirs[:, 0].tolist(), np.array(found, dtype=np.int64).reshape(-1, 4)

    def align(self, batch: dict[str, Any]) -> dict[str, Any]:
        """The batch with the keys of `compared_first` and of the teacher, all on the CPU.

        "teacher_input_ids" (B, T') and, for documents, "teacher_document_ids" (B, T'). For the targets that
        are compared, "slots", "rule", "split" and "group" of TranslatedTeacher, (E,) int64 each. "kinds":
        the argument of `compared_first`.
        """
        batch = to_device(batch, "cpu")
        B, T = batch["input_ids"].shape
        inputs, targets = (each.flatten().numpy() for each in (batch["input_ids"], full_targets(batch)))
        documents = batch.get("document_ids", torch.zeros_like(batch["input_ids"])).numpy()
        rows: list[list[tuple[int, int]]] = [[] for _ in range(B)]  # (id, document) of the teacher
        parts = [np.zeros((0, 5), dtype=np.int64)]  # row, and the columns of `document`
        begins = np.flatnonzero(np.diff(documents, prepend=-1))  # of the documents in the flattened B T
        for places in np.split(np.arange(B * T), begins[1:]):
            is_target = targets[places] != IGNORE
            if is_target.any():  # else it is padding
                row, first, last = places[0] // T, places[0], places[is_target][-1]
                ids, found = self.document(np.append(inputs[first:last + 1], targets[last]),
                                           np.append(False, is_target[:last + 1 - first]))
                parts.append(np.insert(found + [first, len(rows[row]), 0, 0], 0, row, axis=1))
                rows[row] += [(index, int(documents.flat[first])) for index in ids]
        # Each row is padded with two zeros at least, so that the teacher has an input. Nothing sees padding.
        table = pad_sequence([torch.tensor([*row, (0, 0), (0, 0)]) for row in rows], batch_first=True)
        table = table[:, :self.context + 1]  # (B, T' + 1, 2)
        width = table.shape[1] - 1  # T'
        found = np.concatenate(parts)
        row, place, slot, rule, split = found[found[:, 2] < width].T
        split = np.where(slot + 1 < width, split, NO_RULE)
        kinds = np.zeros(B * T, dtype=np.int64)
        kinds[place] = np.where(split == NO_RULE, 1, 2)
        arrays = {"slots": row * width + slot, "rule": rule, "split": split,
                  "group": self.groups[targets[place]]}
        batch |= {key: torch.from_numpy(array) for key, array in arrays.items()}
        batch |= {"teacher_input_ids": table[:, :-1, 0], "kinds": kinds}
        if "document_ids" in batch:
            batch["teacher_document_ids"] = table[:, :-1, 1]
        return batch | compared_first(batch, kinds)

    def translated(self, batch: dict[str, Any], hidden: Tensor, weight: Tensor | None) -> TranslatedTeacher:
        """The predictions of a teacher that has read "teacher_input_ids".

        hidden, weight: what the teacher's head is called with, (B, T', C) and its output matrix or None.
        """
        dense, keys = DenseTeacher(hidden.flatten(0, 1), weight), ("slots", "rule", "split", "group")
        return TranslatedTeacher(dense, self.teacher.vocab_size, self.rules, *(batch[key] for key in keys))

    def teacher_of(self, batch: dict[str, Any], predictions: Any) -> AlignedTeacher:
        """predictions: a TranslatedTeacher, or a SparseTeacher from a cache."""
        return AlignedTeacher(predictions, torch.from_numpy(self.groups).to(self.device), batch["is_split"])
