"""The embedded demo corpus: a small true world, told many times, so that everything runs offline.

    python dataset/demo.py                          # writes dataset/data/demo/
    python dataset/demo.py --output_dir DIR --seed 7

The facts and the wordings are ours and stand in `demo_world.toml`; this script turns them into

    pretrain_demo.jsonl, pretrain_demo_valid.jsonl         {"text": ...}
    sft_demo.jsonl, sft_demo_valid.jsonl                   {"conversations": ..., "check": ...}
    lora_medical_demo.jsonl, lora_medical_demo_valid.jsonl the same, on illnesses and injuries

Every instruction pair has its `kind`, the `subject` that it asks about, all `things` that it names
as subject, choice or partner, and a `check` that `evaluation/metrics.py::check_answer` understands
and that the reference answer passes. Illnesses occur in the pretraining text and the medical files
only.

What is held out (`held_out` says which, in `sft_demo_valid.jsonl`):

- "thing": about a tenth of the things of each group. No message of `sft_demo.jsonl` names one, but
  the pretraining text tells their facts. Only things that no other thing's facts mention qualify.
- "combination": for every other thing (and category and word) some kinds of instruction. The thing
  is asked about in other ways, and the kind is asked of other things, but not the two together:
  in no training pair of the kind is the thing among `things`.
- In the medical files: whole conditions. No message of `lora_medical_demo.jsonl` names one.

A prompt is the texts of all user turns; none occurs twice in a file or in training and validation.
Same seed, same bytes.
"""

import argparse
import hashlib
import json
import os
import random
import re
import sys
import tomllib
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from functools import cache, cached_property, partial
from itertools import permutations
from pathlib import Path
from string import Formatter
from types import SimpleNamespace

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from model.files import run_script

WORLD_FILE = Path(__file__).resolve().parent / "demo_world.toml"
SOURCE_FILE = "source.sha256"  # tells by which version of this code a corpus was made
DEMO_DIR = Path(__file__).resolve().parent / "data" / "demo"
DEMO_FILES = {
    "pretrain": "pretrain_demo.jsonl",
    "pretrain_valid": "pretrain_demo_valid.jsonl",
    "sft": "sft_demo.jsonl",
    "sft_valid": "sft_demo_valid.jsonl",
    "medical": "lora_medical_demo.jsonl",
    "medical_valid": "lora_medical_demo_valid.jsonl",
}

PRETRAIN_BYTES = 2_450_000  # text of all documents, validation included
PRETRAIN_VALID_DOCS = 150
TRAIN_PER_KIND = 100
VALID_PER_KIND = 4  # for held-out things, and again for held-out combinations
MEDICAL_WORDINGS = 4  # questions about one aspect of one condition
HELD_OUT_SHARE = 0.1  # of the things of a group
HELD_OUT_CONDITIONS = 7
RESERVED_KINDS = 4  # kinds of instruction held out for one thing
SYSTEM_SHARE = 0.04  # of training pairs that get a neutral system message
MAX_ROUNDS = 40  # over all subjects of a kind, when new prompts run short

SIZES = ("tiny", "small", "medium-sized", "large", "huge")
NUMBER_TEXT = "zero one two three four five six seven eight nine ten"
NUMBERS = NUMBER_TEXT.split()
STOP_TEXT = (
    "a about after all also an and any are around as at be because before behind by can do does "
    "each for from get gets goes has have helps how if in into is it its keep keeps lives made "
    "make makes many more most near not of off often on once one or other out over own people so "
    "some someone than that the their them then there things to two up used very was we "
    "when where which while who with you your"
)
STOP_WORDS = frozenset(STOP_TEXT.split())
# Plurals that no rule of `with_singular` gets right, and words that only look like plurals.
SINGULARS = {
    "shelves": "shelf",
    "leaves": "leaf",
    "knives": "knife",
    "hooves": "hoof",
    "loaves": "loaf",
    "viruses": "virus",
    "cactuses": "cactus",
    "lenses": "lens",
    "pies": "pie",
    "teeth": "tooth",
    "feet": "foot",
    "mice": "mouse",
    "bacteria": "bacterium",
}
NO_PLURALS = (
    "always",
    "sometimes",
    "diabetes",
    "sideways",
    "backwards",
    "lens",
    "hives",
    "measles",
)
NAME_SLOT_TEXT = "n a A the The s S some Some some_of at At"
NAME_SLOTS = frozenset(NAME_SLOT_TEXT.split())  # slots of x that hold its name
WHOLE_LISTS = ("symptoms", "treatment", "doctor")  # never told in part
# Cells whose key word answers a question by itself.
SHORT_CELLS = "color taste material home place source legs wheels number user worker quality power"


# ---------------------------------------------------------------- the world


@dataclass(frozen=True, eq=False)
class Thing:
    """One thing of the world; a cell is a text, or a tuple of texts for a list, stars included."""

    name: str
    article: str  # "a" for what can be counted, "the" for what there is one of, "" for the rest
    plural: str | None
    group: str
    cells: dict[str, str | tuple[str, ...]]

    @cached_property
    def fixed_slots(self) -> dict[str, str]:
        """What templates may say that is always the same: its name and its single cells."""
        return name_slots(self) | text_slots(self)


@dataclass(frozen=True)
class Category:
    """A set of things with its names; `outside` are things that are surely no members."""

    one: str
    many: str
    members: tuple[Thing, ...]
    outside: tuple[Thing, ...]


@dataclass(frozen=True)
class World:
    """The things, and the wordings to tell them in (`raw` is the parsed TOML file)."""

    raw: dict
    things: tuple[Thing, ...]
    people: tuple[SimpleNamespace, ...]
    opposites: dict[str, str]
    categories: tuple[Category, ...]

    def group(self, name: str) -> list[Thing]:
        return [thing for thing in self.things if thing.group == name]


@dataclass(frozen=True)
class Pair:
    """One instruction pair; `earlier` are the (user, assistant) turns before it."""

    kind: str
    subject: str
    user: str
    answer: str
    check: dict
    things: tuple[str, ...]
    system: str | None = None
    earlier: tuple[tuple[str, str], ...] = ()

    def prompt(self) -> str:
        return "\n".join([*(user for user, _ in self.earlier), self.user])


def load_world(path: Path = WORLD_FILE) -> World:
    """The whole world of `demo_world.toml`."""
    raw = tomllib.loads(path.read_text(encoding="utf-8"))
    things = [
        thing for group, spec in raw["group"].items() for thing in read_table(spec["table"], group)
    ]
    return make_world(raw, things)


def make_world(raw: dict, things: Iterable[Thing]) -> World:
    """A world of these things; its categories hold no others."""
    things = tuple(things)
    pairs = [entry.split() for entry in re.split(r"[|\n]", raw["opposites"]) if entry.strip()]
    categories = [
        Category(spec["one"], spec["many"], select(things, [spec["members"]]), outside)
        for spec in raw["category"]
        for outside in [select(things, spec["outside"])]
    ]
    return World(
        raw=raw,
        things=things,
        people=tuple(read_people(raw["people"])),
        opposites=dict(pairs) | {right: left for left, right in pairs},
        categories=tuple(c for c in categories if len(c.members) >= 3),
    )


def read_table(table: str, group: str) -> list[Thing]:
    """The things of one table of `demo_world.toml`."""
    header, *rows = [[cell.strip() for cell in row.split("|")] for row in table.split("\n") if row]
    things = []
    for row in rows:
        cells = dict(zip(header[1:], row[1:], strict=True))
        lists = {c[:-1]: tuple(map(str.strip, cells[c].split(";"))) for c in cells if c[-1] == "+"}
        texts = {column: cell for column, cell in cells.items() if column[-1] != "+"}
        name, article, plural = read_name(row[0])
        filled = {c: v for c, v in (texts | lists).items() if v and v != ("",)}
        things.append(Thing(name, article, plural, group, filled))
    return things


def read_name(cell: str) -> tuple[str, str, str | None]:
    """Name, article and plural from "lion", "mouse/mice", "rice/-" or "the moon"."""
    if cell.startswith("the "):
        return cell.removeprefix("the "), "the", None
    name, _, plural = cell.partition("/")
    return (name, "", None) if plural == "-" else (name, "a", plural or pluralize(name))


