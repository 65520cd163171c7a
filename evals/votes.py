"""Several answers per question: which one to give, and what it costs. All methods over the same tokens.

    result = task.score(lm, questions)                       # greedy, as always
    add_votes(result, Asker(lm, task.score, questions, settings, verifier))

With k samples per question (num_samples, and smaller powers of two):

    pass@k       the chance that one of k samples is right, estimated without bias from n >= k samples
                 (arXiv 2107.03374, equation 1); pass@1 is the mean accuracy of a sample
    maj@k        self-consistency: the answer that most of the k samples give (arXiv 2203.11171)
    weighted@k   the same, and each sample counts its score (arXiv 2206.02336)
    verified@k   best of k: the sample with the highest score (arXiv 2110.14168)
    oracle@k     whether any of the k samples is right: the most that a choice among them can reach
    longer       greedy; an answer that the token limit has cut gets num_samples times as many tokens
    resample     greedy; while no score reaches the threshold, one more sample; the best scored one is given
    revise       greedy; while its score is below the threshold, the question is asked again after it

Equally good choices share the point, as everywhere in evals/. A standard error is that over questions. The
gain of a method is the mean over questions of its point minus greedy's, so its standard error is of a paired
comparison. Tokens are those that are generated for a question. An answer that is read again, by the verifier
or before a revision, counts a second time. The question itself is not counted.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

from configurator import UserError, require, require_not_negative
from evals.benchmarks import Questions
from evals.lm import LM
from evals.results import Result, mean
from generation.verifier import Verifier

if TYPE_CHECKING:  # imported where it is used, because the import takes half a second
    from matplotlib.figure import Figure

RIGHT = ("right", "strict", "exact_match")  # a task's answer has one of these keys: whether it is right


@dataclass(frozen=True, kw_only=True)
class VoteSettings:
    """The keys of eval.py for several answers per question."""

    num_samples: int = 0  # sampled answers per question, for pass@k and votes; 0 asks greedily only
    temperature: float = 0.8  # of the samples
    seed: int = 1337  # of the samples
    verifier: str = ""  # out_dir of verifier.py; its scores choose among the samples
    threshold: float = 0.5  # resample and revise: the verifier accepts an answer from this score on
    retries: int = 2  # resample and revise: further answers to a question, at most

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


METHODS: dict[str, Callable[[Sequence[Sample]], float]] = {
    "maj": lambda samples: vote(samples, [1.0] * len(samples)),
    "weighted": lambda samples: vote(samples, [sample.score for sample in samples]),
    "verified": best_scored}


# ---- All questions ----------------------------------------------------------------------------------------

def in_blocks(samples: list[list[Sample]], k: int, method: str) -> Points:
    """A method over blocks of k samples of each question: the first k, the next k, ..; the mean of them."""
    reads = 1 if method == "maj" else 2  # the verifier reads what was generated
    blocks = [[each[at:at + k] for at in range(0, len(each) - k + 1, k)] for each in samples]
    return Points([mean(list(map(METHODS[method], each))).value for each in blocks],
                  [reads * mean([sum(sample.tokens for sample in block) for block in each]).value
                   for each in blocks])


def until_accepted(attempts: list[list[Sample]], threshold: float, reads: int) -> Points:
    """Take a question's attempts in turn until a score reaches the threshold; the best scored one counts.

    reads: how often the tokens of an attempt count.
    """
    stops = [next((n for n, attempt in enumerate(each, 1) if attempt.score >= threshold), len(each))
             for each in attempts]
    taken = [each[:stop] for each, stop in zip(attempts, stops, strict=True)]
    return Points(list(map(best_scored, taken)), [reads * sum(a.tokens for a in each) for each in taken])


class Asker:
    """A model, the questions of one task, and how to ask them."""

    def __init__(self, lm: LM, score: Callable[[LM, Any], Result], questions: Any, settings: VoteSettings,
                 verifier: Verifier | None):
        """score: the task's score(). questions: what its load() returned."""
        self.lm, self.score, self.questions, self.settings = lm, score, questions, settings
        self.verifier = verifier

    def ask(self, indices: Sequence[int], **state: Any) -> list[Sample]:
        """One sample for each of these questions. state: attributes of the LM during the call."""
        if not indices:
            return []
        before = {key: getattr(self.lm, key) for key in state}
        vars(self.lm).update(state)
        wrapped = isinstance(self.questions, Questions)  # with worked examples
        asked = [(self.questions.asked if wrapped else self.questions)[index] for index in indices]
        try:
            result = self.score(self.lm, self.questions._replace(asked=asked) if wrapped else asked)
        finally:
            vars(self.lm).update(before)
        return self.samples(result)

    def samples(self, result: Result) -> list[Sample]:
        """The samples of a result whose answers the LM has just generated."""
        rows, sampled = self.lm.rows, self.lm.sampled
        scores = self.verifier.score_rows(rows, sampled).tolist() if self.verifier else [0.0] * len(rows)
        right = [bool(next(answer[key] for key in RIGHT if key in answer)) for answer in result.answers]
        return [Sample(answer["vote"], *rest) for answer, *rest
                in zip(result.answers, right, map(sum, sampled), scores, strict=True)]

    def longer(self, greedy: list[Sample], was_cut: list[bool]) -> Points:
        """was_cut: whether the limit has ended each greedy answer."""
        cut = [number for number, each in enumerate(was_cut) if each]
        attempts = [[sample] for sample in greedy]
        for number, sample in zip(cut, self.ask(cut, budget=self.settings.num_samples), strict=True):
            attempts[number].append(sample)
        return Points([float(each[-1].right) for each in attempts],
                      [sum(sample.tokens for sample in each) for each in attempts])

    def revised(self, greedy: list[Sample], replies: list[list[dict[str, Any]]]) -> Points:
        """replies: the messages of the greedy answers."""
        attempts, context = [[sample] for sample in greedy], list(replies)
        for _ in range(self.settings.retries):
            low = [number for number, each in enumerate(attempts) if each[-1].score < self.settings.threshold]
            new = self.ask(low, attempts=[context[number] for number in low])
            for number, sample, reply in zip(low, new, self.lm.replies, strict=False):
                attempts[number].append(sample)
                context[number] = reply
        return until_accepted(attempts, self.settings.threshold, reads=3)  # generated, scored, shown again


