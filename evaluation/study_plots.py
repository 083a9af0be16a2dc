"""The study's figures, as SVG, from what `evaluation.findings.gather` found."""

import matplotlib
import numpy as np
from matplotlib.figure import Figure

from evaluation.findings import (
    DECODING,
    FEW_PROMPTS,
    Evidence,
    Forgotten,
    Pair,
    bad_shares,
    few_prompt_rates,
    forgetting_by_arm,
    ladder_is_whole,
    probes_of,
    tuned_arms,
)
from evaluation.intervals import Interval
from evaluation.plots import COLORS, GRID, STYLE, as_svg, label_ends, line_style
from evaluation.records import DECODING_LABELS
from evaluation.recovery import Row, known_cell
from evaluation.study import Sweep, base_name, full_name, planned_bases, titled, tuned_cells

R_AXIS = (
    "recovery R: 0 the base, 1 full fine-tuning; bars: 95% intervals; hollow: without end tokens"
)


HOLLOW = {"markerfacecolor": "white", "markersize": 4, "zorder": 1}


def study_figures(evidence: Evidence) -> dict[str, str]:
    """SVG text of every figure that there are results for, by its file's name."""
    study, results, rows = evidence.study, evidence.results, evidence.rows
    drawn: dict[str, Figure] = {}
    with matplotlib.rc_context(STYLE):
        for size in study["sizes"]:
            if tuned := tuned_arms(study, size, results):
                drawn[f"study_{size}_rates.svg"] = draw_rates(study, tuned)
            cells = [
                (one, tuned_cells(one, size))
                for one in study["experiments"]
                if size in one["sizes"]
            ]
            measured = [rows[cell] for _, mine in cells for cell in mine]
            if recoveries := recovery_by_cell(study, measured):
                drawn[f"study_{size}_recovery.svg"] = draw_recoveries(recoveries)
            ladders = [
                (one, [rows[cell] for cell in mine])
                for one, mine in cells
                if one["ladder"] and ladder_is_whole(study, one, mine, results)
            ]
            if ladders:
                drawn[f"study_{size}_ladder.svg"] = draw_ladders(ladders)
            if forgotten := forgetting_by_arm(evidence, size):
                every = len(study["tuning"]["seeds"][size])
                drawn[f"study_{size}_forgetting.svg"] = draw_forgetting(study, forgotten, every)
            if probes := probes_by_cell(study, size, results):
                drawn[f"study_{size}_answers.svg"] = draw_answers(probes, evidence.languages)
            pairs = few_prompt_rates(evidence, size)
            if len(pairs) > 1:  # one pair is a line of the table
                drawn[f"study_{size}_prompts.svg"] = draw_few_prompts(pairs)
        for experiment in (one for one in study["experiments"] if one["summary"]):
            if len(by_size := recoveries_by_size(evidence, experiment)) > 1:
                name = experiment["id"].replace(" ", "_")
                drawn[f"study_{name}_sizes.svg"] = draw_sizes(experiment, by_size)
        return {name: as_svg(figure) for name, figure in drawn.items()}


def draw_rates(study: dict, tuned: dict[str, Sweep]) -> Figure:
    """Mean validation NLL by rate, a line for every arm, of the rates that did not diverge.

    A panel for full fine-tuning and its parts, and two for adapters.
    """
    panels: dict[str, dict[str, Sweep]] = {}
    for arm, sweep in tuned.items():
        panels.setdefault(rates_panel(study["arms"][arm]), {})[arm] = sweep
    figure = Figure(figsize=(8, 3.8 * len(panels)))
    all_axes = figure.subplots(len(panels), 1, sharex=True, squeeze=False)[:, 0]
    for axes, (title, arms) in zip(all_axes, panels.items(), strict=True):
        ends = []
        for index, (arm, sweep) in enumerate(arms.items()):
            finite = {rate: loss for rate, loss in sweep.losses.items() if np.isfinite(loss)}
            if not finite:
                continue  # all diverged, which the table says
            points = [(float(rate), loss) for rate, loss in finite.items()]
            color = line_style(index)["color"]
            every = max(sweep.seeds.values())
            axes.plot(*np.transpose(points), **line_style(index))
            for point, rate in zip(points, finite, strict=True):
                draw_dot(axes, point, color, sweep.seeds[rate] == every)
            ends.append((*points[-1], arm))
        axes.set_xscale("log")
        axes.grid(axis="y", **GRID)
        label_ends(axes, ends)
        axes.set_title(title)
        axes.set_ylabel("validation NLL, nats a token")
    all_axes[-1].set_xlabel("peak learning rate; hollow: one seed where others have all")
    return figure


def draw_dot(
    axes: matplotlib.axes.Axes, place: tuple[float, float], color: str, has_every_seed: bool
) -> None:
    """A rate's dot on its arm's line, hollow where others have more seeds."""
    face = color if has_every_seed else "white"
    axes.plot(*place, marker="o", markersize=3.5, color=color, markerfacecolor=face)


