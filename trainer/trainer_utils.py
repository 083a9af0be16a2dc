"""The one training loop, and what the three training scripts share.

Pretraining, full fine-tuning and LoRA differ in their data, their start and their `Method`: which
parameters train, at which rates, with which loss. Everything in `train` (batches, schedule,
clipping, precision, evaluation, saving) is the same code for all, so a comparison between them is
controlled by construction.

`train` is the loop and `run_step` one optimizer step. What they need is made before, in `plan_job`
and `set_up`; what they leave is logged and saved by the functions behind them.
"""

import argparse
import contextlib
import math
import os
import shutil
import signal
import sysconfig
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from accelerate import Accelerator, PartialState
from accelerate.state import AcceleratorState
from accelerate.utils import gather_object, send_to_device, set_seed
from torch import Tensor, nn
from torch.optim import AdamW, Optimizer
from torch.utils.data import DataLoader
from tqdm import tqdm
from transformers import PreTrainedTokenizerFast as Tokenizer

from dataset.lm_dataset import (
    Shape,
    StepPlan,
    TokenDataset,
    chunks,
    collate,
    load_dataset,
    plan_shapes,
    read_prompt,
)
from dataset.world.generate import FILES_DIR, ensure_world
from model.checkpoint import load_model, load_tokenizer, save_model
from model.cli import EXIT_CODES, Finished, UserError, escape_control
from model.generation import MAX_NEW_TOKENS, Decoding, generate
from model.machine import DTYPES
from model.model_lora import EMBEDDING, HEAD, WHOLE
from model.model_minimind import (
    DEFAULT_SHAPE,
    MiniMindForCausalLM,
    minimind_config,
    weights_fingerprint,
)
from trainer.run_folder import Diverged, RunFolder

# Run FLOPs (6 a parameter and token) that repay compiling. At 1.3M parameters on 2 cores of a Xeon
# it takes 23 s the first time and 8 s later, and saves 30 ms a step: 800 steps repay it, or 1.4e13
# FLOPs. On an EPYC it takes 34 s and 9 s and saves some 12 ms, so there only saved code pays soon.
COMPILE_FLOPS = {"cpu": 2e13, "cuda": 1e16}
ADAMW = {"betas": [0.9, 0.999], "eps": 1e-8}
Batch = dict[str, Tensor]  # see `collate`
LossFunction = Callable[[nn.Module, Batch, int], Tensor]


# ---------------------------------------------------------------- what a script gives to `train`


@dataclass
class Session:
    """Where a run computes, where it writes, and the model that it starts from."""

    accelerator: Accelerator
    run: RunFolder
    model: MiniMindForCausalLM
    tokenizer: Tokenizer
    base_fingerprint: str | None  # of the weights that --from_weight names; None: random weights


class Data(NamedTuple):
    """Training samples, and held-out ones for validation."""

    train: TokenDataset
    valid: TokenDataset | None


def token_loss(model: nn.Module, batch: Batch, items: int) -> Tensor:
    """Sum the nats of a micro-batch's labels, over `items`: the labels of the whole step."""
    return model(**batch, num_items_in_batch=items).loss


@dataclass
class Method:
    """What tells one way of training from another.

    The losses of a step's micro-batches, on all processes, are added up. So `compute_loss(model,
    batch, items)` returns a sum over its batch, divided by `items`, the labels of the whole step.
    """

    stage: str  # its name in run.json
    roles: dict[str, str]  # of each parameter that trains, see `name_roles`
    learning_rate_ratios: dict[str, float] = field(default_factory=dict)  # by role; 1 by default
    facts: dict = field(default_factory=dict)  # more for run.json; the same in a resumed run
    save_weights: Callable[[Path], None] | None = None  # to a folder; by default the whole model
    compute_loss: LossFunction = token_loss


def start_session(args: argparse.Namespace) -> Session:
    """Set up accelerate, seeds, the run's folder and the model, unless the run is complete."""
    # accelerate keeps precision and device for a process's life, and has no public reset. Without
    # one, a notebook could not train in float32 after bfloat16.
    AcceleratorState._reset_state(reset_partial_state=True)
    accelerator = Accelerator(
        cpu=args.device == "cpu",
        mixed_precision=DTYPES[args.dtype],
        log_with=None if args.report_to == "none" else args.report_to,
        project_dir=args.save_dir / args.run_name,
    )
    set_seed(args.seed)  # the same on every process, for the same initial weights
    run = RunFolder(args, accelerator.is_main_process)
    accelerator.wait_for_everyone()  # each has looked for the folder before the first makes it
    if run.is_complete:
        accelerator.print(f"{args.run_name}: complete; --overwrite starts it again")
        raise Finished
    model, tokenizer, fingerprint = load_start(args)
    return Session(accelerator, run, model, tokenizer, fingerprint)


