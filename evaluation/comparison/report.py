"""Say what compare.py found: a verdict, a table and figures, as report.md and as one HTML page.

Differences are paired, conversation by conversation, with 95% bootstrap intervals. One seed trained
each method, so the intervals say nothing about other seeds.
"""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

from evaluation.comparison.measure import HELD_OUT
from evaluation.comparison.page import Block, draw_chart, render_html, render_markdown
from evaluation.probe.intervals import paired_bootstrap
from model.cli import escape_control
from model.files import write_text

SHOWN_PROMPTS = 5
BASE_TITLE = "the base, before training"
ACTIVATE = ". .venv/bin/activate\n"


class Gap(NamedTuple):
    """By how much one loss exceeds another on average, with its 95% interval."""

    mean: float
    low: float
    high: float


@dataclass(frozen=True)
class Facts:
    """What a report says about the comparison itself."""

    title: str
    sentences: list[str]  # about data and runs
    key: str  # the measure that chooses and judges: "nll", or "wrong", the share of wrong answers
    is_too_few: bool  # pairs to order methods
    text: str | None  # name of the file that measures forgetting; None: the base's own answers
    failures: dict[str, str]  # why a method was left out


@dataclass(frozen=True)
class Result:
    """What a method reached at its best learning rate."""

    title: str
    color: str
    rate: float
    nll_by_rate: dict[float, float]  # on the half that chooses; infinite where a run diverged
    record: dict  # run.json
    size: int  # bytes of the weights on disk
    measured: dict  # NLL by sequence of "nll" and "text", and "samples"


# ---------------------------------------------------------------- numbers


def format_rate(rate: float) -> str:
    """Write a learning rate as 1.5e-3."""
    mantissa, exponent = f"{rate:.2e}".split("e")
    return f"{float(mantissa):g}e{int(exponent)}"


def format_size(size: float) -> str:
    """Write bytes in megabytes."""
    megabytes = size / 1e6
    return f"{megabytes:.0f}" if megabytes >= 10 else f"{megabytes:.2g}"


def list_losses(measured: dict, key: str) -> tuple[np.ndarray, np.ndarray]:
    """Return a model's losses on each sequence or checked prompt, and how much each one weighs."""
    if key == "wrong":
        outcomes = [sample["outcome"] for sample in measured["samples"]]
        wrong = [outcome != "correct" for outcome in outcomes if outcome is not None]
        return np.array(wrong, dtype=float), np.ones(len(wrong))
    sequences = measured[key]
    nats = np.array(sequences["nats"])
    tokens = np.array(sequences["tokens"])
    if key == "text":  # the end of a base's answer may be that of the token limit
        nats = nats - np.array(sequences["end_nats"])
        tokens = tokens - np.array(sequences["ends"])
    return nats / np.maximum(tokens, 1), tokens.astype(float)


def average_losses(measured: dict, key: str) -> float:
    """Return the mean loss, such as nats per token."""
    losses, weights = list_losses(measured, key)
    return float((losses * weights).sum() / weights.sum())


def subtract_losses(after: dict, before: dict, key: str) -> Gap:
    """Return by how much the losses of one model exceed those of another."""
    losses, weights = list_losses(after, key)
    losses_before, _ = list_losses(before, key)
    differences = (losses - losses_before)[None]  # one seed
    return Gap(*paired_bootstrap(differences, weights[None]))


