"""The benchmark at a tiny size: arms train alike, MiniMind's loading is right, medians by hand."""

from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from accelerate.state import AcceleratorState

from dataset import lm_dataset
from evaluation.bench import bench
from model.checkpoint import TOKENIZER_DIR, load_tokenizer, save_model
from tests.model.small import make_model
from tests.trainer.runs import write_jsonl


@pytest.fixture
def job(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict:
    """A tiny model and 8 conversations of different lengths, one of them of two turns."""
    save_model(make_model(), TOKENIZER_DIR, tmp_path / "tiny")
    counts = [" ".join(map(str, range(1 + 3 * i))) for i in range(8)]
    question = {"role": "user", "content": "Count."}
    chats = [[question, {"role": "assistant", "content": count}] for count in counts]
    chats[0] += chats[1]
    write_jsonl(tmp_path / "chats.jsonl", [{"conversations": chat} for chat in chats])
    monkeypatch.setattr(lm_dataset, "CACHE_DIR", tmp_path / "cache")
    AcceleratorState._reset_state(True)
    job = {"folder": tmp_path, "size": "tiny", "device": "cpu", "dtype": "float32", "peak": 1e9}
    job |= {"method": "FFT", "engine": "ours", "batch": 4, "steps": 2, "workers": 0}
    return job | {"turns": 1, "compiles": "off"}


def test_minimind_way_gives_the_tokens_and_labels_of_ours(job: dict) -> None:
    path = job["folder"] / "chats.jsonl"
    tokens = bench.load_dataset("sft", [path], load_tokenizer(), 340)
    theirs = bench.MiniMindData(path, tokens)
    assert len(tokens) == 8
    for index, (ids, labels) in enumerate(tokens):
        padded_ids, padded_labels = map(np.array, theirs[index])
        assert len(padded_ids) == len(padded_labels) == 340
        assert (padded_ids[: len(ids)] == ids).all() and (padded_ids[len(ids) :] == 0).all()
        assert (padded_labels[: len(ids)] == labels).all()
        assert (padded_labels[len(ids) :] == -100).all()


def test_ours_and_trainer_train_alike(job: dict) -> None:
    for method in ("FFT", "LoRA all-linear"):
        reports = [
            bench.run_turn(job | {"method": method, "engine": engine})
            for engine in ("ours", "trainer")
        ]
        assert reports[0]["loss"] == pytest.approx(reports[1]["loss"], rel=0.02)
    shares = bench.run_turn(job | {"engine": "minimind", "workers": 1}, profiles=True)
    assert 0 < shares["% outside products"] < 100 and 0 < shares["% waiting for data"] < 100


def test_medians_by_hand() -> None:
    """Ours takes 1, 2 and 9 s for 90 tokens, Trainer 3, 4 and 9 s: 3, 2 and 1 times as long."""
    keys, rows = dict.fromkeys(bench.ARM_KEYS, "FFT"), []
    run = keys | {"tokens": 90, "MiB": 2, "flops": 10, "peak": 1800}
    profile = keys | {"% outside products": 75, "kernels": 0.5, "turn": 3}
    for engine, times in {"ours": (1, 2, 9), "trainer": (3, 4, 9)}.items():
        turns = [run | {"turn": turn, "seconds": seconds} for turn, seconds in enumerate(times)]
        rows += [row | {"engine": engine} for row in (*turns, profile)]
    ours, trainer = bench.take_medians(pd.DataFrame(rows)).to_dict("records")
    assert ours["tokens/s"] == 45 and trainer["tokens/s"] == 22.5
    assert ours["% of the peak"] == 25 and ours["MiB"] == 2
    assert ours["% outside products"] == 75 and ours["% GPU busy"] == 25
    assert (ours["time / ours"], trainer["time / ours"]) == (1, 2)