def load_start(args: argparse.Namespace) -> tuple[MiniMindForCausalLM, Tokenizer, str | None]:
    """Load the model to train, in float32, its tokenizer, and the fingerprint of given weights."""
    shape = {flag: getattr(args, flag) for flag in DEFAULT_SHAPE}
    if args.from_weight == "none":
        tokenizer = load_tokenizer(args.tokenizer_path)
        config = minimind_config(vocab_size=len(tokenizer), **shape)
        return MiniMindForCausalLM(config), tokenizer, None
    model = load_model(args.from_weight)
    PartialState().print(f"base: {args.from_weight}, {model.num_parameters():,} parameters")
    known = model.config.to_dict()
    known["qk_norm"] = model.config.model_type == "qwen3"
    for flag, value in shape.items():
        if value not in (None, known[flag]):
            raise UserError(f"--{flag} {value}: the weights have {known[flag]}; drop the flag")
    tokenizer = load_tokenizer(args.tokenizer_path or args.from_weight, model.config.vocab_size)
    return model, tokenizer, weights_fingerprint(model)


def load_data(args: argparse.Namespace, kind: str, session: Session) -> Data:
    """Load training and held-out data; of several processes the first one tokenizes.

    With --show_sample the script ends here, after the sample.
    """
    if FILES_DIR in {path.parent for path in args.data_path}:
        ensure_world()  # writes the small world's files where they are missing
    load = partial(load_dataset, kind, tokenizer=session.tokenizer, max_seq_len=args.max_seq_len)
    max_samples = vars(args).get("max_train_samples")  # pretraining has no such flag
    train_set = load(args.data_path, max_samples=max_samples)
    valid_set = load(args.eval_data_path) if args.eval_data_path else None
    if args.show_sample:
        print(train_set.describe(0, session.tokenizer))
        raise Finished
    for dataset in (train_set, valid_set):
        if dataset is not None:
            info = dataset.info
            files = " ".join(file["name"] for file in info["files"])
            lost = (
                f"{info['truncated']:,} cut, {info['dropped_without_labels']:,} without an answer"
            )
            session.accelerator.print(
                escape_control(f"{files}: {info['records']:,} records, {lost}")
            )
    return Data(train_set, valid_set)


# ---------------------------------------------------------------- before the loop


def learning_rate_at(
    step: int, steps: int, peak: float, schedule: str, warmup_ratio: float, min_ratio: float
) -> float:
    """Return the rate of optimizer step `step` (0 to `steps` - 1).

    Linear warm-up to `peak`, then constant, or down to `min_ratio * peak` in a line or half a
    cosine (Loshchilov & Hutter 2016, arXiv 1608.03983, eq. 5).
    """
    warmup = round(steps * warmup_ratio)
    if step < warmup:
        return peak * (step + 1) / warmup
    if schedule == "constant":
        return peak
    progress = (step - warmup) / max(1, steps - 1 - warmup)
    remaining = 1 - progress
    if schedule == "cosine":
        remaining = (1 + math.cos(math.pi * progress)) / 2
    return peak * (min_ratio + (1 - min_ratio) * remaining)


def parameter_groups(model: nn.Module, method: Method, weight_decay: float) -> list[dict]:
    """Group trainable parameters for AdamW by decay and rate.

    Weight decay is for matrices outside the embedding and the head, whose rows are tokens: rare
    ones would shrink, since they seldom get a gradient.
    """
    groups = defaultdict(list)
    for name, role in method.roles.items():
        parameter = model.get_parameter(name)
        decays = parameter.ndim == 2 and not name.startswith((EMBEDDING, HEAD))
        ratio = method.learning_rate_ratios.get(role, 1.0)
        groups[weight_decay if decays else 0.0, ratio].append(parameter)
    keys = sorted(groups, reverse=True)
    highest_decay, _ = keys[0]
    if highest_decay < weight_decay:
        raise UserError(f"--weight_decay {weight_decay}: acts on no weight that trains; drop it")
    return [
        {"params": groups[decay, ratio], "weight_decay": decay, "lr_ratio": ratio}
        for decay, ratio in keys
    ]


