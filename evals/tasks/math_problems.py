"""Competition mathematics: MATH (arXiv 2103.03874) and its subset MATH-500 (arXiv 2305.20050), 4-shot.

    {"problem": "What is $1/2 + 1/3$?", "solution": "The sum is $\\boxed{\\frac{5}{6}}$."}

The prompt has Minerva's form (arXiv 2206.14858), which lm-eval's minerva_math has too:

    Problem:
    What is $1/2 + 1/3$?

    Solution: The sum is $\\boxed{\\frac{5}{6}}$.

    Problem:
    ...

    Solution:

The examples are the last four rows of the file, which are not asked; lm-eval has Minerva's four. The content
of the last \\boxed{} is the model's answer. The figure "boxed" is the share of texts that have one.

Answers are compared as expressions. Spaces, units, degrees, dollars, a leading "x =" and the commas of large
numbers do not count. Elements of tuples and intervals are compared one by one, and those of sets and bare
lists in any order. Two elements are equal if their values are: exactly for whole numbers, else to 9 digits.
With letters, the values have to be equal at three random points. No text is executed, and no package is
needed: \\frac, \\sqrt and powers become arithmetic of at most 200 characters, which the calculator's syntax
tree evaluates (generation/calculator.py). Everything else (matrices, words, functions) is compared as text.
Files: hendrycks_math*, math500* (rows as above, maybe with the key "answer"); for the hub see HUB.
"""

import ast
import itertools
import math
import random
import re
import string
from typing import Any, NamedTuple

from evals.benchmarks import Questions, answer_text, read, text_of, with_last_as_shots
from evals.lm import LM
from evals.results import Result, means, truncated
from generation.calculator import LONGEST, evaluate

HUB = {"hendrycks_math": "DigitalLearningGmbH/MATH-lighteval:default:test",
       "math500": "HuggingFaceH4/MATH-500:default:test"}
SHOTS = 4
MAX_NEW_TOKENS = 512
MOST_ORDERED = 5  # elements of a set that are compared in any order

# ---- Values -----------------------------------------------------------------------------------------------

BRACES = [(r"\\(frac|sqrt)(\w)", r"\\\1{\2}"), (r"(\\frac\{[^{}]*\})(\w)", r"\1{\2}")]  # \frac12, \sqrt2
# Groups without braces inside; applied again and again, they work from the inside out.
GROUPS = [(r"\\frac\{([^{}]*)\}\{([^{}]*)\}", r"((\1)/(\2))"), (r"\\sqrt\{([^{}]*)\}", r"((\1)**(1/2))"),
          (r"\\sqrt\[(\d+)\]\{([^{}]*)\}", r"((\2)**(1/\1))"), (r"\^\{([^{}]*)\}", r"**(\1)")]
SIGNS = [(r"\\cdot|\\times", "*"), (r"\\pi", "\u03c0"), (r"\^", "**")]
FACTORS = r"(?<=[\w).])(?=[A-Za-z\u03c0(])|(?<=[A-Za-z\u03c0)])(?=\d)"  # between two factors: 2x, x(x+1)
WORD = r"(?<![\\A-Za-z])[A-Za-z]{3}"  # a run of letters is a word, not a product


def as_arithmetic(latex: str) -> str:
    """LaTeX as arithmetic: "2\\\\frac{x}{3}" becomes "2*((x)/(3))". ValueError if it is something else."""
    text = latex if len(latex) <= LONGEST and not re.search(WORD, latex) else ""
    for pattern, sign in BRACES:
        text = re.sub(pattern, sign, text)
    for pattern, sign in GROUPS * text.count("{") + SIGNS:
        text = re.sub(pattern, sign, text)
    text = re.sub(FACTORS, "*", text)
    if not re.fullmatch(r"[0-9A-Za-z\u03c0.+*/()-]+", text):
        raise ValueError("not an expression")
    return text


def same_value(one: str, two: str) -> bool:
    """Whether two expressions have the same value at three points. False if one cannot be read."""
    draw = random.Random(0)
    try:
        trees = [ast.parse(as_arithmetic(text), mode="eval").body for text in (one, two)]
        for _ in range(3):
            names = {letter: draw.uniform(1.1, 4) for letter in string.ascii_letters} | {"\u03c0": math.pi}
            a, b = (evaluate(tree, names) for tree in trees)
            if a != b and (type(a) is type(b) is int or not math.isclose(a, b, rel_tol=1e-9)):
                return False
    except (SyntaxError, ValueError, ArithmeticError, RecursionError, MemoryError):
        return False
    return True


# ---- Answers ----------------------------------------------------------------------------------------------

def boxed(text: str) -> str | None:
    r"""The content of the last \boxed{..} or \fbox{..}, or of "\boxed 5". None if there is none."""
    at = max(text.rfind("\\boxed"), text.rfind("\\fbox"))
    if at < 0:
        return None
    inside = text[at:].partition("box")[2].removeprefix("ed")
    if not inside.startswith("{"):
        return re.split(r"[$\s]", inside.strip())[0] or None
    depth = 0
    for place, letter in enumerate(inside):
        depth += (letter == "{") - (letter == "}")
        if depth == 0:
            return inside[1:place]
    return None


