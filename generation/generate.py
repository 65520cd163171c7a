"""Generation: prompts of any lengths in, tokens out step by step, with a static key/value cache.

    sampling = Sampling(temperature=0.8, top_k=50)
    for tokens in generate(model, [[1, 2, 3], [4]], max_new_tokens=100, sampling=sampling):
        ...                                        # one new token per row; None for a row that has ended
    complete(model, tokenizer, ["Once upon a time"])   # the same for texts: a list of texts

Each row's tokens are those that it would have alone: rows see no padding, and each has its own random
numbers. When a row's context is full, its last block_size // 2 tokens are read again and the older ones are
forgotten. With Sampling.sinks or .window, the cache drops one old token per new token instead
(modeling/sinks.py).

`model.compiled_steps = True` compiles the step of one token. On a CPU the first step then takes half a
minute; a single row becomes 1.5 to 2 times as fast, and many rows no faster. On a GPU a step becomes one CUDA
graph (generation/step_graph.py). There a repetition penalty and constraints look at the tokens on the CPU, so
their steps are not compiled.

Shapes: B rows, T tokens fed in one forward pass, V vocab_size, K key/value heads, D head_dim.
"""

import functools
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from configurator import UserError, require, require_not_negative, require_positive
from formats.tokenizer import Tokenizer
from generation.constraints import Guide
from generation.step_graph import StepGraph
from model import GPT
from modeling.devices import autocast_dtype
from modeling.kv_cache import SPARE_SLOTS, KVCache, StepCache
from modeling.sinks import SinkCache, cache_limits

MIN_SHARED_PREFIX = 64  # tokens: a shorter prefix of all rows is not worth a forward pass of its own
SEED_STRIDE = 2**20  # a row's generator is seeded with seed * SEED_STRIDE + row number
MOST_NEW_TOKENS = 2**20  # tokens per sample; a row's random numbers are drawn at the start, 4 MiB at most
NO_TOKEN = -1  # in place of a token id, for a row whose logits are not finite
MIN_TEMPERATURE = 1e-5  # below, logits / temperature may overflow: like 0, it takes the most likely token


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """How the next token is chosen.

    The order is that of transformers: repetition_penalty, temperature, top_k, top_p, min_p.
    """

    temperature: float = 0.8  # divides the logits; below 1e-5 the most likely token (ties: the lowest id)
    top_k: int | None = None  # keep only the k most likely tokens; None or 0 keeps all
    top_p: float = 1.0  # keep the most likely tokens until they reach this probability, at least one
    min_p: float = 0.0  # drop tokens less likely than min_p times the most likely token
    repetition_penalty: float = 1.0  # above 1 makes tokens that are in the row less likely (CTRL)
    seed: int = 1337  # random numbers depend on this seed and on the number of the row
    sinks: int = 0  # first tokens of a text that always stay in the cache; 4 lets a text outgrow the context
    window: int | None = None  # last tokens that stay in the cache; None fills the context if sinks is set

    def __post_init__(self) -> None:
        # torch seeds have 63 bits, and SEED_STRIDE takes 20 of them.
        for key, low, high in (("temperature", 0, float("inf")), ("top_p", 0, 1), ("min_p", 0, 1),
                               ("repetition_penalty", 0.01, 100), ("seed", 0, 2**43 - 1)):
            require(self, key, low <= getattr(self, key) <= high, f"between {low} and {high}")
        require_not_negative(self, "top_k", "sinks")
        require_positive(self, "window")


@dataclass
class PrefixCache:
    """The ids that a call has read, with their keys and values, for a later call that continues the text.

    A conversation passes the same PrefixCache at every turn, so that only the new turn is read.
    """

    cache: KVCache | None = None
    ids: list[int] = field(default_factory=list)


@dataclass(frozen=True, kw_only=True)
class Options:
    """What a call of `generate` may need besides prompts and sampling."""

    vocab_size: int | None = None  # ids from here on, unknown to the tokenizer, are never chosen
    row_numbers: Sequence[int] | None = None  # one per prompt, for the random numbers; None is 0, 1, 2, ...
    prefix: PrefixCache | None = None  # of a single prompt: reuse what an earlier call read, and update it
    guide: Guide | None = None  # masks the tokens that a grammar does not allow, before sampling


