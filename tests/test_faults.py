"""What stops a run: kills in the middle of a save, signals, full disks, damaged files, no memory.

`stress_resume.py` kills whole processes at random moments; here each moment is chosen.
"""

import argparse
import contextlib
import json
import math
import os
import re
import resource
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from datetime import timedelta
from pathlib import Path

import psutil
import pytest
import torch
from accelerate.state import AcceleratorState

from dataset.command_line import OUT_OF_MEMORY, REPO_DIR, SettingsError
from tests.stress_resume import compare_runs, free_port, write_corpora
from tests.test_training import (
    CPU,
    ONE_THREAD,
    SHAPE_FLAGS,
    Killed,
    at_step,
    call,
    kill,
    record_of,
    rows_of,
    sha256,
    terminate,
)
from trainer import run_folder, train_full_sft, trainer_utils
from trainer.failures import run_script, stop_on_signals
from trainer.run_folder import check_same_run, differences, printable_settings

STEPS = 10


@pytest.fixture(scope="session")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with corpora, a base and `whole/full_sft`, a run of 10 steps left in peace."""
    place = tmp_path_factory.mktemp("faults")
    write_corpora(place)
    flags = f"{SHAPE_FLAGS} {CPU} --data_path {place}/text.jsonl --save_dir {place} --run_name base"
    assert call("pretrain", f"{flags} --batch_size 8 --max_steps 2", place) == 0
    assert call("full_sft", flags_in(place, place / "whole"), place) == 0
    return place


def flags_in(place: Path, out: Path) -> str:
    """Ten steps, with a state and a validation after every second one."""
    return (
        f"{CPU} --from_weight {place}/base --data_path {place}/sft.jsonl --save_dir {out} "
        f"--eval_data_path {place}/valid.jsonl --batch_size 8 --max_steps {STEPS} "
        "--eval_interval 2 --save_interval 2"
    )


def finish(place: Path, out: Path) -> list[str]:
    """Continues a run to its end; what then differs from one left in peace."""
    assert call("full_sft", flags_in(place, out) + " --from_resume", place) == 0
    return list(compare_runs(place / "whole/full_sft", out / "full_sft"))


def hashes(folder: Path) -> dict[Path, str]:
    return {path: sha256(path) for path in folder.rglob("*") if path.is_file()}


def error_of(capfd: pytest.CaptureFixture[str], place: Path, flags: str) -> str:
    """The one line that a run refused with exit code 2 writes to standard error."""
    capfd.readouterr()
    with pytest.raises(SystemExit) as caught:
        run_script(lambda: call("full_sft", flags, place))
    lines = capfd.readouterr().err.splitlines()
    assert caught.value.code == 2
    assert len(lines) == 1 and lines[0].startswith("error: "), lines
    return lines[0]


def test_runs_that_differ_are_told_apart(place: Path, tmp_path: Path) -> None:
    """Another order of the data changes all that a run leaves; else no test here could fail."""
    assert call("full_sft", flags_in(place, tmp_path) + " --seed 43", place) == 0
    told = list(compare_runs(place / "whole/full_sft", tmp_path / "full_sft"))
    files = {"model.safetensors", "metrics.jsonl", "run.json"}
    files |= {f"resume/{name}" for name in ("pytorch_model.bin", "optimizer.bin", "progress.json")}
    files |= {"resume/random_states_0.pkl"}
    assert {line.partition(":")[0] for line in told} == files
    assert "run.json: settings" in " ".join(told)


# ---------------------------------------------------------------- kills


@pytest.mark.parametrize("operation", range(12))
def test_kill_at_any_operation_of_a_save(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, operation: int
) -> None:
    """Of the third save: seven writes, a removal, two renames, a write and a removal."""
    saves, left = [], [operation]
    keep_state = run_folder.RunFolder.keep_state
    remove_folder, rename, sync = run_folder.remove_folder, Path.rename, run_folder.sync

    def counted(act: Callable[..., None]) -> Callable[..., None]:
        def perform(*args: object) -> None:
            if len(saves) == 3 and left[0] == 0:
                if act is remove_folder and args[0].is_dir():  # half of it is gone
                    next(args[0].iterdir()).unlink()
                raise Killed
            left[0] -= len(saves) == 3
            act(*args)

        return perform

    def watched(run: run_folder.RunFolder) -> None:
        saves.append(1)
        keep_state(run)
        assert len(saves) < 3, "there are more operations than the test tries"

    with monkeypatch.context() as patch:
        patch.setattr(run_folder.RunFolder, "keep_state", watched)
        patch.setattr(run_folder, "remove_folder", counted(remove_folder))
        patch.setattr(run_folder, "sync", counted(sync))
        patch.setattr(Path, "rename", counted(rename))
        with pytest.raises(Killed):
            call("full_sft", flags_in(place, tmp_path), place)
    assert finish(place, tmp_path) == []


def test_kill_before_the_first_state(
    place: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    flags = flags_in(place, tmp_path)
    with at_step(2, kill), pytest.raises(Killed):
        call("full_sft", flags, place)
    error = error_of(capfd, place, flags)
    assert "exists: replace it with --overwrite" in error and "--from_resume" not in error
    error = error_of(capfd, place, flags + " --from_resume")
    assert "holds no resume/ state to continue from; start it anew with --overwrite" in error
    assert call("full_sft", flags + " --overwrite", place) == 0
    assert list(compare_runs(place / "whole/full_sft", tmp_path / "full_sft")) == []


def test_record_tells_of_continuations(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """Code and machine stay those of the start; what else was at work, and what is odd, is told."""
    with at_step(5, terminate):
        assert call("full_sft", flags_in(place, tmp_path), place) == 130
    before = record_of(tmp_path / "full_sft")
    monkeypatch.setattr(trainer_utils, "git_state", lambda: {"commit": "f00", "dirty": False})
    assert finish(place, tmp_path) == []
    record = record_of(tmp_path / "full_sft")
    assert (record["git"], record["machine"]) == (before["git"], before["machine"])
    assert [(entry["step"], entry["git"]["commit"]) for entry in record["resumed"]] == [(5, "f00")]
    out = capfd.readouterr().out
    assert f"resumed from {tmp_path}/full_sft/resume at step 5" in out
    commit = before["git"].get("commit")
    assert f"note: run.json.git.commit was {commit} and is f00 now" in out


def test_losses_of_lost_steps_are_forgotten(place: Path, tmp_path: Path) -> None:
    """Killed after the validation of step 4, before its state; then stopped in step 3."""
    run = tmp_path / "full_sft"
    with pytest.MonkeyPatch.context() as patch, pytest.raises(Killed):
        patch.setattr(trainer_utils, "check_weights", lambda _, step: kill() if step == 4 else None)
        call("full_sft", flags_in(place, tmp_path), place)
    assert [row["step"] for row in rows_of(run)] == [1, 2, 2, 3, 4, 4]
    with at_step(1, terminate):
        assert call("full_sft", flags_in(place, tmp_path) + " --from_resume", place) == 130
    assert [row["step"] for row in rows_of(run)] == [1, 2, 2, 3]
    assert record_of(run)["train_loss"] == rows_of(run)[3]["loss"]
    assert record_of(run)["eval_loss"] == rows_of(run)[2]["eval_loss"]
    assert finish(place, tmp_path) == []


@pytest.mark.parametrize("damage", ["cut", "one bit", "missing", "no hashes"])
def test_damaged_state_is_refused(
    place: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str], damage: str
) -> None:
    with at_step(5, terminate):
        assert call("full_sft", flags_in(place, tmp_path), place) == 130
    state = tmp_path / "full_sft/resume"
    names = {"cut": "optimizer.bin", "one bit": "pytorch_model.bin"}
    names |= {"missing": "random_states_0.pkl", "no hashes": "sha256.json"}
    path = state / names[damage]
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.unlink()
    if damage in ("cut", "one bit"):
        path.write_bytes(content if damage == "one bit" else content[: len(content) // 2])
    before = hashes(tmp_path)
    error = error_of(capfd, place, flags_in(place, tmp_path) + " --from_resume")
    reason = "missing, so" if damage == "no hashes" else "damaged or missing; restore resume/"
    assert f"{path}: {reason}" in error
    assert hashes(tmp_path) == before


# ---------------------------------------------------------------- one process, one run


def test_folder_made_in_the_meantime_is_not_overwritten(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """Another run took the name while this one read its data."""
    load_data = train_full_sft.load_data

    def slow(*args: object) -> object:
        (tmp_path / "full_sft").mkdir()
        (tmp_path / "full_sft/model.safetensors").write_text("dear")
        return load_data(*args)

    monkeypatch.setattr(train_full_sft, "load_data", slow)
    error = error_of(capfd, place, flags_in(place, tmp_path))
    assert "full_sft: made by another process in the meantime" in error
    assert (tmp_path / "full_sft/model.safetensors").read_text() == "dear"


def test_second_process_is_refused_until_the_first_is_dead(
    place: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """Killed, it leaves a data process, which lives on for seconds and must not hold the lock."""
    flags = flags_in(place, tmp_path) + " --num_workers 1"
    script = [sys.executable, "trainer/train_full_sft.py", *flags.split()]
    script += ["--max_steps", "100000", "--log_interval", "1"]
    with subprocess.Popen(script, cwd=REPO_DIR, env=ONE_THREAD, stdout=subprocess.PIPE) as process:
        try:
            while process.poll() is None and not (tmp_path / "full_sft/resume").is_dir():
                time.sleep(0.01)
            for way in ("--from_resume", "--overwrite"):
                error = error_of(capfd, place, f"{flags} --max_steps 100000 {way}")
                assert "full_sft: another process trains this run now" in error
            assert len(psutil.Process(process.pid).children()) == 1
        finally:
            process.kill()
    assert call("full_sft", flags + " --overwrite", place) == 0


# ---------------------------------------------------------------- signals


def send(number: signal.Signals, times: int = 1, to_children: bool = False) -> None:
    children = psutil.Process().children() if to_children else []
    for child in children:
        child.send_signal(number)
    time.sleep(0.2 * to_children)  # time to die in
    for _ in range(times):
        os.kill(os.getpid(), number)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_signal_to_the_whole_group_saves_the_state(
    place: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str], number: signal.Signals
) -> None:
    """A terminal's Ctrl-C and a batch system's SIGTERM reach the data processes too."""
    flags = flags_in(place, tmp_path) + " --num_workers 1"
    with at_step(3, lambda: send(number, to_children=True)):
        assert call("full_sft", flags, place) == 130
    record, output = record_of(tmp_path / "full_sft"), capfd.readouterr()
    kept = "the state of step 3 is kept: continue from it with --from_resume"
    assert (record["status"], record["step"], record["reason"]) == ("interrupted", 3, kept)
    assert f"interrupted at step 3, validation loss {record['eval_loss']:.4f}; {kept}" in output.out
    assert "stopping: the state is saved after this step" in output.err
    assert finish(place, tmp_path) == []


def test_second_interrupt_stops_at_once(place: Path, tmp_path: Path) -> None:
    with at_step(4, lambda: send(signal.SIGINT, times=2)):
        assert call("full_sft", flags_in(place, tmp_path), place) == 130
    record = record_of(tmp_path / "full_sft")
    assert (record["status"], record["step"]) == ("interrupted", 3)
    assert record["reason"].startswith("at once; the state of step 2 is kept")
    assert finish(place, tmp_path) == []


def test_signals_that_come_twice_stop_once() -> None:
    """torchrun passes on what the terminal has sent already; batch systems repeat themselves."""
    handlers = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        received = stop_on_signals(processes=2)
        send(signal.SIGINT, times=2)
        assert received == [signal.SIGINT] * 2
        received = stop_on_signals(processes=1)
        send(signal.SIGTERM, times=2)
        assert received == [signal.SIGTERM] * 2
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)


def test_dead_data_process_ends_the_run(
    place: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    flags = flags_in(place, tmp_path) + " --num_workers 1"

    def kill_worker() -> None:
        (worker,) = psutil.Process().children()
        worker.kill()

    with at_step(4, kill_worker):
        error = error_of(capfd, place, flags)
    assert "a data loading process died at step" in error and "lower --num_workers" in error
    # It may be noticed before the state of step 4 is saved, or after.
    assert re.search(r"the state of step [24] is kept", error)
    assert record_of(tmp_path / "full_sft")["status"] == "failed"
    assert finish(place, tmp_path) == []


# ---------------------------------------------------------------- other processes of the run


def pair(rank: int, port: int) -> dict[str, str]:
    """The environment that torchrun gives to one of two processes."""
    environment = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": 2, "LOCAL_WORLD_SIZE": 2}
    environment |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    return {name: str(value) for name, value in environment.items()}


@pytest.mark.parametrize("rank", [0, 1])
def test_process_that_never_comes_is_not_waited_for(
    place: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
    rank: int,
) -> None:
    """Killed before the two have met, say: nobody sees it die."""
    for name, value in pair(rank, free_port()).items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(trainer_utils, "PEER_TIMEOUT", timedelta(seconds=1))
    capfd.readouterr()
    try:
        with pytest.raises(SystemExit) as caught:
            run_script(lambda: call("full_sft", flags_in(place, tmp_path), place))
    finally:
        AcceleratorState._reset_state(True)
    assert caught.value.code == 2
    error = capfd.readouterr().err.splitlines()[-1]  # what stands above it is torch's
    assert error.startswith("error: before the first step, another process of this run did not ")
    assert error.endswith("see its output, and start all of them again")
    assert not (tmp_path / "full_sft").exists()


# The second process alone dies, in its sixth step.
KILL_OF_ONE = """
import functools, os, pathlib, signal, sys
sys.path.insert(0, {repo!r})
from trainer import train_full_sft, trainer_utils
from trainer.failures import run_script
train_step, taken = trainer_utils.train_step, []
def watched(*args):
    taken.append(1)
    if len(taken) == 6 and os.environ["RANK"] == "1":
        os.kill(os.getpid(), signal.SIGKILL)
    return train_step(*args)
