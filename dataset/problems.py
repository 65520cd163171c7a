"""Problems with one right answer, generated from a seed: sums, products, word problems, lists, dates.

    for problem in problems("train", seed=1):            # without end; shares no problem with "test"
        problem.question, problem.steps, problem.answer
    rows = list(problem_rows("chat", count=40_000, seed=1))   # prepare.py --source=problems --kind=chat

    What is 15 * 4?   ->   thought: 10 * 4 = 40; 5 * 4 = 20; 40 + 20 = 60   answer: 60

They show, in minutes and offline, what each training stage adds to a model. A small model can learn to write
the worked steps where it cannot learn the answer alone. It can call the calculator for what it cannot learn
at all. A program can tell a right answer from a wrong one. Train and test are disjoint by construction: a
hash of the operation and its numbers decides, whatever the wording and the order of the numbers.
"""

import math
import random
import re
import zlib
from collections.abc import Iterator
from typing import Any, Literal, NamedTuple

WITH_CALCULATOR = "You can call calculator(expression)."  # the system message that offers the tool
ROWS = 40_000  # rows of an embedded data set, before duplicates are dropped
# Names the rows that this file makes; data folders record it. Change it whenever a row changes, so that old
# folders count as outdated. (The first value was a hash of this file.)
ROWS_VERSION = "38e5fd87d76913fd1edd1c16b9e867595835e4c95c8a89773e82518c62c32fde"
CALLS = 0.3  # of the chats that offer the calculator, this share calls it; the others answer REFUSAL
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
    family: str  # a key of FAMILIES
    question: str
    steps: list[str]  # the worked steps; empty if there is nothing to work out
    answer: str
    key: str  # the problem without its wording: decides between train and test
    expression: str | None = None  # for the calculator, if the problem is arithmetic

    @property
    def is_test(self) -> bool:
        return zlib.crc32(self.key.encode()) % 10 == 0


# ---- Arithmetic, worked -----------------------------------------------------------------------------------

def places(number: int) -> list[int]:
    """The number as a sum of its non-zero digits, each with its zeros: 407 -> [400, 7]."""
    digits = str(number)
    return [int(digit) * 10**(len(digits) - 1 - i) for i, digit in enumerate(digits) if digit != "0"]


def work(a: int, b: int, operator: str) -> tuple[list[str], int]:
    """The steps of a + b, a - b or a * b, place by place, and the result.

    A product of small numbers is split at the places of both, so that each step is in the multiplication
    table: 12 * 30 -> 10 * 30 = 300; 2 * 30 = 60; 300 + 60 = 360.
    """
    if operator == "*":
        pairs = [(left, right) for right in places(b) for left in (places(a) if a < 100 else [a])]
        steps = [f"{left} * {right} = {left * right}" for left, right in pairs]
        total, operator, terms = math.prod(pairs[0]), "+", [left * right for left, right in pairs[1:]]
    else:
        steps, total, terms = [], a, places(b)
    for term in terms:
        after = total + term if operator == "+" else total - term
        steps.append(f"{total} {operator} {term} = {after}")
        total = after
    return steps, total


def arithmetic(family: str, draw: random.Random, operator: str, digits: int) -> Problem:
    """A problem about two numbers of at most this many digits; exactly this many for "hard"."""
    if family == "hard":
        a, b = (draw.randrange(10**(digits - 1), 10**digits) for _ in range(2))
    else:
        a, b = (draw.randrange(2, 10**draw.randint(1, digits)) for _ in range(2))
    if operator == "-":
        a, b = max(a, b), min(a, b)
    steps, result = work(a, b, operator)
    expression = f"{a} {operator} {b}"
    if family == "story":
        wording = draw.choice(STORIES[operator])
        question = wording.format(a=a, b=b, name=draw.choice(NAMES), things=draw.choice(THINGS))
    else:
        question = draw.choice(("What is {}?", "Compute {}.", "{} = ?")).format(expression)
    key = f"{min(a, b)} {operator} {max(a, b)}"
    return Problem(family, question, steps, str(result), key, expression)


# ---- Lists and dates --------------------------------------------------------------------------------------

def spaced(numbers: list[int]) -> str:
    return " ".join(map(str, numbers))


def listing(family: str, draw: random.Random) -> Problem:
    """Copy, reverse or sort 3 to 5 numbers, or count one of them."""
    numbers = [draw.randrange(10 if family == "count" else 100) for _ in range(draw.randint(3, 5))]
    steps: list[str] = []
    if family == "count":
        wanted = draw.choice(numbers)
        steps = [f"{number} {numbers[:i].count(wanted)}" for i, number in enumerate(numbers, 1)]
        question, result = f"How often is {wanted} in {spaced(numbers)}?", [numbers.count(wanted)]
    else:
        if family == "sort":
            steps = [spaced(sorted(numbers[:i])) for i in range(1, len(numbers))]
        question = f"{family.capitalize()} {spaced(numbers)}."
        result = {"copy": numbers, "reverse": numbers[::-1], "sort": sorted(numbers)}[family]
    return Problem(family, question, steps, spaced(result), question)


def weekday(draw: random.Random) -> Problem:
    """The day 2 to 20 days after another day. The steps drop whole weeks first, and then count day by day."""
    day, ahead = draw.randrange(7), draw.randrange(2, 21)
    wording = draw.choice(("Which day is {ahead} days after {day}?",
                           "{name} leaves on a {day} and is back in {ahead} days. Which day is that?"))
    steps = [f"{ahead} - {ahead - ahead % 7} = {ahead % 7}"] if ahead >= 7 else []
    steps += [DAYS[(day + passed) % 7] for passed in range(1, ahead % 7)]
    question = wording.format(ahead=ahead, day=DAYS[day], name=draw.choice(NAMES))
    return Problem("date", question, steps, DAYS[(day + ahead) % 7], f"{DAYS[day]} {ahead}")


