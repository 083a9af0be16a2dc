"""The claims' rules: estimates that need more than a sum of shares, and verdicts."""

from itertools import product

import numpy as np
import pandas as pd
from scipy import stats

from evaluation.probe.statistics import DRAWS
from evaluation.study.analysis import Estimate, Evidence, draw_shares, estimate_sum, mark_answers
from evaluation.study.plan import Run
from evaluation.study.results import RESULTS_DIR
from evaluation.study.settings import MAIN_BASE, Claim, Condition

LEVELS = np.arange(0.40, 1.0, 0.05)  # of combinations, at which C9 compares unseen things
SKILL_RANGE = (0.40, 0.95)  # of full fine-tuning on a skill that C8 counts
FEWEST_BASES = 8  # of C12
SAMPLED = "t0.85p0.85"


def select_skills(evidence: Evidence, decoding: str, prompts: pd.DataFrame) -> pd.DataFrame:
    """Keep the prompts of skills on which full fine-tuning has 40 to 95% at every size."""
    for size in evidence.study.sizes:
        runs = evidence.find_cell("fft", size)
        if not runs.empty and not prompts.empty:
            marks = pd.Series(mark_answers(runs, prompts, decoding).mean(axis=0), prompts.index)
            shares = marks.groupby(prompts.skill).transform("mean")
            prompts = prompts[shares.between(*SKILL_RANGE)]
    return prompts


def list_paths(evidence: Evidence, arm: str, size: str) -> pd.DataFrame:
    """Return kept checkpoints and ends of an arm's runs from the main base, at every rate."""
    runs, base = evidence.runs, Run(size, MAIN_BASE).base_id
    runs = runs[(runs.arm == arm) & (runs.base == base) & (runs.status == "completed")]
    stems = runs.id.str.split("@").str[0]
    return runs[stems.isin(stems[runs.id.str.contains("@")])]


def draw_frontier(evidence: Evidence, arm: str, size: str, decoding: str) -> np.ndarray | None:
    """Return the best share of unseen things at each level of combinations: (draws, levels).

    The best is over checkpoints and rates whose share of combinations reaches the level; -inf where
    none does.
    """
    points = []
    for _, runs in list_paths(evidence, arm, size).groupby(["learning_rate", "step"]):
        sets = [evidence.choose_prompts(name) for name in ("combinations", "unseen")]
        points.append([draw_shares(mark_answers(runs, s, decoding), s, size) for s in sets])
    if not points:
        return None
    taught, unseen = np.moveaxis(np.array(points), 1, 0)
    return np.where(taught[:, :, None] >= LEVELS, unseen[:, :, None], -np.inf).max(axis=0)


def compare_frontiers(evidence: Evidence, size: str, decoding: str) -> dict[str, Estimate] | None:
    """Return all_r8's frontier minus full fine-tuning's, by level that both reach with each seed.

    None if a frontier was not run.
    """
    ours, full = (draw_frontier(evidence, arm, size, decoding) for arm in ("all_r8", "fft"))
    if ours is None or full is None:
        return None
    both = np.isfinite(ours) & np.isfinite(full)
    gaps = np.where(both, ours, np.nan) - full
    levels = np.flatnonzero(both[:-DRAWS].all(axis=0))
    return {f"all_r8 - fft at {LEVELS[one]:.2f}": Estimate.of(gaps[:, one]) for one in levels}


def list_endings(evidence: Evidence) -> pd.DataFrame:
    """Return, by base, the bound of the end token and the share of endless answers of all_r8.

    The first edition's bases are included where bases.csv names their bound.
    """
    rows = []
    for base in evidence.final[evidence.final.arm == "base"].itertuples():
        runs = evidence.find_cell(base.cell.replace("base", "all_r8"), base.size)
        if not runs.empty:
            marks = mark_answers(runs, evidence.choose_prompts("combinations"), SAMPLED, "endless")
            rows.append((base.id, evidence.study.edition, base.reachable_end, marks.mean()))
    first = pd.read_csv(RESULTS_DIR / "edition1.csv").query("kind == 'cell' and tuned == True")
    first = first.query("arm == 'all_r8' and variant == 'main'").dropna(subset="never_end_sampled")
    bounds = pd.read_csv(RESULTS_DIR / "bases.csv").set_index("base").reachable_end
    rows += [(one.base, 1, bounds[one.base], one.never_end_sampled) for one in first.itertuples()]
    return pd.DataFrame(rows, columns=["base", "edition", "bound", "endless"])