def flops_per_token(model: MiniMindForCausalLM, lengths: np.ndarray) -> float:
    """Count the FLOPs of training on one token, forward and backward, nominally.

    2 N forward, 2 N for the gradients of activations and 2 N_trainable for those of weights
    (Kaplan et al. 2020, arXiv 2001.08361, section 2.1), and 6 L D T for causal attention.
    """
    total = model.num_parameters()
    trainable = model.num_parameters(only_trainable=True)
    # A token's attention costs its sample's length, and long samples have more tokens.
    length = float((lengths.astype(float) ** 2).sum() / lengths.sum())
    attention = 6 * model.config.num_hidden_layers * model.config.hidden_size * length
    return 4 * total + 2 * trainable + attention


def should_compile(use_compile: str, device: str, flops: float) -> bool:
    """Decide whether --use_compile or the run's size asks for compiled code.

    `auto` looks at the FLOPs of the base on the run's tokens and leaves adapters out, so that a
    comparison compiles all methods or none. It falls back where there is no compiler.
    """
    header = Path(sysconfig.get_paths()["include"]) / "Python.h"
    compiler = os.environ.get("CXX", "g++") if device == "cpu" else os.environ.get("CC", "gcc")
    is_able = header.is_file() and shutil.which(compiler) is not None
    if use_compile == "on" and not is_able:
        remedy = "install them (python3-dev, build-essential), or drop the flag"
        raise UserError(f"--use_compile on: needs {compiler} and Python.h; {remedy}")
    earns = flops >= COMPILE_FLOPS.get(device, math.inf)
    return use_compile == "on" or (use_compile == "auto" and earns and is_able)


def compile_model(model: MiniMindForCausalLM, device: str, gradients_add_up: bool) -> None:
    """Compile what a training step computes: on CUDA as one graph, elsewhere in parts.

    On CUDA few shapes are planned, with a graph for each, which is launched as a whole. Such a
    launch overwrites gradients in place, so it is not for runs whose gradients add up over
    micro-batches. A method's own loss that takes logits does not pass through it.
    """
    if device != "cuda":
        compile_parts(model)
        return
    mode = None if gradients_add_up else "reduce-overhead"
    model.sum_nats = torch.compile(model.sum_nats, fullgraph=True, dynamic=False, mode=mode)


def compile_parts(model: MiniMindForCausalLM, backend: str | Callable = "inductor") -> None:
    """Compile a layer and the loss, each as one graph for all shapes.

    The layers are alike but for their weights, so the graph of one serves all, and compiling takes
    no longer in a deep model. If the embedding is frozen there are two, because the first layer
    then needs no gradient of its input. A method's own loss passes through the layers, too.
    """
    # All models share the code of a layer, and Dynamo allows it 8 graphs in a process.
    torch.compiler.reset()
    options = {"fullgraph": True, "dynamic": True, "backend": backend}
    for layer in model.model.layers:
        layer.compile(**options)
    model.sum_target_nats = torch.compile(model.sum_target_nats, **options)


@dataclass
class Job:
    """What a run will do, worked out before anything is written."""

    plan: StepPlan
    steps: int
    groups: list[dict]  # of parameters, for AdamW
    is_compiled: bool
    shapes: list[Shape]  # of compiled batches on CUDA
    kept: set[int]  # steps whose weights are kept
    facts: dict  # for run.json; a resumed run must agree with them


