r"""Measure one checkpoint on the world's probe files: kinds of answers, and NLL of the references.

    python evaluation/study/measure.py out/study/RUN --output record.json
    python evaluation/study/measure.py out/study/RUN_read_rows --sets combinations unseen \
        --add_to RUN --output record.json

run.py calls it for each run. --add_to RUN measures a checkpoint that update_analysis.py made from
RUN, as line RUN@read_rows of runs.jsonl. prompts.csv has the prompts in the order of the answers.
"""

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import numpy as np
import pandas as pd

from dataset.lm_dataset import read_jsonl
from dataset.world.generate import FILES_DIR, PROBES, list_files
from evaluation.probe.answers import probe
from evaluation.probe.likelihood import measure_nll
from evaluation.probe.prompts import read_prompts
from evaluation.probe.world_facts import rank_facts
from evaluation.probe.world_measure import is_right, replace_thing, split_answer
from evaluation.study.data import measure_random_facts
from evaluation.study.results import LETTERS, append_run
from evaluation.study.settings import RESULTS_DIR, Study, read_study
from model.checkpoint import Checkpoint, load_checkpoint, weights_fingerprint
from model.files import UserError, make_parser, read_json, run_script, write_json, write_text
from model.reachability import reachable_probability

MOST_DONORS = 20  # answers to other prompts of the skill, for the chance level


def find_chance(record: dict, others: list[dict]) -> float:
    """Return the share of other answers of the skill that are right once they name this thing."""
    new = split_answer(record)[0]
    donors = [other for other in others[:MOST_DONORS] if other["things"] != record["things"]]
    answers = [replace_thing(answer, old, new) for old, answer in map(split_answer, donors)]
    return round(float(np.mean([is_right(answer, record) for answer in answers] or [0])), 4)


def check_prompts(data: dict[str, Path], path: Path) -> None:
    """Write prompts.csv at the first run, and refuse other prompts after that.

    Columns: id, set, half, skill, cluster (thing, or thing and skill), chance.
    """
    files = [data[f"{name}_{half}"] for name in PROBES for half in PROBES[name]]
    records = [record for file in files for _, record in read_jsonl(file)]
    table = pd.DataFrame(records)[["id", "set", "half", "skill"]]
    things = pd.Series(["+".join(record["things"]) for record in records])
    table["cluster"] = things.where(table["set"] != "combinations", things + ":" + table.skill)
    rows = table.to_numpy().tolist()
    if not path.is_file():
        for _, group in table.groupby(["set", "skill"]):
            others = [records[i] for i in group.index]
            table.loc[group.index, "chance"] = [find_chance(one, others) for one in others]
        write_text(path, table.to_csv(index=False))
    if pd.read_csv(path, keep_default_na=False).iloc[:, :-1].to_numpy().tolist() != rows:
        raise UserError(f"{path}: the world has other prompts now; restore the world of this study")


