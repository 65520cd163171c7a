"""How likely a model finds given words behind given others, with no token of them computed twice.

    request = encode_plain(tokenizer, "Q: 2 + 2?\nA:", [" 4", " 5"])      # or encode_turn: in the chat format
    texts, lost = fitting(request, request.continuations[0], block_size)  # what a model can read of it
    found = log_probs(model, texts)                                       # [(-0.1, True)]

Texts that begin alike, as the choices of a question and the questions behind the same worked examples do, are
a tree of tokens. In sorted order, what a text shares with any one before it, it shares with the last one
before it. So the texts are read in that order, many in one forward pass: each adds the tokens in which it
leaves the one before, and these see their own text and no other (a mask of the tree; no padding). Between two
passes the cache keeps the path that the next text goes on from. Only where an asked token stands are logits
computed.

Encoding is that of lm-evaluation-harness (github.com/EleutherAI/lm-evaluation-harness, 0.4.13: `HFLM`).
Shapes: B = 1, T new tokens, S slots of the cache, N asked tokens, V vocab_size.
"""

import itertools
from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from configurator import UserError
from formats.chat_format import encode_prompt, end_of_turn
from formats.tokenizer import Tokenizer
from model import GPT
from modeling.devices import autocast_dtype
from modeling.kv_cache import KVCache
from training.losses import chunk_rows, linear_log_probs

MAX_BATCH_TOKENS = {"cpu": 256, "cuda": 4096}  # new tokens in a forward pass: more see more that is not theirs
ROW_TOKENS = 4096  # of running text in a forward pass


class Likelihood(NamedTuple):
    """What a model thinks of a continuation."""

    log_prob: float  # of all its tokens, in nats
    tokens: int
    greedy: bool  # each of its tokens is the likeliest: greedy decoding would write it
    bytes: int  # of its text
    cut: int = 0  # tokens that the context lost at its beginning


class Request(NamedTuple):
    """Ids of a context, and of what may follow it. before, behind: those around the context in a chat."""

    context: list[int]
    continuations: list[list[int]]
    before: list[int] = []
    behind: list[int] = []


class Text(NamedTuple):
    """Ids that fit a model but for the last one, which is not read, and how many at the end are scored."""

    ids: np.ndarray  # int32
    asked: int


# ---- Text -> ids ------------------------------------------------------------------------------------------

def encode_plain(tokenizer: Tokenizer, context: str, continuations: list[str]) -> Request:
    """A context and what may follow it, as HFLM encodes them.

    Both are one text, which is cut where the context's own ids end. Spaces at the end of the context belong
    to the continuation. Behind nothing, the token that opens a text is the context. UserError where a
    continuation has no token of its own.
    """
    bare, texts = context.rstrip(), []
    before = tokenizer.prefix_ids + tokenizer.encode(bare) if bare else []
    for continuation in continuations:
        ids = tokenizer.encode(context + continuation)
        texts.append((tokenizer.prefix_ids + ids)[len(before):] if bare else ids)
        if not texts[-1]:
            raise UserError(f"{continuation!r} behind {context[-40:]!r} is no token of its own")
    return Request(before or [opening_id(tokenizer)], texts)


def opening_id(tokenizer: Tokenizer) -> int:
    """What stands before a text: the tokenizer's bos_token, else its end-of-text token."""
    return tokenizer.eot_id if tokenizer.bos_id is None else tokenizer.bos_id


def encode_turn(tokenizer: Tokenizer, context: str, continuations: list[str]) -> Request:
    """The context as a user's message, the continuations as the first words of the assistant's answer. One
    that says nothing is the end of the turn."""
    frame, stop = encode_prompt(tokenizer, [{"role": "user", "content": ""}]), end_of_turn(tokenizer)
    end = frame.index(stop)
    answers = [tokenizer.encode(continuation.strip()) or [stop] for continuation in continuations]
    return Request(tokenizer.encode(context.strip()), answers, frame[:end], frame[end:])


