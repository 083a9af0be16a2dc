"""How compare.py trains: the methods, their learning rates, and their runs as processes."""

import asyncio
import os
import shutil
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from dataset.lm_dataset import read_jsonl
from evaluation.comparison.measure import DIVERGED, Loss, print_progress
from evaluation.comparison.report import format_rate
from evaluation.runs import ENDED, call_script, choose_start_flags, read_status
from evaluation.study.names import BLACK, BLUE, GREEN, GREY
from model.cli import UserError
from model.files import read_json

# Learning rates that were best in our three sizes, by stage and width.
TUNED_RATES = {
    "lora": {128: 3e-3, 256: 1.5e-3, 512: 1e-3},
    "full_sft": {128: 1e-3, 256: 1.25e-4, 512: 1e-4},
}
FIRST_RATES = (0.5, 1.0, 2.0)  # times the start
MOST_RATES = len(FIRST_RATES) + 2
TIMED_STEPS = 20


# ---------------------------------------------------------------- methods and learning rates


@dataclass(frozen=True)
class Method:
    """A way of fine-tuning: a training script, and its flags."""

    title: str
    color: str  # in the figures, as in the study's
    stage: str  # of the script: lora or full_sft
    flags: list[str]
    rate_factor: float = 1.0  # times the stage's learning rate

    def list_first_rates(self, width: int) -> list[float]:
        """List the learning rates that run first, an octave apart."""
        start = self.rate_factor * choose_start_rate(self.stage, width)
        return [round_rate(start * factor) for factor in FIRST_RATES]


