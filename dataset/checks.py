"""What makes an answer correct.

An answer is correct if it ends, is not blank, does not loop, names the things of the reference and
no others, states the reference's facts and no others, and has the form that was asked for. Each
wrong answer gets one kind, the first of `KINDS` that applies.

A record to be checked is a conversation whose last message is the reference answer, with

    "check": {"about": ["animal.home"],      value lists that are compared with the reference
              "any": ["camel", "scorpion"],  any of these things is right (else the reference's)
              "exact": true,                 the words must be the reference's, in its order
              "begins": "Well,", "ends": "I am sure.", "contains": ["word"],
              "upper": true, "quoted": true, "words": 3, "lines": "1." or "-"}

All keys are optional. The names of things and the lists of values are the world's; a list can also
be given in full, as "about": {"mood": ["glad", "sad"]}.
"""

import re
from functools import cache

from dataset.world.facts import WORLD_DIR, World, read_world

KINDS = ("correct", "blank", "endless", "loop", "other thing", "wrong fact", "wrong form")
LOOP = re.compile(r"(.{4,}?)\1{2,}", re.DOTALL)  # 4 characters or more, 3 times in a row
ARTICLE = re.compile(r"^(a|an|the) ")
POLARITY = ("yes", "no", "not", "never", "cannot")


class Vocabulary:
    """Find the things of the world, and the values of its attributes, in a text.

    Args:
        names: for each thing, the phrases that name it.
        values: for each "category.attribute", its values.
    """

    def __init__(self, names: dict[str, list[str]], values: dict[str, list[str]]):
        phrases = {phrase.lower(): name for name, forms in names.items() for phrase in forms}
        self.names = Finder(phrases)
        self.values = {key: Finder(values_of(words)) for key, words in values.items()}


class Finder:
    """Find phrases in a text as whole words, the longest first, whatever their case."""

    def __init__(self, meaning: dict[str, str]):
        self.meaning = meaning
        longest_first = sorted(meaning, key=len, reverse=True)
        choice = "|".join(re.escape(phrase) for phrase in longest_first) or r"(?!)"
        self.pattern = re.compile(rf"(?<![a-z0-9])(?:{choice})(?![a-z0-9])")

    def find(self, text: str) -> list[str]:
        """Return the meanings of the phrases in the order of the text, repeats left out."""
        found = [self.meaning[match] for match in self.pattern.findall(text.lower())]
        return list(dict.fromkeys(found))

    def phrases_of(self, meanings: list[str]) -> "Finder":
        """Return a finder of the phrases with these meanings alone."""
        return Finder({p: meaning for p, meaning in self.meaning.items() if meaning in meanings})


def values_of(words: list[str]) -> dict[str, str]:
    """Map each value, without its article, to itself."""
    return {ARTICLE.sub("", word.lower()): word.lower() for word in words}


def make_vocabulary(*worlds: World) -> Vocabulary:
    """Collect the names and the values of some worlds."""
    names, values = {}, {"category": []}
    for world in worlds:
        names |= {t.name: [t.name] + ([t.plural] if t.plural else []) for t in world.things}
        values["category"] += world.categories
        for category in world.categories.values():
            for attribute in category.attributes.values():
                found = {thing.values[attribute.name] for thing in category.things}
                values[attribute.vocabulary] = sorted(found)
    return Vocabulary(names, values)


@cache
def world_vocabulary() -> Vocabulary:
    """Read the vocabulary of the world in `dataset/world/` once."""
    return make_vocabulary(read_world(), read_world(WORLD_DIR / "chinese"))


def judge_answer(
    answer: str, ended: bool, record: dict, vocabulary: Vocabulary | None = None
) -> str:
    """Return "correct" or the kind of mistake, one of `KINDS`.

    Args:
        answer: the text that the model wrote, without its end token.
        ended: whether the end token came within the limit of 96 tokens.
        record: a conversation that ends with the reference, and its check.
    """
    vocabulary = vocabulary or world_vocabulary()
    prompt, reference = (turn["content"] for turn in record["conversations"][-2:])
    check = record.get("check", {})
    if not answer.strip():
        return "blank"
    if not ended:
        return "endless"
    if LOOP.search(answer):
        return "loop"
    named, expected = vocabulary.names.find(answer), vocabulary.names.find(reference)
    if "any" in check:
        subject = [name for name in named if name in check["any"]]
        if len(subject) != 1 or set(named) - set(subject) - set(expected):
            return "other thing"
    elif set(named) != set(expected):
        return "other thing"
    if check.get("exact"):
        if split_words(answer) == split_words(reference):
            return "wrong form" if wrong_form(answer, check) else "correct"
        is_same = sorted(split_words(answer)) == sorted(split_words(reference))
        return "wrong form" if is_same else "wrong fact"
    subjects = vocabulary.names.phrases_of(record.get("things", []))
    facts = find_facts(answer, named, check, vocabulary, subjects)
    if facts != find_facts(reference, expected, check, vocabulary, subjects):
        return "wrong fact"
    is_echo = " ".join(split_words(prompt)) in " ".join(split_words(answer))
    return "wrong form" if is_echo or wrong_form(answer, check) else "correct"


def find_facts(
    text: str, named: list[str], check: dict, vocabulary: Vocabulary, subjects: Finder
) -> tuple:
    """Return what a text states: the values of each list, beside their things, and its polarity.

    The subjects' own names are left out: "heart failure" does not name the heart. With as many
    values as things, value and thing are paired in the order of the text: "a lion in grassland, a
    shark in the sea" differs from "a lion in the sea, a shark in grassland".
    """
    about, facts = check.get("about", []), []
    text = subjects.pattern.sub("_", text.lower())
    for key in about:
        finder = (
            Finder(values_of(about[key])) if isinstance(about, dict) else vocabulary.values[key]
        )
        values = finder.find(text)
        is_paired = len(values) == len(named) > 1
        facts.append(frozenset(zip(named, values, strict=True)) if is_paired else frozenset(values))
    words = set(split_words(text))
    return (*facts, frozenset(words.intersection(POLARITY)))


def split_words(text: str) -> list[str]:
    """Split into lower-case words and numbers; a character of Chinese counts as a word."""
    return re.findall(r"[a-z0-9']+|[^\x00-\x7f]", text.lower())


def wrong_form(answer: str, check: dict) -> bool:
    """Say whether an answer misses a form that was asked for."""
    text = answer.strip()
    letters = [letter for letter in text if letter.isalpha()]
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    marks = [f"{i}." if check.get("lines") == "1." else "-" for i in range(1, len(lines) + 1)]
    return not (
        text.startswith(check.get("begins", ""))
        and text.endswith(check.get("ends", ""))
        and all(word.lower() in text.lower() for word in check.get("contains", []))
        and (not check.get("upper") or all(letter.isupper() for letter in letters))
        and (not check.get("quoted") or (len(text) > 2 and text[0] == text[-1] == '"'))
        and len(split_words(text)) <= check.get("words", 10_000)
        and (
            "lines" not in check
            or all(line.startswith(mark) for line, mark in zip(lines, marks, strict=True))
        )
    )
