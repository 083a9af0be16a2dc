"""The prompt files: what is in ours, and the errors of a broken one."""

import json
from collections import Counter
from pathlib import Path

import pytest

from dataset.lm_dataset import read_jsonl
from dataset.world.generate import ensure_world
from evaluation.probe.prompts import CJK, PROMPTS_FILE, read_prompts
from model.cli import UserError

PROMPTS = read_prompts(PROMPTS_FILE)  # refuses a reference that fails its own check
SECTIONS = {
    "Trained forms": 12,
    "New wordings": 9,
    "Free wording": 20,
    "Unseen things": 10,
    "Medical": 8,
    "Chinese": 9,
    "Outside the world": 5,
}
CHECKED = [prompt for prompt in PROMPTS if prompt.section != "Outside the world"]


def test_our_prompts_go_from_easy_to_hard():
    assert Counter(prompt.section for prompt in PROMPTS) == SECTIONS
    assert list(dict.fromkeys(prompt.section for prompt in PROMPTS)) == list(SECTIONS)
    assert all(prompt.check is not None for prompt in CHECKED)
    assert all(prompt.check is None for prompt in PROMPTS if prompt not in CHECKED)
    chinese = [prompt for prompt in PROMPTS if CJK.search(prompt.text)]
    assert {prompt.section for prompt in chinese} == {"Chinese"}
    assert len(chinese) == SECTIONS["Chinese"] and all(prompt.translation for prompt in chinese)
    assert len({prompt.text for prompt in PROMPTS}) == len(PROMPTS)
    assert read_prompts(PROMPTS_FILE, limit=2) == PROMPTS[:2]


@pytest.mark.parametrize(
    "section, name", [("Trained forms", "combinations"), ("New wordings", "wordings")]
)
def test_generated_prompts_are_the_first_of_their_skill_in_the_tuning_half(section, name):
    first = {}  # the prompt by its skill
    for _, record in read_jsonl(ensure_world()[f"{name}_tune"]):
        first.setdefault(record["skill"], record["conversations"][:-1])
    ours = [prompt for prompt in PROMPTS if prompt.section == section]
    skills = [skill for prompt in ours for skill in first if first[skill] == prompt.messages]
    assert len(set(skills)) == len(ours)


def test_a_check_fails_an_echo_and_an_evasion():
    for prompt in CHECKED:
        for text in (prompt.text, "I do not know.", "A lion is a lion.", "我不知道。"):
            assert prompt.judge(text, True) != "correct", (prompt.id, text)
        assert prompt.judge(prompt.reference, False) == "endless"


def test_markdown(tmp_path):
    text = """# Title
## Facts
Prose, which is not read.

### one
> What is it?
> In two lines.

- translation: What?
- reference: A fox.\\nA second line.
- check: exact = true

### two
> Hi
> ***
> Hello.
> ***
> And now?
"""
    (tmp_path / "p.md").write_text(text)
    one, two = read_prompts(tmp_path / "p.md")
    assert (one.id, one.section, one.translation) == ("one", "Facts", "What?")
    assert one.text == "What is it?\nIn two lines."
    assert (one.reference, one.check) == ("A fox.\nA second line.", {"exact": True})
    assert two.messages[1] == {"role": "assistant", "content": "Hello."}
    assert two.text == "user: Hi\nassistant: Hello.\nuser: And now?" and two.check is None


def test_a_byte_order_mark_hides_no_prompt(tmp_path: Path) -> None:
    path = tmp_path / "p.md"
    path.write_text("### one\n> Hi\n\n### two\n> Ho\n", encoding="utf-8-sig")
    assert [prompt.id for prompt in read_prompts(path)] == ["one", "two"]


@pytest.mark.parametrize(
    "body, message",
    [
        ("no quote", "prompt 'a': write '> the question'"),
        ("> Hi\n- chek: x", "prompt 'a': write"),
        ("> Hi\n- reference: x\n- check: about =", "the check is no TOML"),
        ("> Hi\n- check: upper = true", "a check compares with a reference"),
        ("> Hi\n- reference: x\n- check: upper = true", "a: the reference fails its check: wrong"),
        ("> Hi\n- reference: x\n- check: about = ['no.such']", "the world has no list 'no.such'"),
        ("> Hi\n- reference: x\n- check: uper = true", "it has no key 'uper'"),
        ("> Hi\n- reference: x\n- check: about = 5", "'about' must be a list of names"),
        ("> Hi\n### a\n> Ho", "two prompts have the id 'a'"),
        ("> Hi\n> ***\n> Ho", "the last turn is the assistant's"),
        (None, "holds no prompt"),
    ],
)
def test_a_broken_prompt_is_named(tmp_path, body, message):
    path = tmp_path / "p.md"
    path.write_text(f"## S\n### a\n{body}\n" if body else "# Prose\n")
    with pytest.raises(UserError, match=f"p.md: .*{message}"):
        read_prompts(path)


def test_a_check_that_is_no_object_is_named(tmp_path):
    talk = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]
    path = tmp_path / "p.jsonl"
    path.write_text(json.dumps({"conversations": talk, "check": "yes"}))
    with pytest.raises(UserError, match="p-1: .*must be an object"):
        read_prompts(path)


def test_jsonl_takes_the_last_answer_as_the_reference(tmp_path):
    talk = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]
    probe = {"id": "unseen-1", "set": "unseen", "conversations": talk, "check": {}}
    path = tmp_path / "p.jsonl"
    path.write_text(json.dumps(probe) + "\n" + json.dumps({"conversations": talk}) + "\n")
    one, two = read_prompts(path)
    assert (one.id, one.section, one.check, one.reference) == ("unseen-1", "unseen", {}, "Hello")
    assert one.messages == talk[:1]
    assert (two.id, two.section, two.check) == ("p-2", "p", None)
