"""The rules of PROTOCOL_3.md: a function a question, and the table of predictions and results.

    python evaluation/study/round3.py        # prints both tables from runs.jsonl

A run is found by its size, method, rate and epochs; all its seeds of this round count. Shares are
of greedy answers to fresh prompts, between 0 and 1, and NaN where nothing ran.
"""

import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import numpy as np
import pandas as pd
from scipy import stats

from evaluation.probe.intervals import CONFIDENCE, paired_bootstrap
from evaluation.probe.outputs import print_table
from evaluation.study.results import LETTERS, read_runs
from evaluation.study.settings import RESULTS_DIR
from model.cli import make_parser, run_script

PLAIN_SKILLS = ["how", "kind", "known_for", "look", "nation", "nature", "used_for", "where", "who"]
EPOCHS = {"xs": 4, "s": 3, "m26": 2}  # of the reported runs
MAIN_BASE = "wrapped42"
NOT_ASKED = "-"
LEAST_LEARNED = 0.30  # correct with the template: such a LoRA learned its task
MOST_FAILED = 0.03  # correct without it: such a LoRA seems to have failed
LEAST_BLANK = 0.30


@dataclass(frozen=True)
class Estimate:
    """A share or a difference with its 95% intervals; `low_t` and `high_t` need three runs."""

    value: float
    low: float = np.nan
    high: float = np.nan
    low_t: float = np.nan
    high_t: float = np.nan
    runs: int = 0


class Round3:
    """The completed runs of this round, and their fresh prompts."""

    def __init__(self, runs: pd.DataFrame, prompts: pd.DataFrame) -> None:
        self.runs = runs
        self.prompts = prompts

    def find(self, size: str, arm: str, rate: float = 0.0, **settings: str | float) -> pd.DataFrame:
        """Return a method's runs: a row a seed. A base has rate 0 and no epochs."""
        wanted = {"size": size, "arm": arm, "learning_rate": rate}
        wanted |= {"epochs": 0.0 if arm == "base" else EPOCHS[size], "data": "sft"}
        wanted |= {"base": MAIN_BASE} | settings
        if arm == "base":
            wanted["data"] = "pretrain"
        wanted["base"] = f"{size}-world-{wanted['base']}"
        names = list(wanted)
        is_wanted = (self.runs[names] == pd.Series(wanted)).all(axis=1)
        return self.runs[is_wanted].sort_values("seed")

    def choose(self, outcome: str) -> pd.DataFrame:
        """Return the fresh prompts of an outcome: "composition", "plain" or "unseen"."""
        name = "fresh_unseen" if outcome == "unseen" else "fresh_combinations"
        of_set = self.prompts[self.prompts["set"] == name].reset_index(drop=True)
        if outcome == "unseen":
            return of_set
        is_plain = of_set.skill.isin(PLAIN_SKILLS)
        return of_set[is_plain == (outcome == "plain")]

    def mark(
        self,
        runs: pd.DataFrame,
        outcome: str = "composition",
        way: str = "",
        kind: str = "correct",
        decoding: str = "greedy",
    ) -> pd.DataFrame:
        """Return marks: a row a run (its seed), a column a prompt, the share of its draws.

        `way` is "no_template" or "on_fft"; prompts that were not asked in this way are left out.
        """
        prompts = self.choose(outcome)
        name = prompts["set"].iloc[0]
        if way:
            name = f"{name}/{way}"
        marks = {}
        for run in runs.itertuples():
            if name in run.outcomes:
                draws = [list(draw) for draw in run.outcomes[name][decoding].split()]
                letters = np.array(draws)[:, prompts.index]
                is_asked = letters[0] != NOT_ASKED
                share = (letters == LETTERS[kind]).mean(axis=0)
                marks[run.seed] = pd.Series(share[is_asked], prompts.index[is_asked])
        return pd.DataFrame(marks).T

    def estimate(self, marks: pd.DataFrame, minus: pd.DataFrame | None = None) -> Estimate:
        """Return the mean of marks, or their difference over the seeds that both have."""
        if marks.empty or (minus is not None and minus.empty):
            return Estimate(np.nan)
        differences = marks if minus is None else (marks - minus).dropna()
        if differences.empty:
            return Estimate(np.nan)
        is_unseen = set(self.choose("unseen").index) == set(marks.columns)
        prompts = self.choose("unseen") if is_unseen else self.prompts_of_combinations()
        clusters = prompts.cluster.reindex(differences.columns)
        sums = differences.T.groupby(clusters.to_numpy()).sum().T.to_numpy()
        counts = clusters.groupby(clusters.to_numpy()).size().to_numpy(float)
        weights = np.tile(counts, (len(differences), 1))
        value, low, high = paired_bootstrap(sums / weights, weights)
        by_seed = differences.mean(axis=1)
        low_t, high_t = np.nan, np.nan
        if len(by_seed) >= 3:
            reach = stats.t.ppf((1 + CONFIDENCE) / 2, len(by_seed) - 1) * by_seed.sem()
            low_t, high_t = value - reach, value + reach
        return Estimate(value, low, high, low_t, high_t, len(by_seed))

    def prompts_of_combinations(self) -> pd.DataFrame:
        """Return the fresh prompts on combinations, composition and plain questions."""
        is_wanted = self.prompts["set"] == "fresh_combinations"
        return self.prompts[is_wanted].reset_index(drop=True)

    def share(self, runs: pd.DataFrame, **options: str) -> float:
        """Return the mean share of correct answers; the options are those of `mark`."""
        return self.estimate(self.mark(runs, **options)).value


