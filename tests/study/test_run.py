"""The runner: order, results that are appended once, runs that diverge, fail or are stopped."""

import json
from pathlib import Path

import pytest

from evaluation.study import run as runner
from evaluation.study.plan import Run
from evaluation.study.results import RESULTS_DIR, append_run, read_nll, read_runs
from evaluation.study.settings import read_study
from model.files import UserError

SHARES = {5e-4: 0.6, 1e-3: 0.8, 2e-3: 0.7}
ONLY = ["xs-world-wrapped42", "xs-world-wrapped42-fft-e3-*"]


class FakeRunner(runner.Runner):
    """A runner whose scripts write what the real ones would write."""

    broken: str = ""  # a run whose training fails
    calls: list = []

    def call(self, words: list, run_id: str) -> bool:
        """Write the run.json of a training or the record of a measurement."""
        words = list(map(str, words))
        self.calls.append(words)
        if words[0].endswith("measure.py"):
            rate = json.loads((Path(words[1]) / "run.json").read_text())["settings"]
            scalars = {"tune_correct": SHARES.get(rate["learning_rate"], 0.0), "tune_nll": 1.0}
            nll = {"nats": [1.0], "end_nats": [0.5], "tokens": [2], "ends": [1]}
            record = {"weights": "w", "scalars": scalars, "nll": {"unseen": nll}}
            record["outcomes"] = {"unseen": {"greedy": "c"}}
            Path(words[words.index("--output") + 1]).write_text(json.dumps(record))
        elif run_id != self.broken:
            folder = self.save_dir / words[words.index("--run_name") + 1]
            folder.mkdir(exist_ok=True)
            rate = float(words[words.index("--learning_rate") + 1])
            settings = {"learning_rate": rate, "seed": 1, "dtype": "bfloat16", "device": "cpu"}
            status = "diverged" if rate == 4e-3 else "completed"
            record = {"status": status, "settings": settings, "step": 10, "tokens": 1}
            (folder / "run.json").write_text(json.dumps(record))
        return run_id != self.broken


@pytest.fixture
def fake(tmp_path: Path, monkeypatch) -> FakeRunner:
    """Return a runner of full fine-tuning at xs."""
    monkeypatch.setattr(runner, "round_base", lambda trained, folder: trained.rename(folder))
    data = {name: tmp_path / f"{name}.jsonl" for name in ("pretrain", "sft", "medical")}
    (tmp_path / "out").mkdir()
    made = FakeRunner(read_study(), data, tmp_path / "out", tmp_path, ONLY)
    made.calls = []
    return made


def test_a_study_runs_to_its_end(fake: FakeRunner) -> None:
    """The base is first, the grid second, the best rate's other seeds last; each once."""
    fake.run_all(2)
    ids = read_runs(fake.results_dir, 2).id.tolist()
    grid = {f"xs-world-wrapped42-fft-e3-lr{rate:g}-s1" for rate in SHARES}
    assert ids[0] == "xs-world-wrapped42"
    assert set(ids[1:4]) == grid
    assert {f"xs-world-wrapped42-fft-e3-lr0.001-s{seed}" for seed in (2, 3)} <= set(ids)
    assert len(ids) == len(set(ids))
    nll = read_nll(fake.results_dir, 2)
    assert (nll.id == "").sum() == 1  # tokens and end tokens stand there once
    assert set(nll.id) == {"", *ids}
    count = len(fake.calls)
    fake.run_all(2)
    assert len(fake.calls) == count  # nothing is missing, so nothing ran


def test_a_run_that_diverged_is_a_result(fake: FakeRunner) -> None:
    """A diverged run has a line without measures, and is not run again."""
    fake.perform(Run("xs", "wrapped42", "fft", 4e-3, 1, 3.0, start_id="xs-world-wrapped42"))
    (row,) = read_runs(fake.results_dir, 2).itertuples()
    assert row.status == "diverged"
    assert row.tune_correct != row.tune_correct  # not measured


def test_a_failure_is_recorded_and_repeated(fake: FakeRunner) -> None:
    """A failed run has a line with its log; the others go on, and the next call repeats it."""
    fake.broken = "xs-world-wrapped42-fft-e3-lr0.0005-s1"
    with pytest.raises(UserError, match="lr0.0005-s1: training failed; see"):
        fake.run_all(1)
    runs = read_runs(fake.results_dir, 2).set_index("id")
    assert runs.status.to_dict() == {
        "xs-world-wrapped42": "completed",
        "xs-world-wrapped42-fft-e3-lr0.0005-s1": "failed",
        "xs-world-wrapped42-fft-e3-lr0.001-s1": "completed",
        "xs-world-wrapped42-fft-e3-lr0.002-s1": "completed",
    }
    again = FakeRunner(fake.study, fake.data, fake.save_dir, fake.results_dir, ONLY)
    again.run_all(1)
    runs = read_runs(fake.results_dir, 2)
    assert set(runs.status) == {"completed"}
    assert runs.id.is_unique


def test_time_that_is_up_starts_nothing(fake: FakeRunner) -> None:
    """A deadline that has passed leaves all runs for the next call."""
    fake.deadline = 0.0
    fake.run_all(1)
    assert read_runs(fake.results_dir, 2).empty


def test_tuning_runs_of_m26_ask_the_tuning_half_alone(fake: FakeRunner) -> None:
    """One epoch at m26 serves the choice of a rate; at xs the tuning run is also reported."""
    for size, epochs, expected in (("m26", 1.0, True), ("m26", 2.0, False), ("xs", 3.0, False)):
        run = Run(size, "wrapped42", "fft", 1e-3, 1, epochs)
        assert runner.serves_tuning_alone(fake.study, run) == expected


def test_editions_share_their_files(tmp_path: Path) -> None:
    """A new edition's lines are added to those that are there, which stay as they are."""
    for name in ("runs.jsonl", "nll.parquet"):
        (tmp_path / name).write_bytes((RESULTS_DIR / name).read_bytes())
    before, text = read_nll(tmp_path, 1), (tmp_path / "runs.jsonl").read_text()
    row = {"id": "a", "edition": 2, "set": "unseen", "part": "", "nats": [1.0], "end_nats": [0.1]}
    append_run(tmp_path, {"id": "a", "edition": 2, "status": "completed"}, [row])
    after = read_nll(tmp_path, 1)
    assert after.id.equals(before.id) and after.nats.map(str).equals(before.nats.map(str))
    assert (tmp_path / "runs.jsonl").read_text().startswith(text)
    assert read_runs(tmp_path, 2).id.tolist() == ["a"]
    assert read_nll(tmp_path, 2).nats[0].tolist() == [1.0]
