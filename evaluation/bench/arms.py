"""Arms of the benchmark: short training runs, of which all steps but the first are timed.

ours      `train()` of trainer/, called as its scripts call it; its `on_step` starts and stops the
          clock. Blocks are compiled, as in every long run.
minimind  the same, with data loaded in MiniMind's way.
trainer   transformers' Trainer on LlamaForCausalLM, with PEFT's adapters: the same weights,
          batches, optimizer, clipping and autocast. Not compiled, its default.
"""

import os
import re
import resource
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import transformers
from peft import LoraConfig, get_peft_model

from dataset.lm_dataset import StepPlan, TokenDataset, load_dataset, read_jsonl
from model.checkpoint import load_model, load_tokenizer
from model.model_lora import LoraSettings, apply_lora
from model.model_minimind import IGNORE_INDEX, MiniMindForCausalLM
from trainer.arguments import MAX_SEQ_LEN, choose_dtype, make_parser, parse_args
from trainer.train_lora import freeze_in_half
from trainer.trainer_utils import start_run, train

METHODS = {  # targets of our adapter, and of PEFT's
    "FFT": None,
    "LoRA square": ("square", ["q_proj", "o_proj"]),
    "LoRA all linear": ("all-linear", "all-linear"),
}
# Names in a profile: products are operators on a CPU and kernels on a GPU.
PRODUCTS = {"cpu": r"^aten::(mm|addmm|bmm|baddbmm)$", "cuda": "gemm|gemv|nvjet"}
WAITING = r"^enumerate\(DataLoader\)"
WATCH = "nvidia-smi --query-gpu=utilization.gpu --format=csv,noheader,nounits --loop-ms=100"


@dataclass(frozen=True)
class Job:
    """What an arm trains; its run, tokens and compiled code stay in `folder`."""

    weights: Path
    data: Path
    folder: Path
    device: str
    steps: int
    engine: str = "ours"
    method: str = "FFT"
    batch: int = 32
    workers: int = 0
    compiles: str = "on"

    @property
    def keys(self) -> dict:
        """Return what distinguishes the job in tables."""
        names = ("method", "batch", "workers", "engine")
        keys = {"size": self.weights.name, "data": self.data.stem}
        return keys | {name: getattr(self, name) for name in names}

    def load_tokens(self) -> TokenDataset:
        """Load the conversations to train on."""
        cache = self.folder / "tokens"
        return load_dataset("sft", [self.data], load_tokenizer(), MAX_SEQ_LEN, cache_dir=cache)

    def load_model(self) -> MiniMindForCausalLM:
        """Load our model, with the method's adapter."""
        model = load_model(self.weights)
        if METHODS[self.method]:
            apply_lora(model, LoraSettings(rank=8, alpha=32, targets=METHODS[self.method][0]))
        return model


def synchronize(device: str) -> None:
    """Wait until the device has finished."""
    if device != "cpu":
        torch.accelerator.synchronize()


class MiniMindData:
    """MiniMind's way of loading: a sample is rendered, tokenized, padded and labeled when read."""

    def __init__(self, path: Path, tokens: TokenDataset):
        self.lengths, self.targets, self.info = tokens.lengths, tokens.targets, tokens.info
        self.records = [record for _, record in read_jsonl(path)]
        self.tokenizer = load_tokenizer()
        self.opening = self.tokenizer("<|im_start|>assistant\n").input_ids

    def __getitem__(self, index: int) -> tuple[list[int], list[int]]:
        """Return ids and labels, padded to the most that a sample may have."""
        chat, size = self.records[index]["conversations"], len(self.opening)
        text = self.tokenizer.apply_chat_template(chat, tokenize=False)
        ids = self.tokenizer(text).input_ids[:MAX_SEQ_LEN]
        ids += [self.tokenizer.pad_token_id] * (MAX_SEQ_LEN - len(ids))
        labels, in_answer = [IGNORE_INDEX] * len(ids), False
        for i in range(size, len(ids)):
            if in_answer or ids[i - size : i] == self.opening:
                labels[i], in_answer = ids[i], ids[i] != self.tokenizer.eos_token_id
        return ids, labels