def read_people(table: str) -> list[SimpleNamespace]:
    people = []
    for entry in re.split(r"[|\n]", table):
        if entry.strip():
            name, he, his, him = entry.split()
            person = SimpleNamespace(n=name, he=he, his=his, him=him, He=he.capitalize())
            people.append(person)
    return people


def select(things: Iterable[Thing], selectors: list[str]) -> tuple[Thing, ...]:
    """The things that any selector names: "animal" or "animal.kind=bird,reptile"."""
    return tuple(t for t in things if any(is_selected(t, selector) for selector in selectors))


def is_selected(thing: Thing, selector: str) -> bool:
    where, _, values = selector.partition("=")
    group, _, column = where.partition(".")
    if thing.group != group or not column:
        return thing.group == group
    cell = thing.name if column == "name" else thing.cells.get(column, ())
    found = (cell,) if isinstance(cell, str) else cell
    return any(plain(value) in values.split(",") for value in found)


# ---------------------------------------------------------------- words


def plain(cell: str) -> str:
    """A cell without the stars around its key words."""
    return cell.replace("*", "")


def pluralize(name: str) -> str:
    first, of, rest = name.partition(" of ")
    if of:
        return f"{pluralize(first)} of {rest}"
    if re.search(r"[^aeiou]y$", name):
        return name[:-1] + "ies"
    if name.endswith("fish"):
        return name
    return name + ("es" if re.search(r"(s|x|ch|sh)$", name) else "s")


def indefinite(noun: str) -> str:
    """ "a" or "an" before the noun, by its sound."""
    sounds_like_you = noun.lower().startswith(("uni", "use", "uri", "eu", "one"))
    return "an" if noun[0].lower() in "aeiou" and not sounds_like_you else "a"


def fix_articles(text: str) -> str:
    """Turns "a(n)" into "a" or "an"."""
    return re.sub(
        r"\b([Aa])\(n\) (\S+)",
        lambda m: m[1] + indefinite(m[2])[1:] + " " + m[2],
        text,
    )


def capital(text: str) -> str:
    return text[:1].upper() + text[1:]


def small(text: str) -> str:
    """The text with a small first letter, unless it opens with "I"."""
    return text if re.match(r"I\b", text) else text[:1].lower() + text[1:]


def join(items: Iterable[str], word: str = "and") -> str:
    """ "a", "a and b", "a, b and c"."""
    *head, last = items
    return f"{', '.join(head)} {word} {last}" if head else last


@cache
def word_pattern(phrase: str) -> re.Pattern:
    return re.compile(rf"(?<!\w){re.escape(phrase)}(?!\w)", re.IGNORECASE)


def has_word(text: str, phrase: str) -> bool:
    """True if the phrase is in the text as whole words, in any case."""
    return word_pattern(phrase).search(text) is not None


def name_slots(thing: Thing) -> dict[str, str]:
    counted = thing.article == "a"
    the = f"the {thing.name}" if thing.article else thing.name
    singular = f"{indefinite(thing.name)} {thing.name}" if counted else the
    some = thing.plural or the
    slots = {"n": thing.name, "a": singular, "A": capital(singular), "the": the}
    slots |= {"The": capital(the), "some": some, "Some": capital(some), "some_of": some}
    if thing.cells.get("number") == "1":
        slots["some_of"] = thing.name
    if not counted:
        return slots | {"are": "is"}
    return slots | {"are": "are", "s": thing.plural, "S": capital(thing.plural)}


def text_slots(thing: Thing) -> dict[str, str]:
    """The slots of the cells that hold one text."""
    texts = {column: plain(cell) for column, cell in thing.cells.items() if isinstance(cell, str)}
    numbers = {column: NUMBERS[int(text)] for column, text in texts.items() if text.isdigit()}
    slots = texts | {c: "no" if word == "zero" else word for c, word in numbers.items()}
    slots |= {f"{column}_count": word for column, word in numbers.items()}
    if "kind" in texts:
        slots["kinds"] = pluralize(texts["kind"])
    if "at" in texts:
        slots["At"] = capital(texts["at"])
    return slots


def words(thing: Thing, rng: random.Random) -> SimpleNamespace:
    """What templates may say about a thing; lists come shuffled, and not always whole."""
    slots = dict(thing.fixed_slots)
    for column, cell in thing.cells.items():
        if isinstance(cell, tuple):
            items = [plain(item) for item in rng.sample(cell, len(cell))]
            least = len(items) if column in WHOLE_LISTS else min(2, len(items))
            shown = items[: rng.randint(least, len(items))]
            slots[column] = join(shown, "or" if column == "doctor" else "and")
            slots[f"{column}1"] = items[0]
    return SimpleNamespace(**slots)


@cache
def slots_of(template: str) -> tuple[tuple[str, str], ...]:
    """The slots of a template as (name, attribute), "" for no attribute."""
    fields = [field for _, field, _, _ in Formatter().parse(template) if field is not None]
    return tuple((field.partition(".")[0], field.partition(".")[2]) for field in fields)


def fits(template: str, slots: dict) -> bool:
    """True if every slot of the template can be filled."""
    return all(
        name in slots and (not attribute or hasattr(slots[name], attribute))
        for name, attribute in slots_of(template)
    )


def fill(template: str, **slots) -> str:
    return fix_articles(template.format(**slots))


def say(templates: Iterable[str], rng: random.Random, **slots) -> str:
    """One of the templates that fit, filled."""
    return fill(rng.choice([t for t in templates if fits(t, slots)]), **slots)


def names_thing(template: str) -> bool:
    """True if the template names the thing x, so that it can stand alone."""
    return any(name == "x" and attribute in NAME_SLOTS for name, attribute in slots_of(template))


def fact_cells(thing: Thing, world: World) -> list[str]:
    """The filled cells of a thing that there are sentences for."""
    return [c for c in world.raw["group"][thing.group]["say"] if c in thing.cells]


def fact(thing: Thing, cell: str, world: World, rng: random.Random, alone: bool = True) -> str:
    """A sentence that tells one cell; not `alone`, it may say "it" for the thing."""
    templates = world.raw["group"][thing.group]["say"][cell]
    return say([t for t in templates if not alone or names_thing(t)], rng, x=words(thing, rng))


def answer_templates(thing: Thing, cell: str, world: World) -> list[str]:
    """The two plainest sentences for a cell, so that answers are alike in form."""
    templates = world.raw["group"][thing.group]["say"][cell]
    x = {"x": words(thing, random.Random(0))}
    fitting = [t for t in templates if names_thing(t) and fits(t, x)]
    return fitting if cell == "define" else fitting[:2]


def answer_fact(thing: Thing, cell: str, world: World, rng: random.Random) -> str:
    return say(answer_templates(thing, cell, world), rng, x=words(thing, rng))


def two_people(world: World, rng: random.Random) -> dict[str, SimpleNamespace]:
    hero, friend = rng.sample(world.people, 2)
    return {"h": hero, "f": friend}


# ---------------------------------------------------------------- checks


def content_words(text: str) -> list[str]:
    found = re.findall(r"[A-Za-z][\w'-]*", text)
    return [word for word in found if word.lower() not in STOP_WORDS and len(word) > 2]


def with_singular(noun: str) -> list[str]:
    """A noun and, if it is a plural, its singular: "forest" passes for "forests"."""
    if noun in SINGULARS:
        return [noun, SINGULARS[noun]]
    if not noun.endswith("s") or noun.endswith(("ss", "us", "is", "ness")) or noun in NO_PLURALS:
        return [noun]
    if re.search(r"..ies$", noun):
        return [noun, noun[:-3] + "y"]
    return [noun, re.sub(r"(?<=[xh])es$|s$", "", noun)]


def head_noun(phrase: str) -> str:
    """ "eyes" of "eyes on stalks", "feet" of "hundreds of tiny feet"."""
    return re.split(r" (?:on|around|for|in|at|over|to|with|that) ", phrase)[0].split()[-1]


