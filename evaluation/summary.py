"""Samples in numbers: rates and means of one checkpoint, and how two checkpoints differ."""

import hashlib
import re
from collections import defaultdict
from collections.abc import Collection
from statistics import fmean, median

import numpy as np

from evaluation.intervals import mcnemar, most_unseen, paired_bootstrap, wilson_interval
from evaluation.metrics import compression_ratio, distinct_n, equal_slices
from evaluation.outputs import CHECKS, FLAGS, OFF_TOPIC, rounded

# What distinct-n and compression are taken on: (of each answer, of all), the same for every
# checkpoint. A loop shows within 32 tokens; 109 prompts whose answers have ten or more are enough.
TOKEN_SLICES = (32, 1000)
CHARACTER_SLICES = (128, 4000)
MEANS = ("tokens", "seq_rep_4", "diversity", "content_recall")
# Compared sample by sample. The outcomes are yes or no.
OUTCOMES = (*CHECKS, *FLAGS, OFF_TOPIC)
COMPARED = (*OUTCOMES, *MEANS)


class NotComparable(ValueError):
    """Two sets of samples that do not answer the same prompts."""


def rate(flags: list[bool]) -> dict:
    """How often a flag is set, with its 95% Wilson interval."""
    low, high = wilson_interval(sum(flags), len(flags))
    value = sum(flags) / len(flags) if flags else None
    return {
        "rate": rounded(value),
        "k": sum(flags),
        "n": len(flags),
        "low": rounded(low),
        "high": rounded(high),
    }


def known(samples: list[dict], name: str) -> list:
    """The values of a measure where it has one: checks, references and a judge may be missing."""
    return [sample[name] for sample in samples if sample[name] is not None]


def check_rates(samples: list[dict]) -> dict:
    """Strict and loose pass rates of the samples that have a check."""
    return {name: rate(known(samples, name)) for name in CHECKS}


def summarize(samples: list[dict], hidden: Collection[str] = ()) -> dict:
    """Rates and means over the samples of one decoding.

    Args:
        hidden: measures that are not shown; they are None.
    """
    by_section: dict[str, list[dict]] = defaultdict(list)
    for sample in samples:
        by_section[sample["section"]].append(sample)
    means = {name: known(samples, name) for name in MEANS}
    pmi = known(samples, "prompt_pmi")
    measured = {
        **check_rates(samples),
        **{name: rate(known(samples, name)) for name in (*FLAGS, OFF_TOPIC)},
        **{f"mean_{name}": rounded(fmean(v)) if v else None for name, v in means.items()},
        **{f"n_{name}": len(v) for name, v in means.items()},
        "median_prompt_pmi": rounded(median(pmi)) if pmi else None,
        **corpus_measures(samples, TOKEN_SLICES, CHARACTER_SLICES),
    }
    shown = {
        name: None if re.sub("^(mean|median|n)_", "", name) in hidden else value
        for name, value in measured.items()
    }
    sections = {
        name: {k: v for k, v in check_rates(group).items() if k not in hidden}
        for name, group in by_section.items()
    }
    return {"samples": len(samples), **shown, "sections": sections}


def corpus_measures(
    samples: list[dict], of_tokens: tuple[int, int], of_characters: tuple[int, int]
) -> dict[str, float | None]:
    """distinct-1 to -3 and compression of all answers together; None where text is too little.

    Answers are taken seed by seed, in an order of the prompts that is by chance (by their hash) and
    the same for every checkpoint.

    Args:
        of_tokens, of_characters: size and budget of the `equal_slices`.
    """
    ordered = sorted(samples, key=chance_order)
    slices = equal_slices((sample["output_ids"] for sample in ordered), *of_tokens)
    text = "\n".join(equal_slices((sample["text"] for sample in ordered), *of_characters))
    return {
        **{f"distinct_{n}": rounded(distinct_n(slices, n)) for n in (1, 2, 3)},
        "compression_ratio": rounded(compression_ratio(text)) if text else None,
    }


def chance_order(sample: dict) -> tuple[int, str]:
    """Sorts by seed, then by the hash of the prompt."""
    return sample["seed"] or 0, hashlib.sha256(sample["prompt"].encode()).hexdigest()


# ------------------------------------------------------------------------------------ comparisons


def compare(samples_a: list[dict], samples_b: list[dict]) -> dict[str, dict[str, dict]]:
    """How the answers of B differ from those of A, prompt by prompt, for each decoding and measure.

    Both are lines of samples.jsonl. Intervals are the two-level paired bootstrap's over the `seed`
    and the prompts of the samples. The seeds of one checkpoint are those of the decoding; to
    compare two methods over training seeds, join the samples of their runs with `seed` set to the
    run's.

    Returns:
        By decoding and measure, for those that both have (older samples have fewer): `a` and `b`,
        the means; `difference`, b - a, with its 95% interval `low`, `high`; `equivalent_within`,
        the smallest margin at which two one-sided tests at 5% call them equal (the 90% interval
        lies within it); and `mcnemar_p` for outcomes with one answer a prompt, else None:
        McNemar's test takes pairs as independent, and two answers to one prompt are not.

    Raises:
        NotComparable: the samples are not of the same prompts, decodings and seeds.
    """
    table_a, table_b = by_decoding(samples_a), by_decoding(samples_b)
    if table_a.keys() != table_b.keys():
        raise NotComparable(f"decodings {sorted(table_a)} and {sorted(table_b)}")
    return {
        decoding: compare_decoding(table_a[decoding], table_b[decoding]) for decoding in table_a
    }