def fitting(request: Request, continuation: list[int], block_size: int) -> tuple[list[Text], int]:
    """What a model can read of a context and a continuation, and how many tokens of the context are lost.

    The context loses its beginning. A continuation that the model cannot hold is scored in pieces, each
    behind as much as fits.
    """
    assert continuation, "nothing is asked"
    context, before, behind = request.context, request.before, request.behind
    room = max(1, block_size + 1 - len(before) - len(behind) - len(continuation))
    kept = context[max(0, len(context) - room):]
    whole = before + kept + behind + continuation
    begin, texts = len(whole) - len(continuation), []
    for end in [*range(begin + block_size, len(whole), block_size), len(whole)]:
        texts.append(Text(np.array(whole[max(0, end - block_size - 1):end], np.int32), end - begin))
        begin = end
    return texts, len(context) - len(kept)


# ---- Ids -> log-probabilities -----------------------------------------------------------------------------

class Tree(KVCache):
    """Keys, values and last hidden states of a tree of tokens, in one row of slots.

    text, path: the last text that was read, and the slots of its tokens.
    """

    def __init__(self, model: GPT, size: int):
        device, dtype = model.head_weight.device, autocast_dtype(model.head_weight)
        super().__init__(model.config, 1, size, device, dtype)
        self.states = torch.zeros(size, model.config.n_embd, device=device, dtype=dtype)
        self.text, self.path = np.zeros(0, np.int32), np.zeros(0, np.int64)

    def read(self, model: GPT, texts: list[np.ndarray]) -> list[np.ndarray]:
        """Compute what is new in each of these texts, in their order; returns their paths."""
        first = end = self.used
        paths, new, places = [], [], []
        for text in texts:
            shared = shared_prefix_length(self.text, text)
            new.append(text[shared:])
            places.append(np.arange(shared, len(text)))
            self.text, self.path = text, np.append(self.path[:shared], np.arange(end, end + len(new[-1])))
            paths.append(self.path)
            end += len(new[-1])
        mask, row = np.zeros((end - first, end), bool), 0  # (T, S)
        for path, ids in zip(paths, new, strict=True):
            rows = slice(row, row + len(ids))
            mask[rows, path[:len(path) - len(ids)]] = True  # what it shares with those before it
            mask[rows, first:][:, rows] = np.tri(len(ids), dtype=bool)  # and what it adds
            row += len(ids)
        device = self.rows.device
        self.mask = torch.from_numpy(mask).to(device)[None, None]  # (1, 1, T, S)
        self.positions = torch.from_numpy(np.concatenate(places)).to(device)[None]  # (1, T)
        ids = torch.from_numpy(np.concatenate(new)).to(device)[None].long()  # (1, T)
        self.states[first:end] = model(ids, cache=self, head=lambda hidden, weight: hidden[0])
        return paths

    def prepare(self, T: int) -> tuple[Tensor, Tensor]:
        return self.mask, self.positions

    def keep(self, length: int) -> None:
        """Forget all but the first tokens of the last text, which move to the first slots."""
        settled = shared_prefix_length(self.path[:length], np.arange(length))
        slots = torch.from_numpy(self.path[settled:length]).to(self.rows.device)
        for stored in (*self.k, *self.v):
            stored[:, :, settled:length] = stored[:, :, slots]
        self.states[settled:length] = self.states[slots]
        self.text, self.path = self.text[:length], np.arange(length)
        self.set_lengths([length])


def shared_prefix_length(one: np.ndarray, two: np.ndarray) -> int:
    """With how many equal elements both begin."""
    length = min(len(one), len(two))
    differs = one[:length] != two[:length]
    return int(differs.argmax()) if differs.any() else length


def batches(texts: list[np.ndarray], at_once: int) -> Iterator[list[tuple[int, int]]]:
    """(number, end) of each text in sorted order, in batches that add at most `at_once` tokens to the tree.

    A text that adds more is read in pieces, of which the last one ends where it ends.
    """
    before, batch, size = np.zeros(0, np.int32), [], 0
    for number in sorted(range(len(texts)), key=lambda number: texts[number].tobytes()):
        begin = shared_prefix_length(before, texts[number])
        for end in [*range(begin + at_once, len(texts[number]), at_once), len(texts[number])]:
            if size + end - begin > at_once:
                yield batch
                batch, size = [], 0
            batch.append((number, end))
            size, begin = size + end - begin, end
        before = texts[number]
    if batch:
        yield batch


