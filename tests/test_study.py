"""The study: what is planned, what is known, what the rules say, and one run of it from nothing."""

import argparse
import hashlib
import json
import re
import shlex
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from copy import deepcopy
from dataclasses import astuple, replace
from pathlib import Path

import numpy as np
import pytest
from matplotlib.figure import Figure

from dataset.command_line import REPO_DIR, SettingsError
from dataset.jsonl import DataError
from evaluation import run_study
from evaluation.findings import (
    NOT_RUN,
    Contrast,
    Forgotten,
    Judged,
    bad_shares,
    cited,
    contrast_answers,
    corrected,
    few_prompt_rates,
    forgetting_by_arm,
    gather,
    holm,
    is_met,
    judge,
    judge_claims,
    p_value,
    stated,
    why_no_answers,
    why_unknown,
    wrong_winner_rate,
)
from evaluation.intervals import Interval
from evaluation.recovery import (
    check_controlled,
    check_prompts,
    describe_cell,
    interval_of,
    measure_cell,
    recovery_draws,
)
from evaluation.run_study import (
    STUDY_RESULTS,
    changed_flag,
    check_data,
    check_patterns,
    check_same_base,
    check_start,
    chosen_ids,
    fetch_bases,
    has_weights,
    how_to_go_on,
    lacks,
    missing_data,
    parse_shard,
    perform,
    runs_left,
    summarize_probe,
)
from evaluation.study import (
    DEFAULTS,
    STUDY_FILE,
    Cell,
    Run,
    as_words,
    is_interior,
    lineage,
    parse_cell,
    planned_runs,
    rates_of,
    read_results,
    read_study,
    sweep_of,
    training_flags,
    tuned_rate,
    tuning_runs,
)
from evaluation.study_plots import (
    draw_recovery,
    draw_sizes,
    probes_by_cell,
    recoveries_by_size,
    recovery_by_cell,
    study_figures,
)
from evaluation.study_report import (
    ANSWER_RATES,
    citations,
    study_block,
    study_details,
    summary_block,
)
from model.checkpoint import TOKENIZER_DIR, load_tokenizer, save_model
from tests.tiny import tiny_model

TOML = """
[common]
max_seq_len = 64
batch_size = 8
device = "cpu"
[measure]
max_seq_len = 64
device = "cpu"
[probe]
decoding = ["greedy"]
max_new_tokens = 4
device = "cpu"
[data]
pretrain = ["text.jsonl"]
pretrain_valid = ["text.jsonl"]
general = ["chat.jsonl"]
general_valid = ["chat_valid.jsonl"]
[[parts]]
truncate = [1]
[sizes.xs]
hidden_size = 32
num_hidden_layers = 1
num_attention_heads = 2
num_key_value_heads = 1
intermediate_size = 32
learning_rate = 1e-2
dtype = "float32"
epochs = 2
[bases.plain]
share = 0.5
flags = { log_interval = 1 }
[arms.fft]
title = "all of it"
stage = "full_sft"
rates = ["1e-3", "1e-2", "1e-1"]
[arms.square]
title = "LoRA on q and o"
stage = "lora"
rates = ["1e-3", "1e-2"]
flags = { lora_targets = "square", lora_rank = 2 }
[tuning]
base = { xs = "plain" }
base_seed = 42
variant = "main"
seeds = { xs = [1, 2] }
[variants.main]
data = "general"
reference = "main"
flags = { max_train_samples = 16, epochs = 1 }
[variants.long]
data = "general"
reference = "main"
flags = { max_train_samples = 16, epochs = 3 }
[[experiments]]
id = "rates"
question = "Which rate?"
cells = ["fft@sweep"]
seeds = [1, 2]
[[experiments]]
id = "H"
question = "Does it help?"
cells = ["square@1e-3", "fft@tuned/long"]
seeds = [1, 2, 3]
[[experiments.claims]]
name = "C"
text = "square fails"
not_shown = "why"
supported = [{ recovery = "square@1e-3", at_most = 0.5 }]
refuted = [{ recovery = "square@1e-3", at_least = 0.5 }]
"""
OTHER_DATA = """
[variants.other]
data = "pretrain"
reference = "other"
flags = {}
"""
NATS = {"nats": [1.0, 1.0], "tokens": [1, 1], "end_nats": [0.5, 0.5], "ends": [0, 0]}
COMMITTED = (Path("dataset/data"), Path("out/study"))  # where its commands say data and runs are
THIRD = "0.33 [0.33, 0.33]"
SAME = "+0.00 (+0.00 to +0.00)"  # what two seeds forget alike
HALF, WHOLE = "0.50 [0.50, 0.50]", "1 (what R is a share of)"  # R in a table
EDGE = "open: a rate at the edge of its grid, or not run with every seed, neighbors too"
TOKENS = [10, 20, 30, 40]  # validation: 10 and 30; test: 20 and 40


@pytest.fixture
def study(tmp_path: Path) -> dict:
    path = tmp_path / "study.toml"
    path.write_text(TOML)
    return read_study(path)


def measured_as(nats: list[float], tokens: list[int] = TOKENS) -> dict:
    """Held-out measures of conversations, each with one end token, of a tenth of a nat."""
    return {"nats": nats, "tokens": tokens, "end_nats": [0.1] * 4, "ends": [1] * 4}


def result_of(run_id: str, seed: int, nats: list[float] | None, arm: str | None = "fft") -> dict:
    """A result file's content; without `nats` the run diverged."""
    base = {"id": run_id, "size": "xs", "base": "plain", "arm": arm, "seed": seed, "seconds": 36.0}
    if nats is None:
        return base | {"status": "diverged", "run": {"git": {"dirty": True}}}
    held_out = {"general": measured_as(nats)}
    run = {"trainable_parameters": 1234, "flops": 2e12 * seed, "peak_memory_bytes": 1.5e9}
    run |= {"git": {}, "steps": 99}
    run |= {"parameters": 2000, "tokens": 3_000_000, "settings": {"dtype": "float32"}}
    measured = {"held_out": held_out, "text_nll": 4.0}
    return base | {"status": "completed", "run": run} | measured


def results_of(losses: dict[str, list[float] | None]) -> dict[str, dict]:
    """Results by id, from nats by id."""
    return {
        name: result_of(name, int(name.rsplit("s", 1)[1]), nats, name.split("-")[2])
        for name, nats in losses.items()
    }


SWEEP = {
    "xs-plain42-fft-lr1e-3-s1": [20.0, 40.0, 60.0, 80.0],  # 2 nats a token everywhere
    "xs-plain42-fft-lr1e-3-s2": [20.0, 40.0, 60.0, 80.0],
    "xs-plain42-fft-lr1e-2-s1": [10.0, 60.0, 30.0, 120.0],  # 1 on validation, 3 on test
    "xs-plain42-fft-lr1e-2-s2": [10.0, 60.0, 30.0, 120.0],
    "xs-plain42-fft-lr1e-1-s1": [1.0, 1.0, 1.0, 1.0],
    "xs-plain42-fft-lr1e-1-s2": None,  # so much better, but for the seed that diverged
}
CELL = Cell("xs", "plain", 42, "square", "1e-3", "main")
LANGUAGES = {"English": np.arange(4) < 3, "Chinese": np.arange(4) == 3}
BASE = {"xs-plain42": result_of("xs-plain42", 42, [50.0, 100.0, 150.0, 200.0], None)}


def test_runs_come_once_in_order_after_their_base(study: dict) -> None:
    runs, waiting = planned_runs(study, "xs", {})
    assert [run.id for run in runs] == [
        "xs-plain42",
        "xs-plain42-fft-lr1e-3-s1",
        "xs-plain42-fft-lr1e-2-s1",
        "xs-plain42-fft-lr1e-1-s1",
        "xs-plain42-square-lr1e-3-s1",
        "xs-plain42-square-lr1e-3-s2",
        "xs-plain42-square-lr1e-3-s3",
    ]
    assert waiting == ["H: fft@tuned/long", "rates: fft@sweep"]
    runs, waiting = planned_runs(study, "xs", results_of(SWEEP))
    assert [run.id for run in runs if run.variant == "long"] == [
        f"xs-plain42-fft-long-lr1e-2-s{seed}" for seed in (1, 2, 3)
    ]
    assert waiting == []


def test_rate_is_tuned_on_validation_and_no_diverged_rate_wins(study: dict) -> None:
    results = results_of(SWEEP)
    sweep = sweep_of(study, "fft", "xs", results)
    assert sweep.losses == {"1e-3": 2.0, "1e-2": 1.0, "1e-1": float("inf")}
    assert (sweep.best, sweep.is_whole, is_interior(sweep)) == ("1e-2", True, True)
    assert tuned_rate(study, "fft", "xs", results) == "1e-2"
    del results["xs-plain42-fft-lr1e-3-s2"]
    assert tuned_rate(study, "fft", "xs", results) is None
    # A report of what there is takes the best that has every seed.
    assert tuned_rate(study, "fft", "xs", results, all_seeds=False) == "1e-2"
    del results["xs-plain42-fft-lr1e-3-s1"]
    assert sweep_of(study, "fft", "xs", results) is None


def sweep_with(study: dict, found: dict[str, float | None]) -> tuple[list[str], str | None]:
    """What a sweep of fft has left to run, and its tuned rate, by NLL of "rate-seed"."""
    name = "xs-plain42-fft-lr"
    results = results_of(
        {name + key: nll and [nll * tokens for tokens in TOKENS] for key, nll in found.items()}
    )
    runs = tuning_runs(study, "fft", "xs", results)
    left = [run.id.removeprefix(name) for run in runs if run.id not in results]
    return left, tuned_rate(study, "fft", "xs", results)


def test_sweep_takes_every_seed_to_the_best_rate_and_its_neighbors_only(study: dict) -> None:
    study["arms"]["fft"]["rates"] = ["1e-4", "1e-3", "1e-2", "1e-1"]
    assert sweep_with(study, {}) == (["1e-4-s1", "1e-3-s1", "1e-2-s1", "1e-1-s1"], None)
    found = {"1e-4-s1": 3.0, "1e-3-s1": 2.0, "1e-2-s1": 1.0, "1e-1-s1": 2.0}
    assert sweep_with(study, found) == (["1e-3-s2", "1e-2-s2", "1e-1-s2"], None)
    # One more seed at some of them moves nothing, though with it their means would.
    found |= {"1e-2-s2": 3.2}
    assert sweep_with(study, found) == (["1e-3-s2", "1e-1-s2"], None)
    # The mean at 1e-2 is 2.1, at 1e-3 2.05: the best moves, and wants its other neighbor.
    found |= {"1e-3-s2": 2.1, "1e-1-s2": 3.0}
    assert sweep_with(study, found) == (["1e-4-s2"], None)
    assert sweep_with(study, found | {"1e-4-s2": 3.0}) == ([], "1e-3")


