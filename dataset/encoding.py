"""What each process of prepare.py does: rows in, ids out.

    for rows, batch in tokenize_all(batches, recipe, processes): ...     # in order, a few batches ahead

The parent reads and writes; the processes parse, look for evaluation items, and encode: text as it is, chats
and preferences as formats/chat_format.py writes them, with a mask beside their ids (dataset/shards.py).
"""

import hashlib
import json
import multiprocessing
import multiprocessing.connection
import os
import signal
import threading
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from typing import Any, Literal, NamedTuple

import numpy as np

from dataset.conversations import Message, conversation, preference, rename_keys
from dataset.decontaminate import OVERLAPS, Index
from dataset.sources import Row, Skip, document, row_value
from formats.chat_format import call_text, encode_answer, encode_chat, encode_prompt, parts_of
from formats.tokenizer import Tokenizer


class Recipe(NamedTuple):
    """How a row becomes ids."""

    kind: Literal["text", "chat", "preference"]
    text_key: str  # where the text is, in rows of text
    keys: dict[str, str]  # {our name of a key: the rows'}, in the others
    index: Index | None  # of evaluation items that no row may overlap
    tokenizer: Tokenizer | None = None  # None: the rows are only looked into


class Batch(NamedTuple):
    """What became of some consecutive rows: one entry a row in everything but `ids` and `mask`."""

    ids: np.ndarray  # (tokens,) the documents one behind the other, each with its end-of-text token
    mask: np.ndarray  # (tokens,) uint8, of chats and preferences: see dataset/shards.py
    lengths: np.ndarray  # (rows,) int64, tokens; 0 for a row that was skipped
    byte_counts: np.ndarray  # (rows,) int64, bytes of UTF-8
    hashes: np.ndarray  # (rows,) uint64, the first 8 bytes of the text's SHA-256
    reasons: list[str | None]  # why a row was skipped
    overlaps: list[list[dict[str, Any]]]  # with evaluation items: see dataset/decontaminate.py


def tokenize(rows: list[Row], recipe: Recipe) -> Batch:
    """Read, hash and encode some rows."""
    tokenizer = recipe.tokenizer
    dtype = np.uint16 if tokenizer.vocab_size <= 2**16 else np.uint32
    ids, masks = [np.empty(0, dtype)], [np.empty(0, np.uint8)]
    lengths, byte_counts, hashes = (np.zeros(len(rows), dtype) for dtype in (np.int64, np.int64, np.uint64))
    contents, reasons, overlaps = parse_rows(rows, recipe)
    for i, content in enumerate(contents):
        if content is None:
            continue
        tokens, mask = ENCODERS[recipe.kind](tokenizer, content)
        ids.append(np.array([*tokens, tokenizer.eot_id], dtype))
        masks.append(np.array([*mask, 0] if mask else [], np.uint8))
        data = text_in(content).encode("utf-8")
        lengths[i], byte_counts[i], hashes[i] = len(ids[-1]), len(data), text_hash(data)
    return Batch(np.concatenate(ids), np.concatenate(masks), lengths, byte_counts, hashes, reasons, overlaps)


# ---- Rows -> contents -------------------------------------------------------------------------------------

def parse_rows(rows: list[Row], recipe: Recipe) -> tuple[
        list[Any], list[str | None], list[list[dict[str, Any]]]]:
    """Of each row the content, or None, and why it cannot be used, or None; and its overlaps."""
    contents, reasons = [], []
    for row in rows:
        try:
            contents.append(content_of(row, recipe))
            reasons.append(None)
        except Skip as reason:
            contents.append(None)
            reasons.append(str(reason))
    overlaps: list[list[dict[str, Any]]] = [[] for _ in rows]
    if recipe.index:
        overlaps = recipe.index.find(["" if content is None else visible_text(content) for content in contents])
        for i, found in enumerate(overlaps):
            if found:
                contents[i], reasons[i] = None, OVERLAPS
    return contents, reasons, overlaps


def content_of(row: Row, recipe: Recipe) -> Any:
    """A row's text, its messages, or the three parts of a preference. Skip if it cannot be used."""
    if recipe.kind == "text":
        return document(row, recipe.text_key)
    fields = rename_keys(row_value(row), recipe.keys)
    return conversation(fields) if recipe.kind == "chat" else preference(fields)


def text_in(content: Any) -> str:
    """What a document is known by: its text, or its messages as JSON."""
    return content if isinstance(content, str) else json.dumps(content, ensure_ascii=False)


def text_hash(data: bytes) -> int:
    """64 bits of SHA-256: the document's name when duplicates are looked for and when the split is drawn."""
    return int.from_bytes(hashlib.sha256(data).digest()[:8], "big")


def visible_text(content: Any) -> str:
    """The words of a document: its text, or what is said in all its messages, with blank lines between."""
    if isinstance(content, str):
        return content
    return "\n\n".join(text for message in messages_in(content) for text in (
        message.get("thought"), message["content"], *map(call_text, message.get("tool_calls", ()))) if text)


def pieces(content: Any) -> Iterator[str]:
    """What of a document becomes ids by itself: its text, or all of its messages but the special tokens."""
    if isinstance(content, str):
        yield content
        return
    for message in messages_in(content):  # from what is `visible_text` a tokenizer would not learn the roles' names
        yield from (part.text for part in parts_of(message) if not part.is_special)


def messages_in(content: list | tuple) -> list[Message]:
    """Those of a conversation, or a preference's prompt and its two answers."""
    return content if isinstance(content, list) else [*content[0], *content[1:]]


# ---- Contents -> ids --------------------------------------------------------------------------------------

def encode_preference(tokenizer: Tokenizer, content: tuple) -> tuple[list[int], list[int]]:
    """(ids, mask) of prompt, chosen and rejected answer, whose tokens the mask calls 0, 1 and 2."""
    prompt = encode_prompt(tokenizer, content[0])
    chosen, rejected = (encode_answer(tokenizer, answer) for answer in content[1:])
    mask = [0] * len(prompt) + [1] * len(chosen) + [2] * len(rejected)
    return prompt + chosen + rejected, mask


ENCODERS = {"text": lambda tokenizer, text: (tokenizer.encode(text), None), "chat": encode_chat,
            "preference": encode_preference}


# ---- Processes --------------------------------------------------------------------------------------------

def tokenize_all(batches: Iterable[list[Row]], recipe: Recipe,
                 processes: int) -> Iterator[tuple[list[Row], Batch]]:
    """`tokenize` over all batches, in order, a few at a time."""
    if processes == 1:
        for rows in batches:
            yield rows, tokenize(rows, recipe)
        return
    with ProcessPoolExecutor(processes, initializer=start_worker, initargs=(recipe,)) as pool:
        waiting: deque = deque()
        try:
            for rows in batches:
                waiting.append((rows, pool.submit(run_in_worker, rows)))
                if len(waiting) > 2 * processes:
                    rows, result = waiting.popleft()
                    yield rows, result.result()
            for rows, result in waiting:
                yield rows, result.result()
        finally:
            pool.shutdown(cancel_futures=True)


def start_worker(recipe: Recipe) -> None:
    """Give a worker process its recipe; Ctrl-C is the parent's to handle, and no worker outlives it."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=leave_with_parent, daemon=True).start()
    global tokenize_here
    tokenize_here = lambda rows: tokenize(rows, recipe)  # noqa: E731


def leave_with_parent() -> None:
    multiprocessing.connection.wait([multiprocessing.parent_process().sentinel])
    os._exit(1)


def run_in_worker(rows: list[Row]) -> Batch:
    return tokenize_here(rows)
