"""The one training loop, and what the three training scripts share.

Pretraining, full fine-tuning and LoRA differ in their data, their start and which parameters
train; everything from here on (batches, schedule, loss, clipping, precision, evaluation, saving)
is the same code for all three, so a comparison between them is controlled by construction.

A run leaves `<save_dir>/<run_name>/`:

    config.json, model.safetensors, tokenizer   or adapter_config.json, adapter_model.safetensors
    run.json        settings, data and base fingerprints, versions, status, cost, final losses
    metrics.jsonl   a line per log interval and per evaluation
    resume/         full state to continue from with --from_resume
"""

import argparse
import contextlib
import json
import math
import shutil
import signal
import sys
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path

import torch
from accelerate import Accelerator, InitProcessGroupKwargs
from accelerate.utils import set_seed
from torch import nn
from torch.utils.data import DataLoader
from tqdm import tqdm

from dataset.command_line import SettingsError, UserError
from dataset.lm_dataset import (
    IGNORE_INDEX,
    ConversationDataset,
    PackedDataset,
    StepCollator,
    StepSampler,
    collate,
    count_shared,
    data_notes,
    describe_sample,
    load_dataset,
)
from dataset.untrusted import shown
from model.checkpoint import TOKENIZER_DIR, load_model, load_tokenizer
from model.files import read_json, write_text
from model.model_lora import lora_layers
from model.model_minimind import MiniMindForCausalLM, count_parameters, minimind_config
from trainer.arguments import DEFAULT_SHAPE
from trainer.failures import (
    DISK_IS_FULL,
    EXIT_CODES,
    Diverged,
    explain,
    is_lost_peer,
    is_out_of_memory,
    lost_peer,
    stop_on_signals,
    what_is_left,
)
from trainer.machine import (
    can_compile,
    choose_device,
    choose_dtype,
    describe_machine,
    keep_freed_memory,
    peak_memory_bytes,
)
from trainer.run_folder import (
    RunFolder,
    check_state,
    differences,
    git_state,
    printable_settings,
    remove_folder,
)

# Below this many FLOPs, 6 a parameter and token, a run ends before compiling has paid for itself.
COMPILE_FLOPS = {"cpu": 1e14, "cuda": 1e16}
# How long a process of several waits for another one that says nothing: at the start and in a step,
# and while the main process tokenizes. One that dies is noticed at once, by its connections.
PEER_TIMEOUT = timedelta(minutes=10)
TOKENIZING_TIMEOUT = timedelta(hours=12)


# ---------------------------------------------------------------- start


def make_accelerator(args: argparse.Namespace) -> Accelerator:
    """Sets the seed and the device, and resolves `auto` in `args` to what is used."""
    args.device = choose_device(args.device)
    args.dtype = choose_dtype(args.dtype, args.device)
    if args.use_compile == "on" and not can_compile(args.device):
        raise SettingsError(
            "--use_compile on: no compiler (g++ or clang++ on a CPU, gcc or cc on a GPU) or no "
            "Python.h here; install both, or use --use_compile off"
        )
    if args.device == "cpu":
        keep_freed_memory()
    precision = {"float32": "no", "bfloat16": "bf16", "float16": "fp16"}[args.dtype]
    trackers = None if args.report_to == "none" else args.report_to
    accelerator = Accelerator(
        cpu=args.device == "cpu",
        mixed_precision=precision,
        log_with=trackers,
        project_dir=args.save_dir / args.run_name if trackers else None,
        kwargs_handlers=[InitProcessGroupKwargs(timeout=PEER_TIMEOUT)],
    )
    set_seed(args.seed)  # the same on every process, for the same initial weights
    return accelerator


def load_start(args: argparse.Namespace) -> tuple[MiniMindForCausalLM, Path]:
    """The model to train, in float32, and the folder of its tokenizer."""
    shape = {flag: vars(args)[flag] for flag in DEFAULT_SHAPE if vars(args)[flag] is not None}
    start = random_start if args.from_weight == "none" else saved_start
    model, folder = start(args, shape)
    check_length(args.max_seq_len, model.config.max_position_embeddings)
    return model, folder


