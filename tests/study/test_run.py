"""The runner: order, results that are appended once, runs that diverge, fail or are stopped."""

import asyncio
import json
import sys
from argparse import Namespace
from dataclasses import dataclass, field
from pathlib import Path
from unittest.mock import MagicMock

import pytest

from evaluation.study import run as runner
from evaluation.study.measure import find_whole
from evaluation.study.plan import Run
from evaluation.study.results import append_run, read_runs
from evaluation.study.settings import read_study
from model.cli import UserError

STUDY = read_study()
BASE = "xs-world-wrapped42"
RATES = (5e-4, 1e-3, 2e-3)  # the second is the best


@dataclass
class FakeRunner(runner.Runner):
    """A runner whose scripts write what the real ones would write."""

    broken: str = ""  # a run whose training fails
    calls: int = 0
    measured: list = field(default_factory=list)  # the words of each measurement

    async def call(self, words: list, run_id: str) -> bool:
        """Write the run.json of a training or the record of a measurement."""
        words = list(map(str, words))
        self.calls += 1
        if words[0].endswith("measure.py"):
            self.measured.append(words)
            scalars = {"tune_correct": f"lr{RATES[1]:g}" in run_id, "tune_nll": 1.0}
            record = {"weights": "w", "outcomes": {}, "scalars": scalars}
            Path(words[words.index("--output") + 1]).write_text(json.dumps(record))
        elif run_id != self.broken:
            folder = self.save_dir / words[words.index("--run_name") + 1]
            folder.mkdir(exist_ok=True)
            rate = float(words[words.index("--learning_rate") + 1])
            settings = {"learning_rate": rate, "seed": 1, "dtype": "bfloat16", "device": "cpu"}
            status = "diverged" if rate == 4e-3 else "completed"
            record = {"status": status, "settings": settings, "step": 10, "steps": 10, "tokens": 1}
            (folder / "run.json").write_text(json.dumps(record))
        return run_id != self.broken


@pytest.fixture
def fake(tmp_path: Path, monkeypatch) -> FakeRunner:
    """Return a runner of full fine-tuning at xs."""
    monkeypatch.setattr(runner, "load_model", MagicMock())
    monkeypatch.setattr(runner, "save_model", lambda model, trained, folder: folder.mkdir())
    data = {name: tmp_path / f"{name}.jsonl" for name in ("pretrain", "sft", "medical")}
    (tmp_path / "out").mkdir()
    return FakeRunner(STUDY, data, tmp_path / "out", tmp_path, [BASE, f"{BASE}-fft-e4-*-s[123]"])


def test_a_study_runs_to_its_end(fake: FakeRunner) -> None:
    """The base is first, the grid second, the best rate's other seeds last; each once."""
    asyncio.run(fake.run_all(2))
    ids = read_runs(fake.results_dir, 2).id.tolist()
    assert ids[0] == BASE
    assert set(ids[1:4]) == {f"{BASE}-fft-e4-lr{rate:g}-s1" for rate in RATES}
    assert sorted(ids[4:6]) == [f"{BASE}-fft-e4-lr0.001-s{seed}" for seed in (2, 3)]
    assert fake.calls == 2 * len(ids)  # a training and a measurement each
    asyncio.run(fake.run_all(2))
    assert fake.calls == 2 * len(ids)  # nothing is missing, so nothing ran


def test_arms_find_a_base_that_ships(fake: FakeRunner, capsys: pytest.CaptureFixture) -> None:
    asyncio.run(fake.perform(Run("xs", "wrapped42")))
    (fake.save_dir / BASE).rename(fake.save_dir / "lost")
    asyncio.run(fake.run_all(1))
    assert f"needed first, in {fake.save_dir}: {BASE}" in capsys.readouterr().out
    (fake.results_dir / "bases" / BASE).mkdir(parents=True)
    asyncio.run(fake.run_all(1))
    assert (fake.save_dir / BASE).is_dir() and fake.calls == 2 + 9 * 2


