"""Save and show outputs: what `eval_llm.py` writes for a checkpoint, and the tables it prints.

    samples.jsonl   a line per prompt, decoding and seed
    samples.md      the same to read; begins with what was trained
    results.json    what was trained, shares with intervals, NLL, provenance
    nll.json        NLL of each held-out sequence, where it was measured

Whatever a model or a prompt says is shown as text: it can't steer a terminal or act as Markdown.
"""

import itertools
import json
import re
from html import escape
from itertools import groupby
from pathlib import Path

import pandas as pd

from evaluation.probe.measures import SHARES, summarize
from model.files import REPO_DIR, UserError, escape_control, read_json, write_text

OUTPUT_DIR = REPO_DIR / "evaluation" / "model_outputs"
RUN_COLUMNS = ["stage", "status", "parameters", "trainable_parameters", "step", "steps"]
PLAIN_NAMES = {"square": "q and o", "all-linear": "all layers", "mlp": "the MLP"}
UNITS = dict.fromkeys(SHARES, ".1%") | {"tokens": ".1f"}  # how a measure is written; else .3f


def escape_markdown(text: str) -> str:
    """Write a text as one line of inert Markdown."""
    plain = escape(escape_control(" ".join(text.split())), quote=False)
    return re.sub(r"([\\`*_\[\]|~])", r"\\\1", plain)


def fence(text: str) -> str:
    """Put a text into a code fence that nothing in it can close."""
    ticks = "`" * max(3, 1 + max((len(run) for run in re.findall("`+", text)), default=0))
    return f"{ticks}text\n{escape_control(text)}\n{ticks}"


def describe_training(folder: Path) -> dict:
    """Describe what was trained, from run.json, or from adapter_config.json of a foreign adapter.

    Returns:
        title (a plain name of the arm), parts, base, data, learning_rate, steps; None: not known.
    """
    run, adapter = (
        read_json(folder / name) if (folder / name).is_file() else {}
        for name in ("run.json", "adapter_config.json")
    )
    settings, stage = run.get("settings", {}), run.get("stage")
    base = settings.get("from_weight", adapter.get("base_model_name_or_path"))
    data = settings.get("data_path") or []
    if adapter or stage == "lora":
        rank = settings.get("lora_rank", adapter.get("r"))
        alpha = settings.get("lora_alpha", adapter.get("lora_alpha"))
        targets = settings.get("lora_targets") or ", ".join(adapter.get("target_modules", []))
        whole = ", ".join(settings.get("modules_to_save") or adapter.get("modules_to_save") or [])
        tokens = ", ".join(map(str, settings.get("train_tokens") or []))
        parts = f"LoRA on {targets}, rank {rank}, alpha {alpha:g}"
        parts += f"; whole: {whole}" * bool(whole) + f"; rows of: {tokens}" * bool(tokens)
        title = f"LoRA on {PLAIN_NAMES.get(targets, targets)}, r={rank}"
        title += f", and {whole or tokens}" * bool(whole or tokens)
    else:
        trainable = settings.get("trainable", "all")
        parts = "all weights" if trainable == "all" else trainable
        tuned = "full fine-tuning" if trainable == "all" else f"fine-tuning of {trainable}"
        title = {"full_sft": tuned, "pretrain": "base"}.get(stage, folder.name)
    return {
        "title": title,
        "stage": stage,
        "parts": parts if run or adapter else None,
        "parameters": run.get("trainable_parameters"),
        "base": None if base in (None, "none") else Path(base).name,
        "data": [Path(path).name for path in ([data] if isinstance(data, str) else data)],
        "learning_rate": settings.get("learning_rate"),
        "steps": run.get("steps"),
    }


def list_training(training: dict) -> list[str]:
    """Write what was trained as lines of a Markdown list."""
    parts, count, rate = (training[key] for key in ("parts", "parameters", "learning_rate"))
    known = {
        "trained": f"{parts} ({count:,} parameters)" if count else parts,
        "base": training["base"] or ("none: random weights" if parts else None),
        "data": ", ".join(training["data"]),
        "learning rate": f"{rate:g}" if rate else None,
        "steps": training["steps"] and f"{training['steps']:,}",
    }
    lines = [f"- {name}: {escape_markdown(value)}" for name, value in known.items() if value]
    return lines or ["- trained: not known (no run.json beside the weights)"]


def format_summary(summary: pd.DataFrame, with_intervals: bool) -> pd.DataFrame:
    """Write a summary as text, a column a decoding: each measure, and `correct` by section."""
    is_all = summary["section"] == "all"
    is_part = ~is_all & (summary["measure"] == "correct") & (summary["section"].nunique() > 2)
    rows = summary[is_all | is_part].copy()
    rows["cell"] = [f"{row.value:{UNITS.get(row.measure, '.3f')}}" for row in rows.itertuples()]
    if with_intervals:
        texts = [f" [{row.low:.0%}, {row.high:.0%}]" for row in rows.itertuples()]
        rows["cell"] += pd.Series(texts, rows.index).where(rows["low"].notna(), "")
    rows["measure"] += (", " + rows["section"]).where(is_part, "")
    order = sorted(rows["measure"].unique(), key=lambda name: not name.startswith("correct"))
    table = rows.pivot(index="measure", columns="decoding", values="cell")
    return table.loc[order, rows["decoding"].unique()].fillna("-")