def keys(thing: Thing, cell: str) -> list[str]:
    """Words of a cell of which an answer should hold one: those in stars, else what counts most."""
    value = thing.cells[cell]
    text = value if isinstance(value, str) else "; ".join(value)
    if text.isdigit():
        zero = ["zero", "none", "0", f"no {cell}"]
        return zero if text == "0" else [NUMBERS[int(text)], text]
    found = re.findall(r"\*([^*]+)\*", text)
    if not found and not isinstance(value, str):
        found = [head_noun(item) for item in value]
    if found:
        found = [form for word in found for form in with_singular(word)]
    else:
        found = content_words(text)
    return [word for word in dict.fromkeys(found) if not has_word(thing.name, word)]


def any_of(found: Iterable[str], question: str) -> dict:
    """A check for one of these words, those aside that the question gives away."""
    return {"contains_any": [w for w in dict.fromkeys(found) if not has_word(question, w)]}


def cell_check(thing: Thing, cell: str, question: str) -> dict:
    """What an answer about a cell must hold: one key word; of "black and white", every color."""
    if cell != "color":
        return any_of(keys(thing, cell), question)
    color = thing.cells["color"]
    hues = [part.split()[-1] for part in re.split(r", | and | or ", color)]
    if " or " in color or any(has_word(question, hue) for hue in hues):
        return any_of(hues, question)
    return {"contains": hues}


def is_sound(pair: Pair) -> bool:
    """True if the reference holds what its check wants, as far as words go."""
    answer, check = pair.answer, pair.check
    size = len(answer.split())
    return (
        all(has_word(answer, word) for word in check.get("contains", ()))
        and any(has_word(answer, word) for word in check.get("contains_any", [answer]))
        and not any(has_word(answer, word) for word in check.get("excludes", ()))
        and check.get("min_words", size) <= size <= check.get("max_words", size)
    )


def name_check(thing: Thing) -> list[str]:
    return list(dict.fromkeys([thing.name, thing.plural or thing.name]))


def all_names(things: Iterable[Thing]) -> list[str]:
    return [name for thing in things for name in name_check(thing)]


def apart(things: Iterable[Thing]) -> bool:
    """True if no name stands inside another, so that naming one does not name two."""
    return not any(has_word(y.name, x.name) for x, y in permutations(things, 2))


# ---------------------------------------------------------------- pretraining documents


def entry_doc(thing: Thing, world: World, rng: random.Random) -> str:
    """A short encyclopedia entry: facts in any order, the first one naming the thing."""
    cells = fact_cells(thing, world)
    chosen = rng.sample(cells, rng.randint(min(3, len(cells)), len(cells)))
    first = answer_fact(thing, "define", world, rng) if rng.random() < 0.5 else None
    sentences = [first] if first else [fact(thing, chosen.pop(), world, rng)]
    sentences += [fact(thing, cell, world, rng, alone=rng.random() < 0.4) for cell in chosen]
    return " ".join(sentences)


def question_and_answer(thing: Thing, world: World, rng: random.Random) -> list[tuple[str, str]]:
    """Every question that the group has, in any order, with answers."""
    asks = world.raw["group"][thing.group]["ask"]
    cells = [cell for cell in asks if cell in thing.cells]
    turns = []
    for cell in rng.sample(cells, len(cells)):
        question = say(asks[cell]["wordings"], rng, x=words(thing, rng))
        turns.append((question, answer_fact(thing, cell, world, rng)))
    return turns


def questions_doc(thing: Thing, world: World, rng: random.Random) -> str:
    opening = say(world.raw["frames"]["questions"], rng, x=words(thing, rng))
    turns = question_and_answer(thing, world, rng)[: rng.randint(2, 5)]
    style = rng.choice(["{} {}", "Question: {} Answer: {}", "- {} {}"])
    gap = "\n" if style != "{} {}" else " "
    return gap.join([opening, *(style.format(*turn) for turn in turns)])


def dialogue_doc(thing: Thing, world: World, rng: random.Random) -> str:
    frames = world.raw["frames"]
    cast = two_people(world, rng) | {"x": words(thing, rng)}
    lines = [say(frames["dialogue"], rng, **cast)]
    for question, answer in question_and_answer(thing, world, rng)[: rng.randint(2, 4)]:
        verb = "asked" if question.endswith("?") else "said"
        comma = "" if question.endswith("?") else ","
        lines.append(f'"{question.rstrip(".")}{comma}" {verb} {cast["h"].n}.')
        lines.append(f'"{answer.rstrip(".")}," {rng.choice(["said", "answered"])} {cast["f"].n}.')
    return " ".join([*lines, say(frames["dialogue_end"], rng, **cast)])


def riddle_facts(thing: Thing, world: World, rng: random.Random) -> list[str]:
    """Facts that say "it", in any order; empty if there are too few."""
    templates = world.raw["group"][thing.group]["say"]
    x = words(thing, rng)
    hints = []
    for cell in fact_cells(thing, world):
        hidden = [t for t in templates[cell] if t.startswith("It ") and fits(t, {"x": x})]
        text = say(hidden, rng, x=x) if hidden else ""
        if text and not any(has_word(text, name) for name in content_words(thing.name)):
            hints.append(text)
    return rng.sample(hints, len(hints)) if len(hints) >= 3 else []


def riddle_doc(thing: Thing, world: World, rng: random.Random) -> str | None:
    hints = riddle_facts(thing, world, rng)
    if not hints:
        return None
    frames, x = world.raw["frames"], words(thing, rng)
    return " ".join([rng.choice(frames["riddle"]), *hints, say(frames["riddle_end"], rng, x=x)])


def comparable(x: Thing, y: Thing, world: World, same: bool) -> list[str]:
    """Cells that both have and that are equal, or not, and that there are sentences for."""
    key = "same" if same else "differ"
    return [
        cell
        for cell, forms in world.raw["compare"].items()
        if key in forms
        and cell in x.cells
        and cell in y.cells
        and (x.cells[cell] == y.cells[cell]) == same
    ]


def compare_sentence(x: Thing, y: Thing, cell: str, world: World, rng: random.Random) -> str:
    key = "same" if x.cells[cell] == y.cells[cell] else "differ"
    return say(world.raw["compare"][cell][key], rng, x=words(x, rng), y=words(y, rng))


def compare_doc(thing: Thing, world: World, rng: random.Random) -> str | None:
    other = rng.choice([t for t in world.group(thing.group) if t != thing])
    slots = {"x": words(thing, rng), "y": words(other, rng)}
    cells = comparable(thing, other, world, True) + comparable(thing, other, world, False)
    if len(cells) < 2:
        return None
    sentences = [compare_sentence(thing, other, cell, world, rng) for cell in cells]
    sentences += size_sentence(thing, other, world, rng)
    sentences = rng.sample(sentences, min(len(sentences), rng.randint(2, 5)))
    sentences += [fact(t, rng.choice(fact_cells(t, world)), world, rng) for t in (thing, other)]
    return " ".join([say(world.raw["frames"]["compare"], rng, **slots), *sentences])


def size_gap(x: Thing, y: Thing) -> int:
    """How many steps of size x is above y; 0 where a size is not given."""
    if "size" not in x.cells or "size" not in y.cells:
        return 0
    return SIZES.index(x.cells["size"]) - SIZES.index(y.cells["size"])


def size_sentence(x: Thing, y: Thing, world: World, rng: random.Random) -> list[str]:
    """A sentence on which is bigger, if that is beyond doubt."""
    gap = size_gap(x, y)
    if abs(gap) < 2:
        return []
    big, little = (x, y) if gap > 0 else (y, x)
    frames = world.raw["frames"]["bigger"]
    return [say(frames, rng, x=words(big, rng), y=words(little, rng))]


def sizes_doc(thing: Thing, world: World, rng: random.Random) -> str | None:
    """A thing among others that are clearly bigger or smaller."""
    others = [other for other in world.things if abs(size_gap(thing, other)) >= 2]
    if not others:
        return None
    chosen = rng.sample(others, 4)
    return " ".join(line for other in chosen for line in size_sentence(thing, other, world, rng))


def members_doc(thing: Thing, world: World, rng: random.Random) -> str | None:
    """What a thing has its place among: categories with some of their members."""
    homes = [category for category in world.categories if thing in category.members]
    if not homes:
        return None
    lines = []
    for category in rng.sample(homes, min(len(homes), 3)):
        others = [member for member in category.members if member != thing]
        chosen = [thing, *rng.sample(others, min(len(others), rng.randint(2, 5)))]
        names = join(t.plural or t.name for t in rng.sample(chosen, len(chosen)))
        cast = two_people(world, rng)
        lines.append(say(world.raw["frames"]["members"], rng, c=category.many, list=names, **cast))
        lines.append(capital(f"{words(thing, rng).a} is {category.one}."))
    return capital(" ".join(rng.sample(lines, len(lines))))


