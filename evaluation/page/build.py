"""Build what outputs are read on: a page of all folders, README.md and each folder's samples.md.

    python evaluation/page/build.py     # of evaluation/model_outputs

`index.html` is one file, which asks no network for anything: page.html is the frame, page.css its
style, page.js its behavior. Outputs are JSON in a data block whose every `<` is escaped; page.js
puts them on the page as text nodes. A Content-Security-Policy runs the one script and the one style
of this build, known by their hashes, and nothing else.

README.md and samples.md are made again for the folders that names.csv knows.
"""

import base64
import hashlib
import json
import sys
from pathlib import Path
from string import Template

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from dataset.lm_dataset import read_jsonl
from dataset.world.checks import LOOP
from evaluation.page.readme import make_outputs_readme
from evaluation.probe.markdown import (
    FLAGS,
    is_earlier,
    list_ways,
    make_title,
    name_prompts,
    render_samples,
)
from evaluation.probe.names import list_named_folders, read_names
from evaluation.probe.outputs import OUTPUT_DIR
from evaluation.probe.prompts import PROMPTS_FILE
from model.cli import UserError, escape_control, make_parser, run_script
from model.files import REPO_DIR, read_json, write_text

FOLDER = Path(__file__).resolve().parent
ORDER = {"pretrain": 0, "lora": 1, "full_sft": 2}  # of arms, by their stage
PARTLY, OTHER = 3, 4  # fine-tuning of some weights; what is not known or was asked in another way


def build_page(outputs: Path) -> str:
    """Build the page of all folders in `outputs` that hold samples."""
    folders = sorted(path.parent for path in outputs.glob("*/samples.jsonl"))
    if not folders:
        raise UserError(f"{outputs}: holds no outputs; probe a checkpoint with eval_llm.py first")
    data = json.dumps(collect_data(folders))
    parts = {"data": data.replace("<", "\\u003c")}
    for name, file in {"style": "page.css", "script": "page.js"}.items():
        parts[name] = (FOLDER / file).read_text("utf-8")
        digest = hashlib.sha256(parts[name].encode()).digest()
        parts[f"{name}_hash"] = f"sha256-{base64.b64encode(digest).decode()}"
    return Template((FOLDER / "page.html").read_text("utf-8")).substitute(parts)


def collect_data(folders: list[Path]) -> dict:
    """Collect prompts, arms and answers; an answer refers to its prompt by number."""
    prompts: dict[tuple, dict] = {}
    arms = []
    for folder in folders:
        samples = [sample for _, sample in read_jsonl(folder / "samples.jsonl")]
        answers = []
        for sample in samples:
            place = (sample["id"], sample["prompt"])
            if place not in prompts:
                prompts[place] = describe_prompt(sample) | {"number": len(prompts)}
            number = {"prompt": prompts[place]["number"]}
            answers.append(number | describe_answer(sample))
        arms.append(describe_arm(folder, samples) | {"answers": answers})
    arms.sort(key=lambda arm: (arm["family"], arm["order"], arm["rate"], arm["name"]))
    return {
        "prompts": list(prompts.values()),
        "arms": arms,
        "shown": choose_headline(arms),
    }


def describe_prompt(sample: dict) -> dict[str, str]:
    """Describe the prompt of a sample."""
    keys = ("id", "section", "prompt", "prompt_translation", "reference")
    return {key: escape_control(sample.get(key) or "") for key in keys}


def describe_answer(sample: dict) -> dict:
    """Describe one answer; its text comes in 3 parts: before a loop, the loop, after it."""
    output = sample["output"]
    kinds = [sample["outcome"]] if sample.get("outcome") else []
    kinds += [flag for flag in FLAGS if sample.get(flag)]
    start = end = len(output)
    if "loop" in kinds and (loop := LOOP.search(output)):
        start, end = loop.span()
    parts = (output[:start], output[start:end], output[end:])
    return {
        "decoding": sample["decoding"],
        "seed": sample["seed"],
        "text": list(map(escape_control, parts)),
        "translation": escape_control(sample["output_translation"] or ""),
        "kinds": list(dict.fromkeys(kinds)),
    }


