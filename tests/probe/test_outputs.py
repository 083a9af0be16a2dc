"""Saved outputs: what was trained, and hostile text that must stay inert."""

import json
from operator import itemgetter

import pytest

from dataset.lm_dataset import read_jsonl
from evaluation.probe import console, outputs
from evaluation.probe.answers import make_sample, probe
from evaluation.probe.markdown import FLAGS, is_earlier, name_size, render_samples
from evaluation.probe.measures import summarize
from evaluation.probe.names import SHIPPED_DIR, list_named_folders
from evaluation.probe.outputs import OUTPUT_DIR, describe_training
from evaluation.probe.prompts import PROMPTS_FILE, Prompt, read_prompts
from model.checkpoint import load_checkpoint, load_tokenizer

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
        *("LoRA on q and o, rank 8, with whole norms", "LoRA on square", "base", 16.0, 250),
        ["a.jsonl", "b.jsonl"],
    ]
    settings = RUN["settings"] | {"modules_to_save": [], "train_tokens": ["<|im_end|>"]}
    title = "LoRA on q and o, rank 8, with the rows of <|im_end|>"
    assert describe({"stage": "lora", "settings": settings})[0] == title
    settings |= {"train_tokens": [f"token{i}" for i in range(120)], "lora_rank": 0}
    title = "training of the rows of 120 tokens alone"
    assert describe({"stage": "lora", "settings": settings})[0] == title
    run = {"stage": "full_sft", "settings": SETTINGS | {"trainable": "mlp"}}
    assert describe(run) == ["fine-tuning of mlp", "mlp", "base"]
    run = {"stage": "full_sft", "settings": {"trainable": "frozen-embeddings"}}
    assert describe(run)[0] == "full fine-tuning, embedding frozen"
    run = {"stage": "pretrain", "settings": {"from_weight": "none"}}
    assert describe(run) == ["base", "all weights", None]
    assert describe({})[:2] == ["mine", "not known"]


def test_committed_answers_of_a_shipped_model_can_be_made_again():
    """Greedy ones to the first 12 prompts; ties may flip between processors, in at most one."""
    name = "1.3M-lora-all-layers-r8"
    lines = [line for _, line in read_jsonl(OUTPUT_DIR / name / "samples.jsonl")]
    saved = [line for line in lines if line["decoding"] == "greedy"][:12]
    prompts = []
    for line in saved:  # as they were asked: the file may have changed since
        messages = [{"role": "user", "content": line["prompt"]}]
        prompts.append(
            Prompt(line["id"], line["section"], messages, None, line["check"], line["reference"])
        )
    again = probe(load_checkpoint(SHIPPED_DIR / name), prompts, decodings=["greedy"])
    place = itemgetter("id", "output", "outcome")
    equal = [place(line) == place(other) for line, other in zip(again, saved, strict=True)]
    assert len(equal) == 12
    assert sum(equal) >= 11


@pytest.mark.parametrize(
    "folder", [folder for folder, _ in list_named_folders(OUTPUT_DIR)], ids=lambda path: path.name
)
def test_committed_texts_are_those_of_their_data(folder):
    """If this fails: python evaluation/page/build.py."""
    assert (folder / "samples.md").read_text(encoding="utf-8") == render_samples(folder)


def make_samples(count: int, outcomes: str, seeds: tuple = (None,)) -> list[dict]:
    """Make samples of `count` prompts; a letter of `outcomes` is c where they are correct."""
    samples = []
    for seed in seeds:
        for i in range(count):
            sample = {
                "id": f"p-{i}",
                "section": "Facts" if i % 2 else "Forms",
                "decoding": "greedy" if seed is None else "t1.0",
                "seed": seed,
                "prompt": f"What is {i}?",
                "prompt_translation": None,
                "output": f"It is {i}.",
                "output_translation": None,
                "reference": None,
                "outcome": "correct" if outcomes[i] == "c" else "wrong fact",
                "tokens": 4,
                "prompt_sha256": str(i),
            }
            samples.append(sample | dict.fromkeys(FLAGS, False))
    return samples


def test_a_page_tells_how_it_came_about_and_counts(tmp_path):
    folder = tmp_path / "xs-lora-on-fft-without-template"
    folder.mkdir()
    table = "name,run,title,description\nxs-lora,RUN,the LoRA,It is here.\nxs-fft,FFT,FFT,All.\n"
    (tmp_path / "names.csv").write_text(table)
    training = {
        "title": "LoRA on all layers, rank 8",
        "parts": "LoRA on all-linear",
        "parameters": 12345,
        "model_parameters": 1258880,
        "lora_rank": 8,
        "lora_alpha": 32.0,
        "learning_rate": 3e-3,
        "steps": 1000,
        "base": "my_base",
        "data": ["mine.jsonl"],
    }
    provenance = {
        "model": "RUN",
        "on_weights": {"name": "FFT"},
        "no_template": True,
        "prompts": {"file": "mine.md"},
        "command": "python eval_llm.py --model RUN",
    }
    samples = make_samples(4, "cwcw") + make_samples(4, "wwcw", seeds=(1, 2))
    results = {"training": training, "provenance": provenance}
    outputs.write_outputs(folder, samples, summarize(samples), results)
    lines = (folder / "samples.md").read_text().splitlines()
    ways = "put on the weights of xs-fft, asked without the chat template"
    assert lines[0] == f"# The LoRA, 1.3M parameters, {ways}"
    assert lines[2] == (
        "It is here. 12,345 weights (LoRA on all layers, rank 8, alpha 32) were trained on "
        "mine.jsonl from the model my\\_base, at a peak learning rate of 0.003, for 1,000 steps."
    )
    assert lines[4].startswith("The model was asked 4 prompts of mine.md. The adapter was put on")
    assert "python eval_llm.py --model RUN" in lines
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in lines if "|" in line]
    assert rows[0] == ["answers", "greedy", "sampled (t1.0)"]
    assert rows[2:] == [  # no row of a mistake that never occurs
        ["correct", "2 of 4", "2 of 8"],
        ["correct: Forms", "2 of 2", "2 of 4"],
        ["correct: Facts", "0 of 2", "0 of 4"],
        ["wrong fact", "2 of 4", "6 of 8"],
        ["tokens", "4 on average", "4 on average"],
    ]


def test_an_earlier_prompt_file_is_known_by_its_prompts():
    ours = [{"id": prompt.id, "prompt": prompt.text} for prompt in read_prompts(PROMPTS_FILE)]
    assert not is_earlier(ours[:3], {})
    reworded = [*ours, ours[0] | {"prompt": "Otherwise?"}]
    assert is_earlier(reworded, {})
    assert not is_earlier(reworded, {"prompts": {"file": "mine.md"}})
    assert name_size(24_634_880) == "25M" and name_size(1_258_880) == "1.3M"


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
    assert "at a peak learning rate of 0.0001, for 250 steps." in page
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

    console.print_answers({"a\x1b": [sample]}, 3)
    console.print_models({"a\x1b": summary.assign(section="\x1b")}, {"a\x1b": {}})
    out = capsys.readouterr().out
    assert "Heading" in out and not set("\x1b\x9b\u202e") & set(out)
