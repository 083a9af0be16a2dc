"""Data that the study makes from the world: mixed text, random facts, tokenizers with unused rows.

All of it is made anew at each call, from the world alone: the same world gives the same bytes.
"""

import json
import random
from itertools import permutations, product
from pathlib import Path

from dataset.lm_dataset import read_jsonl
from dataset.world.facts import read_world
from model.checkpoint import TOKENIZER_FILES
from model.files import UserError, read_json, write_json, write_text
from trainer.arguments import BASE_DIR

TEXT_SHARE = 0.2  # of all characters of `sft_mixed`
TEXT_PROMPT = "Write a text."  # in front of a document; no instruction of the world says this
FACT_BITS = 8  # of a random fact: its value is one of 256
FACT_WORDS = 16  # a value is 2 of these


def find_data(name: str, world: dict[str, Path], folder: Path) -> Path:
    """Return the path of data: one of the world's files, or made in `folder`.

    Args:
        name: of the world's file, or `sft_mixed`, `facts` or `tokenizer` with a count.
    """
    if name in world:
        return world[name]
    stem = name.rstrip("0123456789")
    count = int(name[len(stem) :] or 0)
    folder.mkdir(parents=True, exist_ok=True)
    if stem == "tokenizer":
        write_tokenizer(folder / name, count)
        return folder / name
    if stem not in ("sft_mixed", "facts"):
        raise UserError(f"the study has no data {name!r}; mend study.toml")
    records = draw_facts(count) if stem == "facts" else mix_text(world)
    text = "".join(json.dumps(one, ensure_ascii=False) + "\n" for one in records)
    write_text(folder / f"{name}.jsonl", text)
    return folder / f"{name}.jsonl"


def make_turns(prompt: str, answer: str) -> list[dict[str, str]]:
    """Return a conversation of one question."""
    return [{"role": "user", "content": prompt}, {"role": "assistant", "content": answer}]


def mix_text(world: dict[str, Path]) -> list[dict]:
    """Return the pairs, and first documents of the text until these are a fifth of all characters.

    A document answers one fixed prompt, so loss falls on all of it.
    """
    records = [record for _, record in read_jsonl(world["sft"])]
    size = sum(len(turn["content"]) for one in records for turn in one["conversations"])
    budget = size * TEXT_SHARE / (1 - TEXT_SHARE)
    for _, document in read_jsonl(world["pretrain"]):
        budget -= len(document["text"])
        if budget < 0:
            break
        records.append({"conversations": make_turns(TEXT_PROMPT, document["text"])})
    return records


def draw_facts(count: int) -> list[dict]:
    """Return random facts: a pair of nouns, no two alike, has one of 256 values with equal odds."""
    nouns = [t.name for t in read_world().things if t.plural and t.name.isalpha()]
    rng, pairs = random.Random(count), [*map(" ".join, permutations(nouns[FACT_WORDS:], 2))]
    values = [*map(" ".join, product(nouns[:FACT_WORDS], repeat=2))]
    keys = enumerate(rng.sample(pairs, count))
    facts = [(i, make_turns(key, rng.choice(values))) for i, key in keys]
    return [{"id": f"fact-{i}", "conversations": t, "check": {"exact": True}} for i, t in facts]


def write_tokenizer(folder: Path, rows: int) -> None:
    """Write the base's tokenizer with `rows` more tokens, which no text can contain."""
    folder.mkdir(exist_ok=True)
    for name in TOKENIZER_FILES[1:]:
        if (path := BASE_DIR / name).is_file():
            write_text(folder / name, path.read_text(encoding="utf-8"))
    content = read_json(BASE_DIR / TOKENIZER_FILES[0])
    added, first = content["added_tokens"], len(content["model"]["vocab"])
    added += [added[0] | {"id": first + i, "content": f"<|unused{i}|>"} for i in range(rows)]
    write_json(folder / TOKENIZER_FILES[0], content)
