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
from collections import defaultdict
from dataclasses import dataclass
from functools import cache, lru_cache

from dataset.world.facts import WORLD_DIR, World, read_world

KINDS = ("correct", "blank", "endless", "loop", "other thing", "wrong fact", "wrong form")
# 4 to 200 characters, 3 times in a row: (.{4,200}?)\1{2} in half the time, since it looks first
# whether 4 characters come again at all.
LOOP = re.compile(r"(.{4})(?=.{0,196}?\1)(.{0,196}?)\1\2\1\2", re.DOTALL | re.I)
ARTICLE = re.compile(r"^(a|an|the) ")
WORD = re.compile(r"[a-z0-9']+|[^\x00-\x7f]")  # a character of Chinese is a word
POLARITY = frozenset({"yes", "no", "not", "never", "不", "没"})
NOT = re.compile(r"cannot|[a-z]+n['’]t")
QUOTES = ('""', "''", "“”", "‘’")
DASH = "[-–—]"


class Finder:
    """Find phrases in a text as whole words, the longest first, whatever their case.

    Args:
        meaning: what each phrase, in lower case, stands for.
    """

    def __init__(self, meaning: dict[str, str]) -> None:
        self.meaning = meaning
        # One branch for each first letter: an engine that tries 600 phrases at each place in turn
        # takes 5 times as long. Within a branch the longest stands first.
        endings = defaultdict(list)
        for phrase in sorted(meaning, key=len, reverse=True):
            first_letter = phrase[:1]
            endings[first_letter].append(re.escape(phrase[1:]))
        branches = []
        for first_letter, ends in endings.items():
            choice = "|".join(ends)
            branches.append(f"{re.escape(first_letter)}(?:{choice})")
        choice = "|".join(branches) or r"(?!)"  # without phrases: what never matches
        self.pattern = re.compile(rf"(?<![a-z0-9])(?:{choice})(?![a-z0-9])")

    def find(self, text: str) -> list[str]:
        """Return the meanings of the phrases in the order of the text, repeats left out."""
        phrases = self.pattern.findall(text.lower())
        return list(dict.fromkeys(self.meaning[phrase] for phrase in phrases))

    def blank(self, text: str, meanings: list[str]) -> str:
        """Return the text in lower case, with "_" for each phrase of these meanings."""

        def replace(match: re.Match) -> str:
            return "_" if self.meaning[match[0]] in meanings else match[0]

        return self.pattern.sub(replace, text.lower())


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
    ) -> None:
        meaning = {}
        for name, phrases in names.items():
            meaning |= {phrase.lower(): name for phrase in phrases}
        self.names = Finder(meaning)
        self.values = {key: make_value_finder(words) for key, words in values.items()}
        self.facts = facts


def make_value_finder(values: list[str]) -> Finder:
    """Return a finder of values, which stand in a text with or without their article."""
    meaning = {}
    for value in values:
        meaning[drop_article(value.lower())] = value.lower()
    return Finder(meaning)


def drop_article(value: str) -> str:
    """Return a value without its article: "a cub" becomes "cub"."""
    return ARTICLE.sub("", value)


def make_vocabulary(*worlds: World) -> Vocabulary:
    """Collect the names and the values of some worlds."""
    names = {}
    facts = {}
    values = {"category": []}
    for world in worlds:
        for thing in world.things:
            names[thing.name] = [thing.name, thing.plural] if thing.plural else [thing.name]
            facts[thing.name] = [value.lower() for value in thing.values.values()]
        values["category"] += world.categories
        for category in world.categories.values():
            for attribute in category.attributes.values():
                distinct = {thing.values[attribute.name] for thing in category.things}
                values[attribute.vocabulary] = sorted(distinct)
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
        vocabulary: the world's names and values (those of `dataset/world/`).
    """
    check = record.get("check", {})
    prompt, reference = [message["content"] for message in record["conversations"][-2:]]
    if not answer.strip():
        return "blank"
    if not ended:
        return "endless"
    if is_loop(answer):
        return "loop"
    # The reference states what it states. With "any" its things are not those that are compared.
    if answer != reference or "any" in check:
        mistake = find_wrong_content(answer, record, vocabulary or world_vocabulary())
        if mistake:
            return mistake
    # Exact words are often the prompt's own: "Say the word lion".
    if not check.get("exact") and repeats_prompt(answer, prompt):
        return "wrong form"
    return "wrong form" if misses_form(answer, reference, check) else "correct"


@lru_cache(100_000)  # while the world is written, many references come again
def is_loop(text: str) -> bool:
    """Say whether a text repeats itself 3 times in a row."""
    return LOOP.search(text) is not None


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
    facts: list[frozenset]


def find_wrong_content(answer: str, record: dict, vocabulary: Vocabulary) -> str | None:
    """Return the kind of mistake in what an answer names and states; None if there is none."""
    check = record.get("check", {})
    reference = record["conversations"][-1]["content"]
    right = read_text(reference, record, vocabulary)
    stated = read_text(answer, record, vocabulary)
    if names_wrong_things(stated, right, check):
        return "other thing"
    if check.get("exact"):
        return compare_words(answer, reference)
    if stated.facts != right.facts:
        return "wrong fact"
    # What the reference itself adds, true or not, is no mistake.
    strays = find_strays(answer, record, vocabulary) - find_strays(reference, record, vocabulary)
    if strays:
        return "wrong fact"
    if "any" not in check and stated.subjects != right.subjects:
        return "wrong form"  # a sentence, where the reference is a bare value
    return None


def names_wrong_things(stated: Statement, right: Statement, check: dict) -> bool:
    """Say whether an answer lacks a thing that it should name, or names another.

    A reference that names no subject, such as a bare value, leaves it free.
    """
    if "any" in check:
        chosen = set(stated.named).intersection(check["any"])
        allowed = chosen.union(right.named)
        return len(chosen) != 1 or not allowed.issuperset(stated.named)
    if right.subjects and stated.subjects != right.subjects:
        return True
    return stated.others != right.others


def compare_words(answer: str, reference: str) -> str | None:
    """Return the kind of mistake where the words must be the reference's, in its order."""
    words = split_words(answer)
    right_words = split_words(reference)
    if words == right_words:
        return None
    return "wrong form" if sorted(words) == sorted(right_words) else "wrong fact"


