"""Saved outputs: what was trained, and hostile text that must stay inert."""

import json

import pytest

from evaluation.probe.answers import make_sample
from evaluation.probe.outputs import (
    describe_training,
    escape_markdown,
    fence,
    list_training,
    write_outputs,
)
from evaluation.probe.prompts import Prompt
from model.checkpoint import load_tokenizer

HOSTILE = "</pre>\n````\n# Heading\n<script>alert(1)</script>\x1b[31m\x9b\u202e|[x](javascript:0)"
SETTINGS = {"from_weight": "out/base", "data_path": ["a.jsonl", "b.jsonl"], "learning_rate": 1e-4}
LORA = {"lora_rank": 8, "lora_alpha": 16.0, "lora_targets": "square", "modules_to_save": ["norms"]}


@pytest.mark.parametrize(
    "files, title, lines",
    [
        ({}, None, ["- trained: not known (no run.json beside the weights)"]),
        (
            {
                "run.json": {
                    "stage": "lora",
                    "steps": 250,
                    "trainable_parameters": 49152,
                    "settings": SETTINGS | LORA,
                }
            },
            "LoRA on q and o, r=8, and norms",
            [
                "- trained: LoRA on square, rank 8, alpha 16; whole: norms (49,152 parameters)",
                "- base: base",
                "- data: a.jsonl, b.jsonl",
                "- learning rate: 0.0001",
                "- steps: 250",
            ],
        ),
        (
            {"run.json": {"stage": "full_sft", "settings": SETTINGS | {"trainable": "mlp"}}},
            "fine-tuning of mlp",
            [
                "- trained: mlp",
                "- base: base",
                "- data: a.jsonl, b.jsonl",
                "- learning rate: 0.0001",
            ],
        ),
        (
            {"run.json": {"stage": "pretrain", "settings": {"from_weight": "none"}}},
            "base",
            ["- trained: all weights", "- base: none: random weights"],
        ),
        (
            {
                "adapter_config.json": {
                    "r": 4,
                    "lora_alpha": 8,
                    "target_modules": ["q_proj", "v_proj"],
                    "base_model_name_or_path": "owner/name",
                }
            },
            "LoRA on q_proj, v_proj, r=4",
            ["- trained: LoRA on q\\_proj, v\\_proj, rank 4, alpha 8", "- base: name"],
        ),
    ],
)
def test_what_was_trained(tmp_path, files, title, lines):
    for name, content in files.items():
        (tmp_path / name).write_text(json.dumps(content))
    training = describe_training(tmp_path)
    assert training["title"] == (title or tmp_path.name)
    assert list_training(training) == lines


def test_escapes():
    assert escape_markdown("a\n *b* <c> `d` | [e]") == "a \\*b\\* &lt;c&gt; \\`d\\` \\| \\[e\\]"
    assert fence("x") == "```text\nx\n```" and fence("````") == "`````text\n````\n`````"


def test_hostile_text_is_inert_and_nothing_is_lost(tmp_path):
    tokenizer = load_tokenizer()
    prompt = Prompt(
        "<b>", "<i>|*x*", [{"role": "user", "content": HOSTILE}], HOSTILE, None, HOSTILE
    )
    ids = tokenizer.encode(HOSTILE, add_special_tokens=False)
    sample = make_sample(tokenizer, prompt, ids, ids, "greedy", None)
    sample["output_translation"] = HOSTILE
    folder = tmp_path / "na|me"
    write_outputs(folder, [sample], {"training": describe_training(folder), "summary": []})
    line, page = ((folder / name).read_text() for name in ("samples.jsonl", "samples.md"))
    assert not set("\x1b\x9b\u202e") & set(page + line)
    assert json.loads(line)["output"] == HOSTILE
    outside, inside = [], []
    where, ticks = outside, ""
    for row in page.splitlines():
        if where is outside and row.startswith("```"):
            where, ticks = inside, row.removesuffix("text")
        elif where is inside and row == ticks:
            where = outside
        else:
            where.append(row)
    assert where is outside and inside.count("# Heading") == 2
    text = "\n".join(outside)
    assert "<" not in text and "\n# Heading" not in text and "\\[x\\]" in text