trainer_utils.train_step = watched
cache = pathlib.Path({cache!r})
trainer_utils.load_dataset = functools.partial(trainer_utils.load_dataset, cache_dir=cache)
run_script(train_full_sft.main)
"""


def test_process_that_dies_ends_the_run(place: Path, tmp_path: Path) -> None:
    port = free_port()
    script = KILL_OF_ONE.format(repo=str(REPO_DIR), cache=str(place / "cache"))
    command = [sys.executable, "-c", script, *flags_in(place, tmp_path).split()]
    processes = [
        subprocess.Popen(
            command, env=ONE_THREAD | pair(rank, port), stderr=subprocess.PIPE, text=True
        )
        for rank in range(2)
    ]
    errors = [process.communicate(timeout=90)[1] for process in processes]
    assert [process.returncode for process in processes] == [2, -signal.SIGKILL], errors
    [error] = errors[0].splitlines()
    assert error.startswith("error: at step 6, another process of this run did not come, died or ")
    assert error.endswith("the state of step 4 is kept: continue from it with --from_resume")
    record = record_of(tmp_path / "full_sft")
    assert (record["status"], record["step"]) == ("failed", 5)
    assert record["reason"].startswith("another process of this run did not come, died or ")
    assert record["reason"] in error


# ---------------------------------------------------------------- disks


@contextlib.contextmanager
def file_size_limit(size: int) -> Iterator[None]:
    """While open, no file of this process can grow beyond `size` bytes, as on a full disk."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)


