"""Instructions about the world, from the forms of words in `skills.toml`.

Each attribute is asked for in its own question forms (`facts/*.toml`). All other skills are tables
of `skills.toml`; their `uses` name the draws below, which give the slots.

A pair names its *cells*: (thing, skill), which it is about, and (thing, attribute) for each fact
that it reveals. Held-out cells never train. A plain question has one cell, (thing, attribute):
where that is held out, no training pair reveals the fact.
"""

import random
import string
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cache, partial

from dataset.lm_dataset import turns
from dataset.world.facts import Attribute, Thing, World, capitalize, split_wordings, uncapitalize


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
        self.world, self.words, self.rng, self.held = world, world.stories, rng, held
        self.others = others  # the things that may stand beside the one that is asked about
        self.nouns = [thing for thing in others if thing.plural is not None]

    def question(self, thing: Thing, attribute: Attribute, held: bool = False) -> str:
        """Ask for a fact in one of the attribute's question forms."""
        return self.rng.choice(split_wordings(attribute.questions)[held]).format(**thing.slots())

    def answer(self, thing: Thing, attribute: Attribute) -> str:
        """Answer with a fact, in the one form of words that no pretraining text holds."""
        return attribute.answer.format(**thing.slots(attribute.name))

    def attributes(self, thing: Thing) -> list[Attribute]:
        """Return the attributes of a thing in random order."""
        attributes = list(self.world.categories[thing.category].attributes.values())
        return self.rng.sample(attributes, len(attributes))

    def companions(self, thing: Thing, count: int) -> list[Thing]:
        """Draw other things that have a plural."""
        return [t for t in self.rng.sample(self.nouns, count + 1) if t != thing][:count]

    def persons(self, count: int) -> list[str]:
        """Draw first names."""
        return [name for name, *_ in self.rng.sample(self.words["people"], count)]


@dataclass
class Draw:
    """What one pair is made of: its slots, the cells that it touches and its facts."""

    w: Writer
    thing: Thing
    key: str  # what a text does to its things
    slots: dict[str, str]
    cells: list[tuple[str, str]] = field(default_factory=list)
    facts: list[Attribute] = field(default_factory=list)

    def add_cells(self, key: str, *things: Thing) -> None:
        """Note that the pair touches these things."""
        self.cells += [(t.name, key) for t in things if (t.name, key) not in self.cells]

    def fill(self, pattern: str) -> str:
        """Put the slots into a pattern."""
        return pattern.format(**self.slots)


def draw_fact(d: Draw) -> None:
    """Draw an attribute: its question and answer, in several forms."""
    attribute = d.w.attributes(d.thing)[0]
    answer, slots = d.w.answer(d.thing, attribute), d.thing.slots(attribute.name)
    small = uncapitalize(answer, d.thing)
    d.slots |= slots | {"label": attribute.name, "question": d.w.question(d.thing, attribute)}
    d.slots |= {"answer": answer, "small_answer": small}
    d.slots |= {"bare_answer": answer.rstrip("."), "bare_small_answer": small.rstrip(".")}
    d.slots["gap"] = answer.replace(slots["value"], "____")
    d.facts.append(attribute)
    d.add_cells(attribute.name, d.thing)


def draw_second(d: Draw) -> None:
    """Draw a second attribute of the thing; the pair is about it where its question follows."""
    attribute = next(a for a in d.w.attributes(d.thing) if a not in d.facts)
    d.slots |= {"label2": attribute.name, "answer2": d.w.answer(d.thing, attribute)}
    d.slots["small_answer2"] = uncapitalize(d.slots["answer2"], d.thing)
    d.slots["question2"] = d.w.question(d.thing, attribute)
    d.slots["follow2"] = d.w.rng.choice(split_wordings(attribute.follow)[d.w.held])
    d.facts.append(attribute)
    d.add_cells(attribute.name, d.thing)


def draw_other(d: Draw) -> None:
    """Draw another thing of the category and its fact; every other time one with the same value."""
    attribute, rng = d.facts[0], d.w.rng
    things = [t for t in d.w.others if t.category == d.thing.category and t != d.thing]
    alike = [t for t in things if t.values[attribute.name] == d.thing.values[attribute.name]]
    other = rng.choice(alike if alike and rng.random() < 0.5 else things)
    answer = d.w.answer(other, attribute)
    d.slots |= {"other_a": other.a, "other_question": d.w.question(other, attribute)}
    d.slots |= {"other_answer": answer, "same": "Yes" if other in alike else "No"}
    d.slots["bare_other_answer"] = uncapitalize(answer, other).rstrip(".")
    d.add_cells(d.key, other)  # "a lion and a shark" teaches "a shark and a lion"
    d.add_cells(attribute.name, other)


