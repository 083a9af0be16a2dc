"""Compute the second edition's shares of answers, with intervals, by cell.

A cell is an arm at 1 rate, with all its seeds. Its name, without parts that have their default, is
`arm[*rate][/epochs][~pairs][@base][^start][#data][+part]`. The bootstrap draws training seeds and
clusters of prompts (on a thing, or on a thing and a skill), the same for all arms compared.
"""

import re
import zlib
from dataclasses import dataclass
from itertools import product
from operator import itemgetter
from pathlib import Path

import numpy as np
import pandas as pd
from scipy import special

from dataset.world.checks import KINDS
from evaluation.probe.statistics import CONFIDENCE, DRAWS, resample_means
from evaluation.study.plan import Sweep, tune_rates
from evaluation.study.results import LETTERS, read_runs
from evaluation.study.settings import MAIN_BASE, RESULTS_DIR, Condition, Study, read_study
from model.files import UserError

PART_TITLES = {"read_rows": "base rows", "only_frozen-embeddings": "base embedding"}
TERM = re.compile(r"(?:^|([+-]) )(?:([\d.]+) )?([a-z]\S*)")  # of a sum: sign, factor, cell


@dataclass(frozen=True)
class Evidence:
    """The study, its runs with `cell` and `title`, its prompts, and its learning rates."""

    study: Study
    runs: pd.DataFrame  # their ends and kept checkpoints
    final: pd.DataFrame  # the completed runs, without kept checkpoints
    prompts: pd.DataFrame
    sweeps: dict[tuple[str, str], Sweep]

    def find_cell(self, cell: str, size: str) -> pd.DataFrame:
        """Return the runs of a cell by seed; `cell:size` names its own size."""
        name, _, own = cell.partition(":")
        return self.final[(self.final.cell == name) & (self.final["size"] == (own or size))]

    def choose_prompts(self, name: str, half: str = "test") -> pd.DataFrame:
        """Return the prompts of a set's half, with their place in the outcome strings."""
        of_set = self.prompts[self.prompts["set"] == name].reset_index(drop=True)
        return of_set[of_set.half == half]


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
        low, high = np.nanquantile(draws[-DRAWS:], [(1 - CONFIDENCE) / 2, (1 + CONFIDENCE) / 2])
        return cls(float(draws[0]), float(low), float(high), tuple(draws[1:-DRAWS].tolist()))

    def __str__(self) -> str:
        return f"{self.value:.2f}" + f" [{self.low:.2f}, {self.high:.2f}]" * (self.low < self.high)


def load_evidence(folder: Path = RESULTS_DIR) -> Evidence:
    """Read study.toml, the prompts, and the runs of its edition in its order."""
    study, path = read_study(folder), folder / "prompts.csv"
    runs, order = read_runs(folder, study.edition), [*study.sizes, "base", *study.arms]
    runs = runs.sort_values("seed", kind="stable")
    runs = runs.sort_values(["size", "arm"], key=lambda c: c.map(order.index), kind="stable")
    sweeps = tune_rates(study, runs)
    runs["part"] = runs.id.str.extract("@([a-z].*)", expand=False)  # of the update, none: whole
    names = [name_cell(study, run, sweeps) for run in runs.itertuples()]
    runs[["cell", "title"]] = pd.DataFrame(names, runs.index, ["cell", "title"])
    runs["usual"] = runs.cell.str.replace(r"\*[^/~@^#+]*", "", regex=True)  # without the rate
    runs["fraction"] = runs.trainable_parameters / runs.groupby("base").parameters.transform("min")
    none = pd.DataFrame(columns=["set", "half"])
    prompts = pd.read_csv(path, keep_default_na=False) if path.is_file() else none
    final = runs[~runs.id.str.contains("@") & (runs.status == "completed")]
    check_controlled(final)
    return Evidence(study, runs, final, prompts, sweeps)


def name_cell(study: Study, run: tuple, sweeps: dict) -> tuple[str, str]:
    """Return the name of a run's cell and its title: its arm, and non-default parts."""
    base = run.base.rpartition("-")[2]
    if run.arm == "base":
        is_other = base != MAIN_BASE
        return "base" + f"@{base}" * is_other, "the base alone" + f", {base}" * is_other
    arm, sweep = study.arms[run.arm], sweeps[run.size, run.arm]
    start = study.arms.get(run.start, arm).title
    length = "1 epoch" if run.epochs == 1 else f"{run.epochs:g} epochs"
    trial = "preliminary" if run.learning_rate == sweep.leading else ""
    extras = [
        (f"*{run.learning_rate:g}", trial, sweep.reported != [run.learning_rate]),
        (f"/{run.epochs:g}", length, run.epochs != study.sizes[run.size].epochs),
        (f"~{run.samples:g}", f"{run.samples:,.0f} pairs", pd.notna(run.samples)),
        (f"@{base}", f"from {base}", base != MAIN_BASE),
        (f"^{run.start}", f"after {start}", run.start != "base"),
        (f"#{run.data}", run.data, run.data != arm.data),
        (f"+{run.part}", PART_TITLES.get(run.part, run.part), pd.notna(run.part)),
    ]
    codes, words, _ = zip(("", arm.title, True), *filter(itemgetter(2), extras), strict=True)
    return run.arm + "".join(codes), ", ".join(filter(None, words))


