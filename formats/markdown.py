"""Markdown tables and code blocks, for reports, model cards and the terminal."""

import re
from collections.abc import Iterable
from typing import Any


def table(headers: Iterable[Any], rows: Iterable[Iterable[Any]], align: str = "") -> str:
    """A Markdown table. align: one letter per column: l (left), r (right) or - (default); "" is all default.

    >>> print(table(["name", "n"], [["a", 1]], "lr"))
    | name | n |
    |:---|---:|
    | a | 1 |
    """
    headers = [str(header) for header in headers]
    rules = {"l": ":---", "r": "---:", "-": "---"}
    lines = [headers, *([str(cell) for cell in row] for row in rows)]
    text = ["| " + " | ".join(line) + " |" for line in lines]
    text.insert(1, "|" + "|".join(rules[letter] for letter in align or "-" * len(headers)) + "|")
    return "\n".join(text)


def fenced(text: str) -> str:
    """The text as a code block. The fence is longer than any run of backticks in the text, so that the text
    cannot end the block."""
    fence = "`" * max(3, 1 + max(map(len, re.findall("`+", text)), default=0))
    return f"{fence}text\n{text}\n{fence}"