def test_state_that_does_not_fit_leaves_the_previous_one(
    place: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    run, kept = tmp_path / "full_sft", {}
    with contextlib.ExitStack() as stack:

        def fill() -> None:
            kept.update(hashes(run / "resume"))
            stack.enter_context(file_size_limit(100_000))

        with at_step(6, fill):
            error = error_of(capfd, place, flags_in(place, tmp_path))
    assert f"{run}/resume.tmp: not written, with " in error
    assert "the state of step 4 is kept: continue from it with --from_resume" in error
    assert hashes(run / "resume") == kept and not (run / "resume.tmp").exists()
    record = record_of(run)
    assert (record["status"], record["step"]) == ("failed", 6)
    assert "resume.tmp: not written" in record["reason"]
    assert finish(place, tmp_path) == []


def test_weights_that_do_not_fit_are_not_left_in_part(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    save_model, run = train_full_sft.save_model, tmp_path / "full_sft"

    def save(*args: object) -> None:
        with file_size_limit(100_000):
            save_model(*args)

    with monkeypatch.context() as patch:
        patch.setattr(train_full_sft, "save_model", save)
        error = error_of(capfd, place, flags_in(place, tmp_path))
    assert f"{run}/model.safetensors: not written (" in error
    assert not list(run.glob("model.safetensors*"))
    assert record_of(run)["status"] == "failed"
    assert finish(place, tmp_path) == []


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 4 MiB: one state of the tiny model, 2.6 MB, fits, a second does not."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=4m", "tmpfs", str(disk)]
    if shutil.which("mount") is None or subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("mounting a file system is not permitted here")
    yield disk
    subprocess.run(["umount", "--lazy", str(disk)], check=True)


def test_full_disk(place: Path, small_disk: Path, capfd: pytest.CaptureFixture[str]) -> None:
    error = error_of(capfd, place, flags_in(place, small_disk))
    assert "resume.tmp: not written, with " in error and "the state of step 2 is kept" in error
    assert record_of(small_disk / "full_sft")["status"] == "failed"
    subprocess.run(["mount", "-o", "remount,size=40m", str(small_disk)], check=True)
    assert finish(place, small_disk) == []


def test_read_only_disk(place: Path, small_disk: Path, capfd: pytest.CaptureFixture[str]) -> None:
    subprocess.run(["mount", "-o", "remount,ro", str(small_disk)], check=True)
    for out in (small_disk, small_disk / "deeper"):
        error = error_of(capfd, place, flags_in(place, out))
        assert f"--save_dir: {small_disk} cannot be written to; choose another one" in error


def test_save_dir_below_a_file(
    place: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    error = error_of(capfd, place, flags_in(place, place / "sft.jsonl/out"))
    assert f"--save_dir: {place}/sft.jsonl is no folder; choose another one" in error


# ---------------------------------------------------------------- numbers and memory


def after_step(step: int, spoil: Callable[[torch.nn.Module], float]) -> pytest.MonkeyPatch:
    """Patches the training step: step `step` returns as its loss what `spoil(model)` says."""
    patch, train_step, taken = pytest.MonkeyPatch(), trainer_utils.train_step, []

    def watched(job: object, model: torch.nn.Module, *args: object) -> tuple:
        loss, *rest = train_step(job, model, *args)
        taken.append(1)
        return (spoil(model) or loss if len(taken) == step else loss, *rest)

    patch.setattr(trainer_utils, "train_step", watched)
    return patch


def break_weights(model: torch.nn.Module) -> None:
    with torch.no_grad():
        model.model.norm.weight[3] = math.inf


@pytest.mark.parametrize(
    ("step", "flags", "spoil", "reason"),
    [
        (5, "", lambda _: math.nan, "loss nan, gradient norm "),
        (6, "", break_weights, "validation loss nan after step 6"),
        (6, " --eval_interval 5", break_weights, "model.norm.weight is not finite after the "),
    ],
)
def test_what_is_not_finite_is_never_saved(
    place: Path,
    tmp_path: Path,
    capfd: pytest.CaptureFixture[str],
    step: int,
    flags: str,
    spoil: Callable[[torch.nn.Module], float],
    reason: str,
) -> None:
    patch = after_step(step, spoil)
    try:
        assert call("full_sft", flags_in(place, tmp_path) + flags, place) == 3
    finally:
        patch.undo()
    run = tmp_path / "full_sft"
    record = record_of(run)
    assert (record["status"], record["step"]) == ("diverged", step)
    assert record["reason"].startswith(reason) and f"step {step};" in record["reason"]
    assert record["reason"].endswith("a lower --learning_rate or more --warmup_ratio")
    assert f"diverged at step {step}" in capfd.readouterr().out
    assert json.loads((run / "resume/progress.json").read_text())["step"] == 4
    assert not (run / "model.safetensors").exists()
    assert all(math.isfinite(row.get("eval_loss", 0)) for row in rows_of(run))
    if not flags:
        assert finish(place, tmp_path) == []


def run_out() -> None:
    torch.empty(10**15)


def raise_error(error: BaseException) -> Callable[[], None]:
    def act() -> None:
        raise error

    return act


@pytest.mark.parametrize(
    "act", [run_out, raise_error(MemoryError()), raise_error(torch.OutOfMemoryError("CUDA"))]
)
def test_out_of_memory(
    place: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str], act: Callable[[], None]
) -> None:
    with at_step(4, act):
        error = error_of(capfd, place, flags_in(place, tmp_path))
    assert "out of memory at step 4: free some, or start anew with --overwrite and " in error
    assert error.endswith("the state of step 2 is kept: continue from it with --from_resume")
    record = record_of(tmp_path / "full_sft")
    assert (record["status"], record["step"]) == ("oom", 3)


@pytest.mark.parametrize(
    ("error", "code", "line"),
    [
        (MemoryError(), 2, f"error: {OUT_OF_MEMORY}"),
        (torch.OutOfMemoryError("CUDA"), 2, f"error: {OUT_OF_MEMORY}"),
        (KeyboardInterrupt(), 130, "interrupted"),
    ],
)
def test_end_before_the_run_begins(
    capfd: pytest.CaptureFixture[str], error: BaseException, code: int, line: str
) -> None:
    with pytest.raises(SystemExit) as caught:
        run_script(raise_error(error))
    assert (caught.value.code, capfd.readouterr().err) == (code, line + "\n")


# ---------------------------------------------------------------- other runs under the same name


@pytest.mark.parametrize(
    ("flags", "reason"),
    [
        ("--eval_data_path {place}/sft.jsonl", "--eval_data_path was ['valid.jsonl'] and is"),
        ("--batch_size 4 --accumulation_steps 2", "--accumulation_steps was 1 and is 2 now"),
        ("--max_steps 12", "--max_steps was 10 and is 12 now"),
        ("--dtype bfloat16", "--dtype was float32 and is bfloat16 now"),
        ("--seed 43", "--seed was 42 and is 43 now"),
        ("--trainable norms", "--trainable was all and is norms now"),
    ],
)
def test_continuing_as_another_run_is_refused(
    place: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str], flags: str, reason: str
) -> None:
    with at_step(1, terminate):
        assert call("full_sft", flags_in(place, tmp_path), place) == 130
    before = hashes(tmp_path)
    flags = f"{flags_in(place, tmp_path)} {flags.format(place=place)} --from_resume"
    assert f"--from_resume: {reason}" in error_of(capfd, place, flags)
    assert hashes(tmp_path) == before


