"""The study's part of the README and its figures, from `results/study/` and `study.toml` alone."""

from collections.abc import Iterable
from dataclasses import replace
from itertools import combinations
from statistics import fmean, median

import matplotlib
import numpy as np
from matplotlib.figure import Figure

from evaluation.findings import (
    FEW_PROMPTS,
    NOT_RUN,
    Judged,
    Row,
    count_diverged,
    describe_cell,
    judge_claims,
    rule_of,
    tuned_arms,
    wrong_winner_rate,
)
from evaluation.intervals import Interval
from evaluation.outputs import markdown_table
from evaluation.plots import COLORS, GRID, STYLE, as_svg, label_ends, line_style
from evaluation.study import (
    DEFAULTS,
    Cell,
    Sweep,
    is_interior,
    parse_cell,
    planned_bases,
    planned_runs,
    rates_of,
    runs_of,
    sweep_of,
    tuning_run,
    validation_nll,
)

CLAIM_COLUMNS = ("claim", "verdict", "measured", "seeds")
CELL_COLUMNS = ("trained", "parameters", "rate", "seeds", "NLL", "R", "forgets", "tokens/s")
# Rates of answers, greedy / as the reproduced study sampled, in cells that were probed.
RATES = {"runaway": "never stops", "loop": "loops", "blank": "blank"}
RATES |= {"check_strict": "check passed"}
RATE_COLUMNS = ("trained", "mean validation NLL by rate", "best rate", "seeds")
UPDATE_COLUMNS = ("matrices", "of the update's squared norm", "of the parameters", "r90 / rank")
R_AXIS = "recovery R: 0 the base, 1 full fine-tuning; bars: 95% intervals"
NO_STUDY = "The study was not run yet: `python evaluation/run_study.py`."
DECODING = "t0.85p0.85"  # how the reproduced study judged its eight prompts


def study_block(study: dict, results: dict[str, dict], drawn: Iterable[str]) -> list[str]:
    """Markdown lines: for each size what was run, the verdicts, the cells, the tuned rates."""
    lines = []
    for size in study["sizes"]:
        if any(result["size"] == size for result in results.values()):
            lines += size_lines(study, size, results, drawn)
    return lines[:-1] or [NO_STUDY]


def size_lines(study: dict, size: str, results: dict[str, dict], drawn: Iterable[str]) -> list[str]:
    """The lines of one size."""
    runs, waiting = planned_runs(study, size, results)
    done = [result for result in results.values() if result["size"] == size]
    known = {run.id for run in runs} | {result["id"] for result in done}
    broken = sum(result["status"] != "completed" for result in done)
    hours = sum(result["seconds"] for result in done) / 3600
    lines = [
        f"**At `{size}`**: {len(done)} of {len(known)} runs have a result"
        + (f" ({broken} diverged)" if broken else "")
        + (f"; {len(waiting)} cells add more once a rate is known" if waiting else "")
        + f". They took {hours:.1f} hours of runs.",
        "",
    ]
    lines += base_lines(study, size, results)
    lines += claim_lines(judge_claims(study, size, results))
    for experiment in study["experiments"]:
        lines += experiment_lines(study, experiment, size, results)
    lines += rate_lines(study, size, results)
    for name in drawn:
        if name.startswith(f"study_{size}_"):
            lines += [f"![{title_of(name)}](evaluation/figures/{name})", ""]
    return lines


def base_lines(study: dict, size: str, results: dict[str, dict]) -> list[str]:
    """What the arms start from: a line for every base."""
    lines = []
    for run in planned_bases(study, size):
        base = results.get(run.id, {})
        if "text_nll" in base:
            made = base["run"]
            tokens, parameters = made["tokens"], made["parameters"]
            lines.append(
                f"- `{run.id}`: {parameters:,} parameters, pretrained on {tokens / 1e6:.1f}M "
                f"tokens ({tokens / parameters:.1f} each) in {made['settings']['dtype']}; "
                f"{base['text_nll']:.3f} nats a token of held-out text."
            )
    return [*lines, ""] if lines else []


