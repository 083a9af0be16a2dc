"""Measure how often answers that follow no instruction are correct.

    python evaluation/probe/world_measure.py --answers full_sft/samples.jsonl

world_measure.json is what it found for the committed world. Each control answers the tuning half
of the combinations; percent by skill and over all prompts:

    references  the reference answers: all of them must be correct
    constant    for each skill the answer among its training pairs that is correct most often
    nearest     the answer of the most similar training prompt (TF-IDF cosine of words), the first
                thing of its prompt replaced by that of the new prompt
    shuffled    references, or a model's answers, of the other prompts of the skill
    one_answer  the training answer that is correct most often over all prompts
    prompt      the prompt repeated; all_things: a list of all things

2 controls say what the checks do not see, so they are high: `random_order` has the words of the
reference in random order, `stray_words` has "in of and which the" after the reference.
"""

import re
import sys
from collections import Counter, defaultdict
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import numpy as np
import pandas as pd

from dataset.lm_dataset import read_jsonl
from dataset.world.checks import judge_answer, split_words, world_vocabulary
from dataset.world.facts import WORLD_DIR, read_world
from dataset.world.generate import ensure_world
from model.cli import UserError, make_parser, run_script
from model.files import read_json, write_json

OUTPUT = Path(__file__).with_suffix(".json")
WORLDS = (read_world(), read_world(WORLD_DIR / "chinese"))
THINGS = {thing.name: thing for world in WORLDS for thing in world.things}
NAMES = world_vocabulary().names


def read_records(path: Path) -> list[dict]:
    """Read the records of a JSONL file."""
    return [record for _, record in read_jsonl(path)]


def split_answer(record: dict) -> tuple[str, str]:
    """Part a conversation into all text before the answer, and the answer."""
    *before, answer = (turn["content"] for turn in record["conversations"])
    return "\n".join(before), answer


def is_right(answer: str, record: dict) -> bool:
    """Say whether an answer that ends is correct."""
    return judge_answer(answer, True, record) == "correct"


def find_constants(
    records: list[dict], groups: list[str], answers: list[tuple[str, str]]
) -> dict[str, str]:
    """Return for each group of prompts the answer of that group that is right most often.

    `answers` are (group, text) of training answers; only one that names the same things as a
    reference can be right.
    """
    alike, votes = defaultdict(list), defaultdict(Counter)
    for group, answer in dict.fromkeys(answers):
        alike[group, frozenset(NAMES.find(answer))].append(answer)
    for record, group in zip(records, groups, strict=True):
        for answer in alike[group, frozenset(NAMES.find(split_answer(record)[1]))]:
            votes[group][answer] += is_right(answer, record)
    return {group: max(votes[group], key=votes[group].get, default="") for group in groups}


def find_nearest(prompts: list[str], training: list[str]) -> list[int]:
    """Return the place of the most similar training prompt of each prompt."""
    bags, lists = [set(split_words(text)) for text in training], defaultdict(list)
    for i, bag in enumerate(bags):
        for word in bag:
            lists[word].append(i)
    places = {word: np.array(found) for word, found in lists.items()}
    weights = {word: np.log(len(bags) / len(found)) ** 2 for word, found in lists.items()}
    norms = np.sqrt([sum(weights[word] for word in bag) for bag in bags]) + 1e-9
    nearest = []
    for prompt in prompts:
        scores = np.zeros(len(bags))
        for word in places.keys() & split_words(prompt):
            scores[places[word]] += weights[word]
        nearest.append(int(np.argmax(scores / norms)))
    return nearest


def replace_thing(answer: str, old_prompt: str, new_prompt: str) -> str:
    """Put the first thing of one prompt, if both name any, in place of that of another."""
    old, new = ([*map(THINGS.get, NAMES.find(text)), None][0] for text in (old_prompt, new_prompt))
    if old is None or new is None:
        return answer
    slots = new.slots()
    forms = {form: slots.get(slot, slots["a"]) for slot, form in old.slots().items()}
    longest_first = "|".join(map(re.escape, sorted(forms, key=len, reverse=True)))
    return re.sub(rf"\b(?:{longest_first})\b", lambda match: forms[match.group()], answer)


