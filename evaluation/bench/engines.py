"""The engines that the benchmark compares, and the clock of their steps.

`run_turn` is what an arm's process does: it trains a few steps by the arm's engine and returns
what they cost.
"""

import multiprocessing
import os
import time
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd
import torch
import torch.nn.functional as F
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from torch.autograd import DeviceType
from torch.optim import AdamW
from torch.optim.optimizer import register_optimizer_step_post_hook
from torch.utils.data import DataLoader, Dataset
from transformers import DataCollatorForSeq2Seq, LlamaForCausalLM, Trainer, TrainingArguments

from dataset.lm_dataset import StepPlan, TokenDataset, load_dataset, read_jsonl
from model.checkpoint import load_model, load_tokenizer
from model.files import read_json
from model.machine import peak_memory
from model.model_lora import LoraSettings, apply_lora
from model.model_minimind import IGNORE_INDEX
from trainer import train_full_sft, train_lora
from trainer.arguments import MAX_SEQ_LEN

METHODS = {  # and what PEFT calls the layers that get an adapter
    "FFT": None,
    "LoRA square": ["q_proj", "o_proj"],
    "LoRA all-linear": "all-linear",
}
LEARNING_RATE = 1e-4
RANK = 8  # of all adapters
PRODUCTS = {  # names of matrix products in a profile
    "cpu": r"^aten::(mm|addmm|bmm|baddbmm)$",
    "cuda": "gemm|gemv|nvjet",
}


@dataclass(frozen=True)
class Arm:
    """One process of the benchmark: what it trains, by which engine and for how long."""

    folder: Path  # of the models, the pairs and all that a run leaves
    device: str
    dtype: str  # of matrix products
    peak: float  # FLOPs a second of a large matrix product
    size: str
    steps: int  # that are timed; one more comes first
    method: str = "FFT"  # of METHODS
    engine: str = "ours"
    batch: int = 32
    workers: int = 0
    threads: int | None = None  # that compute on a CPU; None: PyTorch's choice
    compiles: str = "on"  # our engine; the two others do not compile
    compiled_code: str = "compiled"  # folder of the compiler's cache, in `folder`

    @property
    def pairs(self) -> Path:
        """The file of pairs."""
        return self.folder / "chats.jsonl"

    @property
    def is_gpu(self) -> bool:
        """Whether it computes on CUDA."""
        return self.device == "cuda"


class MiniMindData(Dataset):
    """MiniMind's way of loading: a sample is rendered, tokenized, padded and labeled when read."""

    def __init__(self, path: Path) -> None:
        self.records = [record for _, record in read_jsonl(path)]
        self.tokenizer = load_tokenizer()
        self.opening = self.tokenizer("<|im_start|>assistant\n").input_ids

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        """Return ids and labels, padded to the most that a sample may have."""
        messages = self.records[index]["conversations"]
        text = self.tokenizer.apply_chat_template(messages, tokenize=False)
        ids = self.tokenizer(text).input_ids
        ids += [self.tokenizer.pad_token_id] * MAX_SEQ_LEN
        ids = ids[:MAX_SEQ_LEN]
        labels = [IGNORE_INDEX] * MAX_SEQ_LEN
        size = len(self.opening)
        in_answer = False
        for i in range(size, MAX_SEQ_LEN):
            if in_answer or ids[i - size : i] == self.opening:
                labels[i] = ids[i]
                in_answer = ids[i] != self.tokenizer.eos_token_id
        return torch.tensor(ids), torch.tensor(labels)


def pad_lengths(data: TokenDataset) -> np.ndarray:
    """Return the lengths of padded samples: all alike, so nothing is grouped by length."""
    return np.full_like(data.lengths, MAX_SEQ_LEN)


