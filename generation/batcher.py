"""Continuous batching: rows of text join and leave a running batch at any step; each has a slot of one cache.

    batcher = Batcher(model, tokenizer.vocab_size, slots=16, context_length=2048)
    batcher.waiting.append(Row(prompt=[1, 2, 3], max_new_tokens=100, sampling=Sampling(seed=7), is_done=..))
    while batcher.waiting or batcher.live:
        batcher.admit()                # waiting rows get free slots
        batcher.step()                 # row.new grows by at most one token
    row.ended = True                   # ends a row early: its slot is free before the next step

A step first reads a piece of the new prompts, then generates one token for each row whose prompt is read:

    slot 0   p p p p t t t t t            p: a piece of the prompt, t: one token
    slot 1           p p t t t t          joins while slot 0 generates, which goes on in every step
    slot 2               P t t t t        P: held by slot 1 already (a shared system message), so it is copied

A slot keeps the keys and values of its text after the end, so that the next turn of the same conversation
reads only what is new. The tokens of a row are those that `generate` chooses for the same prompt, sampling
and row number: rows do not see each other, and each has its own random numbers. When a context is full, its
last half is read again, as in generation/generate.py; with `limits`, it drops an old token per new token
(modeling/sinks.py).

Shapes: B rows of a step, T tokens of a piece, V vocab_size, S slots of the cache that queries see.
"""

import os
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor

from configurator import UserError
from generation.constraints import Guide
from generation.generate import NO_TOKEN, SEED_STRIDE, Sampling, next_ids, shift_context
from model import GPT
from modeling.devices import autocast_dtype
from modeling.kv_cache import KVCache
from modeling.sinks import SinkCache

PIECE_TOKENS = 128  # prompt tokens per step, of all rows together: running rows wait no longer than for these

# A token's log-probability, and {id: log-probability} of the likeliest tokens in its place.
Scores = tuple[float, dict[int, float]]


@dataclass(eq=False, kw_only=True)
class Row:
    """One text to generate, and what the batcher has generated of it so far."""

    prompt: list[int]  # at least one token
    max_new_tokens: int  # at least 1
    sampling: Sampling
    number: int = 0  # decides the random numbers, with the seed
    is_done: Callable[[list[int]], bool]  # called with `new` after each token; True ends the row
    top: int | None = None  # keep the scores of each new token, with this many of the likeliest
    echo: bool = False  # keep the scores of the prompt, from its second token on, too; needs top
    guide: Guide | None = None  # the grammar that the text must fit, as a batch of one row
    # ---- Written by the batcher
    slot: int = 0  # which row of the cache it has
    context: list[int] = field(default_factory=list)  # the tokens to attend to
    read: int = 0  # how many of them the cache holds
    new: list[int] = field(default_factory=list)  # the generated tokens
    scores: list[Scores] = field(default_factory=list)
    cached: int = 0  # tokens of the prompt that a slot held already
    ended: bool = False
    error: Exception | None = None  # the reason, if it ended by a failure

    def __post_init__(self) -> None:
        self.generator = torch.Generator().manual_seed(self.sampling.seed * SEED_STRIDE + self.number)

    @property
    def unread(self) -> int:
        return len(self.context) - self.read

    def fail(self, error: Exception) -> None:
        """End with an error, unless the row has ended before."""
        if not self.ended:
            self.error, self.ended = error, True


