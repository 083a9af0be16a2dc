"""
The study's part of the README, its tables and its figures, from `results/study/` and `study.toml`.

The README gets the verdicts and the figures (:func:`study_block`); every rule, cell and rate stands
in `results/study/README.md` (:func:`study_details`).
"""

from collections.abc import Iterable
from dataclasses import dataclass, replace
from itertools import combinations
from statistics import fmean, median

import matplotlib
import numpy as np
from matplotlib.figure import Figure

from evaluation.findings import (
    FEW_PROMPTS,
    NOT_RUN,
    SIDES,
    Judged,
    Measured,
    Row,
    bad_shares,
    bound_of,
    common_seeds,
    contrast,
    count_diverged,
    describe_cell,
    full_of,
    judge_claims,
    known_cell,
    marked,
    measure_cell,
    probes_of,
    rule_of,
    tuned_arms,
    why_unknown,
    wrong_winner_rate,
)
from evaluation.intervals import Interval
from evaluation.outputs import markdown_table
from evaluation.plots import COLORS, GRID, STYLE, as_svg, label_ends, line_style
from evaluation.records import DECODINGS
from evaluation.study import (
    DEFAULTS,
    Cell,
    Run,
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

CLAIM_COLUMNS = ("claim", "verdict", "measured", "supported if; refuted if", "seeds")
SUMMARY_COLUMNS = ("trained", "parameters", "learning rate", "seeds", "R")
SUMMARY_COLUMNS += ("never end or blank, English prompts: greedy / T=.85",)
CELL_COLUMNS = ("trained", "parameters", "rate", "seeds", "NLL", "R", "forgets", "tokens/s")
# Rates of answers, greedy / as the reproduced study sampled, in cells that were probed.
RATES = {"runaway": "never stops", "loop": "loops", "blank": "blank"}
RATES |= {"check_strict": "check passed"}
RATE_COLUMNS = ("trained", "mean validation NLL by rate", "best rate", "seeds")
# What a rung of a ladder is above another, by how it is compared.
CHANGE_COLUMNS = {"steps": "adds to R", "without": "R above the first"}
UPDATE_COLUMNS = ("matrices", "of the update's squared norm", "of the parameters", "r90 / rank")
UPDATE_COLUMNS += ("effective rank / rank", "intruders (of random directions)")
FEW_COLUMNS = ("better, by R", "worse", "the worse is named", "a tie", "seeds", "prompts")
R_AXIS = "recovery R: 0 the base, 1 full fine-tuning; bars: 95% intervals"
NO_STUDY = "The study was not run yet: `python evaluation/run_study.py`."
DECODING = "t0.85p0.85"  # how the reproduced study judged its eight prompts
FAULTS = ("runaway", "loop", "blank")  # of an answer, which the study saw by eye


DETAILS = "evaluation/results/study/README.md"


def verdicts_by_size(study: dict, results: dict[str, dict]) -> dict[str, list[Judged]]:
    """The claims of each size of which some run has a result, judged."""
    found = {result["size"] for result in results.values()}
    return {size: judge_claims(study, size, results) for size in study["sizes"] if size in found}


def describe_cells(study: dict, results: dict[str, dict]) -> dict[Cell, Row | None]:
    """What was measured of every cell of an experiment, a sweep's at its best rate.

    Each is bootstrapped once, though tables and figures of several experiments tell of it.
    """
    cells = {
        cell
        for experiment in study["experiments"]
        for size in experiment["sizes"]
        for cell in tuned_cells(experiment, size)
    }
    return {cell: describe_cell(study, cell, results) for cell in cells}


def summary_block(
    study: dict,
    results: dict[str, dict],
    rows: dict[Cell, Row | None],
    languages: dict[str, np.ndarray],
) -> list[str]:
    """Markdown lines of the README's first table: what little is to be remembered."""
    lines = []
    for size in study["sizes"]:
        for experiment in study["experiments"]:
            if experiment["summary"] and size in experiment["sizes"]:
                lines += summary_table(study, experiment, size, results, rows, languages)
    return lines[:-1]


def summary_table(
    study: dict,
    experiment: dict,
    size: str,
    results: dict[str, dict],
    rows: dict[Cell, Row | None],
    languages: dict[str, np.ndarray],
) -> list[str]:
    """The base and the measured cells of a summary, with their answers to English prompts."""
    told = []
    for cell in tuned_cells(experiment, size):
        if (row := rows[cell]) and row.recovery:
            measured = row.measured
            name = ", ".join([study["arms"][cell.arm]["title"], *variant_of(cell)])
            probes = list(probes_of(study, cell, results).values())
            seeds = f"{len(measured.seeds)}{asked(len(probes), measured)}"
            facts = [costs(measured.records)[0], measured.cell.rate, seeds]
            told.append([name, *facts, in_words(row.recovery), bad_rates(probes, languages)])
    if not told:
        return []
    base = Run(size, experiment["base"], experiment["base_seed"])
    probes = [result["probe"] for result in [results.get(base.id, {})] if "probe" in result]
    start = ["nothing: the base", "-", "-", "-", "0", bad_rates(probes, languages)]
    steps = f"*At `{size}`. {experiment['question']}*"
    return [steps, "", *markdown_table(SUMMARY_COLUMNS, [start, *told]), ""]


def bad_rates(probes: list[dict], languages: dict[str, np.ndarray]) -> str:
    """The share of answers to English prompts that never end or are blank, by decoding."""
    if not probes:
        return "-"
    english = languages["English"]
    shares = [
        np.mean([marked(probe["outcomes"][decoding])[english] for probe in probes])
        for decoding in probes[0]["outcomes"]
    ]
    return " / ".join(f"{100 * share:.0f}%" for share in shares)


def study_block(
    study: dict, results: dict[str, dict], verdicts: dict[str, list[Judged]], drawn: Iterable[str]
) -> list[str]:
    """Markdown lines for the README: for each size what was run, the verdicts, the figures."""
    lines = []
    for size, claims in verdicts.items():
        lines += size_lines(study, size, results, claims, drawn)
    return lines[:-1]


def study_details(
    study: dict,
    results: dict[str, dict],
    rows: dict[Cell, Row | None],
    languages: dict[str, np.ndarray],
    verdicts: dict[str, list[Judged]],
) -> list[str]:
    """Markdown lines of `DETAILS`: for each size the rules, the cells, the tuned rates.

    Args:
        rows: what :func:`describe_cells` found.
        languages: which prompts are in each.
    """
    lines = [
        "# The study's results",
        "",
        "Made by `python evaluation/report.py` from the JSON files beside this one, one a run "
        "([`study.py`](../../study.py) says what they hold), and from the rules in "
        "[`study.toml`](../../study.toml). What they come to is told in the "
        "[README](../../../README.md#what-we-found-so-far). R(a) is the recovery of a cell, in "
        "brackets its 95% interval over seeds and conversations; bad(a) / bad(b) compares how many "
        "answers, under all decodings, never end (no end token within the limit) or are blank. "
        "`forgets`: nats a token of held-out pretraining text above the base's. `tokens/s`: of "
        "runs that shared a machine, most with one thread, no benchmark. Rates are of all prompts, "
        f"{languages['Chinese'].sum()} of {len(languages['Chinese'])} in Chinese, greedy / T=.85.",
        "",
        f"{count_dirty(results)} of {len(results)} runs say `dirty`: their working tree held what "
        "was not committed, for the most part the results of runs before them.",
        "",
    ]
    for size, claims in verdicts.items():
        lines += [f"## At `{size}`", "", *rule_lines(claims)]
        for experiment in study["experiments"]:
            lines += experiment_lines(study, experiment, size, results, rows, languages)
        lines += rate_lines(study, size, results)
    return lines[:-1]


def count_dirty(results: dict[str, dict]) -> int:
    """How many runs were made from a working tree with changes."""
    return sum(result["run"]["git"].get("dirty", False) for result in results.values())


def size_lines(
    study: dict, size: str, results: dict[str, dict], claims: list[Judged], drawn: Iterable[str]
) -> list[str]:
    """The README's lines of one size."""
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
    lines += claim_lines(claims)
    lines += [f"Every rule, cell, tuned rate, and their commands: [`{DETAILS}`]({DETAILS}).", ""]
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
                f"{base['text_nll']:.3f} nats a token of held-out text, {told_starts(base)} a "
                f"response token (the test half, from which R counts){told_answers(base)}."
            )
    return [*lines, ""] if lines else []


