"""Samples to read while a model trains: text for a log, and greedy answers of a chat model.

    text = sample_answers(model, tokenizer, prompts)[0]      # "user: 2+2?\\nassistant: 4"
    run.print(log_text("sample    ", text))
"""

import re
from typing import Any

from formats.chat_format import CHAT_TOKENS, START, THOUGHT_END
from formats.tokenizer import Tokenizer
from generation.assistant import Assistant
from generation.generate import Sampling
from model import GPT

ANSWER_TOKENS = 64  # enough to see what an answer is like
PROMPT_CHARACTERS = 400  # of a long prompt, only the end is shown


def log_text(label: str, text: str) -> str:
    """The text after a label, its further lines indented below the first one.

    Control characters are escaped, because a model may write any, and a terminal would obey them.
    """
    text = text.replace("\r\n", "\n").strip("\n").rstrip()
    shown = "".join(c if c.isprintable() or c in "\n\t" else repr(c)[1:-1] for c in text)
    return label + (shown.replace("\n", "\n" + " " * len(label)) or "(empty)")


def transcript(text: str) -> str:
    """A text in our chat format without its control tokens: "user: 2+2?", one line per turn or thought."""
    text = re.sub(rf"{re.escape(START)}(\w+)\n", r"\1: ", text)  # a turn's role
    text = text.replace(THOUGHT_END, "\n")
    return re.sub("|".join(map(re.escape, CHAT_TOKENS)), "", text)


def sample_answers(model: GPT, tokenizer: Tokenizer, prompts: list[list[int]]) -> list[str]:
    """Each prompt, from its first role on, with the model's greedy answer of at most ANSWER_TOKENS tokens.

    All ranks call it with the same prompts, because a sharded model needs them all.
    """
    if not prompts:
        return []
    assistant = Assistant(model, tokenizer, Sampling(temperature=0), ANSWER_TOKENS)
    answers = assistant.generate_turns(prompts, list(range(len(prompts))), None, None)
    texts = []
    for prompt, answer in zip(prompts, answers, strict=True):
        question = tokenizer.decode(prompt)
        if len(question) > PROMPT_CHARACTERS:
            question = f"... {question[-PROMPT_CHARACTERS:]}"
        texts.append(transcript(question + tokenizer.decode(answer, inside=True)))
    return texts


def print_answers(run: Any, model: GPT, tokenizer: Tokenizer, rows: Any, count: int) -> None:
    """Print greedy answers to the first `count` prompts of ChatRows or PairRows. All ranks call it."""
    prompts = [rows.documents.prompt(number) for number in rows.usable[:count]]
    for text in sample_answers(model, tokenizer, prompts):
        run.print(log_text("sample    ", text))
