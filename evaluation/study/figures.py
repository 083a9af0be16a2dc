"""The study's figures, as SVG text. Each title states what the figure shows.

`draw_forest` draws estimates with intervals; three more figures are curves or points.
"""

import io
from collections.abc import Callable

import matplotlib as mpl
import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from evaluation.study import edition1
from evaluation.study.analysis import (
    Evidence,
    choose_prompts,
    mark_answers,
    tabulate_shares,
)
from evaluation.study.claims import list_endings, list_paths
from evaluation.study.plan import tune_rate
from evaluation.study.settings import MAIN_BASE

STYLE = {
    "svg.fonttype": "none",
    "svg.hashsalt": "study",  # the same bytes from the same data
    "font.size": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.titlesize": 10,
    "axes.titlelocation": "left",
}
PALETTE = {"greedy": "#1f5a99", "t0.85p0.85": "#d1712a"}
LABELS = {"greedy": "greedy", "t0.85p0.85": "sampled, T=0.85"}
LADDER = (
    "seed",
    "seed_tuned",
    "all_r8",
    "all_r64",
    "all_r8_embedding",
    "all_r8_vocabulary",
    "fft_frozen",
    "fft",
)
RATE_ARMS = ("fft", "seed_tuned", "all_r8", "all_r8_vocabulary")


def save_svg(figure: Figure) -> str:
    """Return a figure as SVG text and close it."""
    file = io.StringIO()
    figure.savefig(file, format="svg", bbox_inches="tight", metadata={"Date": None})
    plt.close(figure)
    return "\n".join(line.rstrip() for line in file.getvalue().splitlines()) + "\n"


def draw_forest(ax: Axes, frame: pd.DataFrame, color: str, label: str, shift: float = 0) -> None:
    """Draw estimates with intervals, a line each.

    Args:
        frame: `name`, `value`, `low` and `high`; the first row is the top one.
    """
    places = -np.arange(len(frame)) + shift
    reach = [frame.value - frame.low, frame.high - frame.value]
    ax.errorbar(frame.value, places, xerr=np.clip(reach, 0, None), fmt="o", color=color,
                markersize=4, linewidth=1.2, label=label)  # fmt: skip
    ax.set_yticks(-np.arange(len(frame)), frame.name)
    ax.grid(axis="x", linewidth=0.3)


def draw_edition1(evidence: Evidence) -> tuple[Figure, str]:
    """Draw the first edition's R without ends at both sizes, a row a way of training."""
    title = "Learning rate and frozen embedding hold LoRA back at 1.6M parameters"
    figure, ax = plt.subplots(figsize=(6, 2.8))
    arms = edition1.LADDER[:-1]
    for base, label, color, shift in (
        (edition1.PLAIN, "1.6M parameters", PALETTE["greedy"], 0.12),
        (edition1.WHOLE, "6.1M", PALETTE["t0.85p0.85"], -0.12),
    ):
        frame = edition1.pick_main([(base, arm) for arm in arms])
        frame["name"] = [edition1.ARMS[arm] for arm in arms]
        draw_forest(ax, frame, color, label, shift)
    ax.set(xlim=(0, 1), xlabel="share of full fine-tuning's gain, without end tokens", title=title)
    ax.legend(frameon=False, loc="lower left")
    return figure, title


def draw_rates1(evidence: Evidence) -> tuple[Figure, str]:
    """Draw the first edition's R by learning rate, at 1.6M parameters."""
    title = "In 500 steps LoRA on q and o needs 100 times the learning rate of MiniMind's script"
    figure, ax = plt.subplots(figsize=(6, 2.8))
    for arm, rows in edition1.list_rates().groupby("arm", sort=False):
        rows = rows.sort_values("rate")
        ax.plot(rows.rate, rows.R, ".-", label=edition1.ARMS[arm])
    ax.axvline(1e-4, color="#999999", linestyle=":")
    ax.set(xscale="log", ylim=(0, 1.05), xlabel="learning rate", ylabel="R", title=title)
    ax.legend(frameon=False, fontsize=7, loc="upper left")
    return figure, title


