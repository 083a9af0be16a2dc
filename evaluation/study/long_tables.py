"""The tables of TABLES.md, and those of REPORT.md with a row for each way of training."""

import tomllib
from functools import lru_cache

import numpy as np
import pandas as pd
from matplotlib.ticker import EngFormatter

from dataset.world.checks import KINDS
from evaluation.probe.baselines import tabulate_baselines
from evaluation.probe.judgements import tabulate_judgements
from evaluation.probe.names import list_named_folders
from evaluation.probe.outputs import OUTPUT_DIR
from evaluation.probe.world_measure import tabulate_controls
from evaluation.study.analysis import (
    PLAIN_SKILLS,
    Evidence,
    compute_prompt_shares,
    estimate_gap,
    estimate_share,
    find_tuning_epochs,
    select_reported,
    select_usual,
    tabulate_cells,
    were_asked,
)
from evaluation.study.blocks import (
    Tables,
    block,
    percent,
    read_samples,
    write_gap,
    write_interval,
    write_rate,
    write_share,
)
from evaluation.study.endings import list_endings
from evaluation.study.frontiers import PATH_ARMS, find_frontier, find_paths, list_points
from evaluation.study.names import DECODINGS, OUTCOMES, SIZES
from evaluation.study.settings import RESULTS_DIR
from model.files import REPO_DIR, read_json

OTHER_SETS = ["wordings", "medical", "chinese"]
CELL = ["size", "trained", "rate"]  # columns that name a row
MAIN_ARMS = [
    "study",
    "study_tuned",
    "all_r8",
    "all_r16",
    "all_r32",
    "all_r64",
    "fft_frozen",
    "fft",
]


def label_rows(table: pd.DataFrame) -> pd.DataFrame:
    """Return runs or cells with the columns that tables show: size, trained, rate, weights."""
    is_trained = table.arm != "base"
    rates = table.learning_rate.map(write_rate) + table["mark"]
    return table.assign(
        size=table["size"].map(SIZES),
        trained=table.title,
        rate=rates.where(is_trained, "-"),
        weights=table.fraction.map(percent).where(is_trained, "-"),
    )


@lru_cache(maxsize=2)
def tabulate_reported(evidence: Evidence) -> pd.DataFrame:
    """Return the cells of all reported runs. A row is a cell, outcome and decoding."""
    return tabulate_cells(evidence, select_reported(evidence), list(OUTCOMES))


def spread_shares(cells: pd.DataFrame) -> pd.DataFrame:
    """Return a row a cell, and a column for each set and decoding: percent with its interval."""
    if cells.empty:
        return cells
    sets = cells["set"].replace(OUTCOMES)
    texts = []
    for cell in cells.itertuples():
        texts.append(f"{percent(cell.share)} {write_interval(cell.low, cell.high)}")
    labeled = label_rows(cells).assign(
        column=sets + ", " + cells.decoding.map(DECODINGS),
        text=texts,
        runs=cells.seeds,
    )
    index = [*CELL, "weights", "runs"]
    table = labeled.pivot_table("text", index, "column", aggfunc="first", sort=False)
    return table.reset_index()


# ------------------------------------------------------------------------------------------- shares


@block("shares")
def tabulate_shares(evidence: Evidence) -> Tables:
    """Return composition, plain questions and unseen things. A row is a cell."""
    return [spread_shares(tabulate_reported(evidence))]


@block("other_sets")
def tabulate_other_sets(evidence: Evidence) -> Tables:
    """Return the shares of the other sets. A row is a cell."""
    reported = select_reported(evidence)
    were_all_asked = reported.outcomes.map(lambda outcomes: set(OTHER_SETS) <= set(outcomes))
    cells = tabulate_cells(evidence, reported[were_all_asked.astype(bool)], OTHER_SETS)
    return [spread_shares(cells)]


@block("parts")
def tabulate_parts(evidence: Evidence) -> Tables:
    """Return the shares of models of which a part is the base's again. A row is a cell."""
    reported = set(select_reported(evidence).id)
    wholes = evidence.runs.id.str.split("@").str[0]
    parts = evidence.runs[evidence.runs.part.notna() & wholes.isin(reported)]
    return [spread_shares(tabulate_cells(evidence, parts, list(OUTCOMES)))]


