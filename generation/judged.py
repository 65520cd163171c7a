"""Answers that a model samples to the embedded problems, judged right or wrong, and kept on disk.

    request = Request(families=("add", "multiply"), count=1000, samples=8)
    path = make_answers(Path("data/judged"), folder, assistant, request, batch_size=256)
    for row in read_answers(path, request): ...

A row is one problem: {"family", "key", "prompt": messages, "answers": [{"ids", "tokens", "message", "right"}]}.
ids: the prompt and the whole answer. tokens: how many of them the model has generated. message: the last message
of the answer. right: what the checker says (dataset/problems.py).

The file's name is a hash of the model, its tokenizer, the problems and the sampling. Problems and random numbers
follow from the seed, so a stopped run continues after its last complete row, and a larger count adds rows.
"""

import dataclasses
import hashlib
import json
import os
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

from tqdm import tqdm

from configurator import UserError
from dataset.problems import FAMILIES, ROWS_VERSION, Problem, is_right, problems, prompt_of
from formats import hf
from formats.files import lock_path, read_jsonl, write_text
from formats.peft import weights_sha256
from generation.assistant import Assistant
from generation.generate import Sampling


class Request(NamedTuple):
    """Which problems are answered, and how often."""

    families: tuple[str, ...]  # of dataset/problems.py; () is all
    count: int  # problems
    samples: int  # answers per problem
    calculator: bool = False  # offer the calculator


def family_names(text: str) -> tuple[str, ...]:
    """Families separated by commas. Raises UserError for an unknown one."""
    if unknown := set(text.split(",")) - FAMILIES.keys():
        raise UserError(f"families={text}: no family {min(unknown)!r}; there are {', '.join(FAMILIES)}")
    return tuple(text.split(","))


def cache_path(cache: Path, folder: Path, assistant: Assistant, request: Request) -> Path:
    """The file of these answers. The number of problems is not in its name."""
    sampling = {field.name: getattr(assistant.sampling, field.name) for field in dataclasses.fields(Sampling)}
    identity = (weights_sha256(folder), hf.config_sha256(folder), assistant.tokenizer.definition, ROWS_VERSION,
                request._replace(count=0), sampling, assistant.max_new_tokens)
    return cache / f"{hashlib.sha256(repr(identity).encode()).hexdigest()[:16]}.jsonl"


def answer_problems(assistant: Assistant, request: Request, batch: list[Problem],
                    first: int) -> list[dict[str, Any]]:
    """The rows of these problems. first: number of the first answer, for its random numbers."""
    asked = [problem for problem in batch for _ in range(request.samples)]
    replies = assistant.reply([prompt_of(problem, request.calculator) for problem in asked], first=first)
    answers = [{"ids": ids, "tokens": tokens, "message": reply[-1], "right": is_right(problem, reply[-1])}
               for problem, reply, ids, tokens in zip(asked, replies, assistant.rows, assistant.lengths,
                                                      strict=True)]
    return [{"family": problem.family, "key": problem.key, "prompt": prompt_of(problem, request.calculator),
             "answers": answers[number * request.samples:(number + 1) * request.samples]}
            for number, problem in enumerate(batch)]


def make_answers(cache: Path, folder: Path, assistant: Assistant, request: Request, batch_size: int) -> Path:
    """Make what the file of these answers lacks; return its path.

    folder: of the assistant's model. batch_size: answers that are generated together. Raises UserError if
    another process is writing the file.
    """
    path = cache_path(cache, folder, assistant, request)
    cache.mkdir(parents=True, exist_ok=True)
    lock = lock_path(path.with_suffix(".lock"))
    if lock is None:
        raise UserError(f"{path}: another process is writing it")
    try:
        rows = read_jsonl(path)
        write_text(path, "".join(json.dumps(row) + "\n" for row in rows))  # a kill may have left half a line
        stream = problems("train", assistant.sampling.seed, request.families)
        todo = list(islice(stream, len(rows), request.count))
        size = max(1, batch_size // request.samples)  # problems that are answered together
        with open(path, "a", encoding="utf-8") as file, tqdm(
                total=len(todo), unit="problem", leave=False, disable=None) as bar:
            for at in range(0, len(todo), size):
                first = (len(rows) + at) * request.samples
                new = answer_problems(assistant, request, todo[at:at + size], first)
                file.writelines(json.dumps(row) + "\n" for row in new)
                file.flush()
                bar.update(len(new))
    finally:
        os.close(lock)
    return path


def read_answers(path: Path, request: Request) -> list[dict[str, Any]]:
    """The rows of `make_answers`, one per problem."""
    return read_jsonl(path)[:request.count]
