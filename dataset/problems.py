"""Problems with one right answer, made from a seed: sums, products, word problems, lists, dates.

    for problem in problems("train", seed=1):            # without end; never one that "test" gives
        problem.question, problem.steps, problem.answer
    rows = list(problem_rows("chat", count=40_000, seed=1))   # prepare.py --source=problems --kind=chat

    What is 15 * 4?   ->   thought: 10 * 4 = 40; 5 * 4 = 20; 40 + 20 = 60   answer: 60

They let anybody see, in minutes and offline, what each stage does for a model: the worked steps are what a
small model can learn where it cannot learn the answer alone; the calculator does what it cannot learn at all;
and of two answers it can be said which is right. Train and test are disjoint by construction: a hash of the
operation and its numbers decides, whatever words are around them and whichever comes first.
"""

import math
import random
import re
import zlib
from collections.abc import Callable, Iterator
from typing import Any, Literal, NamedTuple

WITH_CALCULATOR = "You can call calculator(expression)."  # the system message that offers the tool
ROWS = 40_000  # of a data set
CALLS = 0.3  # of the chats in which the calculator is offered, those that use it; others say:
REFUSAL = "I cannot work that out."
NAMES = ("Ann", "Ben", "Eva", "Ivo", "Lea", "Max", "Mia", "Tom")
THINGS = ("apples", "books", "cards", "coins", "nuts", "pens", "shells", "stamps")
STORIES = {
    "+": ("{name} has {a} {things} and gets {b} more. How many {things} does {name} have?",
          "There are {a} {things} in one box and {b} in another. How many {things} are there?"),
    "-": ("{name} had {a} {things} and gave away {b}. How many {things} are left?",
          "Of {a} {things}, {name} lost {b}. How many {things} remain?"),
    "*": ("There are {a} boxes with {b} {things} in each. How many {things} are there?",
          "{name} buys {a} bags of {b} {things}. How many {things} does {name} buy?"),
}
DAYS = ("Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday", "Sunday")


class Problem(NamedTuple):
    family: str
    question: str
    steps: list[str]  # the worked way to the answer; none where it is seen at once
    answer: str
    key: str  # what the problem is, without its wording: decides between train and test
    expression: str | None = None  # for the calculator, where it is arithmetic

    @property
    def is_test(self) -> bool:
        return zlib.crc32(self.key.encode()) % 10 == 0


# ---- Arithmetic, worked -----------------------------------------------------------------------------------

def places(number: int) -> list[int]:
    """Its digits with their zeros, without those that are 0: 407 -> [400, 7]."""
    digits = str(number)
    return [int(d) * 10**i for i, d in zip(range(len(digits) - 1, -1, -1), digits, strict=True) if d != "0"]


def work(a: int, b: int, operator: str) -> tuple[list[str], int]:
    """The steps of a + b, a - b or a * b, place by place, and the result.

    Products of small numbers are cut at the places of both, so that each is one of the multiplication table.
    """
    if operator == "*":
        pairs = [(left, right) for right in places(b) for left in (places(a) if a < 100 else [a])]
        steps = [f"{left} * {right} = {left * right}" for left, right in pairs]
        total = math.prod(pairs[0])
        for left, right in pairs[1:]:
            steps.append(f"{total} + {left * right} = {total + left * right}")
            total += left * right
        return steps, total
    steps, total = [], a
    for place in places(b):
        after = total + place if operator == "+" else total - place
        steps.append(f"{total} {operator} {place} = {after}")
        total = after
    return steps, total


def arithmetic(family: str, draw: random.Random, operator: str, digits: tuple[int, int],
               story: bool = False) -> Problem:
    """A problem on two numbers of so many digits at the most."""
    a, b = (draw.randrange(10**(n - 1), 10**n) if family == "hard" else
            draw.randrange(2, 10**draw.randint(1, n)) for n in digits)
    if operator == "-":
        a, b = max(a, b), min(a, b)
    steps, result = work(a, b, operator)
    expression = f"{a} {operator} {b}"
    if story:
        wording = draw.choice(STORIES[operator])
        question = wording.format(a=a, b=b, name=draw.choice(NAMES), things=draw.choice(THINGS))
    else:
        question = draw.choice(("What is {}?", "Compute {}.", "{} = ?")).format(expression)
    low, high = sorted((a, b))
    return Problem(family, question, steps, str(result), f"{low} {operator} {high}", expression)


# ---- Lists and dates --------------------------------------------------------------------------------------

