"""Measure which facts of the world a checkpoint knows, without a question.

    python evaluation/probe/world_facts.py out/full_sft model/base_xs

The facts are those that prompts ask for, here the prompts of the tuning halves. A fact is known if
its statement, as the pretraining text has it, is the likeliest of the statements with each value of
the attribute.
"""

import sys
from itertools import chain
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import numpy as np

from dataset.lm_dataset import encode_batch, read_jsonl
from dataset.world.facts import HELD_STATEMENTS, Attribute, Thing, read_world
from dataset.world.generate import ensure_world
from evaluation.probe.likelihood import sum_nats
from evaluation.probe.world_measure import THINGS
from model.checkpoint import Checkpoint, load_checkpoint
from model.cli import make_parser, run_script


def list_facts(paths: list[Path]) -> list[tuple[Thing, Attribute]]:
    """Return what the prompts of probe files ask for: facts of their first things, each once."""
    categories, facts = read_world().categories, {}
    for _, record in chain.from_iterable(map(read_jsonl, paths)):
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
        nats = sum_nats(model, [(one, one) for one in ids], batch_size=64)[:, 0]
        known.append(nats[0] < nats[1:].min())
        chances.append(1 / len(texts))
    return {"facts": len(known), "share": float(np.mean(known)), "chance": float(np.mean(chances))}


def main(argv: list[str] | None = None) -> None:
    """Print the share of facts that each checkpoint knows, by set of prompts."""
    parser = make_parser(__doc__)
    parser.add_argument("folders", type=Path, nargs="+", help="models or adapters")
    folders, world = parser.parse_args(argv).folders, ensure_world()
    for folder in folders:
        checkpoint = load_checkpoint(folder)
        for name in ("combinations", "unseen"):
            found = rank_facts(checkpoint, [world[f"{name}_tune"]])
            shares = f"{found['share']:.1%} known, {found['chance']:.1%} by chance"
            print(f"{folder}  {name}: {found['facts']} facts, {shares}")


if __name__ == "__main__":
    run_script(main)