# ------------------------------------------------------------------------------------- the rules
# Each takes shares between 0 and 1 and returns the conclusion of its question.


def judge_asking(
    with_template: dict[str, float], without: dict[str, float], blank: dict[str, float]
) -> str:
    """Q1: does the way of asking alone make every LoRA fail? Keys: "original" and all-layer ranks.

    `without` and `blank` are correct and blank answers without the template.
    """
    learned = [name for name in with_template if name != "original"]
    values = [*with_template.values(), *without.values(), *blank.values()]
    if np.isnan(values).any() or not learned:
        return "not run"
    if any(without[name] >= with_template[name] / 2 for name in learned):
        return "no"
    all_learned = all(with_template[name] >= LEAST_LEARNED for name in learned)
    all_failed = all(share <= MOST_FAILED for share in without.values())
    all_blank = all(share >= LEAST_BLANK for share in blank.values())
    return "yes" if all_learned and all_failed and all_blank else "in part"


def judge_steps(full_long: float, lora_long: float) -> str:
    """Q2: is the rest undertraining? Shares at the original's steps, or rate x steps."""
    if np.isnan([full_long, lora_long]).any():
        return "not run"
    if full_long >= 0.65 and lora_long >= 0.48:
        return "yes"
    if full_long < 0.50 and lora_long < 0.30:
        return "no"
    return "in part"


def judge_rate(high_rate: float, low_rate: float) -> str:
    """Q3: does the rate matter at equal rate x steps?"""
    if np.isnan([high_rate, low_rate]).any():
        return "not run"
    if low_rate < 0.15:
        return "the rate itself is a cause"
    if low_rate >= high_rate - 0.05:
        return "none beside the steps"
    return "in part"


def judge_layers(layers_alone: float, best_together: float, full: float) -> str:
    """Q4: do the layers suffice alone, or together with the rate?"""
    if np.isnan([layers_alone, best_together, full]).any():
        return "not run"
    if layers_alone >= full / 2:
        return "the layers suffice alone"
    return "together they suffice" if best_together >= 0.70 else "together they do not suffice"


def judge_capacity(behind: dict[str, float]) -> str:
    """Q6: size, or capacity? `behind`: full fine-tuning minus r=64, by size."""
    if np.isnan([behind.get(size, np.nan) for size in ("xs", "s")]).any():
        return "not run"
    if behind["xs"] > 0.10:
        return "size"
    ran = [gap for gap in behind.values() if not np.isnan(gap)]
    return "capacity" if max(ran) <= 0.03 else "in part"


def judge_distance(full_near: float, full_far: float) -> str:
    """Q7: does a base that read the pairs bring full fine-tuning at 1e-5 20 points or more?"""
    if np.isnan([full_near, full_far]).any():
        return "not run"
    return "a cause" if full_near - full_far >= 0.20 else "not a cause"


