r"""Train ways of fine-tuning side by side on your own model and pairs, and say which to take.

    python evaluation/compare.py --from_weight out/full_sft --data_path mine.jsonl --dry_run
    python evaluation/compare.py --from_weight out/full_sft --data_path mine.jsonl
    python evaluation/compare.py --from_weight out/full_sft --data_path mine.jsonl --from_resume

Each method trains at three learning rates or more. One half of the held-out pairs chooses the rate,
the other half judges. out/compare/NAME/ then holds report.md and index.html, a page that needs no
network. Beside them are figures/, data/ (your pairs in three parts), runs/ (ordinary run folders
with logs) and measured/. Methods, the first four by default:

    lora-all-r8            LoRA on all linear layers, r=8
    lora-all-high-rank     the same with half the base's width as its rank, at most 64
    full                   full fine-tuning
    full-frozen-embedding  full fine-tuning of all but the embedding
    lora-original          LoRA as MiniMind's scripts have it: on square matrices, scaling 1
    lora-all-r8-dora       lora-all-r8 with DoRA
"""

import argparse
import asyncio
import hashlib
import json
import math
import os
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import numpy as np

from dataset.lm_dataset import read_jsonl, record_messages
from evaluation.compare_report import LEAST_PAIRS, Facts, Result, format_rate, write_report
from evaluation.probe.answers import encode_prompts, probe
from evaluation.probe.likelihood import measure_nll
from evaluation.probe.prompts import Prompt, read_prompts
from evaluation.runs import ENDED, call_script, choose_start_flags, read_status
from model.checkpoint import Checkpoint, load_checkpoint, weights_fingerprint
from model.files import (
    REPO_DIR,
    UserError,
    escape_control,
    file_sha256,
    make_parser,
    read_json,
    run_script,
    write_json,
    write_text,
)
from model.reachability import reachable_probability
from trainer.arguments import DEVICES, MAX_SEQ_LEN, POSITIVE, SIZE, choose_device, limit

# Learning rates that were best in our three sizes, by stage and width.
TUNED_RATES = {
    "lora": {128: 3e-3, 256: 1.5e-3, 512: 1e-3},
    "full_sft": {128: 1e-3, 256: 1.25e-4, 512: 1e-4},
}
FIRST_RATES = (0.5, 1.0, 2.0)  # times the start
MOST_RATES = len(FIRST_RATES) + 2
MOST_HELD_OUT = 500  # pairs that are split off where no held-out file is given
LEAST_STEPS = 300
MOST_EPOCHS = 10
TIMED_STEPS = 20
MOST_PROMPTS = 200  # of the held-out ones that are asked
SHORTEST_LIMIT = 32  # tokens of an answer
DIVERGED = (math.inf, math.inf)
Loss = tuple[float, float]  # share of wrong answers (0 without checks), then NLL


# ---------------------------------------------------------------- methods and learning rates


