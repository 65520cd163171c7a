"""A needle in a haystack: is one sentence found in a long text, wherever it stands?

    The secret number is 4831907.

Greg Kamradt's grid of depths and lengths (github.com/gkamradt/LLMTest_NeedleInAHaystack) with a needle like
RULER's (arXiv 2404.06654, niah_single): a number of seven digits, drawn for each test, in a line of its own
among the lines of another text. The question says the needle's words again, for a base to go on with; an
assistant (--chat=True) is told to answer with the number alone.

    ...
    The secret number is 4831907.
    ...

    What is the secret number? The secret number is

Right is an answer whose first number is the needle's; nobody guesses that. A prompt and the 24 tokens of its
answer have together as many tokens as the test's length says, to the token. The last length is
--context_length, by default the model's block_size; up to more, the model reads with its positions extended.
Lengths and depths are evenly spaced: at 0 % the needle is the first line, at 100 % the last one before the
question, else it stands at the line end that is nearest. --num_tests=100 makes 5 x 5 cells of four tests.

The text is the standard library's source, from another place for each test, or that of --data=needle=FILE;
one that is too short is read again from its beginning. needle.png shows the share of right answers by length
and depth, and the block_size of the model.
"""

import itertools
import math
import random
import re
from pathlib import Path
from typing import Any, NamedTuple

from configurator import UserError
from dataset.sources import Skip, document, find_files, read_rows
from evals.lm import LM
from evals.results import Result, mean

NEEDLE = "The secret number is {}.\n"
QUESTION = "\nWhat is the secret number? The secret number is"
QUESTION_CHAT = "\nWhat is the secret number? Answer with the number alone."
ANSWER = 24  # tokens; seven digits and a few words
TEXT = 2**22  # characters of the haystack; a million tokens


class Test(NamedTuple):
    """Where a needle lies. row, column: of the grid; number: the needle's; place: of the haystack's end in
    the text, 0 to 1."""

    row: int
    column: int
    number: str
    place: float


class Tests(NamedTuple):
    side: int  # depths and lengths of the grid
    tests: list[Test]
    text: str


