"""The one training loop, and what the three training scripts share.

Pretraining, full fine-tuning and LoRA differ in their data, their start and which parameters
train. Everything in `train` (batches, schedule, loss, clipping, precision, evaluation, saving) is
the same code for all three, so a comparison between them is controlled by construction.
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
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
import torch
from accelerate import Accelerator, PartialState
from accelerate.utils import gather_object, send_to_device, set_seed
from torch import nn
from torch.optim import AdamW, Optimizer
from torch.utils.data import DataLoader
from tqdm import tqdm
from transformers import PreTrainedTokenizerFast as Tokenizer

from dataset.lm_dataset import StepPlan, TokenDataset, chunks, collate, load_dataset, plan_shapes
from model.checkpoint import load_model, load_tokenizer, save_model, weights_fingerprint
from model.files import UserError, escape_control
from model.generation import MAX_NEW_TOKENS, Decoding, generate
from model.model_minimind import DEFAULT_SHAPE, MiniMindForCausalLM, minimind_config
from trainer.arguments import DTYPES
from trainer.run_folder import EXIT_CODES, RunFolder

# Run FLOPs (6 a parameter and token) that repay compiling, which takes 15 to 25 s at xs on a CPU.
COMPILE_FLOPS = {"cpu": 2e13, "cuda": 1e16}


def start_run(args: argparse.Namespace) -> tuple[Accelerator, RunFolder]:
    """Set up accelerate, seeds and the run's folder; exit if the run is complete already."""
    accelerator = Accelerator(
        cpu=args.device == "cpu",
        mixed_precision=DTYPES[args.dtype],
        log_with=None if args.report_to == "none" else args.report_to,
        project_dir=args.save_dir / args.run_name,
    )
    set_seed(args.seed)  # the same on every process, for the same initial weights
    run = RunFolder(args, accelerator.is_main_process)
    accelerator.wait_for_everyone()  # each has looked for the folder before the first makes it
    if run.record.get("status") == "completed":
        accelerator.print(f"{args.run_name}: complete; --overwrite starts it again")
        raise SystemExit(0)
    return accelerator, run


def load_start(args: argparse.Namespace) -> tuple[MiniMindForCausalLM, Tokenizer, str | None]:
    """Load the model to train, in float32, its tokenizer, and the fingerprint of given weights."""
    shape = {flag: getattr(args, flag) for flag in DEFAULT_SHAPE}
    if args.from_weight == "none":
        tokenizer = load_tokenizer(args.tokenizer_path)
        config = minimind_config(vocab_size=len(tokenizer), **shape)
        return MiniMindForCausalLM(config), tokenizer, None
    model = load_model(args.from_weight)
    PartialState().print(f"base: {args.from_weight}, {model.num_parameters():,} parameters")
    found = model.config.to_dict() | {"qk_norm": model.config.model_type == "qwen3"}
    for flag, value in shape.items():
        if value not in (None, found[flag]):
            raise UserError(f"--{flag} {value}: the weights have {found[flag]}; drop the flag")
    tokenizer = load_tokenizer(args.tokenizer_path or args.from_weight, model.config.vocab_size)
    return model, tokenizer, weights_fingerprint(model)


def load_data(
    args: argparse.Namespace, kind: str, tokenizer: Tokenizer, accelerator: Accelerator
) -> tuple[TokenDataset, TokenDataset | None]:
    """Load training and held-out data; of several processes the first one tokenizes."""
    load = partial(load_dataset, kind, tokenizer=tokenizer, max_seq_len=args.max_seq_len)
    train_set = load(args.data_path, max_samples=vars(args).get("max_train_samples"))
    eval_set = load(args.eval_data_path) if args.eval_data_path else None
    if args.show_sample:
        print(train_set.describe(0, tokenizer))
        raise SystemExit(0)
    for dataset in filter(None, (train_set, eval_set)):
        info, files = dataset.info, " ".join(file["name"] for file in dataset.info["files"])
        lost = f"{info['truncated']:,} cut, {info['dropped_without_labels']:,} without an answer"
        accelerator.print(escape_control(f"{files}: {info['records']:,} records, {lost}"))
    return train_set, eval_set


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
    remaining = 1 - progress if schedule == "linear" else (1 + math.cos(math.pi * progress)) / 2
    return peak * (min_ratio + (1 - min_ratio) * remaining)


