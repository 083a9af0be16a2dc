"""Token ids and labels are those of edition 1, with which results are compared."""

import hashlib
import json
from pathlib import Path

import pytest

from dataset import lm_dataset
from dataset.lm_dataset import TokenDataset, load_dataset
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
