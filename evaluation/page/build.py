"""Build the page on which outputs are read: one HTML file, which asks no network for anything.

    python evaluation/page/build.py     # evaluation/model_outputs/index.html, of every folder there

page.html is the frame, page.css its style, page.js its behavior. Outputs are JSON in a data block
whose every `<` is escaped; page.js puts them on the page as text nodes. A Content-Security-Policy
runs the one script and the one style of this build, known by their hashes, and nothing else.
"""

import argparse
import base64
import hashlib
import json
import sys
from pathlib import Path
from string import Template

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from dataset.lm_dataset import read_jsonl
from evaluation.probe.measures import find_loop
from evaluation.probe.outputs import OUTPUT_DIR
from model.files import UserError, escape_control, read_json, run_script, write_text

FOLDER = Path(__file__).resolve().parent
FLAGS = ("blank", "endless", "loop", "off_topic")


def build_page(outputs: Path) -> str:
    """Build the page of all folders in `outputs` that hold samples."""
    folders = sorted(path.parent for path in outputs.glob("*/samples.jsonl"))
    if not folders:
        raise UserError(f"{outputs}: holds no outputs; probe a checkpoint with eval_llm.py first")
    style, script = ((FOLDER / name).read_text("utf-8") for name in ("page.css", "page.js"))
    data = json.dumps(collect_data(folders), separators=(",", ":"))
    parts = {"style": style, "script": script, "data": data.replace("<", "\\u003c")}
    hashes = {f"{name}_hash": hash_source(parts[name]) for name in ("style", "script")}
    return Template((FOLDER / "page.html").read_text("utf-8")).substitute(parts, **hashes)


def hash_source(text: str) -> str:
    """Name an inline script or style as a Content-Security-Policy does."""
    return "sha256-" + base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()


def collect_data(folders: list[Path]) -> dict:
    """Collect prompts, arms and answers; an answer refers to its prompt by number."""
    prompts: dict[tuple[str, str], dict] = {}
    arms = []
    for folder in folders:
        answers = []
        for _, sample in read_jsonl(folder / "samples.jsonl"):
            keys = ("id", "section", "prompt", "prompt_translation", "reference")
            facts = {key: escape_control(sample.get(key) or "") for key in keys}
            place = (sample["id"], sample["prompt"])
            number = prompts.setdefault(place, facts | {"number": len(prompts)})["number"]
            answers.append({"prompt": number} | describe_answer(sample))
        arms.append(describe_arm(folder) | {"answers": answers})
    arms.sort(key=lambda arm: (arm["family"], arm["order"], arm["rate"], arm["name"]))
    return {"prompts": list(prompts.values()), "arms": arms, "shown": choose_headline(arms)}


def describe_answer(sample: dict) -> dict:
    """Describe one answer: its text in 1 piece, or in 3 with the loop in the middle."""
    output, flags = sample["output"], [flag for flag in FLAGS if sample.get(flag)]
    start, end = (find_loop(output) if "loop" in flags else None) or (len(output), len(output))
    outcome = sample.get("outcome")
    return {
        "decoding": sample["decoding"],
        "seed": sample["seed"],
        "text": [
            escape_control(text) for text in (output[:start], output[start:end], output[end:])
        ],
        "translation": escape_control(sample["output_translation"] or ""),
        "kinds": [*([outcome] if outcome else []), *(f for f in flags if f != outcome)],
    }


def describe_arm(folder: Path) -> dict:
    """Describe what a folder's answers come from, by its results.json."""
    path = folder / "results.json"
    results = read_json(path) if path.is_file() else {}
    training = results.get("training") or {"title": folder.name}
    rate, base = training.get("learning_rate"), training.get("base")
    stage = training.get("stage")
    correct = [
        row["value"]
        for row in results.get("summary", [])
        if (row["section"], row["measure"]) == ("all", "correct")
    ]
    notes = [f"learning rate {rate:g}" if rate else "", f"from {base}" if base else ""]
    return {
        "name": escape_control(folder.name),
        "title": escape_control(training["title"]),
        "note": escape_control(", ".join(filter(None, notes))),
        "family": folder.name if stage == "pretrain" else base or folder.name,
        "order": {"pretrain": 0, "lora": 1, "full_sft": 2}.get(stage, 3),
        "rate": rate or 0,
        "correct": correct[0] if correct else 0,
    }


def choose_headline(arms: list[dict]) -> list[str]:
    """Choose what the page opens on: of the largest family, the base, 2 adapters, full fine-tuning.

    The adapters are that of the lowest learning rate (MiniMind's) and that with the most correct.
    """
    families = [arm["family"] for arm in arms]
    family = [arm for arm in arms if arm["family"] == max(families, key=families.count)]
    adapters = [arm for arm in family if arm["order"] == 1]
    chosen = [arm for arm in family if arm["order"] == 0][:1]
    if adapters:
        chosen.append(min(adapters, key=lambda arm: arm["rate"]))
        chosen.append(max(adapters, key=lambda arm: (arm["correct"], arm["rate"])))
    tuned = [arm for arm in family if arm["order"] == 2]
    chosen += [max(tuned, key=lambda arm: arm["correct"])] if tuned else []
    return list(dict.fromkeys(arm["name"] for arm in chosen or family[:4]))


def main(argv: list[str] | None = None) -> int:
    """Write index.html beside the folders."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--outputs", type=Path, default=OUTPUT_DIR)
    args = parser.parse_args(argv)
    write_text(args.outputs / "index.html", build_page(args.outputs))
    print(f"wrote {args.outputs / 'index.html'}")
    return 0


if __name__ == "__main__":
    run_script(main)