def check_controlled(runs: pd.DataFrame) -> None:
    """Refuse runs that differ in their data, or started from other weights than planned (G3)."""
    arms = runs[runs.arm != "base"]
    # Bases with unused rows have tokenizers of their own.
    texts = arms.train_data.map(lambda data: str(data | {"tokenizer_sha256": None}))
    for (data, _), group in texts.groupby([arms.data, arms.samples], dropna=False):
        if group.nunique() > 1:
            raise UserError(f"runs on {data!r} differ in their training data; run them again")
    for run in arms.itertuples():
        is_start = (runs.cell.str.partition("@")[0] == run.start) & (runs.base == run.base)
        is_start &= (runs.seed == run.seed) | (run.start == "base")
        if is_start.any() and run.base_fingerprint not in set(runs.weights[is_start]):
            raise UserError(f"{run.id}: started from other weights than its {run.start}; run again")


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


def draw_shares(
    marks: np.ndarray, prompts: pd.DataFrame, size: str, alone: int | None = None
) -> np.ndarray:
    """Return shares of all seeds, each of the first `alone`, each draw; marks: (seeds, prompts)."""
    codes, names = pd.factorize(prompts.cluster)
    members = np.eye(len(names))[codes]
    sums, counts = marks @ members, np.tile(members.sum(axis=0), (len(marks), 1))
    streams = f"seeds {size}", prompts["set"].iloc[0]
    draws = resample_means(sums, counts, tuple(zlib.crc32(one.encode()) for one in streams))
    return np.concatenate([[marks.mean()], marks.mean(axis=1)[:alone], draws])


def estimate_sum(
    evidence: Evidence, condition: Condition, place: tuple[str, str, str], prompts: pd.DataFrame
) -> tuple[Estimate, int] | None:
    """Estimate a sum of cells, and count their bases; None if a cell was not run.

    Cells of one size are compared over the seeds that all of them have. `place`: the sum, the size
    of cells that name none, and the decoding.
    """
    estimate, size, decoding = place
    terms = TERM.findall(estimate)
    runs = pd.concat(
        evidence.find_cell(cell, size).assign(cell=i, factor=float(f"{sign}{factor or 1}"))
        for i, (sign, factor, cell) in enumerate(terms)
    )
    cells = runs.groupby("size").cell.transform("nunique")
    runs = runs[runs.groupby(["size", "seed"]).cell.transform("nunique") == cells]
    if runs.cell.nunique() < len(terms):
        return None
    alone, total = runs.cell.value_counts().min(), 0.0
    for (_, factor, one), group in runs.groupby(["cell", "factor", "size"]):
        if condition.scalar:
            marks, chosen = group[[condition.scalar]].to_numpy(float), prompts.iloc[:1]
        else:
            marks, chosen = mark_answers(group, prompts, decoding), prompts
        shares = draw_shares(marks, chosen, one, alone)
        if condition.log_odds:
            shares = special.logit(np.clip(shares, 5e-4, 1 - 5e-4))  # half a prompt of 1,000
        total = total + factor * shares
    return Estimate.of(total), runs.base.nunique()


def select_reported(evidence: Evidence) -> pd.DataFrame:
    """Return the runs on which tables report: all sets were asked, at the best learning rate.

    While an arm's best rate is not known, the best of those that ran stands for it.
    """
    rows, sets = [], set(evidence.prompts["set"])
    for run in evidence.final.itertuples():
        sweep = evidence.sweeps.get((run.size, run.arm))  # a base has none
        is_trial = "*" in run.cell and run.learning_rate not in [*sweep.reported, sweep.leading]
        rows.append(not is_trial and set(run.outcomes) == sets)
    return evidence.final[np.array(rows, dtype=bool)]


def tabulate_cells(evidence: Evidence, runs: pd.DataFrame) -> pd.DataFrame:
    """Return one row per cell of `runs`, set and decoding, in the order of study.toml.

    Columns: those of the runs, seeds, set, decoding, share (correct) with its interval (low, high),
    their text, above_chance, and the share of each kind of `KINDS`.
    """
    rows = []
    for (size, _), seeds in runs.groupby(["size", "cell"], sort=False):
        first = seeds.iloc[0]
        place = dict(first[["size", "cell", "usual", "arm", "title", "learning_rate", "fraction"]])
        sets = [name for name in evidence.prompts["set"].unique() if name in first.outcomes]
        for name, decoding in product(sets, evidence.study.probe["decodings"]):
            prompts = evidence.choose_prompts(name)
            kinds = {kind: mark_answers(seeds, prompts, decoding, kind) for kind in KINDS}
            found = Estimate.of(draw_shares(kinds["correct"], prompts, size))
            chance = prompts.chance.mean()
            row = {"seeds": len(seeds), "set": name, "decoding": decoding, "share": found.value}
            row |= {"low": found.low, "high": found.high}
            row["text"] = f"{found.value:.0%} [{100 * found.low:.0f}, {100 * found.high:.0f}]"
            row["above_chance"] = (found.value - chance) / (1 - chance)
            rows.append(place | row | {kind: marks.mean() for kind, marks in kinds.items()})
    return pd.DataFrame(rows)
