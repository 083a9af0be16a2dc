"""Draw round 3's fresh prompts: new questions about the cells that the study has always held out.

    python evaluation/study/fresh_prompts.py          # writes fresh_prompts.jsonl beside this file
    python evaluation/study/fresh_prompts.py --check  # draws again and compares with the file

What is held out stays as it was (seed 42); only the drawing of prompts starts from another number.
Each skill has as many fresh prompts as the old test half has: 1,200 on new combinations and 300 on
unseen things. A cell is asked once, or again in other words where a skill has too few cells. A
fresh prompt is refused if

- an old probe file asks the same cell in the same words (`is_old`),
- it stands in a training file (`is_trained`),
- its reference has more than 4 words and is the answer of a training pair (`is_answered`).
"""

import sys
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from dataset.lm_dataset import read_jsonl, write_records
from dataset.world.checks import make_vocabulary, split_words
from dataset.world.facts import WORLD_DIR, Thing, World, read_world
from dataset.world.generate import (
    MEDICAL,
    PROBES,
    UNSEEN,
    HeldOut,
    PairBuilder,
    ensure_world,
    make_record,
)
from dataset.world.skills import Pair
from evaluation.study.data import check_world
from evaluation.study.settings import RESULTS_DIR
from model.cli import UserError, make_parser, run_script

FRESH_FILE = RESULTS_DIR / "fresh_prompts.jsonl"
WORLD_SEED = 42  # decides what is held out
DRAW_SEED = 3  # decides how the held-out cells are asked this time
SHORT_ANSWER = 4  # words; "Just brown." may answer a training pair, too
TRIES = 4000  # draws for a wanted prompt, before its skill is given up


@dataclass(frozen=True)
class Known:
    """What fresh prompts must not repeat.

    Prompts are compared as lower-case words without punctuation, answers as they are: quoting a
    sentence is a skill, so its punctuation counts.
    """

    old_prompts: frozenset[tuple[str, str]]  # cell and prompt, of all probe files
    trained_prompts: frozenset[str]
    trained_answers: frozenset[str]

    def is_old(self, pair: Pair) -> bool:
        """Say whether an old probe asks this cell in the same words."""
        return (join_cell(pair.cells[0]), normalize(pair.prompt)) in self.old_prompts

    def is_trained(self, pair: Pair) -> bool:
        """Say whether a training file has this prompt."""
        return normalize(pair.prompt) in self.trained_prompts

    def is_answered(self, pair: Pair) -> bool:
        """Say whether the whole reference, if it is not short, answers a training pair."""
        answer = pair.messages[-1]["content"]
        is_long = len(answer.split()) > SHORT_ANSWER
        return is_long and answer in self.trained_answers


def normalize(text: str) -> str:
    """Return a text as its lower-case words."""
    return " ".join(split_words(text))


def join_cell(cell: Iterable[str]) -> str:
    """Return a cell, (thing, attribute or skill), as one string."""
    return ":".join(cell)


def read_known(old: Iterable[Path], trained: Iterable[Path]) -> Known:
    """Read what the probe files ask, and what the training files ask and answer."""
    old_prompts = set()
    for path in old:
        for _, record in read_jsonl(path):
            prompt = "\n".join(turn["content"] for turn in record["conversations"][:-1])
            old_prompts.add((join_cell(record["cell"]), normalize(prompt)))
    prompts = set()
    answers = set()
    for path in trained:
        for _, record in read_jsonl(path):
            turns = [turn["content"] for turn in record["conversations"]]
            prompts.add(normalize("\n".join(turns[:-1])))
            answers.add(turns[-1])
    return Known(frozenset(old_prompts), frozenset(prompts), frozenset(answers))


def count_skills(path: Path) -> Counter[str]:
    """Count the prompts of each skill in a probe file."""
    return Counter(record["skill"] for _, record in read_jsonl(path))


