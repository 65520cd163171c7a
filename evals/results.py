"""The figures of an evaluation: a mean or a ratio, its standard error, and the number of observations."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple


class Figure(NamedTuple):
    """A measured number."""

    value: float
    stderr: float  # standard error of the value
    n: int  # number of questions, or of whatever the value is an average over


@dataclass
class Result:
    """What a task measured on a model."""

    figures: dict[str, Figure]  # {"accuracy": ..}; the first one is the headline figure
    answers: list[dict[str, Any]] = field(default_factory=list)  # one per question
    details: dict[str, Any] = field(default_factory=dict)  # further findings: curves, counts


def mean(values: Sequence[float]) -> Figure:
    """The mean of at least one number. Its standard error is the sample standard deviation / sqrt(n); it is 0
    for a single number."""
    n, average = len(values), sum(values) / len(values)
    variance = sum((value - average) ** 2 for value in values) / max(n - 1, 1)
    return Figure(average, math.sqrt(variance / n), n)


def means(answers: Sequence[dict[str, Any]], keys: Sequence[str]) -> dict[str, Figure]:
    """The mean of each of these keys over the answers."""
    return {key: mean([answer[key] for answer in answers]) for key in keys}


def truncated(flags: Sequence[bool]) -> dict[str, Figure]:
    """{"truncated": share of prompts that lost their beginning}, or {} if none did."""
    return {"truncated": mean(flags)} if any(flags) else {}


def ratio(sums: Sequence[float], counts: Sequence[float]) -> Figure:
    """sum(sums) / sum(counts) over groups, such as nats per token over windows; n is sum(counts).

    The standard error is that of a ratio of means over independent groups (Cochran, Sampling Techniques,
    1977).
    """
    groups, n = len(counts), sum(counts)
    value = sum(sums) / n
    spread = sum((each - value * count) ** 2 for each, count in zip(sums, counts, strict=True))
    return Figure(value, math.sqrt(spread * groups / max(groups - 1, 1)) / n, n)
