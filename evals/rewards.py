"""What an answer is worth in reinforcement learning: whether it is right, or a user's own measure.

    reward = Reward("answer")
    reward.terms(prompt, message)                    # {"answer": 1.0}; the reward is the sum of the terms
    reward = Reward("my_reward.py:score")            # def score(prompt, answer, row): return 1.0

`score` gets the messages of the prompt, the model's last message ({"role", "content"} and perhaps "thought")
and the row, and returns a number or {name: number}. It must be a pure function. The file is executed, so use
only files that you trust. An exception, a value that is no finite number, or a reward that takes longer than
reward_seconds (a regex may, too) ends the run with one line. An answer that was cut by the length limit is
worth 0.
"""

import copy
import math
import numbers
import re
import runpy
import signal
from pathlib import Path
from typing import Any

from configurator import UserError
from dataset.conversations import Message
from dataset.prompts import LETTERS, Prompt
from dataset.sources import Skip
from evals.tasks.word_problems import flexible, strict
from formats.files import file_sha256

BUILT_IN = "answer"


# ---- Right answers ----------------------------------------------------------------------------------------

def right_letter(row: dict[str, Any]) -> str:
    """The letter of the right choice: `answer` is its index, its letter or its text. Raises ValueError."""
    choices, answer = row["choices"], row.get("answer")
    if type(answer) is not int:
        answer = choices.index(answer) if answer in choices else [*LETTERS].index(str(answer))
    if not 0 <= answer < min(len(choices), len(LETTERS)):
        raise ValueError(f"the answer {answer} is no choice")
    return LETTERS[answer]


def is_well_formed(message: Message) -> bool:
    """Whether an answer, right or wrong, has an end, closed thoughts, and content."""
    return not {"cut", "malformed"} & message.keys() and bool(message["content"])


def is_right(row: dict[str, Any], message: Message) -> bool:
    """Whether an answer agrees with the reference in the row (dataset/prompts.py lists the forms)."""
    content, answer = message["content"], str(row.get("answer")).strip()
    if not is_well_formed(message):
        return False
    if row.get("choices"):
        letter = re.match(r"\W*([A-Z])\b", content)
        return right_letter(row) == (letter and letter[1])
    if "regex" in row:
        return re.fullmatch(row["regex"], content) is not None
    return flexible(content) == strict(answer) if "####" in answer else content == answer


def require_reference(row: dict[str, Any]) -> None:
    """Raise Skip unless `is_right` can check answers to this row."""
    try:
        text = "" if type(row.get("answer")) not in (str, int, float) else str(row["answer"]).strip()
        if not row.get("choices") and "regex" not in row and not text:
            raise ValueError("no answer, regex or choices")
        if "####" in text and strict(text) is None:
            raise ValueError("no number after ####")
        is_right(row, {"content": "A"})  # raises what is wrong with choices or a pattern
    except (ValueError, TypeError, re.error) as error:
        raise Skip(f"no reference answer ({error})") from None


# ---- The reward -------------------------------------------------------------------------------------------

class RewardTimeout(SystemExit):
    """A call took too long. Not an Exception, so that the function's `except Exception` does not catch it."""


def built_in(prompt: list[Message], answer: Message, row: dict[str, Any]) -> dict[str, float]:
    """The reward "answer", in the form of a user's function."""
    return {BUILT_IN: float(is_right(row, answer))}


def load_function(spec: str) -> Any:
    """The function of "file.py:function". Raises UserError if there is none."""
    path, _, name = spec.rpartition(":")
    if not path.endswith(".py") or not Path(path).is_file():
        raise UserError(f"reward={spec}: must be {BUILT_IN} or an existing file.py:function")
    try:
        function = runpy.run_path(path).get(name)
    except (Exception, SystemExit) as error:
        raise UserError(f"reward={spec}: {type(error).__name__}: {error}") from None
    if not callable(function):
        raise UserError(f"reward={spec}: {path} has no function {name!r}")
    return function


class Reward:
    """Compares answers with references, or calls the user's function. `identity` is the hash of its file."""

    def __init__(self, spec: str = BUILT_IN, seconds: float = 10.0):
        """spec: "answer" or "file.py:function". seconds: that the reward of one answer may take."""
        self.spec, self.seconds, self.identity = spec, seconds, ""
        self.function: Any = built_in
        if spec != BUILT_IN:
            self.function = load_function(spec)
            self.identity = file_sha256(Path(spec.rpartition(":")[0]))

    def terms(self, prompt: Prompt, message: Message) -> dict[str, float]:
        """{name: value}, whose sum is the reward of an answer. Raises UserError if the function fails."""
        if "cut" in message and self.spec != BUILT_IN:
            return {}
        try:
            value = self.call(prompt, message)
            terms = value if isinstance(value, dict) else {"custom": value}
            if not all(isinstance(name, str) and isinstance(each, numbers.Real) and math.isfinite(each)
                       for name, each in terms.items()):
                raise TypeError(f"returned {value!r}, which is no finite number or dict of them")
        except BaseException as error:  # also asyncio.CancelledError and SystemExit
            if isinstance(error, KeyboardInterrupt):
                raise
            question = " ".join(prompt.messages[-1]["content"].split())[:60]
            reason = " ".join(str(error).split())[:300]
            raise UserError(f"reward={self.spec}: {type(error).__name__}: {reason} (prompt: {question})") \
                from None
        return {name: float(each) for name, each in terms.items()}

    def call(self, prompt: Prompt, message: Message) -> Any:
        """The function on copies, so that it cannot change the data. Raises RewardTimeout.

        Only the main thread can be interrupted.
        """
        def stop(number: int, frame: Any) -> None:
            raise RewardTimeout(f"took longer than reward_seconds={self.seconds:g}")

        before = signal.signal(signal.SIGALRM, stop)
        signal.setitimer(signal.ITIMER_REAL, self.seconds)
        try:
            return self.function(*copy.deepcopy((prompt.messages, message, prompt.row)))
        finally:
            signal.setitimer(signal.ITIMER_REAL, 0)
            signal.signal(signal.SIGALRM, before)
