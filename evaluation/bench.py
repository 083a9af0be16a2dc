r"""Measures speed and memory of training, generation and loading, beside transformers and PEFT.

    python evaluation/bench.py                            # or: make bench; about 40 minutes
    python evaluation/bench.py --sizes xs --quick         # some minutes: does it run?
    python evaluation/bench.py --data_path dataset/data/medquad.jsonl.gz
    python evaluation/bench.py --sweep 1 8 32    # does a small batch keep it busy?

Everything is measured in one run on one machine, in turns: every arm takes a step, then every arm
takes the next, so that a slow moment of the machine falls on all of them. An arm is a process of
its own (its memory is its own), and takes its steps when this one says so:

    ours      train_full_sft.py and train_lora.py as a user starts them, each step of theirs held
              until its turn; their default compiles the blocks
    trainer   transformers' Trainer on LlamaForCausalLM, with PEFT, from the same weights, on the
              same batches: bf16 autocast, dynamic padding, fused AdamW, the same clipping
    peak      torch.mm at the shapes of a training step, weighted by their FLOPs
    answers, transformers     our generation as eval_llm.py sets it up, and LlamaForCausalLM's own

A time is from one step's start to the next one's: loading and bookkeeping are in it. The first
five steps, and later ones in which an arm compiles, are not counted; what they cost more than
others is shown apart. Tokens are those of samples, no padding. How many times as fast, or as long,
and the share of the peak are the median of the turns' own ratios. The share counts 6 N FLOPs a
token for full fine-tuning and 4 N for adapters, attention left out. Beside LoRA stands its floor:
one adapter, on the first block's q.

Without --data_path, conversations of random words are made, with lengths as of medical question
answering cut at 340 tokens: mean 276. Writes evaluation/bench.json, which report.py tells of.
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
import tomllib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from statistics import median

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import numpy as np
import torch
from torch import nn
from torch._dynamo.utils import counters
from torch.utils.data import DataLoader
from transformers import LlamaConfig

from dataset.command_line import Parser
from dataset.demo import ensure_demo_corpus
from dataset.jsonl import DataError
from dataset.lm_dataset import (
    ConversationDataset,
    StepCollator,
    StepSampler,
    encode_whole,
    load_dataset,
)
from evaluation.bench_tables import METHODS, bench_lines, nominal_flops_per_token, spread
from evaluation.probe.prompts import PROMPTS_FILE, encode_prompts, read_prompts
from model.checkpoint import TOKENIZER_DIR, load_model, load_tokenizer, save_model
from model.files import write_text
from model.generation import Decoder, Decoding, generate
from model.model_minimind import MiniMindForCausalLM, count_parameters, minimind_config
from trainer import train_full_sft, train_lora, trainer_utils
from trainer.arguments import MAX_SEQ_LEN
from trainer.failures import run_script
from trainer.machine import (
    can_compile,
    choose_device,
    choose_dtype,
    describe_machine,
    keep_freed_memory,
    peak_memory_bytes,
)
from trainer.run_folder import git_state
from trainer.train_tokenizer import corpus_texts
from trainer.trainer_utils import PlannedSteps

RESULT = Path(__file__).resolve().parent / "bench.json"
SHAPE = ("hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size")
STUDY_SIZES = tomllib.loads((Path(__file__).resolve().parent / "study.toml").read_text())["sizes"]
SIZES = {name: {key: size[key] for key in SHAPE} for name, size in STUDY_SIZES.items()}
LORA_TARGETS = {"lora_square": "square", "lora_all": "all-linear"}
# As little as trains in the first block: the least that a step of an adapter there can cost.
LORA_TARGETS["lora_floor"] = "model.layers.0.self_attn.q_proj"
PEFT_TARGETS = {
    "lora_square": ["q_proj", "o_proj"],
    "lora_all": ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"],
}
RANK, ALPHA = 8, 32.0
SEED = 42
WARM_UP = 5  # turns; most of what is compiled is compiled in these
# A long run, of which the first steps are measured: ours compiles only what earns that back.
PLANNED_STEPS = 10_000
# Deciles of conversation lengths in tokens, from the shortest to the longest.
LENGTH_DECILES = (60, 165, 210, 250, 280, 305, 335, 340, 340, 340, 340)
SAMPLES = 2_000
TEMPLATE_TOKENS = 18  # of the chat template, and of first words, whose space is missing
PROMPT_SHARE = 0.15  # of a conversation's tokens are the user's
NEW_TOKENS = 64
PROMPTS = 100
REPEATS = 7  # of generation
# Of a GPU's sweep, in which its utilization is asked: nvidia-smi's own mean is over up to a second.
GPU_SECONDS = 5
GPU_SWEEP = [1, 2, 4, 8, 16, 32, 64, 128]
CPU_SWEEP = [8, 32]  # the study's batches
# FLOP/s of dense bfloat16 products by a part of the card's name, as its maker states them.
CARD_PEAKS = {"H200": 989e12, "H100": 989e12, "A100": 312e12, "L40S": 362e12, "RTX 4090": 165e12}
CACHE = "cache"  # of tokens, in the temporary folder


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = Parser(__doc__)
    add = parser.add_argument
    add("--sizes", nargs="+", choices=SIZES, default=["xs", "s", "base"], help="xs s base")
    add("--batch_size", type=int, default=32, help="conversations a step (32)")
    add("--steps", type=int, default=6, help="measured steps of every arm (6)")
    add("--quick", action="store_true", help="one measured step, one repetition")
    add("--data_path", type=Path, nargs="+", help="JSONL of conversations (default: random words)")
    add("--sweep", type=int, nargs="+", help="batches to try, last size (8 32; GPU: 1 to 128)")
    add("--workers", type=int, nargs="+", default=[0, 1, 2], help="loader processes to try (0 1 2)")
    add("--device", choices=("auto", "cpu", "cuda"), default="auto", help="default: auto")
    add("--output", type=Path, default=RESULT, help="default: evaluation/bench.json")
    add("--worker", help=argparse.SUPPRESS)  # what a process started by this script measures
    args = parser.parse_args(argv)
    if args.quick:
        args.steps = 1
    return args


def main(argv: list[str] | None = None) -> int:
    args = parse_args(argv)
    if args.worker:
        return run_worker(Work(**json.loads(args.worker)))
    args.device = choose_device(args.device)
    if args.sweep is None:
        args.sweep = GPU_SWEEP if args.device == "cuda" else CPU_SWEEP
    with tempfile.TemporaryDirectory(prefix="bench") as folder:
        result = measure(args, Path(folder))
    print("\n".join(["", *bench_lines(result), ""]))
    write_text(args.output, json.dumps(result, indent=1) + "\n")
    print(f"wrote {args.output}")
    return 0


def measure(args: argparse.Namespace, folder: Path) -> dict:
    """Everything, as bench.json holds it."""
    started = time.perf_counter()
    data = args.data_path or [write_random_data(folder / "data.jsonl", SAMPLES)]
    result = {
        "git": git_state(),
        "machine": describe_machine(args.device),
        "dtype": choose_dtype("auto", args.device),
        "card_peak": card_peak(args.device),
        "batch_size": args.batch_size,
        "data": describe_data(data, folder),
        "training": {},
    }
    for size in args.sizes:
        weights = folder / size
        torch.manual_seed(SEED)
        save_model(MiniMindForCausalLM(minimind_config(**SIZES[size])), TOKENIZER_DIR, weights)
        works = [work(args, folder, size, f"peak/{size}", data)]
        works += [
            work(args, folder, size, f"{engine}/{method}", data)
            for method in METHODS
            for engine in ("ours", "trainer")
        ]
        steps = WARM_UP + args.steps
        found = training_result(weights, in_turns(works, steps, folder))
        # Apart: all processes at once would not fit into 24 GiB.
        works = [work(args, folder, size, f"ours/{name}", data) for name in ("fft", "lora_floor")]
        found["floor"] = step_ratio(*in_turns(works, steps, folder).values())
        result["training"][size] = found
        print(f"{size}: trained after {(time.perf_counter() - started) / 60:.1f} minutes")
    last = args.sizes[-1]
    result["startup"] = startup(args, folder, last)
    result["generation"] = generation(args, folder, last)
    result["tokenizing"] = tokenizing(args.data_path, folder, 1 if args.quick else 3)
    result["loader"] = loader(load_sft(data, folder / CACHE), args.batch_size, args.workers)
    result["sweep"] = {"size": last, "batches": sweep(args, folder, last, data)}
    result["minutes"] = round((time.perf_counter() - started) / 60, 1)
    return result


def card_peak(device: str) -> float | None:
    """What a GPU's maker says of its bfloat16 products; None of others, and of a CPU."""
    name = torch.cuda.get_device_name() if device == "cuda" else ""
    return next((peak for part, peak in CARD_PEAKS.items() if part in name), None)


