"""Judge claims and gates; compute C9's frontiers and C12's correlation."""

import re
from itertools import product

import numpy as np
import pandas as pd
from scipy import stats

from evaluation.probe.statistics import DRAWS
from evaluation.study.analysis import Estimate, Evidence, draw_shares, estimate_sum, mark_answers
from evaluation.study.plan import Run
from evaluation.study.settings import MAIN_BASE, RESULTS_DIR, Claim, Condition

LEVELS = np.arange(8, 20) / 20  # of combinations, at which C9 compares unseen things
SKILL_RANGE = (0.40, 0.95)  # of full fine-tuning on a skill that C8 counts
PATH_ARMS = ("fft", "fft_mixed", "all_r8")  # whose checkpoints C9 compares
FEWEST_BASES = 8  # of C12
SAMPLED = "t0.85p0.85"


def select_skills(evidence: Evidence, decoding: str, prompts: pd.DataFrame) -> pd.DataFrame:
    """Keep the prompts of skills on which full fine-tuning has 40 to 95% at every size."""
    for size in evidence.study.sizes:
        runs = evidence.find_cell("fft", size)
        if not runs.empty and not prompts.empty:
            marks = pd.Series(mark_answers(runs, prompts, decoding).mean(axis=0), prompts.index)
            shares = marks.groupby(prompts.skill).transform("mean")
            prompts = prompts[shares.round(9).between(*SKILL_RANGE)]
    return prompts


def find_paths(
    evidence: Evidence, arm: str, size: str = "xs", start: str = "base", data: str | None = None
) -> pd.DataFrame:
    """Return kept checkpoints and ends of an arm's runs by rate; `data` instead of its own."""
    data, base = data or evidence.study.arms[arm].data, Run(size, MAIN_BASE).base_id
    wanted = {"arm": arm, "base": base, "start": start, "data": data, "status": "completed"}
    is_wanted = (evidence.runs[list(wanted)] == wanted).all(axis=1) & evidence.runs.part.isna()
    runs = evidence.runs[is_wanted]
    stems = runs.id.str.split("@").str[0]
    return runs[stems.isin(stems[runs.id.str.contains("@")])].sort_values(["learning_rate", "step"])


def trace_frontiers(
    evidence: Evidence,
    decoding: str,
    arms: tuple[str, ...],
    size: str = "xs",
    sets: tuple[str, str] = ("combinations", "unseen"),
    start: str = "base",
    data: str | None = None,
    levels: np.ndarray = LEVELS,
) -> dict[str, np.ndarray]:
    """Return arms' frontiers, (1 + seeds + draws, levels): of all seeds, each seed, each draw.

    A frontier is the best share of the second set, over checkpoints and rates whose share of the
    first set reaches the level; -inf where none does. Seeds that a rate lacks are left out.
    """
    chosen, frontiers = [evidence.choose_prompts(name) for name in sets], {}
    paths = {arm: find_paths(evidence, arm, size, start, data) for arm in arms}
    rates = [one for runs in paths.values() for _, one in runs.groupby("learning_rate")]
    seeds = set.intersection(*(set(one.seed) for one in rates)) if rates else set()
    for arm, runs in paths.items():
        groups = runs[runs.seed.isin(seeds)].groupby(["learning_rate", "step"])
        points = [
            [draw_shares(mark_answers(group, one, decoding), one, size) for one in chosen]
            for _, group in groups
            if len(group) == len(seeds)
        ]
        if points:
            taught, kept = np.moveaxis(np.array(points), 1, 0)
            reached = np.where(taught[:, :, None] >= levels - 1e-9, kept[:, :, None], -np.inf)
            frontiers[arm] = reached.max(axis=0)
    return frontiers


def compare_frontiers(evidence: Evidence, size: str, decoding: str) -> dict[str, Estimate] | None:
    """Return all_r8's frontier minus fft's by level that each seed reaches; None if not run."""
    frontiers = trace_frontiers(evidence, decoding, ("all_r8", "fft"), size)
    if len(frontiers) < 2:
        return None
    ours, full = frontiers["all_r8"], frontiers["fft"]
    both = np.isfinite(ours) & np.isfinite(full)
    gaps = np.where(both, ours, np.nan) - full
    levels = np.flatnonzero(both[:-DRAWS].all(axis=0))
    return {f"at {LEVELS[one]:.2f}": Estimate.of(gaps[:, one]) for one in levels}


def list_endings(evidence: Evidence) -> pd.DataFrame:
    """Return, by base, the bound of the end token and the share of endless answers of all_r8."""
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


def correlate_endings(evidence: Evidence, bases: list[str]) -> dict[str, Estimate]:
    """Return the rank correlation of bound and endless answers, and the smallest ordered step.

    `bases` are of xs; their shares of endless answers should rise in this order.
    """
    table = list_endings(evidence)
    found = stats.spearmanr(table.bound, table.endless).statistic
    shares = table.set_index("base").endless.reindex([Run("xs", name).base_id for name in bases])
    values = {"rank correlation": found if len(table) >= FEWEST_BASES else np.nan}
    values["smallest step"] = shares.diff().iloc[1:].min(skipna=False)
    return {key: Estimate(*[float(one)] * 3) for key, one in values.items() if not np.isnan(one)}


