"""Answers that a model samples to the embedded problems, judged right or wrong, and kept on disk.

    request = Request(families=("add", "multiply"), count=1000, samples=8)
    rows = make_answers(Path("data/judged"), folder, sampler, request, batch_size=256)

A row is one problem: {"family", "key", "prompt": messages, "answers": [..]}. An answer is {"ids", "sampled",
"messages", "right"}. ids: the prompt and the whole answer. sampled: 1 for the ids that the model generated.
messages: what follows the prompt. right: what the checker says of the last message (dataset/problems.py).

The file's name is a hash of the model, its tokenizer, the problems and the sampling. Problems and random
numbers follow from the seed, so a stopped run continues after its last complete row, and a larger count adds
rows.
"""

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
from formats.chat_format import encode_prompt
from formats.files import lock_path, read_jsonl, write_text
from formats.peft import weights_sha256
from generation.rollouts import RolloutSampler


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


def cache_path(cache: Path, folder: Path, sampler: RolloutSampler, request: Request) -> Path:
    """The file of these answers. The number of problems is not in its name."""
    identity = (weights_sha256(folder), hf.config_sha256(folder), sampler.tokenizer.definition, ROWS_VERSION,
                request._replace(count=0), sampler.limits)
    return cache / f"{hashlib.sha256(repr(identity).encode()).hexdigest()[:16]}.jsonl"


def answer_problems(sampler: RolloutSampler, request: Request, batch: list[Problem],
                    first: int) -> list[dict[str, Any]]:
    """The rows of these problems. first: number of the first problem, for the random numbers."""
    prompts = [prompt_of(problem, request.calculator) for problem in batch]
    numbers = range(first * request.samples, (first + len(batch)) * request.samples)
    rollouts = sampler.sample([encode_prompt(sampler.tokenizer, prompt) for prompt in prompts], numbers,
                              request.samples, [request.calculator] * len(batch))
    rows = []
    for number, (problem, prompt) in enumerate(zip(batch, prompts, strict=True)):
        group = rollouts[number * request.samples:(number + 1) * request.samples]
        answers = [{"ids": each.prompt + each.ids, "messages": each.messages,
                    "sampled": [0] * len(each.prompt) + list(map(int, each.sampled)),
                    "right": is_right(problem, each.messages[-1])} for each in group]
        rows.append({"family": problem.family, "key": problem.key, "prompt": prompt, "answers": answers})
    return rows


def make_answers(cache: Path, folder: Path, sampler: RolloutSampler, request: Request,
                 batch_size: int) -> list[dict[str, Any]]:
    """The rows of these answers: those of the file, and those that it lacks, which are added to it.

    folder: of the sampler's model. batch_size: answers that are generated together. Raises UserError if
    another process is writing the file.
    """
    path = cache_path(cache, folder, sampler, request)
    cache.mkdir(parents=True, exist_ok=True)
    lock = lock_path(path.with_suffix(".lock"))
    if lock is None:
        raise UserError(f"{path}: another process is writing it")
    try:
        rows = read_jsonl(path)
        write_text(path, "".join(json.dumps(row) + "\n" for row in rows))  # a kill may have left half a line
        stream = problems("train", sampler.limits.seed, request.families)
        todo = list(islice(stream, len(rows), request.count))
        size = max(1, batch_size // request.samples)  # problems that are answered together
        with open(path, "a", encoding="utf-8") as file, tqdm(
                total=len(todo), unit="problem", leave=False, disable=None) as bar:
            for at in range(0, len(todo), size):
                new = answer_problems(sampler, request, todo[at:at + size], len(rows))
                file.writelines(json.dumps(row) + "\n" for row in new)
                file.flush()
                rows += new
                bar.update(len(new))
    finally:
        os.close(lock)
    return rows[:request.count]