@block("other_rates")
def tabulate_other_rates(evidence: Evidence) -> Tables:
    """Return the shares at learning rates that were not chosen, where all sets were asked."""
    usual = select_usual(evidence)
    is_other = usual.arm.isin(MAIN_ARMS) & ~usual.id.isin(select_reported(evidence).id)
    others = usual[is_other & were_asked(usual, "unseen")]
    cells = tabulate_cells(evidence, others, list(OUTCOMES))
    return [spread_shares(cells)]


@block("kinds")
def tabulate_kinds(evidence: Evidence) -> Tables:
    """Return shares of each kind of answer, greedy / sampled. A row is a cell and an outcome."""
    cells = tabulate_reported(evidence)
    if cells.empty:
        return [cells]
    labeled = label_rows(cells).assign(outcome=cells["set"].map(OUTCOMES))
    shown = labeled.rename(columns={"above_chance": "above chance"})
    texts = shown[[*KINDS, "above chance"]].map("{:z.0%}".format)
    places = shown[[*CELL, "outcome"]]
    # A row is a cell, an outcome and a decoding before this, a cell and an outcome after it.
    groups = places.join(texts).groupby([*CELL, "outcome"], sort=False)
    return [groups.agg(" / ".join).reset_index()]


# ---------------------------------------------------------------------------------- sizes and rates

TEXT_TOKENS = 15.5e6  # that a base read, with its chat tokens
SHAPE_TITLES = {
    "hidden_size": "width",
    "num_hidden_layers": "layers",
    "num_attention_heads": "heads",
    "intermediate_size": "MLP",
}


@block("sizes")
def tabulate_sizes(evidence: Evidence) -> Tables:
    """Return the shapes of the models and how long they train. A row is a size."""
    rows = []
    for size, title in SIZES.items():
        settings = evidence.study.sizes[size]
        base = evidence.find_cell("base", size)
        parameters = base.parameters.mean()
        row = {"size": title, "code": f"`{size}`"}
        row |= {title: str(settings.shape[name]) for name, title in SHAPE_TITLES.items()}
        row["parameters"] = None if base.empty else f"{parameters:,.0f}"
        row["tokens read a parameter"] = None if base.empty else f"{TEXT_TOKENS / parameters:.2g}"
        row["epochs"] = f"{settings.epochs:g}"
        row["rates compared after"] = f"{settings.tuning_epochs:g}"
        row["runs planned"] = str(len(settings.seeds))
        rows.append(row)
    return [pd.DataFrame(rows)]


@block("rates")
def tabulate_rates(evidence: Evidence) -> Tables:
    """Return correct answers of the tuning half by learning rate, the reported rate in bold.

    A row is a size, a method and the number of epochs after which its rates were compared. The
    second table has runs that gave no result.
    """
    usual = select_usual(evidence)
    tuned = usual[usual.seed == 1].sort_values("learning_rate")
    rows = []
    for arm in evidence.study.arms:
        for size in SIZES:
            runs = tuned[(tuned.arm == arm) & (tuned["size"] == size)]
            if size in evidence.study.arms[arm].rates:
                rows += list_sweeps(evidence, size, arm, runs)
    is_lost = evidence.runs.status != "completed"
    lost = evidence.runs.loc[is_lost, ["id", "status"]]
    return [pd.DataFrame(rows)] if lost.empty else [pd.DataFrame(rows), lost]


def list_sweeps(evidence: Evidence, size: str, arm: str, runs: pd.DataFrame) -> list[dict]:
    """Return a row for each number of epochs after which an arm's rates ran."""
    tuning_epochs = find_tuning_epochs(evidence.study, size, arm)
    reported = evidence.find_cell(arm, size)
    mark = "" if reported.empty else reported.iloc[0]["mark"]
    rows = []
    for epochs, group in runs.groupby("epochs"):
        is_judged = epochs == tuning_epochs
        if len(group) < 2 and not is_judged:
            continue
        texts = []
        for run in group.itertuples():
            text = f"{write_rate(run.learning_rate)}: {percent(run.tune_correct)}"
            is_reported = is_judged and "*" not in run.cell
            texts.append(f"**{text}**{mark}" if is_reported else text)
        row = {"size": SIZES[size], "trained": evidence.study.arms[arm].title}
        row["epochs"] = f"{epochs:g}"
        row["rates are chosen here"] = "yes" if is_judged else "no"
        row["rate: correct"] = ", ".join(texts)
        rows.append(row)
    return rows


