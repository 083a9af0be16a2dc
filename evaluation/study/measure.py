r"""Measure one checkpoint on the world's probe files: kinds of answers, and NLL of the references.

    python evaluation/study/measure.py out/study/RUN --output record.json
    python evaluation/study/measure.py out/study/RUN_read_rows --sets combinations unseen \
        --add_to RUN --output record.json

run.py calls it for each run. --round3 asks the old and the fresh prompts, --no_template asks them
also without the chat template, --full_sft also with the adapter on these weights. --add_to RUN
measures a checkpoint that update_analysis.py made from RUN, as line RUN@read_rows of runs.jsonl.
prompts.csv and prompts_3.csv have the prompts in the order of the answers.
"""

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import numpy as np
import pandas as pd
import torch

from dataset.lm_dataset import read_jsonl
from dataset.world.generate import FILES_DIR, PROBES, list_files
from evaluation.probe.answers import encode_prompts, probe
from evaluation.probe.likelihood import measure_nll
from evaluation.probe.prompts import Prompt, read_prompts
from evaluation.probe.world_facts import rank_facts
from evaluation.probe.world_measure import is_right, replace_thing, split_answer
from evaluation.study.data import FACT_BITS
from evaluation.study.fresh_prompts import FRESH_FILE
from evaluation.study.results import LETTERS, append_run
from evaluation.study.settings import RESULTS_DIR, Study, read_study
from model.checkpoint import Checkpoint, load_checkpoint
from model.cli import UserError, make_parser, run_script
from model.files import read_json, write_json, write_text
from model.model_minimind import weights_fingerprint
from model.reachability import reachable_probability
from trainer.arguments import MAX_SEQ_LEN

NOT_ASKED = "-"  # in the place of an outcome's letter
ROUND3_SETS = ["combinations", "unseen"]  # the old sets that round 3 asks
MOST_DONORS = 20  # answers to other prompts of the skill, for the chance level


def find_chance(record: dict, others: list[dict]) -> float:
    """Return the share of other answers of the skill that are right once they name this thing."""
    new_prompt, _ = split_answer(record)
    right = []
    for donor in others[:MOST_DONORS]:
        if donor["things"] != record["things"]:
            old_prompt, answer = split_answer(donor)
            answer = replace_thing(answer, old_prompt, new_prompt)
            right.append(is_right(answer, record))
    return round(float(np.mean(right)), 4) if right else 0.0


def check_prompts(files: list[Path], path: Path) -> None:
    """Write the table of the prompts of probe files at the first run, and refuse others after that.

    Columns: id, set, half, skill, cluster (thing, or thing and skill), chance.
    """
    records = [record for file in files for _, record in read_jsonl(file)]
    table = pd.DataFrame(records)[["id", "set", "half", "skill"]]  # a row a prompt
    things = pd.Series(["+".join(record["things"]) for record in records])
    # What a combination holds out is a thing with a skill; other sets hold out whole things.
    has_skill = table["set"].str.endswith("combinations")
    table["cluster"] = things.where(~has_skill, things + ":" + table["skill"])
    rows = table.to_numpy().tolist()
    if not path.is_file():
        for _, group in table.groupby(["set", "skill"]):
            alike = [records[index] for index in group.index]
            table.loc[group.index, "chance"] = [find_chance(record, alike) for record in alike]
        write_text(path, table.to_csv(index=False))
    saved = pd.read_csv(path, keep_default_na=False).drop(columns="chance")
    if saved.to_numpy().tolist() != rows:
        raise UserError(f"{path}: the world has other prompts now; restore the world of this study")