def random_start(args: argparse.Namespace, shape: dict) -> tuple[MiniMindForCausalLM, Path]:
    """A model of this shape with random weights, for a tokenizer that is there."""
    folder = args.tokenizer_path or TOKENIZER_DIR
    tokenizer = load_tokenizer(folder)
    try:
        config = minimind_config(vocab_size=len(tokenizer), **shape)
    except ValueError as error:
        raise SettingsError(str(error)) from error
    config.pad_token_id = tokenizer.pad_token_id
    config.bos_token_id = tokenizer.bos_token_id
    config.eos_token_id = tokenizer.eos_token_id
    return MiniMindForCausalLM(config), folder


def saved_start(args: argparse.Namespace, shape: dict) -> tuple[MiniMindForCausalLM, Path | str]:
    """A saved model, which must have what of a shape was given, and its tokenizer's folder."""
    path = args.from_weight
    model = load_model(path)
    found = model.config.to_dict() | {"qk_norm": model.config.model_type == "qwen3"}
    for flag, value in shape.items():
        if found[flag] != value:
            raise SettingsError(f"--{flag} {value}: {path} has {found[flag]}; drop the flag")
    folder = args.tokenizer_path or path
    tokenizer = load_tokenizer(folder, model.config.vocab_size)
    if len(tokenizer) < model.config.vocab_size:  # padded, or another's tokenizer
        print(f"note: {path} has {model.config.vocab_size} tokens, {folder} {len(tokenizer)}")
    return model, folder


def check_length(max_seq_len: int, positions: int) -> None:
    """Refuses samples longer than the positions that a model is made for."""
    if max_seq_len > positions:
        raise SettingsError(f"--max_seq_len {max_seq_len}: the model takes {positions} at most")


@contextlib.contextmanager
def main_process_first(accelerator: Accelerator) -> Iterator[None]:
    """The main process does alone what follows, then the others do it, however long that takes.

    accelerate's own wait ends after PEER_TIMEOUT, within which a large corpus is not tokenized.
    """
    if accelerator.num_processes == 1:
        yield
        return
    group = torch.distributed.new_group(backend="gloo", timeout=PEER_TIMEOUT)
    if not accelerator.is_main_process:
        torch.distributed.monitored_barrier(group, timeout=TOKENIZING_TIMEOUT)
    yield
    if accelerator.is_main_process:
        torch.distributed.monitored_barrier(group, timeout=TOKENIZING_TIMEOUT)


def fill_data_paths(args: argparse.Namespace, kind: str, accelerator: Accelerator) -> None:
    """Points a run without `--data_path` to the demo corpus, made when it is missing."""
    if args.data_path is None:
        from dataset.demo import DEMO_FILES, ensure_demo_corpus

        with main_process_first(accelerator):  # which writes it, if need be
            files = ensure_demo_corpus()
        args.data_path = [files[kind]]
        args.eval_data_path = args.eval_data_path or [files[f"{kind}_valid"]]
        accelerator.print(f"no --data_path: using the demo corpus, {DEMO_FILES[kind]}")


def load_data(
    args: argparse.Namespace,
    kind: str,
    tokenizer_dir: Path,
    accelerator: Accelerator,
    max_samples: int | None = None,
) -> tuple[PackedDataset | ConversationDataset, PackedDataset | ConversationDataset | None]:
    """Training and validation data of a stage; the main process tokenizes, the others wait."""
    tokenizer = load_tokenizer(tokenizer_dir)
    with main_process_first(accelerator):
        train = load_dataset(
            kind, args.data_path, tokenizer, args.max_seq_len, max_samples=max_samples
        )
        valid = None
        if args.eval_data_path:
            valid = load_dataset(kind, args.eval_data_path, tokenizer, args.max_seq_len)
            valid.store.info["also_in_training"] = count_shared(valid.store, train.store)
    return train, valid


def show_sample(tokenizer_dir: Path, dataset: PackedDataset | ConversationDataset) -> int:
    """Prints the first sample's tokens beside what each position predicts."""
    print(describe_sample(load_tokenizer(tokenizer_dir), dataset, 0))
    return 0


