"""Saved outputs: what was trained, and hostile text that must stay inert."""

import json
from operator import itemgetter

from dataset.lm_dataset import read_jsonl
from evaluation.probe import outputs
from evaluation.probe.answers import make_sample, probe
from evaluation.probe.measures import summarize
from evaluation.probe.outputs import OUTPUT_DIR, describe_training
from evaluation.probe.prompts import PROMPTS_FILE, Prompt, read_prompts
from model.checkpoint import load_checkpoint, load_tokenizer
from model.files import REPO_DIR

HOSTILE = "</pre>\n````\n# Heading\n<script>alert(1)</script>\x1b[31m\x9b\u202e|[x](javascript:0)"
SETTINGS = {"from_weight": "out/base", "data_path": ["a.jsonl", "b.jsonl"], "learning_rate": 1e-4}
LORA = {"lora_rank": 8, "lora_alpha": 16.0, "lora_targets": "square", "modules_to_save": ["norms"]}
RUN = {"stage": "lora", "steps": 250, "trainable_parameters": 49152, "settings": SETTINGS | LORA}


def test_what_was_trained(tmp_path):
    def describe(content: dict, *keys: str) -> list:
        folder = tmp_path / "mine"
        folder.mkdir(exist_ok=True)
        (folder / "run.json").write_text(json.dumps(content))
        training = describe_training(folder)
        return [training[key] for key in ("title", "parts", "base", *keys)]

    assert describe(RUN, "lora_alpha", "steps", "data") == [
        *("LoRA on q and o, r=8, and norms", "LoRA on square", "base", 16.0, 250),
        ["a.jsonl", "b.jsonl"],
    ]
    run = {"stage": "full_sft", "settings": SETTINGS | {"trainable": "mlp"}}
    assert describe(run) == ["fine-tuning of mlp", "mlp", "base"]
    run = {"stage": "pretrain", "settings": {"from_weight": "none"}}
    assert describe(run) == ["base", "all weights", None]
    assert describe({})[:2] == ["mine", "not known"]


def test_committed_answers_can_be_made_again():
    """Those of the base to the first 2 prompts; T=0.85 draws by the seed."""
    saved = [line for _, line in read_jsonl(OUTPUT_DIR / "xs-world-wrapped42" / "samples.jsonl")]
    again = probe(load_checkpoint(REPO_DIR / "model/base_xs"), read_prompts(PROMPTS_FILE, 2))
    place = itemgetter("id", "decoding", "seed", "output")
    assert {*map(place, again)} <= {*map(place, saved)}


def test_hostile_text_is_inert_and_nothing_is_lost(tmp_path, capsys):
    tokenizer = load_tokenizer()
    messages = [{"role": "user", "content": HOSTILE}]
    prompt = Prompt("<b>", "<i>|*x*", messages, HOSTILE, {"about": []}, HOSTILE)
    ids = tokenizer.encode(HOSTILE, add_special_tokens=False)
    sample = make_sample(tokenizer, prompt, ids, ids, "greedy", None)
    sample["output_translation"] = HOSTILE
    folder = tmp_path / "na|me"
    folder.mkdir()
    (folder / "run.json").write_text(json.dumps(RUN | {"stage": "pretrain"}))
    summary = summarize([sample])
    outputs.write_outputs(folder, [sample], summary, {"training": describe_training(folder)})
    line, page = ((folder / name).read_text() for name in ("samples.jsonl", "samples.md"))
    assert not set("\x1b\x9b\u202e") & set(page + line)
    assert json.loads(line)["output"] == HOSTILE
    assert "- learning rate: 0.0001\n- steps: 250\n- base: base\n" in page
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

    outputs.print_answers({"a\x1b": [sample]}, 3)
    outputs.print_models({"a\x1b": summary.assign(section="\x1b")}, {"a\x1b": {}})
    out = capsys.readouterr().out
    assert "Heading" in out and not set("\x1b\x9b\u202e") & set(out)
