"""Figures: what they show of made-up runs, and how large the committed ones are."""

import re
from pathlib import Path

import pandas as pd
import pytest

from evaluation.study.analysis import load_evidence
from evaluation.study.causes import tabulate_causes
from evaluation.study.figures import FIGURES, list_losses, list_rungs
from evaluation.study.round3_figures import list_asked, list_fresh_gaps, list_frontier
from evaluation.study.round3_tables import get_round3
from evaluation.study.settings import RESULTS_DIR
from evaluation.study.values import find_value
from tests.study.synthetic import (
    list_outcomes,
    list_prompts,
    make_line,
    make_run,
    make_study,
    write_lines,
)

COMMITTED = sorted((RESULTS_DIR / "figures").glob("*.svg"))
PIXELS = 96 / 72  # of a point


def make_asked(arm: str, rate: float, outcomes: dict[str, str]) -> dict:
    """Return a line of round 3 at 1.3M, whose old prompts were answered as by others."""
    run = make_run("xs", arm, rate, 4)
    outcomes = list_outcomes(4, 6) | outcomes
    return make_line(run, outcomes, id=f"{run.id}-round3", round=3)


def test_nothing_is_drawn_of_runs_that_do_not_exist(tmp_path: Path) -> None:
    write_lines(tmp_path, make_study())
    evidence = load_evidence(tmp_path)
    assert FIGURES["asking"](evidence) is None
    assert FIGURES["behind"](evidence) is None
    assert FIGURES["frontier"](evidence) is None


def test_ways_of_asking_by_hand(tmp_path: Path) -> None:
    """Of 6 fresh compositions 4 are asked without the template; only these count in each way."""
    full = {
        "fresh_combinations": "ccccffcc",
        "fresh_combinations/no_template": "cfff--ff",
    }
    lora = {
        "fresh_combinations": "ccfcccff",
        "fresh_combinations/no_template": "ffff--cc",
        "fresh_combinations/on_fft": "cfffccff",
    }
    lines = [make_asked("fft", 1e-3, full), make_asked("all_r8", 3e-3, lora)]
    write_lines(tmp_path, [*make_study(), *lines])
    evidence = load_evidence(tmp_path)
    table = list_asked(evidence, "xs").set_index(["arm", "way"]).share
    assert table["fft", ""] == 1
    assert table["fft", "no_template"] == 0.25
    assert table["all_r8", ""] == 0.75
    assert table["all_r8", "no_template"] == 0
    assert table["all_r8", "on_fft"] == 0.25
    assert ("fft", "on_fft") not in table.index
    title, svg = FIGURES["asking"](evidence)
    assert title == "Asked without the template that it was trained with, every LoRA fails"
    assert "all-layer LoRA, rank 8" in svg
    table = tabulate_causes(evidence)[0].set_index("cause")
    row = table.loc["asked without the chat template"]
    assert row["mended last, 1.3M"] == "0% to 75%"
    assert row["mended last, 25M"] == row["mended alone, 1.3M"] == "not run"
    row = table.loc["adapters on query and output alone"]
    assert row["mended alone, 1.3M"] == "not run"  # the original LoRA ran, on all layers it did not


def test_gaps_on_fresh_prompts_by_hand(tmp_path: Path) -> None:
    """Full fine-tuning has 5 of 6 compositions, rank 8 has 2: 3 of 6 behind, 100 weights of 100."""
    full = make_asked("fft", 1e-3, {"fresh_combinations": "cccccfff"})
    lora = make_asked("all_r8", 3e-3, {"fresh_combinations": "ccffffcc"})
    other = make_asked("all_r8", 1.2e-2, {"fresh_combinations": "cccccccc"})
    rows = make_asked("all_r8_rows", 3e-3, {"fresh_combinations": "cccccccc"})
    write_lines(tmp_path, [*make_study(), full, lora, other, rows])
    evidence = load_evidence(tmp_path)
    (gap,) = list_fresh_gaps(get_round3(evidence)).itertuples()
    assert (gap.size, gap.arm, gap.gap.value) == ("xs", "all_r8", 0.5)
    assert gap.ratio == 100 * 4 / 400  # 400 labeled tokens in 4 epochs
    assert find_value(evidence, "fresh/composition/1.3M/all_r8/3e-3") == "33"
    assert find_value(evidence, "fresh/plain/1.3M/all_r8/3e-3/4") == "100"
    assert find_value(evidence, "fresh/plain/1.3M/all_r8/3e-3/1") == "not run"
    assert find_value(evidence, "cell/composition/1.3M/all_r8*0.006") == "42"  # 5 of 12
    assert find_value(evidence, "cell/composition/1.3M/study/10") == "not run"


def test_what_25m_models_keep_by_hand(tmp_path: Path) -> None:
    lines = []
    for rate, unseen in ((1e-4, "cfff"), (5e-5, "ccff")):
        run = make_run("m26", "fft", rate, 3)
        outcomes = {"fresh_combinations": "cccfffcf", "fresh_unseen": unseen}
        lines.append(make_line(run, outcomes, round=3))
    short = make_run("m26", "fft", 2e-4, 3, epochs=1)
    lines.append(make_line(short, outcomes, round=3))
    prompts = list_prompts("fresh_unseen", {"where": 4}, "test")
    write_lines(tmp_path, [*make_study(), *lines])
    table = pd.read_csv(tmp_path / "prompts_3.csv")
    pd.concat([table, pd.DataFrame(prompts)]).to_csv(tmp_path / "prompts_3.csv", index=False)
    marks = list_frontier(get_round3(load_evidence(tmp_path))).set_index("rate")
    assert sorted(marks.index) == [5e-5, 1e-4]  # the third was shorter
    assert set(marks.composition) == set(marks.plain) == {0.5}
    assert marks.unseen.to_dict() == {1e-4: 0.25, 5e-5: 0.5}


def test_rungs_and_losses_by_hand(tmp_path: Path) -> None:
    write_lines(tmp_path, make_study())
    evidence = load_evidence(tmp_path)
    rungs = list_rungs(evidence, "xs").set_index("label")
    assert rungs.share["the original LoRA"] == 0.25 and rungs.runs["the original LoRA"] == 1
    assert rungs.share["full fine-tuning"] == pytest.approx(10 / 12)
    losses = list_losses(evidence)  # 3 rates of 2 tuned methods, and the original LoRA's
    assert len(losses) == 7 and set(losses.loss) == {1}


@pytest.mark.parametrize("path", COMMITTED, ids=lambda path: path.stem)
def test_committed_figures_can_be_read(path: Path) -> None:
    """At most 760 px wide, every text at least 12 px high, and no size by its code name."""
    text = path.read_text(encoding="utf-8")
    width = float(re.search(r'<svg [^>]*width="([\d.]+)pt"', text)[1])
    assert width * PIXELS <= 760
    heights = re.findall(r"font(?:-size)?: (?:\w+ )*([\d.]+)px", text)
    assert heights and min(map(float, heights)) * PIXELS >= 12
    shown = " ".join(re.findall(r">([^<>]+)</text>", text))
    assert not re.search(r"\b(xs|s|m26)\b", shown)