def compile_blocks(model: MiniMindForCausalLM, mode: str, tokens: float, device: str) -> bool:
    """Compiles the transformer block, once for all layers, if `mode` or the run's size says so.

    `auto` leaves short runs alone, and machines without a compiler; it depends on the settings
    only, never on a clock, so a resumed run computes what the first part computed; and not on what
    trains, so that a comparison of methods on the same data compiles all of them or none.
    """
    total, _ = count_parameters(model)
    earns = 6 * total * tokens >= COMPILE_FLOPS.get(device, math.inf)
    wanted = mode == "on" or (mode == "auto" and earns and can_compile(device))
    if wanted:
        for layer in model.model.layers:
            layer.compile()
    return wanted


# ---------------------------------------------------------------- schedule, groups, cost


def learning_rate_at(
    step: int, steps: int, peak: float, schedule: str, warmup_ratio: float, min_ratio: float
) -> float:
    """The rate of optimizer step `step` (0 to `steps` - 1).

    Linear warm-up to `peak`, then constant, or down to `min_ratio * peak` in a line or half a
    cosine (Loshchilov & Hutter 2016, arXiv 1608.03983, eq. 5).
    """
    warmup = round(steps * warmup_ratio)
    if step < warmup:
        return peak * (step + 1) / warmup
    if schedule == "constant":
        return peak
    progress = (step - warmup) / max(1, steps - 1 - warmup)
    remaining = 1 - progress if schedule == "linear" else (1 + math.cos(math.pi * progress)) / 2
    return peak * (min_ratio + (1 - min_ratio) * remaining)


def same_rate(name: str) -> float:
    """The rate of a parameter over --learning_rate: of every one the same."""
    return 1.0


def parameter_groups(
    model: nn.Module, args: argparse.Namespace, lr_ratio: Callable[[str], float] = same_rate
) -> list[dict]:
    """Trainable parameters as AdamW groups; a group's `lr_ratio` multiplies the scheduled rate.

    Weight decay falls on matrices outside the embedding.

    Args:
        lr_ratio: a parameter's rate over --learning_rate, by its name.
    """
    decayed, others = defaultdict(list), defaultdict(list)  # by their ratio
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            in_vocabulary = name.startswith(("model.embed_tokens", "lm_head"))
            kind = decayed if parameter.ndim == 2 and not in_vocabulary else others
            kind[lr_ratio(name)].append(parameter)
    return [
        {"params": members, "weight_decay": decay, "lr_ratio": ratio}
        for kind, decay in ((decayed, args.weight_decay), (others, 0.0))
        for ratio, members in sorted(kind.items())
    ]


def check_weight_decay(model: nn.Module, args: argparse.Namespace) -> None:
    """Refuses a weight decay that no trainable parameter would get."""
    decays = any(group["weight_decay"] for group in parameter_groups(model, args))
    if args.weight_decay and not decays:
        raise SettingsError(
            f"--weight_decay {args.weight_decay}: acts on matrices outside the embedding, of which "
            "none trains; drop it"
        )


def flops_per_token(model: MiniMindForCausalLM, sequence_length: float) -> float:
    """Model FLOPs of training on one token, forward and backward.

    2 N forward, 2 N for the gradients of activations and 2 N_trainable for those of weights
    (Kaplan et al. 2020, arXiv 2001.08361, section 2.1), and 6 L D T for causal attention. Nominal:
    the head counts for every token, though the loss skips tokens without a label.
    """
    total, trainable = count_parameters(model)
    config = model.config
    attention = 6 * config.num_hidden_layers * config.hidden_size * sequence_length
    return 4 * total + 2 * trainable + attention


# ---------------------------------------------------------------- the loop


@dataclass
class Progress:
    """Where a run stands; saved with the resume state as JSON, whose floats are exact."""

    step: int = 0
    tokens: int = 0
    labeled_tokens: int = 0
    seconds: float = 0.0
    window_loss: float = 0.0  # this and the next three: summed since the last log line
    window_steps: int = 0
    window_tokens: int = 0
    window_seconds: float = 0.0

    def add(self, loss: float, tokens: int, labeled: int, seconds: float) -> None:
        """Counts one optimizer step."""
        self.step += 1
        self.tokens += tokens
        self.labeled_tokens += labeled
        self.seconds += seconds
        self.window_loss += loss
        self.window_steps += 1
        self.window_tokens += tokens
        self.window_seconds += seconds


