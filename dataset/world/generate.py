"""Write the world's files: pretraining text, instructions, medical instructions and probes.

    python dataset/world/generate.py   # to dataset/data/world/; --help: another folder or seed

    pretrain_world.jsonl        documents; _valid: held-out documents; _patterns: held-out patterns
    sft_world.jsonl             instructions
    lora_medical_world.jsonl    medical instructions
    probe_SET_HALF.jsonl        held-out prompts with references and checks, to tune and to test:
                                combinations, unseen, wordings, medical, chinese
    held_out.json               the things that no training pair names

The same seed gives the same bytes. What is held out is drawn by hash, so that adding a thing moves
little else. The scripts in trainer/ call `ensure_world` when no --data_path is given.
"""

import hashlib
import random
import sys
from dataclasses import replace
from functools import cache
from pathlib import Path

from filelock import FileLock

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from dataset.checks import ARTICLE, Vocabulary, judge_answer, make_vocabulary
from dataset.lm_dataset import write_records
from dataset.world.facts import WORLD_DIR, Thing, World, read_world
from dataset.world.skills import NOUN_DRAWS, Pair, Writer, collect_fillers, collect_makers
from dataset.world.text import ChineseWriter, TextWriter, write_documents
from model.cli import make_parser, run_script
from model.files import write_json, write_text

FILES_DIR = WORLD_DIR.parent / "data" / "world"
TEXT_BYTES, CHINESE_BYTES = 8_800_000, 400_000
VALIDATION_SHARE = 0.02  # of documents
PAIRS = {"general": 1150, "medical": 300, "chinese": 300}  # of a skill, at most
HELD_CELLS = {"tune": 0.05, "test": 0.15}  # shares of (thing, attribute) that never train
UNSEEN = {"general": 40, "medical": 8, "chinese": 0}  # things of each half that no pair names
PROBES = {  # prompts of each set and half
    "combinations": {"tune": 400, "test": 1200},
    "unseen": {"tune": 300, "test": 300},
    "wordings": {"tune": 300, "test": 300},
    "medical": {"tune": 150, "test": 300},
    "chinese": {"tune": 60, "test": 150},
}
PART_SETS = {"medical": ("combinations", "unseen"), "chinese": ("combinations",)}  # in one file
MEDICAL = "condition"  # the category that the medical set is about
FILLED = 0.5  # share of the training pairs on lists and scenes that are about a filler
TRIES = 400  # draws for a wanted pair, before a skill is given up
TRAIN = ("train", None)


@cache
def place(seed: int, *words: str) -> float:
    """Map words to a number between 0 and 1."""
    digest = hashlib.sha256("\n".join([str(seed), *words]).encode()).digest()
    return int.from_bytes(digest[:8]) / 2**64


class HeldOut:
    """What never trains: things by half, and cells of the other things by half."""

    def __init__(self, world: World, unseen: int, seed: int):
        self.seed = seed
        ranked = sorted((t.name for t in world.things), key=lambda name: place(seed, "thing", name))
        self.things = {"tune": ranked[:unseen], "test": ranked[unseen : 2 * unseen]}
        self.half_of_thing = {name: half for half, names in self.things.items() for name in names}
        self.mirrors = find_mirrors(world)

    def half_of_cell(self, cell: tuple[str, str]) -> str | None:
        """Return the half that holds a cell out; None for one that trains."""
        at = place(self.seed, "cell", *self.mirrors.get(cell, cell))
        test = "test" if at < sum(HELD_CELLS.values()) else None
        return "tune" if at < HELD_CELLS["tune"] else test

    def find_set(self, pair: Pair, held_wording: bool) -> tuple[str, str | None] | None:
        """Return `TRAIN`, or the probe set and half of a pair; None if it fits nowhere.

        A pair is held out by its first cell alone; in "wordings" the question's form is new, too.
        """
        main, *rest = pair.cells
        unseen, half = self.half_of_thing.get(main[0]), self.half_of_cell(main)
        if any(map(self.half_of_cell, rest)) or (held_wording and (unseen or not half)):
            return None
        if unseen:
            return None if half else ("unseen", unseen)
        return ("wordings" if held_wording else "combinations", half) if half else TRAIN


def find_mirrors(world: World) -> dict[tuple[str, str], tuple[str, str]]:
    """Map both directions of a fact to one cell: a baker's tool is a rolling pin's user."""
    cells = {
        (thing.name, ARTICLE.sub("", value)): (thing.name, attribute)
        for thing in world.things
        for attribute, value in thing.values.items()
    }
    both = cells.keys() & {(value, name) for name, value in cells}
    return {cells[pair]: min(cells[pair], cells[pair[::-1]]) for pair in both}