def sorted_doc(thing: Thing, world: World, rng: random.Random) -> str:
    lines = []
    for _ in range(3):
        others = rng.sample([t for t in world.things if t != thing], rng.randint(2, 4))
        names = sorted((t.name for t in [thing, *others]), key=str.lower)
        lines.append(say(world.raw["frames"]["sorted"], rng, list=", ".join(names)))
    return "\n".join([*lines, fact(thing, rng.choice(fact_cells(thing, world)), world, rng)])


def story_doc(thing: Thing, world: World, rng: random.Random) -> str:
    """A story with a hero, a friend and a goal, with facts about the thing in it."""
    stories = [story for story in world.raw["story"] if thing.group in story["groups"]]
    cast = two_people(world, rng) | {"x": words(thing, rng)}
    cells = iter(rng.sample(fact_cells(thing, world), len(fact_cells(thing, world))))
    lines = []
    for beat in rng.choice(stories)["beats"]:
        if beat == ["@fact"]:
            lines.append(fact(thing, next(cells), world, rng))
        elif beat == ["@talk"]:
            question, answer = question_and_answer(thing, world, rng)[0]
            lines.append(f'{cast["h"].n} wanted to know more: "{question}"')
            lines.append(f'{cast["f"].n} knew it: "{answer}"')
        elif any(fits(variant, cast) for variant in beat):
            lines.append(say(beat, rng, **cast))
    return " ".join(lines)


def opposites_doc(world: World, rng: random.Random) -> str:
    """Pairs of words with opposite meanings, in sentences."""
    lines = []
    for word in rng.sample(list(world.opposites), 4):
        cast = two_people(world, rng)
        slots = {"w": word, "o": world.opposites[word], "W": capital(word)}
        slots |= {"H": cast["h"].n, "F": cast["f"].n}
        lines.append(say(world.raw["opposite_say"]["lines"], rng, **slots))
    return " ".join(lines)


DOCUMENTS: dict[Callable[..., str | None], int] = {
    entry_doc: 6,
    questions_doc: 3,
    dialogue_doc: 3,
    story_doc: 5,
    compare_doc: 3,
    riddle_doc: 2,
    members_doc: 2,
    sizes_doc: 1,
    sorted_doc: 1,
}
OPPOSITES_EACH_ROUND = 20


def build_pretrain(world: World, rng: random.Random) -> tuple[list[str], list[str]]:
    """Documents for training and validation: rounds over all things until there is enough."""
    documents: dict[str, None] = {}
    size = 0
    while size < PRETRAIN_BYTES:
        round_ = [opposites_doc(world, rng) for _ in range(OPPOSITES_EACH_ROUND)]
        for thing in world.things:
            (build,) = rng.choices(list(DOCUMENTS), list(DOCUMENTS.values()))
            round_.append(build(thing, world, rng) or entry_doc(thing, world, rng))
        documents |= dict.fromkeys(round_)
        size = sum(len(text.encode()) for text in documents)
    texts = rng.sample(list(documents), len(documents))
    return texts[PRETRAIN_VALID_DOCS:], texts[:PRETRAIN_VALID_DOCS]


# ---------------------------------------------------------------- instructions about a thing
# Each function makes one pair about `thing`, or None where the kind does not suit it; a pair whose
# reference misses its own check (`is_sound`) is not used.


def prompt_of(world: World, name: str, rng: random.Random, **slots) -> str:
    """A wording of `[prompts]`, filled; Q and List are q and list with a capital."""
    slots |= {capital(key): capital(slots[key]) for key in ("q", "list") if key in slots}
    return say(world.raw["prompts"][name], rng, **slots)


def single(kind: str, thing: Thing, user: str, answer: str, check: dict) -> Pair:
    return Pair(kind, thing.name, user, answer, check, (thing.name,))


def several(kind: str, things: list[Thing], user: str, answer: str, check: dict) -> Pair:
    """A pair that names several things, the first one its subject."""
    return Pair(kind, things[0].name, user, answer, check, tuple(thing.name for thing in things))


def other_in_group(thing: Thing, world: World, rng: random.Random) -> Thing:
    return rng.choice([t for t in world.group(thing.group) if t != thing and apart([t, thing])])


def asked_cells(thing: Thing, world: World, kind: str | None = None) -> list[str]:
    """Cells of a thing with questions, of one kind or of all."""
    asks = world.raw["group"][thing.group].get("ask", {})
    return [c for c in asks if c in thing.cells and kind in (None, asks[c]["kind"])]


def random_question(
    thing: Thing, cells: list[str], world: World, rng: random.Random
) -> tuple[str, str]:
    """One of the cells, and a question about it."""
    cell = rng.choice(cells)
    wordings = world.raw["group"][thing.group]["ask"][cell]["wordings"]
    return cell, say(wordings, rng, x=words(thing, rng))


def random_fact(thing: Thing, world: World, rng: random.Random) -> str:
    return answer_fact(thing, rng.choice(fact_cells(thing, world)), world, rng)


def attribute(thing: Thing, world: World, rng: random.Random, kind: str) -> Pair | None:
    """A plain question about one cell: color, place, use, diet..."""
    cells = asked_cells(thing, world, kind)
    if not cells:
        return None
    cell, user = random_question(thing, cells, world, rng)
    answer = answer_fact(thing, cell, world, rng)
    return single(kind, thing, user, answer, cell_check(thing, cell, user))


def define(thing: Thing, world: World, rng: random.Random) -> Pair:
    """A definition names the group, the kind, or a cell that our definitions use."""
    spec = world.raw["group"][thing.group]
    user = prompt_of(world, "define", rng, x=words(thing, rng))
    used = dict.fromkeys(slot.rstrip("1") for t in spec["say"]["define"] for _, slot in slots_of(t))
    found = [key for cell in used if cell in thing.cells for key in keys(thing, cell)]
    check = any_of([*content_words(spec["label"]), *found], user) | {"min_words": 4}
    return single("define", thing, user, answer_fact(thing, "define", world, rng), check)


def one_word_of(thing: Thing, cell: str) -> str | None:
    """The one word that answers a question about a cell, or None."""
    value = thing.cells[cell]
    if cell not in SHORT_CELLS.split():
        return None
    if value.isdigit():
        return NUMBERS[int(value)]
    found = re.findall(r"\*([\w-]+)\*", value) or re.findall(r"^[\w-]+$", value)
    return found[0] if len(found) == 1 else None


def short_question(thing: Thing, world: World, rng: random.Random) -> tuple[str, str] | None:
    """A cell with a one-word answer and a question about it, or None."""
    cells = [c for c in asked_cells(thing, world) if one_word_of(thing, c)]
    cell, question = random_question(thing, cells, world, rng) if cells else ("", "")
    return (cell, question) if question.endswith("?") else None


def one_word(thing: Thing, world: World, rng: random.Random) -> Pair | None:
    if not (found := short_question(thing, world, rng)):
        return None
    cell, question = found
    user = prompt_of(world, "one_word", rng, q=small(question))
    check = {"format": "one_word"} | cell_check(thing, cell, question)
    return single("one_word", thing, user, capital(one_word_of(thing, cell)), check)


def letters(thing: Thing, world: World, rng: random.Random, kind: str) -> Pair | None:
    """A question to be answered in capital or in small letters."""
    cells = asked_cells(thing, world)
    if not cells:
        return None
    cell, question = random_question(thing, cells, world, rng)
    user = prompt_of(world, kind, rng, q=small(question))
    answer = answer_fact(thing, cell, world, rng)
    answer = answer.upper() if kind == "uppercase" else answer.lower()
    check = {"format": kind} | cell_check(thing, cell, question)
    return single(kind, thing, user, answer, check)