# ---- From logits to a token -------------------------------------------------------------------------------

def penalize(logits: Tensor, rows: Sequence[list[int]], penalty: float) -> Tensor:
    """Make the tokens of each row less likely to be repeated in it: logits (B, V), changed in place.

    This is CTRL's penalty (arXiv 1909.05858), as transformers computes it.
    """
    if penalty == 1.0:
        return logits
    for row, tokens in enumerate(rows):
        seen = torch.tensor(sorted(set(tokens)), device=logits.device)
        values = logits[row, seen]
        logits[row, seen] = torch.where(values > 0, values / penalty, values * penalty)
    return logits


def choose(logits: Tensor, uniform: Tensor, sampling: Sampling) -> Tensor:
    """Choose one token per row: logits (B, V) float32, uniform (B,) in [0, 1) -> ids (B,) int64.

    Tokens are sorted by probability, ties by id. The cumulative distribution is inverted at `uniform`.
    """
    if sampling.temperature < MIN_TEMPERATURE:
        return logits.argmax(dim=-1)
    logits, order = (logits / sampling.temperature).sort(dim=-1, descending=True, stable=True)  # (B, V) both
    probabilities = logits.softmax(dim=-1)
    if sampling.top_k:
        probabilities[:, sampling.top_k:] = 0
        probabilities /= probabilities.sum(dim=-1, keepdim=True)
    before = probabilities.cumsum(dim=-1) - probabilities  # (B, V): probability of all likelier tokens
    drop = (before >= sampling.top_p) & (sampling.top_p < 1)  # rounding may bring `before` to 1
    drop |= probabilities < sampling.min_p * probabilities[:, :1]
    drop[:, 0] = False  # whatever the filters say, the most likely token stays
    # The dropped tokens have no mass. The first token whose cumulative mass exceeds the target is chosen.
    mass = probabilities.masked_fill(drop, 0).cumsum(dim=-1)  # (B, V)
    place = torch.searchsorted(mass, uniform[:, None] * mass[:, -1:], right=True)  # (B, 1)
    return order.gather(-1, place.clamp(max=mass.shape[-1] - 1))[:, 0]


def next_ids(logits: Tensor, uniform: Tensor, sampling: Sampling, rows: Sequence[list[int]] = (),
             guide: Guide | None = None) -> Tensor:
    """`choose`, with NO_TOKEN for a row whose logits are not finite.

    rows: the tokens of each row, for the repetition penalty, which changes the logits in place. guide: masks
    the tokens that its grammar does not allow.
    """
    logits = penalize(logits, rows, sampling.repetition_penalty)
    logits = logits if guide is None else guide.mask(logits)
    broken = ~logits.amax(dim=-1).isfinite()  # (B,): NaN or an infinity reaches the maximum
    return choose(logits, uniform, sampling).masked_fill(broken, NO_TOKEN)


# ---- Forward passes ---------------------------------------------------------------------------------------

def last_logits(model: GPT, ids: Tensor, cache: KVCache, last: list[int] | None = None) -> Tensor:
    """Feed tokens of each row, ids (B, T), and return the logits after one of them, (B, V).

    last: the index of that token in each row; with T = 1 it is not needed.
    """
    def head(hidden: Tensor, weight: Tensor) -> Tensor:
        hidden = hidden[:, 0] if last is None else hidden[range(len(last)), last]  # (B, T, C) -> (B, C)
        return model.logits(hidden)  # (B, V)

    return model(ids, cache=cache, head=head)


@functools.cache
def compiled_step() -> Callable[[GPT, Tensor, KVCache], Tensor]:
    """Compile `last_logits` for a CPU, into C++."""
    return torch.compile(last_logits, options={"cpp_wrapper": True})


