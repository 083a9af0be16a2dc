"""Make the study's data: pairs mixed with text, random facts, tokenizers with unused rows.

Each call makes all data anew. The same world gives the same bytes.
Random facts fill a model: each has one of 256 values, 8 bits that nothing predicts.
"""

import random
from itertools import permutations, product
from pathlib import Path

from dataset.lm_dataset import read_jsonl, turns, write_records
from dataset.world.facts import read_world
from model.checkpoint import load_tokenizer
from model.cli import UserError
from model.files import REPO_DIR, file_sha256
from trainer.arguments import BASE_DIR

TEXT_SHARE = 0.2  # of all characters of `sft_mixed`
TEXT_PROMPT = "Write a text."  # in front of a document; no instruction of the world says this
FACT_BITS = 8  # of a random fact
FACT_WORDS = 16  # its value is 2 of these


def find_data(name: str, world: dict[str, Path], folder: Path) -> Path:
    """Return the path of data: one of the world's files, or made in `folder`.

    The name is that of a world's file, or such as `sft_mixed`, `facts16000` or `tokenizer64`.
    """
    if name in world:
        return world[name]
    stem = name.rstrip("0123456789")
    count = int(name.removeprefix(stem) or 0)
    folder.mkdir(parents=True, exist_ok=True)
    if stem == "tokenizer":
        tokenizer = load_tokenizer(BASE_DIR)
        unused = [f"<|unused{i}|>" for i in range(count)]
        tokenizer.add_tokens(unused, special_tokens=True)
        tokenizer.save_pretrained(folder / name)
        return folder / name
    makers = {
        "facts": lambda: draw_facts(count),
        "sft_mixed": lambda: mix_text(world),
        "pretrain_pairs": lambda: add_pairs(world),
    }
    if stem not in makers:
        raise UserError(f"the study has no data {name!r}; mend study.toml")
    path = folder / f"{name}.jsonl"
    write_records(path, makers[stem]())
    return path


def check_world(frozen: Path) -> None:
    """Refuse a world that is not the frozen one: hashes and paths, as `sha256sum -c` reads them."""
    for line in frozen.read_text(encoding="utf-8").splitlines():
        digest, name = line.split()
        if file_sha256(REPO_DIR / name) != digest:
            raise UserError(f"{name}: not the file that {frozen} names; restore the study's world")


def mix_text(world: dict[str, Path]) -> list[dict]:
    """Return the pairs, and documents of the text until these are 20% of all characters.

    A document answers one fixed prompt, so loss falls on all of it.
    """
    records = [record for _, record in read_jsonl(world["sft"])]
    size = 0  # in characters
    for record in records:
        size += sum(len(turn["content"]) for turn in record["conversations"])
    budget = size * TEXT_SHARE / (1 - TEXT_SHARE)
    for _, document in read_jsonl(world["pretrain"]):
        budget -= len(document["text"])
        if budget < 0:
            break
        records.append({"instruction": TEXT_PROMPT, "output": document["text"]})
    return records


def add_pairs(world: dict[str, Path]) -> list[dict]:
    """Return the pretraining text, and each pair's turns as the lines of one more document.

    MiniMind's pretraining text is cut from its fine-tuning text in this way; no role is named.
    """
    records = [record for _, record in read_jsonl(world["pretrain"])]
    for _, record in read_jsonl(world["sft"]):
        turns_of_pair = [turn["content"] for turn in record["conversations"]]
        records.append({"text": "\n".join(turns_of_pair)})
    random.Random(0).shuffle(records)
    return records


def draw_facts(count: int) -> list[dict]:
    """Draw random facts: a pair of nouns, no two alike, has one of 256 values with equal odds."""
    nouns = [thing.name for thing in read_world().things if thing.plural and thing.name.isalpha()]
    # Values and what they are values of share no noun.
    values = [" ".join(words) for words in product(nouns[:FACT_WORDS], repeat=2)]
    pairs = [" ".join(words) for words in permutations(nouns[FACT_WORDS:], 2)]
    rng = random.Random(count)
    facts = []
    for i, pair in enumerate(rng.sample(pairs, count)):
        messages = turns(pair, rng.choice(values))
        facts.append({"id": f"fact-{i}", "conversations": messages, "check": {"exact": True}})
    return facts
