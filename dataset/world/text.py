"""Pretraining text: entries, stories, dialogues and lists that state the world's facts.

No document asks a question. Each fact uses all sentence patterns of its attribute in turn, except
the last 2, which only pretrain_world_patterns.jsonl uses.

All draws come from one generator. Whoever changes their order changes every file that follows.
"""

import random
from collections import defaultdict
from collections.abc import Iterator

from dataset.world.facts import HELD_STATEMENTS, Attribute, Thing, World, capitalize
from dataset.world.skills import GAP, Writer, join_names

CAPITALS = 0.06  # share of quoted statements and titles that stand in capital letters
GAPS = 0.02  # share of quoted statements with a blank in place of the value
LISTED = 0.15  # share of entries whose sentences stand in lines behind numbers or dashes
SCORES = 0.3  # share of lists with a number beside each name
THIRD_FACT = 0.6  # share of stories that state a third fact of their thing
SCENES = 0.5  # share of stories with a scene
DIALOGUE_FACTS = 4  # at most
GAME_ROUNDS = 4


class TextWriter(Writer):
    """Write documents; remember which patterns stated a fact, to use all of them."""

    def __init__(self, world: World, rng: random.Random, use_held_out: bool = False) -> None:
        super().__init__(world, rng, world.things, use_held_out)
        self.decks: dict[tuple, list[str]] = defaultdict(list)  # patterns that are still to come

    def draw(self, key: tuple, patterns: list[str]) -> str:
        """Draw a pattern; none comes again before all were drawn."""
        if not self.decks[key]:
            self.decks[key] = self.rng.sample(patterns, len(patterns))
        return self.decks[key].pop()

    def frame(self, name: str, /, **slots: str) -> str:
        """Fill one of the story frames of a kind."""
        return self.draw((name,), self.words[name]).format_map(slots)

    def state(self, thing: Thing, attribute: Attribute, it: bool = False) -> str:
        """State a fact in a sentence that names the thing, or says "it" of one named before."""
        says_it = it and not self.use_held_out
        if says_it:
            patterns = attribute.it
        elif self.use_held_out:
            patterns = attribute.statements[-HELD_STATEMENTS:]
        else:
            patterns = attribute.statements[:-HELD_STATEMENTS]
        pattern = self.draw((thing.name, attribute.name, says_it), patterns)
        return pattern.format_map(thing.slots(attribute.name))

    def state_any(self, thing: Thing, person: str) -> str:
        """Let a person say any fact of a thing."""
        return self.quote(thing, self.shuffle_attributes(thing)[0], person)

    def quote(self, thing: Thing, attribute: Attribute, person: str) -> str:
        """Let a person say a fact."""
        sentence = self.state(thing, attribute).rstrip(".")
        if self.rng.random() < CAPITALS:
            sentence = sentence.upper()
        elif self.rng.random() < GAPS:
            sentence = sentence.replace(thing.values[attribute.name], GAP)
        return self.frame("tags", p=person, S=sentence)

    def topic(self, thing: Thing) -> str:
        """Name a thing as the topic of a text: "the lion", "France"."""
        return thing.name if thing.plural is None else f"the {thing.name}"

    def scene(self) -> str:
        """Show two people with things, numbers or boxes."""
        first_person, second_person = self.draw_first_names(2)
        first, second = self.draw_companions(self.rng.choice(self.things), 2)
        numbers = self.rng.sample(range(2, 11), 2)
        return self.frame(
            "scenes",
            p=first_person,
            q=second_person,
            a=first.phrase,
            b=second.phrase,
            plural=first.plural,
            n=self.words["numbers"][numbers[0]],
            m=self.words["numbers"][numbers[1]],
            color=self.rng.choice(self.words["colors"]),
            box=self.rng.choice(self.words["boxes"]),
        )

    def list_names(self) -> str:
        """Read out a short list of things."""
        items = self.draw_companions(self.rng.choice(self.things), self.rng.randint(3, 4))
        names = [item.name for item in items]
        entries = names
        if self.rng.random() < SCORES:
            entries = [f"{name} {self.rng.randint(1, 9)}" for name in names]
        return self.frame(
            "lists",
            list=", ".join(entries),
            first=names[0],
            last=names[-1],
            n=self.words["numbers"][len(names)],
        )

    def classify(self, thing: Thing) -> str:
        """State the category of a thing."""
        category = self.category(thing)
        slots = thing.slots()
        slots["category"] = category.phrase
        slots["categories"] = category.plural
        return self.frame("kinds", **slots)

    def relate(self, thing: Thing, attribute: Attribute) -> list[str]:
        """Lead over to another thing that has the same value, if there is one."""
        value = thing.values[attribute.name]
        alike = [t for t in self.siblings(thing) if t.values[attribute.name] == value]
        if not alike:
            return []
        second = self.rng.choice(alike)
        link = self.frame("links", b=second.phrase)
        return [f"{link} {self.state(second, attribute)}"]

    def entry(self, thing: Thing) -> str:
        """State all facts of a thing, as a small encyclopedia does."""
        facts = self.shuffle_attributes(thing)
        title = self.frame("titles", topic=self.topic(thing))
        if self.rng.random() < CAPITALS:
            title = title.upper()
        sentences = [title, self.state(thing, facts[0])]
        for i, fact in enumerate(facts[1:]):
            sentences.append(self.state(thing, fact, it=i % 2 == 0))
        place = self.rng.randint(2, len(sentences))
        sentences.insert(place, self.classify(thing))
        sentences += self.relate(thing, self.rng.choice(facts))
        if self.rng.random() >= LISTED:
            return " ".join(sentences)
        is_numbered = self.rng.random() < 0.5
        lines = [title]
        for i, sentence in enumerate(sentences[1:], start=1):
            lines.append(f"{i}. {sentence}" if is_numbered else f"- {sentence}")
        return "\n".join(lines)

    def story(self, thing: Thing) -> str:
        """Let two people talk of a thing, and of another one, within a small scene."""
        first, second = self.draw_first_names(2)
        facts = self.shuffle_attributes(thing)[:3]
        new_thing = self.rng.choice(self.things)
        sentences = [
            self.frame("openings", p=first, q=second),
            self.quote(thing, facts[0], first),
            self.frame("replies", p=second),
            self.quote(thing, facts[1], second),
        ]
        if len(facts) > 2 and self.rng.random() < THIRD_FACT:
            sentences.append(self.quote(thing, facts[2], first))
        new_fact = self.shuffle_attributes(new_thing)[0]
        speaker = self.rng.choice([first, second])
        sentences.append(self.quote(new_thing, new_fact, speaker))
        if self.rng.random() < SCENES:
            sentences.insert(1, self.scene())
        sentences.append(self.frame("closings", p=first, q=second))
        return " ".join(sentences)

    def dialogue(self, thing: Thing) -> str:
        """Let two people exchange facts, a line each."""
        first, second = self.draw_first_names(2)
        facts = self.shuffle_attributes(thing)
        lines = [self.frame("talks", p=first, topic=self.topic(thing))]
        for i, fact in enumerate(facts[:DIALOGUE_FACTS]):
            is_reply = i % 2 == 0
            speaker = second if is_reply else first
            start = f"{self.frame('answers')} " if is_reply else ""
            lines.append(f"{speaker}: {start}{self.state(thing, fact)}")
        speaker = second if len(lines) % 2 else first
        for sentence in self.relate(thing, facts[0]):
            lines.append(f"{speaker}: {sentence}")
        return "\n".join(lines)

    def lesson(self, thing: Thing) -> str:
        """Show a classroom: what is asked for, lists, numbers and a few facts."""
        first, second = self.draw_first_names(2)
        lines = [
            self.frame("classroom", p=first, q=second),
            self.list_names(),
            self.scene(),
            self.frame("classroom", p=second, q=first),
            self.state_any(thing, first),
            capitalize(self.classify(self.draw_companions(thing, 1)[0])),
            self.scene(),
        ]
        self.rng.shuffle(lines)
        return " ".join(lines)

    def game(self, thing: Thing) -> str:
        """Let two people play with words: each thing is named more than once."""
        first, second = self.draw_first_names(2)
        lines = [self.play(thing, first, second) for _ in range(GAME_ROUNDS)]
        lines.append(self.state_any(thing, first))
        return " ".join(lines)

    def play(self, thing: Thing, first_person: str, second_person: str) -> str:
        """Play a round of a game with 3 or 4 things."""
        items = self.draw_companions(thing, self.rng.randint(3, 4))
        line = self.frame(
            "games",
            list=join_names(items),
            reversed=join_names(items[::-1]),
            rest=join_names(items[:-1]),
            first=items[0].name,
            last=items[-1].name,
            plural=items[0].plural,
            p=first_person,
            q=second_person,
            color=self.rng.choice(self.words["colors"]),
            a=items[0].phrase,
            b=items[1].phrase,
            box=self.rng.choice(self.words["boxes"]),
            n=self.words["numbers"][self.rng.randint(2, 10)],
        )
        return capitalize(line)

    def write_round(self) -> Iterator[str]:
        """Write documents of each kind for each thing, in random order."""
        things = self.rng.sample(self.things, len(self.things))
        for i, thing in enumerate(things):
            yield self.entry(thing)
            yield self.story(thing)
            yield self.dialogue(thing)
            yield self.entry(thing)
            yield self.game(thing) if i % 2 else self.lesson(thing)