def load(source: str | None, limit: int, shots: int | None, context_length: int | None,
         num_tests: int) -> Tests:
    """The text and where the needles lie, the same for every model. There are no shots."""
    count = min(limit, num_tests)
    side = max(1, min(10, math.isqrt(count // 4)))  # four tests a cell, so that a cell's share says something
    draw = random.Random("needle")
    tests = [Test(i // side % side, i % side, str(draw.randrange(10**6, 10**7)), draw.random())
             for i in range(count)]
    return Tests(side, tests, haystack(source))


def haystack(source: str | None) -> str:
    """The beginning of the user's text, or of the standard library's source; a folder is not meant for text.
    """
    own = source is not None and not Path(source).is_dir()
    texts, length = [], 0
    for row in read_rows(find_files(source if own else "pystdlib")[0], "text", piece=2**20):
        try:
            texts.append(document(row, "text"))
        except Skip as reason:
            if own:
                raise UserError(f"{row.place}: {reason}") from None
        length += len(texts[-1]) if texts else 0
        if length >= TEXT:
            break
    return "\n".join(texts)[:TEXT]


def score(lm: LM, questions: Tests, context_length: int | None, num_tests: int) -> Result:
    """The share of needles that are found; by depth and length among the details."""
    trained = lm.model.config.block_size
    longest = context_length or trained
    if longest > trained and lm.model.config.position == "learned":
        raise UserError(f"context_length={longest}: the positions of {lm.folder} are learned, to {trained}")
    lm.model.reconfigure(block_size=max(longest, trained))
    try:
        lengths, prompts = prompts_of(lm, questions, longest)
        texts = lm.generate_until(prompts, ["\n"], ANSWER)
    finally:
        lm.model.reconfigure(block_size=trained)
    depths = spaced(0, 100, questions.side)
    answers, cells = [], [[[] for _ in lengths] for _ in depths]
    for test, text in zip(questions.tests, texts, strict=True):
        number = re.search("[0-9]+", text)
        right = number is not None and number[0] == test.number
        cells[test.row][test.column].append(right)
        answers.append({"depth": depths[test.row], "length": lengths[test.column], "number": test.number,
                        "said": text, "right": right})
    details = {"lengths": lengths, "depths": depths, "trained_context": trained,
               "found": [[sum(cell) / len(cell) for cell in row] for row in cells]}
    return Result({"accuracy": mean([answer["right"] for answer in answers])}, answers, details)


def spaced(low: int, high: int, count: int) -> list[int]:
    """Evenly spaced numbers from low to high; a single one is high."""
    return [round(high - (high - low) * i / max(count - 1, 1)) for i in reversed(range(count))]


def prompts_of(lm: LM, questions: Tests, longest: int) -> tuple[list[int], list[list[int]]]:
    """The lengths of the grid, and the ids of a prompt for each test. UserError where not even the needle
    fits."""
    tokenizer = lm.tokenizer
    question = tokenizer.encode(QUESTION_CHAT if lm.chat else QUESTION)
    needles = [tokenizer.encode(NEEDLE.format(test.number)) for test in questions.tests]
    around = len(lm.before) + len(question) + len(lm.after) + ANSWER
    shortest = around + max(map(len, needles))
    if shortest >= longest:
        raise UserError(f"context_length={longest}: needle, question and answer alone are {shortest} tokens")
    lengths, depths = (spaced(low, high, questions.side) for low, high in
                       ((max(shortest + 1, longest // questions.side), longest), (0, 100)))
    text = tokenizer.encode(questions.text[:max(2**18, 64 * longest)] + "\n")  # many times the longest
    text *= 1 + math.ceil(longest / len(text))
    is_end = [piece.endswith(b"\n") for piece in tokenizer.token_bytes()]
    ends = [i for i, token in enumerate(text, 1) if i >= longest and is_end[token]]
    prompts = []
    for test, needle in zip(questions.tests, needles, strict=True):
        size, end = lengths[test.column] - around - len(needle), ends[int(test.place * len(ends))]
        hay = text[end - size:end]
        wanted = size * depths[test.row] / 100
        lines = [0, *(i for i, token in enumerate(hay, 1) if is_end[token])]
        at = min(lines, key=lambda line: abs(line - wanted))
        prompts.append(hay[:at] + needle + hay[at:] + question)
    return lengths, prompts


def draw(found: dict[str, dict[str, Any]]) -> Any:
    """The details of some models as a picture of a panel each: a matplotlib Figure."""
    from matplotlib.figure import Figure
    side = max(len(details["lengths"]) for details in found.values())
    size = max(5, side)  # of a panel, in cells of half an inch
    figure = Figure(figsize=(1.5 + (2 + size / 2) * len(found), 2 + size / 2), layout="constrained")
    panels = figure.subplots(1, len(found), squeeze=False)[0]
    for panel, (model, details) in zip(panels, found.items(), strict=True):
        shares = [[100 * share for share in row] for row in details["found"]]
        image = panel.imshow(shares, cmap="viridis", vmin=0, vmax=100, aspect="auto")
        for row, column in itertools.product(range(len(shares)), repeat=2):
            share = shares[row][column]
            panel.text(column, row, f"{share:.0f}", ha="center", va="center",
                       color="black" if share > 60 else "white")
        within = sum(length <= details["trained_context"] for length in details["lengths"])
        panel.axvline(within - 0.5, color="red", linestyle="--", linewidth=3, clip_on=False,
                      label=f"trained context: {details['trained_context']:,} tokens")
        panel.set(title="/".join(Path(model).parts[-2:]), xlabel="prompt and answer (tokens)",
                  ylabel="depth of the needle (%)", xticks=range(len(shares)), yticks=range(len(shares)),
                  yticklabels=details["depths"])
        panel.set_xticklabels([f"{length:,}" for length in details["lengths"]], rotation=30, ha="right")
        panel.legend(loc="lower center", bbox_to_anchor=(0.5, 1.08), frameon=False)
    figure.colorbar(image, ax=panels, label="needles found (%)")
    return figure