def describe_arm(folder: Path, samples: list[dict]) -> dict:
    """Describe what a folder's answers come from, by its results.json."""
    path = folder / "results.json"
    results = read_json(path) if path.is_file() else {}
    results.setdefault("training", {"title": folder.name})
    training = results["training"]
    provenance = results.get("provenance", {})
    names = read_names(folder.parent)
    base = training.get("base")
    base = names["name"].get(base, base)
    return {
        "name": escape_control(folder.name),
        "title": escape_control(make_title(results, names)),
        "note": escape_control(make_note(training, base, samples, provenance)),
        "family": folder.name if training.get("stage") == "pretrain" else base or folder.name,
        "order": OTHER if list_ways(provenance, names) else find_order(training),
        "rate": training.get("learning_rate") or 0,
        "correct": find_share(results.get("summary", [])),
    }


def make_note(training: dict, base: str | None, samples: list[dict], provenance: dict) -> str:
    """Tell in a few words what an arm's title leaves out."""
    notes = []
    if rate := training.get("learning_rate"):
        notes.append(f"learning rate {rate:g}")
    if base:
        notes.append(f"from {base}")
    if is_earlier(samples, provenance):
        notes.append("earlier prompts")
    if name_prompts(provenance) != PROMPTS_FILE.name:
        notes.append(f"prompts of {name_prompts(provenance)}")
    return ", ".join(notes)


def find_order(training: dict) -> int:
    """Return where an arm stands among those of its family."""
    order = ORDER.get(training.get("stage"), OTHER)
    is_partly = order == ORDER["full_sft"] and training.get("parts") != "all weights"
    return PARTLY if is_partly else order


def find_share(summary: list[dict]) -> float:
    """Return the share of correct answers in the first decoding."""
    for row in summary:
        if row["section"] == "all" and row["measure"] == "correct":
            return row["value"]
    return 0


def choose_headline(arms: list[dict]) -> list[str]:
    """Choose what the page opens on: of the largest family, the base, 2 adapters, full fine-tuning.

    All answered what most arms answered. The adapters are that of the lowest learning
    rate (MiniMind's) and that with the most correct.
    """
    asked = []
    for arm in arms:
        asked.append(frozenset(answer["prompt"] for answer in arm["answers"]))
    common = max(asked, key=asked.count)  # only these answers can be compared
    arms = [arm for arm, prompts in zip(arms, asked, strict=True) if prompts >= common]
    families = [arm["family"] for arm in arms]
    largest = max(families, key=families.count)
    family = [arm for arm in arms if arm["family"] == largest]
    by_order = {}
    for arm in family:
        by_order.setdefault(arm["order"], []).append(arm)
    chosen = by_order.get(ORDER["pretrain"], [])[:1]
    if adapters := by_order.get(ORDER["lora"]):
        chosen.append(min(adapters, key=lambda arm: arm["rate"]))
        chosen.append(choose_best(adapters))
    if tuned := by_order.get(ORDER["full_sft"]):
        chosen.append(choose_best(tuned))
    names = [arm["name"] for arm in chosen or family[:4]]
    return list(dict.fromkeys(names))


def choose_best(arms: list[dict]) -> dict:
    """Choose the arm with the most correct answers, the last among equals."""
    return sorted(arms, key=lambda arm: arm["correct"])[-1]


def write_texts(outputs: Path) -> None:
    """Write samples.md of the folders that names.csv knows, and README.md."""
    for folder, _ in list_named_folders(outputs):
        write_text(folder / "samples.md", render_samples(folder))
    write_text(outputs / "README.md", make_outputs_readme(REPO_DIR))


def main(argv: list[str] | None = None) -> None:
    """Write index.html beside the folders, and the texts of the study's."""
    parser = make_parser(__doc__)
    parser.add_argument("--outputs", type=Path, default=OUTPUT_DIR)
    args = parser.parse_args(argv)
    if args.outputs.resolve() == OUTPUT_DIR:
        write_texts(args.outputs)
    write_text(args.outputs / "index.html", build_page(args.outputs))
    print(f"wrote {args.outputs / 'index.html'}")


if __name__ == "__main__":
    run_script(main)
