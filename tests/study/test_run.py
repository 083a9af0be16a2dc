"""The runner: order, results that are appended once, runs that diverge or are stopped."""

import argparse
import json
from pathlib import Path

import pytest

from evaluation.study import run as runner
from evaluation.study.plan import Run
from evaluation.study.results import append_run, read_nll, read_runs
from evaluation.study.settings import read_study
from model.files import UserError

STUDY = read_study()
SHARES = {5e-4: 0.6, 1e-3: 0.8, 2e-3: 0.7}


@pytest.fixture
def args(tmp_path: Path, monkeypatch) -> argparse.Namespace:
    """Return arguments of a study whose scripts write what the real ones would write."""
    data = {name: tmp_path / f"{name}.jsonl" for name in ("pretrain", "sft", "medical")}
    calls = []

    def call_script(words: list, log: Path, deadline: float, may_fail: bool = False) -> None:
        words = list(map(str, words))
        calls.append(words)
        if words[0] == "evaluation/study/measure.py":
            rate = json.loads((Path(words[1]) / "run.json").read_text())["settings"][
                "learning_rate"
            ]
            scalars = {"tune_correct": SHARES.get(rate, 0.0), "tune_nll": 1.0, "nll_text": 3.0}
            found = {"nats": [1.0], "end_nats": [0.5], "tokens": [2.0], "ends": [1.0]}
            record = {
                "weights": "w",
                "scalars": scalars,
                "outcomes": {"combinations": {"greedy": "c"}},
                "nll": {"combinations": found},
            }
            Path(words[3]).write_text(json.dumps(record))
            return
        folder = tmp_path / "out" / words[words.index("--run_name") + 1]
        folder.mkdir(exist_ok=True)
        rate = float(words[words.index("--learning_rate") + 1])
        settings = {"learning_rate": rate, "seed": 1, "dtype": "bfloat16", "device": "cpu"}
        status = "diverged" if rate == 4e-3 else "completed"
        record = {"status": status, "settings": settings, "step": 10, "tokens": 1}
        (folder / "run.json").write_text(json.dumps(record))

    monkeypatch.setattr(runner, "call_script", call_script)
    monkeypatch.setattr(runner, "ensure_world", lambda: data)
    monkeypatch.setattr(runner, "round_base", lambda trained, folder: trained.rename(folder))
    monkeypatch.setattr(runner, "STOP", type(runner.STOP)())
    (tmp_path / "out").mkdir()
    return argparse.Namespace(
        save_dir=tmp_path / "out",
        results_dir=tmp_path,
        study=tmp_path / "study.toml",
        only=["xs-world-wrapped42", "xs-world-wrapped42-fft-e3-*"],
        jobs=2,
        max_hours=1.0,
        calls=calls,
    )


def test_a_study_runs_to_its_end(args) -> None:
    """The base is first, the grid second, the best rate's other seeds last; each once."""
    runner.run_all(STUDY, args)
    ids = read_runs(args.results_dir, 2).id.tolist()
    assert ids[0] == "xs-world-wrapped42"
    assert len(ids) == len(set(ids))
    grid = {f"xs-world-wrapped42-fft-e3-lr{rate:g}-s1" for rate in SHARES}
    others = {f"xs-world-wrapped42-fft-e3-lr0.001-s{seed}" for seed in (2, 3)}
    assert grid | others <= set(ids)
    assert set(ids[1:4]) == grid
    nll = read_nll(args.results_dir, 2)
    assert (nll.id == "").sum() == 1  # tokens and end tokens stand there once
    assert set(nll.id) == {"", *ids}
    count = len(args.calls)
    runner.run_all(STUDY, args)
    assert len(args.calls) == count  # nothing is missing, so nothing ran


def test_a_run_that_diverged_is_a_result(args) -> None:
    """A diverged run has a line without measures, and its grid is settled."""
    run = Run("xs", "wrapped42", "fft", 4e-3, 1, 3.0, start_id="xs-world-wrapped42")
    runner.perform_run(STUDY, run, args, float("inf"))
    row = read_runs(args.results_dir, 2).iloc[0]
    assert row.status == "diverged"
    assert row.tune_correct != row.tune_correct  # not measured


def test_a_failed_run_names_its_log(args, monkeypatch) -> None:
    """A script that leaves no finished run is an error; the other runs go on."""
    works = runner.call_script

    def fail_once(words: list, *rest, **more) -> None:
        if "--learning_rate" in words and words[words.index("--learning_rate") + 1] == "0.0005":
            return
        works(words, *rest, **more)

    monkeypatch.setattr(runner, "call_script", fail_once)
    with pytest.raises(UserError, match="lr0.0005-s1: training failed; see"):
        runner.run_all(STUDY, args)
    assert "xs-world-wrapped42-fft-e3-lr0.001-s1" in read_runs(args.results_dir, 2).id.tolist()


def test_time_that_is_up_starts_nothing(args) -> None:
    """--max_hours 0 leaves all runs for the next call."""
    args.max_hours = 0.0
    runner.run_all(STUDY, args)
    assert read_runs(args.results_dir, 2).empty


def test_data_that_the_world_lacks(args) -> None:
    """A run on unknown data names what there is."""
    run = Run("xs", "wrapped42", "fft_mixed", 1e-3, 1, 3.0, "sft_mixed", start_id="x")
    with pytest.raises(UserError, match="no data 'sft_mixed'; it has pretrain, sft, medical"):
        runner.make_command(STUDY, run, runner.ensure_world(), args.save_dir)


def test_tuning_runs_of_m26_ask_the_tuning_half_alone(args) -> None:
    """One epoch at m26 serves the choice of a rate; at xs the tuning run is also reported."""
    assert runner.is_only_tuning(STUDY, Run("m26", "wrapped42", "fft", 1e-3, 1, 1.0))
    assert not runner.is_only_tuning(STUDY, Run("m26", "wrapped42", "fft", 1e-3, 1, 2.0))
    assert not runner.is_only_tuning(STUDY, Run("xs", "wrapped42", "fft", 1e-3, 1, 3.0))


def test_editions_share_their_files(tmp_path) -> None:
    """A new edition's lines are added to those that are there."""
    source = Path(runner.RESULTS_DIR)
    for name in ("runs.jsonl", "nll.parquet"):
        (tmp_path / name).write_bytes((source / name).read_bytes())
    before = len(read_runs(tmp_path, 1)), len(read_nll(tmp_path, 1))
    row = {"id": "a", "edition": 2, "set": "unseen", "part": "", "nats": [1.0], "end_nats": [0.1]}
    append_run(tmp_path, {"id": "a", "edition": 2, "status": "completed"}, [row])
    assert (len(read_runs(tmp_path, 1)), len(read_nll(tmp_path, 1))) == before
    assert read_runs(tmp_path, 2).id.tolist() == ["a"]
    assert read_nll(tmp_path, 2).nats[0].tolist() == [1.0]