def ask(
    checkpoint: Checkpoint, prompts: list[Prompt], options: dict, has_template: bool = True
) -> dict[str, str]:
    """Return the outcomes of prompts by decoding: a letter a prompt, a word a draw.

    Without the chat template only prompts of one turn are asked; `NOT_ASKED` stands for the others.
    """
    asked = [prompt for prompt in prompts if has_template or len(prompt.messages) == 1]
    samples = probe(checkpoint, asked, **options, has_template=has_template)
    letters: dict[tuple, dict[str, str]] = {}  # by decoding and seed, then by prompt
    for sample in samples:
        draw = (sample["decoding"], sample["seed"])
        of_prompt = letters.setdefault(draw, {})
        of_prompt[sample["id"]] = LETTERS[sample["outcome"]]
    words: dict[str, list[str]] = {}
    for (decoding, _), of_prompt in letters.items():
        word = "".join(of_prompt.get(prompt.id, NOT_ASKED) for prompt in prompts)
        words.setdefault(decoding, []).append(word)
    return {decoding: " ".join(draws) for decoding, draws in words.items()}


@torch.inference_mode()
def find_first_end(checkpoint: Checkpoint, prompts: list[Prompt], has_template: bool) -> float:
    """Return the mean probability, at temperature 1, that an answer begins with the end token."""
    model, tokenizer = checkpoint
    encoded = encode_prompts(tokenizer, prompts, has_template)
    of_ends = []
    for ids in encoded:
        logits = model(torch.tensor([ids]), logits_to_keep=1).logits[0, -1]  # (vocabulary,)
        probabilities = logits.float().softmax(dim=-1)
        of_ends.append(probabilities[tokenizer.eos_token_id].item())
    return float(np.mean(of_ends))


def measure_way(
    study: Study, checkpoint: Checkpoint, sets: dict[str, list[Prompt]], way: str
) -> dict[str, dict]:
    """Return the outcomes and the scalar of one more way of asking: "no_template" or "on_fft".

    Outcomes have names such as `combinations/no_template`. One draw is sampled, not three.
    """
    has_template = way != "no_template"
    options = study.probe | {"seeds": study.probe["seeds"][:1]}
    outcomes = {}
    for name, prompts in sets.items():
        outcomes[f"{name}/{way}"] = ask(checkpoint, prompts, options, has_template)
    fresh = [prompt for prompt in sets["fresh_combinations"] if len(prompt.messages) == 1]
    first_end = find_first_end(checkpoint, fresh, has_template)
    return {"outcomes": outcomes, "scalars": {f"first_end/{way}": first_end}}


def count_lines(path: Path) -> int:
    """Count the records of a JSONL file."""
    return sum(1 for _ in read_jsonl(path))


def measure_nats(
    study: Study, checkpoint: Checkpoint, data: dict[str, Path], base: str, paths: list[Path]
) -> tuple[dict, dict[str, float]]:
    """Return nats by reference conversation of the combinations, and scalars: NLL of both halves.

    `base`, a base or a kind of bases in study.toml, decides how held-out text is read. `paths` are
    the files of the combinations, the tuning half first. Scalars are in nats a token.
    """
    nll = measure_nll(checkpoint, "sft", paths, study.common["max_seq_len"], 32)["sequences"]
    kind_of_base = base.rpartition("-")[2].rstrip("0123456789")
    flags = study.bases[kind_of_base]
    kind = "pretrain_wrapped" if flags.get("wrap_documents") else "pretrain"
    text = measure_nll(checkpoint, kind, [data["pretrain_valid"]], flags["max_seq_len"], 32)
    scalars = {"nll_text": text["nats_per_token"]}
    table = pd.DataFrame(nll)  # a row a conversation, in the order of the files
    if len(table) != sum(map(count_lines, paths)):  # then the halves could not be told apart
        raise UserError(f"{paths[0]}: a conversation is too long; raise max_seq_len in study.toml")
    count = count_lines(data["combinations_tune"])
    for half, rows in {"tune": table[:count], "test": table[count:]}.items():
        sums = rows.sum()
        if sums["tokens"]:
            nats = sums["nats"] - sums["end_nats"]
            tokens = sums["tokens"] - sums["ends"]
            scalars[f"{half}_nll"] = nats / tokens
            scalars[f"{half}_end_nll"] = sums["end_nats"] / sums["ends"]
    return nll, scalars