# ---------------------------------------------------------------- data


def write_random_data(path: Path, samples: int, seed: int = SEED) -> Path:
    """Conversations of random words whose lengths follow `LENGTH_DECILES`."""
    tokenizer, generator = load_tokenizer(), np.random.default_rng(seed)
    vocabulary = tokenizer.get_vocab()
    # A word with its space is one token, whatever stands around it.
    words = sorted(token[1:] for token in vocabulary if token[0] == "Ġ" and token[1:].isalpha())
    ranks = (generator.permutation(samples) + 0.5) / samples * 10
    lengths = np.interp(ranks, range(11), LENGTH_DECILES).astype(int)
    lines = []
    for length in lengths:
        content = generator.choice(words, max(2, length - TEMPLATE_TOKENS))
        split = max(1, int(len(content) * PROMPT_SHARE))
        turns = [("user", content[:split]), ("assistant", content[split:])]
        messages = [{"role": role, "content": " ".join(part)} for role, part in turns]
        lines.append(json.dumps({"conversations": messages}) + "\n")
    path.write_text("".join(lines), encoding="utf-8")
    return path


def load_sft(paths: list[Path], cache: Path) -> ConversationDataset:
    """The conversations that arms train on; their tokens go into the temporary `cache`."""
    return load_dataset("sft", paths, load_tokenizer(), MAX_SEQ_LEN, cache)


