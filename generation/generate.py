"""Generation: prompts of any lengths in, tokens out step by step, with a static key/value cache.

    for tokens in generate(model, [[1, 2, 3], [4]], max_new_tokens=100, sampling=Sampling(temperature=0.8)):
        ...                                        # one new token a row, None for a row that has ended

Each row is what it would be alone: rows see no padding, and draw from their own numbers. When a row's context
is full, its last block_size // 2 tokens are read anew and the others forgotten. `model.compiled_steps = True`
compiles the step of one token: half a minute at first, then on a CPU 1.5 to 2 times as fast for one row, and
no faster for many; on a GPU a CUDA graph. Shapes: B rows, V vocab_size.
"""

import functools
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from configurator import UserError
from model import GPT
from modeling.devices import autocast_dtype
from modeling.kv_cache import KVCache, StepCache

MIN_SHARED_PREFIX = 64  # tokens: what all rows begin with is read a single time from this length on


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """How the next token is chosen; the filters apply in this order, as in transformers."""

    temperature: float = 0.8  # divides the logits; 0 takes the most likely token (the lowest id of equals)
    top_k: int | None = None  # only the k most likely tokens; None, 0 or more than there are: all
    top_p: float = 1.0  # only the most likely tokens that together reach this probability, at least one
    min_p: float = 0.0  # only tokens at least this likely relative to the most likely one
    repetition_penalty: float = 1.0  # divides positive logits of tokens in the row, multiplies others
    seed: int = 1337  # each row draws from this and its own number

    def __post_init__(self) -> None:
        for key, low, high in (("temperature", 0, float("inf")), ("top_p", 0, 1), ("min_p", 0, 1),
                               ("seed", 0, 2**43 - 1)):  # with the numbers of the rows, torch takes 63 bits
            if not low <= getattr(self, key) <= high:
                raise UserError(f"{key}={getattr(self, key)}: must be between {low} and {high}")
        if self.repetition_penalty <= 0:
            raise UserError(f"repetition_penalty={self.repetition_penalty}: must be positive")
        if self.top_k is not None and self.top_k < 0:
            raise UserError(f"top_k={self.top_k}: must not be negative")


def choose(logits: Tensor, uniform: Tensor, sampling: Sampling) -> Tensor:
    """One token a row: logits (B, V) float32, uniform (B,) in [0, 1) -> ids (B,) int64.

    Inverts the cumulative distribution at `uniform`, with the tokens from most to least likely, equals by id.
    """
    if sampling.temperature == 0:
        return logits.argmax(dim=-1)
    logits, order = (logits / sampling.temperature).sort(dim=-1, descending=True, stable=True)  # (B, V) both
    probabilities = logits.softmax(dim=-1)
    if sampling.top_k:
        probabilities[:, sampling.top_k:] = 0
        probabilities /= probabilities.sum(dim=-1, keepdim=True)
    before = probabilities.cumsum(dim=-1) - probabilities  # probability of all likelier tokens
    drop = (before >= sampling.top_p) & (sampling.top_p < 1)
    drop |= probabilities < sampling.min_p * probabilities[:, :1]
    drop[:, 0] = False
    mass = probabilities.masked_fill(drop, 0).cumsum(dim=-1)
    place = torch.searchsorted(mass, uniform[:, None] * mass[:, -1:], right=True)  # (B, 1)
    return order.gather(-1, place.clamp(max=mass.shape[-1] - 1))[:, 0]


def penalize(logits: Tensor, rows: list[list[int]], penalty: float) -> Tensor:
    """Make the tokens of each row less likely in it: CTRL's penalty (arXiv 1909.05858) as in transformers."""
    if penalty == 1.0:
        return logits
    for row, tokens in enumerate(rows):
        seen = torch.tensor(sorted(set(tokens)), device=logits.device)
        values = logits[row, seen]
        logits[row, seen] = torch.where(values > 0, values / penalty, values * penalty)
    return logits


@dataclass
class PrefixCache:
    """What a text leaves behind for one that goes on with it: its ids, and their keys and values."""

    cache: KVCache | None = None
    ids: list[int] = field(default_factory=list)