class PairBuilder:
    """Draw pairs of all skills for training and for the probes of one part of the world."""

    def __init__(self, world: World, held_out: HeldOut, vocabulary: Vocabulary, unseen: set[str]):
        self.held_out, self.vocabulary, self.unseen = held_out, vocabulary, unseen
        self.makers, self.things = collect_makers(world), world.things
        self.rng, self.prompts = random.Random(held_out.seed), set()
        self.is_general = len(world.categories) > 2  # a small part asks about a cell twice
        self.asked: set[tuple] = set()  # skill and cell of each held-out prompt
        self.references: set[str] = set()  # of held-out prompts
        seen = [t for t in world.things if t.name not in held_out.half_of_thing]
        self.fillers, specs = collect_fillers(world), world.wordings["skill"].items()
        self.times = {name: spec.get("times", 1) for name, spec in specs}
        self.games = {name for name, spec in specs if NOUN_DRAWS.keys() >= set(spec["uses"])}
        self.writers = {held: Writer(world, self.rng, seen, held) for held in (False, True)}
        for writer in self.writers.values():
            writer.nouns += self.fillers

    def draw(self, skill: str, things: list[Thing], wanted: tuple) -> Pair | None:
        """Draw one new pair of a set and half."""
        held = wanted[0] == "wordings"
        for _ in range(TRIES):
            is_filled = wanted == TRAIN and skill in self.games and self.rng.random() < FILLED
            thing = self.rng.choice(self.fillers if is_filled else things)
            pair = self.makers[skill](self.writers[held], thing)
            if not pair or self.held_out.find_set(pair, held) != wanted or not self.is_sound(pair):
                continue
            answer = pair.messages[-1]["content"]
            if wanted != TRAIN:
                key = (wanted, pair.skill, pair.cells[0])
                if key in self.asked and self.is_general:
                    continue
                self.asked.add(key)
                self.references.add(answer)
            elif answer in self.references and len(answer.split()) > 4:
                continue
            self.prompts.add(pair.prompt)
            return pair
        return None

    def is_sound(self, pair: Pair) -> bool:
        """Say whether the prompt is new, the reference correct and no unseen thing beside it."""
        text = "\n".join(message["content"] for message in pair.messages)
        beside = self.unseen.intersection(self.vocabulary.names.find(text)) - {pair.cells[0][0]}
        if pair.prompt in self.prompts or beside:
            return False
        answer = pair.messages[-1]["content"]
        return judge_answer(answer, True, make_record(pair), self.vocabulary) == "correct"

    def collect(self, wanted: tuple, quota: int, total: int | None = None) -> list[Pair]:
        """Draw pairs of one set and half, as many of each skill, in random order."""
        half = wanted[1] if wanted[0] == "unseen" else None
        things = [t for t in self.things if self.held_out.half_of_thing.get(t.name) == half]
        skills, drawn, times = list(self.makers), [], self.times if wanted == TRAIN else {}
        for i in range(quota * max(times.values(), default=1)):
            if total is None or len(drawn) < total:
                skills = [skill for skill in skills if i < quota * times.get(skill, 1)]
                pairs = [self.draw(skill, things, wanted) for skill in skills]
                drawn += filter(None, pairs)
                skills = [pair.skill for pair in pairs if pair]
        self.rng.shuffle(drawn)
        return drawn[:total]


def make_record(pair: Pair, **fields: str) -> dict:
    """Return a pair as a line of a probe file."""
    things = list(dict.fromkeys(thing for thing, _ in pair.cells))
    about = {"skill": pair.skill, "things": things, "cell": list(pair.cells[0])}
    return fields | about | {"conversations": pair.messages, "check": pair.check}


def write_pretraining(output_dir: Path, worlds: list[World], seed: int, scale: float) -> None:
    """Write the documents: for training, held-out documents, and held-out patterns."""
    rng, (world, chinese) = random.Random(seed), worlds
    documents = write_documents(TextWriter(world, rng), round(TEXT_BYTES * scale))
    documents += write_documents(ChineseWriter(chinese, rng), round(CHINESE_BYTES * scale))
    rng.shuffle(documents)
    held = round(VALIDATION_SHARE * len(documents))
    writer = TextWriter(world, rng, held=True)
    patterns = [writer.entry(thing) for thing in world.things]
    files = {"": documents[held:], "_valid": documents[:held], "_patterns": patterns}
    for ending, texts in files.items():
        write_records(output_dir / f"pretrain_world{ending}.jsonl", ({"text": t} for t in texts))