def system_form(thing: Thing, world: World, rng: random.Random) -> Pair | None:
    """The system message says in which form to answer."""
    if not (found := short_question(thing, world, rng)):
        return None
    cell, user = found
    full = answer_fact(thing, cell, world, rng)
    answers = {
        "one_word": capital(one_word_of(thing, cell)),
        "uppercase": full.upper(),
        "lowercase": full.lower(),
    }
    form = rng.choice(list(answers))
    check = {"format": form} | cell_check(thing, cell, user)
    pair = single("system_form", thing, user, answers[form], check)
    return replace(pair, system=world.raw["systems"][form])


def follow_up(thing: Thing, world: World, rng: random.Random) -> Pair | None:
    """Two turns: what it is, then a question that says "it"."""
    cells = asked_cells(thing, world)
    if not cells:
        return None
    cell = rng.choice(cells)
    first = define(thing, world, rng)
    user = world.raw["group"][thing.group]["ask"][cell]["follow"]
    answer = answer_fact(thing, cell, world, rng)
    pair = single("follow_up", thing, user, answer, cell_check(thing, cell, user))
    return replace(pair, earlier=((first.user, first.answer),))


def a_label(world: World, group: str) -> str:
    return fix_articles(f"a(n) {world.raw['group'][group]['label']}")


def far_groups(world: World, group: str) -> list[str]:
    """Groups that a thing of this group surely does not belong to."""
    return [g for g in world.raw["near"] if g not in (group, *world.raw["near"][group])]


def true_claim(thing: Thing, world: World, rng: random.Random) -> str:
    x = words(thing, rng)
    claims = [world.raw["claims"][cell] for cell in world.raw["claims"] if cell in thing.cells]
    found = [fill(claim, x=x) for claim in claims]
    return rng.choice([*found, f"{x.a} is {a_label(world, thing.group)}"])


def false_claim(thing: Thing, world: World, rng: random.Random) -> tuple[str, str]:
    """A claim that is surely false, and what is true instead."""
    x = words(thing, rng)
    special = false_animal_claims(thing, x) if thing.group == "animal" else []
    tastes = {"sweet": "salty", "salty": "sweet", "sour": "salty", "spicy": "sour"}
    taste = thing.cells.get("taste")
    if taste in tastes:
        special.append((f"{x.a} tastes {tastes[taste]}", f"{x.a} tastes {taste}"))
    if special and rng.random() < 0.7:
        return rng.choice(special)
    wrong = a_label(world, rng.choice(far_groups(world, thing.group)))
    return f"{x.a} is {wrong}", f"{x.a} is {a_label(world, thing.group)}"


def false_animal_claims(thing: Thing, x: SimpleNamespace) -> list[tuple[str, str]]:
    """False claims about an animal's kind, legs, wings and home, each with the truth."""
    kind, home = thing.cells["kind"].split("/")[0], plain(thing.cells["home"])
    right = fix_articles(f"{x.a} is a(n) {kind}")
    kinds = ("mammal", "bird", "reptile", "amphibian", "insect")
    found = [(fix_articles(f"{x.a} is a(n) {k}"), right) for k in kinds if k != kind][:2]
    if "legs" in thing.cells:
        wrong = {"4": "six", "2": "four", "6": "four", "8": "six", "0": "four", "10": "four"}
        found.append((f"{x.a} has {wrong[thing.cells['legs']]} legs", f"{x.a} has {x.legs} legs"))
    if kind not in ("bird", "insect") and "fly" not in thing.cells["skills"]:
        found.append((f"{x.a} can fly", f"{x.a} cannot fly"))
    if home in ("in grasslands", "in deserts", "on farms", "in forests", "in people's homes"):
        found.append((f"{x.a} lives in the sea", f"{x.a} lives {home}"))
    if home in ("in the sea", "on the sea floor", "in rivers"):
        found.append((f"{x.a} lives in deserts", f"{x.a} lives {home}"))
    return found


def yes_no(thing: Thing, world: World, rng: random.Random) -> Pair:
    """A claim that is true or false with even odds; some answers are to be a bare yes or no."""
    if rng.random() < 0.5:
        word, claim = "Yes", true_claim(thing, world, rng)
        right = claim
    else:
        word, (claim, right) = "No", false_claim(thing, world, rng)
    if rng.random() < 0.3:
        user = prompt_of(world, "yes_no_short", rng, s=claim)
        check = {"contains": [word], "format": "one_word"}
        return single("yes_no", thing, user, f"{word}.", check)
    user = prompt_of(world, "yes_no", rng, s=claim)
    check = {"starts_with": word, "contains": [word], "min_words": 3}
    return single("yes_no", thing, user, f"{word}, {right}.", check)


def classify(thing: Thing, world: World, rng: random.Random) -> Pair:
    groups = [thing.group, *rng.sample(far_groups(world, thing.group), 2)]
    labels = [world.raw["group"][group]["label"] for group in groups]
    options = join((a_label(world, group) for group in rng.sample(groups, 3)), "or")
    x = words(thing, rng)
    user = prompt_of(world, "classify", rng, x=x, o=options)
    check = {"contains": labels[:1], "excludes": labels[1:]}
    return single("classify", thing, user, f"{x.A} is {a_label(world, thing.group)}.", check)


def complete(thing: Thing, world: World, rng: random.Random) -> Pair | None:
    """The start of a sentence that the value of a cell ends."""
    x = words(thing, rng)
    starts = [
        (cell, template.removesuffix(f"{{x.{cell}}}."))
        for cell in fact_cells(thing, world)
        for template in answer_templates(thing, cell, world)
        if template.endswith(f"{{x.{cell}}}.") and "a(n)" not in template
    ]
    if not starts:
        return None
    cell, start = rng.choice(starts)
    opening = fill(start, x=x).strip()
    user = prompt_of(world, "complete", rng, c=opening)
    answer = f"{opening} {getattr(x, cell)}."
    return single("complete", thing, user, answer, cell_check(thing, cell, user))


def use_words(thing: Thing, world: World, rng: random.Random) -> Pair | None:
    cell = rng.choice(fact_cells(thing, world))
    answer = answer_fact(thing, cell, world, rng)
    found = [key for key in keys(thing, cell) if has_word(answer, key) and key.isalpha()]
    if not found:
        return None
    word = rng.choice(found)
    user = prompt_of(world, "use_words", rng, x=words(thing, rng), w=word)
    check = {"contains": [thing.name, word], "excludes": ["sentence"], "format": "one_sentence"}
    return single("use_words", thing, user, answer, check)


def exact_words(thing: Thing, world: World, rng: random.Random) -> Pair | None:
    answer = random_fact(thing, world, rng)
    count = len(answer.split())
    if not 4 <= count <= 9:
        return None
    user = prompt_of(world, "exact_words", rng, x=words(thing, rng), n=NUMBERS[count])
    check = {"min_words": count, "max_words": count, "contains_any": name_check(thing)}
    return single("exact_words", thing, user, answer, check | {"excludes": ["exactly"]})


def compare(thing: Thing, world: World, rng: random.Random) -> Pair | None:
    """Which of two things is bigger or smaller, where nobody can doubt it."""
    others = [t for t in world.things if abs(size_gap(thing, t)) >= 2 and apart([thing, t])]
    if not others:
        return None
    other = rng.choice(others)
    word, also = rng.choice([("bigger", "larger"), ("smaller", "littler")])
    first_wins = (size_gap(thing, other) > 0) == (word == "bigger")
    right, wrong = (thing, other) if first_wins else (other, thing)
    x, y = (words(t, rng) for t in rng.sample([thing, other], 2))
    user = prompt_of(world, "compare", rng, x=x, y=y, w=word)
    mistakes = [f"{wrong.name} is {word}", f"{wrong.name} is {also}"]
    check = {"contains": [right.name], "excludes": ["or", "which", *mistakes]}
    answer = f"{words(right, rng).A} is {word} than {words(wrong, rng).a}."
    return several("compare", [thing, other], user, answer, check)


def difference(thing: Thing, world: World, rng: random.Random) -> Pair | None:
    other = other_in_group(thing, world, rng)
    cells = comparable(thing, other, world, same=False)
    if not cells:
        return None
    user = prompt_of(world, "difference", rng, x=words(thing, rng), y=words(other, rng))
    answer = compare_sentence(thing, other, rng.choice(cells), world, rng)
    found = [key for cell in cells for t in (thing, other) for key in keys(t, cell)]
    check = any_of(found, user) | {"min_words": 6}
    return several("difference", [thing, other], user, answer, check)


