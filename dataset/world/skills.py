"""Instructions about the world, from the forms of words in `skills.toml`.

Each attribute is asked for in its own question forms (`facts/*.toml`). All other skills are tables
of `skills.toml`; their `uses` name the draws below, which give the slots.

A pair names its *cells*: (thing, skill), which it is about, and (thing, attribute) for each fact
that it reveals. Held-out cells never train. A plain question has one cell, (thing, attribute):
where that is held out, no training pair reveals the fact.

All draws come from one generator. Whoever changes their order changes every file that follows.
"""

import random
import string
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cache, partial

from dataset.lm_dataset import turns
from dataset.world.facts import (
    Attribute,
    Category,
    Thing,
    World,
    capitalize,
    choose_wordings,
    uncapitalize,
)

Cell = tuple[str, str]  # the name of a thing, and a skill or an attribute
Message = dict[str, str]  # role and content
GAP = "____"  # stands in place of a value
ALIKE = 0.5  # share of comparisons with a thing that has the same value, where there is one
TRUE = 0.5  # share of claims that are true


@dataclass
class Pair:
    """An instruction, its reference answer and what it touches."""

    skill: str
    messages: list[Message]
    cells: list[Cell]
    check: dict = field(default_factory=dict)

    @property
    def prompt(self) -> str:
        """All text before the answer."""
        return "\n".join(message["content"] for message in self.messages[:-1])

    @property
    def answer(self) -> str:
        """The reference."""
        return self.messages[-1]["content"]


@dataclass
class Draft:
    """A pair that is drawn, but not yet written: of 3 drafts, the cells rule 2 out."""

    cells: list[Cell]
    write: Callable[[], Pair]


class Writer:
    """Draw things, facts and people.

    Args:
        world: where facts and words come from.
        rng: the generator of all draws.
        things: those that may stand beside the one that is asked about.
        use_held_out: whether to take the question forms that never train.
    """

    def __init__(
        self, world: World, rng: random.Random, things: list[Thing], use_held_out: bool = False
    ) -> None:
        self.world = world
        self.words = world.stories
        self.rng = rng
        self.things = things
        self.use_held_out = use_held_out
        self.nouns = [thing for thing in things if thing.plural is not None]
        self.members: dict[str, list[Thing]] = defaultdict(list)  # of each category
        for thing in things:
            self.members[thing.category].append(thing)

    def category(self, thing: Thing) -> Category:
        """Return the category of a thing."""
        return self.world.categories[thing.category]

    def question(self, thing: Thing, attribute: Attribute, use_held_out: bool = False) -> str:
        """Ask for a fact in one of the attribute's question forms."""
        forms = choose_wordings(attribute.questions, use_held_out)
        return self.rng.choice(forms).format_map(thing.slots())

    def answer(self, thing: Thing, attribute: Attribute) -> str:
        """Answer with a fact, in the one form of words that no pretraining text holds."""
        return attribute.answer.format_map(thing.slots(attribute.name))

    def shuffle_attributes(self, thing: Thing) -> list[Attribute]:
        """Return the attributes of a thing in random order."""
        attributes = list(self.category(thing).attributes.values())
        return self.rng.sample(attributes, len(attributes))

    def siblings(self, thing: Thing) -> list[Thing]:
        """Return the other things of the same category."""
        members = self.members[thing.category]
        return [member for member in members if member.name != thing.name]

    def draw_companions(self, thing: Thing, count: int) -> list[Thing]:
        """Draw other things that have a plural."""
        drawn = self.rng.sample(self.nouns, count + 1)  # one more, for the thing may be among them
        return [noun for noun in drawn if noun.name != thing.name][:count]

    def draw_first_names(self, count: int) -> list[str]:
        """Draw first names."""
        people = self.rng.sample(self.words["people"], count)
        return [person[0] for person in people]


@dataclass
class Draw:
    """What one pair is made of: its slots, the cells that it touches and its facts."""

    writer: Writer
    thing: Thing
    key: str  # the skill of its cells; skills that ask for the same answers share one
    slots: dict[str, str]
    cells: list[Cell] = field(default_factory=list)
    facts: list[Attribute] = field(default_factory=list)

    def add_cells(self, key: str, *things: Thing) -> None:
        """Note that the pair touches these things."""
        for thing in things:
            cell = (thing.name, key)
            if cell not in self.cells:
                self.cells.append(cell)

    def fill(self, pattern: str) -> str:
        """Put the slots into a pattern."""
        return pattern.format_map(self.slots)

    def find_fitting(self, patterns: list[str]) -> list[str]:
        """Return the patterns whose slots were all drawn."""
        drawn = self.slots.keys()
        return [pattern for pattern in patterns if find_slots(pattern) <= drawn]


