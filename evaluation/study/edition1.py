"""The first edition's tables, from edition1.csv, runs.jsonl, nll.parquet and saved outputs.

edition1.toml says which cells a table has and what they are called. R counts all response tokens;
R without ends leaves the end tokens out.
"""

import tomllib

import numpy as np
import pandas as pd

from dataset.lm_dataset import read_jsonl
from evaluation.probe.outputs import OUTPUT_DIR
from evaluation.study.results import RESULTS_DIR, read_nll, read_runs

CONTENT = tomllib.loads((RESULTS_DIR / "edition1.toml").read_text(encoding="utf-8"))
ARMS, SIZES = CONTENT["arms"], CONTENT["sizes"]
PLAIN, WHOLE = "xs-plain42", "s-whole42"  # the bases with 20 tokens a parameter
LADDER = ["minimind", "square", "all_r8", "all_r8_rows", "fft_frozen_vocabulary"]
LADDER += ["embeddings_norms", "all_r8_vocabulary", "fft"]
FROZEN_OR_NOT = ["minimind", "all_r8", "fft_frozen_vocabulary", "all_r8_vocabulary"]
RATED = ["minimind", "all_r8", "all_r8_vocabulary", "fft"]
KEPT = [
    "minimind@1e-4",
    "all_r8@3e-3",
    "all_r8_vocabulary@2e-3",
    "fft@5e-4",
    "fft@1e-3",
    "fft@2e-3",
]
COSTS = ["minimind@1e-4/one_epoch", "minimind@1e-4/ten_epochs", "all_r8@3e-3"]
COSTS += ["all_r8_vocabulary@2e-3", "fft@2e-3"]
KINDS = {"R without ends": "R_no_end", "R": "R"}


def read_rows(kind: str) -> pd.DataFrame:
    """Read the rows of edition1.csv of a kind (base, cell, claim), indexed by base and cell."""
    table = pd.read_csv(RESULTS_DIR / "edition1.csv", dtype={"learning_rate": str})
    table = table[table.kind == kind].assign(tuned=table.tuned.eq(True))
    return table.set_index(["base", "cell"], drop=False).rename_axis([None, None])


def find_main(cells: pd.DataFrame, base: str, arm: str) -> pd.Series | None:
    """Return an arm's 2 epochs at its tuned rate (the study's LoRA: at 1e-4), if they were run."""
    found = cells[(cells.base == base) & (cells.arm == arm) & (cells.variant == "main")]
    found = found[found.learning_rate == "1e-4" if arm == "minimind" else found.tuned]
    return None if found.empty else found.iloc[0]


def pick_main(places: list[tuple[str, str]]) -> pd.DataFrame:
    """Return R without ends (value, low, high) of arms from bases; missing where not run."""
    cells = read_rows("cell")
    found = [find_main(cells, base, arm) for base, arm in places]
    columns = {"value": "R_no_end", "low": "R_no_end_low", "high": "R_no_end_high"}
    rows = [{key: row[name] for key, name in columns.items()} if row is not None else {}
            for row in found]  # fmt: skip
    return pd.DataFrame(rows, columns=[*columns])


def list_rates() -> pd.DataFrame:
    """Return the cells of 4 arms at 1.6M parameters, at every learning rate."""
    cells = read_rows("cell").loc[PLAIN]
    cells = cells[cells.arm.isin(RATED) & (cells.variant == "main")]
    cells = cells[~cells.cell.str.contains("+", regex=False)]
    return cells.assign(rate=cells.learning_rate.astype(float))


def format_interval(row: pd.Series | None, column: str) -> str:
    """Return an estimate with its interval; a dash where it is not known."""
    if row is None or pd.isna(row[column]):
        return "-"
    value, low, high = row[column], row[f"{column}_low"], row[f"{column}_high"]
    return "1" if low == high == 1 else f"{value:.2f} [{low:.2f}, {high:.2f}]"


def format_shares(*shares: float) -> str:
    """Return shares in percent, with dashes where nothing was measured."""
    texts = ["-" if pd.isna(share) else f"{100 * share:.0f}%" for share in shares]
    return "-" if set(texts) == {"-"} else " / ".join(texts)


def name_cell(row: pd.Series) -> str:
    """Return the title of a cell."""
    return ", ".join([ARMS[row.arm], *filter(None, [CONTENT["variants"].get(row.variant)])])


def name_base(base: str) -> str:
    """Return a base by its size and the tokens a parameter that it read."""
    return f"{SIZES[base.partition('-')[0]]['name']}, {CONTENT['bases'][base]}"


