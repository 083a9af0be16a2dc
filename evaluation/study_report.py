"""The study's part of the README and its tables, from `results/study/` and `study.toml`.

The README gets a summary (`summary_block`), the bases and the figures (`study_block`); every
verdict with its rule, every cell and rate stands in `results/study/README.md` (`study_details`).
"""

from collections.abc import Iterable
from statistics import fmean

import numpy as np

from evaluation.findings import (
    NOT_RUN,
    SIDES,
    Evidence,
    Judged,
    Pair,
    bound_of,
    cited,
    contrast,
    few_prompt_rates,
    forgetting_by_arm,
    ladder_is_whole,
    marked,
    probes_of,
    stated,
    tuned_arms,
    why_unknown,
)
from evaluation.intervals import Interval
from evaluation.outputs import markdown_table
from evaluation.records import RATES
from evaluation.recovery import (
    Measured,
    Row,
    base_of,
    count_diverged,
    describe_cell,
    full_of,
    gains_enough,
)
from evaluation.study import (
    FULL,
    TEST,
    Cell,
    Run,
    base_id,
    base_name,
    is_interior,
    lineage,
    planned_bases,
    planned_runs,
    rates_of,
    runs_of,
    short_name,
    sweep_of,
    titled,
    tuned_cells,
    tuning_cell,
    tuning_run,
    validation_nll,
)

CLAIM_COLUMNS = ("claim", "verdict", "measured", "without end tokens")
CLAIM_COLUMNS += ("supported if; refuted if", "seeds", "it does not show")
SUMMARY_COLUMNS = ("trained", "parameters", "learning rate", "seeds", "R", "R without end tokens")
SUMMARY_COLUMNS += ("never end or blank, English prompts: greedy / T=.85",)
CELL_COLUMNS = ("trained", "parameters", "rate", "steps", "seeds", "NLL", "R")
CELL_COLUMNS += ("R without end tokens",)
CELL_COLUMNS += ("forgets", "TFLOP", "peak GB")
FORGETTING_COLUMNS = ("trained", "rate", "seeds", "NLL", "forgets")
# Rates of answers, greedy / as the reproduced study sampled, in cells that were probed.
ANSWER_RATES = {key: RATES[key] for key in ("runaway", "loop", "blank", "check_strict")}
RATE_COLUMNS = ("trained", "mean validation NLL by rate", "best rate", "seeds")
# What a rung of a ladder is above another, by how it is compared.
CHANGE_COLUMNS = {"steps": "adds to R", "without": "R above the first"}
UPDATE_COLUMNS = ("matrices", "of the update's squared norm", "of the parameters", "r90 / rank")
UPDATE_COLUMNS += ("effective rank / rank", "intruders (of random directions)")
FEW_COLUMNS = ("better, by R", "worse", "the worse is named", "a tie", "seeds", "prompts")
NO_STUDY = "The study was not run yet: `python evaluation/run_study.py`."


DETAILS = "evaluation/results/study/README.md"
FIGURES = "evaluation/figures/"
TITLES = {  # of figures, by how their files' names end
    "_rates.svg": "Validation NLL by learning rate and what is trained",
    "_recovery.svg": "Recovery of every arm that was run, with 95% intervals",
    "_ladder.svg": "Recovery after each change on the way to full fine-tuning, or without it",
    "_forgetting.svg": "What is forgotten against what is learned, at every rate",
    "_answers.svg": "Share of answers that never end or are blank, of every arm that was asked",
    "_prompts.svg": "How often eight prompts, judged once, name the worse of two arms",
    "_sizes.svg": "Recovery of the same arms at each size",
}
IN_SUMMARY = ("_ladder.svg", "_sizes.svg")  # beside the README's first tables


