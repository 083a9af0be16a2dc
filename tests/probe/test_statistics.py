"""The two-level bootstrap against closed forms and brute force.

The other intervals and tests are scipy's; test_measures.py compares them with values by hand.
"""

from itertools import product

import numpy as np
import pytest

from evaluation.probe.statistics import paired_bootstrap


def test_bootstrap_over_prompts_has_the_exact_distribution():
    # Of two prompts with differences 0 and 1, the resampled mean is 0, 1/2, 1 with 1/4, 1/2, 1/4.
    assert paired_bootstrap(np.array([[0.0, 1.0]]), confidence=0.4) == (0.5, 0.5, 0.5)
    assert paired_bootstrap(np.array([[0.0, 1.0]]), confidence=0.6) == (0.5, 0, 1)


def test_two_level_bootstrap_agrees_with_enumeration():
    differences = np.array([[0.0, 1.0, 5.0], [2.0, -3.0, 4.0]])
    means = [  # every draw of two seeds and three prompts, equally likely
        np.mean([differences[s, p] for s in seeds for p in prompts])
        for seeds in product(range(2), repeat=2)
        for prompts in product(range(3), repeat=3)
    ]
    low, high = np.quantile(means, [0.1, 0.9])
    assert paired_bootstrap(differences, confidence=0.8) == pytest.approx((1.5, low, high), abs=0.2)


def test_prompts_are_the_same_for_every_seed():
    # Prompts differ much, seeds not at all: more seeds must not narrow the interval.
    prompts = np.random.default_rng(1).normal(size=40)
    one = paired_bootstrap(prompts[None])
    assert paired_bootstrap(np.tile(prompts, (20, 1))) == pytest.approx(one)


def test_weights_leave_cells_out():
    values = np.array([[1.0, 9.0, 3.0]])
    mean, low, high = paired_bootstrap(values, np.array([[1.0, 0.0, 3.0]]))
    assert mean == pytest.approx((1 + 9) / 4)  # (1 * 1 + 3 * 3) / 4
    assert 1 <= low <= high <= 3  # the prompt without weight is never drawn alone
    with pytest.raises(ValueError, match="nothing to compare"):
        paired_bootstrap(values, np.zeros((1, 3)))
    # Both cells have weight, but seed 0 with prompt 1 alone has none: such a draw is left out.
    assert paired_bootstrap(np.array([[1.0, 9.0], [9.0, 3.0]]), np.eye(2)) == (2, 1, 3)
