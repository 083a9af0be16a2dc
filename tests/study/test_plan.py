"""The plan: names of runs, tuned learning rates, commands."""

from pathlib import Path

import pandas as pd
import pytest

from evaluation.study.plan import Run, make_command, make_tuning_run, plan_runs, tune_rate
from evaluation.study.settings import RESULTS_DIR, read_study
from model.cli import UserError

STUDY = read_study()
BASE = "xs-world-wrapped42"
MIDDLE = {5e-4: (0.6, 1.0), 1e-3: (0.8, 0.9), 2e-3: (0.7, 0.9)}  # (share correct, NLL) by rate
FALLING = {5e-4: (0.9, 1), 1e-3: (0.8, 1), 2e-3: (0.7, 1)}
RISING = {5e-4: (0.7, 1), 1e-3: (0.8, 1), 2e-3: (0.9, 1)}


def make_done(results: dict[float, tuple[float, float]]) -> pd.DataFrame:
    """Return tuning runs of full fine-tuning at xs."""
    ids = {make_tuning_run(STUDY, "xs", "fft", rate).id: pair for rate, pair in results.items()}
    rows = [(run_id, *pair, "completed") for run_id, pair in ids.items()]
    return pd.DataFrame(rows, columns=["id", "tune_correct", "tune_nll", "status"])


@pytest.mark.parametrize(
    ("results", "best", "missing"),
    [
        ({}, None, [5e-4, 1e-3, 2e-3]),
        (MIDDLE, 1e-3, []),
        (MIDDLE | {2e-3: (0.83, 0.9)}, None, [4e-3]),  # the best rate is at the edge
        (MIDDLE | {5e-4: (0.9, 0.9)}, None, [2.5e-4]),
        (MIDDLE | {2e-3: (0.9, 0.9), 4e-3: (0.95, 1)}, None, [8e-3]),
        (MIDDLE | {2e-3: (0.9, 0.9), 4e-3: (float("nan"),) * 2}, 2e-3, []),  # diverged
        (MIDDLE | {2e-3: (0.81, 0.95)}, 1e-3, []),  # a tie: the lower NLL wins
    ],
)
def test_rates_are_tuned(results: dict, best: float | None, missing: list[float]) -> None:
    """A grid runs first, is extended until its best rate lies inside, and breaks ties by NLL."""
    sweep = tune_rate(STUDY, "xs", "fft", make_done(results))
    assert (sweep.reported, sweep.missing) == ([best] if best else [], missing)
    two = make_done({1e-3: (0.8, 0.9), 2e-3: (0.81, 0.95)})  # a tie before the grid has ended
    assert tune_rate(STUDY, "xs", "fft", two).leading == 1e-3


@pytest.mark.parametrize(
    ("results", "best", "is_at_edge"),
    [
        (MIDDLE, 1e-3, False),
        (FALLING | {2.5e-4: (0.92, 1), 1.25e-4: (0.95, 1), 6.25e-5: (0.98, 1)}, 6.25e-5, True),
        (FALLING | {2.5e-4: (0.92, 1), 1.25e-4: (0.95, 1), 6.25e-5: (0.5, 1)}, 1.25e-4, False),
        (RISING | {4e-3: (0.92, 1), 8e-3: (0.95, 1), 1.6e-2: (0.98, 1)}, 1.6e-2, True),
        (RISING | {4e-3: (0.92, 1), 8e-3: (0.95, 1), 1.6e-2: (0.5, 1)}, 8e-3, False),
    ],
)
def test_a_best_rate_at_the_edge_stays_one_after_3_extensions(
    results: dict, best: float, is_at_edge: bool
) -> None:
    """No further rate follows the third; the best is reported, and known to lie at the edge."""
    sweep = tune_rate(STUDY, "xs", "fft", make_done(results))
    assert (sweep.reported, sweep.missing) == ([best], [])
    assert sweep.is_at_edge == is_at_edge


def test_runs_wait_for_their_rate_and_start() -> None:
    """Other seeds wait for the best rate; rates that ran stay; a start has the same seed."""
    before, runs = (plan_runs(STUDY, make_done(one)) for one in ({2e-3: (0.7, 0.9)}, MIDDLE))
    ids, later = ({run.id.removeprefix(f"{BASE}-") for run in one} for one in (before, runs))
    assert {"fft-e4-lr0.001-s1", "fft-e4-lr0.002-s1", "study-e4-lr0.0001-s3"} <= ids
    assert "fft-e4-lr0.001-s2" not in ids
    assert {"fft-e4-lr0.001-s2", "fft-e4-lr0.001-s3"} <= later
    starts = {(run.start, run.seed): run.start_id for run in runs if run.data == "medical"}
    assert (starts["fft", 2], starts["base", 2]) == (f"{BASE}-fft-e4-lr0.001-s2", BASE)
    assert not [run for run in before if run.start == "fft"]
    epochs = [make_tuning_run(STUDY, "m26", arm, 1).epochs for arm in ("all_r8", "fft")]
    assert epochs == [1, 2]


def test_commands_join_flags_start_and_data() -> None:
    """The adapter's flags, the start, and the data come together."""
    run = Run("m26", "wrapped42", "all_r8_rows", 1e-3, 2, 2.0, start_id="m26-world-wrapped42")
    words = " ".join(make_command(STUDY, run, {"sft": Path("sft.jsonl")}.get, Path("out")))
    assert words.startswith("trainer/train_lora.py --max_seq_len 340")
    assert "--lora_name m26-world-wrapped42-all_r8_rows-e2-lr0.001-s2 " in words
    assert "--train_tokens <|im_start|> <|im_end|> " in words
    assert "--from_weight out/m26-world-wrapped42 --seed 2 --epochs 2.0 " in words
    find = {"pretrain": Path("p"), "tokenizer": Path("t"), "tokenizer64": Path("t64")}.get
    words = make_command(STUDY, Run("xs", "plain64x42"), find, Path("out"))
    assert words[words.index("--tokenizer_path") + 1] == "t64"
    words = make_command(STUDY, Run("xs", "wrapped43"), find, Path("out"))
    assert words[0] == "trainer/train_pretrain.py"
    assert " ".join(words).endswith("xs-world-wrapped43-float32 --seed 43 --data_path p")
    assert words[words.index("--wrap_documents") + 1] == "--tokenizer_path"


def test_unknown_names_are_refused(tmp_path: Path) -> None:
    """A misspelled key or arm is named."""
    path = tmp_path / "study.toml"
    for old, new, error in (
        ("tuning_epochs = 1", "tuning_epoch = 1", "sizes.m26.tuning_epoch"),
        ('["square_r36"]', '["square_r37"]', "no rates of arm 'square_r37'"),
    ):
        path.write_text((RESULTS_DIR / "study.toml").read_text().replace(old, new))
        with pytest.raises(UserError, match=error):
            read_study(tmp_path)