def train_ours(arm: Arm, _: TokenDataset) -> dict[str, float]:
    """Run a training script as its users do; return mean loss and FLOPs a token."""
    name = f"run{os.getpid()}"
    steps = arm.steps + 1
    flags = {
        "--from_weight": arm.folder / arm.size,
        "--data_path": arm.pairs,
        "--save_dir": arm.folder,
        "--max_steps": steps,
        "--log_interval": steps,
        "--learning_rate": LEARNING_RATE,
        "--lr_schedule": "constant",
        "--device": arm.device,
        "--dtype": arm.dtype,
        "--use_compile": arm.compiles,
        "--num_workers": arm.workers,
        "--batch_size": arm.batch,
    }
    train = train_full_sft.main
    if arm.method == "FFT":
        flags["--run_name"] = name
    else:
        flags["--lora_name"] = name
        flags["--lora_targets"] = arm.method.removeprefix("LoRA ")
        train = train_lora.main
    words = ["--overwrite"]
    for flag, value in flags.items():
        words += [flag, str(value)]
    train(words)
    record = read_json(arm.folder / name / "run.json")
    return {"loss": record["train_loss"], "flops": record["flops"] / record["tokens"]}


def train_minimind(arm: Arm, data: TokenDataset) -> dict[str, float]:
    """Train by a step and a loading like those of MiniMind's scripts; return the mean loss.

    We describe trainer/train_full_sft.py, trainer/train_lora.py, dataset/lm_dataset.py and the
    loss of model/model_minimind.py, of https://github.com/jingyaogong/minimind at d65ef2c. The
    model is ours. So are the adapters, in MiniMind's form (scale 1, normal A), with `RANK` for its
    16; on all linears they are what its form would be there.

    Every row has `MAX_SEQ_LEN` tokens, and logits and the loss are computed at each of them.
    Weights are float32, also the frozen ones. Only CUDA gets an autocast, so that a CPU computes
    in float32 whatever `arm.dtype` says. The gradient scaler of float16 is off in other types.
    The rate is constant, and no random system messages are added, as with the other engines.
    """
    model = load_model(arm.folder / arm.size).to(arm.device).train()
    if arm.method != "FFT":
        layers = arm.method.removeprefix("LoRA ")
        apply_lora(model, LoraSettings(RANK, alpha=RANK, targets=layers, init="gaussian"))
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = AdamW(trained, LEARNING_RATE)
    plan = StepPlan(pad_lengths(data), arm.batch)
    loader = DataLoader(
        MiniMindData(arm.pairs),
        batch_sampler=plan.iterate(0, arm.steps + 1, process=0),
        num_workers=arm.workers,
        pin_memory=arm.is_gpu,
    )
    autocast = torch.autocast(arm.device, getattr(torch, arm.dtype), enabled=arm.is_gpu)
    losses = []
    for input_ids, labels in loader:
        input_ids = input_ids.to(arm.device)
        targets = labels.to(arm.device)[:, 1:].flatten()
        with autocast:
            predictions = model(input_ids).logits[:, :-1].flatten(0, 1)
            loss = F.cross_entropy(predictions, targets, ignore_index=IGNORE_INDEX)
        loss.backward()
        nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.detach())
    return {"loss": torch.stack(losses).mean().item()}


def train_trainer(arm: Arm, data: TokenDataset) -> dict[str, float]:
    """Train by Trainer, and PEFT for adapters, as `train_ours` does; return the mean loss."""
    plan = StepPlan(data.lengths, arm.batch)
    steps = arm.steps + 1
    samples = []
    for step in range(steps):
        for index in plan[step]:
            ids, labels = data[index]
            samples.append({"input_ids": ids.tolist(), "labels": labels.tolist()})
    model = LlamaForCausalLM.from_pretrained(arm.folder / arm.size, dtype=torch.float32)
    targets = METHODS[arm.method]
    if targets:
        config = LoraConfig(r=RANK, lora_alpha=32, target_modules=targets)
        model = get_peft_model(model, config)
    settings = TrainingArguments(
        output_dir=arm.folder / "theirs",
        use_cpu=arm.device == "cpu",
        bf16=arm.dtype == "bfloat16",
        max_steps=steps,
        learning_rate=LEARNING_RATE,
        lr_scheduler_type="constant",
        per_device_train_batch_size=arm.batch,
        train_sampling_strategy="sequential",
        save_strategy="no",
    )
    collator = DataCollatorForSeq2Seq(load_tokenizer())
    output = Trainer(model, settings, collator, samples).train()
    return {"loss": output.training_loss}


