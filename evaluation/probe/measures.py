"""Measure answers without a judge model, and summarize and compare them as data frames.

    correct       the answer passes its prompt's check (`judge_answer` in dataset/checks.py)
    other thing, wrong fact, wrong form     why it does not, where it ends, is not blank and no loop
    blank         nothing but white space before the end token
    endless       no end token within the limit
    loop          4 characters or more stand 3 times in a row
    tokens        length of the answer without its end token
    seq_rep_4     share of repeated 4-grams of tokens (Welleck et al. 2020, arXiv 1908.04319)
    distinct_2    distinct among all word bigrams, on equally much text (Li et al. 2016, 1510.03055)
    recall        share of the reference's content words that the answer has (as in ROUGE-1)
    off_topic     an independent model finds it likelier under another prompt (likelihood.py)

The first 4 are shares of the prompts with a check, the others of all. `find_words` splits text into
words; each Chinese character counts as one.
"""

import hashlib
import re
from collections.abc import Sequence

import numpy as np
import pandas as pd

from dataset.checks import LOOP
from evaluation.probe.statistics import mcnemar, most_unseen, paired_bootstrap, wilson_interval
from model.files import UserError

CJK = r"\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff"
WORD = re.compile(rf"[{CJK}]|[^\W_{CJK}]+(?:['’-][^\W_{CJK}]+)*")
STOP_TEXT = (
    "a about after all also an and any are as at be because been but by can could did do does for "
    "from had has have he her his how i if in into is it its may me more most my no not of on one "
    "or other our she should so some such than that the their them then there these they this to "
    "up us was we were what when which who will with would you your "
    "的 了 是 在 和 与 也 有 就 不 这 那 我 你 他 她 它 们 一 个 及 或 等 被 把 对 为 以"
)
STOP_WORDS = frozenset(STOP_TEXT.split())
CHECKED = ("correct", "other thing", "wrong fact", "wrong form")
SHARES = (*CHECKED, "blank", "endless", "loop", "off_topic")
MEANS = ("tokens", "seq_rep_4", "recall")
MEASURES = (*SHARES, *MEANS)
COMPARISON = ["decoding", "measure", "a", "b", "difference", "low", "high", "p"]
DISTINCT_WORDS = (12, 600)  # of each answer, and of all: what distinct_2 is taken on


def find_words(text: str) -> list[str]:
    """Split a text into words with inner ' or -, and single Chinese or Japanese characters."""
    return WORD.findall(text)


def has_cjk(text: str) -> bool:
    """Say whether a text holds a Chinese or Japanese character."""
    return re.search(f"[{CJK}]", text) is not None


def find_loop(text: str) -> tuple[int, int] | None:
    """Find the first stretch of a text that repeats itself 3 times or more."""
    match = LOOP.search(text)
    return match and match.span()


def seq_rep_n(tokens: Sequence, n: int = 4) -> float | None:
    """Compute 1 - (unique n-grams) / (all n-grams); None below n tokens."""
    grams = [tuple(tokens[i : i + n]) for i in range(len(tokens) - n + 1)]
    return 1 - len(set(grams)) / len(grams) if grams else None


def content_recall(answer: str, reference: str) -> float | None:
    """Compute the share of the reference's distinct content words that the answer has."""
    wanted = {word.casefold() for word in find_words(reference)} - STOP_WORDS
    found = {word.casefold() for word in find_words(answer)}
    return len(wanted & found) / len(wanted) if wanted else None


def distinct_n(texts: Sequence[str], n: int, each: int, budget: int) -> float | None:
    """Compute the share of distinct word n-grams in the first `each` words of the texts.

    The ratio falls as text grows: words count until they are `budget`; None if they are fewer.
    """
    grams: list[tuple] = []
    for text in texts:
        words = find_words(text)[: min(each, budget)]
        grams += [tuple(words[i : i + n]) for i in range(len(words) - n + 1)]
        budget -= len(words)
        if budget == 0:
            return len(set(grams)) / len(grams)
    return None


