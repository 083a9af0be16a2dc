"""Say what compare.py found: a verdict, a table and figures, as report.md and as one HTML page.

Differences are paired, conversation by conversation, with 95% bootstrap intervals. One seed trained
each method, so the intervals say nothing about other seeds.
"""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

from evaluation.comparison.page import Block, draw_chart, render_html, render_markdown
from evaluation.probe.statistics import paired_bootstrap
from model.files import escape_control, write_text

SHOWN_PROMPTS = 5
COLORS = {  # of a method in every figure
    "lora-all-r8": "#1f5a99",
    "lora-all-high-rank": "#5fa3d9",
    "lora-all-r8-dora": "#7b5ea7",
    "lora-original": "#444444",
    "full": "#d1712a",
    "full-frozen-embedding": "#8a8a3a",
}
Interval = tuple[float, float, float]  # a mean difference, and its lower and upper bound


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


def subtract_losses(after: dict, before: dict, key: str) -> Interval:
    """Return by how much the losses of one model exceed those of another, with an interval."""
    losses, weights = list_losses(after, key)
    return paired_bootstrap((losses - list_losses(before, key)[0])[None], weights[None])


def tabulate_results(results: dict[str, Result], base: dict) -> pd.DataFrame:
    """Return a frame with a row a method; `nll_minus` and its like are against the best method."""
    rows = []
    for name, result in results.items():
        row = {"method": name, "title": result.title, "rate": result.rate, "bytes": result.size}
        row["seconds"] = result.record["train_seconds"]
        row["memory"] = result.record["peak_memory_bytes"]
        row["weights"] = result.record["trainable_parameters"]
        row["gained"] = average_losses(base, "nll") - average_losses(result.measured, "nll")
        row |= name_interval("forgot", subtract_losses(result.measured, base, "text"))
        rows.append(row)
    table = pd.DataFrame(rows).set_index("method")
    has_checks = any(sample["outcome"] is not None for sample in base["samples"])
    for key in ["nll", "wrong"] if has_checks else ["nll"]:
        means = {name: average_losses(result.measured, key) for name, result in results.items()}
        best = results[min(means, key=means.get)].measured
        table[key] = pd.Series(means)
        differences = {
            name: name_interval(key, subtract_losses(result.measured, best, key))
            for name, result in results.items()
        }
        table = table.join(pd.DataFrame(differences).T)
    return table


def name_interval(key: str, interval: Interval) -> dict[str, float]:
    """Name the columns of a difference and its interval."""
    return dict(zip((f"{key}_minus", f"{key}_low", f"{key}_high"), interval, strict=True))


# ---------------------------------------------------------------- the verdict


def choose_method(table: pd.DataFrame, key: str) -> tuple[str, str]:
    """Return the method to take, and the one that it is compared with.

    The cheapest is taken (bytes on disk, then seconds) of those that the paired interval does not
    tell from the best. It is compared with the best of the others.
    """
    ordered = table.sort_values(f"{key}_minus", kind="stable")
    tied = ordered[ordered[f"{key}_low"] <= 0]
    taken = tied.sort_values(["bytes", "seconds"], kind="stable").index[0]
    others = ordered.index.drop(taken)
    return taken, others[0] if len(others) else taken


