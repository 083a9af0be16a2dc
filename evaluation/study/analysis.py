"""Compute the second edition's shares of correct answers, with intervals, by cell.

A cell is an arm at one learning rate, with all its seeds. Its name, without parts that have their
default, is `arm[*rate][/epochs][~pairs][@base][^start][#data][+part]`. The bootstrap draws training
seeds and clusters of prompts (on a thing, or on a thing and a skill), the same for all arms
compared.

The 1,200 test prompts on new combinations are two outcomes. *Composition*: something is to be done
with what is known. *Plain questions* ask for a fact that no training pair states, so they test
what is kept from pretraining, as the prompts on unseen things do.
"""

import zlib
from dataclasses import dataclass, replace
from itertools import product
from pathlib import Path

import numpy as np
import pandas as pd
from scipy import stats

from dataset.world.checks import KINDS
from evaluation.probe.intervals import CONFIDENCE, resample_means
from evaluation.study.names import AT_EDGE, TUNED_SHORTER
from evaluation.study.plan import Sweep, choose_rate, tune_rates
from evaluation.study.results import LETTERS, read_runs
from evaluation.study.settings import MAIN_BASE, RESULTS_DIR, Study, read_study
from model.cli import UserError

PLAIN_SKILLS = [
    "how",
    "kind",
    "known_for",
    "look",
    "nation",
    "nature",
    "used_for",
    "where",
    "who",
]
PARTS_OF = {"composition": "combinations", "plain": "combinations"}  # outcome -> set of prompts
PART_TITLES = {"read_rows": "base rows", "only_frozen-embeddings": "base embedding"}
FEWEST_SEEDS = 3  # for an interval over seeds alone
CELL_COLUMNS = [  # that all runs of a cell share
    "size",
    "cell",
    "usual",
    "arm",
    "title",
    "mark",
    "learning_rate",
    "fraction",
]


@dataclass(frozen=True, eq=False)
class Evidence:
    """The study, its runs with their cells, titles and marks, its prompts, its learning rates.

    `runs` are ends and kept checkpoints, `final` completed ends alone. Both have the trainings of
    round 3 as further seeds, since these answered the old prompts, too. `round3` has the completed
    runs of that round again, its bases included, for the fresh prompts.
    """

    study: Study
    runs: pd.DataFrame
    final: pd.DataFrame
    prompts: pd.DataFrame
    sweeps: dict[tuple[str, str], Sweep]  # by size and arm
    round3: pd.DataFrame
    fresh_prompts: pd.DataFrame

    def find_cell(self, cell: str, size: str) -> pd.DataFrame:
        """Return the runs of a cell, one a seed."""
        is_cell = self.final.cell == cell
        is_size = self.final["size"] == size
        return self.final[is_cell & is_size]

    def choose_prompts(self, name: str, half: str = "test") -> pd.DataFrame:
        """Return the prompts of a set or an outcome; see the function of this name."""
        return choose_prompts(self.prompts, name, half)


@dataclass(frozen=True)
class Estimate:
    """A share or a difference of shares with its 95% bootstrap interval, and each seed's value."""

    value: float
    low: float
    high: float
    by_seed: tuple[float, ...] = ()

    @classmethod
    def of(cls, by_seed: np.ndarray, by_resample: np.ndarray) -> "Estimate":
        """Summarize the values of seeds, (seeds,), and of bootstrap resamples, (resamples,)."""
        tail = (1 - CONFIDENCE) / 2
        low, high = np.nanquantile(by_resample, [tail, 1 - tail])
        return cls(
            value=float(np.mean(by_seed)),
            low=float(low),
            high=float(high),
            by_seed=tuple(by_seed.tolist()),
        )

    def t_interval(self) -> tuple[float, float] | None:
        """Return the 95% t interval over seeds, if there are three or more."""
        count = len(self.by_seed)
        if count < FEWEST_SEEDS:
            return None
        spread = float(np.std(self.by_seed, ddof=1))
        error = spread / count**0.5
        quantile = (1 + CONFIDENCE) / 2
        half = float(stats.t.ppf(quantile, count - 1)) * error
        return self.value - half, self.value + half


def choose_prompts(prompts: pd.DataFrame, name: str, half: str = "test") -> pd.DataFrame:
    """Return the prompts of a set or an outcome. A row is a prompt, its index its place.

    `prompts` has the columns of prompts.csv. A name may begin with `fresh_`, as round 3's sets do.
    """
    fresh = "fresh_" if name.startswith("fresh_") else ""
    outcome = name.removeprefix(fresh)
    set_name = fresh + PARTS_OF.get(outcome, outcome)
    of_set = prompts[prompts["set"] == set_name]
    placed = of_set.reset_index(drop=True)
    chosen = placed[placed.half == half]
    is_plain = chosen.skill.isin(PLAIN_SKILLS)
    if outcome == "composition":
        return chosen[~is_plain]
    if outcome == "plain":
        return chosen[is_plain]
    return chosen