def told_starts(base: dict) -> str:
    """A base's NLL on the test conversations of each data set."""
    return ", ".join(
        f"{sum(found['nats'][1::2]) / sum(found['tokens'][1::2]):.3f} on {data}"
        for data, found in base["held_out"].items()
    )


def told_answers(base: dict) -> str:
    """How a base answers, if it was asked."""
    if "probe" not in base:
        return ""
    rates = [f"{name} {mean_rates([base['probe']['rates']], key)}" for key, name in RATES.items()]
    return f"; answers of {base['probe']['prompts']['count']} prompts: {', '.join(rates)}"


def claim_lines(claims: list[Judged]) -> list[str]:
    """The verdicts, and which claims have none yet."""
    told = [judged for judged in claims if judged.verdict != NOT_RUN]
    rows = [
        (
            f"{judged.claim['name']}: {judged.claim['text']}",
            f"**{judged.verdict}**",
            "; ".join(judged.evidence) or "-",
            "; ".join(" and ".join(map(bound_of, judged.claim[side])) for side in SIDES),
            str(judged.seeds),
        )
        for judged in told
    ]
    lines = [*markdown_table(CLAIM_COLUMNS, rows), ""] if rows else []
    not_run = [judged.claim["name"] for judged in claims if judged.verdict == NOT_RUN]
    return lines + ([f"Not run yet: {'; '.join(not_run)}.", ""] if not_run else [])


