"""A conversation in a terminal: the answer as it is written, thoughts and tool calls dimmed.

    converse(assistant, system="", ask=input, write=sys.stdout.write)

/reset forgets the conversation, /save FILE writes it as a line of JSON that prepare.py --kind=chat reads,
/quit (or the end of input) leaves. Ctrl-C ends an answer, and takes its question back. What was said is not
read again at every turn: its keys and values stay. When the context is full, the oldest turns are forgotten.
"""

import json
from collections.abc import Callable
from typing import Any

from formats.chat_format import CALL, END, RESPONSE, THOUGHT, THOUGHT_END, encode_prompt
from generation.assistant import Assistant
from generation.generate import PrefixCache

DIM, PLAIN = "\x1b[2m", "\x1b[0m"
HELP = "/reset forgets, /save FILE writes, /quit leaves; Ctrl-C ends an answer\n"


class Printer:
    """Writes tokens as they come: a character when all its bytes are there, and special tokens as a style."""

    def __init__(self, assistant: Assistant, write: Callable[[str], Any], styled: bool):
        self.tokenizer, self.write = assistant.tokenizer, write
        dim, plain = (DIM, PLAIN) if styled else ("", "")
        spelled = {THOUGHT: dim, THOUGHT_END: f"{plain}\n", CALL: dim, END: f"{plain}\n", RESPONSE: ""}
        self.styles = {self.tokenizer.hf.token_to_id(name): style for name, style in spelled.items()}
        self.run: list[int] = []
        self.written = 0

    def __call__(self, token: int) -> None:
        if token in self.styles or token == self.tokenizer.eot_id:
            self.write(self.styles.get(token, "\n"))
            self.run, self.written = [], 0
            return
        self.run.append(token)
        text = self.tokenizer.decode(self.run).rstrip("\N{REPLACEMENT CHARACTER}")
        self.write(text[self.written:])
        self.written = len(text)


def converse(assistant: Assistant, system: str, ask: Callable[[str], str], write: Callable[[str], Any],
             styled: bool = True) -> None:
    """Ask, answer, and again, until the end of input or /quit."""
    begin = [{"role": "system", "content": system}] if system else []
    messages, past = list(begin), PrefixCache()
    write(HELP)
    while True:
        try:
            text = ask("> ").strip()
            text.encode("utf-8")
        except (EOFError, KeyboardInterrupt):
            write("\n")
            return
        except UnicodeError:
            write("that is not UTF-8\n")
            continue
        command, _, argument = text.partition(" ")
        if command == "/quit":
            return
        if command == "/reset":
            messages = list(begin)
        elif command == "/save":
            write(save(messages, argument.strip()))
        elif command.startswith("/"):
            write(HELP)
        elif text:
            messages.append({"role": "user", "content": text})
            write(forget(assistant, messages, len(begin)))
            printer = Printer(assistant, write, styled)
            try:
                replies = assistant.reply([messages], printer, past)[0]
            except KeyboardInterrupt:
                write(f"{PLAIN if styled else ''}\n")
                messages.pop()
                continue
            for reply in replies:
                if reply["role"] == "tool":
                    write(f"{DIM}= {reply['content']}{PLAIN}\n" if styled else f"= {reply['content']}\n")
            if replies[-1].pop("cut", False):
                write(f"{PLAIN if styled else ''} [...]\n")
            messages += replies


def forget(assistant: Assistant, messages: list[dict[str, Any]], keep: int) -> str:
    """Drop the oldest turns, behind the first `keep` messages, until an answer has room; says so."""
    room = assistant.model.config.block_size - min(assistant.max_new_tokens,
                                                   assistant.model.config.block_size // 4)
    dropped = 0
    while len(messages) > keep + 1 and len(encode_prompt(assistant.tokenizer, messages)) > room:
        del messages[keep]
        dropped += 1
        while len(messages) > keep + 1 and messages[keep]["role"] != "user":
            del messages[keep]
            dropped += 1
    return f"[the context is full: {dropped} messages forgotten]\n" if dropped else ""


def save(messages: list[dict[str, Any]], path: str) -> str:
    """Append the conversation to a .jsonl; returns what to say."""
    if not path:
        return "/save needs a file: /save chats.jsonl\n"
    try:
        with open(path, "a", encoding="utf-8") as file:
            file.write(json.dumps({"messages": messages}, ensure_ascii=False) + "\n")
    except OSError as error:
        return f"{error}\n"
    return f"{len(messages)} messages appended to {path}\n"
