"""Each claim of PROTOCOL.md can be supported, refuted and open by its rule."""

import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from evaluation.probe import statistics
from evaluation.study import analysis, claims
from evaluation.study.settings import Condition
from tests.study.synthetic import PROMPTS, STUDY, spell_outcomes, write_prompts, write_runs

FACTS = "/100#facts16000"
SMALL = ["square_r1", "square_r2", "square_r4", "square_r8", "all_r1", "all_r2"]
EXTRA = ["plain42", "plain64x42", "plain512x42", "plain4096x42"]


def make_gaps(xs: float, m26: float, second_base: float | None = None) -> dict[str, float]:
    """Return shares whose gap to full fine-tuning is known at 2 sizes, and at a second xs base."""
    second = xs if second_base is None else second_base
    return {
        "fft": 0.8, "all_r8": 0.8 - xs, "fft:m26": 0.8, "all_r8:m26": 0.8 - m26,
        "all_r32:m26": 0.8 - m26, "fft@wrapped43": 0.8, "all_r8@wrapped43": 0.8 - second,
    }  # fmt: skip


GATES = {"base": 0.0, "fft": 0.8, "all_r64_vocabulary": 0.8}  # of xs; they read tune_correct
FALLING = [0.5, 0.3, 0.2, 0.1]
CASES = {  # shares that make a claim supported, refuted, open
    "C1": [
        {"fft": 0.8, "study": a, "study/1": b, "study/10": c}
        for a, b, c in ((0.04, 0.02, 0.05), (0.77, 0.5, 0.8), (0.04, 0.02, 0.3))
    ],
    "C2": [
        {"fft_script*5e-7": a, "fft_script*1e-6": b, "fft_script*1e-5": c}
        for a, b, c in ((0.0, 0.01, 0.05), (0.6, 0.7, 0.8), (0.0, 0.01, 0.35))
    ],
    "C3": [{"study_tuned": a, "study": 0.1} for a in (0.5, 0.12, 0.26)],
    "C4": [{"all_r8": 0.6, "square_r36": b} for b in (0.4, 0.59, 0.5)],
    "C5": [{"all_r64": a, "all_r8": 0.4} for a in (0.6, 0.41, 0.46)],
    "C6": [
        {"all_r8_rows@plain42": a, "all_r8@plain42": 0.1, "all_r8_rows": b, "all_r8": 0.5}
        for a, b in ((0.5, 0.51), (0.11, 0.51), (0.5, 0.6))
    ],
    "C7": [{"all_r8_vocabulary": a, "all_r8": 0.4} for a in (0.6, 0.41, 0.5)],
    "C8": [make_gaps(0.3, 0.1), make_gaps(0.2, 0.2), make_gaps(0.3, 0.1, second_base=0.1)],
    "C9": [  # checkpoints keep a share of unseen things at 50 and 70% of combinations
        {arm: [(0.1, 0.9), (0.5, kept), (0.7, kept)] for arm, kept in (("all_r8", a), ("fft", b))}
        for a, b in ((0.5, 0.3), (0.3, 0.5), (0.5, 0.45))
    ],
    "C10": [{"fft": 0.8, "study/10": a, "study/50~16000": a} for a in (0.05, 0.5, 0.3)],
    "C11": [  # adapters of different sizes, 16,000 facts
        {f"{arm}{FACTS}": {"bits_per_parameter": bits} for arm in SMALL}
        | {f"{arm}{FACTS}": {"stored": stored} for arm in ("all_r8", "fft")}
        for bits, stored in ((2.0, 0.9), (4.0, 0.95), (2.0, [0.95, 0.95, 0.8]))
    ],
    "C12": [  # the wrapped base, and plain ones with more and more unused rows
        {"base": {"reachable_end": 0.99}, "all_r8": {"endless": 0.0}}
        | {f"base@{EXTRA[i]}": {"reachable_end": FALLING[i]} for i in range(4)}
        | {f"all_r8@{EXTRA[i]}": {"endless": endless[i]} for i in range(4)}
        for endless in ((0.2, 0.4, 0.6, 0.95), (0.0, 0.0, 0.0, 0.0), (0.2, 0.6, 0.4, 0.95))
    ],
    "C13": [{"fft": 0.8, "all_r8^fft#medical": b} for b in (0.5, 0.79, 0.72)],
}


@pytest.fixture(autouse=True)
def draw_less(monkeypatch) -> None:
    """Draw 500 times: the rules need no precise intervals."""
    for module in (analysis, claims, statistics):
        monkeypatch.setattr(module, "DRAWS", 500)


def judge(folder: Path, claim: str) -> str:
    """Return the verdict of one claim."""
    evidence = analysis.load_evidence(folder)
    wanted = [one for one in STUDY.claims if one.name == claim]
    study = evidence.study.model_copy(update={"claims": wanted})
    return claims.judge_claims(replace(evidence, study=study))[0].verdict[0]