def load_evidence(folder: Path = RESULTS_DIR) -> Evidence:
    """Read study.toml, the prompts, and the runs of its edition in its order."""
    study = read_study(folder)
    lines = read_runs(folder, study.edition)
    # Lines of round 2 were written without a round, and a study may have no others.
    is_round3 = lines.get("round", pd.Series(2, lines.index)).fillna(2) == 3
    # Round 2 asked the same weights of these bases already.
    is_same_base = is_round3 & (lines.arm == "base") & lines.base.isin(lines.id[~is_round3])
    runs = sort_runs(study, name_tuned(study, lines[~is_same_base]))
    sweeps = tune_rates(study, runs)
    # After an @ stands a part of the update, a word, or the step of a kept checkpoint.
    runs["part"] = runs.id.str.extract("@([a-z].*)", expand=False)
    names = [name_cell(study, sweeps, run) for run in runs.itertuples()]
    runs[["cell", "title"]] = pd.DataFrame(names, runs.index, ["cell", "title"])
    sweeps = settle_edges(study, sweeps, runs)
    runs["mark"] = [find_rate_marks(study, sweeps, run) for run in runs.itertuples()]
    runs["usual"] = runs.cell.str.replace(r"\*[^/~@^#+]*", "", regex=True)  # without the rate
    # The fewest are the base's own: a model with an adapter has more.
    base_parameters = runs.groupby("base").parameters.transform("min")
    runs["fraction"] = runs.trainable_parameters / base_parameters
    is_end = ~runs.id.str.contains("@")
    final = runs[is_end & (runs.status == "completed")]
    check_controlled(final)
    return Evidence(
        study=study,
        runs=runs,
        final=final,
        prompts=read_prompt_table(folder / "prompts.csv"),
        sweeps=sweeps,
        round3=lines[is_round3 & (lines.status == "completed")],
        fresh_prompts=read_prompt_table(folder / "prompts_3.csv"),
    )


def name_tuned(study: Study, lines: pd.DataFrame) -> pd.DataFrame:
    """Return lines in which a run at another rate than its arm's own names the tuned arm.

    Round 3 trained `study` and `study_all` at several rates. Round 2 calls the same training
    `study_tuned` and `study_all_tuned`.
    """
    arms = lines.arm
    for name, arm in study.arms.items():
        tuned = f"{name}_tuned"
        if tuned in study.arms:
            arms = arms.mask((lines.arm == name) & ~lines.learning_rate.isin(arm.fixed), tuned)
    return lines.assign(arm=arms)


def settle_edges(study: Study, sweeps: dict, runs: pd.DataFrame) -> dict:
    """Return sweeps in which a best rate is no edge if a run of another seed lies beyond it.

    The plan counts the runs of the first seed, but round 3 tried some rates with a later one. The
    rate is chosen again, where the lowest seed of a rate stands for it. If this names the same
    rate, and other rates lie on both sides, then it is no edge; otherwise nothing changes.
    """
    is_end = ~runs.id.str.contains("@")
    ends = runs[is_end & is_usual(runs) & (runs.status != "failed")]
    settled = dict(sweeps)
    for (size, arm), sweep in sweeps.items():
        is_same = (ends["size"] == size) & (ends.arm == arm)
        is_same &= ends.epochs == find_tuning_epochs(study, size, arm)
        by_rate = ends[is_same].sort_values("seed").drop_duplicates("learning_rate")
        table = by_rate.set_index("learning_rate")[["tune_correct", "tune_nll"]]
        table = table.astype(float).sort_index()
        if not sweep.is_at_edge or table.empty:
            continue
        best = choose_rate(table, study.tie)
        is_inside = best not in (table.index[0], table.index[-1])
        if is_inside and best in find_rates(sweep):
            settled[size, arm] = replace(sweep, is_at_edge=False)
    return settled


def sort_runs(study: Study, runs: pd.DataFrame) -> pd.DataFrame:
    """Return runs in the order of study.toml: by size, arm and seed."""
    order = [*study.sizes, "base", *study.arms]
    by_seed = runs.sort_values("seed", kind="stable")
    return by_seed.sort_values(
        ["size", "arm"], key=lambda column: column.map(order.index), kind="stable"
    )


def read_prompt_table(path: Path) -> pd.DataFrame:
    """Read prompts.csv or prompts_3.csv; empty if there is none. A row is a prompt."""
    if not path.is_file():
        return pd.DataFrame(columns=["set", "half", "skill", "cluster"])
    return pd.read_csv(path, keep_default_na=False)


