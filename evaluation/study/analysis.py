"""What the second edition's runs say: shares of answers with intervals, and tables of them.

The unit is a prompt in a cluster (its thing, or thing and skill) and a training seed. Each draw of
the bootstrap takes seeds and clusters with replacement, the same for all arms that are compared.
Row 0 of the draws is the estimate itself. Prompts of the test half alone are counted.
"""

import re
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import numpy as np
import pandas as pd

from evaluation.probe.statistics import DRAWS, resampling_counts
from evaluation.study.plan import Run, list_rates
from evaluation.study.results import LETTERS, RESULTS_DIR, read_nll, read_runs
from evaluation.study.settings import MAIN_BASE, Study, read_study
from model.files import UserError

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
    evidence = Evidence(study, read_runs(folder, study.edition), prompts, folder)
    check_controlled(evidence.final)
    return evidence


def check_controlled(runs: pd.DataFrame) -> None:
    """Refuse arms that were not trained alike: gate G3.

    Arms of one data set read the same tokens with the same labels, and those from one base started
    from the weights that this base was measured with.
    """
    weights = runs.set_index("id").weights
    arms = runs[runs.arm != "base"]
    for (data, _), group in arms.groupby(["data", "samples"], dropna=False):
        if group.train_data.map(str).nunique() > 1:
            raise UserError(f"runs on {data!r} differ in their training data; run them again")
    for run in arms[arms.start == "base"].itertuples():
        if run.base in weights.index and run.base_fingerprint != weights[run.base]:
            raise UserError(f"{run.id}: started from other weights than those of {run.base}")


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
