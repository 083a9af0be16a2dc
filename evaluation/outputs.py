"""Saved outputs: what `eval_llm.py` writes, and the table it prints.

    samples.jsonl   a line per prompt, decoding and seed
    samples.md      the same to read
    results.json    rates with intervals, NLL, provenance
    nll.json        NLL of each held-out sequence

Whatever a model or a prompt says is shown as text: it can't steer a terminal or act as Markdown.
"""

import json
import re
from collections import defaultdict
from collections.abc import Collection, Iterable, Sequence
from html import escape
from pathlib import Path

from dataset.command_line import REPO_DIR
from dataset.untrusted import shown
from model.files import write_text

OUTPUT_DIR = REPO_DIR / "evaluation" / "model_outputs"
RESULTS_DIR = REPO_DIR / "evaluation" / "results"
CHECKS = ("check_strict", "check_loose")
FLAGS = ("blank", "runaway", "loop")
# What results.json calls the sequences and the tokens that each NLL is measured on.
NLL_UNITS = {"nll": ("conversations", "response_tokens"), "text_nll": ("blocks", "tokens")}
OFF_TOPIC = "off_topic"  # a flag too, where there is a judge


def inline(text: str) -> str:
    """`text` as one line of inert Markdown."""
    plain = escape(shown(" ".join(text.split())), quote=False)
    return re.sub(r"([\\`*_\[\]|~])", r"\\\1", plain)


def fenced(text: str) -> str:
    """`text` in a code fence that nothing in it can close."""
    longest = max((len(run) for run in re.findall("`+", text)), default=0)
    fence = "`" * max(3, longest + 1)
    return f"{fence}text\n{shown(text)}\n{fence}"


def as_json(result: dict) -> str:
    """JSON with a line for each key, and for each entry of a list of objects."""

    def lines(value: object) -> str:
        if isinstance(value, list) and value and isinstance(value[0], dict):
            return "[\n" + ",\n".join(f"  {json.dumps(row)}" for row in value) + "\n]"
        return json.dumps(value)

    entries = (f"{json.dumps(key)}: {lines(value)}" for key, value in result.items())
    return "{\n" + ",\n".join(entries) + "\n}\n"


def as_jsonl(samples: list[dict]) -> str:
    """One JSON object a line, readable Chinese, no character that could steer a terminal."""
    lines = (shown(json.dumps(sample, ensure_ascii=False)) for sample in samples)
    return "".join(line + "\n" for line in lines)


def rounded(value: float | None) -> float | None:
    """Six decimals, so that a last bit does not make two files differ."""
    return None if value is None else round(value, 6)


def verdict(sample: dict, hidden: Collection[str]) -> str:
    """The measures of a sample in a few words, without those that are not shown."""
    words = [f"{sample['tokens']} tokens"]
    flags = [flag for flag in (*FLAGS, OFF_TOPIC) if flag not in hidden]
    words += [flag.replace("_", " ") for flag in flags if sample[flag]]
    if check := check_result(sample, hidden):
        words.append(f"check {check}")
    return ", ".join(words)


def check_result(sample: dict, hidden: Collection[str]) -> str | None:
    """`passed`, `passed loosely` or `failed`; None without a check, or where it is not shown."""
    if not sample["check"] or "check_strict" in hidden:
        return None
    if sample["check_strict"]:
        return "passed"
    return "passed loosely" if sample["check_loose"] and "check_loose" not in hidden else "failed"


def as_markdown(name: str, samples: list[dict], results: dict) -> str:
    """samples.md: the results as a table, then every prompt with its outputs."""
    lines = [f"# Outputs of {inline(name)}", "", "Written by `eval_llm.py`; do not edit.", ""]
    rows = [[inline(row[0]), *row[1:]] for row in table_rows(name, results)]
    lines += markdown_table(COLUMNS, rows)
    hidden = results["not_shown"]
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
            lines += ["", f"**{sample['decoding']}{seed}** ({verdict(sample, hidden)}):", ""]
            lines.append(fenced(sample["output"]))
            if sample["output_translation"]:
                lines += ["", f"Translation: {inline(sample['output_translation'])}"]
    return "\n".join(lines) + "\n"


# Column, its place in a decoding's results, and how it is written.
RATES_TABLE = {
    "strict": ("check_strict", "rate"),
    "loose": ("check_loose", "rate"),
    "blank": ("blank", "rate"),
    "never ends": ("runaway", "rate"),
    "loop": ("loop", "rate"),
    "off-topic": (OFF_TOPIC, "rate"),
}
# Repetition is of the answers that have 4-grams, whose number stands before it.
TEXT_TABLE = {
    "tokens": ("mean_tokens", "length"),
    "recall": ("mean_content_recall", "number"),
    "with 4-grams": ("n_seq_rep_4", "count"),
    "seq-rep-4": ("mean_seq_rep_4", "number"),
    "diversity": ("mean_diversity", "number"),
    "distinct-2": ("distinct_2", "number"),
    "compression": ("compression_ratio", "number"),
}
NAMES = ("checkpoint", "decoding")
COLUMNS = (*NAMES, "NLL", "text NLL", *RATES_TABLE, *TEXT_TABLE)
ON_TOP = len(COLUMNS) - len(TEXT_TABLE)  # columns of the first of two tables in the terminal
NLL_COLUMNS = ("checkpoint", "NLL", "text NLL")
DIFFERENCE_COLUMNS = (
    "measure",
    "decoding",
    "first",
    "this",
    "difference",
    "interval",
    "equal within",
    "McNemar p",
)