def lies_within(found: Estimate, low: float, high: float, whole: bool = True) -> bool:
    """Say if an estimate lies in bounds, 1e-9 aside; if `whole`, its interval and seeds as well."""
    values = [found.value] + [found.low, found.high, *found.by_seed] * whole
    return low - 1e-9 <= min(values) and max(values) <= high + 1e-9


def estimate_claim(
    evidence: Evidence, claim: Claim, condition: Condition, place: tuple[str, str, str]
) -> tuple[dict[str, Estimate] | None, int]:
    """Return estimates by their names (None: not run), and on how many bases they rest."""
    (estimate, size, decoding), prompts = place, evidence.choose_prompts("combinations")
    if claim.kind == "frontier":
        return compare_frontiers(evidence, size, decoding), 1
    if claim.kind == "reachability":
        found = {k: v for k, v in correlate_endings(evidence, claim.bases).items() if k == estimate}
        return found or None, len(list_endings(evidence))
    if claim.middle_skills:
        prompts = select_skills(evidence, decoding, prompts)
    found = None if prompts.empty else estimate_sum(evidence, condition, place, prompts)
    scale = "log-odds" if condition.log_odds else condition.scalar
    name = f"{estimate}, {scale}" if scale else estimate
    return ({name: found[0]}, found[1]) if found else (None, 1)


def judge_claim(evidence: Evidence, claim: Claim) -> tuple[str, set[str], list[tuple]]:
    """Return a claim's verdict by its rule alone, the sizes that it is about, and its estimates.

    A size of which nothing was run is left out, as long as another one was.
    """
    estimates, about = [], set()
    met: dict[str, list[bool | None]] = {"supported": [], "refuted": []}
    missed = []  # whether an estimate is wholly out of bounds
    begun = set(evidence.final["size"][evidence.final.arm != "base"])
    for side, condition in [(s, one) for s in met for one in getattr(claim, s)]:
        low, high = condition.at_least, condition.at_most
        sizes = condition.sizes or claim.sizes
        sizes = [s for s in sizes if s in begun] or sizes
        about.update(sizes, re.findall(r":(\w+)", " ".join(condition.estimates)))
        for place in product(condition.estimates, sizes, claim.decodings):
            found, bases = estimate_claim(evidence, claim, condition, place)
            own = ", ".join(dict.fromkeys(re.findall(r":(\w+)", place[0]))) or place[1]
            met[side].append(None if found is None else bool(found))
            for name, one in (found or {}).items():
                estimates.append((claim.name, name, own, place[2], bases, one))
                met[side][-1] &= lies_within(one, low, high, condition.whole)
                below, above = low - 3e-9, high + 3e-9
                missed.append(lies_within(one, -np.inf, below) or lies_within(one, above, np.inf))
    is_refuted = all(met["refuted"]) if claim.refuted else any(missed)
    conditions = met["supported"] + met["refuted"]
    sides = {"supported": all(met["supported"]), "refuted": is_refuted}
    verdicts = [side for side, holds in sides.items() if holds]
    verdict = verdicts[0] if len(verdicts) == 1 else "open"
    if verdict == "open" and None in conditions:
        verdict = "not all run" if set(conditions) != {None} else "not run"
    return verdict, about, estimates


def judge_gates(evidence: Evidence) -> pd.DataFrame:
    """Return a row a gate and estimate on the tuning half: whether it `holds`, fails or waits."""
    rows, states = [], {"supported": "holds", "not run": "not run", "not all run": "not run"}
    for gate in evidence.study.gates:
        verdict, _, estimates = judge_claim(evidence, gate)
        values = ", ".join(f"{name} {one.value:.3f}" for _, name, *_, one in estimates)
        words = gate.name, gate.text, *gate.sizes, values.replace(", tune_correct", "")
        rows.append((*words, states.get(verdict, "fails")))
    return pd.DataFrame(rows, columns=["gate", "text", "size", "tuning half", "state"])


def judge_claims(evidence: Evidence) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Return one row per claim (verdict, fewest seeds, most bases), and one per estimate.

    A claim gets no conclusion if a gate of one of its sizes does not hold.
    """
    claims, estimates, gates = [], [], judge_gates(evidence)
    for claim in evidence.study.claims:
        verdict, sizes, found = judge_claim(evidence, claim)
        shut = gates[gates["size"].isin(sizes) & (gates.state != "holds")]
        if verdict in ("supported", "refuted", "open") and not shut.empty:
            verdict = f"no conclusion: {', '.join(shut.gate + ' ' + shut.state)}"
        row = {"claim": claim.name, "text": claim.text, "prediction": claim.prediction}
        seeds = min((len(one.by_seed) for *_, one in found), default=0) or "-"
        bases = max((count for *_, count, _ in found), default="-")
        claims.append(row | {"verdict": verdict, "seeds": seeds, "bases": bases})
        estimates += found
    columns = ["claim", "estimate", "size", "decoding", "bases", "value"]
    table = pd.DataFrame(estimates, columns=columns).drop_duplicates(columns[:4])
    return pd.DataFrame(claims), table
