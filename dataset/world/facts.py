"""Read the world: things, their facts and the sentences that state them.

A file in `facts/` holds one category: a table with a line for each thing and a column for each
attribute, and sentence patterns, questions and an answer for each attribute. To add a thing, add a
line to its table. `Thing.slots` names the slots of a pattern.
"""

import tomllib
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path

from model.cli import UserError

WORLD_DIR = Path(__file__).resolve().parent
HELD_STATEMENTS = 2  # the last patterns of an attribute stand in no training document
HELD_WORDINGS = 0.15  # the last share of each list of question forms never trains
AN_SOUND = ("hour", "honest", "herb")  # a consonant that is not heard
A_SOUND = ("uni", "use", "euro", "uku", "one")  # a vowel that sounds as in "you" or "won"


@dataclass(frozen=True)
class Attribute:
    """What can be said and asked about one property of the things of a category."""

    name: str
    category: str
    skill: str
    statements: list[str]  # patterns that name the thing
    it: list[str]  # patterns that say "it", of a thing that was named before
    questions: list[str]
    follow: list[str]  # questions after an answer about the same thing
    answer: str
    english: dict = field(default_factory=dict)  # of a Chinese attribute: the same, line by line

    @property
    def vocabulary(self) -> str:
        """The name of the list of values that an answer is checked against."""
        return f"{self.category}.{self.name}"


@dataclass(frozen=True)
class Thing:
    """One thing of the world: `plural` is None for names such as France or asthma."""

    name: str
    plural: str | None
    category: str
    values: dict[str, str] = field(hash=False)

    @cached_property
    def phrase(self) -> str:
        """The thing with its article: "a lion", "an owl", "France"."""
        return self.name if self.plural is None else with_article(self.name)

    @cached_property
    def name_slots(self) -> dict[str, str]:
        """The slots of the thing's name. They are filled once: a world asks a million times."""
        slots = {"a": self.phrase, "name": self.name}
        if self.plural:
            slots["plural"] = self.plural
        capitals = {capitalize(slot): capitalize(text) for slot, text in slots.items()}
        return slots | capitals

    def slots(self, attribute: str | None = None) -> dict[str, str]:
        """Return what the slots of a pattern stand for, and each again with a capital.

        With an attribute, {value} and {Value} are the thing's value of it.
        """
        slots = self.name_slots.copy()  # the caller may change it
        if attribute:
            value = self.values[attribute]
            slots["value"] = value
            slots["Value"] = capitalize(value)
        return slots


@dataclass(frozen=True)
class Category:
    """The things of one kind and their attributes."""

    name: str
    plural: str
    attributes: dict[str, Attribute]
    things: tuple[Thing, ...]

    @property
    def phrase(self) -> str:
        """The category with its article: "an animal"."""
        return with_article(self.name)


@dataclass(frozen=True)
class World:
    """All categories, and the wordings of skills and stories."""

    categories: dict[str, Category]
    wordings: dict
    stories: dict

    @property
    def things(self) -> list[Thing]:
        """All things, category by category."""
        return [thing for category in self.categories.values() for thing in category.things]

    @property
    def is_small(self) -> bool:
        """Whether this is a part, such as the medical one, with too few categories to compare."""
        return len(self.categories) <= 2


def capitalize(text: str) -> str:
    """Make the first letter a capital and leave the others alone."""
    return text[:1].upper() + text[1:]


def uncapitalize(text: str, thing: Thing) -> str:
    """Make the first letter small, unless the text begins with a proper name."""
    if thing.plural is None and thing.name[0].isupper() and text.startswith(thing.name):
        return text
    return text[:1].lower() + text[1:]


def with_article(noun: str) -> str:
    """Put "a" or "an" before a noun, by its sound."""
    is_vowel = noun[0].lower() in "aeiou" and not noun.startswith(A_SOUND)
    article = "an" if is_vowel or noun.startswith(AN_SOUND) else "a"
    return f"{article} {noun}"


def split_wordings(forms: list[str]) -> tuple[list[str], list[str]]:
    """Part question forms into those that train and those that are held out, the last 15%."""
    held_count = max(1, round(HELD_WORDINGS * len(forms)))
    return forms[:-held_count], forms[-held_count:]


def choose_wordings(forms: list[str], use_held_out: bool) -> list[str]:
    """Return the question forms that train, or those that are held out."""
    trained, held_out = split_wordings(forms)
    return held_out if use_held_out else trained


def read_toml(path: Path) -> dict:
    """Read a TOML file; raise a UserError that names the file if it is broken."""
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: {error}") from error


def read_category(path: Path) -> Category:
    """Read one category file; raise a UserError that names the line of a broken table."""
    data = read_toml(path)
    category = data["name"]
    is_count = data["grammar"] == "count"  # else its things are names, without article and plural
    names = 2 if is_count else 1  # cells before the values
    attributes = {}
    for key, fields in data["attributes"].items():
        attributes[key] = Attribute(key, category, **fields)
    things = []
    for line in data["table"].strip().splitlines():
        cells = [cell.strip() for cell in line.split("|")]
        values = cells[names:]
        if len(values) != len(attributes) or not all(values):
            raise UserError(
                f"{path}: {line!r}: write {'name | plural' if is_count else 'name'} and one value "
                f"for each of {', '.join(attributes)}, parted by |"
            )
        plural = cells[1] if is_count else None
        value_of = dict(zip(attributes, values, strict=True))
        things.append(Thing(cells[0], plural, category, value_of))
    return Category(category, data["plural"], attributes, tuple(things))


def read_world(folder: Path = WORLD_DIR, things_each: int | None = None) -> World:
    """Read all categories, or the first things of each; refuse a name that stands twice."""
    categories = {}
    seen = {}
    for path in sorted((folder / "facts").glob("*.toml")):
        category = read_category(path)
        for thing in category.things:
            if thing.name in seen:
                raise UserError(f"{path}: {thing.name!r} also stands in {seen[thing.name]}")
            seen[thing.name] = path.name
        things = category.things[:things_each]
        categories[category.name] = replace(category, things=things)
    wordings = read_toml(folder / "skills.toml")
    stories = read_toml(folder / "stories.toml")
    return World(categories, wordings, stories)
