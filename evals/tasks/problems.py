"""The embedded problems (dataset/problems.py), from their test split: exact match of the answer.

    {"question": "What is 15 * 24?", "answer": "360"}

The question is a user's message, and the answer is generated greedily. It is right if it has the right answer
and nothing else; a thought may come before it. It is well formed if it is a day (for a question about dates)
or numbers (for all others), right or wrong, and all thoughts are closed. A model without chat tokens reads
plain text, "What is 15 * 24?\\n", and its answer is the last line of the first paragraph that it generates.
With calculator=True the system message offers the calculator, and calls of it are answered.
"""

import itertools

from dataset.problems import Problem, is_right, is_well_formed, problems, prompt_of
from dataset.prompts import EASY
from evals.lm import LM
from evals.results import Result, mean
from formats.chat_format import end_of_turn
from generation.assistant import Message

WITH_NUMBERS = ("add", "subtract", "multiply", "story", "hard")
MAX_NEW_TOKENS = 120  # the longest worked answer takes about 100


def load(source: str | None, limit: int, shots: int | None, calculator: bool = False,
         family: str | None = None) -> list[Problem]:
    """The first `limit` different test problems.

    They are of one family, or of all families but the hard one; with the calculator, of those with
    arithmetic. The problems are generated, so `source` is not read, and there are no worked examples.
    """
    families = (family,) if family else WITH_NUMBERS if calculator else EASY
    seen: dict[str, Problem] = {}
    for problem in itertools.islice(problems("test", 1, families), 20 * limit):
        seen.setdefault(problem.key, problem)
        if len(seen) == limit:
            break
    return list(seen.values())


def last_messages(lm: LM, questions: list[Problem], calculator: bool) -> list[Message]:
    """The last message of each conversation, with the calls of all of its messages under "calls".

    For a model without chat tokens it is the line that is the answer.
    """
    if end_of_turn(lm.tokenizer) is not None:
        conversations = [prompt_of(problem, calculator) for problem in questions]
        return [{**replies[-1], "calls": [call for each in replies for call in each.get("tool_calls", [])]}
                for replies in lm.reply(conversations, MAX_NEW_TOKENS)]
    texts = lm.generate_until([f"{problem.question}\n" for problem in questions], [], MAX_NEW_TOKENS)
    paragraphs = [text.split("\n\n")[0].strip().splitlines() or [""] for text in texts]
    return [{"role": "assistant", "content": lines[-1].strip()} for lines in paragraphs]


def score(lm: LM, questions: list[Problem], calculator: bool = False, family: str | None = None) -> Result:
    """Accuracy and the share of well-formed answers; the details have accuracy by family."""
    messages = last_messages(lm, questions, calculator)
    pairs = list(zip(questions, messages, strict=True))
    right = [is_right(problem, message) for problem, message in pairs]
    formed = [is_well_formed(problem, message) for problem, message in pairs]
    families = {name: [each for problem, each in zip(questions, right, strict=True) if problem.family == name]
                for name in sorted({problem.family for problem in questions})}
    answers = [{"question": problem.question, "answer": problem.answer, "said": message["content"],
                "message": message, "steps": problem.steps, "expression": problem.expression,
                "vote": "" if "malformed" in message else message["content"], "right": each}
               for (problem, message), each in zip(pairs, right, strict=True)]
    return Result({"accuracy": mean(right), "well_formed": mean(formed)}, answers,
                  {"families": {name: sum(each) / len(each) for name, each in families.items()}})
