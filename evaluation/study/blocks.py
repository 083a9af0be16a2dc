"""Blocks of the report's tables by name, and how their numbers are written.

To add a table, write a function under `@block("name")` in short_tables.py or long_tables.py. It
takes the evidence and returns data frames. Then put `<!-- study:name -->` and
`<!-- /study:name -->` where the table belongs; report.py fills it in.
"""

from collections.abc import Callable
from pathlib import Path

import pandas as pd

from evaluation.study.analysis import Estimate, Evidence, estimate_share
from evaluation.study.names import ONE_RUN

Tables = list[pd.DataFrame]

BLOCKS: dict[str, Callable[[Evidence], Tables]] = {}


def block(name: str) -> Callable:
    """Register a function as the one that makes the tables of a block."""

    def register(function: Callable[[Evidence], Tables]) -> Callable[[Evidence], Tables]:
        BLOCKS[name] = function
        return function

    return register


def percent(share: float) -> str:
    """Write a share in percent, without decimals."""
    return f"{share:.0%}"


def points(difference: float) -> str:
    """Write a difference of shares in percentage points, without decimals."""
    return f"{100 * difference:z.0f}"


def write_interval(low: float, high: float) -> str:
    """Write the ends of an interval in points, such as `[58, 64]`."""
    return f"[{points(low)}, {points(high)}]"


def write_share(estimate: Estimate) -> str:
    """Write a share with its interval, such as `61% [58, 64]`."""
    ends = write_interval(estimate.low, estimate.high)
    return f"{percent(estimate.value)} {ends}"


def write_gap(gap: Estimate) -> str:
    """Write a difference in points with its interval, such as `20 [18, 23]`."""
    ends = write_interval(gap.low, gap.high)
    return f"{points(gap.value)} {ends}"


def write_t_interval(gap: Estimate) -> str | None:
    """Write the t interval over seeds in points; None with fewer than three."""
    bounds = gap.t_interval()
    return write_interval(*bounds) if bounds else None


def write_rate(rate: float) -> str:
    """Write a learning rate, such as `1e-3` or `1.25e-4`."""
    mantissa, exponent = f"{rate:.6e}".split("e")
    short_mantissa = f"{float(mantissa):g}"
    return f"{short_mantissa}e{int(exponent)}"


def mark_share(evidence: Evidence, runs: pd.DataFrame, name: str) -> str:
    """Write the greedy share of a set or outcome, with the marks that belong to its runs."""
    prompts = evidence.choose_prompts(name)
    estimate = estimate_share(runs, prompts, "greedy")
    first = runs.iloc[0]
    text = percent(estimate.value)
    if len(runs) == 1 and first.arm != "base":
        text += ONE_RUN
    return text + first["mark"]


def read_samples(folder: Path) -> pd.DataFrame | None:
    """Read the saved answers of a folder, if it has any. A row is an answer."""
    path = folder / "samples.jsonl"
    if not path.is_file():
        return None
    return pd.read_json(path, lines=True, dtype=False)
