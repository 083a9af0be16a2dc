"""Save and show outputs: what `eval_llm.py` writes for a checkpoint, and what it prints.

    samples.jsonl   a line per prompt, decoding and seed
    samples.md      the same to read; begins with what was trained
    results.json    what was trained, shares with intervals, NLL, provenance
    nll.json        NLL of each held-out sequence, where it was measured
    minus_NAME.csv  paired differences from the first checkpoint, where several were probed

Whatever a model or a prompt says is shown as text: it can't steer a terminal or act as Markdown.
"""

import argparse
import json
import re
from html import escape
from pathlib import Path

import pandas as pd

from dataset.world.generate import write_records
from model.checkpoint import WEIGHTS_FILE
from model.files import UserError, escape_control, file_sha256, read_json, write_json, write_text
from model.model_lora import ADAPTER_WEIGHTS
from trainer.arguments import choose_device
from trainer.run_folder import describe_machine

OUTPUT_DIR = Path(__file__).resolve().parents[1] / "model_outputs"
PLAIN_NAMES = {"square": "q and o", "all-linear": "all layers", "mlp": "the MLP"}
TUNED = {"all": "full fine-tuning", "frozen-embeddings": "full fine-tuning, embedding frozen"}
FLAGS = ("blank", "endless", "loop", "off_topic")


def escape_markdown(text: str) -> str:
    """Write a text as one line of inert Markdown."""
    plain = escape(escape_control(" ".join(text.split())), quote=False)
    return re.sub(r"([\\`*_\[\]|~])", r"\\\1", plain)


def fence(text: str) -> str:
    """Put a text into a code fence that nothing in it can close."""
    ticks = "`" * max(3, 1 + max((len(run) for run in re.findall("`+", text)), default=0))
    return f"{ticks}text\n{escape_control(text)}\n{ticks}"


def describe_training(folder: Path) -> dict:
    """Describe what was trained, from run.json; `title` is its plain name, None is not known."""
    run = read_json(folder / "run.json") if (folder / "run.json").is_file() else {}
    stage, settings = run.get("stage"), run.get("settings", {})
    if stage == "lora":
        rank, whole, tokens = map(settings.get, ("lora_rank", "modules_to_save", "train_tokens"))
        extra, targets = ", ".join([*(whole or ()), *(tokens or ())]), settings["lora_targets"]
        parts = f"LoRA on {targets}" if rank else extra
        names = [f"LoRA on {PLAIN_NAMES.get(targets, targets)}, r={rank}"] * bool(rank)
        title = ", and ".join([*names, *filter(None, [extra])])
    else:
        parts = settings.get("trainable", "all")
        tuned = TUNED.get(parts, f"fine-tuning of {parts}")
        parts = "all weights" if parts == "all" else parts
        title = {"full_sft": tuned, "pretrain": "base"}.get(stage, folder.name)
    base = settings.get("from_weight")
    keys = ("lora_rank", "lora_alpha", "modules_to_save", "train_tokens", "learning_rate")
    return {
        "title": title,
        "parts": parts if stage in ("lora", "full_sft", "pretrain") else "not known",
        "parameters": run.get("trainable_parameters"),
        **{key: settings.get(key) for key in keys},
        "steps": run.get("steps"),
        "base": None if base in (None, "none") else Path(base).name,
        "data": [Path(path).name for path in settings.get("data_path") or []],
        "stage": stage,
    }


def describe_probe(path: Path, args: argparse.Namespace) -> dict:
    """Describe where results come from: weights, prompts, settings, machine, versions."""
    weights = next(filter(Path.is_file, (path / ADAPTER_WEIGHTS, path / WEIGHTS_FILE)))
    keys = ("decoding", "seeds", "max_new_tokens", "batch_size", "dtype", "translator")
    keys += ("no_template", "limit", "wrap_documents")
    return {
        "weights_sha256": file_sha256(weights),
        "prompts": {"file": args.prompts.name, "sha256": file_sha256(args.prompts)},
        **{k: vars(args)[k] and vars(args)[k].resolve().name for k in ("judge", "tokenizer_path")},
        **{key: vars(args)[key] for key in keys},
        **describe_machine(choose_device(args.device)),
    }


def write_outputs(
    folder: Path, samples: list[dict], summary: pd.DataFrame, results: dict[str, dict]
) -> None:
    """Write samples.jsonl, samples.md and results.json (`results` and `summary`)."""
    write_records(folder / "samples.jsonl", samples)
    page = [f"# Outputs of {escape_markdown(folder.name)}", ""]
    for key, value in results["training"].items():
        if value:
            text = ", ".join(map(str, value)) if isinstance(value, list) else str(value)
            page.append(f"- {key.replace('_', ' ')}: {escape_markdown(text)}")
    rows = summary[summary["section"].eq("all") | summary["measure"].eq("correct")]
    keys = ["measure", "section"]
    table = rows.pivot_table(index=keys, columns="decoding", values="value", sort=False).round(3)
    page += ["", table.rename(index=escape_markdown).reset_index().to_markdown(index=False), ""]
    write_text(folder / "samples.md", "\n".join([*page, *list_answers(samples)]) + "\n")
    rows = json.loads(summary.to_json(orient="records", double_precision=6))
    write_json(folder / "results.json", results | {"summary": rows})