def define_methods(width: int) -> dict[str, Method]:
    """Define all methods for a base of this width.

    The high rank is half the width, at most 64. With it r=64 came near to full fine-tuning in our
    smallest model, and beyond half the width an adapter has more weights than a square matrix.
    """
    all_layers = ["--lora_targets", "all-linear", "--lora_alpha", "32", "--lora_rank"]
    original = ["--lora_targets", "square", "--lora_alpha", "8", "--lora_rank", "8"]
    high_rank = min(64, width // 2)
    return {
        "lora-all-r8": Method(
            title="rank-8 LoRA on all layers",
            color=BLUE,
            stage="lora",
            flags=[*all_layers, "8"],
        ),
        "lora-all-high-rank": Method(
            title=f"rank-{high_rank} LoRA on all layers",
            color="#6aa9e0",
            stage="lora",
            flags=[*all_layers, str(high_rank)],
        ),
        "full": Method(
            title="full fine-tuning",
            color=BLACK,
            stage="full_sft",
            flags=[],
        ),
        "full-frozen-embedding": Method(
            title="full fine-tuning with a frozen embedding",
            color=GREEN,
            stage="full_sft",
            flags=["--trainable", "frozen-embeddings"],
        ),
        "lora-original": Method(
            title="the original LoRA",
            color=GREY,
            stage="lora",
            flags=[*original, "--lora_init", "gaussian"],
            rate_factor=4,  # its updates count alpha / r = 1 times, those of lora-all-r8 4 times
        ),
        "lora-all-r8-dora": Method(
            title="rank-8 DoRA on all layers",
            color="#7b5ea7",
            stage="lora",
            flags=[*all_layers, "8", "--use_dora"],
        ),
    }


METHOD_NAMES = list(define_methods(width=128))


def choose_start_rate(stage: str, width: int) -> float:
    """Choose the learning rate around which a stage's search starts.

    Up to our largest width it lies on the line through our tuned rates, in logarithms. Beyond, it
    is tinker-cookbook's for Llama-shaped models (hyperparam_utils.py): ten times as much for LoRA.
    """
    tuned = TUNED_RATES[stage]
    if width > max(tuned):
        rate = 5e-5 * (2000 / width) ** 0.781
        return 10 * rate if stage == "lora" else rate
    widths = np.log(list(tuned.keys()))
    rates = np.log(list(tuned.values()))
    return float(np.exp(np.interp(np.log(width), widths, rates)))


def round_rate(rate: float) -> float:
    """Keep three digits, so that a folder's name says the whole rate."""
    return float(f"{rate:.3g}")


def find_next_rate(losses: dict[float, Loss]) -> float | None:
    """Return the rate an octave beyond the best one if that is at an edge, and there is room."""
    rates = sorted(losses)
    best = min(rates, key=losses.get)
    if len(rates) >= MOST_RATES:
        return None
    if best == rates[0]:
        return round_rate(best / 2)
    return round_rate(best * 2) if best == rates[-1] else None


# ---------------------------------------------------------------- training


@dataclass
class Comparison:
    """The runs of all methods, from one base and on the same pairs."""

    folder: Path
    base: str
    methods: dict[str, Method]
    flags: list[str]  # of every run
    steps: int
    jobs: int
    failures: dict[str, str] = field(default_factory=dict)  # why a method was given up

    def find_run(self, name: str, rate: float) -> Path:
        """Return the folder of a run."""
        return self.folder / "runs" / f"{name}-lr{rate:g}"

    def has_ended(self, name: str, rate: float) -> bool:
        """Decide whether a run needs no more training."""
        return read_status(self.find_run(name, rate)) in ENDED

    def make_command(self, name: str, rate: float, run: Path, steps: int) -> list[str]:
        """Return the script that trains a method at a rate, and its flags."""
        method = self.methods[name]
        return [
            f"trainer/train_{method.stage}.py",
            *method.flags,
            "--lora_name" if method.stage == "lora" else "--run_name",
            run.name,
            "--save_dir",
            str(run.parent),
            "--from_weight",
            self.base,
            "--data_path",
            str(self.folder / "data" / "train.jsonl"),
            "--eval_data_path",
            str(self.folder / "data" / "choose.jsonl"),
            "--show_answers",
            "0",
            "--max_steps",
            str(steps),
            "--learning_rate",
            f"{rate:g}",
            *self.flags,
        ]

    async def call(self, name: str, rate: float, run: Path, steps: int) -> str:
        """Train a run to its end, from its saved state if there is one; return its status."""
        log = run.with_name(f"{run.name}.log")
        log.parent.mkdir(parents=True, exist_ok=True)
        command = self.make_command(name, rate, run, steps)
        threads = max(1, (os.cpu_count() or 1) // self.jobs)
        await call_script([*command, *choose_start_flags(run)], log, threads)
        status = read_status(run)
        if status == "interrupted":  # by a signal that this process did not get
            raise UserError(f"{run.name} was stopped; the same command with --from_resume goes on")
        if status not in ENDED:
            *_, last = [line for line in log.read_text("utf-8").splitlines() if line.strip()]
            place = log.relative_to(self.folder)
            self.give_up(name, f"{run.name} failed ({last.strip()}); see {place}")
        return status

    def give_up(self, name: str, reason: str) -> None:
        """Leave a method out, and say why."""
        self.failures[name] = reason
        print_progress(f"left out: {name}: {reason}")

    def list_remaining(self) -> list[str]:
        """List the methods that have not failed."""
        return [name for name in self.methods if name not in self.failures]

    def time_method(self, name: str, rate: float) -> tuple[float, float]:
        """Return the seconds of a step and those around the steps, by a short run."""
        steps = min(TIMED_STEPS, self.steps)
        print_progress(f"timing {steps} steps of {name}")
        run = self.folder / "timing" / name
        shutil.rmtree(run, ignore_errors=True)  # of a call that was stopped
        start = time.perf_counter()
        asyncio.run(self.call(name, rate, run, steps))
        seconds = time.perf_counter() - start
        if name in self.failures:
            shutil.rmtree(run, ignore_errors=True)  # a full disk is to be free for the others
            return 0.0, 0.0
        rows = [row for _, row in read_jsonl(run / "metrics.jsonl") if "tokens_per_second" in row]
        shutil.rmtree(run)
        if not rows:  # it diverged at once
            return seconds / steps, 0.0
        # The last line is about the second half of the steps: loading is over.
        last = rows[-1]
        step_seconds = last["tokens"] / last["step"] / last["tokens_per_second"]
        return step_seconds, max(0.0, seconds - steps * step_seconds)

    async def train(self, name: str, rate: float, slots: asyncio.Semaphore) -> None:
        """Train a method at a rate once a slot is free, unless it ended or the method failed."""
        if self.has_ended(name, rate):
            return
        run = self.find_run(name, rate)
        async with slots:
            if name in self.failures:
                return
            print_progress(f"{name} at {format_rate(rate)}")
            status = await self.call(name, rate, run, self.steps)
        if status in ENDED:
            record = read_json(run / "run.json")
            result = f"diverged, {record['reason']}"
            if status == "completed":
                loss = f"NLL {record['eval_loss']:.4f} of the pairs that choose"
                result = f"{loss}, after {record['train_seconds']:.0f} s"
            print_progress(f"{name} at {format_rate(rate)}: {result}")

    async def train_all(self, todo: list[tuple[str, float]]) -> None:
        """Train runs, `jobs` at once."""
        slots = asyncio.Semaphore(self.jobs)
        await asyncio.gather(*(self.train(name, rate, slots) for name, rate in todo))

    def tune(
        self, first_rates: dict[str, list[float]], score: Callable[[Path], Loss]
    ) -> dict[str, dict[float, Loss]]:
        """Train every method at its rates, and beyond them while the best is at an edge."""
        losses: dict[str, dict[float, Loss]] = {name: {} for name in self.methods}
        todo = [(name, rate) for name in self.methods for rate in first_rates[name]]
        while todo:
            asyncio.run(self.train_all(todo))
            for name, rate in todo:
                if name not in self.failures:
                    losses[name][rate] = score(self.find_run(name, rate))
            todo = []
            for name in self.list_remaining():
                rate = find_next_rate(losses[name])
                if rate is not None:
                    todo.append((name, rate))
            for name, rate in todo:
                if not self.has_ended(name, rate):
                    has_diverged = min(losses[name].values()) == DIVERGED
                    why = "every rate diverged" if has_diverged else "the best rate is at an edge"
                    print_progress(f"{name}: {why}, so {format_rate(rate)} runs as well")
        return {name: losses[name] for name in self.list_remaining()}
