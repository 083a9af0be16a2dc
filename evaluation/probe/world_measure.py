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
from functools import cache
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import numpy as np
import pandas as pd

from dataset.lm_dataset import read_jsonl
from dataset.world.checks import judge_answer, split_words, world_vocabulary
from dataset.world.facts import WORLD_DIR, Thing, read_world
from dataset.world.generate import ensure_world
from model.cli import UserError, make_parser, run_script
from model.files import read_json, write_json

OUTPUT = Path(__file__).with_suffix(".json")


@cache
def read_things() -> dict[str, Thing]:
    """Read all things of the world, by name, once."""
    english = read_world()
    chinese = read_world(WORLD_DIR / "chinese")
    return {thing.name: thing for thing in (*english.things, *chinese.things)}


def read_records(path: Path) -> list[dict]:
    """Read the records of a JSONL file."""
    return [record for _, record in read_jsonl(path)]


def split_answer(record: dict) -> tuple[str, str]:
    """Part a conversation into all text before the answer, and the answer."""
    *before, answer = [turn["content"] for turn in record["conversations"]]
    return "\n".join(before), answer


def is_right(answer: str, record: dict) -> bool:
    """Say whether an answer that ends is correct."""
    return judge_answer(answer, True, record) == "correct"


def find_constants(
    records: list[dict], groups: list[str], answers: list[tuple[str, str]]
) -> dict[str, str]:
    """Return for each group of prompts the answer of that group that is right most often.

    `groups` has the group of each record. `answers` are (group, text) of training answers; only one
    that names the same things as a reference can be right.
    """
    names = world_vocabulary().names
    alike = defaultdict(list)  # answers, by their group and the things that they name
    for group, answer in dict.fromkeys(answers):
        things = frozenset(names.find(answer))
        alike[group, things].append(answer)
    votes = defaultdict(Counter)  # how often an answer is right, by its group
    for record, group in zip(records, groups, strict=True):
        _, reference = split_answer(record)
        things = frozenset(names.find(reference))
        for answer in alike[group, things]:
            votes[group][answer] += is_right(answer, record)
    return {group: max(votes[group], key=votes[group].get, default="") for group in groups}


def find_nearest(prompts: list[str], training: list[str]) -> list[int]:
    """Return the place of the most similar training prompt of each prompt.

    Similar is the cosine of TF-IDF vectors, with a term frequency of 0 or 1.
    """
    bags = [set(split_words(text)) for text in training]
    lists = defaultdict(list)  # places of the training prompts that have a word
    for place, bag in enumerate(bags):
        for word in bag:
            lists[word].append(place)
    places = {}
    weights = {}  # what a word that two prompts share adds to their product
    for word, with_word in lists.items():
        places[word] = np.array(with_word)
        weights[word] = np.log(len(bags) / len(with_word)) ** 2
    squares = [sum(weights[word] for word in bag) for bag in bags]
    norms = np.sqrt(squares) + 1e-9  # no division by 0; the prompt's own norm changes no order
    nearest = []
    for prompt in prompts:
        scores = np.zeros(len(bags))
        for word in places.keys() & split_words(prompt):
            scores[places[word]] += weights[word]
        best = np.argmax(scores / norms)
        nearest.append(int(best))
    return nearest


def find_first_thing(text: str) -> Thing | None:
    """Return the thing that a text names first; None if it names none."""
    names = world_vocabulary().names.find(text)
    return read_things().get(names[0]) if names else None


def replace_thing(answer: str, old_prompt: str, new_prompt: str) -> str:
    """Put the first thing of one prompt, if both name any, in place of that of another."""
    old = find_first_thing(old_prompt)
    new = find_first_thing(new_prompt)
    if old is None or new is None:
        return answer
    new_slots = new.slots()
    forms = {}  # each form of the old name, and that of the new one
    for slot, form in old.slots().items():
        forms[form] = new_slots.get(slot, new_slots["a"])
    # The longest first, so that "lions" is not read as "lion".
    longest_first = sorted(forms, key=len, reverse=True)
    pattern = "|".join(map(re.escape, longest_first))
    return re.sub(rf"\b(?:{pattern})\b", lambda match: forms[match.group()], answer)


