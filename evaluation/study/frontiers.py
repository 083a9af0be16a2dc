"""What is kept while something is learned: kept checkpoints, and the best of them at each level."""

import numpy as np
import pandas as pd

from evaluation.study.analysis import Evidence, compute_prompt_shares
from evaluation.study.plan import Run
from evaluation.study.settings import MAIN_BASE

PATH_ARMS = ("fft", "fft_mixed", "all_r8")  # whose checkpoints are compared
EXACT = 1e-9  # shares that differ by less are equal


def find_paths(
    evidence: Evidence, arm: str, size: str = "xs", start: str = "base", data: str | None = None
) -> pd.DataFrame:
    """Return kept checkpoints and ends of an arm's runs. A row is one of them, by rate and step.

    `data` is trained instead of the arm's own data. Runs that kept no checkpoint are left out.
    """
    wanted = {
        "arm": arm,
        "base": Run(size, MAIN_BASE).base_id,
        "start": start,
        "data": data or evidence.study.arms[arm].data,
        "status": "completed",
    }
    is_wanted = (evidence.runs[list(wanted)] == wanted).all(axis=1)
    runs = evidence.runs[is_wanted & evidence.runs.part.isna()]
    is_checkpoint = runs.id.str.contains("@")
    names = runs.id.str.split("@").str[0]  # of the run that a checkpoint belongs to
    kept = runs[names.isin(names[is_checkpoint])]
    return kept.sort_values(["learning_rate", "step"])


def list_points(
    evidence: Evidence, runs: pd.DataFrame, sets: tuple[str, str], decoding: str
) -> pd.DataFrame:
    """Return the shares of two sets that checkpoints reach, `taught` and `kept`.

    A row is a checkpoint of a rate: the mean of the seeds that every rate of `runs` has.
    """
    rates = runs.groupby(["arm", "learning_rate"]).seed.agg(set)
    seeds = set.intersection(*rates) if len(rates) else set()
    shared = runs[runs.seed.isin(seeds)]
    columns = {}
    for title, name in zip(("taught", "kept"), sets, strict=True):
        prompt_shares = compute_prompt_shares(shared, evidence.choose_prompts(name), decoding)
        columns[title] = prompt_shares.mean(axis=1) if len(shared) else []
    points = shared[["arm", "learning_rate", "step"]].assign(**columns)
    return points.groupby(["arm", "learning_rate", "step"], as_index=False).mean()


def find_frontier(points: pd.DataFrame, levels: np.ndarray) -> list[float]:
    """Return, for each level, the best kept share of the points that were taught so much.

    nan where no point reaches the level.
    """
    frontier = []
    for level in levels:
        reached = points.kept[points.taught >= level - EXACT]
        frontier.append(reached.max())
    return frontier
