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
    """Return the mean in each draw, (draws,): sums over weights of what the draw takes.

    Each draw takes rows (training or sampling seeds) and columns (prompts or clusters) with
    replacement, the same columns for every row: they are crossed (Owen 2007, "The pigeonhole
    bootstrap", arXiv 0712.1111). Columns drawn anew for each row would hide that a prompt which is
    hard for one seed is hard for all, and the interval would be too narrow.

    Args:
        sums: (rows, columns), what is added up in each cell.
        weights: (rows, columns), such as the number of answers or tokens in each cell.
        seeds: of the resampling of rows and of columns. They differ, so that rows and columns are
            drawn apart where there are as many of both.
    """
    row_count, column_count = sums.shape
    row_seed, column_seed = seeds
    row_counts = resampling_counts(row_count, DRAWS, row_seed)
    column_counts = resampling_counts(column_count, DRAWS, column_seed)
    # (draws, rows) each: the columns of a draw first, then its rows.
    sums_of_rows = column_counts @ sums.T
    weights_of_rows = column_counts @ weights.T
    totals = (row_counts * sums_of_rows).sum(axis=1)
    total_weights = (row_counts * weights_of_rows).sum(axis=1)
    means = np.full(DRAWS, np.nan)  # stays nan in a draw without weight
    return np.divide(totals, total_weights, out=means, where=total_weights > 0)


def paired_bootstrap(differences: np.ndarray, weights: np.ndarray) -> tuple[float, float, float]:
    """Compute a weighted mean difference over seeds and prompts, and its 95% percentile interval.

    With one seed, the interval says nothing about other seeds. A draw without weight is left out.

    Args:
        differences: (seeds, prompts), arm B minus A, in the unit of the measure.
        weights: (seeds, prompts), such as tokens for a mean per token. Weight 0 leaves a cell out,
            but not all of them.
    """
    # A seed or a prompt without any weight could be drawn alone.
    is_row_used = weights.any(axis=1)
    is_column_used = weights.any(axis=0)
    differences = differences[is_row_used][:, is_column_used]
    weights = weights[is_row_used][:, is_column_used]
    sums = differences * weights
    means = resample_means(sums, weights, SEEDS)
    ends = [(1 - CONFIDENCE) / 2, (1 + CONFIDENCE) / 2]
    low, high = np.nanquantile(means, ends)
    mean = sums.sum() / weights.sum()
    return float(mean), float(low), float(high)
