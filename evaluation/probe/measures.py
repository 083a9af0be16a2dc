"""Summarize the measures of answers, and compare two checkpoints, as data frames.

    correct       the answer passes its prompt's check (`judge_answer` in dataset/world/checks.py)
    other thing, wrong fact, wrong form     why an answer with text, an end and no loop is incorrect
    blank         nothing but white space before the end token
    endless       no end token within the limit
    loop          4 characters or more stand 3 times in a row
    off_topic     a judge model finds it as likely under another prompt (likelihood.py)
    tokens        length of the answer without its end token

The first 4 are shares of the answers with a check, the next 4 of all answers.
"""

import numpy as np
import pandas as pd

from evaluation.probe.intervals import paired_bootstrap, share_interval
from model.cli import UserError

CHECKED = ("correct", "other thing", "wrong fact", "wrong form")
SHARES = (*CHECKED, "blank", "endless", "loop", "off_topic")
MEASURES = (*SHARES, "tokens")
COMPARISON = ["decoding", "measure", "a", "b", "difference", "low", "high"]


def tabulate_measures(samples: list[dict]) -> pd.DataFrame:
    """List the measures of samples, a line each: decoding, seed, section, id, measure, value."""
    frame = pd.DataFrame(samples)  # a row a sample, a column a measure
    outcome = frame["outcome"]
    for name in CHECKED:
        frame[name] = outcome.eq(name).where(outcome.notna())
    frame["seed"] = frame["seed"].fillna(0).astype(int)  # greedy decoding draws nothing
    keys = ["decoding", "seed", "section", "id", "prompt_sha256"]
    long = frame.melt(keys, list(MEASURES), "measure")  # a row a measure of a sample
    long = long.dropna(subset="value")
    return long.astype({"value": float})


def summarize(samples: list[dict]) -> pd.DataFrame:
    """Summarize samples: a line for each decoding, section ("all" first) and measure.

    Shares have 95% Wilson intervals, `low` and `high`, which take answers as independent; `n`
    counts the answers that have the measure.
    """
    long = tabulate_measures(samples)
    all_sections = long.assign(section="all")
    sections = long[long["section"] != "all"]
    long = pd.concat([all_sections, sections])  # each measure of a sample twice
    keys = ["decoding", "section", "measure"]
    groups = long.groupby(keys, sort=False)["value"]
    # A row for each decoding, section and measure.
    table = groups.agg(value="mean", total="sum", n="count")
    table = table.reset_index()
    intervals = []
    for row in table.itertuples():
        if row.measure in SHARES:
            intervals.append(share_interval(round(row.total), row.n))
        else:
            intervals.append((None, None))
    table[["low", "high"]] = pd.DataFrame(intervals, dtype=float)
    table = table[[*keys, "value", "low", "high", "n"]]
    return table.round(6)


def compare(samples_a: list[dict], samples_b: list[dict]) -> pd.DataFrame:
    """Compare B's samples with A's prompt by prompt: a line for each decoding and measure.

    The 95% interval is a bootstrap over seeds and prompts. Samples of other prompts, decodings or
    seeds are refused.
    """
    keys = ["decoding", "measure", "seed", "id", "prompt_sha256"]
    values_a = tabulate_measures(samples_a).set_index(keys)["value"]
    values_b = tabulate_measures(samples_b).set_index(keys)["value"]
    # Each answer has tokens, so they tell what was asked.
    asked_a = set(values_a.xs("tokens", level="measure").index)
    asked_b = set(values_b.xs("tokens", level="measure").index)
    if asked_a != asked_b:
        raise UserError("not comparable: other prompts, decodings, seeds or chat templates")
    # A row a measure of a sample, columns a and b.
    both = pd.concat({"a": values_a, "b": values_b}, axis="columns", join="inner")
    rows = []
    for (decoding, measure), group in both.groupby(["decoding", "measure"], sort=False):
        # A row a seed; a column a prompt of a, then of b.
        tables = group.reset_index().pivot(index="seed", columns="id", values=["a", "b"])
        a = tables["a"].to_numpy()
        b = tables["b"].to_numpy()
        compared = compare_tables(measure, a, b)
        rows.append([decoding, measure, *compared])
    return pd.DataFrame(rows, columns=COMPARISON)


def compare_tables(measure: str, a: np.ndarray, b: np.ndarray) -> list[float]:
    """Return the means of A and B, their difference B minus A, and its interval's ends.

    `a` and `b` are values of the measure, (seeds, prompts); nan where a sample lacks it.
    """
    is_measured = ~np.isnan(a) & ~np.isnan(b)
    differences = np.where(is_measured, b - a, 0)
    mean, low, high = paired_bootstrap(differences, is_measured.astype(float))
    if measure in SHARES and not differences.any():
        # Each resample says 0, but so many prompts do not show that no prompt ever differs.
        prompts = int(is_measured.any(axis=0).sum())
        _, high = share_interval(0, prompts, "exact")
        low = -high
    mean_a = a[is_measured].mean()
    mean_b = b[is_measured].mean()
    return [mean_a, mean_b, mean, low, high]
