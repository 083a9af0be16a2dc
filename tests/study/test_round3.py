"""Round 3: its rules on made-up shares and runs, and its fresh prompts."""

from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from dataset.world.skills import Pair
from evaluation.probe.prompts import Prompt
from evaluation.study import measure
from evaluation.study.fresh_prompts import FRESH_FILE, Known, count_skills, read_known
from evaluation.study.round3 import (
    Round3,
    choose_rate,
    judge_asking,
    judge_batch,
    judge_capacity,
    judge_distance,
    judge_layers,
    judge_rate,
    judge_steps,
    list_predictions,
    tabulate_conclusions,
    tabulate_predictions,
)
from model.files import write_text

GOOD = {"original": 0.01, "all_r8": 0.6, "all_r64": 0.8}
NONE = dict.fromkeys(GOOD, 0.0)
BLANK = dict.fromkeys(GOOD, 0.5)


@pytest.mark.parametrize(
    ("with_template", "without", "blank", "conclusion"),
    [
        (GOOD, NONE, BLANK, "yes"),
        (GOOD, NONE | {"all_r8": 0.03}, BLANK, "yes"),
        (GOOD, NONE | {"all_r8": 0.04}, BLANK, "in part"),  # more than 3% correct
        (GOOD, NONE | {"all_r8": 0.30}, BLANK, "no"),  # half of its share
        (GOOD, NONE, BLANK | {"original": 0.2}, "in part"),  # few blanks
        (GOOD | {"all_r8": 0.29}, NONE, BLANK, "in part"),  # did not learn
        (GOOD, NONE | {"all_r64": np.nan}, BLANK, "not run"),
        ({"original": 0.01}, {"original": 0.0}, {"original": 0.5}, "not run"),
    ],
)
def test_asking(with_template: dict, without: dict, blank: dict, conclusion: str) -> None:
    assert judge_asking(with_template, without, blank) == conclusion


def test_rules_at_their_thresholds() -> None:
    nan = float("nan")
    assert judge_steps(0.65, 0.48) == "yes"
    assert judge_steps(0.49, 0.29) == "no"
    assert judge_steps(0.65, 0.47) == judge_steps(0.5, 0.1) == "in part"
    assert judge_rate(0.30, 0.14) == "the rate itself is a cause"
    assert judge_rate(0.30, 0.25) == "none beside the steps"
    assert judge_rate(0.30, 0.24) == "in part"
    assert judge_layers(0.44, 0.5, 0.88) == "the layers suffice alone"
    assert judge_layers(0.40, 0.70, 0.88) == "together they suffice"
    assert judge_layers(0.40, 0.69, 0.88) == "together they do not suffice"
    assert judge_capacity({"xs": 0.03, "s": -0.02, "m26": nan}) == "capacity"
    assert judge_capacity({"xs": 0.03, "s": 0.0, "m26": 0.05}) == "in part"
    assert judge_capacity({"xs": 0.11, "s": 0.0, "m26": 0.0}) == "size"
    assert judge_distance(0.25, 0.05) == "a cause"
    assert judge_distance(0.20, 0.05) == "not a cause"
    assert judge_batch(0.10, 0.16) == "large batches hurt LoRA more"
    assert judge_batch(0.10, 0.14) == "no difference"
    missing = [
        judge_steps(nan, 0.5),
        judge_rate(0.3, nan),
        judge_layers(0.1, nan, 0.8),
        judge_capacity({"xs": 0.0}),
        judge_distance(nan, 0.04),
        judge_batch(0.1, nan),
    ]
    assert set(missing) == {"not run"}


@pytest.mark.parametrize(
    ("shares", "nats", "best", "is_edge"),
    [
        ([0.6, 0.8, 0.7], [1.0, 0.9, 0.8], 2.0, False),
        ([0.6, 0.8, 0.79], [1.0, 0.9, 0.8], 4.0, True),  # a tie: the lower loss
        ([0.9, 0.8, 0.7], [1.0, 0.9, 0.8], 1.0, True),
    ],
)
def test_rates_are_chosen(shares: list, nats: list, best: float, is_edge: bool) -> None:
    rates = pd.DataFrame({"learning_rate": [1.0, 2.0, 4.0]})
    rates = rates.assign(tune_correct=shares, tune_nll=nats)
    assert choose_rate(rates) == (best, is_edge)


def make_runs(outcomes: list[dict], seeds: list[int]) -> Round3:
    """Return runs of all-layer LoRA, and four prompts: two of composition, a plain one, unseen."""
    prompts = pd.DataFrame(
        [
            ("1", "fresh_combinations", "quotes", "a:quotes"),
            ("2", "fresh_combinations", "where", "b:where"),
            ("3", "fresh_combinations", "negate", "c:negate"),
            ("4", "fresh_unseen", "where", "d"),
        ],
        columns=["id", "set", "skill", "cluster"],
    )
    names = ["size", "base", "arm", "learning_rate", "epochs", "data"]
    place = dict(zip(names, ["xs", "xs-world-wrapped42", "all_r8", 3e-3, 4.0, "sft"], strict=True))
    rows = [place | {"seed": s, "outcomes": o} for s, o in zip(seeds, outcomes, strict=True)]
    return Round3(pd.DataFrame(rows), prompts)