def correlate_endings(evidence: Evidence, bases: list[str]) -> dict[str, Estimate | None]:
    """Return the rank correlation of bound and endless answers, and the smallest ordered step.

    Args:
        bases: of xs; their shares of endless answers should rise in this order.
    """
    table = list_endings(evidence)
    found = stats.spearmanr(table.bound, table.endless).statistic
    shares = table.set_index("base").endless.reindex([Run("xs", name).base_id for name in bases])
    values = {"rank correlation": found if len(table) >= FEWEST_BASES else np.nan}
    values["smallest step"] = shares.diff().iloc[1:].min(skipna=False)
    return {
        key: None if np.isnan(one) else Estimate(*[float(one)] * 3) for key, one in values.items()
    }


# ---------------------------------------------------------------- verdicts


def is_satisfied(condition: Condition, found: Estimate) -> bool:
    """Say whether an estimate, and unless `whole` is off its interval and seeds, are in bounds."""
    values = [found.value] + [found.low, found.high, *found.by_seed] * condition.whole
    return min(values) >= condition.at_least and max(values) <= condition.at_most


def judge_condition(
    evidence: Evidence, claim: Claim, condition: Condition, size: str, decoding: str
) -> tuple[bool | None, list[dict]]:
    """Say whether a condition holds (None: not run), and list what it bounds."""
    found: dict[str, Estimate] | None = None
    bases = 1
    if evidence.prompts.empty:
        pass
    elif claim.kind == "frontier":
        found = compare_frontiers(evidence, size, decoding)
    elif claim.kind == "reachability":
        one = correlate_endings(evidence, claim.bases)[condition.estimate]
        found = {condition.estimate: one} if one else None
        bases = len(list_endings(evidence))
    else:
        prompts = evidence.choose_prompts("combinations")
        prompts = select_skills(evidence, decoding, prompts) if claim.middle_skills else prompts
        if not prompts.empty and (
            one := estimate_sum(evidence, condition, size, decoding, prompts)
        ):
            found, bases = {condition.title: one[0]}, one[1]
    place = {"claim": claim.name, "size": size, "decoding": decoding, "bases": bases}
    if found is None:
        return None, []
    rows = [place | {"estimate": text, "value": one} for text, one in found.items()]
    return bool(rows) and all(is_satisfied(condition, row["value"]) for row in rows), rows


def judge_claims(evidence: Evidence) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Return a row a claim with its verdict, and a row an estimate.

    A size of which nothing was run is left out, as long as another one was.
    """
    claims, estimates = [], []
    for claim in evidence.study.claims:
        sides: dict[str, list[bool | None]] = {"supported": [], "refuted": []}
        for side, met in sides.items():
            for condition in getattr(claim, side):
                sizes = condition.sizes or claim.sizes
                sizes = [s for s in sizes if s in set(evidence.final["size"])] or sizes
                for size, decoding in product(sizes, claim.decodings):
                    one, rows = judge_condition(evidence, claim, condition, size, decoding)
                    met.append(one)
                    estimates += rows
        is_met = {"supported": all(sides["supported"]), "refuted": all(sides["refuted"])}
        if claim.refuted_by == "any":
            is_met["refuted"] = any(sides["refuted"])
        conditions = sides["supported"] + sides["refuted"]
        verdicts = [side for side, holds in is_met.items() if holds]
        verdict = verdicts[0] if len(verdicts) == 1 else "open"
        if verdict == "open" and None in conditions:
            verdict = "open, not all run" if set(conditions) != {None} else "not run"
        row = {"claim": claim.name, "text": claim.text, "prediction": claim.prediction}
        claims.append(row | {"verdict": verdict})
    columns = ["claim", "estimate", "size", "decoding", "bases", "value"]
    table = pd.DataFrame(estimates, columns=columns).drop_duplicates(columns[:4])
    return pd.DataFrame(claims), table