def test_sweep_of_one_seed_and_one_that_diverged_everywhere(study: dict) -> None:
    diverged = {f"{rate}-s1": None for rate in ("1e-3", "1e-2", "1e-1")}
    assert sweep_with(study, diverged) == ([], None)
    study["tuning"]["seeds"]["xs"] = [1]
    found = {"1e-3-s1": 2.0, "1e-2-s1": 1.0, "1e-1-s1": 2.0}
    assert sweep_with(study, found) == ([], "1e-2")


def test_sweep_of_other_runs_than_rates_are_tuned_by_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "study.toml"
    for old, new, named in (
        ("fft@sweep", "fft@sweep/long", "variant"),
        ("seeds = [1, 2]\n[[", "seeds = [1, 2, 3]\n[[", "seeds"),
        ('cells = ["fft@sweep"]', 'base = "other"\ncells = ["fft@sweep"]', "base"),
    ):
        path.write_text(TOML.replace(old, new))
        with pytest.raises(SettingsError, match=f"'rates': fft@sweep has {named} other than"):
            read_study(path)


def test_recovery_of_a_cell_by_hand(study: dict) -> None:
    # On test conversations the base has 5 nats a token, FFT at its tuned rate 3, square 4.
    square = {f"xs-plain42-square-lr1e-3-s{s}": [0.0, 80.0, 0.0, 160.0] for s in (1, 2)}
    results = BASE | results_of(SWEEP | square | {"xs-plain42-square-lr1e-3-s3": None})
    row = describe_cell(study, CELL, results)
    assert row.measured.nll == pytest.approx(4.0)
    assert (row.measured.seeds, row.measured.failed) == ([1, 2], 1)
    assert row.recovery.estimate == pytest.approx(0.5)
    # Every conversation and every seed says the same, so does every draw.
    assert (row.recovery.low, row.recovery.high) == pytest.approx((0.5, 0.5))
    assert row.forgetting == 0.0
    full = describe_cell(study, replace(CELL, arm="fft", rate="tuned"), results)
    assert full.recovery == Interval(1.0, 1.0, 1.0)
    # A seed that full fine-tuning was not run with counts in nothing that stands beside R.
    third = {"xs-plain42-square-lr1e-3-s3": [0.0, 10.0, 0.0, 10.0]}
    row = describe_cell(study, CELL, results | results_of(third))
    assert (row.measured.seeds, row.measured.nll) == ([1, 2], pytest.approx(4.0))
    assert [record["flops"] for record in row.measured.records] == [2e12, 4e12]


def test_recovery_without_end_tokens_by_hand(study: dict) -> None:
    """All that square gains is of end tokens, 6 + 12 nats, and nothing of the answers."""
    results = deepcopy(BASE) | results_of(SWEEP)
    results["xs-plain42"]["held_out"]["general"]["end_nats"] = [0.0, 10.0, 0.0, 20.0]
    for seed in (1, 2):
        name = f"xs-plain42-square-lr1e-3-s{seed}"
        results[name] = result_of(name, seed, [0.0, 94.0, 0.0, 188.0], "square")
        results[name]["held_out"]["general"]["end_nats"] = [0.0, 4.0, 0.0, 8.0]
    row = describe_cell(study, CELL, results)
    assert row.recovery.estimate == pytest.approx(18 / 120)
    assert row.answer_recovery.estimate == pytest.approx(0.0)
    experiment = study["experiments"][1]
    judged = judge(study, experiment, experiment["claims"][0], "xs", results)
    ((formula, found),) = judged.contrasts.items()
    assert (formula, stated(found)) == ("R(square@1e-3)", "0.150 [0.150, 0.150]")
    assert cited(judged) == "open, 0.150 [0.150, 0.150]"  # of two seeds
    evidence = gather(study, results, LANGUAGES)
    told_of = citations(evidence)
    assert told_of[judged.claim["name"]] == cited(judged)
    later = {"name": "H9", "text": "", "not_shown": "", "supported": [], "refuted": []}
    evidence.study["experiments"].append({"claims": [later]})  # of a size that has no result yet
    assert citations(evidence) == told_of | {"H9": NOT_RUN}
    assert judged.without_ends == ["0.000 [0.000, 0.000]"]
    longer = {f"xs-plain42-square-lr1e-3-s{s}": [0.0, 80.0, 0.0, 160.0] for s in (1, 2)}
    row = describe_cell(study, CELL, results | results_of(longer))  # 0.1 nats for each end token
    assert row.answer_recovery.estimate == pytest.approx((270 - 239.8) / (270 - 179.8))
    full = describe_cell(study, replace(CELL, arm="fft", rate="tuned"), results)
    assert full.answer_recovery == Interval(1.0, 1.0, 1.0)
    for name in ("xs-plain42-square-lr1e-3-s2", "xs-plain42"):  # which does not tell them apart
        changed = deepcopy(results)
        del changed[name]["held_out"]["general"]["ends"]
        row = describe_cell(study, CELL, changed)
        assert (row.recovery.estimate, row.answer_recovery) == (pytest.approx(18 / 120), None)
        judged = judge(study, experiment, experiment["claims"][0], "xs", changed)
        assert judged.without_ends == ["-"]
    # Full fine-tuning gains 120 nats, but 16 without end tokens: on 58 tokens less than .3 each.
    results["xs-plain42"]["held_out"]["general"]["end_nats"] = [0.0, 35.1, 0.0, 69.1]
    row = describe_cell(study, CELL, results)
    assert (row.recovery.estimate, row.answer_recovery) == (pytest.approx(18 / 120), None)


def test_forgetting_is_told_at_every_rate_of_the_summarys_arms(study: dict) -> None:
    summary = {"id": "S", "question": "Q.", "seeds": [1], "summary": True}
    cells = {"cells": ["square@1e-3", "square@tuned", "fft@tuned"]}
    study["experiments"].append(DEFAULTS | summary | cells)
    results = deepcopy(BASE) | results_of(SWEEP)
    for name, text_nll in (("lr1e-3-s1", 4.5), ("lr1e-3-s2", 4.7), ("lr1e-2-s1", 5.0)):
        results[f"xs-plain42-fft-{name}"]["text_nll"] = text_nll
    del results["xs-plain42-fft-lr1e-2-s2"]
    evidence = gather(study, results, LANGUAGES)
    assert list(forgetting_by_arm(evidence, "xs")) == ["fft"]  # nothing of square has a result
    results |= results_of({"xs-plain42-square-lr1e-2-s1": [0.0, 80.0, 0.0, 160.0]})
    found = forgetting_by_arm(gather(study, results, LANGUAGES), "xs")
    assert found["square"] == [Forgotten("1e-2", 1, 0, pytest.approx(4.0), pytest.approx(0.0))]
    assert found["fft"] == [
        Forgotten("1e-3", 2, 0, pytest.approx(2.0), pytest.approx(0.6)),
        Forgotten("1e-2", 1, 0, pytest.approx(3.0), pytest.approx(1.0)),
        Forgotten("1e-1", 1, 1, pytest.approx(1 / 30), pytest.approx(0.0)),
    ]
    assert "| fft | 1e-3 | 2 | 2.000 | +0.60 |" in report_of(study, results)
    assert "| fft | 1e-1 | 1 (1 diverged) | 0.033 | +0.00 |" in report_of(study, results)
    assert "study_xs_forgetting.svg" in figures_of(study, results)


def three_seeds(square: list[list[float]]) -> dict[str, dict]:
    """Results of FFT and of square with three seeds each."""
    full = SWEEP["xs-plain42-fft-lr1e-2-s1"]
    arms = {f"xs-plain42-square-lr1e-3-s{s}": nats for s, nats in enumerate(square, start=1)}
    return BASE | results_of(SWEEP | {"xs-plain42-fft-lr1e-2-s3": full} | arms)


def test_verdict_needs_three_seeds_that_agree_and_a_rate_inside_its_grid(study: dict) -> None:
    # 80 and 160 nats on test are R = .5; 100 and 200, the base's, are 0; 70 and 140 are .75.
    good, base, bad = [0, 80, 0, 160], [0, 100, 0, 200], [0, 70, 0, 140]
    low = [0, 96, 0, 192]  # R = .1
    (claim,) = judge_claims(study, "xs", three_seeds([low, low, base]))
    assert (claim.verdict, claim.seeds) == ("supported", 3)
    assert stated(claim.contrasts["R(square@1e-3)"]).startswith("0.067 [")
    (claim,) = judge_claims(study, "xs", three_seeds([good, good]))
    assert (claim.verdict, claim.seeds) == ("open: too few seeds", 2)
    (claim,) = judge_claims(study, "xs", three_seeds([base, base, bad]))
    assert claim.verdict == "open"  # the mean says at most .5, one seed does not
    (claim,) = judge_claims(study, "xs", three_seeds([None, None, None]))
    assert claim.verdict == "open: no run of square completed, 3 diverged"


def test_no_verdict_with_a_rate_at_the_edge_of_its_grid(study: dict) -> None:
    best, worse = [10.0, 60.0, 30.0, 120.0], [20.0, 40.0, 60.0, 80.0]
    arms = {f"xs-plain42-square-lr1e-3-s{s}": [0.0, 96.0, 0.0, 192.0] for s in (1, 2, 3)}
    for rate, nats in (("1e-3", best), ("1e-2", worse), ("1e-1", worse)):
        arms |= {f"xs-plain42-fft-lr{rate}-s{seed}": nats for seed in (1, 2, 3)}
    (claim,) = judge_claims(study, "xs", BASE | results_of(arms))
    assert (claim.verdict, claim.seeds) == (EDGE, 3)
    arms |= {f"xs-plain42-fft-lr1e-3-s{seed}": worse for seed in (1, 2, 3)}
    arms |= {f"xs-plain42-fft-lr1e-2-s{seed}": best for seed in (1, 2, 3)}
    (claim,) = judge_claims(study, "xs", BASE | results_of(arms))
    assert claim.verdict == "supported"
    del arms["xs-plain42-fft-lr1e-1-s2"]
    (claim,) = judge_claims(study, "xs", BASE | results_of(arms))
    assert claim.verdict == EDGE


