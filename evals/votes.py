"""Several answers per question: which one to give, and what it costs. All methods over the same tokens.

    result = task.score(lm, questions)                       # greedy, as always
    add_votes(Asker(lm, task.score, questions, settings, verifier), result)

With k samples per question (num_samples, and smaller powers of two):

    pass@k       the chance that one of k samples is right, estimated without bias from n >= k samples
                 (arXiv 2107.03374, equation 1); pass@1 is the mean accuracy of a sample
    maj@k        self-consistency: the answer that most of the k samples give (arXiv 2203.11171)
    weighted@k   the same, and each sample counts its score (arXiv 2206.02336)
    verified@k   best of k: the sample with the highest score (arXiv 2110.14168)
    oracle@k     whether any of the k samples is right: the most that a choice among them can reach
    longer       the greedy answer; if the token limit cuts it, the question is answered again with a limit of
                 num_samples times max_new_tokens
    revise       the greedy answer; while its score is below the threshold, the question is asked again after
                 it, and the attempt with the highest score counts

Equally good choices share the point, as everywhere in evals/. A standard error is that over questions. The
gain of a method is the mean over questions of its point minus greedy's, so its standard error is of a paired
comparison. Tokens are those that are generated for a question. An answer counts again whenever it is read
again, by the verifier or before a revision. The question itself is not counted.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import TYPE_CHECKING, Any, NamedTuple

from configurator import UserError, require, require_not_negative
from evals.benchmarks import Questions
from evals.lm import LM
from evals.results import Result, mean
from generation.verifier import Verifier

if TYPE_CHECKING:  # imported where it is used, because the import takes half a second
    from matplotlib.figure import Figure

RIGHT = ("right", "accuracy", "strict", "exact_match")  # an answer has one of these keys: whether it is right


@dataclass(frozen=True, kw_only=True)
class VoteSettings:
    """The keys of eval.py for several answers per question."""

    num_samples: int = 0  # sampled answers per question, for pass@k and votes; 0 asks greedily only
    temperature: float = 0.8  # of the samples
    seed: int = 1337  # of the samples
    verifier: str = ""  # out_dir of verifier.py; its scores choose among the samples
    threshold: float = 0.5  # revise: the verifier accepts an answer from this score on
    retries: int = 2  # revise: further answers to a question, at most

    def __post_init__(self) -> None:
        require(self, "num_samples", 0 <= self.num_samples <= 1024, "between 0 and 1,024")
        require(self, "temperature", 0 < self.temperature < math.inf, "positive")
        require(self, "threshold", 0 <= self.threshold <= 1, "between 0 and 1")
        require_not_negative(self, "seed", "retries")
        if self.verifier and not self.num_samples:
            raise UserError(f"verifier={self.verifier}: only chooses among samples; set num_samples")


class Sample(NamedTuple):
    """One answer to a question."""

    vote: str  # the answer in a form that can be compared; "" if there is none
    right: bool
    tokens: int  # tokens that were generated
    score: float = 0.0  # the verifier's probability that it is right
    cut: bool = False  # whether the limit of new tokens has ended it
    reply: Sequence[dict[str, Any]] = ()  # its messages, if the task is a conversation


class Points(NamedTuple):
    """What a method brought for each question."""

    right: list[float]  # the point, 0 to 1
    tokens: list[float]


# ---- One question -----------------------------------------------------------------------------------------

def pass_at_k(n: int, right: int, k: int) -> float:
    """1 - C(n - right, k) / C(n, k): the chance that k of n samples include one of the `right` ones.

    An unbiased estimate of 1 - (1 - p)^k, if each sample is right with probability p.
    """
    return 1 - math.comb(n - right, k) / math.comb(n, k)


def vote(samples: Sequence[Sample], weights: Sequence[float]) -> float:
    """The point for the answer with the largest total weight; equally large ones share it."""
    totals: dict[str, float] = {}
    for sample, weight in zip(samples, weights, strict=True):
        if sample.vote:
            totals[sample.vote] = totals.get(sample.vote, 0.0) + weight
    right = {sample.vote for sample in samples if sample.right}
    best = [answer for answer, total in totals.items() if total == max(totals.values())]
    return sum(answer in right for answer in best) / max(len(best), 1)


def best_scored(samples: Sequence[Sample]) -> float:
    """The point for the sample with the highest score; equally high ones share it."""
    best = max(sample.score for sample in samples)
    return mean([sample.right for sample in samples if sample.score == best]).value


# {name: (the point for k samples, how often their tokens count)}. With a verifier they count twice, because
# it reads what was generated.
METHODS: dict[str, tuple[Callable[[Sequence[Sample]], float], int]] = {
    "maj": (lambda samples: vote(samples, [1.0] * len(samples)), 1),
    "weighted": (lambda samples: vote(samples, [sample.score for sample in samples]), 2),
    "verified": (best_scored, 2)}


# ---- All questions ----------------------------------------------------------------------------------------

def total(samples: Sequence[Sample]) -> int:
    """The tokens of these samples."""
    return sum(sample.tokens for sample in samples)


def in_blocks(samples: list[list[Sample]], k: int, method: str) -> Points:
    """A method over blocks of k samples of each question: the first k, the next k, ..; the mean of them."""
    point, reads = METHODS[method]
    blocks = [[each[at:at + k] for at in range(0, len(each) - k + 1, k)] for each in samples]
    return Points([mean(list(map(point, each))).value for each in blocks],
                  [reads * mean(list(map(total, each))).value for each in blocks])


class Asker(NamedTuple):
    """A model, a task's score(), what its load() returned, and how to ask the questions."""

    lm: LM
    score: Callable[[LM, Any], Result]
    questions: Any
    settings: VoteSettings
    verifier: Verifier | None

    def ask(self, indices: Sequence[int], **state: Any) -> list[Sample]:
        """One sample for each of these questions. state: attributes of the LM during the call."""
        if not indices:
            return []
        before = {key: getattr(self.lm, key) for key in state}
        vars(self.lm).update(state)
        wrapped = isinstance(self.questions, Questions)  # with worked examples
        asked = [(self.questions.asked if wrapped else self.questions)[index] for index in indices]
        try:
            return self.samples(self.score(
                self.lm, self.questions._replace(asked=asked) if wrapped else asked))
        finally:
            vars(self.lm).update(before)

    def samples(self, result: Result) -> list[Sample]:
        """The samples of a result whose answers the LM has just generated."""
        lm, n = self.lm, len(result.answers)
        scores = self.verifier.score_rows(lm.rows, lm.sampled).tolist() if self.verifier else [0.0] * n
        right = [bool(next(answer[key] for key in RIGHT if key in answer)) for answer in result.answers]
        return [Sample(answer["vote"], *rest) for answer, *rest in zip(
            result.answers, right, map(sum, lm.sampled), scores, lm.cut, lm.replies or [()] * n, strict=True)]

    def retry(self, greedy: list[Sample], rounds: int, again: Callable[[Sample], bool],
              state: Callable[[list[Sample]], dict[str, Any]]) -> list[list[Sample]]:
        """The attempts at each question: the last one is repeated while `again`, at most `rounds` times.

        state: of the LM, from the attempts that are repeated.
        """
        attempts = [[sample] for sample in greedy]
        for _ in range(rounds):
            rest = [number for number, each in enumerate(attempts) if again(each[-1])]
            new = self.ask(rest, **state([attempts[number][-1] for number in rest]))
            for number, sample in zip(rest, new, strict=True):
                attempts[number].append(sample)
        return attempts


