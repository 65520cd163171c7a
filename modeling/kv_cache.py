"""The key/value cache: generation computes the keys and values of each token only once.

    cache = KVCache(model.config, batch_size=2, max_length=8)
    logits = model(prompts, cache=cache)               # prompts (B, T), padded at the end of shorter rows
    cache.set_lengths([5, 3])                          # how many tokens of each row are real
    logits = model(next_tokens, cache=cache)           # (B, 1)
    cache.set_lengths([6, 4])

A token's slot is its position, so rows of different length need no padding at their beginning:

    slot           0  1  2  3  4  5  6  7
    row 0          a  b  c  d  e  .  .  .      lengths = [5, 3], used = 5, even = False
    row 1          f  g  h  x  x  .  .  .      x: written by padding, hidden from every query by the mask
    next token     -  -  -  1  -  0  -  -      row 0 writes slot 5, row 1 overwrites the x in slot 3

StepCache gives compiled decoding steps equal shapes. Shapes: B rows, T tokens of a step, K key/value heads, S
slots that queries see, D head_dim.
"""

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from modeling.attention import Positions

# Stores the k and v of new tokens in one layer, (B, K, T, D) each; returns what to attend to, (B, K, S, D).
Store = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]

STEP_SLOTS = 128  # StepCache: the visible slots are a multiple of this number
SPARE_SLOTS = 8  # slots that are never visible: torch would compile two equal sizes as one and the same


class KVCache:
    """Keys and values of every layer, (B, K, max_length, D) each, allocated once.

    config: a GPTConfig. lengths: the number of tokens in each row. used: the length of the longest row.
    even: True if all rows have the same length.
    """

    def __init__(self, config: Any, batch_size: int, max_length: int, device: Any = None,
                 dtype: torch.dtype | None = None):
        shape = (batch_size, config.n_kv_head, max_length, config.head_dim)
        self.k, self.v = ([torch.zeros(shape, device=device, dtype=dtype) for _ in range(config.n_layer)]
                          for _ in range(2))
        self.rows = torch.arange(batch_size, device=device)[:, None]  # (B, 1)
        self.block_size = config.block_size
        self.set_lengths([0] * batch_size)

    def prepare(self, T: int) -> tuple[Tensor | None, Positions]:
        """Reserve the next T slots of each row, before the layers call `update`.

        Returns the mask for `attend` and the positions. Raises ValueError beyond block_size.
        """
        if self.used + T > self.block_size:
            raise ValueError(f"{self.used + T} tokens do not fit block_size={self.block_size}")
        self.begin, self.end = self.used, self.used + T  # first new slot of even rows; visible slots
        # Equal rows need no mask if the cache is empty (causal) or if one query sees all that there is.
        if self.even and (self.used == 0 or T == 1):
            return None, slice(self.used, self.used + T)
        device = self.rows.device
        lengths = torch.tensor(self.lengths, device=device)
        self.slots = lengths[:, None] + torch.arange(T, device=device)  # (B, T)
        keys = torch.arange(self.used + T, device=device)  # (S,)
        return keys <= self.slots[:, None, :, None], self.slots  # (B, 1, T, S)

    def update(self, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Store k and v of a layer, (B, K, T, D), in the reserved slots; return what to attend to,
        (B, K, S, D) each. GPT.forward binds `layer`, which makes it a `Store`."""
        stored = self.k[layer], self.v[layer]  # (B, K, all slots, D)
        for slots, new in zip(stored, (k, v), strict=True):
            if self.even:
                slots.narrow(2, self.begin, k.shape[2]).copy_(new)
            else:
                slots[self.rows, :, self.slots] = new.transpose(1, 2).to(slots.dtype)  # (B, T, K, D)
        if self.used == 0:  # the new keys and values are all there is, and causal attention will do
            return k, v
        return stored[0].narrow(2, 0, self.end).to(k.dtype), stored[1].narrow(2, 0, self.end).to(v.dtype)

    def set_lengths(self, lengths: list[int]) -> None:
        """Set the number of tokens in each row, after a forward pass. Later slots count as empty."""
        self.lengths, self.used, self.even = lengths, max(lengths), len(set(lengths)) == 1

    def select_rows(self, rows: list[int]) -> None:
        """Keep only these rows, in this order. A row that is listed twice is copied."""
        index = torch.tensor(rows, device=self.rows.device)
        self.k, self.v = ([slots[index] for slots in each] for each in (self.k, self.v))
        self.rows = torch.arange(len(rows), device=index.device)[:, None]  # (B, 1)
        self.set_lengths([self.lengths[row] for row in rows])


class StepCache(KVCache):
    """A cache for compiled steps of one token: their shapes change only once in STEP_SLOTS steps.

    Such a step always has a mask, and sees all slots up to a multiple of STEP_SLOTS. seen: the numbers of
    these slots, (S,) int64. place: the slot of each row's next token, (B, 1) int64. mark_dynamic tells torch
    which sizes change between calls, so that it compiles once for all of them.
    """

    def __init__(self, config: Any, batch_size: int, max_length: int, device: Any = None,
                 dtype: torch.dtype | None = None):
        self.all_slots = torch.arange(STEP_SLOTS * math.ceil(max_length / STEP_SLOTS), device=device)
        self.seen = self.all_slots[:0]
        super().__init__(config, batch_size, len(self.all_slots) + SPARE_SLOTS, device, dtype)
        for tensor in (*self.k, *self.v):
            torch._dynamo.mark_static_address(tensor, guard=False)  # else a CUDA graph may not write to it
            torch._dynamo.mark_dynamic(tensor, 2)

    def prepare(self, T: int) -> tuple[Tensor | None, Positions]:
        if T > 1:
            return super().prepare(T)
        return self.seen <= self.place[:, None, :, None], self.place  # (B, 1, 1, S), (B, 1)

    def update(self, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        if k.shape[2] > 1:
            return super().update(layer, k, v)
        stored, S = (self.k[layer], self.v[layer]), len(self.seen)
        for slots, new in zip(stored, (k, v), strict=True):
            slots[self.rows, :, self.place] = new.transpose(1, 2).to(slots.dtype)  # (B, 1, K, D)
        return stored[0].narrow(2, 0, S).to(k.dtype), stored[1].narrow(2, 0, S).to(v.dtype)  # (B, K, S, D)

    def set_lengths(self, lengths: list[int]) -> None:
        super().set_lengths(lengths)
        if len(self.seen) != (size := STEP_SLOTS * (self.used // STEP_SLOTS + 1)):
            self.seen = self.all_slots[:size]
            torch._dynamo.mark_dynamic(self.seen, 0)
        self.place = torch.tensor(lengths, device=self.rows.device)[:, None]  # (B, 1)
