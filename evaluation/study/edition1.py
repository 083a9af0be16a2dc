"""The first edition's tables, from edition1.csv and saved outputs.

edition1.toml names the cells of each table. R counts all response tokens, R without ends all but
the end tokens.
"""

import tomllib

import pandas as pd

from dataset.lm_dataset import read_jsonl
from evaluation.probe.outputs import OUTPUT_DIR
from evaluation.study.results import RESULTS_DIR

CONTENT = tomllib.loads((RESULTS_DIR / "edition1.toml").read_text(encoding="utf-8"))
SIZES = pd.DataFrame(CONTENT["sizes"]).T  # name and parameters of the README's bases
PERCENT = {"weights": "weights", "never end": "never_end_sampled", "correct": "correct_sampled"}
SHOWN_COLUMNS = ["trained", "from", "lr", "weights", "steps", "seeds", "R without ends", "R"]
SHOWN_COLUMNS += ["never end", "forgotten"]


def read_cells() -> pd.DataFrame:
    """Read the cells of edition1.csv by base and cell, with the texts of `SHOWN_COLUMNS`."""
    table = pd.read_csv(RESULTS_DIR / "edition1.csv", dtype={"learning_rate": str})
    table = table.query("kind == 'cell'").set_index(["base", "cell"], drop=False)
    table = table.rename_axis([None, None])

    def spell(form: str, *columns: str) -> pd.Series:
        numbers = table[[*columns]].astype(float)
        texts = pd.Series([form.format(*row) for row in numbers.values], table.index)
        return texts.mask(numbers.isna().any(axis=1), "-")

    texts = {
        "trained": table.arm.map(CONTENT["arms"])
        + table.variant.map(CONTENT["variants"]).radd(", ").fillna(""),
        "from": table.base.map(CONTENT["bases"]),
        "lr": table.learning_rate,
        "weights": spell("{:,.0f}", "trainable_parameters"),
        "steps": spell("{:,.0f}", "steps"),
        "seeds": spell("{:.0f}", "seeds"),
        "never end": spell("{:.0%} / {:.0%}", "never_end_greedy", "never_end_sampled"),
        "forgotten": spell("{:+.2f}", "forgets"),
    }
    for title, name in {"R without ends": "R_no_end", "R": "R"}.items():
        found = spell("{:.2f} [{:.2f}, {:.2f}]", name, f"{name}_low", f"{name}_high")
        texts[title] = found.replace("1.00 [1.00, 1.00]", "1")
    return table.rename(columns={"R": "recovery"}).assign(**texts)


def list_main_cells() -> pd.DataFrame:
    """Return the README's cells: 2 epochs at the tuned rate, the study's LoRA at 1e-4."""
    cells = read_cells()
    usual = cells.tuned.eq(True).where(cells.arm != "minimind", cells.lr == "1e-4")
    usual &= (cells.variant == "main") & ~cells.cell.str.contains("+", regex=False)
    cells = cells[usual & cells.base.isin(SIZES.index) & cells.arm.isin(CONTENT["readme"])]
    cells = cells.assign(weights=cells.trainable_parameters / cells.base.map(SIZES.parameters))
    order = [*CONTENT["readme"], *SIZES.index]
    return cells.sort_values(["arm", "base"], key=lambda names: names.map(order.index))


def tabulate_readme() -> pd.DataFrame:
    """Return the README's table: a row an arm, both sizes side by side."""
    rows = []
    for _, group in list_main_cells().groupby("arm", sort=False):
        pair = group.set_index("base").reindex(SIZES.index)
        row = {"trained": group.trained.iloc[0], "lr": " / ".join(pair.lr.dropna().unique())}
        for title, name in PERCENT.items():
            texts = pair[name].astype(float).map("{:.0%}".format).replace("nan%", "-")
            row[title] = "-" if set(texts) == {"-"} else " / ".join(texts)
        for base, size in SIZES["name"].items():
            also = f" ({pair.recovery[base]:.2f})" if pair.recovery[base] < 1 else ""
            row[f"{size}: R without ends (R)"] = f"{pair['R without ends'][base]}{also}"
        rows.append(row)
    table = pd.DataFrame(rows).replace("nan", "-")
    return table[[*table.columns[:3], *table.columns[5:], *table.columns[3:5]]]


def tabulate_answers() -> pd.DataFrame:
    """Return the greedy answers of 4 models to one prompt, word for word."""
    wanted, rows = CONTENT["answers"], []
    for title, folder in wanted["folders"].items():
        samples = [line for _, line in read_jsonl(OUTPUT_DIR / folder / "samples.jsonl")]
        one = next(s for s in samples if (s["id"], s["decoding"]) == (wanted["prompt"], "greedy"))
        text = one["output"]
        if len(text) > wanted["characters"]:
            text = text[: wanted["characters"]].rpartition(" ")[0] + " ..."
        link = f"[{folder}](evaluation/model_outputs/{folder}/samples.md)"
        rows.append((title, f"`{text}`", link))
    return pd.DataFrame(rows, columns=["trained", f"answer to: {one['prompt']}", "folder"])


def make_edition1_tables() -> dict[str, list[pd.DataFrame]]:
    """Return the tables of each block of the first edition."""
    blocks = {"edition1": [tabulate_readme()], "answers1": [tabulate_answers()]}
    cells = read_cells()
    for name, wanted in CONTENT["tables"].items():
        places = [one.rpartition(":")[::2] for one in wanted]
        table = cells.loc[[(base or SIZES.index[0], cell) for base, cell in places], SHOWN_COLUMNS]
        blocks[name] = [table.drop(columns=["from"] * (table["from"].nunique() == 1))]
    return blocks
