"""Read and append results: runs.jsonl has a line for each run. nll.parquet is of edition 1."""

import json
from operator import itemgetter
from pathlib import Path

import pandas as pd
from filelock import FileLock

from dataset.lm_dataset import read_jsonl
from dataset.world.checks import KINDS
from model.cli import UserError
from model.files import write_text

LETTERS = dict(zip(KINDS, "cbelofw", strict=True))  # of the outcome strings
COLUMNS = ["id", "size", "base", "arm", "learning_rate", "seed", "status", "start", "data"]
COLUMNS += ["epochs", "samples", "step", "outcomes", "train_data", "weights", "parameters"]
COLUMNS += ["facts_combinations", "facts_unseen", "bits_per_parameter", "stored"]
COLUMNS += ["base_fingerprint", "tune_correct", "tune_nll", "nll_text", "reachable_end"]
COLUMNS += ["trainable_parameters"]


def read_runs(folder: Path, edition: int) -> pd.DataFrame:
    """Read the runs of an edition; each scalar and each cost is a column of its own.

    The files of several machines join by concatenation, so a run may stand in it twice by mistake.
    """
    path = folder / "runs.jsonl"
    lines = []
    places = {}
    for where, line in read_jsonl(path) if path.is_file() else []:
        if line["edition"] != edition:
            continue
        first = places.setdefault(line["id"], where)
        if first != where:
            raise UserError(f"{where}: {line['id']} is in {first} too; delete one of both lines")
        lines.append(line)
    # A cost has the run's last step, the line of a kept checkpoint its own.
    table = pd.DataFrame([line.get("cost", {}) | line.get("scalars", {}) | line for line in lines])
    table = table.reindex(columns=[*table, *(name for name in COLUMNS if name not in table)])
    texts, numbers = ["id", "status", "data"], ["samples", "bits_per_parameter", "stored"]
    numbers += ["parameters", "trainable_parameters"]
    return table.astype(dict.fromkeys(texts, str) | dict.fromkeys(numbers, float))


def append_run(folder: Path, line: dict) -> None:
    """Add the line of a run; it takes the place of an earlier failure of the same run."""
    with FileLock(folder / "lock"):
        path = folder / "runs.jsonl"
        lines = path.read_text(encoding="utf-8").split("\n") if path.is_file() else []
        is_failure = itemgetter("id", "status")
        lines = [x for x in lines if x and is_failure(json.loads(x)) != (line["id"], "failed")]
        write_text(path, "\n".join([*lines, json.dumps(line, ensure_ascii=False)]) + "\n")