class ChineseWriter(TextWriter):
    """Write short Chinese documents."""

    def quote(self, thing: Thing, attribute: Attribute, person: str) -> str:
        """Let a person say a fact."""
        sentence = self.state(thing, attribute).rstrip("。")
        return self.frame("tags", p=person, S=sentence)

    def write_round(self) -> Iterator[str]:
        """Write an entry and a story for each thing."""
        for thing in self.rng.sample(self.things, len(self.things)):
            first_fact, *facts = self.shuffle_attributes(thing)
            sentences = [self.state(thing, first_fact)]
            sentences += [self.state(thing, fact, it=True) for fact in facts]
            yield "".join(sentences)
            first, second = self.draw_first_names(2)
            new_thing = self.rng.choice(self.things)
            sentences = [
                self.frame("openings", p=first, q=second),
                self.quote(thing, first_fact, first),
                self.state_any(new_thing, second),
                self.frame("lessons", p=first, q=second),
                self.frame("closings", p=first, q=second),
            ]
            yield "".join(sentences)


def write_documents(writer: TextWriter, size: int) -> list[str]:
    """Write whole rounds until the documents, each of them once, have `size` bytes of UTF-8."""
    documents: dict[str, None] = {}  # as keys, which keep their order
    written = 0
    while written < size:
        for document in writer.write_round():
            if document not in documents:
                documents[document] = None
                written += len(document.encode())
    return list(documents)
