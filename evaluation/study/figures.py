"""The study's figures, as SVG text: a function a figure.

Each is at most 760 px wide, its text at least 12 px high, and its title one sentence that the marks
show. A method has the same color everywhere. Shares are of correct greedy answers to test prompts.
"""

import io
import textwrap
from collections.abc import Callable
from dataclasses import dataclass

import matplotlib as mpl
import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, NullLocator, PercentFormatter

from evaluation.study.analysis import (
    Evidence,
    estimate_share,
    select_usual,
    were_asked,
)
from evaluation.study.blocks import percent
from evaluation.study.endings import list_endings
from evaluation.study.names import (
    BLACK,
    BLUE,
    BOTH_MENDED,
    GREEN,
    GREY,
    METHODS,
    ORANGE,
    SIZES,
)
from evaluation.study.round3 import tabulate_predictions
from evaluation.study.round3_tables import get_round3
from evaluation.study.settings import RESULTS_DIR

WIDTH = 7.9  # inches; at 96 px an inch 758 px
TITLE_LETTERS = 78  # in a line of a title
STYLE = {
    "svg.fonttype": "none",  # text stays text
    "svg.hashsalt": "study",  # the same bytes from the same data
    "font.size": 10,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "legend.frameon": False,
    "hatch.linewidth": 0.6,
}

FIGURES: dict[str, Callable[[Evidence], tuple[str, str] | None]] = {}


def figure(name: str) -> Callable:
    """Register a function as the one that draws a figure; it returns a title and SVG, or None."""

    def register(function: Callable) -> Callable:
        FIGURES[name] = function
        return function

    return register


def start_figure(title: str, height: float, **options: list) -> tuple[Figure, np.ndarray]:
    """Open a figure of the full width with a title on the left; return it and its panels in a row.

    `options` are those of `plt.subplots`.
    """
    fig, axes = plt.subplots(
        figsize=(WIDTH, height), squeeze=False, layout="constrained", **options
    )
    lines = textwrap.fill(title, TITLE_LETTERS)
    fig.suptitle(lines, x=0.01, ha="left", fontsize=11.5, fontweight="bold")
    return fig, axes[0]


def write_svg(fig: Figure) -> str:
    """Close a figure and return it as SVG, the same bytes for the same data."""
    file = io.StringIO()
    fig.savefig(file, format="svg", metadata={"Date": None})
    plt.close(fig)
    lines = [line.rstrip() for line in file.getvalue().splitlines()]
    return "\n".join(lines) + "\n"


def show_percent(axis: mpl.axis.Axis) -> None:
    """Write the ticks of an axis in percent."""
    axis.set_major_formatter(PercentFormatter(xmax=1, decimals=0))


def write_beside(ax: Axes, x: float, y: float, text: str) -> None:
    """Write a text to the right of a mark or a bar's end."""
    ax.annotate(text, (x, y), xytext=(4, 0), textcoords="offset points", va="center", fontsize=9.5)


# ------------------------------------------------------------------------------------------- ladder


@dataclass(frozen=True)
class Rung:
    """A bar of the ladder."""

    label: str
    arm: str
    color: str


LADDERS = {
    "xs": [
        Rung("the original LoRA", "study", GREY),
        Rung("... on all layers", "study_all", BLUE),
        Rung("... at a higher rate", "study_tuned", GREY),
        Rung("... with both", BOTH_MENDED["xs"], BLUE),
        Rung("all-layer LoRA, rank 64", "all_r64", BLUE),
        Rung("full fine-tuning", "fft", BLACK),
    ],
    "m26": [
        Rung("the original LoRA", "study", GREY),
        Rung("... on all layers", "study_all", BLUE),
        Rung("... at a higher rate", "study_tuned", GREY),
        Rung("... with both", BOTH_MENDED["m26"], BLUE),
        Rung("all-layer LoRA, rank 8", "all_r8", BLUE),
        Rung("all-layer LoRA, rank 32", "all_r32", BLUE),
        Rung("full fine-tuning", "fft", BLACK),
    ],
}


