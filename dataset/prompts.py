"""Prompts with reference answers, for reinforcement learning: the embedded problems, or rows of files.

    source = PromptSource("problems", tokenizer, block_size=128, seed=1337)
    prompt = source.prompt(5, families="", calculator=0.5)        # always the same prompt for number 5
    prompt.ids, prompt.row["answer"]

A row of a file has a question in one of the forms of dataset/conversations.py, and what its answer is checked
against (evals/rewards.py):

    {"question": "Ann has 3 pens ...", "answer": "3 * 4 = 12\\n#### 12"}       the number, as in GSM8K
    {"question": "Which is a metal?", "choices": ["iron", "wood"], "answer": 0}     the letter A
    {"prompt": "Name a prime number.", "regex": "2|3|5|7"}                     the whole answer matches
    {"prompt": "Capital of France?", "answer": "Paris"}                        exactly this text

With a task of dataset/tasks.py, the rows are those of that benchmark, and the prompts are those that eval.py
asks: "Question: Ann has 3 pens ...\\nAnswer:".

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
from dataset.tasks import TaskName, conversation_of
from formats.chat_format import encode_prompt
from formats.files import file_sha256
from formats.tokenizer import Tokenizer

EMBEDDED = "problems"  # the name of the embedded problems
EASY = tuple(name for name in FAMILIES if name != "hard")  # what a small model can work out itself
LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"
VALIDATION = 2**62  # numbers from here on are validation prompts
VAL_FRACTION = 0.1  # of the rows of files


def family_names(text: str) -> tuple[str, ...]:
    """Families of embedded problems, separated by commas; "": all but hard. Raises UserError for others."""
    names = tuple(text.split(",")) if text else EASY
    if unknown := set(names) - FAMILIES.keys():
        raise UserError(f"families={text}: no family {min(unknown)!r}; there are {', '.join(FAMILIES)}")
    return names


class Prompt(NamedTuple):
    messages: list[Message]
    ids: list[int]
    row: dict[str, Any]  # the row of the file, or the fields of the embedded problem
    has_tools: bool  # whether a system message offers the calculator


def read_question(row: Row, check: Callable[[dict[str, Any]], None],
                  task: TaskName | None) -> tuple[list[Message], dict[str, Any]]:
    """The messages of a row, and the row; a task's row becomes {"question", "answer"}.

    Raises Skip, with the reason, if it has no question.
    """
    value = conversation_of(task, row_value(row)) if task else row_value(row)
    messages = opening(value) if isinstance(value, dict) else []
    if not messages or messages[-1]["role"] != "user":
        raise Skip("no question")
    check(value)
    choices = [f"{letter}. {text}" for letter, text in zip(LETTERS, value.get("choices") or [], strict=False)]
    messages[-1] = {**messages[-1], "content": "\n".join([messages[-1]["content"], *choices])}
    return messages, value


@lru_cache(maxsize=2)  # a batch may reach into the next epoch
def epoch_order(seed: int, epoch: int, count: int) -> np.ndarray:
    """The order in which an epoch reads its prompts: a permutation of (count,)."""
    return np.random.default_rng((seed, epoch)).permutation(count)


class PromptSource:
    """Maps a number to a prompt: a pure function of the source, the seed and the number."""

    def __init__(self, source: str, tokenizer: Tokenizer, block_size: int, seed: int,
                 check: Callable[[dict[str, Any]], None] = lambda row: None, task: TaskName | None = None):
        """source: "problems", or files as in prepare.py, whose prompts of more than block_size tokens are
        left out. check(row) raises Skip for a row without a reference answer. task: the benchmark that the
        files' rows are of. Raises UserError for a file that cannot be read, with the place of the first bad
        row, and if there are too few prompts."""
        if task and source == EMBEDDED:
            raise UserError(f"task={task}: needs files of this task's rows as --dataset=")
        self.source, self.tokenizer, self.T, self.seed = source, tokenizer, block_size, seed
        files = [] if source == EMBEDDED else find_files(source, "dataset")[0]
        self.hashes = {str(path): file_sha256(path) for path in files}
        rows = usable_rows(read_rows(files), lambda row: read_question(row, check, task))
        prompts = [self.encode(*question) for _, question in rows]
        fits = [prompt for prompt in prompts if len(prompt.ids) <= block_size]
        fits.sort(key=lambda prompt: zlib.crc32(json.dumps(prompt.row, sort_keys=True, default=str).encode()))
        held_out = max(1, int(VAL_FRACTION * len(fits)))
        while held_out < len(fits) and fits[held_out].row == fits[held_out - 1].row:
            held_out += 1  # equal rows stay together
        self.val, self.train = fits[:held_out], fits[held_out:]
        self.left_out = len(prompts) - len(fits)  # longer than block_size
        if files and not self.train:
            raise UserError(f"dataset={source}: {len(fits)} of {len(prompts)} prompts fit block_size="
                            f"{block_size}; at least 2 are needed")

    def encode(self, messages: list[Message], row: dict[str, Any]) -> Prompt:
        has_tools = any(each["role"] == "system" and "calculator(" in each["content"] for each in messages)
        return Prompt(messages, encode_prompt(self.tokenizer, messages), row, has_tools)

    @property
    def epoch_size(self) -> int:
        """Training prompts of an epoch. Raises UserError for the embedded problems, which have no end."""
        if self.source == EMBEDDED:
            raise UserError("stages: the embedded problems have no epochs; count steps")
        return len(self.train)

    def prompt(self, number: int, families: str, calculator: float) -> Prompt:
        """Prompt `number`. families, calculator: of the embedded problems, as in grpo.py.

        Raises UserError if an embedded prompt does not fit block_size.
        """
        if self.source == EMBEDDED:
            draw = random.Random(f"prompts/{self.seed}/{number}")
            offers, names = draw.random() < calculator, family_names(families)
            if offers:  # half of these prompts need the calculator; for the others it is an offer
                names = ("hard",) if draw.random() < 0.5 else tuple(sorted(ARITHMETIC | {"story": 0}))
            problem = next(problems("train", draw.randrange(2**62), names))
            prompt = self.encode(prompt_of(problem, offers), problem._asdict())
            if len(prompt.ids) > self.T:
                raise UserError(f"block_size={self.T}: a prompt has {len(prompt.ids)} tokens")
            return prompt
        if number >= VALIDATION:
            return self.val[number - VALIDATION]
        epoch, place = divmod(number, len(self.train))
        return self.train[epoch_order(self.seed, epoch, len(self.train))[place]]
