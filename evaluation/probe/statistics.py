"""Intervals and tests: how sure a share or a difference is.

Wilson's interval and McNemar's test are scipy's. scipy lacks the two-level bootstrap: here it is a
few lines of numpy over resampling counts, whose row d counts how often draw d takes each unit.
"""

from functools import lru_cache

import numpy as np
from scipy import stats

DRAWS = 10_000
CONFIDENCE = 0.95
SEED = 0  # of the resampling: the same data give the same interval


def wilson_interval(k: int, n: int) -> tuple[float, float]:
    """Compute the 95% Wilson score interval of a share of k in n."""
    interval = stats.binomtest(k, n).proportion_ci(CONFIDENCE, method="wilson")
    return float(interval.low), float(interval.high)


def mcnemar(a: np.ndarray, b: np.ndarray) -> float:
    """Compute the two-sided p-value of McNemar's exact test on paired outcomes, (n,) bool each."""
    only_a, only_b = int((a & ~b).sum()), int((b & ~a).sum())
    return float(stats.binomtest(only_a, only_a + only_b).pvalue) if only_a + only_b else 1.0


def most_unseen(n: int) -> float:
    """Bound a share that none of n trials showed (Clopper-Pearson); resampling gives 0 there."""
    return float(stats.binomtest(0, n).proportion_ci(CONFIDENCE, method="exact").high)


@lru_cache(maxsize=8)
def resampling_counts(units: int, draws: int = DRAWS, seed: int = SEED) -> np.ndarray:
    """Count how often each draw takes each unit, (draws, units) float64."""
    generator = np.random.default_rng([seed, units])
    counts = generator.multinomial(units, np.full(units, 1 / units), size=draws)
    return counts.astype(np.float64)


def paired_bootstrap(
    differences: np.ndarray, weights: np.ndarray | None = None, confidence: float = CONFIDENCE
) -> tuple[float, float, float]:
    """Compute a weighted mean difference over seeds and prompts, and its percentile interval.

    Each draw takes seeds with replacement, and prompts with replacement, the same prompts for every
    seed: prompts are crossed with seeds (Owen 2007, "The pigeonhole bootstrap", arXiv 0712.1111).
    With one seed, the interval says nothing about other seeds. A draw without weight is left out.

    Args:
        differences: (seeds, prompts), arm A minus arm B.
        weights: (seeds, prompts), such as tokens for a mean per token; 0 leaves a cell out, but
            not all of them.
    """
    weights = np.ones_like(differences, dtype=np.float64) if weights is None else weights
    rows, columns = weights.any(axis=1), weights.any(axis=0)  # an empty one could be drawn alone
    if not rows.any():
        raise ValueError("nothing to compare: every cell has weight 0")
    weights = weights[rows][:, columns]
    sums = differences[rows][:, columns] * weights
    of_seeds = resampling_counts(len(sums))
    of_prompts = resampling_counts(sums.shape[1], seed=SEED + 1)
    totals = (of_seeds * (of_prompts @ sums.T)).sum(axis=1)
    weight = (of_seeds * (of_prompts @ weights.T)).sum(axis=1)
    drawn = weight > 0
    means = totals[drawn] / weight[drawn]
    low, high = np.quantile(means, [(1 - confidence) / 2, (1 + confidence) / 2])
    return float(sums.sum() / weights.sum()), float(low), float(high)
