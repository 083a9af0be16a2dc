"""The benchmark at a tiny size: arms train alike, MiniMind's loading is right, medians by hand."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from accelerate.state import AcceleratorState

from dataset import lm_dataset
from dataset.lm_dataset import turns
from evaluation.bench import bench
from model.checkpoint import TOKENIZER_DIR, load_tokenizer, save_model
from tests.model.small import make_model
from tests.trainer.runs import write_jsonl


@pytest.fixture
def arm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> bench.Arm:
    """A tiny model and 8 conversations of different lengths, one of them of two turns."""
    save_model(make_model(), TOKENIZER_DIR, tmp_path / "tiny")
    chats = []
    for i in range(8):
        count = " ".join(str(number) for number in range(1 + 3 * i))
        chats.append(turns("Count.", count))
    chats[0] += chats[1]
    write_jsonl(tmp_path / "chats.jsonl", [{"conversations": chat} for chat in chats])
    monkeypatch.setattr(lm_dataset, "CACHE_DIR", tmp_path / "cache")
    AcceleratorState._reset_state(True)
    return bench.Arm(tmp_path, "cpu", "float32", 1e9, "tiny", steps=2, batch=4, compiles="off")


def test_minimind_way_gives_the_tokens_and_labels_of_ours(arm: bench.Arm) -> None:
    tokens = lm_dataset.load_dataset("sft", [arm.pairs], load_tokenizer(), 340)
    theirs = bench.MiniMindData(arm.pairs, tokens)
    assert len(tokens) == 8
    for index, (ids, labels) in enumerate(tokens):
        padding = 340 - len(ids)
        padded_ids, padded_labels = theirs[index]
        assert padded_ids == [*ids, *[0] * padding]
        assert padded_labels == [*labels, *[-100] * padding]


def test_ours_and_trainer_train_alike(arm: bench.Arm) -> None:
    for method in ("FFT", "LoRA all-linear"):
        ours, theirs = bench.cross(arm, [method], ["ours", "trainer"])
        loss = bench.run_turn(ours)["loss"]
        assert loss == pytest.approx(bench.run_turn(theirs)["loss"], rel=0.02)


def test_a_profiled_turn_gives_shares_of_its_time(arm: bench.Arm) -> None:
    minimind = replace(arm, engine="minimind", workers=1)
    shares = bench.run_turn(minimind, profiles=True)
    assert 0 < shares["% outside products"] < 100
    assert 0 < shares["% waiting for data"] < 100


def test_tokens_of_the_timed_steps_by_hand(arm: bench.Arm) -> None:
    """Of 8 samples in batches of 4, the second batch is timed; padding counts for no engine."""
    data = lm_dataset.load_dataset("sft", [arm.pairs], load_tokenizer(), 340)
    timed = replace(arm, steps=1)
    for engine, is_grouped in (("ours", True), ("minimind", False)):
        batches = lm_dataset.StepPlan(data.lengths if is_grouped else np.full(8, 340), 4)
        tokens = sum(len(data[index][0]) for index in batches[1])
        assert bench.count_tokens(replace(timed, engine=engine), data) == tokens


def test_medians_by_hand() -> None:
    """Ours takes 1, 2 and 9 s for 90 tokens, Trainer 3, 4 and 9 s: 3, 2 and 1 times as long."""
    keys = dict.fromkeys(bench.ARM_KEYS, "FFT")
    profile = {"% outside products": 75, "kernels": 0.5, "turn": 3}
    rows = []
    for engine, times in {"ours": (1, 2, 9), "trainer": (3, 4, 9)}.items():
        arm_keys = keys | {"engine": engine}
        for turn, seconds in enumerate(times):
            cost = {"tokens": 90, "MiB": 2, "flops": 10, "peak": 1800}
            rows.append(arm_keys | cost | {"turn": turn, "seconds": seconds})
        rows.append(arm_keys | profile)
    ours, trainer = bench.take_medians(pd.DataFrame(rows)).to_dict("records")
    assert ours["tokens/s"] == 45
    assert ours["% of the peak"] == 25
    assert ours["MiB"] == 2
    assert ours["% outside products"] == 75
    assert ours["% GPU busy"] == 25
    assert ours["time / ours"] == 1
    assert trainer["tokens/s"] == 22.5
    assert trainer["time / ours"] == 2
