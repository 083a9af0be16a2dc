"""Shares, gaps, intervals and marks of made-up runs, worked out by hand."""

import json
from pathlib import Path

import numpy as np
import pytest

from evaluation.study.analysis import (
    Estimate,
    Evidence,
    compute_prompt_shares,
    estimate_gap,
    estimate_share,
    load_evidence,
    select_reported,
    tabulate_cells,
)
from evaluation.study.frontiers import find_frontier, find_paths, list_points
from evaluation.study.plan import Run
from model.cli import UserError
from tests.study.synthetic import (
    list_outcomes,
    make_line,
    make_run,
    make_study,
    spell,
    write_lines,
)


@pytest.fixture
def evidence(tmp_path: Path) -> Evidence:
    """Return the evidence of the made-up study."""
    write_lines(tmp_path, make_study())
    return load_evidence(tmp_path)


def test_combinations_are_two_outcomes(evidence: Evidence) -> None:
    """Plain questions stand apart from composition; the index is the place in outcome strings."""
    expected = {
        "composition": range(4, 16),
        "plain": range(16, 20),
        "combinations": range(4, 20),
        "unseen": range(2, 6),
    }
    for name, places in expected.items():
        prompts = evidence.choose_prompts(name)
        assert prompts.index.tolist() == list(places)
    tuning = evidence.choose_prompts("composition", "tune")
    assert tuning.index.tolist() == [0, 1, 2, 3]


def test_shares_are_means_over_runs(evidence: Evidence) -> None:
    """Full fine-tuning has 9, 10, 11 of 12 compositions, 1 of 4 plain, 2 of 4 unseen things."""
    runs = evidence.find_cell("fft", "xs")
    plain = evidence.choose_prompts("plain")
    unseen = evidence.choose_prompts("unseen")
    composition = evidence.choose_prompts("composition")
    share = estimate_share(runs, composition, "greedy")
    assert share.by_seed == pytest.approx((9 / 12, 10 / 12, 11 / 12))
    assert share.value == pytest.approx(10 / 12)
    assert estimate_share(runs, plain, "greedy").value == 0.25
    assert estimate_share(runs, unseen, "greedy").value == 0.5
    nothing = runs.iloc[:0]
    assert estimate_share(nothing, plain, "greedy") is None
    wrong = compute_prompt_shares(runs, plain, "greedy", "wrong fact")
    assert wrong.tolist() == [[0, 1, 1, 1]] * 3


def test_t_interval_by_hand() -> None:
    """With 3 runs it is the mean and 4.303 times the deviation over the root of 3."""
    gap = Estimate(value=0.2, low=0.1, high=0.3, by_seed=(0.1, 0.2, 0.3))
    half = 4.302653 * 0.1 / 3**0.5
    low, high = gap.t_interval()
    assert low == pytest.approx(0.2 - half)
    assert high == pytest.approx(0.2 + half)
    of_two = Estimate(value=0.2, low=0.1, high=0.3, by_seed=(0.1, 0.3))
    assert of_two.t_interval() is None


def test_bootstrap_of_few_clusters_by_hand(evidence: Evidence) -> None:
    """Of 2 clusters with all and nothing right, a quarter of the draws takes one of them twice."""
    prompts = evidence.choose_prompts("plain")
    prompts = prompts.assign(cluster=["right", "wrong", "wrong", "right"])
    runs = evidence.find_cell("study", "xs")
    letters = "f" * 16 + "cffc"
    runs = runs.assign(outcomes=[{"combinations": {"greedy": letters}}])
    share = estimate_share(runs, prompts, "greedy")
    assert share.value == 0.5
    assert (share.low, share.high) == (0, 1)
    one_cluster = prompts.assign(cluster="one")
    alike = estimate_share(runs, one_cluster, "greedy")
    assert (alike.low, alike.high) == (0.5, 0.5)


def test_gaps_are_over_the_runs_of_both(evidence: Evidence) -> None:
    """By seed 3, 4 and 2 of 12; a LoRA without its first run is compared in the others."""
    prompts = evidence.choose_prompts("composition")
    above = evidence.find_cell("fft", "xs")
    below = evidence.find_cell("all_r8", "xs")
    gap = estimate_gap(above, below, prompts, "greedy")
    assert gap.by_seed == pytest.approx((3 / 12, 4 / 12, 2 / 12))
    assert gap.low < gap.value < gap.high
    later = below[below.seed > 1]
    gap_later = estimate_gap(above, later, prompts, "greedy")
    assert gap_later.by_seed == pytest.approx((4 / 12, 2 / 12))
    first = above[above.seed == 1]
    assert estimate_gap(first, later, prompts, "greedy") is None