def find_rates(sweep: Sweep) -> list[float]:
    """Return the rates that an arm is reported at: the best one, or fixed ones.

    While the best rate is unknown, the best of those that ran stands for the arm.
    """
    if sweep.reported or sweep.leading is None:
        return sweep.reported
    return [sweep.leading]


def name_cell(study: Study, sweeps: dict, run: tuple) -> tuple[str, str]:
    """Return the name of a run's cell and its title: its arm, and parts that are not default."""
    base = run.base.rpartition("-")[2]
    if run.arm == "base":
        if base == MAIN_BASE:
            return "base", "the base alone"
        return f"base@{base}", f"the base alone, {base}"
    arm = study.arms[run.arm]
    code = run.arm
    words = [arm.title]
    if find_rates(sweeps[run.size, run.arm]) != [run.learning_rate]:
        code += f"*{run.learning_rate:g}"
    if run.epochs != study.sizes[run.size].epochs:
        code += f"/{run.epochs:g}"
        words.append("1 epoch" if run.epochs == 1 else f"{run.epochs:g} epochs")
    if pd.notna(run.samples):
        code += f"~{run.samples:g}"
        words.append(f"{run.samples:,.0f} pairs")
    if base != MAIN_BASE:
        code += f"@{base}"
        words.append(f"from {base}")
    if run.start != "base":
        code += f"^{run.start}"
        words.append(f"after {study.arms[run.start].title}")
    if run.data != arm.data:
        code += f"#{run.data}"
        words.append(run.data)
    if pd.notna(run.part):
        code += f"+{run.part}"
        words.append(PART_TITLES.get(run.part, run.part))
    return code, ", ".join(words)


def find_tuning_epochs(study: Study, size: str, arm: str) -> float:
    """Return after how many epochs an arm's rates were compared."""
    usual = study.sizes[size].tuning_epochs
    return study.arms[arm].tuning_epochs.get(size, usual)


def find_rate_marks(study: Study, sweeps: dict, run: tuple) -> str:
    """Return the marks of a run's learning rate: chosen after fewer epochs, or at an edge."""
    if run.arm == "base" or run.size not in study.arms[run.arm].rates:
        return ""
    sweep = sweeps[run.size, run.arm]
    if run.learning_rate not in find_rates(sweep):
        return ""
    tuning_epochs = find_tuning_epochs(study, run.size, run.arm)
    marks = ""
    if tuning_epochs < run.epochs:
        marks += TUNED_SHORTER
    if sweep.is_at_edge:
        marks += AT_EDGE
    return marks


def check_controlled(runs: pd.DataFrame) -> None:
    """Refuse runs that differ in their data, or started from other weights than planned (G3)."""
    arms = runs[runs.arm != "base"]
    texts = arms.train_data.map(describe_data)
    for (data, _), group in texts.groupby([arms.data, arms.samples], dropna=False):
        if group.nunique() > 1:
            raise UserError(f"runs on {data!r} differ in their training data; run them again")
    arm_of_cell = runs.cell.str.split("@").str[0]
    for run in arms.itertuples():
        is_start = (arm_of_cell == run.start) & (runs.base == run.base)
        if run.start != "base":
            is_start &= runs.seed == run.seed
        starts = set(runs.weights[is_start])
        if starts and run.base_fingerprint not in starts:
            raise UserError(f"{run.id}: started from other weights than its {run.start}; run again")


def describe_data(data: dict) -> str:
    """Write what must be the same in all runs on the same data."""
    # Bases with unused rows have tokenizers of their own.
    return str(data | {"tokenizer_sha256": None})


def read_letters(outcomes: dict, prompts: pd.DataFrame, decoding: str, way: str = "") -> np.ndarray:
    """Return a run's letters of `LETTERS`; `way` is another way of asking.

    A row is one answer to each prompt: the greedy one, or one of several sampled ones.
    """
    (name,) = prompts["set"].unique()
    if way:
        name = f"{name}/{way}"
    words = outcomes[name][decoding].split()
    letters = np.array([list(word) for word in words])
    return letters[:, prompts.index]


def compute_prompt_shares(
    runs: pd.DataFrame, prompts: pd.DataFrame, decoding: str, kind: str = "correct"
) -> np.ndarray:
    """Return the share of each prompt's answers that are of a kind of `KINDS`: (runs, prompts)."""
    prompt_shares = []
    for outcomes in runs.outcomes:
        letters = read_letters(outcomes, prompts, decoding)
        is_kind = letters == LETTERS[kind]
        prompt_shares.append(is_kind.mean(axis=0))
    return np.array(prompt_shares)


