"""The embedded problems (dataset/problems.py), those of the test split: exact match of the answer.

    {"question": "What is 15 * 24?", "answer": "360"}

Asked as a user's message, answered greedily. Right is what says the answer and nothing else (a thought may
come before it); well formed is a number, numbers or a day, whichever, with every thought closed. A model
without chat tokens is asked in plain text, "What is 15 * 24?\\n", and the last line of the first paragraph
that it writes counts. With calculator=True the system message offers the tool, and its calls are answered.
"""

import itertools

from dataset.problems import FAMILIES, Problem, is_right, is_well_formed, problems, prompt_of
from evals.lm import LM
from evals.results import Result, mean
from formats.chat_format import end_of_turn
from generation.assistant import Message

ARITHMETIC = ("add", "subtract", "multiply", "story", "hard")
MAX_NEW_TOKENS = 120  # the longest worked answer takes about 100


def load(source: str | None, limit: int, shots: int | None, calculator: bool = False,
         family: str | None = None) -> list[Problem]:
    """The first `limit` test problems, each once, of a family, or of all but the hard ones (with the
    calculator: of all that are arithmetic). They are made here: there is no source and there are no shots."""
    easy = tuple(name for name in FAMILIES if name != "hard")
    families = (family,) if family else ARITHMETIC if calculator else easy
    seen: dict[str, Problem] = {}
    for problem in itertools.islice(problems("test", 1, families), 20 * limit):
        seen.setdefault(problem.key, problem)
        if len(seen) == limit:
            break
    return list(seen.values())


def score(lm: LM, found: list[Problem], calculator: bool = False, family: str | None = None) -> Result:
    """Accuracy and the share of well-formed answers; accuracy by family among the details."""
    messages = answers(lm, found, calculator)
    right = [is_right(problem, message) for problem, message in zip(found, messages, strict=True)]
    formed = [is_well_formed(problem, message) for problem, message in zip(found, messages, strict=True)]
    families: dict[str, list[bool]] = {}
    for problem, each in zip(found, right, strict=True):
        families.setdefault(problem.family, []).append(each)
    said = [{"question": problem.question, "answer": problem.answer, "said": message["content"],
             "right": each} for problem, message, each in zip(found, messages, right, strict=True)]
    return Result({"accuracy": mean(right), "well_formed": mean(formed)}, said,
                  {"families": {name: sum(of) / len(of) for name, of in sorted(families.items())}})


def answers(lm: LM, found: list[Problem], calculator: bool) -> list[Message]:
    """The message that each conversation ends in; of a model that knows no chats, what it writes behind the
    question: the last line before a blank one."""
    if end_of_turn(lm.tokenizer) is not None:
        return [replies[-1] for replies in
                lm.reply([prompt_of(problem, calculator) for problem in found], MAX_NEW_TOKENS)]
    texts = lm.generate_until([f"{problem.question}\n" for problem in found], [], MAX_NEW_TOKENS)
    lines = [text.split("\n\n")[0].strip().splitlines() or [""] for text in texts]
    return [{"role": "assistant", "content": last[-1].strip()} for last in lines]