def test_cells_have_names_without_what_is_usual(evidence: Evidence) -> None:
    """A tuned arm stands for its best rate with all seeds; other rates are named and not shown."""
    tuned = evidence.find_cell("fft", "xs")
    assert tuned.learning_rate.tolist() == [1e-3] * 3
    higher = evidence.find_cell("fft*0.002", "xs")
    assert higher.seed.tolist() == [1]
    reported = select_reported(evidence)
    table = tabulate_cells(evidence, reported, ["composition", "unseen"])
    assert set(table.cell) == {"base", "fft", "all_r8", "study"}
    rows = table.set_index(["cell", "set", "decoding"])
    row = rows.loc["all_r8", "composition", "greedy"]
    assert row.share == pytest.approx(21 / 36)
    assert row.correct == pytest.approx(21 / 36)
    assert row["wrong fact"] == pytest.approx(15 / 36)


def test_titles_say_what_differs(tmp_path: Path) -> None:
    """Epochs, pairs and the start of a run stand in its title if they are not the usual ones."""
    run = make_run("xs", "study", 1e-4, 1, epochs=50)
    line = make_line(run, {}, samples=16000)
    write_lines(tmp_path, [line])
    (title,) = load_evidence(tmp_path).runs.title
    assert title == "the original LoRA, 50 epochs, 16,000 pairs"


def test_a_rate_at_the_edge_stands_for_its_arm_and_is_marked(tmp_path: Path) -> None:
    """At 25M full fine-tuning is judged and reported after 2 epochs, LoRA is judged after 1."""
    lines = []
    for rate, epochs, tune in ((1e-4, 2, 4), (2e-4, 2, 3), (2e-4, 1, 4)):
        run = make_run("m26", "fft", rate, 1, epochs)
        lines.append(make_line(run, list_outcomes(tune, 8)))
    for rate, tune in ((5e-4, 1), (1e-3, 4), (2e-3, 1)):
        run = make_run("m26", "all_r8", rate, 1, epochs=1)
        lines.append(make_line(run, {"combinations": spell(tune, 4)}))
    reported = make_run("m26", "all_r8", 1e-3, 1)
    lines.append(make_line(reported, list_outcomes(4, 6)))
    write_lines(tmp_path, lines)
    evidence = load_evidence(tmp_path)
    marks = evidence.runs.set_index("cell")["mark"]
    assert marks["fft"] == "‡"
    assert marks["fft*0.0002"] == ""
    assert marks["fft*0.0002/1"] == ""
    assert marks["all_r8"] == "†"
    assert marks["all_r8/1"] == ""
    full = evidence.find_cell("fft", "m26")
    assert full.learning_rate.tolist() == [1e-4]


def test_a_rate_stays_marked_once_its_grid_may_grow_no_more(tmp_path: Path) -> None:
    """After 3 extensions the highest of 6 rates is the best, so a better one may lie beyond."""
    lines = []
    for rate, tune in ((5e-4, 0), (1e-3, 0), (2e-3, 1), (4e-3, 2), (8e-3, 3), (1.6e-2, 4)):
        run = make_run("xs", "fft", rate, 1)
        lines.append(make_line(run, {"combinations": spell(tune, 4)}))
    write_lines(tmp_path, lines)
    marks = load_evidence(tmp_path).runs.set_index("cell")["mark"]
    assert marks["fft"] == "‡"
    assert marks["fft*0.008"] == ""


def test_round_3_adds_seeds(tmp_path: Path) -> None:
    """Its trainings join their cells, with the old prompts; its base is asked anew, not added."""
    right = list_outcomes(4, 12)
    seed_4 = make_line(make_run("xs", "fft", 1e-3, 4), right, round=3)
    base = make_line(Run("xs", "wrapped42", round=3), right, round=3)
    write_lines(tmp_path, [*make_study(), base, seed_4])
    evidence = load_evidence(tmp_path)
    assert evidence.round3.id.tolist() == [base["id"], seed_4["id"]]
    cell = evidence.find_cell("fft", "xs")
    assert cell.seed.tolist() == [1, 2, 3, 4]
    share = estimate_share(cell, evidence.choose_prompts("composition"), "greedy")
    assert share.by_seed == pytest.approx((9 / 12, 10 / 12, 11 / 12, 1))
    assert base["id"] not in set(evidence.runs.id)
    assert len(evidence.fresh_prompts) == 8