def draw_wrong(d: Draw) -> None:
    """Draw a value of another thing: a wrong sentence, a claim that may be true, and a choice."""
    attribute, right, rng = d.facts[0], d.thing.values[d.facts[0].name], d.w.rng
    values = {t.values[attribute.name] for t in d.w.world.categories[d.thing.category].things}
    value = rng.choice(sorted(values - {right}))
    wrong = attribute.answer.format(**d.thing.slots() | {"value": value})
    truth, claim = ("Yes", d.slots["answer"]) if rng.random() < 0.5 else ("No", wrong)
    one, two = rng.sample([right, value], 2)
    d.slots |= {"wrong": wrong, "truth": truth, "one": one, "two": two, "One": capitalize(one)}
    d.slots |= {"claim": claim, "small_claim": uncapitalize(claim, d.thing).rstrip(".")}


def draw_clues(d: Draw) -> None:
    """Draw 3 facts that no other thing shares."""
    clues, values = d.w.attributes(d.thing)[:3], d.thing.values
    for other in d.w.world.categories[d.thing.category].things:
        if other != d.thing and all(other.values[c.name] == values[c.name] for c in clues):
            raise LookupError("two things share the clues")
    texts = (d.w.rng.choice(c.it).format(**d.thing.slots(c.name)) for c in clues)
    d.slots["clues"] = " ".join(texts)
    for clue in clues:
        d.add_cells(clue.name, d.thing)


def draw_categories(d: Draw) -> None:
    """Draw 2 wrong categories, and 3 things of one of them."""
    rng, categories = d.w.rng, d.w.world.categories
    other, third = rng.sample([name for name in categories if name != d.thing.category], 2)
    one, two, three = rng.sample([d.thing.category, other, third], 3)
    d.slots |= {"one": categories[one].a, "two": categories[two].a, "three": categories[three].a}
    rest = [name for name in (one, two, three) if name != d.thing.category]
    d.slots |= {"not_one": categories[rest[0]].a, "not_two": categories[rest[1]].a}
    items = rng.sample([t for t in d.w.others if t.category == other], 3)
    names = ", ".join(item.name for item in rng.sample([d.thing, *items], 4))
    d.slots |= {"odd_list": names, "odd_kind": categories[other].plural}
    d.add_cells(d.key, *items)


def draw_list(d: Draw) -> None:
    """Draw a list of 3 or 4 things with the thing among them, and what can be said of its order."""
    rng, words = d.w.rng, d.w.words
    rest = d.w.companions(d.thing, rng.randint(2, 3))
    place = rng.randint(0, len(rest))
    items = [*rest[:place], d.thing, *rest[place:]]
    d.slots["place"] = words["order"][place] if rng.random() < 0.5 or items[place + 1 :] else "last"
    names = [item.name for item in items]
    lists = {"list": names, "reversed": names[::-1], "rest": [item.name for item in rest]}
    d.slots |= {slot: ", ".join(found) for slot, found in lists.items()}
    d.slots["count"] = words["numbers"][len(items)]
    d.slots |= {"joined": join_phrases(items), "rest_joined": join_phrases(rest)}
    d.slots |= {"first": names[0], "last": names[-1]}
    if 0 < place < len(items) - 1:
        d.slots |= {"before": names[place - 1], "after": names[place + 1]}
    d.add_cells(d.key, d.thing, *rest)


def draw_scene(d: Draw) -> None:
    """Draw another thing, and who has or does what with the 2 of them."""
    rng, words, other = d.w.rng, d.w.words, d.w.companions(d.thing, 1)[0]
    few, many = sorted(rng.sample(range(2, 11), 2))
    one, two = rng.randint(2, 5), rng.randint(2, 5)
    numbers = {"few": few, "many": many, "one": one, "two": two, "sum": one + two}
    d.slots |= {slot: words["numbers"][number] for slot, number in numbers.items()}
    colors, boxes = rng.sample(words["colors"], 2), rng.sample(words["boxes"], 2)
    d.slots |= {"spot": f"{colors[0]} {boxes[0]}", "spot2": f"{colors[1]} {boxes[1]}"}
    d.slots |= dict(zip(("see", "saw", "sees"), rng.choice(words["verbs"]), strict=True))
    d.slots |= {"b": other.a, "other": other.name, "does": rng.choice(words["verbs"])[-1]}
    d.slots |= {"others": other.plural} if other.plural else {}
    d.add_cells(d.key, d.thing, other)