def describe_data(paths: list[Path], folder: Path) -> dict:
    """Number of conversations and their length in tokens."""
    lengths = load_sft(paths, folder / CACHE).lengths
    return {
        "conversations": len(lengths),
        "mean_tokens": round(float(lengths.mean()), 1),
        "max_tokens": int(lengths.max()),
    }


# ---------------------------------------------------------------- arms, in turns


@dataclass(frozen=True)
class Work:
    """What one process measures; passed to it as JSON."""

    arm: str  # "ours/fft", "trainer/lora_all", "peak/base", "answers/float32/batch"...
    size: str
    weights: str  # folder
    data: list[str]
    save_dir: str
    cache: str  # of tokens, as temporary as the rest
    batch_size: int
    device: str


def work(
    args: argparse.Namespace, folder: Path, size: str, arm: str, data: list[Path], batch: int = 0
) -> Work:
    """The work of one arm; `batch` in place of --batch_size."""
    return Work(
        arm=arm,
        size=size,
        weights=str(folder / size),
        data=[str(path.resolve()) for path in data],
        save_dir=str(folder / "runs"),
        cache=str(folder / CACHE),
        batch_size=batch or args.batch_size,
        device=args.device,
    )


class Arm:
    """A process that measures, from outside: it does a step when told, and says what it took."""

    def __init__(self, work: Work, folder: Path, **environment: str):
        self.work = work
        self.log = folder / f"{work.size}-{work.arm.replace('/', '-')}.log"
        command = [sys.executable, __file__, "--worker", json.dumps(vars(work))]
        self.started = time.perf_counter()
        with self.log.open("w") as log:
            self.process = subprocess.Popen(
                command,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                text=True,
                env={**os.environ, "TOKENIZERS_PARALLELISM": "true", **environment},
            )

    def wait(self) -> float:
        """Waits until it is about to take its first step; seconds since it was started."""
        self.hear()
        return time.perf_counter() - self.started

    def hear(self) -> dict:
        """The next line that the process says.

        Raises:
            OSError: it ended instead.
        """
        line = self.process.stdout.readline()
        if not line:
            tail = self.log.read_text()[-2000:]
            raise OSError(f"{self.work.arm} at {self.work.size} ended too soon:\n{tail}")
        return json.loads(line)

    def step(self) -> dict:
        """Lets it take a step."""
        self.process.stdin.write("step\n")
        self.process.stdin.flush()
        return self.hear()

    def end(self) -> None:
        """Lets it go, without saving what it trained."""
        self.process.stdin.close()
        self.process.wait()
        self.process.stdout.close()


