"""Measure which of the world's facts a checkpoint knows, without a question.

    python evaluation/probe/world_facts.py out/full_sft                       # tuning halves
    python evaluation/probe/world_facts.py out/full_sft model/base_xs --prompts my_probe.jsonl

The facts are those that the probes' prompts ask for. A fact is known if its statement, as the
pretraining text has it, is the likeliest of the statements with each value of the attribute.
"""

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import numpy as np

from dataset.lm_dataset import encode_batch
from dataset.world.facts import HELD_STATEMENTS, Attribute, Thing, read_world
from dataset.world.generate import ensure_world
from evaluation.probe.answers import Checkpoint
from evaluation.probe.likelihood import sum_nats
from evaluation.probe.world_measure import THINGS, read_records
from model.checkpoint import load_checkpoint
from model.files import run_script

BATCH_SIZE = 64


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


def main(argv: list[str] | None = None) -> int:
    """Print the share of facts that each checkpoint knows, by probe file."""
    formatter = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=formatter)
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
