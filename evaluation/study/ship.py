"""Put kept weights of the study into model/trained/, where each folder has a card.

    python evaluation/study/ship.py 1.3M-lora-original   # a name of model_outputs/names.csv
    python evaluation/study/ship.py                      # write the cards of all folders again
    python evaluation/study/ship.py xs-world-wrapped42-all_r16-e4-lr0.003-s4  # any other adapter

run.py keeps the weights of round 3 in out/study/kept/, rounded to bfloat16. A card's facts come
from the folder's run.json, and its shares from runs.jsonl. Adapters that have no name in names.csv
go to evaluation/study/adapters/, where `eval_llm.py --model` finds them under the run's id.
"""

import argparse
import shlex
import shutil
import sys
from pathlib import Path

import pandas as pd
from huggingface_hub import ModelCard, ModelCardData

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from evaluation.probe.names import SHIPPED_DIR, list_shipped, read_names
from evaluation.probe.outputs import OUTPUT_DIR
from evaluation.study.analysis import read_prompt_table
from evaluation.study.names import SIZES
from evaluation.study.results import read_runs
from evaluation.study.round3 import Round3
from evaluation.study.round3_tables import WAY_TITLES, list_one_turn, share_asked
from evaluation.study.settings import MAIN_BASE, RESULTS_DIR, read_study
from model.cli import UserError, make_parser, run_script
from model.files import REPO_DIR, read_json, write_json
from model.model_lora import ADAPTER_CONFIG

ADAPTER_DIR = RESULTS_DIR / "adapters"
BASES = {
    "1.3M": "model/base_xs",
    "5.5M": "evaluation/study/bases/s-world-wrapped42",
    "25M": "evaluation/study/bases/m26-world-wrapped42",
}
CARD = """\
---
{{ card_data }}
---

# {{ title }}, {{ size }} parameters

{{ description }}

- **Base**: `{{ base }}`, which has read about the small world and never saw an instruction.
- **Data**: {{ data }}.
- **Training**: learning rate {{ rate }}, {{ steps }} steps with batches of {{ batch }} \
({{ epochs }} epochs), seed {{ seed }}. {{ trained }} weights trained.
{% if is_adapter -%}
- **PEFT**: finds the base under this path from the repository's root alone; run from elsewhere, \
write the base's whole path into `adapter_config.json`. `eval_llm.py` finds it from anywhere.
{% endif -%}
- **Weights**: bfloat16, and the shares below were measured on these rounded weights.
- **License**: Apache-2.0, like the repository. All its data is our own.

| asked | correct, of {{ prompts }} composed prompts |
|:---|:---|
{% for way, share in shares.items() -%}
| {{ way }} | {{ share }} |
{% endfor %}
Answers are greedy. `evaluation/REPORT.md` says what counts as correct, and how little such a \
share says about instructions in general.

    python eval_llm.py --model model/trained/{{ name }}   # ask it
    {{ train }}   # train it again

"""


def ship(name: str, save_dir: Path) -> None:
    """Copy kept weights: those with a name in words into model/trained/, others into adapters/.

    Raise a UserError if neither a name nor a run's adapter is meant, or weights are not there.
    """
    names = read_names(OUTPUT_DIR)
    known = names[names["name"] == name]
    if not known.empty:
        run = known.index[0]
        folder = SHIPPED_DIR / name
        size = name.partition("-")[0]
    elif name.partition("-")[0] in SIZES:
        run = name
        folder = ADAPTER_DIR / name
        size = SIZES[name.partition("-")[0]]
    else:
        raise UserError(f"{name}: is no name of {OUTPUT_DIR / 'names.csv'} and no run's id")
    source = save_dir / "kept" / run
    if not source.is_dir():
        raise UserError(f"{source}: not there; python evaluation/study/run.py --only '{run}'")
    is_adapter = (source / ADAPTER_CONFIG).is_file()
    if is_adapter and f"-{MAIN_BASE}-" not in run:
        raise UserError(f"{run}: its base does not ship, so its adapter could not be opened")
    if folder.parent == ADAPTER_DIR and not is_adapter:
        raise UserError(f"{source}: is a whole model, and {ADAPTER_DIR} has adapters alone")
    unwanted = shutil.ignore_patterns("tokenizer*") if is_adapter else None
    shutil.copytree(source, folder, ignore=unwanted, dirs_exist_ok=True)
    shutil.copy(save_dir / run / "run.json", folder / "run.json")
    if is_adapter:
        # A path from the repository's root fits every clone.
        config = read_json(folder / ADAPTER_CONFIG)
        config["base_model_name_or_path"] = BASES[size]
        write_json(folder / ADAPTER_CONFIG, config)