@dataclass(frozen=True)
class Job:
    """What a stage hands to the loop."""

    args: argparse.Namespace
    accelerator: Accelerator
    model: MiniMindForCausalLM  # with the right parameters frozen, before wrapping
    train_set: PackedDataset | ConversationDataset
    eval_set: PackedDataset | ConversationDataset | None
    run: RunFolder
    save: Callable[[MiniMindForCausalLM, Path], None]  # writes the final weights
    facts: dict  # what else run.json should tell: base, adapter...
    lr_ratio: Callable[[str], float] = same_rate  # of a parameter, by its name


def train(job: Job) -> int:
    """Trains, evaluates and saves; returns the exit code.

    Whatever ends the run, `run.json` says how, and only a run that came to its end is said to be
    completed.

    Raises:
        SettingsError: the run cannot be continued, memory ran out, or a data process or another
            training process died.
        OSError: the disk is full or cannot be written to.
    """
    check_weight_decay(job.model, job.args)
    make_run_folder(job)
    progress = Progress()
    try:
        return run_loop(job, progress)
    except UserError:
        raise  # refused before the first step: the run is what it was
    except Diverged as error:
        # To continue would repeat it: the settings must stay what they were.
        advice = "start anew with --overwrite and a lower --learning_rate or more --warmup_ratio"
        return end_run(job, progress, "diverged", f"{error}; {advice}")
    except KeyboardInterrupt:
        return end_run(job, progress, "interrupted", f"at once; {what_is_left(job.run)}")
    except BaseException as error:
        record_failure(job, progress, error)
        explanation = explain(error, progress.step + 1, job.run)
        if explanation is None:
            raise
        raise explanation from error


