"""Summaries, comparisons and the two-level bootstrap: by hand, in closed form or by brute force.

The other intervals are scipy's.
"""

from itertools import product

import numpy as np
import pytest

from evaluation.probe import intervals
from evaluation.probe.intervals import paired_bootstrap
from evaluation.probe.measures import compare, summarize
from model.cli import UserError


def make_answer(number: int, outcome: str | None = None, **fields) -> dict:
    """Make a sample with an unremarkable answer; `fields` replace what matters."""
    flags = {"blank": False, "endless": False, "loop": False, "off_topic": None}
    values = {"tokens": 4, "prompt_sha256": "x"}
    origin = {"id": f"p{number}", "section": "A", "decoding": "greedy", "seed": None}
    return origin | flags | values | {"outcome": outcome} | fields


def test_summary_by_hand():
    samples = [make_answer(0, "correct", tokens=2), make_answer(1, "wrong fact", section="B")]
    samples += [make_answer(2, blank=True, tokens=0)]
    table = summarize(samples).set_index(["section", "measure"])
    correct = table.loc[("all", "correct")]
    assert (correct.value, correct.n) == (0.5, 2)  # of the two with a check
    assert (correct.low, correct.high) == (0.094531, 0.905469)
    assert table.loc[("B", "wrong fact")].value == 1 and table.loc[("A", "wrong fact")].value == 0
    assert table.loc[("all", "blank")].value == pytest.approx(1 / 3, abs=1e-6)
    assert table.loc[("all", "tokens")].value == 2
    assert "off_topic" not in table.index.get_level_values("measure")


def arm(loops: str, **fields) -> list[dict]:
    """Make a sample for each letter: x loops, - does not."""
    return [make_answer(i, loop=mark == "x", **fields) for i, mark in enumerate(loops)]


def test_compare_by_hand():
    found = compare(arm("xxxxxx--", tokens=4), arm("------x-", tokens=6)).set_index("measure")
    assert "correct" not in found.index  # nobody has one
    loop = found.loc["loop"]
    assert (loop.a, loop.b, loop.difference) == (0.75, 0.125, -0.625)
    assert -1 <= loop.low < -0.625 < loop.high <= 0.1
    tokens = found.loc["tokens"]  # every prompt differs by 2: no resampling changes that
    assert (tokens.difference, tokens.low, tokens.high) == (2, 2, 2)


def test_compare_pairs_by_prompt_not_by_order():
    a, b = arm("xx--"), arm("xx--")
    loop = compare(a, b[::-1]).set_index("measure").loc["loop"]
    # No pair of four differs: (1 - p)^4 = 2.5% at p = 60.2%.
    assert loop.difference == 0
    assert (loop.low, loop.high) == pytest.approx((-0.602365, 0.602365), abs=1e-6)


@pytest.mark.parametrize("change", [{"decoding": "t1.0"}, {"prompt_sha256": "y"}, {"id": "q"}])
def test_other_prompts_are_not_compared(change):
    a = arm("--")
    with pytest.raises(UserError, match="not comparable"):
        compare(a, [a[0], a[1] | change])


def test_two_level_bootstrap_agrees_with_enumeration(monkeypatch):
    monkeypatch.setattr(intervals, "CONFIDENCE", 0.9)
    differences = np.array([[0.0, 4.0, 9.0], [10.0, 14.0, 19.0]])
    means = [  # every draw of two seeds and three prompts, the same for both; equally likely
        np.mean([differences[s, p] for s in seeds for p in prompts])
        for seeds in product(range(2), repeat=2)
        for prompts in product(range(3), repeat=3)
    ]
    low, high = np.quantile(means, [0.05, 0.95])
    found = paired_bootstrap(differences, np.ones((2, 3)))
    assert found == pytest.approx((28 / 3, low, high), abs=0.2)


def test_weights_leave_cells_out(monkeypatch):
    values, weights = np.array([[1.0, 9.0, 3.0]]), np.array([[1.0, 0.0, 3.0]])
    assert paired_bootstrap(values, weights) == (2.5, 1, 3)  # (1 * 1 + 3 * 3) / 4
    # Half of the draws of 2 prompts take both. Draws of 3 would have 2.2 and 2.71 as well.
    with monkeypatch.context() as patch:
        patch.setattr(intervals, "CONFIDENCE", 0.4)
        assert paired_bootstrap(values, weights) == (2.5, 2.5, 2.5)
    # Both cells have weight, but seed 0 with prompt 1 alone has none: such a draw is left out.
    assert paired_bootstrap(np.array([[1.0, 9.0], [9.0, 3.0]]), np.eye(2)) == (2, 1, 3)
