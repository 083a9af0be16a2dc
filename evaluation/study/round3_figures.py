"""The figures of round 3: ways of asking, capacity, and what is kept while something is learned.

They are drawn from its runs on the fresh prompts, each a function that report.py finds by its name.
"""

import matplotlib as mpl
import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.ticker import FixedLocator, NullLocator

from evaluation.study.analysis import Evidence
from evaluation.study.blocks import percent, write_rate
from evaluation.study.figures import (
    STYLE,
    figure,
    show_percent,
    start_figure,
    write_beside,
    write_svg,
)
from evaluation.study.names import BLACK, BLUE, GREEN, GREY, SIZES
from evaluation.study.round3 import EPOCHS, Round3
from evaluation.study.round3_tables import get_round3, select_asked, share_asked
from evaluation.study.short_tables import list_capacity_gaps

# ------------------------------------------------------------------------------------------- asking

WAYS = {  # way of asking -> label
    "": "with the chat template, as trained",
    "no_template": "without the template",
    "on_fft": "the LoRA on the weights of full fine-tuning",
}
ASKED_ARMS = {
    "xs": ["study", "all_r8", "all_r64", "fft", "fft_frozen"],
    "m26": ["study", "all_r8", "all_r32", "fft", "fft_frozen"],
}
ASKED_TITLES = {
    "study": "the original LoRA",
    "all_r8": "all-layer LoRA, rank 8",
    "all_r32": "all-layer LoRA, rank 32",
    "all_r64": "all-layer LoRA, rank 64",
    "fft": "full fine-tuning",
    "fft_frozen": "the same, embedding frozen",
}
ASKED_COLORS = {"study": GREY, "fft": BLACK, "fft_frozen": GREEN}  # else all-layer
FAILS = 0.03  # a share that is called a failure


@figure("asking")
def draw_asking(evidence: Evidence) -> tuple[str, str] | None:
    """Draw composition by way of asking, round 3's fresh prompts; nothing before its runs."""
    tables = {size: list_asked(evidence, size) for size in ASKED_ARMS}
    panels = {size: table for size, table in tables.items() if not table.empty}
    if not panels:
        return None
    every = pd.concat(panels.values())
    is_lora = every.arm.isin(["study", "all_r8", "all_r32", "all_r64"])
    bare = every.share[is_lora & (every.way == "no_template")]
    title = "How a model is asked decides what it answers"
    if len(bare) and (bare <= FAILS).all():
        title = "Asked without the template that it was trained with, every LoRA fails"
    with mpl.rc_context(STYLE):
        most = max(table.arm.nunique() for table in panels.values())
        fig, axes = start_figure(title, 1.5 + 0.65 * most, ncols=len(panels))
        for ax, (size, table) in zip(axes, panels.items(), strict=True):
            draw_asked(ax, table)
            ax.set_title(f"{SIZES[size]} parameters", loc="left", fontsize=10)
        handles = [ASKED_LOOKS[way] | {"label": label} for way, label in WAYS.items()]
        patches = [mpl.patches.Patch(edgecolor="#444444", **look) for look in handles]
        fig.legend(handles=patches, loc="outside lower left", ncols=2)
        return title, write_svg(fig)


ASKED_LOOKS = {
    "": {"facecolor": "#444444"},
    "no_template": {"facecolor": "white"},
    "on_fft": {"facecolor": "white", "hatch": "////"},
}


def list_asked(evidence: Evidence, size: str) -> pd.DataFrame:
    """Return composition of round 3's models of a size. A row is a model and a way of asking.

    Only prompts that can be asked in each way count: those of one turn.
    """
    rows = []
    if not evidence.round3.empty:
        found = get_round3(evidence)
        runs = select_asked(found)
        for arm in ASKED_ARMS[size]:
            of_arm = runs[(runs["size"] == size) & (runs.arm == arm)]
            for way in WAYS:
                share = share_asked(found, of_arm, way, "correct")
                rows.append({"arm": arm, "way": way, "share": share})
    table = pd.DataFrame(rows, columns=["arm", "way", "share"])
    return table.dropna()


