"""The benchmark at a tiny size: arms train alike, MiniMind's loading is right, medians by hand."""

from dataclasses import replace

import numpy as np
import pandas as pd
import pytest

from evaluation.bench import bench
from evaluation.bench.arms import Job, MiniMindData
from model.checkpoint import TOKENIZER_DIR, save_model
from tests.tiny import tiny_model
from tests.trainer.runs import write_jsonl


@pytest.fixture(scope="module")
def job(tmp_path_factory: pytest.TempPathFactory) -> Job:
    """A tiny model and 8 conversations of different lengths, one of them of two turns."""
    folder = tmp_path_factory.mktemp("bench")
    save_model(tiny_model(), TOKENIZER_DIR, folder / "tiny")
    counts = [" ".join(map(str, range(1 + 3 * i))) for i in range(8)]
    question = {"role": "user", "content": "Count."}
    chats = [[question, {"role": "assistant", "content": count}] for count in counts]
    chats[0] += chats[1]
    write_jsonl(folder / "counts.jsonl", [{"conversations": chat} for chat in chats])
    paths = (folder / "tiny", folder / "counts.jsonl", folder / "runs")
    return Job(*paths, device="cpu", steps=2, batch=4, compiles="off")


def test_minimind_way_gives_the_tokens_and_labels_of_ours(job: Job) -> None:
    tokens = job.load_tokens()
    theirs = MiniMindData(job.data, tokens)
    assert len(tokens) == 8
    for index, (ids, labels) in enumerate(tokens):
        padded_ids, padded_labels = map(np.array, theirs[index])
        assert len(padded_ids) == len(padded_labels) == 340
        assert (padded_ids[: len(ids)] == ids).all() and (padded_ids[len(ids) :] == 0).all()
        assert (padded_labels[: len(ids)] == labels).all()
        assert (padded_labels[len(ids) :] == -100).all()


def test_ours_and_trainer_train_alike_and_are_compared(
    job: Job, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(bench, "measure_peak", lambda device: 1e12)
    jobs = [replace(job, engine=engine) for engine in ("ours", "trainer")]
    frame = bench.run_in_turns(jobs, 1)  # refuses arms whose losses differ
    assert frame["engine"].tolist() == ["ours", "trainer"] and frame["time / ours"][0] == 1
    assert (frame[["tokens/s", "MiB", "% of the peak"]] > 0).all(axis=None)
    assert frame["% outside products"].between(1, 100).all()


def test_medians_by_hand() -> None:
    """Ours takes 1, 2 and 9 s for 90 tokens, Trainer 3, 4 and 9 s: 3, 2 and 1 times as long."""
    keys = dict.fromkeys(bench.KEYS, "FFT") | {"tokens": 90, "memory": 2**21, "products": 0.25}
    keys |= {"flops": 10, "peak": 1800, "card": 9000, "waiting": 0.125, "busy": 40.0}
    seconds = {"ours": (1, 2, 9), "trainer": (3, 4, 9)}
    rows = [
        keys | {"turn": turn, "engine": engine, "seconds": times[turn]}
        for turn in range(3)
        for engine, times in seconds.items()
    ]
    ours, trainer = bench.summarize(pd.DataFrame(rows)).to_dict("records")
    assert ours["tokens/s"] == 45 and trainer["tokens/s"] == 22.5
    assert ours["% of the peak"] == 25 and ours["% MFU"] == 5 and ours["MiB"] == 2
    assert ours["% outside products"] == 75 and ours["% waiting for data"] == 12.5
    assert (ours["time / ours"], trainer["time / ours"]) == (1, 2)


def test_each_table_names_its_processor(job: Job, capsys: pytest.CaptureFixture) -> None:
    rows = bench.measure_generation(job, 1)
    assert rows["engine"].tolist() == ["ours", "transformers"] * 2
    machine = {"processor": "A chip", "threads": 2, "versions": {"torch": "2.13.0"}}
    result = {"git": {}, "machine": machine, "dtype": "bfloat16"}
    tables = {"Generation": rows.to_dict("records"), "Loading": [{"tokens/s": 1234.5, "MFU": None}]}
    bench.print_tables(result | {"tables": tables})
    printed = capsys.readouterr().out
    for title in tables:
        assert f"**{title}** on A chip, 2 threads, bfloat16, torch 2.13.0, commit" in printed
    assert "| 1,234 " in printed and "MFU" not in printed