# ----------------------------------------------------------------------------------- skills, by row

GROUPS = dict.fromkeys(["reading_who", "remember", "repeat", "swap"], "prompt names")
GROUPS |= dict.fromkeys(["add_item", "reverse_list"], "list edits")
GROUPS |= dict.fromkeys(PLAIN_SKILLS, "plain questions")
OTHER_GROUP = "other composition"
GROUP_HEADS = ["composition", "prompt names", "list edits", OTHER_GROUP, "plain questions"]


def share_by_skill(evidence: Evidence, runs: pd.DataFrame, half: str = "test") -> pd.DataFrame:
    """Return correct combinations, greedy / sampled. A row is a group or a skill, a column a cell.

    The tuning half is greedy alone. Skills are in the order of their mean, the hardest first.
    """
    prompts = evidence.choose_prompts("combinations", half)
    groups = prompts.skill.map(GROUPS).fillna(OTHER_GROUP)
    is_composition = groups != "plain questions"
    columns = {}
    for names, seeds in label_rows(runs).groupby(CELL, sort=False):
        for decoding in DECODINGS if half == "test" else ["greedy"]:
            prompt_shares = compute_prompt_shares(seeds, prompts, decoding).mean(axis=0)
            shares = pd.Series(prompt_shares, prompts.index)
            head = pd.Series({"composition": shares[is_composition].mean()})
            by_group = shares.groupby(groups).mean()
            by_skill = shares.groupby(prompts.skill).mean()
            columns[", ".join(names), decoding] = pd.concat([head, by_group, by_skill])
    table = pd.DataFrame(columns)  # a column is a cell and a decoding
    by_hardness = table.drop(GROUP_HEADS, errors="ignore").mean(axis=1).sort_values(kind="stable")
    texts = table.reindex([*GROUP_HEADS, *by_hardness.index]).map(percent)
    joined = texts.T.groupby(level=0, sort=False).agg(" / ".join).T  # a column is a cell
    counts = pd.concat([groups, prompts.skill]).value_counts()
    counts["composition"] = is_composition.sum()
    counts = counts.reindex(joined.index).fillna(0)
    joined.insert(0, "prompts", counts.map("{:,.0f}".format))
    return joined.rename_axis("skill")


def show_groups(evidence: Evidence, runs: pd.DataFrame, half: str = "test") -> pd.DataFrame:
    """Return correct combinations by groups of skills. A row is a cell, a column a group."""
    if runs.empty:
        return pd.DataFrame()
    by_skill = share_by_skill(evidence, runs, half)
    return by_skill.loc[GROUP_HEADS].T.rename_axis("trained, rate").reset_index()


@block("groups")
def tabulate_groups(evidence: Evidence) -> Tables:
    """Return correct combinations by groups of skills, main methods. A row is a cell."""
    reported = select_reported(evidence)
    return [show_groups(evidence, reported[reported.usual.isin(MAIN_ARMS)])]


@block("tuning_groups")
def tabulate_tuning_groups(evidence: Evidence) -> Tables:
    """Return the tuning half by groups of skills, seed 1. A row is a rate of a main method."""
    usual = select_usual(evidence)
    is_main = usual.arm.isin(MAIN_ARMS) & (usual.arm != "study") & (usual.seed == 1)
    asked = usual[is_main & usual.outcomes.astype(bool)]
    by_length = asked.sort_values(["size", "epochs"], ascending=[False, True], kind="stable")
    return [show_groups(evidence, by_length, "tune")]