def generate_steps(model: GPT, prompts: list[list[int]], max_new_tokens: int, sampling: Sampling,
            is_done: Callable[[int, list[int]], bool] = lambda row, new: False,
            vocab_size: int | None = None, numbers: Sequence[int] | None = None,
            past: PrefixCache | None = None) -> Iterator[list[int | None]]:
    """Yield one token a row and step, None for rows that have ended; at most max_new_tokens steps.

    prompts: ids, at least one a row; of a prompt longer than the context only its end is read. is_done(row,
    new ids): asked after each token whether the row ends with it. vocab_size: ids from there on are never
    chosen (a model may have more rows than its tokenizer has tokens). numbers: those of the prompts, for
    their seeds; None: 0, 1, ... past: of a single prompt, what an earlier call left behind: the beginning
    that the prompt shares with it is not read again.
    """
    if not prompts or not all(prompts):
        raise ValueError("every prompt needs at least one token")
    block_size, device = model.config.block_size, model.head_weight.device
    context = [prompt[-block_size:] for prompt in prompts]  # what each row attends to
    new: list[list[int]] = [[] for _ in prompts]
    live = [True] * len(prompts)
    seeds = [sampling.seed * 2**20 + number for number in numbers or range(len(prompts))]
    uniform = torch.stack([torch.rand(max_new_tokens, generator=torch.Generator().manual_seed(seed))
                           for seed in seeds]).to(device)  # (B, steps)
    cache, unread = None, context  # unread: what of each row is not in the cache
    if past is not None and past.cache is not None:
        shared = len(os.path.commonprefix([past.ids, context[0][:-1]]))
        cache, unread = past.cache, [context[0][shared:]]
        cache.set_lengths([shared])
    for step in range(max_new_tokens):
        if cache is None:
            longest = min(block_size, max(map(len, context)) + max_new_tokens - step)
            slots = longest if past is None else block_size
            kind = StepCache if model.compiled_steps else KVCache
            cache = kind(model.config, len(context), slots, device, autocast_dtype(model.head_weight))
            unread = read_shared(model, context, cache)
        logits = forward_last(model, unread, cache)
        cache.set_lengths([len(row) for row in context])
        if past is not None:
            past.cache, past.ids = cache, context[0].copy()
        logits = penalize(logits[:, :vocab_size].float(), context, sampling.repetition_penalty)
        tokens = choose(logits, uniform[:, step], sampling).tolist()
        step_tokens = [token if alive else None for token, alive in zip(tokens, live, strict=True)]
        for row, token in enumerate(step_tokens):
            if token is None:
                continue
            new[row].append(token)
            context[row].append(token)
            if is_done(row, new[row]):
                live[row], context[row] = False, [token]  # stays in the batch, and holds nothing before it
            elif len(context[row]) > block_size:
                context[row], cache = context[row][-max(1, block_size // 2):], None
        unread = [row[-1:] for row in context]
        if cache is not None and not all(live):
            cache.set_lengths([len(row) - 1 for row in context])  # not what a row that ended had grown to
        yield step_tokens
        if not any(live):
            return


generate = torch.inference_mode()(generate_steps)  # 15 % faster than no_grad; but its tensors can enter no training


def read_shared(model: GPT, rows: list[list[int]], cache: KVCache) -> list[list[int]]:
    """Read what all rows begin with, as worked examples before questions, a single time, where that is much.

    The cache, which is empty, then holds it for every row. Returns what is left to be read of each.
    """
    shared = min(len(os.path.commonprefix(rows)), *(len(row) - 1 for row in rows))
    if len(rows) == 1 or shared < MIN_SHARED_PREFIX:
        return rows
    one = KVCache(model.config, 1, shared, cache.rows.device, cache.k[0].dtype)
    forward_last(model, [rows[0][:shared]], one)
    for slots, read in zip((*cache.k, *cache.v), (*one.k, *one.v), strict=True):
        slots[:, :, :shared] = read  # (1, K, shared, D) for all B rows
    cache.set_lengths([shared] * len(rows))
    return [row[shared:] for row in rows]


def forward_last(model: GPT, rows: list[list[int]], cache: KVCache) -> Tensor:
    """Feed some tokens a row behind what the cache holds; logits after each row's last one, (B, V)."""
    longest = max(map(len, rows))
    ids = torch.tensor([row + [0] * (longest - len(row)) for row in rows], device=cache.rows.device)  # (B, T)
    if longest == 1 and isinstance(cache, StepCache):
        return compiled_step(cache.rows.device.type)(model, ids, cache)

    def head(hidden: Tensor, weight: Tensor) -> Tensor:
        last = [len(row) - 1 for row in rows]
        hidden = hidden[:, 0] if longest == 1 else hidden[range(len(rows)), last]  # (B, C)
        return (hidden @ weight.T.to(hidden.dtype))[:, :model.config.vocab_size]

    with torch.compiler.set_stance("force_eager"):  # every length would be compiled anew
        return model(ids, cache=cache, head=head)


# ---- Compiled ---------------------------------------------------------------------------------------------

def last_logits(model: GPT, ids: Tensor, cache: KVCache) -> Tensor:
    """Feed one token a row, ids (B, 1); the logits behind it, (B, V)."""
    logits = model(ids, cache=cache, head=lambda hidden, weight: hidden[:, 0] @ weight.T.to(hidden.dtype))
    return logits[:, :model.config.vocab_size]


@functools.cache
def compiled_step(device: str) -> Callable[[GPT, Tensor, KVCache], Tensor]:
    """`last_logits`, compiled for a kind of device: into C++ on a CPU, into a CUDA graph on a GPU, where
    coordinate_descent_tuning makes products with a single row kernels of their own."""
    options = {"cpu": {"cpp_wrapper": True},
               "cuda": {"triton.cudagraphs": True, "coordinate_descent_tuning": True}}
    return torch.compile(last_logits, options=options.get(device))

