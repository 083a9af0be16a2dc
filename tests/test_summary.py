"""Rates, means and differences of samples, on cases worked out by hand."""

import gzip

import pytest

from evaluation.summary import NotComparable, compare, compare_nll, corpus_measures, summarize

CHECK = {"contains": ["a"]}


def sample(section: str = "A", **fields) -> dict:
    """A sample with an unremarkable answer; `fields` replace what matters."""
    measures = {"tokens": 4, "seq_rep_4": 0.5, "diversity": 0.25, "content_recall": None}
    flags = {"blank": False, "runaway": False, "loop": False, "off_topic": None, "prompt_pmi": None}
    checks = {"check": None, "check_strict": None, "check_loose": None}
    answer = {"section": section, "output_ids": [1, 2, 3, 4], "output": "a b", "text": "a b"}
    origin = {"decoding": "greedy", "seed": None, "prompt": "?", "prompt_sha256": "same"}
    return measures | flags | checks | answer | origin | fields


def checked(strict: bool, **fields) -> dict:
    return sample(check=CHECK, check_strict=strict, check_loose=True, **fields)


def test_summary_by_hand():
    samples = [checked(True, off_topic=True), checked(False, loop=True, off_topic=False)]
    samples += [sample("B", tokens=1, content_recall=0.5, prompt_pmi=2.0)]
    summary = summarize(samples)
    assert summary["samples"] == 3
    assert summary["loop"] == {"rate": 0.333333, "k": 1, "n": 3, "low": 0.061492, "high": 0.79234}
    assert (summary["check_strict"]["rate"], summary["check_loose"]["rate"]) == (0.5, 1)
    assert (summary["off_topic"]["k"], summary["off_topic"]["n"]) == (1, 2)
    assert summary["sections"]["A"]["check_strict"]["n"] == 2
    assert summary["sections"]["B"]["check_strict"]["rate"] is None
    assert (summary["mean_tokens"], summary["mean_content_recall"]) == (3, 0.5)
    assert summary["median_prompt_pmi"] == 2
    assert summary["distinct_1"] is None  # 12 tokens, fewer than the budget


def test_answers_without_4_grams_are_left_out_of_repetition():
    blank = sample(tokens=0, seq_rep_4=None, diversity=None)
    summary = summarize([sample(), blank, sample(seq_rep_4=0.1)])
    assert (summary["mean_seq_rep_4"], summary["n_seq_rep_4"]) == (pytest.approx(0.3), 2)
    assert (summary["mean_diversity"], summary["n_diversity"]) == (0.25, 2)
    assert summary["n_tokens"] == 3
    nothing = summarize([blank])
    assert (nothing["mean_diversity"], nothing["n_diversity"]) == (None, 0)


def test_corpus_measures_do_not_depend_on_the_order_or_the_length_of_answers():
    answers = [sample(prompt=f"p{i}", output_ids=[i, 7], text="ab") for i in range(4)]
    found = corpus_measures(answers, (2, 8), (2, 8))
    assert found["distinct_1"] == 5 / 8  # 0 1 2 3, and 7 four times
    longer = [one | {"output_ids": one["output_ids"] * 9, "text": "ab" * 9} for one in answers]
    assert corpus_measures(longer[::-1], (2, 8), (2, 8)) == found
    assert found["compression_ratio"] == pytest.approx(11 / len(gzip.compress(b"ab\nab\nab\nab")))
    assert set(corpus_measures(answers, (2, 9), (2, 9)).values()) == {None}


def test_what_is_hidden_is_none_and_the_rest_stays():
    samples = [checked(True, content_recall=0.5)]
    full, part = summarize(samples), summarize(samples, ["check_strict", "content_recall", "loop"])
    assert (part["check_strict"], part["mean_content_recall"], part["loop"]) == (None, None, None)
    assert part["sections"] == {"A": {"check_loose": full["check_loose"]}}
    assert part["check_loose"] == full["check_loose"] and part["blank"] == full["blank"]


def arm(loops: str, tokens: int = 4, decoding: str = "greedy") -> list[dict]:
    """A sample for each letter of `loops`: x loops, - does not."""
    return [
        sample(id=f"p{i}", loop=mark == "x", tokens=tokens, decoding=decoding)
        for i, mark in enumerate(loops)
    ]


def test_compare_by_hand():
    found = compare(arm("xxxxxx--", tokens=4), arm("------x-", tokens=6))["greedy"]
    assert "check_strict" not in found and "off_topic" not in found  # nobody has one
    loop = found["loop"]
    assert (loop["a"], loop["b"], loop["difference"]) == (0.75, 0.125, -0.625)
    # Seven pairs differ, six one way: 2 * (C(7,0) + C(7,1)) / 2^7 = 0.125.
    assert loop["mcnemar_p"] == 0.125
    # Differences are -1 (6 of 8), 1 and 0: the interval brackets the mean within their range.
    assert -1 <= loop["low"] < -0.625 < loop["high"] <= 0.1
    assert loop["equivalent_within"] <= -loop["low"]
    tokens = found["tokens"]  # every prompt differs by 2: no resampling changes that
    assert (tokens["difference"], tokens["low"], tokens["high"]) == (2, 2, 2)
    assert (tokens["equivalent_within"], tokens["mcnemar_p"]) == (2, None)


def test_compare_pairs_by_prompt_and_seed_not_by_order():
    a, b = arm("xx--"), arm("xx--")
    found = compare(a, list(reversed(b)))["greedy"]["loop"]
    # No pair of four differs: (1 - p)^4 = 2.5% at p = 60.2%, 5% at 52.7%.
    assert (found["difference"], found["mcnemar_p"]) == (0, 1)
    assert (found["low"], found["high"]) == (-0.602365, 0.602365)
    assert found["equivalent_within"] == pytest.approx(1 - 0.05**0.25, abs=1e-6)
    seeds_a = [one | {"seed": seed} for seed in (0, 1) for one in a]
    found = compare(seeds_a, seeds_a)["greedy"]["loop"]
    assert found["mcnemar_p"] is None  # two answers to one prompt are no two pairs


@pytest.mark.parametrize(
    "b, message",
    [
        (arm("--", decoding="t1.0"), "decodings"),
        (arm("-"), "only one has an answer to 'p1'"),
        ([one | {"prompt_sha256": "other"} for one in arm("--")], "'p0' was asked in another form"),
    ],
)
def test_other_prompts_are_not_compared(b, message):
    with pytest.raises(NotComparable, match=message):
        compare(arm("--"), b)


def test_compare_nll_weighs_sequences_by_their_tokens():
    a = {"data": [], "nats_per_token": 3.0}
    a["sequences"] = [[30.0, 10, 9.0, 1], [60.0, 20, 9.0, 1], [90.0, 30, 9.0, 1]]  # with end tokens
    b = {"data": [], "nats_per_token": 2.0, "sequences": [[20.0, 10], [40.0, 20], [60.0, 30]]}
    found = compare_nll(a, b)  # a nat a token better in every sequence
    assert (found["difference"], found["low"], found["high"]) == (-1, -1, -1)
    uneven = b | {"sequences": [[30.0, 10], [60.0, 20], [30.0, 30]]}
    assert compare_nll(a, uneven)["difference"] == -1  # (0 * 10 + 0 * 20 - 2 * 30) / 60
    with pytest.raises(NotComparable, match="other tokens"):
        compare_nll(a, b | {"sequences": [[20.0, 11], [40.0, 20], [60.0, 30]]})
