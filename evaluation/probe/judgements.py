"""Compare the checks with judgements made by reading.

    python evaluation/probe/judgements.py      # seconds; writes judgements.json

crafted_answers.jsonl holds answers to test prompts that were made up before the checks scored them.
The wrong ones exchange subject and object, say the opposite, have verbs that make no sense or break
the instruction. The right ones are in the words that a person might use. Both take prompts of
different skills, drawn at random.

judged_answers.csv says which saved answers of three models are right, those of
evaluation/study/answers, with the outcome of the checks in sight.

A language model that had read the checks wrote both files. Nobody else has judged these answers.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import pandas as pd

from dataset.world.generate import ensure_world
from evaluation.probe.world_measure import is_right, read_records
from model.cli import make_parser, run_script
from model.files import read_json, write_json

JUDGEMENTS_FILE = Path(__file__).with_suffix(".json")
CRAFTED_FILE = JUDGEMENTS_FILE.with_name("crafted_answers.jsonl")
SAVED_FILE = JUDGEMENTS_FILE.with_name("judged_answers.csv")


def judge_crafted(crafted: list[dict], records: list[dict]) -> pd.DataFrame:
    """Return a row a crafted answer: what its author and what the checks say of it."""
    record_of_id = {record["id"]: record for record in records}
    rows = []
    for line in crafted:
        record = record_of_id[line["id"]]
        is_exact = "exact" in record["check"]
        row = {
            "answers": "crafted, every word checked" if is_exact else "crafted, facts checked",
            "by reading": "right" if line["is_right"] else "wrong",
            "is_correct": is_right(line["answer"], record),
        }
        rows.append(row)
    return pd.DataFrame(rows)


def read_judged(path: Path) -> pd.DataFrame:
    """Return the same columns for the saved answers that were judged by reading."""
    saved = pd.read_csv(path)
    saved["answers"] = "saved, of 3 models"
    saved["by reading"] = saved["by_hand"]
    saved["is_correct"] = saved["outcome"] == "correct"
    return saved[["answers", "by reading", "is_correct"]]


def tabulate_judgements(path: Path = JUDGEMENTS_FILE) -> pd.DataFrame:
    """Return how many answers of each kind the checks call correct."""
    return pd.DataFrame(read_json(path)["judgements"])


def main(argv: list[str] | None = None) -> None:
    """Judge the answers, write the JSON file and print the table."""
    parser = make_parser(__doc__)
    parser.add_argument("--output", type=Path, default=JUDGEMENTS_FILE, help="a JSON file")
    args = parser.parse_args(argv)
    records = read_records(ensure_world()["combinations_test"])
    crafted = read_records(CRAFTED_FILE)
    saved = read_judged(SAVED_FILE)
    judged = pd.concat([judge_crafted(crafted, records), saved])

    groups = judged.groupby(["by reading", "answers"], sort=False)
    table = groups["is_correct"].agg(["size", "sum"]).reset_index()
    table = table.rename(columns={"size": "number", "sum": "correct by the checks"})
    write_json(args.output, {"judgements": table.to_dict("records")})
    print(tabulate_judgements(args.output).to_string(index=False))


if __name__ == "__main__":
    run_script(main)