def measure_controls(files: dict[str, Path], answer_files: list[Path]) -> dict:
    """Judge all controls; return percent by skill and on average."""
    records = read_records(files["combinations_tune"])
    pairs = read_records(files["sft"])
    skills = [record["skill"] for record in records]
    rights = {}  # by control, whether each of its answers is right
    for name, texts in write_controls(records, pairs).items():
        rights[name] = [is_right(text, record) for text, record in zip(texts, records, strict=True)]
    references = {record["id"]: split_answer(record)[1] for record in records}
    shuffled = {"references": references}
    for path in answer_files:
        shuffled[path.parent.name] = read_greedy_answers(path, records)
    for name, texts in shuffled.items():
        rights[f"shuffled {name}"] = [find_shuffled_share(texts, r, records) for r in records]
    return {name: average_by_skill(shares, skills) for name, shares in rights.items()}


def write_controls(records: list[dict], pairs: list[dict]) -> dict[str, list[str]]:
    """Return the answers of each control to the prompts of `records`; `pairs` train."""
    prompts = []
    references = []
    for record in records:
        prompt, reference = split_answer(record)
        prompts.append(prompt)
        references.append(reference)
    training = [split_answer(pair) for pair in pairs]  # prompt and answer
    count = len(records)
    skills = [record["skill"] for record in records]
    of_skill = []
    of_all = []  # one group of all prompts
    for pair, (_, answer) in zip(pairs, training, strict=True):
        of_skill.append((pair["skill"], answer))
        of_all.append(("", answer))
    constants = find_constants(records, skills, of_skill)
    one_answer = find_constants(records, [""] * count, of_all)[""]
    places = find_nearest(prompts, [prompt for prompt, _ in training])
    nearest = []
    for place, new_prompt in zip(places, prompts, strict=True):
        old_prompt, answer = training[place]
        nearest.append(replace_thing(answer, old_prompt, new_prompt))
    generator = np.random.default_rng(0)
    in_random_order = []
    for reference in references:
        words = generator.permutation(reference.split())
        in_random_order.append(" ".join(words))
    return {
        "references": references,
        "constant": [constants[skill] for skill in skills],
        "nearest": nearest,
        "one_answer": [one_answer] * count,
        "prompt": prompts,
        "all_things": [", ".join(read_things())] * count,
        "random_order": in_random_order,
        "stray_words": [f"{reference} in of and which the" for reference in references],
    }


def read_greedy_answers(path: Path, records: list[dict]) -> dict[str, str]:
    """Return a model's greedy answers by the prompt's id; an endless one counts as empty."""
    texts = {}
    for line in read_records(path):
        if line["decoding"] == "greedy":
            texts[line["id"]] = "" if line["endless"] else line["output"]
    missing = [record["id"] for record in records if record["id"] not in texts]
    if missing:
        raise UserError(f"{path}: no greedy answer to {missing[0]}; ask the whole tuning half")
    return texts


def find_shuffled_share(texts: dict[str, str], record: dict, records: list[dict]) -> float:
    """Return the share of the answers to other prompts of the skill that are right here."""
    right = []
    for donor in records:
        if donor["skill"] == record["skill"] and donor is not record:
            right.append(is_right(texts[donor["id"]], record))
    return sum(right) / max(1, len(right))


def average_by_skill(shares: list[float], skills: list[str]) -> dict[str, float]:
    """Return the percentage over all prompts, and that of each skill.

    `shares` has a number from 0 to 1 for each prompt, `skills` its skill.
    """
    percent = 100 * np.array(shares)
    skill_names = np.array(skills)
    averages = {"average": round(float(percent.mean()), 2)}
    for skill in sorted(set(skills)):
        mean = percent[skill_names == skill].mean()
        averages[skill] = round(float(mean), 1)
    return averages


def tabulate_controls(path: Path = OUTPUT) -> pd.DataFrame:
    """Return the controls of a JSON file: correct answers to all prompts, and the highest skill."""
    rows = []
    for name, shares in read_json(path)["controls"].items():
        average = shares.pop("average")  # what stays is by skill
        highest = max(shares.values())
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
