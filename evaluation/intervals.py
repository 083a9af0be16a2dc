"""Statistics of a comparison: how sure a rate, a difference or a separation is.

What scipy has is taken from scipy. The two-level bootstrap and the AUC's interval, which it lacks,
are a few lines of numpy over resampling counts: row d says how often draw d takes each unit.

    python -m pytest tests/test_intervals.py
"""

from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from scipy import stats

DRAWS = 10_000
CONFIDENCE = 0.95
SEED = 0  # of the resampling: the same data give the same interval


@dataclass(frozen=True)
class Interval:
    """An estimate and the interval around it."""

    estimate: float
    low: float
    high: float


def percentile_interval(
    estimate: float, draws: np.ndarray, confidence: float = CONFIDENCE
) -> Interval:
    """The interval that holds the middle of some draws, (n,), around what was estimated."""
    low, high = np.quantile(draws, [(1 - confidence) / 2, (1 + confidence) / 2])
    return Interval(float(estimate), float(low), float(high))


def wilson_interval(k: int, n: int, confidence: float = CONFIDENCE) -> tuple[float, float]:
    """Wilson score interval of a rate of k in n; (0, 1) for n = 0. Wilson 1927, JASA 22:209.

    Raises:
        ValueError: not 0 <= k <= n.
    """
    if n == 0 and k == 0:
        return 0.0, 1.0
    interval = stats.binomtest(k, n).proportion_ci(confidence, method="wilson")
    return float(interval.low), float(interval.high)


def mcnemar(a: np.ndarray, b: np.ndarray) -> float:
    """Two-sided p-value of McNemar's exact test on paired outcomes, (n,) bool each.

    Of the pairs that differ, as many should fall either way: a binomial test of 1/2. 1 where no
    pair differs. McNemar 1947, Psychometrika 12:153.
    """
    only_a, only_b = int((a & ~b).sum()), int((b & ~a).sum())
    if only_a + only_b == 0:
        return 1.0
    return float(stats.binomtest(only_a, only_a + only_b).pvalue)


def most_unseen(n: int, confidence: float) -> float:
    """Upper end of the exact interval of a rate of which n trials showed not one (Clopper-Pearson).

    Near 3/n at 90%: what no pair of n showed may still happen. Resampling cannot tell this.
    """
    return float(stats.binomtest(0, n).proportion_ci(confidence, method="exact").high)


@lru_cache(maxsize=8)
def resampling_counts(units: int, draws: int, seed: int) -> np.ndarray:
    """(draws, units) float64: how often each of `units` is drawn when that many are drawn."""
    generator = np.random.default_rng([seed, units])
    counts = generator.multinomial(units, np.full(units, 1 / units), size=draws)
    return counts.astype(np.float64)


def paired_bootstrap(
    differences: np.ndarray,
    weights: np.ndarray | None = None,
    confidence: float = CONFIDENCE,
    draws: int = DRAWS,
    seed: int = SEED,
) -> Interval:
    """Percentile interval of a weighted mean difference between two arms, over seeds and prompts.

    Every draw takes seeds with replacement, and prompts with replacement, the same for both arms
    and the same prompts for every seed drawn: prompts are crossed with seeds, and drawing them anew
    for each seed would hide how much the result hangs on which prompts were asked (Owen 2007, "The
    pigeonhole bootstrap", arXiv 0712.1111). With a single seed only prompts are resampled, and the
    interval says nothing about other seeds. A draw without any weight has no mean and is left out.

    Args:
        differences: (seeds, prompts), arm A minus arm B.
        weights: (seeds, prompts), such as tokens for a mean per token; 0 leaves a cell out. By
            default every cell weighs 1.

    Raises:
        ValueError: no cell has weight.
    """
    weights = np.ones_like(differences, dtype=np.float64) if weights is None else weights
    rows, columns = weights.any(axis=1), weights.any(axis=0)  # an empty one could be drawn alone
    if not rows.any():
        raise ValueError("nothing to compare: every cell has weight 0")
    weights = weights[rows][:, columns]
    sums = differences[rows][:, columns] * weights
    of_seeds = resampling_counts(len(sums), draws, seed)
    of_prompts = resampling_counts(sums.shape[1], draws, seed + 1)
    totals = (of_seeds * (of_prompts @ sums.T)).sum(axis=1)
    weight = (of_seeds * (of_prompts @ weights.T)).sum(axis=1)
    drawn = weight > 0
    means = totals[drawn] / weight[drawn]
    return percentile_interval(sums.sum() / weights.sum(), means, confidence)


def ratio_interval(numerators: np.ndarray, denominators: np.ndarray) -> Interval:
    """Percentile interval of sum(numerators) / sum(denominators), (n,) each, over their units.

    Both are resampled together. The denominators' sum must be well above 0, in every draw too.
    """
    counts = resampling_counts(len(numerators), DRAWS, SEED)
    ratios = (counts @ numerators) / (counts @ denominators)
    return percentile_interval(numerators.sum() / denominators.sum(), ratios)


def auc(
    references: np.ndarray,
    controls: np.ndarray,
    confidence: float = CONFIDENCE,
    draws: int = DRAWS,
    seed: int = SEED,
) -> Interval:
    """P(reference > control) + P(equal) / 2 over all pairs, and its paired percentile interval.

    The area under the ROC curve, Mann-Whitney's U / n^2: 1/2 where a measure cannot tell the two
    apart. Element i of both, (n,) each, belongs to prompt i; prompts are resampled.
    """
    above = references[:, None] > controls[None, :]
    wins = above + (references[:, None] == controls[None, :]) / 2
    share = resampling_counts(len(references), draws, seed) / len(references)
    values = ((share @ wins) * share).sum(axis=1)
    return percentile_interval(wins.mean(), values, confidence)
