"""Attention sinks: text of any length in a small key/value cache, and a learned sink logit per head.

    limits = cache_limits(model.config, sinks=4, window=124)
    cache = SinkCache(model.config, 1, limits, model.rope)        # used like a KVCache (modeling/kv_cache.py)
    y = attend_with_sink(q, k, v, mask, dropout, sink)             # Attention.forward, with sink_logits=True

StreamingLLM (arXiv 2309.17453): models put much of their attention on the first tokens of a text, which they
need only as a place for attention that goes nowhere. A plain sliding window loses these tokens, and the model
breaks. SinkCache keeps the first `sinks` tokens and the last `window` tokens. Positions are counted inside
the cache, so they never leave the trained range:

    sinks=2, window=3      a b c d e | f g        text so far
    slots                  a b f g e              a new token takes the slot of the oldest in the window
    cache positions        0 1 3 4 2              the newest token is always at sinks + window - 1

RoPE depends on differences of positions only. So the keys of the window stay as they were stored, and only
the sinks are rotated towards the query, a little more at each step. Once in a while the window is
rotated back, because the rotary table ends.

The learned sink logit is that of GPT-OSS (OpenAI, 2025): one more term in the denominator of the softmax, so
that a head may attend to nothing. Left out: sinks in a cache with learned positions.

Shapes: B rows, T tokens of a step, S slots, H query heads, K key/value heads, D head_dim.
"""

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask

from configurator import UserError
from modeling.attention import Mask, Paths, Positions, attend, gather_tokens
from modeling.kv_cache import KVCache
from modeling.rope import RotaryTables


def cache_limits(config: Any, sinks: int, window: int | None) -> tuple[int, int] | None:
    """Return (sinks, window) of a SinkCache, or None if neither is set: then the context ends at block_size.

    config: a GPTConfig. A window of None fills the context. Raises UserError for a model without rotary
    positions, and for a cache that is larger than the context.
    """
    if not sinks and window is None:
        return None
    if config.position != "rope":
        raise UserError(f"sinks and window need rotary positions; this model has position={config.position}")
    window = config.block_size - sinks if window is None else window
    if sinks < 0 or window < 1 or sinks + window > config.block_size:
        raise UserError(f"sinks={sinks} and window={window}: the window needs at least 1 token, and both "
                        f"together at most the context of {config.block_size:,}")
    return sinks, window


AHEAD = 16  # steps for which the sinks of equal rows are rotated at once, because every operation costs time


