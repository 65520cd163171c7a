"""The embedded problems (parts/problems.py), those of the test split: exact match of the answer.

    {"question": "What is 15 * 24?", "answer": "360"}

Asked as a user's message, answered greedily. Right is what says the answer and nothing else (a thought may
come before it); well formed is a number, numbers or a day, whichever, with every thought closed. A model
without chat tokens is asked in plain text, "What is 15 * 24?\\n", and the last line of the first paragraph
that it writes counts. With calculator=True the system message offers the tool, and its calls are answered.
"""

import itertools
import math
from typing import Any

from parts.assistant import Assistant
from parts.chat import end_of_turn
from parts.generate import generate
from parts.problems import FAMILIES, Problem, is_right, is_well_formed, problems, prompt_of

ARITHMETIC = ("add", "subtract", "multiply", "story", "hard")


def load(limit: int, calculator: bool = False, family: str | None = None) -> list[Problem]:
    """The first `limit` test problems, each once, of a family, or of all but the hard ones (with the
    calculator: of all that are arithmetic)."""
    easy = tuple(name for name in FAMILIES if name != "hard")
    families = (family,) if family else ARITHMETIC if calculator else easy
    seen: dict[str, Problem] = {}
    for problem in itertools.islice(problems("test", 1, families), 20 * limit):
        seen.setdefault(problem.key, problem)
        if len(seen) == limit:
            break
    return list(seen.values())


def score(assistant: Assistant, found: list[Problem], calculator: bool = False,
          batch_size: int = 64) -> dict[str, Any]:
    """{"accuracy", "stderr", "well_formed", "n", "families": {name: accuracy}} of an assistant's answers."""
    answers = [message for start in range(0, len(found), batch_size)
               for message in answer(assistant, found[start:start + batch_size], calculator)]
    right = [is_right(problem, message) for problem, message in zip(found, answers, strict=True)]
    formed = [is_well_formed(problem, message) for problem, message in zip(found, answers, strict=True)]
    accuracy, n = sum(right) / len(found), len(found)
    families: dict[str, list[bool]] = {}
    for problem, each in zip(found, right, strict=True):
        families.setdefault(problem.family, []).append(each)
    return {"accuracy": accuracy, "stderr": math.sqrt(accuracy * (1 - accuracy) / n),
            "well_formed": sum(formed) / n, "n": n,
            "families": {name: sum(of) / len(of) for name, of in sorted(families.items())}}


def answer(assistant: Assistant, batch: list[Problem], calculator: bool) -> list[dict[str, Any]]:
    """The message that each conversation ends in."""
    if end_of_turn(assistant.tokenizer) is None:
        return plain_answers(assistant, batch)
    return [reply[-1] for reply in assistant.reply([prompt_of(problem, calculator) for problem in batch])]


def plain_answers(assistant: Assistant, batch: list[Problem]) -> list[dict[str, Any]]:
    """What a model that knows no chats writes behind the question: the last line before a blank one."""
    tokenizer = assistant.tokenizer
    prompts = [tokenizer.prefix_ids + tokenizer.encode(f"{problem.question}\n") for problem in batch]
    new: list[list[int]] = [[] for _ in batch]
    for tokens in generate(assistant.model, prompts, assistant.max_new_tokens, assistant.sampling,
                           lambda row, ids: ids[-1] in assistant.end_ids, tokenizer.vocab_size):
        for row, token in enumerate(tokens):
            new[row] += [] if token is None else [token]
    assistant.tokens += sum(map(len, new))
    texts = [tokenizer.decode([i for i in ids if i not in assistant.end_ids]) for ids in new]
    lines = [text.split("\n\n")[0].strip().splitlines() or [""] for text in texts]
    return [{"role": "assistant", "content": last[-1].strip()} for last in lines]
