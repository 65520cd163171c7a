"""A teacher with another tokenizer: what it predicts, in the student's tokens.

    aligner = Aligner(student_tokenizer, folder_of_the_teacher, context=8192, device=device)
    batch = aligner.align(batch)          # adds the teacher's ids, and where it predicts which target

The teacher reads the text of each row in its own tokens:

    student   | def | _main | () | :  |
    teacher   | def | _ma | in | ():  |

**The map.** Each token of the teacher is mapped to the first token that the student's tokenizer gives for its
text. The probabilities of the teacher's tokens that are mapped to the same token are added.

**Groups.** The map is not enough for "_main". The teacher has no such token and reads "_ma" and "in", so its
probability of "_ma" is that of "_ma" and of "_main". These two are a group: each token of the student is in
the group of the token that the teacher's first token of its text is mapped to. The teacher predicts groups.

**Within a group.** Where the teacher's token is the whole text of the group's own token, as "_ma", the next
prediction says how the text goes on: "in..." means "_main", anything else "_ma". There the tokens of the
target's group are compared one by one. A token that the teacher tells apart only by a third token stays
together with the one that its first two tokens are mapped to: the group has parts. Which token of a group or
part it is, the student learns from the text, by the cross-entropy within the group or part.

**After the student's own tokens.** If the student has a token "def_", it would not have read "def" before a
"_": so after its "def" the teacher's tokens that begin with "_" do not count. The other probabilities are
divided by their sum. (If all texts of tokens are equal on both sides, all tokens count.)

**Within a token of the teacher.** The student's ":" begins inside the teacher's "():", after the bytes "()".
There, only those tokens of the teacher are used that begin with "()" and go on, mapped by the rest of their
texts.

Two kinds of targets are learned from the text alone: those that begin within a token of the teacher and end
beyond it, and those that are in another group than the one that the teacher's own next token is mapped to.

Which case applies depends on the text that follows. In each case, the teacher's probabilities are those given
this case; the text teaches how often each case happens. The gradient of the forward KL is linear in the
teacher's probabilities, so it averages over the cases. No other divergence does that. With equal tokenizers
every group is one token, and the loss is that of ordinary distillation.

What is approximate: a text has many tokenizations, and the teacher's probability of a text is the one of its
own tokenization only. How the student cuts a text may depend on what follows, and the map knows only the text
of one token, or of two within a group. A row may begin or end within a word, which the teacher then reads as
a whole word.

Special tokens have no bytes. A special token means the teacher's token of the same name, and the end-of-text
token means the teacher's. The teacher reads any other special token as the text of its name, and its own BOS
at the beginning of rows and documents; neither is compared. Text that the teacher's tokenizer does not
reproduce byte for byte is trained on without the teacher. The log counts the targets that were `aligned`.

Shapes: B rows, T positions of the student, T' of the teacher, E targets that are compared, V the student's
vocabulary, V' the teacher's.
"""

import re
import threading
from bisect import bisect_left, bisect_right
from collections import defaultdict
from collections.abc import Sequence
from itertools import groupby, pairwise
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from configurator import UserError
from dataset.dataloader import IGNORE
from distillation.divergences import AlignedTeacher, DenseTeacher, Groups
from formats.tokenizer import Tokenizer
from modeling.devices import to_device

PROBE = "It's a naïve 日本 test: x = 10;\n\tA  b"  # accents, capitals, digits and blanks must survive
NO_RULE = -1  # in place of a rule's number, where no rule applies


def copy_to(array: np.ndarray, device: torch.device) -> Tensor:
    """An array as a tensor on `device`, without waiting for what a GPU computes."""
    return torch.from_numpy(array).to(device, non_blocking=True)


class Rule(NamedTuple):
    """Which tokens of the teacher count, and each for which token of the student."""

    teacher: Tensor  # (n,) int64
    student: Tensor  # (n,) int64

    def translate(self, q: Tensor, vocab_size: int) -> Tensor:
        """Probabilities (m, V') -> (m, V)."""
        return q.new_zeros(len(q), vocab_size).index_add_(1, self.student, q.index_select(1, self.teacher))