def forward_last(model: GPT, rows: list[list[int]], cache: KVCache) -> Tensor:
    """Feed each row's new tokens after those in the cache; return the logits after its last token, (B, V)."""
    longest = max(map(len, rows))
    ids = torch.tensor([row + [0] * (longest - len(row)) for row in rows], device=cache.rows.device)  # (B, T)
    if longest == 1 and isinstance(cache, StepCache):
        return compiled_step()(model, ids, cache)
    last = None if longest == 1 else [len(row) - 1 for row in rows]
    with torch.compiler.set_stance("force_eager"):  # each new length would be compiled again
        return last_logits(model, ids, cache, last)


def graph_steps(model: GPT, cache: KVCache, unread: list[list[int]], uniform: Tensor, sampling: Sampling,
                options: Options) -> Iterator[list[int]]:
    """Return the tokens of further steps, one list of ids per step. unread: one token per row."""
    def choose_at(logits: Tensor, step: Tensor) -> Tensor:
        return next_ids(logits[:, :options.vocab_size].float(), uniform.index_select(1, step)[:, 0], sampling)

    return StepGraph(model, cache, [row[0] for row in unread], choose_at).tokens(uniform.shape[1])


# ---- Generation -------------------------------------------------------------------------------------------

def uniform_numbers(seed: int, row_numbers: Sequence[int], steps: int) -> Tensor:
    """Draw the random numbers of each row, in [0, 1): (B, steps). They depend on seed and row number only."""
    generators = [torch.Generator().manual_seed(seed * SEED_STRIDE + number) for number in row_numbers]
    return torch.stack([torch.rand(steps, generator=generator) for generator in generators])