def rule_lines(claims: list[Judged]) -> list[str]:
    """The rule of each claim that was judged, and what its verdict leaves open."""
    lines = [
        f"- {judged.claim['name']}: {rule_of(judged.claim)}. It does not show "
        f"{judged.claim['not_shown']}."
        for judged in claims
        if judged.verdict != NOT_RUN
    ]
    return [*lines, ""] if lines else []


def experiment_lines(
    study: dict,
    experiment: dict,
    size: str,
    results: dict[str, dict],
    rows: dict[Cell, Row | None],
    languages: dict[str, np.ndarray],
) -> list[str]:
    """The measured cells of an experiment, under its question; of a ladder, once it is whole."""
    if size not in experiment["sizes"] or experiment["summary"]:
        return []
    if experiment["few_prompts"]:
        pairs = few_prompt_rates(study, size, results, rows, languages["English"])
        columns, lines = FEW_COLUMNS, few_rows(pairs)
    else:
        columns, lines = cell_table(study, experiment, size, results, rows)
    if not lines:
        return []
    title = f"{experiment['id']}. {experiment['question']}"
    again = f"`python evaluation/run_study.py --size {size} --experiment '{experiment['id']}'`"
    table = [f"*{title}* {again}", "", *markdown_table(columns, lines), ""]
    return table + update_lines(study, experiment, size, results)


def cell_table(
    study: dict,
    experiment: dict,
    size: str,
    results: dict[str, dict],
    rows: dict[Cell, Row | None],
) -> tuple[list[str], list[list[str]]]:
    """Columns and rows of an experiment's cells; no rows of a ladder that is not whole."""
    cells, ladder = tuned_cells(experiment, size), experiment["ladder"]
    columns = [*CELL_COLUMNS, *(RATES.values() if experiment["probe"] else ())]
    if ladder:
        columns.append(CHANGE_COLUMNS[ladder])
        if not is_whole(study, experiment, cells, results):
            return columns, []
    names = experiment["rungs"] if ladder else [""] * len(cells)
    lines = []
    for place, (name, cell) in enumerate(zip(names, cells, strict=True)):
        title = study["arms"][cell.arm]["title"]
        line = [f"{name}: {short_name(cell)}" if name else f"{short_name(cell)}: {title}"]
        if found := rows[cell]:
            line += cell_row(found, experiment["probe"])
            if ladder:
                line.append(told_change(study, cells, place, ladder, results))
        elif diverged := count_diverged(study, cell, results):
            line += ["-", cell.rate, f"0 ({diverged} diverged)"]
            line += ["-"] * (len(columns) - len(line))
        else:
            continue
        lines.append(line)
    return columns, lines


