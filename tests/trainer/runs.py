"""Small runs of the three training scripts, here and in processes of their own."""

import faulthandler
import functools
import gc
import itertools
import json
import multiprocessing
import os
import signal
import sys
import time
from collections.abc import Callable
from multiprocessing.process import BaseProcess
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch.optim.optimizer import register_optimizer_step_post_hook

from dataset import lm_dataset
from model.cli import run_script
from tests import DEVICE
from trainer import train_full_sft, train_lora, train_pretrain
from trainer.run_folder import RunFolder

STAGES = {"pretrain": train_pretrain, "full_sft": train_full_sft, "lora": train_lora}
WEIGHTS = {"pretrain": "model.safetensors", "full_sft": "model.safetensors"}
WEIGHTS["lora"] = "adapter_model.safetensors"
SHAPE = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "intermediate_size": 48,
}
SHAPE_FLAGS = " ".join(f"--{name} {value}" for name, value in SHAPE.items())
ON_DEVICE = f"--device {DEVICE} --dtype float32 --log_interval 1"
Action = Callable[[int], None]  # after a step
# A server imports the libraries once; each run is a fork of it and inherits no threads.
CONTEXT = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload(["tests.trainer.runs"])


def write_jsonl(path: Path, records: list[dict]) -> Path:
    path.write_text("".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records))
    return path


def write_corpora(home: Path) -> None:
    """Small corpora whose samples differ in length, so that batches are grouped by it."""

    def answers(numbers: range) -> list[dict]:
        return [
            {"instruction": f"Count to {i % 9}.", "output": " ".join(map(str, range(i % 9 + 1)))}
            for i in numbers
        ]

    texts = [{"text": f"The cat saw {i} birds. " * (i % 5 + 1)} for i in range(90)]
    write_jsonl(home / "text.jsonl", texts)
    write_jsonl(home / "sft.jsonl", answers(range(45)))
    write_jsonl(home / "valid.jsonl", answers(range(100, 140)))


def do_nothing(step: int) -> None:
    """Stand for no action after a step."""


def call(
    stage: str, flags: str, home: Path, on_step: Action = do_nothing, keeps_state: bool = True
) -> int:
    """Run a stage's `main()` as a fresh process would, tokens cached in `home`; return its code.

    A completed run keeps its last resume file, to be compared, if it is not told otherwise.
    """
    torch.manual_seed(hash(flags) % 2**32)  # nothing may depend on what ran before
    torch.compiler.reset()
    gc.collect()  # frees the lock of a run that was refused
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    torch.use_deterministic_algorithms(DEVICE == "cuda")  # else 2 runs differ in last bits
    steps = itertools.count(1)
    hook = register_optimizer_step_post_hook(lambda *_: on_step(next(steps)))
    try:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(lm_dataset, "CACHE_DIR", home / "cache")
            if keeps_state:
                patch.setattr(RunFolder, "discard_state", lambda _: None)
            # Answers take longer than the training of so small a model.
            quiet = " --show_answers 0" * (stage != "pretrain" and "show_answers" not in flags)
            return STAGES[stage].main((flags + quiet).split())
    finally:
        hook.remove()
        torch.set_num_threads(threads)
        torch.use_deterministic_algorithms(False)


class Killed(BaseException):
    """Stands for a process that ends without a chance to save."""


def kill() -> None:
    raise Killed


def terminate() -> None:
    os.kill(os.getpid(), signal.SIGTERM)


def act_at(step: int, action: Callable[[], None], now: int) -> None:
    if now == step:
        action()


def at_step(step: int, action: Callable[[], None]) -> Action:
    """Make an `on_step` that acts once, in the step `step` of a call."""
    return functools.partial(act_at, step, action)


def be_process(
    stage: str, flags: str, environment: dict, home: Path, log: Path, on_step: Action
) -> None:
    """Do what the script of a stage does, as the head of a process group, with output to `log`."""
    os.setsid()
    multiprocessing.set_start_method("fork", force=True)  # of data processes
    os.environ.update({name: str(value) for name, value in environment.items()})
    descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    faulthandler.dump_traceback_later(100, exit=False)  # where it hangs
    sys.stdout.reconfigure(line_buffering=True)
    run_script(lambda: call(stage, flags, home, on_step))


def start(
    stage: str, flags: str, processes: int, home: Path, log: Path, on_step: Action = do_nothing
) -> list[BaseProcess]:
    """Start a run's processes, several as torchrun does; the last one calls `on_step`."""
    log.unlink(missing_ok=True)
    port = 10_000 + int.from_bytes(os.urandom(2)) % 20_000  # below those that the system gives
    group = {"WORLD_SIZE": processes, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    started = []
    for rank in range(processes):
        environment = {"RANK": rank, "LOCAL_RANK": rank} | group if processes > 1 else {}
        acts = on_step if rank == processes - 1 else do_nothing
        given = (stage, flags, environment, home, log, acts)
        started.append(CONTEXT.Process(target=be_process, args=given))
        started[-1].start()
    return started


def run_two(stage: str, flags: str, home: Path, on_step: Action = do_nothing) -> list[int]:
    """Run a script on two processes of this machine; return their exit codes."""
    processes = start(stage, flags, 2, home, home / "log", on_step)
    until = time.monotonic() + 120
    for process in processes:
        process.join(max(0, until - time.monotonic()))
        process.kill()
        process.join()
    return [process.exitcode for process in processes]


def exit_code(main: Callable[[list[str]], int], words: list[str]) -> int:
    """Return what a script with these words on its command line ends with."""
    with pytest.raises(SystemExit) as caught:
        run_script(lambda: main(words))
    return caught.value.code


def record_of(run: Path) -> dict:
    return json.loads((run / "run.json").read_text())


def rows_of(run: Path) -> list[dict]:
    """Read the whole lines of `metrics.jsonl` without what depends on the clock."""
    lines = (run / "metrics.jsonl").read_text().splitlines(keepends=True)
    rows = [json.loads(line) for line in lines if line.endswith("}\n")]
    return [{k: v for k, v in row.items() if k != "tokens_per_second"} for row in rows]


def bytes_of(weights: Path) -> dict[str, bytes]:
    """Read every tensor's bits; the order of a safetensors file's header may differ."""
    return {name: tensor.numpy().tobytes() for name, tensor in load_file(weights).items()}
