"""Figures of an evaluation: a mean, its standard error, and of how many."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple


class Figure(NamedTuple):
    """A measured number."""

    value: float
    stderr: float  # standard error of the value
    n: int  # questions (or whatever it was averaged over)


@dataclass
class Result:
    """What a task found out about a model."""

    figures: dict[str, Figure]  # {"accuracy": ..}; the first is the one that counts
    answers: list[dict[str, Any]] = field(default_factory=list)  # one a question: what was said
    details: dict[str, Any] = field(default_factory=dict)  # further findings: curves, counts


def mean(values: Sequence[float]) -> Figure:
    """Mean of at least one number; its standard error is the sample's deviation / sqrt(n), and 0 of a single
    number."""
    n, average = len(values), sum(values) / len(values)
    variance = sum((value - average) ** 2 for value in values) / max(n - 1, 1)
    return Figure(average, math.sqrt(variance / n), n)


def truncated(flags: Sequence[bool]) -> dict[str, Figure]:
    """{"truncated": the share of prompts that lost their beginning}, or {} where none did."""
    return {"truncated": mean(flags)} if any(flags) else {}


def ratio(sums: Sequence[float], counts: Sequence[float]) -> Figure:
    """A sum over groups divided by their counts' sum, as nats a token over windows; n is that sum.

    Its standard error is that of a ratio of means over independent groups (Cochran, Sampling Techniques,
    1977).
    """
    groups, n = len(counts), sum(counts)
    value = sum(sums) / n
    spread = sum((each - value * count) ** 2 for each, count in zip(sums, counts, strict=True))
    return Figure(value, math.sqrt(spread * groups / max(groups - 1, 1)) / n, n)
