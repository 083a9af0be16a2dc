"""Figures of single runs, as SVG: rates with intervals, loss curves, sweeps, energy by rank.

Lines and rows are named where they stand; colors are Okabe and Ito's (jfly.uni-koeln.de/color,
2008), which people with any color vision can tell apart. The same results give the same bytes: ids
come from a fixed salt, and no date is written.
"""

import io
import math

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from evaluation.records import (
    DECODING_LABELS,
    Record,
    families,
    method,
    peak_rate,
    rate_of_answers,
    sweeps,
    thin,
    unfinished,
    validation_loss,
)

COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#000000")  # the ones legible on white
DASHES = ("-", "--", ":")
GRID = {"color": "#dddddd", "linewidth": 0.6}
STYLE = {
    "svg.hashsalt": "report",
    "font.size": 9,
    "figure.labelsize": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.titlesize": 9,
    "axes.titlelocation": "left",
    "axes.axisbelow": True,
    "figure.constrained_layout.use": True,
}
CURVE_POINTS = 60
KINDS = {
    "attention": ("q_proj", "k_proj", "v_proj", "o_proj"),
    "MLP": ("gate_proj", "up_proj", "down_proj"),
}


def figures(records: list[Record], rates: dict[str, str]) -> dict[str, str]:
    """SVG text of every figure that there are results for, by its file's name.

    Args:
        rates: the rates that are shown, with their labels.
    """
    drawn: dict[str, Figure] = {}
    with matplotlib.rc_context(STYLE):
        for base, members in families(records).items():
            probed = [r for r in members if r.results and r.results["decodings"]]
            curved = [r for r in members if r.results and r.curve and r.stage != "pretrain"]
            swept = [runs for runs in sweeps(members) if runs[0].base == base]
            analyzed = [r for r in members if r.update]
            if probed and rates:
                drawn[f"rates_{base}.svg"] = draw_rates(probed, rates)
            if curved:
                drawn[f"curves_{base}.svg"] = draw_curves(curved)
            if swept:
                drawn[f"learning_rates_{base}.svg"] = draw_sweeps(swept)
            if analyzed:
                drawn[f"spectra_{base}.svg"] = draw_energy(analyzed)
        return {name: as_svg(figure) for name, figure in drawn.items()}


def as_svg(figure: Figure) -> str:
    """The figure as SVG, without the date and the version that made it."""
    file = io.StringIO()
    figure.savefig(file, format="svg", facecolor="white", metadata={"Date": None, "Creator": None})
    return "".join(line.rstrip() + "\n" for line in file.getvalue().splitlines())


