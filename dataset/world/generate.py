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
from pathlib import Path

from filelock import FileLock

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from dataset.lm_dataset import write_records
from dataset.world.checks import ARTICLE, Vocabulary, judge_answer, make_vocabulary
from dataset.world.facts import WORLD_DIR, Thing, World, read_world
from dataset.world.skills import NOUN_DRAWS, Cell, Pair, Writer, collect_fillers, collect_makers
from dataset.world.text import ChineseWriter, TextWriter, write_documents
from model.cli import make_parser, run_script
from model.files import write_json, write_text

FILES_DIR = WORLD_DIR.parent / "data" / "world"
TEXT_BYTES = 8_800_000
CHINESE_BYTES = 400_000
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
PART_PROBES = {  # the probe files of each part
    "general": ["combinations", "unseen", "wordings"],
    "medical": ["medical"],
    "chinese": ["chinese"],
}
PROBE_SETS = {  # what stands in a file; the files of small parts hold several sets or one
    "combinations": ["combinations"],
    "unseen": ["unseen"],
    "wordings": ["wordings"],
    "medical": ["combinations", "unseen"],
    "chinese": ["combinations"],
}
MEDICAL = "condition"  # the category that the medical set is about
FILLED = 0.5  # share of the training pairs on lists and scenes that are about a filler
TRIES = 400  # draws for a wanted pair, before a skill is given up
SHORT_ANSWER = 4  # words; so short a reference may answer training pairs, too
Purpose = tuple[str, str | None]  # what a pair is for: a probe set and its half, or training
TRAIN: Purpose = ("train", None)


def place(seed: int, *words: str) -> float:
    """Map words to a number between 0 and 1."""
    text = "\n".join([str(seed), *words])
    digest = hashlib.sha256(text.encode()).digest()
    return int.from_bytes(digest[:8]) / 2**64


def choose_half(position: float) -> str | None:
    """Return the half that holds out what is placed there; None beyond both shares."""
    if position < HELD_CELLS["tune"]:
        return "tune"
    return "test" if position < HELD_CELLS["tune"] + HELD_CELLS["test"] else None


class HeldOut:
    """What never trains: things by half, and cells of the other things by half.

    A hash of its name decides about a thing or a cell, so it stays where it is if others join.
    """

    def __init__(self, world: World, unseen_count: int, seed: int) -> None:
        self.seed = seed
        self.halves: dict[Cell, str | None] = {}  # of the cells that were asked for
        names = [thing.name for thing in world.things]
        ranked = sorted(names, key=lambda name: place(seed, "thing", name))
        self.things = {
            "tune": ranked[:unseen_count],
            "test": ranked[unseen_count : 2 * unseen_count],
        }
        self.half_of_thing = {}
        for half, held_names in self.things.items():
            self.half_of_thing |= dict.fromkeys(held_names, half)
        self.mirrors = find_mirrors(world)

    def half_of_cell(self, cell: Cell) -> str | None:
        """Return the half that holds a cell out; None for one that trains."""
        if cell not in self.halves:
            thing, key = self.mirrors.get(cell, cell)
            position = place(self.seed, "cell", thing, key)
            self.halves[cell] = choose_half(position)
        return self.halves[cell]

    def find_purpose(self, cells: list[Cell], held_wording: bool) -> Purpose | None:
        """Return `TRAIN`, or the probe set and half of a pair; None if it fits nowhere.

        A pair is held out by its first cell alone; in "wordings" the question's form is new, too.
        All its other cells train.
        """
        main_cell, *other_cells = cells
        unseen_half = self.half_of_thing.get(main_cell[0])
        cell_half = self.half_of_cell(main_cell)
        for cell in other_cells:
            if self.half_of_cell(cell):
                return None
        if held_wording:
            if cell_half and not unseen_half:
                return ("wordings", cell_half)
            return None
        if unseen_half:  # its cells must train in general: the thing alone is new
            return None if cell_half else ("unseen", unseen_half)
        return ("combinations", cell_half) if cell_half else TRAIN


def find_mirrors(world: World) -> dict[Cell, Cell]:
    """Map both directions of a fact to one cell: a baker's tool is a rolling pin's user.

    Were they drawn apart, a training pair could tell what a prompt on the other asks for.
    """
    cells = {}  # by thing and value
    for thing in world.things:
        for attribute, value in thing.values.items():
            cells[thing.name, ARTICLE.sub("", value)] = (thing.name, attribute)
    mirrors = {}
    for (name, value), cell in cells.items():
        if (value, name) in cells:
            mirrors[cell] = min(cell, cells[value, name])
    return mirrors