def parameter_groups(
    model: nn.Module, weight_decay: float, lr_ratio: Callable[[str], float]
) -> list[dict]:
    """Group trainable parameters for AdamW; weight decay is for matrices outside the embedding."""
    groups = defaultdict(list)
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            is_plain = parameter.ndim != 2 or name.startswith(("model.embed_tokens", "lm_head"))
            groups[0.0 if is_plain else weight_decay, lr_ratio(name)].append(parameter)
    keys = sorted(groups, reverse=True)
    if keys[0][0] < weight_decay:
        raise UserError(f"--weight_decay {weight_decay}: acts on no weight that trains; drop it")
    return [{"params": groups[key], "weight_decay": key[0], "lr_ratio": key[1]} for key in keys]


def flops_per_token(model: MiniMindForCausalLM, lengths: np.ndarray) -> float:
    """Count the FLOPs of training on one token, forward and backward, nominally.

    2 N forward, 2 N for the gradients of activations and 2 N_trainable for those of weights
    (Kaplan et al. 2020, arXiv 2001.08361, section 2.1), and 6 L D T for causal attention.
    """
    total, trainable = model.num_parameters(), model.num_parameters(only_trainable=True)
    # A token's attention costs its sample's length, and long samples have more tokens.
    length = float((lengths.astype(float) ** 2).sum() / lengths.sum())
    attention = 6 * model.config.num_hidden_layers * model.config.hidden_size * length
    return 4 * total + 2 * trainable + attention


def compile_loss(
    model: MiniMindForCausalLM, args: argparse.Namespace, tokens: float, processes: int
) -> bool:
    """Compile forward pass and loss as one graph, if --use_compile or the run's size says so.

    `auto` looks at the base's size and the tokens, so a comparison compiles all methods or none.
    """
    header, device = Path(sysconfig.get_paths()["include"]) / "Python.h", args.device
    is_able = header.is_file() and shutil.which("g++" if device == "cpu" else "gcc")
    base = sum(p.numel() for name, p in model.named_parameters() if ".lora_" not in name)
    earns = 6 * base * tokens >= COMPILE_FLOPS.get(device, math.inf)
    is_wanted = args.use_compile == "on" or (args.use_compile == "auto" and earns and bool(is_able))
    if is_wanted:
        # One graph for all shapes; on CUDA, where few shapes are planned, one each, and launched as
        # a whole. Such a launch overwrites gradients, so they must not add up over micro-batches.
        replays = device == "cuda" and args.accumulation_steps == processes == 1
        options = {"dynamic": device != "cuda", "mode": "reduce-overhead" if replays else None}
        model.sum_nats = torch.compile(model.sum_nats, fullgraph=True, **options)
    return is_wanted


def stop_on_signals(processes: int) -> list[int]:
    """Return a list that SIGTERM or Ctrl-C appends to; a second Ctrl-C stops at once.

    Not with several processes: there the terminal and torchrun both pass the first one on.
    """
    received: list[int] = []

    def note(number: int, _: object) -> None:
        if number == signal.SIGINT and number in received and processes == 1:
            raise KeyboardInterrupt
        received.append(number)
        os.write(2, b"\nstopping: the state is saved first\n")  # print may be in the middle of one

    signal.signal(signal.SIGTERM, note)
    signal.signal(signal.SIGINT, note)
    return received


def ignore_signals(_: int) -> None:
    """Ignore signals in a data process: the main process handles them."""
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    signal.signal(signal.SIGINT, signal.SIG_IGN)


