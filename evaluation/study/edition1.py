"""The first edition's table, from edition1.csv; edition1.toml names its rows.

R counts all response tokens, R without ends all but the end tokens.
"""

import tomllib

import pandas as pd

from evaluation.study.settings import RESULTS_DIR

CONTENT = tomllib.loads((RESULTS_DIR / "edition1.toml").read_text(encoding="utf-8"))
SIZES = pd.DataFrame(CONTENT["sizes"]).T  # name and parameters of the bases


def read_cells() -> pd.DataFrame:
    """Read the cells of edition1.csv by base and cell."""
    table = pd.read_csv(RESULTS_DIR / "edition1.csv", dtype={"learning_rate": str})
    table = table.query("kind == 'cell'").set_index(["base", "cell"], drop=False)
    return table.rename_axis([None, None])


def write_recovery(cell: pd.Series) -> str:
    """Write R without ends with its interval, and R in parentheses; full fine-tuning has 1."""
    if pd.isna(cell.R):
        return "-"
    text = "{:.2f} [{:.2f}, {:.2f}] ({:.2f})"
    text = text.format(cell.R_no_end, cell.R_no_end_low, cell.R_no_end_high, cell.R)
    return "1" if cell.R == 1 else text


def tabulate_edition1() -> pd.DataFrame:
    """Return a row an arm, both sizes side by side."""
    cells, rows = read_cells(), []
    for title, names in CONTENT["rows"].items():
        chosen = [(base, name) for base, name in zip(SIZES.index, names, strict=True) if name]
        pair = cells.loc[chosen].set_index("base").reindex(SIZES.index)
        row = {"trained": title, "lr": " / ".join(pair.learning_rate.dropna().unique())}
        pair["weights"] = pair.trainable_parameters / SIZES.parameters
        percent = pair[["weights", "never_end_sampled", "correct_sampled"]].astype(float)
        texts = percent.map(lambda x: "-" if pd.isna(x) else f"{x:.0%}").agg(" / ".join)
        row["weights"], *others = texts.replace("- / -", "-")
        for base, size in SIZES["name"].items():
            row[f"{size}: R without ends (R)"] = write_recovery(pair.loc[base])
        rows.append(row | dict(zip(("never end", "correct"), others, strict=True)))
    return pd.DataFrame(rows)