def list_answers(samples: list[dict]) -> list[str]:
    """Write every prompt with its answers as lines of Markdown, section by section."""
    lines, by_prompt, section = [], {}, None
    for sample in samples:
        by_prompt.setdefault(sample["id"], []).append(sample)
    for prompt_id, answers in by_prompt.items():
        first = answers[0]
        if first["section"] != section:
            section = first["section"]
            lines += [f"## {escape_markdown(section)}", ""]
        lines += [f"### {escape_markdown(prompt_id)}", "", fence(first["prompt"]), ""]
        notes = {"translation": first["prompt_translation"], "reference": first["reference"]}
        lines += [f"{key}: {escape_markdown(text)}  " for key, text in notes.items() if text]
        for answer in answers:
            seed = "" if answer["seed"] is None else f", seed {answer['seed']}"
            flags = [flag.replace("_", "-") for flag in FLAGS if answer[flag]]
            kinds = dict.fromkeys(filter(None, [answer["outcome"], *flags]))
            kinds = ", ".join([*kinds, f"{answer['tokens']} tokens"])
            lines += ["", f"**{answer['decoding']}{seed}**: {kinds}", "", fence(answer["output"])]
            if answer["output_translation"]:
                lines += ["", f"translation: {escape_markdown(answer['output_translation'])}"]
        lines.append("")
    return lines


def print_table(table: pd.DataFrame) -> None:
    """Print a data frame without its index; missing values are dashes."""
    whole = table.convert_dtypes().astype(object).fillna("-")
    print(whole.to_markdown(index=False, disable_numparse=True))


def print_answers(answers: dict[str, list[dict]], count: int) -> None:
    """Print all models' answers to `count` prompts from the whole file, in the first decoding."""
    columns = list(zip(*answers.values(), strict=True))
    prompts = len({samples[0]["id"] for samples in columns})
    for samples in columns[: prompts : max(1, prompts // max(1, count))][:count]:
        print(f"\nprompt: {escape_control(samples[0]['prompt'])}")
        width = max(map(len, answers))
        for name, sample in zip(answers, samples, strict=True):
            outcome = f"  [{sample['outcome']}]" if sample["outcome"] else ""
            text = " ".join(sample["output"].split())[:160]
            print(escape_control(f"  {name:<{width}}  {text}{outcome}"))


def print_models(summaries: dict[str, pd.DataFrame], nll: dict[str, dict[str, dict]]) -> None:
    """Print a row a model: correct by section, never ends, NLL; slashes part the decodings."""
    rows = []
    for name, found in nll.items():
        row = {"trained": escape_control(name)}
        if name in summaries:
            groups = summaries[name].groupby(["measure", "section"], sort=False)["value"]
            for (measure, section), values in sorted(groups, key=lambda item: item[0][0]):
                if (measure, section == "all") in (("correct", False), ("endless", True)):
                    column = "never ends" if measure == "endless" else f"correct, {section}"
                    row[escape_control(column)] = " / ".join(map("{:.0%}".format, values))
        rows.append(row | {kind: f"{one['nats_per_token']:.3f}" for kind, one in found.items()})
    for summary in list(summaries.values())[:1]:
        print(f"\n{' / '.join(summary['decoding'].unique())}:")
    print_table(pd.DataFrame(rows))


def write_differences(folder: Path, first: str, tables: list[pd.DataFrame]) -> None:
    """Write the differences from the first model as CSV; print 4, under the first decoding."""
    table = pd.concat(tables)
    table.to_csv(folder / f"minus_{first}.csv", index=False, float_format="%.6g")
    shown = table[table["measure"].isin(["correct", "endless", "nll", "text_nll"])]
    texts = [
        f"{row.measure} {row.difference:+.3f} [{row.low:+.3f}, {row.high:+.3f}]"
        for row in shown.drop_duplicates("measure").itertuples()
    ]
    print(escape_control(f"{folder.name} minus {first}, 95% intervals: {', '.join(texts)}"))


def list_runs(folder: Path) -> pd.DataFrame:
    """List the runs and checkpoints of a folder: base, stage, status, size, steps, loss."""
    marks = ("run.json", "config.json", "adapter_config.json")
    found = sorted({file.parent for mark in marks for file in folder.glob(f"*/{mark}")})
    if not found:
        raise UserError(f"--list {folder}: holds no run; train something first")
    rows = []
    for path in found:
        run = read_json(path / "run.json") if (path / "run.json").is_file() else {}
        base = describe_training(path)["base"]
        rows.append(run | {"name": escape_control(path.name), "base": base})
    columns = ["name", "base", "stage", "status", "parameters", "trainable_parameters"]
    return pd.DataFrame(rows).reindex(columns=[*columns, "step", "steps", "eval_loss"]).round(4)
