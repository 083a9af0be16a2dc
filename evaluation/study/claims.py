"""The claims' rules: estimates that need more than a sum of shares, and verdicts."""

from itertools import product

import numpy as np
import pandas as pd
from scipy import special, stats

from evaluation.study.analysis import (
    Estimate,
    Evidence,
    choose_prompts,
    draw_shares,
    estimate_sum,
    find_cell,
    make_estimate,
    mark_answers,
)
from evaluation.study.plan import Run
from evaluation.study.results import RESULTS_DIR
from evaluation.study.settings import MAIN_BASE, Claim, Condition

LEVELS = np.arange(0.40, 1.0, 0.05)  # of combinations, at which C9 compares unseen things
SKILL_RANGE = (0.40, 0.95)  # of full fine-tuning on a skill that C8 counts
FEWEST_BASES = 8  # of C12


def select_skills(evidence: Evidence, decoding: str, prompts: pd.DataFrame) -> pd.DataFrame:
    """Keep the prompts of skills on which full fine-tuning has 40 to 95% at every size."""
    kept = set(prompts.skill)
    for size in evidence.study.sizes:
        runs = find_cell(evidence, "fft", size)
        if not runs.empty:
            marks = mark_answers(runs, prompts, decoding, "correct").mean(axis=0)
            shares = pd.Series(marks, prompts.index).groupby(prompts.skill).mean()
            kept &= set(shares[shares.between(*SKILL_RANGE)].index)
    return prompts[prompts.skill.isin(kept)]


def to_log_odds(shares: np.ndarray) -> np.ndarray:
    """Return log(p / (1 - p)), with p kept half a prompt of 1,000 away from 0 and 1."""
    return special.logit(np.clip(shares, 5e-4, 1 - 5e-4))


def is_clear_gap(
    evidence: Evidence, text: str, decoding: str, prompts: pd.DataFrame, gap: float
) -> bool:
    """Say whether a difference of gaps is more than chance of a base, and holds in log-odds.

    It must be above twice the spread of the two xs bases, and its log-odds above 0.
    """
    texts = [f"fft@{base} - all_r8@{base}" for base in (MAIN_BASE, "wrapped43")]
    gaps = [estimate_sum(evidence, one, "xs", decoding, prompts) for one in texts]
    odds = estimate_sum(evidence, text, "xs", decoding, prompts, to_log_odds)
    return all(gaps) and gap > 2 * abs(gaps[0].value - gaps[1].value) and odds.low > 0


def list_paths(evidence: Evidence, arm: str, size: str) -> pd.DataFrame:
    """Return kept checkpoints and ends of an arm's runs from the main base, at every rate."""
    runs, base = evidence.runs, Run(size, MAIN_BASE).base_id
    runs = runs[(runs.arm == arm) & (runs.base == base) & (runs.status == "completed")]
    stems = runs.id.str.split("@").str[0]
    return runs[stems.isin(stems[runs.id.str.contains("@")])]


def draw_frontier(evidence: Evidence, arm: str, size: str, decoding: str) -> np.ndarray | None:
    """Return the best share of unseen things at each level of combinations: (1 + DRAWS, levels).

    The best is over checkpoints and rates whose share of combinations reaches the level.
    """
    runs = list_paths(evidence, arm, size)
    if runs.empty:
        return None
    points = []
    for _, point in runs.groupby(["learning_rate", "step"]):
        draws = []
        for name in ("combinations", "unseen"):
            prompts = choose_prompts(evidence, name)
            marks = mark_answers(point.sort_values("seed"), prompts, decoding, "correct")
            draws.append(draw_shares(marks, prompts, size))
        points.append(draws)
    taught, unseen = np.moveaxis(np.array(points), 1, 0)
    reached = taught[:, :, None] >= LEVELS
    return np.where(reached, unseen[:, :, None], np.nan_to_num(-np.inf)).max(axis=0)


def compare_frontiers(evidence: Evidence, size: str, decoding: str) -> dict[str, Estimate]:
    """Return all_r8's frontier minus full fine-tuning's, by level that both reach."""
    ours, full = (draw_frontier(evidence, arm, size, decoding) for arm in ("all_r8", "fft"))
    if ours is None or full is None:
        return {}
    gaps = {}
    for level in np.flatnonzero((ours[0] >= 0) & (full[0] >= 0)):
        draws = ours[:, level] - full[:, level]
        inside = (ours[:, level] >= 0) & (full[:, level] >= 0)  # draws in which both reach it
        gaps[f"all_r8 - fft at {LEVELS[level]:.2f}"] = make_estimate(draws[inside], [])
    return gaps