class TranslatedTeacher(NamedTuple):
    """A teacher's predictions of E targets."""

    aligner: "Aligner"
    teacher: DenseTeacher  # at its B T' positions
    slots: Tensor  # (E,) int64, which of the B T' positions predicts the target
    group: Tensor  # (E,) int64, of the target
    # On the CPU, so that looking for the targets of a rule does not wait for a GPU.
    rule: np.ndarray  # (E,) int64, number of the rule for this prediction
    split: np.ndarray  # (E,) int64, number of the rule for the next prediction, within the group; or NO_RULE
    exclusion: np.ndarray  # (E,) int64, number in the aligner's `excluded`

    def probabilities(self, slots: Tensor, numbers: np.ndarray, vocab_size: int, temperature: float,
                      exclusion: Sequence[int] = ()) -> Tensor:
        """The predictions at `slots` (n,), each by the rule of its number: probabilities (n, V).

        exclusion: for each slot, the number in the aligner's `excluded` of the tokens that do not count.
        """
        logits = self.teacher.logits(slots, self.aligner.teacher.vocab_size)  # (n, V')
        q = (logits / temperature).softmax(-1)  # (n, V')
        if exclusion:
            tokens = [self.aligner.excluded[number] for number in exclusion]
            pairs = np.repeat(np.arange(len(tokens)), [*map(len, tokens)]), np.concatenate(tokens)
            q[tuple(copy_to(each, q.device) for each in pairs)] = 0
        out = q.new_zeros(len(q), vocab_size)  # (n, V)
        for number in np.unique(numbers).tolist():
            rows = copy_to(np.flatnonzero(numbers == number), q.device)
            out[rows] = self.aligner.rules[number].translate(q[rows], vocab_size)
        return out

    def log_probs(self, chunk: slice, vocab_size: int, temperature: float) -> Tensor:
        """The log-probabilities of groups at a chunk of targets, as in Groups.sum: (n, V)."""
        out = self.probabilities(self.slots[chunk], self.rule[chunk], vocab_size, temperature,
                                 self.exclusion[chunk].tolist())  # (n, V)
        # Divide by the sum: the probabilities are those given that a token of the teacher counts at all.
        out /= out.sum(-1, keepdim=True).clamp(min=torch.finfo(torch.float32).tiny)
        is_split, group = self.split[chunk] != NO_RULE, self.group[chunk]  # (n,) both
        rows = copy_to(np.flatnonzero(is_split), out.device)  # (m,)
        if len(rows):
            base = group[rows, None]  # (m, 1)
            within = self.probabilities(self.slots[chunk][rows] + 1, self.split[chunk][is_split], vocab_size,
                                        temperature)  # (m, V)
            # The group's own token gets the rest: next tokens that begin no other token of the group.
            within.scatter_(1, base, (1 - within.sum(-1, keepdim=True)).clamp(min=0))
            whole = out[rows].gather(1, base)  # (m, 1)
            out[rows] = out[rows].scatter(1, base, 0) + whole * within
        row, token = self.aligner.student_groups.members(group[rows])
        return self.aligner.student_groups.sum(out, rows[row], token).log_()