def in_turns(works: list[Work], steps: int, folder: Path) -> dict[str, list[dict]]:
    """What every arm says of its steps, one arm after the other, every other turn backward.

    They compile with a cache of this call's own, so that compiling costs what it costs at first.
    """
    cache = {"TORCHINDUCTOR_CACHE_DIR": tempfile.mkdtemp(prefix="compiled", dir=folder)}
    arms = [Arm(work, folder, **cache) for work in works]
    for arm in arms:
        arm.wait()
    said: dict[str, list[dict]] = {arm.work.arm: [] for arm in arms}
    for turn in range(steps):
        for arm in arms if turn % 2 else reversed(arms):
            said[arm.work.arm].append(arm.step())
    for arm in arms:
        arm.end()
    return said


class Pace:
    """A process's side of `Arm`: holds each step until it is told to take it."""

    def __init__(self, device: str):
        self.device = device
        self.channel = os.fdopen(os.dup(1), "w")
        os.dup2(2, 1)  # what else is printed goes to the log
        self.facts: dict = {}
        self.clock: float | None = None

    def next_step(self) -> None:
        """Says what the step since the last call took, and waits; ends the process when let go."""
        if self.device == "cuda":
            torch.cuda.synchronize()
        if self.clock is not None:
            self.facts["seconds"] = time.perf_counter() - self.clock
            self.facts["peak_memory_bytes"] = peak_memory_bytes(self.device)
        print(json.dumps(self.facts), file=self.channel, flush=True)
        if not sys.stdin.readline():
            os._exit(0)  # in the middle of a run, whose state nobody needs
        self.clock = time.perf_counter()


def run_worker(work: Work) -> int:
    """Measures in this process until it is let go."""
    pace = Pace(work.device)
    engine, _, method = work.arm.partition("/")
    engines = {
        "ours": run_ours,
        "trainer": run_trainer,
        "peak": run_peak,
        "answers": run_answers,
        "transformers": run_transformers,
    }
    engines[engine](work, method, pace)
    return 0


def run_ours(work: Work, method: str, pace: Pace) -> None:
    """The stage's own script; each of its optimizer steps waits for its turn."""
    take_step = trainer_utils.train_step

    def paced(*args: object) -> tuple[float, float, int, int]:
        pace.next_step()
        loss, norm, tokens, labeled = take_step(*args)
        graphs = counters["stats"]["unique_graphs"]
        pace.facts |= {"loss": loss, "tokens": tokens, "graphs": graphs}
        return loss, norm, tokens, labeled

    trainer_utils.train_step = paced
    trainer_utils.load_dataset = partial(load_dataset, cache_dir=Path(work.cache))
    flags = ["--save_dir", work.save_dir, "--from_weight", work.weights, "--device", work.device]
    flags += ["--data_path", *work.data, "--batch_size", str(work.batch_size), "--seed", str(SEED)]
    flags += ["--max_steps", str(PLANNED_STEPS), "--max_seq_len", str(MAX_SEQ_LEN), "--overwrite"]
    flags += ["--learning_rate", "1e-4", "--log_interval", str(PLANNED_STEPS)]
    if work.device == "cuda" and can_compile("cuda"):
        flags += ["--use_compile", "on"]  # "auto" compiles long runs only
    name = f"{work.size}_{method}_{work.batch_size}"
    if method == "fft":
        train_full_sft.main([*flags, "--run_name", name])
    else:
        flags += ["--lora_targets", LORA_TARGETS[method], "--lora_rank", str(RANK)]
        train_lora.main([*flags, "--lora_name", name, "--lora_alpha", str(ALPHA)])


