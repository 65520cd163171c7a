"""ROC-AUC against scikit-learn, and by hand; calibration and decisions by hand."""

import math
import random

import pytest

from evals.calibration import auc_within, calibration_error, roc_auc, wrong_decisions


def test_auc_by_hand():
    assert roc_auc([0.9, 0.4, 0.7], [True, False, True]) == 1
    assert roc_auc([0.9, 0.4, 0.7], [False, True, True]) == 0
    # Pairs (right, wrong): (.5, .5) is a tie, (.5, .2) is won, (.1, .5) and (.1, .2) are lost: 1.5 of 4.
    assert roc_auc([0.5, 0.1, 0.5, 0.2], [True, True, False, False]) == 0.375
    assert math.isnan(roc_auc([0.5, 0.1], [True, True]))


def test_auc_is_scikit_learns():
    metrics = pytest.importorskip("sklearn.metrics")
    draw = random.Random(0)
    for _ in range(20):
        right = [draw.random() < 0.7 for _ in range(50)]
        scores = [draw.randrange(10) / 10 for _ in right]  # with ties
        assert roc_auc(scores, right) == pytest.approx(metrics.roc_auc_score(right, scores), rel=1e-12)


def test_auc_within_groups_counts_pairs_of_the_same_group_only():
    # Group a: (.2, .1) is won. Group b: (.8, .9) is lost. Between the groups nothing is compared.
    scores, right, groups = [0.2, 0.1, 0.8, 0.9], [True, False, True, False], ["a", "a", "b", "b"]
    assert auc_within(scores, right, groups) == 0.5
    assert math.isnan(auc_within(scores, right, [1, 2, 3, 4]))


def test_a_score_that_is_the_length_fails_within_one_length():
    """Long answers are mostly wrong; among answers of one length, right ones are not to be recognised."""
    draw = random.Random(1)
    lengths = [draw.randrange(10, 60) for _ in range(2000)]
    right = [draw.random() > length / 60 for length in lengths]
    scores = [1 - length / 60 for length in lengths]
    assert roc_auc(scores, right) > 0.75
    assert auc_within(scores, right, lengths) == 0.5


def test_calibration_error_by_hand():
    # Bin [.9, 1]: mean score .95, half are right: .45 off. Bin [.1, .2): mean .1, none is right: .1 off.
    assert calibration_error([0.9, 1.0, 0.1, 0.1], [True, False, False, False]) == pytest.approx(
        (0.45 * 2 + 0.1 * 2) / 4)
    assert calibration_error([1.0, 0.0], [True, False]) == 0
    # Errors of the two answers in one bin cancel: that is what calibration means.
    assert calibration_error([0.5, 0.5], [True, False]) == 0


def test_false_accepts_and_rejects_by_hand():
    accepts, rejects = wrong_decisions([0.5, 0.4, 0.9, 0.2], [False, False, True, True], 0.5)
    assert (accepts, rejects) == (0.5, 0.5)
    assert math.isnan(wrong_decisions([0.5], [True], 0.5)[0])