def normalized(answer: str, commas: bool = True) -> str:
    """The answer without what does not count. commas: whether those of large numbers are taken out."""
    # LaTeX's spaces, \left, \right, degrees, dollars and percents. Then "x =" or "x \in" at the beginning.
    text = re.sub(r"(?<!\\)\\[!,;: ]|\\left|\\right|\^\\circ|\^\{\\circ\}|\\?[$%]|~", "", answer)
    text = re.sub(r"^\s*[A-Za-z]\s*(?:=|\\in\b)", "", re.sub(r"\\[dtc]frac", r"\\frac", text)).strip()
    text = re.sub(r"(?<=.)\\(?:text|mbox|mathrm)\{[^{}]*\}(?:\^\d|\^\{\d\})?$", "", text)  # a unit
    text = re.sub(r"\\(?:text|mbox|mathrm|textbf)\{([^{}]*)\}", r"\1", text)  # \text{no} -> no
    text = re.sub(r"\s+", "", text)
    text = re.sub(r"(?<=\d)(?:,|\{,\})(?=\d{3}(?!\d))", "", text) if commas else text
    text = re.sub(r"\\frac(\d)(\d)", r"\\frac{\1}{\2}", text.rstrip("."))  # \frac12 -> \frac{1}{2}
    return re.sub(r"(?<![\^\d.])(\d+)\\frac\{(\d+)\}\{(\d+)\}", r"(\1+\\frac{\2}{\3})", text)  # 2 1/3


def comma_parts(text: str) -> list[str]:
    """The text, split at the commas outside of brackets; [] if the brackets do not match."""
    parts, depth = [""], 0
    for letter in text:
        depth += (letter in "([{") - (letter in ")]}")
        if depth < 0:
            return []
        parts = [*parts, ""] if letter == "," and depth == 0 else [*parts[:-1], parts[-1] + letter]
    return parts


def elements(text: str) -> tuple[str, list[str]]:
    """The brackets and the elements of a tuple, an interval, a set or a list: "[1,2)" is "[)", 1 and 2."""
    match = re.fullmatch(r"(\\\{|[(\[])(.*)(\\\}|[)\]])", text)
    inside = comma_parts(match[2]) if match else []
    if match and (len(inside) > 1 or (inside and match[1] == "\\{")):
        return match[1] + match[3], inside
    return "", comma_parts(text)


def same_elements(a: str, b: str) -> bool:
    """Whether two normalized answers are the same mathematics."""
    if a == b or not a or not b:
        return a == b
    (brackets, one), (others, two) = elements(a), elements(b)
    if brackets != others or len(one) != len(two):
        return False
    ordered = brackets not in ("", "\\{\\}") or len(one) > MOST_ORDERED
    return any(all(x == y or same_value(x, y) for x, y in zip(one, order, strict=True))
               for order in ([two] if ordered else itertools.permutations(two)))


def equal(said: str, answer: str) -> bool:
    """Whether two answers are the same mathematics."""
    # "100,200" is a number, or a list of two: the answers are read in the one way, then in the other.
    return any(same_elements(normalized(said, commas), normalized(answer, commas))
               for commas in (True, False))


# ---- The task ---------------------------------------------------------------------------------------------

class MathProblem(NamedTuple):
    prompt: str
    solution: str
    answer: str


def problem_of(row: dict[str, Any]) -> MathProblem:
    solution = text_of(row["solution"])
    answer = row["answer"] if "answer" in row else boxed(solution)
    return MathProblem(f"Problem:\n{text_of(row['problem'])}\n\nSolution:", solution, answer_text(answer))


def load(source: str | None, limit: int, shots: int | None, name: str) -> Questions:
    """The first `limit` rows, and the last `shots` as worked examples."""
    return with_last_as_shots(read(source, name, HUB[name]), limit, SHOTS if shots is None else shots,
                              problem_of)


def score(lm: LM, questions: Questions, name: str) -> Result:
    """The share of right answers, and the share of texts with a boxed answer."""
    shots = "".join(f"{each.prompt} {each.solution}\n\n" for each in questions.shots)
    prompts = [shots + problem.prompt for problem in questions.asked]
    texts = lm.generate_until(prompts, ["Problem:"], MAX_NEW_TOKENS)
    answers = [{"prompt": problem.prompt, "answer": problem.answer, "said": text,
                "vote": "" if boxed(text) is None else normalized(boxed(text)),
                "boxed": boxed(text) is not None, "accuracy": equal(boxed(text) or "", problem.answer)}
               for problem, text in zip(questions.asked, texts, strict=True)]
    return Result(means(answers, ("accuracy", "boxed")) | truncated(lm.truncated), answers,
                  {"shots": len(questions.shots), "first_prompt": prompts[0]})