def draw_fact(draw: Draw) -> None:
    """Draw an attribute: its question and answer, in several forms."""
    thing = draw.thing
    attribute = draw.writer.shuffle_attributes(thing)[0]
    answer = draw.writer.answer(thing, attribute)
    small_answer = uncapitalize(answer, thing)
    draw.slots.update(
        thing.slots(attribute.name),
        label=attribute.name,
        question=draw.writer.question(thing, attribute),
        answer=answer,
        small_answer=small_answer,
        bare_answer=answer.rstrip("."),
        bare_small_answer=small_answer.rstrip("."),
        gap=answer.replace(thing.values[attribute.name], GAP),
    )
    draw.facts.append(attribute)
    draw.add_cells(attribute.name, thing)


def draw_second(draw: Draw) -> None:
    """Draw a second attribute of the thing; the pair is about it where its question follows."""
    thing = draw.thing
    writer = draw.writer
    attribute = next(drawn for drawn in writer.shuffle_attributes(thing) if drawn not in draw.facts)
    answer = writer.answer(thing, attribute)
    draw.slots.update(
        label2=attribute.name,
        answer2=answer,
        small_answer2=uncapitalize(answer, thing),
        question2=writer.question(thing, attribute),
        follow2=writer.rng.choice(choose_wordings(attribute.follow, writer.use_held_out)),
    )
    draw.facts.append(attribute)
    draw.add_cells(attribute.name, thing)


def draw_other(draw: Draw) -> None:
    """Draw another thing of the category and its fact; every other time one with the same value."""
    writer = draw.writer
    attribute = draw.facts[0]
    value = draw.thing.values[attribute.name]
    things = writer.siblings(draw.thing)
    alike = [thing for thing in things if thing.values[attribute.name] == value]
    wants_alike = alike and writer.rng.random() < ALIKE
    second = writer.rng.choice(alike if wants_alike else things)
    answer = writer.answer(second, attribute)
    draw.slots.update(
        other_a=second.phrase,
        other_question=writer.question(second, attribute),
        other_answer=answer,
        bare_other_answer=uncapitalize(answer, second).rstrip("."),
        same="Yes" if second in alike else "No",
    )
    draw.add_cells(draw.key, second)  # "a lion and a shark" teaches "a shark and a lion"
    draw.add_cells(attribute.name, second)


def draw_wrong(draw: Draw) -> None:
    """Draw a value of another thing: a wrong sentence, a claim that may be true, and a choice."""
    rng = draw.writer.rng
    attribute = draw.facts[0]
    right_value = draw.thing.values[attribute.name]
    things = draw.writer.category(draw.thing).things
    values = {thing.values[attribute.name] for thing in things}
    wrong_value = rng.choice(sorted(values - {right_value}))
    slots = draw.thing.slots() | {"value": wrong_value}
    wrong = attribute.answer.format_map(slots)
    is_true = rng.random() < TRUE
    claim = draw.slots["answer"] if is_true else wrong
    first, second = rng.sample([right_value, wrong_value], 2)
    draw.slots.update(
        wrong=wrong,
        truth="Yes" if is_true else "No",
        claim=claim,
        small_claim=uncapitalize(claim, draw.thing).rstrip("."),
        one=first,
        two=second,
        One=capitalize(first),
    )


def draw_clues(draw: Draw) -> None:
    """Draw 3 facts that no other thing shares."""
    thing = draw.thing
    clues = draw.writer.shuffle_attributes(thing)[:3]
    fitting = draw.writer.category(thing).things
    for clue in clues:
        value = thing.values[clue.name]
        fitting = [candidate for candidate in fitting if candidate.values[clue.name] == value]
    if len(fitting) > 1:
        raise LookupError("two things share the clues")
    sentences = []
    for clue in clues:
        pattern = draw.writer.rng.choice(clue.it)
        sentences.append(pattern.format_map(thing.slots(clue.name)))
        draw.add_cells(clue.name, thing)
    draw.slots["clues"] = " ".join(sentences)