class PairBuilder:
    """Draw pairs of all skills for training and for the probes of one part of the world."""

    def __init__(
        self, world: World, held_out: HeldOut, vocabulary: Vocabulary, unseen_names: set[str]
    ) -> None:
        self.held_out = held_out
        self.vocabulary = vocabulary
        self.unseen_names = unseen_names  # of the held-out things of all parts
        self.things = world.things
        self.makers = collect_makers(world)
        self.fillers = collect_fillers(world)
        self.is_small = world.is_small
        self.prompts: set[str] = set()
        self.asked: set[tuple] = set()  # purpose, skill and cell of each held-out prompt
        self.references: set[str] = set()  # of held-out prompts
        self.times = {}  # how many times as many training pairs a skill has
        self.fact_free_skills = set()  # about lists and scenes alone
        for skill, spec in world.wordings["skill"].items():
            self.times[skill] = spec.get("times", 1)
            if NOUN_DRAWS.keys() >= set(spec["uses"]):
                self.fact_free_skills.add(skill)
        self.rng = random.Random(held_out.seed)
        seen = [thing for thing in world.things if thing.name not in held_out.half_of_thing]
        self.writers = {}  # by whether they take the held-out question forms
        for held_wording in (False, True):
            writer = Writer(world, self.rng, seen, held_wording)
            writer.nouns += self.fillers
            self.writers[held_wording] = writer

    def draw(self, skill: str, things: list[Thing], wanted: Purpose) -> Pair | None:
        """Draw one new pair for a purpose; None if none turns up."""
        held_wording = wanted[0] == "wordings"
        writer = self.writers[held_wording]
        takes_fillers = wanted == TRAIN and skill in self.fact_free_skills
        for _ in range(TRIES):
            is_filler = takes_fillers and self.rng.random() < FILLED
            thing = self.rng.choice(self.fillers if is_filler else things)
            draft = self.makers[skill](writer, thing)
            if draft is None or self.held_out.find_purpose(draft.cells, held_wording) != wanted:
                continue
            pair = draft.write()
            if self.is_new(pair, wanted) and self.is_sound(pair):
                self.note(pair, wanted)
                return pair
        return None

    def is_new(self, pair: Pair, wanted: Purpose) -> bool:
        """Say whether a pair repeats no prompt, no held-out cell and no long reference.

        A small part has too few cells: it asks about each in several ways.
        """
        if pair.prompt in self.prompts:
            return False
        if wanted == TRAIN:
            is_long = len(pair.answer.split()) > SHORT_ANSWER
            return not is_long or pair.answer not in self.references
        return self.is_small or (wanted, pair.skill, pair.cells[0]) not in self.asked

    def is_sound(self, pair: Pair) -> bool:
        """Say whether the reference is correct, and no unseen thing stands beside the subject."""
        subject, _ = pair.cells[0]
        named = self.vocabulary.names.find(f"{pair.prompt}\n{pair.answer}")
        if self.unseen_names.intersection(named) - {subject}:
            return False
        return judge_answer(pair.answer, True, make_record(pair), self.vocabulary) == "correct"

    def note(self, pair: Pair, wanted: Purpose) -> None:
        """Remember a pair, so that no later one repeats it."""
        self.prompts.add(pair.prompt)
        if wanted != TRAIN:
            self.asked.add((wanted, pair.skill, pair.cells[0]))
            self.references.add(pair.answer)

    def collect(self, wanted: Purpose, quota: int, total: int | None = None) -> list[Pair]:
        """Draw pairs for a purpose, `quota` of each skill, in random order; `total` at most.

        Skills take turns; one that finds no pair is given up.
        """
        half = wanted[1] if wanted[0] == "unseen" else None
        half_of_thing = self.held_out.half_of_thing
        things = [thing for thing in self.things if half_of_thing.get(thing.name) == half]
        times = self.times if wanted == TRAIN else {}
        most = max(times.values(), default=1)
        skills = list(self.makers)
        drawn = []
        for turn in range(quota * most):
            if total is not None and len(drawn) >= total:
                break
            skills = [skill for skill in skills if turn < quota * times.get(skill, 1)]
            pairs = [self.draw(skill, things, wanted) for skill in skills]
            pairs = [pair for pair in pairs if pair is not None]
            skills = [pair.skill for pair in pairs]
            drawn += pairs
        self.rng.shuffle(drawn)
        return drawn[:total]


def make_record(pair: Pair, **fields: str) -> dict:
    """Return a pair as a line of a probe file."""
    things = [thing for thing, _ in pair.cells]
    return {
        **fields,
        "skill": pair.skill,
        "things": list(dict.fromkeys(things)),  # each once, in this order
        "cell": list(pair.cells[0]),
        "conversations": pair.messages,
        "check": pair.check,
    }


def write_pretraining(
    output_dir: Path, world: World, chinese: World, seed: int, scale: float
) -> None:
    """Write the documents: for training, held-out documents, and held-out patterns."""
    rng = random.Random(seed)
    documents = write_documents(TextWriter(world, rng), round(TEXT_BYTES * scale))
    documents += write_documents(ChineseWriter(chinese, rng), round(CHINESE_BYTES * scale))
    rng.shuffle(documents)
    valid_count = round(VALIDATION_SHARE * len(documents))
    pattern_writer = TextWriter(world, rng, use_held_out=True)
    files = {
        "pretrain_world": documents[valid_count:],
        "pretrain_world_valid": documents[:valid_count],
        "pretrain_world_patterns": [pattern_writer.entry(thing) for thing in world.things],
    }
    for name, texts in files.items():
        write_records(output_dir / f"{name}.jsonl", ({"text": text} for text in texts))


