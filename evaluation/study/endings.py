"""Answers that do not end, against what the end token can reach in a base."""

import pandas as pd

from evaluation.study.analysis import Evidence, compute_prompt_shares
from evaluation.study.settings import RESULTS_DIR

SAMPLED = "t0.85p0.85"


def list_endings(evidence: Evidence) -> pd.DataFrame:
    """Return the bound of the end token and the share of endless answers of all-layer LoRA r=8.

    A row is a base; columns: base, edition, bound, endless. The first edition's bases stand below.
    """
    return pd.concat([list_own_endings(evidence), list_first_endings()], ignore_index=True)


def list_own_endings(evidence: Evidence) -> pd.DataFrame:
    """Return the rows of `list_endings` for the second edition's bases."""
    prompts = evidence.choose_prompts("combinations")
    rows = []
    for base in evidence.final[evidence.final.arm == "base"].itertuples():
        cell = base.cell.replace("base", "all_r8")
        runs = evidence.find_cell(cell, base.size)
        if runs.empty:
            continue
        endless = compute_prompt_shares(runs, prompts, SAMPLED, "endless").mean()
        rows.append(
            {
                "base": base.id,
                "edition": evidence.study.edition,
                "bound": base.reachable_end,
                "endless": endless,
            }
        )
    return pd.DataFrame(rows)


def list_first_endings() -> pd.DataFrame:
    """Return the rows of `list_endings` for the first edition's bases."""
    cells = pd.read_csv(RESULTS_DIR / "edition1.csv").query("kind == 'cell' and tuned == True")
    main = cells.query("arm == 'all_r8' and variant == 'main'")
    tuned = main.dropna(subset="never_end_sampled")
    bounds = pd.read_csv(RESULTS_DIR / "bases.csv").set_index("base").reachable_end
    return pd.DataFrame(
        {
            "base": tuned.base,
            "edition": 1,
            "bound": tuned.base.map(bounds),
            "endless": tuned.never_end_sampled,
        }
    )