def test_kept_checkpoints_are_measured_on_2_sets_and_the_end_once(fake: FakeRunner) -> None:
    run = Run("xs", "wrapped42", "fft", 1e-3, 1, 4.0, start_id=BASE)
    for step in (5, 10):
        (fake.save_dir / run.id / f"checkpoints/step_{step}").mkdir(parents=True)
    asyncio.run(fake.perform(run))
    assert read_runs(fake.results_dir, 2).id.tolist() == [f"{run.id}@5", run.id]
    checkpoint, end = fake.measured
    assert checkpoint[1].endswith("step_5") and checkpoint[-2:] == ["combinations", "unseen"]
    assert not {"--sets", "--only_tune"} & {*end} and end[end.index("--base") + 1] == "wrapped42"


def test_runs_that_diverge_or_fail_have_a_line(fake: FakeRunner) -> None:
    """A diverged run is a result; a failed one is named, and the next call repeats it alone."""
    asyncio.run(fake.perform(Run("xs", "wrapped42", "fft", 4e-3, 1, 3.0, start_id=BASE)))
    fake.broken = f"{BASE}-fft-e4-lr0.0005-s1"
    asyncio.run(fake.run_all(1))
    assert "lr0.0005-s1: training failed; see" in fake.errors[0] and len(fake.errors) == 1
    runs = read_runs(fake.results_dir, 2).set_index("id")
    assert runs.status.tolist() == ["diverged", "completed", "failed", "completed", "completed"]
    assert runs.tune_correct.isna().tolist() == [True, False, True, False, False]
    again = FakeRunner(fake.study, fake.world, fake.save_dir, fake.results_dir, [fake.broken])
    asyncio.run(again.run_all(1))
    runs = read_runs(fake.results_dir, 2)
    assert runs.id.is_unique and runs.status.tolist().count("completed") == 4


def test_a_stopped_runner_stops_its_scripts(tmp_path: Path, monkeypatch) -> None:
    """When time is up, the script gets SIGTERM, saves its state, and the run has no line."""
    script = tmp_path / "script.py"
    script.write_text(
        "import pathlib, signal, sys, time\n"
        "def save(*_): pathlib.Path('saved').touch(); sys.exit()\n"
        "signal.signal(signal.SIGTERM, save)\n"
        "pathlib.Path('started').touch(); time.sleep(60)\n"
    )
    monkeypatch.setattr(runner, "make_command", lambda *_: [script])
    monkeypatch.setattr(runner, "REPO_DIR", tmp_path)
    study = runner.Runner(STUDY, {"sft": script}, tmp_path, tmp_path, [BASE])

    async def stop() -> None:
        task = asyncio.create_task(study.run_all(1))
        while not (tmp_path / "started").exists():
            await asyncio.sleep(0.01)
        task.cancel()

    asyncio.run(stop())
    assert (tmp_path / "saved").exists() and read_runs(tmp_path, 2).empty
    assert sys.executable in (tmp_path / f"{BASE}.log").read_text()


def test_editions_share_their_file(tmp_path: Path) -> None:
    for edition in (1, 2):
        append_run(tmp_path, {"id": "a", "edition": edition, "status": "completed"})
    assert [len(read_runs(tmp_path, edition)) for edition in (1, 2)] == [1, 1]


def test_a_changed_checkpoint_is_added_to_its_run_once(tmp_path: Path) -> None:
    append_run(tmp_path, {"id": "r", "status": "completed", "edition": 2, "step": 9})
    given = {"study_dir": tmp_path, "facts": None, "only_tune": False, "add_to": "r"}
    args = Namespace(**given, folder=Path("out/r_read_rows"))
    part = find_whole(args)
    assert part == {"id": "r@read_rows", "status": "completed", "edition": 2, "step": None}
    for changes in ({"add_to": "lost"}, {"folder": Path("out/r")}, {"folder": Path("out/other")}):
        with pytest.raises(UserError, match="no completed run"):
            find_whole(Namespace(**(vars(args) | changes)))
    append_run(tmp_path, part)
    with pytest.raises(UserError, match="r@read_rows already"):
        find_whole(args)