def write_card(folder: Path, found: Round3) -> None:
    """Write a folder's README.md, which the hub shows as the model's card."""
    model = read_names(OUTPUT_DIR).loc[folder.name]
    record = read_json(folder / "run.json")
    settings = record["settings"]
    run = settings["run_name"]
    size = folder.name.partition("-")[0]
    files = ", ".join(f"`{file['name']}`" for file in record["train_data"]["files"])
    is_adapter = (folder / ADAPTER_CONFIG).is_file()
    data = ModelCardData(
        language="en",
        license="apache-2.0",
        library_name="peft" if is_adapter else "transformers",
        pipeline_tag="text-generation",
    )
    card = ModelCard.from_template(
        data,
        template_str=CARD,
        name=folder.name,
        title=model["title"][0].upper() + model["title"][1:],
        size=size,
        description=model["description"],
        base=BASES[size],
        is_adapter=is_adapter,
        data=f"{files}, {record['train_data']['records']:,} records (dataset/world/generate.py)",
        rate=f"{settings['learning_rate']:g}",
        steps=f"{record['steps']:,}",
        batch=settings["batch_size"],
        epochs=f"{settings['epochs']:g}",
        seed=settings["seed"],
        trained=f"{record['trainable_parameters']:,}",
        prompts=f"{len(list_one_turn(found)):,}",
        shares=list_shares(found, run),
        train=write_training(record, BASES[size], folder.name),
    )
    card.save(folder / "README.md")


def write_training(record: dict, base: str, name: str) -> str:
    """Write the command that trains a run again, from the base that ships."""
    settings = record["settings"]
    is_lora = record["stage"] == "lora"
    words = ["python", f"trainer/train_{record['stage']}.py"]
    words += ["--lora_name" if is_lora else "--run_name", name, "--from_weight", base]
    flags = ["learning_rate", "epochs", "seed", "dtype"]
    flags += ["lora_targets", "lora_rank", "lora_alpha", "lora_init"] if is_lora else ["trainable"]
    for flag in flags:
        words += [f"--{flag}", str(settings[flag])]
    return shlex.join(words)


def list_shares(found: Round3, run: str) -> dict[str, str]:
    """List the shares of a run's correct answers by the way of asking."""
    lines = found.runs[found.runs.id == run]
    shares = {}
    for way, title in WAY_TITLES.items():
        share = share_asked(found, lines, way, "correct")
        if not pd.isna(share):
            shares[title] = f"{share:.0%}"
    return shares


def main(argv: list[str] | None = None) -> None:
    """Ship the runs that are named, and write all cards."""
    parser: argparse.ArgumentParser = make_parser(__doc__)
    parser.add_argument("names", nargs="*", metavar="NAME", help="of names.csv, or a run")
    parser.add_argument("--save_dir", type=Path, default=REPO_DIR / "out/study", help="out/study")
    args = parser.parse_args(argv)
    for name in args.names:
        ship(name, args.save_dir)
    lines = read_runs(RESULTS_DIR, read_study().edition)
    is_ours = (lines["round"] == 3) & (lines.status == "completed")
    found = Round3(lines[is_ours], read_prompt_table(RESULTS_DIR / "prompts_3.csv"))
    for folder in list_shipped():
        write_card(folder, found)
        print(f"wrote {folder.relative_to(REPO_DIR)}/README.md")


if __name__ == "__main__":
    run_script(main)
