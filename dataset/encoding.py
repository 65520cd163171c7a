"""Rows -> token ids, in parallel: what each worker process of prepare.py does.

    for rows, batch in tokenize_all(batches, recipe, processes): ...     # in order

The parent process reads files and writes shards. The workers parse rows, apply the rules of
dataset/quality.py, look for evaluation items, and encode: text as it is, chats and preferences in the format
of formats/chat_format.py, with a mask next to their ids (dataset/shards.py).
"""

import hashlib
import json
import multiprocessing.connection
import os
import signal
import threading
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from typing import Any, Literal, NamedTuple

import numpy as np

from configurator import UserError
from dataset.conversations import Message, conversation, preference, rename_keys, without_nulls
from dataset.decontaminate import OVERLAPS, Index
from dataset.quality import Limits, document_signatures, first_failure
from dataset.shards import SEPARATOR, token_dtype
from dataset.sources import Row, Skip, document, row_value
from dataset.tasks import conversation_of
from formats.chat_format import call_text, encode_documents, encode_pair
from formats.tokenizer import Tokenizer

EXCERPT = 300  # characters of a text that are shown where a quality rule dropped it
# A row's content: a text, the messages of a chat, or a preference's (prompt, chosen answer, rejected answer).
Content = str | list[Message] | tuple[list[Message], Message, Message]


class Recipe(NamedTuple):
    """How a row becomes ids."""

    kind: Literal["text", "chat", "preference"]
    text_key: str  # of rows of text: the key that holds the text
    keys: dict[str, str]  # of chats and preferences: {our name of a key: its name in the rows}
    index: Index | None  # evaluation items that no row may overlap
    tokenizer: Tokenizer | None = None  # None is enough for `parse_rows`
    task: str | None = None  # of chats: rows are those of this benchmark (dataset/tasks.py)
    rules: Limits = {}  # of text: quality rules that a row must not violate
    dedup: bool = False  # whether rows get a signature, to find near-duplicates by


class Batch(NamedTuple):
    """What some consecutive rows became."""

    ids: np.ndarray  # (tokens,) uint16 or uint32, document after document, each with its end-of-text token
    mask: np.ndarray  # (tokens,) uint8 for chats and preferences (dataset/shards.py); empty for text
    lengths: np.ndarray  # (rows,) int64, tokens; 0 for a row that was skipped
    byte_counts: np.ndarray  # (rows,) int64, bytes of UTF-8
    hashes: np.ndarray  # (rows,) uint64, `text_hash`
    reasons: list[str | None]  # (rows) why a row was skipped
    details: list[dict[str, Any]]  # (rows) what a rule that dropped the row saw; else empty
    signatures: np.ndarray  # (rows, PERMUTATIONS) uint32, or None without dedup


# ---- Rows -> contents -------------------------------------------------------------------------------------

def messages_in(content: list | tuple) -> list[Message]:
    """All messages of a chat, or of a preference's prompt and its two answers."""
    return content if isinstance(content, list) else [*content[0], *content[1:]]


def texts_of(message: Message) -> list[str]:
    """All that a reader of a message sees: its thought, its content and its calls."""
    texts = message.get("thought"), message["content"], *map(call_text, message.get("tool_calls", ()))
    return [text for text in texts if text]


def visible_text(content: Content) -> str:
    """A text, or the `texts_of` the messages with blank lines between."""
    if isinstance(content, str):
        return content
    return "\n\n".join(text for message in messages_in(content) for text in texts_of(message))


def parse_content(row: Row, recipe: Recipe) -> Content:
    """The row's content. Raises Skip if the row cannot be used, or if a text violates a quality rule."""
    if recipe.kind == "text":
        text = document(row, recipe.text_key)
        if failure := first_failure(text, recipe.rules):
            raise Skip(f"quality rule {failure[0]}", value=failure[1], text=text[:EXCERPT])
        return text
    value = row_value(row)
    if recipe.task:
        value = conversation_of(recipe.task, value)
    # In Parquet and on the hub, all structs of a column have the same fields: an absent field is a null.
    fields = rename_keys(without_nulls(value) if row.kind == "value" else value, recipe.keys)
    return conversation(fields) if recipe.kind == "chat" else preference(fields)


def parse_rows(rows: list[Row], recipe: Recipe) -> tuple[
        list[Content | None], list[str | None], list[dict[str, Any]]]:
    """(contents, reasons, details), one entry per row.

    A row that cannot be used, violates a quality rule, or overlaps an evaluation item, has the content None
    and a reason. The latter two have details: what the rule saw.
    """
    contents: list[Content | None] = [None] * len(rows)
    reasons: list[str | None] = [None] * len(rows)
    details: list[dict[str, Any]] = [{} for _ in rows]
    for i, row in enumerate(rows):
        try:
            contents[i] = parse_content(row, recipe)
        except Skip as reason:
            reasons[i], details[i] = str(reason), reason.details
    if recipe.index:
        overlaps = recipe.index.find([visible_text(each or "") for each in contents])
        for i in range(len(rows)):
            if overlaps[i]:
                contents[i], reasons[i], details[i] = None, OVERLAPS, {"overlaps": overlaps[i]}
    return contents, reasons, details


