"""The first edition's tables, from edition1.csv.

edition1.toml names the cells of each table. R counts all response tokens, R without ends all but
the end tokens.
"""

import tomllib

import pandas as pd

from evaluation.study.settings import RESULTS_DIR

CONTENT = tomllib.loads((RESULTS_DIR / "edition1.toml").read_text(encoding="utf-8"))
SIZES = pd.DataFrame(CONTENT["sizes"]).T  # name and parameters of the README's bases
FORMATS = {  # of the texts in the tables, each of some columns of edition1.csv
    "weights": ("{:,.0f}", "trainable_parameters"),
    "steps": ("{:,.0f}", "steps"),
    "seeds": ("{:.0f}", "seeds"),
    "R without ends": ("{:.2f} [{:.2f}, {:.2f}]", "R_no_end", "R_no_end_low", "R_no_end_high"),
    "R": ("{:.2f} [{:.2f}, {:.2f}]", "R", "R_low", "R_high"),
    "never end": ("{:.0%} / {:.0%}", "never_end_greedy", "never_end_sampled"),
    "forgotten": ("{:+.2f}", "forgets"),
}


def read_cells() -> pd.DataFrame:
    """Read the cells of edition1.csv by base and cell, with the texts of `FORMATS`."""
    table = pd.read_csv(RESULTS_DIR / "edition1.csv", dtype={"learning_rate": str})
    table = table.query("kind == 'cell'").set_index(["base", "cell"], drop=False)
    table = table.rename_axis([None, None])
    variants = table.variant.map(CONTENT["variants"]).radd(", ").fillna("")
    texts = {"trained": table.arm.map(CONTENT["arms"]) + variants}
    texts |= {"from": table.base.map(CONTENT["bases"]), "lr": table.learning_rate}
    for title, (form, *columns) in FORMATS.items():
        numbers = table[columns].astype(float)
        found = pd.Series([form.format(*row) for row in numbers.values], table.index)
        found = found.replace("1.00 [1.00, 1.00]", "1")
        texts[title] = found.mask(numbers.isna().any(axis=1), "-")
    return table.rename(columns={"R": "recovery"}).assign(**texts)


def choose_cells(names: list[str]) -> pd.DataFrame:
    """Return cells that edition1.toml names `base:cell`, or `cell` from the main base."""
    places = [name.rpartition(":")[::2] for name in names]
    return read_cells().loc[[(base or SIZES.index[0], cell) for base, cell in places]]


def tabulate_readme() -> pd.DataFrame:
    """Return the README's table: a row an arm, both sizes side by side."""
    rows, cells = [], choose_cells(CONTENT["readme"])
    cells["weights"] = cells.trainable_parameters / cells.base.map(SIZES.parameters)
    for arm, group in cells.groupby("trained", sort=False):
        pair = group.set_index("base").reindex(SIZES.index)
        row = {"trained": arm, "lr": " / ".join(pair.lr.dropna().unique())}
        percent = pair[["weights", "never_end_sampled", "correct_sampled"]].astype(float)
        texts = percent.map("{:.0%}".format, na_action="ignore").fillna("-").agg(" / ".join)
        row["weights"], *others = texts.replace("- / -", "-")
        for base, size in SIZES["name"].items():
            also = f" ({pair.recovery[base]:.2f})" if pair.recovery[base] < 1 else ""
            row[f"{size}: R without ends (R)"] = f"{pair['R without ends'][base]}{also}"
        rows.append(row | dict(zip(("never end", "correct"), others, strict=True)))
    return pd.DataFrame(rows).replace("nan", "-")


def make_edition1_tables() -> dict[str, list[pd.DataFrame]]:
    """Return the tables of each block of the first edition."""
    blocks = {"edition1": [tabulate_readme()]}
    for name, wanted in CONTENT["tables"].items():
        table = choose_cells(wanted)[["trained", "from", "lr", *FORMATS]]
        blocks[name] = [table.drop(columns=["from"] * (table["from"].nunique() == 1))]
    return blocks