def shift_context(context: list[list[int]], block_size: int) -> bool:
    """Cut each row that has outgrown the context to its last block_size // 2 tokens; True if any was cut.

    With block_size=4, [1, 2, 3, 4, 5] becomes [4, 5]. The positions of the kept tokens change, so the caller
    has to read them again into a new cache.
    """
    full = [row for row in context if len(row) > block_size]
    for row in full:
        row[:] = row[-max(1, block_size // 2):]
    return bool(full)


def append_tokens(rows: list[list[int]], tokens: list[int | None]) -> None:
    """Append each row's token of one step; None, of a row that has ended, adds nothing."""
    for row, token in zip(rows, tokens, strict=True):
        if token is not None:
            row.append(token)


class Reader:
    """What the model has read of each row, for one call of `generate`.

    context: the tokens that each row attends to: all, or the sinks and the last ones. cache: their keys and
    values; None where everything has to be read. unread: the tokens of each row that the cache does not hold.
    """

    def __init__(self, model: GPT, prompts: list[list[int]], sampling: Sampling, prefix: PrefixCache | None):
        if not prompts or not all(prompts):
            raise ValueError("every prompt needs at least one token")
        self.model, self.prefix = model, prefix
        self.limits = cache_limits(model.config, sampling.sinks, sampling.window)  # (sinks, window) or None
        if model.compiled_steps and (self.limits or model.config.n_expert):
            raise UserError("compile=True does not work with experts, sinks or window")
        sinks, size = (self.limits[0], sum(self.limits)) if self.limits else (0, model.config.block_size)
        self.size = size
        self.context = [prompt[:] if len(prompt) <= size else prompt[:sinks] + prompt[sinks - size:]
                        for prompt in prompts]
        self.cache: KVCache | None = None
        self.unread = self.context
        # A cache that has dropped tokens cannot go back, so it is not used again.
        if prefix and prefix.cache and max(len(prefix.ids), len(self.context[0])) <= size:
            shared = len(os.path.commonprefix([prefix.ids, self.context[0][:-1]]))
            self.cache, self.unread = prefix.cache, [self.context[0][shared:]]
            self.cache.set_lengths([shared])
            del prefix.ids[shared:]  # their slots are overwritten now, and Ctrl-C may stop that halfway

    def read(self, steps_left: int) -> Tensor:
        """Read what is unread; return the logits after the last token of each row, (B, V)."""
        if self.cache is None:
            self.cache = self.new_cache(steps_left)
        return forward_last(self.model, self.unread, self.cache)

    def new_cache(self, steps_left: int) -> KVCache:
        """Make a cache for the rows, and set what it does not hold yet.

        A long prefix that all rows share, such as worked examples before a question, is computed once and
        copied to every row. Each row keeps its last token at least, because the logits after it are needed.
        """
        model, rows, block_size = self.model, self.context, self.model.config.block_size
        # A row may grow by one token per step. With `prefix`, a later call may fill the whole context.
        slots = block_size if self.prefix else min(block_size, max(map(len, rows)) + steps_left)
        slots += SPARE_SLOTS if model.compiled_steps else 0
        device, dtype = model.head_weight.device, autocast_dtype(model.head_weight)
        kind = StepCache if model.compiled_steps and device.type == "cpu" else KVCache
        cache = (kind(model.config, len(rows), slots, device, dtype) if self.limits is None else
                 SinkCache(model.config, len(rows), self.limits, model.rope, dtype))
        self.unread = rows
        shared = min(len(os.path.commonprefix(rows)), *(len(row) - 1 for row in rows))
        if len(rows) > 1 and shared >= MIN_SHARED_PREFIX:
            one = KVCache(model.config, 1, shared, device, dtype)
            forward_last(model, [rows[0][:shared]], one)
            for stored, computed in zip((*cache.k, *cache.v), (*one.k, *one.v), strict=True):
                stored[:, :, :shared] = computed  # (1, K, shared, D) -> (B, K, shared, D)
            cache.set_lengths([shared] * len(rows))
            self.unread = [row[shared:] for row in rows]
        return cache

    def append(self, tokens: list[int | None], live: list[bool]) -> bool:
        """Append one step's tokens, which are unread then. Returns False if the rows must be read again.

        A row that is not live stays in the batch, with one token.
        """
        if self.prefix is not None:
            self.prefix.cache, self.prefix.ids = self.cache, self.context[0].copy()
        append_tokens(self.context, tokens)
        self.context = [row if alive else row[-1:] for row, alive in zip(self.context, live, strict=True)]
        self.unread = [row[-1:] for row in self.context]
        if self.limits is None and shift_context(self.context, self.size):
            self.cache = None
            return False
        assert self.cache is not None
        self.cache.set_lengths([len(row) - 1 for row in self.context])  # all but the tokens just chosen
        return True


def generate_steps(model: GPT, prompts: list[list[int]], max_new_tokens: int, sampling: Sampling,
                   is_done: Callable[[int, list[int]], bool] | None = None,
                   options: Options = Options()) -> Iterator[list[int | None]]:
    """Yield one token per row and step, None for rows that have ended, for at most max_new_tokens steps.

    prompts: token ids, at least one per row. If a prompt is longer than the context, only its end is read
        (and the sinks).
    is_done(row, new ids): called after each token of a row; True ends the row with that token. None lets
        every row reach max_new_tokens.
    Raises ValueError for an empty prompt, and UserError if the logits of the model are not finite.
    """
    reader, guide = Reader(model, prompts, sampling, options.prefix), options.guide
    new: list[list[int]] = [[] for _ in prompts]  # the tokens that each row has generated
    live = [True] * len(prompts)  # False for a row that has ended
    numbers = options.row_numbers or range(len(prompts))
    uniform = uniform_numbers(sampling.seed, numbers, max_new_tokens).to(model.head_weight.device)
    uses_graph = model.compiled_steps and uniform.is_cuda and not guide and sampling.repetition_penalty == 1
    graph: Iterator[list[int]] | None = None  # the tokens of further steps, from a CUDA graph
    for step in range(max_new_tokens):
        chosen = next(graph, None) if graph is not None else None
        if chosen is None:
            logits = reader.read(max_new_tokens - step)[:, :options.vocab_size].float()  # (B, V)
            chosen = next_ids(logits, uniform[:, step], sampling, reader.context, guide).tolist()
            graph = None
        if NO_TOKEN in chosen:
            raise UserError(f"{model.source}: its logits are not finite, so its weights are broken")
        tokens = [token if alive else None for token, alive in zip(chosen, live, strict=True)]
        if guide is not None:
            guide.advance(tokens)
        append_tokens(new, tokens)
        live = [alive and not (is_done and is_done(row, new[row])) for row, alive in enumerate(live)]
        if not reader.append(tokens, live):
            graph = None
        elif uses_graph and graph is None:
            graph = graph_steps(model, reader.cache, reader.unread, uniform[:, step + 1:], sampling, options)
        yield tokens
        if not any(live):
            return


# inference_mode is 15 % faster than no_grad, but its tensors cannot be used in training: on-policy training
# calls generate_steps, and all others call this function.
generate = torch.inference_mode()(generate_steps)


# ---- Text -------------------------------------------------------------------------------------------------

@dataclass(frozen=True, kw_only=True)
class TextSampling(Sampling):
    """How the next token is chosen, and what ends a text."""

    stop: list | str | None = None  # text that ends a sample, or a list of texts: '["\\n\\n", "def "]'

    def __post_init__(self) -> None:
        super().__post_init__()
        are_texts = all(isinstance(text, str) and text for text in self.stops)
        require(self, "stop", are_texts, "a text or a list of texts, none of them empty")

    @property
    def stops(self) -> list[str]:
        """`stop` as a list."""
        return [self.stop] if isinstance(self.stop, str) else self.stop or []


def visible_text(text: str, stops: list[str], finished: bool = True) -> str:
    """The text up to the earliest of the stop texts in it.

    Until it is finished, leave out an end that may still change: an incomplete character, or the beginning of
    a stop text.
    """
    if ends := [text.find(stop) for stop in stops if stop in text]:
        return text[:min(ends)]
    if finished:
        return text
    text = text.rstrip("\N{REPLACEMENT CHARACTER}")  # bytes of a character whose other bytes may follow
    begun = [n for stop in stops for n in range(1, len(stop)) if text.endswith(stop[:n])]
    return text[:len(text) - max(begun, default=0)]


class TextEnd:
    """What ends a text: a token of end_ids, or a stop text. Neither is shown."""

    def __init__(self, tokenizer: Tokenizer, end_ids: set[int], stops: list[str]):
        self.tokenizer, self.end_ids, self.stops = tokenizer, end_ids, stops
        # A stop text that the last token completes spans at most one token per byte. One token more, because
        # a tokenizer may drop a space from the first token that it decodes.
        self.window = 1 + max((len(stop.encode()) for stop in stops), default=0)

    def is_reached(self, new: list[int]) -> bool:
        """Whether the last of the generated ids ends the text."""
        if new[-1] in self.end_ids or not self.stops:
            return new[-1] in self.end_ids
        for more in range(4):  # one of these windows begins with a whole character
            tail = self.tokenizer.decode(new[-self.window - more:], inside=True)
            # A tokenizer with byte tokens ("<0xE4>") may read a cut character and all bytes after it as
            # replacement characters. A longer window may begin with a whole character.
            if "\N{REPLACEMENT CHARACTER}" not in tail or any(stop in tail for stop in self.stops):
                break
        return any(stop in tail for stop in self.stops)

    def text(self, new: list[int], finished: bool = True) -> str:
        """The generated ids as `visible_text`."""
        text = self.tokenizer.decode([i for i in new if i not in self.end_ids], inside=True)
        return visible_text(text, self.stops, finished)


def complete(model: GPT, tokenizer: Tokenizer, prompts: list[str], max_new_tokens: int = 200,
             sampling: Sampling = Sampling(), end_ids: set[int] | None = None) -> list[str]:
    """Continue each text, all in one batch; return what follows each, up to a token of end_ids.

    end_ids: None takes the tokenizer's. An empty prompt starts after the end-of-text token. sample.py prints
    the same texts for the same seed and the same row numbers. Raises UserError as `generate` does.
    """
    if end_ids is None:
        end_ids = {*(tokenizer.end_ids if isinstance(tokenizer.end_ids, list) else [tokenizer.end_ids])}
    end, new = TextEnd(tokenizer, end_ids, []), list[list[int]]([] for _ in prompts)
    rows = [tokenizer.prefix_ids + tokenizer.encode(prompt) or [tokenizer.eot_id] for prompt in prompts]
    for tokens in generate(model, rows, max_new_tokens, sampling, lambda row, ids: end.is_reached(ids),
                           Options(vocab_size=tokenizer.vocab_size)):
        append_tokens(new, tokens)
    return [end.text(row) for row in new]
