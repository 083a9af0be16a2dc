"""The measures on cases worked out by hand."""

import gzip

import pytest

from evaluation.metrics import (
    check_answer,
    compression_ratio,
    content_recall,
    distinct_n,
    diversity,
    equal_slices,
    find_loop,
    is_blank,
    is_loop,
    is_runaway,
    seq_rep_n,
    split_words,
)


def test_blank_and_runaway():
    assert is_blank("") and is_blank(" \n\t\u3000")
    assert not is_blank(" .")
    assert is_runaway(stopped=False) and not is_runaway(stopped=True)


def test_words_count_each_chinese_character():
    assert split_words("It's well-known: 2 cats!") == ["It's", "well-known", "2", "cats"]
    assert split_words("北京 is 首都。") == ["北", "京", "is", "首", "都"]


@pytest.mark.parametrize(
    "text, loop",
    [
        ("Well, the cat the cat the cat", "the cat the cat the cat"),
        ("the cat the cat the dog", None),
        ("the cat the cat", None),
        ("Well then, here comes the cat the cat", None),
        ("no no no", None),  # a single token, three times
        ("I say no no no no no no", "no no no no no no"),  # "no no", three times
        ("So: it is red. it is red. it is red. it is", "it is red. it is red. it is red. it is"),
        ("the cat the cat the cat ran off", None),  # not at the end
        ("好的，我很好。我很好。我很好。", "我很好。我很好。我很好。"),
        ("!!!!!!", "!!!!!!"),
        ("the cat the cat the ca", "the cat the cat the ca"),  # cut short at the length limit
        ("the cat the cat the cow", None),
        (
            "我很好。我很好。我很好。我\ufffd",
            "我很好。我很好。我很好。我",
        ),  # cut within a character
        ("1. Eat well. 2. Eat well. 3. Eat well.", None),
        ("", None),
    ],
)
def test_loop(text, loop):
    span = find_loop(text)
    assert (span and text[slice(*span)]) == loop
    assert is_loop(text) == (loop is not None)


def test_repetition():
    tokens = list("abcabc")  # 4-grams abca bcab cabc; 3-grams abc twice of 4; 2-grams 3 of 5
    assert seq_rep_n(tokens, 4) == 0
    assert seq_rep_n(tokens, 3) == pytest.approx(1 / 4)
    assert seq_rep_n(tokens, 2) == pytest.approx(2 / 5)
    assert diversity(tokens) == pytest.approx(3 / 5 * 3 / 4 * 1)
    assert diversity([7] * 5) == pytest.approx(1 / 4 * 1 / 3 * 1 / 2)
    assert seq_rep_n([7] * 13) == pytest.approx(0.9)  # one unique 4-gram in ten
    assert seq_rep_n([1, 2, 3]) is None and diversity([1, 2, 3]) is None  # no 4-gram to repeat
    assert diversity([]) is None and diversity([1, 2, 3, 4]) == 1


def test_distinct_n():
    outputs = [[1, 2, 1, 2], [1, 2, 3]]
    assert distinct_n(outputs, 1) == pytest.approx(3 / 7)
    assert distinct_n(outputs, 2) == pytest.approx(3 / 5)  # 12 21 12 | 12 23
    assert distinct_n([[1], []], 2) is None


def test_equal_slices_take_as_much_of_each_up_to_one_budget():
    outputs = ["abcdef", "gh", "", "ijkl", "mnop"]
    assert equal_slices(outputs, size=3, budget=7) == ["abc", "gh", "", "ij"]
    assert equal_slices(outputs, size=3, budget=11) == ["abc", "gh", "", "ijk", "mno"]
    assert equal_slices(outputs, size=3, budget=12) == []
    # However much more a verbose model says, it is measured on the same prompts.
    verbose = [text * 9 for text in ("abc", "ghi", "jkl")]
    assert equal_slices(verbose, size=3, budget=9) == ["abc", "ghi", "jkl"]


def test_compression_ratio():
    text = "so it goes, " * 100
    assert compression_ratio(text) == 1200 / len(gzip.compress(text.encode()))
    assert compression_ratio(text) > 20 > 1 > compression_ratio("so it goes")
    assert compression_ratio("") == 0


def test_content_recall():
    assert content_recall("A DOG barks", "The dog barks at the cat") == pytest.approx(2 / 3)
    assert content_recall("cat cat cat", "a cat") == 1
    assert content_recall("anything", "it is what it is") is None
    assert content_recall("北方", "北京的") == pytest.approx(1 / 2)


