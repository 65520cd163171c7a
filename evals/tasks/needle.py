"""A needle in a haystack: does a model find one sentence in a long text, wherever the sentence is?

    The secret number is 4831907.

The grid of depths and lengths is Greg Kamradt's (github.com/gkamradt/LLMTest_NeedleInAHaystack). The needle
is like one of RULER's (arXiv 2404.06654, niah_single): a number of seven digits, drawn for each test, on a
line of its own in another text. The question begins the needle's sentence again, so that a base model
continues it; a chat model (--chat=True) is instructed to answer with the number alone.

    ...
    The secret number is 4831907.
    ...

    What is the secret number? The secret number is

An answer is right if its first number is the needle's; guessing gains nothing. A prompt and the 24 tokens of
its answer have exactly the number of tokens that the test's length prescribes. The largest length is
--context_length, by default the model's block_size. Beyond block_size the rotary positions are extended.
Lengths and depths are evenly spaced. At depth 0 % the needle is the first line, at 100 % the last line before
the question. In between it is at the nearest end of a line. --num_tests=100 makes 5 x 5 cells of four tests.

The text is the standard library's source, from another place for each test, or the file of
--data=needle=FILE, repeated if it is too short. needle.png shows the share of right answers by length and
depth, and the model's block_size.
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
ANSWER = 24  # tokens for the answer: seven digits and a few words
TEXT = 2**22  # characters of the haystack: about a million tokens


class Test(NamedTuple):
    """Where a needle is put."""

    row: int  # depth, as a row of the grid
    column: int  # length, as a column of the grid
    number: str  # the needle's
    place: float  # end of the haystack in the text, 0 to 1


class Tests(NamedTuple):
    side: int  # number of depths, and of lengths
    tests: list[Test]
    text: str


def haystack(source: str | None) -> str:
    """The beginning of the user's file, or of the standard library's source if `source` is no file."""
    own = source is not None and not Path(source).is_dir()
    texts, length = [], 0
    for row in read_rows(find_files(source if own else "pystdlib", "data")[0], "text"):
        try:
            texts.append(document(row, "text"))
        except Skip as reason:
            if own:
                raise UserError(f"{row.place}: {reason}") from None
        # A skipped file counts like the one before it. Counting it as 0 would be right, but would change the
        # text, and with it the data_sha256 of all earlier results.
        length += len(texts[-1]) if texts else 0
        if length >= TEXT:
            break
    return "\n".join(texts)[:TEXT]


def load(source: str | None, limit: int, shots: int | None, context_length: int | None = None,
         num_tests: int = 100) -> Tests:
    """The text and the tests, the same for every model. There are no worked examples."""
    count = min(limit, num_tests)
    side = max(1, min(10, math.isqrt(count // 4)))  # at least four tests per cell
    draw = random.Random("needle")
    tests = [Test(i // side % side, i % side, str(draw.randrange(10**6, 10**7)), draw.random())
             for i in range(count)]
    return Tests(side, tests, haystack(source))


def linspace(low: int, high: int, count: int) -> list[int]:
    """`count` evenly spaced integers from low to high; a single one is high."""
    return [round(high - (high - low) * i / max(count - 1, 1)) for i in reversed(range(count))]


def prompts_of(lm: LM, questions: Tests, longest: int) -> tuple[list[int], list[list[int]]]:
    """The lengths of the grid, and the prompt of each test as ids. UserError if the needle does not fit."""
    tokenizer, side = lm.tokenizer, questions.side
    question = tokenizer.encode(QUESTION_CHAT if lm.chat else QUESTION)
    needles = [tokenizer.encode(NEEDLE.format(test.number)) for test in questions.tests]
    around = len(lm.prefix) + len(question) + len(lm.suffix) + ANSWER  # tokens besides needle and haystack
    shortest = around + max(map(len, needles))
    if shortest >= longest:
        raise UserError(f"context_length={longest}: needle, question and answer alone are {shortest} tokens")
    lengths, depths = linspace(max(shortest + 1, longest // side), longest, side), linspace(0, 100, side)
    text = tokenizer.encode(questions.text[:max(2**18, 64 * longest)] + "\n")  # many times the longest
    text *= 1 + math.ceil(longest / len(text))
    is_line_end = [piece.endswith(b"\n") for piece in tokenizer.token_bytes()]
    # The haystack ends at one of these line ends; before each are at least `longest` tokens.
    ends = [i for i, token in enumerate(text, 1) if i >= longest and is_line_end[token]]
    prompts = []
    for test, needle in zip(questions.tests, needles, strict=True):
        size, end = lengths[test.column] - around - len(needle), ends[int(test.place * len(ends))]
        hay = text[end - size:end]
        target = size * depths[test.row] / 100
        line_starts = [0, *(i for i, token in enumerate(hay, 1) if is_line_end[token])]
        at = min(line_starts, key=lambda start: abs(start - target))
        prompts.append(hay[:at] + needle + hay[at:] + question)
    return lengths, prompts


def score(lm: LM, questions: Tests, context_length: int | None = None, num_tests: int = 100) -> Result:
    """The share of needles that are found; the details have it by depth and length."""
    trained = lm.model.config.block_size
    longest = context_length or trained
    with lm.extended_context(longest):
        lengths, prompts = prompts_of(lm, questions, longest)
        texts = lm.generate_until(prompts, ["\n"], ANSWER)
    depths = linspace(0, 100, questions.side)
    answers, cells = [], [[[] for _ in lengths] for _ in depths]
    for test, text in zip(questions.tests, texts, strict=True):
        right = re.findall("[0-9]+", text)[:1] == [test.number]  # the first number
        cells[test.row][test.column].append(right)
        answers.append({"depth": depths[test.row], "length": lengths[test.column], "number": test.number,
                        "said": text, "right": right})
    details = {"lengths": lengths, "depths": depths, "trained_context": trained,
               "found": [[sum(cell) / len(cell) for cell in row] for row in cells]}
    return Result({"accuracy": mean([answer["right"] for answer in answers])}, answers, details)


def draw(models: dict[str, dict[str, Any]]) -> Any:
    """One panel per model, from {model: details}, as a matplotlib Figure."""
    from matplotlib.figure import Figure
    side = max(5, *(len(details["lengths"]) for details in models.values()))  # of a panel, in half inches
    figure = Figure(figsize=(1.5 + (2 + side / 2) * len(models), 2 + side / 2), layout="constrained")
    panels = figure.subplots(1, len(models), squeeze=False)[0]
    for panel, (model, details) in zip(panels, models.items(), strict=True):
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