def rates_panel(arm: dict) -> str:
    """The panel of an arm, so that few lines share one."""
    if arm["stage"] == "full_sft":
        return "full fine-tuning, of all or of a part"
    if "modules_to_save" in arm.get("flags", {}):
        return "LoRA with embedding and norms"
    return "LoRA, vocabulary frozen or but two rows of it"


def recovery_by_cell(study: dict, measured: list[Row | None]) -> list[tuple[str, Row]]:
    """Name and row of every whole run that was measured, from the lowest R to the highest."""
    rows = [row for row in measured if row and row.recovery]
    found = {
        f"{full_name(study, row.measured.cell)}, {row.measured.cell.rate} "
        f"({in_seeds(len(row.measured.seeds))})": row
        for row in rows
        if not row.measured.cell.part
    }
    return sorted(found.items(), key=lambda item: item[1].recovery.estimate)


def in_seeds(count: int) -> str:
    """`1 seed`, `5 seeds`."""
    return "1 seed" if count == 1 else f"{count} seeds"


def draw_recoveries(recoveries: list[tuple[str, Row]]) -> Figure:
    """R of every arm with its 95% interval, between the base and full fine-tuning."""
    figure = Figure(figsize=(8, 1 + 0.3 * len(recoveries)))
    axes = figure.subplots()
    for place, (_, row) in enumerate(recoveries):
        draw_recovery(axes, place, row)
    for edge in (0, 1):
        axes.axvline(edge, **GRID)
    axes.set_yticks(range(len(recoveries)), [name for name, _ in recoveries])
    axes.set_ylim(-0.5, len(recoveries) - 0.5)
    figure.supxlabel(R_AXIS)
    return figure


def recoveries_by_size(evidence: Evidence, experiment: dict) -> dict[str, dict[str, Row]]:
    """The measured cells of an experiment by size and by name, of sizes that have two or more."""
    found = {}
    for size in experiment["sizes"]:
        cells = [(cell, evidence.rows[cell]) for cell in tuned_cells(experiment, size)]
        rows = {
            f"{titled(evidence.study, cell)}, {cell.rate}": row
            for cell, row in cells
            if row and row.recovery
        }
        if len(rows) > 1:  # full fine-tuning alone says nothing
            found[size] = rows
    return found


def draw_sizes(experiment: dict, by_size: dict[str, dict[str, Row]]) -> Figure:
    """R of the same arms at each size, with their 95% intervals."""
    names = list(dict.fromkeys(name for rows in by_size.values() for name in rows))
    figure = Figure(figsize=(8, 1.4 + 0.5 * len(names)))
    axes = figure.subplots()
    for index, (size, rows) in enumerate(by_size.items()):
        for name, row in rows.items():
            place = names.index(name) + 0.4 * (index / (len(by_size) - 1) - 0.5)
            draw_recovery(axes, place, row, COLORS[index])
        label = f"{size}, {base_name(experiment, size)}"
        axes.plot([], [], "o", color=COLORS[index], markersize=4, label=label)
    for edge in (0, 1):
        axes.axvline(edge, **GRID)
    axes.set_yticks(range(len(names)), names)
    axes.set_ylim(len(names) - 0.5, -0.5)
    figure.supxlabel(R_AXIS)
    axes.legend(frameon=False, title="size, and its base")
    return figure


def draw_ladders(ladders: list[tuple[dict, list[Row | None]]]) -> Figure:
    """A panel for every order of changes: R with its 95% interval after each."""
    heights = [len(rows) for _, rows in ladders]
    figure = Figure(figsize=(8, 1 + 0.3 * sum(heights)))
    panels = figure.subplots(len(ladders), 1, sharex=True, squeeze=False, height_ratios=heights)
    for axes, (experiment, rows) in zip(panels[:, 0], ladders, strict=True):
        for place, row in enumerate(rows):
            if row and row.recovery:
                draw_recovery(axes, place, row)
            else:
                axes.annotate("every run diverged", (0, place), va="center", fontsize=7)
        for edge in (0, 1):
            axes.axvline(edge, **GRID)
        names = zip(experiment["rungs"], rows, strict=True)
        axes.set_yticks(range(len(rows)), [rung_name(name, row) for name, row in names])
        axes.set_ylim(len(rows) - 0.5, -0.5)
        axes.set_title(experiment["question"])
    figure.supxlabel(R_AXIS)
    return figure


def draw_forgetting(study: dict, by_arm: dict[str, list[Forgotten]], seeds: int) -> Figure:
    """What is forgotten against held-out NLL: a line for every arm, a dot for every rate.

    Args:
        seeds: how many make a dot full.
    """
    figure = Figure(figsize=(8, 5))
    axes = figure.subplots()
    for index, (arm, points) in enumerate(by_arm.items()):
        style = line_style(index)
        places = [(one.nll, one.above) for one in points]
        axes.plot(*np.transpose(places), label=study["arms"][arm]["title"], **style)
        for one, place in zip(points, places, strict=True):
            draw_dot(axes, place, style["color"], one.seeds >= seeds)
    axes.grid(**GRID)
    axes.set_xlabel(
        "held-out response NLL, nats a token: to the left, more was learned (hollow: one seed)"
    )
    axes.set_ylabel("NLL of pretraining text above the base's, nats a token")
    axes.legend(frameon=False, fontsize=8)
    return figure