def resample_shares(prompt_shares: np.ndarray, prompts: pd.DataFrame, size: str) -> np.ndarray:
    """Return the mean in each bootstrap resample, (resamples,), of (seeds, prompts).

    The same seeds and clusters are drawn for all runs of a size, so differences are paired.
    """
    codes, clusters = pd.factorize(prompts.cluster)
    is_in_cluster = np.eye(len(clusters))[codes]  # (prompts, clusters)
    sums = prompt_shares @ is_in_cluster
    sizes = np.tile(is_in_cluster.sum(axis=0), (len(prompt_shares), 1))  # prompts in each cluster
    # Each stream of random numbers is named by a number.
    seed_stream = hash_text(f"seeds {size}")
    prompt_stream = hash_text(prompts["set"].iloc[0])
    return resample_means(sums, sizes, (seed_stream, prompt_stream))


def hash_text(text: str) -> int:
    """Return a number that stands for a text, the same in every process."""
    return zlib.crc32(text.encode())


def estimate_share(
    runs: pd.DataFrame, prompts: pd.DataFrame, decoding: str, kind: str = "correct"
) -> Estimate | None:
    """Estimate the share of answers of a kind over runs of one cell; None without runs."""
    if runs.empty or prompts.empty:
        return None
    prompt_shares = compute_prompt_shares(runs, prompts, decoding, kind)
    by_resample = resample_shares(prompt_shares, prompts, runs["size"].iloc[0])
    return Estimate.of(prompt_shares.mean(axis=1), by_resample)


def estimate_gap(
    above: pd.DataFrame, below: pd.DataFrame, prompts: pd.DataFrame, decoding: str
) -> Estimate | None:
    """Estimate the correct share of one cell minus that of another, over the seeds of both.

    None if they share no seed. Both are of one size.
    """
    seeds = set(above.seed) & set(below.seed)
    if not seeds or prompts.empty:
        return None
    prompt_shares = []
    for runs in (above, below):
        shared = runs[runs.seed.isin(seeds)].sort_values("seed")
        prompt_shares.append(compute_prompt_shares(shared, prompts, decoding))
    differences = prompt_shares[0] - prompt_shares[1]  # (seeds, prompts)
    by_resample = resample_shares(differences, prompts, above["size"].iloc[0])
    return Estimate.of(differences.mean(axis=1), by_resample)


def select_reported(evidence: Evidence) -> pd.DataFrame:
    """Return the runs that tables report: at the arm's rate, and asked about unseen things too."""
    is_reported = []
    for run in evidence.final.itertuples():
        sweep = evidence.sweeps.get((run.size, run.arm))  # a base has none
        is_at_rate = sweep is None or run.learning_rate in find_rates(sweep)
        is_reported.append(is_at_rate and "unseen" in run.outcomes)
    return evidence.final[np.array(is_reported, dtype=bool)]


def select_usual(evidence: Evidence) -> pd.DataFrame:
    """Return the runs on all training examples from the main base. A row is a run."""
    return evidence.final[is_usual(evidence.final)]


def is_usual(runs: pd.DataFrame) -> pd.Series:
    """Say which runs trained on all examples from the main base."""
    is_main = runs.base.astype(str).str.endswith(f"-{MAIN_BASE}")
    is_arm = (runs.arm != "base") & (runs.start == "base")
    is_whole = (runs.data == "sft") & runs.samples.isna()
    return is_main & is_arm & is_whole


def were_asked(runs: pd.DataFrame, name: str) -> pd.Series:
    """Say which runs have outcomes of this name; some were asked the tuning half alone."""
    return runs.outcomes.map(lambda outcomes: name in outcomes).astype(bool)


def tabulate_cells(evidence: Evidence, runs: pd.DataFrame, sets: list[str]) -> pd.DataFrame:
    """Return a row a cell of `runs`, set or outcome, and decoding, in the order of study.toml.

    Columns: those of the runs, seeds, set, decoding, share (correct) with its interval (low, high),
    above_chance, and the share of each kind of `KINDS`.
    """
    rows = []
    for _, seeds in runs.groupby(["size", "cell"], sort=False):
        place = dict(seeds.iloc[0][CELL_COLUMNS])
        place["seeds"] = len(seeds)
        for name, decoding in product(sets, evidence.study.probe["decodings"]):
            prompts = evidence.choose_prompts(name)
            set_name = PARTS_OF.get(name, name)
            if prompts.empty or set_name not in seeds.outcomes.iloc[0]:
                continue
            estimate = estimate_share(seeds, prompts, decoding)
            chance = prompts.chance.mean()
            row = place | {
                "set": name,
                "decoding": decoding,
                "share": estimate.value,
                "low": estimate.low,
                "high": estimate.high,
                "above_chance": (estimate.value - chance) / (1 - chance),
            }
            for kind in KINDS:
                row[kind] = compute_prompt_shares(seeds, prompts, decoding, kind).mean()
            rows.append(row)
    return pd.DataFrame(rows)
