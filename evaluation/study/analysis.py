"""What the second edition's runs say: shares of correct answers, intervals, verdicts of claims.

The unit is a prompt in a cluster (its thing, or thing and skill) and a training seed. Each draw of
the bootstrap takes seeds and clusters with replacement, the same for all arms that are compared.
Row 0 of the draws is the estimate itself. Prompts of the test half alone are counted.
"""

import re
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from itertools import product
from pathlib import Path

import numpy as np
import pandas as pd
from scipy import special, stats

from evaluation.probe.statistics import DRAWS, resampling_counts
from evaluation.study.plan import MAIN_BASE, Claim, Condition, Run, Study, list_rates, read_study
from evaluation.study.results import LETTERS, RESULTS_DIR, read_nll, read_runs

LEVELS = np.arange(0.40, 1.0, 0.05)  # of combinations, at which C9 compares unseen things
SKILL_RANGE = (0.40, 0.95)  # of full fine-tuning on a skill that C8 counts
FEWEST_BASES = 8  # of C12
TERM = re.compile(
    r"(?P<arm>\w+)(\*(?P<rate>[\d.e-]+))?(/(?P<epochs>[\d.]+))?(@(?P<base>\w+))?"
    r"(\^(?P<start>\w+))?(#(?P<data>\w+))?(:(?P<size>\w+))?"
)
PLACE = ["size", "base", "start", "data", "arm", "epochs", "samples", "learning_rate"]


@dataclass(frozen=True)
class Evidence:
    """The study, its runs (final checkpoints and kept ones) and its prompts."""

    study: Study
    runs: pd.DataFrame
    prompts: pd.DataFrame
    folder: Path

    @property
    def final(self) -> pd.DataFrame:
        """Return the completed runs, without kept checkpoints."""
        done = self.runs.id.str.contains("@") | (self.runs.status != "completed")
        return self.runs[~done]


@dataclass(frozen=True)
class Estimate:
    """A number with its interval, and its value for each seed alone."""

    value: float
    low: float
    high: float
    by_seed: tuple[float, ...] = ()

    def __str__(self) -> str:
        return f"{self.value:.2f} [{self.low:.2f}, {self.high:.2f}]"


def load_evidence(folder: Path = RESULTS_DIR) -> Evidence:
    """Read study.toml, the runs of its edition and the prompts."""
    study = read_study()
    path = folder / "prompts.csv"
    prompts = pd.read_csv(path, keep_default_na=False) if path.is_file() else pd.DataFrame()
    return Evidence(study, read_runs(folder, study.edition), prompts, folder)


# ---------------------------------------------------------------- cells


def find_cell(evidence: Evidence, term: str, size: str) -> pd.DataFrame:
    """Return the runs of a cell, one a seed; empty if it was not run.

    Args:
        term: arm[*rate][/epochs][@base][^start][#data][:size]
        size: where the term names none.
    """
    found = TERM.fullmatch(term)
    if found is None or found["arm"] not in evidence.study.arms:
        raise ValueError(f"{term!r} is no cell of study.toml")
    arm, size = found["arm"], found["size"] or size
    rates = [float(found["rate"])] if found["rate"] else []
    rates = rates or list_rates(evidence.study, size, arm, evidence.runs)
    place = {
        "size": size,
        "base": Run(size, found["base"] or MAIN_BASE).base_id,
        "arm": arm,
        "epochs": float(found["epochs"] or evidence.study.sizes[size].epochs),
        "start": found["start"] or "base",
        "data": found["data"] or evidence.study.arms[arm].data,
    }
    runs = evidence.final
    if runs.empty or not rates:
        return runs.iloc[:0]
    matches = runs[list(place)].eq(pd.Series(place)).all(axis=1)
    return runs[matches & runs.learning_rate.isin(rates)].sort_values("seed")


def choose_prompts(evidence: Evidence, name: str) -> pd.DataFrame:
    """Return the test prompts of a set, with their place in the outcome strings."""
    of_set = evidence.prompts[evidence.prompts["set"] == name].reset_index(drop=True)
    return of_set[of_set.half == "test"]


def mark_answers(runs: pd.DataFrame, prompts: pd.DataFrame, decoding: str, kind: str) -> np.ndarray:
    """Return the share of draws whose answer is of a kind: (runs, prompts).

    Args:
        kind: one of dataset.checks.KINDS.
    """
    (name,) = prompts["set"].unique()
    marks = []
    for outcomes in runs.outcomes:
        draws = np.array([list(draw) for draw in outcomes[name][decoding].split()])
        marks.append((draws[:, prompts.index] == LETTERS[kind]).mean(axis=0))
    return np.array(marks).reshape(len(runs), len(prompts))


def sum_clusters(marks: np.ndarray, prompts: pd.DataFrame) -> tuple[np.ndarray, np.ndarray]:
    """Return sums of marks, (runs, clusters), and prompts a cluster, (clusters,)."""
    codes, names = pd.factorize(prompts.cluster)
    members = np.eye(len(names))[codes]
    return marks @ members, members.sum(axis=0)


# ---------------------------------------------------------------- bootstrap


@cache
def draw_counts(units: int, stream: str) -> np.ndarray:
    """Return how often each draw takes each unit, after a row of ones: (1 + DRAWS, units)."""
    counts = resampling_counts(units, DRAWS, zlib.crc32(stream.encode()))
    return np.vstack([np.ones(units), counts])


def draw_shares(marks: np.ndarray, prompts: pd.DataFrame, size: str) -> np.ndarray:
    """Return the share in each draw, (1 + DRAWS,), of marks (seeds, prompts)."""
    sums, counts = sum_clusters(marks, prompts)
    of_clusters = draw_counts(len(counts), prompts["set"].iloc[0])
    of_seeds = draw_counts(len(marks), f"seeds {size}")
    total = (of_seeds * (of_clusters @ sums.T)).sum(axis=1)
    return total / (of_seeds.sum(axis=1) * (of_clusters @ counts))


