"""Rows -> token ids, in parallel: what each worker process of prepare.py does.

    for rows, documents in tokenize_all(batches, recipe, processes): ...     # in order

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
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple

import numpy as np

from configurator import UserError
from dataset.conversations import Message, conversation, preference, rename_keys, without_nulls
from dataset.decontaminate import OVERLAPS, Index
from dataset.quality import Limits, document_signatures, first_failure
from dataset.shards import SEPARATOR, token_dtype
from dataset.sources import Row, Skip, document, require_object, row_value
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


@dataclass
class Document:
    """What a row becomes by `parse_rows` and `tokenize`."""

    content: Any = None  # a Content; None for a skipped row, and on the way between processes
    reason: str | None = None  # why the row is skipped
    details: dict[str, Any] = field(default_factory=dict)  # what a rule that dropped the row saw
    byte_count: int = 0  # of UTF-8
    hash: int = 0  # `text_hash`
    ids: bytes = b""  # of uint16 or uint32, with end-of-text tokens; an array is slow to send to a process
    mask: bytes = b""  # of uint8, for chats and preferences (dataset/shards.py)
    signature: Any = None  # (PERMUTATIONS,) uint32, with Recipe.dedup


# ---- Rows -> contents -------------------------------------------------------------------------------------

def messages_in(content: list | tuple) -> list[Message]:
    """All messages of a chat, or of a preference's prompt and its two answers."""
    return content if isinstance(content, list) else [*content[0], *content[1:]]


def message_texts(message: Message) -> list[str]:
    """All that a reader of a message sees: its thought, its content and its calls."""
    texts = message.get("thought"), message["content"], *map(call_text, message.get("tool_calls", ()))
    return [text for text in texts if text]


def full_text(content: Content) -> str:
    """A text, or the texts of all messages with blank lines between."""
    if isinstance(content, str):
        return content
    return "\n\n".join(text for message in messages_in(content) for text in message_texts(message))


def parse_content(row: Row, recipe: Recipe) -> Content:
    """The row's content. Raises Skip if the row cannot be used, or if a text violates a quality rule."""
    if recipe.kind == "text":
        text = document(row, recipe.text_key)
        if failure := first_failure(text, recipe.rules):
            raise Skip(f"quality rule {failure[0]}", value=failure[1], text=text[:EXCERPT])
        return text
    value = require_object(row_value(row))
    if recipe.task:
        value = conversation_of(recipe.task, value)
    # In Parquet and on the hub, all structs of a column have the same fields: an absent field is a null.
    fields = rename_keys(without_nulls(value) if row.kind == "value" else value, recipe.keys)
    return conversation(fields) if recipe.kind == "chat" else preference(fields)


def text_hash(data: bytes) -> int:
    """The first 64 bits of SHA-256. Finds duplicates, and decides whether a document is for validation."""
    return int.from_bytes(hashlib.sha256(data).digest()[:8], "big")


def parse_rows(rows: list[Row], recipe: Recipe) -> list[Document]:
    """A document for each row, without ids.

    A row that cannot be used, violates a quality rule, or overlaps an evaluation item, has a reason in place
    of a content. The latter two have details: what the rule saw.
    """
    documents = []
    for row in rows:
        try:
            content = parse_content(row, recipe)
            # Documents are compared and measured by their text, or by their messages as JSON.
            text = content if isinstance(content, str) else json.dumps(content, ensure_ascii=False)
            data = text.encode("utf-8")
            documents.append(Document(content, byte_count=len(data), hash=text_hash(data)))
        except Skip as reason:
            documents.append(Document(None, str(reason), reason.details))
    if recipe.index:
        overlaps = recipe.index.find([full_text(document.content or "") for document in documents])
        documents = [Document(None, OVERLAPS, {"overlaps": found}) if found else document
                     for document, found in zip(documents, overlaps, strict=True)]
    return documents


# ---- Contents -> ids --------------------------------------------------------------------------------------

def encoded_texts(content: Content) -> Iterator[str]:
    """The strings that become ids, for training a tokenizer: all parts of messages but special tokens."""
    if isinstance(content, str):
        yield content
    else:
        for message in messages_in(content):  # unlike `full_text`, this has the roles' names
            yield from (f"{message['role']}\n", *message_texts(message), "\n")


def encode_document(document: Document, recipe: Recipe) -> None:
    """Set a document's ids and mask. Raises UserError if the model's own template refuses the messages."""
    tokenizer, content = recipe.tokenizer, document.content
    if recipe.kind == "text":
        parts = [(tokenizer.encode(content), list[int]())]
    elif recipe.kind == "chat":
        parts = encode_documents(tokenizer, content)
    else:
        prompt, *answers = content
        parts = [encode_pair(tokenizer, prompt, answers)]
    # Each part ends with a separator. In masks it has a value of its own, because some models' token for the
    # end of a text also ends the turns inside a chat.
    ids = [index for part, _ in parts for index in (*part, tokenizer.eot_id)]
    document.ids = np.array(ids, token_dtype(tokenizer.vocab_size)).tobytes()
    if recipe.kind != "text":
        document.mask = bytes(each for _, mask in parts for each in (*mask, SEPARATOR))


def tokenize(rows: list[Row], recipe: Recipe) -> list[Document]:
    """Parse, hash and encode some rows."""
    documents = parse_rows(rows, recipe)
    if recipe.dedup:
        texts = [full_text(document.content or "") for document in documents]
        for document, signature in zip(documents, document_signatures(texts), strict=True):
            document.signature = signature
    for document in documents:
        if document.content is not None:
            try:
                encode_document(document, recipe)
            except UserError as reason:
                document.reason = str(reason)
            document.content = None
    return documents


# ---- Processes --------------------------------------------------------------------------------------------

worker_recipe: Recipe | None = None  # in a worker process: the recipe, which is sent once and not per batch


def exit_with_parent() -> None:
    """Wait until the parent has ended, even by a SIGKILL, and end this process."""
    multiprocessing.connection.wait([multiprocessing.parent_process().sentinel])
    os._exit(1)


def start_worker(recipe: Recipe) -> None:
    """Prepare a worker process. Ctrl-C is left to the parent, and no worker outlives it."""
    global worker_recipe
    worker_recipe = recipe
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=exit_with_parent, daemon=True).start()


def tokenize_in_worker(rows: list[Row]) -> list[Document]:
    return tokenize(rows, worker_recipe)


def tokenize_all(batches: Iterable[list[Row]], recipe: Recipe,
                 processes: int) -> Iterator[tuple[list[Row], list[Document]]]:
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
