"""Token ids, labels and batches are those of edition 1, with which results are compared."""

import hashlib
import json
from pathlib import Path

import numpy as np
import pytest

from dataset import lm_dataset
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


@pytest.mark.parametrize("name", GOLDENS["data"])
def test_tokens_and_labels(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    monkeypatch.setattr(lm_dataset, "CACHE_DIR", tmp_path / "cache")
    write_corpora(tmp_path)
    kind, file, *size = name.split()
    dataset = load_dataset(kind, [tmp_path / file], load_tokenizer(), 64, *map(int, size))
    golden = GOLDENS["data"][name]
    assert hash_samples(dataset) == golden["sha256"]
    # Counts are of the chosen samples today; copies and lost tails are not counted.
    info = golden["info"] | golden["info"].get("kept", {})
    gone = ("kept", "duplicates", "dropped_tail_tokens")
    assert dataset.info == {key: value for key, value in info.items() if key not in gone}


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
