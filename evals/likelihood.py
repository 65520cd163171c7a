"""The log-probability of continuations after a context; a prefix shared by several texts is computed once.

    request = encode_plain(tokenizer, "Q: 2 + 2?\nA:", " 4")   # or encode_turn: chat format
    texts, lost = fit_context(request, block_size)             # cut to the model's context
    score_texts(model, texts)                                  # [Likelihood(-0.1, 0, True)]

Benchmark texts share prefixes: the choices of a question share the question, and all questions share the
worked examples. The texts are sorted, so that each one shares its longest prefix with the text before it.
Together they are a tree of tokens. The KV cache has one slot per node of the tree, in the order of reading:

    texts      sorted     new tokens   slots         tree
    a b c d    a b c d    a b c d      0 1 2 3       a0 -+- b1 - c2 -+- d3
    a f g      a b c e          e            4           |           +- e4
    a b c e    a f g        f g          5 6             +- f5 - g6

All new tokens go through the model as one row, without padding. A mask lets each token attend to its own
text only (rows: new tokens; columns: slots):

    token  position   0 1 2 3 4 5 6
      a       0       x
      b       1       x x
      c       2       x x x
      d       3       x x x x
      e       3       x x x . x               does not see d
      f       1       x . . . . x             sees a only
      g       2       x . . . . x x

Before the next pass the cache keeps the prefix that the next text shares with the last one (here at most
a f g, moved to slots 0 1 2), and drops the rest. Logits are computed at the scored tokens only.

Text is encoded as in lm-evaluation-harness 0.4.13, class HFLM (github.com/EleutherAI/lm-evaluation-harness).
Shapes: B rows (1 for the tree), T new tokens, S slots of the cache, N scored tokens, V vocab_size.
"""

import functools
import itertools
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from configurator import ProgressBar, UserError
from formats.chat_format import encode_content, end_of_turn, turn_frame
from formats.tokenizer import Tokenizer
from model import GPT
from modeling.devices import autocast_dtype
from modeling.kv_cache import KVCache
from training.losses import chunk_rows, linear_log_probs

# New tokens per forward pass. In a longer pass, each token computes more scores that the mask throws away.
MAX_PASS_TOKENS = {"cpu": 256, "cuda": 4096}
ROW_TOKENS = 4096  # tokens of running text per forward pass


class Likelihood(NamedTuple):
    """How likely a model finds a continuation, or the scored tokens of a text."""

    log_prob: float  # sum over its tokens, in nats
    truncated: int = 0  # tokens dropped from the beginning of the context
    greedy: bool = True  # whether each of its tokens is the most likely one


class Request(NamedTuple):
    """Ids of a context and of its continuation. prefix, suffix: ids around the context in a chat."""

    context: list[int]
    continuation: list[int]
    prefix: list[int] = []
    suffix: list[int] = []


class Text(NamedTuple):
    """Ids whose last `num_targets` are scored. The last id is only a target: the model does not read it."""

    ids: np.ndarray  # (2 .. block_size + 1,) int32
    num_targets: int


# ---- Text -> ids ------------------------------------------------------------------------------------------

def opening_id(tokenizer: Tokenizer) -> int:
    """The token that opens a text: the tokenizer's BOS token, or its end-of-text token if it has no BOS."""
    return tokenizer.eot_id if tokenizer.bos_id is None else tokenizer.bos_id


@functools.lru_cache(maxsize=1)  # all choices of a question have the same context
def context_ids(tokenizer: Tokenizer, context: str, chat: bool) -> list[int]:
    """The ids of a context: of a text, or of the content of a user's message."""
    if chat:
        return encode_content(tokenizer, "user", context)
    return tokenizer.prefix_ids + tokenizer.encode(context) if context else []


def encode_plain(tokenizer: Tokenizer, context: str, continuation: str) -> Request:
    """Encode a context and its continuation as HFLM does.

    Context and continuation are encoded as one text, which is split at the number of ids that the context
    alone has. Trailing spaces of the context move to the continuation. An empty context becomes the token
    that opens a text. Raises UserError if the continuation has no token of its own.
    """
    before = context_ids(tokenizer, context.rstrip(), chat=False)
    ids = tokenizer.encode(context + continuation)
    target = (tokenizer.prefix_ids + ids)[len(before):] if before else ids
    if not target:
        raise UserError(f"{continuation!r} after {context[-40:]!r} has no token of its own")
    return Request(before or [opening_id(tokenizer)], target)


def encode_turn(tokenizer: Tokenizer, context: str, continuation: str) -> Request:
    """Encode the context as a user's message and the continuation as the beginning of the assistant's answer.

    An empty continuation becomes the end of the turn.
    """
    answer = encode_content(tokenizer, "assistant", continuation.strip()) or [end_of_turn(tokenizer)]
    return Request(context_ids(tokenizer, context.strip(), chat=True), answer, *turn_frame(tokenizer))