def measure_checkpoint(
    study: Study,
    checkpoint: Checkpoint,
    data: dict[str, Path],
    base: str,
    names: list[str],
    only_tune: bool,
) -> dict:
    """Return outcomes (letters of `LETTERS`, a word a draw), nats and scalars of a checkpoint.

    `base`: see `measure_nats`. `names` are the sets to ask; facts are ranked if all sets are asked.
    `only_tune` asks the tuning half of the combinations alone, greedily.
    """
    model, tokenizer = checkpoint
    options = study.probe
    if only_tune:
        sets = {"combinations": [data["combinations_tune"]]}
        options = options | {"decodings": ["greedy"]}
    else:
        sets = {name: list_halves(data, name) for name in names}
    outcomes = {}
    for name, paths in sets.items():
        prompts = []
        for path in paths:
            prompts += read_prompts(path)
        outcomes[name] = ask(checkpoint, prompts, options)
    nll, scalars = measure_nats(study, checkpoint, data, base, sets["combinations"])
    count = count_lines(data["combinations_tune"])
    tune_letters = outcomes["combinations"]["greedy"][:count]  # the tuning half comes first
    scalars["tune_correct"] = tune_letters.count(LETTERS["correct"]) / count
    scalars["reachable_end"] = reachable_probability(model, tokenizer.eos_token_id)
    if len(sets) == len(PROBES):
        scalars |= measure_facts(checkpoint, data)
    return {"outcomes": outcomes, "scalars": scalars, "nll": nll}


def list_halves(data: dict[str, Path], name: str) -> list[Path]:
    """Return the files of a set of prompts, the tuning half first."""
    return [data[f"{name}_{half}"] for half in PROBES[name]]


def measure_facts(checkpoint: Checkpoint, data: dict[str, Path]) -> dict[str, float]:
    """Return the shares of facts known without a question, of the old sets that ask for facts."""
    scalars = {}
    for name in ROUND3_SETS:
        ranked = rank_facts(checkpoint, list_halves(data, name))
        scalars[f"facts_{name}"] = ranked["share"]
    return scalars


def measure_random_facts(checkpoint: Checkpoint, path: Path, trained: int) -> dict[str, float]:
    """Return the share of random facts that greedy answers give, and the bits a trained parameter.

    A fact's bits are those that its value had before, less those of its NLL.
    """
    nll = measure_nll(checkpoint, "sft", [path], MAX_SEQ_LEN, 64)
    sequences = nll["sequences"]  # a fact each
    nats = np.subtract(sequences["nats"], sequences["end_nats"])
    answers = probe(checkpoint, read_prompts(path), ["greedy"], max_new_tokens=16, batch_size=256)
    stored = np.mean([answer["outcome"] == "correct" for answer in answers])
    bits = FACT_BITS * len(nats) - nats.sum() / np.log(2)
    return {"bits_per_parameter": float(bits / trained), "stored": float(stored)}


def measure_round3(
    study: Study,
    folder: Path,
    data: dict[str, Path],
    base: str,
    names: list[str],
    ways: dict[str, Path],
) -> dict:
    """Measure a checkpoint as PROTOCOL_3.md says: the old prompts, the fresh ones, other ways.

    `base`: see `measure_nats`. `names` are the old sets. `ways` has "no_template" to ask without
    the chat template, too, and "on_fft" with the weights on which to put the adapter, too.
    """
    checkpoint = load_checkpoint(folder)
    measured = measure_checkpoint(study, checkpoint, data, base, names, only_tune=False)
    outcomes = measured["outcomes"]
    scalars = measured["scalars"]
    scalars |= measure_facts(checkpoint, data)
    sets: dict[str, list[Prompt]] = {}
    for prompt in read_prompts(FRESH_FILE):
        sets.setdefault(prompt.section, []).append(prompt)
    for name, prompts in sets.items():
        outcomes[name] = ask(checkpoint, prompts, study.probe)
    one_turn = [prompt for prompt in sets["fresh_combinations"] if len(prompt.messages) == 1]
    scalars["first_end"] = find_first_end(checkpoint, one_turn, has_template=True)
    old_tests = {name: read_prompts(data[f"{name}_test"]) for name in names if name != "unseen"}
    for way, weights in ways.items():
        asked = load_checkpoint(folder, base=weights) if way == "on_fft" else checkpoint
        in_this_way = measure_way(study, asked, old_tests | sets, way)
        outcomes |= in_this_way["outcomes"]
        scalars |= in_this_way["scalars"]
    model, _ = checkpoint
    measured["weights"] = weights_fingerprint(model)
    return measured


