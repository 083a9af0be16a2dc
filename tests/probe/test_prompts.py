"""The prompt files: what is in ours, and the errors of a broken one."""

import json
from collections import Counter

import pytest

from evaluation.probe.prompts import CJK, PROMPTS_FILE, read_prompts
from model.files import UserError

PROMPTS = read_prompts(PROMPTS_FILE)  # refuses a reference that fails its own check
SECTIONS = {
    "Combinations": 30,
    "Unseen things": 20,
    "Medical": 15,
    "Chinese": 15,
    "Outside the world": 10,
}


def test_our_prompts_cover_what_they_should():
    assert Counter(prompt.section for prompt in PROMPTS) == SECTIONS
    assert all(prompt.reference and prompt.check is not None for prompt in PROMPTS)
    chinese = [prompt for prompt in PROMPTS if CJK.search(prompt.text)]
    assert len(chinese) == SECTIONS["Chinese"] and all(prompt.translation for prompt in chinese)
    assert len({prompt.text for prompt in PROMPTS}) == len(PROMPTS)
    assert read_prompts(PROMPTS_FILE, limit=2) == PROMPTS[:2]


def test_a_check_fails_an_echo_and_an_evasion():
    for prompt in PROMPTS:
        for text in (prompt.text, "I do not know.", "A lion is a lion.", "我不知道。"):
            assert prompt.judge(text, True) != "correct", (prompt.id, text)
        assert prompt.judge(prompt.reference, False) == "endless"


def test_markdown(tmp_path):
    text = """# Title
Prose, which is not read.

## Facts
More prose.

### one
> What is it?
> In two lines.

- system: Be brief.
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
    assert [turn["role"] for turn in one.messages] == ["system", "user"]
    assert one.messages[1]["content"] == "What is it?\nIn two lines."
    assert one.reference == "A fox.\nA second line."
    assert one.check == {"exact": True}
    assert [(t["role"], t["content"]) for t in two.messages] == [
        ("user", "Hi"),
        ("assistant", "Hello."),
        ("user", "And now?"),
    ]
    assert two.text == "user: Hi\nassistant: Hello.\nuser: And now?" and two.check is None


@pytest.mark.parametrize(
    "body, message",
    [
        ("no quote", "prompt 'a': write '> the question'"),
        ("> Hi\n- chek: x", "prompt 'a': write"),
        ("> Hi\n- reference: x\n- check: about =", "the check is no TOML"),
        ("> Hi\n- check: upper = true", "a check compares with a reference"),
        ("> Hi\n- reference: x\n- check: upper = true", "a: the reference fails its check: wrong"),
        ("> Hi\n- reference: x\n- check: about = ['no.such']", "the world has no list 'no.such'"),
        ("> Hi\n### a\n> Ho", "two prompts have the id 'a'"),
    ],
)
def test_a_broken_prompt_is_named(tmp_path, body, message):
    path = tmp_path / "p.md"
    path.write_text(f"## S\n### a\n{body}\n")
    with pytest.raises(UserError, match=message):
        read_prompts(path)


def test_a_missing_or_empty_file_is_named(tmp_path):
    with pytest.raises(UserError, match="no such file"):
        read_prompts(tmp_path / "x.md")
    (tmp_path / "y.md").write_text("# Only prose\n")
    with pytest.raises(UserError, match="holds no prompt"):
        read_prompts(tmp_path / "y.md")
    (tmp_path / "z.md").write_bytes("## Café\n".encode("latin-1"))
    with pytest.raises(UserError, match="z.md: not UTF-8"):
        read_prompts(tmp_path / "z.md")


def test_jsonl_takes_the_last_answer_as_the_reference(tmp_path):
    talk = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]
    probe = {"id": "unseen-1", "set": "unseen", "conversations": talk, "check": {}}
    path = tmp_path / "p.jsonl"
    path.write_text(json.dumps(probe) + "\n" + json.dumps({"conversations": talk}) + "\n")
    one, two = read_prompts(path)
    assert (one.id, one.section, one.check, one.reference) == ("unseen-1", "unseen", {}, "Hello")
    assert one.messages == talk[:1]
    assert (two.id, two.section, two.check) == ("p-2", "p", None)