def draw_asked(ax: Axes, table: pd.DataFrame) -> None:
    """Draw a bar for each model and way of asking, with its value."""
    arms = list(dict.fromkeys(table.arm))
    height = 0.26
    for bar in table.itertuples():
        place = arms.index(bar.arm) + height * (list(WAYS).index(bar.way) - 1)
        color = ASKED_COLORS.get(bar.arm, BLUE)
        look = ASKED_LOOKS[bar.way]
        is_full = bar.way == ""
        face = color if is_full else look["facecolor"]
        ax.barh(
            place,
            bar.share,
            height=height,
            facecolor=face,
            edgecolor=color,
            hatch=look.get("hatch"),
        )
        write_beside(ax, bar.share, place, percent(bar.share))
    ax.set_yticks(range(len(arms)), [ASKED_TITLES[arm] for arm in arms])
    ax.tick_params(axis="y", length=0)
    ax.invert_yaxis()
    ax.set_xlim(0, 1.25)
    ax.xaxis.set_major_locator(FixedLocator([0, 0.5, 1]))
    show_percent(ax.xaxis)
    ax.set_xlabel("correct, composition")


# ----------------------------------------------------------------------------------------- capacity

MARKERS = {"xs": "o", "s": "s", "m26": "^"}
LEFT_OF_ITS_MARK = ((-5, -7), "right")  # shift in points, and the side of the label that is there
RIGHT_OF_ITS_MARK = ((5, -8), "left")
LEFT_RANKS = ["all_r8", "all_r16"]
FULL_RATES = {"xs": 1e-3, "s": 1.25e-4, "m26": 1e-4}  # of full fine-tuning in round 3
LORA_RATES = {"xs": 3e-3, "s": 1.5e-3, "m26": 1e-3}  # of all-layer LoRA of every rank
CAPACITY_TITLES = ("all runs, the 1,087 old prompts", "third round, the 1,087 fresh prompts")


@figure("behind")
def draw_behind(evidence: Evidence) -> tuple[str, str] | None:
    """Draw how far all-layer LoRA is behind full fine-tuning, against its weights a token."""
    early = list_capacity_gaps(evidence)
    if early.empty or evidence.round3.empty:
        return None
    is_all_layers = early.arm.str.startswith("all_r")
    panels = [early[is_all_layers], list_fresh_gaps(get_round3(evidence))]
    title = "How far all-layer LoRA is behind full fine-tuning"
    every = pd.concat(panels)
    gaps = every.gap.map(lambda gap: gap.value)
    is_farthest = (every["size"] == "xs") & (every.arm == "all_r8")
    if gaps[is_farthest].min() > gaps[~is_farthest].max():
        title = "LoRA of rank 8 in the smallest model is farthest behind full fine-tuning"
    with mpl.rc_context(STYLE):
        fig, axes = start_figure(title, 3.9, ncols=2, sharey=True)
        for ax, gaps, panel_title in zip(axes, panels, CAPACITY_TITLES, strict=True):
            for place in gaps.itertuples():
                draw_gap(ax, place)
            finish_gaps(ax)
            ax.set_title(panel_title, loc="left", fontsize=10)
        axes[0].set_ylabel("points behind full fine-tuning")
        handles = []
        for size, marker in MARKERS.items():
            label = f"{SIZES[size]} parameters"
            handles.append(mpl.lines.Line2D([], [], color=BLUE, marker=marker, ls="", label=label))
        fig.legend(handles=handles, loc="outside lower left", ncols=3)
        return title, write_svg(fig)


def list_fresh_gaps(found: Round3) -> pd.DataFrame:
    """Return the gaps of round 3's all-layer LoRAs, as `list_capacity_gaps` does."""
    rows = []
    for size, lora_rate in LORA_RATES.items():
        full = found.mark(found.find(size, "fft", FULL_RATES[size]))
        of_size = found.runs[found.runs["size"] == size]
        arms = [arm for arm in of_size.arm.unique() if arm.removeprefix("all_r").isdecimal()]
        for arm in arms:
            runs = found.find(size, arm, lora_rate)
            gap = found.estimate(full, minus=found.mark(runs))
            if gap.runs:
                first = runs.iloc[0]
                ratio = first.trainable_parameters * first.epochs / first.labeled_tokens
                rows.append({"size": size, "arm": arm, "ratio": ratio, "gap": gap})
    return pd.DataFrame(rows)


def draw_gap(ax: Axes, place: tuple) -> None:
    """Draw one gap with its interval and its rank."""
    gap = 100 * np.array([place.gap.low, place.gap.value, place.gap.high])
    low, value, high = gap
    ax.errorbar(
        place.ratio,
        value,
        yerr=[[value - low], [high - value]],
        color=BLUE,
        marker=MARKERS[place.size],
        capsize=3,
    )
    shift, side = LEFT_OF_ITS_MARK if place.arm in LEFT_RANKS else RIGHT_OF_ITS_MARK
    ax.annotate(
        f"r={place.arm.removeprefix('all_r')}",
        (place.ratio, value),
        xytext=shift,
        textcoords="offset points",
        ha=side,
        va="center",
        fontsize=9,
    )