def run_trainer(work: Work, method: str, pace: Pace) -> None:
    """transformers' Trainer on the same weights and batches, with PEFT for the adapters."""
    from transformers import DataCollatorForSeq2Seq, LlamaForCausalLM, Trainer, TrainingArguments

    tokenizer = load_tokenizer()
    data = load_sft([Path(path) for path in work.data], Path(work.cache))
    model = LlamaForCausalLM.from_pretrained(work.weights, dtype=torch.float32)
    if method != "fft":
        from peft import LoraConfig, get_peft_model

        targets = PEFT_TARGETS[method]
        model = get_peft_model(model, LoraConfig(r=RANK, lora_alpha=ALPHA, target_modules=targets))

    class PacedTrainer(Trainer):
        """Reads the batches that ours reads, and takes each step at its turn."""

        def get_train_dataloader(self) -> DataLoader:
            plan = StepSampler(data.lengths, work.batch_size, seed=SEED, max_steps=PLANNED_STEPS)
            batches = [batch for step in plan for batch in step]
            return DataLoader(
                self.train_dataset,
                batch_sampler=batches,
                collate_fn=self.data_collator,
                pin_memory=work.device == "cuda",  # Trainer's default
            )

        def training_step(self, model: nn.Module, inputs: dict, *rest: object) -> torch.Tensor:
            pace.next_step()
            loss = super().training_step(model, inputs, *rest)
            pace.facts |= {"loss": loss.item(), "tokens": int(inputs["attention_mask"].sum())}
            return loss

    settings = TrainingArguments(
        output_dir=f"{work.save_dir}/trainer",
        per_device_train_batch_size=work.batch_size,
        max_steps=PLANNED_STEPS,
        learning_rate=1e-4,
        lr_scheduler_type="cosine",
        weight_decay=0.0,
        optim="adamw_torch_fused",
        bf16=choose_dtype("auto", work.device) == "bfloat16",
        use_cpu=work.device == "cpu",
        save_strategy="no",
        report_to="none",
        logging_steps=PLANNED_STEPS,
        disable_tqdm=True,
        seed=SEED,
    )
    samples = [{"input_ids": ids.tolist(), "labels": labels.tolist()} for ids, labels in data]
    collator = DataCollatorForSeq2Seq(tokenizer)
    PacedTrainer(model, settings, train_dataset=samples, data_collator=collator).train()


# ---------------------------------------------------------------- the matrix peak


def matrix_shapes(config: LlamaConfig) -> list[tuple[int, int, int]]:
    """(in, out, how many) of the matrices of a model, the head included."""
    width, layers = config.hidden_size, config.num_hidden_layers
    keys = config.num_key_value_heads * config.head_dim
    return [
        (width, width, 2 * layers),
        (width, keys, 2 * layers),
        (width, config.intermediate_size, 2 * layers),
        (config.intermediate_size, width, layers),
        (width, config.vocab_size, 1),
    ]


def run_peak(work: Work, _: str, pace: Pace) -> None:
    """Each product of a step once (forward, both gradients): FLOP/s, weighted by FLOPs."""
    if work.device == "cpu":
        keep_freed_memory()  # as our steps do: else new memory is a part of what is timed
    dtype = getattr(torch, choose_dtype("auto", work.device))
    shapes = matrix_shapes(load_model(Path(work.weights)).config)
    tokens = int(work.batch_size * np.mean(LENGTH_DECILES))
    while True:
        pace.next_step()
        seconds = flops = 0.0
        for inputs, outputs, count in shapes:
            taken = time_products(tokens, inputs, outputs, dtype, work.device)
            seconds += count * taken
            flops += count * 6 * tokens * inputs * outputs
        pace.facts["flops_per_second"] = flops / seconds