@pytest.mark.parametrize("claim", [claim.name for claim in STUDY.claims])
def test_a_rule_has_three_outcomes(claim: str, tmp_path: Path) -> None:
    """The rule decides by the shares of the runs; without runs it decides nothing."""
    write_prompts(tmp_path)
    assert judge(tmp_path, claim) == "not run"
    for shares, expected in zip(CASES[claim], ("supported", "refuted", "open"), strict=True):
        gates = GATES | ({"base:m26": 0.0} if "fft:m26" in shares else {})
        write_runs(tmp_path, gates | shares)
        assert judge(tmp_path, claim) == expected, shares


def test_a_side_needs_all_its_cells(tmp_path: Path) -> None:
    """One rate of three decides nothing, and a size that was not run is left out."""
    write_runs(tmp_path, {"fft_script*1e-6": 0.0})
    assert judge(tmp_path, "C2") == "not all run"
    write_runs(tmp_path, CASES["C1"][0] | {"fft:s": 0.8})
    assert judge(tmp_path, "C1") == "not all run"
    # Nothing learns anything: both sides hold.
    write_runs(tmp_path, GATES | {"fft": 0.05, "study": 0.04, "study/1": 0.04, "study/10": 0.04})
    assert judge(tmp_path, "C1") == "open"


def test_nothing_is_concluded_where_a_gate_fails(tmp_path: Path) -> None:
    """A claim that its rule supports waits for G1 and G2 of its size, and is void if one fails."""
    shares = GATES | CASES["C3"][0]
    write_runs(tmp_path, shares | {"base": {"tune_correct": 0.04}})
    assert judge(tmp_path, "C3") == "no conclusion: G1 xs fails"
    write_runs(tmp_path, {name: share for name, share in shares.items() if "r64" not in name})
    assert judge(tmp_path, "C3") == "no conclusion: G2 xs not run"
    write_runs(tmp_path, shares | {"all_r64_vocabulary": {"tune_correct": 0.865}})
    assert judge(tmp_path, "C3") == "no conclusion: G2 xs fails"


def test_verdicts_use_the_seeds_that_all_runs_have(tmp_path: Path) -> None:
    """First an arm, then one rate of C9 loses its third seed; that rate still counts."""
    lower = {"fft*5e-4": [(0.1, 0.9), (0.5, 0.45), (0.7, 0.45)]}  # 5 points below all_r8: open
    write_runs(tmp_path, GATES | CASES["C3"][0] | CASES["C9"][0] | lower)
    path = tmp_path / "runs.jsonl"
    for expected, lost in ((3, "nothing"), (2, "-lr0.01-s3"), (2, "-lr0.0005-s3")):
        lines = path.read_text().splitlines(keepends=True)
        path.write_text("".join(line for line in lines if lost not in line))
        table = claims.judge_claims(analysis.load_evidence(tmp_path))[0].set_index("claim")
        assert (*table.seeds[["C3", "C6"]], table.verdict["C9"]) == (expected, "-", "open")


def test_skills_and_log_odds_of_c8_by_hand(tmp_path: Path) -> None:
    """Of 2 skills the one with full fine-tuning above 95% does not count; odds are p / (1 - p)."""
    write_runs(tmp_path, {"fft": 0.8, "all_r8": 0.5})
    evidence = analysis.load_evidence(tmp_path)
    prompts, runs = evidence.choose_prompts("combinations"), evidence.find_cell("fft", "xs")
    marks = analysis.mark_answers(runs, prompts, "greedy").mean(axis=0)
    assert set(claims.select_skills(evidence, "greedy", prompts).skill) == {"skill 0", "skill 1"}
    learned = prompts.assign(skill=np.where(marks == 1, "all right", "half right"))
    learned.loc[learned.index[marks == 1][:60], "skill"] = "half right"
    assert set(claims.select_skills(evidence, "greedy", learned).skill) == {"half right"}
    is_test = np.arange(PROMPTS) % 10 > 0
    a, b = (np.mean(np.array([*spell_outcomes(s)])[is_test] == "c") for s in (0.8, 0.5))
    condition, place = Condition(estimates=[], log_odds=True), ("fft - all_r8", "xs", "greedy")
    found, _ = analysis.estimate_sum(evidence, condition, place, prompts)
    assert found.value == pytest.approx(math.log(a / (1 - a)) - math.log(b / (1 - b)))


def test_a_condition_needs_interval_and_seeds() -> None:
    """All are within the bounds, unless the condition speaks of the estimate alone."""
    found = analysis.Estimate(0.3, 0.25, 0.35, (0.31, 0.19))
    assert not claims.lies_within(found, 0.2, 1.0)
    assert claims.lies_within(found, 0.2, 1.0, whole=False)
    assert claims.lies_within(found, 0.1, 0.35)