@figure("ladder")
def draw_ladder(evidence: Evidence) -> tuple[str, str] | None:
    """Draw composition, one setting changed at a time: 1.3M, and 25M as far as it ran."""
    title = "At 1.3M a higher rate or more layers alone do little; both together do much"
    panels = {size: list_rungs(evidence, size) for size in LADDERS}
    if any(bars.empty for bars in panels.values()):
        return None
    counts = [len(bars) for bars in panels.values()]
    with mpl.rc_context(STYLE):
        fig, axes = start_figure(title, 3.0, ncols=2)
        for ax, (size, bars) in zip(axes, panels.items(), strict=True):
            draw_rungs(ax, bars)
            ax.set_ylim(max(counts) - 0.5, -0.6)
            ax.set_title(f"{SIZES[size]} parameters", loc="left", fontsize=10)
        return title, write_svg(fig)


def list_rungs(evidence: Evidence, size: str) -> pd.DataFrame:
    """Return the rungs of a size that ran, with their shares and runs. A row is a bar."""
    prompts = evidence.choose_prompts("composition")
    rows = []
    for rung in LADDERS[size]:
        runs = evidence.find_cell(rung.arm, size)
        estimate = estimate_share(runs, prompts, "greedy")
        if estimate:
            row = {"label": rung.label, "color": rung.color}
            rows.append(row | {"share": estimate.value, "runs": len(runs)})
    return pd.DataFrame(rows)


def draw_rungs(ax: Axes, bars: pd.DataFrame) -> None:
    """Draw bars with their values; hatched, where there is one run."""
    for place, bar in enumerate(bars.itertuples()):
        is_single = bar.runs == 1
        ax.barh(
            place,
            bar.share,
            color="white" if is_single else bar.color,
            edgecolor=bar.color,
            hatch="////" if is_single else None,
            height=0.68,
        )
        write_beside(ax, bar.share, place, percent(bar.share) + " (one run)" * is_single)
    ax.set_yticks(range(len(bars)), bars.label)
    ax.tick_params(axis="y", length=0)
    ax.set_xlim(0, 1.32)
    ax.xaxis.set_major_locator(FixedLocator([0, 0.5, 1]))
    show_percent(ax.xaxis)
    ax.set_xlabel("correct answers, composition")


# --------------------------------------------------------------------------------------------- loss


def find_color(arm: str, flags: dict) -> str:
    """Return the color of the method that an arm belongs to."""
    if arm == "fft_frozen":
        return GREEN
    if arm.startswith("fft"):
        return BLACK
    trains_embedding = "modules_to_save" in flags or "embedding" in flags["lora_targets"]
    if trains_embedding:
        return ORANGE
    return GREY if flags["lora_targets"] == "square" else BLUE


LATE_LOSS = 0.4  # nats a token; chosen after a look at the figure
LOSS_LABELS = {
    GREY: "LoRA on q and o",
    BLUE: "LoRA on all layers",
    ORANGE: "the same with a trained embedding",
    BLACK: "full fine-tuning",
    GREEN: "full fine-tuning, embedding frozen",
}


@figure("loss")
def draw_loss(evidence: Evidence) -> tuple[str, str] | None:
    """Draw composition against the loss on reference answers, a mark a setting."""
    table = list_losses(evidence)
    if table.empty:
        return None
    most = table.share[table.loss > LATE_LOSS].max()
    title = f"Answers turn correct late: above {LATE_LOSS} nats a token at most {percent(most)} are"
    markers = {"xs": "o", "s": "s", "m26": "^"}
    with mpl.rc_context(STYLE):
        fig, axes = start_figure(title, 3.9)
        ax = axes[0]
        for (color, size), marks in table.groupby(["color", "size"], sort=False):
            ax.scatter(
                marks.loss,
                marks.share,
                c=color,
                marker=markers[size],
                s=26,
                alpha=0.75,
                linewidths=0,
            )
        label_losses(ax, markers)
        return title, write_svg(fig)


def list_losses(evidence: Evidence) -> pd.DataFrame:
    """Return the loss and composition of every setting from the main bases.

    A row is an arm at a size, learning rate and number of epochs: the mean of its runs.
    """
    prompts = evidence.choose_prompts("composition")
    usual = select_usual(evidence)
    whole = usual[were_asked(usual, "unseen")]
    rows = []
    for (size, arm, *_), runs in whole.groupby(["size", "arm", "learning_rate", "epochs"]):
        flags = evidence.study.arms[arm].flags
        estimate = estimate_share(runs, prompts, "greedy")
        row = {"size": size, "arm": arm, "color": find_color(arm, flags)}
        rows.append(row | {"loss": runs.test_nll.mean(), "share": estimate.value})
    return pd.DataFrame(rows)


