"""Saved outputs: what `eval_llm.py` writes, and the table it prints.

    samples.jsonl   a line per prompt, decoding and seed
    samples.md      the same to read
    results.json    rates with intervals, NLL, provenance

Whatever a model or a prompt says is shown as text: it can't steer a terminal or act as Markdown.
"""

import json
import re
from collections import defaultdict
from html import escape
from pathlib import Path

from dataset.lm_dataset import DataError
from dataset.untrusted import shown
from model.model_minimind import write_text

FLAGS = ("blank", "runaway", "loop")


def inline(text: str) -> str:
    """`text` as one line of inert Markdown."""
    plain = escape(shown(" ".join(text.split())), quote=False)
    return re.sub(r"([\\`*_\[\]|~])", r"\\\1", plain)


def fenced(text: str) -> str:
    """`text` in a code fence that nothing in it can close."""
    longest = max((len(run) for run in re.findall("`+", text)), default=0)
    fence = "`" * max(3, longest + 1)
    return f"{fence}text\n{shown(text)}\n{fence}"


def as_jsonl(samples: list[dict]) -> str:
    """One JSON object a line, readable Chinese, no character that could steer a terminal."""
    lines = (shown(json.dumps(sample, ensure_ascii=False)) for sample in samples)
    return "".join(line + "\n" for line in lines)


def read_translations(path: Path) -> dict[tuple[str, str], str]:
    """Translations in an earlier samples.jsonl by prompt and output, whatever the decoding.

    Raises:
        DataError: a line is no sample.
    """
    if not path.is_file():
        return {}
    known = {}
    for number, line in enumerate(path.read_bytes().split(b"\n"), start=1):
        try:
            old = json.loads(line) if line else None
            if old and old["output_translation"]:
                known[old["prompt"], old["output"]] = old["output_translation"]
        except (ValueError, KeyError, TypeError) as error:
            raise DataError(
                f"{path}:{number}: not a sample ({error}); mend the line, or remove the file and "
                "with it its translations"
            ) from error
    return known


def verdict(sample: dict) -> str:
    """The measures of a sample in a few words."""
    words = [f"{sample['tokens']} tokens"]
    words += [flag for flag in FLAGS if sample[flag]]
    if sample["check"]:
        loose = "passed loosely" if sample["check_loose"] else "failed"
        words.append("check " + ("passed" if sample["check_strict"] else loose))
    return ", ".join(words)


def as_markdown(name: str, samples: list[dict], results: dict) -> str:
    """samples.md: the results as a table, then every prompt with its outputs."""
    lines = [f"# Outputs of {inline(name)}", "", "Written by `eval_llm.py`; do not edit.", ""]
    lines += markdown_table(table_rows(name, results))
    by_prompt: dict[str, list[dict]] = defaultdict(list)
    for sample in samples:
        by_prompt[sample["id"]].append(sample)
    section = None
    for prompt_id, group in by_prompt.items():
        first = group[0]
        if first["section"] != section:
            section = first["section"]
            lines += ["", f"## {inline(section)}"]
        lines += ["", f"### {inline(prompt_id)}", "", "Prompt:", "", fenced(first["prompt"])]
        if first["prompt_translation"]:
            lines += ["", f"Translation: {inline(first['prompt_translation'])}"]
        if first["check"]:
            lines += ["", f"Check: {inline(json.dumps(first['check'], ensure_ascii=False))}"]
        for sample in group:
            seed = "" if sample["seed"] is None else f", seed {sample['seed']}"
            lines += ["", f"**{sample['decoding']}{seed}** ({verdict(sample)}):", ""]
            lines.append(fenced(sample["output"]))
            if sample["output_translation"]:
                lines += ["", f"Translation: {inline(sample['output_translation'])}"]
    return "\n".join(lines) + "\n"


COLUMNS = (
    "checkpoint",
    "decoding",
    "NLL",
    "strict",
    "loose",
    "blank",
    "runaway",
    "loop",
    "seq-rep-4",
    "diversity",
    "tokens",
)


def table_rows(name: str, results: dict) -> list[list[str]]:
    """One row of `COLUMNS` for every decoding of a checkpoint."""
    rows = []
    for decoding, result in results["decodings"].items():
        rates = [result[key]["rate"] for key in ("check_strict", "check_loose", *FLAGS)]
        means = [result["mean_seq_rep_4"], result["mean_diversity"]]
        is_reference = decoding == "references"
        nll = None if is_reference or not results["nll"] else results["nll"]["nats_per_token"]
        row = ["-" if is_reference else name, decoding, "-" if nll is None else f"{nll:.3f}"]
        row += ["-" if value is None else f"{100 * value:.1f}%" for value in rates]
        row += [f"{value:.3f}" for value in means] + [f"{result['mean_tokens']:.1f}"]
        rows.append(row)
    return rows


def markdown_table(rows: list[list[str]]) -> list[str]:
    """The rows of `table_rows` as Markdown lines."""
    cells = [list(COLUMNS), ["---"] * len(COLUMNS), *([inline(row[0]), *row[1:]] for row in rows)]
    return ["| " + " | ".join(row) + " |" for row in cells]


def print_table(rows: list[list[str]], decodings: list[str]) -> None:
    """The rows of all checkpoints, those of one decoding together."""
    order = ["references", *decodings]
    rows = list(map(list, dict.fromkeys(map(tuple, rows))))  # the references once
    rows.sort(key=lambda row: order.index(row[1]))  # stable: checkpoints stay in order
    cells = [list(COLUMNS), *([shown(row[0]), *row[1:]] for row in rows)]
    widths = [max(len(row[i]) for row in cells) for i in range(len(COLUMNS))]
    for row in cells:
        left = [cell.ljust(width) for cell, width in zip(row[:2], widths[:2], strict=True)]
        right = [cell.rjust(width) for cell, width in zip(row[2:], widths[2:], strict=True)]
        print("  ".join(left + right))


def write_outputs(folder: Path, name: str, samples: list[dict], results: dict) -> None:
    """The three files, each written aside and moved into place."""
    folder.mkdir(parents=True, exist_ok=True)
    text = json.dumps(results, indent=2, ensure_ascii=False)
    write_text(folder / "samples.jsonl", as_jsonl(samples))
    write_text(folder / "samples.md", as_markdown(name, samples, results))
    write_text(folder / "results.json", shown(text) + "\n")