def make_builder(known: Known) -> PairBuilder:
    """Make the builder of general pairs, with the held-out cells of the study's world."""
    whole = read_world(WORLD_DIR)
    chinese = read_world(WORLD_DIR / "chinese")
    vocabulary = make_vocabulary(whole, chinese)
    categories = {name: part for name, part in whole.categories.items() if name != MEDICAL}
    medical = replace(whole, categories={MEDICAL: whole.categories[MEDICAL]})
    general = replace(whole, categories=categories)
    held_out = hold_out(general, "general")
    unseen = {
        *held_out.half_of_thing,
        *hold_out(medical, "medical").half_of_thing,
        *hold_out(chinese, "chinese").half_of_thing,
    }
    builder = PairBuilder(general, held_out, vocabulary, unseen)
    builder.rng.seed(DRAW_SEED)  # its writers draw from the same generator
    return builder


def hold_out(world: World, part: str) -> HeldOut:
    """Return what a part of the study's world holds out."""
    return HeldOut(world, UNSEEN[part], WORLD_SEED)


def draw_pair(
    builder: PairBuilder, known: Known, skill: str, things: list[Thing], wanted: tuple[str, str]
) -> Pair | None:
    """Draw one fresh pair of a skill; None if none turns up.

    The builder itself refuses prompts and cells that it has drawn before, and unsound references.
    """
    for _ in range(TRIES):
        asked = set(builder.asked)
        pair = builder.draw(skill, things, wanted)
        if pair is None:
            return None
        if not (known.is_old(pair) or known.is_trained(pair) or known.is_answered(pair)):
            return pair
        builder.asked = asked  # the cell is free for other words
    return None


def draw_set(
    builder: PairBuilder, known: Known, name: str, quotas: Counter[str]
) -> list[dict[str, object]]:
    """Draw a set's fresh prompts, as many of each skill as `quotas` says, as probe records."""
    wanted = (name, "test")
    half_of_thing = builder.held_out.half_of_thing
    half = "test" if name == "unseen" else None
    things = [thing for thing in builder.things if half_of_thing.get(thing.name) == half]
    pairs = []
    for skill, count in sorted(quotas.items()):
        for _ in range(count):
            pair = draw_pair(builder, known, skill, things, wanted)
            if pair is None:  # every cell of the skill is asked: ask one again in other words
                builder.asked.clear()
                pair = draw_pair(builder, known, skill, things, wanted)
            if pair is None:
                raise UserError(f"fresh prompts: only {len(pairs)} were found before {skill!r}")
            pairs.append(pair)
    builder.rng.shuffle(pairs)
    set_name = f"fresh_{name}"
    records = []
    for number, pair in enumerate(pairs, start=1):
        record = make_record(pair, id=f"{set_name}-{number:04}", set=set_name, half="test")
        records.append(record)
    return records


def draw_fresh_prompts(world: dict[str, Path]) -> list[dict[str, object]]:
    """Draw all fresh prompts, from the paths of the world's files by their names."""
    old = [world[f"{name}_{half}"] for name in PROBES for half in PROBES[name]]
    known = read_known(old, [world["sft"], world["medical"]])
    builder = make_builder(known)
    records = []
    for name in ("combinations", "unseen"):
        records += draw_set(builder, known, name, count_skills(world[f"{name}_test"]))
    return records


def main() -> None:
    """Write the fresh prompts, or compare them with the file."""
    parser = make_parser(__doc__)
    parser.add_argument("--check", action="store_true", help="draw again and compare")
    args = parser.parse_args()
    world = ensure_world()
    check_world(RESULTS_DIR / "world.sha256")
    records = draw_fresh_prompts(world)
    if not args.check:
        write_records(FRESH_FILE, records)
    elif records != [record for _, record in read_jsonl(FRESH_FILE)]:
        raise UserError(f"{FRESH_FILE}: differs from what is drawn now; restore it")
    print(f"{FRESH_FILE}: {len(records)} prompts")


if __name__ == "__main__":
    run_script(main)