def tabulate_results(results: dict[str, Result], base: dict) -> pd.DataFrame:
    """Return a frame with a row a method.

    `nll_gap`, and `wrong_gap` where answers are checked, are against the lowest loss, `forgot`
    against the base.
    """
    has_checks = any(sample["outcome"] is not None for sample in base["samples"])
    keys = ["nll", "wrong"] if has_checks else ["nll"]
    rows = []
    for name, result in results.items():
        row = {
            "method": name,
            "title": result.title,
            "color": result.color,
            "rate": result.rate,
            "bytes": result.size,
            "seconds": result.record["train_seconds"],
            "memory": result.record["peak_memory_bytes"],
            "weights": result.record["trainable_parameters"],
            "forgot": subtract_losses(result.measured, base, "text"),
        }
        for key in keys:
            row[key] = average_losses(result.measured, key)
        rows.append(row)
    table = pd.DataFrame(rows).set_index("method")
    for key in keys:
        best = results[table[key].idxmin()]
        table[f"{key}_gap"] = [
            subtract_losses(result.measured, best.measured, key) for result in results.values()
        ]
    return table


# ---------------------------------------------------------------- the verdict


def choose_method(table: pd.DataFrame, key: str, is_too_few: bool) -> tuple[str, str]:
    """Return the method to take, and the one that it is compared with.

    The cheapest is taken (bytes on disk, then seconds) of those that the paired interval does not
    tell from the best; the best itself, if too few pairs judge. It is compared with the best of
    the others.
    """
    ordered = table.sort_values(key, kind="stable")
    is_tied = [gap.low <= 0 for gap in ordered[f"{key}_gap"]]
    cheapest = ordered[is_tied].sort_values(["bytes", "seconds"], kind="stable")
    taken = ordered.index[0] if is_too_few else cheapest.index[0]
    others = ordered.index.drop(taken)
    return taken, others[0] if len(others) else taken


def write_verdict(
    table: pd.DataFrame, facts: Facts, taken: str, rival: str, forgetting: Gap
) -> str:
    """Write the first sentence of a report; `forgetting` is of the taken method minus its rival."""
    first = table.loc[taken]
    second = table.loc[rival]
    place = f"{first.title} at {format_rate(first.rate)}"
    if taken == rival:
        others = "the others were left out" if facts.failures else "no other method was asked for"
        return f"There is nothing to compare {place} with, because {others}."
    if facts.is_too_few:
        few = "Your held-out pairs are too few to order the methods"
        return f"{few}; {place} has the lowest NLL, which may be chance."
    gaps = table[f"{facts.key}_gap"]
    if all(gap.low <= 0 for gap in gaps):
        size = f"{format_size(first.bytes)} MB"
        return f"These do not differ on your data; take the cheapest, {place} ({size})."
    # One of the two is the best of all, so the gap of the other one is between them.
    is_best = first[facts.key] <= second[facts.key]
    parts = [describe_gap(gaps[rival if is_best else taken], facts.key, second.title)]
    size = format_size(first.bytes)
    other_size = format_size(second.bytes)
    if size != other_size:
        parts.append(f"takes {size} MB in place of {other_size}")
    has_text = facts.text is not None
    if forgetting.high < 0:
        parts.append("forgets less" if has_text else "stays nearer to the base")
    elif forgetting.low > 0:
        parts.append("forgets more" if has_text else "moves further from the base")
    *earlier, last = parts
    claim = f"{', '.join(earlier)}, and {last}" if earlier else last
    return f"Take {place}: it is {claim}."


def describe_gap(gap: Gap, key: str, title: str) -> str:
    """Say that a method is as good as the one with this title, or by how much it is better."""
    unit = "points" if key == "wrong" else "nats a token"

    def show(value: float) -> str:
        """Write a difference in its unit."""
        return f"{100 * value:.0f}" if key == "wrong" else f"{value:.2g}"

    if gap.low <= 0:
        bound = max(-gap.low, gap.high)
        return f"as good as {title} within {show(bound)} {unit}"
    interval = f"{show(gap.low)} to {show(gap.high)}"
    return f"{show(gap.mean)} {unit} ({interval}) better than {title}"


# ---------------------------------------------------------------- figures and the table