def train(
    args: argparse.Namespace,
    accelerator: Accelerator,
    run: RunFolder,
    model: MiniMindForCausalLM,
    tokenizer: Tokenizer,
    train_set: TokenDataset,
    eval_set: TokenDataset | None,
    facts: dict,
    save_weights: Callable[[Path], None] | None = None,
    lr_ratio: Callable[[str], float] = lambda name: 1.0,
) -> int:
    """Train, evaluate and save; return the exit code.

    The loss of a step is the mean over all its labeled tokens, those of every micro-batch on every
    process: neither accumulation nor the number of processes changes what a batch means.

    Args:
        facts: what makes the run what it is besides flags: stage, fingerprint of the base.
        save_weights: writes an adapter to a folder; by default the whole model is saved.
        lr_ratio: a parameter's rate over --learning_rate, by its name.
    """
    save_weights = save_weights or partial(save_model, model, tokenizer.name_or_path)
    device, processes, rank = args.device, accelerator.num_processes, accelerator.process_index
    sizes = (args.batch_size, args.accumulation_steps)
    plan = StepPlan(train_set.lengths, *sizes, args.seed, processes)
    # Epochs are rounded first: 1.1 of 10 steps are 11, not 11.000000000000002.
    steps = args.max_steps or max(1, math.ceil(round(args.epochs * plan.steps_per_epoch, 6)))
    kept = {round(steps * (i + 1) / args.keep_checkpoints) for i in range(args.keep_checkpoints)}
    tokens = float(train_set.lengths.sum()) * steps / plan.steps_per_epoch
    is_compiled = compile_loss(model, args, tokens, processes)
    shapes = plan_shapes(plan, train_set.targets, steps) if is_compiled and device == "cuda" else []
    fill = partial(collate, rows=args.batch_size if is_compiled else 0, shapes=shapes)
    total, trainable = model.num_parameters(), model.num_parameters(only_trainable=True)
    groups = parameter_groups(model, args.weight_decay, lr_ratio)
    schedule = (args.learning_rate, args.lr_schedule, args.warmup_ratio, args.min_lr_ratio)
    facts = facts | {
        "processes": processes,
        "parameters": total,
        "trainable_parameters": trainable,
        "steps": steps,
        "steps_per_epoch": plan.steps_per_epoch,
        "compiled": is_compiled,
        "train_data": train_set.info,
        "eval_data": eval_set.info if eval_set is not None else None,
    }
    state, record = run.begin(facts), run.record
    summary = "compiling first; " * is_compiled + f"{trainable:,} of {total:,} parameters train"
    accelerator.print(f"{args.run_name}: {summary} for {steps} steps on {device} in {args.dtype}")

    with run.record_end():
        # The gradient scaler of float16 must see whether a step was skipped; a fused step hides it.
        optimizer = AdamW(groups, args.learning_rate, fused=args.dtype != "float16")
        settings = {name: str(value) for name, value in run.record["settings"].items()}
        accelerator.init_trackers("minimind-lora-study", config=settings)  # none by default
        set_seed(args.seed, device_specific=True)  # dropout differs between processes
        trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
        wrapped, optimizer = accelerator.prepare(model, optimizer)
        wrapped.train()
        clock = time.perf_counter()  # stands still in evaluation and saving
        if is_compiled and not shapes:
            # Code for all sizes depends on those that it is made for: here they are the same in a
            # resumed run, and no 2 of them are equal.
            sample = (np.zeros(256, np.int64),) * 2
            batch = send_to_device(fill([sample], rows=min(args.batch_size, 8)), accelerator.device)
            accelerator.backward(wrapped(**batch, num_items_in_batch=1).loss)
            optimizer.zero_grad()
        if state is not None:
            restore_state(state, trained, optimizer, accelerator)
        todo = range(record["step"], steps)
        loader = DataLoader(
            train_set,
            batch_sampler=(micro for step in todo for micro in plan.micro_batches(step, rank)),
            collate_fn=fill,
            num_workers=args.num_workers,
            worker_init_fn=ignore_signals,
            pin_memory=device == "cuda",
            # The loader draws a number when it starts; not from the state that was restored.
            generator=torch.Generator(),
        )
        micro_batches, losses = iter(loader), []  # losses stay on the device between log lines
        hidden = None if accelerator.is_main_process else True  # None: if this is no terminal
        bar = tqdm(todo, args.run_name, steps, initial=record["step"], disable=hidden)
        stop = stop_on_signals(processes)
        for step in bar:
            rate = learning_rate_at(step, steps, *schedule)
            for group in optimizer.param_groups:
                group["lr"] = rate * group["lr_ratio"]
            labeled = int(train_set.targets[plan[step]].sum())
            parts = len(plan.micro_batches(step, rank))
            loss = torch.zeros((), device=accelerator.device)
            for part in range(1, parts + 1):
                batch = send_to_device(next(micro_batches), accelerator.device, non_blocking=True)
                # Processes exchange gradients after the last part.
                with accelerator.no_sync(wrapped) if part < parts else contextlib.nullcontext():
                    nats = wrapped(**batch, num_items_in_batch=labeled).loss
                    # Processes average their gradients, but the loss is a sum over them.
                    accelerator.backward(nats * processes)
                loss += nats.detach()
            norm = accelerator.clip_grad_norm_(wrapped.parameters(), args.grad_clip or math.inf)
            optimizer.step()
            optimizer.zero_grad()
            losses.append(loss)
            record["step"] = now = step + 1
            record["tokens"] += int(train_set.lengths[plan[step]].sum())
            record["labeled_tokens"] += labeled

            intervals = (args.log_interval, args.save_interval, args.eval_interval)  # 0: at the end
            logs, saves, evaluates = (now == steps or (n and now % n == 0) for n in intervals)
            if stop:
                accelerator.set_trigger()
            # Several processes ask each other at log lines alone: that waits for the device.
            stops = bool(stop) if processes == 1 else logs and accelerator.check_trigger()
            if not (logs or evaluates or saves or stops or now in kept):
                continue
            sums = accelerator.reduce(torch.stack(losses), "sum").tolist()
            losses.clear()
            run.losses += sums
            record["train_seconds"] += time.perf_counter() - clock
            # A float16 step whose scaled gradients overflow is skipped, and the next scaled less.
            is_finite = norm.isfinite() or accelerator.optimizer_step_was_skipped
            if not (is_finite and all(map(math.isfinite, sums))):
                raise FloatingPointError(f"loss {sums[-1]}, gradient norm {norm:.3g} in step {now}")
            if logs:
                row = run.log_step(norm.item(), rate)
                accelerator.log(row, step=now)
                text = f"loss {row['loss']:.4f}, {row['tokens_per_second']:,.0f} tokens/s"
                bar.set_postfix_str(text, refresh=False)
                if bar.disable:
                    left = tqdm.format_interval((steps - now) * record["train_seconds"] / now)
                    accelerator.print(f"step {now}/{steps}: {text}, {left} left", flush=True)
            if evaluates and eval_set is not None:
                eval_loss = evaluate(model, eval_set, args.batch_size, accelerator)
                if not math.isfinite(eval_loss):
                    raise FloatingPointError(f"validation loss {eval_loss} after step {now}")
                run.log({"step": now, "eval_loss": eval_loss})
                run.write(eval_loss=eval_loss)
                accelerator.log({"eval_loss": eval_loss}, step=now)
            keeps = saves or stops or now in kept
            if keeps and not all(parameter.isfinite().all() for parameter in trained.values()):
                raise FloatingPointError(f"weights are not finite after step {now}")
            if now in kept and accelerator.is_main_process:
                save_weights(run.path / "checkpoints" / f"step_{now}")
            if saves or stops:
                run.save_state(collect_state(trained, optimizer, accelerator))
            if stops:
                break
            clock = time.perf_counter()
        if record["step"] < steps:
            run.end("interrupted")
        else:
            if accelerator.is_main_process:
                save_weights(run.path)
                answer_held_out(run, model, tokenizer, eval_set)
            run.write(flops=flops_per_token(model, train_set.lengths) * record["tokens"])
            run.end("completed")
    # The gradients' reducer must not be the last owner of the processes' group: it would wait for
    # gloo's threads while it holds the interpreter's lock, which they need (pytorch#56297).
    wrapped = None
    accelerator.free_memory()
    accelerator.end_training()
    return EXIT_CODES[run.record["status"]]


