"""Write the world's files: pretraining text, instructions, medical instructions and probes.

    python dataset/world/generate.py                    # all of it, to dataset/data/world/
    python dataset/world/generate.py --seed 7 --output_dir /tmp/world

    pretrain_world.jsonl        documents; _valid: held-out documents; _patterns: held-out patterns
    sft_world.jsonl             instructions
    lora_medical_world.jsonl    medical instructions
    probe_SET_HALF.jsonl        held-out prompts with references and checks, to tune and to test:
                                combinations, unseen, wordings, medical, chinese
    held_out.json               the things that no training pair names

The same seed gives the same bytes. What is held out is drawn by hash, so that adding a thing moves
nothing else. The scripts in trainer/ call `ensure_world` when no --data_path is given.
"""

import argparse
import hashlib
import json
import random
import sys
from collections import Counter
from collections.abc import Iterable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from dataset.checks import ARTICLE, Vocabulary, judge_answer, make_vocabulary
from dataset.command_line import run_script
from dataset.world.facts import WORLD_DIR, Thing, World, read_world
from dataset.world.skills import Maker, Pair, Writer, collect_makers
from dataset.world.text import ChineseWriter, TextWriter, write_documents
from model.files import write_text

OUTPUT_DIR = Path(__file__).resolve().parents[1] / "data" / "world"
TEXT_BYTES, CHINESE_BYTES = 8_800_000, 400_000
PAIRS, MEDICAL_PAIRS, CHINESE_PAIRS = 1_050, 300, 300  # of a skill, at most
HELD_CELLS = {"tune": 0.05, "test": 0.15}  # shares of (thing, attribute) that never train
UNSEEN = {"tune": 40, "test": 40}  # things that no training pair names
UNSEEN_CONDITIONS = {"tune": 8, "test": 8}
MEDICAL = "condition"
PROBES = {  # prompts of each set and half
    "combinations": {"tune": 400, "test": 1200},
    "unseen": {"tune": 300, "test": 300},
    "wordings": {"tune": 300, "test": 300},
    "medical": {"tune": 150, "test": 300},
    "chinese": {"tune": 60, "test": 150},
}
VALIDATION_SHARE = 0.02  # of documents
TRIES = 400  # draws a wanted pair, before a skill is given up
FILES = ("pretrain", "sft", "medical")


class HeldOut:
    """What never trains: things by half, and cells of seen things by half."""

    def __init__(self, world: World, unseen: dict[str, int], seed: int):
        self.seed = seed
        self.halves: dict[tuple[str, str], str | None] = {}
        ranked = sorted(world.things, key=lambda thing: self.place("thing", thing.name))
        chosen = iter(ranked)
        self.things = {half: [next(chosen).name for _ in range(n)] for half, n in unseen.items()}
        self.mirrors = find_mirrors(world)
        self.half_of_thing = {name: half for half, names in self.things.items() for name in names}

    def place(self, *words: str) -> float:
        """Map words to a number between 0 and 1."""
        digest = hashlib.sha256("\n".join([str(self.seed), *words]).encode()).digest()
        return int.from_bytes(digest[:8]) / 2**64

    def half_of_cell(self, cell: tuple[str, str]) -> str | None:
        """Return the half that holds a cell out; None for one that trains."""
        if cell not in self.halves:
            place, shares = self.place("cell", *self.mirrors.get(cell, cell)), HELD_CELLS
            test = "test" if place < shares["tune"] + shares["test"] else None
            self.halves[cell] = "tune" if place < shares["tune"] else test
        return self.halves[cell]

    def find_set(self, pair: Pair, held_wording: bool) -> tuple[str, str | None] | None:
        """Return ("train", None), or the probe set and half of a pair; None if it fits nowhere.

        A pair is held out by its first cell alone, all else of it is known; in the set "wordings"
        the form of the question is new, too.
        """
        main, *rest = pair.cells
        unseen = self.half_of_thing.get(main[0])
        if any(
            self.half_of_cell(cell) or (self.half_of_thing.get(cell[0]) and cell[0] != main[0])
            for cell in rest
        ):
            return None
        half = self.half_of_cell(main)
        if unseen:
            return None if half or held_wording else ("unseen", unseen)
        if half:
            return "wordings" if held_wording else "combinations", half
        return None if held_wording else ("train", None)


def find_mirrors(world: World) -> dict[tuple[str, str], tuple[str, str]]:
    """Map a fact told from both ends to one cell: a baker's tool is a rolling pin's user."""
    names, mirrors = {thing.name: thing for thing in world.things}, {}
    for thing in world.things:
        for attribute, value in thing.values.items():
            other = names.get(ARTICLE.sub("", value))
            for back, other_value in other.values.items() if other else ():
                if ARTICLE.sub("", other_value) == thing.name:
                    mirrors[other.name, back] = min((thing.name, attribute), (other.name, back))
    return mirrors


