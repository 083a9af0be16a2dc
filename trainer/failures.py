"""How a script that computes ends: what torch's errors mean, exit codes, signals."""

import os
import signal
import sys
from collections.abc import Callable
from typing import NoReturn

import torch

from dataset import command_line
from dataset.command_line import INTERRUPTED, OUT_OF_MEMORY, SettingsError
from model.files import read_json
from trainer.run_folder import RunFolder

EXIT_CODES = {"completed": 0, "failed": 1, "oom": 2, "diverged": 3, "interrupted": INTERRUPTED}
# torch tells these by a RuntimeError's text alone.
MEMORY_IS_FULL = (
    "DefaultCPUAllocator",
    "CUDA error: out of memory",
    "CUBLAS_STATUS_ALLOC_FAILED",
    "MPS backend out of memory",
)
DISK_IS_FULL = "inline_container.cc"  # torch's file writer: a write was cut short
WORKER_DIED = "DataLoader worker"
PEER_DIED = "third_party/gloo"  # errors of its connections name only their source file


class Diverged(ArithmeticError):
    """The loss, its gradient or the weights are no longer finite; the message names the step."""


def run_script(main: Callable[[], int]) -> NoReturn:
    """`dataset.command_line.run_script`, which knows torch's errors, too."""
    command_line.run_script(lambda: translated(main))


def translated(main: Callable[[], int]) -> int:
    """What `main` returns.

    Raises:
        SettingsError: in place of torch's errors of which the cause is known.
    """
    try:
        return main()
    except RuntimeError as error:
        if is_out_of_memory(error):
            raise SettingsError(OUT_OF_MEMORY) from error
        if is_lost_peer(error):
            told = f"before the first step, {lost_peer(error)}, and start all of them again"
            raise SettingsError(told) from error
        raise


def is_out_of_memory(error: BaseException) -> bool:
    """Whether a GPU's memory or the machine's ran out."""
    is_class = isinstance(error, torch.OutOfMemoryError | MemoryError)
    return is_class or any(text in str(error) for text in MEMORY_IS_FULL)


def is_lost_peer(error: BaseException) -> bool:
    """Whether another process of the run never came, died, or does not answer."""
    return isinstance(error, torch.distributed.DistError) or PEER_DIED in str(error)


def lost_peer(error: BaseException) -> str:
    """What torch says of another process: the first sentence of the last line is the cause."""
    told = str(error).splitlines()[-1].partition(". ")[0]
    return f"another process of this run did not come, died or is stuck ({told}): see its output"


def explain(error: BaseException, step: int, run: RunFolder) -> Exception | None:
    """What an error that stopped a run means and what to do, where that is known."""
    if is_out_of_memory(error):
        return SettingsError(
            f"out of memory at step {step}: free some, or start anew with --overwrite and "
            "--batch_size halved, --accumulation_steps doubled (the same training), or a shorter "
            f"--max_seq_len; {what_is_left(run)}"
        )
    if WORKER_DIED in str(error):
        return SettingsError(
            f"a data loading process died at step {step} ({error}); for want of memory, if nobody "
            f"killed it: lower --num_workers; {what_is_left(run)}"
        )
    if is_lost_peer(error):
        return SettingsError(f"at step {step}, {lost_peer(error)}; {what_is_left(run)}")
    if isinstance(error, OSError):
        return OSError(f"{error}; {what_is_left(run)}")
    return None


def what_is_left(run: RunFolder) -> str:
    """What of a run that ended too soon can be continued."""
    state = run.resume_state()
    if state is None:
        return "no state was saved: start it anew with --overwrite"
    step = read_json(state / "progress.json")["step"]
    return f"the state of step {step} is kept: continue from it with --from_resume"


def stop_on_signals(processes: int) -> list[int]:
    """A list that SIGTERM or Ctrl-C appends to; the loop saves and stops after its step.

    A second Ctrl-C stops at once; not with several processes, where the terminal and torchrun both
    pass the first one on.
    """
    received: list[int] = []

    def note(number: int, _: object) -> None:
        if number == signal.SIGINT and signal.SIGINT in received and processes == 1:
            raise KeyboardInterrupt
        received.append(number)
        # Not print, whose buffer the signal may have found half-written.
        os.write(sys.__stderr__.fileno(), b"\nstopping: the state is saved after this step\n")

    signal.signal(signal.SIGTERM, note)
    signal.signal(signal.SIGINT, note)
    return received
