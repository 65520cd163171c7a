"""Keys and values of the tokens that a model has read, so that generation computes them once.

    cache = KVCache(model.config, batch_size=2, max_length=100)
    logits = model(prompts, cache=cache)               # (B, T) behind what the cache holds, here nothing
    cache.hold([12, 9])                                # how many tokens of each row count

`StepCache` is the same for compiled steps. Shapes: B rows, T tokens of a step, K key/value heads, S
slots, D head_dim.
"""

import math
from typing import Any

import torch
from torch import Tensor


class KVCache:
    """Static keys and values of every layer, for generation.

    k, v: (B, K, S, D) of each layer, allocated once. lengths: how many tokens each row holds; used: the
    largest of them; even: whether it is that of all rows. A token's slot is its position, so rows of unequal
    length need no padding on the left: what the padding behind a shorter row wrote is overwritten before
    anything attends to it.
    """

    def __init__(self, config: Any, batch_size: int, max_length: int, device: Any = None, dtype: Any = None):
        shape = (batch_size, config.n_kv_head, max_length, config.head_dim)
        self.k, self.v = ([torch.zeros(shape, device=device, dtype=dtype) for _ in range(config.n_layer)]
                          for _ in range(2))
        self.rows = torch.arange(batch_size, device=device)[:, None]  # (B, 1)
        self.block_size = config.block_size
        self.set_lengths([0] * batch_size)

    def prepare(self, T: int) -> tuple[Tensor | None, slice | Tensor]:
        """Make the next T slots of each row those that `update` fills. Returns the mask for `attend`, and the
        positions: a slice that all rows share, or (B, T)."""
        if self.used + T > self.block_size:
            raise ValueError(f"{self.used + T} tokens do not fit block_size={self.block_size}")
        if self.even and (self.used == 0 or T == 1):  # causal, or a token that sees all there is
            return None, slice(self.used, self.used + T)
        device = self.rows.device
        lengths = torch.tensor(self.lengths, device=device)
        self.slots = lengths[:, None] + torch.arange(T, device=device)  # (B, T)
        keys = torch.arange(self.used + T, device=device)  # (S,)
        return keys <= self.slots[:, None, :, None], self.slots  # (B, 1, T, S)

    def update(self, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Store (B, K, T, D) in the begun slots; returns what is to be attended to, (B, K, S, D) each."""
        T, S = k.shape[2], self.used + k.shape[2]
        held = self.k[layer], self.v[layer]  # (B, K, all slots, D)
        for slots, new in zip(held, (k, v), strict=True):
            if self.even:
                slots.narrow(2, self.used, T).copy_(new)
            else:
                slots[self.rows, :, self.slots] = new.transpose(1, 2).to(slots.dtype)  # (B, T, K, D)
        if self.used == 0:  # nothing older: the new keys are all there is, and plain causal attention will do
            return k, v
        return held[0].narrow(2, 0, S).to(k.dtype), held[1].narrow(2, 0, S).to(v.dtype)

    def set_lengths(self, lengths: list[int]) -> None:
        """Declare, after a forward pass, how many tokens each row holds; what lies beyond is forgotten."""
        self.lengths, self.used, self.even = lengths, max(lengths), len(set(lengths)) == 1


class StepCache(KVCache):
    """A cache with which 128 steps of one token in a row have the same shapes: what they see, through a mask,
    is all slots up to a multiple of 128.

    seen: these slots, (S,) int64. place: (B, 1) int64, the slot of each row's next token. torch is told which
    sizes differ between calls, and compiles once for all of them.
    """

    def __init__(self, config: Any, batch_size: int, max_length: int, device: Any = None, dtype: Any = None):
        self.all_slots = torch.arange(128 * math.ceil(max_length / 128), device=device)
        self.seen = self.all_slots[:0]
        # More than are ever seen: of two sizes that are equal, torch would compile that they always are.
        super().__init__(config, batch_size, len(self.all_slots) + 8, device, dtype)
        for tensor in (*self.k, *self.v):
            torch._dynamo.mark_static_address(tensor, guard=False)  # a CUDA graph writes into no other input
            torch._dynamo.mark_dynamic(tensor, 2)

    def prepare(self, T: int) -> tuple[Tensor | None, slice | Tensor]:
        if T > 1:
            return super().prepare(T)
        return self.seen <= self.place[:, None, :, None], self.place  # (B, 1, 1, S), (B, 1)

    def update(self, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        if k.shape[2] > 1:
            return super().update(layer, k, v)
        held, S = (self.k[layer], self.v[layer]), len(self.seen)
        for slots, new in zip(held, (k, v), strict=True):
            slots[self.rows, :, self.place] = new.transpose(1, 2).to(slots.dtype)  # (B, 1, K, D)
        return held[0].narrow(2, 0, S).to(k.dtype), held[1].narrow(2, 0, S).to(v.dtype)  # (B, K, S, D)

    def set_lengths(self, lengths: list[int]) -> None:
        super().set_lengths(lengths)
        if len(self.seen) != (size := 128 * (self.used // 128 + 1)):
            self.seen = self.all_slots[:size]
            torch._dynamo.mark_dynamic(self.seen, 0)
        self.place = torch.tensor(lengths, device=self.rows.device)[:, None]