def fit_context(request: Request, block_size: int) -> tuple[list[Text], int]:
    """Cut a context and a continuation to what the model can read; returns (texts, dropped context tokens).

    The context is cut at its beginning. A continuation longer than block_size becomes several texts. Each
    begins with the tokens before it that still fit.
    """
    context, continuation, prefix, suffix = request
    assert continuation, "a continuation has at least one token"
    # At least one token of context stays. The last token of the continuation is not read: hence the + 1.
    room = max(1, block_size + 1 - len(prefix) - len(suffix) - len(continuation))
    kept = context[max(0, len(context) - room):]
    whole = prefix + kept + suffix + continuation
    begin, texts = len(whole) - len(continuation), []  # begin: of the tokens that are not scored yet
    for end in [*range(begin + block_size, len(whole), block_size), len(whole)]:
        texts.append(Text(np.array(whole[max(0, end - block_size - 1):end], np.int32), end - begin))
        begin = end
    return texts, len(context) - len(kept)


# ---- Ids -> log-probabilities -----------------------------------------------------------------------------

def shared_prefix_length(one: np.ndarray, two: np.ndarray) -> int:
    """The number of equal elements at the beginning of both arrays."""
    length = min(len(one), len(two))
    differs = one[:length] != two[:length]
    return int(differs.argmax()) if differs.any() else length


def tree_mask(paths: list[np.ndarray], counts: list[int], first: int) -> np.ndarray:
    """Which slots each new token attends to: (T, S) bool.

    paths: the slots of each text; the last counts[i] of paths[i] are new. first: the first new slot.
    """
    mask, row = np.zeros((sum(counts), first + sum(counts)), bool), 0
    for path, count in zip(paths, counts, strict=True):
        mask[row:row + count, path[:len(path) - count]] = True  # all of the shared prefix
        mask[row:row + count, first + row:first + row + count] = np.tri(count, dtype=bool)  # causal
        row += count
    return mask


class Tree(KVCache):
    """Keys, values and last hidden states of a tree of tokens, in one row of slots (module docstring).

    text: ids of the text that was read last, (L,) int32. path: the slot of each of its tokens, (L,) int64.
    """

    def __init__(self, model: GPT, size: int):
        device, dtype = model.head_weight.device, autocast_dtype(model.head_weight)
        super().__init__(model.config, 1, size, device, dtype)
        self.states = torch.zeros(size, model.config.n_embd, device=device, dtype=dtype)  # (slots, n_embd)
        self.text, self.path = np.zeros(0, np.int32), np.zeros(0, np.int64)

    def read(self, model: GPT, texts: list[np.ndarray]) -> list[np.ndarray]:
        """Run the model on the new tokens of these texts, in this order; returns the path of each text.

        The new tokens of a text are those after the prefix that it shares with the text before it. They take
        the slots from `used` on.
        """
        first, paths, counts, ids, positions = self.used, [], [], [], []
        for text in texts:
            shared, begin = shared_prefix_length(self.text, text), first + sum(counts)
            counts.append(len(text) - shared)
            ids.append(text[shared:])
            positions.append(np.arange(shared, len(text)))
            self.text, self.path = text, np.append(self.path[:shared], np.arange(begin, begin + counts[-1]))
            paths.append(self.path)
        device, T = self.rows.device, sum(counts)
        self.mask = torch.from_numpy(tree_mask(paths, counts, first)).to(device)[None, None]  # (1, 1, T, S)
        self.positions = torch.from_numpy(np.concatenate(positions)).to(device)[None]  # (1, T)
        new = torch.from_numpy(np.concatenate(ids)).to(device)[None].long()  # (1, T)
        # The head returns the hidden states, (T, n_embd): no logits yet.
        self.states[first:first + T] = model(new, cache=self, head=lambda hidden, weight: hidden[0])
        return paths

    def prepare(self, T: int) -> tuple[Tensor, Tensor]:
        """The mask and the positions of the pass that `read` has set up (a plain cache: causal, in order)."""
        self.begin, self.end = self.used, self.used + T
        return self.mask, self.positions

    def keep(self, length: int) -> None:
        """Move the first `length` tokens of the last text to the first slots, and drop all others."""
        settled = shared_prefix_length(self.path[:length], np.arange(length))  # already in place
        slots = torch.from_numpy(self.path[settled:length]).to(self.rows.device)
        for stored in (*self.k, *self.v):
            stored[:, :, settled:length] = stored[:, :, slots]
        self.states[settled:length] = self.states[slots]
        self.text, self.path = self.text[:length], np.arange(length)
        self.set_lengths([length])


def batches(texts: list[np.ndarray], max_tokens: int) -> Iterator[list[tuple[int, int]]]:
    """Yield batches of (index, end) in sorted order; a batch adds at most `max_tokens` tokens to the tree.

    (index, end) reads texts[index][:end]. A text that adds more tokens is read in several pieces.
    """
    before, batch, size = np.zeros(0, np.int32), [], 0
    for index in sorted(range(len(texts)), key=lambda index: texts[index].tobytes()):
        begin = shared_prefix_length(before, texts[index])
        for end in [*range(begin + max_tokens, len(texts[index]), max_tokens), len(texts[index])]:
            if size + end - begin > max_tokens:
                yield batch
                batch, size = [], 0
            batch.append((index, end))
            size, begin = size + end - begin, end
        before = texts[index]
    if batch:
        yield batch