def all_methods(asker: Asker, result: Result) -> dict[str, Points]:
    """Ask the questions in every way; result: the greedy answers, which were generated last."""
    cfg, n, greedy = asker.settings, asker.settings.num_samples, asker.samples(result)
    drawn = asker.ask([number for number in range(len(greedy)) for _ in range(n)],
                      temperature=cfg.temperature, seed=cfg.seed, copies=n)
    samples = [drawn[at:at + n] for at in range(0, len(drawn), n)]
    found = {"greedy": Points([float(s.right) for s in greedy], [s.tokens for s in greedy])}
    for k in sorted({n, *(2**power for power in range(n.bit_length()))}):
        right = [pass_at_k(n, sum(sample.right for sample in each), k) for each in samples]
        found[f"pass@{k}"] = Points(right, [k / n * total(each) for each in samples])
        for method in (METHODS if asker.verifier else ("maj",)) if k > 1 or n == 1 else ():
            found[f"{method}@{k}"] = in_blocks(samples, k, method)
    found[f"oracle@{n}"] = found[f"pass@{n}"]
    attempts = asker.retry(greedy, 1, lambda last: last.cut, lambda cut: {"budget": n})
    found["longer"] = Points([float(each[-1].right) for each in attempts], list(map(total, attempts)))
    if asker.verifier and any(sample.reply for sample in greedy):  # the task is a conversation
        attempts = asker.retry(greedy, cfg.retries, lambda last: last.score < cfg.threshold,
                               lambda low: {"attempts": [sample.reply for sample in low]})
        # An attempt is read when it is scored, and the earlier ones are read before it and scored with it.
        tokens = [2 * sum(accumulate(sample.tokens for sample in each)) for each in attempts]
        found["revise"] = Points(list(map(best_scored, attempts)), tokens)
    return found


