"""Measures of what a model wrote, without a judge model.

Degeneration (blank, runaway, loop, repeated n-grams, diversity, compression), content-word recall,
and checkable instructions in IFEval's style. Every definition is here and only here; what needs a
model's likelihood is in likelihood.py, intervals are in intervals.py. Tokens are whatever the
caller passes (token ids in `eval_llm.py`); text is split by `split_words`, where each Chinese or
Japanese character counts as one word.

    python -m pytest tests/test_metrics.py
"""

import gzip
import json
import math
import re
from collections.abc import Hashable, Iterable, Sequence
from functools import lru_cache

CJK = r"\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff"
HALF_CHARACTER = "\ufffd"  # what decoding shows for bytes that are no whole character
CJK_CHARACTER = re.compile(f"[{CJK}]")
LETTER = rf"[^\W_{CJK}]"  # a letter or digit of a script that separates its words
WORD = re.compile(rf"[{CJK}]|{LETTER}+(?:['’-]{LETTER}+)*")
WORD_OR_MARK = re.compile(rf"{WORD.pattern}|\S")
ONE_WORD = re.compile(rf"\W*(?:[{CJK}]+|{LETTER}+(?:['’-]{LETTER}+)*)\W*")
BULLET = re.compile(r"\s*[-*•]\s+\S")
NUMBERED = re.compile(r"\s*(\d{1,6})[.)]\s+\S")
SENTENCE_END = re.compile(r"(?<=[.!?])\s+|(?<=[。！？])\s*|\s*\n\s*")
LIST_COMMA = re.compile(r"[,，、]")
FENCE = re.compile(r"\s*```(?:json)?\s*\n(.*?)\n?\s*```\s*", re.DOTALL | re.IGNORECASE)
MAX_ENTRY_WORDS = 5  # longer than this, a comma-separated entry is a clause of a sentence

STOP_TEXT = (
    "a about after all also an and any are as at be because been but by can could did do does for "
    "from had has have he her his how i if in into is it its may me more most my no not of on one "
    "or other our she should so some such than that the their them then there these they this to "
    "up us was we were what when which who will with would you your "
    "的 了 是 在 和 与 也 有 就 不 这 那 我 你 他 她 它 们 一 个 及 或 等 被 把 对 为 以"
)
STOP_WORDS = frozenset(STOP_TEXT.split())

LIST_KEYS = ("contains", "contains_any", "excludes")
TEXT_KEYS = ("starts_with", "ends_with", "equals")
COUNT_KEYS = ("min_words", "max_words", "items")
CHECK_KEYS = (*LIST_KEYS, *TEXT_KEYS, *COUNT_KEYS, "format")
FORMATS = (
    "bullets",
    "numbered",
    "comma",
    "uppercase",
    "lowercase",
    "one_sentence",
    "one_word",
    "json",
)


# ---------------------------------------------------------------------------- degenerate outputs


def split_words(text: str) -> list[str]:
    """Words of `text`: letters and digits with inner ' or -, and every CJK character by itself."""
    return WORD.findall(text)


def has_cjk(text: str) -> bool:
    """True if `text` holds a Chinese or Japanese character: what calls for a translation here."""
    return CJK_CHARACTER.search(text) is not None


def is_blank(text: str) -> bool:
    """True if `text`, the output before the end token, holds nothing but white space."""
    return not text.strip()


def is_runaway(stopped: bool) -> bool:
    """True if generation met its length limit without the model producing its end token."""
    return not stopped