def claim_lines(claims: list[Judged]) -> list[str]:
    """The verdicts, each with its rule and what it leaves open."""
    told = [judged for judged in claims if judged.verdict != NOT_RUN]
    rows = [
        (
            f"{judged.claim['name']}: {judged.claim['text']}",
            f"**{judged.verdict}**",
            "; ".join(judged.evidence) or "-",
            str(judged.seeds),
        )
        for judged in told
    ]
    lines = [*markdown_table(CLAIM_COLUMNS, rows), ""] if rows else []
    lines += [
        f"- {judged.claim['name']}: {rule_of(judged.claim)}. It does not show "
        f"{judged.claim['not_shown']}."
        for judged in told
    ]
    lines += [""] if told else []
    not_run = [judged.claim["name"] for judged in claims if judged.verdict == NOT_RUN]
    return lines + ([f"Not run yet: {'; '.join(not_run)}.", ""] if not_run else [])


def experiment_lines(
    study: dict, experiment: dict, size: str, results: dict[str, dict]
) -> list[str]:
    """The measured cells of an experiment, under its question; of a ladder, once it is whole.

    What few prompts would say is shown by a figure alone.
    """
    if size not in experiment["sizes"] or experiment["few_prompts"]:
        return []
    cells = tuned_cells(experiment, size)
    if experiment["ladder"]:
        rungs = [describe_cell(study, cell, results) for cell in cells]
        if not is_whole(experiment, rungs):
            return []
    columns = (*CELL_COLUMNS, *(RATES.values() if experiment["probe"] else ()))
    names = experiment.get("rungs", [""] * len(experiment["cells"]))
    rows = []
    for name, cell in zip(names, cells, strict=True):
        start = [f"{name}: {short_name(cell)}" if name else short_name(cell)]
        if row := describe_cell(study, cell, results):
            rows.append(start + cell_row(row, experiment["probe"]))
        elif diverged := count_diverged(study, cell, results):
            known = ["-", cell.rate, f"0 ({diverged} diverged)"]
            rows.append([*start, *known, *["-"] * (len(columns) - len(known) - 1)])
    if not rows:
        return []
    title = f"{experiment['id']}. {experiment['question']}"
    again = f"`python evaluation/run_study.py --size {size} --experiment '{experiment['id']}'`"
    lines = [f"*{title}* {again}", "", *markdown_table(columns, rows), ""]
    return lines + update_lines(study, experiment, size, results)


def update_lines(study: dict, experiment: dict, size: str, results: dict[str, dict]) -> list[str]:
    """Where the updates lie that were cut to parts, and of what rank they are; a mean over seeds.

    r90 is the number of singular values that hold 90% of a matrix's squared norm.
    """
    runs = [
        run
        for text in experiment["cells"]
        for run in runs_of(study, experiment, text, size, results)
    ]
    cut = {run.id: results.get(run.id, {}) for run in runs if run.parts}
    updates = [result["update"] for result in cut.values() if "update" in result]
    if not updates:
        return []
    rows = []
    for kind in updates[0]["shares"]["by_kind"]:
        shares = [update["shares"]["by_kind"][kind] for update in updates]
        cells = [
            f"{100 * fmean(share[of] for share in shares):.1f}%" for of in ("update", "parameters")
        ]
        ranks = [
            matrix["r90"] / min(matrix["shape"])
            for update in updates
            for matrix in update["matrices"]
            if matrix["name"].endswith(kind)
        ]
        told = f"{min(ranks):.2f} to {max(ranks):.2f}" if ranks else "-"
        rows.append([kind, *cells, told])
    return [
        f"The update itself, of {len(updates)} seeds: where its squared norm lies, and the share "
        "of a matrix's rank that holds 90% of it.",
        "",
        *markdown_table(UPDATE_COLUMNS, rows),
        "",
    ]


def tuned_cells(experiment: dict, size: str) -> list[Cell]:
    """The cells of an experiment, a sweep at its best rate."""
    cells = [parse_cell(text, experiment, size, experiment["id"]) for text in experiment["cells"]]
    return [replace(cell, rate="tuned") if cell.rate == "sweep" else cell for cell in cells]