@block("skills")
def tabulate_skills(evidence: Evidence) -> Tables:
    """Return correct combinations of all reported runs by groups, then of main methods by skill.

    In the first table a cell of several runs has a row for each run, too.
    """
    reported = select_reported(evidence)
    if reported.empty:
        return [reported]
    counts = reported.groupby(["size", "cell"]).seed.transform("nunique")
    single = reported[counts > 1]
    seeds = single.seed.map(", seed {}".format).astype(str)
    single = single.assign(title=single.title + seeds)
    main = reported[reported.usual.isin(MAIN_ARMS)]
    by_group = show_groups(evidence, pd.concat([reported, single]))
    return [by_group, share_by_skill(evidence, main).reset_index()]


@block("checkpoints")
def tabulate_checkpoints(evidence: Evidence) -> Tables:
    """Return the kept checkpoints of 1.3M by groups of skills, seed 1. A row is a checkpoint."""
    paths = pd.concat([find_paths(evidence, arm) for arm in PATH_ARMS])
    firsts = paths[paths.seed == 1]
    steps = firsts.step.map(", step {:,.0f}".format).astype(str)
    titles = firsts.title + steps
    return [show_groups(evidence, firsts.assign(title=titles))]


# ---------------------------------------------------------------------------------------- frontiers


@block("frontiers")
def tabulate_frontiers(evidence: Evidence) -> Tables:
    """Return the best share of unseen things by level of composition, 1.3M. A row is a level."""
    paths = [find_paths(evidence, arm) for arm in PATH_ARMS]
    levels = np.arange(8, 20) / 20
    return [show_frontiers(evidence, pd.concat(paths), ("composition", "unseen"), levels)]


@block("harm")
def tabulate_harm(evidence: Evidence) -> Tables:
    """Return the best composition by level of medical answers, 1.3M. A row is a level."""
    paths = [find_paths(evidence, arm, start="fft", data="medical") for arm in PATH_ARMS]
    levels = np.arange(4, 20) / 20
    return [show_frontiers(evidence, pd.concat(paths), ("medical", "composition"), levels)]


def show_frontiers(
    evidence: Evidence, paths: pd.DataFrame, sets: tuple[str, str], levels: np.ndarray
) -> pd.DataFrame:
    """Return frontiers in percent, a column a method and decoding.

    Of levels with the same shares only the highest has a row.
    """
    columns = {}
    for decoding, decoding_title in DECODINGS.items():
        points = list_points(evidence, paths, sets, decoding)
        for arm in PATH_ARMS:
            arm_points = points[points.arm == arm]
            if arm_points.empty:
                continue
            frontier = pd.Series(find_frontier(arm_points, levels))
            title = f"{evidence.study.arms[arm].title}, {decoding_title}"
            columns[title] = frontier.map(percent, na_action="ignore")
    table = pd.DataFrame(columns)
    if table.empty:
        return table
    named = table.set_index(pd.Index(levels, name="level").map(percent))
    reached = named.dropna(how="all")
    return reached[~reached.duplicated(keep="last")].reset_index()


# ------------------------------------------------------------------------------- costs and the rest


@block("costs")
def tabulate_costs(evidence: Evidence) -> Tables:
    """Return likelihood and cost, means over runs. A row is a cell."""
    reported = select_reported(evidence)
    if reported.empty:
        return [reported]
    forms = {
        "test_nll": ("NLL", "{:.2f}".format),
        "nll_text": ("text NLL", "{:.2f}".format),
        "steps": ("steps", "{:,.0f}".format),
        "peak_memory_bytes": ("memory", EngFormatter("B", places=0)),
    }
    means = label_rows(reported).groupby(CELL, sort=False)[list(forms)].mean()
    texts = {title: means[column].map(form) for column, (title, form) in forms.items()}
    return [pd.DataFrame(texts).reset_index()]


@block("all_facts")
def tabulate_all_facts(evidence: Evidence) -> Tables:
    """Return facts ranked first on new combinations and unseen things. A row is a cell."""
    reported = select_reported(evidence)
    if reported.empty:
        return [reported]
    columns = {"facts_combinations": "new combinations", "facts_unseen": "unseen things"}
    means = label_rows(reported).groupby(CELL, sort=False)[list(columns)].mean()
    return [means.map(percent).rename(columns=columns).reset_index()]


