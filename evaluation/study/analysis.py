"""What the second edition's runs say: shares of answers with intervals, by cell.

A cell is all seeds of a way of training, named `arm[*rate][/epochs][~pairs][@base][^start][#data]`
without what is usual. The bootstrap's unit is a prompt in a cluster (its thing, or thing and skill)
and a training seed. Each draw takes seeds and clusters with replacement, the same for all arms that
are compared. Prompts of the test half alone are counted.
"""

import zlib
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import numpy as np
import pandas as pd
from scipy import special

from dataset.checks import KINDS
from evaluation.probe.statistics import DRAWS, resampling_counts
from evaluation.study.plan import list_rates
from evaluation.study.results import LETTERS, RESULTS_DIR, read_nll, read_runs
from evaluation.study.settings import MAIN_BASE, Condition, Study, read_study
from model.files import UserError


@dataclass(frozen=True)
class Evidence:
    """The study, its runs (ends and kept checkpoints, with `cell` and `title`) and its prompts."""

    study: Study
    runs: pd.DataFrame
    prompts: pd.DataFrame
    folder: Path

    @property
    def final(self) -> pd.DataFrame:
        """Return the completed runs, without kept checkpoints."""
        is_final = ~self.runs.id.str.contains("@") & (self.runs.status == "completed")
        return self.runs[is_final]

    def find_cell(self, cell: str, size: str) -> pd.DataFrame:
        """Return the runs of a cell by seed; `cell:size` names its own size."""
        name, _, own = cell.partition(":")
        return self.final[(self.final.cell == name) & (self.final["size"] == (own or size))]

    def choose_prompts(self, name: str) -> pd.DataFrame:
        """Return the test prompts of a set, with their place in the outcome strings."""
        of_set = self.prompts[self.prompts["set"] == name].reset_index(drop=True)
        return of_set[of_set.half == "test"]


@dataclass(frozen=True)
class Estimate:
    """A number with its 95% percentile interval, and its value for each seed alone."""

    value: float
    low: float
    high: float
    by_seed: tuple[float, ...] = ()

    @classmethod
    def of(cls, draws: np.ndarray) -> "Estimate":
        """Summarize draws: the estimate, that of each seed alone, then the bootstrap's."""
        low, high = np.nanquantile(draws[-DRAWS:], [0.025, 0.975])
        return cls(float(draws[0]), float(low), float(high), tuple(draws[1:-DRAWS].tolist()))

    def __str__(self) -> str:
        return f"{self.value:.2f} [{self.low:.2f}, {self.high:.2f}]"


def load_evidence(folder: Path = RESULTS_DIR) -> Evidence:
    """Read study.toml, the runs of its edition in its order, and the prompts."""
    study, path = read_study(), folder / "prompts.csv"
    runs = read_runs(folder, study.edition)
    order = [*study.sizes, "base", *study.arms]
    runs = runs.sort_values("seed", kind="stable").sort_values(
        ["size", "arm"], key=lambda names: names.map(order.index), kind="stable"
    )
    pairs = runs[["size", "arm"]].drop_duplicates().itertuples(index=False)
    rates = {pair: list_rates(study, *pair, runs) for pair in map(tuple, pairs)}
    names = [name_cell(study, run, rates[run.size, run.arm]) for run in runs.itertuples()]
    runs[["cell", "title"]] = pd.DataFrame(names, runs.index, ["cell", "title"])
    prompts = pd.read_csv(path, keep_default_na=False) if path.is_file() else pd.DataFrame()
    evidence = Evidence(study, runs, prompts, folder)
    check_controlled(evidence.final)
    return evidence


def name_cell(study: Study, run: tuple, rates: list[float]) -> tuple[str, str]:
    """Return the name of a run's cell and its title: its arm, and what is not usual."""
    arm, base = study.arms.get(run.arm), run.base.rpartition("-")[2]
    start = study.arms[run.start].title if run.start in study.arms else ""
    extras = [
        (f"*{run.learning_rate:g}", "", arm and rates != [run.learning_rate]),
        (f"/{run.epochs:g}", f"{run.epochs:g} epochs", run.epochs != study.sizes[run.size].epochs),
        (f"~{run.samples:g}", f"{run.samples:,.0f} pairs", pd.notna(run.samples)),
        (f"@{base}", f"from {base}", base != MAIN_BASE),
        (f"^{run.start}", f"after {start}", run.start != "base"),
        (f"#{run.data}", run.data, arm and run.data != arm.data),
    ]
    extras = [(code, words) for code, words, is_unusual in extras if is_unusual]
    extras = extras if arm else [one for one in extras if one[0][0] == "@"]
    words = [arm.title if arm else "the base alone", *(words for _, words in extras if words)]
    return run.arm + "".join(code for code, _ in extras), ", ".join(words)


def check_controlled(runs: pd.DataFrame) -> None:
    """Refuse arms that were not trained alike: gate G3.

    Arms of one data set read the same tokens with the same labels, and those from one base started
    from the weights that this base was measured with.
    """
    weights, arms = runs.set_index("id").weights, runs[runs.arm != "base"]
    for (data, _), group in arms.groupby(["data", "samples"], dropna=False):
        if group.train_data.map(str).nunique() > 1:
            raise UserError(f"runs on {data!r} differ in their training data; run them again")
    for run in arms[(arms.start == "base") & arms.base.isin(weights.index)].itertuples():
        if run.base_fingerprint != weights[run.base]:
            raise UserError(f"{run.id}: started from other weights than those of {run.base}")


# ---------------------------------------------------------------- shares