def make_headline1() -> pd.DataFrame:
    """Return the README's table: both sizes, from the bases with 20 tokens a parameter."""
    cells, rows = read_rows("cell"), []
    for arm in LADDER:
        pair = [find_main(cells, base, arm) for base in (PLAIN, WHOLE)]

        def pick(column: str, pair: list = pair) -> list[float]:
            return [np.nan if one is None else one[column] for one in pair]

        weights = pick("trainable_parameters")
        whole = [SIZES["xs"]["parameters"], SIZES["s"]["parameters"]]
        rates = dict.fromkeys(rate for rate in pick("learning_rate") if isinstance(rate, str))
        row = {"trained": ARMS[arm], "lr": " / ".join(rates)}
        row["weights"] = format_shares(*np.divide(weights, whole))
        for one, size in zip(pair, ("1.6M", "6.1M"), strict=True):
            also = f" ({one.R:.2f})" if one is not None and one.R < 1 else ""
            row[f"{size}: R without ends (R)"] = format_interval(one, "R_no_end") + also
        row["never end"] = format_shares(*pick("never_end_sampled"))
        rows.append(row | {"correct": format_shares(*pick("correct_sampled"))})
    return pd.DataFrame(rows)


def tabulate_cells(names: list[str]) -> pd.DataFrame:
    """Return a row a cell."""
    rows = [
        {
            "trained": name_cell(row),
            "lr": row.learning_rate,
            "weights": f"{row.trainable_parameters:,.0f}",
            "steps": f"{row.steps:,.0f}",
            "seeds": f"{row.seeds:.0f}",
            "R without ends": format_interval(row, "R_no_end"),
            "R": format_interval(row, "R"),
            "never end": format_shares(row.never_end_greedy, row.never_end_sampled),
        }
        for _, row in read_rows("cell").loc[PLAIN].loc[names].iterrows()
    ]
    return pd.DataFrame(rows)


def tabulate_contrasts(names: dict[str, str]) -> pd.DataFrame:
    """Return differences between cells, of the claims named."""
    claims, rows = read_rows("claim").query("measure == 'difference of R' and R > 0"), []
    for name, title in names.items():
        row = claims[claims.claim == name].iloc[0]
        found = {title: format_interval(row, column) for title, column in KINDS.items()}
        rows.append({"change": title, "base": name_base(row.base), **found})
    return pd.DataFrame(rows)


def tabulate_ladders() -> pd.DataFrame:
    """Return how much R without ends moves with each change, in 2 orders, and when left out."""
    cells = read_rows("cell").loc[PLAIN].R_no_end
    columns = {}
    for title, changes in CONTENT["ladders"].items():
        values = pd.Series([cells[name] for name in changes.values()], index=list(changes))
        steps = values.diff().map("{:+.2f}".format) + values.map(" -> {:.2f}".format)
        steps.iloc[0] = f"{values.iloc[0]:.2f}"
        columns[title] = steps
    whole, *others = (cells[name] for name in CONTENT["left_out"].values())
    lost = [f"{other - whole:+.2f} -> {other:.2f}" for other in others]
    columns["left out"] = pd.Series(lost, index=list(CONTENT["left_out"])[1:])
    table = pd.DataFrame(columns).reindex(list(CONTENT["ladders"]["learning rate first"]))
    return table.rename_axis("change").reset_index()


def tabulate_sizes() -> pd.DataFrame:
    """Return R without ends of some arms from each base."""
    cells, rows = read_rows("cell"), []
    for base in CONTENT["bases"]:
        found = {ARMS[arm]: find_main(cells, base, arm) for arm in FROZEN_OR_NOT}
        texts = {title: format_interval(row, "R_no_end") for title, row in found.items()}
        rows.append({"base": name_base(base), **texts})
    return pd.DataFrame(rows)


def tabulate_shapes() -> pd.DataFrame:
    """Return the embedding's share of the weights, by size."""
    table = pd.DataFrame(SIZES.values())
    shares = CONTENT["vocabulary"] * table.width / table.parameters
    texts = {"size": table["name"], "parameters": table.parameters.map("{:,}".format)}
    return pd.DataFrame(texts | {"embedding's share": shares.map("{:.0%}".format)})


def sum_nats() -> pd.DataFrame:
    """Return nats of the test conversations (odd index) by run: all, and of end tokens."""
    table = read_nll(RESULTS_DIR, 1).query("set == 'general' and part == '' and id != ''")
    columns = ["nats", "end_nats"]
    sums = table.dropna(subset=columns)[columns].map(lambda nats: np.sum(nats[1::2], dtype=float))
    return sums.set_index(table.dropna(subset=columns).id)


def tabulate_ends() -> pd.DataFrame:
    """Return, by base, the end tokens' share of full fine-tuning's gain, and endless answers."""
    cells, nats, rows = read_rows("cell"), sum_nats(), []
    bounds = pd.read_csv(RESULTS_DIR / "bases.csv").set_index("base").reachable_end
    for base in CONTENT["bases"]:
        full = find_main(cells, base, "fft")
        runs = [f"{base}-fft-lr{full.learning_rate}-s{i + 1}" for i in range(int(full.seeds))]
        gain = nats.loc[base] - nats.loc[runs].mean()
        row = {"base": name_base(base), "bound": f"{bounds[base]:.2f}"}
        row["ends' share of the gain"] = format_shares(gain.end_nats / gain.nats)
        for arm in ("all_r8", "all_r8_rows", "all_r8_vocabulary", "fft"):
            one = find_main(cells, base, arm)
            row[ARMS[arm]] = "-" if one is None else format_shares(one.never_end_sampled)
        rows.append(row)
    return pd.DataFrame(rows)


