"""The prompt files: what is in ours, and what a broken one is told."""

import json
from collections import Counter
from pathlib import Path

import pytest

from dataset.jsonl import DataError
from evaluation.metrics import CHECK_KEYS, FORMATS, check_answer
from evaluation.prompts import PROMPTS_FILE, parse_markdown, read_prompts

OURS = PROMPTS_FILE
PROMPTS = read_prompts(OURS)
CHECKED = [prompt for prompt in PROMPTS if prompt.check]


def test_our_prompts_cover_what_they_should():
    sections = Counter(prompt.section for prompt in PROMPTS)
    assert len(PROMPTS) >= 90 and len(sections) >= 9 and min(sections.values()) >= 7
    assert {"Medical", "Chat and identity", "Refusal to answer blank"} <= sections.keys()
    assert sum(prompt.translation is not None for prompt in PROMPTS) >= 15
    assert len(CHECKED) >= 90 and all(prompt.reference for prompt in PROMPTS)
    assert {key for prompt in CHECKED for key in prompt.check} == set(CHECK_KEYS)
    assert {prompt.check.get("format") for prompt in CHECKED} == {None, *FORMATS}
    assert len({prompt.text for prompt in PROMPTS}) == len(PROMPTS)
    assert read_prompts(OURS, limit=2) == PROMPTS[:2]


@pytest.mark.parametrize("prompt", CHECKED, ids=lambda prompt: prompt.id)
def test_a_check_passes_its_reference_and_not_an_echo_or_an_evasion(prompt):
    assert check_answer(prompt.reference, prompt.check)
    for text in (prompt.text, "I do not know.", "Sure! Here it is:", "我不知道。", "the the the"):
        assert not check_answer(text, prompt.check), text


def test_markdown():
    text = """# Title
Prose.
## Facts
More prose.

### facts-01
> One
>
> two.

- translation: Eins
- check: {"contains": ["x"]}
- reference: "x\\ny"
## How to
### how-1
> Three
"""
    first, second = parse_markdown(text, "p.md")
    assert (first.id, first.section, first.text) == ("facts-01", "Facts", "One\n\ntwo.")
    assert first.messages == [{"role": "user", "content": "One\n\ntwo."}]
    assert (first.translation, first.check, first.reference) == (
        "Eins",
        {"contains": ["x"]},
        "x\ny",
    )
    assert (second.section, second.text, second.check) == ("How to", "Three", None)


@pytest.mark.parametrize(
    "body, message",
    [
        ("## A\n### a\n> x\n### a\n> y", "p.md:4: id 'a' is taken by line 2"),
        ("## A\n### a\n- check: {}", "p.md:3: a check is an object"),
        ("## A\n### a\n\n### b\n> x", "p.md:2: 'a' has no prompt"),
        ("## A\n### a\n>\n", "p.md:2: 'a' has no prompt"),
        ("## A\n### a\n> x\n- chek: {}", "p.md:4: unknown field 'chek'"),
        ("## A\n### a\n> x\n- check: {'a'}", "p.md:4: 'check' is not JSON"),
        ('## A\n### a\n> x\n- check: {"contian": ["a"]}', "p.md:4: unknown check key 'contian'"),
        ("## A\n### a\n> x\n- reference: 3", "p.md:4: 'reference' must be"),
        ("## A\n### a\n> x\n- translation:", "p.md:4: 'translation' is empty"),
        ("## A\n### a\n> x\n- translation: y\n- translation: z", "p.md:5: 'translation' is given"),
        ("## A\n### a\n> x\nlost", "p.md:4: expected '> prompt'"),
        ("## A\n### a\n> x\n- translation: y\n> z", "p.md:5: expected '> prompt'"),
        ("## A\n### a\n> 你好", "p.md:2: 'a' is Chinese"),
        ("## A\n### A 1\n> x", "p.md:2: id 'A 1'"),
        ("### a\n> x", "p.md:1: a prompt before the first '## Section'"),
        ("# Title\n", "p.md: holds no prompt"),
    ],
)
def test_broken_markdown_is_refused_with_its_line(body, message):
    with pytest.raises(DataError) as error:
        parse_markdown(body, "p.md")
    assert str(error.value).startswith(message)


def write_jsonl(path: Path, records: list[dict]) -> Path:
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


def talk(*contents: str, **extra) -> dict:
    roles = (["user", "assistant"] * len(contents))[: len(contents)]
    turns = [{"role": r, "content": c} for r, c in zip(roles, contents, strict=True)]
    return {"conversations": turns, **extra}


def test_jsonl_keeps_the_last_answer_as_the_reference(tmp_path):
    path = write_jsonl(
        tmp_path / "demo.test.jsonl",
        [
            talk("Hi", "Hello"),
            talk("A?", "B", "C?", "D", id="x", section="S", check={"contains": ["D"]}),
            talk("never read", "because of the limit"),
        ],
    )
    first, second = read_prompts(path, limit=2)
    assert (first.id, first.section, first.text) == ("demo-00001", "demo", "Hi")
    assert (first.reference, first.check, first.translation) == ("Hello", None, None)
    assert (second.id, second.section, second.reference) == ("x", "S", "D")
    assert [m["content"] for m in second.messages] == ["A?", "B", "C?"]
    assert second.text == "user: A?\nassistant: B\nuser: C?"
    assert second.check == {"contains": ["D"]}


@pytest.mark.parametrize(
    "records, message",
    [
        ([talk("a", "b", id=3)], "bad.jsonl:1: 'id' must be a text, not 3"),
        ([talk("a", "b"), talk("a", "b", check={"format": "haiku"})], "bad.jsonl:2: unknown check"),
        ([talk("a", "b", id="x"), talk("c", "d", id="x")], "two prompts have the id 'x'"),
        ([{"text": "a"}], "bad.jsonl:1: no field"),
    ],
)
def test_broken_jsonl_is_refused(tmp_path, records, message):
    with pytest.raises(DataError, match=message):
        read_prompts(write_jsonl(tmp_path / "bad.jsonl", records))


def test_missing_file_names_its_flag(tmp_path):
    with pytest.raises(DataError, match=r"none\.md: no such file; check --prompts"):
        read_prompts(tmp_path / "none.md")
