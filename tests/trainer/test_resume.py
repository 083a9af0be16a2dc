"""What stops a run, and how it goes on: kills, signals, full disks, damage, no memory, no numbers.

`stress_resume.py` kills whole processes at random moments; here each moment is chosen.
"""

import math
import os
import resource
import shutil
import signal
import time
import zipfile
from pathlib import Path

import pytest
import torch
from pytest import CaptureFixture, MonkeyPatch

from model.checkpoint import TOKENIZER_DIR, load_model, save_model
from model.files import file_sha256
from tests import DEVICE
from tests.trainer import stress_resume
from tests.trainer.runs import (
    ON_DEVICE,
    SHAPE_FLAGS,
    WEIGHTS,
    Action,
    Killed,
    at_step,
    bytes_of,
    call,
    do_nothing,
    exit_code,
    kill,
    record_of,
    rows_of,
    start,
    terminate,
)
from tests.trainer.stress_resume import compare_runs
from trainer import run_folder, train_full_sft

STEPS = 10


def flags_in(home: Path, out: Path) -> str:
    """Ten steps, with a state and a validation after every second one."""
    return (
        f"{ON_DEVICE} --from_weight {home}/pretrain --data_path {home}/sft.jsonl --save_dir {out} "
        f"--eval_data_path {home}/valid.jsonl --batch_size 8 --max_steps {STEPS} "
        "--eval_interval 2 --save_interval 2"
    )