def test_both_rounds_names_of_a_training_are_one_cell(tmp_path: Path) -> None:
    """Round 3 calls the original LoRA `study` at all rates, round 2 only at its own."""
    right = list_outcomes(3, 6)
    tuned = make_line(make_run("s", "study_tuned", 5e-3, 1), right)
    same = make_line(make_run("s", "study", 5e-3, 4), right, round=3)
    slow = make_line(make_run("s", "study", 1e-4, 4), right, round=3)
    write_lines(tmp_path, [tuned, same, slow])
    runs = load_evidence(tmp_path).runs.set_index("id")
    assert runs.cell[same["id"]] == runs.cell[tuned["id"]]
    assert runs.arm[slow["id"]] == "study"


@pytest.mark.parametrize(("tune", "mark"), [(3, ""), (4, "‡")])
def test_a_later_seed_beyond_an_edge_settles_it(tmp_path: Path, tune: int, mark: str) -> None:
    """A worse rate of another seed beyond the best takes its mark; one as good does not.

    As good means the same share and, as all made-up runs have, the same loss: then the lower rate
    would be chosen, so the best still lies at an edge.
    """
    lines = []
    for rate, seed, right in ((5e-5, 3, tune), (1e-4, 1, 4), (2e-4, 1, 3)):
        run = make_run("m26", "fft", rate, seed, epochs=2)
        lines.append(make_line(run, list_outcomes(right, 8)))
    write_lines(tmp_path, lines)
    marks = load_evidence(tmp_path).runs.set_index("cell")["mark"]
    assert marks["fft"] == mark


def test_a_diverged_run_alone_is_no_best_rate(tmp_path: Path) -> None:
    """A sweep whose only run diverged has no rate to settle, and its runs can be read."""
    run = make_run("m26", "fft", 1e-4, 1, epochs=2)
    line = make_line(run, {}, status="diverged", scalars={})
    write_lines(tmp_path, [line, make_line(make_run("xs", "fft", 1e-3, 1), list_outcomes(4, 8))])
    assert load_evidence(tmp_path).final["size"].tolist() == ["xs"]


def test_arms_must_start_alike(tmp_path: Path) -> None:
    """A run from other weights than its base's, or on other data, is named (gate G3)."""
    text = "".join(json.dumps(line) + "\n" for line in make_study())
    changes = (
        ('"base_fingerprint": "of the base"', '"base_fingerprint": "x"', "started from other"),
        ('"train_data": {"tokens": 1}', '"train_data": {"tokens": 2}', "differ in their training"),
    )
    write_lines(tmp_path, [])
    for old, new, error in changes:
        (tmp_path / "runs.jsonl").write_text(text.replace(old, new, 2))
        with pytest.raises(UserError, match=error):
            load_evidence(tmp_path)


def test_frontiers_by_hand(tmp_path: Path) -> None:
    """Checkpoints with 6, 9 of 12 keep 2, 1 of 4 unseen things; the end has 12 and 0."""
    run = make_run("xs", "fft", 1e-3, 1)
    lines = make_study()[:1]
    for step, right, kept in ((100, 6, 2), (200, 9, 1), (0, 12, 0)):
        outcomes = list_outcomes(4, right)
        outcomes["unseen"] = "ff" + spell(kept, 4)
        name = f"{run.id}@{step}" if step else run.id
        lines.append(make_line(run, outcomes, id=name, step=step or 300))
    write_lines(tmp_path, lines)
    evidence = load_evidence(tmp_path)
    paths = find_paths(evidence, "fft")
    assert paths.step.tolist() == [100, 200, 300]
    points = list_points(evidence, paths, ("composition", "unseen"), "greedy")
    levels = np.array([0.4, 0.5, 0.6, 0.75, 0.8])
    assert find_frontier(points, levels) == [0.5, 0.5, 0.25, 0.25, 0]
    (unreached,) = find_frontier(points, np.array([1.01]))
    assert np.isnan(unreached)