def mark_answers(
    runs: pd.DataFrame, prompts: pd.DataFrame, decoding: str, kind: str = "correct"
) -> np.ndarray:
    """Return the share of draws whose answer is of a kind of `KINDS`: (runs, prompts)."""
    (name,) = prompts["set"].unique()
    marks = []
    for outcomes in runs.outcomes:
        draws = np.array([list(draw) for draw in outcomes[name][decoding].split()])
        marks.append((draws[:, prompts.index] == LETTERS[kind]).mean(axis=0))
    return np.array(marks)


@cache
def draw_counts(units: int, stream: str) -> np.ndarray:
    """Return how often each draw takes each unit: (DRAWS, units)."""
    return resampling_counts(units, DRAWS, zlib.crc32(stream.encode()))


def draw_shares(
    marks: np.ndarray, prompts: pd.DataFrame, size: str, alone: int | None = None
) -> np.ndarray:
    """Return the share of all seeds, of each of the first `alone` seeds, and in each draw.

    Args:
        marks: (seeds, prompts).
    """
    codes, names = pd.factorize(prompts.cluster)
    members = np.eye(len(names))[codes]
    sums, counts = marks @ members, members.sum(axis=0)
    of_clusters = draw_counts(len(counts), prompts["set"].iloc[0])
    of_seeds = draw_counts(len(marks), f"seeds {size}")
    total = (of_seeds * (of_clusters @ sums.T)).sum(axis=1)
    draws = total / (of_seeds.sum(axis=1) * (of_clusters @ counts))
    return np.concatenate([[marks.mean()], marks.mean(axis=1)[:alone], draws])


def estimate_sum(
    evidence: Evidence, condition: Condition, size: str, decoding: str, prompts: pd.DataFrame
) -> tuple[Estimate, int] | None:
    """Estimate a condition's sum of cells, and count their bases; None if a cell was not run.

    Cells of one size are compared over the seeds that all of them have.
    """
    cells = [evidence.find_cell(cell, size) for _, cell in condition.terms]
    if any(runs.empty for runs in cells):
        return None
    sizes = [runs["size"].iloc[0] for runs in cells]
    seeds: dict[str, set] = {}
    for one, runs in zip(sizes, cells, strict=True):
        seeds[one] = seeds.get(one, set(runs.seed)) & set(runs.seed)
    if not (alone := min(map(len, seeds.values()))):
        return None
    total = 0.0
    for (factor, _), one, runs in zip(condition.terms, sizes, cells, strict=True):
        runs, chosen = runs[runs.seed.isin(seeds[one])], prompts
        if condition.scalar:
            marks, chosen = runs[[condition.scalar]].to_numpy(float), prompts.iloc[:1]
        else:
            marks = mark_answers(runs, prompts, decoding)
        shares = draw_shares(marks, chosen, one, alone)
        if condition.log_odds:
            shares = special.logit(np.clip(shares, 5e-4, 1 - 5e-4))  # half a prompt of 1,000
        total = total + factor * shares
    return Estimate.of(total), pd.concat(cells).base.nunique()


# ---------------------------------------------------------------- tables


def tabulate_cells(evidence: Evidence) -> pd.DataFrame:
    """Return a row a reported cell, set and decoding, in the order of study.toml.

    Columns: size, cell, arm, title, learning_rate, seeds, diverged, set, decoding, share (an
    Estimate), above_chance, and the share of each kind of `KINDS`.
    """
    rows, final = [], evidence.final
    lost = evidence.runs[evidence.runs.status == "diverged"].groupby(["size", "cell"]).size()
    for (size, cell), runs in final.groupby(["size", "cell"], sort=False):
        first = runs.iloc[0]
        is_rate_trial = "*" in cell and not evidence.study.arms[first.arm].fixed
        if is_rate_trial or runs.outcomes.map(str).str.contains("-", regex=False).any():
            continue  # serves the choice of a rate
        place = first[["size", "cell", "arm", "title", "learning_rate"]].to_dict()
        place |= {"seeds": len(runs), "diverged": lost.get((size, cell), 0)}
        for name in evidence.prompts["set"].unique():
            prompts = evidence.choose_prompts(name)
            for decoding in evidence.study.probe.draws:
                kinds = {kind: mark_answers(runs, prompts, decoding, kind) for kind in KINDS}
                share = Estimate.of(draw_shares(kinds["correct"], prompts, size))
                chance = prompts.chance.astype(float).mean()
                row = {"set": name, "decoding": decoding, "share": share}
                row["above_chance"] = (share.value - chance) / (1 - chance)
                rows.append(place | row | {kind: marks.mean() for kind, marks in kinds.items()})
    return pd.DataFrame(rows)


def tabulate_nll(evidence: Evidence, name: str = "combinations") -> pd.DataFrame:
    """Return nats a token of a set's reference answers by run id: without end tokens, and ends."""
    if not (evidence.folder / "nll.parquet").is_file() or evidence.prompts.empty:
        return pd.DataFrame(columns=["answer", "end"], dtype=float)
    table = read_nll(evidence.folder, evidence.study.edition).query("set == @name").set_index("id")
    places = evidence.choose_prompts(name).index
    table = table[["nats", "end_nats", "tokens", "ends"]]
    sums = table.map(lambda values: np.array(values)[places].sum(), na_action="ignore")
    counts, sums = sums.loc[""], sums.drop("")
    answer = (sums.nats - sums.end_nats) / (counts.tokens - counts.ends)
    return pd.DataFrame({"answer": answer, "end": sums.end_nats / counts.ends})