def test_no_verdict_on_an_arm_whose_own_rate_is_at_an_edge(study: dict) -> None:
    """Full fine-tuning's grid has an inside; square's, of two rates, has none."""
    experiment = study["experiments"][1]
    (claim,) = experiment["claims"]
    for side in ("supported", "refuted"):
        claim[side][0]["recovery"] = "square@tuned"
    better, worse = [0.0, 96.0, 0.0, 192.0], [30.0, 98.0, 90.0, 196.0]
    results = three_seeds([better] * 3)
    results |= results_of({f"xs-plain42-square-lr1e-2-s{s}": worse for s in (1, 2, 3)})
    assert judge(study, experiment, claim, "xs", results).verdict == EDGE
    study["arms"]["square"]["rates"].insert(0, "1e-4")
    results |= results_of({f"xs-plain42-square-lr1e-4-s{s}": worse for s in (1, 2)})
    found = judge(study, experiment, claim, "xs", results)
    assert found.verdict == "supported"
    assert stated(found.contrasts["R(square@tuned)"]).endswith("]")
    # A seed that diverged beside them is told of.
    results |= results_of({"xs-plain42-square-lr1e-3-s4": None})
    found = judge(study, experiment, claim, "xs", results)
    assert stated(found.contrasts["R(square@tuned)"]).endswith("], 1 runs diverged")


def test_no_verdict_on_answers_of_an_arm_whose_rate_is_at_an_edge(study: dict) -> None:
    results = three_seeds([[0.0, 96.0, 0.0, 192.0]] * 3)
    worse = [30.0, 98.0, 90.0, 196.0]
    results |= results_of({f"xs-plain42-square-lr1e-2-s{s}": worse for s in (1, 2)})
    probe = {"outcomes": {"greedy": {"runaway": "1111", "blank": "0000"}}}
    results = {name: result | {"probe": probe} for name, result in results.items()}
    tuned, given = (replace(CELL, rate=rate) for rate in ("tuned", "1e-3"))
    assert not contrast_answers(study, [tuned, given], results).is_tuned
    assert not contrast_answers(study, [given, tuned], results).is_tuned
    assert contrast_answers(study, [given, given], results).is_tuned


def test_verdict_needs_all_conditions_of_a_side_and_takes_the_worst_p(study: dict) -> None:
    experiment = study["experiments"][1]
    (claim,) = experiment["claims"]

    def judged(results: dict, supported: list[dict], refuted: list[dict]) -> Judged:
        sides = {"supported": supported, "refuted": refuted}
        for conditions in sides.values():
            for condition in conditions:
                condition["recovery"] = "square@1e-3"
        return judge(study, experiment, claim | sides, "xs", results)

    results = three_seeds([[0, 70, 0, 140]] * 3)  # R = .75
    both = [{"at_most": 0.5}, {"at_least": 0.1}]
    assert judged(results, both, [{"at_least": 0.9}]).verdict == "open"
    assert judged(results, both[::-1], [{"at_least": 0.9}]).verdict == "open"
    # R is .1, .1 and 0, so t of a bound of .25 is 5.5 and of .5 is 13; p = 1 - t / (t^2 + 2)^.5.
    results = three_seeds([[0, 96, 0, 192]] * 2 + [[0, 100, 0, 200]])
    for conditions in (
        [{"at_most": 0.25}, {"at_most": 0.5}],
        [{"at_most": 0.5}, {"at_most": 0.25}],
    ):
        found = judged(results, conditions, [{"at_least": 0.9}])
        assert found.verdict == "supported"
        assert found.p == pytest.approx(1 - 5.5 / 32.25**0.5, abs=1e-4)


def test_verdicts_are_corrected_for_the_number_of_hypotheses() -> None:
    # Of 3: the smallest times 3, the next times 2, none below the one before.
    assert holm([0.04, 0.01, 0.03]) == pytest.approx([0.06, 0.03, 0.06])
    named = {"H1": 0.03, "H2": 0.01, "H5": 0.02, "P0": 0.04, "P2": 0.04, "P3": 0.04}
    named |= {"E1": 0.06, "X": 0.04}
    claims = [Judged({"name": name}, "supported", {}, 3, p) for name, p in named.items()]
    assert [judged.verdict for judged in corrected(claims)] == [
        *["supported", "supported", "supported"],  # .04, .03 and .04 of 3
        *["supported", "supported", "supported", "open: p = 0.060", "supported"],
    ]
    claims.append(Judged({"name": "H7"}, "open: too few seeds", {}, 2, 0.001))
    claims.append(Judged({"name": "H8"}, "not run", {}))
    # What is planned counts, too: 5 times .01, 4 times .02, 3 times .03.
    assert [judged.verdict for judged in corrected(claims)[:3]] == [
        *["open: p = 0.090", "supported", "open: p = 0.080"]
    ]


def test_no_hypothesis_is_concluded_before_the_gates() -> None:
    names = ("P0", "P3", "H1", "E1", "X")
    claims = [Judged({"name": name}, "supported", {}, 3, 0.001) for name in names]
    verdicts = [judged.verdict for judged in corrected(claims)]
    waits = "open (gates not passed: P2): supported"
    assert verdicts == ["supported", "supported", waits, "supported", "supported"]


def test_p_value_counts_the_draws_beyond_the_bound() -> None:
    draws = np.linspace(0.005, 0.995, 100)
    found = Contrast(Interval(0.5, 0.1, 0.9), [0.5], draws, 0, True)
    # 2 of the draws are below .02, 10 above .9.
    assert p_value({"at_least": 0.02}, found) == pytest.approx(2 * 3 / 101)
    assert p_value({"at_most": 0.9}, found) == pytest.approx(2 * 11 / 101)
    assert p_value({"at_least": 0.6}, found) == 1.0
    # Three seeds, mean .98 and standard deviation .02: t = .03 / (.02 / 3 ** .5) = 2.598, two
    # degrees of freedom: p = 1 - t / (t ** 2 + 2) ** .5 = .1216.
    few = replace(found, by_seed=[0.96, 0.98, 1.0], draws=np.full(1000, 0.98))
    assert p_value({"at_least": 0.95}, few) == pytest.approx(0.1216, abs=1e-4)


def test_recovery_of_too_small_a_gain_is_not_told(study: dict) -> None:
    near = BASE["xs-plain42"] | {"held_out": {"general": measured_as([50.0, 63.0, 150.0, 126.0])}}
    results = three_seeds([[0, 80, 0, 160]] * 3) | {"xs-plain42": near}  # FFT gains .15 nats
    row = describe_cell(study, CELL, results)
    assert (row.measured.nll, row.recovery) == (4.0, None)
    (claim,) = judge_claims(study, "xs", results)
    assert claim.verdict == "open: full fine-tuning gains less than 0.3 nats"


