"""Pretraining text: statements of the world's facts, told in entries, stories, dialogues and lists.

No document asks a question. Each fact is told in all its sentence patterns in turn, except the last
2 of each attribute, which stand in the validation file of patterns alone.
"""

import random
from collections import defaultdict
from collections.abc import Iterator

from dataset.world.facts import HELD_STATEMENTS, Attribute, Thing, World, capitalize, with_article
from dataset.world.skills import COLORS, NUMBERS, PLACES, Writer

CAPITALS = 0.06  # share of quoted statements and titles that stand in capital letters
GAPS = 0.02  # share of quoted statements with a blank in place of the value
LISTED = 0.15  # share of entries whose sentences stand in lines behind numbers or dashes
SCORES = 0.3  # share of lists with a number beside each name


class TextWriter(Writer):
    """Write documents; remembers which patterns a fact was told in, to use all of them."""

    def __init__(self, world: World, rng: random.Random, held: bool = False):
        super().__init__(world, rng, world.things, held)
        self.decks: dict[tuple, list[str]] = defaultdict(list)
        self.sharing: dict[tuple[str, str, str], list[Thing]] = defaultdict(list)
        for thing in world.things:
            for name, value in thing.values.items():
                self.sharing[thing.category, name, value].append(thing)

    def draw(self, key: tuple, patterns: list[str]) -> str:
        """Draw a pattern; none comes again before all were drawn."""
        if not self.decks[key]:
            self.decks[key] = self.rng.sample(patterns, len(patterns))
        return self.decks[key].pop()

    def frame(self, name: str, /, **slots: str) -> str:
        """Fill one of the story frames of a kind."""
        frames = [f for f in self.world.stories[name]]
        return self.draw((name,), frames).format(**slots)

    def state(self, thing: Thing, attribute: Attribute) -> str:
        """State a fact in a sentence that names the thing."""
        cut = len(attribute.statements) - HELD_STATEMENTS
        patterns = attribute.statements[cut:] if self.held else attribute.statements[:cut]
        pattern = self.draw((thing.name, attribute.name), list(patterns))
        return pattern.format(**thing.slots(attribute.name))

    def state_it(self, thing: Thing, attribute: Attribute) -> str:
        """State a fact of a thing that was named before."""
        if self.held:
            return self.state(thing, attribute)
        pattern = self.draw((thing.name, attribute.name, "it"), list(attribute.it))
        return pattern.format(**thing.slots(attribute.name))

    def facts_of(self, thing: Thing) -> list[Attribute]:
        """Return all attributes of a thing in random order."""
        return self.attributes(thing, len(self.world.categories[thing.category].attributes))

    def quote(self, thing: Thing, attribute: Attribute, person: str) -> str:
        """Let a person say a fact."""
        sentence = self.state(thing, attribute).rstrip(".")
        if self.rng.random() < CAPITALS:
            sentence = sentence.upper()
        elif self.rng.random() < GAPS:
            sentence = sentence.replace(thing.values[attribute.name], "____")
        return self.frame("tags", p=person, S=sentence)

    def topic(self, thing: Thing) -> str:
        """Name a thing as the topic of a text: "the lion", "France"."""
        return thing.name if thing.plural is None else f"the {thing.name}"

    def scene(self) -> str:
        """Show two people with things, numbers or boxes."""
        (p, q), (one, two) = self.persons(2), self.companions(self.rng.choice(self.others), 2)
        n, m = (NUMBERS[n] for n in self.rng.sample(range(2, 11), 2))
        color, box = self.rng.choice(COLORS), self.rng.choice(PLACES)
        slots = {"p": p, "q": q, "a": one.a, "b": two.a, "plural": one.plural, "n": n, "m": m}
        return self.frame("scenes", **slots, color=color, box=box)

    def list_names(self) -> str:
        """Read out a short list of things."""
        items = self.companions(self.rng.choice(self.others), self.rng.randint(3, 4))
        names = [item.name for item in items]
        slots = {"first": names[0], "last": names[-1], "n": NUMBERS[len(items)]}
        if self.rng.random() < SCORES:
            names = [f"{name} {self.rng.randint(1, 9)}" for name in names]
        return self.frame("lists", list=", ".join(names), **slots)

    def classify(self, thing: Thing) -> str:
        """State the category of a thing."""
        plural = self.world.categories[thing.category].plural
        slots = thing.slots() | {"category": with_article(thing.category), "categories": plural}
        return self.frame("kinds", **slots)

    def relate(self, thing: Thing, attribute: Attribute) -> str | None:
        """Lead over to another thing that has the same value, if there is one."""
        value = thing.values[attribute.name]
        others = [t for t in self.sharing[thing.category, attribute.name, value] if t != thing]
        if not others:
            return None
        other = self.rng.choice(others)
        return f"{self.frame('links', b=other.a)} {self.state(other, attribute)}"

    def entry(self, thing: Thing) -> str:
        """Tell all facts of a thing, as a small encyclopedia does."""
        facts = self.facts_of(thing)
        title = self.frame("titles", topic=self.topic(thing))
        title = title.upper() if self.rng.random() < CAPITALS else title
        sentences = [title, self.state(thing, facts[0])]
        for i, fact in enumerate(facts[1:]):
            tell = self.state_it if i % 2 == 0 else self.state
            sentences.append(tell(thing, fact))
        sentences.insert(self.rng.randint(2, len(sentences)), self.classify(thing))
        last = self.rng.choice(facts)
        sentences += filter(None, [self.relate(thing, last)])
        if self.rng.random() < LISTED:
            numbered = self.rng.random() < 0.5
            marks = [f"{i}." if numbered else "-" for i in range(1, len(sentences))]
            lines = [f"{m} {s}" for m, s in zip(marks, sentences[1:], strict=True)]
            return "\n".join([title, *lines])
        return " ".join(sentences)

    def story(self, thing: Thing) -> str:
        """Let two people talk of a thing, and of another one, within a small scene."""
        p, q = self.persons(2)
        facts = self.facts_of(thing)[:3]
        other = self.rng.choice(self.others)
        lines = [self.frame("openings", p=p, q=q), self.quote(thing, facts[0], p)]
        lines += [self.frame("replies", p=q), self.quote(thing, facts[1], q)]
        if len(facts) > 2 and self.rng.random() < 0.6:
            lines.append(self.quote(thing, facts[2], p))
        lines.append(self.quote(other, self.facts_of(other)[0], self.rng.choice([p, q])))
        if self.rng.random() < 0.5:
            lines.insert(1, self.scene())
        return " ".join([*lines, self.frame("closings", p=p, q=q)])

    def dialogue(self, thing: Thing) -> str:
        """Let two people tell each other facts, a line each."""
        p, q = self.persons(2)
        facts = self.facts_of(thing)
        lines = [self.frame("talks", p=p, topic=self.topic(thing))]
        for i, fact in enumerate(facts[:4]):
            start = f"{self.frame('answers')} " if i % 2 == 0 else ""
            lines.append(f"{(q, p)[i % 2]}: {start}{self.state(thing, fact)}")
        other = self.relate(thing, facts[0])
        if other:
            lines.append(f"{(q, p)[len(lines) % 2 == 0]}: {other}")
        return "\n".join(lines)

    def lesson(self, thing: Thing) -> str:
        """Show a classroom: what is asked for, lists, numbers and a few facts."""
        p, q = self.persons(2)
        lines = [self.frame("classroom", p=p, q=q), self.list_names(), self.scene()]
        lines += [self.frame("classroom", p=q, q=p), self.quote(thing, self.facts_of(thing)[0], p)]
        other = self.companions(thing, 1)[0]
        lines += [capitalize(self.classify(other)), self.scene()]
        self.rng.shuffle(lines)
        return " ".join(lines)

    def write_round(self) -> Iterator[str]:
        """Write one document of each kind for each thing, in random order."""
        things = self.rng.sample(self.others, len(self.others))
        for thing in things:
            for write in (self.entry, self.story, self.dialogue, self.lesson):
                yield write(thing)


class ChineseWriter(TextWriter):
    """Write short Chinese documents."""

    def write_round(self) -> Iterator[str]:
        """Write an entry and a story for each thing."""
        for thing in self.rng.sample(self.others, len(self.others)):
            facts = self.facts_of(thing)
            yield self.state(thing, facts[0]) + "".join(self.state_it(thing, f) for f in facts[1:])
            p, q = self.persons(2)
            other = self.rng.choice(self.others)
            lines = [
                self.frame("openings", p=p, q=q),
                self.frame("tags", p=p, S=self.state(thing, facts[0]).rstrip("。")),
                self.frame("tags", p=q, S=self.state(other, self.facts_of(other)[0]).rstrip("。")),
                self.frame("lessons", p=p, q=q),
                self.frame("closings", p=p, q=q),
            ]
            yield "".join(lines)


def write_documents(writer: TextWriter, size: int) -> list[str]:
    """Write whole rounds until the documents, each of them once, have `size` bytes of UTF-8."""
    documents: dict[str, None] = {}
    while sum(len(document.encode()) for document in documents) < size:
        documents |= dict.fromkeys(writer.write_round())
    return list(documents)
