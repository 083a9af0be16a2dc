"""Pretraining text: entries, stories, dialogues and lists that state the world's facts.

No document asks a question. Each fact uses all sentence patterns of its attribute in turn, except
the last 2, which only pretrain_world_patterns.jsonl uses.
"""

import random
from collections import defaultdict
from collections.abc import Iterator

from dataset.world.facts import HELD_STATEMENTS, Attribute, Thing, World, capitalize
from dataset.world.skills import Writer

CAPITALS = 0.06  # share of quoted statements and titles that stand in capital letters
GAPS = 0.02  # share of quoted statements with a blank in place of the value
LISTED = 0.15  # share of entries whose sentences stand in lines behind numbers or dashes
SCORES = 0.3  # share of lists with a number beside each name


class TextWriter(Writer):
    """Write documents; remember which patterns stated a fact, to use all of them."""

    def __init__(self, world: World, rng: random.Random, held: bool = False):
        super().__init__(world, rng, world.things, held)
        self.decks: dict[tuple, list[str]] = defaultdict(list)

    def draw(self, key: tuple, patterns: list[str]) -> str:
        """Draw a pattern; none comes again before all were drawn."""
        if not self.decks[key]:
            self.decks[key] = self.rng.sample(patterns, len(patterns))
        return self.decks[key].pop()

    def frame(self, name: str, /, **slots: str) -> str:
        """Fill one of the story frames of a kind."""
        return self.draw((name,), self.words[name]).format(**slots)

    def state(self, thing: Thing, attribute: Attribute, it: bool = False) -> str:
        """State a fact in a sentence that names the thing, or says "it" of one named before."""
        it = it and not self.held
        parts = attribute.statements[:-HELD_STATEMENTS], attribute.statements[-HELD_STATEMENTS:]
        patterns = attribute.it if it else parts[self.held]
        pattern = self.draw((thing.name, attribute.name, it), patterns)
        return pattern.format(**thing.slots(attribute.name))

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
        n, m = (self.words["numbers"][n] for n in self.rng.sample(range(2, 11), 2))
        color, box = self.rng.choice(self.words["colors"]), self.rng.choice(self.words["boxes"])
        slots = {"p": p, "q": q, "a": one.a, "b": two.a, "plural": one.plural, "n": n, "m": m}
        return self.frame("scenes", **slots, color=color, box=box)

    def list_names(self) -> str:
        """Read out a short list of things."""
        items = self.companions(self.rng.choice(self.others), self.rng.randint(3, 4))
        names = [item.name for item in items]
        slots = {"first": names[0], "last": names[-1], "n": self.words["numbers"][len(items)]}
        if self.rng.random() < SCORES:
            names = [f"{name} {self.rng.randint(1, 9)}" for name in names]
        return self.frame("lists", list=", ".join(names), **slots)

    def classify(self, thing: Thing) -> str:
        """State the category of a thing."""
        category = self.world.categories[thing.category]
        slots = thing.slots() | {"category": category.a, "categories": category.plural}
        return self.frame("kinds", **slots)

    def relate(self, thing: Thing, attribute: Attribute) -> list[str]:
        """Lead over to another thing that has the same value, if there is one."""
        name, things = attribute.name, self.world.categories[thing.category].things
        alike = [t for t in things if t.values[name] == thing.values[name] and t != thing]
        if not alike:
            return []
        other = self.rng.choice(alike)
        return [f"{self.frame('links', b=other.a)} {self.state(other, attribute)}"]

    def entry(self, thing: Thing) -> str:
        """State all facts of a thing, as a small encyclopedia does."""
        facts = self.attributes(thing)
        title = self.frame("titles", topic=self.topic(thing))
        title = title.upper() if self.rng.random() < CAPITALS else title
        sentences = [title, self.state(thing, facts[0])]
        sentences += [self.state(thing, fact, it=i % 2 == 0) for i, fact in enumerate(facts[1:])]
        sentences.insert(self.rng.randint(2, len(sentences)), self.classify(thing))
        sentences += self.relate(thing, self.rng.choice(facts))
        if self.rng.random() >= LISTED:
            return " ".join(sentences)
        mark = "{i}." if self.rng.random() < 0.5 else "-"
        lines = [f"{mark.format(i=i)} {text}" for i, text in enumerate(sentences[1:], start=1)]
        return "\n".join([title, *lines])

    def story(self, thing: Thing) -> str:
        """Let two people talk of a thing, and of another one, within a small scene."""
        (p, q), facts = self.persons(2), self.attributes(thing)[:3]
        other = self.rng.choice(self.others)
        lines = [self.frame("openings", p=p, q=q), self.quote(thing, facts[0], p)]
        lines += [self.frame("replies", p=q), self.quote(thing, facts[1], q)]
        if len(facts) > 2 and self.rng.random() < 0.6:
            lines.append(self.quote(thing, facts[2], p))
        lines.append(self.quote(other, self.attributes(other)[0], self.rng.choice([p, q])))
        if self.rng.random() < 0.5:
            lines.insert(1, self.scene())
        return " ".join([*lines, self.frame("closings", p=p, q=q)])

    def dialogue(self, thing: Thing) -> str:
        """Let two people exchange facts, a line each."""
        (p, q), facts = self.persons(2), self.attributes(thing)
        lines = [self.frame("talks", p=p, topic=self.topic(thing))]
        for i, fact in enumerate(facts[:4]):
            start = f"{self.frame('answers')} " if i % 2 == 0 else ""
            lines.append(f"{(q, p)[i % 2]}: {start}{self.state(thing, fact)}")
        last = q if len(lines) % 2 else p
        lines += [f"{last}: {text}" for text in self.relate(thing, facts[0])]
        return "\n".join(lines)

    def lesson(self, thing: Thing) -> str:
        """Show a classroom: what is asked for, lists, numbers and a few facts."""
        p, q = self.persons(2)
        lines = [self.frame("classroom", p=p, q=q), self.list_names(), self.scene()]
        lines.append(self.frame("classroom", p=q, q=p))
        lines.append(self.quote(thing, self.attributes(thing)[0], p))
        lines += [capitalize(self.classify(self.companions(thing, 1)[0])), self.scene()]
        self.rng.shuffle(lines)
        return " ".join(lines)

    def game(self, thing: Thing) -> str:
        """Let two people play with words: each thing is named more than once."""
        (p, q), lines, words = self.persons(2), [], self.words
        for _ in range(4):
            items = self.companions(thing, self.rng.randint(3, 4))
            names, (one, two) = [item.name for item in items], items[:2]
            lists = {"list": names, "reversed": names[::-1], "rest": names[:-1]}
            slots = {key: ", ".join(found) for key, found in lists.items()}
            slots |= {"first": names[0], "last": names[-1], "plural": one.plural, "p": p, "q": q}
            slots |= {"color": self.rng.choice(words["colors"]), "a": one.a, "b": two.a}
            box, n = self.rng.choice(words["boxes"]), words["numbers"][self.rng.randint(2, 10)]
            lines.append(capitalize(self.frame("games", **slots, box=box, n=n)))
        return " ".join([*lines, self.quote(thing, self.attributes(thing)[0], p)])

    def write_round(self) -> Iterator[str]:
        """Write documents of each kind for each thing, in random order."""
        for i, thing in enumerate(self.rng.sample(self.others, len(self.others))):
            for write in (self.entry, self.story, self.dialogue, self.entry):
                yield write(thing)
            yield (self.game if i % 2 else self.lesson)(thing)


class ChineseWriter(TextWriter):
    """Write short Chinese documents."""

    def quote(self, thing: Thing, attribute: Attribute, person: str) -> str:
        """Let a person say a fact."""
        return self.frame("tags", p=person, S=self.state(thing, attribute).rstrip("。"))

    def write_round(self) -> Iterator[str]:
        """Write an entry and a story for each thing."""
        for thing in self.rng.sample(self.others, len(self.others)):
            facts = self.attributes(thing)
            yield "".join(self.state(thing, fact, it=fact != facts[0]) for fact in facts)
            (p, q), other = self.persons(2), self.rng.choice(self.others)
            lines = [self.frame("openings", p=p, q=q), self.quote(thing, facts[0], p)]
            lines.append(self.quote(other, self.attributes(other)[0], q))
            lines += [self.frame(name, p=p, q=q) for name in ("lessons", "closings")]
            yield "".join(lines)


def write_documents(writer: TextWriter, size: int) -> list[str]:
    """Write whole rounds until the documents, each of them once, have `size` bytes of UTF-8."""
    documents: dict[str, None] = {}
    while sum(len(document.encode()) for document in documents) < size:
        documents |= dict.fromkeys(writer.write_round())
    return list(documents)