@pytest.fixture(scope="module")
def whole(home: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of 10 steps left in peace."""
    out = tmp_path_factory.mktemp("whole")
    assert call("full_sft", flags_in(home, out), home) == 0
    return out / "full_sft"


def finish(home: Path, out: Path, whole: Path) -> list[str]:
    """Continue a run to its end; return what then differs from one left in peace."""
    assert call("full_sft", flags_in(home, out) + " --from_resume", home) == 0
    return list(compare_runs(whole, out / "full_sft"))


def hashes(folder: Path) -> dict[Path, str]:
    return {path: file_sha256(path) for path in folder.rglob("*") if path.is_file()}


def saved_step(run: Path) -> int:
    return torch.load(run / "resume.pt", weights_only=True)["record"]["step"]


def error_of(capfd: CaptureFixture, home: Path, flags: str, on_step: Action = do_nothing) -> str:
    """Return the line that a run refused with exit code 2 writes to standard error."""
    capfd.readouterr()
    assert exit_code(lambda words: call("full_sft", " ".join(words), home, on_step), [flags]) == 2
    lines = capfd.readouterr().err.splitlines()
    assert len(lines) == 1 and lines[0].startswith("error: "), lines
    return lines[0]


def test_comparison_finds_another_run(home: Path, whole: Path, tmp_path: Path) -> None:
    """Another order of the data changes all that a run leaves; else no test here could fail."""
    assert call("full_sft", flags_in(home, tmp_path) + " --seed 43", home) == 0
    found = {line.partition(":")[0] for line in compare_runs(whole, tmp_path / "full_sft")}
    assert found == {"model.safetensors", "metrics.jsonl", "run.json", "resume.pt"}


RESUMED = [
    (
        "pretrain",
        f"{SHAPE_FLAGS} --from_weight none --data_path {{home}}/text.jsonl --max_seq_len 64 "
        "--eval_data_path {home}/text.jsonl --batch_size 4 --accumulation_steps 2",
        "float32",
    ),
    ("full_sft", "--accumulation_steps 2 --batch_size 4 --keep_checkpoints 3", "bfloat16"),
    (
        "lora",
        "--lora_dropout 0.2 --loraplus_lr_ratio 4 --train_tokens <|im_end|> "
        "--modules_to_save norms --modules_to_save_lr_ratio 0.5",
        "bfloat16",
    ),
]
RESUMED.append(("lora", "--use_dora --lora_dropout 0.2 --weight_decay 0.1", "float32"))
if DEVICE == "cuda":  # float16 trains there alone
    RESUMED.append(("full_sft", "", "float16"))


@pytest.mark.gpu
@pytest.mark.parametrize(("stage", "extra", "dtype"), RESUMED)
def test_resumed_run_equals_an_uninterrupted_one(
    home: Path, tmp_path: Path, stage: str, extra: str, dtype: str
) -> None:
    flags = f"{flags_in(home, tmp_path / 'whole')} {extra.format(home=home)} --dtype {dtype}"
    flags += " --warmup_ratio 0.2 --log_interval 3 --save_interval 4"
    assert call(stage, flags, home) == 0
    whole = tmp_path / "whole" / stage
    for way in ("stopped", "killed"):
        given, parts = flags.replace("whole", way), tmp_path / way / stage
        if way == "stopped":
            assert call(stage, given, home, at_step(5, terminate)) == 130
            assert (record_of(parts)["status"], record_of(parts)["step"]) == ("interrupted", 5)
        else:
            # Dies in step 7, after the state of step 4 and the log line of step 6; and, as if it
            # had come further, with rows that the state does not know, the last one cut short.
            with pytest.raises(Killed):
                call(stage, given, home, at_step(7, kill))
            with (parts / "metrics.jsonl").open("a") as file:
                file.write('{"step": 8, "loss": 1.0}\n{"step": 9, "lo')
            assert saved_step(parts) == 4
        assert call(stage, given + " --from_resume", home) == 0
        assert bytes_of(whole / WEIGHTS[stage]) == bytes_of(parts / WEIGHTS[stage])
        assert list(compare_runs(whole, parts)) == []
        step = 5 if way == "stopped" else 4
        assert [entry["step"] for entry in record_of(parts)["resumed"]] == [step]
    before = hashes(parts)  # a complete run has nothing to do, and does nothing
    with pytest.raises(SystemExit, match="0"):
        call(stage, given + " --from_resume", home)
    assert hashes(parts) == before


@pytest.mark.parametrize("operation", ["save", "fsync", "replace"])
def test_kill_at_any_operation_of_a_save(
    home: Path, whole: Path, tmp_path: Path, monkeypatch: MonkeyPatch, operation: str
) -> None:
    """Of the third save: writing aside, flushing, moving into place."""
    saves, save_state = [], run_folder.RunFolder.save_state

    def die(*args: object) -> None:
        if operation == "save":  # half of it is written
            Path(args[1]).write_bytes(b"PK\x03\x04half")
        raise Killed

    def watch(run: run_folder.RunFolder, state: dict) -> None:
        saves.append(1)
        if len(saves) == 3:
            monkeypatch.setattr(torch if operation == "save" else os, operation, die)
            monkeypatch.setattr(Path, "unlink", lambda *_, **__: None)  # a kill does not clean up
        save_state(run, state)

    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(run_folder.RunFolder, "save_state", watch)
        call("full_sft", flags_in(home, tmp_path), home)
    monkeypatch.undo()
    assert saved_step(tmp_path / "full_sft") == 4
    assert finish(home, tmp_path, whole) == []


@pytest.mark.parametrize("damage", ["cut", "one bit"])
def test_damaged_state_is_refused(
    home: Path, tmp_path: Path, capfd: CaptureFixture, damage: str
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


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_signal_to_the_whole_group_saves_the_state(
    home: Path, tmp_path: Path, capfd: CaptureFixture, number: int
) -> None:
    """A terminal's Ctrl-C and a batch system's SIGTERM reach the data processes too."""
    flags, log = flags_in(home, tmp_path), tmp_path / "log"
    endless = flags.replace(f"--max_steps {STEPS}", "--max_steps 100000 --num_workers 1")
    [process] = start("full_sft", endless, 1, home, log)
    try:
        until = time.monotonic() + 300  # the server imports the libraries first
        while not (log.exists() and "step 3/" in log.read_text()):
            assert process.is_alive() and time.monotonic() < until
            time.sleep(0.05)
        # Another process of the same name is refused as long as this one lives.
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(run_folder, "LOCK_SECONDS", 0)
            error = error_of(capfd, home, flags + " --overwrite")
        assert "another process trains this run now" in error
        os.killpg(process.pid, number)
        process.join(60)
    finally:
        process.kill()
    text, record = log.read_text(), record_of(tmp_path / "full_sft")
    assert process.exitcode == 130, text
    assert "stopping: the state is saved first" in text and "Traceback" not in text
    assert record["status"] == "interrupted" and record["step"] >= 3
    assert text.splitlines()[-1].endswith(f"at step {record['step']}, --from_resume continues")
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


def test_signals_are_pythons_own_after_training(home: Path, tmp_path: Path) -> None:
    """The next Ctrl-C in a notebook, or while held-out answers are printed, stops at once."""
    # A shell that starts the tests in the background lets them ignore SIGINT.
    handler = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        assert call("full_sft", flags_in(home, tmp_path) + " --max_steps 1", home) == 0
        assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)
    finally:
        signal.signal(signal.SIGINT, handler)


def test_state_that_does_not_fit_leaves_the_previous_one(
    home: Path, whole: Path, tmp_path: Path, capfd: CaptureFixture
) -> None:
    """No file may grow beyond 100,000 bytes, as on a full disk."""
    run, kept, limits = tmp_path / "full_sft", {}, resource.getrlimit(resource.RLIMIT_FSIZE)

    def fill() -> None:
        kept["state"] = file_sha256(run / "resume.pt")
        resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, limits[1]))

    try:
        error = error_of(capfd, home, flags_in(home, tmp_path), at_step(6, fill))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert f"{run}/resume.pt: not written" in error
    assert file_sha256(run / "resume.pt") == kept["state"] and not (run / "resume.pt.tmp").exists()
    record = record_of(run)
    assert (record["status"], record["step"]) == ("failed", 6)
    assert finish(home, tmp_path, whole) == []


@pytest.mark.parametrize(
    ("step", "flags", "reason"),
    [
        (5, "", "loss nan, gradient norm nan in step 6"),
        (6, "", "validation loss nan after step 6"),
        (6, " --eval_interval 5", "weights are not finite after step 6"),
        (5, " --log_interval 10", "loss nan, gradient norm nan in step 6"),  # before it is saved
    ],
)
def test_what_is_not_finite_is_never_saved(
    home: Path, tmp_path: Path, monkeypatch: MonkeyPatch, step: int, flags: str, reason: str
) -> None:
    models, run, select = [], tmp_path / "full_sft", train_full_sft.select_trainable
    watch = lambda model, parts: (models.append(model), select(model, parts))  # noqa: E731
    monkeypatch.setattr(train_full_sft, "select_trainable", watch)

    def break_weights() -> None:
        models[0].model.norm.weight.data[3] = math.inf

    flags = flags_in(home, tmp_path) + flags
    assert call("full_sft", flags, home, at_step(step, break_weights)) == 3
    record = record_of(run)
    assert (record["status"], record["step"]) == ("diverged", 6)
    assert record["reason"].startswith(reason) and "lower --learning_rate" in record["reason"]
    assert saved_step(run) == 4
    assert not (run / "model.safetensors").exists()
    assert all(math.isfinite(row.get("eval_loss", 0)) for row in rows_of(run))


def test_out_of_memory(home: Path, whole: Path, tmp_path: Path, capfd: CaptureFixture) -> None:
    act = at_step(4, lambda: torch.empty(10**15))
    assert "out of memory in step 4: halve" in error_of(capfd, home, flags_in(home, tmp_path), act)
    record = record_of(tmp_path / "full_sft")
    assert (record["status"], record["step"]) == ("oom", 3)
    assert finish(home, tmp_path, whole) == []


ANOTHER_RUN = {  # flags of the continuation -> the error's words
    "--batch_size 4 --accumulation_steps 2": "--accumulation_steps was 1 and is 2 now",
    "--keep_checkpoints 2": "--keep_checkpoints was 0 and is 2 now",
    "--learning_rate 1e-4": "--learning_rate was 0.0005 and is 0.0001 now",
    "--seed 43": "--seed was 42 and is 43 now",
    "--data_path {own}/sft.jsonl": "train_data.sha256 was ['",
    "--from_weight {own}/pretrain": "base_fingerprint was ",
}


def test_continuing_as_another_run_is_refused(
    home: Path, tmp_path: Path, capfd: CaptureFixture
) -> None:
    """Of data and base their content counts, not how their paths are spelled."""
    out, own = tmp_path / "out", tmp_path / "own"
    assert call("full_sft", flags_in(home, out), home, at_step(1, terminate)) == 130
    own.mkdir()
    lines = (home / "sft.jsonl").read_text().splitlines(keepends=True)
    (own / "sft.jsonl").write_text("".join(reversed(lines)))
    model = load_model(home / "pretrain")
    model.model.norm.weight.data[0] += 1
    save_model(model, TOKENIZER_DIR, own / "pretrain")
    before = hashes(out)
    for flags, reason in ANOTHER_RUN.items():
        given = f"{flags_in(home, out)} {flags.format(own=own)} --from_resume"
        error = error_of(capfd, home, given)
        assert f"--from_resume: {reason}" in error and "start another run" in error
    assert hashes(out) == before
    copy = shutil.copytree(home, tmp_path / "copy", ignore=shutil.ignore_patterns("cache"))
    renamed = (copy / "sft.jsonl").rename(copy / "renamed.jsonl")
    given = f"{flags_in(copy, out)} --data_path {renamed} --from_resume"
    assert call("full_sft", given, home) == 0
    assert record_of(out / "full_sft")["train_data"]["files"][0]["name"] == "renamed.jsonl"


@pytest.mark.gpu
def test_a_few_random_kills() -> None:
    assert stress_resume.main(["--kills", "2", "--case", "full_sft, float32, data processes"]) == 0