def add_votes(asker: Asker, result: Result) -> None:
    """Add the figures of all methods to a task's result, and details["methods"] with gains and tokens."""
    n, methods = asker.settings.num_samples, all_methods(asker, result)
    shown = ["pass@1", *(f"{name}@{n}" for name in ("pass", *METHODS, "oracle")), "longer", "revise"]
    result.figures |= {name: mean(methods[name].right) for name in shown if name in methods}
    result.details["methods"] = {}
    for name, (right, tokens) in methods.items():
        accuracy, gain = mean(right), mean(
            [a - b for a, b in zip(right, methods["greedy"].right, strict=True)])
        result.details["methods"][name] = {
            "accuracy": accuracy.value, "stderr": accuracy.stderr, "gain": gain.value,
            "gain_stderr": gain.stderr, "tokens": mean(tokens).value}


# ---- Table and picture ------------------------------------------------------------------------------------

def method_rows(models: list[dict[str, Any]]) -> list[list[str]]:
    """The table of all methods as rows of cells: a header, then one row per model, task and method."""
    rows = [["task", "method", "model", "accuracy", "gain over greedy", "tokens per question"]]
    for model in models:
        for task, found in model["tasks"].items():
            for name, each in found["details"].get("methods", {}).items():
                rows.append([task, name, model["name"], f"{each['accuracy']:.4f} +- {each['stderr']:.4f}",
                             f"{each['gain']:+.4f} +- {each['gain_stderr']:.4f}", f"{each['tokens']:,.1f}"])
    return rows if len(rows) > 1 else []


def draw(models: dict[str, dict[str, Any]]) -> "Figure | None":
    """Accuracy against tokens: one panel per model, one curve per method. None without sampled answers."""
    from matplotlib.figure import Figure
    panels = {name: details["methods"] for name, details in models.items() if "methods" in details}
    if not panels:
        return None
    figure = Figure(figsize=(7 * len(panels), 4.5), layout="constrained")
    for axes, (name, methods) in zip(figure.subplots(1, len(panels), squeeze=False)[0], panels.items(),
                                     strict=True):
        for curve in dict.fromkeys(method.partition("@")[0] for method in methods):
            points = [each for method, each in methods.items() if method.partition("@")[0] == curve]
            if curve == "greedy":  # a line to compare with; "longer" would hide its point
                axes.axhline(points[0]["accuracy"], linestyle="--", color="black", label=curve)
            elif curve != "oracle":  # the last point of pass@k
                axes.errorbar([each["tokens"] for each in points], [each["accuracy"] for each in points],
                              [each["stderr"] for each in points], marker="o", capsize=2,
                              label=f"{curve}@k" if len(points) > 1 else curve)
        axes.set_xscale("log", base=2)
        axes.xaxis.set_major_formatter("{x:g}")
        axes.set(xlabel="tokens per question", ylabel="accuracy", title=name)
        axes.legend(loc="center left", bbox_to_anchor=(1, 0.5))
        axes.grid(alpha=0.3)
    return figure