class SinkCache(KVCache):
    """A cache of sinks + window slots that never fills up: see the module docstring.

    base: text position of each row at which its window's positions count as 0, a list of B. first: the sinks
    at positions 0, 1, .., of rows that are full. keys: `k` of all layers in one tensor. While a step's rows
    have at most sinks + window tokens, this is a plain KVCache. After that tokens must be fed one at a time,
    and `set_lengths` may only count up, or begin a row again.
    """

    def __init__(self, config: Any, batch_size: int, limits: tuple[int, int], rope: RotaryTables,
                 dtype: torch.dtype | None = None):
        """limits: `cache_limits`. rope: the model's tables; they grow if they are shorter than 2 S rows."""
        self.sinks, self.size, self.rope = limits[0], sum(limits), rope
        if len(rope.cos) < 2 * self.size:
            with torch.inference_mode(False):  # the model may be trained later
                rope.rebuild(2 * self.size, config.head_dim, config.rope_theta, config.rope_scaling,
                             rope.cos.device)
        self.tables = [table / rope.cos[0, 0] for table in (rope.cos, rope.sin)]  # without YaRN's factor
        self.base = [0] * batch_size
        self.index, self.chosen = slice(None), list(range(batch_size))  # rows that a step feeds
        self.ahead: dict[int, Tensor] = {}  # {step: the sinks, turned by that many positions}
        super().__init__(config, batch_size, self.size, rope.cos.device, dtype)
        self.keys = torch.stack(self.k)  # (layers, B, K, S, D)
        self.k = list(self.keys)  # views, one per layer
        self.first = torch.zeros_like(self.keys[..., :self.sinks, :])

    def turned(self, k: Tensor, steps: list[int] | slice, sign: int) -> Tensor:
        """Move keys (.., B, K, n, D) by sign * steps positions, one number for each of B."""
        cos, sin = (table[steps][:, None, None] for table in self.tables)  # (B, 1, 1, D)
        x = k.float()
        return torch.addcmul(x * cos, x.roll(x.shape[-1] // 2, dims=-1), sin, value=sign).to(k.dtype)

    def rotate_sinks(self, steps: list[int], equal: bool) -> None:
        """Write `first`, moved by `steps` positions, to the fed rows. equal: all rows move alike."""
        sinks = self.keys[..., :self.sinks, :]  # (layers, B, K, sinks, D), a view
        if min(self.lengths) <= self.size:  # keep the sinks of such rows, which were not rotated yet
            # (B, 1, 1, 1)
            young = torch.tensor(self.lengths, device=sinks.device).view(-1, 1, 1, 1) <= self.size
            self.first[:, self.index] = torch.where(young, sinks[:, self.index], self.first[:, self.index])
            self.ahead = {}
        if not equal:
            sinks[:, self.index] = self.turned(self.first[:, self.index], steps, 1)
            return
        if steps[0] not in self.ahead:
            flat = self.first.flatten(0, 2)[None]  # (1, layers B K, sinks, D)
            turned = self.turned(flat, slice(steps[0], steps[0] + AHEAD), 1).unflatten(1, sinks.shape[:3])
            self.ahead = dict(enumerate(turned, steps[0]))  # {step: (layers, B, K, sinks, D)}
        sinks.copy_(self.ahead[steps[0]])

    def prepare(self, T: int) -> tuple[Tensor | None, Positions]:
        """As KVCache.prepare, without an end. Raises ValueError for several tokens that do not all fit."""
        if self.used + T <= self.size:
            return super().prepare(T)
        if T > 1:
            raise ValueError("a full SinkCache reads one token at a time")
        # For each row's new token n: `inside` is its position in the cache, and `steps` is by how much its
        # position in the rotary table, n - base, is ahead. The sinks are rotated by `steps`. A row that has
        # ended may have a length below its base.
        inside, device = [min(n, self.size - 1) for n in self.lengths], self.rows.device
        steps = [max(n - self.base[row] - i, 0)
                 for n, row, i in zip(self.lengths, self.chosen, inside, strict=True)]
        if max(steps) + self.size > len(self.rope.cos):  # the table ends: rotate the windows back
            window = self.keys[..., self.sinks:, :]  # a view
            window[:, self.index] = self.turned(window[:, self.index], steps, -1)
            for row, step in zip(self.chosen, steps, strict=True):
                self.base[row] += step
            steps = [0] * len(steps)
        equal = self.even and min(inside) == self.size - 1  # all rows are fed, full, and of one length
        self.rotate_sinks(steps, equal)
        # The slot of each row's new token: that of the oldest token in the window, if the row is full.
        ring = [n if n < self.size else self.sinks + (n - self.sinks) % (self.size - self.sinks)
                for n in self.lengths]
        self.begin, self.end = ring[0], self.size
        if equal:
            return None, slice(steps[0] + inside[0], steps[0] + inside[0] + 1)
        # (B, 1) both
        self.slots, seen = (torch.tensor(each, device=device)[:, None] for each in (ring, inside))
        mask = torch.arange(self.size, device=device) <= seen[:, None, :, None]  # (B, 1, 1, S)
        return mask, seen + torch.tensor(steps, device=device)[:, None]  # positions (B, 1)


def attend_with_sink(q: Tensor, k: Tensor, v: Tensor, mask: Mask, dropout: float, sink: Tensor) -> Tensor:
    """As `attend`, with exp(sink) added to the denominator of each head's softmax; sink: (H,).

    The term is one more key, before all others, whose value is 0. Each vector gets one more number: 0 in real
    keys and 1 in the sink's key, times the sink logit in the queries. So every kernel of `attend` computes
    it. Raises UserError for a BlockMask (documents on a GPU).
    """
    if isinstance(mask, BlockMask):
        raise UserError("sink_logits=True does not work with document_mask=True on a GPU")
    if isinstance(mask, Paths):
        q, k, v = (gather_tokens(x, mask.tokens) for x in (q, k, v))  # (R, heads, S, D)
        return gather_tokens(attend_with_sink(q, k, v, None, dropout, sink), mask.slots)  # (B, H, T, D)
    T, D = q.shape[2:]
    causal = mask is None and T > 1
    logit = (sink * math.sqrt(D + 1)).to(q.dtype).view(1, -1, 1, 1).expand(*q.shape[:3], 1)  # (B, H, T, 1)
    q = torch.cat((q * math.sqrt((D + 1) / D), logit), dim=-1)  # `attend` divides by sqrt(D + 1)
    q = F.pad(q, (0, 0, int(causal), 0))  # causal: query 0 is for the sink's key alone, and is dropped below
    k, v = (F.pad(x, (0, 1, 1, 0)) for x in (k, v))  # (B, K, S + 1, D + 1)
    k = k + F.pad(k.new_ones(1, 1, 1, 1), (D, 0, 0, k.shape[2] - 1))  # the sink's key, at 0, is (0, .., 0, 1)
    mask = F.pad(mask, (1, 0), value=True) if mask is not None else None
    return attend(q, k, v, mask, dropout)[:, :, int(causal):, :D]
