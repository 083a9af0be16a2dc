"""Numbers that stand inside sentences, by name.

A text has `<!-- =share/composition/fft/25M -->88<!-- /= -->`; report.py writes the number. The
parts of a name are those of a function here, after its own name:

    share/OUTCOME/METHOD/SIZE       percent correct, means over runs
    gap/OUTCOME/LORA/SIZE           points that all-layer LoRA is behind full fine-tuning
    frozen_gap/OUTCOME/LORA/SIZE    the same, if the embedding is frozen in full fine-tuning
    fresh_gap/ARM/SIZE              round 3: the gap in composition on the fresh prompts
    interval/OUTCOME/LORA/SIZE      the bootstrap's interval of that gap, such as `22 to 27`
    t_interval/OUTCOME/LORA/SIZE    the t interval over three runs
    known/OUTCOME/SIZE              percent of the facts that the base ranks first
    loss_correlation/WHICH          rank correlation of loss and composition: `all`, or `frozen`:
                                    settings whose embedding is frozen
    asked/ARM/WAY/SIZE              round 3: percent correct of the composed prompts of one turn, by
                                    the way of asking (template, no_template, on_fft); a last part,
                                    such as `blank`, names another kind of answer
    cell/OUTCOME/SIZE/CELL          percent correct of a cell (analysis.py), such as `study/10`, or
                                    `study_tuned*0.005`: the original LoRA at a rate not its own
    fresh/OUTCOME/SIZE/ARM/RATE     round 3: percent correct on the fresh prompts; a last part names
                                    the epochs if they are not the usual ones
    medical/WAY                     round 3: percent correct of the medical test prompts, by the way
                                    of asking, after medical pairs alone at 1.3M
    forecasts/WHICH                 how many: `all`; points off in the median: `first`, `later`

OUTCOME is `composition`, `plain`, `unseen`, or `all` for the 1,200 prompts of both kinds. METHOD is
a key of `METHODS`, LORA `r8`, `width16` or `r64`, SIZE `1.3M`, `5.5M` or `25M`. A last part
`sampled` takes sampled answers in place of greedy ones. A value of round 3, or of a
cell, whose runs are not there yet is "not run".
"""

from collections.abc import Callable

import numpy as np
import pandas as pd
from scipy import stats

from evaluation.study.analysis import Estimate, Evidence, estimate_gap, estimate_share
from evaluation.study.blocks import points
from evaluation.study.figures import list_losses
from evaluation.study.names import BLACK, DECODINGS, GAP_LORAS, METHODS, ORANGE, SIZES
from evaluation.study.results import LETTERS
from evaluation.study.round3 import NOT_ASKED
from evaluation.study.round3_figures import list_fresh_gaps
from evaluation.study.round3_tables import get_round3, select_asked, share_asked
from evaluation.study.settings import RESULTS_DIR
from evaluation.study.short_tables import KNOWN
from model.cli import UserError

NOT_RUN = "not run"
VALUES: dict[str, Callable[..., str]] = {}


def value(function: Callable[..., str]) -> Callable[..., str]:
    """Register a function: its name begins the names of its values, its arguments follow."""
    VALUES[function.__name__] = function
    return function


def find_value(evidence: Evidence, name: str) -> str:
    """Return the text of a value by its name, such as `gap/composition/r8/25M`."""
    kind, *parts = name.split("/")
    if kind not in VALUES:
        raise UserError(f"no value {name!r}; there are {', '.join(VALUES)} (values.py)")
    try:
        return VALUES[kind](evidence, *parts)
    except (KeyError, IndexError, TypeError, AttributeError) as error:
        raise UserError(
            f"no value {name!r}: {error!r}; values.py says what its parts are"
        ) from error


def find_size(title: str) -> str:
    """Return the code name of a size."""
    return {title: size for size, title in SIZES.items()}[title]


def find_prompts(evidence: Evidence, outcome: str) -> pd.DataFrame:
    """Return the test prompts of an outcome; `all` are those of composition and plain questions."""
    return evidence.choose_prompts("combinations" if outcome == "all" else outcome)


def find_decoding(title: str) -> str:
    """Return the code name of a decoding."""
    return {title: decoding for decoding, title in DECODINGS.items()}[title]


@value
def share(
    evidence: Evidence, outcome: str, method: str, size: str, decoding: str = "greedy"
) -> str:
    """Write the percent correct of a method."""
    arms = {row.key: row.arms for row in METHODS}[method]
    code = find_size(size)
    runs = evidence.find_cell(arms[code], code)
    estimate = estimate_share(runs, find_prompts(evidence, outcome), find_decoding(decoding))
    return points(estimate.value)