@torch.no_grad()
@torch.compiler.set_stance("force_eager")  # without gradients it would be a second graph
def evaluate(
    model: MiniMindForCausalLM, dataset: TokenDataset, batch_size: int, accelerator: Accelerator
) -> float:
    """Return the mean NLL over the labeled tokens of a data set, in nats a token."""
    batches = list(chunks(dataset.lengths.argsort(kind="stable").tolist(), batch_size))
    total = torch.zeros((), device=accelerator.device)
    model.eval()
    for indices in batches[accelerator.process_index :: accelerator.num_processes]:
        batch = send_to_device(collate([dataset[i] for i in indices]), accelerator.device)
        total += model(**batch, num_items_in_batch=1).loss
    model.train()
    return (accelerator.reduce(total, "sum") / int(dataset.targets.sum())).item()


def collect_state(trained: dict, optimizer: Optimizer, accelerator: Accelerator) -> dict:
    """Return all that a run continues from, but its progress: the parameters by their names."""
    random = [torch.get_rng_state()]
    if accelerator.device.type != "cpu":
        random.append(torch.get_device_module(accelerator.device).get_rng_state())
    return {
        "weights": {name: parameter.detach() for name, parameter in trained.items()},
        "optimizer": optimizer.state_dict(),
        "random": gather_object([random]),  # of every process
        "scaler": accelerator.scaler.state_dict() if accelerator.scaler else None,
    }