def summary_block(evidence: Evidence, drawn: Iterable[str]) -> list[str]:
    """Markdown lines of what is to be remembered: the README's first tables and figures."""
    lines = []
    for experiment in evidence.study["experiments"]:
        for size in experiment["sizes"] if experiment["summary"] else ():
            lines += summary_table(evidence, experiment, size)
    lines += figure_lines(name for name in drawn if name.endswith(IN_SUMMARY))
    return lines[:-1]


def figure_lines(names: Iterable[str]) -> list[str]:
    """The README's figures, each with what it shows, for those who cannot see it."""
    lines = []
    for name in names:
        title = next(title for end, title in TITLES.items() if name.endswith(end))
        lines += [f"![{title}]({FIGURES}{name})", ""]
    return lines


def summary_table(evidence: Evidence, experiment: dict, size: str) -> list[str]:
    """The base and the measured cells of a summary, with their answers to English prompts."""
    study, results, english = evidence.study, evidence.results, evidence.languages["English"]
    told = []
    for cell in tuned_cells(experiment, size):
        if (row := evidence.rows[cell]) and row.recovery:
            measured = row.measured
            probes = list(probes_of(study, cell, results).values())
            seeds = f"{len(measured.seeds)}{asked(len(probes), measured)}"
            facts = [costs(measured.records)[0], measured.cell.rate, seeds]
            recoveries = [in_words(row.recovery), in_words(row.answer_recovery)]
            told.append([titled(study, cell), *facts, *recoveries, bad_rates(probes, english)])
    if not told:
        return []
    start = base_id(size, base_name(experiment, size), experiment["base_seed"])
    base = results.get(start, {})
    probes = [base["probe"]] if "probe" in base else []
    untrained = ["nothing: the base", "-", "-", "-", "0", "0", bad_rates(probes, english)]
    title = f"*At `{size}`. {experiment['question']}*"
    return [title, "", *markdown_table(SUMMARY_COLUMNS, [untrained, *told]), ""]


def bad_rates(probes: list[dict], chosen: np.ndarray) -> str:
    """The share of answers to chosen prompts that never end or are blank, by decoding."""
    if not probes:
        return "-"
    shares = [
        np.mean([marked(probe["outcomes"][decoding])[chosen] for probe in probes])
        for decoding in probes[0]["outcomes"]
    ]
    return " / ".join(f"{100 * share:.0f}%" for share in shares)


def study_block(evidence: Evidence, drawn: Iterable[str]) -> list[str]:
    """Markdown lines for the README: for each size what was run, from what, and the figures."""
    lines = []
    for size in evidence.verdicts:
        lines += size_lines(evidence.study, size, evidence.results, drawn)
    return lines[:-1]


def study_details(evidence: Evidence) -> list[str]:
    """Markdown lines of `DETAILS`: for each size the verdicts, the cells, the tuned rates."""
    study, results, chinese = evidence.study, evidence.results, evidence.languages["Chinese"]
    lines = [
        "# The study's results",
        "",
        "Made by `python evaluation/report.py` from the JSON files beside this one, one a run "
        "([`study.py`](../../study.py) says what they hold), and from the rules in "
        "[`study.toml`](../../study.toml). What they come to is told in the "
        "[README](../../../README.md#the-findings-one-by-one). R(a) is the recovery of a cell, in "
        "brackets its 95% interval over seeds and conversations; bad(a) / bad(b) compares how many "
        "answers, under all decodings, never end (no end token within the limit) or are blank. "
        "`R without end tokens` counts all response tokens but those that end a message. "
        "`forgets`: nats a token of held-out pretraining text above the base's, from the lowest "
        "to the highest seed where there are several. `TFLOP` and `peak GB`: of one training, by "
        "the parameters and tokens, and the most memory that its process held, libraries and data "
        f"with it. Rates are of all prompts, {chinese.sum()} of {len(chinese)} in Chinese, "
        "greedy / T=.85.",
        "",
        f"{count_dirty(results)} of {len(results)} runs say `dirty`: their working tree held what "
        "was not committed.",
        "",
    ]
    for size, claims in evidence.verdicts.items():
        lines += [f"## At `{size}`", "", *claim_lines(claims)]
        for experiment in study["experiments"]:
            lines += experiment_lines(evidence, experiment, size)
        lines += rate_lines(study, size, results)
        lines += forgetting_lines(evidence, size)
    return lines[:-1]