def label_losses(ax: Axes, markers: dict[str, str]) -> None:
    """Name axes, colors and marks of the loss's figure."""
    ax.set_xscale("log")
    ax.xaxis.set_major_locator(FixedLocator([0.05, 0.1, 0.2, 0.4, 1, 2, 4]))
    ax.xaxis.set_minor_locator(NullLocator())
    ax.xaxis.set_major_formatter("{x:g}")
    ax.axvline(LATE_LOSS, color=BLACK, linewidth=0.8, linestyle=":")
    ax.set_xlabel("loss on reference answers, nats a token")
    ax.set_ylabel("correct answers, composition")
    show_percent(ax.yaxis)
    handles = []
    for color, label in LOSS_LABELS.items():
        handles.append(mpl.lines.Line2D([], [], color=color, marker="o", ls="", label=label))
    for size, marker in markers.items():
        line = mpl.lines.Line2D([], [], color="#666666", marker=marker, ls="", label=SIZES[size])
        handles.append(line)
    ax.legend(handles=handles, loc="upper right", fontsize=9.5)


# --------------------------------------------------------------------------------------------- keep

KEEP_METHODS = ["r8", "width16", "fft", "fft_frozen"]
KEEP_LABELS = {  # size and arm -> label, its shift in points, and which of its ends is at the mark
    ("xs", "all_r8"): ("1.3M, rank 8", (6, 6), "left"),
    ("s", "all_r8"): ("5.5M, rank 8", (5, -14), "left"),
    ("s", "all_r16"): ("5.5M, rank 16", (-4, 17), "right"),
    ("m26", "all_r8"): ("25M, rank 8", (-6, 5), "right"),
    ("m26", "all_r32"): ("25M, rank 32", (6, 8), "left"),
}
KEEP_NAMES = [  # where a method's name stands
    (0.70, 0.51, "all-layer LoRA", BLUE),
    (0.81, 0.15, "full fine-tuning", BLACK),
    (0.868, 0.83, "full fine-tuning, embedding frozen", GREEN),
]


@figure("keep")
def draw_keep(evidence: Evidence) -> tuple[str, str] | None:
    """Draw unseen things against composition, a mark a method and size."""
    title = "Full fine-tuning keeps far more unseen things if its embedding is frozen"
    table = list_kept(evidence)
    if table.empty:
        return None
    with mpl.rc_context(STYLE):
        fig, axes = start_figure(title, 4.2)
        ax = axes[0]
        for mark in table.itertuples():
            draw_kept(ax, mark)
        for x, y, name, color in KEEP_NAMES:
            ax.text(x, y, name, color=color, ha="center", va="top", fontweight="bold")
        ax.set_xlim(0.58, 0.94)
        ax.set_ylim(-0.03, 0.85)
        ax.set_xlabel("correct answers, composition")
        ax.set_ylabel("correct answers, unseen things")
        show_percent(ax.xaxis)
        show_percent(ax.yaxis)
        return title, write_svg(fig)


def draw_kept(ax: Axes, mark: tuple) -> None:
    """Draw one final model with the intervals of both shares, and its label."""
    taught, kept = mark.taught, mark.kept
    ax.errorbar(
        taught.value,
        kept.value,
        xerr=[[taught.value - taught.low], [taught.high - taught.value]],
        yerr=[[kept.value - kept.low], [kept.high - kept.value]],
        fmt="o",
        color=mark.color,
        elinewidth=0.8,
    )
    default = (SIZES[mark.size], (6, 6), "left")
    label, shift, side = KEEP_LABELS.get((mark.size, mark.arm), default)
    ax.annotate(
        label,
        (taught.value, kept.value),
        xytext=shift,
        textcoords="offset points",
        ha=side,
        color=mark.color,
        fontsize=9.5,
    )


def list_kept(evidence: Evidence) -> pd.DataFrame:
    """Return both outcomes of final models. A row is a method and size, each arm once."""
    rows = {}
    for method in METHODS:
        if method.key not in KEEP_METHODS:
            continue
        for size, arm in method.arms.items():
            runs = evidence.find_cell(arm, size)
            if runs.empty or (size, arm) in rows:
                continue
            rows[size, arm] = {
                "size": size,
                "arm": arm,
                "color": method.color,
                "taught": estimate_share(runs, evidence.choose_prompts("composition"), "greedy"),
                "kept": estimate_share(runs, evidence.choose_prompts("unseen"), "greedy"),
            }
    return pd.DataFrame(list(rows.values()))


