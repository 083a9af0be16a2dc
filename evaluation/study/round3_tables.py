"""The tables of round 3: ways of asking, outcomes, predictions with results and conclusions."""

import pandas as pd

from evaluation.study.analysis import Evidence, were_asked
from evaluation.study.blocks import Tables, block, percent, write_interval, write_rate
from evaluation.study.names import SIZES
from evaluation.study.round3 import (
    EPOCHS,
    MAIN_BASE,
    Round3,
    list_predictions,
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

    NaN if this way was not asked.
    """
    marks = found.mark(runs, way=way, kind=kind, decoding=decoding)
    if marks.empty:
        return float("nan")
    return float(marks[list_one_turn(found)].to_numpy().mean())


def list_one_turn(found: Round3) -> pd.Index:
    """List the fresh prompts of composition that have one turn, so that every way can ask them."""
    is_asked = were_asked(found.runs, "fresh_combinations/no_template")
    return found.mark(found.runs[is_asked][:1], way="no_template").columns


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
            plain = found.mark(group, "plain", way)
            row["plain questions"] = percent(float(plain.to_numpy().mean()))
            row["runs"] = len(group)
            rows.append(row)
    return [pd.DataFrame(rows)]


@block("outcomes_3")
def tabulate_outcomes(evidence: Evidence) -> Tables:
    """Return a row a run: its outcomes on the fresh prompts, in percent with 95% intervals."""
    if evidence.round3.empty:
        return [pd.DataFrame()]
    found = get_round3(evidence)
    predicted = {}  # by the run's id
    for told in list_predictions():
        if (told.outcome, told.way, told.kind, told.behind) == ("composition", "", "correct", None):
            for run in found.find(told.size, told.arm, told.rate, **dict(told.settings)).id:
                predicted[run] = write_told(told.middle, told.low, told.high)
    ended = pd.read_csv(RESULTS_DIR / "ended_3.csv", index_col="id").ended  # written by hand
    rows = []
    for run_id, run in found.runs.groupby("id", sort=False):
        first = run.iloc[0]
        is_base = first.arm == "base"
        name = "base" if is_base else evidence.study.arms[first.arm].title
        name += ", on medical pairs" if first.data == "medical" else ""
        row = {"ended": ended.get(run_id, "-"), "size": SIZES[first["size"]], "trained": name}
        row["rate"] = "-" if is_base else write_rate(first.learning_rate)
        row |= {"epochs": f"{first.epochs:g}", "seed": "-" if is_base else first.seed}
        row["predicted"] = predicted.get(run_id, "-")
        for outcome, title in OUTCOME_TITLES.items():
            estimate = found.estimate(found.mark(run, outcome))
            row[title] = f"{percent(estimate.value)} {write_interval(estimate.low, estimate.high)}"
        sampled = found.share(run, decoding="t0.85p0.85")
        row["composition, sampled"] = percent(sampled)
        rows.append(row)
    return [pd.DataFrame(rows)]


def write_told(middle: float | None, low: float, high: float) -> str:
    """Write what was predicted: a value and its range, or a range alone."""
    told = f"{low:.0f} to {high:.0f}"
    return told if pd.isna(middle) else f"{middle:.0f} ({told})"


@block("round3")
def tabulate_round3(evidence: Evidence) -> Tables:
    """Return the questions of PROTOCOL_3.md: the conclusion of its rule, then its predictions."""
    if evidence.round3.empty:
        return [pd.DataFrame()]
    found = get_round3(evidence)
    conclusions = tabulate_conclusions(found)
    predictions = tabulate_predictions(found)
    numbers = conclusions.question.str[:2]
    rows = []
    for question in sorted({*numbers, *predictions.question}):
        group = predictions[predictions.question == question]
        has_begun = (group.met != "not run").any()
        for _, rule in conclusions[numbers == question].iterrows():
            is_open = has_begun and rule.conclusion == "not run"
            verdict = "open, runs are missing" if is_open else rule.conclusion
            rows.append({"question": f"**{rule.question}**", "verdict": f"**{verdict}**"})
        for _, prediction in group.iterrows():
            rows.append(write_prediction(prediction))
    columns = ["question", "predicted", "found", "95% interval", "runs", "verdict"]
    return [pd.DataFrame(rows, columns=columns, dtype=object).fillna("")]


def write_prediction(prediction: pd.Series) -> dict[str, object]:
    """Write a prediction and what was found, in percent of correct answers or in points."""
    where = f"{prediction.question}, {SIZES[prediction['size']]}: {prediction.what}"
    predicted = write_told(prediction.told, prediction["from"], prediction.to)
    row: dict[str, object] = {"question": where, "predicted": predicted}
    if prediction.met == "not run":
        return row | {"found": "-", "95% interval": "-", "runs": 0, "verdict": "not run"}
    row["found"] = f"{prediction.found:z.0f}"
    row["95% interval"] = f"{prediction.low:z.0f} to {prediction.high:z.0f}"
    row["runs"] = int(prediction.runs)
    row["verdict"] = "as predicted" if prediction.met == "yes" else "not as predicted"
    return row