def test_marks_and_estimates() -> None:
    """Shares by outcome and way; prompts not asked are left out; t needs three runs."""
    outcome = {
        "fresh_combinations": {"greedy": "cbe", "t0.85p0.85": "cbc cbe"},
        "fresh_combinations/no_template": {"greedy": "b-c"},
        "fresh_unseen": {"greedy": "c"},
    }
    found = make_runs([outcome], [4])
    runs = found.find("xs", "all_r8", 3e-3)
    assert found.share(runs) == 0.5  # prompts 1 and 3
    assert found.share(runs, decoding="t0.85p0.85") == 0.75  # 1 of 1, and half of 2 draws
    assert found.share(runs, outcome="plain", kind="blank") == 1.0
    assert found.share(runs, outcome="unseen") == 1.0
    assert found.share(runs, way="no_template") == 0.5
    assert list(found.mark(runs, "plain", "no_template").columns) == []  # it was not asked
    assert np.isnan(found.share(runs, way="on_fft"))
    assert found.estimate(found.mark(runs)).runs == 1
    assert found.find("xs", "all_r8", 3e-3, epochs=1.0).empty
    shares = ["ccc", "cce", "eee"]
    three = make_runs([{"fresh_combinations": {"greedy": text}} for text in shares], [4, 5, 6])
    runs = three.find("xs", "all_r8", 3e-3)
    estimate = three.estimate(three.mark(runs))  # 1, 1/2 and 0 of composition
    reach = 4.302653 * 0.5 / 3**0.5  # t of 2 degrees of freedom, sd 0.5
    assert estimate.value == 0.5 and estimate.runs == 3
    assert np.isclose(estimate.high_t - estimate.value, reach, atol=1e-5)
    none = three.estimate(three.mark(runs), minus=three.mark(runs))
    assert (none.value, none.low, none.high) == (0, 0, 0)


def test_tables_wait_for_runs() -> None:
    """Predictions and conclusions of what did not run say so; a run that is there is judged."""
    outcome = {"fresh_combinations": {"greedy": "ccc"}, "fresh_unseen": {"greedy": "c"}}
    outcome |= {"fresh_combinations/no_template": {"greedy": "bbb"}}
    found = make_runs([outcome], [4])
    table = tabulate_predictions(found)
    assert len(table) == len(list_predictions())
    ran = table[table.met != "not run"].set_index("what")
    assert ran.met.to_dict() == {
        "all-layer LoRA, r=8, without the template": "yes",
        "all-layer LoRA, r=8, without the template: blank": "no",  # 100%, told at most 80
    }
    assert set(tabulate_conclusions(found).conclusion) == {"not run"}


def make_pair(prompt: str, answer: str, cell: tuple[str, str] = ("cow", "where")) -> Pair:
    """Return a pair of one turn."""
    turns = [{"role": "user", "content": prompt}, {"role": "assistant", "content": answer}]
    return Pair("where", turns, [cell])


def test_fresh_prompts_repeat_nothing(tmp_path: Path) -> None:
    """Old words about the same cell, trained prompts and long trained answers are refused."""
    line = (
        '{{"cell": ["cow", "where"], "conversations": [{{"role": "user", "content": "{}"}}, '
        '{{"role": "assistant", "content": "{}"}}]}}\n'
    )
    old, trained = tmp_path / "old.jsonl", tmp_path / "trained.jsonl"
    write_text(old, line.format("Where is the cow?", "On a farm."))
    write_text(trained, line.format("Where is a dog?", "A dog sleeps in a kennel."))
    known = read_known([old], [trained])
    assert known.is_old(make_pair("where is the cow", "Here."))  # but for its marks
    assert not known.is_old(make_pair("Where is the cow?", "Here.", ("ox", "where")))
    assert known.is_trained(make_pair("Where is a dog", "Here."))
    assert not known.is_trained(make_pair("Where is a cat?", "Here."))
    assert known.is_answered(make_pair("Who?", "A dog sleeps in a kennel."))
    assert not known.is_answered(make_pair("Who?", '"A dog sleeps in a kennel."'))  # in quotes
    short = Known(frozenset(), frozenset(), frozenset(["Just brown."]))
    assert not short.is_answered(make_pair("Which color?", "Just brown."))


def test_fresh_prompts_have_the_old_shares_of_skills() -> None:
    """1,087 prompts of composition, 113 plain questions, 300 on unseen things."""
    skills = count_skills(FRESH_FILE)
    table = pd.read_csv(FRESH_FILE.parent / "prompts.csv", keep_default_na=False)
    is_asked = (table.half == "test") & table["set"].isin(["combinations", "unseen"])
    assert skills == table.skill[is_asked].value_counts().to_dict()


def test_outcomes_of_prompts_that_were_not_asked_are_marked(monkeypatch) -> None:
    """Without the template a prompt of two turns is left out; each draw is a word."""
    one = Prompt("one", "set", [{"role": "user", "content": "Hello"}], None, {}, "Hi.")
    two = Prompt("two", "set", [*one.messages, *one.messages], None, {}, "Hi.")
    kinds = {"one": "blank", "two": "correct"}

    def answer(checkpoint: None, prompts: list[Prompt], has_template: bool, **options: list):
        rounds = [("greedy", None), ("t1.0", 1), ("t1.0", 2)]
        return [
            {"id": prompt.id, "decoding": decoding, "seed": seed, "outcome": kinds[prompt.id]}
            for decoding, seed in rounds
            for prompt in prompts
        ]

    monkeypatch.setattr(measure, "probe", answer)
    assert measure.ask(None, [one, two], {}) == {"greedy": "bc", "t1.0": "bc bc"}
    words = measure.ask(None, [one, two], {}, has_template=False)
    assert words == {"greedy": "b-", "t1.0": "b- b-"}