def write_verdict(
    table: pd.DataFrame, facts: Facts, taken: str, rival: str, forgetting: Interval
) -> str:
    """Write the first sentence of a report; `forgetting` is of the taken method minus its rival."""
    key = facts.key
    first = table.loc[taken]
    second = table.loc[rival]
    place = f"{first.title} at {format_rate(first.rate)}"
    if taken == rival:
        return f"Only {place} ran to its end, so there is nothing to compare it with."
    if facts.is_too_few:
        best = table.loc[table[key].idxmin()]
        has_least = f"{best.title} at {format_rate(best.rate)} has the lowest NLL so far"
        return f"Your held-out pairs are too few to order the methods; {has_least}."
    is_tied = table[f"{key}_low"] <= 0
    if is_tied.all():
        size = f"{format_size(first.bytes)} MB"
        return f"These do not differ on your data; take the cheapest, {place} ({size})."

    def show(value: float) -> str:
        return f"{100 * value:.0f} points" if key == "wrong" else f"{value:.2g} nats"

    # One of both is the best method, so the interval of the other one is between the two.
    other = second if first[f"{key}_minus"] == 0 else first
    low = other[f"{key}_low"]
    high = other[f"{key}_high"]
    if is_tied[rival]:
        parts = [f"as good as {second.title} within {show(max(-low, high))}"]
    else:
        gap = f"{show(other[f'{key}_minus'])} ({show(low)} to {show(high)})"
        parts = [f"{gap} better than {second.title}"]
    if first.bytes != second.bytes:
        parts.append(f"{format_size(first.bytes)} MB in place of {format_size(second.bytes)}")
    less, more = "forgets less", "forgets more"
    if facts.text is None:
        less, more = "stays nearer to the base", "moves further from the base"
    if forgetting[2] < 0:
        parts.append(less)
    elif forgetting[1] > 0:
        parts.append(more)
    return f"Take {place}: {', '.join(parts)}."


# ---------------------------------------------------------------- figures and the table


def draw_rates(axes: Axes, results: dict[str, Result]) -> None:
    """Draw NLL against learning rate: a line a method, its chosen rate large."""
    for name, result in results.items():
        rates = sorted(result.nll_by_rate)
        values = [result.nll_by_rate[rate] for rate in rates]
        finite = [value if np.isfinite(value) else np.nan for value in values]
        axes.plot(rates, finite, "o-", markersize=4, color=COLORS[name], label=result.title)
        chosen = result.nll_by_rate[result.rate]
        axes.plot(result.rate, chosen, "o", markersize=10, color=COLORS[name])
        for rate, value in zip(rates, values, strict=True):
            if not np.isfinite(value):
                axes.annotate(
                    "diverged", (rate, 0.95), xycoords=("data", "axes fraction"), ha="center"
                )
    axes.set_xscale("log")
    axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda rate, _: format_rate(rate)))
    axes.xaxis.set_minor_formatter(NullFormatter())


def draw_points(axes: Axes, table: pd.DataFrame, x: str, y: str) -> None:
    """Draw a point a method."""
    for name, row in table.iterrows():
        axes.plot(row[x], row[y], "o", markersize=9, color=COLORS[name], label=row.title)


def format_interval(row: pd.Series, key: str) -> str:
    """Write a difference with its interval; the best one has none."""
    if row[f"{key}_minus"] == row[f"{key}_low"] == row[f"{key}_high"] == 0:
        return "the best"
    scale = 100 if key == "wrong" else 1
    digits = 0 if key == "wrong" else 3
    minus, low, high = (
        f"{scale * row[f'{key}_{part}']:+.{digits}f}" for part in ("minus", "low", "high")
    )
    return f"{minus} [{low}, {high}]"


def describe_answers(samples: list[dict]) -> dict[str, str]:
    """Count answers that are correct, blank, loop or never end."""
    checked = [sample for sample in samples if sample["outcome"] is not None]
    right = sum(sample["outcome"] == "correct" for sample in checked)
    counts = {"correct": f"{right} of {len(checked)}"} if checked else {}
    for flag, title in {"blank": "blank", "loop": "loop", "endless": "never end"}.items():
        counts[title] = f"{sum(sample[flag] for sample in samples)} of {len(samples)}"
    return counts


