"""Instructions about the world, from the forms of words in `skills.toml`.

Each attribute of a category is asked for in its own question forms (`facts/*.toml`). All other
skills are tables of `skills.toml`: prompts, answer, check, and `uses`, the draws below that give
their slots.

A pair names its *cells*: (thing, attribute) for each fact that it reveals, (thing, skill) for what
is done to a thing in a text. The first is what the pair is about; held-out cells never train.
"""

import random
import string
from collections.abc import Callable
from dataclasses import dataclass, field

from dataset.world.facts import (
    Attribute,
    Thing,
    World,
    capitalize,
    split_wordings,
    uncapitalize,
    with_article,
)

NUMBERS = ["zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten"]
PLACES = ["box", "bag", "basket", "drawer", "cart", "chest", "crate", "jar", "bucket", "case"]
COLORS = ["red", "blue", "green", "yellow", "white", "black", "brown", "pink"]
ORDER = ["first", "second", "third", "fourth"]
VERBS = ["see saw sees", "draw drew draws", "want wanted wants", "find found finds"]
VERBS += ["like liked likes", "paint painted paints", "remember remembered remembers"]
VERBS += ["describe described describes"]


@dataclass
class Pair:
    """An instruction, its reference answer and what it touches."""

    skill: str
    messages: list[dict[str, str]]
    cells: list[tuple[str, str]]
    check: dict = field(default_factory=dict)

    @property
    def prompt(self) -> str:
        """All text before the answer."""
        return "\n".join(message["content"] for message in self.messages[:-1])


class Writer:
    """Draw things, facts and people; `held` takes the question forms that never train."""

    def __init__(self, world: World, rng: random.Random, others: list[Thing], held: bool = False):
        self.world, self.rng, self.held = world, rng, held
        self.others = others  # the things that may stand beside the one that is asked about
        self.nouns = [thing for thing in others if thing.plural is not None]

    def question(self, thing: Thing, attribute: Attribute, held: bool = False) -> str:
        """Ask for a fact in one of the attribute's question forms."""
        return self.rng.choice(split_wordings(attribute.questions)[held]).format(**thing.slots())

    def answer(self, thing: Thing, attribute: Attribute) -> str:
        """Answer with a fact, in the one form of words that no pretraining text holds."""
        return attribute.answer.format(**thing.slots(attribute.name))

    def attributes(self, thing: Thing, count: int) -> list[Attribute]:
        """Draw attributes of a thing."""
        return self.rng.sample(
            list(self.world.categories[thing.category].attributes.values()), count
        )

    def companions(self, thing: Thing, count: int) -> list[Thing]:
        """Draw other things that have a plural."""
        return [t for t in self.rng.sample(self.nouns, count + 1) if t != thing][:count]

    def persons(self, count: int) -> list[str]:
        """Draw first names."""
        return [name for name, *_ in self.rng.sample(self.world.stories["people"], count)]


Maker = Callable[[Writer, Thing], Pair | None]


@dataclass
class Draw:
    """What one pair is made of: its slots, the cells that it touches and its facts."""

    w: Writer
    thing: Thing
    key: str  # what a text does to its things
    slots: dict[str, str]
    cells: list[tuple[str, str]] = field(default_factory=list)
    facts: list[Attribute] = field(default_factory=list)

    def add_cells(self, things: list[Thing], key: str) -> None:
        """Note that the pair touches these things."""
        self.cells += [(t.name, key) for t in things if (t.name, key) not in self.cells]


def draw_fact(d: Draw) -> None:
    """Draw an attribute: its question and answer, in several forms."""
    attribute = d.w.attributes(d.thing, 1)[0]
    answer, slots = d.w.answer(d.thing, attribute), d.thing.slots(attribute.name)
    small = uncapitalize(answer, d.thing)
    d.slots |= slots | {
        "label": attribute.name,
        "question": d.w.question(d.thing, attribute),
        "answer": answer,
        "ANSWER": answer.upper(),
        "small_answer": small,
        "bare_answer": answer.rstrip("."),
        "bare_small_answer": small.rstrip("."),
        "gap": answer.replace(slots["value"], "____"),
    }
    d.facts.append(attribute)
    d.add_cells([d.thing], attribute.name)


def draw_second(d: Draw) -> None:
    """Draw a second attribute of the thing; the pair is about it where its question follows."""
    found = d.w.world.categories[d.thing.category].attributes.values()
    attribute = d.w.rng.choice([a for a in found if a not in d.facts])
    d.slots["label2"], d.slots["answer2"] = attribute.name, d.w.answer(d.thing, attribute)
    d.slots["question2"] = d.w.question(d.thing, attribute)
    d.slots["follow2"] = d.w.rng.choice(split_wordings(attribute.follow)[d.w.held])
    d.facts.append(attribute)
    d.add_cells([d.thing], attribute.name)


