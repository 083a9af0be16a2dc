"""Saved answers are split into the study's outcomes."""

import json
from pathlib import Path

import pytest

from evaluation.study.shares import count_outcomes, read_outcomes
from model.cli import UserError


def write_answers(folder: Path, rows: list[tuple[str, str, str]]) -> None:
    """Write answers as eval_llm.py does: id of the prompt, decoding, outcome."""
    names = ["id", "decoding", "outcome"]
    lines = [json.dumps(dict(zip(names, row, strict=True))) + "\n" for row in rows]
    (folder / "samples.jsonl").write_text("".join(lines))


def test_outcomes_have_as_many_prompts_as_the_protocol_says() -> None:
    outcomes = read_outcomes()
    fresh = outcomes[outcomes.index.str.startswith("fresh_")]
    assert fresh.value_counts().to_dict() == {"composition": 1087, "unseen": 300, "plain": 113}
    old = outcomes[outcomes.index.str.startswith(("combinations-test-", "unseen-test-"))]
    assert old.value_counts().to_dict() == {"composition": 1087, "unseen": 300, "plain": 113}


def test_answers_are_counted_by_outcome_and_decoding(tmp_path: Path) -> None:
    outcomes = read_outcomes()
    first = {name: outcomes.index[outcomes == name][0] for name in ("composition", "plain")}
    rows = [
        (first["composition"], "greedy", "correct"),
        (first["composition"], "sampled", "correct"),
        (first["composition"], "sampled", "blank"),
        (first["plain"], "greedy", "wrong fact"),
    ]
    write_answers(tmp_path, rows)
    counts = count_outcomes(tmp_path).set_index(["decoding", "outcome"])
    assert counts.share["greedy", "composition"] == "100.0%"
    assert counts.share["sampled", "composition"] == "50.0%"
    assert counts.share["greedy", "plain"] == "0.0%"


def test_folders_without_such_answers_are_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"has no samples\.jsonl"):
        count_outcomes(tmp_path)
    write_answers(tmp_path, [("mochi-food", "greedy", "correct")])
    with pytest.raises(UserError, match="mochi-food is no test prompt"):
        count_outcomes(tmp_path)