def plan_job(args: argparse.Namespace, session: Session, data: Data, method: Method) -> Job:
    """Work out the steps of a run, and compile if that pays; refuse what cannot work."""
    model = session.model
    processes = session.accelerator.num_processes
    lengths = data.train.lengths
    plan = StepPlan(lengths, args.batch_size, args.accumulation_steps, args.seed, processes)
    # Epochs are rounded first: 1.1 of 10 steps are 11, not 11.000000000000002.
    steps = args.max_steps or max(1, math.ceil(round(args.epochs * plan.steps_per_epoch, 6)))
    groups = parameter_groups(model, method, args.weight_decay)
    tokens = float(lengths.sum()) * steps / plan.steps_per_epoch
    is_compiled = should_compile(
        args.use_compile, args.device, 6 * count_base(model, method) * tokens
    )
    shapes = []
    if is_compiled:
        compile_model(model, args.device, args.accumulation_steps * processes > 1)
        if args.device == "cuda":
            shapes = plan_shapes(plan, data.train.targets, steps)
    facts = {
        "stage": method.stage,
        "base_fingerprint": session.base_fingerprint,
        **method.facts,
        "train_data": data.train.info,
        "eval_data": data.valid.info if data.valid is not None else None,
        "processes": processes,
        "parameters": model.num_parameters(),
        "trainable_parameters": model.num_parameters(only_trainable=True),
        "steps": steps,
        "steps_per_epoch": plan.steps_per_epoch,
        "compiled": is_compiled,
        "adamw": ADAMW,
    }
    parts = args.keep_checkpoints
    kept = {round(steps * part / parts) for part in range(1, parts + 1)}
    return Job(plan, steps, groups, is_compiled, shapes, kept, facts)


def count_base(model: MiniMindForCausalLM, method: Method) -> int:
    """Count the parameters outside adapters."""
    adapters = [name for name, role in method.roles.items() if role != WHOLE]
    return model.num_parameters() - sum(model.get_parameter(name).numel() for name in adapters)


@dataclass
class Loop:
    """What a step works with."""

    accelerator: Accelerator
    plan: StepPlan
    model: nn.Module  # as accelerate wraps it
    trained: dict[str, nn.Parameter]
    optimizer: Optimizer
    compute_loss: LossFunction
    grad_clip: float
    micro_batches: Iterator[Batch]
    losses: list[Tensor] = field(default_factory=list)  # of the last steps, on the device


def set_up(
    args: argparse.Namespace, session: Session, data: Data, method: Method, job: Job
) -> Loop:
    """Make the optimizer, the model as it is trained, and the loader of batches."""
    accelerator, run = session.accelerator, session.run
    # The gradient scaler of float16 must see whether a step was skipped; a fused step hides it.
    is_fused = args.dtype != "float16"
    optimizer = AdamW(job.groups, args.learning_rate, **ADAMW, fused=is_fused)
    settings = {name: str(value) for name, value in run.record["settings"].items()}
    accelerator.init_trackers("minimind-lora-study", config=settings)  # none by default
    set_seed(args.seed, device_specific=True)  # dropout differs between processes
    trained = {name: session.model.get_parameter(name) for name in method.roles}
    model, optimizer = accelerator.prepare(session.model, optimizer)
    model.train()
    rows = args.batch_size if job.is_compiled else 0  # compiled code wants equal batches
    loader = DataLoader(
        data.train,
        batch_sampler=job.plan.iterate(run.record["step"], job.steps, accelerator.process_index),
        collate_fn=partial(collate, rows=rows, shapes=job.shapes),
        num_workers=args.num_workers,
        worker_init_fn=ignore_signals,
        pin_memory=args.device == "cuda",
        # The loader draws a number when it starts; not from the state of a resumed run.
        generator=torch.Generator(),
    )
    loop = Loop(
        accelerator=accelerator,
        plan=job.plan,
        model=model,
        trained=trained,
        optimizer=optimizer,
        compute_loss=method.compute_loss,
        grad_clip=args.grad_clip or math.inf,
        micro_batches=iter(loader),
    )
    if job.is_compiled and not job.shapes:
        warm_up(loop, rows=min(args.batch_size, 7))
    return loop


def warm_up(loop: Loop, rows: int) -> None:
    """Compile now, on a batch whose sizes differ, so that Dynamo makes each of them dynamic.

    A resumed run would else meet another batch first, and get other code and other last bits. The
    length is odd, as no width is: Dynamo takes equal sizes for one, and those of weights are fixed.
    """
    ids = np.zeros(255, np.int64)
    batch = send_to_device(collate([(ids, ids)], rows=rows), loop.accelerator.device)
    loop.accelerator.backward(loop.compute_loss(loop.model, batch, 1))
    loop.optimizer.zero_grad()


# ---------------------------------------------------------------- the loop