class SlotCache(KVCache):
    """A KVCache whose forward passes feed only some of its rows."""

    def select(self, slots: list[int], lengths: list[int]) -> None:
        """Choose the rows of the next forward pass, and how many of their tokens count."""
        self.rows = torch.tensor(slots, device=self.rows.device)[:, None]  # (B, 1)
        # Neighbouring rows are read in place; others are gathered, which copies them.
        is_range = slots == list(range(slots[0], slots[0] + len(slots)))
        self.index = slice(slots[0], slots[-1] + 1) if is_range else self.rows[:, 0]
        self.set_lengths(lengths)
        self.even = False  # write row by row, because the other rows must not change

    def update(self, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        keys, values = super().update(layer, k, v)
        return (k, v) if keys is k else (keys[self.index], values[self.index])  # (B, K, S, D)

    def copy(self, source: int, target: int, length: int) -> None:
        """Copy the first `length` tokens of a row to another row."""
        for stored in (*self.k, *self.v):
            stored[target, :, :length] = stored[source, :, :length]


class SinkSlots(SlotCache, SinkCache):
    """A SlotCache whose rows never fill up, with the arguments of SinkCache."""

    def select(self, slots: list[int], lengths: list[int]) -> None:
        super().select(slots, lengths)
        self.chosen = slots
        for slot, length in zip(slots, lengths, strict=True):
            if length < self.size:  # another text
                self.base[slot] = 0


def token_scores(logits: Tensor, targets: list[int], top: int) -> list[Scores]:
    """The scores of each target: logits (N, V) float32 that predict the N targets."""
    log_probs = logits.log_softmax(dim=-1)
    chosen = log_probs[range(len(targets)), targets].tolist()
    values, ids = log_probs.topk(top)  # (N, top) both
    return [(score, dict(zip(*pair, strict=True)))
            for score, *pair in zip(chosen, ids.tolist(), values.tolist(), strict=True)]


class Batcher:
    """A model with its slots. One thread at a time may call it; anyone may set row.ended."""

    def __init__(self, model: GPT, vocab_size: int, slots: int, context_length: int,
                 limits: tuple[int, int] | None = None):
        """vocab_size: ids from here on are never chosen. context_length: tokens of a slot, unless limits says
        how many sinks and tokens of a window it keeps (`cache_limits`)."""
        self.model, self.vocab_size, self.limits = model, vocab_size, limits
        self.context_length = sum(limits) if limits else context_length
        self.device, dtype = model.head_weight.device, autocast_dtype(model.head_weight)
        self.cache = (SinkSlots(model.config, slots, limits, model.rope, dtype) if limits else
                      SlotCache(model.config, slots, context_length, self.device, dtype))
        empty = Row(prompt=[], max_new_tokens=0, sampling=Sampling(), is_done=bool, ended=True)
        self.slots = [empty] * slots  # the row that each slot holds; it may have ended
        self.waiting: list[Row] = []

    @property
    def live(self) -> list[Row]:
        """The rows that have a slot and have not ended."""
        return [row for row in self.slots if not row.ended]

    @torch.inference_mode()
    def admit(self) -> None:
        """Give free slots to waiting rows in the order of arrival.

        A row whose prompt is being read by another row waits until it can copy what that row has read.
        """
        waiting, self.waiting = self.waiting, []
        for row in (row for row in waiting if not row.ended):
            live = self.live
            if len(live) == len(self.slots) or any(each.unread > 1 and each.prompt == row.prompt
                                                   for each in live):
                self.waiting.append(row)
            else:
                self.place(row)

    def place(self, row: Row) -> None:
        """Give a row a free slot, with the longest prefix of its prompt that any slot holds."""
        sinks, size = self.limits[0] if self.limits else 0, self.context_length
        row.context = row.prompt[:sinks] + row.prompt[max(sinks, len(row.prompt) - size + sinks):]
        # The last token is read in any case, because the logits after it are needed; scores need all of them.
        known = [] if row.echo else row.context[:-1]
        # A slot that has dropped tokens holds no prefix.
        held = [len(os.path.commonprefix([each.context[:each.read], known])) if each.read <= size else 0
                for each in self.slots]
        free = [slot for slot, each in enumerate(self.slots) if each.ended]
        source = max(range(len(held)), key=lambda slot: (held[slot], slot in free, -self.slots[slot].read))
        # If another row still needs the source, or most of its text would be lost, copy what both share to
        # the shortest text.
        is_next = source in free and 2 * held[source] >= self.slots[source].read
        row.slot = source if is_next else min(free, key=lambda slot: self.slots[slot].read)
        if row.slot != source:
            self.cache.copy(source, row.slot, held[source])
        row.read = row.cached = held[source]
        self.slots[row.slot] = row

    # ---- Steps --------------------------------------------------------------------------------------------

    @torch.inference_mode()
    def step(self) -> None:
        """Read a piece of the new prompts, then generate a token for each row whose prompt is read."""
        try:
            if reading := [row for row in self.live if row.unread > 1]:
                self.read(reading)
            if ready := [row for row in self.live if row.unread == 1]:
                self.decode(ready)
        except Exception as error:  # such as no memory: the cache may be half written
            for row in self.live:
                row.read = 0
                row.fail(error)

    def forward(self, rows: list[Row], T: int, scored: list[int] | slice) -> Tensor:
        """Feed the next T tokens of each row; return the logits of the scored rows, (N, T, V) float32."""
        ids = torch.tensor([row.context[row.read:row.read + T] for row in rows], device=self.device)  # (B, T)
        self.cache.select([row.slot for row in rows], [row.read for row in rows])
        logits = self.model(ids, cache=self.cache,
                            head=lambda hidden, weight: self.model.logits(hidden[scored]))
        for row in rows:
            row.read += T
        return logits[..., :self.vocab_size].float()

    def read(self, rows: list[Row]) -> None:
        """Read the same number of tokens of each prompt, without its last token."""
        T = min(max(1, PIECE_TOKENS // len(rows)), *(row.unread - 1 for row in rows))
        scored = [number for number, row in enumerate(rows) if row.echo and not row.new]
        for number, logits in zip(scored, self.forward(rows, T, scored), strict=True):
            row = rows[number]
            row.scores += token_scores(logits, row.context[row.read - T + 1:row.read + 1], row.top)

    def decode(self, rows: list[Row]) -> None:
        """Generate one token per row; shift a context that is full."""
        for row, logits in zip(rows, self.forward(rows, 1, slice(None)), strict=True):  # (1, V)
            try:
                token = self.choose(row, logits)
            except UserError as error:
                row.fail(error)
                continue
            row.context.append(token)
            row.new.append(token)
            if row.is_done(row.new) or len(row.new) == row.max_new_tokens:
                row.ended = True
            elif self.limits is None and shift_context([row.context], self.context_length):
                row.read = 0

    def choose(self, row: Row, logits: Tensor) -> int:
        """The next token of a row: logits (1, V). Raises UserError if there is none."""
        uniform = torch.rand(1, generator=row.generator).to(self.device)
        # On a copy, because the scores are those of the logits as they are.
        token = int(next_ids(logits.clone(), uniform, row.sampling, [row.context], row.guide))
        if token == NO_TOKEN:
            raise UserError(f"{self.model.source}: its logits are not finite, so its weights are broken")
        if row.guide is not None:
            row.guide.advance([token])
        if row.top is not None:
            row.scores += token_scores(logits, [token], row.top)
        return token
