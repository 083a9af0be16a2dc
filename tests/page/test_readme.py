"""The README of the saved outputs: made of tiny folders, and the committed one up to date."""

import json
from pathlib import Path

from evaluation.page.readme import LONGEST, make_outputs_readme
from evaluation.probe.prompts import PROMPTS_FILE, read_prompts
from model.files import REPO_DIR

NAMES = """\
name,run,title,description
25M-base,base,base,It only read.
25M-lora-all-layers-r8,lora,LoRA,It learned.
1.3M-base,xs,base,A small one.
"""
FIRST = read_prompts(PROMPTS_FILE, 2)


def write_folder(outputs: Path, name: str, answers: dict[tuple, tuple], **provenance) -> None:
    """Write a folder; `answers` are (text, outcome) by (id, prompt)."""
    (outputs / name).mkdir(parents=True, exist_ok=True)
    lines = []
    for (prompt_id, prompt), (output, outcome) in answers.items():
        sample = {"id": prompt_id, "section": "Facts", "decoding": "greedy", "prompt": prompt}
        sample |= {"prompt_translation": "A lion?" if prompt == "狮子？" else None}
        sample |= {"output": output, "outcome": outcome, "output_translation": None}
        lines += [sample, sample | {"decoding": "t1.0", "output": "Sampled."}]
    text = "".join(json.dumps(line) + "\n" for line in lines)
    (outputs / name / "samples.jsonl").write_text(text)
    (outputs / name / "results.json").write_text(json.dumps({"provenance": provenance}))


def read_rows(text: str, heading: str) -> list[list[str]]:
    """Return the rows of the first table below a heading."""
    _, _, below = text.partition(f"\n{heading}\n")
    table = below.partition("\n| ")[2].partition("\n\n")[0]
    return [line.strip("| ").split(" | ") for line in table.splitlines()]


def test_answers_stand_side_by_side(tmp_path):
    outputs = tmp_path / "evaluation" / "model_outputs"
    outputs.mkdir(parents=True)
    (outputs / "names.csv").write_text(NAMES)
    mine = {"prompts": {"file": "mine.md"}}
    prompts = [("lion", "狮子？"), ("fox", "A *fox*?"), ("ant", "Poem!")]
    write_folder(
        outputs,
        "25M-base",
        dict(zip(prompts, [("a" * 999, "wrong fact")] * 3, strict=True)),
        **mine,
    )
    good = [("Yes | no", "correct"), ("", "blank"), ("Ants.", None)]
    write_folder(outputs, "25M-lora-all-layers-r8", dict(zip(prompts, good, strict=True)), **mine)
    write_folder(outputs, "my-own", {prompts[0]: ("Mine.", "correct")}, **mine)
    write_folder(outputs, "1.3M-base", {("x", "An earlier one?"): ("B.", "correct")})

    text = make_outputs_readme(tmp_path)
    assert read_rows(text, "## Folders")[2:] == [
        ["[25M-base](25M-base/samples.md)", "It only read.", "-", "0 of 3"],
        [
            "[25M-lora-all-layers-r8](25M-lora-all-layers-r8/samples.md)",
            "It learned.",
            "-",
            "1 of 2",
        ],
        ["[1.3M-base](1.3M-base/samples.md)\\*", "A small one.", "-", "1 of 1"],
    ]
    assert "my-own" not in text and "Sampled" not in text and "other ways" not in text
    head, _, *rows = read_rows(text, "### Facts")
    assert head[1:] == [
        "[base](25M-base/samples.md)",
        "[lora-all-layers-r8](25M-lora-all-layers-r8/samples.md)",
    ]
    cut = "a" * LONGEST + "…"
    assert rows == [
        ["狮子？<br>*A lion?*", cut, "✓ Yes \\| no"],
        ["A \\*fox\\*?", cut, "*blank*"],
        ["Poem!", cut, "Ants."],
    ]

    # The same adapter, asked without the chat template.
    name, ways = "25M-lora-all-layers-r8-without-template", mine | {"no_template": True}
    write_folder(outputs, name, dict(zip(prompts, good[::-1], strict=True)), **ways)
    text = make_outputs_readme(tmp_path)
    assert read_rows(text, "## Folders")[4][1] == "The same model, asked without the chat template."
    head, _, *rows = read_rows(text, "### The same models, asked in other ways")
    assert [row[1] for row in rows] == ["✓ Yes \\| no", "Ants."]
    assert [row[-1] for row in rows] == ["1 of 2", "1 of 2"]


def test_earlier_models_show_what_the_study_asked_apart(tmp_path):
    outputs = tmp_path / "evaluation" / "model_outputs"
    outputs.mkdir(parents=True)
    (outputs / "names.csv").write_text(NAMES)
    write_folder(outputs, "25M-base", {("x", "An earlier one?"): ("B.", "correct")})
    easy = {("tune-1", prompt.text): (prompt.text.upper(), "correct") for prompt in FIRST}
    apart = tmp_path / "evaluation" / "study" / "answers"
    write_folder(apart, "base-probe_combinations_tune", easy | {("t", "Not ours?"): ("C.", None)})
    text = make_outputs_readme(tmp_path)
    assert read_rows(text, "## Folders")[2][2:] == ["2 of 2", "1 of 1"]
    _, _, *rows = read_rows(text, f"### {FIRST[0].section}")
    assert rows == [[prompt.text, f"✓ {prompt.text.upper()}"] for prompt in FIRST]


def test_the_committed_readme_is_that_of_the_committed_answers():
    """If this fails: python evaluation/page/build.py."""
    path = REPO_DIR / "evaluation" / "model_outputs" / "README.md"
    assert path.read_text(encoding="utf-8") == make_outputs_readme(REPO_DIR)