def print_summaries(results: dict[str, dict]) -> None:
    """Print a column a checkpoint: each measure under all decodings, and NLL."""
    columns, decodings = {}, ""
    for name, result in results.items():
        column = {kind: f"{nll['nats_per_token']:.3f}" for kind, nll in result["nll"].items()}
        if result["summary"]:
            table = format_summary(pd.DataFrame(result["summary"]), with_intervals=False)
            table = table.rename(index=escape_control)
            decodings = f"\n{' / '.join(table.columns)}:\n"
            column = table.agg(" / ".join, axis=1).to_dict() | column
        columns[escape_control(name)] = column
    print(f"{decodings}{pd.DataFrame(columns).fillna('-').to_string()}")


def print_answers(answers: dict[str, list[dict]], count: int) -> None:
    """Print the first answers of all models to the first prompts, one below the other."""
    columns = zip(*answers.values(), strict=True)
    for samples in itertools.islice(columns, count):
        print(f"\nprompt: {escape_control(samples[0]['prompt'])}")
        width = max(map(len, answers))
        for name, sample in zip(answers, samples, strict=True):
            outcome = f"  [{sample['outcome']}]" if sample["outcome"] else ""
            text = " ".join(sample["output"].split())[:300]
            print(f"  {name:<{width}}  {escape_control(text)}{outcome}")
    print()


def print_table(table: pd.DataFrame) -> None:
    """Print a data frame without its index; missing values are dashes."""
    print(table.round(4).astype(object).fillna("-").to_string(index=False))


def to_records(frame: pd.DataFrame) -> list[dict]:
    """Turn a data frame into JSON objects, a line each."""
    return json.loads(frame.to_json(orient="records", double_precision=6))


def write_outputs(folder: Path, samples: list[dict], results: dict) -> None:
    """Write samples.jsonl, samples.md and results.json, each whole or not at all."""
    folder.mkdir(parents=True, exist_ok=True)
    lines = (escape_control(json.dumps(sample, ensure_ascii=False)) for sample in samples)
    write_text(folder / "samples.jsonl", "".join(line + "\n" for line in lines))
    write_text(folder / "samples.md", write_markdown(folder.name, samples, results["training"]))
    write_text(folder / "results.json", escape_control(write_lines(results)))


def write_lines(results: dict) -> str:
    """Write results as JSON with a line for each key, and for each line of the summary."""
    parts = []
    for key, value in results.items():
        rows = [json.dumps(row) for row in value] if key == "summary" else []
        text = "[\n" + ",\n".join(rows) + "\n]" if rows else json.dumps(value, ensure_ascii=False)
        parts.append(f"{json.dumps(key)}: {text}")
    return "{\n" + ",\n".join(parts) + "\n}\n"


def write_markdown(name: str, samples: list[dict], training: dict) -> str:
    """Write samples.md: what was trained, the measures, then every prompt with its outputs."""
    lines = [f"# Outputs of {escape_markdown(name)}", "", *list_training(training), ""]
    table = format_summary(summarize(samples), with_intervals=True)
    lines += [table.rename(index=escape_markdown).to_markdown(), ""]
    ids = list(dict.fromkeys(sample["id"] for sample in samples))
    by_prompt = sorted(samples, key=lambda sample: ids.index(sample["id"]))
    section = None
    for prompt_id, group in groupby(by_prompt, key=lambda sample: sample["id"]):
        first, *_ = answers = list(group)
        if first["section"] != section:
            section = first["section"]
            lines += [f"## {escape_markdown(section)}", ""]
        lines += [f"### {escape_markdown(prompt_id)}", "", fence(first["prompt"]), ""]
        notes = {"translation": first["prompt_translation"], "reference": first["reference"]}
        lines += [f"{key}: {escape_markdown(text)}  " for key, text in notes.items() if text]
        for answer in answers:
            seed = "" if answer["seed"] is None else f", seed {answer['seed']}"
            lines += ["", f"**{answer['decoding']}{seed}**: {describe_answer(answer)}", ""]
            lines.append(fence(answer["output"]))
            if answer["output_translation"]:
                lines += ["", f"translation: {escape_markdown(answer['output_translation'])}"]
        lines.append("")
    return "\n".join(lines)


def describe_answer(sample: dict) -> str:
    """Name the outcome of an answer, or its flags where it has no check, and its length."""
    flags = [name for name in ("blank", "endless", "loop", "off_topic") if sample[name]]
    words = [sample["outcome"]] if sample["outcome"] else flags
    return ", ".join([*words, f"{sample['tokens']} tokens"]).replace("_", "-")


def list_runs(folder: Path) -> pd.DataFrame:
    """List the runs and checkpoints of a folder: base, stage, status, size, steps, loss."""
    marks = ("run.json", "config.json", "adapter_config.json")
    paths = sorted(folder.iterdir()) if folder.is_dir() else []
    found = [path for path in paths if any((path / mark).is_file() for mark in marks)]
    if not found:
        raise UserError(f"--list {folder}: holds no run; train something first")
    rows = []
    for path in found:
        run = read_json(path / "run.json") if (path / "run.json").is_file() else {}
        facts = {"name": escape_control(path.name), "base": describe_training(path)["base"]}
        rows.append(facts | {key: run.get(key) for key in [*RUN_COLUMNS, "eval_loss"]})
    return pd.DataFrame(rows)