def count_dirty(results: dict[str, dict]) -> int:
    """How many runs were made from a working tree with changes."""
    return sum(result["run"]["git"].get("dirty", False) for result in results.values())


def size_lines(study: dict, size: str, results: dict[str, dict], drawn: Iterable[str]) -> list[str]:
    """The README's lines of one size."""
    runs, waiting = planned_runs(study, size, results)
    done = [result for result in results.values() if result["size"] == size]
    known = {run.id for run in runs} | {result["id"] for result in done}
    broken = sum(result["status"] != "completed" for result in done)
    hours = sum(result["seconds"] for result in done) / 3600
    lines = [
        f"**At `{size}`**: {len(done)} of {len(known)} runs have a result"
        + (f" ({broken} diverged)" if broken else "")
        + (f"; cells that add more once a rate is known: {len(waiting)}" if waiting else "")
        + f". They took {hours:.1f} hours of runs.",
        "",
    ]
    lines += base_lines(study, size, results)
    where = f"[`{DETAILS}`]({DETAILS}#at-{size})"
    lines += [f"Every verdict with its rule, every cell and tuned rate, and commands: {where}.", ""]
    mine = [name for name in drawn if name.startswith(f"study_{size}_")]
    return lines + figure_lines(name for name in mine if not name.endswith(IN_SUMMARY))


def base_lines(study: dict, size: str, results: dict[str, dict]) -> list[str]:
    """What the arms start from: a line for every base."""
    lines = []
    for run in planned_bases(study, size):
        base = results.get(run.id, {})
        if "text_nll" in base:
            made = base["run"]
            lines.append(
                f"- `{run.id}`: {made['parameters']:,} parameters, "
                f"{told_tokens(study, run, results)} in {made['settings']['dtype']}; "
                f"{base['text_nll']:.3f} nats a token of held-out text, {told_starts(base)} a "
                f"response token (the test half, from which R counts)"
                f"{told_ends(study, run, results)}{told_answers(base)}."
            )
    return [*lines, ""] if lines else []


def told_tokens(study: dict, run: Run, results: dict[str, dict]) -> str:
    """How much text a base was pretrained on, with what it continues."""
    line = lineage(study, run.size, run.base, run.seed)
    if missing := [older.id for older in line if older.id not in results]:
        return f"pretrained from `{missing[-1]}`, which has no result here,"
    tokens = sum(results[older.id]["run"]["tokens"] for older in line)
    each = tokens / results[run.id]["run"]["parameters"]
    return f"pretrained on {tokens / 1e6:.1f}M tokens ({each:.1f} each)"


def told_starts(base: dict) -> str:
    """A base's NLL on the test conversations of each data set."""
    return ", ".join(
        f"{sum(found['nats'][TEST]) / sum(found['tokens'][TEST]):.3f} on {data}"
        for data, found in base["held_out"].items()
    )


def told_ends(study: dict, run: Run, results: dict[str, dict]) -> str:
    """How much of what full fine-tuning gains from a base is of end tokens."""
    cell = Cell(run.size, run.base, run.seed, FULL, "tuned", study["tuning"]["variant"])
    base, full = base_of(study, cell, results), full_of(study, cell, results)
    ends_are_known = full and base.end_nats is not None and full.end_nats is not None
    if not (ends_are_known and gains_enough(base.nats, full)):
        return ""
    gain = base.nats.sum() - full.nats.mean(axis=0).sum()
    of_ends = base.end_nats.sum() - full.end_nats.mean(axis=0).sum()
    return f"; {100 * of_ends / gain:.0f}% of what full fine-tuning gains is of end tokens"


