"""The tables of round 3: ways of asking, predictions with their results, conclusions."""

import pandas as pd

from evaluation.study.analysis import Evidence, were_asked
from evaluation.study.blocks import Tables, block, percent
from evaluation.study.names import SIZES
from evaluation.study.round3 import (
    EPOCHS,
    MAIN_BASE,
    Round3,
    tabulate_conclusions,
    tabulate_predictions,
)
from evaluation.study.settings import RESULTS_DIR

WAY_TITLES = {
    "": "as it was trained",
    "no_template": "without the template",
    "on_fft": "on the weights of full fine-tuning",
}
KINDS_SHOWN = ["correct", "blank", "other thing"]
OUTCOME_TITLES = {
    "composition": "composition",
    "plain": "plain questions",
    "unseen": "unseen things",
}


def get_round3(evidence: Evidence) -> Round3:
    """Return the runs of round 3 and its fresh prompts."""
    return Round3(evidence.round3, evidence.fresh_prompts)


def select_asked(found: Round3) -> pd.DataFrame:
    """Select the runs of the main base that were asked in several ways, at the usual epochs.

    Runs of one arm at other learning rates were asked in one way alone.
    """
    runs = found.runs[were_asked(found.runs, "fresh_combinations/no_template")]
    is_usual = (runs.epochs == runs["size"].map(EPOCHS)) | (runs.arm == "base")
    is_usual &= runs.base.str.endswith(f"-{MAIN_BASE}") & runs.data.isin(["sft", "pretrain"])
    return runs[is_usual]


def share_asked(
    found: Round3, runs: pd.DataFrame, way: str, kind: str, decoding: str = "greedy"
) -> float:
    """Return the share of answers of a kind, over the prompts that are asked in every way.

    These are the prompts of composition that have one turn. NaN if this way was not asked.
    """
    marks = found.mark(runs, way=way, kind=kind, decoding=decoding)
    one_turn = found.mark(runs, way="no_template").columns
    if marks.empty:
        return float("nan")
    return float(marks[one_turn].to_numpy().mean())


@block("asking_table")
def tabulate_asking(evidence: Evidence) -> Tables:
    """Return a row a model and way of asking: kinds of answers, and the first token."""
    if evidence.round3.empty:
        return [pd.DataFrame()]
    found = get_round3(evidence)
    rows = []
    for (size, arm), group in select_asked(found).groupby(["size", "arm"], sort=False):
        for way, title in WAY_TITLES.items():
            shares = [share_asked(found, group, way, kind) for kind in KINDS_SHOWN]
            if pd.isna(shares[0]):
                continue
            first = f"first_end/{way}" if way else "first_end"
            name = "base" if arm == "base" else evidence.study.arms[arm].title
            sampled = share_asked(found, group, way, "correct", "t0.85p0.85")
            row = {"size": SIZES[size], "trained": name, "asked": title}
            row |= dict(zip(KINDS_SHOWN, map(percent, shares), strict=True))
            row["correct, sampled"] = percent(sampled)
            row["end token first"] = f"{group[first].mean():.2f}"
            row["runs"] = len(group)
            rows.append(row)
    return [pd.DataFrame(rows)]


@block("outcomes_3")
def tabulate_outcomes(evidence: Evidence) -> Tables:
    """Return a row a method: its outcomes on the fresh prompts, in percent with 95% intervals."""
    if evidence.round3.empty:
        return [pd.DataFrame()]
    found = get_round3(evidence)
    ended = pd.read_csv(RESULTS_DIR / "ended_3.csv", index_col="id").ended  # written by hand
    keys = ["size", "arm", "learning_rate", "epochs", "data"]
    rows = []
    for (size, arm, rate, epochs, _), group in found.runs.groupby(keys, sort=False):
        name = "base" if arm == "base" else evidence.study.arms[arm].title
        row = {"size": SIZES[size], "trained": name, "rate": f"{rate:g}", "epochs": f"{epochs:g}"}
        if arm == "base":
            row["rate"] = "-"  # pretraining's is another matter
        for outcome, title in OUTCOME_TITLES.items():
            estimate = found.estimate(found.mark(group, outcome))
            interval = f"({percent(estimate.low)} to {percent(estimate.high)})"
            row[title] = f"{percent(estimate.value)} {interval}"
        row["runs"] = len(group)
        row["ended"] = ended[group.id].max()
        rows.append(row)
    return [pd.DataFrame(rows)]


@block("predictions_3")
def tabulate_told(evidence: Evidence) -> Tables:
    """Return a row a prediction of PROTOCOL_3.md whose run is there, in percent or points."""
    if evidence.round3.empty:
        return [pd.DataFrame()]
    table = tabulate_predictions(get_round3(evidence))
    ran = table[table.met != "not run"]
    sizes = ran["size"].map(SIZES)
    texts = ran[["told", "from", "to", "found", "low", "high"]].map(
        "{:.0f}".format, na_action="ignore"
    )
    shown = ran.assign(size=sizes, **texts)
    shown["told"] = shown.told.where(ran.told.notna(), "-")
    return [shown]


@block("conclusions_3")
def tabulate_concluded(evidence: Evidence) -> Tables:
    """Return a row a question of PROTOCOL_3.md: the conclusion of its rule."""
    if evidence.round3.empty:
        return [pd.DataFrame()]
    return [tabulate_conclusions(get_round3(evidence))]
