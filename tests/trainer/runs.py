"""Small runs of the three training scripts, for tests of different files."""

import functools
import hashlib
import json
import os
import signal
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from accelerate.state import AcceleratorState
from safetensors.torch import load_file

from dataset.lm_dataset import load_dataset
from trainer import train_full_sft, train_lora, train_pretrain, trainer_utils

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
CPU = "--device cpu --dtype float32 --log_interval 1"
ONE_THREAD = os.environ | {"OMP_NUM_THREADS": "1"}
train = trainer_utils.train


def write_jsonl(path: Path, records: list[dict]) -> None:
    path.write_text("".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records))


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


def call(
    stage: str, flags: str, home: Path, on_step: Callable[[int], None] = lambda step: None
) -> int:
    """Run `main()` of a stage as a fresh process would; return its exit code.

    Args:
        home: the tokens are cached in a folder of it.
    """
    torch.manual_seed(hash(flags) % 2**32)  # nothing may depend on what ran before
    AcceleratorState._reset_state(True)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    handlers = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    load = functools.partial(load_dataset, cache_dir=home / "cache")
    try:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(trainer_utils, "load_dataset", load)
            patch.setattr(STAGES[stage], "train", functools.partial(train, on_step=on_step))
            return STAGES[stage].main(flags.split())
    finally:
        torch.set_num_threads(threads)
        for number, handler in handlers.items():
            signal.signal(number, handler)


class Killed(BaseException):
    """Stands for a process that ends without a chance to save."""


def at_step(step: int, action: Callable[[], None]) -> Callable[[int], None]:
    """Make an `on_step` that acts once, in step `step` of a run."""
    return lambda now: action() if now == step else None


def terminate() -> None:
    os.kill(os.getpid(), signal.SIGTERM)


def kill() -> None:
    raise Killed


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


def sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()
