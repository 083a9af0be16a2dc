"""The study's results on disk: a line a run in runs.jsonl, nats by sequence in nll.parquet."""

import json
from pathlib import Path

import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq

from dataset.checks import KINDS
from dataset.lm_dataset import read_jsonl
from model.files import replace_file, write_text

RESULTS_DIR = Path(__file__).parent
LETTERS = dict(zip(KINDS, "cbelofw", strict=True))  # of the outcome strings
# The row without an id holds what is the same for all runs: tokens and end tokens by sequence.
SCHEMA = pa.schema(
    [
        ("id", pa.string()),
        ("edition", pa.int8()),
        ("set", pa.string()),
        ("part", pa.string()),  # of the update; "" is the whole run
        ("nats", pa.list_(pa.float32())),
        ("end_nats", pa.list_(pa.float32())),  # those of the end tokens among them
        ("tokens", pa.list_(pa.int32())),
        ("ends", pa.list_(pa.int32())),
    ]
)
PACKING = {
    "compression": "zstd",
    "compression_level": 19,
    "use_dictionary": ["id", "set", "part"],
    "use_byte_stream_split": ["nats.list.element", "end_nats.list.element"],
}


def read_runs(folder: Path, edition: int) -> pd.DataFrame:
    """Read the runs of an edition; each scalar is a column of its own."""
    path = folder / "runs.jsonl"
    lines = [line for _, line in read_jsonl(path)] if path.is_file() else []
    rows = [line | line.get("scalars", {}) for line in lines if line["edition"] == edition]
    table = pd.DataFrame(rows)
    needed = ["id", "size", "base", "arm", "learning_rate", "seed", "status", "start", "data"]
    needed += ["epochs", "samples", "tune_correct", "tune_nll"]
    needed += ["train_data", "weights", "base_fingerprint"]
    table = table.reindex(columns=[*table, *(name for name in needed if name not in table)])
    return table.astype({"id": str, "status": str})


def read_nll(folder: Path, edition: int) -> pd.DataFrame:
    """Read the nats of an edition's runs, a row a run and set."""
    return pd.read_parquet(folder / "nll.parquet", filters=[("edition", "==", edition)])


def append_run(folder: Path, line: dict, nll: list[dict]) -> None:
    """Add a run: its nats first, so that no line of runs.jsonl is without them.

    Args:
        nll: rows of `SCHEMA`; a row without an id is added once a set.
    """
    path = folder / "nll.parquet"
    table = pq.read_table(path, schema=SCHEMA) if path.is_file() else SCHEMA.empty_table()
    keys = [column.to_pylist() for column in table.select(["edition", "id", "set", "part"])]
    known = set(zip(*keys, strict=True))
    fresh = [r for r in nll if (r["edition"], r["id"], r["set"], r["part"]) not in known]
    if fresh:
        table = pa.concat_tables([table, pa.Table.from_pylist(fresh, schema=SCHEMA)])
        aside = path.with_name(f"{path.name}.tmp")
        pq.write_table(table, aside, **PACKING)
        replace_file(aside, path)
    path = folder / "runs.jsonl"
    lines = path.read_text(encoding="utf-8") if path.is_file() else ""
    write_text(path, lines + json.dumps(line, ensure_ascii=False) + "\n")