def cell_row(row: Row, probed: bool) -> list[str]:
    """What `CELL_COLUMNS` and, if it was probed, `RATES` tell of a cell after its name."""
    measured = row.measured
    seeds = str(len(measured.seeds))
    if measured.failed:
        seeds += f" ({measured.failed} diverged)"
    forgets = "-" if row.forgetting is None else f"{row.forgetting:+.2f}"
    parameters, speed = costs(measured.records)
    cells = [parameters, measured.cell.rate, seeds, f"{measured.nll:.3f}", in_words(row.recovery)]
    rates = [mean_rates(measured.rates, key) for key in RATES] if probed else []
    return [*cells, forgets, speed, *rates]


def costs(records: list[dict]) -> tuple[str, str]:
    """How many parameters were trained, and how fast, the median of the seeds."""
    if not records:
        return "-", "-"
    speed = median(record["tokens_per_second"] for record in records)
    return f"{records[0]['trainable_parameters']:,}", f"{speed:,.0f}"


def mean_rates(rates: list[dict], key: str) -> str:
    """A rate under each decoding in percent, the mean of the probed seeds."""
    if not rates:
        return "-"
    return " / ".join(
        f"{100 * fmean(of_run[decoding][key]['rate'] for of_run in rates):.0f}%"
        for decoding in rates[0]
    )


def in_words(interval: Interval | None) -> str:
    """An estimate with its interval."""
    if interval is None:
        return "-"
    if interval.low == interval.high == 1.0:
        return "1 (what R is a share of)"
    return f"{interval.estimate:.2f} [{interval.low:.2f}, {interval.high:.2f}]"


def rate_lines(study: dict, size: str, results: dict[str, dict]) -> list[str]:
    """The table of tuned rates."""
    rows = []
    every = len(study["tuning"]["seeds"][size])
    for arm, sweep in tuned_arms(study, size, results).items():
        cells = []
        for rate, loss in sweep.losses.items():
            text = f"{rate}: {loss:.3f}" + ("" if sweep.seeds[rate] == every else "\\*")
            cells.append(f"**{text}**" if rate == sweep.best else text)
        inside = "" if is_interior(sweep) else ", at the edge of the grid"
        seeds = min(sweep.seeds[rate] for rate in sweep.near)
        rows.append([arm, ", ".join(cells), sweep.best + inside, str(seeds)])
    rows += [row for arm in study["arms"] if (row := unfinished_row(study, arm, size, results))]
    if not rows:
        return []
    title = (
        "*Learning rates, tuned on the validation conversations; \\*: with the first seed only, "
        "`seeds`: of the best rate and its neighbors; inf: a seed diverged*"
    )
    return [title, "", *markdown_table(RATE_COLUMNS, rows), ""]


def unfinished_row(study: dict, arm: str, size: str, results: dict[str, dict]) -> list[str]:
    """What is known of an arm whose grid the first seed has not finished; empty if nothing is."""
    if sweep_of(study, arm, size, results):
        return []
    tuning, cells, told, seeds = study["tuning"], [], [], []
    for rate in rates_of(study, arm, size):
        runs = [tuning_run(study, arm, rate, size, seed) for seed in tuning["seeds"][size]]
        done = [results[run.id] for run in runs if run.id in results]
        if not done:
            continue
        cells.append(f"{rate}: {fmean(map(validation_nll, done)):.3f}")
        cell = Cell(size, tuning["base"], tuning["base_seed"], arm, rate, tuning["variant"])
        row = describe_cell(study, cell, results)
        told.append(f"R = {in_words(row.recovery if row else None)} at {rate}")
        seeds.append(len(done))
    if not cells:
        return []
    return [arm, ", ".join(cells), f"grid not finished; {', '.join(told)}", str(min(seeds))]


# ---------------------------------------------------------------- figures