# ------------------------------------------------------------------------------------------ endings

ENDING_LABELS = {  # base -> label and its shift in points
    "xs-world-plain42": ("0 unused rows", (8, -2)),
    "xs-world-plain64x42": ("64", (-5, 9)),
    "xs-world-plain512x42": ("512", (8, -3)),
    "xs-world-plain4096x42": ("4,096 unused rows", (8, 0)),
}
ENDING_NOTES = [  # what is pointed at: a text, where it stands, and where its line ends
    ("bases of the first edition\nwith 6.1M parameters", (0.66, 0.3), (0.925, 0.08)),
    ("bases that read\nchat tokens", (0.93, 0.3), (0.998, 0.02)),
]


@figure("endings")
def draw_endings(evidence: Evidence) -> tuple[str, str] | None:
    """Draw the share of endless answers against the bound of the end token, a mark a base."""
    title = "Sampled answers run on where the base keeps the end token improbable"
    table = list_endings(evidence)
    with mpl.rc_context(STYLE):
        fig, axes = start_figure(title, 3.4)
        ax = axes[0]
        for edition, bases in table.groupby("edition", sort=False):
            is_own = edition == evidence.study.edition
            ax.plot(
                bases.bound,
                bases.endless,
                "o",
                color=BLUE,
                markerfacecolor=BLUE if is_own else "white",
                label="this study" if is_own else "first edition",
            )
        for base in table[table.base.isin(list(ENDING_LABELS))].itertuples():
            text, shift = ENDING_LABELS[base.base]
            place = (base.bound, base.endless)
            ax.annotate(text, place, xytext=shift, textcoords="offset points")
        for text, place, end in ENDING_NOTES:
            line = {"arrowstyle": "-", "color": "#888888", "linewidth": 0.8}
            ax.annotate(text, end, xytext=place, ha="center", arrowprops=line)
        ax.set_xlabel("highest probability that the end token can reach, embedding frozen")
        ax.set_ylabel("sampled answers without end")
        ax.set_ylim(-0.03, 1.03)
        show_percent(ax.yaxis)
        ax.legend(loc="upper right")
        return title, write_svg(fig)


# ---------------------------------------------------------------------------------------- forecasts


@figure("forecasts")
def draw_forecasts(evidence: Evidence) -> tuple[str, str] | None:
    """Draw what was found against what was predicted, a mark a forecast."""
    table = pd.read_csv(RESULTS_DIR / "forecasts.csv")
    errors = (table.found - table.predicted).abs()
    is_first = table.stage == "with the rules"
    first_error = errors[is_first].median()
    later_error = errors[~is_first].median()
    title = (
        f"Our first forecasts were off by {first_error:.0f} points in the median, "
        f"later ones by {later_error:.0f}"
    )
    with mpl.rc_context(STYLE):
        fig, axes = start_figure(title, 4.6)
        ax = axes[0]
        ax.plot([0, 100], [0, 100], color=BLACK, linewidth=0.8)
        later, first = table[~is_first], table[is_first]
        ax.plot(
            later.predicted,
            later.found,
            "o",
            color="#6d6d6d",
            markerfacecolor="none",
            markersize=5,
            label=f"{len(later)} later ones",
        )
        ax.plot(
            first.predicted,
            first.found,
            "o",
            color=ORANGE,
            markersize=6,
            label=f"{len(first)} fixed with the rules",
        )
        third = list_third_forecasts(evidence)
        ax.plot(third.told, third.found, "s", color=BLUE, label=f"{len(third)} of the third round")
        ax.set_aspect("equal")
        ax.set_xlabel("predicted, percent or points")
        ax.set_ylabel("found")
        ax.legend(loc="upper left", bbox_to_anchor=(1.02, 1), handletextpad=0.2)
        return title, write_svg(fig)


def list_third_forecasts(evidence: Evidence) -> pd.DataFrame:
    """Return round 3's predictions of a number, in percent or points, whose runs are there."""
    if evidence.round3.empty:
        return pd.DataFrame(columns=["told", "found"])
    table = tabulate_predictions(get_round3(evidence))
    return table[table.told.notna() & table.found.notna()]