def measure_controls(files: dict[str, Path], answer_files: list[Path]) -> dict:
    """Judge all controls; return percent by skill and on average."""
    records, pairs = read_records(files["combinations_tune"]), read_records(files["sft"])
    prompts, references = zip(*map(split_answer, records), strict=True)
    training, answers = zip(*map(split_answer, pairs), strict=True)
    skills, count = [record["skill"] for record in records], len(records)
    of_skill = [(pair["skill"], answer) for pair, answer in zip(pairs, answers, strict=True)]
    constants = find_constants(records, skills, of_skill)
    one = find_constants(records, [""] * count, [("", answer) for answer in answers])
    near = find_nearest(prompts, training)
    generator = np.random.default_rng(0)
    old = [(answers[place], training[place]) for place in near]
    controls = {
        "references": references,
        "constant": [constants[skill] for skill in skills],
        "nearest": [replace_thing(*pair, new) for pair, new in zip(old, prompts, strict=True)],
        "one_answer": [one[""]] * count,
        "prompt": prompts,
        "all_things": [", ".join(THINGS)] * count,
        "random_order": [" ".join(generator.permutation(text.split())) for text in references],
        "stray_words": [f"{text} in of and which the" for text in references],
    }
    found = {name: [*map(is_right, texts, records)] for name, texts in controls.items()}
    shuffled = {"references": {r["id"]: a for r, a in zip(records, references, strict=True)}}
    for path in answer_files:
        lines = [line for line in read_records(path) if line["decoding"] == "greedy"]
        texts = {line["id"]: "" if line["endless"] else line["output"] for line in lines}
        if missing := [record["id"] for record in records if record["id"] not in texts]:
            raise UserError(f"{path}: no greedy answer to {missing[0]}; ask the whole tuning half")
        shuffled[path.parent.name] = texts
    for name, texts in shuffled.items():
        found[f"shuffled {name}"] = shares = []
        for record in records:
            others = [r for r in records if r["skill"] == record["skill"] and r is not record]
            right = [is_right(texts[other["id"]], record) for other in others]
            shares.append(sum(right) / max(1, len(others)))
    return {name: average_by_skill(shares, skills) for name, shares in found.items()}


def average_by_skill(shares: list[float], skills: list[str]) -> dict[str, float]:
    """Return the percentage over all prompts, and that of each skill."""
    percent, skill = 100 * np.array(shares), np.array(skills)
    means = {name: round(float(percent[skill == name].mean()), 1) for name in sorted(set(skills))}
    return {"average": round(float(percent.mean()), 2)} | means


def tabulate_controls(path: Path = OUTPUT) -> pd.DataFrame:
    """Return the controls of a JSON file: correct answers to all prompts, and the highest skill."""
    rows = []
    for name, shares in read_json(path)["controls"].items():
        average, highest = shares.pop("average"), max(shares.values())
        skill = max(shares, key=shares.get) if 0 < highest < 100 else "any"
        rows.append((name.replace("_", " "), f"{average}%", f"{highest}% ({skill})"))
    return pd.DataFrame(rows, columns=["control", "all prompts", "highest skill"])


def main(argv: list[str] | None = None) -> None:
    """Measure the controls, write the JSON file and print what is above 15%."""
    parser = make_parser(__doc__)
    parser.add_argument("--answers", type=Path, nargs="+", default=[], help="samples.jsonl files")
    parser.add_argument("--output", type=Path, default=OUTPUT, help="a JSON file (beside this one)")
    args = parser.parse_args(argv)
    controls = measure_controls(ensure_world(), args.answers)
    write_json(args.output, {"controls": controls})
    for name, control in controls.items():
        high = {skill: share for skill, share in control.items() if share > 15}
        print(f"{name}: {control['average']}%; above 15%: {high}")


if __name__ == "__main__":
    run_script(main)