@dataclass(frozen=True)
class Method:
    """A way of fine-tuning: a training script, and its flags."""

    title: str
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
    original += ["--lora_init", "gaussian"]
    high_rank = min(64, width // 2)
    frozen = ["--trainable", "frozen-embeddings"]
    title = "LoRA on all layers, r="
    return {
        "lora-all-r8": Method(f"{title}8", "lora", [*all_layers, "8"]),
        "lora-all-high-rank": Method(f"{title}{high_rank}", "lora", [*all_layers, str(high_rank)]),
        "full": Method("full fine-tuning", "full_sft", []),
        "full-frozen-embedding": Method("full fine-tuning, embedding frozen", "full_sft", frozen),
        # Its updates count alpha / r = 1 times, a quarter of those of r=8 above.
        "lora-original": Method("the original LoRA", "lora", original, rate_factor=4),
        "lora-all-r8-dora": Method(f"{title}8, DoRA", "lora", [*all_layers, "8", "--use_dora"]),
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
    logarithms = np.interp(np.log(width), np.log(list(tuned)), np.log(list(tuned.values())))
    return float(np.exp(logarithms))


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


# ---------------------------------------------------------------- data


@dataclass(frozen=True)
class Pairs:
    """The user's conversations in three parts, and a sentence about how they were parted."""

    train: list[list[dict]]
    choose: list[list[dict]]  # chooses the learning rates
    judge: list[list[dict]]
    note: str


def read_pairs(paths: list[Path]) -> list[tuple[str, list[dict]]]:
    """Read conversations, each with its hash."""
    pairs = []
    for path in paths:
        for where, record in read_jsonl(path):
            messages = record_messages(record, where)
            digest = hashlib.sha256(json.dumps(messages).encode()).hexdigest()
            pairs.append((digest, messages))
    return pairs


def choose_held_out(digests: list[str]) -> set[str]:
    """Choose a tenth of the different conversations, at most 500: those with the lowest hashes."""
    unique = sorted(set(digests))
    return set(unique[: min(MOST_HELD_OUT, len(unique) // 10)])


def split_pairs(data_paths: list[Path], eval_paths: list[Path]) -> Pairs:
    """Part the pairs; the same conversation never stands on both sides."""
    pairs = read_pairs(data_paths)
    if eval_paths:
        held_out = dict(read_pairs(eval_paths))
    else:
        chosen = choose_held_out([digest for digest, _ in pairs])
        held_out = {digest: messages for digest, messages in pairs if digest in chosen}
    train = [messages for digest, messages in pairs if digest not in held_out]
    # Sorted by hash, so that neither half depends on the order in the file.
    halves = [held_out[digest] for digest in sorted(held_out)]
    if len(halves) < 2 or not train:
        count = f"{len(train)} pairs to train on and {len(halves)} held out"
        remedy = "give at least 20 pairs, or 1 and --eval_data_path with 2 or more others"
        raise UserError(f"{data_paths[0]}: too few examples ({count}); {remedy}")
    if eval_paths:
        note = "The held-out pairs are those of --eval_data_path."
        if len(train) < len(pairs):
            note += f" {len(pairs) - len(train)} pairs stand in both files and do not train."
    else:
        note = "The held-out pairs were split off the data by a hash of the conversation."
    return Pairs(train, halves[::2], halves[1::2], note)


def write_pairs(pairs: Pairs, folder: Path) -> None:
    """Write the three parts as JSONL."""
    folder.mkdir(parents=True, exist_ok=True)
    for name in ("train", "choose", "judge"):
        lines = [json.dumps({"conversations": messages}) for messages in getattr(pairs, name)]
        write_text(folder / f"{name}.jsonl", "\n".join(lines) + "\n")


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

    def make_command(self, name: str, rate: float, run: Path, steps: int) -> list[str]:
        """Return the script that trains a method at a rate, and its flags."""
        method = self.methods[name]
        data = self.folder / "data"
        words = [f"trainer/train_{method.stage}.py", *method.flags]
        words += ["--lora_name" if method.stage == "lora" else "--run_name", run.name]
        words += ["--save_dir", str(run.parent), "--from_weight", self.base]
        words += ["--data_path", str(data / "train.jsonl")]
        words += ["--eval_data_path", str(data / "choose.jsonl"), "--show_answers", "0"]
        return [*words, "--max_steps", str(steps), "--learning_rate", f"{rate:g}", *self.flags]

    async def call(self, name: str, rate: float, run: Path, steps: int) -> None:
        """Train a run to its end, from its saved state if there is one; note a failure."""
        log = run.with_name(f"{run.name}.log")
        log.parent.mkdir(parents=True, exist_ok=True)
        command = self.make_command(name, rate, run, steps)
        threads = max(1, (os.cpu_count() or 1) // self.jobs)
        await call_script([*command, *choose_start_flags(run)], log, threads, REPO_DIR)
        if read_status(run) not in ENDED:
            *_, last = ["nothing", *filter(str.strip, log.read_text("utf-8").splitlines())]
            self.failures[name] = f"{run.name} failed ({last.strip()}); see {log}"
            print(escape_control(f"left out: {self.failures[name]}"), flush=True)
        # What a run continues from is three times as large as its weights.
        elif read_status(run) == "completed":
            (run / "resume.pt").unlink(missing_ok=True)

    def time_method(self, name: str, rate: float) -> tuple[float, float]:
        """Return the seconds of a step and those around the steps, by a short run."""
        run = self.folder / "timing" / name
        steps = min(TIMED_STEPS, self.steps)
        start = time.perf_counter()
        asyncio.run(self.call(name, rate, run, steps))
        seconds = time.perf_counter() - start
        if name in self.failures:
            return 0.0, 0.0
        # The last line is about the second half of the steps: loading is over.
        rows = [row for _, row in read_jsonl(run / "metrics.jsonl") if "tokens_per_second" in row]
        if not rows:  # it diverged at once
            return seconds / steps, 0.0
        step_seconds = rows[-1]["tokens"] / rows[-1]["step"] / rows[-1]["tokens_per_second"]
        return step_seconds, max(0.0, seconds - steps * step_seconds)

    async def train(self, name: str, rate: float, slots: asyncio.Semaphore) -> None:
        """Train a method at a rate once a slot is free, unless it ended or the method failed."""
        run = self.find_run(name, rate)
        if read_status(run) in ENDED:
            return
        async with slots:
            if name in self.failures:
                return
            print(f"{time.strftime('%H:%M:%S')} {name} at {format_rate(rate)}", flush=True)
            await self.call(name, rate, run, self.steps)
        if name not in self.failures:
            record = read_json(run / "run.json")
            result = f"NLL {record['eval_loss']:.4f}, {record['train_seconds']:.0f} s"
            if record["status"] == "diverged":
                result = f"diverged ({record['reason']})"
            print(f"{time.strftime('%H:%M:%S')} {run.name}: {result}", flush=True)

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
            for name in self.methods:
                rate = find_next_rate(losses[name]) if name not in self.failures else None
                if rate is not None:
                    todo.append((name, rate))
        return losses


# ---------------------------------------------------------------- measuring


@dataclass(frozen=True)
class Yardstick:
    """What every model is asked and measured with; results are kept, so that none is lost."""

    folder: Path
    device: str
    batch_size: int
    max_seq_len: int
    text: Path  # whose likelihood says what is forgotten
    text_kind: str  # see `measure_nll`
    asked: list[Prompt]  # held-out prompts, then those of --prompts
    choosing: list[Prompt]  # with checks; they choose the learning rates
    max_new_tokens: int

    def load(self, path: str | Path) -> Checkpoint:
        """Load a checkpoint onto the device."""
        model, tokenizer = load_checkpoint(path)
        return model.to(choose_device(self.device)), tokenizer

    def ask(self, checkpoint: Checkpoint, prompts: list[Prompt], decoding: str) -> list[dict]:
        """Ask prompts once each."""
        return probe(checkpoint, prompts, [decoding], [0], self.max_new_tokens, self.batch_size)

    def measure(self, name: str, path: str | Path) -> dict:
        """Measure NLL of held-out pairs and of the other text, and ask the prompts."""
        kept = self.folder / "measured" / f"{name}.json"
        if kept.is_file():
            return read_json(kept)
        print(f"{time.strftime('%H:%M:%S')} measuring {name}", flush=True)
        checkpoint = self.load(path)
        judge = [self.folder / "data" / "judge.jsonl"]
        sizes = (self.max_seq_len, self.batch_size)
        measured = {
            "nll": measure_nll(checkpoint, "sft", judge, *sizes)["sequences"],
            "text": measure_nll(checkpoint, self.text_kind, [self.text], *sizes)["sequences"],
            "samples": self.ask(checkpoint, self.asked, "greedy"),
        }
        kept.parent.mkdir(exist_ok=True)
        write_json(kept, measured)
        return measured

    def score(self, run: Path) -> Loss:
        """Return what chooses between the learning rates of a method: the lower, the better."""
        record = read_json(run / "run.json")
        if record["status"] == "diverged":
            return DIVERGED
        if not self.choosing:
            return 0.0, record["eval_loss"]
        kept = self.folder / "measured" / f"{run.name}-choose.json"
        if not kept.is_file():
            samples = self.ask(self.load(run), self.choosing, "greedy")
            wrong = [sample["outcome"] != "correct" for sample in samples]
            kept.parent.mkdir(exist_ok=True)
            write_json(kept, {"wrong": float(np.mean(wrong))})
        return read_json(kept)["wrong"], record["eval_loss"]

    def write_base_answers(self, base: str) -> None:
        """Let the base answer the held-out prompts, sampled at temperature 1, and keep the pairs.

        What their NLL rises by estimates the KL divergence from the base to a tuned model on these
        prompts, which goes with what is forgotten elsewhere (Shenfeld et al. 2025, arXiv
        2509.04259).
        """
        if self.text.is_file():
            return
        pairs = []
        for prompt, sample in zip(
            self.asked, self.ask(self.load(base), self.asked, "t1.0"), strict=True
        ):
            if sample["output"].strip():
                answer = {"role": "assistant", "content": sample["output"]}
                pairs.append({"conversations": [*prompt.messages, answer]})
        if not pairs:
            raise UserError(f"{base}: answers nothing, so give --text_data to measure forgetting")
        write_text(self.text, "".join(json.dumps(pair) + "\n" for pair in pairs))


def make_yardstick(args: argparse.Namespace, folder: Path, checkpoint: Checkpoint) -> Yardstick:
    """Choose what is asked, by the files in `folder` and the flags."""
    model, tokenizer = checkpoint
    asked = read_prompts(folder / "data" / "judge.jsonl", MOST_PROMPTS)
    lengths = [len(tokenizer.encode(p.reference, add_special_tokens=False)) for p in asked]
    # Twice the longest held-out answer: what is longer will hardly end.
    max_new_tokens = min(args.max_seq_len, max(SHORTEST_LIMIT, 2 * max(lengths)))
    choosing = []
    if args.prompts:
        prompts = read_prompts(args.prompts)
        checked = [prompt for prompt in prompts if prompt.check]
        if len(checked) >= 2 * LEAST_PAIRS:
            choosing = checked[::2]
        chosen = {prompt.id for prompt in choosing}
        asked += [prompt for prompt in prompts if prompt.id not in chosen]
    room = min(args.max_seq_len, model.config.max_position_embeddings - max_new_tokens)
    encoded = encode_prompts(tokenizer, asked)
    fitting = [prompt for prompt, ids in zip(asked, encoded, strict=True) if len(ids) <= room]
    if not fitting:
        raise UserError(f"--max_seq_len {args.max_seq_len}: no held-out prompt fits; raise it")
    if len(fitting) < len(asked):
        print(f"note: {len(asked) - len(fitting)} prompts are too long to be asked")
    text_kind = "sft"
    if args.text_data:
        text_kind = "pretrain_wrapped" if args.wrap_documents else "pretrain"
    return Yardstick(
        folder=folder,
        device=args.device,
        batch_size=args.batch_size,
        max_seq_len=args.max_seq_len,
        text=args.text_data or folder / "data" / "base_answers.jsonl",
        text_kind=text_kind,
        asked=fitting,
        choosing=choosing,
        max_new_tokens=max_new_tokens,
    )


# ---------------------------------------------------------------- the command line


def make_compare_parser() -> argparse.ArgumentParser:
    """Make the parser of the command line."""
    parser = make_parser(__doc__, usage="%(prog)s --from_weight BASE --data_path PAIRS [flags]")
    add = parser.add_argument_group("what is compared").add_argument
    add("--from_weight", required=True, help="the base: a folder or a hub id")
    add("--data_path", type=Path, nargs="+", required=True, help="your pairs, JSONL or JSONL.gz")
    held_out = "held-out pairs (a tenth of the data, at most 500)"
    add("--eval_data_path", type=Path, nargs="+", default=[], help=held_out)
    prompts = f".md or JSONL; {2 * LEAST_PAIRS} prompts with checks or more choose and judge"
    add("--prompts", type=Path, help=prompts)
    text = "text whose likelihood says what is forgotten (the base's own answers)"
    add("--text_data", type=Path, help=text)
    add("--wrap_documents", action="store_true", help="that text as train_pretrain.py wraps it")
    add("--methods", nargs="+", choices=METHOD_NAMES, default=METHOD_NAMES[:4], metavar="METHOD")
    add("--name", help="folder in out/compare (BASE-PAIRS)")
    add("--save_dir", type=Path, default=REPO_DIR / "out" / "compare", help="(out/compare)")
    add = parser.add_argument_group("how it runs").add_argument
    steps = f"of a run (an epoch, at least {LEAST_STEPS} steps, at most {MOST_EPOCHS} epochs)"
    add("--epochs", type=POSITIVE, help=steps)
    add("--max_steps", type=SIZE, help="optimizer steps, in place of --epochs")
    add("--batch_size", type=SIZE, default=32, help="pairs a step (32)")
    add("--max_seq_len", type=limit(int, 2), default=MAX_SEQ_LEN, help="tokens a pair (340)")
    add("--seed", type=limit(int, 0, 2**32 - 1), default=42, help="(42)")
    add("--device", choices=DEVICES, default="auto", help="(auto)")
    add("--jobs", type=SIZE, default=1, help="runs at once (1)")
    add("--dry_run", action="store_true", help="print the plan and the commands alone")
    add("--from_resume", action="store_true", help="continue; more --methods may join")
    return parser


def check_compare_args(args: argparse.Namespace) -> None:
    """Refuse values that cannot work, before anything is loaded; name the comparison."""
    if args.epochs and args.max_steps:
        raise UserError("--epochs and --max_steps: contradict each other; give one")
    if args.wrap_documents and not args.text_data:
        raise UserError("--wrap_documents: is of --text_data; drop it")
    files = [*args.data_path, *args.eval_data_path, args.prompts, args.text_data]
    for path in files:
        if path is not None and not path.is_file():
            raise UserError(f"{path}: no such file; mend the path")
    stem = args.data_path[0].name.split(".")[0]
    args.name = args.name or f"{Path(args.from_weight).name}-{stem}"
    if Path(args.name).name != args.name or args.name == ".." or not args.name.isprintable():
        raise UserError(f"--name {args.name!r}: must be a plain folder name")
    args.methods = list(dict.fromkeys(args.methods))
    if "lora-all-r8-dora" in args.methods:
        script = REPO_DIR / "trainer" / "train_lora.py"
        shown = subprocess.run([sys.executable, script, "--help"], capture_output=True, text=True)
        if "--use_dora" not in shown.stdout:
            raise UserError("--methods lora-all-r8-dora: train_lora.py has no --use_dora; drop it")


def count_steps(pairs: int, batch_size: int, epochs: float | None, max_steps: int | None) -> int:
    """Return the steps of a run: an epoch, at least 300 steps, but at most 10 epochs."""
    per_epoch = math.ceil(pairs / batch_size)
    if max_steps:
        return max_steps
    if epochs:
        return max(1, math.ceil(epochs * per_epoch))
    return min(max(per_epoch, LEAST_STEPS), MOST_EPOCHS * per_epoch)


def open_folder(folder: Path, settings: dict, from_resume: bool) -> dict:
    """Return the plan of an earlier call, or a new one; refuse what is of another comparison.

    Without runs a folder is as good as new: a dry run leaves one.
    """
    path = folder / "plan.json"
    has_runs = (folder / "runs").is_dir()
    if has_runs and not from_resume:
        raise UserError(f"{folder} exists: give another --name, or --from_resume to continue")
    if from_resume and not path.is_file():
        raise UserError(f"--from_resume: no {path}; drop it")
    plan = read_json(path) if path.is_file() else {"settings": None, "seconds": {}}
    if plan["settings"] == settings:
        return plan
    if has_runs:
        changed = [key for key in settings if plan["settings"].get(key) != settings[key]]
        what = f"{', '.join(changed)} changed"
        raise UserError(f"--from_resume: {what}; restore it, or give another --name")
    for made in ("measured", "timing"):
        shutil.rmtree(folder / made, ignore_errors=True)
    (folder / "data" / "base_answers.jsonl").unlink(missing_ok=True)
    return {"settings": settings, "seconds": {}}


def time_all(
    comparison: Comparison, yardstick: Yardstick, plan: dict, rates: dict[str, list[float]]
) -> None:
    """Measure the base, and steps of each method; add to the plan what both take, in seconds."""
    seconds = plan["seconds"]
    path = comparison.folder / "plan.json"
    write_json(path, plan)
    if "measuring" not in seconds:
        start = time.perf_counter()
        yardstick.write_base_answers(comparison.base)
        yardstick.measure("base", comparison.base)
        seconds["measuring"] = time.perf_counter() - start
        write_json(path, plan)
    for name in comparison.methods:
        if name not in seconds:
            print(f"{time.strftime('%H:%M:%S')} timing {name}", flush=True)
            step_seconds, other_seconds = comparison.time_method(name, rates[name][0])
            if name not in comparison.failures:
                seconds[name] = [step_seconds, other_seconds]
                write_json(path, plan)
    shutil.rmtree(comparison.folder / "timing", ignore_errors=True)


def print_plan(comparison: Comparison, plan: dict, rates: dict[str, list[float]]) -> None:
    """Print what will be trained, and how long it takes."""
    seconds = plan["seconds"]
    total = 0.0
    for name, method in comparison.methods.items():
        if name in comparison.failures:
            continue
        step_seconds, other_seconds = seconds[name]
        minutes = (comparison.steps * step_seconds + other_seconds) / 60
        total += minutes * len(rates[name]) / comparison.jobs + seconds["measuring"] / 60
        listed = ", ".join(map(format_rate, rates[name]))
        cost = f"{1000 * step_seconds:.0f} ms a step, {minutes:.1f} minutes a run"
        print(f"  {name} ({method.title}) at {listed}: {cost}")
    # Runs beyond an edge, at most two more for each method, all of them at the worst.
    most = total * MOST_RATES / len(FIRST_RATES)
    print(f"about {total:.0f} minutes, at most {most:.0f} if rates are extended", flush=True)


def collect_results(
    comparison: Comparison, yardstick: Yardstick, losses: dict[str, dict[float, Loss]]
) -> dict[str, Result]:
    """Measure each method at its best rate."""
    results = {}
    for name, of_rate in losses.items():
        if name in comparison.failures:
            continue
        best = min(of_rate, key=of_rate.get)
        run = comparison.find_run(name, best)
        if of_rate[best] == DIVERGED:
            comparison.failures[name] = "it diverged at every learning rate"
            print(f"left out: {name}: {comparison.failures[name]}")
            continue
        results[name] = Result(
            title=comparison.methods[name].title,
            rate=best,
            nll_by_rate={rate: nll for rate, (_, nll) in of_rate.items()},
            record=read_json(run / "run.json"),
            size=sum(path.stat().st_size for path in run.glob("*.safetensors")),
            measured=yardstick.measure(run.name, run),
        )
    if not results:
        raise UserError("no method is left; see the lines above")
    return results


def list_settings(args: argparse.Namespace, fingerprint: str, steps: int) -> dict:
    """List what must be the same in every call for one folder; files by their hashes."""
    settings = {"from_weight": fingerprint, "steps": steps}
    for name in ("seed", "batch_size", "max_seq_len", "device", "wrap_documents"):
        settings[name] = getattr(args, name)
    for name in ("data_path", "eval_data_path"):
        settings[name] = [file_sha256(path) for path in getattr(args, name)]
    for name in ("prompts", "text_data"):
        path = getattr(args, name)
        settings[name] = file_sha256(path) if path else None
    return settings


def list_common_flags(args: argparse.Namespace) -> list[str]:
    """Return the flags that all runs share, and the training on all data after them."""
    flags = ["--seed", str(args.seed), "--batch_size", str(args.batch_size)]
    flags += ["--max_seq_len", str(args.max_seq_len)]
    return flags if args.device == "auto" else [*flags, "--device", args.device]


def write_final_command(
    args: argparse.Namespace, method: Method, rate: float, epochs: float
) -> str:
    """Write the command that trains a method on all data, as often as its run saw them."""
    words = ["python", f"trainer/train_{method.stage}.py", *method.flags]
    words += ["--lora_name" if method.stage == "lora" else "--run_name", args.name]
    words += ["--from_weight", args.from_weight, "--data_path", *map(str, args.data_path)]
    words += ["--epochs", f"{epochs:.3g}", "--learning_rate", f"{rate:g}"]
    return shlex.join([*words, *list_common_flags(args)])


def main(argv: list[str] | None = None) -> None:
    """Plan, train, measure and report by the flags on the command line."""
    args = make_compare_parser().parse_args(argv)
    check_compare_args(args)
    base = args.from_weight
    if Path(base).is_dir():
        base = str(Path(base).resolve())  # the scripts run in another folder
    checkpoint = load_checkpoint(base)
    model, tokenizer = checkpoint
    width = model.config.hidden_size
    methods = {name: define_methods(width)[name] for name in args.methods}
    pairs = split_pairs(args.data_path, args.eval_data_path)
    steps = count_steps(len(pairs.train), args.batch_size, args.epochs, args.max_steps)
    epochs = steps * args.batch_size / len(pairs.train)

    folder = args.save_dir.resolve() / args.name
    settings = list_settings(args, weights_fingerprint(model), steps)
    plan = open_folder(folder, settings, args.from_resume)
    write_pairs(pairs, folder / "data")
    flags = list_common_flags(args)
    comparison = Comparison(folder, base, methods, flags, steps, args.jobs)
    yardstick = make_yardstick(args, folder, checkpoint)
    facts = Facts(
        base=args.from_weight,
        data=", ".join(path.name for path in args.data_path),
        train=len(pairs.train),
        choose=len(pairs.choose),
        judge=len(pairs.judge),
        note=pairs.note,
        steps=steps,
        epochs=epochs,
        batch_size=args.batch_size,
        seed=args.seed,
        checked=len(yardstick.choosing),
        text=args.text_data.name if args.text_data else None,
        end_bound=reachable_probability(model, tokenizer.eos_token_id),
    )
    for line in (*facts.describe_data(), facts.describe_end()):
        print(escape_control(line))

    rates = {name: method.list_first_rates(width) for name, method in methods.items()}
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        time_all(comparison, yardstick, plan, rates)
        print_plan(comparison, plan, rates)
        if args.dry_run:
            for name in methods.keys() - comparison.failures.keys():
                for rate in rates[name]:
                    run = comparison.find_run(name, rate)
                    command = comparison.make_command(name, rate, run, steps)
                    print(shlex.join(["python", *command]))
            return
        losses = comparison.tune(rates, yardstick.score)
        results = collect_results(comparison, yardstick, losses)
    except KeyboardInterrupt:
        print(f"stopped; the same command with --from_resume continues ({folder})")
        raise
    base_measured = yardstick.measure("base", base)

    def write_command(name: str) -> str:
        return write_final_command(args, methods[name], results[name].rate, epochs)

    write_report(folder, facts, results, base_measured, comparison.failures, write_command)


if __name__ == "__main__":
    run_script(main)
