"""A conversation in the terminal: answers appear as they are generated; thoughts and tool calls are dim.

    converse(assistant, system="", ask=input, write=sys.stdout.write)

/reset starts over, /save FILE appends the conversation as one line of JSON, which prepare.py --kind=chat
reads, and /quit (or the end of input) leaves. Ctrl-C stops an answer and removes its question. The cache
keeps the keys and values of earlier turns. When the context is full, the oldest turns are dropped. On a
terminal, the arrow keys recall the lines of this and earlier conversations, from ~/.nanollama_history.
"""

import atexit
import contextlib
import json
import os
import re
from collections.abc import Callable
from typing import Any

from formats.chat_format import CALL, END, RESPONSE, THOUGHT, THOUGHT_END, encode_prompt
from formats.tokenizer import Tokenizer
from generation.assistant import Assistant, Message
from generation.generate import PrefixCache

DIM, PLAIN = "\x1b[2m", "\x1b[0m"  # terminal styles
CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]")  # control characters except tab and newline
HISTORY, MOST_LINES = os.path.expanduser("~/.nanollama_history"), 1000
HELP = "/reset starts over, /save FILE saves, /quit leaves; Ctrl-C stops an answer\n"


def escaped(text: str) -> str:
    """The text with escapes for control characters: a model may write any, and a terminal would obey them."""
    return CONTROL.sub(lambda found: repr(found[0])[1:-1], text)


class Printer:
    """Writes tokens as they come: a character once all its bytes are there, a special token as a style."""

    def __init__(self, tokenizer: Tokenizer, write: Callable[[str], Any], styled: bool):
        self.tokenizer, self.write, self.shown = tokenizer, write, escaped if styled else str
        self.dim, self.plain = dim, plain = (DIM, PLAIN) if styled else ("", "")
        spelled = {THOUGHT: dim, THOUGHT_END: f"{plain}\n", CALL: dim, END: f"{plain}\n", RESPONSE: ""}
        # Those of other models' formats.
        spelled |= {"<think>": dim, "</think>": plain, "<tool_call>": dim, "</tool_call>": plain}
        self.styles = {tokenizer.hf.token_to_id(name): style for name, style in spelled.items()}
        self.ids: list[int] = []  # the tokens since the last special token
        self.written = 0  # the number of their characters that are on the screen

    def __call__(self, token: int) -> None:
        if token in self.styles or token in self.tokenizer.special_ids:
            self.write(self.styles.get(token, "\n"))
            self.ids, self.written = [], 0
            return
        self.ids.append(token)
        # A token may end within a character, which decodes to a replacement character so far.
        text = self.tokenizer.decode(self.ids, inside=True).rstrip("\N{REPLACEMENT CHARACTER}")
        self.write(self.shown(text[self.written:]))
        # With byte tokens ("<0xE4>"), characters before it decode to replacement characters, too.
        self.written = max(self.written, len(text))

    def show_result(self, result: str) -> None:
        """Write the result of a tool."""
        self.write(f"{self.dim}= {result}{self.plain}\n")


def edit_lines() -> None:
    """From now on, input() edits lines, and recalls those of this and earlier conversations."""
    # Some Pythons are built without readline, and at first there is no file.
    with contextlib.suppress(ImportError, OSError):
        import readline
        readline.set_history_length(MOST_LINES)
        if os.access(os.path.dirname(HISTORY), os.W_OK):
            atexit.register(readline.write_history_file, HISTORY)
        readline.read_history_file(HISTORY)


def read_line(ask: Callable[[str], str], write: Callable[[str], Any]) -> str | None:
    """Ask for a line of text, again if it is not UTF-8; None at the end of input or after Ctrl-C."""
    while True:
        try:
            text = ask("> ").strip()
            text.encode("utf-8")
            return text
        except (EOFError, KeyboardInterrupt):
            write("\n")
            return None
        except UnicodeError:
            write("that is not UTF-8\n")


def drop_turns(assistant: Assistant, messages: list[Message], keep: int) -> str:
    """Drop the oldest turns, after `keep` messages, until an answer has room; return what to print."""
    block_size = assistant.model.config.block_size
    room = block_size - min(assistant.max_new_tokens, block_size // 4)
    before = len(messages)
    while len(messages) > keep + 1 and len(encode_prompt(assistant.tokenizer, messages)) > room:
        # A turn is a question and all messages up to the next question.
        del messages[keep]
        while len(messages) > keep + 1 and messages[keep]["role"] != "user":
            del messages[keep]
    dropped = before - len(messages)
    return f"[the context is full: dropped the oldest {dropped} messages]\n" if dropped else ""


def save(messages: list[Message], path: str) -> str:
    """Append the conversation to a .jsonl file; return what to print."""
    if not path:
        return "/save needs a file: /save chats.jsonl\n"
    try:
        with open(path, "a", encoding="utf-8") as file:
            file.write(json.dumps({"messages": messages}, ensure_ascii=False) + "\n")
    except (OSError, ValueError) as error:  # ValueError: a zero byte in the path
        return f"{error}\n"
    return f"appended {len(messages)} messages to {path}\n"


def answer(assistant: Assistant, messages: list[Message], prefix: PrefixCache, printer: Printer) -> None:
    """Print the answer to the last message, and append it; after Ctrl-C remove the question instead."""
    try:
        replies = assistant.reply([messages], printer, prefix, show_result=printer.show_result)[0]
    except KeyboardInterrupt:
        printer.write(f"{printer.plain}\n")
        messages.pop()
        return
    if replies[-1].pop("cut", False):
        printer.write(f"{printer.plain} [...]\n")
    messages += replies


def converse(assistant: Assistant, system: str, ask: Callable[[str], str], write: Callable[[str], Any],
             styled: bool = True) -> None:
    """Read questions and print answers until the end of input or /quit. system: the first message, if any."""
    opening = [{"role": "system", "content": system}] if system else []
    messages, prefix = list(opening), PrefixCache()
    write(HELP)
    while (text := read_line(ask, write)) is not None:
        command, _, argument = text.partition(" ")
        if command == "/quit":
            return
        if command == "/reset":
            messages = list(opening)
        elif command == "/save":
            write(save(messages, argument.strip()))
        elif command.startswith("/"):
            write(HELP)
        elif text:
            messages.append({"role": "user", "content": text})
            write(drop_turns(assistant, messages, len(opening)))
            answer(assistant, messages, prefix, Printer(assistant.tokenizer, write, styled))
