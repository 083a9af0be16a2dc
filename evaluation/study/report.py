"""Write the tables and figures of README.md and evaluation/REPORT.md from the committed results.

    python evaluation/study/report.py      # or: make report

A block stands between `<!-- study:NAME -->` and `<!-- /study:NAME -->`: the figure of this name, if
it has one, and its tables. Files whose content does not change are not written.
"""

import os
import re
import sys
from collections.abc import Callable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import pandas as pd

from dataset.checks import KINDS
from evaluation.study.analysis import Evidence, load_evidence, tabulate_cells, tabulate_nll
from evaluation.study.claims import judge_claims, list_endings
from evaluation.study.edition1 import make_edition1_tables
from evaluation.study.figures import DECODINGS, FIGURES
from evaluation.study.plan import tune_rate
from evaluation.study.results import RESULTS_DIR
from model.files import REPO_DIR, UserError, run_script, write_text

FILES = ("README.md", "evaluation/REPORT.md")
BLOCK = re.compile(r"<!-- study:(\w+) -->\n.*?<!-- /study:\1 -->", re.DOTALL)
HEADLINE = ["base", "seed", "all_r8", "all_r8_vocabulary", "fft"]
MEANS = {  # columns of the tables of likelihood and of cost, with their formats
    "nll": {"answer": "{:.3f}", "end": "{:.3f}", "nll_text": "{:.3f}"},
    "costs": {
        "parameters": "{:,.0f}",
        "steps": "{:,.0f}",
        "M tokens": "{:.1f}",
        "TFLOP": "{:.0f}",
        "minutes": "{:.0f}",
        "peak GB": "{:.2f}",
    },
}


def to_table(frame: pd.DataFrame) -> str:
    """Return a data frame as a Markdown table; a dash where nothing was measured."""
    if frame.empty:
        return "Not run yet."
    text = frame.astype(object).fillna("-").to_markdown(index=False, disable_numparse=True)
    return re.sub(r"-{3,}", "---", re.sub(r" +\|", " |", text))  # without padding


def spread(cells: pd.DataFrame, index: list[str], names: list[str]) -> pd.DataFrame:
    """Return a row a cell, and a column for each of `names` and each decoding: percent correct."""
    texts = cells.assign(text=[share.percent for share in cells.share])
    texts["column"] = texts[names].agg(" ".join, axis=1) + ", " + texts.decoding.map(DECODINGS)
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
    seeds = estimates.value.map(
        lambda one: one.by_seed and f"{min(one.by_seed):.2f} to {max(one.by_seed):.2f}"
    )
    estimates = estimates.assign(value=estimates.value.map(str), seeds=seeds)
    lost = evidence.runs.query("status != 'completed'")[["id", "status"]]
    endings = list_endings(evidence)
    endings["bound"] = endings.bound.map("{:.2f}".format)
    endings["endless"] = endings.endless.map("{:.0%}".format)
    tables = {"claims": [claims], "estimates": [estimates], "endings": [endings]}
    tables |= {"rates": [tabulate_rates(evidence)] + [lost] * (not lost.empty)}
    if cells.empty:
        return tables | dict.fromkeys(["headline", "shares", "kinds", "keeping", *MEANS], [cells])
    main = cells[cells["set"].isin(["combinations", "unseen"])]
    columns = ["size", "title", "learning_rate", "seeds", "diverged"]
    taught = cells[cells["set"] == "combinations"].groupby(["size", "title"], sort=False)
    kinds = taught[[*KINDS, "above_chance"]].agg(lambda v: " / ".join(f"{100 * x:.0f}" for x in v))
    runs = evidence.final.merge(cells[["size", "cell"]].drop_duplicates())
    runs = runs.join(pd.json_normalize(runs.cost)).join(tabulate_nll(evidence), "id")
    runs = runs.assign(parameters=runs.trainable_parameters, minutes=runs.train_seconds / 60)
    runs = runs.assign(TFLOP=runs.flops / 1e12, **{"M tokens": runs.tokens / 1e6})
    runs = runs.assign(**{"peak GB": runs.peak_memory_bytes / 1e9})
    means = runs.groupby(["size", "title"], sort=False)
    for name, formats in MEANS.items():
        table = means[[*formats]].mean()
        for column, form in formats.items():
            table[column] = table[column].map(form.format)
        tables[name] = [table.reset_index()]
    return tables | {
        "headline": [spread(main[main.cell.isin(HEADLINE)], ["title"], ["size", "set"])],
        "shares": [spread(cells, columns, ["set"])],
        "kinds": [kinds.reset_index()],
        "keeping": [],
    }


def make_report(root: Path, folder: Path) -> dict[Path, str]:
    """Return the text of every file of the report by its path."""
    evidence = load_evidence(folder)
    cells = tabulate_cells(evidence)
    tables = make_tables(evidence, cells) | make_edition1_tables()
    files, titles = {}, {}
    for name, draw in FIGURES.items():
        if found := draw(evidence, cells):
            titles[name], files[folder / "figures" / f"{name}.svg"] = found
    for file in FILES:
        path = root / file
        if path.is_file():
            text = path.read_text(encoding="utf-8")
            files[path] = BLOCK.sub(make_filler(tables, titles, folder, path), text)
    return files


def make_filler(tables: dict, titles: dict, folder: Path, path: Path) -> Callable:
    """Return what makes a block of a file anew, from the match of its marks."""

    def fill(found: re.Match[str]) -> str:
        name = found[1]
        if name not in tables:
            raise UserError(f"{path.name}: no block {name!r}; there are {', '.join(tables)}")
        parts = [to_table(table) for table in tables[name]]
        if name in titles:
            figure = os.path.relpath(folder / "figures" / f"{name}.svg", path.parent)
            parts.insert(0, f"![{titles[name]}]({figure})")
        return "\n".join(
            [found[0].partition("\n")[0], "\n\n".join(parts), f"<!-- /study:{name} -->"]
        )

    return fill


def main() -> None:
    """Write the files of the report that change."""
    for path, text in make_report(REPO_DIR, RESULTS_DIR).items():
        if not path.is_file() or path.read_text(encoding="utf-8") != text:
            path.parent.mkdir(parents=True, exist_ok=True)
            write_text(path, text)
            print(f"wrote {path.relative_to(REPO_DIR)}")


if __name__ == "__main__":
    run_script(main)