def listing(family: str, draw: random.Random) -> Problem:
    """Copy, reverse, sort or count: 3 to 5 numbers."""
    numbers = [draw.randrange(10 if family == "count" else 100) for _ in range(draw.randint(3, 5))]
    shown, steps = spaced(numbers), []
    if family == "count":
        wanted = draw.choice(numbers)
        steps = [f"{number} {numbers[:i].count(wanted)}" for i, number in enumerate(numbers, 1)]
        question, result = f"How often is {wanted} in {shown}?", [numbers.count(wanted)]
    else:
        if family == "sort":
            steps = [spaced(sorted(numbers[:i])) for i in range(1, len(numbers))]
        question = f"{family.capitalize()} {shown}."
        result = {"copy": numbers, "reverse": numbers[::-1], "sort": sorted(numbers)}[family]
    return Problem(family, question, steps, spaced(result), question)


def spaced(numbers: list[int]) -> str:
    return " ".join(map(str, numbers))


def weekday(draw: random.Random) -> Problem:
    """A whole number of weeks aside, and then day by day."""
    day, ahead = draw.randrange(7), draw.randrange(2, 21)
    wording = draw.choice(("Which day is {ahead} days after {day}?",
                           "{name} leaves on a {day} and is back in {ahead} days. Which day is that?"))
    steps = [f"{ahead} - {ahead - ahead % 7} = {ahead % 7}"] if ahead >= 7 else []
    steps += [DAYS[(day + passed) % 7] for passed in range(1, ahead % 7)]
    question = wording.format(ahead=ahead, day=DAYS[day], name=draw.choice(NAMES))
    return Problem("date", question, steps, DAYS[(day + ahead) % 7], f"{DAYS[day]} {ahead}")


# {family: (share of the problems, how one is made)}. "hard" is what a small model does not learn to work.
FAMILIES: dict[str, tuple[float, Callable[[random.Random], Problem]]] = {
    "add": (2, lambda draw: arithmetic("add", draw, "+", (3, 3))),
    "subtract": (3, lambda draw: arithmetic("subtract", draw, "-", (3, 3))),
    "multiply": (4, lambda draw: arithmetic("multiply", draw, "*", (2, 2))),
    "story": (2, lambda draw: arithmetic("story", draw, draw.choice("+-*"), (2, 2), story=True)),
    "hard": (0.5, lambda draw: arithmetic("hard", draw, "*", (3, 3))),
    "copy": (0.5, lambda draw: listing("copy", draw)),
    "reverse": (0.5, lambda draw: listing("reverse", draw)),
    "sort": (1, lambda draw: listing("sort", draw)),
    "count": (1, lambda draw: listing("count", draw)),
    "date": (1, weekday),
}


def problems(split: Literal["train", "test"], seed: int, families: tuple[str, ...] = ()) -> Iterator[Problem]:
    """Problems without end, of these families, or of all in their shares."""
    draw = random.Random(f"{split}/{seed}")
    names = families or tuple(FAMILIES)
    shares = [FAMILIES[name][0] for name in names]
    while True:
        problem = FAMILIES[draw.choices(names, shares)[0]][1](draw)
        if problem.is_test == (split == "test"):
            yield problem


# ---- Problems as rows of a data set -----------------------------------------------------------------------

def problem_rows(kind: str, count: int, seed: int) -> Iterator[dict[str, Any]]:
    """Rows that prepare.py takes for --kind=text, chat or preference; "mistakes" are preferences, too: right
    steps before wrong ones, without the calculator. Yields no more than `count`."""
    draw = random.Random(f"rows/{kind}/{seed}")
    source, hard_ones = problems("train", seed), problems("train", seed, ("hard",))
    for number in range(count):
        if kind == "preference":  # half are of the problems that need the calculator most
            problem = next(hard_ones if number % 2 else source)
            if problem.expression is not None:
                yield preference_row(problem, number % 4 == 1, draw)
            continue
        problem = next(source)
        if kind == "text":
            yield {"text": "\n".join([problem.question, *problem.steps, problem.answer])}
        elif kind == "chat":
            yield chat_row(problem, draw)
        else:
            yield {"prompt": prompt_of(problem), "chosen": solution(problem),
                   "rejected": [mistaken(problem, draw)]}


