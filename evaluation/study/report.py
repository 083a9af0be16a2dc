"""Write the tables and figures of README.md and evaluation/REPORT.md from the committed results.

    python evaluation/study/report.py      # or: make report

A block stands between `<!-- study:NAME -->` and `<!-- /study:NAME -->`: the figure of this name, if
it has one, and its tables. Files whose content does not change are not written.
"""

import os
import re
import sys
from functools import partial
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import pandas as pd

from dataset.checks import KINDS
from evaluation.study.analysis import Evidence, load_evidence, tabulate_cells, tabulate_nll
from evaluation.study.claims import judge_claims, list_endings
from evaluation.study.edition1 import make_edition1_tables
from evaluation.study.figures import DECODING_TITLES, FIGURES
from evaluation.study.plan import tune_rate
from evaluation.study.results import RESULTS_DIR
from model.files import REPO_DIR, UserError, run_script, write_text

FILES = ("README.md", "evaluation/REPORT.md")
BLOCK = re.compile(r"<!-- study:(\w+) -->\n.*?<!-- /study:\1 -->", re.DOTALL)
HEADLINE = ["base", "seed", "all_r8", "all_r8_vocabulary", "fft"]
CELL = ["size", "title", "learning_rate"]
MEANS = {  # over the runs of a cell: column, divisor, digits
    "NLL of answers": ("answer", 1, 3),
    "NLL of end tokens": ("end", 1, 3),
    "NLL of text": ("nll_text", 1, 3),
    "weights": ("trainable_parameters", 1, 0),
    "steps": ("steps", 1, 0),
    "M tokens": ("tokens", 1e6, 1),
    "TFLOP": ("flops", 1e12, 0),
    "minutes": ("train_seconds", 60, 0),
    "peak GB": ("peak_memory_bytes", 1e9, 2),
}


def to_table(frame: pd.DataFrame) -> str:
    """Return a data frame as a Markdown table; a dash where nothing was measured."""
    if frame.empty:
        return "Not run yet."
    text = frame.astype(object).fillna("-").to_markdown(index=False, disable_numparse=True)
    return re.sub(r"-{3,}", "---", re.sub(r" +\|", " |", text))  # without padding


def spread(cells: pd.DataFrame, index: list[str], names: list[str]) -> pd.DataFrame:
    """Return a row a cell, and a column for each of `names` and each decoding: percent correct."""
    numbers = [(100 * one.value, 100 * one.low, 100 * one.high) for one in cells.share]
    texts = cells.assign(text=["{:.0f} [{:.0f}, {:.0f}]".format(*three) for three in numbers])
    texts["column"] = (
        texts[names].agg(" ".join, axis=1) + ", " + texts.decoding.map(DECODING_TITLES)
    )
    wide = texts.pivot_table("text", index, "column", aggfunc="first", sort=False, observed=True)
    return wide.reset_index()


def tabulate_rates(evidence: Evidence) -> pd.DataFrame:
    """Return the share correct on the tuning half by learning rate, the best rate in bold."""
    rows = []
    for name, arm in evidence.study.arms.items():
        for size in arm.rates:
            sweep = tune_rate(evidence.study, size, name, evidence.runs)
            texts = sweep.shares.map("{:.0%}".format).replace("nan%", "diverged")
            texts = [
                f"**{rate:g}: {text}**" if rate == sweep.best else f"{rate:g}: {text}"
                for rate, text in texts.items()
            ]
            place = "inside" if sweep.is_interior else "at the edge" if sweep.best else "not tuned"
            if texts:
                rows.append((size, arm.title, ", ".join(texts), place))
    return pd.DataFrame(rows, columns=["size", "trained", "rate: correct", "best rate"])


def make_tables(evidence: Evidence, cells: pd.DataFrame) -> dict[str, list[pd.DataFrame]]:
    """Return the tables of every block by its name."""
    claims, estimates = judge_claims(evidence)
    seeds = [one.by_seed or (one.value,) for one in estimates.value]
    ranges = [f"{min(values):.2f} to {max(values):.2f}" for values in seeds]
    estimates = estimates.assign(value=estimates.value.map(str), seeds=ranges)
    lost = evidence.runs.query("status != 'completed'")[["id", "status"]]
    endings = list_endings(evidence)
    endings["bound"] = endings.bound.map("{:.2f}".format)
    endings["endless"] = endings.endless.map("{:.0%}".format)
    tables = {"claims": [claims], "estimates": [estimates], "endings": [endings]}
    tables |= {"rates": [tabulate_rates(evidence)] + [lost] * (not lost.empty)}
    if cells.empty:
        return tables | dict.fromkeys(["headline", "shares", "kinds", "keeping", "costs"], [cells])
    main = cells[cells["set"].isin(["combinations", "unseen"]) & cells.cell.isin(HEADLINE)]
    taught = cells[cells["set"] == "combinations"].groupby(CELL, sort=False)
    kinds = taught[[*KINDS, "above_chance"]].agg(lambda v: " / ".join(f"{100 * x:.0f}" for x in v))
    runs = evidence.final.merge(cells[["size", "cell"]].drop_duplicates())
    runs = runs.join(pd.json_normalize(runs.cost)).join(tabulate_nll(evidence), "id")
    means = runs.groupby(CELL, sort=False)
    costs = {
        title: (means[column].mean() / divisor).map(f"{{:,.{digits}f}}".format)
        for title, (column, divisor, digits) in MEANS.items()
    }
    return tables | {
        "headline": [spread(main, ["title"], ["size", "set"])],
        "shares": [spread(cells, [*CELL, "seeds", "diverged"], ["set"])],
        "kinds": [kinds.reset_index()],
        "keeping": [],
        "costs": [pd.DataFrame(costs).reset_index()],
    }


def fill_block(found: re.Match[str], tables: dict, titles: dict, place: str) -> str:
    """Return a block of a file made anew.

    Args:
        place: of the figures, as the file links it.
    """
    name = found[1]
    if name not in tables:
        raise UserError(f"no block {name!r}; there are {', '.join(tables)}")
    parts = [f"![{titles[name]}]({place}/{name}.svg)"] if name in titles else []
    parts += map(to_table, tables[name])
    return "\n".join([f"<!-- study:{name} -->", "\n\n".join(parts), f"<!-- /study:{name} -->"])


def make_report(root: Path, folder: Path) -> dict[Path, str]:
    """Return the text of every file of the report by its path."""
    evidence = load_evidence(folder)
    cells = tabulate_cells(evidence)
    tables = make_tables(evidence, cells) | make_edition1_tables()
    files, titles = {}, {}
    for name, draw in FIGURES.items():
        if found := draw(evidence, cells):
            titles[name], files[folder / "figures" / f"{name}.svg"] = found
    for path in filter(Path.is_file, map(root.joinpath, FILES)):
        place = os.path.relpath(folder / "figures", path.parent)
        fill = partial(fill_block, tables=tables, titles=titles, place=place)
        files[path] = BLOCK.sub(fill, path.read_text(encoding="utf-8"))
    return files


def main() -> None:
    """Write the files of the report that change."""
    for path, text in make_report(REPO_DIR, RESULTS_DIR).items():
        if not path.is_file() or path.read_text(encoding="utf-8") != text:
            path.parent.mkdir(parents=True, exist_ok=True)
            write_text(path, text)
            print(f"wrote {path.relative_to(REPO_DIR)}")


if __name__ == "__main__":
    run_script(main)