ENGINES = {
    "ours": train_ours,
    "ours, not compiled": train_ours,
    "minimind": train_minimind,
    "trainer": train_trainer,
}


class StepClock:
    """Note when the first and the last step end, and profile what lies between, if asked to."""

    def __init__(self, arm: Arm, profiles: bool) -> None:
        self.device = arm.device
        self.last_step = arm.steps + 1
        self.profiler = torch.profiler.profile() if profiles else None
        self.step = 0
        self.first_step_at = 0.0  # seconds, as `time.time` counts
        self.started_at = 0.0
        self.ended_at = 0.0

    def note_step(self, *_: object) -> None:
        """Be called after each step of an optimizer."""
        self.step += 1
        if self.step == 1:
            self.first_step_at = self.read()
            if self.profiler:
                self.profiler.start()
            self.started_at = time.time()
        elif self.step == self.last_step:
            self.ended_at = self.read()
            if self.profiler:
                self.profiler.stop()

    def read(self) -> float:
        """Return the time at which the device has done all its work."""
        torch.get_device_module(self.device).synchronize()
        return time.time()

    @property
    def seconds(self) -> float:
        """How long the timed steps took."""
        return self.ended_at - self.started_at


def run_turn(arm: Arm, profiles: bool = False) -> dict[str, float]:
    """Train a first step and `arm.steps` timed ones; return their cost, or their profile."""
    os.environ["TORCHINDUCTOR_CACHE_DIR"] = str(arm.folder / arm.compiled_code)
    # A spawned process would spawn the workers of its loader, too, which takes them seconds. Users'
    # scripts start them in the platform's way.
    multiprocessing.set_start_method(None, force=True)
    if arm.threads is not None:
        torch.set_num_threads(arm.threads)
    data = load_dataset("sft", [arm.pairs], load_tokenizer(), MAX_SEQ_LEN)
    clock = StepClock(arm, profiles)
    hook = register_optimizer_step_post_hook(clock.note_step)
    with open(os.devnull, "w") as null, redirect_stdout(null), redirect_stderr(null):
        report = ENGINES[arm.engine](arm, data)
    hook.remove()
    if clock.profiler:
        return describe_profile(clock.profiler, clock.seconds, arm)
    report["first_step_at"] = clock.first_step_at
    report["seconds"] = clock.seconds
    report["tokens"] = count_tokens(arm, data)
    report["MiB"] = peak_memory(arm.device) / 2**20
    return report


def count_tokens(arm: Arm, data: TokenDataset) -> int:
    """Count the tokens of the timed steps, padding aside."""
    lengths = pad_lengths(data) if arm.engine == "minimind" else data.lengths
    plan = StepPlan(lengths, arm.batch)
    return sum(data.lengths[plan[step]].sum() for step in range(1, arm.steps + 1))


def describe_profile(
    profiler: torch.profiler.profile, seconds: float, arm: Arm
) -> dict[str, float]:
    """Return what part of the timed steps was spent outside matrix products, and on waiting."""
    # A row is an operation, by its name; times are microseconds, "self" without those inside it.
    events = pd.DataFrame(vars(event) for event in profiler.key_averages()).set_index("key")
    is_kernel = events["device_type"].eq(DeviceType.CUDA) & ~events["is_user_annotation"]
    kernels = events["self_device_time_total"][is_kernel] / 1e6
    operations = kernels if arm.is_gpu else events["self_cpu_time_total"] / 1e6
    products = operations.filter(regex=PRODUCTS["cuda" if arm.is_gpu else "cpu"]).sum()
    waiting = events["cpu_time_total"].filter(like="DataLoader").sum() / 1e6
    return {
        "% outside products": 100 - 100 * products / seconds,
        "% waiting for data": 100 * waiting / seconds,
        "kernels": kernels.sum() if arm.is_gpu else float("nan"),
    }