def rung_name(name: str, row: Row | None) -> str:
    """A rung's name, with the runs that diverged."""
    failed = row.measured.failed if row else 0
    return f"{name} ({failed} diverged)" if failed else name


def draw_recovery(
    axes: matplotlib.axes.Axes, place: float, row: Row, color: str = COLORS[0]
) -> None:
    """A dot with its interval and its value in figures; a hollow one without end tokens."""
    interval = row.recovery
    below, above = interval.estimate - interval.low, interval.high - interval.estimate
    spread = np.maximum([[below], [above]], 0)
    axes.errorbar([interval.estimate], [place], xerr=spread, fmt="o", color=color, markersize=4)
    where = {"xytext": (0, 4), "textcoords": "offset points", "ha": "center", "fontsize": 7}
    axes.annotate(f"{interval.estimate:.2f}", (interval.estimate, place), **where)
    if row.answer_recovery:
        axes.plot([row.answer_recovery.estimate], [place], "o", color=color, **HOLLOW)


def probes_by_cell(study: dict, size: str, results: dict[str, dict]) -> dict[str, list[dict]]:
    """How the bases and the arms that were asked answered, by name."""
    bases = {run.id: results.get(run.id, {}) for run in planned_bases(study, size)}
    found = {
        f"{name}, the base": [base["probe"]] for name, base in bases.items() if "probe" in base
    }
    experiments = [one for one in study["experiments"] if size in one["sizes"] and one["probe"]]
    for cell in (cell for one in experiments for cell in tuned_cells(one, size)):
        if probes := list(probes_of(study, cell, results).values()):
            known = known_cell(study, cell, results)
            found[f"{full_name(study, known)}, {known.rate} ({in_seeds(len(probes))})"] = probes
    return found


def draw_answers(probes: dict[str, list[dict]], languages: dict[str, np.ndarray]) -> Figure:
    """Bad answers of every arm that was asked, in percent with 95% intervals.

    A panel for each language, arms from the most of sampled bad ones in the first to the fewest.
    """
    shares = {
        language: {name: bad_shares(found, chosen) for name, found in probes.items()}
        for language, chosen in languages.items()
    }
    first = next(iter(shares.values()))
    names = sorted(first, key=lambda name: (-first[name][DECODING].estimate, name))
    figure = Figure(figsize=(9, 1.4 + 0.3 * len(names)))
    panels = figure.subplots(1, len(languages), sharey=True, squeeze=False)[0]
    for axes, (language, chosen) in zip(panels, languages.items(), strict=True):
        for index, decoding in enumerate(DECODING_LABELS):
            draw_shares(axes, index, [shares[language][name][decoding] for name in names])
        axes.set_xlim(-4, 104)
        axes.set_xticks([0, 50, 100], ["0%", "50%", "100%"])
        axes.grid(axis="x", **GRID)
        axes.set_title(f"{chosen.sum()} {language} prompts")
    panels[0].set_yticks(range(len(names)), names)
    panels[0].set_ylim(len(names) - 0.5, -0.5)
    figure.supxlabel("answers that never end or are blank; bars: 95% intervals")
    marks, labels = panels[0].get_legend_handles_labels()
    figure.legend(marks, labels, loc="outside upper right", ncols=2, frameon=False)
    return figure


def draw_shares(axes: matplotlib.axes.Axes, index: int, shares: list[Interval]) -> None:
    """The shares of one decoding, the `index`-th of `DECODING_LABELS`, a row for each."""
    below = [100 * (one.estimate - one.low) for one in shares]
    above = [100 * (one.high - one.estimate) for one in shares]
    axes.errorbar(
        [100 * one.estimate for one in shares],
        [row + 0.3 * index - 0.15 for row in range(len(shares))],
        xerr=np.maximum([below, above], 0),
        fmt="Do"[index],
        color=COLORS[index],
        markersize=4,
        label=list(DECODING_LABELS.values())[index],
    )


def draw_few_prompts(pairs: list[Pair]) -> Figure:
    """A bar for every pair of arms: the worse named, neither, the better named."""
    figure = Figure(figsize=(8, 1 + 0.5 * len(pairs)))
    axes = figure.subplots()
    for place, pair in enumerate(pairs):
        left, right = 0.0, 1 - pair.wrong - pair.tied
        parts = zip((pair.wrong, pair.tied, right), (COLORS[1], "#bbbbbb", COLORS[0]), strict=True)
        for share, color in parts:
            axes.barh(place, 100 * share, left=100 * left, color=color, height=0.6)
            axes.annotate(f"{100 * share:.0f}%", (100 * (left + share / 2), place), ha="center")
            left += share
    names = [f"{pair.better} over {pair.worse}" for pair in pairs]
    axes.set_yticks(range(len(pairs)), names)
    axes.set_xlabel(f"{FEW_PROMPTS} prompts judged once: wrong winner, tie, right winner (%)")
    axes.set_xlim(0, 100)
    return figure