def all_methods(asker: Asker, result: Result) -> dict[str, Points]:
    """Ask the questions in every way; result: the greedy answers, which were generated last."""
    lm, n, cfg = asker.lm, asker.settings.num_samples, asker.settings
    cut, replies, greedy = lm.cut, lm.replies, asker.samples(result)
    numbers = [number for number in range(len(greedy)) for _ in range(n)]
    drawn = asker.ask(numbers, temperature=cfg.temperature, seed=cfg.seed, copies=n)
    samples = [drawn[at:at + n] for at in range(0, len(drawn), n)]
    right = [sum(sample.right for sample in each) for each in samples]
    tokens = [mean([sample.tokens for sample in each]).value for each in samples]
    found = {"greedy": Points([float(s.right) for s in greedy], [s.tokens for s in greedy])}
    for k in sorted({n, *(2**power for power in range(n.bit_length()))}):
        found[f"pass@{k}"] = Points([pass_at_k(n, c, k) for c in right], [k * each for each in tokens])
        for method in (METHODS if asker.verifier else ("maj",)) if k > 1 or n == 1 else ():
            found[f"{method}@{k}"] = in_blocks(samples, k, method)
    found[f"oracle@{n}"] = Points([float(c > 0) for c in right], [n * each for each in tokens])
    found["longer"] = asker.longer(greedy, cut)
    if asker.verifier:
        attempts = [[one, *more[:cfg.retries]] for one, more in zip(greedy, samples, strict=True)]
        found["resample"] = until_accepted(attempts, cfg.threshold, reads=2)
        if replies:  # the task is a conversation
            found["revise"] = asker.revised(greedy, replies)
    return found


def add_votes(asker: Asker, result: Result) -> None:
    """Add the figures of all methods to a task's result, and details["methods"] with gains and tokens."""
    n, methods = asker.settings.num_samples, all_methods(asker, result)
    keys = [f"{name}@{n}" for name in ("pass", *METHODS, "oracle")]
    shown = ["pass@1", *keys, "longer", "resample", "revise"]
    result.figures |= {name: mean(methods[name].right) for name in shown if name in methods}
    result.details["methods"] = {}
    for name, (right, tokens) in methods.items():
        gains = [a - b for a, b in zip(right, methods["greedy"].right, strict=True)]
        accuracy, gain = mean(right), mean(gains)
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
        curves: dict[str, list[dict[str, float]]] = {}
        for method, each in methods.items():
            if not method.startswith("oracle"):  # the last point of pass@k
                curves.setdefault(method.partition("@")[0], []).append(each)
        for curve, points in curves.items():
            axes.errorbar([each["tokens"] for each in points], [each["accuracy"] for each in points],
                          [each["stderr"] for each in points], marker="o", capsize=2,
                          label=f"{curve}@k" if len(points) > 1 else curve)
        axes.axhline(methods["greedy"]["accuracy"], color="C0", linestyle="--", linewidth=1)
        axes.set_xscale("log", base=2)
        axes.xaxis.set_major_formatter("{x:g}")
        axes.set(xlabel="tokens per question", ylabel="accuracy", title=name)
        axes.legend(loc="center left", bbox_to_anchor=(1, 0.5))  # beside the panel
        axes.grid(alpha=0.3)
    return figure