def time_products(tokens: int, inputs: int, outputs: int, dtype: torch.dtype, device: str) -> float:
    """Seconds of a linear's three products: its output and both gradients; the best of three."""
    x = torch.randn(tokens, inputs, device=device).to(dtype)
    w = torch.randn(outputs, inputs, device=device).to(dtype)
    y = torch.randn(tokens, outputs, device=device).to(dtype)

    def products() -> None:
        torch.mm(x, w.T)
        torch.mm(y, w)
        torch.mm(y.T, x)

    products()
    calls = 20 if device == "cuda" else 1  # their launches overlap with what runs
    return min(timed(lambda: [products() for _ in range(calls)], device) for _ in range(3)) / calls


def timed(function: Callable[[], object], device: str = "cpu") -> float:
    """Seconds that a call takes."""
    if device == "cuda":
        torch.cuda.synchronize()
    clock = time.perf_counter()
    function()
    if device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - clock


# ---------------------------------------------------------------- results of training


def training_result(weights: Path, said: dict[str, list[dict]]) -> dict:
    """What one size's arms said, as bench.json holds it.

    Raises:
        DataError: arms did not take the same batches.
    """
    total = count_parameters(load_model(weights))[0]
    turns = measured_turns(said)
    (peak,) = [steps for arm, steps in said.items() if arm.startswith("peak/")]
    peaks = [step["flops_per_second"] for step in peak]
    arms = {arm: steps for arm, steps in said.items() if not arm.startswith("peak/")}
    plans = {tuple(step["tokens"] for step in steps) for steps in arms.values()}
    if len(plans) != 1:
        raise DataError(f"{weights.name}: the arms took different batches: {sorted(plans)}")
    found = {"parameters": total, "peak_flops_per_second": spread([peaks[turn] for turn in turns])}
    found["arms"] = {
        arm: arm_result(steps, turns, nominal_flops_per_token(arm.partition("/")[2], found), peaks)
        for arm, steps in arms.items()
    }
    return found


def measured_turns(said: dict[str, list[dict]]) -> list[int]:
    """The turns after `WARM_UP` in which no arm compiled.

    Raises:
        DataError: there is none.
    """
    arms = list(said.values())
    turns = [
        turn
        for turn in range(WARM_UP, len(arms[0]))
        if all(arm[turn].get("graphs") == arm[turn - 1].get("graphs") for arm in arms)
    ]
    if not turns:
        raise DataError("some arm compiled in every measured step: use more --steps")
    return turns


def arm_result(
    steps: list[dict], turns: list[int], flops_per_token: int, peaks: list[float]
) -> dict:
    """What one arm said of its steps, the measured turns apart from those that compiled."""
    rest = [steps[turn] for turn in turns]
    first = [step for turn, step in enumerate(steps) if turn not in turns]
    speeds = [step["tokens"] / step["seconds"] for step in rest]
    usual = sum(step["tokens"] for step in first) / median(speeds)
    shares = [
        speed * flops_per_token / peaks[turn] for turn, speed in zip(turns, speeds, strict=True)
    ]
    return {
        "tokens_per_second": spread(speeds),
        "seconds": [step["seconds"] for step in rest],
        "compile_seconds": sum(step["seconds"] for step in first) - usual,
        "share_of_peak": spread(shares),
        "peak_memory_bytes": rest[-1]["peak_memory_bytes"],
        "first_loss": steps[0]["loss"],
    }


def step_ratio(full: list[dict], other: list[dict]) -> dict[str, float]:
    """How many times as long as full fine-tuning's step another arm's takes, by turn."""
    turns = measured_turns({"full": full, "other": other})
    return spread([other[turn]["seconds"] / full[turn]["seconds"] for turn in turns])


# ---------------------------------------------------------------- start, sweep