def finish_gaps(ax: Axes) -> None:
    """Name the axes of one panel of gaps."""
    ax.axhline(0, color=BLACK, linewidth=0.8)
    ax.set_xscale("log")
    ax.set_xlim(0.03, 9)
    ax.xaxis.set_major_locator(FixedLocator([0.1, 0.3, 1, 3]))
    ax.xaxis.set_minor_locator(NullLocator())
    ax.xaxis.set_major_formatter("{x:g}")
    ax.set_xlabel("adapter weights for each labeled token")


# ----------------------------------------------------------------------------------------- frontier

FRONTIER_SIZE = "m26"
FRONTIER_LOOKS = {  # arm -> label, color, marker
    "fft": ("full fine-tuning", BLACK, "o"),
    "fft_batch8": ("full fine-tuning, batches of 8", BLACK, "D"),
    "fft_frozen": ("full fine-tuning, embedding frozen", GREEN, "o"),
    "all_r8": ("all-layer LoRA, rank 8", BLUE, "o"),
    "all_r32": ("all-layer LoRA, rank 32", BLUE, "s"),
    "all_r64": ("all-layer LoRA, rank 64", BLUE, "^"),
}
FRONTIER_OUTCOMES = {"unseen": "unseen things", "plain": "plain questions"}
FEWEST_POINTS = 3  # that are joined
LEAST_EFFECT = 0.1  # between single runs, that is called a difference


@figure("frontier")
def draw_frontier(evidence: Evidence) -> tuple[str, str] | None:
    """Draw what is kept against composition at 25M, a mark a method and learning rate."""
    if evidence.round3.empty:
        return None
    marks = list_frontier(get_round3(evidence))
    if marks.empty:
        return None
    title = "What 25M models compose, and what they keep"
    full = marks[marks.arm == "fft"].set_index("rate").unseen
    usual = full.get(FULL_RATES[FRONTIER_SIZE], 1.0)
    if full.get(FULL_RATES[FRONTIER_SIZE] / 2, 0.0) - usual > LEAST_EFFECT:
        title = "At 25M full fine-tuning keeps more unseen things at half its best rate"
    with mpl.rc_context(STYLE):
        fig, axes = start_figure(title, 4.2, ncols=2, sharey=True)
        for ax, (outcome, outcome_title) in zip(axes, FRONTIER_OUTCOMES.items(), strict=True):
            for arm, (_, color, marker) in FRONTIER_LOOKS.items():
                points = marks[marks.arm == arm].sort_values("rate")
                style = "-" if len(points) >= FEWEST_POINTS else ""
                ax.plot(points.composition, points[outcome], style, color=color, marker=marker)
            ax.set_title(outcome_title, loc="left", fontsize=10)
            ax.set_xlabel("correct answers, composition")
            ax.set_xlim(0.25, 1)
            ax.set_ylim(0, 1)
            show_percent(ax.xaxis)
            show_percent(ax.yaxis)
        for point in marks[marks.arm.isin(["fft", "fft_batch8"])].itertuples():
            write_beside(axes[0], point.composition, point.unseen, f" {write_rate(point.rate)}")
        axes[0].set_ylabel("correct answers, what no pair mentions")
        handles = []
        for arm, (label, color, marker) in FRONTIER_LOOKS.items():
            if (marks.arm == arm).any():
                line = mpl.lines.Line2D([], [], color=color, marker=marker, ls="", label=label)
                handles.append(line)
        fig.legend(handles=handles, loc="outside lower left", ncols=2)
        return title, write_svg(fig)


def list_frontier(found: Round3) -> pd.DataFrame:
    """Return all outcomes of round 3's methods at 25M. A row is an arm and a learning rate."""
    runs = found.runs[found.runs["size"] == FRONTIER_SIZE]
    is_long = (runs.epochs == EPOCHS[FRONTIER_SIZE]) | (runs.arm == "fft_batch8")
    is_drawn = is_long & runs.arm.isin(FRONTIER_LOOKS)
    rows = []
    for (arm, rate), group in runs[is_drawn].groupby(["arm", "learning_rate"]):
        row = {"arm": arm, "rate": rate, "composition": found.share(group)}
        for outcome in FRONTIER_OUTCOMES:
            row[outcome] = found.share(group, outcome=outcome)
        rows.append(row)
    return pd.DataFrame(rows)