# {family: its share of the problems}. "hard" is too hard for a small model.
FAMILIES = {"add": 2, "subtract": 3, "multiply": 4, "story": 2, "hard": 0.5,
            "copy": 0.5, "reverse": 0.5, "sort": 1, "count": 1, "date": 1}
# {family: (operator, digits)} of the families that are always the same operation
ARITHMETIC = {"add": ("+", 3), "subtract": ("-", 3), "multiply": ("*", 2), "hard": ("*", 3)}


def draw_problem(family: str, draw: random.Random) -> Problem:
    """A problem of a family; the generator `draw` makes every choice."""
    if family == "story":
        return arithmetic(family, draw, draw.choice("+-*"), 2)
    if family in ARITHMETIC:
        return arithmetic(family, draw, *ARITHMETIC[family])
    return weekday(draw) if family == "date" else listing(family, draw)


def problems(split: Literal["train", "test"], seed: int, families: tuple[str, ...] = ()) -> Iterator[Problem]:
    """Problems without end, of these families or (for none) of all, in their shares."""
    draw = random.Random(f"{split}/{seed}")
    names = families or tuple(FAMILIES)
    shares = [FAMILIES[name] for name in names]
    while True:
        problem = draw_problem(draw.choices(names, shares)[0], draw)
        if problem.is_test == (split == "test"):
            yield problem


# ---- What an answer is worth ------------------------------------------------------------------------------

def is_right(problem: Problem, message: dict[str, Any]) -> bool:
    """True if the content of an assistant's message is the answer and nothing else."""
    return message["content"] == problem.answer and "malformed" not in message


def is_well_formed(problem: Problem, message: dict[str, Any]) -> bool:
    """True if the message has the form of an answer, right or wrong: numbers or a day."""
    pattern = r"-?\d+( \d+)*" if problem.family != "date" else "|".join(DAYS)
    return "malformed" not in message and re.fullmatch(pattern, message["content"]) is not None


# ---- Messages ---------------------------------------------------------------------------------------------

def assistant(content: str, steps: list[str] | None = None) -> dict[str, Any]:
    """The assistant's message: the steps, if there are any, are its thought."""
    thought = {"thought": "; ".join(steps)} if steps else {}
    return {"role": "assistant", "content": content, **thought}


def prompt_of(problem: Problem, calculate: bool = False) -> list[dict[str, Any]]:
    """The question; before it, if `calculate`, the system message that offers the calculator."""
    system = [{"role": "system", "content": WITH_CALCULATOR}] if calculate else []
    return [*system, {"role": "user", "content": problem.question}]


def solution(problem: Problem, calculate: bool = False) -> list[dict[str, Any]]:
    """The right answer: one message with steps, or a call of the calculator, its result, and the answer."""
    if not calculate:
        return [assistant(problem.answer, problem.steps)]
    call = {"name": "calculator", "arguments": {"expression": problem.expression}}
    return [{**assistant(""), "tool_calls": [call]}, {"role": "tool", "content": problem.answer},
            assistant(problem.answer)]


# ---- Rows of a data set -----------------------------------------------------------------------------------

def chat_row(problem: Problem, draw: random.Random) -> dict[str, Any]:
    """A problem and its solution. If the calculator is offered, some chats call it and more refuse to answer,
    so that there is something for preferences to teach."""
    offered = problem.expression is not None and (problem.family == "hard" or draw.random() < 0.2)
    refuses = offered and draw.random() > CALLS
    reply = [assistant(REFUSAL)] if refuses else solution(problem, offered)
    return {"messages": prompt_of(problem, offered) + reply}


def preference_row(problem: Problem, called: bool, draw: random.Random) -> dict[str, Any]:
    """A preference about the calculator: calling it is better than refusing; or, if it has been `called`,
    repeating its result is better than repeating it with a digit left out or doubled."""
    prompt = prompt_of(problem, True)
    call, result, answer = solution(problem, True)
    if not called:
        return {"prompt": prompt, "chosen": [call], "rejected": [assistant(REFUSAL)]}
    at = draw.randrange(len(problem.answer))
    digit = draw.choice(("", 2 * problem.answer[at]))
    wrong = assistant(problem.answer[:at] + digit + problem.answer[at + 1:])
    return {"prompt": [*prompt, call, result], "chosen": [answer], "rejected": [wrong]}


def problem_rows(kind: str, count: int, seed: int) -> Iterator[dict[str, Any]]:
    """At most `count` rows for prepare.py's kind=text, chat or preference."""
    draw = random.Random(f"rows/{kind}/{seed}")
    source, hard_ones = problems("train", seed), problems("train", seed, ("hard",))
    for number in range(count):
        # Half of the preferences are about "hard" problems, which need the calculator most.
        problem = next(hard_ones if kind == "preference" and number % 2 else source)
        if kind == "text":
            yield {"text": "\n".join([problem.question, *problem.steps, problem.answer])}
        elif kind == "chat":
            yield chat_row(problem, draw)
        elif problem.expression is not None:  # the calculator is of no use for lists and dates
            yield preference_row(problem, number % 4 == 1, draw)  # half of the hard ones: after a call
