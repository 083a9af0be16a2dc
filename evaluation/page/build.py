"""Build the page on which outputs are read: one HTML file, which asks no network for anything.

    python evaluation/page/build.py     # evaluation/model_outputs/index.html, of every folder there

page.html is the frame, page.css its style, page.js its behavior. Outputs are JSON in a data block
whose every `<` is escaped; page.js puts them on the page as text nodes. A Content-Security-Policy
runs the one script and the one style of this build, known by their hashes, and nothing else.
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
from evaluation.probe.outputs import FLAGS, OUTPUT_DIR
from evaluation.probe.prompts import PROMPTS_FILE
from model.files import UserError, escape_control, make_parser, read_json, run_script, write_text

FOLDER = Path(__file__).resolve().parent


def build_page(outputs: Path) -> str:
    """Build the page of all folders in `outputs` that hold samples."""
    folders = sorted(path.parent for path in outputs.glob("*/samples.jsonl"))
    if not folders:
        raise UserError(f"{outputs}: holds no outputs; probe a checkpoint with eval_llm.py first")
    parts = {"data": json.dumps(collect_data(folders)).replace("<", "\\u003c")}
    for name, file in {"style": "page.css", "script": "page.js"}.items():
        parts[name] = (FOLDER / file).read_text("utf-8")
        digest = base64.b64encode(hashlib.sha256(parts[name].encode()).digest()).decode()
        parts[f"{name}_hash"] = f"sha256-{digest}"
    return Template((FOLDER / "page.html").read_text("utf-8")).substitute(parts)


def collect_data(folders: list[Path]) -> dict:
    """Collect prompts, arms and answers; an answer refers to its prompt by number."""
    prompts, arms = {}, []
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
    """Describe one answer; its text comes in 3 parts: before a loop, the loop, after it."""
    output, outcome = sample["output"], sample.get("outcome")
    kinds = dict.fromkeys(filter(None, [outcome, *(flag for flag in FLAGS if sample.get(flag))]))
    loop = LOOP.search(output) if "loop" in kinds else None
    start, end = loop.span() if loop else (len(output), len(output))
    return {
        "decoding": sample["decoding"],
        "seed": sample["seed"],
        "text": [*map(escape_control, (output[:start], output[start:end], output[end:]))],
        "translation": escape_control(sample["output_translation"] or ""),
        "kinds": list(kinds),
    }


def describe_arm(folder: Path) -> dict:
    """Describe what a folder's answers come from, by its results.json."""
    path = folder / "results.json"
    results = read_json(path) if path.is_file() else {}
    training = results.get("training") or {"title": folder.name}
    rate, base, stage, parts = map(training.get, ("learning_rate", "base", "stage", "parts"))
    rows = reversed(results.get("summary", []))  # of several decodings the first counts
    shares = {row["measure"]: row["value"] for row in rows if row["section"] == "all"}
    notes = [f"learning rate {rate:g}" if rate else "", f"from {base}" if base else ""]
    prompts = results.get("provenance", {}).get("prompts", {}).get("file", PROMPTS_FILE.name)
    notes.append("" if prompts == PROMPTS_FILE.name else f"prompts of {prompts}")
    return {
        "name": escape_control(folder.name),
        "title": escape_control(training["title"]),
        "note": escape_control(", ".join(filter(None, notes))),
        "family": folder.name if stage == "pretrain" else base or folder.name,
        "order": {"pretrain": 0, "lora": 1, "full_sft": 2 + (parts != "all weights")}.get(stage, 3),
        "rate": rate or 0,
        "correct": shares.get("correct", 0),
    }


def choose_headline(arms: list[dict]) -> list[str]:
    """Choose what the page opens on: of the largest family, the base, 2 adapters, full fine-tuning.

    All answered what most arms answered. The adapters are that of the lowest learning
    rate (MiniMind's) and that with the most correct.
    """
    asked = [frozenset(answer["prompt"] for answer in arm["answers"]) for arm in arms]
    common = max(asked, key=asked.count)  # only these answers can be compared
    arms = [arm for arm, prompts in zip(arms, asked, strict=True) if prompts >= common]
    families = [arm["family"] for arm in arms]
    family = [arm for arm in arms if arm["family"] == max(families, key=families.count)]
    base, adapters, tuned = ([a for a in family if a["order"] == order] for order in range(3))
    slowest = sorted(adapters, key=lambda arm: arm["rate"])[:1]
    best = [sorted(kind, key=lambda arm: arm["correct"])[-1:] for kind in (adapters, tuned)]
    chosen = [*base[:1], *slowest, *best[0], *best[1]] or family[:4]
    return list(dict.fromkeys(arm["name"] for arm in chosen))


def main(argv: list[str] | None = None) -> None:
    """Write index.html beside the folders."""
    parser = make_parser(__doc__)
    parser.add_argument("--outputs", type=Path, default=OUTPUT_DIR)
    args = parser.parse_args(argv)
    write_text(args.outputs / "index.html", build_page(args.outputs))
    print(f"wrote {args.outputs / 'index.html'}")


if __name__ == "__main__":
    run_script(main)
