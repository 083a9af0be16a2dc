"""The table of causes: what could have made LoRA fail, and what mending it brings.

A cause is mended twice: alone, in the LoRA that has all other causes, and last, in the LoRA that
has no other. Causes act together, so the two numbers differ and no shares of the failure add up.
"""

from dataclasses import dataclass

import pandas as pd

from evaluation.study.analysis import Evidence
from evaluation.study.blocks import Tables, block
from evaluation.study.names import BOTH_MENDED
from evaluation.study.values import NOT_RUN, find_value

Change = tuple[str, str]  # names of values (values.py): before and after


@dataclass(frozen=True)
class Cause:
    """A row of the table: a cause, its experiment, and composition before and after mending it."""

    title: str
    experiment: str
    original: str  # can the original study have had it?
    alone: tuple[Change | None, Change | None] = (None, None)  # 1.3M, 25M
    last: tuple[Change | None, Change | None] = (None, None)


CAUSES = [
    Cause(
        "asked without the chat template",
        "asked without and with it",
        "yes, if MiniMind's script was told to ask the pretrained model",
        alone=(
            ("asked/study/no_template/1.3M", "asked/study/template/1.3M"),
            ("asked/study/no_template/25M", "asked/study/template/25M"),
        ),
        last=(
            ("asked/all_r8/no_template/1.3M", "asked/all_r8/template/1.3M"),
            ("asked/all_r8/no_template/25M", "asked/all_r8/template/25M"),
        ),
    ),
    Cause(
        "put on the weights of full fine-tuning",
        "asked on those weights and on its own base",
        "yes, by the default of MiniMind's script",
        alone=(
            ("asked/study/on_fft/1.3M", "asked/study/template/1.3M"),
            ("asked/study/on_fft/25M", "asked/study/template/25M"),
        ),
        last=(
            ("asked/all_r8/on_fft/1.3M", "asked/all_r8/template/1.3M"),
            ("asked/all_r8/on_fft/25M", "asked/all_r8/template/25M"),
        ),
    ),
    Cause(
        "too low a rate for these steps",
        "1e-4, and the best rate of each",
        "perhaps, but it took 64 times as many steps as ours",
        alone=(
            ("cell/composition/1.3M/study", "cell/composition/1.3M/study_tuned"),
            ("cell/composition/25M/study", "cell/composition/25M/study_tuned"),
        ),
        last=(
            ("cell/composition/1.3M/study_all", f"cell/composition/1.3M/{BOTH_MENDED['xs']}"),
            ("cell/composition/25M/study_all", f"cell/composition/25M/{BOTH_MENDED['m26']}"),
        ),
    ),
    Cause(
        "adapters on query and output alone",
        "the same LoRA on all layers",
        "yes",
        alone=(
            ("cell/composition/1.3M/study", "cell/composition/1.3M/study_all"),
            ("cell/composition/25M/study", "cell/composition/25M/study_all"),
        ),
        last=(
            ("cell/composition/1.3M/study_tuned", f"cell/composition/1.3M/{BOTH_MENDED['xs']}"),
            ("cell/composition/25M/study_tuned", f"cell/composition/25M/{BOTH_MENDED['m26']}"),
        ),
    ),
    Cause(
        "too small a product of rate and steps",
        "about the original's product (25M), or three times it, by the rate alone (1.3M)",
        "no, by our estimate of its steps",
        alone=(
            ("cell/composition/1.3M/study", "cell/composition/1.3M/study_tuned"),
            ("cell/composition/25M/study", "cell/composition/25M/study_tuned*0.001/13"),
        ),
    ),
    Cause(
        "too low a rank",
        "the original LoRA at rank 16; all-layer LoRA at rank 64 (1.3M) and 32 (25M)",
        "yes on all layers; on query and output it tried rank 16",
        alone=(("cell/composition/1.3M/study", "cell/composition/1.3M/study_r16"), None),
        last=(
            ("cell/composition/1.3M/all_r8", "cell/composition/1.3M/all_r64"),
            ("cell/composition/25M/all_r8", "cell/composition/25M/all_r32"),
        ),
    ),
    Cause(
        "an end token that the base never read",
        "sampled answers, the rows of the chat tokens frozen and trained",
        "no, MiniMind's bases read it",
        last=(
            (
                "cell/composition/1.3M/all_r8@plain42/sampled",
                "cell/composition/1.3M/all_r8_rows@plain42/sampled",
            ),
            None,
        ),
    ),
]


@block("causes")
def tabulate_causes(evidence: Evidence) -> Tables:
    """Return composition before and after mending a cause, in percent. A row is a cause."""
    if evidence.round3.empty:
        return [pd.DataFrame()]
    rows = []
    for cause in CAUSES:
        row = {"cause": cause.title, "experiment": cause.experiment}
        for title, changes in {"alone": cause.alone, "last": cause.last}.items():
            for size, change in zip(("1.3M", "25M"), changes, strict=True):
                row[f"mended {title}, {size}"] = write_change(evidence, change)
        row["can the original have had it?"] = cause.original
        rows.append(row)
    return [pd.DataFrame(rows)]


def write_change(evidence: Evidence, change: Change | None) -> str | None:
    """Write both percents of a change; None where no experiment was planned."""
    if change is None:
        return None
    before, after = (find_value(evidence, name) for name in change)
    if NOT_RUN in (before, after):
        return NOT_RUN
    return f"{before}% to {after}%"
