"""The study's figures, as SVG text. Each title states what the figure shows."""

import io
from functools import partial
from itertools import product

import matplotlib as mpl
import matplotlib.pyplot as plt
import numpy as np
import pandas as pd

from evaluation.study.analysis import Evidence, mark_answers
from evaluation.study.claims import PATH_ARMS, find_paths, list_endings

STYLE = {
    "svg.fonttype": "none",
    "svg.hashsalt": "study",  # the same bytes from the same data
    "font.size": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.prop_cycle": mpl.cycler(color=["#1f5a99", "#d1712a", "#444444", "#8a8a3a"]),
    "legend.frameon": False,
}
Figure = tuple[str, str] | None  # a title, and SVG
DECODING_TITLES = {"greedy": "greedy", "t0.85p0.85": "T=0.85"}
MAIN_SETS = ["combinations", "unseen"]
HEADLINE = ["study", "study_tuned", "all_r8", "all_r16", "all_r32", "all_r64", "fft_frozen", "fft"]
LADDER = "base fft_script study study_tuned study_all square_r36 study_all_tuned all_r8 all_r16"
LADDER += " all_r32 all_r64 all_r8_vocabulary all_r64_vocabulary fft_frozen fft"


def draw_panels(title: str, table: pd.DataFrame, x: str, y: str = "") -> str:
    """Draw a panel for each `panel` of a table, and in it a color for each `series`.

    The table has points (`x`, `y`), either with names as y and intervals from `low` to `high`, or
    with a `note` beside each. The arguments `x` and `y` are titles of the axes.
    """
    panels = table.groupby("panel", sort=False)
    names = list(dict.fromkeys(table.y)) if "low" in table else []
    with mpl.rc_context(STYLE):
        how = {"figsize": (1 + 4.5 * len(panels), max(3, 0.4 * len(names))), "squeeze": False}
        fig, axes = plt.subplots(1, len(panels), sharex=True, sharey=True, **how)
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
        axes[0][-1].legend(loc="upper left", bbox_to_anchor=(1, 1))
        fig.suptitle(title, x=0, y=1.02, ha="left")
        file = io.StringIO()
        fig.savefig(file, format="svg", bbox_inches="tight", metadata={"Date": None})
        plt.close(fig)
    return "\n".join(line.rstrip() for line in file.getvalue().splitlines()) + "\n"


def select_arms(cells: pd.DataFrame, arms: list[str]) -> pd.DataFrame:
    """Return the cells of arms in their order, of sizes at which LoRA on all layers was scored."""
    sizes, is_main = cells["size"][cells.arm == "all_r8"], cells["set"].isin(MAIN_SETS)
    rows = cells[cells.usual.isin(arms) & is_main & cells["size"].isin(sizes)]
    return rows.iloc[rows.arm.map(arms.index).argsort(kind="stable")]


def draw_arms(title: str, arms: list[str], evidence: Evidence, cells: pd.DataFrame) -> Figure:
    """Draw the shares of correct combinations and unseen things by arm, size and decoding."""
    if cells.empty or (rows := select_arms(cells, arms)).empty:
        return None
    rates = rows.learning_rate.map(", {:g}".format).where(rows.arm == "fft_script", "")  # it has 3
    table = rows.assign(y=rows.title.str.removesuffix(", preliminary") + rates)
    table["series"] = table["set"] + ", " + table.decoding.map(DECODING_TITLES)
    table = table.rename(columns={"share": "x", "size": "panel"})
    return title, draw_panels(title, table, "correct answers")


def draw_endings(evidence: Evidence, cells: pd.DataFrame) -> Figure:
    """Draw the share of endless answers against the bound of the end token, a point a base."""
    title = "Where the bound of the end token is low, sampled answers often do not end"
    table = list_endings(evidence).rename(columns={"bound": "x", "endless": "y", "base": "note"})
    table = table.assign(panel="", series="edition " + table.edition.map(str))
    return title, draw_panels(title, table, "bound of the end token", "endless answers")


def draw_keeping(evidence: Evidence, cells: pd.DataFrame) -> Figure:
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
    title = f"LoRA answers more unseen things. Here at best {', '.join(best.index + ' ' + best)}"
    return title, draw_panels(title, table, *texts)


MESSAGE = "Size alone does not make every LoRA fail: r=8 on all layers answers most prompts"
STEPS = "At xs rate, layers and rank matter"
FIGURES = {"headline": partial(draw_arms, MESSAGE, HEADLINE), "endings": draw_endings}
FIGURES |= {"ladder": partial(draw_arms, STEPS, LADDER.split()), "keeping": draw_keeping}