def draw_sizes1(evidence: Evidence) -> tuple[Figure, str]:
    """Draw the first edition's R without ends by size and tokens a parameter."""
    title = "With the embedding frozen, LoRA recovers more at 6.1M and after more pretraining"
    figure, ax = plt.subplots(figsize=(6, 2.8))
    bases = ["xs-short42", edition1.PLAIN, "s-short42", "s-half42", edition1.WHOLE]
    for arm in edition1.FROZEN_OR_NOT:
        rows = edition1.pick_main([(base, arm) for base in bases])
        reach = [rows.value - rows.low, rows.high - rows.value]
        ax.errorbar(range(len(bases)), rows.value, yerr=reach, fmt="o", label=edition1.ARMS[arm])
    ax.set_xticks(range(len(bases)), [edition1.name_base(base) for base in bases])
    ax.set(ylim=(0, 1), xlabel="parameters, tokens a parameter", ylabel="R without ends")
    ax.set_title(title)
    ax.legend(frameon=False, fontsize=7, loc="upper left", bbox_to_anchor=(1, 1))
    return figure, title


def draw_kept1(evidence: Evidence) -> tuple[Figure, str]:
    """Draw what the first edition's arms forget against what they learn, a point a rate."""
    title = "At equal forgetting, full fine-tuning at a low learning rate learns most"
    figure, ax = plt.subplots(figsize=(6, 2.8))
    for arm, rows in edition1.list_rates().groupby("arm", sort=False):
        rows = rows[rows.forgets < 1.1].sort_values("forgets")
        ax.plot(rows.forgets, rows.R, ".-", label=edition1.ARMS[arm])
        for row in rows.itertuples():
            ax.annotate(row.learning_rate, (row.forgets, row.R), fontsize=6)
    ax.set(xlabel="forgotten, nats a token of pretraining text", ylabel="R", title=title)
    ax.legend(frameon=False, fontsize=7)
    return figure, title


def draw_headline(evidence: Evidence) -> tuple[Figure, str] | None:
    """Draw the share of correct answers by arm and size, both decodings."""
    shares = tabulate_shares(evidence)
    if shares.empty:
        return None
    usual = (shares["set"] == "combinations") & shares.base.str.endswith(MAIN_BASE)
    usual &= (shares.start == "base") & shares.samples.isna() & shares.arm.isin(LADDER)
    usual &= shares.epochs == shares["size"].map(lambda name: evidence.study.sizes[name].epochs)
    shares = shares[usual]
    sizes = list(dict.fromkeys(shares["size"]))
    figure, axes = plt.subplots(1, len(sizes), figsize=(3.4 * len(sizes) + 1, 3), squeeze=False)
    for ax, size in zip(axes[0], sizes, strict=True):
        for place, decoding in enumerate(PALETTE):
            rows = shares[(shares["size"] == size) & (shares.decoding == decoding)]
            rows = rows.set_index("arm").loc[[arm for arm in LADDER if arm in set(rows.arm)]]
            frame = pd.DataFrame([vars(one) for one in rows.share])[["value", "low", "high"]]
            frame["name"] = [evidence.study.arms[arm].title for arm in rows.index]
            draw_forest(ax, frame, PALETTE[decoding], LABELS[decoding], 0.12 - 0.24 * place)
        ax.set(xlim=(0, 1), xlabel="correct answers", title=size)
    axes[0][0].legend(frameon=False, fontsize=7)
    size = sizes[-1]
    means = {
        row.arm: row.share.value
        for row in shares[(shares["size"] == size) & (shares.decoding == "greedy")].itertuples()
    }
    told = ", ".join(
        f"{evidence.study.arms[arm].title} {100 * means[arm]:.0f}%"
        for arm in ("fft", "all_r8", "seed")
        if arm in means
    )
    title = f"Correct greedy answers at {size}: {told}"
    figure.suptitle(title, x=0.02, ha="left", y=1.04)
    figure.tight_layout()
    return figure, title


