"""GSM8K: word problems from grade school (arXiv 2110.14168), 8-shot with chain of thought (arXiv 2201.11903).

    {"question": "Ann buys 3 pens at $4 each. What does she pay?",
     "answer": "3 pens cost 3 * 4 = $<<3*4=12>>12.\\n#### 12"}

The prompt is that of lm-eval's task gsm8k: eight rows of the training split with their worked answers, then
the question.

    Question: Ann buys 3 pens at $4 each. What does she pay?
    Answer: 3 pens cost 3 * 4 = $<<3*4=12>>12.
    #### 12

    Question: ...
    Answer:

The eight rows are the first of the training split, the same before every question; the examples that Wei et
al. wrote are not in the data. A prompt longer than the context loses its beginning.

"strict" reads the number after the first ####, "flexible" the last number of the text. Both are compared as
numbers. lm-eval's task has the same two filters, but compares strings: it counts 12.0 and 12.00 as wrong,
takes the dots of "12..." for a part of the number, and finds no number after "#### $". Files: gsm8k_train*,
gsm8k_test* of github.com/openai/grade-school-math; hub: openai/gsm8k.
"""

import re
from decimal import Decimal
from typing import Any, NamedTuple

from configurator import UserError
from dataset.tasks import question_prompt
from evals.benchmarks import Questions, convert, text_of
from evals.lm import LM
from evals.multiple_choice import splits
from evals.results import Result, means, truncated

SHOTS = 8
MAX_NEW_TOKENS = 256  # lm-eval's default
STOPS = ["Question:"]
# A number: 7, 1,080, 7.50, .5, -7, $7, -$7, $-7. Three digits follow each comma. A minus after a letter, a
# digit or a bracket is an operator: the last number of 10-5 is 5.
SIGN = r"(?:(?<![\w)])-\$?|\$-?)?"
NUMBER = SIGN + r"(?:(?:[0-9]{1,3}(?:,[0-9]{3})+(?![0-9])|[0-9]+)(?:\.[0-9]+)?|(?<![0-9])\.[0-9]+)"
STRICT = rf"####\s*({NUMBER})"


class Problem(NamedTuple):
    prompt: str
    answer: str  # the worked answer
    number: Decimal  # the right result


def parse_number(number: str) -> Decimal:
    return Decimal(re.sub("[$,]", "", number))


def strict(text: str) -> Decimal | None:
    """The number after the first #### that has one."""
    match = re.search(STRICT, text)
    return parse_number(match[1]) if match else None


def flexible(text: str) -> Decimal | None:
    """The last number of a text."""
    numbers = re.findall(NUMBER, text)
    return parse_number(numbers[-1]) if numbers else None


def problem_of(row: dict[str, Any]) -> Problem:
    # The number has to be all that follows: of "#### 12,34" `strict` would read 12.
    match = re.search(rf"{STRICT}\s*$", row["answer"])
    if match is None:
        raise ValueError("no number after ####, or more after it")
    return Problem(question_prompt(text_of(row["question"])), row["answer"], parse_number(match[1]))


def load(source: str | None, limit: int, shots: int | None) -> Questions:
    """The first `limit` rows of the test split, and the first `shots` of the training split."""
    train, test = splits(source, "gsm8k", {name: f"openai/gsm8k:main:{name}" for name in ("train", "test")})
    count = SHOTS if shots is None else shots
    if len(train) < count:
        raise UserError(f"data={source}: gsm8k needs, for shots={count}, a gsm8k_train file")
    return Questions(convert(test[:limit], problem_of), convert(train[:count], problem_of))


def score(lm: LM, questions: Questions) -> Result:
    """The shares of right answers, strict and flexible."""
    shots = "".join(f"{problem.prompt} {problem.answer}\n\n" for problem in questions.shots)
    prompts = [shots + problem.prompt for problem in questions.asked]
    texts = lm.generate_until(prompts, STOPS, MAX_NEW_TOKENS)
    answers = [{"prompt": problem.prompt, "answer": str(problem.number), "said": text,
                "vote": "" if strict(text) is None else str(strict(text).normalize()),
                "strict": strict(text) == problem.number, "flexible": flexible(text) == problem.number}
               for problem, text in zip(questions.asked, texts, strict=True)]
    return Result(means(answers, ("strict", "flexible")) | truncated(lm.truncated), answers,
                  {"shots": len(questions.shots), "first_prompt": prompts[0]})