@pytest.mark.parametrize(
    "text, check, passes",
    [
        ("The capital is PARIS.", {"contains": ["Paris", "capital"]}, True),
        ("Parisians like it.", {"contains": ["Paris"]}, False),
        ("New\n York City", {"contains": ["new york"]}, True),
        ("答案是Paris。", {"contains": ["Paris"]}, True),
        ("中国的首都是北京。", {"contains": ["北京"]}, True),
        ("It is _red_, in C++!", {"contains": ["red", "C++"]}, True),
        ("It is 15.", {"contains": ["5"]}, False),
        ("a dog", {"contains_any": ["cat", "dog"]}, True),
        ("a cow", {"contains_any": ["cat", "dog"]}, False),
        ("a category", {"excludes": ["cat"]}, True),
        ("a Cat", {"excludes": ["cat"]}, False),
        ("  \n", {"excludes": ["cat"]}, False),  # blank never passes
        ("  once upon a time", {"starts_with": "Once upon"}, True),
        ("It was once", {"starts_with": "Once"}, False),
        ("So it ends. THE END \n", {"ends_with": "the end"}, True),
        ("The end?", {"ends_with": "the end"}, False),
        (" Yes\n", {"equals": "Yes"}, True),
        ("yes", {"equals": "Yes"}, False),
        ("one two three", {"min_words": 3, "max_words": 3}, True),
        ("one two three", {"min_words": 4}, False),
        ("one two three", {"max_words": 2}, False),
        ("- a\n* b\n1. c\n-d\nplain", {"items": 3}, True),
        ("- a\n- b", {"items": 3}, False),
        ("- a\n- b\n1. c", {"items": 2, "format": "bullets"}, False),  # a line is no bullet
        ("- a\n\n  - b", {"items": 2, "format": "bullets"}, True),
        ("Here:\n- a", {"format": "bullets"}, False),
        ("1. a\n2) b", {"format": "numbered", "items": 2}, True),
        ("1. a\n1. b", {"format": "numbered"}, False),
        ("2. a\n3. b", {"format": "numbered"}, False),
        ("red, green, and blue", {"format": "comma", "items": 3}, True),
        ("苹果、香蕉，梨", {"format": "comma", "items": 3}, True),
        ("red, green,", {"format": "comma"}, False),
        ("red", {"format": "comma"}, False),
        ("red,\ngreen", {"format": "comma"}, False),
        ("Well, I do not think that I can say it", {"format": "comma"}, False),
        ("YES, 2!", {"format": "uppercase"}, True),
        ("YES, i", {"format": "uppercase"}, False),
        ("2!", {"format": "uppercase"}, False),
        ("yes, 2!", {"format": "lowercase"}, True),
        ("Yes", {"format": "lowercase"}, False),
        ("It weighs 3.5 kg.", {"format": "one_sentence"}, True),
        ("It is. It was.", {"format": "one_sentence"}, False),
        ("It is\nIt was", {"format": "one_sentence"}, False),
        ("是的。好的。", {"format": "one_sentence"}, False),
        ("是的。", {"format": "one_sentence"}, True),
        (" Paris.", {"format": "one_word"}, True),
        ("well-known", {"format": "one_word"}, True),
        ("New York", {"format": "one_word"}, False),
        ("北京。", {"format": "one_word"}, True),
        ("是，北京", {"format": "one_word"}, False),
        ("...", {"format": "one_word"}, False),
        ('{"a": [1]}', {"format": "json"}, True),
        ('```json\n{"a": 1}\n```', {"format": "json"}, True),
        ("{'a': 1}", {"format": "json"}, False),
        ("42", {"format": "json"}, False),
        ("[" * 100_000, {"format": "json"}, False),
        ("Paris is big.", {"contains": ["Paris"], "max_words": 2}, False),  # all must hold
    ],
)
def test_strict_check(text, check, passes):
    assert check_answer(text, check) is passes


@pytest.mark.parametrize(
    "text, check, passes",
    [
        ("Sure, here it is:\nParis", {"equals": "Paris"}, True),  # first line dropped
        ("Paris\nHope that helps!", {"equals": "Paris"}, True),  # last line dropped
        ("Sure:\nParis\nBye!", {"equals": "Paris"}, True),  # both
        ("**Paris**", {"equals": "Paris"}, True),  # markdown stripped
        ("Sure:\n**Paris**", {"equals": "Paris"}, True),
        ("Sure, Paris", {"equals": "Paris"}, False),
        ("Here:\n* a\n* b", {"format": "bullets", "items": 2}, True),
        ("a cat", {"excludes": ["cat"]}, False),  # what is left after dropping is blank
    ],
)
def test_loose_check(text, check, passes):
    assert check_answer(text, check, strict=False) is passes
    assert not check_answer(text, check)


def test_what_is_strict_is_loose():
    assert check_answer("- a\n- b", {"items": 2}, strict=False)


@pytest.mark.parametrize(
    "check, names",
    [
        ({"contain": ["a"]}, "contain"),
        ({"format": "haiku"}, "haiku"),
        ({"contains": "Paris"}, "contains"),  # a string would be read letter by letter
        ({"contains_any": []}, "contains_any"),
        ({"excludes": [" "]}, "excludes"),
        ({"starts_with": ["a"]}, "starts_with"),
        ({"items": True}, "items"),
        ({"max_words": 0}, "max_words"),
        ({}, "contains"),
    ],
)
def test_bad_check_is_refused_by_name(check, names):
    with pytest.raises(ValueError, match=names):
        check_answer("", check)