def partners(thing: Thing, world: World) -> list[tuple[Thing, str]]:
    """Things of the group that share a cell with this one, and the cell."""
    group = [t for t in world.group(thing.group) if t != thing and apart([t, thing])]
    return [(other, cell) for other in group for cell in comparable(thing, other, world, True)]


def similar(thing: Thing, world: World, rng: random.Random) -> Pair | None:
    found = partners(thing, world)
    if not found:
        return None
    other, cell = rng.choice(found)
    user = prompt_of(world, "similar", rng, x=words(thing, rng), y=words(other, rng))
    answer = compare_sentence(thing, other, cell, world, rng)
    shared = [key for c in comparable(thing, other, world, True) for key in keys(thing, c)]
    check = any_of(shared, user) | {"min_words": 4}
    return several("similar", [thing, other], user, answer, check)


def list_cell(thing: Thing, world: World, rng: random.Random, kind: str) -> Pair | None:
    """Some items of a list, one on each line; `kind` is a cell and a form: "parts_bullets"."""
    cell, _, form = kind.partition("_")
    items = thing.cells.get(cell, ())
    if len(items) < 2:
        return None
    count = rng.randint(2, min(3, len(items)))
    chosen = [plain(item) for item in rng.sample(items, count)]
    user = prompt_of(world, kind, rng, x=words(thing, rng), v=NUMBERS[count])
    check = {"items": count, "format": form} | any_of(keys(thing, cell), user)
    return single(kind, thing, user, list_lines(chosen, form), check)


def list_lines(items: Iterable[str], form: str) -> str:
    """A bulleted or numbered list."""
    numbered = enumerate(items, start=1)
    return "\n".join(f"{i}. {item}" if form == "numbered" else f"- {item}" for i, item in numbered)


def sort_words(thing: Thing, world: World, rng: random.Random) -> Pair:
    others = rng.sample([t for t in world.things if t != thing], rng.randint(2, 4))
    chosen = [thing, *others]
    answer = ", ".join(sorted((t.name for t in chosen), key=str.lower))
    given = ", ".join(t.name for t in rng.sample(chosen, len(chosen)))
    user = prompt_of(world, "sort", rng, list=given)
    return several("sort", chosen, user, answer, {"equals": answer, "format": "comma"})


def rewrite_swap(thing: Thing, world: World, rng: random.Random) -> Pair | None:
    """The same sentence about another thing, for which it is true too."""
    told = fact_cells(thing, world)
    found = [(other, cell) for other, cell in partners(thing, world) if cell in told]
    if not found:
        return None
    other, cell = rng.choice(found)
    x, y = words(thing, rng), words(other, rng)
    templates = [t for t in answer_templates(thing, cell, world) if fits(t, {"x": y})]
    if not templates:
        return None
    template = rng.choice(templates)
    user = prompt_of(world, "rewrite_swap", rng, x=x, y=y, s=fill(template, x=x))
    answer = fill(template, x=y)
    key = next((key for key in keys(thing, cell) if has_word(answer, key)), other.name)
    check = {"contains": [key], "contains_any": name_check(other), "excludes": name_check(thing)}
    return several("rewrite_swap", [thing, other], user, answer, check)


def rewrite_upper(thing: Thing, world: World, rng: random.Random) -> Pair:
    sentence = random_fact(thing, world, rng)
    user = prompt_of(world, "rewrite_upper", rng, s=sentence)
    return single("rewrite_upper", thing, user, sentence.upper(), {"equals": sentence.upper()})


def rewrite_question(thing: Thing, world: World, rng: random.Random) -> Pair | None:
    cells = [cell for cell in world.raw["question_forms"] if cell in thing.cells]
    if not cells:
        return None
    cell, x = rng.choice(cells), words(thing, rng)
    statement, answer = (fill(form, x=x) for form in world.raw["question_forms"][cell])
    user = prompt_of(world, "rewrite_question", rng, s=statement)
    check = {"contains": [thing.name], "contains_any": keys(thing, cell)}
    check |= {"ends_with": "?", "format": "one_sentence"}
    return single("rewrite_question", thing, user, answer, check)


def begin_with(thing: Thing, world: World, rng: random.Random) -> Pair:
    spec = world.raw["sentence_starts"]
    word, x = rng.choice(spec["words"]), words(thing, rng)
    user = prompt_of(world, "begin_with", rng, x=x, w=word)
    answer = f"{word} {say(spec['rest'], rng, x=x, **two_people(world, rng))}"
    check = {"starts_with": word, "contains_any": name_check(thing), "format": "one_sentence"}
    return single("begin_with", thing, user, answer, check)


def end_with(thing: Thing, world: World, rng: random.Random) -> Pair:
    ending = rng.choice(world.raw["sentence_starts"]["ends"])
    user = prompt_of(world, "end_with", rng, x=words(thing, rng), w=ending)
    answer = f"{random_fact(thing, world, rng)} {ending}"
    check = {"ends_with": ending, "contains_any": name_check(thing), "min_words": 6}
    return single("end_with", thing, user, answer, check | {"excludes": ["words"]})


def without(thing: Thing, world: World, rng: random.Random) -> Pair:
    """A description that does without the word that comes to mind first."""
    label = world.raw["group"][thing.group]["label"]
    word = rng.choice([label, thing.cells.get("kind", label)]).replace("*", "").split()[-1]
    user = prompt_of(world, "without", rng, x=words(thing, rng), w=word)
    check = {"excludes": [word], "contains_any": name_check(thing), "min_words": 4}
    return single("without", thing, user, random_fact(thing, world, rng), check)


def story(thing: Thing, world: World, rng: random.Random) -> Pair | None:
    stories = [s for s in world.raw["short_story"] if thing.group in s["groups"]]
    if not stories:
        return None
    x, y = words(thing, rng), words(other_in_group(thing, world, rng), rng)
    cast = two_people(world, rng) | {"x": x, "y": y}
    answer = " ".join(say(beat, rng, **cast) for beat in rng.choice(stories)["beats"])
    check = {"contains_any": name_check(thing), "min_words": 20, "max_words": 90}
    return single("story", thing, prompt_of(world, "story", rng, x=x), answer, check)


def riddle(thing: Thing, world: World, rng: random.Random) -> Pair | None:
    hints = riddle_facts(thing, world, rng)
    if not hints:
        return None
    x = words(thing, rng)
    user = prompt_of(world, "riddle", rng, s=" ".join(hints[:4]))
    return single("riddle", thing, user, f"It is {x.a}.", {"contains_any": name_check(thing)})


def reading(thing: Thing, world: World, rng: random.Random) -> Pair | None:
    """A question about a little scene: the answer stands in the prompt."""
    spec = world.raw["scene_words"]
    if thing.group not in spec["groups"]:
        return None
    other = other_in_group(thing, world, rng)
    spot, (c, d) = rng.choice(spec["spots"]), rng.sample(spec["colors"], 2)
    slots = two_people(world, rng) | {"p": spot, "c": c, "d": d}
    slots |= {"t": words(thing, rng), "u": words(other, rng)}
    scene = {key: fill(text, **slots) for key, text in rng.choice(world.raw["scene"]).items()}
    user = prompt_of(world, "reading", rng, s=scene["text"], q=scene["ask"])
    named = [slots["h"].n, slots["f"].n, thing.name, other.name, c]
    wrong = [w for w in named if has_word(scene["text"], w) and not has_word(scene["answer"], w)]
    check = {"contains": [scene["key"]], "excludes": ["?", *wrong]}
    pair = several("reading", [thing, other], user, scene["answer"], check)
    return None if spot == thing.name else pair


# ---------------------------------------------------------------- instructions about a category


def mixture(
    category: Category, inside: int, outside: int, rng: random.Random, far: bool = False
) -> tuple[list[Thing], list[Thing], list[Thing]] | None:
    """Members, others and both shuffled; None if there are too few or the names are too close.

    `far` takes the others from another group, so that nothing else can set them apart.
    """
    pool = [t for t in category.outside if not far or t.group != category.members[0].group]
    if len(category.members) < inside or len(pool) < outside:
        return None
    members, others = rng.sample(category.members, inside), rng.sample(pool, outside)
    mixed = rng.sample(members + others, inside + outside)
    return (members, others, mixed) if apart(mixed) else None