def test_a_file_may_be_named_by_another_path(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    paths = {"data_path": [tmp_path / "exp/x.jsonl"], "tokenizer_path": tmp_path / "exp/tokenizer"}
    args = argparse.Namespace(**paths, eval_data_path=None, from_weight="none")
    (tmp_path / "exp").mkdir()
    monkeypatch.chdir(tmp_path / "exp")
    record = {"settings": printable_settings(args)}
    assert record["settings"]["data_path"] == ["x.jsonl"]
    monkeypatch.chdir(tmp_path)
    assert printable_settings(args)["data_path"] == ["exp/x.jsonl"]
    check_same_run(record, args)
    args.data_path = [tmp_path / "exp/y.jsonl"]
    with pytest.raises(SettingsError, match="--data_path was .*x.jsonl.* and is .*y.jsonl"):
        check_same_run(record, args)


def test_no_memory_when_a_run_is_continued_forgets_no_step(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with at_step(3, terminate):
        assert call("full_sft", flags_in(place, tmp_path), place) == 130
    before = record_of(tmp_path / "full_sft")

    def no_room(job: object) -> None:
        raise torch.OutOfMemoryError("no room for the model")

    with monkeypatch.context() as patch:
        patch.setattr(trainer_utils, "prepare", no_room)
        with pytest.raises(SettingsError, match="out of memory"):
            call("full_sft", flags_in(place, tmp_path) + " --from_resume", place)
    record = record_of(tmp_path / "full_sft")
    assert record["status"] == "oom"
    assert [record[name] for name in ("step", "tokens")] == [3, before["tokens"]]
    assert finish(place, tmp_path) == []


def test_continuing_a_run_of_older_code_is_refused(
    place: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    with at_step(1, terminate):
        assert call("full_sft", flags_in(place, tmp_path), place) == 130
    file = tmp_path / "full_sft/run.json"
    record = json.loads(file.read_text())
    del record["settings"]["grad_clip"]
    file.write_text(json.dumps(record))
    message = error_of(capfd, place, f"{flags_in(place, tmp_path)} --from_resume")
    assert "--from_resume: this run was begun by code that had no --grad_clip" in message


@pytest.mark.parametrize(
    ("changed", "reason"),
    [
        ("sft.jsonl", "train_data.files[0].sha256 was"),
        ("valid.jsonl", "eval_data.files[0].sha256 was"),
    ],
)
def test_other_data_under_the_same_name_is_refused(
    place: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str], changed: str, reason: str
) -> None:
    own = tmp_path / "own"
    shutil.copytree(place, own, ignore=shutil.ignore_patterns("cache", "whole"))
    with at_step(1, terminate):
        assert call("full_sft", flags_in(own, tmp_path), place) == 130
    (own / changed).write_text((own / changed).read_text().replace("0 1", "0 2", 1))
    before = hashes(tmp_path / "full_sft")
    error = error_of(capfd, place, flags_in(own, tmp_path) + " --from_resume")
    assert f"--from_resume: {reason}" in error and "restore what changed" in error
    assert hashes(tmp_path / "full_sft") == before


def test_compiling_changes_what_is_computed(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`--use_compile auto` decides by the machine's compiler too."""
    with at_step(1, terminate):
        assert call("full_sft", flags_in(place, tmp_path), place) == 130
    monkeypatch.setattr(trainer_utils, "compile_blocks", lambda *_: True)
    with pytest.raises(SettingsError, match="compiled was False and is True now"):
        call("full_sft", flags_in(place, tmp_path) + " --from_resume", place)


def test_differences_name_the_place() -> None:
    before = {"a": [1, {"b": 2}], "c": None, "d": 1}
    now = {"a": [1, {"b": 3}], "c": {"e": 0}, "d": 1}
    assert list(differences("x", before, now)) == [
        "x.a[1].b was 2 and is 3 now",
        "x.c was None and is {'e': 0} now",
    ]
    assert list(differences("x", [1], [1, 2])) == ["x was [1] and is [1, 2] now"]
    assert list(differences("x", now, now)) == []


# ---------------------------------------------------------------- random kills


def test_a_few_random_kills(tmp_path: Path) -> None:
    command = [sys.executable, "tests/stress_resume.py", "--case", "lora, bfloat16, dropout"]
    command += ["--kills", "2", "--memory_steps", "0", "--output", str(tmp_path / "summary.json")]
    done = subprocess.run(command, cwd=REPO_DIR, env=ONE_THREAD, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert (summary["kills"], summary["survived"]) == (2, 2)
    assert sum(summary["cases"][0]["phases"].values()) == 2
