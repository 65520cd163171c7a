"""Markdown tables, for reports, model cards and the terminal."""

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
