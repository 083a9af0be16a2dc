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
from evaluation.probe.prompts import Prompt, encode_prompts, read_prompts
from evaluation.study.results import LETTERS, RESULTS_DIR
from evaluation.study.settings import STUDY_FILE, ProbeSettings, read_study
from model.checkpoint import load_checkpoint
from model.files import UserError, run_script, write_json
from model.model_minimind import IGNORE_INDEX, weights_fingerprint
from model.reachability import reachable_probability

MOST_DONORS = 20  # answers to other prompts of the skill, for the chance level


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
    table = pd.DataFrame(records)[["id", "set", "half", "skill"]]
    table["thing"] = ["+".join(record["things"]) for record in records]
    is_pair = table["set"] == "combinations"
    table["cluster"] = table.thing.where(~is_pair, table.thing + ":" + table.skill)
    for _, group in table.groupby(["set", "skill"]):
        others = [records[i] for i in group.index]
        table.loc[group.index, "chance"] = [find_chance(one, others) for one in others]
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
    checkpoint: Checkpoint, prompts: list[Prompt], draws: dict[str, int], probing: ProbeSettings
) -> dict[str, np.ndarray]:
    """Return, by decoding, letters of `LETTERS`: (draws, prompts)."""
    letters = {}
    for name, count in draws.items():
        settings = range(1, count + 1), probing.max_new_tokens, probing.batch_size
        samples = probe(checkpoint, prompts, [name], *settings)  # draw by draw
        found = np.array([LETTERS[sample["outcome"]] for sample in samples])
        letters[name] = found.reshape(count, len(prompts))
    return letters


def measure_references(checkpoint: Checkpoint, prompts: list[Prompt], batch_size: int) -> dict:
    """Return nats, end_nats, tokens and ends of each prompt's reference answer, its last turn."""
    model, tokenizer = checkpoint
    whole = encode_conversations(tokenizer, [one.record["conversations"] for one in prompts])
    before = encode_prompts(tokenizer, prompts)
    samples, end = [], tokenizer.eos_token_id
    for (ids, labeled), prompt in zip(whole, before, strict=True):
        is_answer = np.array(labeled) & (np.arange(len(ids)) >= len(prompt))
        samples.append((np.array(ids), np.where(is_answer, ids, IGNORE_INDEX)))
    nats, end_nats = sum_nats(model, samples, batch_size, end).T
    tokens = [(labels != IGNORE_INDEX).sum() for _, labels in samples]
    ends = [(labels == end).sum() for _, labels in samples]
    return {"nats": nats, "end_nats": end_nats, "tokens": tokens, "ends": ends}


def measure_checkpoint(
    folder: Path, prompts_csv: Path, only_tune: bool, probing: ProbeSettings
) -> dict:
    """Return outcomes, nats and scalars of a checkpoint.

    Args:
        prompts_csv: written at the first run, compared with the world's prompts after that.
        only_tune: ask the tuning half alone, greedily; other prompts have the letter "-".
    """
    data = ensure_world()
    paths = [data[f"{name}_{half}"] for name in PROBES for half in ("tune", "test")]
    table = check_prompts([record for path in paths for _, record in read_jsonl(path)], prompts_csv)
    model, tokenizer = checkpoint = load_checkpoint(folder)
    rows = table.index[(table.half == "tune") | (not only_tune)]
    prompts = [prompt for path in paths for prompt in read_prompts(path)]
    prompts = [prompts[row] for row in rows]
    draws = {"greedy": 1} if only_tune else probing.draws
    letters = {
        name: pd.DataFrame(found, columns=rows).reindex(columns=table.index, fill_value="-")
        for name, found in ask_prompts(checkpoint, prompts, draws, probing).items()
    }
    nll = pd.DataFrame(measure_references(checkpoint, prompts, probing.batch_size), rows)
    nll = nll.reindex(table.index)
    is_tuning = (table["set"] == "combinations") & (table.half == "tune")
    tuning = nll[is_tuning].sum()
    text = measure_nll(checkpoint, "pretrain", [data["pretrain_valid"]], 340, 32)
    outcomes, nats = {}, {}
    for name, group in table.groupby("set", sort=False):
        nats[name] = nll.loc[group.index].to_dict("list")
        outcomes[name] = {
            decoding: " ".join(found[group.index].sum(axis=1))
            for decoding, found in letters.items()
        }
    scalars = {
        "tune_correct": float((letters["greedy"].loc[0, is_tuning] == "c").mean()),
        "tune_nll": (tuning.nats - tuning.end_nats) / (tuning.tokens - tuning.ends),
        "nll_text": text["nats_per_token"],
        "reachable_end": float(reachable_probability(model, [tokenizer.eos_token_id])[0]),
    }
    weights = weights_fingerprint(model)
    return {"weights": weights, "outcomes": outcomes, "scalars": scalars, "nll": nats}


def main() -> None:
    """Measure a checkpoint and write the record."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--study", type=Path, default=STUDY_FILE)
    parser.add_argument("--prompts_csv", type=Path, default=RESULTS_DIR / "prompts.csv")
    parser.add_argument("--only_tune", action="store_true", help="ask the tuning half alone")
    args = parser.parse_args()
    probing = read_study(args.study).probe
    record = measure_checkpoint(args.folder, args.prompts_csv, args.only_tune, probing)
    write_json(args.output, record)


if __name__ == "__main__":
    run_script(main)