def train(args: argparse.Namespace, session: Session, data: Data, method: Method) -> int:
    """Train, evaluate and save; return the exit code.

    The loss of a step is the mean over all its labeled tokens, those of every micro-batch on every
    process: neither accumulation nor the number of processes changes what a batch means.
    """
    accelerator, run = session.accelerator, session.run
    job = plan_job(args, session, data, method)
    state = run.begin(job.facts)
    announce(args, session, job)
    with run.record_end():
        clock = time.perf_counter()  # stands still in evaluation and saving
        loop = set_up(args, session, data, method, job)
        if state is not None:
            restore_state(state, loop)
        bar = make_bar(args, session, job)
        with catch_signals(accelerator.num_processes) as received:
            for step in bar:
                rate = set_learning_rate(args, loop.optimizer, step, job.steps)
                labeled = int(data.train.targets[job.plan[step]].sum())
                norm = run_step(loop, step, labeled)
                run.count_step(int(data.train.lengths[job.plan[step]].sum()), labeled)
                due = list_due(args, job, data, step + 1)
                stops = must_stop(accelerator, received, due.logs)
                if not (any(due) or stops):
                    continue
                # Only here the device is waited for.
                fetch_losses(run, loop, norm)
                run.record["train_seconds"] += time.perf_counter() - clock
                if due.logs:
                    log_step(accelerator, run, bar, norm.item(), rate)
                if due.evaluates:
                    log_evaluation(args, session, data.valid)
                if due.saves or due.keeps or stops:
                    check_weights(loop.trained, step + 1)
                if due.keeps:
                    save_weights(session, method, run.path / "checkpoints" / f"step_{step + 1}")
                if due.saves or stops:
                    run.save_state(collect_state(loop))
                if stops:
                    break
                clock = time.perf_counter()
        if run.record["step"] < job.steps:
            run.end("interrupted")
        else:
            complete(session, data, method)
    # The gradients' reducer must not be the last owner of the processes' group: it would wait for
    # gloo's threads while it holds the interpreter's lock, which they need (pytorch#56297).
    loop = None
    accelerator.free_memory()
    accelerator.end_training()
    return EXIT_CODES[run.record["status"]]


def run_step(loop: Loop, step: int, labeled: int) -> Tensor:
    """Take one optimizer step over `labeled` labels; return the gradient's norm, on the device."""
    accelerator = loop.accelerator
    parts = len(loop.plan.micro_batches(step, accelerator.process_index))
    loss = torch.zeros((), device=accelerator.device)
    for part in range(1, parts + 1):
        batch = send_to_device(next(loop.micro_batches), accelerator.device, non_blocking=True)
        # Processes exchange gradients once, after the last part.
        is_last = part == parts
        with contextlib.nullcontext() if is_last else accelerator.no_sync(loop.model):
            part_loss = loop.compute_loss(loop.model, batch, labeled)
            # accelerate averages gradients over the processes. Each loss is already divided by the
            # labels of all of them, so a sum is wanted, and the average is undone.
            accelerator.backward(part_loss * accelerator.num_processes)
        loss += part_loss.detach()
    norm = accelerator.clip_grad_norm_(loop.model.parameters(), loop.grad_clip)
    loop.optimizer.step()
    loop.optimizer.zero_grad()
    loop.losses.append(loss)
    return norm


def set_learning_rate(
    args: argparse.Namespace, optimizer: Optimizer, step: int, steps: int
) -> float:
    """Give every group of parameters its rate in this step; return the rate before ratios."""
    schedule = (args.learning_rate, args.lr_schedule, args.warmup_ratio, args.min_lr_ratio)
    rate = learning_rate_at(step, steps, *schedule)
    for group in optimizer.param_groups:
        group["lr"] = rate * group["lr_ratio"]
    return rate


# ---------------------------------------------------------------- signals