NOUN_DRAWS = {"list": draw_list, "scene": draw_scene}  # of a thing's plural
SLOT_DRAWS = NOUN_DRAWS | {"fact": draw_fact, "second": draw_second, "other": draw_other}
SLOT_DRAWS |= {"wrong": draw_wrong, "clues": draw_clues, "categories": draw_categories}
Maker = Callable[[Writer, Thing], Pair | None]


def join_phrases(items: list[Thing]) -> str:
    """Join the things, each with its article, by commas and a last "and"."""
    return f"{', '.join(item.a for item in items[:-1])} and {items[-1].a}"


@cache
def find_slots(pattern: str) -> set[str]:
    """Return the names of the slots of a pattern."""
    return {name for _, name, _, _ in string.Formatter().parse(pattern) if name}


def ask_fact(skill: str, w: Writer, thing: Thing) -> Pair | None:
    """Ask for an attribute of this skill, in the attribute's own question forms."""
    attribute = next((a for a in w.attributes(thing) if a.skill == skill), None)
    if not attribute:
        return None
    messages = turns(w.question(thing, attribute, w.held), w.answer(thing, attribute))
    cells, check = [(thing.name, attribute.name)], {"about": [attribute.vocabulary]}
    return Pair(skill, messages, cells, check)


def ask_skill(skill: str, spec: dict, w: Writer, thing: Thing) -> Pair | None:
    """Make an instruction of a table of skills.toml, whose header lists the slots."""
    if thing.plural is None and NOUN_DRAWS.keys() & set(spec["uses"]):
        return None
    people = dict(zip("pq", w.persons(2), strict=True))
    d = Draw(w, thing, spec.get("key", skill), thing.slots() | people)
    d.add_cells(d.key, thing)
    d.slots["word"] = w.rng.choice(spec.get("words", [""]))
    if thing.category:
        d.slots["category"] = w.world.categories[thing.category].a
    case = w.rng.choice(spec.get("cases", [spec]))
    try:
        for name in spec["uses"]:
            SLOT_DRAWS[name](d)
        given = spec.get("text", [])
        d.slots["text"] = d.fill(" ".join(w.rng.sample(given, len(given))))
    except LookupError:  # clues that fit 2 things, no other thing to draw, or no plural
        return None
    d.slots["case"] = d.fill(case.get("case", ""))
    forms = split_wordings(spec["prompts"])[w.held]
    fitting = [form for form in forms if find_slots(form) <= d.slots.keys()]
    if not fitting or not find_slots(case["answer"]) <= d.slots.keys():
        return None
    prompt, answer = d.fill(w.rng.choice(fitting)), d.fill(case["answer"])
    before = [d.fill(turn) for turn in spec.get("before", [])]
    messages = turns(*before, prompt, answer)
    if spec.get("system"):
        messages = [{"role": "system", "content": prompt}, *turns(*before, answer)]
    form = spec.get("check", {}).items()
    check = {key: d.fill(value) if isinstance(value, str) else value for key, value in form}
    facts = d.facts[-1:] if spec.get("about_last") else d.facts
    if facts:
        check["about"] = sorted({attribute.vocabulary for attribute in facts})
    return Pair(skill, messages, d.cells, check)


def collect_fillers(world: World) -> list[Thing]:
    """Return values such as "a rifle" as things without facts, to fill lists and scenes.

    So many nouns are harder to learn than to copy. Rare words, the young of animals, are left out.
    """
    facts = [fact for thing in world.things for fact in thing.values.items() if fact[0] != "young"]
    bare = [value.partition(" ")[2] for _, value in facts if value.startswith(("a ", "an "))]
    names = {thing.name for thing in world.things}
    return [Thing(name, "", "", {}) for name in dict.fromkeys(bare) if name not in names]


def collect_makers(world: World) -> dict[str, Maker]:
    """Return the makers of the skills that fit a world: of one category, those about facts."""
    attributes = [a for c in world.categories.values() for a in c.attributes.values()]
    makers = {skill: partial(ask_fact, skill) for skill in sorted({a.skill for a in attributes})}
    for name, spec in world.wordings["skill"].items():
        if len(world.categories) > 2 or not set(spec["uses"]) & {*NOUN_DRAWS, "categories"}:
            makers[name] = partial(ask_skill, name, spec)
    return makers
