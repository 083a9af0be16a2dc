"""Read the world: things, their facts and the sentences that state them.

A file in `facts/` holds one category: a table with a line for each thing and a column for each
attribute, and sentence patterns, questions and an answer for each attribute. To add a thing, add a
line to its table. `Thing.slots` names the slots of a pattern.
"""

import tomllib
from dataclasses import dataclass, field, replace
from pathlib import Path

from model.cli import UserError

WORLD_DIR = Path(__file__).resolve().parent
HELD_STATEMENTS = 2  # the last patterns of an attribute stand in no training document
HELD_WORDINGS = 0.15  # the last share of each list of question forms never trains
AN_SOUND, A_SOUND = ("hour", "honest", "herb"), ("uni", "use", "euro", "uku", "one")


@dataclass(frozen=True)
class Attribute:
    """What can be said and asked about one property of the things of a category."""

    name: str
    category: str
    skill: str
    statements: list[str]
    it: list[str]
    questions: list[str]
    follow: list[str]
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

    @property
    def a(self) -> str:
        """The thing with its article: "a lion", "an owl", "France"."""
        return self.name if self.plural is None else with_article(self.name)

    def slots(self, attribute: str | None = None) -> dict[str, str]:
        """Return what the slots of a pattern stand for, and each again with a capital."""
        slots = {"a": self.a, "name": self.name}
        slots |= {"plural": self.plural} if self.plural else {}
        slots |= {"value": self.values[attribute]} if attribute else {}
        return slots | {capitalize(key): capitalize(text) for key, text in slots.items()}


@dataclass(frozen=True)
class Category:
    """The things of one kind and their attributes."""

    name: str
    plural: str
    attributes: dict[str, Attribute]
    things: tuple[Thing, ...]

    @property
    def a(self) -> str:
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
    vowel = noun[0].lower() in "aeiou" and not noun.startswith(A_SOUND)
    return f"{'an' if vowel or noun.startswith(AN_SOUND) else 'a'} {noun}"


def split_wordings(forms: list[str]) -> tuple[list[str], list[str]]:
    """Part question forms into those that train and those that are held out, the last 15%."""
    held = max(1, round(HELD_WORDINGS * len(forms)))
    return forms[:-held], forms[-held:]


def read_toml(path: Path) -> dict:
    """Read a TOML file; raise a UserError that names the file if it is broken."""
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: {error}") from error


def read_category(path: Path) -> Category:
    """Read one category file; raise a UserError that names the line of a broken table."""
    data = read_toml(path)
    name, is_count = data["name"], data["grammar"] == "count"
    tables = data["attributes"].items()
    attributes = {key: Attribute(key, name, **fields) for key, fields in tables}
    things = []
    for line in data["table"].strip().splitlines():
        cells = [cell.strip() for cell in line.split("|")]
        heads, values = (cells[:2], cells[2:]) if is_count else ([cells[0], None], cells[1:])
        if len(values) != len(attributes) or not all(values):
            raise UserError(
                f"{path}: {line!r}: write {'name | plural' if is_count else 'name'} and one value "
                f"for each of {', '.join(attributes)}, parted by |"
            )
        things.append(Thing(*heads, name, dict(zip(attributes, values, strict=True))))
    return Category(name, data["plural"], attributes, tuple(things))


def read_world(folder: Path = WORLD_DIR, things_each: int | None = None) -> World:
    """Read all categories, or the first things of each; refuse a name that stands twice."""
    categories, seen = {}, {}
    for path in sorted((folder / "facts").glob("*.toml")):
        category = read_category(path)
        for thing in category.things:
            if thing.name in seen:
                raise UserError(f"{path}: {thing.name!r} also stands in {seen[thing.name]}")
            seen[thing.name] = path.name
        categories[category.name] = replace(category, things=category.things[:things_each])
    return World(categories, read_toml(folder / "skills.toml"), read_toml(folder / "stories.toml"))
