"""Save outputs: what `eval_llm.py` writes for a checkpoint.

    samples.jsonl   a line per prompt, decoding and seed
    samples.md      the same to read; begins with what was trained, and how it was asked
    results.json    what was trained, shares with intervals, NLL, provenance
    nll.json        NLL of each held-out sequence, where it was measured
    minus_NAME.csv  paired differences from the first checkpoint, where several were probed

markdown.py makes samples.md from samples.jsonl and results.json, so no model has to be asked again
when its form changes.
"""

import argparse
import json
from pathlib import Path

import pandas as pd

from dataset.lm_dataset import write_records
from evaluation.probe.markdown import escape_markdown as escape_markdown  # for importers
from evaluation.probe.markdown import render_samples
from evaluation.probe.names import name_folder
from model.checkpoint import WEIGHTS_FILE
from model.files import file_sha256, read_json, write_json, write_text
from model.machine import choose_device, describe_machine
from model.model_lora import ADAPTER_WEIGHTS
from model.model_minimind import MiniMindForCausalLM, list_weights

OUTPUT_DIR = Path(__file__).resolve().parents[1] / "model_outputs"
PLACES = {"square": "q and o", "all-linear": "all layers", "mlp": "the MLP"}  # of --lora_targets
TUNED = {"all": "full fine-tuning", "frozen-embeddings": "full fine-tuning, embedding frozen"}
FEW_TOKENS = 4  # of --train_tokens: a title names no more


def describe_training(folder: Path) -> dict:
    """Describe what was trained, from run.json; `title` is its plain name, None is not known."""
    run = read_json(folder / "run.json") if (folder / "run.json").is_file() else {}
    stage = run.get("stage")
    settings = run.get("settings", {})
    parts = "not known"
    title = folder.name
    if stage == "lora":
        parts, title = describe_adapter(settings)
    elif stage in ("full_sft", "pretrain"):
        trainable = settings.get("trainable", "all")
        parts = "all weights" if trainable == "all" else trainable
        tuned = TUNED.get(trainable, f"fine-tuning of {trainable}")
        title = "base" if stage == "pretrain" else tuned
    base = settings.get("from_weight")
    return {
        "title": title,
        "parts": parts,
        "parameters": run.get("trainable_parameters"),
        "lora_rank": settings.get("lora_rank"),
        "lora_alpha": settings.get("lora_alpha"),
        "modules_to_save": settings.get("modules_to_save"),
        "train_tokens": settings.get("train_tokens"),
        "learning_rate": settings.get("learning_rate"),
        "steps": run.get("steps"),
        "base": None if base in (None, "none") else Path(base).name,
        "data": [Path(path).name for path in settings.get("data_path") or []],
        "stage": stage,
    }


def describe_adapter(settings: dict) -> tuple[str, str]:
    """Return what an adapter's settings train, in the words of the flags and in plain ones."""
    rank = settings.get("lora_rank")
    targets = settings["lora_targets"]
    whole = settings.get("modules_to_save") or []
    tokens = settings.get("train_tokens") or []
    also = [f"whole {' and '.join(whole)}"] if whole else []
    if tokens:
        named = ", ".join(tokens) if len(tokens) <= FEW_TOKENS else f"{len(tokens)} tokens"
        also.append(f"the rows of {named}")
    extra = " and ".join(also)
    if not rank:
        return ", ".join([*whole, *tokens]), f"training of {extra} alone"
    title = f"LoRA on {PLACES.get(targets, targets)}, rank {rank}"
    return f"LoRA on {targets}", f"{title}, with {extra}" if extra else title


def count_parameters(model: MiniMindForCausalLM) -> int:
    """Count a model's weights, those of an adapter on it left out."""
    weights = list_weights(model).items()
    return sum(tensor.numel() for name, tensor in weights if ".lora_" not in name)


def describe_weights(folder: Path) -> dict[str, str]:
    """Return the name of a checkpoint's folder, and the hash of its weights."""
    names = (ADAPTER_WEIGHTS, WEIGHTS_FILE)
    path = next(folder / name for name in names if (folder / name).is_file())
    return {"name": name_folder(folder), "sha256": file_sha256(path)}


def describe_probe(path: Path, args: argparse.Namespace) -> dict:
    """Describe where results come from: weights, prompts, settings, machine, versions."""
    weights = describe_weights(path)
    prompts = {"file": args.prompts.name, "sha256": file_sha256(args.prompts)}
    return {
        "model": weights["name"],
        "weights_sha256": weights["sha256"],
        "on_weights": args.on_weights and describe_weights(args.on_weights),
        "prompts": prompts,
        "judge": args.judge and args.judge.resolve().name,
        "tokenizer_path": args.tokenizer_path and args.tokenizer_path.resolve().name,
        "decoding": args.decoding,
        "seeds": args.seeds,
        "max_new_tokens": args.max_new_tokens,
        "batch_size": args.batch_size,
        "dtype": args.dtype,
        "translator": args.translator,
        "no_template": args.no_template,
        "limit": args.limit,
        "wrap_documents": args.wrap_documents,
        **describe_machine(choose_device(args.device)),
    }


def write_outputs(
    folder: Path, samples: list[dict], summary: pd.DataFrame, results: dict[str, dict]
) -> None:
    """Write samples.jsonl, results.json (`results` and `summary`) and samples.md."""
    write_records(folder / "samples.jsonl", samples)
    rows = json.loads(summary.to_json(orient="records", double_precision=6))
    write_json(folder / "results.json", results | {"summary": rows})
    write_text(folder / "samples.md", render_samples(folder))


def print_table(table: pd.DataFrame) -> None:
    """Print a data frame without its index; missing values are dashes."""
    whole = table.convert_dtypes().astype(object).fillna("-")
    print(whole.to_markdown(index=False, disable_numparse=True))
