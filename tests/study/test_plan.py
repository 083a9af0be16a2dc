"""The plan: names of runs, tuned learning rates, flags."""

from pathlib import Path

import pandas as pd
import pytest

from evaluation.study.plan import (
    Run,
    list_rates,
    make_command,
    make_tuning_run,
    plan_runs,
    tune_rate,
)
from evaluation.study.settings import read_study
from model.files import UserError

STUDY = read_study()
COLUMNS = ["id", "tune_correct", "tune_nll", "status"]


def make_done(results: dict[float, tuple[float, float]], arm: str = "fft") -> pd.DataFrame:
    """Return tuning runs at xs with (share correct, NLL) by learning rate."""
    ids = [make_tuning_run(STUDY, "xs", arm, rate).id for rate in results]
    rows = [(name, *pair, "completed") for name, pair in zip(ids, results.values(), strict=True)]
    return pd.DataFrame(rows, columns=COLUMNS)


def test_a_grid_runs_first() -> None:
    """Without results each rate of the grid is missing, and no other seed is planned."""
    none = make_done({})
    assert tune_rate(STUDY, "xs", "fft", none).missing == [5e-4, 1e-3, 2e-3]
    runs = {run.id for run in plan_runs(STUDY, none)}
    assert "xs-world-wrapped42-fft-e3-lr0.001-s1" in runs
    assert not any("-fft-e3" in name and name.endswith("s2") for name in runs)
    assert "xs-world-wrapped42-seed-e3-lr0.0001-s3" in runs  # a fixed rate needs no grid


def test_the_best_rate_gets_all_seeds() -> None:
    """An interior optimum ends the search; the other seeds run at that rate alone."""
    done = make_done({5e-4: (0.6, 1.0), 1e-3: (0.8, 0.9), 2e-3: (0.7, 0.9)})
    assert tune_rate(STUDY, "xs", "fft", done).best == 1e-3
    assert tune_rate(STUDY, "xs", "fft", done).is_interior
    runs = [run for run in plan_runs(STUDY, done) if run.arm == "fft" and run.size == "xs"]
    main = {
        (run.learning_rate, run.seed) for run in runs if run.epochs == 3 and not run.checkpoints
    }
    assert {(1e-3, 2), (1e-3, 3)} <= main


@pytest.mark.parametrize(
    ("shares", "expected"),
    [
        ({5e-4: 0.6, 1e-3: 0.7, 2e-3: 0.8}, [4e-3]),
        ({5e-4: 0.9, 1e-3: 0.7, 2e-3: 0.6}, [2.5e-4]),
        ({5e-4: 0.6, 1e-3: 0.7, 2e-3: 0.8, 4e-3: 0.9}, [8e-3]),
        ({5e-4: 0.6, 1e-3: 0.7, 2e-3: 0.8, 4e-3: float("nan")}, []),  # diverged
    ],
)
def test_a_grid_is_extended(shares: dict[float, float], expected: list[float]) -> None:
    """A best rate at the edge asks for the next octave; a diverged neighbor ends the search."""
    done = make_done({rate: (share, 1.0) for rate, share in shares.items()})
    assert tune_rate(STUDY, "xs", "fft", done).missing == expected


def test_near_ties_are_decided_by_likelihood() -> None:
    """Shares within 2 points tie, and the lower NLL without end tokens wins."""
    done = make_done({5e-4: (0.50, 0.5), 1e-3: (0.81, 0.7), 2e-3: (0.82, 0.8)})
    assert tune_rate(STUDY, "xs", "fft", done).best == 1e-3


def test_arms_start_from_their_base_or_a_tuned_arm() -> None:
    """A run after full fine-tuning waits for its rate and starts from the same seed."""
    done = make_done({5e-4: (0.6, 1.0), 1e-3: (0.8, 0.9), 2e-3: (0.7, 0.9)})
    medical = [run for run in plan_runs(STUDY, done) if run.data == "medical" and run.arm == "seed"]
    starts = {(run.start, run.seed): run.start_id for run in medical}
    assert starts["fft", 2] == "xs-world-wrapped42-fft-e3-lr0.001-s2"
    assert starts["base", 2] == "xs-world-wrapped42"
    assert not [run for run in plan_runs(STUDY, make_done({})) if run.start == "fft"]


def test_command_of_a_run() -> None:
    """The adapter's flags, the start, and the data come together."""
    run = Run("m26", "wrapped42", "all_r8_rows", 1e-3, 2, 2.0, start_id="m26-world-wrapped42")
    words = " ".join(make_command(STUDY, run, {"sft": Path("sft.jsonl")}, Path("out")))
    assert words.startswith("trainer/train_lora.py --max_seq_len 340")
    assert "--lora_name m26-world-wrapped42-all_r8_rows-e2-lr0.001-s2 " in words
    assert "--train_tokens <|im_start|> <|im_end|> " in words
    assert "--from_weight out/m26-world-wrapped42 --seed 2 --epochs 2.0 " in words
    words = make_command(STUDY, Run("xs", "wrapped43"), {"pretrain": Path("p")}, Path("out"))
    assert words[0] == "trainer/train_pretrain.py"
    assert words[-6:] == [
        "--run_name",
        "xs-world-wrapped43-float32",
        "--seed",
        "43",
        "--data_path",
        "p",
    ]
    assert words[words.index("--wrap_documents") + 1] == "--epochs"


def test_arms_without_a_grid_at_a_size_have_no_rate() -> None:
    """A size that an arm does not run at has nothing to report."""
    assert list_rates(STUDY, "m26", "all_r64", make_done({})) == []
    assert list_rates(STUDY, "xs", "fft_script", make_done({})) == [5e-7, 1e-6, 1e-5]


def test_unknown_keys_are_refused(tmp_path: Path) -> None:
    """A misspelled key names its place in the file."""
    text = (Path(__file__).parents[2] / "evaluation" / "study" / "study.toml").read_text()
    path = tmp_path / "study.toml"
    path.write_text(text.replace("tuning_epochs = 1", "tuning_epoch = 1"))
    with pytest.raises(UserError, match="sizes.m26.tuning_epoch"):
        read_study(path)
    path.write_text(text.replace('arms = ["square_r36"]', 'arms = ["square_r37"]'))
    with pytest.raises(UserError, match="square_r37"):
        read_study(path)
