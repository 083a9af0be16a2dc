"""Measure one checkpoint on the world's probe files: kinds of answers, and NLL of the references.

    python evaluation/study/measure.py out/study/RUN --output record.json

run.py calls it in a process of its own for each run. prompts.csv lists the prompts in the order of
the outcome strings and of nll.parquet.
"""

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import numpy as np
import pandas as pd

from dataset.checks import judge_answer
from dataset.lm_dataset import encode_conversations, read_jsonl
from dataset.world.generate import PROBES, ensure_world
from evaluation.probe.answers import Checkpoint, probe
from evaluation.probe.likelihood import measure_nll, sum_nats
from evaluation.probe.prompts import Prompt
from evaluation.study.results import LETTERS, RESULTS_DIR
from evaluation.study.settings import STUDY_FILE, ProbeSettings, read_study
from model.checkpoint import load_checkpoint
from model.files import UserError, run_script, write_json
from model.model_minimind import IGNORE_INDEX, weights_fingerprint
from model.reachability import reachable_probability

MOST_DONORS = 20  # answers to other prompts of the skill, for the chance level


def read_probe_files(data: dict[str, Path]) -> list[dict]:
    """Read the world's probe files, set by set, the tuning half first."""
    paths = [data[f"{name}_{half}"] for name in PROBES for half in ("tune", "test")]
    return [record for path in paths for _, record in read_jsonl(path)]


def find_chance(record: dict, others: list[dict]) -> float:
    """Return the share of other answers of the skill that are right once they name this thing."""
    answers = [
        other["conversations"][-1]["content"].lower().replace(old.lower(), new.lower())
        for other in others[:MOST_DONORS]
        for old, new in zip(other["things"][:1], record["things"][:1], strict=False)
        if other["things"] != record["things"]
    ]
    found = [judge_answer(answer, True, record) == "correct" for answer in answers]
    return round(float(np.mean(found)), 4) if found else 0.0


def list_prompts(records: list[dict]) -> pd.DataFrame:
    """Describe the prompts: set, half, skill, cluster (thing, or thing and skill), chance."""
    by_skill: dict[tuple, list[dict]] = {}
    for record in records:
        by_skill.setdefault((record["set"], record["skill"]), []).append(record)
    table = pd.DataFrame(records)[["id", "set", "half", "skill"]]
    table["thing"] = ["+".join(record["things"]) for record in records]
    is_pair = table["set"] == "combinations"
    table["cluster"] = table.thing.where(~is_pair, table.thing + ":" + table.skill)
    table["chance"] = [find_chance(r, by_skill[r["set"], r["skill"]]) for r in records]
    return table


def check_prompts(records: list[dict], path: Path) -> pd.DataFrame:
    """Write prompts.csv at the first run, and refuse other prompts after that."""
    if not path.is_file():
        list_prompts(records).to_csv(path, index=False)
    table = pd.read_csv(path, keep_default_na=False)
    if table.id.tolist() != [record["id"] for record in records]:
        raise UserError(f"{path}: the world has other prompts now; restore the world of this study")
    return table


def ask_prompts(
    checkpoint: Checkpoint, records: list[dict], draws: dict, study: ProbeSettings
) -> dict:
    """Return, by decoding, a string a draw with one letter of `LETTERS` a prompt."""
    prompts = [
        Prompt(
            record["id"],
            record["set"],
            record["conversations"][:-1],
            check=record["check"] or {"about": []},
            reference=record["conversations"][-1]["content"],
        )
        for record in records
    ]
    letters = {}
    for name, count in draws.items():
        seeds, settings = range(1, count + 1), (study.max_new_tokens, study.batch_size)
        samples = probe(checkpoint, prompts, [name], seeds, *settings)
        found = "".join(LETTERS[sample["outcome"]] for sample in samples)  # draw by draw
        letters[name] = [found[i : i + len(prompts)] for i in range(0, len(found), len(prompts))]
    return letters


def measure_references(
    checkpoint: Checkpoint, records: list[dict], batch_size: int
) -> pd.DataFrame:
    """Return nats, end_nats, tokens and ends of each prompt's reference answer, its last turn."""
    model, tokenizer = checkpoint
    whole = [record["conversations"] for record in records]
    opened = encode_conversations(tokenizer, [c[:-1] for c in whole], generation_prompt=True)
    samples = []
    for (ids, labeled), (prompt, _) in zip(
        encode_conversations(tokenizer, whole), opened, strict=True
    ):
        counted = np.array(labeled) & (np.arange(len(ids)) >= len(prompt))
        samples.append((np.array(ids), np.where(counted, ids, IGNORE_INDEX)))
    end = tokenizer.eos_token_id
    nats = sum_nats(model, samples, batch_size, end)
    table = pd.DataFrame(nats, columns=["nats", "end_nats"])
    table["tokens"] = [int((labels != IGNORE_INDEX).sum()) for _, labels in samples]
    table["ends"] = [int((labels == end).sum()) for _, labels in samples]
    return table


def measure_checkpoint(
    folder: Path, prompts_csv: Path, only_tune: bool, study: ProbeSettings
) -> dict:
    """Return outcomes, nats and scalars of a checkpoint.

    Args:
        prompts_csv: written at the first run, compared with the world's prompts after that.
        only_tune: ask the tuning half alone, greedily; other prompts have the letter "-".
    """
    data = ensure_world()
    records = read_probe_files(data)
    prompts = check_prompts(records, prompts_csv)
    model, tokenizer = checkpoint = load_checkpoint(folder)
    model.eval()
    asked = prompts.index[prompts.half == "tune"] if only_tune else prompts.index
    chosen = [records[i] for i in asked]
    letters = ask_prompts(checkpoint, chosen, {"greedy": 1} if only_tune else study.draws, study)
    nll = measure_references(checkpoint, chosen, study.batch_size).set_axis(asked)
    is_tuning = (prompts["set"] == "combinations") & (prompts.half == "tune")
    tuning = nll[is_tuning[asked]].sum()
    greedy = pd.Series(list(letters["greedy"][0]), asked)[is_tuning[asked]]
    text = measure_nll(checkpoint, "pretrain", [data["pretrain_valid"]], 340, 32)
    bound = reachable_probability(model, [tokenizer.eos_token_id])
    outcomes, nats = {}, {}
    for name, group in prompts.groupby("set", sort=False):
        of_set = {
            decoding: [
                pd.Series(list(draw), asked).reindex(group.index, fill_value="-") for draw in draws
            ]
            for decoding, draws in letters.items()
        }
        outcomes[name] = {key: " ".join(map("".join, draws)) for key, draws in of_set.items()}
        nats[name] = nll.reindex(group.index).to_dict("list")
    return {
        "weights": weights_fingerprint(model),
        "outcomes": outcomes,
        "scalars": {
            "tune_correct": float((greedy == "c").mean()),
            "tune_nll": (tuning.nats - tuning.end_nats) / (tuning.tokens - tuning.ends),
            "nll_text": text["nats_per_token"],
            "reachable_end": float(bound[0]),
        },
        "nll": nats,
    }


def main() -> None:
    """Measure a checkpoint and write the record."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--study", type=Path, default=STUDY_FILE)
    parser.add_argument("--prompts_csv", type=Path, default=RESULTS_DIR / "prompts.csv")
    parser.add_argument("--only_tune", action="store_true", help="ask the tuning half alone")
    args = parser.parse_args()
    settings = read_study(args.study).probe
    record = measure_checkpoint(args.folder, args.prompts_csv, args.only_tune, settings)
    write_json(args.output, record)


if __name__ == "__main__":
    run_script(main)