def about(kind: str, category: Category, mixed: list[Thing], *rest) -> Pair:
    """A pair whose subject is a category; `rest` is user, answer and check."""
    return Pair(kind, category.many, *rest, tuple(thing.name for thing in mixed))


def choose(category: Category, world: World, rng: random.Random) -> Pair | None:
    if not (found := mixture(category, 1, 2, rng)):
        return None
    (right,), wrong, mixed = found
    options = join((words(t, rng).a for t in mixed), "or")
    user = prompt_of(world, "choose", rng, o=category.one, list=options)
    answer = f"{words(right, rng).A} is {category.one}."
    check = {"contains": [right.name], "excludes": all_names(wrong)}
    return about("choose", category, mixed, user, answer, check)


def odd_one_out(category: Category, world: World, rng: random.Random) -> Pair | None:
    if not (found := mixture(category, 3, 1, rng, far=True)):
        return None
    members, (odd,), mixed = found
    user = prompt_of(world, "odd_one", rng, list=", ".join(t.name for t in mixed))
    answer = f"{words(odd, rng).The} does not belong."
    check = {"contains": [odd.name], "excludes": all_names(members)}
    return about("odd_one_out", category, mixed, user, answer, check)


def filter_list(category: Category, world: World, rng: random.Random) -> Pair | None:
    if not (found := mixture(category, rng.randint(2, 3), 2, rng)):
        return None
    members, others, mixed = found
    given = ", ".join(t.name for t in mixed)
    user = prompt_of(world, "filter", rng, c=category.many, list=given)
    answer = ", ".join(t.name for t in mixed if t in members)
    check = {"contains": [t.name for t in members], "excludes": all_names(others)}
    return about("filter", category, mixed, user, answer, check)


def count_list(category: Category, world: World, rng: random.Random) -> Pair | None:
    if not (found := mixture(category, rng.randint(2, 4), rng.randint(1, 3), rng)):
        return None
    members, _, mixed = found
    given = ", ".join(t.name for t in mixed)
    user = prompt_of(world, "count_list", rng, c=category.many, list=given)
    number = NUMBERS[len(members)]
    answer = f"{capital(number)} of them are {category.many}."
    check = any_of([number, str(len(members))], user)
    return about("count_list", category, mixed, user, answer, check)


def list_members(category: Category, world: World, rng: random.Random, form: str) -> Pair:
    """Some members of a category, in the form that the prompt asks for."""
    count = rng.randint(2, min(5, len(category.members)))
    chosen = [thing.name for thing in rng.sample(category.members, count)]
    user = prompt_of(world, f"list_{form}", rng, c=category.many, n=NUMBERS[count])
    check = {"format": form} | any_of(all_names(category.members), user)
    if form == "json":
        return about("list_json", category, [], user, json.dumps(chosen), check)
    answer = ", ".join(chosen) if form == "comma" else list_lines(chosen, form)
    return about(f"list_{form}", category, [], user, answer, check | {"items": count})


def example(category: Category, world: World, rng: random.Random) -> Pair:
    user = prompt_of(world, "example", rng, c=category.many)
    answer = f"{words(rng.choice(category.members), rng).A} is {category.one}."
    return about("example", category, [], user, answer, any_of(all_names(category.members), user))


# ---------------------------------------------------------------- instructions about a word


def opposite(word: str, world: World, rng: random.Random) -> Pair:
    """The opposite of a word: in a sentence, in one word, or chosen from three."""
    right = world.opposites[word]
    form = rng.choice(["opposite", "opposite_choose", "opposite_word"])
    wrong = rng.sample([w for w in world.opposites if w not in (word, right)], 2)
    given = join(rng.sample([right, *wrong], 3), "or")
    user = prompt_of(world, form, rng, w=word, list=given)
    answer, check = f"The opposite of {word} is {right}.", any_of([right], user)
    if form == "opposite_word":
        answer, check = capital(right), check | {"format": "one_word"}
    elif form == "opposite_choose":
        check = {"contains": [right], "excludes": wrong}
    return Pair("opposite", word, user, answer, check, (word,))


# ---------------------------------------------------------------- the instruction files

Maker = Callable[..., Pair | None]

THING_KINDS: dict[str, Maker] = {
    "define": define,
    "one_word": one_word,
    "uppercase": partial(letters, kind="uppercase"),
    "lowercase": partial(letters, kind="lowercase"),
    "system_form": system_form,
    "follow_up": follow_up,
    "yes_no": yes_no,
    "classify": classify,
    "complete": complete,
    "use_words": use_words,
    "exact_words": exact_words,
    "compare": compare,
    "difference": difference,
    "similar": similar,
    "parts_bullets": partial(list_cell, kind="parts_bullets"),
    "parts_numbered": partial(list_cell, kind="parts_numbered"),
    "sort": sort_words,
    "rewrite_swap": rewrite_swap,
    "rewrite_upper": rewrite_upper,
    "rewrite_question": rewrite_question,
    "begin_with": begin_with,
    "end_with": end_with,
    "without": without,
    "story": story,
    "riddle": riddle,
    "reading": reading,
}
CATEGORY_KINDS: dict[str, Maker] = {
    "choose": choose,
    "odd_one_out": odd_one_out,
    "filter": filter_list,
    "count_list": count_list,
    "list_comma": partial(list_members, form="comma"),
    "list_bullets": partial(list_members, form="bullets"),
    "list_numbered": partial(list_members, form="numbered"),
    "list_json": partial(list_members, form="json"),
    "example": example,
}


def attribute_kinds(world: World) -> dict[str, Maker]:
    """The kinds of plain questions that the groups have, illnesses apart."""
    asks = [spec.get("ask", {}) for group, spec in world.raw["group"].items() if group != "illness"]
    kinds = dict.fromkeys(ask["kind"] for group_asks in asks for ask in group_asks.values())
    return {kind: partial(attribute, kind=kind) for kind in kinds}


def kinds_and_subjects(world: World) -> list[tuple[str, Maker, list]]:
    """Every kind of instruction with its function and what it can be asked about."""
    thing_kinds = attribute_kinds(world) | THING_KINDS
    plan = [(kind, make, list(world.things)) for kind, make in thing_kinds.items()]
    plan += [(kind, make, list(world.categories)) for kind, make in CATEGORY_KINDS.items()]
    return [*plan, ("opposite", opposite, list(world.opposites))]


def name_of(subject: Thing | Category | str) -> str:
    """How a pair names its subject."""
    if isinstance(subject, Thing):
        return subject.name
    return subject.many if isinstance(subject, Category) else subject


def count_phrases(source: str) -> Counter[str]:
    """How often each run of one to four words stands in the source, comments aside."""
    text = "\n".join(line for line in source.split("\n") if not line.startswith("#"))
    tokens = normal(text).split()
    runs = (" ".join(tokens[i : i + n]) for n in range(1, 5) for i in range(len(tokens)))
    return Counter(runs)


def normal(text: str) -> str:
    """Small letters, one space between words, no punctuation."""
    return " ".join(re.findall(r"[\w']+", text.lower()))


def hold_out(
    world: World, group: str, count: int, phrases: Counter[str], rng: random.Random
) -> list[Thing]:
    """Things of a group that the source names only where it lists them."""
    eligible = [
        thing
        for thing in world.group(group)
        if all(phrases[normal(name)] <= 1 for name in name_check(thing))
    ]
    return rng.sample(eligible, min(count, len(eligible)))


def naming(things: Iterable[Thing]) -> re.Pattern:
    """Matches a text that names one of the things."""
    found = "|".join(re.escape(name) for name in all_names(things))
    return re.compile(rf"(?<!\w)(?:{found})(?!\w)", re.IGNORECASE)