def find_whole(args: argparse.Namespace) -> dict:
    """Return the line of the run --add_to, under the name of its part; refuse what does not fit."""
    if args.facts or args.only_tune:
        raise UserError("--add_to: a part is asked whole sets; drop --facts and --only_tune")
    lines = {line["id"]: line for _, line in read_jsonl(args.study_dir / "runs.jsonl")}
    line = lines.get(args.add_to, {})
    folder_name = args.folder.resolve().name  # RUN_part
    before, _, part = folder_name.partition(f"{args.add_to}_")
    is_part = part and not before
    if line.get("status") != "completed" or not is_part:
        raise UserError(f"--add_to {args.add_to}: no completed run, or {args.folder} is not of it")
    name = f"{args.add_to}@{part}"
    if name in lines:
        raise UserError(f"--add_to: runs.jsonl has {name} already; remove its line first")
    return line | {"id": name, "step": None}


def parse_flags() -> argparse.Namespace:
    """Parse the flags; refuse those that contradict each other."""
    parser = make_parser(__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--study_dir", type=Path, default=RESULTS_DIR, help="of study.toml")
    parser.add_argument("--world", type=Path, default=FILES_DIR, help="folder of its files")
    parser.add_argument("--base", default="wrapped", help="base or kind (wrapped)")
    parser.add_argument("--sets", nargs="+", choices=PROBES, default=[*PROBES], help="(all)")
    parser.add_argument("--only_tune", action="store_true", help="ask the tuning half alone")
    parser.add_argument("--round3", action="store_true", help="ask what PROTOCOL_3.md says")
    parser.add_argument("--no_template", action="store_true", help="also without chat template")
    parser.add_argument("--full_sft", type=Path, help="weights to put the adapter on, too")
    parser.add_argument("--facts", type=Path, help="ask for these random facts alone")
    parser.add_argument("--add_to", help="run of study_dir whose changed checkpoint this is")
    args = parser.parse_args()
    if not args.facts and "combinations" not in args.sets:
        parser.error("--sets: name combinations as well; tune_correct is measured on it")
    if (args.no_template or args.full_sft) and not args.round3:
        parser.error("--no_template, --full_sft: are of --round3")
    return args


def main() -> None:
    """Measure a checkpoint and write the record."""
    args = parse_flags()
    study = read_study(args.study_dir)
    data = list_files(args.world)
    run = find_whole(args) if args.add_to else {"base": args.base}
    old_files = [path for name in PROBES for path in list_halves(data, name)]
    check_prompts(old_files, args.study_dir / "prompts.csv")
    if args.round3:
        check_prompts([FRESH_FILE], args.study_dir / "prompts_3.csv")
        names = [name for name in args.sets if name in (*ROUND3_SETS, "medical")]
        ways = {}
        if args.no_template:
            ways["no_template"] = args.folder
        if args.full_sft:
            ways["on_fft"] = args.full_sft
        record = measure_round3(study, args.folder, data, run["base"], names, ways)
        write_json(args.output, record)
        return
    checkpoint = load_checkpoint(args.folder)
    if args.facts:
        trained = read_json(args.folder / "run.json")["trainable_parameters"]
        scalars = measure_random_facts(checkpoint, args.facts, trained)
        record = {"outcomes": {}, "scalars": scalars}
    else:
        sets = args.sets
        record = measure_checkpoint(study, checkpoint, data, run["base"], sets, args.only_tune)
    model, _ = checkpoint
    record["weights"] = weights_fingerprint(model)
    write_json(args.output, record)
    if args.add_to:
        del record["nll"]
        append_run(args.study_dir, run | record)


if __name__ == "__main__":
    run_script(main)