def write_world(
    output_dir: Path, seed: int = 42, things_each: int | None = None, scale: float = 1.0
) -> dict[str, Path]:
    """Write all files; `things_each` and `scale` make a small world for tests."""
    world, chinese = (read_world(path, things_each) for path in (WORLD_DIR, WORLD_DIR / "chinese"))
    vocabulary = make_vocabulary(world, chinese)
    output_dir.mkdir(parents=True, exist_ok=True)
    write_pretraining(output_dir, [world, chinese], seed, scale)
    # The text above covers all categories; from here on, `world` is without the medical one.
    medical = replace(world, categories={MEDICAL: world.categories.pop(MEDICAL)})
    parts = {"general": world, "medical": medical, "chinese": chinese}
    unseen = UNSEEN if things_each is None else {part: min(n, 1) for part, n in UNSEEN.items()}
    held = {part: HeldOut(things, unseen[part], seed) for part, things in parts.items()}
    names = {name for held_out in held.values() for name in held_out.half_of_thing}
    train = {}
    for part, things in parts.items():
        builder = PairBuilder(things, held[part], vocabulary, names)
        mine = [part] if part in PART_SETS else PROBES.keys() - PART_SETS
        for name, half in [(n, h) for n in PROBES if n in mine for h in HELD_CELLS]:
            sets = PART_SETS.get(part, [name])
            each = max(1, round(PROBES[name][half] * scale)) // len(sets)
            pairs = [pair for s in sets for pair in builder.collect((s, half), each, each)]
            records = (
                make_record(pair, id=f"{name}-{half}-{i:04}", set=name, half=half)
                for i, pair in enumerate(pairs, start=1)
            )
            write_records(output_dir / f"probe_{name}_{half}.jsonl", records)
        train[part] = builder.collect(TRAIN, max(4, round(PAIRS[part] * scale)))
    sft = train["general"] + train["chinese"]
    random.Random(seed).shuffle(sft)
    for name, pairs in (("sft_world", sft), ("lora_medical_world", train["medical"])):
        records = ({"conversations": pair.messages, "skill": pair.skill} for pair in pairs)
        write_records(output_dir / f"{name}.jsonl", records)
    write_json(output_dir / "held_out.json", {part: h.things for part, h in held.items()})
    return list_files(output_dir)


def list_files(output_dir: Path) -> dict[str, Path]:
    """Return the paths of the world's files by their names."""
    names = {f"pretrain{end}": f"pretrain_world{end}" for end in ("", "_valid", "_patterns")}
    names |= {"sft": "sft_world", "sft_valid": "probe_combinations_tune"}
    names |= {"medical": "lora_medical_world", "medical_valid": "probe_medical_tune"}
    names |= {f"{name}_{half}": f"probe_{name}_{half}" for name in PROBES for half in HELD_CELLS}
    return {key: output_dir / f"{name}.jsonl" for key, name in names.items()}


def ensure_world(output_dir: Path = FILES_DIR, seed: int = 42) -> dict[str, Path]:
    """Return the world's files; write them first if missing, or of another version or seed."""
    sources = [*WORLD_DIR.rglob("*.py"), *WORLD_DIR.rglob("*.toml"), WORLD_DIR.parent / "checks.py"]
    contents = [str(seed).encode(), *(path.read_bytes() for path in sorted(sources))]
    version = hashlib.sha256(b"".join(contents)).hexdigest()
    stamp = output_dir / "sources.sha256"
    output_dir.mkdir(parents=True, exist_ok=True)
    files = list_files(output_dir)
    with FileLock(output_dir / "lock"):
        is_whole = stamp.is_file() and all(map(Path.is_file, files.values()))
        if not is_whole or stamp.read_text() != version:
            print("writing the world's text and instructions, about a minute")
            stamp.unlink(missing_ok=True)  # a world half rewritten is not whole
            write_world(output_dir, seed)
            write_text(stamp, version)
    return files


def main(argv: list[str] | None = None) -> None:
    """Write the files that are missing, and print the number of lines of each file."""
    parser = make_parser(__doc__)
    parser.add_argument("--output_dir", type=Path, default=FILES_DIR)
    parser.add_argument("--seed", type=int, default=42)
    args = parser.parse_args(argv)
    for path in dict.fromkeys(ensure_world(args.output_dir, args.seed).values()):
        print(f"{path}  {sum(1 for _ in path.open(encoding='utf-8'))} lines")


if __name__ == "__main__":
    run_script(main)