def told_change(
    study: dict, cells: list[Cell], place: int, ladder: str, results: dict[str, dict]
) -> str:
    """What R of a rung is above the one before, or of "without", above the first; paired."""
    if place == 0:
        return "-"
    pair = [cells[place], cells[place - 1 if ladder == "steps" else 0]]
    if why_unknown(study, pair, results):
        return "-"
    interval = contrast(study, pair, results).interval
    return f"{interval.estimate:+.2f} [{interval.low:+.2f}, {interval.high:+.2f}]"


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
        found = [
            matrix for update in updates for matrix in update["matrices"] if matrix["kind"] == kind
        ]
        rows.append([kind, *cells, *told_spectra(found)])
    return [
        f"The update itself, of {len(updates)} seeds: where its squared norm lies, the share of a "
        "matrix's rank that holds 90% of it, and the intruder dimensions of a matrix, which the "
        "base's singular vectors hardly hold "
        "([`update_analysis.py`](../../update_analysis.py) defines all).",
        "",
        *markdown_table(UPDATE_COLUMNS, rows),
        "",
    ]


def told_spectra(matrices: list[dict]) -> list[str]:
    """From the smallest to the largest r90 and effective rank of some matrices; mean intruders."""
    if not matrices:
        return ["-", "-", "-"]
    told = []
    for fact in ("r90", "effective_rank"):
        shares = [matrix[fact] / min(matrix["shape"]) for matrix in matrices]
        told.append(f"{min(shares):.2f} to {max(shares):.2f}")
    known = [matrix["intruders"] for matrix in matrices if "intruders" in matrix]
    if not known:
        return [*told, "-"]
    count, chance = (fmean(one[name] for one in known) for name in ("count", "random"))
    return [*told, f"{count:.1f} ({chance:.1f}) of {known[0]['k']}"]


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
    if probed:
        seeds += asked(len(measured.rates), measured)
    forgets = "-" if row.forgetting is None else f"{row.forgetting:+.2f}"
    parameters, speed = costs(measured.records)
    cells = [parameters, measured.cell.rate, seeds, f"{measured.nll:.3f}", in_words(row.recovery)]
    rates = [mean_rates(measured.rates, key) for key in RATES] if probed else []
    return [*cells, forgets, speed, *rates]


def asked(count: int, measured: Measured) -> str:
    """How many runs were asked prompts, where that is not all that R is of."""
    return f" ({count} asked)" if count not in (0, len(measured.seeds)) else ""


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
        if not sweep.is_whole:
            inside = ", not with every seed yet"
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


def study_figures(
    study: dict,
    results: dict[str, dict],
    rows: dict[Cell, Row | None],
    languages: dict[str, np.ndarray],
) -> dict[str, str]:
    """SVG text of every figure that there are results for, by its file's name.

    Args:
        rows: what :func:`describe_cells` found.
        languages: which prompts are in each; a panel of answers for each.
    """
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
                if one["ladder"] and is_whole(study, one, mine, results)
            ]
            if ladders:
                drawn[f"study_{size}_ladder.svg"] = draw_ladders(ladders)
            if probes := probes_by_cell(study, size, results):
                drawn[f"study_{size}_answers.svg"] = draw_answers(probes, languages)
            pairs = few_prompt_rates(study, size, results, rows, languages["English"])
            if len(pairs) > 1:  # one pair is a line of the table
                drawn[f"study_{size}_prompts.svg"] = draw_few_prompts(pairs)
        return {name: as_svg(figure) for name, figure in drawn.items()}


def is_whole(study: dict, experiment: dict, cells: list[Cell], results: dict[str, dict]) -> bool:
    """Whether every rung has its seeds, those counted that diverged, of full fine-tuning too."""
    seeds = len(experiment["seeds"])
    for cell in cells:
        arm, full = measure_cell(study, cell, results), full_of(study, cell, results)
        done = 0 if why_unknown(study, [cell], results) else len(common_seeds([arm], full))
        diverged = count_diverged(study, cell, results) + (full.failed if full else 0)
        if done + diverged < seeds:
            return False
    return True