def make_estimate(draws: np.ndarray, by_seed: list[float]) -> Estimate:
    """Return the estimate (draw 0) with its 95% percentile interval."""
    low, high = np.quantile(draws[1:], [0.025, 0.975])
    return Estimate(float(draws[0]), float(low), float(high), tuple(by_seed))


def parse_estimate(text: str) -> list[tuple[float, str]]:
    """Split `a - 0.5 b` into factors and terms."""
    terms, sign, factor = [], 1.0, 1.0
    for word in text.split():
        if word in "+-":
            sign = 1.0 if word == "+" else -1.0
        elif re.fullmatch(r"[\d.]+", word):
            factor = float(word)
        else:
            terms.append((sign * factor, word))
            sign, factor = 1.0, 1.0
    return terms


def keep_shares(shares: np.ndarray) -> np.ndarray:
    """Return shares as they are: the scale of points."""
    return shares


def to_log_odds(shares: np.ndarray) -> np.ndarray:
    """Return log(p / (1 - p)), with p kept half a prompt of 1,000 away from 0 and 1."""
    return special.logit(np.clip(shares, 5e-4, 1 - 5e-4))


def estimate_sum(
    evidence: Evidence,
    text: str,
    size: str,
    decoding: str,
    prompts: pd.DataFrame,
    scale: Callable[[np.ndarray], np.ndarray] = keep_shares,
) -> Estimate | None:
    """Estimate a sum of cells' shares of correct answers; None if a cell was not run.

    Cells of one size are compared over the seeds that all of them have.
    """
    terms = [(factor, find_cell(evidence, term, size)) for factor, term in parse_estimate(text)]
    if any(runs.empty for _, runs in terms):
        return None
    common: dict[str, set] = {}
    for _, runs in terms:
        of_size = runs["size"].iloc[0]
        common[of_size] = common.get(of_size, set(runs.seed)) & set(runs.seed)
    if not all(common.values()):
        return None
    draws, fewest = 0.0, min(len(seeds) for seeds in common.values())
    by_seed = np.zeros(fewest)
    for factor, runs in terms:
        of_size = runs["size"].iloc[0]
        kept = runs[runs.seed.isin(common[of_size])]
        marks = mark_answers(kept, prompts, decoding, "correct")
        draws = draws + factor * scale(draw_shares(marks, prompts, of_size))
        by_seed += factor * scale(marks[:fewest].mean(axis=1))
    return make_estimate(draws, by_seed.tolist())


# ---------------------------------------------------------------- special estimates


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


def holds(condition: Condition, found: Estimate) -> bool:
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
            met.append(all(holds(condition, one) for one in found.values()))
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


# ---------------------------------------------------------------- tables


def list_cells(evidence: Evidence) -> list[tuple[dict, pd.DataFrame]]:
    """Return every reported cell: its place, and its runs by seed, in the order of study.toml."""
    study, runs = evidence.study, evidence.final
    runs = runs[runs.arm != "base"]
    if runs.empty:
        return []
    order = [list(names).index for names in (study.sizes, study.arms)]
    cells = []
    for key, group in runs.groupby(PLACE, dropna=False, sort=False):
        place = dict(zip(PLACE, key, strict=True))
        rates = list_rates(study, place["size"], place["arm"], evidence.runs)
        is_reported = not group.outcomes.astype(str).str.contains("-", regex=False).any()
        if place["learning_rate"] in rates and is_reported:
            cells.append((place, group.sort_values("seed")))
    return sorted(cells, key=lambda cell: (order[0](cell[0]["size"]), order[1](cell[0]["arm"])))


def tabulate_shares(evidence: Evidence, kind: str = "correct") -> pd.DataFrame:
    """Return a row a cell, set and decoding: share of a kind with interval, and above chance."""
    rows = []
    for place, runs in list_cells(evidence):
        for name in evidence.prompts["set"].unique():
            prompts = choose_prompts(evidence, name)
            for decoding in evidence.study.probe.draws:
                marks = mark_answers(runs, prompts, decoding, kind)
                found = make_estimate(
                    draw_shares(marks, prompts, place["size"]), marks.mean(axis=1).tolist()
                )
                chance = prompts.chance.astype(float).mean()
                row = {"set": name, "decoding": decoding, "seeds": len(runs), "share": found}
                rows.append(place | row | {"above_chance": (found.value - chance) / (1 - chance)})
    return pd.DataFrame(rows)


def tabulate_nll(evidence: Evidence) -> pd.DataFrame:
    """Return a row a cell and set: nats a token without end tokens, and an end token; text NLL."""
    nats = read_nll(evidence.folder, evidence.study.edition)
    counts = nats[nats.id == ""].set_index("set")
    rows = []
    for place, runs in list_cells(evidence):
        for found in nats[nats.id.isin(runs.id)].groupby("set", sort=False):
            name, group = found
            places = choose_prompts(evidence, name).index
            sums = {
                key: np.mean([np.array(values)[places].sum() for values in group[key]])
                for key in ("nats", "end_nats")
            }
            tokens, ends = (counts[key][name][places].sum() for key in ("tokens", "ends"))
            rows.append(
                place
                | {
                    "set": name,
                    "nll": (sums["nats"] - sums["end_nats"]) / (tokens - ends),
                    "end_nll": sums["end_nats"] / ends,
                    "text_nll": runs.nll_text.mean(),
                }
            )
    return pd.DataFrame(rows)