def tabulate_test_tokens() -> pd.DataFrame:
    """Return how many of the test tokens (conversations of odd index) are end tokens."""
    table = read_nll(RESULTS_DIR, 1).query("id == ''").set_index("set")
    tokens, ends = (sum(table[column]["general"][1::2]) for column in ("tokens", "ends"))
    row = {"test tokens": f"{tokens:,}", "end tokens": f"{ends:,}"}
    return pd.DataFrame([row | {"share": f"{ends / tokens:.1%}"}])


def tabulate_kept() -> pd.DataFrame:
    """Return what is learned, and what is forgotten of the pretraining text."""
    cells = read_rows("cell").loc[PLAIN].loc[KEPT]
    table = pd.DataFrame({"trained": cells.apply(name_cell, axis=1), "lr": cells.learning_rate})
    table["NLL of answers"] = cells.nll.map("{:.2f}".format)
    table["R"] = cells.R.map("{:.2f}".format)
    return table.assign(**{"forgotten, nats a token": cells.forgets.map("{:+.2f}".format)})


def tabulate_low_rank() -> pd.DataFrame:
    """Return R of full fine-tuning's update after its linear layers are cut to a rank."""
    cells, rows = read_rows("cell").loc[PLAIN], []
    titles = {"": "embedding and norms whole", "_rest_alike": "embedding and norms cut alike"}
    for rank in (1, 4, 8, 16, 32, 64):
        found = {title: cells.loc[f"fft@2e-3+rank{rank}{end}"] for end, title in titles.items()}
        texts = {title: format_interval(row, "R") for title, row in found.items()}
        rows.append({"rank kept": str(rank), **texts})
    return pd.DataFrame(rows)


def tabulate_costs() -> pd.DataFrame:
    """Return steps, work and memory of some cells, the mean of 3 seeds."""
    cells, runs = read_rows("cell").loc[PLAIN], read_runs(RESULTS_DIR, 1).set_index("id")
    rows = []
    for _, row in cells.loc[COSTS].iterrows():
        variant = "" if row.variant == "main" else f"-{row.variant}"
        names = [f"{PLAIN}-{row.arm}{variant}-lr{row.learning_rate}-s{i}" for i in (1, 2, 3)]
        cost = pd.DataFrame(runs.loc[names].cost.tolist()).mean()
        rows.append(
            {
                "trained": name_cell(row),
                "steps": f"{row.steps:,.0f}",
                "TFLOP": f"{cost.flops / 1e12:.1f}",
                "peak GB": f"{cost.peak_memory_bytes / 1e9:.1f}",
                "training loss": f"{runs.loc[names].train_loss.mean():.2f}",
                "held-out loss": f"{row.nll:.2f}",
            }
        )
    return pd.DataFrame(rows)


def tabulate_verdicts() -> pd.DataFrame:
    """Return every claim with its rule and verdict; claims on the same cells share a row."""
    claims = read_rows("claim").rename(columns={"bad_low": "bad_ratio_low"})
    claims = claims.rename(columns={"bad_high": "bad_ratio_high"}).reset_index(drop=True)
    rows = []
    for (cells, rule), group in claims.groupby(["cell", "rule"], sort=False):
        found = []
        for _, row in group.iterrows():
            column = "bad_ratio" if pd.isna(row.R) else "R"
            interval = format_interval(row, column)
            found.append(f"{row.claim} ({row.base}) {interval}: {row.verdict}")
        rows.append({"cells": f"`{cells}`", "rule": rule, "found": "; ".join(found)})
    return pd.DataFrame(rows)


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
        question = one["prompt"]
        rows.append({"trained": title, f"answer to: {question}": f"`{text}`", "folder": link})
    return pd.DataFrame(rows)


def make_edition1_tables() -> dict[str, list[pd.DataFrame]]:
    """Return the tables of each block of the first edition."""
    blocks = {name: [tabulate_cells(names)] for name, names in CONTENT["tables"].items()}
    blocks |= {
        "ladder1": [tabulate_ladders()],
        "sizes1": [tabulate_sizes(), tabulate_shapes()],
        "ends1": [tabulate_ends(), tabulate_test_tokens()],
        "kept1": [tabulate_kept()],
        "low_rank1": [tabulate_low_rank()],
        "costs1": [tabulate_costs()],
        "verdicts1": [tabulate_verdicts()],
        "answers1": [tabulate_answers()],
    }
    for name, names in CONTENT["contrasts"].items():
        blocks[name].append(tabulate_contrasts(names))
    return blocks