def title_of(name: str) -> str:
    """What a figure shows, for those who cannot see it."""
    return {
        "rates": "Validation NLL by learning rate and what is trained",
        "recovery": "Recovery of every arm that was run, with 95% intervals",
        "answers": "Share of answers that never end or are blank, of every arm that was asked",
        "ladder": "Recovery after each change from MiniMind's LoRA to full fine-tuning, or without",
        "prompts": "How often eight prompts, judged once, name the worse of two arms",
    }[name.rsplit("_", 1)[1].removesuffix(".svg")]


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
            points = [
                (float(rate), loss) for rate, loss in sweep.losses.items() if np.isfinite(loss)
            ]
            if not points:
                continue  # all diverged, which the table says
            axes.plot(*np.transpose(points), **line_style(index))
            every = max(sweep.seeds.values())
            for whole, face in ((True, None), (False, "white")):
                some = [
                    (float(rate), loss)
                    for rate, loss in sweep.losses.items()
                    if np.isfinite(loss) and (sweep.seeds[rate] == every) == whole
                ]
                if some:
                    style = line_style(index) | {"linestyle": "", "markerfacecolor": face}
                    axes.plot(*np.transpose(some), marker="o", markersize=3.5, **style)
            ends.append((*points[-1], arm))
        axes.set_xscale("log")
        axes.grid(axis="y", **GRID)
        label_ends(axes, ends)
        axes.set_title(title)
        axes.set_ylabel("validation NLL, nats a token")
    all_axes[-1].set_xlabel("peak learning rate; hollow: one seed where others have all")
    return figure


def rates_panel(arm: dict) -> str:
    """The panel of an arm, so that few lines share one."""
    if arm["stage"] == "full_sft":
        return "full fine-tuning, of all or of a part"
    if "modules_to_save" in arm["flags"]:
        return "LoRA with embedding and norms"
    return "LoRA, vocabulary frozen or but two rows of it"


def recovery_by_cell(study: dict, measured: list[Row | None]) -> list[tuple[str, Interval]]:
    """Name and R of every whole run that was measured, from the lowest R to the highest."""
    rows = [row for row in measured if row and row.recovery]
    found = {
        f"{full_name(study, row.measured.cell)}, {row.measured.cell.rate} "
        f"({in_seeds(len(row.measured.seeds))})": row.recovery
        for row in rows
        if not row.measured.cell.part
    }
    return sorted(found.items(), key=lambda item: item[1].estimate)


def in_seeds(count: int) -> str:
    """`1 seed`, `5 seeds`."""
    return "1 seed" if count == 1 else f"{count} seeds"


def short_name(cell: Cell) -> str:
    """A cell without what is the same for most."""
    usual = (cell.base, cell.base_seed) == (DEFAULTS["base"], DEFAULTS["base_seed"])
    base = "" if usual else f"from {cell.base}{cell.base_seed}"
    return ", ".join(filter(None, (cell.arm, *variant_of(cell), cell.part, base)))


def variant_of(cell: Cell) -> list[str]:
    """A cell's variant, if it is not what most have."""
    return [] if cell.variant == DEFAULTS["variant"] else [cell.variant]


def full_name(study: dict, cell: Cell) -> str:
    """A cell as figures name it, by its arm's title."""
    return short_name(replace(cell, arm=study["arms"][cell.arm]["title"]))


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
            else:
                axes.annotate("every run diverged", (0, place), va="center", fontsize=7)
        for edge in (0, 1):
            axes.axvline(edge, **GRID)
        names = zip(experiment["rungs"], rows, strict=True)
        axes.set_yticks(range(len(rows)), [rung_name(name, row) for name, row in names])
        axes.set_ylim(len(rows) - 0.5, -0.5)
        axes.set_title(experiment["question"])
    panels[-1, 0].set_xlabel(R_AXIS)
    return figure


def rung_name(name: str, row: Row | None) -> str:
    """A rung's name, with the runs that diverged."""
    failed = row.measured.failed if row else 0
    return f"{name} ({failed} diverged)" if failed else name