def format_table(table: pd.DataFrame, results: dict[str, Result], base: dict) -> pd.DataFrame:
    """Return the table as text, a row a model; the first one is the base."""
    rows = [
        {"method": "the base, untrained", "NLL": f"{average_losses(base, 'nll'):.3f}"}
        | describe_answers(base["samples"])
    ]
    for name, row in table.iterrows():
        shown = {
            "method": row.title,
            "rate": format_rate(row.rate),
            "NLL": f"{row.nll:.3f}",
            "NLL - best [95%]": format_interval(row, "nll"),
        }
        shown |= describe_answers(results[name].measured["samples"])
        if "wrong" in table:
            shown["% wrong - best [95%]"] = format_interval(row, "wrong")
        shown["forgotten [95%]"] = format_interval(row, "forgot")
        shown["trained weights"] = f"{row.weights:,}"
        shown["MB on disk"] = format_size(row.bytes)
        shown["seconds"] = f"{row.seconds:.0f}"
        shown["peak MB"] = f"{row.memory / 1e6:.0f}"
        rows.append(shown)
    columns = max(rows, key=len).keys()
    return pd.DataFrame(rows, columns=list(columns)).fillna("")


# ---------------------------------------------------------------- the report


def list_answer_blocks(results: dict[str, Result], base: dict) -> list[Block]:
    """Return blocks of a few held-out prompts, and as many of the user's own, with all answers."""
    answers = {"the base, untrained": base["samples"]}
    answers |= {result.title: result.measured["samples"] for result in results.values()}
    is_held_out = [sample["section"] == "judge" for sample in base["samples"]]
    places = np.flatnonzero(is_held_out)[:SHOWN_PROMPTS].tolist()
    places += np.flatnonzero(np.invert(is_held_out))[:SHOWN_PROMPTS].tolist()
    blocks: list[Block] = [("heading", "What they answer")]
    for place in places:
        said = [(title, samples[place]) for title, samples in answers.items()]
        blocks.append(("answers", said))
    return blocks


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


def draw_figures(facts: Facts, results: dict[str, Result], table: pd.DataFrame) -> list[Block]:
    """Draw the three figures as blocks: a name, a title that says what is drawn, and SVG."""
    rates = draw_chart(
        lambda axes: draw_rates(axes, results), "learning rate", "NLL of the pairs that choose"
    )
    costs = draw_chart(
        lambda axes: draw_points(axes, table, "seconds", "nll"),
        "seconds of training",
        "NLL of the pairs that judge",
    )
    forgetting = draw_chart(
        lambda axes: draw_points(axes, table, "forgot_minus", "gained"),
        f"forgotten: rise of NLL, {facts.text or 'answers of the base'}",
        "learned: fall of NLL",
    )
    return [
        ("figure", ("rates", "Held-out NLL against learning rate; chosen rates are large", rates)),
        ("figure", ("seconds", "Held-out NLL against seconds of training", costs)),
        ("figure", ("forgetting", "Learned against forgotten", forgetting)),
    ]


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
    taken, rival = choose_method(table, facts.key)
    forgetting = subtract_losses(results[taken].measured, results[rival].measured, "text")
    verdict = write_verdict(table, facts, taken, rival, forgetting)
    shown = format_table(table, results, base)
    command = write_command(taken)

    blocks: list[Block] = [("title", facts.title), ("verdict", verdict)]
    blocks.append(("text", " ".join(facts.sentences)))
    for name, reason in facts.failures.items():
        blocks.append(("text", f"{name} was left out: {reason}."))
    blocks.append(("text", f"This trains {results[taken].title} on all of the data:"))
    blocks += [("code", command), *draw_figures(facts, results, table)]
    blocks += [("heading", "All numbers"), ("table", shown), ("text", explain_table(facts))]
    blocks += [("text", sentence) for sentence in find_edges(results)]
    blocks += list_answer_blocks(results, base)

    (folder / "figures").mkdir(exist_ok=True)
    for kind, content in blocks:
        if kind == "figure":
            name, _, svg = content
            write_text(folder / "figures" / f"{name}.svg", svg)
    write_text(folder / "report.md", render_markdown(blocks))
    write_text(folder / "index.html", render_html(blocks))
    print(shown.to_markdown(index=False, disable_numparse=True))
    print(escape_control(f"\n{verdict}\n\n{command}\n\nreport: {folder / 'index.html'}"))
