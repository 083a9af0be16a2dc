"""Shares, intervals and reports of made-up runs whose shares are known."""

import json
import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from evaluation.study.analysis import load_evidence, select_reported, tabulate_cells
from evaluation.study.report import make_report, tabulate_contrasts, tabulate_skills
from evaluation.study.results import append_run
from model.files import UserError
from tests.study.synthetic import PROMPTS, spell_outcomes, write_prompts, write_runs

NAMES = "headline arms shares kinds keeping harm capacity rates costs claims gates endings edition1"
NAMES += " answers parts other_sets estimates sizes groups steps ladder"
PAGE = "".join(f"<!-- study:{name} -->\n<!-- /study:{name} -->\n" for name in NAMES.split())


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """Write the results of a made-up study."""
    folder = tmp_path_factory.mktemp("results")
    paths = [(0.3, 0.2), (0.6, 0.2)]
    shares = {"base": 0.0, "study": 0.1, "fft": 0.8, "all_r8": 0.5, "fft@plain42": 0.7}
    write_runs(folder, shares | {"fft*5e-4": paths, "study/50~16000": 0.3, "fft:s": 0.9})
    lines = [json.loads(line) for line in (folder / "runs.jsonl").read_text().splitlines()]
    diverged = lines[-1] | {"id": "s-lost", "status": "diverged", "seed": 9}
    append_run(folder, diverged)
    (whole,) = [line for line in lines if line["id"] == "xs-world-wrapped42-fft-e4-lr0.001-s1"]
    append_run(folder, whole | {"id": whole["id"] + "@read_rows", "step": None})
    return folder


def tabulate_reported(folder: Path) -> pd.DataFrame:
    evidence = load_evidence(folder)
    return tabulate_cells(evidence, select_reported(evidence))


def test_cells_have_names_without_what_is_usual(folder: Path) -> None:
    """A tuned arm stands for its best rate with all seeds; titles say what differs."""
    evidence = load_evidence(folder)
    assert evidence.find_cell("fft", "xs").learning_rate.tolist() == [1e-3] * 3
    assert evidence.find_cell("fft", "xs").seed.tolist() == [1, 2, 3]
    titles = dict(zip(evidence.runs.cell, evidence.runs.title, strict=True))
    assert titles["study/50~16000"] == "the study's LoRA, 50 epochs, 16,000 pairs"
    assert titles["fft@plain42"] == "full fine-tuning, from plain42"
    assert evidence.runs.part.tolist().count("read_rows") == 1
    assert evidence.final.part.isna().all()


def test_shares_and_intervals(folder: Path) -> None:
    """Share and interval are those of the test half's clusters, worked out without resampling."""
    table = tabulate_reported(folder).set_index(["size", "cell", "set", "decoding"])
    row = table.loc["xs", "all_r8", "unseen", "greedy"]
    marks = np.array([letter == "c" for letter in spell_outcomes(0.5)])
    is_test = np.arange(PROMPTS) % 10 > 0
    share = marks[is_test].mean()
    assert row.share == row.correct == pytest.approx(share)
    assert row["wrong fact"] == 0 and row.endless == pytest.approx(1 - share)
    assert row.above_chance == pytest.approx((share - 0.1) / 0.9)
    errors = np.bincount(np.arange(PROMPTS)[is_test] // 2, marks[is_test] - share)  # by cluster
    half = 1.96 * np.sqrt((errors**2).sum()) / is_test.sum()
    assert row.low == pytest.approx(share - half, abs=0.01)
    assert row.high == pytest.approx(share + half, abs=0.01)
    assert ("xs", "fft*0.0005", "unseen", "greedy") not in table.index  # chose the rate


def test_shares_and_intervals_over_skills(folder: Path) -> None:
    """Of 2 skills, intervals over skills reach from the lower share to the higher."""
    evidence, places = load_evidence(folder), np.arange(PROMPTS)
    runs, marks = select_reported(evidence), np.array(list(spell_outcomes(0.5))) == "c"
    shares = [marks[(places % 10 > 0) & (places % 2 == i)].mean() for i in (0, 1)]
    table = tabulate_skills(evidence, runs).set_index("skill").filter(like="xs, LoRA on all")
    texts = table.loc[["skill 0", "skill 1"]].squeeze().str.split(" / ").tolist()
    assert texts == [[f"{x:.0%}"] * 2 for x in shares]
    contrasts = tabulate_contrasts(evidence, runs).set_index(["size", "estimate", "decoding"])
    text = contrasts.loc[("xs", "all_r8", "greedy"), "over skills"]
    assert text.endswith("[{:.2f}, {:.2f}]".format(*sorted(shares))) and shares[0] != shares[1]
    apart = runs[(runs.arm == "fft") == (runs.seed == 2)]  # no seed has both
    table = tabulate_contrasts(replace(evidence, final=apart), apart)
    assert "fft" in (estimates := table.estimate.tolist()) and "fft - all_r8" not in estimates


def test_the_best_rate_so_far_stands_for_an_arm(folder: Path, tmp_path: Path) -> None:
    """Until the whole grid has run, the best rate of those that ran is shown."""
    write_prompts(tmp_path)
    lines = (folder / "runs.jsonl").read_text().splitlines(keepends=True)  # but the last rate's
    (tmp_path / "runs.jsonl").write_text("".join(x for x in lines if "fft-e4-lr0.002-" not in x))
    table = tabulate_reported(tmp_path).query("size == 'xs' and arm == 'fft'")
    assert len(table) and table.title.str.startswith("full fine-tuning, preliminary").all()


def test_the_report_is_stable(folder: Path, tmp_path: Path) -> None:
    """Blocks are filled once, and a second report changes nothing."""
    path = tmp_path / "README.md"
    path.write_text(PAGE)
    first = make_report(tmp_path, folder)
    path.write_text(first[path])
    assert make_report(tmp_path, folder) == first
    write_prompts(tmp_path)  # a study without a run, then one without LoRA on all layers
    assert "Not run yet" in make_report(tmp_path, tmp_path)[path]
    lines = (folder / "runs.jsonl").read_text().splitlines(keepends=True)
    (tmp_path / "runs.jsonl").write_text("".join(x for x in lines if "-all_r8-" not in x))
    assert "study:arms -->\nNot run yet" in make_report(tmp_path, tmp_path)[path]
    path.write_text("<!-- study:nothing -->\n<!-- /study:nothing -->")
    with pytest.raises(UserError, match="no block 'nothing'"):
        make_report(tmp_path, folder)
    blocks = re.findall(r"<!-- study:(\w+) -->\nNot run yet", first[path])
    assert blocks == ["harm", "capacity", "answers", "other_sets"]
    assert "| s-lost | diverged |" in first[path]
    assert first[path].count("full fine-tuning, base rows |") == 1
    assert {file.stem for file in first} == {"README", "headline", "ladder", "endings", "keeping"}


def test_arms_must_start_alike(folder: Path, tmp_path: Path) -> None:
    """A run from other weights than its base's, or on other data, is named (gate G3)."""
    text = (folder / "runs.jsonl").read_text()
    for old, new, error in (
        ('"base_fingerprint": "w"', '"base_fingerprint": "x"', "-s1: started from other weights"),
        ('"tokens": 1,', '"tokens": 2,', "differ in their training data"),
    ):
        write_prompts(tmp_path)
        (tmp_path / "runs.jsonl").write_text(text.replace(old, new, 2))
        with pytest.raises(UserError, match=error):
            load_evidence(tmp_path)