class PairBuilder:
    """Draw pairs of all skills for training and for the probes of one part of the world."""

    def __init__(
        self,
        world: World,
        held_out: HeldOut,
        seed: int,
        vocabulary: Vocabulary,
        unseen: frozenset[str],
    ):
        self.held_out, self.rng = held_out, random.Random(seed)
        self.makers = collect_makers(world)
        self.things = world.things
        seen = [t for t in world.things if t.name not in held_out.half_of_thing]
        self.writers = {held: Writer(world, self.rng, seen, held) for held in (False, True)}
        self.vocabulary, self.unseen = vocabulary, unseen
        self.prompts: set[str] = set()

    def draw(self, maker: Maker, things: list[Thing], held: bool, wanted: tuple) -> Pair | None:
        """Draw one new pair of a set and half."""
        for _ in range(TRIES):
            pair = maker(self.writers[held], self.rng.choice(things))
            if (
                pair
                and self.held_out.find_set(pair, held) == wanted
                and pair.prompt not in self.prompts
                and self.is_sound(pair)
            ):
                self.prompts.add(pair.prompt)
                return pair
        return None

    def is_sound(self, pair: Pair) -> bool:
        """Say whether the reference passes its own check, and no unseen thing stands beside."""
        text = "\n".join(message["content"] for message in pair.messages)
        if self.unseen.intersection(self.vocabulary.names.find(text)) - {pair.cells[0][0]}:
            return False
        things = [thing for thing, _ in pair.cells]
        record = {"conversations": pair.messages, "check": pair.check, "things": things}
        answer = pair.messages[-1]["content"]
        return judge_answer(answer, True, record, self.vocabulary) == "correct"

    def collect(self, wanted: tuple, quota: int, total: int | None = None) -> list[Pair]:
        """Draw pairs of one set and half, as many of each skill, in random order."""
        half = wanted[1]
        unseen = self.held_out.things.get(half, []) if wanted[0] == "unseen" else None
        things = [
            thing
            for thing in self.things
            if (thing.name in unseen if unseen else thing.name not in self.held_out.half_of_thing)
        ]
        pairs: dict[str, list[Pair]] = {skill: [] for skill in self.makers}
        open_skills = list(self.makers)
        while open_skills and (total is None or sum(map(len, pairs.values())) < total):
            for skill in list(open_skills):
                pair = self.draw(self.makers[skill], things, wanted[0] == "wordings", wanted)
                if pair:
                    pairs[skill].append(pair)
                if pair is None or len(pairs[skill]) >= quota:
                    open_skills.remove(skill)
        drawn = [pair for found in pairs.values() for pair in found]
        self.rng.shuffle(drawn)
        return drawn[:total]