def by_decoding(samples: list[dict]) -> dict[str, dict[tuple, dict]]:
    """Samples by decoding, then by seed and prompt id."""
    table: dict[str, dict[tuple, dict]] = defaultdict(dict)
    for sample in samples:
        table[sample["decoding"]][sample["seed"], sample["id"]] = sample
    return table


def compare_decoding(a: dict[tuple, dict], b: dict[tuple, dict]) -> dict[str, dict]:
    """The differences of one decoding; `a` and `b` map (seed, prompt id) to a sample."""
    if a.keys() != b.keys():
        seed, prompt_id = sorted(a.keys() ^ b.keys(), key=str)[0]
        raise NotComparable(f"only one has an answer to {prompt_id!r} with seed {seed}")
    for key, sample in a.items():
        if sample["prompt_sha256"] != b[key]["prompt_sha256"]:
            raise NotComparable(f"{key[1]!r} was asked in another form (prompt_sha256)")
    seeds, prompt_ids = (list(dict.fromkeys(part)) for part in zip(*a, strict=True))
    result = {}
    for name in COMPARED:
        values_a, values_b = (matrix(arm, name, seeds, prompt_ids) for arm in (a, b))
        both = ~np.isnan(values_a) & ~np.isnan(values_b)
        if both.any():
            compare_arms = compare_outcomes if name in OUTCOMES else compare_values
            result[name] = compare_arms(values_a, values_b, both)
    return result


def matrix(arm: dict[tuple, dict], name: str, seeds: list, prompt_ids: list[str]) -> np.ndarray:
    """(seeds, prompts) float64: the values of one measure, NaN where there is none."""
    rows = [[arm[seed, prompt_id].get(name) for prompt_id in prompt_ids] for seed in seeds]
    return np.array(rows, dtype=np.float64)  # of None, this makes NaN


def compare_values(a: np.ndarray, b: np.ndarray, both: np.ndarray) -> dict:
    """The comparison of one measure, (seeds, prompts) each; `both` tells where both have one."""
    return {
        "a": rounded(float(a[both].mean())),
        "b": rounded(float(b[both].mean())),
        **difference(np.where(both, b - a, 0), both.astype(float)),
        "mcnemar_p": None,
    }


def compare_outcomes(a: np.ndarray, b: np.ndarray, both: np.ndarray) -> dict:
    """`compare_values` of a yes-or-no measure: McNemar's test, and care where no pair differs."""
    found = compare_values(a, b, both)
    if len(a) == 1:
        found["mcnemar_p"] = rounded(mcnemar(a[both].astype(bool), b[both].astype(bool)))
    if not (a != b)[both].any():  # then every resample says 0, however few prompts there are
        prompts = int(both.any(axis=0).sum())
        found["high"] = rounded(most_unseen(prompts, 0.95))
        found["low"] = -found["high"]
        found["equivalent_within"] = rounded(most_unseen(prompts, 0.9))
    return found


def difference(differences: np.ndarray, weights: np.ndarray) -> dict:
    """The weighted mean of (seeds, prompts) differences, its interval and equivalence margin."""
    wide = paired_bootstrap(differences, weights)
    narrow = paired_bootstrap(differences, weights, confidence=0.9)
    return {
        "difference": rounded(wide.estimate),
        "low": rounded(wide.low),
        "high": rounded(wide.high),
        "equivalent_within": rounded(max(abs(narrow.low), abs(narrow.high))),
    }


def compare_all_nll(a: dict[str, dict | None], b: dict[str, dict | None]) -> dict[str, dict]:
    """`compare_nll` of each kind of NLL, by its name, that was measured on both."""
    return {name: compare_nll(a[name], b[name]) for name in a if a[name] and b[name]}


def compare_nll(a: dict, b: dict) -> dict:
    """How B's NLL on held-out data differs from A's, as `compare` has it, in nats per token.

    On pretraining text this is forgetting, where A is the model before fine-tuning.

    Args:
        a, b: what `held_out_nll` returns, with `sequences`.

    Raises:
        NotComparable: other data, or other tokens: another tokenizer or length.
    """
    (nats_a, tokens_a), (nats_b, tokens_b) = (np.array(x["sequences"])[:, :2].T for x in (a, b))
    if a["data"] != b["data"] or not np.array_equal(tokens_a, tokens_b):
        raise NotComparable("NLL of other data or of other tokens")
    per_token = (nats_b - nats_a) / tokens_a
    return {
        "a": a["nats_per_token"],
        "b": b["nats_per_token"],
        **difference(per_token[None], tokens_a[None]),
        "mcnemar_p": None,
    }