def score_slots(model: GPT, states: Tensor, slots: list[np.ndarray],
                targets: list[np.ndarray]) -> list[Likelihood]:
    """The likelihood of each text's targets, after its slots. UserError if a log-probability is not finite.

    states: (slots, n_embd). slots, targets: one integer array per text, of equal lengths.
    """
    if not slots:
        return []
    V, weight = model.config.vocab_size, model.head_weight
    ends = np.cumsum([len(each) for each in targets])[:-1]
    # Choices with the same context share the slot before their first token: its logits are computed once.
    unique, place = np.unique(np.concatenate(slots), return_inverse=True)  # (U,), (N,)
    ids = np.concatenate(targets).astype(np.int64)  # (N,)
    values, best = np.zeros(len(ids)), np.zeros(len(ids), bool)  # log p(target); is it the largest one?
    chunk = chunk_rows(states, V)
    for begin in range(0, len(unique), chunk):
        here = torch.from_numpy(unique[begin:begin + chunk]).to(states.device)
        logits = (states[here] @ weight.T.to(states.dtype))[:, :V].float()  # (chunk, V)
        mine = np.flatnonzero((begin <= place) & (place < begin + chunk))  # the targets of this chunk
        row, wanted = (torch.from_numpy(each[mine]).to(states.device) for each in (place - begin, ids))
        values[mine] = (logits[row, wanted] - logits.logsumexp(dim=-1)[row]).cpu().numpy()
        best[mine] = (logits.argmax(dim=-1)[row] == wanted).cpu().numpy()
    if not np.isfinite(values).all():
        raise UserError(f"{model.source}: a log-probability is not finite, so its weights are broken")
    return [Likelihood(float(value.sum()), greedy=bool(hit.all()))
            for value, hit in zip(np.split(values, ends), np.split(best, ends), strict=True)]


@torch.inference_mode()
def score_texts(model: GPT, texts: list[Text], max_tokens: int | None = None) -> list[Likelihood]:
    """The sum of the log-probabilities of each text's targets, and whether greedy decoding yields them.

    max_tokens: new tokens per forward pass; None uses MAX_PASS_TOKENS of the device. Raises UserError if a
    log-probability is not finite.
    """
    device = model.head_weight.device
    max_tokens = max_tokens or MAX_PASS_TOKENS.get(device.type, 4096)
    inputs = [text.ids[:-1] for text in texts]
    tree = Tree(model, model.config.block_size + max_tokens)  # the longest kept prefix and one pass
    scores = [Likelihood(0.0)] * len(texts)
    with ProgressBar(total=len(texts), unit="text") as bar:
        for batch in batches(inputs, max_tokens):
            pieces = [inputs[index][:end] for index, end in batch]
            tree.keep(shared_prefix_length(tree.text, pieces[0]))
            paths = tree.read(model, pieces)
            complete = [(index, path) for (index, end), path in zip(batch, paths, strict=True)
                        if end == len(inputs[index])]
            # A text is scored once it is read to its end. Its last `num_targets` slots predict the targets.
            slots = [path[len(path) - texts[index].num_targets:] for index, path in complete]
            targets = [texts[index].ids[-texts[index].num_targets:] for index, _ in complete]
            new = score_slots(model, tree.states, slots, targets)
            for (index, _), score in zip(complete, new, strict=True):
                scores[index] = score
            bar.update(len(complete))
    return scores


# ---- Running text -----------------------------------------------------------------------------------------

@torch.inference_mode()
def token_losses(model: GPT, rows: list[np.ndarray], num_targets: list[int]) -> list[list[float]]:
    """The loss -log p in nats of the last `num_targets` ids of each row.

    A row has more ids than targets, and at most block_size + 1. Neighbouring rows of equal length are
    computed together. Raises UserError if a loss is not finite.
    """
    losses: list[list[float]] = []
    device, V = model.head_weight.device, model.config.vocab_size
    with ProgressBar(total=len(rows), unit="row") as bar:
        for (length, count), group in itertools.groupby(zip(rows, num_targets, strict=True),
                                                        key=lambda pair: (len(pair[0]), pair[1])):
            ids = torch.from_numpy(np.stack([row for row, _ in group])).long()  # (rows, T + 1)
            for part in ids.split(max(1, ROW_TOKENS // length)):
                part = part.to(device)  # (B, T + 1)
                targets = part[:, -count:]  # (B, count)
                values = model(part[:, :-1], head=lambda hidden, weight, targets=targets: linear_log_probs(
                    hidden[:, -targets.shape[1]:].flatten(0, 1), weight, targets.flatten(), V))  # (B count,)
                if not values.isfinite().all():
                    raise UserError(f"{model.source}: a loss is not finite, so its weights are broken")
                losses += (-values).view(targets.shape).tolist()
                bar.update(len(part))
    return losses
