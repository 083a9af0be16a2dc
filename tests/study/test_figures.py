"""Figures: what they show of made-up runs, and how large the committed ones are."""

import re
from pathlib import Path

import pytest

from evaluation.study.analysis import load_evidence
from evaluation.study.figures import FIGURES, list_asked, list_losses, list_rungs
from evaluation.study.plan import Run
from evaluation.study.settings import MAIN_BASE, RESULTS_DIR
from tests.study.synthetic import make_line, make_run, make_study, write_lines

COMMITTED = sorted((RESULTS_DIR / "figures").glob("*.svg"))
PIXELS = 96 / 72  # of a point


def make_asked(arm: str, rate: float, outcomes: dict[str, str]) -> dict:
    """Return a line of round 3 at 1.3M."""
    run = make_run("xs", arm, rate, 4) if arm != "base" else Run("xs", MAIN_BASE)
    return make_line(run, outcomes, id=f"{run.id}-round3", round=3)


def test_nothing_is_drawn_of_runs_that_do_not_exist(tmp_path: Path) -> None:
    write_lines(tmp_path, make_study())
    evidence = load_evidence(tmp_path)
    assert FIGURES["asking"](evidence) is None
    assert FIGURES["gap"](evidence) is None


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
    lines.append(make_asked("base", 0, full))
    write_lines(tmp_path, [*make_study(), *lines])
    evidence = load_evidence(tmp_path)
    table = list_asked(evidence, "xs").set_index(["arm", "way"]).share
    assert table["fft", ""] == 1
    assert table["fft", "no_template"] == table["base", "no_template"] == 0.25
    assert table["all_r8", ""] == 0.75
    assert table["all_r8", "no_template"] == 0
    assert table["all_r8", "on_fft"] == 0.25
    assert ("fft", "on_fft") not in table.index
    title, svg = FIGURES["asking"](evidence)
    assert title == "Asked without the template that it was trained with, every LoRA fails"
    assert "all-layer LoRA, rank 8" in svg


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