def list_endings(evidence: Evidence) -> pd.DataFrame:
    """Return, by base, the bound of the end token and the share of endless answers of all_r8.

    The first edition's bases are included where bases.csv names their bound.
    """
    rows = []
    prompts = choose_prompts(evidence, "combinations") if len(evidence.prompts) else None
    for base in evidence.final[evidence.final.arm == "base"].itertuples():
        name = base.id.rpartition("-")[2]
        runs = find_cell(evidence, f"all_r8@{name}", base.size)
        if not runs.empty:
            marks = mark_answers(runs, prompts, "t0.85p0.85", "endless")
            rows.append((base.id, evidence.study.edition, base.reachable_end, marks.mean()))
    first = pd.read_csv(RESULTS_DIR / "edition1.csv").query("kind == 'cell' and tuned == True")
    first = first.query("arm == 'all_r8' and variant == 'main'").dropna(subset="never_end_sampled")
    bounds = pd.read_csv(RESULTS_DIR / "bases.csv").set_index("base")
    if "reachable_end" in bounds:
        for row in first.itertuples():
            rows.append((row.base, 1, bounds.reachable_end[row.base], row.never_end_sampled))
    return pd.DataFrame(rows, columns=["base", "edition", "bound", "endless"])


# ---------------------------------------------------------------- claims


def is_satisfied(condition: Condition, found: Estimate) -> bool:
    """Say whether the whole interval and every seed satisfy a condition."""
    values = (found.low, found.high, *found.by_seed)
    return min(values) >= condition.at_least and max(values) <= condition.at_most


def estimate_condition(
    evidence: Evidence, claim: Claim, condition: Condition, size: str, decoding: str
) -> dict[str, Estimate | None]:
    """Return what a condition bounds, by its name; of a frontier one estimate a level."""
    text = condition.estimate
    if claim.kind == "capacity" or evidence.prompts.empty:
        return {text: None}
    if claim.kind == "frontier":
        return compare_frontiers(evidence, size, decoding) or {text: None}
    if claim.kind == "reachability":
        table = list_endings(evidence)
        if len(table) < FEWEST_BASES:
            return {text: None}
        value = float(stats.spearmanr(table.bound, table.endless).statistic)
        return {text: Estimate(value, value, value)}
    prompts = choose_prompts(evidence, claim.set)
    if claim.kind == "size gap":
        prompts = select_skills(evidence, decoding, prompts)
        if prompts.empty:
            return {text: None}
    return {text: estimate_sum(evidence, text, size, decoding, prompts)}


def judge_side(evidence: Evidence, claim: Claim, side: str) -> tuple[list[bool | None], list[dict]]:
    """Say of each condition of a side whether it holds (None: not run), and list its estimates."""
    met, rows = [], []
    for condition in getattr(claim, side):
        places = product(condition.sizes or claim.sizes, claim.decodings)
        for size, decoding in places:
            found = estimate_condition(evidence, claim, condition, size, decoding)
            place = {"claim": claim.name, "size": size, "decoding": decoding}
            rows += [place | {"estimate": text, "value": one} for text, one in found.items()]
            if None in found.values():
                met.append(None)
                continue
            met.append(all(is_satisfied(condition, one) for one in found.values()))
            if met[-1] and claim.kind == "size gap" and side == "supported":
                prompts = choose_prompts(evidence, claim.set)
                prompts = select_skills(evidence, decoding, prompts)
                ((text, gap),) = found.items()
                met[-1] = is_clear_gap(evidence, text, decoding, prompts, gap.value)
    return met, rows


def judge_claims(evidence: Evidence) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Return a row a claim with its verdict, and a row an estimate."""
    claims, estimates = [], []
    for claim in evidence.study.claims:
        sides = {}
        for side in ("supported", "refuted"):
            sides[side], rows = judge_side(evidence, claim, side)
            estimates += rows
        found = [value for met in sides.values() for value in met]
        verdict = "not run" if all(value is None for value in found) else "open"
        for side, met in sides.items():
            verdict = side if met and all(met) else verdict
        if verdict == "open" and None in found:
            verdict = "open, not all run"
        row = {"claim": claim.name, "text": claim.text, "prediction": claim.prediction}
        claims.append(row | {"verdict": verdict})
    columns = ["claim", "estimate", "size", "decoding", "value"]
    table = pd.DataFrame(estimates, columns=columns).drop_duplicates(columns[:-1])
    return pd.DataFrame(claims), table