def study_figures(study: dict, results: dict[str, dict]) -> dict[str, str]:
    """SVG text of every figure that there are results for, by its file's name."""
    drawn: dict[str, Figure] = {}
    with matplotlib.rc_context(STYLE):
        for size in study["sizes"]:
            if tuned := tuned_arms(study, size, results):
                drawn[f"study_{size}_rates.svg"] = draw_rates(study, tuned)
            measured = [
                (one, [describe_cell(study, cell, results) for cell in tuned_cells(one, size)])
                for one in study["experiments"]
                if size in one["sizes"]
            ]
            if recoveries := recovery_by_cell(measured):
                drawn[f"study_{size}_recovery.svg"] = draw_recoveries(recoveries)
            ladders = [
                (experiment, rows)
                for experiment, rows in measured
                if experiment["ladder"] and is_whole(experiment, rows)
            ]
            if ladders:
                drawn[f"study_{size}_ladder.svg"] = draw_ladders(ladders)
            if pairs := few_prompt_rates(study, size, results):
                drawn[f"study_{size}_prompts.svg"] = draw_few_prompts(pairs)
        return {name: as_svg(figure) for name, figure in drawn.items()}


def is_whole(experiment: dict, rows: list[Row | None]) -> bool:
    """Whether every rung was run with every seed."""
    seeds = len(experiment["seeds"])
    return all(row and row.recovery and len(row.measured.seeds) == seeds for row in rows)


def title_of(name: str) -> str:
    """What a figure shows, for those who cannot see it."""
    return {
        "rates": "Validation NLL by learning rate and what is trained",
        "recovery": "Recovery of every arm that was run, with 95% intervals",
        "ladder": "Recovery after each change on the way from MiniMind's LoRA to full fine-tuning",
        "prompts": "How often eight prompts, judged once, name the worse of two arms",
    }[name.rsplit("_", 1)[1].removesuffix(".svg")]


def draw_rates(study: dict, tuned: dict[str, Sweep]) -> Figure:
    """Mean validation NLL by rate, a line for every arm, of the rates that did not diverge.

    A panel for full fine-tuning and its parts, and one for adapters.
    """
    stages = [stage for stage in ("full_sft", "lora") if stage in stages_of(study, tuned)]
    figure = Figure(figsize=(8, 3.8 * len(stages)))
    panels = figure.subplots(len(stages), 1, sharex=True, squeeze=False)[:, 0]
    for axes, stage in zip(panels, stages, strict=True):
        arms = {arm: tuned[arm] for arm in tuned if study["arms"][arm]["stage"] == stage}
        ends = []
        for index, (arm, sweep) in enumerate(arms.items()):
            points = [
                (float(rate), loss) for rate, loss in sweep.losses.items() if np.isfinite(loss)
            ]
            if not points:
                continue  # all diverged, which the table says
            axes.plot(*np.transpose(points), marker="o", markersize=3, **line_style(index))
            ends.append((*points[-1], arm))
        axes.set_xscale("log")
        axes.grid(axis="y", **GRID)
        label_ends(axes, ends)
        axes.set_title("full fine-tuning, of all or of a part" if stage == "full_sft" else "LoRA")
        axes.set_ylabel("validation NLL, nats a token")
    panels[-1].set_xlabel("peak learning rate")
    return figure


def stages_of(study: dict, arms: Iterable[str]) -> set[str]:
    """The stages of these arms."""
    return {study["arms"][arm]["stage"] for arm in arms}


def recovery_by_cell(
    measured: list[tuple[dict, list[Row | None]]],
) -> list[tuple[str, Interval]]:
    """Name and R of every whole run that was measured, from the lowest R to the highest."""
    rows = [row for _, rows in measured for row in rows if row and row.recovery]
    found = {
        f"{short_name(row.measured.cell)}, {row.measured.cell.rate} "
        f"({len(row.measured.seeds)} seeds)": row.recovery
        for row in rows
        if not row.measured.cell.part
    }
    return sorted(found.items(), key=lambda item: item[1].estimate)


def short_name(cell: Cell) -> str:
    """A cell without what is the same for most."""
    usual = (cell.base, cell.base_seed) == (DEFAULTS["base"], DEFAULTS["base_seed"])
    base = "" if usual else f"from {cell.base}{cell.base_seed}"
    variant = "" if cell.variant == DEFAULTS["variant"] else cell.variant
    return ", ".join(filter(None, (cell.arm, variant, cell.part, base)))


