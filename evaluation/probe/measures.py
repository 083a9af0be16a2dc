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
    frame = pd.DataFrame(samples)
    for name in CHECKED:
        frame[name] = frame["outcome"].eq(name).where(frame["outcome"].notna())
    frame["seed"] = frame["seed"].fillna(0).astype(int)  # greedy decoding draws nothing
    keys = ["decoding", "seed", "section", "id", "prompt_sha256"]
    long = frame.melt(keys, list(MEASURES), "measure").dropna(subset="value")
    return long.astype({"value": float})


def summarize(samples: list[dict]) -> pd.DataFrame:
    """Summarize samples: a line for each decoding, section ("all" first) and measure.

    Shares have 95% Wilson intervals, `low` and `high`, which take answers as independent; `n`
    counts the answers that have the measure.
    """
    long = tabulate_measures(samples)
    long = pd.concat([long.assign(section="all"), long[long["section"] != "all"]])
    groups = long.groupby(["decoding", "section", "measure"], sort=False)["value"]
    table = groups.agg(value="mean", total="sum", n="count").reset_index()
    intervals = [
        share_interval(round(row.total), row.n) if row.measure in SHARES else (None, None)
        for row in table.itertuples()
    ]
    table[["low", "high"]] = pd.DataFrame(intervals, dtype=float)
    return table[["decoding", "section", "measure", "value", "low", "high", "n"]].round(6)


def compare(samples_a: list[dict], samples_b: list[dict]) -> pd.DataFrame:
    """Compare B's samples with A's prompt by prompt: a line for each decoding and measure.

    The 95% interval is a bootstrap over seeds and prompts. Samples of other prompts, decodings or
    seeds are refused.
    """
    keys = ["decoding", "measure", "seed", "id", "prompt_sha256"]
    a, b = (tabulate_measures(s).set_index(keys)["value"] for s in (samples_a, samples_b))
    asked_a, asked_b = (set(values.xs("tokens", level="measure").index) for values in (a, b))
    if asked_a != asked_b:
        raise UserError("not comparable: other prompts, decodings, seeds or chat templates")
    both = pd.concat({"a": a, "b": b}, axis=1, join="inner")
    rows = []
    for (decoding, measure), group in both.groupby(["decoding", "measure"], sort=False):
        tables = group.reset_index().pivot(index="seed", columns="id", values=["a", "b"])
        a, b = tables["a"].to_numpy(), tables["b"].to_numpy()  # (seeds, prompts), with gaps
        there = ~np.isnan(a) & ~np.isnan(b)
        mean, low, high = paired_bootstrap(np.where(there, b - a, 0), there.astype(float))
        if measure in SHARES and not (a != b)[there].any():  # each resample says 0
            _, high = share_interval(0, int(there.any(axis=0).sum()), "exact")
            low = -high
        rows.append([decoding, measure, a[there].mean(), b[there].mean(), mean, low, high])
    return pd.DataFrame(rows, columns=COMPARISON)