def draw_rates(axes: Axes, results: dict[str, Result]) -> None:
    """Draw NLL against learning rate: a line a method, its chosen rate large."""
    for result in results.values():
        rates = sorted(result.nll_by_rate)
        values = [result.nll_by_rate[rate] for rate in rates]
        finite = [value if np.isfinite(value) else np.nan for value in values]
        axes.plot(rates, finite, "o-", markersize=4, color=result.color, label=result.title)
        chosen = result.nll_by_rate[result.rate]
        axes.plot(result.rate, chosen, "o", markersize=10, color=result.color)
        for rate in rates:
            if not np.isfinite(result.nll_by_rate[rate]):
                axes.annotate(
                    "diverged",
                    (rate, 0.95),
                    xycoords=("data", "axes fraction"),
                    color=result.color,
                    ha="center",
                )
    axes.set_xscale("log")
    axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda rate, _: format_rate(rate)))
    axes.xaxis.set_minor_formatter(NullFormatter())


def draw_points(axes: Axes, table: pd.DataFrame, x: str, y: str) -> None:
    """Draw a point a method."""
    for row in table.to_dict("records"):
        axes.plot(
            row[x],
            row[y],
            "o",
            markersize=9,
            color=row["color"],
            label=row["title"],
        )


def format_gap(gap: Gap, scale: float, digits: int) -> str:
    """Write a difference with its interval; the method with the lowest loss has none to itself."""
    if gap == (0, 0, 0):
        return "the lowest"
    mean, low, high = (f"{scale * value:+.{digits}f}" for value in gap)
    return f"{mean} [{low}, {high}]"


def count_answers(samples: list[dict]) -> dict[str, str]:
    """Count answers that are correct, blank, loop or never end."""
    counts = {}
    outcomes = [sample["outcome"] for sample in samples if sample["outcome"] is not None]
    if outcomes:
        counts[f"correct, of {len(outcomes)}"] = str(outcomes.count("correct"))
    for flag, title in {"blank": "blank", "loop": "loop", "endless": "never end"}.items():
        count = sum(sample[flag] for sample in samples)
        counts[f"{title}, of {len(samples)}"] = str(count)
    return counts


def format_table(table: pd.DataFrame, results: dict[str, Result], base: dict) -> pd.DataFrame:
    """Return the table as text, a row a model; the last one is the base."""
    rows = []
    for name, row in table.iterrows():
        shown = {
            "method": row.title,
            "rate": format_rate(row.rate),
            "NLL": f"{row.nll:.3f}",
            "NLL - lowest [95%]": format_gap(row.nll_gap, scale=1, digits=3),
        }
        shown |= count_answers(results[name].measured["samples"])
        if "wrong_gap" in table:
            shown["% wrong - lowest [95%]"] = format_gap(row.wrong_gap, scale=100, digits=0)
        shown |= {
            "forgotten [95%]": format_gap(row.forgot, scale=1, digits=3),
            "trained weights": f"{row.weights:,}",
            "MB on disk": format_size(row.bytes),
            "seconds": f"{row.seconds:.0f}",
            "peak MB": f"{row.memory / 1e6:.0f}",
        }
        rows.append(shown)
    of_base = {
        "method": BASE_TITLE,
        "NLL": f"{average_losses(base, 'nll'):.3f}",
        **count_answers(base["samples"]),
    }
    return pd.DataFrame([*rows, of_base]).fillna("")


# ---------------------------------------------------------------- the report


def list_answer_blocks(results: dict[str, Result], base: dict) -> list[Block]:
    """Return blocks of a few held-out prompts, and as many of the user's own, with all answers."""
    titles = [BASE_TITLE]
    models = [base["samples"]]
    for result in results.values():
        titles.append(result.title)
        models.append(result.measured["samples"])
    held_out = []
    others = []
    for answers in zip(*models, strict=True):  # all answers to one prompt
        is_held_out = answers[0]["section"] == HELD_OUT
        (held_out if is_held_out else others).append(answers)
    shown = [*held_out[:SHOWN_PROMPTS], *others[:SHOWN_PROMPTS]]
    return [("answers", list(zip(titles, answers, strict=True))) for answers in shown]