def write_records(path: Path, records: Iterable[dict]) -> None:
    """Write JSON lines, whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    write_text(path, "".join(json.dumps(r, ensure_ascii=False) + "\n" for r in records))


def training_record(pair: Pair) -> dict:
    """Return a pair as a line of a training file."""
    return {"conversations": pair.messages, "skill": pair.skill}


def probe_records(pairs: list[Pair], name: str, half: str) -> list[dict]:
    """Return pairs as lines of a probe file."""
    return [
        {
            "id": f"{name}-{half}-{number:04}",
            "set": name,
            "half": half,
            "skill": pair.skill,
            "things": list(dict.fromkeys(thing for thing, _ in pair.cells)),
            "cell": list(pair.cells[0]),
            "conversations": pair.messages,
            "check": pair.check,
        }
        for number, pair in enumerate(pairs, start=1)
    ]


def split_world(world: World) -> tuple[World, World]:
    """Part the world into its general and its medical part."""
    general = {name: c for name, c in world.categories.items() if name != MEDICAL}
    medical = {name: c for name, c in world.categories.items() if name == MEDICAL}
    return (
        World(general, world.wordings, world.stories),
        World(medical, world.wordings, world.stories),
    )


def build_text(world: World, chinese: World, seed: int, scale: float) -> dict[str, list[str]]:
    """Write the documents: for training, held-out documents, and held-out patterns."""
    rng = random.Random(seed)
    documents = write_documents(TextWriter(world, rng), round(TEXT_BYTES * scale))
    documents += write_documents(ChineseWriter(chinese, rng), round(CHINESE_BYTES * scale))
    rng.shuffle(documents)
    held = round(VALIDATION_SHARE * len(documents))
    writer = TextWriter(world, rng, held=True)
    patterns = [writer.entry(thing) for thing in world.things]
    return {"": documents[held:], "_valid": documents[:held], "_patterns": patterns}


def write_world(
    output_dir: Path, seed: int = 42, things_each: int | None = None, scale: float = 1.0
) -> dict[str, Path]:
    """Write all files; `things_each` and `scale` make a small world for tests."""
    world = read_world(things_each=things_each)
    chinese = read_world(WORLD_DIR / "chinese", things_each)
    vocabulary = make_vocabulary(world, chinese)
    small = things_each is not None
    for ending, documents in build_text(world, chinese, seed, scale).items():
        records = ({"text": document} for document in documents)
        write_records(output_dir / f"pretrain_world{ending}.jsonl", records)

    general, medical = split_world(world)
    parts = {
        "general": (general, {h: n // 8 if small else n for h, n in UNSEEN.items()}, PAIRS),
        "medical": (
            medical,
            {h: 1 if small else n for h, n in UNSEEN_CONDITIONS.items()},
            MEDICAL_PAIRS,
        ),
        "chinese": (chinese, {}, CHINESE_PAIRS),
    }
    held = {part: HeldOut(things, unseen, seed) for part, (things, unseen, _) in parts.items()}
    all_unseen = frozenset(name for part in held.values() for name in part.half_of_thing)
    train, probes = {}, {}
    for part, (things, _, quota) in parts.items():
        builder = PairBuilder(things, held[part], seed, vocabulary, all_unseen)
        names = ["combinations", "unseen", "wordings"] if part == "general" else [part]
        for name in names:
            for half, count in PROBES[name].items():
                wanted = [(name, half)] if part == "general" else [("combinations", half)]
                if part == "medical":
                    wanted.append(("unseen", half))
                number = max(1, round(count * scale)) // len(wanted)
                found = [p for want in wanted for p in builder.collect(want, number, number)]
                probes[name, half] = probe_records(found, name, half)
        train[part] = builder.collect(("train", None), max(4, round(quota * scale)))
    sft = train["general"] + train["chinese"]
    random.Random(seed).shuffle(sft)
    write_records(output_dir / "sft_world.jsonl", map(training_record, sft))
    write_records(output_dir / "lora_medical_world.jsonl", map(training_record, train["medical"]))
    for (name, half), records in probes.items():
        write_records(output_dir / f"probe_{name}_{half}.jsonl", records)
    unseen = {part: held_out.things for part, held_out in held.items()}
    write_text(output_dir / "held_out.json", json.dumps(unseen, ensure_ascii=False, indent=1))
    counts = Counter(pair.skill for pair in [*sft, *train["medical"]])
    print(f"{len(sft)} pairs of {len(counts)} skills, {len(train['medical'])} medical pairs")
    return list_files(output_dir)


def list_files(output_dir: Path) -> dict[str, Path]:
    """Return the paths of the world's files by their names."""
    files = {
        "pretrain": output_dir / "pretrain_world.jsonl",
        "pretrain_valid": output_dir / "pretrain_world_valid.jsonl",
        "pretrain_patterns": output_dir / "pretrain_world_patterns.jsonl",
        "sft": output_dir / "sft_world.jsonl",
        "sft_valid": output_dir / "probe_combinations_tune.jsonl",
        "medical": output_dir / "lora_medical_world.jsonl",
        "medical_valid": output_dir / "probe_medical_tune.jsonl",
    }
    for name, halves in PROBES.items():
        files |= {f"{name}_{half}": output_dir / f"probe_{name}_{half}.jsonl" for half in halves}
    return files


def hash_sources() -> str:
    """Hash the generator and its data, which the files depend on."""
    paths = [*WORLD_DIR.rglob("*.py"), *WORLD_DIR.rglob("*.toml"), WORLD_DIR.parent / "checks.py"]
    digest = hashlib.sha256()
    for path in sorted(paths):
        digest.update(path.read_bytes())
    return digest.hexdigest()


def ensure_world(output_dir: Path = OUTPUT_DIR) -> dict[str, Path]:
    """Return the world's files; write them first where they are missing or of another version."""
    stamp = output_dir / "sources.sha256"
    if not stamp.is_file() or stamp.read_text() != hash_sources():
        print("writing the world's text and instructions, about a minute")
        write_world(output_dir)
        write_text(stamp, hash_sources())
    return list_files(output_dir)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--output_dir", type=Path, default=OUTPUT_DIR)
    parser.add_argument("--seed", type=int, default=42)
    args = parser.parse_args(argv)
    write_world(args.output_dir, args.seed)
    return 0


if __name__ == "__main__":
    run_script(main)