def run_loop(job: Job, progress: Progress) -> int:
    """Prepares, takes all steps, and saves; the exit code of a run that ended in order."""
    args, accelerator, run = job.args, job.accelerator, job.run
    stop = stop_on_signals(accelerator.num_processes)
    lengths = job.train_set.lengths.astype(float)
    # A token's attention costs its sample's length, and long samples have more tokens.
    per_token = flops_per_token(job.model, float((lengths**2).sum() / lengths.sum()))
    steps_per_epoch = -(-len(lengths) // global_batch_size(job))
    # Rounded first: 1.1 epochs of 10 steps are 11, not the 11.000000000000002 of the product.
    steps = args.max_steps or max(1, math.ceil(round(args.epochs * steps_per_epoch, 6)))
    tokens = float(lengths.sum()) * steps / steps_per_epoch
    compiled = compile_blocks(job.model, args.use_compile, tokens, args.device)
    if args.from_resume:
        check_resume(job, compiled)
        # Before anything can fail, or run.json would say that the run stands at step 0.
        vars(progress).update(read_json(run.resume_state() / "progress.json"))
    model, optimizer = prepare(job)
    if args.from_resume:
        restore(job, progress)
    describe_run(job, progress.step, steps, steps_per_epoch, compiled)
    with make_bar(job, progress.step, steps) as bar:
        take_steps(job, progress, model, optimizer, steps, stop, bar)
    if progress.step < steps:
        return end_run(job, progress, "interrupted", what_is_left(run))
    if accelerator.is_main_process:
        job.save(accelerator.unwrap_model(model), run.path)
    run.write(flops=per_token * progress.tokens)
    return end_run(job, progress, "completed", f"saved to {run.path}")


def take_steps(
    job: Job,
    progress: Progress,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    steps: int,
    stop: list[int],
    bar: tqdm,
) -> None:
    """The loop: one iteration is one optimizer step. Ends early, its state saved, on a signal.

    The loss of a step is the mean over all its labeled tokens: those of every micro-batch on every
    process, so that neither accumulation nor the number of processes changes what a batch means.

    Raises:
        Diverged: before anything of the step is saved.
    """
    args, accelerator = job.args, job.accelerator
    model.train()
    clock = time.perf_counter()  # runs while training and loading, not in evaluation or saving
    for micro_batches in make_loader(job, progress.step, steps):
        rate = learning_rate_at(
            progress.step,
            steps,
            args.learning_rate,
            args.lr_schedule,
            args.warmup_ratio,
            args.min_lr_ratio,
        )
        loss, norm, tokens, labeled = train_step(job, model, optimizer, micro_batches, rate)
        progress.add(loss, tokens, labeled, time.perf_counter() - clock)
        bar.update()
        # A float16 step whose scaled gradients overflow is skipped, and the next scaled less.
        skipped = accelerator.optimizer_step_was_skipped
        if not math.isfinite(loss) or not (math.isfinite(norm) or skipped):
            raise Diverged(f"loss {loss}, gradient norm {norm} in step {progress.step}")
        last = progress.step == steps
        if due(progress.step, args.log_interval) or last:
            log_step(job, progress, norm, rate, steps, bar)
        if job.eval_set is not None and (due(progress.step, args.eval_interval) or last):
            log_evaluation(job, model, progress.step, bar)
        interrupted = any_process(accelerator, bool(stop)) and not last
        if interrupted or due(progress.step, args.save_interval) or last:
            check_weights(model, progress.step)
            save_state(job, progress)
        if interrupted:
            return
        clock = time.perf_counter()


def check_weights(model: nn.Module, step: int) -> None:
    """Refuses to save what the last update broke: its loss was taken before it.

    Raises:
        Diverged: a weight is infinite or NaN.
    """
    for name, parameter in model.named_parameters():
        if parameter.requires_grad and not parameter.isfinite().all():
            raise Diverged(f"{name} is not finite after the update of step {step}")


def due(step: int, interval: int) -> bool:
    """Whether something that happens every `interval` steps happens now; 0 is never."""
    return interval > 0 and step % interval == 0


def global_batch_size(job: Job) -> int:
    """Samples of one optimizer step, over all processes."""
    return job.args.batch_size * job.args.accumulation_steps * job.accelerator.num_processes


def prepare(job: Job) -> tuple[nn.Module, torch.optim.Optimizer]:
    """Model and optimizer on the device, wrapped for precision and processes; trackers started."""
    args, accelerator = job.args, job.accelerator
    groups = parameter_groups(job.model, args, job.lr_ratio)
    # The gradient scaler of float16 must see whether a step was skipped; a fused step hides it.
    fused = args.dtype != "float16"
    optimizer = torch.optim.AdamW(groups, lr=args.learning_rate, fused=fused)
    if args.report_to != "none":
        settings = {name: str(value) for name, value in printable_settings(args).items()}
        accelerator.init_trackers("minimind-lora-study", config=settings)
    set_seed(args.seed, device_specific=True)  # dropout differs between processes
    return accelerator.prepare(job.model, optimizer)


def make_loader(job: Job, first_step: int, steps: int) -> DataLoader:
    """One loader for the whole run, whose workers live as long: an item is a step's batches."""
    args, accelerator = job.args, job.accelerator
    sampler = StepSampler(
        job.train_set.lengths,
        args.batch_size,
        args.accumulation_steps,
        accelerator.num_processes,
        accelerator.process_index,
        args.seed,
        first_step,
        steps,
    )
    return DataLoader(
        PlannedSteps(),
        batch_size=None,
        sampler=sampler,
        collate_fn=StepCollator(job.train_set, padding_id(job)),
        num_workers=args.num_workers,
        persistent_workers=args.num_workers > 0,
        worker_init_fn=ignore_signals,
        pin_memory=args.device == "cuda",
        # The loader draws a number when it starts; not from the state that a resumed run restored.
        generator=torch.Generator(),
    )


def padding_id(job: Job) -> int:
    """What batches are padded with; under causal attention no real token sees it."""
    return job.model.config.pad_token_id or 0


def make_bar(job: Job, first_step: int, steps: int) -> tqdm:
    """The progress bar of the main process; none where output is no terminal."""
    return tqdm(
        total=steps,
        initial=first_step,
        desc=job.args.run_name,
        unit="step",
        disable=None if job.accelerator.is_main_process else True,
        file=sys.stderr,
    )


class PlannedSteps(torch.utils.data.Dataset):
    """Hands the sampler's plan of a step to the collator, which fetches its samples."""

    def __getitem__(self, step: list[list[int]]) -> list[list[int]]:
        return step


def train_step(
    job: Job,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    micro_batches: list[dict[str, torch.Tensor]],
    rate: float,
) -> tuple[float, float, int, int]:
    """One optimizer step; returns loss (nats a labeled token), gradient norm, and token counts."""
    accelerator = job.accelerator
    # Counted after the shift: the first token of a sample is never a target.
    counts = torch.tensor(
        [
            sum(int(batch["num_tokens"]) for batch in micro_batches),
            sum(int((batch["labels"][:, 1:] != IGNORE_INDEX).sum()) for batch in micro_batches),
        ],
        device=accelerator.device,
    )
    tokens, labeled = accelerator.reduce(counts, "sum").tolist()
    for group in optimizer.param_groups:
        group["lr"] = rate * group["lr_ratio"]
    total = torch.zeros((), device=accelerator.device)
    for position, batch in enumerate(micro_batches):
        is_last = position == len(micro_batches) - 1
        with contextlib.nullcontext() if is_last else accelerator.no_sync(model):
            loss = model(
                input_ids=batch["input_ids"].to(accelerator.device, non_blocking=True),
                labels=batch["labels"].to(accelerator.device, non_blocking=True),
                num_items_in_batch=labeled,
            ).loss
            # DDP averages gradients over processes; the loss is a sum over them.
            accelerator.backward(loss * accelerator.num_processes)
        total += loss.detach()
    limit = job.args.grad_clip or math.inf
    norm = accelerator.clip_grad_norm_(model.parameters(), limit)
    optimizer.step()
    optimizer.zero_grad()
    return accelerator.reduce(total, "sum").item(), float(norm), tokens, labeled


@torch.no_grad()
def evaluate(job: Job, model: nn.Module) -> float:
    """Mean NLL over the labeled tokens of the validation set, in nats a token."""
    accelerator, dataset = job.accelerator, job.eval_set
    size = job.args.batch_size
    order = dataset.lengths.argsort(kind="stable").tolist()
    batches = [order[start : start + size] for start in range(0, len(order), size)]
    totals = torch.zeros(2, dtype=torch.float64)
    # Out of DDP, whose forward waits for the other processes: here one may have no batch left.
    model = accelerator.unwrap_model(model)
    model.eval()
    for indices in batches[accelerator.process_index :: accelerator.num_processes]:
        batch = collate([dataset[i] for i in indices], padding_id(job))
        labels = batch["labels"]
        loss = model(
            input_ids=batch["input_ids"].to(accelerator.device),
            labels=labels.to(accelerator.device),
            num_items_in_batch=1,
        ).loss
        totals += torch.tensor([float(loss), int((labels[:, 1:] != IGNORE_INDEX).sum())])
    model.train()
    # Over processes in float32: not every device has float64.
    summed = accelerator.reduce(totals.float().to(accelerator.device), "sum")
    return (summed[0] / summed[1]).item()


def log_step(
    job: Job,
    progress: Progress,
    norm: float,
    rate: float,
    steps: int,
    bar: tqdm,
) -> None:
    """Writes a line of metrics, loss and speed since the last one, and shows it in the bar."""
    loss = progress.window_loss / progress.window_steps
    tokens_per_second = progress.window_tokens / progress.window_seconds
    progress.window_loss, progress.window_steps = 0.0, 0
    progress.window_tokens, progress.window_seconds = 0, 0.0
    row = {
        "step": progress.step,
        "tokens": progress.tokens,
        "loss": loss,
        "grad_norm": norm if math.isfinite(norm) else None,  # of a float16 step that was skipped
        "learning_rate": rate,
        "tokens_per_second": round(tokens_per_second, 1),
    }
    job.run.log(row)
    job.run.record["train_loss"] = loss
    job.accelerator.log({k: v for k, v in row.items() if k != "step"}, step=progress.step)
    bar.set_postfix(loss=f"{loss:.3f}", tok_s=f"{tokens_per_second:,.0f}", refresh=False)
    if bar.disable and job.accelerator.is_main_process:
        print(f"step {progress.step}/{steps}  loss {loss:.4f}  {tokens_per_second:,.0f} tokens/s")


def log_evaluation(job: Job, model: nn.Module, step: int, bar: tqdm) -> None:
    """Writes the validation loss as a line of metrics and shows it in the bar.

    Raises:
        Diverged: it is infinite or NaN.
    """
    loss = evaluate(job, model)
    if not math.isfinite(loss):
        raise Diverged(f"validation loss {loss} after step {step}")
    job.run.log({"step": step, "eval_loss": loss})
    job.run.write(eval_loss=loss)
    job.accelerator.log({"eval_loss": loss}, step=step)
    bar.set_postfix(eval_loss=f"{loss:.3f}", refresh=False)


def describe_run(
    job: Job, first_step: int, steps: int, steps_per_epoch: int, compiled: bool
) -> None:
    """Writes everything known before the first step to `run.json` and says it in a line.

    Code and machine are those that the run began with; a list under `resumed` tells where each
    continuation began, and on what.
    """
    args = job.args
    total, trainable = count_parameters(job.model)
    origin = code_and_machine(args.device)
    if args.from_resume:
        resumed = [*job.run.record.get("resumed", []), {"step": first_step, **origin}]
        origin = {"resumed": resumed}
    job.run.write(
        status="running",
        settings=printable_settings(args),
        **job.facts,
        parameters=total,
        trainable_parameters=trainable,
        steps=steps,
        steps_per_epoch=steps_per_epoch,
        processes=job.accelerator.num_processes,
        compiled=compiled,
        train_data=job.train_set.store.info,
        eval_data=job.eval_set.store.info if job.eval_set is not None else None,
        reason=None,
        **origin,
    )
    if job.accelerator.is_main_process:
        print(
            f"{args.run_name}: {trainable:,} of {total:,} parameters train for {steps} steps on "
            f"{args.device} in {args.dtype}{', compiled' if compiled else ''}"
        )
        for line in trained_parts(job.model) if trainable < total else []:
            print(line)
        for dataset in filter(None, (job.train_set, job.eval_set)):
            for note in data_notes(dataset.store.info):
                print(shown(note))
        if job.eval_set is None:
            print("no --eval_data_path: no validation loss")


def trained_parts(model: nn.Module) -> list[str]:
    """What trains of a model that does not train whole, such as `adapted: 4 q_proj, 4 o_proj`.

    A line for the adapted linears and one for the parameters that train themselves, by their last
    names and how often these occur.
    """
    adapted = Counter(path.rpartition(".")[2] for path, _ in lora_layers(model))
    trained = Counter(
        ".".join(name.split(".")[-2:])
        for name, parameter in model.named_parameters()
        if parameter.requires_grad and ".lora_" not in name
    )
    return [
        f"{title}: {', '.join(f'{count} {name}' for name, count in counts.items())}"
        for title, counts in (("adapted", adapted), ("trained", trained))
        if counts
    ]


def code_and_machine(device: str) -> dict:
    """What a run's last bits depend on besides its settings and data."""
    return {"git": git_state(), "machine": describe_machine(device)}


def end_run(job: Job, progress: Progress, status: str, message: str) -> int:
    """Writes the last `run.json`, says how the run ended, and returns the exit code."""
    memory = max(job.run.record.get("peak_memory_bytes", 0), peak_memory_bytes(job.args.device))
    job.run.write(
        status=status,
        reason=None if status == "completed" else message,
        step=progress.step,
        tokens=progress.tokens,
        labeled_tokens=progress.labeled_tokens,
        train_seconds=round(progress.seconds, 2),
        tokens_per_second=round(progress.tokens / max(progress.seconds, 1e-9), 1),
        peak_memory_bytes=memory,
    )
    job.accelerator.end_training()
    if job.accelerator.is_main_process:
        loss = job.run.record.get("eval_loss")
        reached = f", validation loss {loss:.4f}" if loss is not None else ""
        print(f"{job.args.run_name}: {status} at step {progress.step}{reached}; {message}")
    return EXIT_CODES[status]


def record_failure(job: Job, progress: Progress, error: BaseException) -> None:
    """Ends a run that an error stopped, as far as the disk lets it."""
    status = "oom" if is_out_of_memory(error) else "failed"
    told = lost_peer(error) if is_lost_peer(error) else f"{type(error).__name__}: {error}"
    try:
        end_run(job, progress, status, told)
    except OSError as another:
        print(f"run.json still says running: {another}", file=sys.stderr)


def ignore_signals(_: int) -> None:
    """For a data process: a signal to the whole group is for the main process to act on."""
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    signal.signal(signal.SIGINT, signal.SIG_IGN)


def any_process(accelerator: Accelerator, flag: bool) -> bool:
    """Whether `flag` holds on some process: a signal may reach them at different steps."""
    if accelerator.num_processes == 1:
        return flag
    return accelerator.reduce(torch.tensor(int(flag), device=accelerator.device), "sum").item() > 0


def make_run_folder(job: Job) -> None:
    """Makes the folder of a new run, in place of one that `--overwrite` gives up."""
    job.accelerator.wait_for_everyone()  # every process has looked before one of them makes it
    if job.run.is_main and not job.args.from_resume:
        job.run.create(job.args.overwrite)
    job.accelerator.wait_for_everyone()


# ---------------------------------------------------------------- resume


def save_state(job: Job, progress: Progress) -> None:
    """Writes the resume state aside and moves it into place; the previous one survives a kill.

    Raises:
        OSError: it cannot be written; the previous state is still in place.
    """
    accelerator, run = job.accelerator, job.run
    if accelerator.is_main_process:
        remove_folder(run.state_aside)
    accelerator.wait_for_everyone()
    try:
        # torch's format keeps the tie of head and embedding, which safetensors drops and reports.
        accelerator.save_state(str(run.state_aside), safe_serialization=False)
        accelerator.wait_for_everyone()
        if accelerator.is_main_process:
            write_text(run.state_aside / "progress.json", json.dumps(vars(progress)))
            run.keep_state()
    except (OSError, RuntimeError) as error:
        if isinstance(error, RuntimeError) and DISK_IS_FULL not in str(error):
            raise
        free = shutil.disk_usage(run.path).free
        shutil.rmtree(run.state_aside, ignore_errors=True)  # room for run.json to tell of it
        raise OSError(
            f"{run.state_aside}: not written, with {free:,} bytes free on that disk ({error})"
        ) from error
    accelerator.wait_for_everyone()


def check_resume(job: Job, compiled: bool) -> None:
    """Refuses to go on with what is not the run's, or from a state that is damaged.

    Raises:
        SettingsError: the data, the base, the number of processes or whether the model is compiled
            is not what it was.
        CheckpointError: the state is damaged.
    """
    run, record = job.run, job.run.record
    now = {
        "processes": job.accelerator.num_processes,
        "compiled": compiled,
        "train_data": job.train_set.store.info,
        "eval_data": job.eval_set.store.info if job.eval_set is not None else None,
        "base_fingerprint": job.facts.get("base_fingerprint"),
    }
    for name, value in now.items():
        difference = next(differences(name, record.get(name), value), None)
        if difference is not None:
            raise SettingsError(
                f"--from_resume: {difference}, by {run.path / 'run.json'}; restore what changed, "
                "or start another run"
            )
    check_state(run.resume_state())


def restore(job: Job, progress: Progress) -> None:
    """Loads the resume state into model and optimizer, and cuts what was logged after it."""
    run = job.run
    state = run.resume_state()
    job.accelerator.load_state(str(state))
    run.rewind(progress.step)
    run.remove_leftovers()
    if job.accelerator.is_main_process:
        print(f"{job.args.run_name}: resumed from {state} at step {progress.step}")
        before = {name: run.record.get(name) for name in ("git", "machine")}
        for difference in differences("run.json", before, code_and_machine(job.args.device)):
            print(f"note: {difference}; the last bits may differ from an uninterrupted run's")
