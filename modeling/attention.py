"""Attention's kernel call, and the masks it takes: causal, cached, packed documents, shared prefixes.

    mask, positions = mask_and_positions(input_ids, block_size, document_ids=ids)    # once per forward pass
    y = attend(q, k, v, mask)                                                        # once per layer

model.py calls the first function in GPT.forward and the second in Attention.forward. Skip this file on a
first reading: without documents, paths or a cache the mask is None, which means causal attention.

Shapes: B rows, T tokens of a row, S keys, H query heads, K key/value heads, D head_dim.
"""

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, create_block_mask, flex_attention

from modeling.devices import autocast_dtype


class Paths(NamedTuple):
    """Sequences to attend along, in place of the rows, so that a shared prefix is computed only once.

    Example: one row holds the prompt p q once, followed by its two answers a b and c. Tokens are numbered in
    the flattened (B, T) order. The shorter path repeats its last token.

        token     p q a b c              tokens = [[0, 1, 2, 3],        p q a b
        number    0 1 2 3 4                        [0, 1, 4, 4]]        p q c c
        position  0 1 2 3 2              slots  = [[0, 1, 2, 3, 6]]     c is first at 6 = row 1, position 2
    """

    tokens: Tensor  # (R, S) int64: the token numbers of each of R paths
    slots: Tensor  # (B, T) int64: each token's first place in the flattened (R, S)


# None: causal. Tensor: bool (B, 1, T, S), True where a query may see a key. BlockMask: FlexAttention's.
# Paths: shared prefixes, causal along each path.
Mask = None | Tensor | BlockMask | Paths
Positions = slice | Tensor  # one slice for all rows, or (B, T) int64


def gather_tokens(x: Tensor, numbers: Tensor) -> Tensor:
    """x (B, heads, T, D), token numbers (R, S) in the flattened (B, T) -> (R, heads, S, D)."""
    return x.transpose(1, 2).flatten(0, 1)[numbers].transpose(1, 2)


def attend_once(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
    """The attention of one token per row as two products: q (B, K, H / K, D), mask (B, 1, 1, S) -> like q.

    A fused kernel with a mask would leave most of a GPU idle: it splits the work by heads, not by keys.
    """
    scores = (q @ k.mT).float() / math.sqrt(q.shape[-1])  # (B, K, H / K, S)
    return scores.masked_fill(~mask, -torch.inf).softmax(dim=-1).to(v.dtype) @ v


def attend(q: Tensor, k: Tensor, v: Tensor, mask: Mask, dropout: float = 0.0) -> Tensor:
    """Return softmax(q k^T / sqrt(D)) v: q (B, H, T, D), k and v (B, K, S, D) -> (B, H, T, D).

    mask: see `Mask`. With None a single query sees all S keys; several queries need S = T.
    """
    # In bfloat16 the CPU's backward pass is five times slower than in float32.
    if q.dtype == torch.bfloat16 and q.device.type == "cpu":
        with torch.autocast("cpu", enabled=False):
            return attend(q.float(), k.float(), v.float(), mask, dropout).to(q.dtype)
    # Shared prefixes: copy the tokens into their paths, attend causally, take each token's output back.
    if isinstance(mask, Paths):
        q, k, v = (gather_tokens(x, mask.tokens) for x in (q, k, v))  # (R, heads, S, D)
        return gather_tokens(attend(q, k, v, None, dropout), mask.slots)  # (B, H, T, D)
    grouped = q.shape[1] != k.shape[1]
    if isinstance(mask, BlockMask):
        return flex_attention(q, k, v, block_mask=mask, enable_gqa=grouped)
    # GQA with one query token: fold each group's query heads into the query dimension, so that k and v need
    # no copy per query head. Some CUDA kernels return a non-contiguous y; reshape handles both.
    if q.shape[2] == 1 and (grouped or q.is_cuda):
        queries = q.view(len(q), k.shape[1], -1, q.shape[3])  # (B, K, H / K, D)
        if q.is_cuda and isinstance(mask, Tensor):
            return attend_once(queries, k, v, mask).view(q.shape)
        y = F.scaled_dot_product_attention(queries, k, v, attn_mask=mask, dropout_p=dropout)
        return y.reshape(q.shape)  # (B, H, 1, D)
    # No fused CUDA kernel does GQA in float32; without one, all T^2 scores of a head would be in memory.
    if grouped and q.is_cuda and autocast_dtype(q) == torch.float32:
        size, grouped = q.shape[1] // k.shape[1], False
        k, v = k.repeat_interleave(size, dim=1), v.repeat_interleave(size, dim=1)  # (B, H, S, D)
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, dropout_p=dropout, enable_gqa=grouped,
                                          is_causal=q.shape[2] > 1 and mask is None)


def document_positions(document_ids: Tensor) -> Tensor:
    """Positions that start at 0 in each document: document_ids [[5, 5, 5, 6, 6]] -> [[0, 1, 2, 0, 1]]."""
    now = torch.arange(document_ids.shape[1], device=document_ids.device)  # (T,)
    begins = F.pad(document_ids[:, 1:] != document_ids[:, :-1], (1, 0), value=True)  # (B, T)
    return now - torch.where(begins, now, 0).cummax(dim=1).values  # (B, T)


def document_mask(document_ids: Tensor, dense: bool = False) -> Tensor | BlockMask:
    """Return the mask for causal attention within documents, from document_ids (B, T) int64.

    On a GPU this is FlexAttention's BlockMask, which skips the blocks between documents. FlexAttention has no
    dropout, and no backward pass on a CPU: on a CPU or with dense=True the mask is bool, (B, 1, T, T).
    """
    B, T = document_ids.shape
    if document_ids.is_cuda and not dense:
        def visible(b: Tensor, h: Tensor, q: Tensor, kv: Tensor) -> Tensor:
            return (kv <= q) & (document_ids[b, q] == document_ids[b, kv])
        return create_block_mask(visible, B, None, T, T, device=document_ids.device)
    same = document_ids[:, None, :, None] == document_ids[:, None, None, :]  # (B, 1, T, T)
    return same & torch.ones(T, T, dtype=torch.bool, device=document_ids.device).tril()


def mask_and_positions(input_ids: Tensor, block_size: int, document_ids: Tensor | None = None,
                       paths: Tensor | None = None, dense: bool = False) -> tuple[Mask, Positions]:
    """Return the mask for `attend` and the position of each token, as GPT.forward documents them.

    dense: build document masks as bool tensors on a GPU, too. Raises ValueError for rows or paths that are
    longer than block_size.
    """
    T = (input_ids if paths is None else paths).shape[1]
    if T > block_size:
        raise ValueError(f"{T} tokens do not fit block_size={block_size}")
    if paths is not None:
        # Each token's first place along the paths. A token on several paths has the same prefix on all of
        # them, so the attention output of its first place is right for all.
        places = torch.arange(paths.numel(), device=paths.device)  # (R S,)
        slots = input_ids.new_zeros(input_ids.numel())  # (B T,)
        slots.scatter_reduce_(0, paths.flatten(), places, "amin", include_self=False)
        slots = slots.view_as(input_ids)  # (B, T)
        return Paths(paths, slots), slots % T
    if document_ids is not None:
        return document_mask(document_ids, dense), document_positions(document_ids)
    return None, slice(0, T)