@block("precision")
def tabulate_precision(evidence: Evidence) -> Tables:
    """Return which runs of 25M multiplied in which precision. A row is a cell and a precision."""
    reported = select_reported(evidence)
    largest = reported[(reported["size"] == "m26") & (reported.arm != "base")]
    if largest.empty:
        return [largest]
    groups = label_rows(largest).groupby([*CELL, "dtype"], sort=False).seed
    seeds = groups.agg(lambda column: ", ".join(column.map(str)))
    return [seeds.rename("seeds").reset_index().rename(columns={"dtype": "precision"})]


@block("capacity")
def tabulate_capacity(evidence: Evidence) -> Tables:
    """Return random facts learned, means over runs. A row is a cell."""
    runs = evidence.final[evidence.final.data.str.startswith("facts")]
    if runs.empty:
        return [runs]
    columns = ["trainable_parameters", "bits_per_parameter", "stored"]
    means = label_rows(runs).groupby("trained", sort=False)[columns].mean().round(2)
    return [means.convert_dtypes().reset_index()]


@block("endings")
def tabulate_endings(evidence: Evidence) -> Tables:
    """Return the bound of the end token and the share of endless answers. A row is a base."""
    table = list_endings(evidence)
    return [
        table.assign(
            bound=table.bound.map("{:.3f}".format),
            endless=table.endless.map(percent),
        )
    ]


@block("free")
def tabulate_free_wording(evidence: Evidence) -> Tables:
    """Return correct greedy answers to the prompts by hand. A row is a model and way of asking.

    Models that were asked an earlier prompt file have a table of their own.
    """
    rows: dict[bool, list[dict[str, str]]] = {False: [], True: []}  # by whether that file was asked
    for folder, model in list_named_folders(OUTPUT_DIR):
        samples = read_samples(folder)
        greedy = samples[samples.decoding == "greedy"]
        is_correct = greedy.outcome == "correct"
        size, _, _ = model["name"].partition("-")
        way = folder.name.removeprefix(model["name"]).replace("-", " ").strip()
        row = {"size": size, "trained": model["title"], "asked": way or "as it was trained"}
        for section, marks in is_correct.groupby(greedy.section, sort=False):
            row[section] = f"{marks.sum()} of {len(marks)}"
        rows["Trained forms" not in row].append(row)
    return [pd.DataFrame(group) for group in rows.values() if group]


@block("controls")
def tabulate_all_controls(evidence: Evidence) -> Tables:
    """Return how often answers that follow no instruction are correct. A row is a control."""
    return [tabulate_controls(), tabulate_baselines(), tabulate_judgements()]


@block("edition1")
def tabulate_edition1(evidence: Evidence) -> Tables:
    """Return the first edition, both sizes side by side. A row is a method."""
    table = pd.read_csv(RESULTS_DIR / "edition1.csv", dtype={"learning_rate": str})
    cells = table[table.kind == "cell"].set_index(["base", "cell"], drop=False)
    layout = tomllib.loads((RESULTS_DIR / "edition1.toml").read_text(encoding="utf-8"))
    sizes = pd.DataFrame(layout["sizes"]).T
    rows = []
    for title, names in layout["rows"].items():
        places = zip(sizes.index, names, strict=True)
        chosen = cells.loc[[(base, name) for base, name in places if name]]
        pair = chosen.set_index("base").reindex(sizes.index)  # a row is a size
        rows.append(describe_first_edition(title, pair, sizes))
    return [pd.DataFrame(rows)]