@torch.inference_mode()
def text_log_probs(model: GPT, texts: list[Text], at_once: int | None = None) -> list[tuple[float, bool]]:
    """Of each text: the sum of the asked tokens' log-probabilities (float32), and whether each of them is the
    likeliest at its place.

    at_once: new tokens in a forward pass; None: what suits the device. Texts have at least two ids and at
    most block_size + 1.
    """
    device = model.head_weight.device
    at_once = at_once or MAX_BATCH_TOKENS.get(device.type, 4096)
    inputs = [text.ids[:-1] for text in texts]
    tree = Tree(model, model.config.block_size + at_once)
    found: list[Any] = [None] * len(texts)
    with tqdm(total=len(texts), unit="text", leave=False, disable=None) as bar:
        for batch in batches(inputs, at_once):
            pieces = [inputs[number][:end] for number, end in batch]
            tree.keep(shared_prefix_length(tree.text, pieces[0]))
            paths = tree.read(model, pieces)
            whole = [(number, path) for (number, end), path in zip(batch, paths, strict=True)
                     if end == len(inputs[number])]
            slots = [path[len(path) - texts[number].asked:] for number, path in whole]
            ids = [texts[number].ids[-texts[number].asked:] for number, _ in whole]
            values, hits = at_slots(model, tree.states, slots, ids)
            for (number, _), each, hit in zip(whole, values, hits, strict=True):
                found[number] = float(each.sum()), bool(hit.all())
            bar.update(len(whole))
    return found


def at_slots(model: GPT, states: Tensor, slots: list[np.ndarray],
             ids: list[np.ndarray]) -> tuple[list[np.ndarray], list[np.ndarray]]:
    """Of each text: log p(id) behind each of its asked slots, float64, and whether it is the likeliest, bool.

    slots, ids: one array a text, of equal lengths.
    """
    if not slots:
        return [], []
    V, weight = model.config.vocab_size, model.head_weight
    ends = np.cumsum([len(each) for each in ids])[:-1]
    unique, place = np.unique(np.concatenate(slots), return_inverse=True)  # of choices, the first is one
    targets = np.concatenate(ids).astype(np.int64)  # (N,)
    values, hits = np.zeros(len(targets)), np.zeros(len(targets), bool)
    rows = chunk_rows(states, V)
    for begin in range(0, len(unique), rows):
        here = torch.from_numpy(unique[begin:begin + rows]).to(states.device)
        logits = (states[here] @ weight.T.to(states.dtype))[:, :V].float()  # (n, V)
        mine = np.flatnonzero((begin <= place) & (place < begin + rows))
        row, wanted = (torch.from_numpy(each[mine]).to(states.device) for each in (place - begin, targets))
        values[mine] = (logits[row, wanted] - logits.logsumexp(dim=-1)[row]).cpu().numpy()
        hits[mine] = (logits.argmax(dim=-1)[row] == wanted).cpu().numpy()
    return np.split(values, ends), np.split(hits, ends)


# ---- Running text -----------------------------------------------------------------------------------------

@torch.inference_mode()
def nats(model: GPT, rows: list[np.ndarray], asked: list[int]) -> list[list[float]]:
    """-log p of the last `asked` ids of each row, which has more than that and at most block_size + 1.

    Rows of one length that stand together are computed together. UserError where the model gives no number.
    """
    found: list[list[float]] = []
    device, V = model.head_weight.device, model.config.vocab_size
    with tqdm(total=len(rows), unit="row", leave=False, disable=None) as bar:
        for (length, count), alike in itertools.groupby(zip(rows, asked, strict=True),
                                                        key=lambda pair: (len(pair[0]), pair[1])):
            ids = torch.from_numpy(np.stack([row for row, _ in alike])).long()  # (B, T + 1)
            for part in ids.split(max(1, ROW_TOKENS // length)):
                part = part.to(device)
                wanted = part[:, -count:]  # (B, asked)
                values = model(part[:, :-1], head=lambda hidden, weight, wanted=wanted: linear_log_probs(
                    hidden[:, -wanted.shape[1]:].flatten(0, 1), weight, wanted.flatten(), V))
                if not values.isfinite().all():
                    raise UserError("a log-probability is not finite: the model's weights are broken")
                found += (-values).view(wanted.shape).tolist()
                bar.update(len(part))
    return found