def draw_interval(axes: matplotlib.axes.Axes, place: int, interval: Interval) -> None:
    """A dot with its interval, and its value in figures."""
    below, above = interval.estimate - interval.low, interval.high - interval.estimate
    spread = np.maximum([[below], [above]], 0)
    axes.errorbar([interval.estimate], [place], xerr=spread, fmt="o", color=COLORS[0], markersize=4)
    where = {"xytext": (0, 4), "textcoords": "offset points", "ha": "center", "fontsize": 7}
    axes.annotate(f"{interval.estimate:.2f}", (interval.estimate, place), **where)


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
        for index, decoding in enumerate(DECODINGS):
            draw_shares(axes, index, [shares[language][name][decoding] for name in names])
        axes.set_xlim(-4, 104)
        axes.set_xticks([0, 50, 100], ["0%", "50%", "100%"])
        axes.grid(axis="x", **GRID)
        axes.set_title(f"{chosen.sum()} {language} prompts")
    panels[0].set_yticks(range(len(names)), names)
    panels[0].set_ylim(len(names) - 0.5, -0.5)
    figure.supxlabel("answers that never end or are blank; bars: 95% intervals", fontsize=9)
    marks, labels = panels[0].get_legend_handles_labels()
    figure.legend(marks, labels, loc="outside upper right", ncols=2, frameon=False)
    return figure


def draw_shares(axes: matplotlib.axes.Axes, index: int, shares: list[Interval]) -> None:
    """The shares of one decoding, the `index`-th of `DECODINGS`, a row for each."""
    below = [100 * (one.estimate - one.low) for one in shares]
    above = [100 * (one.high - one.estimate) for one in shares]
    axes.errorbar(
        [100 * one.estimate for one in shares],
        [row + 0.3 * index - 0.15 for row in range(len(shares))],
        xerr=np.maximum([below, above], 0),
        fmt="Do"[index],
        color=COLORS[index],
        markersize=4,
        label=list(DECODINGS.values())[index],
    )


@dataclass(frozen=True)
class Pair:
    """Two arms that few prompts are to tell apart."""

    better: str  # by R
    worse: str
    wrong: float  # how often the worse is named
    tied: float
    seeds: int  # fewest of both
    prompts: int


def few_prompt_rates(
    study: dict,
    size: str,
    results: dict[str, dict],
    rows: dict[Cell, Row | None],
    chosen: np.ndarray,
) -> list[Pair]:
    """How often few prompts name the worse of two arms, for every pair that R tells apart.

    Args:
        chosen: (prompts,) True for those that they are drawn from.
    """
    found: dict[Cell, np.ndarray] = {}
    for experiment in study["experiments"]:
        if experiment["few_prompts"] and size in experiment["sizes"]:
            for cell in tuned_cells(experiment, size):
                fine = fine_answers(probes_of(study, cell, results).values(), chosen)
                if len(fine) and rows[cell] and rows[cell].recovery:
                    found[cell] = fine
    pairs = []
    for one, other in combinations(found, 2):
        interval = contrast(study, [one, other], results).interval
        if interval.low <= 0 <= interval.high:
            continue  # R does not say which is the better one
        better, worse = (one, other) if interval.low > 0 else (other, one)
        first, second = found[better], found[worse]
        wrong, tied = wrong_winner_rate(first, second)
        names = (short_name(known_cell(study, cell, results)) for cell in (better, worse))
        seeds = min(len(first), len(second))
        pairs.append(Pair(*names, wrong, tied, seeds, first.shape[1]))
    return pairs


def fine_answers(probes: Iterable[dict], chosen: np.ndarray) -> np.ndarray:
    """(seeds, prompts): 1 where an answer ends, does not loop and is not blank, else 0."""
    return np.array([1 - marked(probe["outcomes"][DECODING], FAULTS)[chosen] for probe in probes])


def few_rows(pairs: list[Pair]) -> list[list[str]]:
    """The rows of `FEW_COLUMNS`."""
    return [
        [
            pair.better,
            pair.worse,
            f"{100 * pair.wrong:.0f}%",
            f"{100 * pair.tied:.0f}%",
            str(pair.seeds),
            str(pair.prompts),
        ]
        for pair in pairs
    ]


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
