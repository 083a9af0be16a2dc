"""Results of several machines: they join by concatenation, and no run may be there twice."""

from pathlib import Path

import pytest

from evaluation.study.results import append_run, read_runs
from model.cli import UserError


def make_line(name: str, correct: float, status: str = "completed", edition: int = 2) -> dict:
    scalars = {"tune_correct": correct}
    return {"id": name, "status": status, "edition": edition, "step": 9, "scalars": scalars}


def join(folder: Path, *machines: Path) -> Path:
    """Concatenate the results of machines, as `cat` does."""
    folder.mkdir(exist_ok=True)
    texts = [(machine / "runs.jsonl").read_bytes() for machine in machines]
    (folder / "runs.jsonl").write_bytes(b"".join(texts))
    return folder


@pytest.fixture
def machines(tmp_path: Path) -> tuple[Path, Path]:
    """The folders of two machines: one made the runs a and b, the other c."""
    first, second = tmp_path / "first", tmp_path / "second"
    first.mkdir()
    second.mkdir()
    append_run(first, make_line("a", 0.25))
    append_run(first, make_line("b", 0.5))
    append_run(second, make_line("c", 0.75))
    return first, second


def test_results_of_two_machines_join(tmp_path: Path, machines: tuple[Path, Path]) -> None:
    append_run(machines[1], make_line("a", 0.1, edition=1))  # another edition's run of that name
    joined = join(tmp_path / "joined", *machines)
    runs = read_runs(joined, 2)
    assert runs.id.tolist() == ["a", "b", "c"]
    assert runs.tune_correct.tolist() == [0.25, 0.5, 0.75]
    append_run(joined, make_line("d", 1.0))  # and the joined file goes on
    assert read_runs(joined, 2).id.tolist() == ["a", "b", "c", "d"]


@pytest.mark.parametrize("status", ["completed", "failed"])
def test_a_run_of_both_machines_is_refused(
    tmp_path: Path, machines: tuple[Path, Path], status: str
) -> None:
    append_run(machines[1], make_line("b", 0.5, status))
    path = join(tmp_path / "joined", *machines) / "runs.jsonl"
    with pytest.raises(UserError) as caught:
        read_runs(path.parent, 2)
    assert str(caught.value) == f"{path}:4: b is in {path}:2 too; delete one of both lines"
