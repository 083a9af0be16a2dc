"""The benchmark at a tiny size: engines train alike, parts have their arms, medians by hand."""

import multiprocessing
from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from accelerate.state import AcceleratorState

from dataset import lm_dataset
from dataset.lm_dataset import turns
from evaluation.bench import bench, engines
from model.checkpoint import TOKENIZER_DIR, load_tokenizer, save_model
from tests.model.small import make_model
from tests.trainer.runs import write_jsonl


@pytest.fixture
def arm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> engines.Arm:
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
    return engines.Arm(tmp_path, "cpu", "float32", 1e9, "tiny", steps=2, batch=4, compiles="off")


def test_minimind_way_gives_the_tokens_and_labels_of_ours(arm: engines.Arm) -> None:
    tokens = lm_dataset.load_dataset("sft", [arm.pairs], load_tokenizer(), 340)
    theirs = engines.MiniMindData(arm.pairs)
    assert len(tokens) == 8
    for index, (ids, labels) in enumerate(tokens):
        padding = 340 - len(ids)
        padded_ids, padded_labels = theirs[index]
        assert padded_ids.tolist() == [*ids, *[0] * padding]
        assert padded_labels.tolist() == [*labels, *[-100] * padding]


def train_together(arm: engines.Arm, method: str) -> list[float]:
    """Train by each engine; return the mean losses of ours, MiniMind's step and Trainer.

    All samples are in each batch, so that neither their order nor padding may change a loss.
    """
    arms = bench.cross(
        replace(arm, batch=8), [method], dict.fromkeys(("ours", "minimind", "trainer"), {})
    )
    return [engines.run_turn(arm)["loss"] for arm in arms]


def test_engines_train_alike(arm: engines.Arm) -> None:
    ours, minimind, trainer = train_together(arm, "FFT")
    assert minimind == pytest.approx(ours, rel=1e-5)
    assert trainer == pytest.approx(ours, rel=1e-5)


def test_engines_train_adapters(arm: engines.Arm) -> None:
    """They start at random: as the base, of which more layers and a higher scale learn more."""
    tokens = lm_dataset.load_dataset("sft", [arm.pairs], load_tokenizer(), 340)
    base = engines.train_minimind(replace(arm, batch=8, steps=0), tokens)["loss"]
    ours, minimind, trainer = train_together(arm, "LoRA all-linear")
    _, square, _ = train_together(arm, "LoRA square")
    assert trainer == pytest.approx(ours, rel=2e-3)
    assert ours < minimind < square < base


def test_a_profiled_turn_gives_shares_of_its_time(arm: engines.Arm) -> None:
    minimind = replace(arm, engine="minimind", workers=1)
    shares = engines.run_turn(minimind, profiles=True)
    assert 0 < shares["% outside products"] < 100
    assert 0 < shares["% waiting for data"] < 100


def test_tokens_of_the_timed_steps_by_hand(arm: engines.Arm) -> None:
    """Of 8 samples in batches of 4, the second batch is timed; padding counts for no engine."""
    data = lm_dataset.load_dataset("sft", [arm.pairs], load_tokenizer(), 340)
    timed = replace(arm, steps=1)
    for engine, is_grouped in (("ours", True), ("minimind", False)):
        batches = lm_dataset.StepPlan(data.lengths if is_grouped else np.full(8, 340), 4)
        tokens = sum(len(data[index][0]) for index in batches[1])
        assert engines.count_tokens(replace(timed, engine=engine), data) == tokens


def test_medians_by_hand() -> None:
    """Ours takes 1, 2 and 9 s for 90 tokens, Trainer 3, 4 and 9 s: 3, 2 and 1 times as long.

    MiniMind's takes as long as ours for a third of the tokens.
    """
    keys = dict.fromkeys(bench.ARM_KEYS, "FFT")
    profile = {"% outside products": 75, "kernels": 0.5, "turn": 3}
    rows = []
    times_by_engine = {"ours": (1, 2, 9), "trainer": (3, 4, 9), "minimind": (1, 2, 9)}
    for engine, times in times_by_engine.items():
        arm_keys = keys | {"engine": engine}
        tokens = 30 if engine == "minimind" else 90
        for turn, seconds in enumerate(times):
            cost = {"tokens": tokens, "MiB": 2, "flops": 10, "peak": 1800}
            rows.append(arm_keys | cost | {"turn": turn, "seconds": seconds})
        rows.append(arm_keys | profile)
    ours, trainer, minimind = bench.take_medians(pd.DataFrame(rows)).to_dict("records")
    assert ours["tokens/s"] == 45
    assert ours["% of the peak"] == 25
    assert ours["MiB"] == 2
    assert ours["% outside products"] == 75
    assert ours["% GPU busy"] == 25
    assert ours["time / ours"] == 1
    assert trainer["tokens/s"] == 22.5
    assert trainer["time / ours"] == 2
    assert minimind["time / ours"] == 3


def test_a_busy_process_runs_as_long_as_its_block() -> None:
    before = multiprocessing.active_children()
    with bench.run_busy_process():
        assert len(multiprocessing.active_children()) == len(before) + 1
    assert multiprocessing.active_children() == before


def test_threads_are_timed_alone_and_beside_a_busy_process(arm: engines.Arm) -> None:
    table = bench.measure_threads(arm, turns=1)
    assert table[bench.THREADS_KEYS].to_numpy().tolist() == [
        ["tiny", 1, "nothing"],
        ["tiny", 1, "one busy process"],
        ["tiny", 2, "nothing"],
        ["tiny", 2, "one busy process"],
    ]
    assert (table["tokens/s"] > 0).all()


def test_an_arm_computes_with_its_threads(arm: engines.Arm) -> None:
    threads = torch.get_num_threads()
    try:
        for count in (1, 2):
            engines.run_turn(replace(arm, threads=count))
            assert torch.get_num_threads() == count
    finally:
        torch.set_num_threads(threads)


def test_a_spawned_arm_starts_workers_in_the_way_of_the_platform(arm: engines.Arm) -> None:
    way = multiprocessing.get_start_method()
    multiprocessing.set_start_method("spawn", force=True)  # as in a process that was spawned
    try:
        engines.run_turn(arm)
        assert multiprocessing.get_start_method() == way
    finally:
        multiprocessing.set_start_method(None, force=True)


def test_parts_of_a_processor_and_of_a_gpu(arm: engines.Arm) -> None:
    """Each size has its arms; threads are for a processor, and batches of many sizes for a GPU."""
    on_cpu = [title for title, _ in bench.plan_parts(arm, ["xs", "s", "m26"], 1)]
    on_gpu = [title for title, _ in bench.plan_parts(replace(arm, device="cuda"), ["xs"], 1)]
    assert Counter(on_cpu) == {
        "Training": 3,
        "Start": 3,
        "Loading": 3,
        "Threads": 2,
    }
    assert Counter(on_gpu) == {
        "Training": 1,
        "Start": 1,
        "Batches": 8,
        "Loading": 3,
    }