def judge_batch(gap_small: float, gap_large: float) -> str:
    """Q8: is the gap at batch 128 at least 5 points above that at batch 8?"""
    if np.isnan([gap_small, gap_large]).any():
        return "not run"
    return "large batches hurt LoRA more" if gap_large - gap_small >= 0.05 else "no difference"


def choose_rate(rates: pd.DataFrame, tie: float = 0.02) -> tuple[float, bool]:
    """Return the best rate, and whether it is an edge; a row a rate: tune_correct and tune_nll."""
    ordered = rates.sort_values("learning_rate")
    is_tied = ordered.tune_correct >= ordered.tune_correct.max() - tie - 1e-9
    best = ordered[is_tied].sort_values("tune_nll").learning_rate.iloc[0]
    return best, best in (ordered.learning_rate.iloc[0], ordered.learning_rate.iloc[-1])


# ------------------------------------------------------------------------------- the predictions


@dataclass(frozen=True)
class Prediction:
    """What was told of a share (or of full fine-tuning minus it), in percent, before it ran."""

    question: str
    text: str
    size: str
    arm: str
    rate: float
    low: float
    high: float
    middle: float | None = None
    outcome: str = "composition"
    way: str = ""
    kind: str = "correct"
    settings: tuple[tuple[str, str | float], ...] = ()
    behind: tuple[str, float] | None = None  # arm and rate of full fine-tuning, for a gap


LORAS = [
    ("xs", "study", 1e-4, "the original LoRA"),
    ("xs", "all_r8", 3e-3, "all-layer LoRA, r=8"),
    ("xs", "all_r64", 3e-3, "all-layer LoRA, r=64"),
    ("m26", "study", 1e-4, "the original LoRA"),
    ("m26", "all_r8", 1e-3, "all-layer LoRA, r=8"),
    ("m26", "all_r32", 1e-3, "all-layer LoRA, r=32"),
]
FULL = [("xs", "fft", 1e-3), ("m26", "fft", 1e-4)]
ORIGINAL_EXPERIMENTS = [
    ("1 epoch", "all_r8", {"epochs": 1.0}, (28, 33, 38)),
    ("10 epochs", "all_r8", {"epochs": 10.0}, (58, 66, 74)),
    ("r=16", "all_r16", {}, (60, 68, 75)),
    ("batch 8, 1 epoch", "all_r8_batch8", {"epochs": 1.0}, (50, 60, 70)),
    ("medical pairs", "all_r8", {"data": "medical"}, (0, 0, 3)),
]


