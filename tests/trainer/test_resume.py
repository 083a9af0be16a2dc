"""What stops a run, and how it goes on: kills, signals, full disks, damage, no memory, no numbers.

`stress_resume.py` kills whole processes at random moments; here each moment is chosen.
"""

import contextlib
import math
import os
import resource
import signal
import subprocess
import sys
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

from model.checkpoint import TOKENIZER_DIR, load_model, save_model
from model.files import REPO_DIR, UserError, run_script
from tests.trainer.runs import (
    CPU,
    ONE_THREAD,
    WEIGHTS,
    Killed,
    at_step,
    bytes_of,
    call,
    kill,
    record_of,
    rows_of,
    sha256,
    terminate,
)
from tests.trainer.stress_resume import compare_runs
from trainer import run_folder, train_full_sft, trainer_utils
from trainer.trainer_utils import stop_on_signals

STEPS = 10


def flags_in(home: Path, out: Path) -> str:
    """Ten steps, with a state and a validation after every second one."""
    return (
        f"{CPU} --from_weight {home}/pretrain --data_path {home}/sft.jsonl --save_dir {out} "
        f"--eval_data_path {home}/valid.jsonl --batch_size 8 --max_steps {STEPS} "
        "--eval_interval 2 --save_interval 2"
    )


@pytest.fixture(scope="module")
def whole(base: Path, home: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of 10 steps left in peace."""
    out = tmp_path_factory.mktemp("whole")
    assert call("full_sft", flags_in(home, out), home) == 0
    return out / "full_sft"


def finish(home: Path, out: Path, whole: Path) -> list[str]:
    """Continue a run to its end; return what then differs from one left in peace."""
    assert call("full_sft", flags_in(home, out) + " --from_resume", home) == 0
    return list(compare_runs(whole, out / "full_sft"))


def hashes(folder: Path) -> dict[Path, str]:
    return {path: sha256(path) for path in folder.rglob("*") if path.is_file()}


def saved_step(run: Path) -> int:
    return torch.load(run / "resume.pt", weights_only=True)["progress"]["step"]


def error_of(
    capfd: pytest.CaptureFixture[str],
    home: Path,
    flags: str,
    on_step: Callable[[int], None] = lambda step: None,
) -> str:
    """Return the line that a run refused with exit code 2 writes to standard error."""
    capfd.readouterr()
    with pytest.raises(SystemExit) as caught:
        run_script(lambda: call("full_sft", flags, home, on_step))
    lines = capfd.readouterr().err.splitlines()
    assert caught.value.code == 2
    assert len(lines) == 1 and lines[0].startswith("error: "), lines
    return lines[0]


def test_runs_that_differ_are_told_apart(home: Path, whole: Path, tmp_path: Path) -> None:
    """Another order of the data changes all that a run leaves; else no test here could fail."""
    assert call("full_sft", flags_in(home, tmp_path) + " --seed 43", home) == 0
    found = {line.partition(":")[0] for line in compare_runs(whole, tmp_path / "full_sft")}
    assert found == {"model.safetensors", "metrics.jsonl", "run.json", "resume.pt"}


# ---------------------------------------------------------------- kills


RESUMED = [
    ("full_sft", "--accumulation_steps 2 --batch_size 2 --weight_decay 0.1", "float32"),
    ("full_sft", "--accumulation_steps 2 --batch_size 4 --keep_checkpoints 3", "bfloat16"),
    ("lora", "--lora_dropout 0.2 --loraplus_lr_ratio 4", "float32"),
    (
        "lora",
        "--lora_dropout 0.2 --loraplus_lr_ratio 4 --train_tokens <|im_end|> "
        "--modules_to_save norms --modules_to_save_lr_ratio 0.5",
        "bfloat16",
    ),
]


@pytest.mark.parametrize(("stage", "extra", "dtype"), RESUMED)
@pytest.mark.parametrize("way", ["SIGTERM", "kill"])
def test_resumed_run_equals_an_uninterrupted_one(
    base: Path, home: Path, tmp_path: Path, stage: str, extra: str, dtype: str, way: str
) -> None:
    flags = f"{flags_in(home, tmp_path / 'whole')} {extra} --dtype {dtype} --warmup_ratio 0.2"
    flags += " --log_interval 3 --save_interval 4"
    assert call(stage, flags, home) == 0
    flags = flags.replace("whole", "parts")
    whole, parts = tmp_path / "whole" / stage, tmp_path / "parts" / stage
    if way == "SIGTERM":
        assert call(stage, flags, home, at_step(5, terminate)) == 130
        assert (record_of(parts)["status"], record_of(parts)["step"]) == ("interrupted", 5)
    else:
        # Dies in step 7, after the state of step 4 and the log line of step 6; and, as if it had
        # come further, with rows that the state knows nothing of, the last one cut short.
        with pytest.raises(Killed):
            call(stage, flags, home, at_step(7, kill))
        with (parts / "metrics.jsonl").open("a") as file:
            file.write('{"step": 8, "loss": 1.0}\n{"step": 9, "lo')
        assert saved_step(parts) == 4
    assert call(stage, flags + " --from_resume", home) == 0
    assert bytes_of(whole / WEIGHTS[stage]) == bytes_of(parts / WEIGHTS[stage])
    assert list(compare_runs(whole, parts)) == []
    # Once more has nothing to do, and does nothing.
    before = hashes(parts)
    assert call(stage, flags + " --from_resume", home) == 0
    assert hashes(parts) == before


@pytest.mark.parametrize("operation", range(3))
def test_kill_at_any_operation_of_a_save(
    home: Path, whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, operation: int
) -> None:
    """Of the third save: writing aside, flushing, moving into place."""
    saves, steps = [], []
    save_state = run_folder.RunFolder.save_state

    def watch(run: run_folder.RunFolder, state: dict) -> None:
        saves.append(1)
        save_state(run, state)
        assert len(saves) < 3, "there are fewer operations than the test counts"

    def counted(act: Callable) -> Callable:
        def perform(*args: object, **kwargs: object) -> object:
            if len(saves) == 3:
                if len(steps) == operation:
                    if act is save:  # half of it is written
                        Path(args[1]).write_bytes(b"PK\x03\x04half")
                    raise Killed
                steps.append(1)
            return act(*args, **kwargs)

        return perform

    save = torch.save
    with monkeypatch.context() as patch:
        patch.setattr(run_folder.RunFolder, "save_state", watch)
        patch.setattr(torch, "save", counted(save))
        patch.setattr(os, "fsync", counted(os.fsync))
        patch.setattr(os, "replace", counted(os.replace))
        patch.setattr(Path, "unlink", lambda *_, **__: None)  # a killed process does not clean up
        with pytest.raises(Killed):
            call("full_sft", flags_in(home, tmp_path), home)
    assert saved_step(tmp_path / "full_sft") == 4
    assert finish(home, tmp_path, whole) == []


def test_kill_before_the_first_state_and_before_the_last_weights(
    home: Path, whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    flags = flags_in(home, tmp_path)
    with pytest.raises(Killed):
        call("full_sft", flags, home, at_step(2, kill))
    with pytest.raises(UserError, match="resume.pt is not there; use --overwrite"):
        call("full_sft", flags + " --from_resume", home)
    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(train_full_sft, "save_model", lambda *_: kill())
        call("full_sft", flags + " --overwrite", home)
    assert finish(home, tmp_path, whole) == []
    assert record_of(tmp_path / "full_sft")["status"] == "completed"


def test_record_keeps_its_origin_and_names_continuations(
    home: Path, whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert call("full_sft", flags_in(home, tmp_path), home, at_step(5, terminate)) == 130
    before = record_of(tmp_path / "full_sft")
    monkeypatch.setattr(run_folder, "git_state", lambda: {"commit": "f00", "dirty": False})
    assert finish(home, tmp_path, whole) == []
    record = record_of(tmp_path / "full_sft")
    assert (record["git"], record["machine"]) == (before["git"], before["machine"])
    assert [(entry["step"], entry["git"]["commit"]) for entry in record["resumed"]] == [(5, "f00")]


@pytest.mark.parametrize("damage", ["cut", "one bit"])
def test_damaged_state_is_refused(
    home: Path, whole: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str], damage: str
) -> None:
    assert call("full_sft", flags_in(home, tmp_path), home, at_step(5, terminate)) == 130
    path = tmp_path / "full_sft/resume.pt"
    content = bytearray(path.read_bytes())
    with zipfile.ZipFile(path) as file:
        largest = max(file.infolist(), key=lambda entry: entry.file_size)
    content[largest.header_offset + 5000] ^= 1  # in a tensor
    path.write_bytes(content if damage == "one bit" else content[: len(content) // 2])
    before = hashes(tmp_path)
    error = error_of(capfd, home, flags_in(home, tmp_path) + " --from_resume")
    assert f"{path}: damaged; restore it from a copy or use --overwrite" in error
    assert hashes(tmp_path) == before


# ---------------------------------------------------------------- signals and other processes


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_signal_to_the_whole_group_saves_the_state(
    home: Path, whole: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str], number: int
) -> None:
    """A terminal's Ctrl-C and a batch system's SIGTERM reach the data processes too."""
    command = [
        sys.executable,
        "-c",
        "from tests.trainer import runs; import sys; from pathlib import",
    ]
    command[-1] += (
        " Path; sys.exit(runs.call('full_sft', ' '.join(sys.argv[2:]), Path(sys.argv[1])))"
    )
    flags = flags_in(home, tmp_path).split() + ["--num_workers", "1"]
    flags[flags.index(str(STEPS))] = "100000"
    with subprocess.Popen(
        [*command, str(home), *flags],
        cwd=REPO_DIR,
        env=ONE_THREAD,
        start_new_session=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    ) as process:
        for line in process.stdout:
            if line.startswith("step 3/"):
                # Another process of the same name is refused as long as this one lives.
                with pytest.MonkeyPatch.context() as patch:
                    patch.setattr(run_folder, "LOCK_SECONDS", 0)
                    error = error_of(capfd, home, flags_in(home, tmp_path) + " --overwrite")
                assert "another process trains this run now" in error
                os.killpg(process.pid, number)
                break
        out, errors = process.communicate(timeout=60)
    assert process.returncode == 130, errors
    assert "stopping: the state is saved first" in errors and "Traceback" not in errors
    record = record_of(tmp_path / "full_sft")
    assert record["status"] == "interrupted" and record["step"] >= 3
    assert f"the state of step {record['step']} is kept: --from_resume" in out.splitlines()[-1]
    assert saved_step(tmp_path / "full_sft") == record["step"]


def test_second_interrupt_stops_at_once(home: Path, whole: Path, tmp_path: Path) -> None:
    def interrupt_twice() -> None:
        for _ in range(2):
            os.kill(os.getpid(), signal.SIGINT)

    assert call("full_sft", flags_in(home, tmp_path), home, at_step(4, interrupt_twice)) == 130
    record = record_of(tmp_path / "full_sft")
    assert (record["status"], record["step"], record["reason"]) == ("interrupted", 3, "at once")
    assert saved_step(tmp_path / "full_sft") == 2
    assert finish(home, tmp_path, whole) == []
    handler = signal.getsignal(signal.SIGINT)
    try:  # torchrun passes on what the terminal has sent already
        received = stop_on_signals(processes=2)
        interrupt_twice()
        assert received == [signal.SIGINT] * 2
    finally:
        signal.signal(signal.SIGINT, handler)
        signal.signal(signal.SIGTERM, signal.SIG_DFL)


def test_folder_made_in_the_meantime_is_not_overwritten(
    home: Path, whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another run took the name while this one read its data."""
    load_data = train_full_sft.load_data

    def load_slowly(*args: object) -> object:
        (tmp_path / "full_sft").mkdir()
        return load_data(*args)

    monkeypatch.setattr(train_full_sft, "load_data", load_slowly)
    with pytest.raises(FileExistsError):
        call("full_sft", flags_in(home, tmp_path), home)


# ---------------------------------------------------------------- disks, numbers, memory


@contextlib.contextmanager
def file_size_limit(size: int) -> Iterator[None]:
    """Let no file of this process grow beyond `size` bytes, as on a full disk."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)


def test_state_that_does_not_fit_leaves_the_previous_one(
    home: Path, whole: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    run, kept = tmp_path / "full_sft", {}
    with contextlib.ExitStack() as stack:

        def fill() -> None:
            kept["state"] = sha256(run / "resume.pt")
            stack.enter_context(file_size_limit(100_000))

        error = error_of(capfd, home, flags_in(home, tmp_path), at_step(6, fill))
    assert f"{run}/resume.pt: not written" in error
    assert sha256(run / "resume.pt") == kept["state"] and not (run / "resume.tmp").exists()
    record = record_of(run)
    assert (record["status"], record["step"]) == ("failed", 6)
    assert finish(home, tmp_path, whole) == []


def test_weights_that_do_not_fit_are_not_left_in_part(
    home: Path, whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = tmp_path / "full_sft"

    def save(*args: object) -> None:
        with file_size_limit(100_000):
            save_model(*args)

    with monkeypatch.context() as patch, pytest.raises(OSError):
        patch.setattr(train_full_sft, "save_model", save)
        call("full_sft", flags_in(home, tmp_path), home)
    assert not (run / "model.safetensors").exists()
    assert record_of(run)["status"] == "failed"
    (run / "model.safetensors.tmp").unlink(missing_ok=True)
    assert finish(home, tmp_path, whole) == []


@pytest.mark.parametrize(
    ("step", "flags", "reason"),
    [
        (5, "", "loss nan, gradient norm nan in step 6"),
        (6, "", "validation loss nan after step 6"),
        (6, " --eval_interval 5", "model.norm.weight is not finite after step 6"),
        (5, " --log_interval 10", "loss nan, gradient norm nan in step 6"),  # before it is saved
    ],
)
def test_what_is_not_finite_is_never_saved(
    home: Path,
    whole: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    step: int,
    flags: str,
    reason: str,
) -> None:
    models = []
    select = train_full_sft.select_trainable
    monkeypatch.setattr(
        train_full_sft, "select_trainable", lambda m, *a: (models.append(m), select(m, *a))
    )

    def break_weights() -> None:
        with torch.no_grad():
            models[0].model.norm.weight[3] = math.inf

    flags = flags_in(home, tmp_path) + flags
    assert call("full_sft", flags, home, at_step(step, break_weights)) == 3
    run = tmp_path / "full_sft"
    record = record_of(run)
    assert (record["status"], record["step"]) == ("diverged", 6)
    assert record["reason"].startswith(reason) and "lower --learning_rate" in record["reason"]
    assert saved_step(run) == 4
    assert not (run / "model.safetensors").exists()
    assert all(math.isfinite(row.get("eval_loss", 0)) for row in rows_of(run))


def raise_error(error: BaseException) -> Callable[[], None]:
    def act() -> None:
        raise error

    return act


@pytest.mark.parametrize(
    "act",
    [
        lambda: torch.empty(10**15),
        raise_error(MemoryError()),
        raise_error(torch.OutOfMemoryError()),
    ],
)
def test_out_of_memory(
    home: Path,
    whole: Path,
    tmp_path: Path,
    capfd: pytest.CaptureFixture[str],
    act: Callable[[], None],
) -> None:
    error = error_of(capfd, home, flags_in(home, tmp_path), at_step(4, act))
    assert "out of memory in step 4: halve --batch_size" in error
    record = record_of(tmp_path / "full_sft")
    assert (record["status"], record["step"]) == ("oom", 3)
    assert finish(home, tmp_path, whole) == []


# ---------------------------------------------------------------- other runs under the same name


@pytest.mark.parametrize(
    ("flags", "reason"),
    [
        ("--batch_size 4 --accumulation_steps 2", "--accumulation_steps was 1 and is 2 now"),
        ("--max_steps 12", "--max_steps was 10 and is 12 now"),
        ("--dtype bfloat16", "--dtype was float32 and is bfloat16 now"),
        ("--trainable norms", "--trainable was all and is norms now"),
        ("--keep_checkpoints 2", "--keep_checkpoints was 0 and is 2 now"),
        ("--eval_data_path {home}/sft.jsonl", "eval_data was {{"),
        ("--data_path {own}/sft.jsonl", "train_data was {{"),
        ("--from_weight {own}/pretrain", "base_fingerprint was "),
    ],
)
def test_continuing_as_another_run_is_refused(
    base: Path,
    home: Path,
    tmp_path: Path,
    capfd: pytest.CaptureFixture[str],
    flags: str,
    reason: str,
) -> None:
    """Of data and base their content counts, not how their paths are spelled."""
    out, own = tmp_path / "out", tmp_path / "own"
    assert call("full_sft", flags_in(home, out), home, at_step(1, terminate)) == 130
    own.mkdir()
    lines = (home / "sft.jsonl").read_text().splitlines(keepends=True)
    (own / "sft.jsonl").write_text("".join(reversed(lines)))
    model = load_model(base)
    with torch.no_grad():
        model.model.norm.weight[0] += 1
    save_model(model, TOKENIZER_DIR, own / "pretrain")
    before = hashes(out)
    flags = f"{flags_in(home, out)} {flags.format(home=home, own=own)} --from_resume"
    error = error_of(capfd, home, flags)
    assert f"--from_resume: {reason.format()}" in error and "start another run" in error
    assert hashes(out) == before


def test_compiling_changes_what_is_computed(
    home: Path, whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`--use_compile auto` decides by the machine's compiler too."""
    assert call("full_sft", flags_in(home, tmp_path), home, at_step(1, terminate)) == 130
    monkeypatch.setattr(trainer_utils, "compile_blocks", lambda *_: True)
    with pytest.raises(UserError, match="compiled was False and is True now"):
        call("full_sft", flags_in(home, tmp_path) + " --from_resume", home)


def test_code_is_dirty_when_it_was_changed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Results beside the code do not make it another."""
    git = ["git", "-C", str(tmp_path), "-c", "user.name=a", "-c", "user.email=a@b"]
    monkeypatch.setattr(run_folder, "REPO_DIR", tmp_path)
    assert run_folder.git_state() == {}
    (tmp_path / "loop.py").write_text("a = 1\n")
    for words in (["init"], ["add", "."], ["commit", "-m", "first"]):
        subprocess.run([*git, *words], check=True, capture_output=True)
    (tmp_path / "run.json").write_text("{}")
    assert run_folder.git_state()["dirty"] is False
    (tmp_path / "loop.py").write_text("a = 2\n")
    assert run_folder.git_state()["dirty"] is True


# ---------------------------------------------------------------- random kills


def test_a_few_random_kills(tmp_path: Path) -> None:
    command = [sys.executable, "tests/trainer/stress_resume.py", "--kills", "2"]
    command += ["--case", "lora, bfloat16, dropout"]
    done = subprocess.run(command, cwd=REPO_DIR, env=ONE_THREAD, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.splitlines()[-1].startswith("2 of 2 kills")