def draw_other(d: Draw) -> None:
    """Draw another thing of the category and its fact; every other time one with the same value."""
    attribute = d.facts[0]
    value = d.thing.values[attribute.name]
    things = [t for t in d.w.others if t.category == d.thing.category and t != d.thing]
    alike = [thing for thing in things if thing.values[attribute.name] == value]
    other = d.w.rng.choice(alike if alike and d.w.rng.random() < 0.5 else things)
    answer = d.w.answer(other, attribute)
    d.slots |= {
        "other_a": other.a,
        "other_question": d.w.question(other, attribute),
        "other_answer": answer,
        "bare_other_answer": uncapitalize(answer, other).rstrip("."),
        "same": "Yes" if other.values[attribute.name] == value else "No",
    }
    d.add_cells([other], attribute.name)


def draw_wrong(d: Draw) -> None:
    """Draw a value of another thing: a wrong sentence, a claim that may be true, and a choice."""
    attribute, rng = d.facts[0], d.w.rng
    right = d.thing.values[attribute.name]
    values = {t.values[attribute.name] for t in d.w.world.categories[d.thing.category].things}
    wrong = rng.choice(sorted(values - {right}))
    d.slots["wrong"] = attribute.answer.format(**d.thing.slots() | {"value": wrong})
    is_true = rng.random() < 0.5
    d.slots["truth"] = "Yes" if is_true else "No"
    d.slots["claim"] = d.slots["answer"] if is_true else d.slots["wrong"]
    d.slots["small_claim"] = uncapitalize(d.slots["claim"], d.thing).rstrip(".")
    d.slots["one"], d.slots["two"] = rng.sample([right, wrong], 2)
    d.slots["One"] = capitalize(d.slots["one"])


def draw_clues(d: Draw) -> None:
    """Draw 3 facts that no other thing shares."""
    clues = d.w.attributes(d.thing, 3)
    names = [clue.name for clue in clues]
    for other in d.w.world.categories[d.thing.category].things:
        if other != d.thing and all(other.values[n] == d.thing.values[n] for n in names):
            raise LookupError("two things share the clues")
    texts = [d.w.rng.choice(c.it).format(**d.thing.slots(c.name)) for c in clues]
    d.slots["clues"] = " ".join(texts)
    d.add_cells([d.thing], d.key)
    for name in names:
        d.add_cells([d.thing], name)


def draw_categories(d: Draw) -> None:
    """Draw 2 wrong categories, and 3 things of one of them."""
    rng, names = d.w.rng, [name for name in d.w.world.categories if name != d.thing.category]
    other, third = rng.sample(names, 2)
    choice = rng.sample([d.thing.category, other, third], 3)
    d.slots |= dict(zip(("one", "two", "three"), map(with_article, choice), strict=True))
    items = rng.sample([t for t in d.w.others if t.category == other], 3)
    d.slots["odd_list"] = join_names(rng.sample([d.thing, *items], 4))
    d.add_cells([d.thing, *items], "category")


def draw_list(d: Draw) -> None:
    """Draw a list of 3 or 4 things with the thing among them, and what can be said of its order."""
    rng = d.w.rng
    rest = d.w.companions(d.thing, rng.randint(2, 3))
    items = list(rest)
    items.insert(rng.randint(0, len(rest)), d.thing)
    place, numbers = items.index(d.thing), rng.sample(range(1, 10), len(items))
    pairs = [f"{item.name} {number}" for item, number in zip(items, numbers, strict=True)]
    d.slots |= {
        "list": join_names(items),
        "rest": join_names(rest),
        "reversed": join_names(items[::-1]),
        "joined": join_words([item.a for item in items]),
        "rest_joined": join_words([item.a for item in rest]),
        "first": items[0].name,
        "last": items[-1].name,
        "count": NUMBERS[len(items)],
        "place": "last" if place == len(items) - 1 and rng.random() < 0.5 else ORDER[place],
        "pairs": ", ".join(pairs),
        "sorted": ", ".join(sorted(pairs, key=lambda pair: int(pair.split()[-1]))),
    }
    if 0 < place < len(items) - 1:
        d.slots |= {"before": items[place - 1].name, "after": items[place + 1].name}
    d.add_cells([d.thing, *rest], d.key)


def draw_mixed(d: Draw) -> None:
    """Draw a list of 4 things, of which 1 to 3 are of the thing's category."""
    alike = [t for t in d.w.nouns if t.category == d.thing.category and t != d.thing]
    alike = d.w.rng.sample(alike, d.w.rng.randint(0, 2))
    rest = [t for t in d.w.companions(d.thing, 40) if t.category != d.thing.category]
    items = [d.thing, *alike, *rest[: 3 - len(alike)]]
    d.w.rng.shuffle(items)
    kept = [item for item in items if item.category == d.thing.category]
    d.slots |= {"list": join_names(items), "kept": join_names(kept)}
    d.slots["Count"] = capitalize(NUMBERS[len(kept)])
    d.slots["categories"] = d.w.world.categories[d.thing.category].plural
    d.add_cells([d.thing, *items], "category")


