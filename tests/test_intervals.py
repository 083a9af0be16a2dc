"""Intervals and tests against scipy, closed forms and brute force."""

from itertools import product

import numpy as np
import pytest
from scipy import stats

from evaluation.intervals import auc, mcnemar, paired_bootstrap, ratio_interval, wilson_interval


@pytest.mark.parametrize(
    "k, n, confidence, low, high",
    [  # by the formula, (p + z^2/2n -+ z sqrt(p(1-p)/n + z^2/4n^2)) / (1 + z^2/n)
        (0, 10, 0.95, 0.0, 0.2775327998628892),
        (5, 10, 0.95, 0.236593090512564, 0.7634069094874361),
        (10, 10, 0.95, 0.7224672001371107, 1.0),
        (3, 50, 0.9, 0.024231257031218402, 0.1409419464606993),
    ],
)
def test_wilson(k, n, confidence, low, high):
    assert wilson_interval(k, n, confidence) == pytest.approx((low, high), abs=1e-12)


def test_wilson_at_its_edges():
    assert wilson_interval(0, 0) == (0, 1)
    assert wilson_interval(0, 7)[0] == 0 and wilson_interval(7, 7)[1] == 1
    with pytest.raises(ValueError, match="k"):
        wilson_interval(3, 2)


def test_mcnemar_by_hand():
    a = np.array([True] * 6 + [False, False, True, False])
    b = np.array([False] * 5 + [True, True, False, True, False])
    # Differ: five times a only, once b only: 2 * (C(6,0) + C(6,1)) / 2^6 = 14/64.
    assert mcnemar(a, b) == pytest.approx(14 / 64)
    assert mcnemar(b, a) == mcnemar(a, b)
    assert mcnemar(a, a) == 1


def test_bootstrap_over_prompts_has_the_exact_distribution():
    # Of two prompts with differences 0 and 1, the resampled mean is 0, 1/2, 1 with 1/4, 1/2, 1/4.
    inner = paired_bootstrap(np.array([[0.0, 1.0]]), confidence=0.4)
    assert (inner.estimate, inner.low, inner.high) == (0.5, 0.5, 0.5)
    outer = paired_bootstrap(np.array([[0.0, 1.0]]), confidence=0.6)
    assert (outer.low, outer.high) == (0, 1)


def test_two_level_bootstrap_agrees_with_enumeration():
    differences = np.array([[0.0, 1.0, 5.0], [2.0, -3.0, 4.0]])
    means = [  # every draw of two seeds and three prompts, equally likely
        np.mean([differences[s, p] for s in seeds for p in prompts])
        for seeds in product(range(2), repeat=2)
        for prompts in product(range(3), repeat=3)
    ]
    found = paired_bootstrap(differences, confidence=0.8)
    assert found.estimate == pytest.approx(1.5)
    low, high = np.quantile(means, [0.1, 0.9])
    assert (found.low, found.high) == pytest.approx((low, high), abs=0.2)


def test_bootstrap_agrees_with_scipy_on_one_seed():
    values = np.random.default_rng(5).normal(0.3, 1, size=200)
    ours = paired_bootstrap(values[None])
    theirs = stats.bootstrap((values,), np.mean, method="percentile", n_resamples=9999, rng=1)
    expected = (theirs.confidence_interval.low, theirs.confidence_interval.high)
    assert (ours.low, ours.high) == pytest.approx(expected, abs=0.01)


def test_prompts_are_the_same_for_every_seed():
    # Prompts differ much, seeds not at all: more seeds must not narrow the interval.
    prompts = np.random.default_rng(1).normal(size=40)
    one = paired_bootstrap(prompts[None])
    many = paired_bootstrap(np.tile(prompts, (20, 1)))
    assert (many.low, many.high) == pytest.approx((one.low, one.high))


def test_weights_leave_cells_out():
    values = np.array([[1.0, 9.0, 3.0]])
    found = paired_bootstrap(values, np.array([[1.0, 0.0, 3.0]]))
    assert found.estimate == pytest.approx((1 + 9) / 4)  # (1 * 1 + 3 * 3) / 4
    assert 1 <= found.low <= found.high <= 3  # the prompt without weight is never drawn alone
    with pytest.raises(ValueError, match="nothing to compare"):
        paired_bootstrap(values, np.zeros((1, 3)))


def test_sparse_weights_give_no_nan():
    # Both cells have weight, but seed 0 with prompt 1 alone has none: such a draw is left out.
    found = paired_bootstrap(np.array([[1.0, 9.0], [9.0, 3.0]]), np.eye(2))
    assert (found.estimate, found.low, found.high) == (2, 1, 3)


def test_ratio_interval():
    below = np.random.default_rng(3).uniform(1, 2, size=300)
    fixed = ratio_interval(below / 2, below)  # half in every conversation: no resampling matters
    assert (fixed.estimate, fixed.low, fixed.high) == pytest.approx((0.5, 0.5, 0.5))
    above = below * 0.5 + np.random.default_rng(4).normal(0, 0.2, size=300)
    ours = ratio_interval(above, below)
    theirs = stats.bootstrap(
        (above, below),
        lambda a, b, axis: a.sum(axis) / b.sum(axis),
        paired=True,
        method="percentile",
        n_resamples=9999,
        rng=1,
    ).confidence_interval
    assert (ours.low, ours.high) == pytest.approx((theirs.low, theirs.high), abs=2e-3)


def test_auc():
    references, controls = np.array([3.0, 2.0, 2.0]), np.array([1.0, 2.0, 0.0])
    # Wins: 3 of 3 for the first; 2 and a tie for each of the others: (3 + 2.5 + 2.5) / 9.
    found = auc(references, controls)
    assert found.estimate == pytest.approx(8 / 9)
    u = stats.mannwhitneyu(references, controls).statistic
    assert found.estimate == pytest.approx(u / 9)
    assert found.low < 8 / 9 <= found.high <= 1
    perfect = auc(np.ones(5), np.zeros(5))
    assert (perfect.estimate, perfect.low, perfect.high) == (1, 1, 1)
    same = np.random.default_rng(0).normal(size=(2, 300))
    chance = auc(*same)
    assert chance.low < 0.5 < chance.high