def measure_checkpoint(
    study: Study,
    checkpoint: Checkpoint,
    data: dict[str, Path],
    base: str,
    names: list[str],
    only_tune: bool,
) -> dict:
    """Return outcomes (letters of `LETTERS`, a word a draw), nats and scalars of a checkpoint.

    `base`, a base or a kind of bases in study.toml, decides how held-out text is read.
    `names` are the sets to ask; facts are ranked if all sets are asked.
    `only_tune` asks the tuning half of the combinations alone, greedily.
    """
    model, tokenizer = checkpoint
    sets = {name: [data[f"{name}_{half}"] for half in PROBES[name]] for name in names}
    options, length = study.probe, study.common["max_seq_len"]
    if only_tune:
        sets = {"combinations": [data["combinations_tune"]]}
        options = options | {"decodings": ["greedy"]}
    outcomes = {}
    for name, paths in sets.items():
        prompts = [prompt for path in paths for prompt in read_prompts(path)]
        samples = pd.DataFrame(probe(checkpoint, prompts, **options)).fillna({"seed": 0})
        letters = samples.assign(letter=samples.outcome.map(LETTERS))
        draws = letters.groupby(["decoding", "seed"]).letter.agg("".join)
        outcomes[name] = draws.groupby("decoding").agg(" ".join).to_dict()
    nll = measure_nll(checkpoint, "sft", sets["combinations"], length, 32)["sequences"]
    count = sum(1 for _ in read_jsonl(data["combinations_tune"]))  # these come first
    flags = study.bases[base.rpartition("-")[2].rstrip("0123456789")]
    kind = "pretrain_wrapped" if flags.get("wrap_documents") else "pretrain"
    text = measure_nll(checkpoint, kind, [data["pretrain_valid"]], flags["max_seq_len"], 32)
    scalars = {
        "tune_correct": outcomes["combinations"]["greedy"][:count].count("c") / count,
        "nll_text": text["nats_per_token"],
        "reachable_end": reachable_probability(model, tokenizer.eos_token_id),
    }
    table = pd.DataFrame(nll)
    for half, rows in {"tune": table[:count], "test": table[count:]}.items():
        one = rows.sum()
        if one.tokens:
            scalars[f"{half}_nll"] = (one.nats - one.end_nats) / (one.tokens - one.ends)
            scalars[f"{half}_end_nll"] = one.end_nats / one.ends
    for name in ("combinations", "unseen") if len(sets) == len(PROBES) else ():
        scalars[f"facts_{name}"] = rank_facts(checkpoint, sets[name])["share"]
    return {"outcomes": outcomes, "scalars": scalars, "nll": nll}


def find_whole(args: argparse.Namespace) -> dict:
    """Return the line of the run --add_to, under the name of its part; refuse what does not fit."""
    if args.facts or args.only_tune:
        raise UserError("--add_to: a part is asked whole sets; drop --facts and --only_tune")
    lines = {line["id"]: line for _, line in read_jsonl(args.study_dir / "runs.jsonl")}
    run, _, part = args.folder.resolve().name.partition(f"{args.add_to}_")
    name = f"{args.add_to}@{part}"
    if lines.get(args.add_to, {}).get("status") != "completed" or run or not part:
        raise UserError(f"--add_to {args.add_to}: no completed run, or {args.folder} is not of it")
    if name in lines:
        raise UserError(f"--add_to: runs.jsonl has {name} already; remove its line first")
    return lines[args.add_to] | {"id": name, "step": None}


def main() -> None:
    """Measure a checkpoint and write the record."""
    parser = make_parser(__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--study_dir", type=Path, default=RESULTS_DIR, help="of study.toml")
    parser.add_argument("--world", type=Path, default=FILES_DIR, help="folder of its files")
    parser.add_argument("--base", default="wrapped", help="base or kind (wrapped)")
    parser.add_argument("--sets", nargs="+", choices=PROBES, default=[*PROBES], help="(all)")
    parser.add_argument("--only_tune", action="store_true", help="ask the tuning half alone")
    parser.add_argument("--facts", type=Path, help="ask for these random facts alone")
    parser.add_argument("--add_to", help="run of study_dir whose changed checkpoint this is")
    args = parser.parse_args()
    if not args.facts and "combinations" not in args.sets:
        parser.error("--sets: name combinations as well; tune_correct is measured on it")
    study, data = read_study(args.study_dir), list_files(args.world)
    run = find_whole(args) if args.add_to else {"base": args.base}
    check_prompts(data, args.study_dir / "prompts.csv")
    checkpoint = load_checkpoint(args.folder)
    if args.facts:
        trained = read_json(args.folder / "run.json")["trainable_parameters"]
        found = {"outcomes": {}, "scalars": measure_random_facts(checkpoint, args.facts, trained)}
    else:
        found = measure_checkpoint(study, checkpoint, data, run["base"], args.sets, args.only_tune)
    found["weights"] = weights_fingerprint(checkpoint[0])
    write_json(args.output, found)
    if args.add_to:
        del found["nll"]
        append_run(args.study_dir, run | found)


if __name__ == "__main__":
    run_script(main)
