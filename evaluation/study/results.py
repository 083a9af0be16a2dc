"""The study's results on disk: a line a run in runs.jsonl, nats by sequence in nll.parquet."""

import json
from operator import itemgetter
from pathlib import Path

import pandas as pd
import pyarrow as pa
from filelock import FileLock

from dataset.checks import KINDS
from dataset.lm_dataset import read_jsonl
from model.files import replace_file, write_text

RESULTS_DIR = Path(__file__).parent
LETTERS = dict(zip(KINDS, "cbelofw", strict=True))  # of the outcome strings
COLUMNS = ["id", "size", "base", "arm", "learning_rate", "seed", "status", "start", "data"]
COLUMNS += ["epochs", "samples", "step", "outcomes", "train_data", "weights"]
COLUMNS += ["base_fingerprint", "tune_correct", "tune_nll", "nll_text", "reachable_end"]
# The row without an id holds what is the same for all runs: tokens and end tokens by sequence.
KEYS = ["id", "edition", "set", "part"]  # part: of the update; "" is the whole run
SCHEMA = pa.schema(
    dict.fromkeys(KEYS, pa.string())
    | {"edition": pa.int8()}
    | dict.fromkeys(["nats", "end_nats"], pa.list_(pa.float32()))
    | dict.fromkeys(["tokens", "ends"], pa.list_(pa.int32()))
)
PACKING = {
    "compression": "zstd",
    "compression_level": 19,
    "use_dictionary": ["id", "set", "part"],
    "use_byte_stream_split": ["nats.list.element", "end_nats.list.element"],
}


def read_runs(folder: Path, edition: int) -> pd.DataFrame:
    """Read the runs of an edition; each scalar and each cost is a column of its own."""
    path = folder / "runs.jsonl"
    lines = [line for _, line in read_jsonl(path)] if path.is_file() else []
    lines = [line for line in lines if line["edition"] == edition]
    table = pd.DataFrame([line | line.get("cost", {}) | line.get("scalars", {}) for line in lines])
    table = table.reindex(columns=[*table, *(name for name in COLUMNS if name not in table)])
    return table.astype({"id": str, "status": str, "samples": float})


def append_run(folder: Path, line: dict, nll: list[dict]) -> None:
    """Add a run: its nats first, so that no line of runs.jsonl is without them.

    The line takes the place of an earlier failure of the same run.

    Args:
        nll: rows of `SCHEMA`; a row without an id is added once a set.
    """
    with FileLock(folder / "lock"):
        path = folder / "nll.parquet"
        if nll:
            tables = [pd.read_parquet(path)] if path.is_file() else []
            table = pd.concat([*tables, pd.DataFrame(nll)]).drop_duplicates(KEYS)
            aside = path.with_name(f"{path.name}.tmp")
            table.to_parquet(aside, index=False, schema=SCHEMA, **PACKING)
            replace_file(aside, path)
        path = folder / "runs.jsonl"
        lines = path.read_text(encoding="utf-8").split("\n") if path.is_file() else []
        is_failure = itemgetter("id", "status")
        lines = [x for x in lines if x and is_failure(json.loads(x)) != (line["id"], "failed")]
        write_text(path, "\n".join([*lines, json.dumps(line, ensure_ascii=False)]) + "\n")