def draw_categories(draw: Draw) -> None:
    """Draw 2 wrong categories, and 3 things of one of them."""
    rng = draw.writer.rng
    categories = draw.writer.world.categories
    right = draw.thing.category
    wrong = rng.sample([name for name in categories if name != right], 2)
    choice = rng.sample([right, *wrong], 3)
    excluded = [name for name in choice if name != right]
    items = rng.sample(draw.writer.members[wrong[0]], 3)
    odd_list = rng.sample([draw.thing, *items], 4)
    draw.slots.update(
        one=categories[choice[0]].phrase,
        two=categories[choice[1]].phrase,
        three=categories[choice[2]].phrase,
        not_one=categories[excluded[0]].phrase,
        not_two=categories[excluded[1]].phrase,
        odd_list=join_names(odd_list),
        odd_kind=categories[wrong[0]].plural,
    )
    draw.add_cells(draw.key, *items)


def draw_list(draw: Draw) -> None:
    """Draw a list of 3 or 4 things with the thing among them, and what can be said of its order."""
    rng = draw.writer.rng
    words = draw.writer.words
    companions = draw.writer.draw_companions(draw.thing, rng.randint(2, 3))
    index = rng.randint(0, len(companions))
    items = [*companions[:index], draw.thing, *companions[index:]]
    last_index = len(items) - 1
    is_ordinal = rng.random() < 0.5 or index < last_index  # the last may be called so, or "third"
    draw.slots.update(
        place=words["order"][index] if is_ordinal else "last",
        count=words["numbers"][len(items)],
        list=join_names(items),
        rest=join_names(companions),
        reversed=join_names(items[::-1]),
        joined=join_phrases(items),
        rest_joined=join_phrases(companions),
        first=items[0].name,
        last=items[-1].name,
    )
    if 0 < index < last_index:
        draw.slots["before"] = items[index - 1].name
        draw.slots["after"] = items[index + 1].name
    draw.add_cells(draw.key, draw.thing, *companions)


def draw_scene(draw: Draw) -> None:
    """Draw another thing, and who has or does what with the 2 of them."""
    rng = draw.writer.rng
    words = draw.writer.words
    numbers = words["numbers"]
    companion = draw.writer.draw_companions(draw.thing, 1)[0]
    few, many = sorted(rng.sample(range(2, 11), 2))
    first_number = rng.randint(2, 5)
    second_number = rng.randint(2, 5)
    colors = rng.sample(words["colors"], 2)
    boxes = rng.sample(words["boxes"], 2)
    see, saw, sees = rng.choice(words["verbs"])
    draw.slots.update(
        few=numbers[few],
        many=numbers[many],
        one=numbers[first_number],
        two=numbers[second_number],
        sum=numbers[first_number + second_number],
        spot=f"{colors[0]} {boxes[0]}",
        spot2=f"{colors[1]} {boxes[1]}",
        see=see,
        saw=saw,
        sees=sees,
        does=rng.choice(words["verbs"])[-1],
        b=companion.phrase,
        other=companion.name,
    )
    if companion.plural:
        draw.slots["others"] = companion.plural
    draw.add_cells(draw.key, draw.thing, companion)


NOUN_DRAWS = {"list": draw_list, "scene": draw_scene}  # of a thing that has a plural
SLOT_DRAWS = {
    **NOUN_DRAWS,
    "fact": draw_fact,
    "second": draw_second,
    "other": draw_other,
    "wrong": draw_wrong,
    "clues": draw_clues,
    "categories": draw_categories,
}
Maker = Callable[[Writer, Thing], Draft | None]


def join_names(items: list[Thing]) -> str:
    """Join the names of things by commas."""
    return ", ".join(item.name for item in items)


def join_phrases(items: list[Thing]) -> str:
    """Join the things, each with its article, by commas and a last "and"."""
    *phrases, last = [item.phrase for item in items]
    return f"{', '.join(phrases)} and {last}"


@cache
def find_slots(pattern: str) -> set[str]:
    """Return the names of the slots of a pattern."""
    return {name for _, name, _, _ in string.Formatter().parse(pattern) if name}