def told_answers(base: dict) -> str:
    """How a base answers, if it was asked."""
    if "probe" not in base:
        return ""
    rates = [
        f"{name} {mean_rates([base['probe']['rates']], key)}" for key, name in ANSWER_RATES.items()
    ]
    return f"; answers of {base['probe']['prompts']['count']} prompts: {', '.join(rates)}"


def claim_lines(claims: list[Judged]) -> list[str]:
    """The verdicts, and which claims have none yet."""
    told = [judged for judged in claims if judged.verdict != NOT_RUN]
    rows = [claim_row(judged) for judged in told]
    lines = [*markdown_table(CLAIM_COLUMNS, rows), ""] if rows else []
    not_run = [judged.claim["name"] for judged in claims if judged.verdict == NOT_RUN]
    return lines + ([f"Not run yet: {'; '.join(not_run)}.", ""] if not_run else [])


def claim_row(judged: Judged) -> list[str]:
    """One row of `CLAIM_COLUMNS`."""
    claim = judged.claim
    measured = [f"{formula} = {stated(found)}" for formula, found in judged.contrasts.items()]
    return [
        f"{claim['name']}: {claim['text']}",
        f"**{judged.verdict}**",
        "; ".join(measured) or "-",
        "; ".join(judged.without_ends) or "-",
        "; ".join(" and ".join(map(bound_of, claim[side])) for side in SIDES),
        str(judged.seeds),
        claim["not_shown"],
    ]


def citations(evidence: Evidence) -> dict[str, str]:
    """What the README's sentences tell of each claim: of the first size that has run it.

    A claim that is run at a second one stands in the details, and is to be told in words.
    """
    experiments = evidence.study["experiments"]
    told = {claim["name"]: NOT_RUN for one in experiments for claim in one["claims"]}
    for claims in evidence.verdicts.values():
        for judged in claims:
            if told[judged.claim["name"]] == NOT_RUN:
                told[judged.claim["name"]] = cited(judged)
    return told


def experiment_lines(evidence: Evidence, experiment: dict, size: str) -> list[str]:
    """The measured cells of an experiment, under its question; of a ladder, once it is whole."""
    if size not in experiment["sizes"] or experiment["summary"]:
        return []
    if experiment["few_prompts"]:
        columns, lines = FEW_COLUMNS, few_rows(few_prompt_rates(evidence, size))
    else:
        columns, lines = cell_table(evidence, experiment, size)
    if not lines:
        return []
    title = f"{experiment['id']}. {experiment['question']}"
    again = f"`python evaluation/run_study.py --size {size} --experiment '{experiment['id']}'`"
    table = [f"*{title}* {again}", "", *markdown_table(columns, lines), ""]
    return table + update_lines(evidence.study, experiment, size, evidence.results)


def cell_table(
    evidence: Evidence, experiment: dict, size: str
) -> tuple[list[str], list[list[str]]]:
    """Columns and rows of an experiment's cells; no rows of a ladder that is not whole."""
    study, results = evidence.study, evidence.results
    cells, ladder = tuned_cells(experiment, size), experiment["ladder"]
    columns = [*CELL_COLUMNS, *(ANSWER_RATES.values() if experiment["probe"] else ())]
    if ladder:
        columns.append(CHANGE_COLUMNS[ladder])
        if not ladder_is_whole(study, experiment, cells, results):
            return columns, []
    names = experiment["rungs"] if ladder else [""] * len(cells)
    lines = []
    for place, (name, cell) in enumerate(zip(names, cells, strict=True)):
        title = study["arms"][cell.arm]["title"]
        line = [f"{name}: {short_name(cell)}" if name else f"{short_name(cell)}: {title}"]
        if found := evidence.rows[cell]:
            line += cell_row(found, experiment["probe"])
            if ladder:
                line.append(told_change(study, cells, place, ladder, results))
        elif diverged := count_diverged(study, cell, results):
            line += ["-", cell.rate, "-", f"0 ({diverged} diverged)"]
            line += ["-"] * (len(columns) - len(line))
        else:
            continue
        lines.append(line)
    return columns, lines