@contextlib.contextmanager
def catch_signals(processes: int) -> Iterator[list[int]]:
    """Yield a list that SIGTERM or Ctrl-C appends to; a second Ctrl-C stops at once.

    Not with several processes: there the terminal and torchrun both pass the first one on. The
    handlers from before come back at the end.
    """
    received: list[int] = []

    def note(number: int, _: object) -> None:
        if number == signal.SIGINT and number in received and processes == 1:
            raise KeyboardInterrupt
        received.append(number)
        os.write(2, b"\nstopping: the state is saved first\n")  # print may be in the middle of one

    before = {number: signal.signal(number, note) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield received
    finally:
        for number, handler in before.items():
            signal.signal(number, handler or signal.SIG_DFL)  # None: it was not Python's


def ignore_signals(_: int) -> None:
    """Ignore signals in a data process: the main process handles them."""
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    signal.signal(signal.SIGINT, signal.SIG_IGN)


def must_stop(accelerator: Accelerator, received: list[int], logs: bool) -> bool:
    """Decide whether a signal ends the run after this step, on all processes together.

    Several processes ask each other at log lines alone, because the answer waits for the device.
    """
    if accelerator.num_processes == 1:
        return bool(received)
    if received:
        accelerator.set_trigger()
    return logs and accelerator.check_trigger()


# ---------------------------------------------------------------- logging and evaluation


class Due(NamedTuple):
    """What a step is followed by."""

    logs: bool
    evaluates: bool
    saves: bool
    keeps: bool


def list_due(args: argparse.Namespace, job: Job, data: Data, now: int) -> Due:
    """List what is due when `now` steps are done; an interval of 0 means at the end only."""

    def is_due(interval: int) -> bool:
        return now == job.steps or (interval > 0 and now % interval == 0)

    return Due(
        logs=is_due(args.log_interval),
        evaluates=is_due(args.eval_interval) and data.valid is not None,
        saves=is_due(args.save_interval),
        keeps=now in job.kept,
    )


def announce(args: argparse.Namespace, session: Session, job: Job) -> None:
    """Say what is about to train."""
    first = "compiling first; " if job.is_compiled else ""
    total = job.facts["parameters"]
    trainable = job.facts["trainable_parameters"]
    what = f"{first}{trainable:,} of {total:,} parameters train for {job.steps} steps"
    session.accelerator.print(f"{args.run_name}: {what} on {args.device} in {args.dtype}")


def make_bar(args: argparse.Namespace, session: Session, job: Job) -> tqdm:
    """Make the progress bar that the loop runs over; it shows on the first process's terminal."""
    done = session.run.record["step"]
    hides = None if session.accelerator.is_main_process else True  # None: if this is no terminal
    steps = range(done, job.steps)
    return tqdm(steps, args.run_name, job.steps, initial=done, disable=hides)


def fetch_losses(run: RunFolder, loop: Loop, norm: Tensor) -> None:
    """Fetch the losses of the last steps from the device; refuse those that are not finite."""
    sums = loop.accelerator.reduce(torch.stack(loop.losses), "sum").tolist()
    loop.losses.clear()
    run.losses += sums
    # A float16 step whose scaled gradients overflow is skipped, and the next scaled less.
    is_finite = norm.isfinite() or loop.accelerator.optimizer_step_was_skipped
    if not (is_finite and all(map(math.isfinite, sums))):
        step = run.record["step"]
        raise Diverged(f"loss {sums[-1]}, gradient norm {norm:.3g} in step {step}")


def log_step(accelerator: Accelerator, run: RunFolder, bar: tqdm, norm: float, rate: float) -> None:
    """Log the steps since the last line: to the folder, a tracker, and the terminal."""
    row = run.log_step(norm, rate)
    accelerator.log(row, step=row["step"])
    text = f"loss {row['loss']:.4f}, {row['tokens_per_second']:,.0f} tokens/s"
    bar.set_postfix_str(text, refresh=False)
    if bar.disable:
        now = row["step"]
        seconds = (bar.total - now) * run.record["train_seconds"] / now
        left = tqdm.format_interval(seconds)
        accelerator.print(f"step {now}/{bar.total}: {text}, {left} left", flush=True)


def log_evaluation(args: argparse.Namespace, session: Session, dataset: TokenDataset) -> None:
    """Evaluate, and log the loss."""
    step = session.run.record["step"]
    loss = evaluate(session.model, dataset, args.batch_size, session.accelerator)
    if not math.isfinite(loss):
        raise Diverged(f"validation loss {loss} after step {step}")
    session.run.log({"step": step, "eval_loss": loss})
    session.run.write(eval_loss=loss)
    session.accelerator.log({"eval_loss": loss}, step=step)


@torch.no_grad()
@torch.compiler.set_stance("force_eager")  # without gradients it would be a second graph
def evaluate(
    model: MiniMindForCausalLM, dataset: TokenDataset, batch_size: int, accelerator: Accelerator
) -> float:
    """Return the mean NLL over the labeled tokens of a data set, in nats a token."""
    batches = list(chunks(dataset.lengths.argsort(kind="stable").tolist(), batch_size))
    share = batches[accelerator.process_index :: accelerator.num_processes]
    total = torch.zeros((), device=accelerator.device)
    model.eval()
    for indices in share:
        batch = send_to_device(collate([dataset[i] for i in indices]), accelerator.device)
        total += model(**batch, num_items_in_batch=1).loss
    model.train()
    return (accelerator.reduce(total, "sum") / int(dataset.targets.sum())).item()


# ---------------------------------------------------------------- saving


def check_weights(trained: dict[str, nn.Parameter], step: int) -> None:
    """Refuse to save what is not finite."""
    if not all(parameter.isfinite().all() for parameter in trained.values()):
        raise Diverged(f"weights are not finite after step {step}")


def save_weights(session: Session, method: Method, folder: Path) -> None:
    """Write a method's weights, or the whole model."""
    if not session.accelerator.is_main_process:
        return
    if method.save_weights is not None:
        method.save_weights(folder)
    else:
        save_model(session.model, session.tokenizer.name_or_path, folder)


def collect_state(loop: Loop) -> dict:
    """Return all that a run continues from, but its progress: the parameters by their names."""
    device = loop.accelerator.device
    scaler = loop.accelerator.scaler
    random = [torch.get_rng_state()]
    if device.type != "cpu":
        random.append(torch.get_device_module(device).get_rng_state())
    return {
        "weights": {name: parameter.detach() for name, parameter in loop.trained.items()},
        "optimizer": loop.optimizer.state_dict(),
        "random": gather_object([random]),  # of every process
        "scaler": scaler.state_dict() if scaler else None,
    }


@torch.no_grad()
def restore_state(state: dict, loop: Loop) -> None:
    """Put back what `collect_state` returned."""
    device = loop.accelerator.device
    for name, parameter in loop.trained.items():
        parameter.copy_(state["weights"][name])
    loop.optimizer.load_state_dict(state["optimizer"])
    random = state["random"][loop.accelerator.process_index]
    torch.set_rng_state(random[0])
    if device.type != "cpu":
        torch.get_device_module(device).set_rng_state(random[1])
    if loop.accelerator.scaler:
        loop.accelerator.scaler.load_state_dict(state["scaler"])


def complete(session: Session, data: Data, method: Method) -> None:
    """Write the weights of a run that came to its end, show answers, and close its record."""
    run, model = session.run, session.model
    save_weights(session, method, run.path)
    if session.accelerator.is_main_process:
        answer_held_out(run, model, session.tokenizer, data.valid)
    run.write(flops=flops_per_token(model, data.train.lengths) * run.record["tokens"])
    run.end("completed")


@torch.compiler.set_stance("force_eager")  # answers grow a token at a time
def answer_held_out(
    run: RunFolder, model: MiniMindForCausalLM, tokenizer: Tokenizer, valid: TokenDataset | None
) -> None:
    """Print greedy answers to held-out conversations; run.json keeps them."""
    print(f"to ask it: python eval_llm.py --model {escape_control(str(run.path))}")
    wanted = vars(run.args).get("show_answers", 0)  # pretraining has no such flag
    count = min(wanted, len(valid or ()))
    if not count:
        return
    prompts = []
    references = []
    for index in range(count):
        ids, labels = valid[index]
        start, end = find_answer(ids, labels)
        prompts.append(ids[:start].tolist())
        references.append(ids[start:end].tolist())
    ends = (tokenizer.eos_token_id,)
    answers = generate(model, prompts, Decoding("greedy"), 0, MAX_NEW_TOKENS, count, ends)
    rows = []
    for prompt, answer, reference in zip(prompts, answers, references, strict=True):
        row = {
            "prompt": read_prompt(tokenizer, prompt),
            "answer": tokenizer.decode(answer, skip_special_tokens=True),
            "reference": tokenizer.decode(reference, skip_special_tokens=True),
        }
        rows.append(row)
        for name, text in row.items():
            print(f"{name:>9}  {escape_control(' '.join(text.split()))}")
    run.write(answers=rows)


def find_answer(ids: np.ndarray, labels: np.ndarray) -> tuple[int, int]:
    """Find the first stretch of labels: the start of an answer, and the end behind it."""
    is_labeled = labels == ids
    changes = np.flatnonzero(np.diff(is_labeled, prepend=False, append=False))
    return int(changes[0]), int(changes[1])