def draw_recoveries(recoveries: list[tuple[str, Interval]]) -> Figure:
    """R of every arm with its 95% interval, between the base and full fine-tuning."""
    figure = Figure(figsize=(8, 1 + 0.3 * len(recoveries)))
    axes = figure.subplots()
    for place, (_, recovery) in enumerate(recoveries):
        draw_interval(axes, place, recovery)
    for edge in (0, 1):
        axes.axvline(edge, **GRID)
    axes.set_yticks(range(len(recoveries)), [name for name, _ in recoveries])
    axes.set_ylim(-0.5, len(recoveries) - 0.5)
    axes.set_xlabel(R_AXIS)
    return figure


def draw_ladders(ladders: list[tuple[dict, list[Row | None]]]) -> Figure:
    """A panel for every order of changes: R with its 95% interval after each."""
    heights = [len(rows) for _, rows in ladders]
    figure = Figure(figsize=(8, 1 + 0.3 * sum(heights)))
    panels = figure.subplots(len(ladders), 1, sharex=True, squeeze=False, height_ratios=heights)
    for axes, (experiment, rows) in zip(panels[:, 0], ladders, strict=True):
        for place, row in enumerate(rows):
            if row and row.recovery:
                draw_interval(axes, place, row.recovery)
        for edge in (0, 1):
            axes.axvline(edge, **GRID)
        axes.set_yticks(range(len(rows)), experiment["rungs"])
        axes.set_ylim(len(rows) - 0.5, -0.5)
        axes.set_title(experiment["question"])
    panels[-1, 0].set_xlabel(R_AXIS)
    return figure


def draw_interval(axes: matplotlib.axes.Axes, place: int, interval: Interval) -> None:
    """A dot with its interval, and its value in figures."""
    below, above = interval.estimate - interval.low, interval.high - interval.estimate
    spread = np.maximum([[below], [above]], 0)
    axes.errorbar([interval.estimate], [place], xerr=spread, fmt="o", color=COLORS[0], markersize=4)
    where = {"xytext": (0, 4), "textcoords": "offset points", "ha": "center", "fontsize": 7}
    axes.annotate(f"{interval.estimate:.2f}", (interval.estimate, place), **where)


def few_prompt_rates(
    study: dict, size: str, results: dict[str, dict]
) -> list[tuple[str, str, float, float]]:
    """Better and worse cell, and how often a few prompts name the worse and neither."""
    passed = {}
    for experiment in study["experiments"]:
        if experiment["few_prompts"] and size in experiment["sizes"]:
            passed |= passed_checks(study, experiment, size, results)
    pairs = []
    for one, other in combinations(passed, 2):
        better, worse = sorted((one, other), key=lambda name: -passed[name].mean())
        pairs.append((better, worse, *wrong_winner_rate(passed[better], passed[worse])))
    return pairs


def passed_checks(
    study: dict, experiment: dict, size: str, results: dict[str, dict]
) -> dict[str, np.ndarray]:
    """By cell, (seeds, prompts with a check): 1 where the answer passed it, else 0."""
    found = {}
    for text in experiment["cells"]:
        runs = runs_of(study, experiment, text, size, results)
        probes = [results[run.id].get("probe") for run in runs if run.id in results]
        marks = [
            probe["outcomes"][DECODING]["check_strict"].replace("-", "")
            for probe in probes
            if probe
        ]
        if marks:
            found[text] = np.array([[int(mark) for mark in of_run] for of_run in marks])
    return found


def draw_few_prompts(pairs: list[tuple[str, str, float, float]]) -> Figure:
    """A bar for every pair of arms: the worse named, neither, the better named."""
    figure = Figure(figsize=(8, 1 + 0.5 * len(pairs)))
    axes = figure.subplots()
    for place, (_, _, wrong, tied) in enumerate(pairs):
        left = 0.0
        parts = zip((wrong, tied, 1 - wrong - tied), (COLORS[1], "#bbbbbb", COLORS[0]), strict=True)
        for share, color in parts:
            axes.barh(place, 100 * share, left=100 * left, color=color, height=0.6)
            axes.annotate(f"{100 * share:.0f}%", (100 * (left + share / 2), place), ha="center")
            left += share
    names = [f"{better} over {worse}" for better, worse, _, _ in pairs]
    axes.set_yticks(range(len(pairs)), names)
    axes.set_xlabel(f"{FEW_PROMPTS} prompts judged once: wrong winner, tie, right winner (%)")
    axes.set_xlim(0, 100)
    return figure