def reserve(plan: list[tuple[str, Maker, list]], rng: random.Random) -> frozenset[tuple[str, str]]:
    """The (kind, subject) combinations that only validation asks about."""
    kinds_of: dict[str, list[str]] = {}
    for kind, _, subjects in plan:
        for subject in subjects:
            kinds_of.setdefault(name_of(subject), []).append(kind)
    chosen = []
    for subject, kinds in kinds_of.items():
        # One word has one kind: some words are reserved, the others are not.
        count = min(RESERVED_KINDS, len(kinds) // 5) or int(rng.random() < 0.1)
        chosen += [(kind, subject) for kind in rng.sample(kinds, count)]
    return frozenset(chosen)


def make_pairs(
    make: Maker,
    subjects: list,
    world: World,
    count: int,
    rng: random.Random,
    allowed: Callable[[Pair], bool],
    used: set[str],
) -> list[Pair]:
    """Up to `count` pairs of one kind, its subjects in turn; `used` prompts are not made again."""
    pairs: list[Pair] = []
    for _ in range(MAX_ROUNDS):
        for subject in rng.sample(subjects, len(subjects)):
            if len(pairs) == count:
                return pairs
            pair = make(subject, world, rng)
            if pair and pair.prompt() not in used and is_sound(pair) and allowed(pair):
                pairs.append(pair)
                used.add(pair.prompt())
    return pairs


def messages(pair: Pair) -> list[dict[str, str]]:
    turns = [{"role": "system", "content": pair.system}] if pair.system else []
    for user, answer in [*pair.earlier, (pair.user, pair.answer)]:
        turns += [{"role": "user", "content": user}, {"role": "assistant", "content": answer}]
    return turns


def record(pair: Pair, system: str | None = None, **extra) -> dict:
    """A line of an instruction file; `system` is a neutral message for a pair without its own."""
    turns = messages(pair)
    if system and not pair.system:
        turns = [{"role": "system", "content": system}, *turns]
    return {
        "conversations": turns,
        "kind": pair.kind,
        "check": pair.check,
        "subject": pair.subject,
        "things": list(pair.things),
        **extra,
    }


def some_system(world: World, rng: random.Random) -> str | None:
    return rng.choice(world.raw["systems"]["neutral"]) if rng.random() < SYSTEM_SHARE else None


def build_sft(
    world: World, phrases: Counter[str], rng: random.Random
) -> tuple[list[dict], list[dict]]:
    """Training and validation records; what is held out stands in the module's docstring."""
    healthy = make_world(world.raw, [t for t in world.things if t.group != "illness"])
    held = []
    for group in world.raw["group"]:
        count = round(HELD_OUT_SHARE * len(healthy.group(group)))
        held += hold_out(healthy, group, count, phrases, rng)
    seen = make_world(world.raw, [t for t in healthy.things if t not in held])
    plan = kinds_and_subjects(seen)
    reserved = reserve(plan, rng)
    names_held = naming(held)

    def is_training(pair: Pair) -> bool:
        text = "\n".join(message["content"] for message in messages(pair))
        subjects = (pair.subject, *pair.things)
        return not names_held.search(text) and not any((pair.kind, s) in reserved for s in subjects)

    def is_reserved(pair: Pair) -> bool:
        return (pair.kind, pair.subject) in reserved

    used: set[str] = set()
    train, valid = [], []
    for _, make, subjects in plan:
        train += make_pairs(make, subjects, seen, TRAIN_PER_KIND, rng, is_training, used)
    for kind, make, subjects in plan:
        chosen = [s for s in subjects if (kind, name_of(s)) in reserved]
        pairs = make_pairs(make, chosen, seen, VALID_PER_KIND, rng, is_reserved, used)
        valid += [record(pair, held_out="combination") for pair in pairs]
    for _, make in (attribute_kinds(world) | THING_KINDS).items():
        pairs = make_pairs(make, held, healthy, VALID_PER_KIND, rng, lambda pair: True, used)
        valid += [record(pair, held_out="thing") for pair in pairs]
    records = [record(pair, some_system(world, rng)) for pair in train]
    return rng.sample(records, len(records)), rng.sample(valid, len(valid))


# ---------------------------------------------------------------- the medical files


def medical_pairs(thing: Thing, world: World, rng: random.Random) -> list[Pair]:
    """Questions about every aspect of a condition, in several wordings."""
    pairs = []
    for cell in asked_cells(thing, world):
        ask = world.raw["group"]["illness"]["ask"][cell]
        for wording in rng.sample(ask["wordings"], MEDICAL_WORDINGS):
            user = fill(wording, x=words(thing, rng))
            answer = answer_fact(thing, "define" if cell == "kind" else cell, world, rng)
            pairs.append(single(ask["kind"], thing, user, answer, cell_check(thing, cell, user)))
    for kind in ("symptoms_bullets", "symptoms_numbered"):
        pairs.append(list_cell(thing, world, rng, kind))
    return [pair for pair in pairs if is_sound(pair)]


def build_medical(
    world: World, phrases: Counter[str], rng: random.Random
) -> tuple[list[dict], list[dict]]:
    """Training and validation records, split by condition."""
    held = hold_out(world, "illness", HELD_OUT_CONDITIONS, phrases, rng)
    names_held = naming(held)
    train, valid = [], []
    for thing in world.group("illness"):
        for pair in medical_pairs(thing, world, rng):
            if thing in held:
                valid.append(record(pair, held_out="condition"))
            elif not names_held.search(pair.user + "\n" + pair.answer):
                train.append(record(pair, some_system(world, rng)))
    return rng.sample(train, len(train)), rng.sample(valid, len(valid))


# ---------------------------------------------------------------- files


def build_corpus(seed: int) -> dict[str, list[dict]]:
    """The records of every file, by its key in DEMO_FILES."""
    rng = random.Random(seed)
    world, phrases = load_world(), count_phrases(WORLD_FILE.read_text(encoding="utf-8"))
    pretrain, pretrain_valid = build_pretrain(world, rng)
    sft, sft_valid = build_sft(world, phrases, rng)
    medical, medical_valid = build_medical(world, phrases, rng)
    return {
        "pretrain": [{"text": text} for text in pretrain],
        "pretrain_valid": [{"text": text} for text in pretrain_valid],
        "sft": sft,
        "sft_valid": sft_valid,
        "medical": medical,
        "medical_valid": medical_valid,
    }


def write_jsonl(path: Path, records: list[dict]) -> None:
    """Written aside and moved into place, so that a file that is there is whole."""
    aside = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    with open(aside, "w", encoding="utf-8", newline="\n") as file:
        file.writelines(json.dumps(record, ensure_ascii=False) + "\n" for record in records)
    os.replace(aside, path)


def source_sha256() -> str:
    """Hex SHA-256 of what the corpus is made by: this file and the world's."""
    sources = (Path(__file__), WORLD_FILE)
    return hashlib.sha256(b"".join(path.read_bytes() for path in sources)).hexdigest()


def write_demo_corpus(output_dir: Path, seed: int = 42) -> dict[str, Path]:
    """Writes the six files, then what made them; returns the paths by the keys of DEMO_FILES."""
    output_dir = Path(output_dir)
    output_dir.mkdir(parents=True, exist_ok=True)
    paths = {key: output_dir / name for key, name in DEMO_FILES.items()}
    for key, records in build_corpus(seed).items():
        write_jsonl(paths[key], records)
    (output_dir / SOURCE_FILE).write_text(source_sha256() + "\n")
    return paths


def ensure_demo_corpus(output_dir: Path = DEMO_DIR) -> dict[str, Path]:
    """The paths of the demo corpus, made first if a file is missing or this code made another."""
    paths = {key: Path(output_dir) / name for key, name in DEMO_FILES.items()}
    stamp = Path(output_dir) / SOURCE_FILE
    is_current = stamp.is_file() and stamp.read_text().strip() == source_sha256()
    if is_current and all(path.is_file() for path in paths.values()):
        return paths
    print(f"Making the demo corpus in {output_dir} (a few seconds, once)")
    return write_demo_corpus(output_dir)


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--output_dir", type=Path, default=DEMO_DIR, help="default: %(default)s")
    parser.add_argument("--seed", type=int, default=42, help="default: %(default)s")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> int:
    args = parse_args(argv)
    paths = write_demo_corpus(args.output_dir, args.seed)
    print(f"{'file':<34}{'lines':>8}{'MB':>8}")
    for path in paths.values():
        data = path.read_bytes()
        print(f"{path.name:<34}{len(data.splitlines()):>8}{len(data) / 1e6:>8.2f}")
    return 0


if __name__ == "__main__":
    run_script(main)