@torch.no_grad()
def restore_state(
    state: dict, trained: dict, optimizer: Optimizer, accelerator: Accelerator
) -> None:
    """Put back what `collect_state` returned."""
    for name, parameter in trained.items():
        parameter.copy_(state["weights"][name])
    optimizer.load_state_dict(state["optimizer"])
    random = state["random"][accelerator.process_index]
    torch.set_rng_state(random[0])
    if accelerator.device.type != "cpu":
        torch.get_device_module(accelerator.device).set_rng_state(random[1])
    if accelerator.scaler:
        accelerator.scaler.load_state_dict(state["scaler"])


def answer_held_out(
    run: RunFolder, model: MiniMindForCausalLM, tokenizer: Tokenizer, eval_set: TokenDataset | None
) -> None:
    """Print greedy answers to held-out conversations; run.json keeps them."""
    print(f"to ask it: python eval_llm.py --model {escape_control(str(run.path))}")
    count = min(vars(run.args).get("show_answers", 0), len(eval_set or ()))
    if not count:
        return
    prompts, references, ends = [], [], (tokenizer.eos_token_id,)
    for ids, labels in (eval_set[i] for i in range(count)):
        start, end = np.flatnonzero(np.diff(labels == ids, prepend=False, append=False))[:2]
        prompts.append(ids[:start].tolist())
        references.append(ids[start:end].tolist())
    answers = generate(model, prompts, Decoding("greedy"), 0, MAX_NEW_TOKENS, count, ends)
    rows = []
    for parts in zip(prompts, answers, references, strict=True):
        texts = tokenizer.batch_decode(parts, skip_special_tokens=True)
        texts[0] = texts[0].strip().removeprefix("user").removesuffix("assistant").strip()
        rows.append(dict(zip(("prompt", "answer", "reference"), texts, strict=True)))
        for name, text in rows[-1].items():
            print(f"{name:>9}  {escape_control(' '.join(text.split()))}")
    run.write(answers=rows)