def list_predictions() -> list[Prediction]:
    """List the predictions of PROTOCOL_3.md that are ranges of shares, in its order."""
    told = []
    for size, arm, rate, title in LORAS:
        text = f"{title}, without the template"
        told.append(Prediction("Q1", text, size, arm, rate, 0, 3, way="no_template"))
        blank = {"way": "no_template", "kind": "blank"}
        told.append(Prediction("Q1", f"{text}: blank", size, arm, rate, 30, 80, **blank))
        low, high = (40, 90) if arm == "study" else (0, 15)
        text = f"{title}, on the weights of full fine-tuning"
        told.append(Prediction("Q1", text, size, arm, rate, low, high, way="on_fft"))
    for size, arm, rate in FULL:
        text = "full fine-tuning, without the template"
        told.append(Prediction("Q1", text, size, arm, rate, 0, 6, way="no_template"))
    for text, arm, settings, (low, middle, high) in ORIGINAL_EXPERIMENTS:
        more = {"middle": middle, "settings": tuple(settings.items())}
        told.append(Prediction("Q1", text, "xs", arm, 3e-3, low, high, **more))
        more = {"way": "no_template", "settings": tuple(settings.items())}
        text = f"{text}, without the template"
        told.append(Prediction("Q1", text, "xs", arm, 3e-3, 0, 3, **more))
    short, long = (("epochs", 3.25),), (("epochs", 13.0),)
    original, full = "the original LoRA", "full fine-tuning"
    unseen = {"outcome": "unseen"}
    near = (("base", "wrapped_pairs42"),)
    told += [
        Prediction("Q2", f"{full}, 1e-5", "m26", "fft", 1e-5, 15, 50, 30),
        Prediction(
            "Q2",
            f"{full}, 1e-5, 30,300 steps",
            "m26",
            "fft_batch8",
            1e-5,
            65,
            88,
            80,
            settings=short,
        ),
        Prediction(
            "Q2", f"{original}, 1e-3, 13 epochs", "m26", "study", 1e-3, 48, 68, 58, settings=long
        ),
        Prediction(
            "Q2",
            f"{full}, 1e-6, 30,300 steps",
            "m26",
            "fft_batch8",
            1e-6,
            5,
            35,
            15,
            settings=short,
        ),
        Prediction("Q3", f"{original}, 5e-3, 3 epochs", "s", "study", 5e-3, 24, 36, 30),
        Prediction(
            "Q3", f"{original}, 1e-3, 13 epochs", "s", "study", 1e-3, 26, 40, 32, settings=long
        ),
        Prediction("Q4", f"{original} on all layers, 1e-4", "m26", "study_all", 1e-4, 15, 35, 25),
        Prediction(
            "Q4", f"{original} on all layers, 2.5e-3", "m26", "study_all", 2.5e-3, 70, 84, 78
        ),
        Prediction("Q4", f"{original} on all layers, 5e-3", "m26", "study_all", 5e-3, 64, 82, 75),
        Prediction("Q5", f"{full}, 1e-4", "m26", "fft", 1e-4, 84, 91, 87),
        Prediction("Q5", f"{full}, 5e-5", "m26", "fft", 5e-5, 79, 89, 84),
        Prediction("Q5", f"{full}, 1e-4: unseen things", "m26", "fft", 1e-4, 15, 32, 22, **unseen),
        Prediction("Q5", f"{full}, 5e-5: unseen things", "m26", "fft", 5e-5, 32, 58, 45, **unseen),
        Prediction("Q6", "r=64 behind", "xs", "all_r64", 3e-3, 0, 8, 4, behind=("fft", 1e-3)),
        Prediction("Q6", "r=64 behind", "s", "all_r64", 1.5e-3, -3, 5, 1, behind=("fft", 1.25e-4)),
        Prediction("Q6", "r=64 behind", "m26", "all_r64", 1e-3, -2, 4, 1, behind=("fft", 1e-4)),
        Prediction("Q6", "r=32 behind", "s", "all_r32", 1.5e-3, 1, 7, 4, behind=("fft", 1.25e-4)),
        Prediction("Q7", f"{full}, 1e-5", "xs", "fft", 1e-5, 35, 80, 60, settings=near),
        Prediction("Q7", f"{full}, 1e-6", "xs", "fft", 1e-6, 5, 45, 25, settings=near),
        Prediction("Q7", original, "xs", "study", 1e-4, 10, 50, 30, settings=near),
    ]
    return told


# ------------------------------------------------------------------------------------ the tables


def tabulate_predictions(found: Round3) -> pd.DataFrame:
    """Return a row a prediction: what was told, the estimate in percent, whether it was met."""
    rows = []
    for told in list_predictions():
        runs = found.find(told.size, told.arm, told.rate, **dict(told.settings))
        options = {"outcome": told.outcome, "way": told.way, "kind": told.kind}
        marks = found.mark(runs, **options)
        if told.behind:
            full = found.mark(found.find(told.size, *told.behind), **options)
            estimate = found.estimate(full, minus=marks)
        else:
            estimate = found.estimate(marks)
        percent = 100 * estimate.value
        is_met = told.low <= percent <= told.high
        rows.append(
            {
                "question": told.question,
                "size": told.size,
                "what": told.text,
                "told": told.middle,
                "from": told.low,
                "to": told.high,
                "found": percent,
                "low": 100 * estimate.low,
                "high": 100 * estimate.high,
                "runs": estimate.runs,
                "met": "not run" if np.isnan(percent) else "yes" if is_met else "no",
            }
        )
    return pd.DataFrame(rows)


def conclude_asking(found: Round3, size: str) -> str:
    """Apply Q1's rule to the runs of a size."""
    shares: dict[str, dict[str, float]] = {"with": {}, "without": {}, "blank": {}}
    for place, arm, rate, _ in LORAS:
        if place == size:
            name = "original" if arm == "study" else arm
            runs = found.find(size, arm, rate)
            shares["with"][name] = found.share(runs)
            shares["without"][name] = found.share(runs, way="no_template")
            shares["blank"][name] = found.share(runs, way="no_template", kind="blank")
    return judge_asking(shares["with"], shares["without"], shares["blank"])