def split_world(world: World, chinese: World) -> dict[str, World]:
    """Return the parts that pairs are made of: general, medical and chinese."""
    general = dict(world.categories)
    medical = general.pop(MEDICAL)
    return {
        "general": replace(world, categories=general),
        "medical": replace(world, categories={MEDICAL: medical}),
        "chinese": chinese,
    }


def write_probes(output_dir: Path, part: str, builder: PairBuilder, scale: float) -> None:
    """Write the held-out prompts of a part, to tune and to test."""
    for name in PART_PROBES[part]:
        sets = PROBE_SETS[name]
        for half, count in PROBES[name].items():
            quota = max(1, round(count * scale)) // len(sets)
            records = []
            for set_name in sets:
                for pair in builder.collect((set_name, half), quota, quota):
                    number = len(records) + 1
                    key = f"{name}-{half}-{number:04}"
                    records.append(make_record(pair, id=key, set=name, half=half))
            write_records(output_dir / f"probe_{name}_{half}.jsonl", records)


def write_pairs(path: Path, pairs: list[Pair]) -> None:
    """Write training pairs."""
    write_records(path, ({"conversations": pair.messages, "skill": pair.skill} for pair in pairs))


def write_world(
    output_dir: Path, seed: int = 42, things_each: int | None = None, scale: float = 1.0
) -> dict[str, Path]:
    """Write all files; `things_each` and `scale` make a small world for tests."""
    world = read_world(WORLD_DIR, things_each)
    chinese = read_world(WORLD_DIR / "chinese", things_each)
    vocabulary = make_vocabulary(world, chinese)
    output_dir.mkdir(parents=True, exist_ok=True)
    write_pretraining(output_dir, world, chinese, seed, scale)
    parts = split_world(world, chinese)
    held_by_part = {}
    unseen_names = set()
    for part, part_world in parts.items():
        unseen_count = UNSEEN[part] if things_each is None else min(UNSEEN[part], 1)
        held_by_part[part] = HeldOut(part_world, unseen_count, seed)
        unseen_names |= held_by_part[part].half_of_thing.keys()
    train = {}
    for part, part_world in parts.items():
        builder = PairBuilder(part_world, held_by_part[part], vocabulary, unseen_names)
        write_probes(output_dir, part, builder, scale)  # first: training avoids their references
        quota = max(4, round(PAIRS[part] * scale))
        train[part] = builder.collect(TRAIN, quota)
    mixed = train["general"] + train["chinese"]
    random.Random(seed).shuffle(mixed)
    write_pairs(output_dir / "sft_world.jsonl", mixed)
    write_pairs(output_dir / "lora_medical_world.jsonl", train["medical"])
    unseen_things = {part: held_out.things for part, held_out in held_by_part.items()}
    write_json(output_dir / "held_out.json", unseen_things)
    return list_files(output_dir)


def list_files(output_dir: Path) -> dict[str, Path]:
    """Return the paths of the world's files by their names; what validates is a probe, too."""
    names = {
        "pretrain": "pretrain_world",
        "pretrain_valid": "pretrain_world_valid",
        "pretrain_patterns": "pretrain_world_patterns",
        "sft": "sft_world",
        "sft_valid": "probe_combinations_tune",
        "medical": "lora_medical_world",
        "medical_valid": "probe_medical_tune",
    }
    for name, halves in PROBES.items():
        for half in halves:
            names[f"{name}_{half}"] = f"probe_{name}_{half}"
    return {key: output_dir / f"{name}.jsonl" for key, name in names.items()}


def hash_sources(seed: int) -> str:
    """Return the version of the world's files: a hash of the seed and of all that makes them."""
    sources = [*WORLD_DIR.rglob("*.py"), *WORLD_DIR.rglob("*.toml")]
    digest = hashlib.sha256(str(seed).encode())
    for path in sorted(sources):
        digest.update(path.read_bytes())
    return digest.hexdigest()


def ensure_world(output_dir: Path = FILES_DIR, seed: int = 42) -> dict[str, Path]:
    """Return the world's files; write them first if missing, or of another version or seed."""
    version = hash_sources(seed)
    stamp = output_dir / "sources.sha256"
    files = list_files(output_dir)
    output_dir.mkdir(parents=True, exist_ok=True)
    with FileLock(output_dir / "lock"):  # of several runs that start together, one writes
        is_whole = stamp.is_file() and all(path.is_file() for path in files.values())
        if not is_whole or stamp.read_text() != version:
            print("writing the world's text and instructions, about half a minute")
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
    files = ensure_world(args.output_dir, args.seed)
    for path in dict.fromkeys(files.values()):
        with path.open(encoding="utf-8") as lines:
            count = sum(1 for _ in lines)
        print(f"{path}  {count} lines")


if __name__ == "__main__":
    run_script(main)