class AlignedRows(NamedTuple):
    """A teacher's predictions at all B T positions of the student, for a cache."""

    teacher: TranslatedTeacher
    kinds: np.ndarray  # (B T,), as in `compared_first`

    @property
    def hidden(self) -> Tensor:
        """The teacher's hidden states, as in DenseTeacher."""
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
    targets = full_targets(batch).flatten()  # (B T,)
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
        self.ours, self.theirs = student.token_bytes(), teacher.token_bytes()  # the bytes of each token
        self.lock = threading.Lock()
        names, vocab = student.hf.get_vocab(), teacher.hf.get_vocab()
        # The student's special tokens: {id: the teacher's id}, and those that the teacher does not have.
        self.special: dict[int, int] = {student.eot_id: teacher.eot_id}
        self.special |= {index: vocab[name] for name, index in names.items()
                         if index in student.special_ids and vocab.get(name) in teacher.special_ids}
        self.unknown = {index for index in names.values()
                        if index in student.special_ids and index not in self.special}
        self.adds_space = self.bytes_of(teacher.encode("a", inside=True)) == b" a"  # as sentencepiece does
        self.make_groups()
        several = np.flatnonzero(np.bincount(self.groups)[self.groups] > 1)
        arrays = self.groups, self.parts, several
        self.student_groups = Groups(*(torch.from_numpy(array).to(device) for array in arrays))
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

    def encode(self, data: bytes, begin: int) -> list[tuple[int, int, int]]:
        """The teacher's tokens of a text that begins at byte `begin`. Bytes that are no UTF-8 have none."""
        tokens: list[tuple[int, int, int]] = []
        text = data.decode("utf-8", "surrogateescape")
        for part in re.finditer("[^\udc80-\udcff]+", text):
            ids, known = self.teacher.encode(part[0], inside=True), part[0].encode()
            read, ends = self.bytes_of(ids), np.cumsum([len(self.theirs[index]) for index in ids])
            first = begin + len(text[:part.start()].encode("utf-8", "surrogateescape"))
            lines = known.splitlines(keepends=True)
            if read not in (known, b" " + known) and len(lines) > 1:  # changed, but perhaps in one line only
                for line in lines:
                    tokens += self.encode(line, first)
                    first += len(line)
                continue
            if read == b" " + known:  # a sentencepiece tokenizer may put a space before every text
                ends -= 1
            elif read != known:  # the tokenizer changes this line: the teacher reads it, and predicts nothing
                ends[:] = 0
            edges = [first, *(first + ends).tolist()]
            tokens += zip(ids, edges, edges[1:], strict=False)
        return tokens

    # ---- Groups and rules ---------------------------------------------------------------------------------

    def first_token(self, text: bytes) -> int | None:
        """The student's first token of a text; None if the bytes are no text, as the end of a character."""
        if text in self.index_of:
            return self.index_of[text]
        ids = []
        if text.decode(errors="ignore").encode() == text:
            ids = self.student.encode(text.decode(), inside=True)[:1]
        # A tokenizer may change the text, or put a space before it.
        return next((index for index in ids if self.ours[index] and text.startswith(self.ours[index])), None)

    def pieces(self, text: bytes) -> list[bytes]:
        """A text as the teacher's tokens cut it inside a longer one; [] if it does not begin with a token."""
        begin = int(self.adds_space and text[:1] == b" ")  # the teacher puts this space there itself
        # White space may be read in another way at the end of a text than before a letter.
        if text[-1:].isspace() and self.first_token(text + b"a") == self.index_of[text]:
            text += b"a"
        tokens = self.encode(text[begin:], begin)
        if not tokens or tokens[0][1] > begin:
            return []
        cuts = [0, *(end for _, _, end in tokens)]
        return [piece for piece in (text[a:b] for a, b in pairwise(cuts)) if piece]

    def add_rule(self, rule: dict[int, int]) -> int:
        """Add the rule {token of the teacher: token of the student}, and return its number."""
        if not rule:
            return NO_RULE
        self.maps[len(self.rules)] = rule
        arrays = (np.fromiter(ids, np.int64) for ids in (rule.keys(), rule.values()))
        self.rules.append(Rule(*(copy_to(array, self.device) for array in arrays)))
        return len(self.rules) - 1

    def text_rule(self, places: range, prefix: bytes) -> dict[int, int]:
        """{token of the teacher: the student's first token of its rest after `prefix`}."""
        firsts = {self.order[place]: self.first_token(self.texts[place][len(prefix):]) for place in places}
        return {token: first for token, first in firsts.items() if first is not None}

    def beginning_with(self, text: bytes) -> range:
        """Where in `order` the teacher's tokens are that begin with a text. UTF-8 has no byte 255."""
        return range(bisect_left(self.texts, text), bisect_left(self.texts, text + b"\xff"))

    def make_groups(self) -> None:
        """Put each token of the student into a group and a part of it, and make the rule for targets that
        begin with a token of the teacher."""
        # The teacher's tokens in the order of their bytes: those that begin with a text are neighbours.
        self.order = sorted((i for i, text in enumerate(self.theirs) if text), key=self.theirs.__getitem__)
        self.texts = [self.theirs[index] for index in self.order]
        self.index_of = {text: index for index, text in enumerate(self.ours) if text}  # the student's tokens
        self.groups, self.parts = np.arange(len(self.ours)), np.arange(len(self.ours))  # (V,) each
        # numbers: of a rule, by its prefix or its group; of an exclusion, by (prefix, token before).
        self.rules, self.numbers = list[Rule](), dict[Any, int]()
        self.maps: dict[int, dict[int, int]] = {NO_RULE: {}}  # the rules again, for lookups
        self.our_texts = sorted(self.index_of)
        self.excluded = list[np.ndarray]()  # (n,) int64 each, tokens of the teacher that do not count
        self.same_texts = sorted(self.ours) == sorted(self.theirs)  # then it is ordinary distillation
        self.members = defaultdict[int, list[int]](list)  # of each group, without its own token
        if self.same:
            self.numbers[b""] = self.add_rule({index: index for index in range(len(self.ours))})
            return
        # From short to long: a text's first token is shorter than the text, so it has its group already.
        for index in sorted(range(len(self.ours)), key=lambda index: len(self.ours[index])):
            pieces = self.pieces(self.ours[index])
            first = self.first_token(pieces[0]) if pieces else None
            if first is None or first == index:
                continue
            self.groups[index] = self.parts[index] = group = int(self.groups[first])
            self.members[group].append(index)
            if len(pieces) > 1 and pieces[0] == self.ours[group]:
                part = self.first_token(pieces[0] + pieces[1])
                if part is not None and self.groups[part] == group:
                    self.parts[index] = part if part == index else self.parts[part]
        rule = self.text_rule(range(len(self.order)), b"") | {b: a for a, b in self.special.items()}
        self.numbers[b""] = self.add_rule(rule)

    def prefix_rule(self, prefix: bytes) -> int:
        """The number of the rule for targets that follow `prefix` within a token of the teacher."""
        if prefix not in self.numbers:
            self.numbers[prefix] = self.add_rule(self.text_rule(self.beginning_with(prefix), prefix))
        return self.numbers[prefix]

    def exclusion(self, prefix: bytes, before: int) -> int:
        """The number, in `excluded`, of the tokens of the teacher that begin with `prefix` and whose rest
        cannot follow the student's token `before`, because the student would read both in another way."""
        if (prefix, before) not in self.numbers:
            text, texts, places = self.ours[before], self.our_texts, {*self.beginning_with(prefix)}
            if not prefix:  # only those that could go on a longer token of the student
                longer = texts[bisect_right(texts, text):bisect_left(texts, text + b"\xff")]
                places = {place for each in longer for place in self.beginning_with(each[len(text):])}
            if self.same_texts or not text or before in self.student.special_ids:
                places = set()
            firsts = {place: self.first_token(text + self.texts[place][len(prefix):]) for place in places}
            self.excluded.append(np.array([self.order[place] for place, first in sorted(firsts.items())
                                          if first is not None and self.ours[first] != text], dtype=np.int64))
            self.numbers[prefix, before] = len(self.excluded) - 1
        return self.numbers[prefix, before]

    def split_rule(self, group: int) -> int:
        """The number of the rule for the token of the teacher that follows the text of a group."""
        if group not in self.numbers:
            base, rule = self.ours[group], dict[int, int]()
            heads = [self.ours[index] for index in self.members[group] if self.parts[index] == index]
            for place in (each for head in heads for each in self.beginning_with(head.removeprefix(base))):
                first = self.first_token(base + self.texts[place])
                if first not in (None, group) and self.groups[first] == group:
                    rule[self.order[place]] = first
            self.numbers[group] = self.add_rule(rule)
        return self.numbers[group]

    # ---- Documents and batches ----------------------------------------------------------------------------

    def tokens(self, ids: list[int]) -> tuple[np.ndarray, np.ndarray]:
        """The student's and the teacher's tokens of one document, (n, 3) each: id, first byte and end.

        A special token that both have counts as one byte.
        """
        sizes = [1 if self.same or index in self.special else len(self.ours[index]) for index in ids]
        ends = np.cumsum(sizes)
        ours = np.stack((ids, ends - sizes, ends), axis=1)
        if self.same:
            return ours, ours
        theirs, at = [(index, 0, 0) for index in self.prefix if ids[0] != self.student.eot_id], 0
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
        """The teacher's ids of one document, and its targets that are compared, (e, 5): the position of each,
        the slot of the teacher that predicts it, the numbers of its two rules, and its number in `excluded`.

        ids: the document's inputs and its last target, (n,). trained: which of them are targets, (n,) bool.
        """
        ours, theirs = self.tokens(ids.tolist())
        compared = []
        covering = np.searchsorted(theirs[:, 2], ours[:, 1], "right")  # the token where each of ours begins
        for place in np.flatnonzero(trained & (covering > 0) & (covering < len(theirs))):
            (index, begin, end), before = ours[place].tolist(), int(ours[place - 1, 0])
            slot = int(covering[place])
            token, first, last = theirs[slot].tolist()
            if first > begin or index in self.unknown:
                continue  # bytes that the teacher has no token for, or a name that it reads as a text
            text, group, split = self.theirs[token], int(self.groups[index]), NO_RULE
            # A sentencepiece tokenizer may put a space before a text: the prefix then begins with it.
            prefix = b"" if self.same or index in self.special else text[:len(text) - (last - begin)]
            rule = NO_RULE if prefix and end > last else self.prefix_rule(prefix)
            # The student may read this text in another way than that of the teacher's token alone.
            mapped, exclusion = self.maps[rule].get(token), self.exclusion(prefix, before)
            if mapped is None or self.groups[mapped] != group or token in self.excluded[exclusion]:
                continue
            if not prefix and group in self.members and text == self.ours[group] and slot + 1 < len(theirs):
                split = self.split_rule(group)
                if self.parts[self.maps[split].get(int(theirs[slot + 1, 0]), group)] != self.parts[index]:
                    split = NO_RULE
            compared.append((place - 1, slot - 1, rule, split, exclusion))
        return theirs[:, 0].tolist(), np.array(compared, dtype=np.int64).reshape(-1, 5)

    def align(self, batch: dict[str, Any]) -> dict[str, Any]:
        """The batch with the keys of `compared_first` and of the teacher, tensors and arrays on the CPU.

        "teacher_input_ids" (B, T') and, for documents, "teacher_document_ids" (B, T'). For the targets that
        are compared, the last five fields of TranslatedTeacher, (E,) int64 each. "kinds": the argument of
        `compared_first`.
        """
        batch = to_device(batch, "cpu")
        B, T = batch["input_ids"].shape
        inputs, targets = (each.flatten().numpy() for each in (batch["input_ids"], full_targets(batch)))
        documents = batch.get("document_ids", torch.zeros_like(batch["input_ids"])).numpy()
        rows: list[list[tuple[int, int]]] = [[] for _ in range(B)]  # (id, document) of the teacher
        parts = [np.zeros((0, 6), dtype=np.int64)]  # row, and the columns of `document`
        begins = np.flatnonzero(np.diff(documents, prepend=-1))  # of the documents in the flattened B T
        for places in np.split(np.arange(B * T), begins[1:]):
            is_target = targets[places] != IGNORE
            if is_target.any():  # else it is padding
                row, first, last = places[0] // T, places[0], places[is_target][-1]
                with self.lock:  # a thread aligns the next batch while the student's own text is aligned
                    ids, compared = self.document(np.append(inputs[first:last + 1], targets[last]),
                                                  np.append(False, is_target[:last + 1 - first]))
                parts.append(np.insert(compared + [first, len(rows[row]), 0, 0, 0], 0, row, axis=1))
                rows[row] += [(index, int(documents.flat[first])) for index in ids]
        # Each row is padded with two zeros at least, so that the teacher has an input. Nothing sees padding.
        table = pad_sequence([torch.tensor([*row, (0, 0), (0, 0)]) for row in rows], batch_first=True)
        table = table[:, :self.context + 1]  # (B, T' + 1, 2)
        width = table.shape[1] - 1  # T'
        compared = np.concatenate(parts)  # (e, 6)
        row, place, slot, rule, split, exclusion = compared[compared[:, 2] < width].T  # (E,) each
        split = np.where(slot + 1 < width, split, NO_RULE)
        kinds = np.zeros(B * T, dtype=np.int64)
        kinds[place] = np.where(split == NO_RULE, 1, 2)
        batch |= {"slots": torch.from_numpy(row * width + slot),
                  "group": torch.from_numpy(self.groups[targets[place]]),
                  "rule": rule, "split": split, "exclusion": exclusion, "kinds": kinds,
                  "teacher_input_ids": table[:, :-1, 0]}
        if "document_ids" in batch:
            batch["teacher_document_ids"] = table[:, :-1, 1].cummax(1).values  # padding: of the last one
        return batch | compared_first(batch, kinds)

    def translated(self, batch: dict[str, Any], hidden: Tensor, weight: Tensor | None) -> TranslatedTeacher:
        """The predictions of a teacher that has read "teacher_input_ids".

        hidden, weight: what the teacher's head is called with, (B, T', C) and its output matrix or None.
        """
        dense = DenseTeacher(hidden.flatten(0, 1), weight)
        arrays = {key: batch[key] for key in ("slots", "group", "rule", "split", "exclusion")}
        return TranslatedTeacher(self, dense, **arrays)

    def teacher_of(self, batch: dict[str, Any], predictions: Any) -> AlignedTeacher:
        """The teacher of a batch. predictions: a TranslatedTeacher, or a SparseTeacher from a cache."""
        return AlignedTeacher(predictions, self.student_groups, batch["is_split"])
