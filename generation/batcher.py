"""Continuous batching: texts join and leave the batch between two steps, each in a row of one static cache.

    batcher = Batcher(model, tokenizer.vocab_size, slots=16, context_length=2048)
    row = Row(prompt=[1, 2, 3], max_new_tokens=100, sampling=Sampling(seed=7), is_done=.., wake=..)
    batcher.submit([row])              # returns at once; row.new then grows in the batcher's own thread
    batcher.cancel([row])              # the row leaves its slot before the next step

Every step first reads a piece of the new prompts, then generates one token for each row whose prompt is read:

    slot 0   p p p p t t t t t            p: a piece of the prompt, t: one token
    slot 1           p p t t t t          joins while slot 0 generates, which goes on in every step
    slot 2               P t t t t        P: held by slot 1 already (a shared system message), so it is copied

A slot keeps the keys and values of its text after the end, so that the next turn of the same conversation
reads only what is new. The tokens of a row are those that `generate` chooses for the same prompt, sampling
and row number: rows do not see each other, and each has its own random numbers. When a context is full, its
last half is read again, as in generation/generate.py.

Shapes: B rows of a step, T tokens of a piece, V vocab_size, S slots of the cache that queries see.
"""

import itertools
import os
import threading
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from configurator import UserError
from generation.constraints import RowGuide
from generation.generate import Sampling, choose, penalize, uniform_numbers
from model import GPT
from modeling.devices import autocast_dtype
from modeling.kv_cache import KVCache

PIECE_TOKENS = 128  # prompt tokens per step, of all rows together: running rows wait no longer than for these

# A token's log-probability, and {id: log-probability} of the likeliest tokens in its place.
Scores = tuple[float, dict[int, float]]


@dataclass(eq=False, kw_only=True)
class Row:
    """One text to generate, and what the batcher has generated of it so far."""

    prompt: list[int]  # at least one token
    max_new_tokens: int
    sampling: Sampling
    number: int = 0  # decides the random numbers, with the seed
    is_done: Callable[[list[int]], bool]  # called with `new` after each token; True ends the row
    wake: Callable[["Row"], Any]  # called in the batcher's thread after each token, and at the end
    top: int | None = None  # keep the scores of each new token, with this many of the likeliest
    echo: bool = False  # ... and those of the prompt's tokens but the first
    first: "Row | None" = None  # a row with the same prompt, which is read before this row gets a slot
    guide: RowGuide | None = None  # the grammar that the text must fit
    # ---- Written by the batcher
    new: list[int] = field(default_factory=list)  # the generated tokens
    scores: list[Scores] = field(default_factory=list)
    cached: int = 0  # tokens of the prompt that a slot held already
    ended: bool = False
    error: Exception | None = None
    cancelled: bool = False

    def __post_init__(self) -> None:
        self.uniform = uniform_numbers(self.sampling.seed, [self.number], self.max_new_tokens)[0]
        self.sampling = replace(self.sampling, seed=0)  # drawn already: rows that differ in it go together

    @property
    def is_read(self) -> bool:
        """True once the prompt is in the cache."""
        return bool(self.new) or self.ended or self.cancelled


@dataclass(eq=False)
class Slot:
    """A row of the cache: the ids whose keys and values it holds, and the text that it works on."""

    number: int
    ids: list[int] = field(default_factory=list)
    row: Row | None = None
    context: list[int] = field(default_factory=list)  # the tokens to attend to; it begins with `ids`
    last_use: int = 0  # the slot that was not used for longest is overwritten first

    @property
    def unread(self) -> int:
        return len(self.context) - len(self.ids)