def conclude_capacity(found: Round3) -> str:
    """Apply Q6's rule."""
    places = [("xs", 3e-3, 1e-3), ("s", 1.5e-3, 1.25e-4), ("m26", 1e-3, 1e-4)]
    behind = {}
    for size, lora_rate, full_rate in places:
        full = found.mark(found.find(size, "fft", full_rate))
        lora = found.mark(found.find(size, "all_r64", lora_rate))
        behind[size] = found.estimate(full, minus=lora).value
    return judge_capacity(behind)


def conclude_layers(found: Round3) -> str:
    """Apply Q4's rule."""
    shares = [found.share(found.find("m26", "study_all", rate)) for rate in (2.5e-3, 5e-3)]
    best = float("nan") if np.isnan(shares).any() else max(shares)
    alone = found.share(found.find("m26", "study_all", 1e-4))
    return judge_layers(alone, best, found.share(found.find("m26", "fft", 1e-4)))


def conclude_batch(found: Round3) -> str:
    """Apply Q8's rule, each method at the rate that its tuning half chooses."""
    gaps = []
    for batch in (8, 128):
        marks = {}
        for method in ("fft", "all_r8"):
            runs = found.runs[found.runs.arm == f"{method}_batch{batch}"]
            runs = runs[runs.epochs == EPOCHS["xs"]]
            if len(runs) < 3:
                return "not run"
            rate, _ = choose_rate(runs)
            marks[method] = found.mark(runs[runs.learning_rate == rate])
        gaps.append(found.estimate(marks["fft"], minus=marks["all_r8"]).value)
    return judge_batch(*gaps)


FULL_FAR = 0.044  # full fine-tuning at 1e-5 from a base that read no pair, second edition
CONCLUSIONS: dict[str, Callable[[Round3], str]] = {
    "Q1, 1.3M: does the way of asking alone make every LoRA fail?": lambda found: conclude_asking(
        found, "xs"
    ),
    "Q1, 25M: does the way of asking alone make every LoRA fail?": lambda found: conclude_asking(
        found, "m26"
    ),
    "Q2: is the rest undertraining?": lambda found: judge_steps(
        found.share(found.find("m26", "fft_batch8", 1e-5, epochs=3.25)),
        found.share(found.find("m26", "study", 1e-3, epochs=13.0)),
    ),
    "Q3: does the rate matter at equal rate x steps?": lambda found: judge_rate(
        found.share(found.find("s", "study", 5e-3)),
        found.share(found.find("s", "study", 1e-3, epochs=13.0)),
    ),
    "Q4: rate and layers at the original's size": conclude_layers,
    "Q6: size, or capacity of the adapter?": conclude_capacity,
    "Q7: does the base's distance matter?": lambda found: judge_distance(
        found.share(found.find("xs", "fft", 1e-5, base="wrapped_pairs42")), FULL_FAR
    ),
    "Q8: do large batches hurt LoRA more?": conclude_batch,
}


def tabulate_conclusions(found: Round3) -> pd.DataFrame:
    """Return a row a question: the conclusion of its rule."""
    rows = [(question, conclude(found)) for question, conclude in CONCLUSIONS.items()]
    return pd.DataFrame(rows, columns=["question", "conclusion"])


def load_round3(folder: Path = RESULTS_DIR) -> Round3:
    """Read the completed runs of round 3 and its prompts."""
    runs = read_runs(folder, edition=2)
    if "round" not in runs:
        runs["round"] = np.nan
    is_done = (runs["round"] == 3) & (runs.status == "completed")
    prompts = pd.read_csv(folder / "prompts_3.csv", keep_default_na=False)
    return Round3(runs[is_done], prompts)


def main() -> None:
    """Print the predictions with their results, and the conclusions."""
    make_parser(__doc__).parse_args()
    found = load_round3()
    print_table(tabulate_predictions(found).round(1))
    print()
    print_table(tabulate_conclusions(found))


if __name__ == "__main__":
    run_script(main)