# ---------------------------------------------------------------------------------- data frames


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

    Returns:
        decoding, section, measure, value, low, high, n. Shares have 95% Wilson intervals, which
        take answers as independent; n is the number of answers that have the measure.
    """
    long = tabulate_measures(samples)
    long = pd.concat([long.assign(section="all"), long])
    groups = long.groupby(["decoding", "section", "measure"], sort=False)["value"]
    table = groups.agg(["mean", "sum", "count"]).reset_index()
    is_share = table["measure"].isin(SHARES)
    intervals = [
        wilson_interval(round(k), n) if share else (None, None)
        for k, n, share in zip(table["sum"], table["count"], is_share, strict=True)
    ]
    table[["low", "high"]] = pd.DataFrame(intervals, index=table.index, dtype=float)
    table = table.rename(columns={"mean": "value", "count": "n"})
    table = table[["decoding", "section", "measure", "value", "low", "high", "n"]]
    return pd.concat([table, measure_distinct(samples)], ignore_index=True).round(6)


def measure_distinct(samples: list[dict]) -> pd.DataFrame:
    """Measure distinct_2 of each decoding, the answers in an order by the prompts' hashes."""
    ordered = sorted(samples, key=lambda s: (s["seed"] or 0, hash_text(s["prompt"])))
    by_decoding: dict[str, list[str]] = {}
    for sample in ordered:
        by_decoding.setdefault(sample["decoding"], []).append(sample["output"])
    found = {name: distinct_n(texts, 2, *DISTINCT_WORDS) for name, texts in by_decoding.items()}
    rows = [(name, value, len(by_decoding[name])) for name, value in found.items() if value]
    table = pd.DataFrame(rows, columns=["decoding", "value", "n"])
    return table.assign(section="all", measure="distinct_2")


def hash_text(text: str) -> str:
    """Hash a text (hex SHA-256)."""
    return hashlib.sha256(text.encode()).hexdigest()


def compare(samples_a: list[dict], samples_b: list[dict]) -> pd.DataFrame:
    """Compare B's samples with A's prompt by prompt, by decoding and measure.

    Returns:
        decoding, measure, a, b, difference, low, high (95%, bootstrap over seeds and prompts), p
        (McNemar's, of shares with one answer a prompt).

    Raises:
        UserError: the samples are not of the same prompts, decodings and seeds.
    """
    keys = ["decoding", "measure", "seed", "id", "prompt_sha256"]
    a, b = (tabulate_measures(s).set_index(keys)["value"] for s in (samples_a, samples_b))
    asked_a, asked_b = (
        {(s["decoding"], s["seed"], s["id"], s["prompt_sha256"]) for s in samples}
        for samples in (samples_a, samples_b)
    )
    if asked_a != asked_b:
        raise UserError("not comparable: other prompts, decodings, seeds or chat templates")
    both = pd.concat({"a": a, "b": b}, axis=1, join="inner")
    rows = []
    for (decoding, measure), group in both.groupby(["decoding", "measure"], sort=False):
        tables = group.reset_index().pivot(index="seed", columns="id", values=["a", "b"])
        values_a, values_b = tables["a"].to_numpy(), tables["b"].to_numpy()
        p = None
        if measure in SHARES and len(values_a) == 1:
            p = mcnemar(values_a[0].astype(bool), values_b[0].astype(bool))
        rows.append([decoding, measure, *compare_values(values_a, values_b, measure in SHARES), p])
    return pd.DataFrame(rows, columns=COMPARISON)


def compare_values(a: np.ndarray, b: np.ndarray, is_share: bool) -> tuple[float, ...]:
    """Return the means, their difference and its interval of (seeds, prompts) values with gaps."""
    there = ~np.isnan(a) & ~np.isnan(b)
    found = paired_bootstrap(np.where(there, b - a, 0), there.astype(float))
    low, high = found.low, found.high
    if is_share and not (a != b)[there].any():  # each resample says 0, however few prompts
        high = most_unseen(int(there.any(axis=0).sum()))
        low = -high
    return float(a[there].mean()), float(b[there].mean()), found.estimate, low, high
