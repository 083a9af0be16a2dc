"""Read and append results: runs.jsonl has a line for each run. nll.parquet is of edition 1."""

import json
from pathlib import Path

import pandas as pd
from filelock import FileLock

from dataset.lm_dataset import read_jsonl
from dataset.world.checks import KINDS
from model.cli import UserError
from model.files import write_text

LETTERS = dict(zip(KINDS, "cbelofw", strict=True))  # of the outcome strings
NUMBERS = [  # columns of float64, nan where a run has none
    "samples",
    "bits_per_parameter",
    "stored",
    "parameters",
    "trainable_parameters",
]
TEXTS = ["id", "status", "data"]
COLUMNS = [  # that a table has even if no run does
    *TEXTS,
    "size",
    "base",
    "arm",
    "learning_rate",
    "seed",
    "start",
    "epochs",
    "step",
    "outcomes",
    "train_data",
    "weights",
    *NUMBERS,
    "facts_combinations",
    "facts_unseen",
    "base_fingerprint",
    "tune_correct",
    "tune_nll",
    "nll_text",
    "reachable_end",
]


def read_runs(folder: Path, edition: int) -> pd.DataFrame:
    """Read the runs of an edition, a row each; each scalar and each cost is a column of its own.

    The files of several machines join by concatenation, so a run may stand in it twice by mistake:
    raise a UserError that names both lines.
    """
    path = folder / "runs.jsonl"
    lines = read_jsonl(path) if path.is_file() else ()
    rows = []
    places: dict[str, str] = {}  # where each run stands
    for place, line in lines:
        if line["edition"] != edition:
            continue
        first = places.setdefault(line["id"], place)
        if first != place:
            raise UserError(f"{place}: {line['id']} is in {first} too; delete one of both lines")
        # A cost has the run's last step, the line of a kept checkpoint its own.
        rows.append(line.get("cost", {}) | line.get("scalars", {}) | line)
    table = pd.DataFrame(rows)
    absent = [name for name in COLUMNS if name not in table]
    table = table.reindex(columns=[*table, *absent])
    types = dict.fromkeys(TEXTS, str) | dict.fromkeys(NUMBERS, float)
    return table.astype(types)


def append_run(folder: Path, line: dict) -> None:
    """Add the line of a run; it takes the place of an earlier failure of the same run."""
    path = folder / "runs.jsonl"
    with FileLock(folder / "lock"):
        text = path.read_text(encoding="utf-8") if path.is_file() else ""
        kept = []
        for old_line in text.split("\n"):  # no splitlines: JSON may hold other line ends
            if old_line:
                old = json.loads(old_line)
                is_failure = old["id"] == line["id"] and old["status"] == "failed"
                if not is_failure:
                    kept.append(old_line)
        kept.append(json.dumps(line, ensure_ascii=False))
        write_text(path, "\n".join(kept) + "\n")