def startup(args: argparse.Namespace, folder: Path, size: str) -> dict[str, dict[str, float]]:
    """Seconds from a process's start to its first optimizer step, and what that one takes.

    Cold: neither tokens nor compiled code are there yet. Warm: the same again, three times.
    """
    data = write_random_data(folder / "startup.jsonl", SAMPLES, seed=time.time_ns())
    cache = {"TORCHINDUCTOR_CACHE_DIR": str(folder / "inductor")}
    waits, steps = [], []
    for _ in range(2 if args.quick else 4):
        arm = Arm(work(args, folder, size, "ours/fft", [data]), folder, **cache)
        waits.append(arm.wait())
        steps.append(arm.step()["seconds"])
        arm.end()
    return {
        "cold": spread(waits[:1]),
        "cold_first_step": spread(steps[:1]),
        "warm": spread(waits[1:]),
        "warm_first_step": spread(steps[1:]),
    }


def sweep(args: argparse.Namespace, folder: Path, size: str, data: list[Path]) -> dict:
    """Speed, share of the peak and utilization by batch size, each arm on its own."""
    found: dict[str, dict] = {}
    for batch in args.sweep:
        found[str(batch)] = {}
        for method in METHODS:
            arm = Arm(work(args, folder, size, f"ours/{method}", data, batch), folder)
            arm.wait()
            for _ in range(WARM_UP):
                arm.step()
            steps: list[dict] = []
            least = GPU_SECONDS if args.device == "cuda" else 0
            with Utilization(args.device) as utilization:
                while len(steps) < args.steps or sum(s["seconds"] for s in steps) < least:
                    steps.append(arm.step())
            arm.end()
            speed = spread([step["tokens"] / step["seconds"] for step in steps])
            memory = steps[-1]["peak_memory_bytes"]
            found[str(batch)][method] = {"tokens_per_second": speed, "peak_memory_bytes": memory}
            found[str(batch)][method]["gpu_utilization"] = utilization.mean()
    return found


class Utilization:
    """The share of time in which the GPU runs a kernel, asked of nvidia-smi ten times a second."""

    COMMAND = ["nvidia-smi", "--query-gpu=utilization.gpu", "--format=csv,noheader,nounits"]

    def __init__(self, device: str):
        self.is_asked = device == "cuda" and shutil.which("nvidia-smi") is not None
        self.percents: list[float] = []

    def __enter__(self) -> "Utilization":
        if self.is_asked:
            card = f"GPU-{torch.cuda.get_device_properties(0).uuid}"
            command = [*self.COMMAND, "--id", card, "--loop-ms=100"]
            self.process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
        return self

    def __exit__(self, *_: object) -> None:
        if self.is_asked:
            self.process.terminate()
            lines = self.process.communicate()[0].split()
            self.percents = [float(line) for line in lines if line.isdecimal()]  # not "[N/A]"

    def mean(self) -> float | None:
        """From 0 to 1; None without a GPU that tells it."""
        return sum(self.percents) / len(self.percents) / 100 if self.percents else None


# ---------------------------------------------------------------- generation


def generation(args: argparse.Namespace, folder: Path, size: str) -> dict:
    """Tokens/s of greedy answers: ours and transformers', by type, alone and in a batch.

    The first turn warms up.
    """
    prompts = bench_prompts("batch")
    found: dict = {"size": size, "prompts": len(prompts), "new_tokens": NEW_TOKENS}
    found["mean_prompt_tokens"] = round(sum(map(len, prompts)) / len(prompts), 1)
    for way in ("alone", "batch"):
        works = [
            work(args, folder, size, f"{engine}/{dtype}/{way}", [])
            for dtype in ("float32", "bfloat16")
            for engine in ("answers", "transformers")
        ]
        for arm, steps in in_turns(works, 2 if args.quick else 1 + REPEATS, folder).items():
            engine, dtype, _ = arm.split("/")
            name = "ours" if engine == "answers" else engine
            found.setdefault(way, {}).setdefault(dtype, {})[name] = {
                "tokens_per_second": spread([s["tokens"] / s["seconds"] for s in steps[1:]]),
                "seconds": [step["seconds"] for step in steps[1:]],
            }
    return found


