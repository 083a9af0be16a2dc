"""Measure which facts a checkpoint knows: the world's, without a question, and random ones.

    python evaluation/probe/world_facts.py out/full_sft                       # tuning halves
    python evaluation/probe/world_facts.py out/full_sft model/base_xs --prompts my_probe.jsonl

The facts are those that the probes' prompts ask for. A fact is known if its statement, as the
pretraining text has it, is the likeliest of the statements with each value of the attribute.

Random facts fill a model: each has one of 256 values, 8 bits that nothing predicts.
"""

import random
import sys
from itertools import permutations, product
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import numpy as np

from dataset.lm_dataset import encode_batch
from dataset.world.facts import HELD_STATEMENTS, Attribute, Thing, read_world
from dataset.world.generate import ensure_world
from evaluation.probe.answers import probe
from evaluation.probe.likelihood import measure_nll, sum_nats
from evaluation.probe.prompts import read_prompts
from evaluation.probe.world_measure import THINGS, read_records
from model.checkpoint import Checkpoint, load_checkpoint
from model.files import make_parser, run_script

BATCH_SIZE = 64
FACT_BITS = 8  # of a random fact
FACT_WORDS = 16  # its value is 2 of these


def list_facts(paths: list[Path]) -> list[tuple[Thing, Attribute]]:
    """Return what the prompts of probe files ask for: facts of their first things, each once."""
    categories, facts = read_world().categories, {}
    for record in (record for path in paths for record in read_records(path)):
        thing = THINGS[record["things"][0]]
        for place in record["check"].get("about", []):
            category, _, name = place.partition(".")
            if category == thing.category and category in categories and name:
                facts[thing.name, name] = thing, categories[category].attributes[name]
    return list(facts.values())


def rank_facts(checkpoint: Checkpoint, paths: list[Path]) -> dict[str, float]:
    """Return the number of facts, the share that ranks first, and the share of values by chance."""
    (model, tokenizer), world, known, chances = checkpoint, read_world(), [], []
    for thing, attribute in list_facts(paths):
        right, things = thing.values[attribute.name], world.categories[thing.category].things
        values = sorted({other.values[attribute.name] for other in things} - {right})
        patterns = attribute.statements[:-HELD_STATEMENTS]
        pattern = next((p for p in patterns if p.endswith("{value}.")), patterns[0])
        slots = [thing.slots() | {"value": value} for value in (right, *values)]
        texts = [pattern.format(**one) for one in slots]
        encoded = encode_batch(tokenizer, texts, special=False)
        ids = [np.array([tokenizer.pad_token_id, *one]) for one in encoded]  # ends a document
        nats = sum_nats(model, [(one, one) for one in ids], BATCH_SIZE)[:, 0]
        known.append(nats[0] < nats[1:].min())
        chances.append(1 / len(texts))
    return {"facts": len(known), "share": float(np.mean(known)), "chance": float(np.mean(chances))}


def draw_facts(count: int) -> list[dict]:
    """Draw random facts: a pair of nouns, no two alike, has one of 256 values with equal odds."""
    nouns = [t.name for t in read_world().things if t.plural and t.name.isalpha()]
    rng, pairs = random.Random(count), [*map(" ".join, permutations(nouns[FACT_WORDS:], 2))]
    values = [*map(" ".join, product(nouns[:FACT_WORDS], repeat=2))]
    facts = []
    for i, pair in enumerate(rng.sample(pairs, count)):
        question = {"role": "user", "content": pair}
        answer = {"role": "assistant", "content": rng.choice(values)}
        fact = {"id": f"fact-{i}", "conversations": [question, answer]}
        facts.append(fact | {"check": {"exact": True}})
    return facts


def measure_random_facts(checkpoint: Checkpoint, path: Path, trained: int) -> dict[str, float]:
    """Return the share of random facts that greedy answers give, and the bits a trained parameter.

    A fact's bits are those that its value had before, less those of its NLL.
    """
    found = measure_nll(checkpoint, "sft", [path], 340, BATCH_SIZE)["sequences"]
    nats = np.subtract(found["nats"], found["end_nats"])
    answers = probe(checkpoint, read_prompts(path), ["greedy"], max_new_tokens=16, batch_size=256)
    stored = np.mean([answer["outcome"] == "correct" for answer in answers])
    bits = FACT_BITS * len(nats) - nats.sum() / np.log(2)
    return {"bits_per_parameter": float(bits / trained), "stored": float(stored)}


def main(argv: list[str] | None = None) -> int:
    """Print the share of facts that each checkpoint knows, by probe file."""
    parser = make_parser(__doc__)
    parser.add_argument("folders", type=Path, nargs="+", help="models or adapters")
    parser.add_argument("--prompts", type=Path, nargs="+", help="JSONL of the world's probes")
    args = parser.parse_args(argv)
    world = {} if args.prompts else ensure_world()
    paths = args.prompts or [world["combinations_tune"], world["unseen_tune"]]
    for folder in args.folders:
        checkpoint = load_checkpoint(folder)
        for path in paths:
            found = rank_facts(checkpoint, [path])
            shares = f"{found['share']:.1%} known, {found['chance']:.1%} by chance"
            print(f"{folder}  {path.name}: {found['facts']} facts, {shares}")
    return 0


if __name__ == "__main__":
    run_script(main)