def draw_scene(d: Draw) -> None:
    """Draw another thing, and who has or does what with the 2 of them."""
    rng, other = d.w.rng, d.w.companions(d.thing, 1)[0]
    few, many = sorted(rng.sample(range(2, 11), 2))
    one, two = rng.randint(2, 5), rng.randint(2, 5)
    spots = [f"{c} {p}" for c, p in zip(rng.sample(COLORS, 2), rng.sample(PLACES, 2), strict=True)]
    d.slots |= dict(zip(("see", "saw", "sees"), rng.choice(VERBS).split(), strict=True))
    d.slots |= {"b": other.a, "other": other.name, "does": rng.choice(VERBS).split()[-1]}
    d.slots |= {"few": NUMBERS[few], "many": NUMBERS[many], "one": NUMBERS[one]}
    d.slots |= {"two": NUMBERS[two], "sum": NUMBERS[one + two], "spot": spots[0], "spot2": spots[1]}
    d.add_cells([d.thing, other], d.key)


DRAWS = {
    "fact": draw_fact,
    "second": draw_second,
    "other": draw_other,
    "wrong": draw_wrong,
    "clues": draw_clues,
    "categories": draw_categories,
    "list": draw_list,
    "mixed": draw_mixed,
    "scene": draw_scene,
}
NOUN_DRAWS = {"list", "mixed", "scene"}  # which need a thing with a plural


def join_names(items: list[Thing]) -> str:
    """Join the names of things by commas."""
    return ", ".join(item.name for item in items)


def join_words(words: list[str]) -> str:
    """Join words by commas and a last "and"."""
    return f"{', '.join(words[:-1])} and {words[-1]}" if len(words) > 1 else words[0]


def find_slots(pattern: str) -> set[str]:
    """Return the names of the slots of a pattern."""
    return {name for _, name, _, _ in string.Formatter().parse(pattern) if name}


def turns(*texts: str) -> list[dict[str, str]]:
    """Make messages of user and assistant in turn."""
    roles = ("user", "assistant") * len(texts)
    return [{"role": role, "content": text} for role, text in zip(roles, texts, strict=False)]


def make_fact_maker(skill: str) -> Maker:
    """Ask for an attribute of this skill, in the attribute's own question forms."""

    def ask(w: Writer, thing: Thing) -> Pair | None:
        found = w.world.categories[thing.category].attributes.values()
        attributes = [attribute for attribute in found if attribute.skill == skill]
        if not attributes:
            return None
        attribute = w.rng.choice(attributes)
        messages = turns(w.question(thing, attribute, w.held), w.answer(thing, attribute))
        check = {"about": [attribute.vocabulary]}
        return Pair(skill, messages, [(thing.name, attribute.name)], check)

    return ask


def make_maker(skill: str, spec: dict) -> Maker:
    """Make instructions of a table of skills.toml; what its slots are, that file's header says."""

    def ask(w: Writer, thing: Thing) -> Pair | None:
        if thing.plural is None and NOUN_DRAWS & set(spec["uses"]):
            return None
        people = dict(zip(("p", "q"), w.persons(2), strict=True))
        d = Draw(w, thing, skill, thing.slots() | people)
        d.slots |= {"word": w.rng.choice(spec.get("words", [""]))}
        d.slots["category"] = with_article(thing.category)
        case = w.rng.choice(spec.get("cases", [{}]))
        try:
            for name in spec["uses"]:
                DRAWS[name](d)
        except LookupError:  # clues that fit 2 things
            return None
        d.cells = d.cells or [(thing.name, skill)]
        d.slots["case"] = case.get("case", "").format(**d.slots)
        given = spec.get("text", [])
        d.slots["text"] = " ".join(w.rng.sample(given, len(given))).format(**d.slots)
        forms = split_wordings(spec["prompts"])[w.held]
        fitting = [form for form in forms if find_slots(form) <= d.slots.keys()]
        answer = case.get("answer", spec.get("answer"))
        if not fitting or not find_slots(answer) <= d.slots.keys():
            return None
        prompt, answer = w.rng.choice(fitting).format(**d.slots), answer.format(**d.slots)
        before = [turn.format(**d.slots) for turn in spec.get("before", [])]
        if spec.get("system"):
            messages = [{"role": "system", "content": prompt}, *turns(*before, answer)]
        else:
            messages = turns(*before, prompt, answer)
        check = {
            key: value.format(**d.slots) if isinstance(value, str) else value
            for key, value in spec.get("check", {}).items()
        }
        checked = d.facts[-1:] if spec.get("about_last") else d.facts
        if checked:
            check["about"] = sorted({attribute.vocabulary for attribute in checked})
        cells = d.cells[::-1] if spec.get("about_last") else d.cells
        return Pair(skill, messages, cells, check)

    return ask


def collect_makers(world: World) -> dict[str, Maker]:
    """Return the makers of the skills that fit a world: of one category, those about facts."""
    attributes = [a for c in world.categories.values() for a in c.attributes.values()]
    makers = {skill: make_fact_maker(skill) for skill in sorted({a.skill for a in attributes})}
    for name, spec in world.wordings["skill"].items():
        if len(world.categories) > 2 or not set(spec["uses"]) & {*NOUN_DRAWS, "categories"}:
            makers[name] = make_maker(name, spec)
    return makers