class SlotCache(KVCache):
    """A KVCache of which every forward pass feeds some rows only."""

    def select(self, slots: list[Slot]) -> None:
        """Choose the rows of the next forward pass, in ascending order."""
        numbers, device = [slot.number for slot in slots], self.rows.device
        self.rows = torch.tensor(numbers, device=device)[:, None]  # (B, 1)
        # Neighbouring rows are read in place; others are gathered, which copies them.
        first, end = numbers[0], numbers[-1] + 1
        self.index = slice(first, end) if end - first == len(numbers) else self.rows[:, 0]
        self.set_lengths([len(slot.ids) for slot in slots])
        self.even = False  # write row by row, because the other rows must not change

    def update(self, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        keys, values = super().update(layer, k, v)
        return (k, v) if keys is k else (keys[self.index], values[self.index])  # (B, K, S, D)

    def copy(self, source: int, target: int, length: int) -> None:
        """Copy the first `length` tokens of a row to another row."""
        for stored in (*self.k, *self.v):
            stored[target, :, :length] = stored[source, :, :length]


def project(hidden: Tensor, weight: Tensor) -> Tensor:
    """The model's head: hidden (.., C), weight (P, C) -> logits (.., P); columns from V on are padding."""
    return hidden @ weight.T.to(hidden.dtype)


def token_scores(logits: Tensor, targets: list[int], top: int) -> list[Scores]:
    """The scores of each target: logits (N, V) float32 that predict the N targets."""
    log_probs = logits.log_softmax(dim=-1)
    chosen = log_probs[range(len(targets)), targets].tolist()
    values, ids = log_probs.topk(top)  # (N, top) both
    return [(score, dict(zip(*pair, strict=True)))
            for score, *pair in zip(chosen, ids.tolist(), values.tolist(), strict=True)]


class Batcher:
    """A model with its slots, and the thread that runs it."""

    def __init__(self, model: GPT, vocab_size: int, slots: int, context_length: int):
        """vocab_size: ids from here on are never chosen. context_length: tokens of a slot."""
        self.model, self.vocab_size, self.context_length = model, vocab_size, context_length
        self.device = model.head_weight.device
        self.cache = SlotCache(model.config, slots, context_length, self.device,
                               autocast_dtype(model.head_weight))
        self.slots = [Slot(number) for number in range(slots)]
        self.waiting: deque[Row] = deque()
        self.changed, self.closed, self.clock = threading.Condition(), False, itertools.count(1)
        self.thread = threading.Thread(target=self.run, daemon=True)
        self.thread.start()

    def submit(self, rows: list[Row]) -> None:
        with self.changed:
            self.waiting.extend(rows)
            self.changed.notify()

    def cancel(self, rows: list[Row]) -> None:
        """Drop these rows; their slots are free before the next step."""
        with self.changed:
            for row in rows:
                row.cancelled = True

    def close(self) -> None:
        """End the thread after the step that it is in."""
        with self.changed:
            self.closed = True
            self.changed.notify()
        self.thread.join()

    @property
    def live(self) -> list[Slot]:
        return [slot for slot in self.slots if slot.row is not None]

    @torch.inference_mode()
    def run(self) -> None:
        """The thread: admit and step until the batcher is closed. An error ends the rows that run."""
        while True:
            with self.changed:
                self.changed.wait_for(lambda: self.closed or self.waiting or self.live)
                if self.closed:
                    return
                self.admit()
            try:
                self.step()
            except Exception as error:  # such as no memory: the cache may be half written
                for slot in self.live:
                    slot.ids = []
                    self.end(slot, error)

    # ---- Slots --------------------------------------------------------------------------------------------

    def admit(self) -> None:
        """Free the slots of cancelled rows, then give free slots to waiting rows in the order of arrival."""
        for slot in self.live:
            if slot.row.cancelled:
                slot.row = None
        for row in list(self.waiting):
            if row.cancelled or (len(self.live) < len(self.slots)
                                 and (row.first is None or row.first.is_read)):
                self.waiting.remove(row)
                if not row.cancelled:
                    self.place(row)

    def place(self, row: Row) -> None:
        """Give a row a slot, with the longest prefix of its prompt that any slot holds."""
        context = row.prompt[-self.context_length:]
        # The last token is read in any case, because the logits after it are needed; scores need all of them.
        known = [] if row.echo else context[:-1]
        held = {slot: len(os.path.commonprefix([slot.ids, known])) for slot in self.slots}
        best = max(self.slots, key=lambda slot: (held[slot], slot.row is None, -slot.last_use))
        slot = best
        if best.row is not None:  # another text still needs it: copy what both share
            slot = min((each for each in self.slots if each.row is None), key=lambda each: each.last_use)
            self.cache.copy(best.number, slot.number, held[best])
        row.cached = held[best]
        slot.row, slot.context, slot.ids = row, context, context[:row.cached]

    def end(self, slot: Slot, error: Exception | None = None) -> None:
        """Take the row from its slot, which keeps the keys and values."""
        row, slot.row, slot.last_use = slot.row, None, next(self.clock)
        row.error, row.ended = error, True
        row.wake(row)

    # ---- Steps --------------------------------------------------------------------------------------------

    def step(self) -> None:
        """Read a piece of the new prompts, then generate a token for each row whose prompt is read."""
        if reading := [slot for slot in self.live if slot.unread > 1]:
            self.read(reading)
        ready = [slot for slot in self.live if slot.unread == 1]
        for slot in [slot for slot in ready if slot.row.max_new_tokens == 0]:
            ready.remove(slot)
            self.end(slot)
        if ready:
            self.decode(ready)

    def forward(self, slots: list[Slot], T: int, head: Callable[[Tensor, Tensor], Any]) -> Any:
        """Feed the next T tokens of each slot; return what the head returns."""
        ids = [slot.context[len(slot.ids):len(slot.ids) + T] for slot in slots]
        self.cache.select(slots)
        result = self.model(torch.tensor(ids, device=self.device), cache=self.cache, head=head)
        for slot, tokens in zip(slots, ids, strict=True):
            slot.ids += tokens
        return result

    def read(self, slots: list[Slot]) -> None:
        """Read the same number of tokens of each prompt, without its last token."""
        T = min(max(1, PIECE_TOKENS // len(slots)), *(slot.unread - 1 for slot in slots))
        scored = [number for number, slot in enumerate(slots) if slot.row.echo and not slot.row.new]
        logits = self.forward(slots, T, lambda hidden, weight: project(hidden[scored], weight))  # (N, T, P)
        for number, each in zip(scored, logits[..., :self.vocab_size].float(), strict=True):
            slot = slots[number]
            targets = slot.context[len(slot.ids) - T + 1:len(slot.ids) + 1]
            slot.row.scores += token_scores(each, targets, slot.row.top or 1)

    def decode(self, slots: list[Slot]) -> None:
        """Generate one token per slot."""
        logits = self.forward(slots, 1, lambda hidden, weight: project(hidden[:, 0], weight))  # (B, P)
        logits = logits[:, :self.vocab_size].float()  # (B, V)
        finite = logits.amax(dim=-1).isfinite().tolist()  # NaN and infinity pass through the maximum
        masked, errors = logits.clone(), dict[Slot, Exception]()
        for number, slot in enumerate(slots):
            if not finite[number]:
                errors[slot] = UserError(f"{self.model.source}: its logits are not finite, so its weights "
                                         "are broken")
            elif slot.row.guide is not None:
                try:
                    allowed = torch.from_numpy(slot.row.guide.allowed(self.vocab_size))
                    masked[number].masked_fill_(~allowed.to(self.device), -torch.inf)
                except UserError as error:
                    errors[slot] = error
        chosen = self.choose_tokens(slots, masked)
        for number, (slot, token) in enumerate(zip(slots, chosen, strict=True)):
            if slot in errors:
                self.end(slot, errors[slot])
                continue
            if slot.row.top is not None:
                slot.row.scores += token_scores(logits[number:number + 1], [token], slot.row.top)
            self.append(slot, token)

    def choose_tokens(self, slots: list[Slot], logits: Tensor) -> list[int]:
        """Choose the next token of each slot: logits (B, V). Rows with equal settings are chosen together."""
        chosen = [0] * len(slots)
        for sampling in {slot.row.sampling for slot in slots}:
            numbers = [number for number, slot in enumerate(slots) if slot.row.sampling == sampling]
            rows = [slots[number].row for number in numbers]
            uniform = torch.stack([row.uniform[len(row.new)] for row in rows]).to(self.device)
            part = penalize(logits[numbers], [slots[number].context for number in numbers],
                            sampling.repetition_penalty)
            for number, token in zip(numbers, choose(part, uniform, sampling).tolist(), strict=True):
                chosen[number] = token
        return chosen

    def append(self, slot: Slot, token: int) -> None:
        """Add a token to its row, which may end with it; shift a context that is full."""
        row = slot.row
        slot.context.append(token)
        row.new.append(token)
        if row.guide is not None:
            row.guide.advance(token)
        if row.is_done(row.new) or len(row.new) == row.max_new_tokens:
            self.end(slot)
            return
        if len(slot.context) > self.context_length:
            slot.context, slot.ids = slot.context[-max(1, self.context_length // 2):], []
        row.wake(row)
