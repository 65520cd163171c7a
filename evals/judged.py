"""Answers that a model samples to prompts, judged: for grpo.py, and kept on disk for verifier.py.

    groups = judge(sampler, prompts, range(8), 4, terms)              # 8 prompts: 8 lists of 4 answers
    rows = stored_answers(Path("data/judged"), cfg, "out/grpo", "problems", cfg.seed, device)

A row is one prompt: {"prompt": messages, "row": of dataset/prompts.py, "answers": [..]}. An answer is {"ids",
"sampled", "messages", "right"}. ids: the prompt and the whole answer. sampled: 1 for the ids that the model
generated. messages: what follows the prompt. right: what the checker says (evals/rewards.py).

The rows of one batch are one file. The folder's name is a hash of the model, its tokenizer, the prompts and
the sampling, so a stopped run continues after its last batch, and a larger num_problems adds files.
"""

import hashlib
import json
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import torch

from configurator import ProgressBar, require, require_positive
from dataset.problems import ROWS_VERSION
from dataset.prompts import Prompt, PromptSource, family_names
from dataset.tasks import TaskName
from evals.rewards import is_right, require_reference
from formats import hf
from formats.chat_format import require_chat
from formats.files import read_jsonl, write_text
from formats.peft import weights_sha256
from formats.tokenizer import Tokenizer
from generation.rollouts import Limits, Rollout, RolloutSampler
from model import GPT


@dataclass(frozen=True, kw_only=True)
class AnswerKeys:
    """The keys of a program that samples answers and judges them."""

    families: str = "add,subtract,multiply,story,sort,count,date"  # of embedded problems; empty: all but hard
    calculator: float = 0.0  # share of the problems that offer the calculator; half of them need it
    num_problems: int = 1000  # problems that are answered
    num_samples: int = 8  # answers per problem
    temperature: float = 1.0  # of the answers
    max_new_tokens: int = 100  # most tokens of an answer
    answers_batch_size: int = 256  # answers that are generated together

    def __post_init__(self) -> None:
        require_positive(self, "num_problems", "num_samples", "max_new_tokens", "answers_batch_size")
        require(self, "temperature", 0 < self.temperature < math.inf, "positive")
        require(self, "calculator", 0 <= self.calculator <= 1, "from 0 to 1")
        family_names(self.families)  # raises UserError for an unknown one


def judge(sampler: RolloutSampler, prompts: list[Prompt], numbers: Sequence[int], size: int,
          terms: Callable[[Prompt, Rollout], dict[str, float]]) -> list[list[Rollout]]:
    """A group of `size` answers to each prompt, with the terms of their rewards.

    numbers: of the prompts, for the random numbers.
    """
    if not prompts:
        return []
    rows = [number * size + place for number in numbers for place in range(size)]
    rollouts = sampler.sample([prompt.ids for prompt in prompts], rows, size,
                              [prompt.has_tools for prompt in prompts])
    for place, rollout in enumerate(rollouts):
        rollout.terms = terms(prompts[place // size], rollout)
    return [rollouts[at:at + size] for at in range(0, len(rollouts), size)]


def judged_rows(keys: AnswerKeys, sampler: RolloutSampler, source: PromptSource,
                numbers: Sequence[int]) -> list[dict[str, Any]]:
    """The rows of these prompts."""
    prompts = [source.prompt(number, keys.families, keys.calculator) for number in numbers]
    groups = judge(sampler, prompts, numbers, keys.num_samples,
                   lambda prompt, rollout: {"right": is_right(prompt.row, rollout.messages[-1])})
    return [{"prompt": prompt.messages, "row": prompt.row, "answers": [
        {"ids": each.prompt + each.ids, "sampled": [0] * len(each.prompt) + list(map(int, each.sampled)),
         "messages": each.messages, "right": bool(each.terms["right"])} for each in group]}
        for prompt, group in zip(prompts, groups, strict=True)]


def stored_answers(cache: Path, keys: AnswerKeys, path: str, dataset: str, seed: int,
                   device: torch.device, task: TaskName | None = None) -> list[dict[str, Any]]:
    """The rows of keys.num_problems prompts, or of all that the files have. Missing rows are made.

    path: the model. dataset, task: of dataset/prompts.py. Raises UserError for a model without chat tokens.
    """
    folder = hf.find_folder(path)
    tokenizer, model = Tokenizer.load(folder), GPT.from_pretrained(folder, device).eval()
    require_chat(tokenizer, path)
    source = PromptSource(dataset, tokenizer, model.config.block_size, seed, require_reference, task)
    sampler = RolloutSampler(model, tokenizer, Limits(
        max_new_tokens=keys.max_new_tokens, block_size=model.config.block_size,
        temperature=keys.temperature, seed=seed))
    settings = [getattr(keys, field.name) for field in fields(AnswerKeys) if field.name != "num_problems"]
    identity = (weights_sha256(folder), hf.config_sha256(folder), tokenizer.definition, ROWS_VERSION,
                source.hashes, task, sampler.limits, settings)
    place = cache / hashlib.sha256(repr(identity).encode()).hexdigest()[:16]
    place.mkdir(parents=True, exist_ok=True)
    size, rows = max(1, keys.answers_batch_size // keys.num_samples), list[dict[str, Any]]()
    count = min(keys.num_problems, len(source.train) or keys.num_problems)
    for first in ProgressBar(range(0, count, size), unit="batch"):
        # A file is complete and has the same content whoever writes it, so processes need no lock.
        file = place / f"{first:07d}.jsonl"
        if not file.is_file():
            new = judged_rows(keys, sampler, source, range(first, first + size))
            write_text(file, "".join(json.dumps(row) + "\n" for row in new))
        rows += read_jsonl(file)
    return rows[:count]