def train_ours(job: Job, on_step: Callable[[int], None]) -> float:
    """Train as train_full_sft.py and train_lora.py do, by what they call; return the mean loss."""
    flags = {"save_dir": job.folder, "run_name": f"{job.engine} {job.method}", "device": job.device}
    flags |= {"data_path": job.data, "batch_size": job.batch, "num_workers": job.workers}
    flags |= {"max_steps": job.steps + 1, "log_interval": job.steps + 1}
    flags |= {"learning_rate": 1e-4, "lr_schedule": "constant", "use_compile": job.compiles}
    words = [word for flag, value in flags.items() for word in (f"--{flag}", str(value))]
    parser = make_parser("", run_name="run", from_weight=str(job.weights))
    args = parse_args(parser, [*words, "--overwrite"], kind="sft")
    accelerator, run = start_run(args)
    model, data = job.load_model(), job.load_tokens()
    freeze_in_half(model, args.dtype)
    if job.engine == "minimind":
        data = MiniMindData(job.data, data)
    train(args, accelerator, run, model, data, None, lambda *_: None, {}, on_step=on_step)
    return run.record["train_loss"]


def train_trainer(job: Job, on_step: Callable[[int], None]) -> float:
    """Train by Trainer, and PEFT for adapters, on ours' batches; return the mean loss."""

    class Report(transformers.TrainerCallback):
        def on_step_end(self, args, state, control, **rest) -> None:
            on_step(state.global_step)

    data, flags = job.load_tokens(), {"max_steps": job.steps + 1, "logging_steps": job.steps + 1}
    plan = StepPlan(data.lengths, job.batch)
    samples = [data[i] for step in range(job.steps + 1) for i in plan[step]]
    samples = [{"input_ids": ids.tolist(), "labels": labels.tolist()} for ids, labels in samples]
    model = transformers.LlamaForCausalLM.from_pretrained(job.weights, dtype=torch.float32)
    if METHODS[job.method]:
        targets = METHODS[job.method][1]
        model = get_peft_model(model, LoraConfig(r=8, lora_alpha=32, target_modules=targets))
    flags |= {"output_dir": str(job.folder / "trainer"), "use_cpu": job.device == "cpu"}
    flags |= {"bf16": choose_dtype("auto", job.device) == "bfloat16", "optim": "adamw_torch_fused"}
    flags |= {"learning_rate": 1e-4, "lr_scheduler_type": "constant", "save_strategy": "no"}
    flags |= {"per_device_train_batch_size": job.batch, "train_sampling_strategy": "sequential"}
    settings = transformers.TrainingArguments(**flags, report_to="none", disable_tqdm=True)
    collator = transformers.DataCollatorForSeq2Seq(load_tokenizer())
    trainer = transformers.Trainer(model, settings, collator, samples, callbacks=[Report()])
    return trainer.train().training_loss


def run_turn(job: Job, profiles: bool = False) -> dict:
    """Train a first step and `job.steps` timed ones; return what these took, or their profile."""
    job.folder.mkdir(parents=True, exist_ok=True)
    os.environ["TORCHINDUCTOR_CACHE_DIR"] = str(job.folder / "compiled")
    profiler, is_watched = torch.profiler.profile(), job.device == "cuda" and not profiles
    report: dict = {}
    if job.device == "cuda":
        torch.cuda.reset_peak_memory_stats()

    def on_step(step: int) -> None:
        if step not in (1, job.steps + 1):
            return
        synchronize(job.device)
        if step == 1:
            report["first_step_at"] = time.time()
            if is_watched:
                card = f"--id=GPU-{torch.cuda.get_device_properties(0).uuid}"
                report["watch"] = subprocess.Popen([*WATCH.split(), card], stdout=subprocess.PIPE)
            if profiles:
                profiler.start()
            report["clock"] = time.perf_counter()
        else:
            report["seconds"] = time.perf_counter() - report.pop("clock")
            if profiles:
                profiler.stop()

    with open(os.devnull, "w") as null, redirect_stdout(null), redirect_stderr(null):
        report["loss"] = (train_trainer if job.engine == "trainer" else train_ours)(job, on_step)
    if is_watched:
        report["watch"].terminate()
        percents = report.pop("watch").communicate()[0].split()
        report["busy"] = np.mean([int(number) for number in percents if number.isdigit()] or np.nan)
    patterns = {"products": PRODUCTS.get(job.device, PRODUCTS["cpu"]), "waiting": WAITING}
    for name, pattern in patterns.items() if profiles else ():
        found = [event for event in profiler.key_averages() if re.search(pattern, event.key)]
        times = [event.self_cpu_time_total + event.self_device_time_total for event in found]
        report[name] = sum(times) / 1e6 / report["seconds"]
    memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    memory *= 1 if sys.platform == "darwin" else 1024
    report["memory"] = torch.cuda.max_memory_allocated() if job.device == "cuda" else memory
    return report
