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
from dataset.world.facts import HELD_STATEMENTS, Attribute, Thing, World, read_world
from dataset.world.generate import ensure_world
from evaluation.probe.likelihood import sum_nats
from evaluation.probe.world_measure import read_things
from model.checkpoint import Checkpoint, load_checkpoint
from model.cli import make_parser, run_script


def list_facts(paths: list[Path]) -> list[tuple[Thing, Attribute]]:
    """Return what the prompts of probe files ask for: facts of their first things, each once."""
    categories = read_world().categories
    things = read_things()
    facts = {}
    for _, record in chain.from_iterable(map(read_jsonl, paths)):
        thing = things[record["things"][0]]
        for vocabulary in record["check"].get("about", []):  # such as "animal.home", or "category"
            category, _, name = vocabulary.partition(".")
            is_attribute = name and category in categories
            if is_attribute and category == thing.category:
                attribute = categories[category].attributes[name]
                facts[thing.name, name] = (thing, attribute)
    return list(facts.values())


def choose_statement(attribute: Attribute) -> str:
    """Return a form in which the pretraining text states the attribute, best with the value last.

    A value that ends its statement is judged after all that leads to it.
    """
    trained = attribute.statements[:-HELD_STATEMENTS]
    for statement in trained:
        if statement.endswith("{value}."):
            return statement
    return trained[0]


def state_values(world: World, thing: Thing, attribute: Attribute) -> list[str]:
    """Return a statement with each value that things of the category have, the true one first."""
    right = thing.values[attribute.name]
    things = world.categories[thing.category].things
    wrong = {alike.values[attribute.name] for alike in things} - {right}
    statement = choose_statement(attribute)
    texts = []
    for value in [right, *sorted(wrong)]:
        slots = thing.slots() | {"value": value}
        texts.append(statement.format(**slots))
    return texts


def rank_facts(checkpoint: Checkpoint, paths: list[Path]) -> dict[str, float]:
    """Return the number of facts, the share that ranks first, and the share of values by chance."""
    model, tokenizer = checkpoint
    world = read_world()
    known = []
    chances = []
    for thing, attribute in list_facts(paths):
        texts = state_values(world, thing, attribute)
        samples = []
        for tokens in encode_batch(tokenizer, texts, special=False):
            ids = np.array([tokenizer.pad_token_id, *tokens])  # the token that ends a document
            samples.append((ids, ids))  # each token but the first is a label
        nats = sum_nats(model, samples, batch_size=64)[:, 0]  # a text each
        known.append(nats[0] < nats[1:].min())
        chances.append(1 / len(texts))
    return {
        "facts": len(known),
        "share": float(np.mean(known)),
        "chance": float(np.mean(chances)),
    }


def main(argv: list[str] | None = None) -> None:
    """Print the share of facts that each checkpoint knows, by set of prompts."""
    parser = make_parser(__doc__)
    parser.add_argument("folders", type=Path, nargs="+", help="models or adapters")
    args = parser.parse_args(argv)
    files = ensure_world()
    for folder in args.folders:
        checkpoint = load_checkpoint(folder)
        for name in ("combinations", "unseen"):
            ranked = rank_facts(checkpoint, [files[f"{name}_tune"]])
            shares = f"{ranked['share']:.1%} known, {ranked['chance']:.1%} by chance"
            print(f"{folder}  {name}: {ranked['facts']} facts, {shares}")


if __name__ == "__main__":
    run_script(main)