def find_subjects(record: dict, vocabulary: Vocabulary) -> list[str]:
    """Return the things that a record is about.

    A prompt written by hand lists none, so those that its reference names count.
    """
    reference = record["conversations"][-1]["content"]
    return record.get("things") or vocabulary.names.find(reference)


def read_text(text: str, record: dict, vocabulary: Vocabulary) -> Statement:
    """Find out what an answer or a reference names and states.

    The subjects' own names hold no values: "heart failure" does not name the heart. With as many
    values as subjects, both are paired in the order of the text: "a lion in grassland, a shark in
    the sea" differs from "a lion in the sea, a shark in grassland".
    """
    about = record.get("check", {}).get("about", [])
    subjects = find_subjects(record, vocabulary)
    named = vocabulary.names.find(text)
    named_subjects = [name for name in named if name in subjects]
    blanked = vocabulary.names.blank(text, record.get("things", []))
    facts = []
    all_values = set()
    for key in about:
        is_given = isinstance(about, dict)
        finder = make_value_finder(about[key]) if is_given else vocabulary.values[key]
        values = finder.find(blanked)
        all_values.update(values)
        if len(values) == len(named_subjects) > 1:
            values = zip(named_subjects, values, strict=True)
        facts.append(frozenset(values))
    words = split_words(NOT.sub("not", blanked))
    facts.append(POLARITY.intersection(words))
    named_in_values = vocabulary.names.find("\n".join(all_values))
    others = set(named).difference(subjects, named_in_values)
    return Statement(named, set(named_subjects), others, facts)


def find_strays(text: str, record: dict, vocabulary: Vocabulary) -> set[str]:
    """Return values of the category that are neither asked for nor true of the subjects."""
    about = record.get("check", {}).get("about", [])
    blanked = vocabulary.names.blank(text, record.get("things", []))
    allowed = set()
    for name in find_subjects(record, vocabulary):
        allowed.update(vocabulary.facts.get(name, ()))
    categories = {key.partition(".")[0] for key in about}
    stated = set()
    for key, finder in vocabulary.values.items():
        category, _, _ = key.partition(".")
        if category in categories:
            values = allowed if key in about else stated
            values.update(finder.find(blanked))
    allowed = {drop_article(value) for value in allowed}
    return {drop_article(value) for value in stated} - allowed


def repeats_prompt(answer: str, prompt: str) -> bool:
    """Say whether the whole prompt stands in the answer."""
    prompt_words = " ".join(split_words(prompt))
    answer_words = " ".join(split_words(answer))
    return bool(prompt_words) and f" {prompt_words} " in f" {answer_words} "


def split_words(text: str) -> list[str]:
    """Split into lower-case words and numbers; a character of Chinese counts as a word."""
    return WORD.findall(text.lower().replace("’", "'"))


def misses_form(answer: str, reference: str, check: dict) -> bool:
    """Say whether an answer misses a form that was asked for; its commas and stops are free."""
    text = answer.strip()
    if "begins" in check and not begins_with(text, check["begins"]):
        return True
    if "ends" in check and not ends_with(text, check["ends"]):
        return True
    for word in check.get("contains", []):
        if word.lower() not in text.lower():
            return True
    if check.get("upper") and not is_upper(text):
        return True
    if check.get("quoted") and not is_quoted(text):
        return True
    if "words" in check and len(split_words(text)) > check["words"]:
        return True
    mark = check.get("lines")
    return mark is not None and not has_lines(text, reference, mark)


def begins_with(text: str, start: str) -> bool:
    """Say whether a text begins with these words; "Wellington" does not begin with "Well"."""
    start = start.rstrip(",.，。")
    head = text[: len(start)]
    tail = text[len(start) :]
    is_cut = start[-1:].isalnum() and re.match(r"\w", tail)
    return head.lower() == start.lower() and not is_cut


def ends_with(text: str, end: str) -> bool:
    """Say whether a text ends with these words."""
    end = end.rstrip(".!。").lower()
    return text.rstrip(" .!。").lower().endswith(end)


def is_upper(text: str) -> bool:
    """Say whether all letters of a text are capitals; "A1." is so, and so is "1."."""
    return all(letter.isupper() for letter in text if letter.isalpha())


def is_quoted(text: str) -> bool:
    """Say whether a text, but for a last full stop, stands in quotation marks."""
    quoted = text.rstrip(".")
    return len(quoted) > 2 and quoted[0] + quoted[-1] in QUOTES


def has_lines(text: str, reference: str, mark: str) -> bool:
    """Say whether a text has as many lines as the reference, each behind a dash or its number."""
    lines = split_lines(text)
    if len(lines) != len(split_lines(reference)):
        return False
    for number, line in enumerate(lines, start=1):
        start = DASH if mark == "-" else rf"{number}[.)]"
        if not re.match(start, line):
            return False
    return True


def split_lines(text: str) -> list[str]:
    """Return the lines of a text that are not blank."""
    lines = [line.strip() for line in text.splitlines()]
    return [line for line in lines if line]