def draw_keeping(evidence: Evidence) -> tuple[Figure, str] | None:
    """Draw unseen things against combinations, along the checkpoints of each rate."""
    arms = [arm for arm in ("fft", "all_r8", "fft_mixed") if len(list_paths(evidence, arm, "xs"))]
    if not arms:
        return None
    figure, axes = plt.subplots(1, 2, figsize=(8, 3.4), sharey=True)
    for ax, decoding in zip(axes, PALETTE, strict=True):
        for arm, color in zip(arms, ("#444444", "#1f5a99", "#8a8a3a"), strict=False):
            paths = list_paths(evidence, arm, "xs")
            for rate, path in paths.groupby("learning_rate"):
                points = [
                    [
                        mark_answers(
                            point, choose_prompts(evidence, name), decoding, "correct"
                        ).mean()
                        for name in ("combinations", "unseen")
                    ]
                    for _, point in path.groupby("step")
                ]
                x, y = np.array(points).T
                title = (
                    evidence.study.arms[arm].title if rate == paths.learning_rate.min() else None
                )
                ax.plot(x, y, ".-", color=color, linewidth=1, label=title)
                ax.annotate(f"{rate:g}", (x[-1], y[-1]), fontsize=6, color=color)
        ax.set(xlabel="correct on combinations", title=LABELS[decoding])
    axes[0].set_ylabel("correct on unseen things")
    axes[0].legend(frameon=False, fontsize=7)
    title = "What is learned against what is kept, at 8 checkpoints of each learning rate"
    figure.suptitle(title, x=0.02, ha="left", y=1.02)
    return figure, title


def draw_endings(evidence: Evidence) -> tuple[Figure, str] | None:
    """Draw the share of endless answers against the bound of the end token, a point a base."""
    table = list_endings(evidence)
    if table.empty:
        return None
    figure, ax = plt.subplots(figsize=(5, 3))
    for edition, rows in table.groupby("edition"):
        color = PALETTE["greedy"] if edition == evidence.study.edition else "#999999"
        ax.plot(rows.bound, rows.endless, "o", color=color, label=f"edition {edition}")
    for row in table.itertuples():
        ax.annotate(row.base, (row.bound, row.endless), fontsize=6)
    title = "Where the end token cannot become probable, sampled answers do not end"
    ax.set(xlabel="bound of the end token's probability", ylabel="endless answers", title=title)
    ax.legend(frameon=False)
    return figure, title


def draw_rates(evidence: Evidence) -> tuple[Figure, str] | None:
    """Draw the share of correct answers on the tuning half by learning rate, at xs."""
    study = evidence.study
    sweeps = {arm: tune_rate(study, "xs", arm, evidence.runs) for arm in RATE_ARMS}
    if not any(sweep.best for sweep in sweeps.values()):
        return None
    figure, ax = plt.subplots(figsize=(5, 3))
    for arm, sweep in sweeps.items():
        ax.plot(list(sweep.shares), list(sweep.shares.values()), ".-", label=study.arms[arm].title)
    title = "Each way of training has its own best learning rate (xs)"
    ax.set(xscale="log", xlabel="learning rate", ylabel="correct, tuning half", title=title)
    ax.legend(frameon=False, fontsize=7)
    return figure, title


DRAWERS: dict[str, Callable] = {
    "edition1": draw_edition1,
    "rates1": draw_rates1,
    "sizes1": draw_sizes1,
    "kept1": draw_kept1,
    "headline": draw_headline,
    "keeping": draw_keeping,
    "endings": draw_endings,
    "rates": draw_rates,
}


def draw_figures(evidence: Evidence) -> tuple[dict[str, str], dict[str, str]]:
    """Return the SVG text of each figure that there is data for, and every title ("" if none)."""
    figures, titles = {}, dict.fromkeys(DRAWERS, "")
    with mpl.rc_context(STYLE):
        for name, draw in DRAWERS.items():
            if found := draw(evidence):
                figures[name] = save_svg(found[0])
                titles[name] = found[1].replace("\n", " ")
    return figures, titles