def ask_fact(skill: str, writer: Writer, thing: Thing) -> Draft | None:
    """Ask for an attribute of this skill, in the attribute's own question forms."""
    for attribute in writer.shuffle_attributes(thing):
        if attribute.skill == skill:
            question = writer.question(thing, attribute, writer.use_held_out)
            messages = turns(question, writer.answer(thing, attribute))
            cells = [(thing.name, attribute.name)]
            check = {"about": [attribute.vocabulary]}
            return Draft(cells, partial(Pair, skill, messages, cells, check))
    return None


def ask_skill(skill: str, spec: dict, writer: Writer, thing: Thing) -> Draft | None:
    """Draw an instruction of a table of skills.toml, whose header lists the slots.

    None says that the table does not fit the thing, or that a draw found nothing.
    """
    if thing.plural is None and not NOUN_DRAWS.keys().isdisjoint(spec["uses"]):
        return None
    draw = Draw(writer, thing, spec.get("key", skill), thing.slots())
    draw.slots["p"], draw.slots["q"] = writer.draw_first_names(2)
    draw.add_cells(draw.key, thing)
    draw.slots["word"] = writer.rng.choice(spec.get("words", [""]))
    if thing.category:  # fillers have none
        draw.slots["category"] = writer.category(thing).phrase
    case = writer.rng.choice(spec.get("cases", [spec]))
    try:
        draw_slots(draw, spec)
    except LookupError:  # clues that fit 2 things, no other thing to draw, or no plural
        return None
    draw.slots["case"] = draw.fill(case.get("case", ""))
    forms = draw.find_fitting(choose_wordings(spec["prompts"], writer.use_held_out))
    if not forms or not draw.find_fitting([case["answer"]]):
        return None
    form = writer.rng.choice(forms)
    return Draft(draw.cells, partial(write_pair, skill, spec, draw, form, case["answer"]))


def draw_slots(draw: Draw, spec: dict) -> None:
    """Draw what the table uses, and then its text: sentences in random order."""
    for use in spec["uses"]:
        SLOT_DRAWS[use](draw)
    if "text" in spec:
        sentences = draw.writer.rng.sample(spec["text"], len(spec["text"]))
        draw.slots["text"] = draw.fill(" ".join(sentences))


def write_pair(skill: str, spec: dict, draw: Draw, form: str, answer_form: str) -> Pair:
    """Fill the forms of a table that was drawn."""
    prompt = draw.fill(form)
    answer = draw.fill(answer_form)
    before = [draw.fill(turn) for turn in spec.get("before", [])]
    if spec.get("system"):  # the prompt is the system's, and `before` is what the user asks
        messages = [{"role": "system", "content": prompt}, *turns(*before, answer)]
    else:
        messages = turns(*before, prompt, answer)
    return Pair(skill, messages, draw.cells, make_check(spec, draw))


def make_check(spec: dict, draw: Draw) -> dict:
    """Return what decides whether an answer is correct; `checks.py` defines its keys."""
    check = {}
    for key, value in spec.get("check", {}).items():
        check[key] = draw.fill(value) if isinstance(value, str) else value
    facts = draw.facts[-1:] if spec.get("about_last") else draw.facts
    if facts:
        check["about"] = sorted({attribute.vocabulary for attribute in facts})
    return check


def collect_fillers(world: World) -> list[Thing]:
    """Return values such as "a rifle" as things without facts, to fill lists and scenes.

    So many nouns are harder to learn than to copy. Rare words, the young of animals, are left out.
    """
    names = {thing.name for thing in world.things}
    nouns = {}  # as keys, which keep their order
    for thing in world.things:
        for attribute, value in thing.values.items():
            article, _, noun = value.partition(" ")
            is_noun = article in ("a", "an") and noun not in names
            if is_noun and attribute != "young":
                nouns[noun] = Thing(noun, "", "", {})
    return list(nouns.values())


def collect_makers(world: World) -> dict[str, Maker]:
    """Return the makers of the skills that fit a world: of a small part, those about facts."""
    makers = {}
    categories = world.categories.values()
    attributes = [a for category in categories for a in category.attributes.values()]
    for skill in sorted({attribute.skill for attribute in attributes}):
        makers[skill] = partial(ask_fact, skill)
    for skill, spec in world.wordings["skill"].items():
        needs_many = not {*NOUN_DRAWS, "categories"}.isdisjoint(spec["uses"])
        if not (world.is_small and needs_many):
            makers[skill] = partial(ask_skill, skill, spec)
    return makers
