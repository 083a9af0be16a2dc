"""What makes an answer correct.

An answer is correct if it ends, is not blank, does not loop, names the things of the reference and
no others, states the reference's facts and none that is false, and has the form that was asked for.
Each wrong answer gets one kind, the first of `KINDS` that applies.

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
from dataclasses import dataclass
from functools import cache

from dataset.world.facts import WORLD_DIR, World, read_world

KINDS = ("correct", "blank", "endless", "loop", "other thing", "wrong fact", "wrong form")
LOOP = re.compile(r"(.{4,200}?)\1{2}", re.DOTALL | re.I)  # 4 to 200 characters, 3 times in a row
ARTICLE = re.compile(r"^(a|an|the) ")
POLARITY = ("yes", "no", "not", "never", "不", "没")
NOT = re.compile(r"cannot|[a-z]+n['’]t")
QUOTES = ('""', "''", "“”", "‘’")
MARKS = {"-": "[-–—]"}  # what begins a line; else its number


class Vocabulary:
    """Find the things of the world, and the values of its attributes, in a text.

    Args:
        names: for each thing, the phrases that name it.
        values: for each "category.attribute", its values.
        facts: for each thing, all its values.
    """

    def __init__(
        self,
        names: dict[str, list[str]],
        values: dict[str, list[str]],
        facts: dict[str, list[str]],
    ):
        phrases = {phrase.lower(): name for name, forms in names.items() for phrase in forms}
        self.names, self.facts = Finder(phrases), facts
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

    def blank(self, text: str, meanings: list[str]) -> str:
        """Return the text in lower case, with "_" for each phrase of these meanings."""

        def replace(match: re.Match) -> str:
            return "_" if self.meaning[match[0]] in meanings else match[0]

        return self.pattern.sub(replace, text.lower())


def values_of(words: list[str]) -> dict[str, str]:
    """Map each value, without its article, to itself."""
    return {ARTICLE.sub("", word.lower()): word.lower() for word in words}


def make_vocabulary(*worlds: World) -> Vocabulary:
    """Collect the names and the values of some worlds."""
    names, values, facts = {}, {"category": []}, {}
    for world in worlds:
        names |= {t.name: [t.name] + ([t.plural] if t.plural else []) for t in world.things}
        facts |= {t.name: [value.lower() for value in t.values.values()] for t in world.things}
        values["category"] += world.categories
        for category in world.categories.values():
            for attribute in category.attributes.values():
                found = {thing.values[attribute.name] for thing in category.things}
                values[attribute.vocabulary] = sorted(found)
    return Vocabulary(names, values, facts)


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
    right = read_text(reference, record, vocabulary)
    stated = right if answer == reference else read_text(answer, record, vocabulary)
    if "any" in check:
        subject = [name for name in stated.named if name in check["any"]]
        if len(subject) != 1 or set(stated.named) - set(subject) - set(right.named):
            return "other thing"
    elif stated.others != right.others or (right.subjects and stated.subjects != right.subjects):
        return "other thing"
    if check.get("exact"):
        if split_words(answer) == split_words(reference):
            return "wrong form" if wrong_form(answer, reference, check) else "correct"
        is_same = sorted(split_words(answer)) == sorted(split_words(reference))
        return "wrong form" if is_same else "wrong fact"
    if stated.facts != right.facts:
        return "wrong fact"
    if stated is not right and (
        find_strays(answer, record, vocabulary) - find_strays(reference, record, vocabulary)
    ):
        return "wrong fact"
    is_form_wrong = repeats_prompt(answer, prompt) or wrong_form(answer, reference, check)
    is_form_wrong |= "any" not in check and stated.subjects != right.subjects
    return "wrong form" if is_form_wrong else "correct"


@dataclass(frozen=True)
class Statement:
    """What a text names and states.

    Args:
        named: all things, in the order of the text.
        subjects: those that the record is about.
        others: things beside the subjects and outside the values: a hammer as the tool of a
            carpenter is a value.
        facts: the values of each list of the check, beside their things, and the polarity.
    """

    named: list[str]
    subjects: set[str]
    others: set[str]
    facts: tuple


def read_text(text: str, record: dict, vocabulary: Vocabulary) -> Statement:
    """Find out what an answer or a reference names and states.

    The subjects' own names hold no values: "heart failure" does not name the heart. With as many
    values as subjects, both are paired in the order of the text: "a lion in grassland, a shark in
    the sea" differs from "a lion in the sea, a shark in grassland".
    """
    things, about = record.get("things", []), record.get("check", {}).get("about", [])
    named = vocabulary.names.find(text)
    subjects = things or vocabulary.names.find(record["conversations"][-1]["content"])
    order = [name for name in named if name in subjects]
    rest = vocabulary.names.blank(text, things)
    facts, found = [], set()
    for key in about:
        is_list = isinstance(about, dict)
        finder = Finder(values_of(about[key])) if is_list else vocabulary.values[key]
        values = finder.find(rest)
        found.update(values)
        is_paired = len(values) == len(order) > 1
        facts.append(frozenset(zip(order, values, strict=True)) if is_paired else frozenset(values))
    words = frozenset(split_words(NOT.sub("not", rest))) & frozenset(POLARITY)
    others = set(named) - set(subjects) - set(vocabulary.names.find("\n".join(found)))
    return Statement(named, set(order), others, (*facts, words))


def find_strays(text: str, record: dict, vocabulary: Vocabulary) -> set[str]:
    """Return values of the category that are neither asked for nor true of the subjects."""
    things, about = record.get("things", []), record.get("check", {}).get("about", [])
    rest = vocabulary.names.blank(text, things)
    categories = {key.partition(".")[0] for key in about}
    found = {
        key: {ARTICLE.sub("", value) for value in finder.find(rest)}
        for key, finder in vocabulary.values.items()
        if key.partition(".")[0] in categories
    }
    subjects = things or vocabulary.names.find(record["conversations"][-1]["content"])
    true = {ARTICLE.sub("", fact) for name in subjects for fact in vocabulary.facts.get(name, ())}
    return set().union(*found.values()) - true.union(*(found.get(key, ()) for key in about))


def repeats_prompt(answer: str, prompt: str) -> bool:
    """Say whether the whole prompt stands in the answer."""
    words = " ".join(split_words(prompt))
    return bool(words) and f" {words} " in f" {' '.join(split_words(answer))} "


def split_words(text: str) -> list[str]:
    """Split into lower-case words and numbers; a character of Chinese counts as a word."""
    return re.findall(r"[a-z0-9']+|[^\x00-\x7f]", text.lower().replace("’", "'"))


def wrong_form(answer: str, reference: str, check: dict) -> bool:
    """Say whether an answer misses a form that was asked for; its commas and stops are free."""
    text = answer.strip()
    begins, ends = check.get("begins", "").rstrip(",.，。"), check.get("ends", "").rstrip(".!。")
    border = r"(?!\w)" if begins[-1:].isalnum() else ""
    letters = [letter for letter in text if letter.isalpha()]
    quoted = text.rstrip(".")
    lines, right_lines = (
        [line.strip() for line in whole.splitlines() if line.strip()] for whole in (text, reference)
    )
    mark = check.get("lines")
    marks = [MARKS.get(mark, rf"{i}[.)]") for i in range(1, len(lines) + 1)]
    return not (
        re.match(re.escape(begins) + border, text, re.I)
        and text.rstrip(" .!。").lower().endswith(ends.lower())
        and all(word.lower() in text.lower() for word in check.get("contains", []))
        and (not check.get("upper") or all(letter.isupper() for letter in letters))
        and (not check.get("quoted") or (len(quoted) > 2 and quoted[0] + quoted[-1] in QUOTES))
        and len(split_words(text)) <= check.get("words", 10_000)
        and (mark is None or len(lines) == len(right_lines))
        and (mark is None or all(map(re.match, marks, lines)))
    )