def bench_prompts(way: str) -> list[list[int]]:
    """The probe's first prompts by length, or one of middle length alone."""
    encoded = sorted(encode_prompts(load_tokenizer(), read_prompts(PROMPTS_FILE, PROMPTS)), key=len)
    return encoded if way == "batch" else [encoded[len(encoded) // 2]]


def run_answers(work: Work, method: str, pace: Pace) -> None:
    """Our generation as eval_llm.py sets it up, ending at no token."""
    if work.device == "cpu":
        keep_freed_memory()
    dtype, way = method.split("/")
    decoder = Decoder(load_model(Path(work.weights)).to(work.device, getattr(torch, dtype)).eval())
    prompts = bench_prompts(way)
    draws = torch.zeros(len(prompts), NEW_TOKENS)
    while True:
        pace.next_step()
        answers = generate(decoder, prompts, Decoding(NEW_TOKENS), draws)
        pace.facts |= {"tokens": len(prompts) * NEW_TOKENS, "first_answer": answers[0]}


def run_transformers(work: Work, method: str, pace: Pace) -> None:
    """transformers' own generation from the same weights."""
    from transformers import LlamaForCausalLM

    dtype, way = method.split("/")
    model = LlamaForCausalLM.from_pretrained(work.weights, dtype=getattr(torch, dtype))
    model.to(work.device).eval()
    tokenizer = load_tokenizer()
    tokenizer.padding_side = "left"
    prompts = bench_prompts(way)
    inputs = tokenizer.pad({"input_ids": prompts}, return_tensors="pt").to(work.device)
    settings = {"max_new_tokens": NEW_TOKENS, "do_sample": False, "eos_token_id": None}
    while True:
        pace.next_step()
        answers = model.generate(**inputs, **settings)[:, -NEW_TOKENS:]
        pace.facts |= {"tokens": len(prompts) * NEW_TOKENS, "first_answer": answers[0].tolist()}


# ---------------------------------------------------------------- tokenizing, loading


def tokenizing(data_path: list[Path] | None, folder: Path, repeats: int) -> dict:
    """MB/s of text: ours from JSONL to the cache of tokens, and the tokenizer's own call alone.

    Of --data_path, or of the demo corpus's documents: random words are no text.
    """
    kind = "sft" if data_path else "pretrain"
    paths = data_path or [ensure_demo_corpus()[kind]]
    texts = list(corpus_texts(paths))
    megabytes = sum(len(text.encode()) for text in texts) / 1e6
    tokenizer = load_tokenizer()
    ways: dict[str, list[float]] = {"ours": [], "encode_batch": []}
    for repeat in range(repeats):
        cache = folder / f"tokens{repeat}"
        load = partial(load_dataset, kind, paths, tokenizer, MAX_SEQ_LEN, cache)
        ways["ours"].append(timed(load))
        encode = partial(encode_whole, tokenizer.backend_tokenizer, texts, special=False)
        ways["encode_batch"].append(timed(encode))
    found = {"files": [path.name for path in paths], "megabytes": megabytes}
    return found | {name: spread([megabytes / s for s in times]) for name, times in ways.items()}


def loader(dataset: ConversationDataset, batch_size: int, workers: list[int]) -> dict[str, float]:
    """Milliseconds that the loader takes for a step's batch, by its number of processes."""
    return {str(count): loader_milliseconds(dataset, batch_size, count) for count in workers}


def loader_milliseconds(dataset: ConversationDataset, batch_size: int, workers: int) -> float:
    """The median of 100 batches, the first left out: it starts the processes."""
    steps = 101
    batches: Iterator = iter(
        DataLoader(
            PlannedSteps(),
            batch_size=None,
            sampler=StepSampler(dataset.lengths, batch_size, max_steps=steps),
            collate_fn=StepCollator(dataset, 0),
            num_workers=workers,
        )
    )
    next(batches)
    return 1e3 * median(timed(lambda: next(batches)) for _ in range(steps - 1))


if __name__ == "__main__":
    run_script(main)