def chat_row(problem: Problem, draw: random.Random) -> dict[str, Any]:
    """A problem and its solution. Where the calculator is offered, chats are of two minds: some call it, more
    refuse."""
    offered = problem.expression is not None and (problem.family == "hard" or draw.random() < 0.2)
    refuses = offered and draw.random() > CALLS
    said = [worked([], REFUSAL)] if refuses else solution(problem, offered)
    return {"messages": prompt_of(problem, offered) + said}


def preference_row(problem: Problem, called: bool, draw: random.Random) -> dict[str, Any]:
    """What is wanted where there is a calculator: to call it, not to refuse; and once it is called, to say
    what it said, not the same with a digit lost or doubled."""
    prompt = prompt_of(problem, True)
    call, result, answer = solution(problem, True)
    if called:
        return {"prompt": [*prompt, call, result], "chosen": [answer],
                "rejected": [worked([], miscopied(problem.answer, draw))]}
    return {"prompt": prompt, "chosen": [call], "rejected": [worked([], REFUSAL)]}


def prompt_of(problem: Problem, calculate: bool = False) -> list[dict[str, Any]]:
    """What the assistant is asked, and whether it is offered the calculator."""
    system = [{"role": "system", "content": WITH_CALCULATOR}] if calculate else []
    return [*system, {"role": "user", "content": problem.question}]


def solution(problem: Problem, calculate: bool = False) -> list[dict[str, Any]]:
    """The right answer: one message, or a call of the calculator, its result, and the answer."""
    if not calculate:
        return [worked(problem.steps, problem.answer)]
    call = {"name": "calculator", "arguments": {"expression": problem.expression}}
    return [{"role": "assistant", "content": "", "tool_calls": [call]},
            {"role": "tool", "content": problem.answer}, {"role": "assistant", "content": problem.answer}]


def worked(steps: list[str], answer: str) -> dict[str, Any]:
    thought = {"thought": "; ".join(steps)} if steps else {}
    return {"role": "assistant", "content": answer, **thought}


def mistaken(problem: Problem, draw: random.Random) -> dict[str, Any]:
    """A plausible wrong answer: a slipped digit, a step left out, another operation, or no steps shown."""
    while True:
        message = mistake(problem, draw)
        if not is_right(problem, message):  # as 2 + 2 would be for 2 * 2
            return message


def mistake(problem: Problem, draw: random.Random) -> dict[str, Any]:
    kinds = ["slip", "format"]
    if problem.expression is not None:
        kinds += ["operator"] + ["missing"] * (len(problem.steps) > 1)
    kind = draw.choice(kinds)
    if kind == "format":  # the steps, and the answer at their end, said aloud
        return {"role": "assistant", "content": "; ".join([*problem.steps, f"so {problem.answer}"])}
    if kind == "operator":
        a, operator, b = problem.expression.split()
        steps, result = work(int(a), int(b), draw.choice(sorted({*"+-*"} - {operator})))
        return worked(steps, str(result))
    if kind == "missing":
        at = draw.randrange(len(problem.steps) - 1)
        steps = problem.steps[:at] + problem.steps[at + 1:]
        return worked(steps, steps[at - 1].split(" = ")[1] if at else steps[0].split()[0])
    wrong = slipped(problem.answer, draw)
    steps = [*problem.steps[:-1], problem.steps[-1].replace(f"= {problem.answer}", f"= {wrong}")] \
        if problem.steps else []
    return worked(steps, wrong)


def slipped(answer: str, draw: random.Random) -> str:
    """An answer with one digit, or the day, changed."""
    if answer in DAYS:
        return draw.choice([day for day in DAYS if day != answer])
    at = draw.choice([i for i, character in enumerate(answer) if character.isdigit()])
    return answer[:at] + draw.choice([d for d in "0123456789" if d != answer[at]]) + answer[at + 1:]


def miscopied(answer: str, draw: random.Random) -> str:
    """A number with one digit left out or said twice."""
    at = draw.randrange(len(answer))
    return answer[:at] + draw.choice(("", 2 * answer[at])) + answer[at + 1:]


# ---- What an answer is worth ------------------------------------------------------------------------------

def is_right(problem: Problem, message: dict[str, Any]) -> bool:
    """Whether the last message of an assistant says the answer and nothing else."""
    return message["content"] == problem.answer and "malformed" not in message


def is_well_formed(problem: Problem, message: dict[str, Any]) -> bool:
    """Whether it has the form of an answer, right or wrong: numbers or a day, and no thought unfinished."""
    pattern = r"-?\d+( \d+)*" if problem.family != "date" else "|".join(DAYS)
    return "malformed" not in message and re.fullmatch(pattern, message["content"]) is not None