def find_gap(
    evidence: Evidence,
    outcome: str,
    lora: str,
    size: str,
    decoding: str = "greedy",
    full: str = "fft",
) -> Estimate:
    """Return the gap of full fine-tuning to an all-layer LoRA."""
    code = find_size(size)
    above = evidence.find_cell(full, code)
    below = evidence.find_cell(GAP_LORAS[lora][code], code)
    return estimate_gap(above, below, find_prompts(evidence, outcome), find_decoding(decoding))


@value
def gap(evidence: Evidence, *place: str) -> str:
    """Write a gap in points."""
    return points(find_gap(evidence, *place).value)


@value
def frozen_gap(evidence: Evidence, outcome: str, lora: str, size: str) -> str:
    """Write a gap in points, against full fine-tuning with a frozen embedding."""
    return points(find_gap(evidence, outcome, lora, size, full="fft_frozen").value)


@value
def fresh_gap(evidence: Evidence, arm: str, size: str) -> str:
    """Write a gap in composition in points, on round 3's fresh prompts."""
    gaps = list_fresh_gaps(get_round3(evidence))
    found = gaps.gap[(gaps["size"] == find_size(size)) & (gaps.arm == arm)]
    return points(found.iloc[0].value) if len(found) else NOT_RUN


@value
def interval(evidence: Evidence, *place: str) -> str:
    """Write the bootstrap's interval of a gap in points."""
    estimate = find_gap(evidence, *place)
    return f"{points(estimate.low)} to {points(estimate.high)}"


@value
def t_interval(evidence: Evidence, *place: str) -> str:
    """Write the t interval of a gap over runs in points."""
    low, high = find_gap(evidence, *place).t_interval()
    return f"{points(low)} to {points(high)}"


@value
def asked(evidence: Evidence, arm: str, way: str, size: str, kind: str = "correct") -> str:
    """Write the percent of answers of a kind, asked in one way, of an arm's usual runs."""
    found = get_round3(evidence)
    runs = select_asked(found)
    is_wanted = (runs["size"] == find_size(size)) & (runs.arm == arm)
    code_way = "" if way == "template" else way
    share = share_asked(found, runs[is_wanted], code_way, kind)
    return NOT_RUN if np.isnan(share) else points(share)


@value
def medical(evidence: Evidence, way: str) -> str:
    """Write the percent correct of medical test prompts, after medical pairs alone, at 1.3M."""
    name = "medical" if way == "template" else f"medical/{way}"
    found = get_round3(evidence)
    runs = found.find("xs", "all_r8", 3e-3, data="medical")
    if runs.empty:
        return NOT_RUN
    outcomes = runs.outcomes.iloc[0]  # of the lowest seed
    count = len(evidence.choose_prompts("medical"))
    letters = outcomes[name]["greedy"][-count:]  # the test half stands last
    asked = letters.replace(NOT_ASKED, "")
    return points(asked.count(LETTERS["correct"]) / len(asked))


@value
def cell(evidence: Evidence, outcome: str, size: str, *parts: str) -> str:
    """Write the percent correct of a cell, whose name may contain a slash."""
    decoding = "greedy"
    if parts[-1] == "sampled":
        *parts, decoding = parts
    runs = evidence.find_cell("/".join(parts), find_size(size))
    prompts = find_prompts(evidence, outcome)
    estimate = estimate_share(runs, prompts, find_decoding(decoding))
    return points(estimate.value) if estimate else NOT_RUN


@value
def fresh(
    evidence: Evidence, outcome: str, size: str, arm: str, rate: str, epochs: str = ""
) -> str:
    """Write the percent correct on round 3's fresh prompts, of an arm at a rate."""
    found = get_round3(evidence)
    settings = {"epochs": float(epochs)} if epochs else {}
    runs = found.find(find_size(size), arm, float(rate), **settings)
    share = found.share(runs, outcome=outcome)
    return NOT_RUN if np.isnan(share) else points(share)


@value
def known(evidence: Evidence, outcome: str, size: str) -> str:
    """Write the percent of facts that the base ranks first without a question."""
    base = evidence.find_cell("base", find_size(size))
    return points(base[KNOWN[outcome]].mean())


@value
def loss_correlation(evidence: Evidence, which: str) -> str:
    """Write the rank correlation of loss and composition over settings."""
    table = list_losses(evidence)
    trains_embedding = table.color.isin([BLACK, ORANGE])
    chosen = {"all": table, "frozen": table[~trains_embedding]}[which]
    return f"{stats.spearmanr(chosen.loss, chosen.share).statistic:.2f}"


@value
def forecasts(evidence: Evidence, which: str) -> str:
    """Write the number of forecasts, or how far they were off in the median, in points."""
    table = pd.read_csv(RESULTS_DIR / "forecasts.csv")
    errors = (table.found - table.predicted).abs()
    is_first = table.stage == "with the rules"
    texts = {
        "all": f"{len(table)}",
        "first": f"{errors[is_first].median():.0f}",
        "later": f"{errors[~is_first].median():.0f}",
    }
    return texts[which]