def describe_first_edition(title: str, pair: pd.DataFrame, sizes: pd.DataFrame) -> dict[str, str]:
    """Return a row of the first edition's table; `pair` has a row a size."""
    row = {"trained": title, "rate": " / ".join(pair.learning_rate.dropna().unique())}
    weights = pair.trainable_parameters / sizes.parameters
    row["weights"] = join_percent(weights)
    for base, size in sizes["name"].items():
        cell = pair.loc[base]
        text = "{R_no_end:.2f} [{R_no_end_low:.2f}, {R_no_end_high:.2f}] ({R:.2f})"
        if pd.isna(cell.R):
            row[f"{size}: R without ends (R)"] = "-"
        elif cell.R == 1:  # full fine-tuning, by definition
            row[f"{size}: R without ends (R)"] = "1"
        else:
            row[f"{size}: R without ends (R)"] = text.format_map(cell)
    row["never end"] = join_percent(pair.never_end_sampled)
    row["correct"] = join_percent(pair.correct_sampled)
    return row


def join_percent(shares: pd.Series) -> str:
    """Write the shares of both sizes, with a dash where one is missing."""
    texts = ["-" if pd.isna(share) else percent(share) for share in shares]
    return "-" if set(texts) == {"-"} else " / ".join(texts)


@block("speed")
def tabulate_speed(evidence: Evidence) -> Tables:
    """Return the tables of `bench.py`, each with its processor."""
    tables = []
    for path in sorted(REPO_DIR.glob("evaluation/bench/*.json")):
        result = read_json(path)
        machine = result["machine"]
        place = f"{machine['processor']}, {machine['threads']} threads, {result['dtype']}"
        for rows in result["tables"].values():
            table = pd.DataFrame(rows)
            numbers = table.select_dtypes(float).map("{:,.2f}".format, na_action="ignore")
            table = table.assign(**numbers).replace({"size": SIZES})
            table.insert(0, "processor", place)
            tables.append(table)
    return tables


# --------------------------------------------------------------------------- estimates, over skills

CONTRASTS = [  # an arm, or two whose difference is meant
    ("all_r8",),
    ("all_r64",),
    ("fft",),
    ("fft", "all_r8"),
    ("fft", "all_r16"),
    ("fft", "all_r32"),
    ("fft", "all_r64"),
    ("fft_frozen", "all_r8"),
    ("fft_frozen", "fft"),
    ("all_r64", "all_r8"),
    ("all_r8_vocabulary", "all_r8"),
    ("all_r8", "square_r36"),
    ("study_tuned", "study"),
]


@block("contrasts")
def tabulate_contrasts(evidence: Evidence) -> Tables:
    """Return composition and differences of it, by what the intervals draw.

    A row is a size, an arm or a difference, and a decoding.
    """
    prompts = evidence.choose_prompts("composition")
    views = {
        "over prompts": prompts,
        "over skills": prompts.assign(cluster=prompts.skill),
        "tuning half": evidence.choose_prompts("composition", "tune"),
    }
    rows = []
    for size, size_title in SIZES.items():
        for arms in CONTRASTS:
            cells = [evidence.find_cell(arm, size) for arm in arms]
            titles = [evidence.study.arms[arm].title for arm in arms]
            for decoding, decoding_title in DECODINGS.items():
                row = {"size": size_title, "composition": " - ".join(titles)}
                row["answers"] = decoding_title
                for title, view in views.items():
                    row[title] = write_contrast(cells, view, decoding)
                if row["over prompts"]:
                    rows.append(row)
    return [pd.DataFrame(rows)]


def write_contrast(cells: list[pd.DataFrame], prompts: pd.DataFrame, decoding: str) -> str | None:
    """Write the share of one cell, or how far the first of two lies above the second."""
    if len(cells) == 1:
        share = estimate_share(cells[0], prompts, decoding)
        return write_share(share) if share else None
    gap = estimate_gap(*cells, prompts, decoding)
    return write_gap(gap) if gap else None


@block("forecasts")
def tabulate_forecasts(evidence: Evidence) -> Tables:
    """Return what was predicted before a run and what was found. A row is a run."""
    table = pd.read_csv(RESULTS_DIR / "forecasts.csv")
    shown = table.assign(
        predicted=table.measure + " " + table.predicted.map("{:g}".format),
        found=table.found.map("{:g}".format),
    )
    # A row is a forecast before this, a run with all its forecasts after it.
    runs = shown.groupby(["date", "size", "run"], sort=False)
    return [runs[["predicted", "found"]].agg("; ".join).reset_index()]
