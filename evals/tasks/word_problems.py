"""Arithmetic word problems: GSM8K (arXiv 2110.14168), SVAMP (arXiv 2103.07191), MAWPS (Koncel-Kedziorski et
al. 2016) and ASDiv (arXiv 2106.15772), 8-shot with chain of thought (arXiv 2201.11903).

    {"question": "Ann buys 3 pens at $4 each. What does she pay?",
     "answer": "3 pens cost 3 * 4 = $<<3*4=12>>12.\\n#### 12"}                                       GSM8K
    {"Body": "A pack costs $ 76 and a discount is $ 25", "Question": "What do you pay?",
     "Equation": "( 76.0 - 25.0 )", "Answer": 51.0}                                                 SVAMP
    {"original_text": "Ann has 2 cats and 3 dogs . How many pets ?", "equation": "X=2.0+3.0", "ans": 5.0}
    {"body": "Ann has 2 cats.", "question": "How many legs?", "formula": "2*4=8", "answer": "8 (legs)"}

The prompt is that of lm-eval's task gsm8k: eight rows with their worked answers, then the question. The
worked answer of the other three is the equation, then "#### " and the number.

    Question: Ann buys 3 pens at $4 each. What does she pay?
    Answer: 3 pens cost 3 * 4 = $<<3*4=12>>12.
    #### 12

    Question: ...
    Answer:

The eight rows are the first of the training split, the same before every question; the examples that Wei et
al. wrote are not in the data. Without a training split they are the last rows, which are then not asked. A
prompt longer than the context loses its beginning. ASDiv has 147 rows of 2,305 whose answer is not one number
(a name, a time, a ratio); they are left out.

"strict" reads the number after the first ####, "flexible" the last number of the text. Both are compared as
numbers. lm-eval's task has the same two filters, but compares strings: it counts 12.0 and 12.00 as wrong,
takes the dots of "12..." for a part of the number, and finds no number after "#### $". Files: NAME_train*,
NAME_test* or NAME*, such as gsm8k_test* of github.com/openai/grade-school-math, SVAMP.json of
github.com/arkilpatel/SVAMP; for the hub see HUB.
"""

import re
from decimal import Decimal
from typing import Any, NamedTuple

from configurator import UserError
from dataset.tasks import word_problem
from evals.benchmarks import Questions, convert, text_of, with_last_as_shots
from evals.lm import LM
from evals.multiple_choice import splits
from evals.results import Result, means, truncated

HUB = {"gsm8k": {"train": "openai/gsm8k:main:train", "test": "openai/gsm8k:main:test"},
       "svamp": {"train": "ChilleD/SVAMP::train", "test": "ChilleD/SVAMP::test"},
       "mawps": {"train": "MU-NLPC/Calc-mawps:default:train", "test": "MU-NLPC/Calc-mawps:default:test"},
       "asdiv": {"validation": "EleutherAI/asdiv:asdiv:validation"}}
SHOTS = 8
MAX_NEW_TOKENS = 256  # lm-eval's default
STOPS = ["Question:"]
# A number: 7, 1,080, 7.50, .5, -7, $7, -$7, $-7. Three digits follow each comma. A minus after a letter, a
# digit or a bracket is an operator: the last number of 10-5 is 5.
SIGN = r"(?:(?<![\w)])-\$?|\$-?)?"
NUMBER = SIGN + r"(?:(?:[0-9]{1,3}(?:,[0-9]{3})+(?![0-9])|[0-9]+)(?:\.[0-9]+)?|(?<![0-9])\.[0-9]+)"
STRICT = rf"####\s*({NUMBER})"


class WordProblem(NamedTuple):
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


def problem_of(row: dict[str, Any]) -> WordProblem:
    prompt, answer = map(text_of, word_problem(row))
    # Nothing may follow the number: `strict` would read 12 from "#### 12,34".
    match = re.search(rf"{STRICT}\s*$", answer)
    if match is None:
        raise ValueError("no number after ####, or more after it")
    return WordProblem(prompt, answer, parse_number(match[1]))


def load(source: str | None, limit: int, shots: int | None, name: str = "gsm8k") -> Questions:
    """The first `limit` rows of the test split, and the first `shots` of the training split, or else the
    last rows."""
    train, test = splits(source, name, HUB[name])
    count = SHOTS if shots is None else shots
    if name == "asdiv":
        test = [row for row in test if re.fullmatch(rf"{NUMBER}( \(.*\))?", str(row.get("answer")))]
    if not train:
        return with_last_as_shots(test, limit, count, problem_of)
    if len(train) < count:
        raise UserError(f"shots={count}: {name} has {len(train)} rows of training")
    return Questions(convert(test[:limit], problem_of), convert(train[:count], problem_of))


def score(lm: LM, questions: Questions, name: str = "gsm8k") -> Result:
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