def test_broken_off_run_is_not_a_result_and_its_base_not_made_for_ever(tmp_path: Path) -> None:
    (tmp_path / "study.toml").write_text(TOML)
    (tmp_path / "results").mkdir()
    diverged = result_of("xs-plain42", 42, None, None)
    (tmp_path / "results" / "xs-plain42.json").write_text(json.dumps(diverged))
    command = [sys.executable, str(REPO_DIR / "evaluation" / "run_study.py"), "--list"]
    for flag, name in (("study", "study.toml"), ("save_dir", "out"), ("results_dir", "results")):
        command += [f"--{flag}", str(tmp_path / name)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 2
    assert done.stderr.startswith("error: xs-plain42: diverged, so nothing can start from it")


def test_experiment_brings_all_that_its_verdict_rests_on(study: dict) -> None:
    args = argparse.Namespace(size="xs", experiment=["H"])
    sweep = {f"xs-plain42-fft-lr{rate}-s{s}" for rate in ("1e-3", "1e-2", "1e-1") for s in (1, 2)}
    square = {f"xs-plain42-square-lr1e-3-s{seed}" for seed in (1, 2, 3)}
    ids = chosen_ids(study, args, {})  # its tuned cells wait for their rate
    assert ids == {"xs-plain42"} | {one for one in sweep if one.endswith("s1")} | square
    ids = chosen_ids(study, args, results_of(SWEEP))
    tuned = {f"xs-plain42-fft{variant}-lr1e-2-s{s}" for variant in ("", "-long") for s in (1, 2, 3)}
    assert ids == {"xs-plain42"} | sweep | square | tuned
    args.experiment = ["H9"]
    with pytest.raises(SettingsError, match="--experiment H9: choose among rates, H"):
        chosen_ids(study, args, {})


def test_base_that_continues_another_comes_after_it_and_starts_from_its_weights(
    study: dict, tmp_path: Path
) -> None:
    study["bases"]["longer"] = {"share": 0.25, "flags": {"dtype": "bfloat16"}, "continues": "plain"}
    study["bases"]["longest"] = study["bases"]["longer"] | {"continues": "longer"}
    study["experiments"][1]["base"] = "longest"
    runs, _ = planned_runs(study, "xs", {})
    bases = ["xs-plain42", "xs-longer42", "xs-longest42"]
    assert [run.id for run in runs[:3]] == bases
    assert [run.base_id for run in runs[:3]] == [None, *bases[:2]]
    assert bases[0] not in {run.base_id for run in runs if run.base == "longest"}
    stage, flags = training_flags(study, runs[2], tmp_path, tmp_path)
    assert (stage, flags["from_weight"]) == ("pretrain", tmp_path / "xs-longer42")
    assert (flags["epochs"], flags["dtype"]) == (0.5, "bfloat16")  # a quarter of two
    arm = next(run for run in runs if run.arm and run.base == "longest")
    stage, flags = training_flags(study, arm, tmp_path, tmp_path)
    assert (flags["from_weight"], flags["dtype"]) == (tmp_path / "xs-longest42", "bfloat16")
    # Without weights of any, an arm waits for all three, oldest first.
    args = argparse.Namespace(size="xs", only=[arm.id], experiment=None, shard=(1, 1))
    args.results_dir, args.save_dir = tmp_path / "results", tmp_path / "out"
    left, _ = runs_left(study, args)
    assert [run.id for run in left] == [*bases, arm.id]
    assert [run.id for run in run_study.ready(left, [], args)] == bases[:1]
    args.only, args.experiment = ["*"], ["H"]
    assert [run.id for run in runs_left(study, args)[0]][:3] == bases


def test_base_that_continues_one_below_it_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "study.toml"
    for before in ("plain", "missing"):
        path.write_text(TOML.replace("share = 0.5", f'share = 0.5\ncontinues = "{before}"'))
        with pytest.raises(
            SettingsError, match=f"base 'plain' continues '{before}', which is not above it"
        ):
            read_study(path)


def test_run_from_another_base_is_refused(tmp_path: Path) -> None:
    args = argparse.Namespace(results_dir=tmp_path, save_dir=tmp_path / "out")
    run = Run("xs", "plain", 1, 42, "fft", "1e-3", "main")
    check_start(run, "w1", args)
    (tmp_path / "xs-plain42.json").write_text('{"weights": "w0"}')
    check_start(run, "w0", args)
    with pytest.raises(SettingsError, match="starts from another xs-plain42"):
        check_start(run, "w1", args)
    # Before it is trained, too: the base in --save_dir is not the one of the results.
    args = argparse.Namespace(results_dir=tmp_path, save_dir=tmp_path, data_dir=tmp_path)
    save_model(tiny_model(0), TOKENIZER_DIR, tmp_path / "xs-plain42")
    with pytest.raises(SettingsError, match="starts from another xs-plain42"):
        perform(run, read_study(STUDY_FILE), args)


def test_runs_go_on_where_a_base_breaks_off_or_diverged(
    study: dict, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    study["experiments"][1]["base_seed"] = 43
    args = argparse.Namespace(size="xs", only=["*"], experiment=None, shard=(1, 1), jobs=1)
    args.study, args.results_dir, args.save_dir = (tmp_path / name for name in ("s", "r", "o"))
    args.results_dir.mkdir()
    done = []

    def perform(run: Run, *_: object) -> None:
        if run.id == "xs-plain43":
            raise SettingsError("xs-plain43: failed")
        done.append(run.id)
        result = result_of(run.id, run.seed, [1.0] * 4, run.arm) | {"weights": "w0", "probe": {}}
        (args.results_dir / f"{run.id}.json").write_text(json.dumps(result))
        (args.save_dir / run.id).mkdir(parents=True)
        (args.save_dir / run.id / "run.json").write_text('{"status": "completed"}')

    monkeypatch.setattr(run_study, "perform", perform)
    with pytest.raises(SettingsError, match="1 runs broke off: xs-plain43; call again"):
        run_study.run_all(study, args)
    assert "xs-plain42-fft-lr1e-3-s1" in done and not any("plain43" in name for name in done)
    diverged = result_of("xs-plain43", 43, None) | {"arm": None, "weights": "w1"}
    (args.results_dir / "xs-plain43.json").write_text(json.dumps(diverged))
    before = list(done)
    with pytest.raises(SettingsError, match="xs-plain43: diverged, so nothing can start from it"):
        run_study.run_all(study, args)
    assert done == before


def test_nothing_waits_for_a_base_whose_own_base_broke_off(
    study: dict, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, before in (("half", "plain"), ("whole", "half")):
        study["bases"][name] = {"share": 0.5, "flags": {}, "continues": before}
    study["experiments"][1]["base"] = "whole"
    args = argparse.Namespace(size="xs", only=["*whole*"], experiment=None, shard=(1, 1), jobs=1)
    args.study, args.results_dir, args.save_dir = (tmp_path / name for name in ("s", "r", "o"))
    begun = []

    def perform(run: Run, *_: object) -> None:
        begun.append(run.id)
        raise SettingsError(f"{run.id}: failed")

    monkeypatch.setattr(run_study, "perform", perform)
    with pytest.raises(SettingsError, match="1 runs broke off: xs-plain42; call again"):
        run_study.run_all(study, args)
    assert begun == ["xs-plain42"]
    args.results_dir.mkdir()
    diverged = result_of("xs-plain42", 42, None, None)
    (args.results_dir / "xs-plain42.json").write_text(json.dumps(diverged))
    with pytest.raises(SettingsError, match="xs-plain42: diverged, so nothing can start from it"):
        run_study.run_all(study, args)
    assert begun == ["xs-plain42"]


def test_pattern_that_no_run_has_is_refused(
    study: dict, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    args = argparse.Namespace(size="xs", only=["xs-*"], results_dir=tmp_path)
    check_patterns(study, args)
    assert capsys.readouterr().err == ""
    args.only = ["xs-*", "xs-plain42-ftt-*"]
    told = "--only xs-plain42-ftt-*: no run of xs is called so"
    check_patterns(study, args)  # two cells wait for a rate, and may be called so
    assert capsys.readouterr().err == f"{told}, yet: 2 cells wait for a rate\n"
    for name, result in results_of(SWEEP).items():
        (tmp_path / f"{name}.json").write_text(json.dumps(result))
    with pytest.raises(SettingsError, match=re.escape(told)):
        check_patterns(study, args)


def test_shards_share_the_runs_among_them(study: dict, tmp_path: Path) -> None:
    args = argparse.Namespace(size="xs", only=["*"], experiment=None)
    args.results_dir, args.save_dir = tmp_path / "results", tmp_path / "out"
    args.shard = (1, 2)
    with pytest.raises(SettingsError, match="--shard: xs-plain42 is not in .*; make it first"):
        runs_left(study, args)
    (args.results_dir / "bases" / "xs-plain42").mkdir(parents=True)
    parts = []
    for index in (1, 2, 3):
        args.shard = (index, 3)
        parts.append([run.id for run in runs_left(study, args)[0]])
    args.shard = (1, 1)
    assert sorted(sum(parts, [])) == sorted(run.id for run in runs_left(study, args)[0])
    assert sum(map(bool, parts)) > 1


def test_dry_run_tells_commands_and_a_time_learned_from_finished_runs(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "study.toml").write_text(TOML)
    (tmp_path / "results").mkdir()
    words = ["--study", str(tmp_path / "study.toml"), "--data_dir", str(tmp_path / "data")]
    words += ["--save_dir", str(tmp_path / "out"), "--results_dir", str(tmp_path / "results")]
    assert run_study.main([*words, "--dry_run", "--jobs", "2"]) == 0
    told = capsys.readouterr().out
    assert "# xs-plain42-square-lr1e-3-s3: ?" in told and "7 runs left\n7 of these" in told
    for seed, seconds in ((1, 1000.0), (2, 3000.0)):
        result = result_of(f"xs-plain42-square-lr1e-3-s{seed}", seed, [1.0] * 4, "square")
        result |= {"variant": "main", "seconds": seconds}
        (tmp_path / "results" / f"{result['id']}.json").write_text(json.dumps(result))
    assert run_study.main([*words, "--dry_run", "--jobs", "2"]) == 0
    told = capsys.readouterr().out
    # One of square and three of fft are left, in 2,000 s each; what a base takes is not known.
    assert "# xs-plain42-square-lr1e-3-s3: 33.3 min\npython trainer/train_lora.py" in told
    assert "5 runs left\nabout 1.1 hours with --jobs 2" in told
    assert "1 of these are of a kind that has not finished yet: time unknown" in told
    assert "cells that add more once a rate is known: H (1), rates (1)" in told
    assert f"first make, with dataset/prepare.py: {tmp_path / 'data' / 'chat.jsonl'}" in told
    assert not (tmp_path / "out").exists()
    (tmp_path / "results" / "bases" / "xs-plain42").mkdir(parents=True)
    assert run_study.main([*words, "--dry_run", "--only", "xs-plain42"]) == 0
    told = capsys.readouterr().out  # of what waits for a rate nothing was asked
    assert told.startswith(
        "# xs-plain42: its weights are there, to be measured\n1 runs left\nfirst"
    )


def test_weights_of_other_flags_are_not_filed(tmp_path: Path) -> None:
    (tmp_path / "study.toml").write_text(TOML)
    study = read_study(tmp_path / "study.toml")
    run = Run("xs", "plain", 1, 42, "square", "1e-3", "main")
    args = argparse.Namespace(save_dir=tmp_path, data_dir=tmp_path, study=tmp_path / "study.toml")
    _, flags = training_flags(study, run, tmp_path, tmp_path)
    settings = {"max_seq_len": 64, "batch_size": 8, "device": "cpu", "lora_targets": "square"}
    settings |= {"lora_rank": 2, "max_train_samples": 16, "epochs": 1.0, "learning_rate": 0.001}
    settings |= {"dtype": "float32", "seed": 1, "run_name": run.id, "data_path": ["elsewhere"]}
    assert changed_flag(settings, flags) is None
    (tmp_path / run.id).mkdir()
    record = {"status": "completed", "settings": settings | {"lora_rank": 4}}
    (tmp_path / run.id / "run.json").write_text(json.dumps(record))
    with pytest.raises(SettingsError, match="was trained with --lora_rank 4, and .* says 2"):
        perform(run, study, args)


def test_size_may_have_a_grid_of_its_own(study: dict) -> None:
    study["tuning"]["rates"] = {"base": {"fft": ["1e-4", "1e-5"]}}
    assert rates_of(study, "fft", "xs") == ["1e-3", "1e-2", "1e-1"]
    assert rates_of(study, "fft", "base") == ["1e-4", "1e-5"]
    assert rates_of(study, "square", "base") == ["1e-3", "1e-2"]


def test_data_that_are_missing_are_named_before_anything_runs(study: dict, tmp_path: Path) -> None:
    for name in ("text", "chat"):
        (tmp_path / f"{name}.jsonl").touch()
    with pytest.raises(SettingsError, match=r"chat_valid\.jsonl: no such file"):
        check_data(study, tmp_path)
    assert missing_data(study, tmp_path) == [tmp_path / "chat_valid.jsonl"]
    (tmp_path / "chat_valid.jsonl").touch()
    check_data(study, tmp_path)


def test_base_made_anew_must_be_the_one_that_there_are_results_of(tmp_path: Path) -> None:
    args = argparse.Namespace(results_dir=tmp_path)
    run = Run("xs", "plain", 42)
    check_same_base(run, {"weights": "w0"}, {}, args)
    check_same_base(run, {"weights": "w0"}, {"weights": "w0"}, args)
    with pytest.raises(SettingsError, match="made anew, its weights differ"):
        check_same_base(run, {"weights": "w1"}, {"weights": "w0"}, args)


def test_published_base_is_taken_unless_there_is_one(tmp_path: Path) -> None:
    for name in ("xs-plain42", "xs-plain43"):
        published = tmp_path / "results" / "bases" / name
        published.mkdir(parents=True)
        (published / "run.json").write_text('{"status": "completed"}')
        (published / "model.safetensors").write_text(f"published {name}")
    made, begun = tmp_path / "out" / "xs-plain43", tmp_path / "out" / "xs-plain42"
    for folder, status in ((made, "completed"), (begun, "running")):
        folder.mkdir(parents=True)
        (folder / "run.json").write_text(json.dumps({"status": status}))
    (made / "model.safetensors").write_text("made here")
    fetch_bases(argparse.Namespace(results_dir=tmp_path / "results", save_dir=tmp_path / "out"))
    assert has_weights("xs-plain42", tmp_path / "out")
    weights = (tmp_path / "out" / "xs-plain42" / "model.safetensors").read_text()
    assert weights == "published xs-plain42"
    assert (made / "model.safetensors").read_text() == "made here"
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == [
        ".bases.lock",
        "xs-plain42",
        "xs-plain43",
    ]


@pytest.mark.parametrize("begun", [False, True])
def test_runs_that_start_together_take_one_copy_of_a_base(tmp_path: Path, begun: bool) -> None:
    published = tmp_path / "results" / "bases" / "xs-plain42"
    published.mkdir(parents=True)
    (published / "run.json").write_text('{"status": "completed"}')
    args = argparse.Namespace(results_dir=tmp_path / "results", save_dir=tmp_path / "out")
    if begun:
        (args.save_dir / "xs-plain42").mkdir(parents=True)
    start = threading.Barrier(8)

    def fetch(_: int) -> bool:
        start.wait()
        fetch_bases(args)
        return has_weights("xs-plain42", args.save_dir)

    with ThreadPoolExecutor(8) as pool:
        assert all(pool.map(fetch, range(8)))
    assert sorted(path.name for path in args.save_dir.iterdir()) == [".bases.lock", "xs-plain42"]


def test_part_of_an_update_is_measured_against_the_whole(study: dict) -> None:
    results = BASE | results_of(SWEEP)
    for seed in (1, 2):  # at the tuned rate FFT has 3 nats a token on test, its part 4.5
        name = f"xs-plain42-fft-lr1e-2-s{seed}"
        results[name] = results[name] | {"parts": {"rank1": [0.0, 90.0, 0.0, 180.0]}}
    row = describe_cell(study, Cell("xs", "plain", 42, "fft", "tuned", "main", "rank1"), results)
    assert row.recovery.estimate == pytest.approx(0.25)
    assert row.forgetting is None
    assert describe_cell(study, replace(row.measured.cell, part="rank2"), results) is None


def test_recovery_is_of_the_cells_own_base_data_and_full_fine_tuning(study: dict) -> None:
    """A second base with half the losses, and a variant of other data that is its own reference."""
    results = BASE | results_of(SWEEP)
    study["variants"]["medical"] = {"data": "medical", "reference": "medical", "flags": {}}
    place = {"xs-plain43": None, "xs-plain43-fft-lr1e-2-s1": "fft"}
    place |= {"xs-plain43-square-lr1e-3-s1": "square", "xs-plain42-fft-medical-lr1e-2-s1": "fft"}
    place["xs-plain42-square-medical-lr1e-3-s1"] = "square"
    of_test = {"xs-plain43": 90, "xs-plain43-fft-lr1e-2-s1": 30, "xs-plain43-square-lr1e-3-s1": 45}
    of_medical = {"xs-plain42": 80, "xs-plain42-fft-medical-lr1e-2-s1": 40}
    of_medical["xs-plain42-square-medical-lr1e-3-s1"] = 70
    results["xs-plain42"] = deepcopy(BASE["xs-plain42"])
    for name, arm in place.items():
        nats = of_test.get(name, 0)
        results[name] = result_of(name, 1, [0.0, nats, 0.0, 2 * nats], arm)
    for name, nats in of_medical.items():
        kept = results[name]["held_out"] if name == "xs-plain42" else {}
        medical = {"nats": [0.0, nats], "tokens": [10, 20], "end_nats": [0, 0], "ends": [0, 0]}
        results[name]["held_out"] = kept | {"medical": medical}
    second = describe_cell(study, replace(CELL, base_seed=43), results)
    assert second.recovery.estimate == pytest.approx((90 - 45) / (90 - 30))
    medical = describe_cell(study, replace(CELL, variant="medical"), results)
    assert medical.recovery.estimate == pytest.approx((80 - 70) / (80 - 40))
    results["xs-plain43-fft-lr1e-2-s1"] = result_of("xs-plain43-fft-lr1e-2-s1", 1, None)
    why = why_unknown(study, [replace(CELL, base_seed=43)], results)
    assert why == "open: no run of fft completed, 1 diverged"


def test_claim_without_runs_is_not_judged(study: dict) -> None:
    (claim,) = judge_claims(study, "xs", BASE | results_of(SWEEP))
    assert claim.verdict == "not run"


def test_seeds_and_conversations_are_drawn_for_all_alike(study: dict) -> None:
    rng = np.random.default_rng(0)
    tokens = rng.integers(5, 50, 30)
    full = rng.uniform(2, 3, (3, 30)) * tokens
    cell = Cell("xs", "plain", 42, "square", "1e-3", "main")
    results = BASE | results_of(SWEEP)
    like = measure_cell(study, replace(cell, arm="fft"), results)
    full_arm = replace(like, seeds=[1, 2, 3], nats=full, tokens=tokens)
    base = 5.0 * tokens
    # Halfway between base and FFT, seed by seed: every draw must give exactly one half.
    half = replace(full_arm, nats=(base + full) / 2)
    shuffled = replace(half, seeds=[3, 2, 1], nats=half.nats[::-1])
    for arm in (half, shuffled):
        (draws,) = recovery_draws(base, [arm], full_arm, draws=50)
        assert draws == pytest.approx(np.full(51, 0.5))
        assert astuple(interval_of(draws)) == pytest.approx((0.5, 0.5, 0.5))
    first, second = recovery_draws(base, [half, full_arm], full_arm, draws=50)
    assert interval_of(second - first).estimate == pytest.approx(0.5)
    with pytest.raises(ValueError, match="no seed"):
        recovery_draws(base, [replace(half, seeds=[7, 8, 9])], full_arm)


def test_interval_of_recovery_covers_conversations_and_seeds(study: dict) -> None:
    like = measure_cell(study, replace(CELL, arm="fft"), BASE | results_of(SWEEP))

    def recovered(base: list[float], arm: list[list[float]]) -> Interval:
        """Of an arm with these nats, where full fine-tuning has none left."""
        nats, tokens, seeds = np.array(arm), np.ones(len(base)), list(range(len(arm)))
        arm = replace(like, seeds=seeds, nats=nats, tokens=tokens)
        full = replace(arm, nats=np.zeros_like(nats))
        return interval_of(*recovery_draws(np.array(base), [arm], full))

    # One seed; a draw has either conversation twice, R = 2/10 or 15/20, or both, 17/30.
    found = recovered([10.0, 20.0], [[8.0, 5.0]])
    assert astuple(found) == pytest.approx((17 / 30, 0.2, 0.75))
    # One conversation; a draw has either seed twice, R = 2/10 or 7/10, or both.
    assert astuple(recovered([10.0], [[8.0], [3.0]])) == pytest.approx((0.45, 0.2, 0.7))


def test_results_of_other_data_or_another_base_are_refused() -> None:
    base = BASE["xs-plain42"] | {"weights": "w0"}
    name = "xs-plain42-fft-lr1e-3-s{}".format
    where = {"base_seed": 42, "variant": "main"}
    run = {"base_fingerprint": "w0", "train_data": {"tokenizer_sha256": "t", "samples": 16}}
    run["settings"] = {"dtype": "float32"}
    one, other = (result_of(name(seed), seed, SWEEP[name(1)]) | where for seed in (1, 2))
    results = {"xs-plain42": base, name(1): one | {"run": run}, name(2): other | {"run": run}}
    check_controlled(results)
    for changed, told in (
        (run | {"train_data": {"tokenizer_sha256": "u", "samples": 16}}, "other data"),
        (run | {"base_fingerprint": "w1"}, "other weights"),
        (run | {"settings": {"dtype": "bfloat16"}}, "another dtype"),
    ):
        with pytest.raises(DataError, match=f"{name(2)}: .*{told}"):
            check_controlled(results | {name(2): other | {"run": changed}})
    elsewhere = {"base": "half", "run": run | {"settings": {"dtype": "bfloat16"}}}
    check_controlled(results | {name(2): other | elsewhere})  # R compares arms from one base
    longer = other | {"variant": "long", "run": run | {"train_data": {"samples": 15}}}
    with pytest.raises(DataError, match=f"{name(2)}: .*other data"):
        check_controlled(results | {name(2): longer})  # R compares it with the main variant's
    held_out = {"general": measured_as(SWEEP[name(1)], TOKENS[::-1])}
    with pytest.raises(DataError, match=f"{name(2)}: was measured on other conversations"):
        check_controlled(results | {name(2): other | {"run": run, "held_out": held_out}})


@pytest.mark.parametrize(
    ("condition", "low", "high", "met"),
    [
        ({"at_least": 0.1}, 0.1, 0.9, True),
        ({"at_least": 0.1}, 0.09, 0.9, False),
        ({"at_most": 0.1}, -1.0, 0.1, True),
        ({"at_most": 0.1}, -1.0, 0.11, False),
    ],
)
def test_rule_needs_the_whole_interval_and_every_seed(
    condition: dict, low: float, high: float, met: bool
) -> None:
    middle = (low + high) / 2
    interval = Interval(middle, low, high)
    seeds = [low, middle, high]
    assert is_met(condition, Contrast(interval, seeds, np.empty(0), 0, is_tuned=True)) is met
    far = [middle, middle, -9.0 if "at_least" in condition else 9.0]
    assert not is_met(condition, Contrast(interval, far, np.empty(0), 0, is_tuned=True))


def test_bad_answers_of_one_arm_are_told_as_a_share_of_anothers() -> None:
    # By prompt and decoding: endless or blank. Arm a has 1 of 6, arm b 1 + 1 + 2 of 6, each seed.
    outcomes = {
        "square": {"greedy": ("010", "000"), "sampled": ("000", "000")},
        "fft": {"greedy": ("101", "100"), "sampled": ("000", "011")},
    }
    results = {}
    for arm, by_decoding in outcomes.items():
        for seed in (1, 2, 3):
            result = result_of(f"xs-plain42-{arm}-lr1e-3-s{seed}", seed, [1.0] * 4, arm)
            named = {
                decoding: {"runaway": runaway, "blank": blank, "loop": "111"}
                for decoding, (runaway, blank) in by_decoding.items()
            }
            results[result["id"]] = result | {"probe": {"outcomes": named}}
    cells = [replace(CELL, arm=arm) for arm in outcomes]
    found = contrast_answers({}, cells, results)
    assert found.interval.estimate == pytest.approx(1 / 4)
    assert found.by_seed == pytest.approx([1 / 4] * 3)
    assert found.is_tuned and len(found.draws) == 10_000
    # Prompts drawn thrice alike: the first has 0 of 1, the second 1 of 1, the third 0 of 2.
    assert set(np.round(found.draws, 6)) >= {0.0, 1.0}
    assert (found.draws > 1).sum() == 0
    for name in list(results):
        if name.endswith(("fft-lr1e-3-s1", "fft-lr1e-3-s2", "square-lr1e-3-s3")):
            del results[name]["probe"]
    assert why_no_answers({}, cells, results) == NOT_RUN


def test_shares_of_bad_answers_have_intervals_over_seeds_and_prompts() -> None:
    probes = [
        {"outcomes": {name: {"runaway": runaway, "blank": blank} for name, (runaway, blank) in one}}
        for one in (
            [("a", ("0110", "0100")), ("b", ("1111", "0000")), ("c", ("0000", "0000"))],
            [("a", ("0000", "0100")), ("b", ("0101", "1010")), ("c", ("0000", "0000"))],
        )
    ]
    everything = np.ones(4, dtype=bool)
    shares = bad_shares(probes, everything)
    # Seed 1 has prompts 2 and 3, seed 2 has prompt 2. Of all draws 13% are 0, 1.9% are 1, and 2.6%
    # 7/8 or more.
    assert (shares["a"].estimate, shares["a"].low) == (3 / 8, 0.0)
    assert shares["a"].high in (7 / 8, 1.0)
    # Clopper and Pearson's of 4 of 4 and 0 of 4, by hand: 1 - .025^(1/4) = .602.
    assert shares["b"] == Interval(1.0, pytest.approx(0.398, abs=1e-3), 1.0)
    assert shares["c"] == Interval(0.0, 0.0, pytest.approx(0.602, abs=1e-3))
    assert bad_shares(probes, np.array([1, 0, 1, 0], dtype=bool))["a"].estimate == 1 / 4


def answers(endless: str) -> dict:
    """A probe of four prompts under both decodings, 1 where an answer never ends."""
    outcomes = {"runaway": endless, "loop": "0000", "blank": "0000", "check_strict": "----"}
    decodings = ("greedy", "t0.85p0.85")
    rates = {decoding: {key: {"rate": 0.0} for key in ANSWER_RATES} for decoding in decodings}
    prompts = {"count": 4, "sha256": "x"}
    return {"outcomes": dict.fromkeys(decodings, outcomes), "rates": rates, "prompts": prompts}


def test_arms_that_were_asked_are_told_by_their_bad_answers(study: dict) -> None:
    cells = {"cells": ["square@1e-3", "fft@tuned"]}
    study["experiments"][1] |= cells | {"probe": True}
    study["experiments"].append(DEFAULTS | cells | {"id": "S", "question": "Q.", "seeds": [1]})
    study["experiments"][2]["summary"] = True
    square = {f"xs-plain42-square-lr1e-3-s{s}": [0.0, 80.0, 0.0, 160.0] for s in (1, 2)}
    results = deepcopy(BASE) | results_of(SWEEP | square)
    assert "study_xs_answers.svg" not in figures_of(study, results)
    results["xs-plain42"]["held_out"]["general"]["end_nats"] = [9.0, 10.1, 9.0, 20.1]
    for name, endless in (
        ("xs-plain42", "1111"),
        ("xs-plain42-square-lr1e-3-s1", "1000"),
        ("xs-plain42-square-lr1e-3-s2", "1110"),
        ("xs-plain42-fft-lr1e-2-s1", "0001"),
    ):
        results[name]["probe"] = answers(endless)
    found = probes_by_cell(study, "xs", results)
    assert {name: len(probes) for name, probes in found.items()} == {
        "xs-plain42, the base": 1,
        "LoRA on q and o, 1e-3 (2 seeds)": 2,
        "all of it, 1e-2 (1 seed)": 1,
    }
    drawn = figures_of(study, results)["study_xs_answers.svg"]
    for text in (*found, "3 English prompts", "1 Chinese prompts"):
        assert f"<!-- {text} -->" in drawn
    assert "![Share of answers" in report_of(study, results)
    drawn = ["study_xs_answers.svg", "study_xs_ladder.svg"]
    summary = summary_block(gather(study, results, LANGUAGES), drawn)
    assert summary[0] == "*At `xs`. Q.*"
    assert summary.pop().endswith("(evaluation/figures/study_xs_ladder.svg)")
    assert summary[-4:-1] == [  # of the three English prompts
        "| nothing: the base | - | - | - | 0 | 0 | 100% / 100% |",
        f"| LoRA on q and o | 1,234 | 1e-3 | 2 | {HALF} | {THIRD} | 67% / 67% |",
        f"| all of it | 1,234 | 1e-2 | 2 (1 asked) | {WHOLE} | {WHOLE} | 0% / 0% |",
    ]
    assert "*S. Q.*" not in report_of(study, results)


def test_answers_to_other_prompts_are_refused(tmp_path: Path) -> None:
    prompts = tmp_path / "prompts.md"
    prompts.write_text("## Facts")
    known = {"prompts": {"sha256": hashlib.sha256(b"## Facts").hexdigest()}}
    check_prompts({"one": {"probe": known}, "not asked": {}}, prompts)
    with pytest.raises(DataError, match=f"two: was asked other prompts than {prompts}"):
        check_prompts({"one": {"probe": known}, "two": {"probe": answers("0000")}}, prompts)


def test_claim_of_answers_is_judged_by_its_bound(study: dict) -> None:
    claim = {"name": "C", "supported": [], "refuted": []}
    claim["supported"] = [{"bad_answers": ["square@1e-3", "fft@1e-3"], "at_most": 0.5}]
    claim["refuted"] = [{"bad_answers": ["square@1e-3", "fft@1e-3"], "at_least": 0.8}]
    results = {}
    for arm, runaway in (("square", "0010000000"), ("fft", "1111111111")):
        for seed in (1, 2, 3):
            result = result_of(f"xs-plain42-{arm}-lr1e-3-s{seed}", seed, [1.0] * 4, arm)
            outcomes = {"greedy": {"runaway": runaway, "blank": "0000000000"}}
            results[result["id"]] = result | {"probe": {"outcomes": outcomes}}
    experiment = study["experiments"][1]
    found = judge(study, experiment, claim, "xs", results)
    assert (found.verdict, found.seeds) == ("supported", 3)
    ratio = found.contrasts["bad(square@1e-3) / bad(fft@1e-3)"]
    assert stated(ratio) == "0.100 [0.000, 0.300]"
    assert cited(found) == "supported, 0.100 [0.000, 0.300]"
    for name in list(results):
        if "fft" in name:
            results[name]["probe"]["outcomes"]["greedy"]["runaway"] = "0000000000"
    found = judge(study, experiment, claim, "xs", results)
    assert found.verdict == "open: a seed of fft has no answer that never ends or is blank"
    for name in list(results):
        if "fft" in name:  # of 10 prompts 3: e^-3 = 5% of all draws would have none of these
            results[name]["probe"]["outcomes"]["greedy"]["runaway"] = "1110000000"
    found = judge(study, experiment, claim, "xs", results)
    assert found.verdict == "open: too few answers of fft never end or are blank"


def test_few_prompts_name_the_wrong_winner_as_often_as_counted() -> None:
    # One of 2 prompts judged: the better arm passes both, the worse one.
    wrong, tied = wrong_winner_rate(np.array([[1, 1]]), np.array([[1, 0]]), few=1, draws=4000)
    assert wrong == 0.0
    assert tied == pytest.approx(0.5, abs=0.03)
    # Of prompts that each arm passes alone, one judged names either: 2 of 3 times the better.
    better, worse = np.array([[1, 1, 0]]), np.array([[0, 0, 1]])
    wrong, tied = wrong_winner_rate(better, worse, few=1, draws=4000)
    assert wrong == pytest.approx(1 / 3, abs=0.03)
    assert tied == 0.0


@pytest.mark.parametrize(
    ("old", "new", "told"),
    [
        ('"square@1e-3", "fft@tuned/long"', '"squre@1e-3"', "'squre' is not among fft, square"),
        ('"fft@tuned/long"', '"fft@tuned/short"', "'short' is not among main, long"),
        ('"fft@tuned/long"', '"fft@best"', "must be arm@rate"),
        ("at_most = 0.5", "below = 0.5", "one of at_least, at_most"),
        ('not_shown = "why"', "", "a claim has no not_shown"),
        ('base = { xs = "plain" }', 'base = { xs = "long" }', "[tuning] names no base for 'xs'"),
        ('id = "H"', 'id = "H"\nbase = { s = "plain" }', "'H': base: names none for size 'xs'"),
        ('id = "H"', 'id = "H"\nbase = { xs = "lain" }', "'lain' is not among plain"),
        ("[common]", "[common", "study.toml"),
        ("[measure]", "[measures]", "has no [measure]"),
        ('question = "Which rate?"\n', "", "experiment 'rates': has no question"),
        ("seeds = [1, 2, 3]", "seed = 1\nseeds = [1]", "experiment 'H': seed is no key"),
        ("seeds = [1, 2, 3]", 'seeds = [1]\nladder = "step"', "ladder 'step': choose among"),
        ('id = "H"', 'id = "rates"', "'rates' is named twice"),
        ('recovery = "square@1e-3", at_most', 'gain = ["square@1e-3"], at_most', "of two cells"),
        (
            'recovery = "square@1e-3", at_most',
            'gain = ["fft@1e-3", "fft@1e-3/other"], at_most',
            "its cells differ in data",
        ),
    ],
)
def test_broken_study_is_named(tmp_path: Path, old: str, new: str, told: str) -> None:
    path = tmp_path / "study.toml"
    assert old in TOML
    path.write_text(TOML.replace(old, new) + OTHER_DATA)
    with pytest.raises(SettingsError, match=re.escape(told)):
        read_study(path)


def test_answers_are_filed_as_one_mark_a_prompt(tmp_path: Path) -> None:
    faults = ("check_strict", "check_loose", "runaway", "loop", "blank")
    marks = {"greedy": (True, False, None), "t1": (None, True, True), "references": (True,) * 3}
    samples = [
        {"decoding": decoding} | dict.fromkeys(faults, mark)
        for decoding, row in marks.items()
        for mark in row
    ]
    (tmp_path / "samples.jsonl").write_text("".join(json.dumps(s) + "\n" for s in samples))
    results = {"provenance": {"prompts": {"count": 3}}, "decodings": {name: name for name in marks}}
    (tmp_path / "results.json").write_text(json.dumps(results))
    assert summarize_probe(tmp_path) == {
        "prompts": {"count": 3},
        "rates": {"greedy": "greedy", "t1": "t1"},
        "outcomes": {"greedy": dict.fromkeys(faults, "10-"), "t1": dict.fromkeys(faults, "-11")},
    }


def test_run_lacks_what_was_asked_of_it_later() -> None:
    run = Run("xs", "plain", 1, 42, "fft", "1e-3", "main")
    measured = {"held_out": {}}
    assert lacks(run, None) and not lacks(run, measured)
    for asked, key in (("probe", "probe"), ("parts", "parts")):
        more = replace(run, **{asked: True})
        assert lacks(more, measured) and not lacks(more, measured | {key: {}})
        assert not lacks(more, {"status": "diverged"})


def test_training_goes_on_where_there_is_a_state(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    assert how_to_go_on(folder) == []
    folder.mkdir()
    assert how_to_go_on(folder) == ["--overwrite"]
    for state in ("resume", "resume.old"):
        (folder / state).mkdir()
        assert how_to_go_on(folder) == ["--from_resume"]
        (folder / state).rmdir()


def test_shards() -> None:
    assert parse_shard("2/3") == (2, 3)
    for text in ("0/3", "4/3", "2", "a/b"):
        with pytest.raises(SettingsError):
            parse_shard(text)


def test_commands_are_what_the_scripts_take(study: dict) -> None:
    run = Run("xs", "plain", 1, 42, "square", "1e-3", "long")
    stage, flags = training_flags(study, run, Path("data"), Path("out"))
    assert stage == "lora"
    assert (
        as_words(flags)
        == (
            "--max_seq_len 64 --batch_size 8 --device cpu --lora_targets square --lora_rank 2 "
            "--max_train_samples 16 --epochs 3 --data_path data/chat.jsonl --lora_name "
            f"{run.id} --save_dir out --from_weight out/xs-plain42 --learning_rate 1e-3 "
            "--dtype float32 --seed 1"
        ).split()
    )
    assert as_words({"a": True, "b": [1, 2]}) == ["--a", "--b", "1", "2"]


def report_of(study: dict, results: dict) -> str:
    """All that the README and the page of details say of the study."""
    evidence = gather(study, results, LANGUAGES)
    block = study_block(evidence, study_figures(evidence))
    return "\n".join([*block, *study_details(evidence)])


def figures_of(study: dict, results: dict) -> dict[str, str]:
    """The figures of these results."""
    return study_figures(gather(study, results, LANGUAGES))


def test_report_tells_what_was_run(study: dict) -> None:
    square = {f"xs-plain42-square-lr1e-3-s{s}": [0.0, 80.0, 0.0, 160.0] for s in (1, 2)}
    results = deepcopy(BASE) | results_of(SWEEP | square)
    # Full fine-tuning gains 120 nats on test, 30 of them where its end tokens take 0.2 nats.
    results["xs-plain42"]["held_out"]["general"]["end_nats"] = [9.0, 10.1, 9.0, 20.1]
    text = report_of(study, results)
    claim = "| C: square fails | **open: too few seeds** | R(square@1e-3) = 0.500 "
    claim += "[0.500, 0.500] | 0.333 [0.333, 0.333] | <= 0.50; >= 0.50 | 2 | why |"
    assert claim in text
    base = "`xs-plain42`: 2,000 parameters, pretrained on 3.0M tokens (1500.0 each) in float32"
    start = "5.000 on general a response token (the test half, from which R counts)"
    start += "; 25% of what full fine-tuning gains is of end tokens"
    assert f"- {base}; 4.000 nats a token of held-out text, {start}." in text
    study["bases"]["plain"]["continues"] = "short"  # of which there is no result
    study["bases"]["short"] = {"share": 0.1, "flags": {}}
    text_of_two = report_of(study, results)
    assert "2,000 parameters, pretrained from `xs-short42`, which has no result here" in text_of_two
    del study["bases"]["plain"]["continues"]
    assert "`python evaluation/run_study.py --size xs --experiment 'H'`" in text
    assert "1 of 9 runs say `dirty`" in text  # the one that diverged
    assert "1 of 4 in Chinese" in text
    row = f"| square: LoRA on q and o | 1,234 | 1e-3 | 99 | 2 | 4.000 | {HALF} | {THIRD} | "
    assert f"{row}{SAME} | 3.0 | 1.50 |" in text
    assert "| fft | 1e-3: 2.000, **1e-2: 1.000**, 1e-1: inf | 1e-2 | 2 |" in text
    unfinished = "not tuned; R = 0.50 [0.50, 0.50] at 1e-3"  # square has two rates
    assert f"| square | 1e-3: 0.000 | {unfinished} | 2 |" in text
    for figure in ("rates", "recovery"):
        assert f"evaluation/figures/study_xs_{figure}.svg" in text


def test_recovery_is_drawn_where_its_interval_lies(study: dict) -> None:
    square = {f"xs-plain42-square-lr1e-3-s{s}": [0.0, 80.0, 0.0, 160.0] for s in (1, 2)}
    row = describe_cell(study, CELL, BASE | results_of(SWEEP | square))
    row = replace(row, recovery=Interval(0.5, 0.4, 0.8), answer_recovery=Interval(0.3, 0.2, 0.4))
    axes = Figure().subplots()
    draw_recovery(axes, 3, row)
    dot, hollow = axes.lines
    assert (dot.get_xydata().tolist(), hollow.get_xydata().tolist()) == ([[0.5, 3]], [[0.3, 3]])
    (bar,) = axes.collections
    assert bar.get_segments()[0].tolist() == [[pytest.approx(0.4), 3], [pytest.approx(0.8), 3]]


def test_sizes_are_compared_where_more_than_one_was_measured(study: dict) -> None:
    study["sizes"]["m"] = study["sizes"]["xs"]
    # Its rates were tuned from another base, where they are the same; a tuned cell asks for that.
    study["bases"]["other"] = study["bases"]["large"] = study["bases"]["plain"]
    study["tuning"]["base"]["m"], study["tuning"]["seeds"]["m"] = "other", [1]
    experiment = DEFAULTS | {"id": "S", "question": "Q.", "seeds": [1], "summary": True}
    experiment |= {"sizes": ["xs", "m"], "cells": ["square@1e-3", "fft@tuned"]}
    experiment["base"] = {"xs": "plain", "m": "large"}
    study["experiments"].append(experiment)
    square = {"xs-plain42-square-lr1e-3-s1": [0.0, 80.0, 0.0, 160.0]}
    results = BASE | results_of(SWEEP | square)
    assert "study_S_sizes.svg" not in figures_of(study, results)
    # The other size has a base and full fine-tuning of the same NLL, but its LoRA does nothing.
    found = SWEEP | {"xs-plain42-square-lr1e-3-s1": [0.0, 100.0, 0.0, 200.0]}
    for name, result in (BASE | results_of(found)).items():
        for base in ("large", "other"):
            other = name.replace("xs-plain", f"m-{base}")
            results[other] = result | {"id": other, "size": "m", "base": base}
    lora = results.pop("m-large42-square-lr1e-3-s1")
    assert "study_S_sizes.svg" not in figures_of(study, results)  # of m full fine-tuning alone
    results |= {lora["id"]: lora}
    evidence = gather(study, results, LANGUAGES)
    by_size = recoveries_by_size(evidence, experiment)
    estimates = {
        size: {name: row.recovery.estimate for name, row in rows.items()}
        for size, rows in by_size.items()
    }
    assert estimates == {
        "xs": {"LoRA on q and o, 1e-3": pytest.approx(0.5), "all of it, tuned": 1.0},
        "m": {"LoRA on q and o, 1e-3": pytest.approx(0.0), "all of it, tuned": 1.0},
    }
    (axes,) = draw_sizes(experiment, by_size).axes
    bars = [bar.get_segments()[0][0].tolist() for bar in axes.collections]  # xs above, m below
    assert bars == [pytest.approx(at) for at in ([0.5, -0.2], [1, 0.8], [0, 0.2], [1, 1.2])]
    legend = [text.get_text() for text in axes.get_legend().get_texts()]
    assert legend == ["xs, plain", "m, large"]
    drawn = study_figures(evidence)
    assert "![Recovery of the same arms" in "\n".join(summary_block(evidence, drawn))


def test_recoveries_are_listed_from_the_lowest(study: dict) -> None:
    square = {f"xs-plain42-square-lr1e-3-s{s}": [0.0, 80.0, 0.0, 160.0] for s in (1, 2)}
    results = BASE | results_of(SWEEP | square)
    cells = [CELL, replace(CELL, arm="fft", rate="tuned")]
    rows = [describe_cell(study, cell, results) for cell in cells]
    found = recovery_by_cell(study, [rows[1], None, *rows])
    assert [name for name, _ in found] == [
        "LoRA on q and o, 1e-3 (2 seeds)",
        "all of it, 1e-2 (2 seeds)",
    ]
    assert [row.recovery.estimate for _, row in found] == pytest.approx([0.5, 1.0])


def test_report_tells_where_an_update_lies(study: dict) -> None:
    study["experiments"][1]["cells"] = ["fft@1e-3+rank1"]
    results = BASE | results_of(SWEEP)
    assert "rank1" not in report_of(study, results)  # not measured yet
    for seed, share, r90 in ((1, 0.25, 2), (2, 0.75, 4)):
        shares = {"by_kind": {"q_proj": {"update": share, "parameters": 0.125}}}
        shares["by_kind"]["norm"] = {"update": 0.0, "parameters": 0.0}
        matrix = {"kind": "q_proj", "shape": [16, 8], "r90": r90, "effective_rank": r90 + 2}
        matrix["intruders"] = {"k": 3, "count": seed, "random": 0.25}
        update = {"shares": shares, "matrices": [matrix]}
        results[f"xs-plain42-fft-lr1e-3-s{seed}"] |= {
            "parts": {"rank1": [1.0] * 4},
            "update": update,
        }
    text = report_of(study, results)
    assert "The update itself, of 2 seeds" in text
    assert "| q_proj | 50.0% | 12.5% | 0.25 to 0.50 | 0.50 to 0.75 | 1.5 (0.2) of 3 |" in text
    assert "| norm | 0.0% | 0.0% | - | - | - |" in text


LADDER = {
    "id": "ladder",
    "question": "What does each change add?",
    "cells": ["square@1e-3", "fft@1e-3", "fft@tuned"],
    "rungs": ["LoRA", "all of it", "tuned"],
    "seeds": [1, 2],
}


@pytest.mark.parametrize(("kind", "last"), [("steps", "-0.50"), ("without", "+0.50")])
def test_ladder_tells_what_each_change_adds(study: dict, kind: str, last: str) -> None:
    # On test conversations: base 5, square 4, FFT 2 at 1e-3 and 3 at the rate tuned on the others.
    study["experiments"] = [study["experiments"][0], DEFAULTS | LADDER | {"ladder": kind}]
    square = {f"xs-plain42-square-lr1e-3-s{s}": [0.0, 80.0, 0.0, 160.0] for s in (1, 2)}
    results = BASE | results_of(SWEEP | square)
    text = report_of(study, results)
    column = {"steps": "adds to R", "without": "R above the first"}[kind]
    assert f"peak GB | {column} |" in text
    assert f"{HALF} | {SAME} | 3.0 | 1.50 | - |" in text
    assert f"1.50 [1.50, 1.50] | {SAME} | 3.0 | 1.50 | +1.00 [+1.00, +1.00] |" in text
    assert f"1.50 | {last} [{last}, {last}] |" in text
    assert "study_xs_ladder.svg" in figures_of(study, results)
    results["xs-plain42-square-lr1e-3-s2"] = result_of("xs-plain42-square-lr1e-3-s2", 2, None)
    text = report_of(study, results)
    assert "| LoRA: square | 1,234 | 1e-3 | 99 | 1 (1 diverged) |" in text  # counted
    assert "LoRA (1 diverged)" in figures_of(study, results)["study_xs_ladder.svg"]
    results["xs-plain42-square-lr1e-3-s1"] = result_of("xs-plain42-square-lr1e-3-s1", 1, None)
    text = report_of(study, results)
    assert "| LoRA: square | - | 1e-3 | - | 0 (2 diverged) | - | - | - | - | - | - | - |" in text
    assert f"1.50 [1.50, 1.50] | {SAME} | 3.0 | 1.50 | - |" in text  # nothing to compare it with
    assert "every run diverged" in figures_of(study, results)["study_xs_ladder.svg"]
    del results["xs-plain42-square-lr1e-3-s2"]
    assert "LoRA: square" not in report_of(study, results)
    assert "study_xs_ladder.svg" not in figures_of(study, results)


def test_few_prompts_are_to_name_the_arm_of_higher_recovery(study: dict) -> None:
    """Its answers loop less; that fewer of them pass a check does not count."""
    cells = {"cells": ["square@1e-3", "fft@tuned"], "seeds": [1, 2], "few_prompts": True}
    study["experiments"] = [study["experiments"][0], DEFAULTS | LADDER | cells]
    square = {f"xs-plain42-square-lr1e-3-s{s}": [0.0, 80.0, 0.0, 160.0] for s in (1, 2)}
    results = BASE | results_of(SWEEP | square)
    for seed in (1, 2):
        for name, loops in (("square-lr1e-3", "1110"), ("fft-lr1e-2", "0000")):
            faults = {"runaway": "0000", "loop": loops, "blank": "0000", "check_strict": loops}
            probe = {"outcomes": {"t0.85p0.85": faults}, "rates": {}}
            results[f"xs-plain42-{name}-s{seed}"]["probe"] = probe
    (pair,) = few_prompt_rates(gather(study, results, LANGUAGES), "xs")
    assert (pair.better, pair.worse) == ("fft", "square")
    assert (pair.wrong, pair.tied, pair.seeds, pair.prompts) == (0.0, 0.0, 2, 3)  # in English
    assert "| fft | square | 0% | 0% | 2 | 3 |" in report_of(study, results)


def test_committed_study_is_sound() -> None:
    study = read_study(STUDY_FILE)
    for size in study["sizes"]:
        results, waiting = {}, [""]
        while waiting:  # what is planned once every rate is known; refuses two runs of one id
            runs, waiting = planned_runs(study, size, results)
            new = {run.id: {"held_out": {"general": NATS}} for run in runs}
            assert not waiting or new.keys() - results.keys()
            results |= new
    for arm in study["arms"].values():
        rates = [float(rate) for rate in arm["rates"]]
        assert rates == sorted(set(rates)) and len(rates) >= 3


def test_committed_results_were_made_with_the_flags_that_the_study_has_today() -> None:
    """Fails when an arm's flags are changed under results of the old ones."""
    study, results = read_study(STUDY_FILE), read_results(STUDY_RESULTS)
    listed = subprocess.run(
        ["git", "-C", STUDY_RESULTS, "ls-files", "-z"], capture_output=True, text=True
    )
    if listed.returncode:
        pytest.skip("not a git checkout: which results are committed is not known")
    committed = [Path(name) for name in listed.stdout.split("\0")[:-1]]
    names = {path.stem for path in committed if path.suffix == ".json" and len(path.parts) == 1}
    results = {name: results[name] for name in sorted(names & results.keys())}
    assert results
    for name, found in results.items():
        facts = {fact: found[fact] for fact in ("size", "base", "seed")}
        if found["arm"] is None:
            run = lineage(study, **facts)[-1]
        else:
            facts |= {fact: found[fact] for fact in ("base_seed", "arm", "rate", "variant")}
            run = Run(**facts)
        stage, flags = training_flags(study, run, *COMMITTED)
        assert found["command"].endswith(f"train_{stage}.py {shlex.join(as_words(flags))}"), name
        assert changed_flag(found["run"]["settings"], flags) is None, name
    bases = {result["id"] for result in results.values() if result["arm"] is None}
    assert bases == {path.parts[1] for path in committed if path.parts[0] == "bases"}


# What the README's first findings say in words: the size and the base, the cell or the two whose R
# differ so much, and what the words allow.
IN_WORDS = [
    ("an epoch less than a tenth", "xs-plain", ["minimind@1e-4/one_epoch"], (0, 0.1)),
    ("at both sizes", "s-short", ["minimind@1e-4/one_epoch"], (0, 0.1)),
    ("costs over a third", "xs-plain", ["all_r16_vocabulary@tuned", "all_r16@tuned"], (1 / 3, 0.4)),
    ("over a quarter of the gain", "xs-plain", ["minimind@tuned", "minimind@1e-4"], (0.25, 0.3)),
    (
        "costs two fifths if",
        "xs-plain",
        ["all_r16_vocabulary@tuned", "all_r16_vocabulary@1e-4"],
        (0.37, 0.43),
    ),
    (
        "nearly a tenth if the adapters alone do",
        "xs-plain",
        ["all_r16_vocabulary@tuned", "all_r16_vocabulary_fast_vocabulary@1e-4"],
        (0.08, 0.1),
    ),
    ("cost nearly a sixth", "xs-plain", ["all_r8@tuned", "square@tuned"], (0.14, 1 / 6)),
    ("nine tenths at either size", "xs-plain", ["all_r8_vocabulary@tuned"], (0.87, 0.95)),
    ("nine tenths at either size", "s-short", ["all_r8_vocabulary@tuned"], (0.87, 0.95)),
    ("nine tenths at either size", "s-whole", ["all_r8_vocabulary@tuned"], (0.87, 0.95)),
    ("recover about four fifths", "xs-plain", ["embeddings_norms@tuned"], (0.77, 0.83)),
    ("recover about four fifths", "s-short", ["embeddings_norms@tuned"], (0.77, 0.83)),
    ("a third of the gain at `xs`", "xs-short", ["all_r8@tuned"], (0.31, 0.36)),
    ("nearly two thirds at `s`", "s-short", ["all_r8@tuned"], (0.62, 2 / 3)),
    ("over half and nearly three quarters", "xs-plain", ["all_r8@tuned"], (0.5, 0.6)),
    ("over half and nearly three quarters", "s-whole", ["all_r8@tuned"], (0.71, 0.75)),
]


def test_committed_readme_says_in_words_what_the_results_are() -> None:
    study, results = read_study(STUDY_FILE), read_results(STUDY_RESULTS)
    said = " ".join((REPO_DIR / "README.md").read_text(encoding="utf-8").split())
    for words, place, texts, (low, high) in IN_WORDS:
        assert words in said
        size, base = place.split("-")
        cells = [parse_cell(text, DEFAULTS | {"base": base}, size) for text in texts]
        first, *others = (describe_cell(study, cell, results).recovery.estimate for cell in cells)
        assert low < first - sum(others) < high, (words, place)


def test_study_runs_from_nothing_and_then_does_nothing(tmp_path: Path) -> None:
    (tmp_path / "study.toml").write_text(
        TOML.replace('["1e-3", "1e-2", "1e-1"]', '["1e-3"]')
        .replace("[1, 2, 3]", "[1]")
        .replace("[1, 2]", "[1]")
        .replace('"square@1e-3", "fft@tuned/long"', '"square@1e-3", "fft@tuned+rank1"')
    )
    texts = [f"Text {i} tells of the number {i}." for i in range(60)]
    chats = [[{"role": "user", "content": t}, {"role": "assistant", "content": t}] for t in texts]
    for name, records in (
        ("text", [{"text": text} for text in texts]),
        ("chat", [{"conversations": chat} for chat in chats[:40]]),
        ("chat_valid", [{"conversations": chat} for chat in chats[40:]]),
    ):
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(r) + "\n" for r in records))
    command = [sys.executable, str(REPO_DIR / "evaluation" / "run_study.py")]
    for flag, name in (("study", "study.toml"), ("data_dir", ""), ("save_dir", "out")):
        command += [f"--{flag}", str(tmp_path / name)]
    command += ["--results_dir", str(tmp_path / "results"), "--jobs", "2"]
    subprocess.run(command, check=True, capture_output=True, timeout=300)
    results = {path.stem: json.loads(path.read_text()) for path in tmp_path.glob("results/*.json")}
    assert set(results) == {
        "xs-plain42",
        "xs-plain42-fft-lr1e-3-s1",
        "xs-plain42-square-lr1e-3-s1",
    }
    for name, result in results.items():
        assert (result["id"], result["status"]) == (name, "completed")
        assert len(result["held_out"]["general"]["nats"]) == 20
        assert str(tmp_path) not in json.dumps(result)
    assert results["xs-plain42-square-lr1e-3-s1"]["run"]["train_data"]["kept"]["samples"] == 16
    full, base = results["xs-plain42-fft-lr1e-3-s1"], results["xs-plain42"]
    nats = full["held_out"]["general"]["nats"]
    assert set(full["parts"]) == {"rank1"} and len(full["parts"]["rank1"]) == len(nats)
    assert full["parts"]["rank1"] != nats
    assert base["weights"] == full["run"]["base_fingerprint"]
    held_out = full["held_out"]["general"]
    tokenizer = load_tokenizer()
    assert held_out["ends"] == [1] * 20
    assert held_out["tokens"] == [len(tokenizer(text)["input_ids"]) + 1 for text in texts[40:]]
    for nats, end_nats in zip(held_out["nats"], held_out["end_nats"], strict=True):
        assert 0 < end_nats < nats
    for decoding, outcomes in base["probe"]["outcomes"].items():
        for name in ("runaway", "loop", "blank"):
            share = outcomes[name].count("1") / len(outcomes[name])
            assert base["probe"]["rates"][decoding][name]["rate"] == pytest.approx(share, abs=1e-6)
    before = sorted((path, path.stat().st_mtime_ns) for path in tmp_path.rglob("*"))
    again = subprocess.run([*command, "--list"], check=True, capture_output=True, text=True)
    assert again.stdout == ""
    subprocess.run(command, check=True, capture_output=True)
    assert sorted((path, path.stat().st_mtime_ns) for path in tmp_path.rglob("*")) == before
