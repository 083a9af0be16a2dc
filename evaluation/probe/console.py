"""Print what was measured: tables, answers side by side, and the runs of a folder.

Whatever a model or a prompt says is printed as text: it can't steer the terminal.
"""

from pathlib import Path

import pandas as pd

from evaluation.probe.outputs import describe_training, print_table
from model.cli import UserError, escape_control
from model.files import read_json

ANSWER_WIDTH = 160  # characters of an answer that are printed
RUN_COLUMNS = [
    "name",
    "base",
    "stage",
    "status",
    "parameters",
    "trainable_parameters",
    "step",
    "steps",
    "eval_loss",
]
PRINTED_MEASURES = ["correct", "endless", "nll", "text_nll"]  # of differences


def print_answers(answers: dict[str, list[dict]], count: int) -> None:
    """Print all models' answers to `count` prompts from the whole file, in the first decoding."""
    if not answers or not count:
        return
    prompts = list(zip(*answers.values(), strict=True))  # a row a prompt, decoding and seed
    asked = len({samples[0]["id"] for samples in prompts})
    spread = max(1, asked // count)
    for samples in prompts[:asked:spread][:count]:
        print("\nprompt:", escape_control(samples[0]["prompt"]))
        for name, sample in zip(answers, samples, strict=True):
            print_answer(name.ljust(max(map(len, answers))), sample)


def print_answer(name: str, sample: dict) -> None:
    """Print the beginning of a model's answer on a line, with its kind."""
    text = " ".join(sample["output"].split())
    words = ["", name, text[:ANSWER_WIDTH]]
    if sample["outcome"]:
        words.append(f"[{sample['outcome']}]")
    print(escape_control("  ".join(words)))


def print_models(summaries: dict[str, pd.DataFrame], nll: dict[str, dict[str, dict]]) -> None:
    """Print a row a model: correct by section, blank, endless, NLL; slashes part the decodings."""
    if summaries:
        first = next(iter(summaries.values()))
        print("\n" + " / ".join(first["decoding"].unique()) + ":")
    rows = []
    for name, measured in nll.items():
        row = {"trained": escape_control(name)}
        if name in summaries:
            row |= list_shares(summaries[name])
        for kind, values in measured.items():
            row[kind] = f"{values['nats_per_token']:.3f}"
        rows.append(row)
    print_table(pd.DataFrame(rows))


def list_shares(summary: pd.DataFrame) -> dict[str, str]:
    """List a model's correct answers by section, its blank and its endless ones, in percent."""
    shares = {}
    for section in summary["section"].unique():
        if section == "all":
            continue
        rows = summary.query("measure == 'correct' and section == @section")
        if not rows.empty:
            shares[escape_control(f"correct, {section}")] = join_percent(rows["value"])
    of_all = summary[summary["section"] == "all"]
    for measure, title in {"blank": "blank", "endless": "never ends"}.items():
        rows = of_all[of_all["measure"] == measure]
        shares[title] = join_percent(rows["value"])
    return shares


def join_percent(shares: pd.Series) -> str:
    """Return shares in percent, with slashes between them."""
    return " / ".join(f"{share:.0%}" for share in shares)


def write_differences(folder: Path, first: str, tables: list[pd.DataFrame]) -> None:
    """Write the differences from the first model as CSV; print 4, under the first decoding."""
    table = pd.concat(tables)
    table.to_csv(folder / f"minus_{first}.csv", index=False, float_format="%.6g")
    shown = table[table["measure"].isin(PRINTED_MEASURES)]
    texts = []
    for row in shown.drop_duplicates("measure").itertuples():
        interval = f"[{row.low:+.3f}, {row.high:+.3f}]"
        texts.append(f"{row.measure} {row.difference:+.3f} {interval}")
    print(escape_control(f"{folder.name} minus {first}, 95% intervals:"), ", ".join(texts))


def list_runs(folder: Path) -> pd.DataFrame:
    """List the runs and checkpoints of a folder: base, stage, status, size, steps, loss."""
    paths = set()
    for mark in ("run.json", "config.json", "adapter_config.json"):
        paths |= {file.parent for file in folder.glob(f"*/{mark}")}
    if not paths:
        raise UserError(f"--list {folder}: holds no run; train something first")
    rows = []
    for path in sorted(paths):
        run = read_json(path / "run.json") if (path / "run.json").is_file() else {}
        run["name"] = escape_control(path.name)
        run["base"] = describe_training(path)["base"]
        rows.append(run)
    return pd.DataFrame(rows).reindex(columns=RUN_COLUMNS).round(4)
