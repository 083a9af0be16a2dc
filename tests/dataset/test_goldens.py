"""Token ids, labels and batches are those of edition 1, whose results they must be comparable to.

MINIMIND_DATA=folder adds the corpora of the study to the test, if the folder holds them.
"""

import hashlib
import json
import os
from pathlib import Path

import numpy as np
import pytest

from dataset.lm_dataset import StepPlan, TokenDataset, load_dataset
from model.checkpoint import load_tokenizer
from tests.trainer.runs import write_corpora

GOLDENS = json.loads((Path(__file__).parents[1] / "goldens/trainer.json").read_text())


def hash_samples(dataset: TokenDataset) -> str:
    digest = hashlib.sha256()
    for index in range(len(dataset)):
        for array in dataset[index]:
            digest.update(array.astype("<i8").tobytes())
    return digest.hexdigest()


def describe_data(info: dict) -> dict:
    """What is counted today: of chosen samples alone, and without copies and lost tails."""
    info = info | info.get("kept", {})
    gone = ("kept", "duplicates", "dropped_tail_tokens")
    return {name: value for name, value in info.items() if name not in gone}


@pytest.mark.parametrize("name", GOLDENS["data"])
def test_small_data_set(tmp_path: Path, name: str) -> None:
    kind, file, *size = name.split()
    write_corpora(tmp_path)
    size = int(size[0]) if size else None
    dataset = load_dataset(kind, [tmp_path / file], load_tokenizer(), 64, size, tmp_path / "cache")
    assert hash_samples(dataset) == GOLDENS["data"][name]["sha256"]
    assert dataset.info == describe_data(GOLDENS["data"][name]["info"])


@pytest.mark.parametrize("name", GOLDENS["corpora"])
def test_corpus(tmp_path: Path, name: str) -> None:
    path = Path(os.environ.get("MINIMIND_DATA", "nowhere")) / name
    if not path.is_file():
        pytest.skip("MINIMIND_DATA names no folder with this corpus")
    kind = "pretrain" if name.startswith("pretrain") else "sft"
    dataset = load_dataset(kind, [path], load_tokenizer(), 340, None, tmp_path / "cache")
    assert hash_samples(dataset) == GOLDENS["corpora"][name]["sha256"]
    assert dataset.info == describe_data(GOLDENS["corpora"][name]["info"])


LENGTHS = np.random.default_rng(3).integers(5, 60, 2030)
PLANS = {
    "8x1": (StepPlan(LENGTHS, 8), 0),
    "4x3 seed 7": (StepPlan(LENGTHS, 4, 3, 7), 0),
    "equal": (StepPlan(np.full(203, 9), 8, seed=1), 0),
    "rank 0 of 2": (StepPlan(LENGTHS, 4, 2, processes=2), 0),
    "rank 1 of 2": (StepPlan(LENGTHS, 4, 2, processes=2), 1),
}


@pytest.mark.parametrize("name", PLANS)
def test_plan(name: str) -> None:
    plan, process = PLANS[name]
    steps = [plan.micro_batches(step, process) for step in range(2 * plan.steps_per_epoch)]
    assert hashlib.sha256(json.dumps(steps).encode()).hexdigest() == GOLDENS["plans"][name]