# ---- Contents -> ids --------------------------------------------------------------------------------------

def identity_bytes(content: Content) -> bytes:
    """The UTF-8 by which documents are compared and measured: of the text, or of the messages as JSON."""
    text = content if isinstance(content, str) else json.dumps(content, ensure_ascii=False)
    return text.encode("utf-8")


def text_hash(data: bytes) -> int:
    """The first 64 bits of SHA-256. Finds duplicates, and decides whether a document is for validation."""
    return int.from_bytes(hashlib.sha256(data).digest()[:8], "big")


def encoded_texts(content: Content) -> Iterator[str]:
    """The strings that become ids, for training a tokenizer: all parts of messages but special tokens."""
    if isinstance(content, str):
        yield content
    else:
        for message in messages_in(content):  # unlike `visible_text`, this has the roles' names
            yield from (f"{message['role']}\n", *texts_of(message), "\n")


def encode(tokenizer: Tokenizer, kind: str, content: Any) -> list[tuple[list[int], list[int]]]:
    """(ids, mask) of each document that a content becomes, without separators. The mask of text is empty.

    Raises UserError if the model's own chat template refuses the messages.
    """
    if kind == "text":
        return [(tokenizer.encode(content), [])]
    if kind == "chat":
        return encode_documents(tokenizer, content)
    prompt, *answers = content
    return [encode_pair(tokenizer, prompt, answers)]


def tokenize(rows: list[Row], recipe: Recipe) -> Batch:
    """Parse, hash and encode some rows."""
    tokenizer = recipe.tokenizer
    dtype = token_dtype(tokenizer.vocab_size)
    ids, masks = [np.empty(0, dtype)], [np.empty(0, np.uint8)]
    lengths, byte_counts = np.zeros((2, len(rows)), np.int64)
    hashes = np.zeros(len(rows), np.uint64)
    contents, reasons, details = parse_rows(rows, recipe)
    for i, content in enumerate(contents):
        if content is not None:
            try:
                documents = encode(tokenizer, recipe.kind, content)
            except UserError as reason:
                reasons[i] = str(reason)
                continue
            data = identity_bytes(content)
            byte_counts[i], hashes[i] = len(data), text_hash(data)
            # A document ends with a separator. In masks it has a value of its own, because some models' token
            # for the end of a text also ends the turns inside a chat.
            for tokens, mask in documents:
                ids.append(np.array([*tokens, tokenizer.eot_id], dtype))
                masks.append(np.array([*mask, SEPARATOR] if mask else [], np.uint8))
                lengths[i] += len(ids[-1])
    texts = [visible_text(each or "") for each in contents]
    signatures = document_signatures(texts) if recipe.dedup else None
    return Batch(np.concatenate(ids), np.concatenate(masks), lengths, byte_counts, hashes, reasons, details,
                 signatures)


# ---- Processes --------------------------------------------------------------------------------------------

worker_recipe: Recipe | None = None  # in a worker process: the recipe, which is sent once and not per batch


def start_worker(recipe: Recipe) -> None:
    """Prepare a worker process. Ctrl-C is left to the parent, and no worker outlives it."""
    global worker_recipe
    worker_recipe = recipe
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=exit_with_parent, daemon=True).start()


def exit_with_parent() -> None:
    """Wait until the parent has ended, even by a SIGKILL, and end this process."""
    multiprocessing.connection.wait([multiprocessing.parent_process().sentinel])
    os._exit(1)


def tokenize_in_worker(rows: list[Row]) -> Batch:
    return tokenize(rows, worker_recipe)


def tokenize_all(batches: Iterable[list[Row]], recipe: Recipe,
                 processes: int) -> Iterator[tuple[list[Row], Batch]]:
    """(rows, `tokenize` of them) for each batch, in order, with two batches per process in flight."""
    if processes == 1:
        yield from ((rows, tokenize(rows, recipe)) for rows in batches)
        return
    with ProcessPoolExecutor(processes, initializer=start_worker, initargs=(recipe,)) as pool:
        pending: deque = deque()
        try:
            for rows in batches:
                pending.append((rows, pool.submit(tokenize_in_worker, rows)))
                if len(pending) > 2 * processes:  # bounds the memory: read on once the oldest is done
                    rows, future = pending.popleft()
                    yield rows, future.result()
            for rows, future in pending:
                yield rows, future.result()
        finally:
            pool.shutdown(cancel_futures=True)