def written(value: float | dict | None, kind: str) -> str:
    """A value of results.json for a table; "-" if there is none or it is not shown."""
    if kind == "rate":
        value = value and value["rate"]
    if value is None:
        return "-"
    forms = {"rate": ".1%", "number": ".3f", "length": ".1f", "count": ",d"}
    return format(value, forms[kind])


def table_rows(name: str, results: dict) -> list[list[str]]:
    """One row of `COLUMNS` for every decoding of a checkpoint."""
    rows = []
    for decoding, result in results["decodings"].items():
        measures = (RATES_TABLE | TEXT_TABLE).values()
        measured = [written(result[key], kind) for key, kind in measures]
        if decoding == "references":
            rows.append(["-", decoding, "-", "-", *measured])
        else:
            _, *nll = nll_row(name, results)
            rows.append([name, decoding, *nll, *measured])
    return rows


def print_nll_counts(results: dict) -> None:
    """What the NLLs of a checkpoint are means over."""
    for name, (sequences, tokens) in NLL_UNITS.items():
        if nll := results[name]:
            title = name.replace("nll", "NLL").replace("_", " ")
            print(f"{title}: {nll[tokens]:,} tokens in {nll[sequences]:,} {sequences}")


def nll_row(name: str, results: dict) -> list[str]:
    """One row of `NLL_COLUMNS`."""
    found = [results["nll"], results["text_nll"]]
    return [name, *(written(nll and nll["nats_per_token"], "number") for nll in found)]


def markdown_table(header: Iterable[str], rows: list[list[str]]) -> list[str]:
    """A Markdown table; cells are Markdown already."""
    header = list(header)
    return [f"| {' | '.join(row)} |" for row in [header, ["---"] * len(header), *rows]]


def difference_rows(found: dict[str, dict[str, dict]], hidden: list[str]) -> list[list[str]]:
    """One row of `DIFFERENCE_COLUMNS` for what `compare` found, by decoding and measure."""
    rows = []
    for decoding, measures in found.items():
        for name, one in measures.items():
            if name not in hidden:
                interval = f"[{one['low']:+.3f}, {one['high']:+.3f}]"
                values = [f"{one['a']:.3f}", f"{one['b']:.3f}", f"{one['difference']:+.3f}"]
                p_value = "-" if one["mcnemar_p"] is None else f"{one['mcnemar_p']:.4f}"
                within = f"{one['equivalent_within']:.3f}"
                rows.append([name, decoding, *values, interval, within, p_value])
    return rows


def print_table(rows: list[list[str]]) -> None:
    """The rows of `table_rows` of all checkpoints as two tables, those of one decoding together."""
    rows = list(map(list, dict.fromkeys(map(tuple, rows))))  # the references once
    order = list(dict.fromkeys(row[1] for row in rows))
    rows.sort(key=lambda row: order.index(row[1]))  # stable: checkpoints stay in order
    print_rows(COLUMNS[:ON_TOP], [row[:ON_TOP] for row in rows])
    print()
    print_rows((*NAMES, *TEXT_TABLE), [row[: len(NAMES)] + row[ON_TOP:] for row in rows])


def print_rows(columns: Sequence[str], rows: list[list[str]]) -> None:
    """A table in the terminal: the first two columns to the left, the others to the right."""
    cells = [list(columns), *([shown(cell) for cell in row] for row in rows)]
    widths = [max(len(row[i]) for row in cells) for i in range(len(columns))]
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


def write_rates(folder: Path, prompts: Path, results: dict) -> None:
    """rates_<prompts>.json, named after the file of the prompts: `results`, and no text."""
    folder.mkdir(parents=True, exist_ok=True)
    text = json.dumps(results, indent=2, ensure_ascii=False)
    write_text(folder / f"rates_{prompts.name.split('.')[0]}.json", shown(text) + "\n")


def write_nll(folder: Path, provenance: dict, nll: dict[str, dict | None]) -> None:
    """nll.json: each NLL with what was measured of its sequences; nothing if none was."""
    if not any(nll.values()):
        return
    folder.mkdir(parents=True, exist_ok=True)
    text = json.dumps({"provenance": provenance, **nll}, ensure_ascii=False)
    write_text(folder / "nll.json", shown(text) + "\n")
