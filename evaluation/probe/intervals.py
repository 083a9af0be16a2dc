"""Intervals: how sure a share or a difference is.

scipy computes the intervals of shares. The two-level bootstrap is numpy code over resampling
counts: row d holds how often draw d takes each unit.
"""

from functools import lru_cache

import numpy as np
from scipy import stats

DRAWS = 10_000
CONFIDENCE = 0.95
SEEDS = (0, 1)  # of resampled seeds and prompts: the same data give the same interval


def share_interval(k: int, n: int, method: str = "wilson") -> tuple[float, float]:
    """Compute the 95% interval of a share of k in n; "exact" is that of Clopper and Pearson."""
    interval = stats.binomtest(k, n).proportion_ci(CONFIDENCE, method=method)
    return float(interval.low), float(interval.high)


@lru_cache(maxsize=32)  # a report cycles through some 20, at most 90 MB each
def resampling_counts(units: int, draws: int, seed: int) -> np.ndarray:
    """Count how often each draw takes each unit, (draws, units) float64."""
    generator = np.random.default_rng([seed, units])
    return generator.multinomial(units, np.full(units, 1 / units), draws).astype(np.float64)


def resample_means(sums: np.ndarray, weights: np.ndarray, seeds: tuple[int, int]) -> np.ndarray:
    """Return the mean in each draw: sums over weights of the rows and columns that it takes.

    Each draw takes rows (training or sampling seeds) and columns (prompts or clusters) with
    replacement, the same columns for every row: they are crossed (Owen 2007, "The pigeonhole
    bootstrap", arXiv 0712.1111). A draw without weight is nan. `sums` and `weights` are (rows,
    columns), `seeds` those of the resampling of rows and of columns.
    """
    of_rows, of_columns = (
        resampling_counts(units, DRAWS, seed) for units, seed in zip(sums.shape, seeds, strict=True)
    )
    total, weight = ((of_rows * (of_columns @ one.T)).sum(axis=1) for one in (sums, weights))
    return np.divide(total, weight, out=np.full(len(total), np.nan), where=weight > 0)


def paired_bootstrap(differences: np.ndarray, weights: np.ndarray) -> tuple[float, float, float]:
    """Compute a weighted mean difference over seeds and prompts, and its 95% percentile interval.

    With one seed, the interval says nothing about other seeds. A draw without weight is left out.

    `differences`, arm B minus A, and `weights`, such as tokens for a mean per token, are (seeds,
    prompts). Weight 0 leaves a cell out, but not all of them.
    """
    rows, columns = weights.any(axis=1), weights.any(axis=0)  # an empty one could be drawn alone
    weights = weights[rows][:, columns]
    sums = differences[rows][:, columns] * weights
    means = resample_means(sums, weights, SEEDS)
    low, high = np.nanquantile(means, [(1 - CONFIDENCE) / 2, (1 + CONFIDENCE) / 2])
    return float(sums.sum() / weights.sum()), float(low), float(high)
