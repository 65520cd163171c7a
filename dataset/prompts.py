"""Prompts with reference answers, for reinforcement learning: the embedded problems, or rows of files.

    source = PromptSource("problems", seed=1337)
    prompt = source.prompt(5, families="", calculator=0.5)        # always the same prompt for number 5
    prompt.messages, prompt.row["answer"]

A row of a file has a question in one of the forms of dataset/conversations.py, and what its answer is checked
against (evals/rewards.py):

    {"question": "Ann has 3 pens ...", "answer": "3 * 4 = 12\\n#### 12"}       the number, as in GSM8K
    {"question": "Which is a metal?", "choices": ["iron", "wood"], "answer": 0}     the letter A
    {"prompt": "Name a prime number.", "regex": "2|3|5|7"}                     the whole answer matches
    {"prompt": "Capital of France?", "answer": "Paris"}                        exactly this text

A hash of the row decides which rows are for validation. Every epoch reads the others in a new order.
"""

import json
import random
import zlib
from collections.abc import Callable
from functools import lru_cache
from typing import Any, NamedTuple

import numpy as np

from configurator import UserError
from dataset.conversations import Message, opening
from dataset.problems import ARITHMETIC, FAMILIES, problems, prompt_of
from dataset.sources import Row, Skip, find_files, read_rows, row_value, usable_rows

EMBEDDED = "problems"  # the name of the embedded problems
EASY = tuple(name for name in FAMILIES if name != "hard")  # what a small model can work out itself
LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"
VALIDATION = 2**62  # numbers from here on are validation prompts
MOST_VALIDATION = 0.1  # share of a file's rows that validation may take


class Prompt(NamedTuple):
    messages: list[Message]
    row: dict[str, Any]  # the row of the file, or the fields of the embedded problem
    offers_calculator: bool  # whether a system message offers the calculator


def read_prompt(row: Row, check: Callable[[dict[str, Any]], None]) -> Prompt:
    """The prompt of a row. Raises Skip, with the reason, if it has none."""
    value = row_value(row)
    if not isinstance(value, dict):
        raise Skip("not an object")
    messages = opening(value)
    if not messages or messages[-1]["role"] != "user":
        raise Skip("no question")
    check(value)
    choices = value.get("choices") or []
    if choices:
        lines = [f"{letter}. {choice}" for letter, choice in zip(LETTERS, choices, strict=False)]
        messages[-1] = {**messages[-1], "content": "\n".join([messages[-1]["content"], *lines])}
    return Prompt(messages, value, any(message["role"] == "system" and "calculator" in message["content"]
                                       for message in messages))


class PromptSource:
    """Maps a number to a prompt: a pure function of the source, the seed and the number."""

    def __init__(self, source: str, seed: int, check: Callable[[dict[str, Any]], None] = lambda row: None):
        """source: "problems", or files as in prepare.py. check(row) raises Skip for a row without a reference
        answer. Raises UserError for a file that cannot be read, with the place of the first bad row."""
        self.source, self.seed = source, seed
        self.train: list[Prompt] = []
        self.val: list[Prompt] = []
        if source == EMBEDDED:
            return
        rows = read_rows(find_files(source, "dataset")[0], None, piece=2**20)
        prompts = [prompt for _, prompt in usable_rows(rows, lambda row: read_prompt(row, check))]
        if len(prompts) < 2:
            raise UserError(f"dataset={source}: {len(prompts)} prompts; at least 2 are needed")
        prompts.sort(key=lambda prompt: zlib.crc32(json.dumps(prompt.row, sort_keys=True).encode()))
        held_out = max(1, int(MOST_VALIDATION * len(prompts)))
        self.val, self.train = prompts[:held_out], prompts[held_out:]

    def keep(self, fits: Callable[[Prompt], bool]) -> tuple[int, int, int]:
        """Leave out the prompts of a file that do not fit. Returns the numbers of training prompts, of
        validation prompts, and of those that were left out."""
        before = len(self.train) + len(self.val)
        self.train, self.val = (list(filter(fits, prompts)) for prompts in (self.train, self.val))
        return len(self.train), len(self.val), before - len(self.train) - len(self.val)

    @lru_cache(maxsize=2)  # noqa: B019
    def order(self, epoch: int) -> np.ndarray:
        """The permutation of an epoch, (training rows,)."""
        return np.random.default_rng((self.seed, epoch)).permutation(len(self.train))

    def prompt(self, number: int, families: str, calculator: float) -> Prompt:
        """Prompt `number`. families, calculator: of the embedded problems (grpo.py)."""
        if self.source == EMBEDDED:
            draw = random.Random(f"prompts/{self.seed}/{number}")
            offers, names = draw.random() < calculator, tuple(filter(None, families.split(","))) or EASY
            if offers:  # half of these prompts need the calculator; for the others it is an offer
                names = ("hard",) if draw.random() < 0.5 else tuple(sorted(ARITHMETIC | {"story": 0}))
            problem = next(problems("train", draw.randrange(2**62), names))
            return Prompt(prompt_of(problem, offers), problem._asdict(), offers)
        if number >= VALIDATION:
            return self.val[number - VALIDATION]
        epoch, place = divmod(number, len(self.train))
        return self.train[self.order(epoch)[place]]
