"""How good scores are: do right answers score higher (ROC-AUC), and do the scores mean what they say (ECE)?

    roc_auc([0.9, 0.4, 0.7], [True, False, True])            # 1.0
    auc_within(scores, right, groups)                        # only compares answers of the same group
    calibration_error(scores, right)                         # 0.08: off by eight points on average

Without ties, ROC-AUC is the probability that a random right answer scores higher than a random wrong one. A
verifier that has only learned that right answers are long has a good ROC-AUC over all answers, and 0.5 among
answers of one length. `auc_within` with the length as the group shows that.
"""

import math
from collections.abc import Hashable, Sequence

import numpy as np

BINS = 10  # of the calibration error, of equal width, as in arXiv 1706.04599


def auc_within(scores: Sequence[float], right: Sequence[bool], groups: Sequence[Hashable]) -> float:
    """The share of (right, wrong) pairs of the same group in which the right answer scores higher.

    A tie counts half. Returns nan if no group has both.
    """
    higher, pairs = 0.0, 0
    members: dict[Hashable, list[int]] = {}
    for index, group in enumerate(groups):
        members.setdefault(group, []).append(index)
    for indices in members.values():
        values, labels = np.array(scores)[indices], np.array(right, dtype=bool)[indices]
        wrong = np.sort(values[~labels])
        below, up_to = (np.searchsorted(wrong, values[labels], side) for side in ("left", "right"))
        higher += (below + up_to).sum() / 2
        pairs += len(wrong) * labels.sum()
    return float(higher / pairs) if pairs else math.nan


def roc_auc(scores: Sequence[float], right: Sequence[bool]) -> float:
    """The area under the ROC curve: `auc_within` of a single group."""
    return auc_within(scores, right, [0] * len(scores))


def calibration_error(scores: Sequence[float], right: Sequence[bool]) -> float:
    """ECE (arXiv 1706.04599): |mean score - share of right answers| in each tenth of [0, 1], by size."""
    values, labels = np.array(scores), np.array(right, dtype=float)
    bins = np.minimum((values * BINS).astype(int), BINS - 1)  # (n,)
    gaps = np.bincount(bins, values - labels, minlength=BINS)  # sum of the differences in each bin
    return float(np.abs(gaps).sum() / len(values))


def wrong_decisions(scores: Sequence[float], right: Sequence[bool], threshold: float) -> tuple[float, float]:
    """(false accepts, false rejects): the share of wrong answers that score at least `threshold`, and the
    share of right answers that score less. nan if there are none."""
    values, labels = np.array(scores), np.array(right, dtype=bool)
    shares = (each.mean() if len(each) else math.nan
              for each in (values[~labels] >= threshold, values[labels] < threshold))
    accepts, rejects = map(float, shares)
    return accepts, rejects