def find_edges(results: dict[str, Result]) -> list[str]:
    """Name the methods whose best rate is the lowest or highest that ran."""
    sentences = []
    for result in results.values():
        if result.rate in (min(result.nll_by_rate), max(result.nll_by_rate)):
            best = f"The best rate of {result.title}, {format_rate(result.rate)}"
            sentences.append(f"{best}, is at the edge of those that ran: one beyond may be better.")
    return sentences


def explain_table(facts: Facts) -> str:
    """Explain the columns of the table."""
    text = "NLL is in nats a token of the answers that judge. "
    if facts.text is None:
        text += "Forgotten is by how much NLL rose on answers that the base itself gave to the "
        text += "held-out prompts, so a part of it is what you wanted to change. "
    else:
        text += f"Forgotten is by how much the NLL of {facts.text} rose. "
    text += "Seconds and memory are of the run at the chosen rate. One seed trained each method, "
    return text + "so the intervals do not cover what another seed would change."


def draw_figures(results: dict[str, Result], table: pd.DataFrame, facts: Facts) -> dict[str, str]:
    """Draw the three figures as SVG, by name."""
    points = table.assign(forgotten=[gap.mean for gap in table["forgot"]])
    judged = "NLL of the pairs that judge"
    rates = draw_chart(
        "Held-out NLL against learning rate; the chosen rates are large",
        lambda axes: draw_rates(axes, results),
        x="learning rate",
        y="NLL of the pairs that choose",
    )
    costs = draw_chart(
        "Held-out NLL against seconds of training",
        lambda axes: draw_points(axes, points, "seconds", "nll"),
        x="seconds",
        y=judged,
    )
    forgetting = draw_chart(
        "What is learned (low NLL) against what is forgotten",
        lambda axes: draw_points(axes, points, "forgotten", "nll"),
        x=f"forgotten: rise of NLL, {facts.text or 'answers of the base'}",
        y=judged,
    )
    return {"rates": rates, "seconds": costs, "forgetting": forgetting}


def write_report(
    folder: Path,
    facts: Facts,
    results: dict[str, Result],
    base: dict,
    write_command: Callable[[str], str],
) -> None:
    """Write report.md with its figures, and index.html; print the verdict and the table.

    `base` is what the base measured; `write_command` returns the command that trains a method on
    all data.
    """
    table = tabulate_results(results, base)
    taken, rival = choose_method(table, facts.key, facts.is_too_few)
    forgetting = subtract_losses(results[taken].measured, results[rival].measured, "text")
    verdict = write_verdict(table, facts, taken, rival, forgetting)
    shown = format_table(table, results, base)
    purpose = f"This trains {results[taken].title} on all of the data:"
    command = ACTIVATE + write_command(taken)
    figures = draw_figures(results, table, facts)

    failures = [f"{name} was left out: {reason}." for name, reason in facts.failures.items()]
    blocks: list[Block] = [
        ("title", facts.title),
        ("verdict", verdict),
        ("text", " ".join(facts.sentences)),
        *(("text", sentence) for sentence in failures),
        ("text", purpose),
        ("code", command),
        *(("figure", figure) for figure in figures.items()),
        ("heading", "All numbers"),
        ("table", shown),
        ("text", explain_table(facts)),
        *(("text", sentence) for sentence in find_edges(results)),
        ("heading", "What they answer"),
        *list_answer_blocks(results, base),
    ]

    (folder / "figures").mkdir(exist_ok=True)
    for name, svg in figures.items():
        write_text(folder / "figures" / f"{name}.svg", svg)
    write_text(folder / "report.md", render_markdown(blocks))
    write_text(folder / "index.html", render_html(blocks))
    print(shown.to_markdown(index=False, disable_numparse=True))
    place = f"report: {folder / 'index.html'}"
    print(escape_control(f"\n{verdict}\n\n{purpose}\n{command}\n\n{place}"))