def find_loop(text: str, min_tokens: int = 2, min_repeats: int = 3) -> tuple[int, int] | None:
    """Character span of the loop that `text` ends in, or None.

    A loop is a phrase of at least `min_tokens` tokens that stands at least `min_repeats` times in a
    row at the very end, that is: the last `min_repeats * p` tokens have period p. Tokens are words
    and single punctuation marks, compared exactly. The shortest period is taken, and the span
    reaches back as far as that period holds. The last token may be cut short, as the length limit
    cuts it: it need only begin what the period asks for; half of a character is left out. A list
    that counts up while it repeats is not a loop.
    After the "repetition loops" of Holtzman et al. 2020, arXiv 1904.09751.
    """
    matches = list(WORD_OR_MARK.finditer(text.rstrip(HALF_CHARACTER)))
    tokens = [match.group() for match in matches]
    for period in range(min_tokens, len(tokens) // min_repeats + 1):
        if not tokens[-1 - period].startswith(tokens[-1]):
            continue
        start = len(tokens) - 1 - period
        while start > 0 and tokens[start - 1] == tokens[start - 1 + period]:
            start -= 1
        if len(tokens) - start >= min_repeats * period:
            return matches[start].start(), matches[-1].end()
    return None


def is_loop(text: str) -> bool:
    """True if `text` ends in a loop as `find_loop` defines it."""
    return find_loop(text) is not None


def ngrams(tokens: Sequence[Hashable], n: int) -> list[tuple[Hashable, ...]]:
    """All n-grams of `tokens` in order; none if there are fewer than n tokens."""
    return [tuple(tokens[i : i + n]) for i in range(len(tokens) - n + 1)]


def seq_rep_n(tokens: Sequence[Hashable], n: int = 4) -> float | None:
    """Share of repeated n-grams: 1 - (unique n-grams) / (all n-grams); None below n tokens.

    Welleck et al. 2020, arXiv 1908.04319 (seq-rep-4).
    """
    grams = ngrams(tokens, n)
    return 1 - len(set(grams)) / len(grams) if grams else None


def diversity(tokens: Sequence[Hashable]) -> float | None:
    """Product over n = 2, 3, 4 of (1 - rep-n), rep-n as in `seq_rep_n`: 1 where nothing repeats.

    None below four tokens: an answer too short to repeat itself is not a diverse one.
    Su et al. 2022, arXiv 2202.06417.
    """
    repeated = [seq_rep_n(tokens, n) for n in (2, 3, 4)]
    return None if None in repeated else math.prod(1 - share for share in repeated)


def equal_slices(outputs: Iterable[Sequence], size: int, budget: int) -> list[Sequence]:
    """The first `size` tokens or characters of each output, until they are `budget` together.

    None counts for more than another, and a verbose model is not measured on fewer prompts than a
    terse one, save where answers are shorter than `size`. The last slice may be cut; empty if all
    outputs together fall short of the budget: less text would look more diverse.
    """
    slices: list[Sequence] = []
    left = budget
    for output in outputs:
        slices.append(output[: min(size, left)])
        left -= len(slices[-1])
        if left == 0:
            return slices
    return []


def distinct_n(outputs: Iterable[Sequence[Hashable]], n: int) -> float | None:
    """Unique over all n-grams of `outputs`; None if there are none.

    Li et al. 2016, arXiv 1510.03055 (distinct-1, distinct-2). The ratio falls as text gets longer:
    pass `equal_slices`. No n-gram spans two outputs.
    """
    grams = [gram for tokens in outputs for gram in ngrams(tokens, n)]
    return len(set(grams)) / len(grams) if grams else None


def compression_ratio(text: str) -> float:
    """Bytes of `text` (UTF-8) over those after gzip: higher if repetitive, 0 if empty.

    Shaib et al. 2024, arXiv 2403.00553. gzip's 18-byte frame weighs on short text, and long text
    is packed better: pass `equal_slices` of all outputs, joined.
    """
    raw = text.encode()
    return len(raw) / len(gzip.compress(raw, mtime=0))


def content_recall(answer: str, reference: str) -> float | None:
    """Share of the reference's distinct content words that the answer has; None if it has none.

    |C(answer) & C(reference)| / |C(reference)|, C(t) = lower-cased words of t without `STOP_WORDS`:
    unigram recall as in ROUGE-1 (Lin 2004, aclanthology.org/W04-1013), counting a word once.
    """
    wanted = {word.casefold() for word in split_words(reference)} - STOP_WORDS
    found = {word.casefold() for word in split_words(answer)}
    return len(wanted & found) / len(wanted) if wanted else None


# -------------------------------------------------------------------------- checkable instructions


def is_list_of_texts(value: object) -> bool:
    """True for a list, not empty, of strings that are not blank."""
    return (
        isinstance(value, list)
        and len(value) > 0
        and all(isinstance(item, str) and item.strip() for item in value)
    )


def validate_check(check: dict) -> None:
    """Raises ValueError, naming the key, if `check` is not one that `check_answer` understands."""
    if not isinstance(check, dict) or not check:
        raise ValueError(f"a check is an object with at least one of {', '.join(CHECK_KEYS)}")
    for key, value in check.items():
        if key not in CHECK_KEYS:
            raise ValueError(f"unknown check key {key!r}; known: {', '.join(CHECK_KEYS)}")
        if key in LIST_KEYS and not is_list_of_texts(value):
            raise ValueError(f"check key {key!r} takes a list of words or phrases, not {value!r}")
        if key in TEXT_KEYS and not is_list_of_texts([value]):
            raise ValueError(f"check key {key!r} takes a text, not {value!r}")
        if key in COUNT_KEYS and (type(value) is not int or value < 1):
            raise ValueError(f"check key {key!r} takes a whole number above 0, not {value!r}")
        if key == "format" and value not in FORMATS:
            raise ValueError(f"unknown check format {value!r}; known: {', '.join(FORMATS)}")


@lru_cache(maxsize=16_384)
def phrase_pattern(phrase: str) -> re.Pattern:
    """What finds `phrase` as whole words; case and the width of gaps do not matter."""
    phrase = phrase.strip()
    pattern = r"\s+".join(re.escape(word) for word in phrase.split())
    before = rf"(?<!{LETTER})" if re.match(LETTER, phrase[0]) else ""
    after = rf"(?!{LETTER})" if re.match(LETTER, phrase[-1]) else ""
    # Case is ignored in the phrase alone: for LETTER's ranges that would cost a millisecond.
    return re.compile(f"{before}(?i:{pattern}){after}")


def has_phrase(text: str, phrase: str) -> bool:
    """True if `phrase` is in `text` as whole words, in any case."""
    return phrase_pattern(phrase).search(text) is not None


def lines_of(text: str) -> list[str]:
    """The lines of `text` that are not blank."""
    return [line for line in text.splitlines() if line.strip()]


def comma_entries(text: str) -> list[str]:
    """The comma-separated entries of `text`, stripped."""
    return [entry.strip() for entry in LIST_COMMA.split(text.strip())]


def count_items(text: str, list_format: str | None) -> int:
    """Entries of a comma list, or the lines that start as a bullet or a number (of that format)."""
    if list_format == "comma":
        return len(comma_entries(text))
    starts = {"bullets": [BULLET], "numbered": [NUMBERED]}.get(list_format, [BULLET, NUMBERED])
    return sum(any(start.match(line) for start in starts) for line in lines_of(text))


def is_json(text: str) -> bool:
    """True if `text`, taken out of a ``` fence if it stands in one, is a JSON object or array."""
    fenced = FENCE.fullmatch(text)
    try:
        return isinstance(json.loads(fenced.group(1) if fenced else text), dict | list)
    except (ValueError, RecursionError):
        return False


def has_format(text: str, name: str) -> bool:
    """True if the whole of `text` has the format `name`.

    bullets, numbered: every line is an item, the numbers counting 1, 2, 3... comma: one line of two
    or more short entries. uppercase, lowercase: every cased letter. one_sentence: no sentence end
    (. ! ? before white space, 。！？, a line break) before the last character. one_word: one word
    or one unbroken run of CJK characters. json: an object or array.
    """
    lines = lines_of(text)
    if name == "bullets":
        return all(BULLET.match(line) for line in lines)
    if name == "numbered":
        numbers = [match and int(match.group(1)) for match in map(NUMBERED.match, lines)]
        return numbers == list(range(1, len(lines) + 1))
    if name == "comma":
        sizes = [len(split_words(entry)) for entry in comma_entries(text)]
        return len(lines) == 1 and len(sizes) > 1 and all(1 <= s <= MAX_ENTRY_WORDS for s in sizes)
    if name == "uppercase":
        return text.isupper()
    if name == "lowercase":
        return text.islower()
    if name == "one_sentence":
        return len([part for part in SENTENCE_END.split(text.strip()) if part]) == 1
    if name == "one_word":
        return ONE_WORD.fullmatch(text) is not None
    return is_json(text)


def holds(text: str, key: str, value, list_format: str | None) -> bool:
    """True if the one requirement `key`: `value` holds for `text`."""
    if key == "contains":
        return all(has_phrase(text, phrase) for phrase in value)
    if key == "contains_any":
        return any(has_phrase(text, phrase) for phrase in value)
    if key == "excludes":
        return not any(has_phrase(text, phrase) for phrase in value)
    if key == "starts_with":
        return text.strip().casefold().startswith(value.strip().casefold())
    if key == "ends_with":
        return text.strip().casefold().endswith(value.strip().casefold())
    if key == "equals":
        return text.strip() == value.strip()
    if key == "min_words":
        return len(split_words(text)) >= value
    if key == "max_words":
        return len(split_words(text)) <= value
    if key == "items":
        return count_items(text, list_format) == value
    return has_format(text, value)


def loose_variants(text: str) -> list[str]:
    """IFEval's eight readings: with or without the first line, the last line, markdown's `*`."""
    lines = text.strip().split("\n")
    readings = ["\n".join(part) for part in (lines, lines[1:], lines[:-1], lines[1:-1])]
    return readings + [reading.replace("*", "") for reading in readings]


def check_answer(text: str, check: dict, strict: bool = True) -> bool:
    """True if `text` meets every requirement in `check`; never for a blank text.

    Keys: `contains` (all of these words or phrases, whole words, any case), `contains_any`,
    `excludes`, `starts_with`, `ends_with` (any case), `equals` (exactly, after strip), `min_words`,
    `max_words`, `items` (exactly that many list lines, or entries where the format is "comma"),
    `format` (see `has_format`). Loose: one of `loose_variants` meets them all. An unknown key or
    format is a ValueError. Zhou et al. 2023 (IFEval), arXiv 2311.07911.
    """
    validate_check(check)
    list_format = check.get("format")
    return any(
        all(holds(variant, key, value, list_format) for key, value in check.items())
        for variant in ([text] if strict else loose_variants(text))
        if not is_blank(variant)
    )
