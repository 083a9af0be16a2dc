"""The study's figures, as SVG text. Each title states what the figure shows."""

import io
from itertools import product

import matplotlib as mpl
import matplotlib.pyplot as plt
import numpy as np
import pandas as pd

from evaluation.study.analysis import Evidence, mark_answers
from evaluation.study.claims import PATH_ARMS, find_paths, list_endings
from evaluation.study.edition1 import CONTENT, SIZES, choose_cells

STYLE = {
    "svg.fonttype": "none",
    "svg.hashsalt": "study",  # the same bytes from the same data
    "font.size": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.prop_cycle": mpl.cycler(color=["#1f5a99", "#d1712a", "#444444", "#8a8a3a"]),
    "legend.frameon": False,
}
DECODING_TITLES = {"greedy": "greedy", "t0.85p0.85": "T=0.85"}
HEADLINE = ["base", "study", "all_r8", "all_r8_vocabulary", "fft"]  # arms


def draw_panels(title: str, table: pd.DataFrame, x: str, y: str = "") -> str:
    """Draw a panel for each `panel` of a table, and in it a color for each `series`.

    The table has points (`x`, `y`), either with names as y and intervals from `low` to `high`, or
    with a `note` beside each. The arguments `x` and `y` are titles of the axes.
    """
    panels = table.groupby("panel", sort=False)
    names = list(dict.fromkeys(table.y)) if "low" in table else []
    with mpl.rc_context(STYLE):
        how = {"sharey": True, "squeeze": False, "figsize": (1 + 4.5 * len(panels), 3)}
        figure, axes = plt.subplots(1, len(panels), **how)
        for ax, (panel, points) in zip(axes[0], panels, strict=True):
            for i, (label, rows) in enumerate(points.groupby("series", sort=False)):
                if names:
                    places = rows.y.map(names.index) + 0.2 * i
                    reach = np.clip([rows.x - rows.low, rows.high - rows.x], 0, None)
                    ax.errorbar(rows.x, places, xerr=reach, fmt="o", label=label)
                    continue
                ax.plot(rows.x, rows.y, ".", color=f"C{i}", label=label)
                for row in rows.itertuples():
                    ax.annotate(row.note, (row.x, row.y), fontsize=6)
            ax.set(xlabel=x, title=panel)
        axes[0][0].set_ylabel(y)
        if names:
            axes[0][0].set(xlim=(0, 1), ylim=(len(names), -1))
            axes[0][0].set_yticks(range(len(names)), names)
        axes[0][0].legend()
        figure.suptitle(title, x=0, y=1.02, ha="left")
        file = io.StringIO()
        figure.savefig(file, format="svg", bbox_inches="tight", metadata={"Date": None})
        plt.close(figure)
    return "\n".join(line.rstrip() for line in file.getvalue().splitlines()) + "\n"


def draw_edition1(evidence: Evidence, cells: pd.DataFrame) -> tuple[str, str]:
    """Draw the first edition's R without ends at both sizes, by arm."""
    title = "Learning rate and frozen embedding hold LoRA back at 1.6M parameters"
    main = choose_cells(CONTENT["readme"]).query("arm != 'fft'")
    columns = {"x": main.R_no_end, "low": main.R_no_end_low, "high": main.R_no_end_high}
    series = main.base.map(SIZES["name"]) + " parameters"
    table = pd.DataFrame(columns).assign(panel="", series=series, y=main.trained)
    return title, draw_panels(title, table, "share of full fine-tuning's gain, without end tokens")


def draw_headline(evidence: Evidence, cells: pd.DataFrame) -> tuple[str, str] | None:
    """Draw the share of correct answers by arm and size, both decodings."""
    if cells.empty or "fft" not in cells.cell.values:  # nothing to compare with yet
        return None
    table = cells[(cells["set"] == "combinations") & cells.cell.isin(HEADLINE)]
    last = table[(table["size"] == table["size"].iloc[-1]) & (table.decoding == "greedy")]
    last = last[last.cell.isin(["fft", "all_r8", "study"])]
    words = [f"{row.title} {100 * row.share:.0f}%" for row in last.itertuples()]
    title = f"Correct greedy answers at {last['size'].iloc[0]}: {', '.join(words)}"
    table = table.rename(columns={"share": "x", "size": "panel", "title": "y"})
    table["series"] = table.decoding.map(DECODING_TITLES)
    return title, draw_panels(title, table, "correct answers")


def draw_endings(evidence: Evidence, cells: pd.DataFrame) -> tuple[str, str]:
    """Draw the share of endless answers against the bound of the end token, a point a base."""
    title = "Where the end token cannot become probable, sampled answers do not end"
    table = list_endings(evidence)
    table = table.assign(panel="", series="edition " + table.edition.map(str))
    table = table.rename(columns={"bound": "x", "endless": "y", "base": "note"})
    texts = "bound of the end token's probability", "endless answers"
    return title, draw_panels(title, table, *texts)


def draw_keeping(evidence: Evidence, cells: pd.DataFrame) -> tuple[str, str] | None:
    """Draw unseen things against combinations, a point a checkpoint, both decodings."""
    sets, rows = ("combinations", "unseen"), []
    for arm, decoding in product(PATH_ARMS, DECODING_TITLES):
        if (runs := find_paths(evidence, arm)).empty:
            continue
        shares = (mark_answers(runs, evidence.choose_prompts(s), decoding).mean(1) for s in sets)
        points = pd.DataFrame(dict(zip("xy", shares, strict=True)))
        series = evidence.study.arms[arm].title
        rows.append(points.assign(panel=DECODING_TITLES[decoding], series=series, note=""))
    if not rows:
        return None
    table, texts = pd.concat(rows), ("correct combinations", "correct unseen things")
    best = table.groupby("series", sort=False).y.max().map("{:.0%}".format)
    title = f"Unseen things, best checkpoint: {', '.join(best.index + ' ' + best)}"
    return title, draw_panels(title, table, *texts)


FIGURES = {"edition1": draw_edition1, "headline": draw_headline}
FIGURES |= {"endings": draw_endings, "keeping": draw_keeping}