def told_change(
    study: dict, cells: list[Cell], place: int, ladder: str, results: dict[str, dict]
) -> str:
    """R minus that of the previous rung ("steps") or of the first ("without"), paired."""
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
    known = [matrix["intruders"] for matrix in matrices]
    count, chance = (fmean(one[name] for one in known) for name in ("count", "random"))
    return [*told, f"{count:.1f} ({chance:.1f}) of {known[0]['k']}"]


def cell_row(row: Row, probed: bool) -> list[str]:
    """What `CELL_COLUMNS` and, if it was probed, `ANSWER_RATES` tell of a cell after its name."""
    measured = row.measured
    seeds = told_seeds(len(measured.seeds), measured.failed)
    if probed:
        seeds += asked(len(measured.rates), measured)
    parameters, steps, flops, memory = costs(measured.records)
    cells = [parameters, measured.cell.rate, steps, seeds, f"{measured.nll:.3f}"]
    cells += [in_words(row.recovery), in_words(row.answer_recovery), told_forgetting(row)]
    cells += [flops, memory]
    return cells + ([mean_rates(measured.rates, key) for key in ANSWER_RATES] if probed else [])


def told_seeds(count: int, failed: int) -> str:
    """How many seeds were measured, and how many diverged, if any did."""
    return f"{count} ({failed} diverged)" if failed else str(count)


def asked(count: int, measured: Measured) -> str:
    """`(n asked)` where more or fewer seeds were asked prompts than R is of."""
    return f" ({count} asked)" if count not in (0, len(measured.seeds)) else ""


def told_forgetting(row: Row) -> str:
    """What was forgotten, in the mean, and from the lowest to the highest seed."""
    if row.forgetting is None:
        return "-"
    mean = np.mean(row.measured.text_nll)
    around = [row.forgetting + nll - mean for nll in row.measured.text_nll]
    spread = f" ({min(around):+z.2f} to {max(around):+z.2f})" if len(around) > 1 else ""
    return f"{row.forgetting:+z.2f}{spread}"


def costs(records: list[dict]) -> tuple[str, str, str, str]:
    """Parameters that a run trained, its steps, and means of the seeds: TFLOP, GB of memory."""
    if not records:
        return "-", "-", "-", "-"
    flops, memory = (
        fmean(record[name] for record in records) for name in ("flops", "peak_memory_bytes")
    )
    parameters = records[0]["trainable_parameters"]
    steps = str(records[0]["steps"])
    return f"{parameters:,}", steps, f"{flops / 1e12:.1f}", f"{memory / 1e9:.2f}"


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
    cells, told, seeds = [], [], []
    for rate in rates_of(study, arm, size):
        runs = [tuning_run(study, arm, rate, size, seed) for seed in study["tuning"]["seeds"][size]]
        done = [results[run.id] for run in runs if run.id in results]
        if not done:
            continue
        cells.append(f"{rate}: {fmean(map(validation_nll, done)):.3f}")
        row = describe_cell(study, tuning_cell(study, arm, rate, size), results)
        told.append(f"R = {in_words(row.recovery if row else None)} at {rate}")
        seeds.append(len(done))
    if not cells:
        return []
    return [arm, ", ".join(cells), f"not tuned; {', '.join(told)}", str(min(seeds))]


def forgetting_lines(evidence: Evidence, size: str) -> list[str]:
    """The table of what is forgotten at every rate, so that it can be told at equal likelihood."""
    rows = [
        [arm, one.rate, told_seeds(one.seeds, one.failed), f"{one.nll:.3f}", f"{one.above:+.2f}"]
        for arm, points in forgetting_by_arm(evidence, size).items()
        for one in points
    ]
    if not rows:
        return []
    title = "*What the arms of the summary forget at each rate of their grids, two epochs*"
    return [title, "", *markdown_table(FORGETTING_COLUMNS, rows), ""]


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