def line_style(index: int) -> dict:
    """Color and dashes of the line with this index: 15 can be told apart."""
    dashes = DASHES[index // len(COLORS) % len(DASHES)]
    return {"color": COLORS[index % len(COLORS)], "linestyle": dashes}


def label_ends(axes: Axes, ends: list[tuple[float, float, str]]) -> None:
    """Names at the right ends (x, y, name) of lines, moved up where they would overlap."""
    low, high = axes.get_ylim()
    place = -math.inf
    for x, y, name in sorted(ends, key=lambda end: end[1]):
        place = max(y, place + 0.06 * (high - low))
        where = {"xytext": (5, 0), "textcoords": "offset points", "va": "center"}
        axes.annotate(name, (x, place), fontsize=8, annotation_clip=False, **where)


# ------------------------------------------------------------------------------------------- rates


def draw_rates(probed: list[Record], rates: dict[str, str]) -> Figure:
    """A panel for every rate, a row for every checkpoint: dots with 95% Wilson intervals."""
    figure = Figure(figsize=(9, 1.1 + 0.42 * len(probed)))
    panels = figure.subplots(1, len(rates), sharey=True, squeeze=False)[0]
    for axes, (key, label) in zip(panels, rates.items(), strict=True):
        for index, decoding in enumerate(DECODING_LABELS):
            draw_rate(axes, probed, key, decoding, index)
        axes.set_title(label)
        axes.set_xlim(-4, 104)
        axes.set_xticks([0, 50, 100], ["0%", "50%", "100%"])
        axes.spines["left"].set_visible(False)
        axes.tick_params(axis="y", length=0)
        axes.grid(axis="x", **GRID)
    panels[0].set_yticks(range(len(probed)), [record.name for record in probed])
    panels[0].set_ylim(len(probed) - 0.5, -0.5)
    names = [f"{name}, 95% interval" for name in DECODING_LABELS.values()]
    marks = panels[0].get_legend_handles_labels()[0]
    figure.legend(marks, names, loc="outside lower left", ncols=2, frameon=False, fontsize=8)
    return figure


def draw_rate(axes: Axes, probed: list[Record], key: str, decoding: str, index: int) -> None:
    """One rate under one decoding, for all checkpoints; decodings stand one below the other."""
    found = [(row, rate_of_answers(record, decoding, key)) for row, record in enumerate(probed)]
    found = [(row + 0.3 * index - 0.15, rate) for row, rate in found if rate]
    rows = [row for row, _ in found]
    middle = [100 * rate["rate"] for _, rate in found]
    below = [100 * (rate["rate"] - rate["low"]) for _, rate in found]
    above = [100 * (rate["high"] - rate["rate"]) for _, rate in found]
    axes.errorbar(
        middle,
        rows,
        xerr=np.maximum([below, above], 0),  # rounding in results.json can leave -1e-7
        fmt="oD"[index],
        color=COLORS[index],
        markerfacecolor=(COLORS[0], "white")[index],
        markersize=4.5,
        linewidth=1.2,
        label=decoding,
    )


# ------------------------------------------------------------------------------------------ curves


def draw_curves(tuned: list[Record]) -> Figure:
    """A panel for every training set: training loss as lines, validation loss as dots."""
    by_data: dict[str, list[Record]] = {}
    for record in tuned:
        by_data.setdefault(record.data, []).append(record)
    figure = Figure(figsize=(9, 3.2))
    panels = figure.subplots(1, len(by_data), squeeze=False, sharey=True)[0]
    for axes, (data, members) in zip(panels, by_data.items(), strict=True):
        ends = [draw_curve(axes, index, member) for index, member in enumerate(members)]
        label_ends(axes, ends)
        axes.set_title(data)
        axes.set_xlabel("step")
        axes.grid(axis="y", **GRID)
    panels[0].set_ylabel("nats a token: training (line),\nvalidation (dots)")
    return figure


def draw_curve(axes: Axes, index: int, record: Record) -> tuple[float, float, str]:
    """Draws one run; returns where it ends, and its name."""
    train = thin(record.curve, "loss", CURVE_POINTS)
    valid = thin(record.curve, "eval_loss", CURVE_POINTS)
    style = line_style(index)
    axes.plot(*np.reshape(train, (-1, 2)).T, linewidth=1.1, alpha=0.75, **style)
    axes.plot(*np.reshape(valid, (-1, 2)).T, "o", color=style["color"], markersize=4)
    last = (train or valid or [(0, 0.0)])[-1]
    return *last, f"{record.name}{unfinished(record)}"


# ------------------------------------------------------------------------------------------ sweeps


def draw_sweeps(swept: list[list[Record]]) -> Figure:
    """Validation loss by learning rate, a line for every sweep, of the runs that completed."""
    figure = Figure(figsize=(7, 3.2))
    axes = figure.subplots()
    ends = []
    for index, runs in enumerate(swept):
        done = [(peak_rate(run), validation_loss(run)) for run in runs]
        done = [(rate, loss) for rate, loss in done if math.isfinite(loss)]
        axes.plot(*np.reshape(done, (-1, 2)).T, marker="o", markersize=4, **line_style(index))
        if done:
            ends.append((*done[-1], f"{method(runs[0])}, {runs[0].run['steps']:,} steps"))
    axes.set_xscale("log")
    axes.margins(y=0.15)
    axes.grid(axis="y", **GRID)
    label_ends(axes, ends)
    axes.set_xlabel("peak learning rate")
    axes.set_ylabel("validation NLL, nats a token")
    return figure


# ----------------------------------------------------------------------------------------- spectra


def draw_energy(analyzed: list[Record]) -> Figure:
    """Share of an update's energy within its first r directions: median over matrices of a kind."""
    figure = Figure(figsize=(9, 3.2))
    panels = figure.subplots(1, len(KINDS), sharey=True)
    for axes, (title, kinds) in zip(panels, KINDS.items(), strict=True):
        for index, record in enumerate(analyzed):
            matrices = [m for m in record.update["matrices"] if m["kind"] in kinds]
            if matrices:
                energy = median_energy([matrix["singular_values"] for matrix in matrices])
                ranks = range(1, len(energy) + 1)
                axes.plot(ranks, energy, label=record.name, linewidth=1.2, **line_style(index))
        axes.axhline(90, **GRID)
        axes.set_xscale("log", base=2)
        axes.xaxis.set_major_formatter("{x:.0f}")
        axes.set_ylim(0, 103)
        axes.set_title(title)
        axes.set_xlabel("rank r")
    panels[0].set_ylabel("energy in r directions, %")
    lines = {line.get_label(): line for axes in panels for line in axes.get_lines()[:-1]}
    # All lines end at 100%, where their names would stand on each other.
    figure.legend(lines.values(), lines, loc="outside right upper", frameon=False, fontsize=8)
    return figure


def median_energy(spectra: list[list[float]]) -> list[float]:
    """For r = 1, 2, ...: median over spectra of 100 (s_1^2 + ... + s_r^2) / (s_1^2 + ...)."""
    longest = max(len(spectrum) for spectrum in spectra)
    shares = []
    for spectrum in spectra:
        energy = np.cumsum(np.square(spectrum))
        shares.append(np.pad(100 * energy / energy[-1], (0, longest - len(energy)), mode="edge"))
    return np.median(shares, axis=0).tolist()
