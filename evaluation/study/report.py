"""Write tables and figures of README.md, REPORT.md and TABLES.md from the committed results.

    python evaluation/study/report.py      # or: make report

A block stands between `<!-- study:NAME -->` and `<!-- /study:NAME -->`: the figure of this name, if
it has one, and its tables. A second call changes nothing.
"""

import os
import re
import sys
import tomllib
from collections.abc import Iterator
from functools import partial
from itertools import product
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import numpy as np
import pandas as pd
from matplotlib.ticker import EngFormatter

from dataset.world.checks import KINDS
from evaluation.probe.outputs import OUTPUT_DIR, escape_markdown
from evaluation.probe.world_measure import tabulate_controls
from evaluation.study import analysis, claims, figures
from evaluation.study.analysis import Evidence, load_evidence, select_reported, tabulate_cells
from evaluation.study.claims import LEVELS, PATH_ARMS, list_endings, trace_frontiers
from evaluation.study.figures import DECODING_TITLES, FIGURES, MAIN_SETS, select_arms
from evaluation.study.settings import MAIN_BASE, RESULTS_DIR, Condition
from model.files import REPO_DIR, UserError, make_parser, read_json, run_script, write_text

FILES = ("README.md", "evaluation/REPORT.md", "evaluation/study/TABLES.md")
BLOCK = re.compile(r"<!-- study:(\w+) -->\n.*?<!-- /study:\1 -->", re.DOTALL)
HARM = {"size": "xs", "sets": ("medical", "combinations"), "start": "fft", "data": "medical"}
HARM |= {"levels": np.arange(4, 20) / 20}  # options of `trace_frontiers`
NAMING, EDITING = ["reading_who", "remember", "repeat", "swap"], ["add_item", "reverse_list"]
PLAIN = ["how", "kind", "known_for", "look", "nation", "nature", "used_for", "where", "who"]
GROUPS = dict.fromkeys(NAMING, "prompt names") | dict.fromkeys(PLAIN, "plain questions")
GROUPS |= dict.fromkeys(EDITING, "list edits")
HEADS = ["all prompts", *dict.fromkeys(GROUPS.values()), "other skills"]
SHORT = {"LoRA on all linear layers, ": "LoRA ", "full fine-tuning": "FFT"}  # titles by groups
CONTRASTS = "all_r8 all_r64 fft fft-all_r8 fft-all_r64 all_r64-all_r8 all_r8_vocabulary-all_r8"
CONTRASTS += " fft-all_r16 fft-all_r32 all_r8-square_r36 study_tuned-study"  # cells, differences
CELL = ["size", "trained", "rate"]
CAPACITY = ["trainable_parameters", "bits_per_parameter", "stored"]
COSTS = {  # column of the runs -> title and form; known facts are asked for without a question
    "facts_combinations": ("facts known, combinations", "{:.0%}".format),
    "facts_unseen": ("facts known, unseen", "{:.0%}".format),
    "test_nll": ("NLL", "{:.2f}".format),
    "nll_text": ("text NLL", "{:.2f}".format),
    "steps": ("steps", "{:,.0f}".format),
    "peak_memory_bytes": ("memory", EngFormatter("B", places=0)),
}


def to_table(frame: pd.DataFrame) -> str:
    """Return a data frame as a Markdown table; a dash where nothing was measured."""
    if frame.empty:
        return "Not run yet."
    text = frame.astype(object).fillna("-").to_markdown(index=False, disable_numparse=True)
    return re.sub(r"-{3,}", "---", re.sub(r" +\|", " |", text))  # without padding


def tabulate_rates(evidence: Evidence) -> pd.DataFrame:
    """Return the share correct on the tuning half by learning rate, the best rate in bold."""
    rows = []
    for (size, arm), sweep in evidence.sweeps.items():
        texts = []
        for rate, share in sweep.shares.items():
            text = f"{rate:g}: " + ("diverged" if np.isnan(share) else f"{share:.0%}")
            texts.append(f"**{text}**" if [rate] == sweep.reported else text)
        rows += [(size, evidence.study.arms[arm].title, ", ".join(texts))] if texts else []
    return pd.DataFrame(rows, columns=["size", "trained", "rate: correct"])


def tabulate_shares(cells: pd.DataFrame) -> pd.DataFrame:
    """Return a row a cell, and a column for each set and decoding: percent correct."""
    column, index = cells["set"] + ", " + cells.decoding.map(DECODING_TITLES), [*CELL, "weights"]
    cells, how = cells.assign(column=column), {"aggfunc": "first", "sort": False}
    return cells.pivot_table("text", [*index, "seeds"], "column", **how).reset_index()


def tabulate_sizes(cells: pd.DataFrame) -> pd.DataFrame:
    """Return a row an arm, a column a set and size: greedy (a star at 1 seed) / sampled."""
    text = (cells.text + np.where(cells.seeds == 1, "*", "")).astype(object)
    text = text.where(cells.decoding == "greedy", cells.share.map("{:.0%}".format))
    trained = cells.trained.replace(SHORT | {", preliminary": ""}, regex=True)
    cells, how = cells.assign(text=text, trained=trained), {"aggfunc": " / ".join, "sort": False}
    table = cells.pivot_table("text", "trained", ["set", "size"], **how)
    table = table if table.empty else table.reindex(MAIN_SETS, axis=1, level="set")
    return table.set_axis(table.columns.map(", ".join), axis=1).reset_index()


def tabulate_frontiers(evidence: Evidence, **options: str | tuple | np.ndarray) -> pd.DataFrame:
    """Return the best shares of the second set, in percent, by the highest level that has them."""
    columns = {}
    for decoding, title in DECODING_TITLES.items():
        for arm, shares in trace_frontiers(evidence, decoding, PATH_ARMS, **options).items():
            texts = ["-" if np.isinf(one) else f"{one:.0%}" for one in shares[0]]
            columns[f"{evidence.study.arms[arm].title}, {title}"] = texts
    levels = pd.Index(options.get("levels", LEVELS), name="level")
    table = pd.DataFrame(columns, levels.map("{:.0%}".format))
    is_kept = table.ne("-").any(axis=1) | (np.arange(len(table)) == 0)
    return table if table.empty else table[is_kept].drop_duplicates(keep="last").reset_index()


def tabulate_skills(evidence: Evidence, runs: pd.DataFrame, half: str = "test") -> pd.DataFrame:
    """Return correct combinations (test half: greedy / sampled): groups, then skills by mean."""
    prompts, shares = evidence.choose_prompts("combinations", half), {}
    groups = prompts.skill.map(GROUPS).fillna("other skills")
    decodings = [*DECODING_TITLES] if half == "test" else ["greedy"]
    for (row, seeds), decoding in product(label_rows(runs).groupby(CELL, sort=False), decodings):
        marks = pd.Series(analysis.mark_answers(seeds, prompts, decoding).mean(0), prompts.index)
        parts = [marks.groupby(by).mean() for by in (groups, prompts.skill)]
        shares[", ".join(row), decoding] = pd.concat([pd.Series({HEADS[0]: marks.mean()}), *parts])
    table = pd.DataFrame(shares)
    order = table.drop(HEADS, errors="ignore").mean(axis=1).sort_values(kind="stable").index
    table = table.reindex([*HEADS, *order]).map("{:.0%}".format)
    table = table.T.groupby(level=0, sort=False).agg(" / ".join).T
    table.insert(0, "prompts", pd.concat([prompts.skill, groups]).value_counts().astype("Int64"))
    return table.rename_axis("skill").reset_index()


def tabulate_contrasts(evidence: Evidence, runs: pd.DataFrame) -> pd.DataFrame:
    """Return estimates by size and decoding: all prompts, then as `views` says."""
    prompts, rows, condition = evidence.choose_prompts("combinations"), [], Condition(estimates=[])
    views = {"over prompts": prompts, "over skills": prompts.assign(cluster=prompts.skill)}
    views["without names, list edits"] = prompts[~prompts.skill.isin([*NAMING, *EDITING])]
    views["tuning half"] = evidence.choose_prompts("combinations", "tune")
    sizes, decodings = runs.groupby("size", sort=False), DECODING_TITLES
    for (size, group), words, decoding in product(sizes, CONTRASTS.split(), decodings):
        names, arms = group.set_index("usual").cell.to_dict(), words.split("-")
        place = " - ".join(names.get(arm, "none") for arm in arms), size, decoding
        found = [analysis.estimate_sum(evidence, condition, place, v) for v in views.values()]
        if None not in found:  # else a cell was not run, or they share no seed
            rows.append((size, place[0], decodings[decoding], *(str(one) for one, _ in found)))
    return pd.DataFrame(rows, columns=["size", "estimate", "decoding", *views])


def read_answers(evidence: Evidence, place: Path, suffix: str = "") -> Iterator[pd.DataFrame]:
    """Read the saved answers of every completed run that has a folder of this name there."""
    for run in evidence.final.itertuples():
        if (path := place / (run.id + suffix) / "samples.jsonl").is_file():
            table = pd.read_json(path, lines=True, dtype=False)
            yield table.assign(trained=f"{run.size}, {run.title}")


def tabulate_answers(evidence: Evidence) -> pd.DataFrame:
    """Return answers to prompts of the tuning half: a column an arm, wrong ones with their kind."""
    columns = {}
    for table in read_answers(evidence, RESULTS_DIR / "answers", "-probe_combinations_tune"):
        kinds = (" *(" + table.outcome + ")*").where(table.outcome != "correct", "")
        columns |= {"prompt": table.prompt.map(escape_markdown)}
        columns |= {table.trained[0]: table.output.map(escape_markdown) + kinds}
    return pd.DataFrame(columns)


def tabulate_free_wording(evidence: Evidence) -> pd.DataFrame:
    """Return correct greedy answers to the prompts in free wording: a row an arm, by section."""
    rows = []
    for table in read_answers(evidence, OUTPUT_DIR):
        greedy = table[table.decoding == "greedy"]
        groups = greedy.outcome.eq("correct").groupby(greedy.section, sort=False)
        texts = groups.agg(lambda v: f"{v.sum()} of {len(v)}")
        rows.append({"trained": table.trained[0]} | texts.to_dict())
    return pd.DataFrame(rows)


def tabulate_edition1() -> pd.DataFrame:
    """Return a row an arm of the first edition, both sizes side by side."""
    table = pd.read_csv(RESULTS_DIR / "edition1.csv", dtype={"learning_rate": str})
    cells = table.query("kind == 'cell'").set_index(["base", "cell"], drop=False)
    layout = tomllib.loads((RESULTS_DIR / "edition1.toml").read_text(encoding="utf-8"))
    rows, sizes = [], pd.DataFrame(layout["sizes"]).T
    for title, names in layout["rows"].items():
        chosen = [(base, name) for base, name in zip(sizes.index, names, strict=True) if name]
        pair = cells.loc[chosen].set_index("base").reindex(sizes.index)
        row = {"trained": title, "lr": " / ".join(pair.learning_rate.dropna().unique())}
        pair["weights"] = pair.trainable_parameters / sizes.parameters
        percent = pair[["weights", "never_end_sampled", "correct_sampled"]].astype(float)
        texts = percent.map(lambda x: "-" if pd.isna(x) else f"{x:.0%}").agg(" / ".join)
        row["weights"], *others = texts.replace("- / -", "-")
        for base, size in sizes["name"].items():
            one = pair.loc[base]
            text = "{R_no_end:.2f} [{R_no_end_low:.2f}, {R_no_end_high:.2f}] ({R:.2f})"
            text = "-" if pd.isna(one.R) else "1" if one.R == 1 else text.format_map(one)
            row[f"{size}: R without ends (R)"] = text  # 1 is FFT
        rows.append(row | dict(zip(("never end", "correct"), others, strict=True)))
    return pd.DataFrame(rows)


def tabulate_speed(root: Path) -> list[pd.DataFrame]:
    """Return the tables of `bench.py`, each with its processor."""
    tables = []
    for result in map(read_json, sorted(root.glob("evaluation/bench/*.json"))):
        machine = f"{result['machine']['processor']}, {result['machine']['threads']} threads"
        for table in map(pd.DataFrame, result["tables"].values()):
            numbers = table.select_dtypes(float).map("{:,.2f}".format, na_action="ignore")
            texts = table.assign(processor=f"{machine}, {result['dtype']}", **numbers)
            tables.append(texts[["processor", *table]])
    return tables


def label_rows(table: pd.DataFrame) -> pd.DataFrame:
    """Return runs or cells with the columns that tables show."""
    rates = table.learning_rate.map("{:g}".format).where(table.arm != "base", "-")
    weights = table.fraction.map("{:.0%}".format).where(table.arm != "base", "-")
    names = {"title": "trained", "above_chance": "above chance"}
    return table.rename(columns=names).assign(rate=rates, weights=weights)


def make_tables(evidence: Evidence, cells: pd.DataFrame) -> dict[str, list[pd.DataFrame]]:
    """Return the tables of every block by its name."""
    verdicts, estimates = claims.judge_claims(evidence)
    estimates["estimates"] = estimates.estimate + ": " + estimates.value.map(str)
    estimates = estimates.groupby(["claim", "size", "decoding", "bases"], sort=False)["estimates"]
    estimates = estimates.agg("; ".join).reset_index()
    lost = evidence.runs.query("status != 'completed'")[["id", "status"]]
    endings = list_endings(evidence)
    endings["bound"] = endings.bound.map("{:.3f}".format)
    endings["endless"] = endings.endless.map("{:.0%}".format)
    tables = {"claims": [verdicts], "estimates": [estimates], "endings": [endings]}
    tables |= {"rates": [tabulate_rates(evidence)] + [lost] * (not lost.empty)}
    tables |= {"gates": [claims.judge_gates(evidence)], "keeping": [tabulate_frontiers(evidence)]}
    facts = label_rows(evidence.final[evidence.final.data.str.startswith("facts")])
    facts = facts.groupby("trained", sort=False)[CAPACITY].mean().round(2).convert_dtypes()
    tables |= {"harm": [tabulate_frontiers(evidence, **HARM)], "capacity": [facts.reset_index()]}
    tables |= {"free": [tabulate_free_wording(evidence)], "headline": [], "ladder": []}
    answers = tabulate_answers(evidence)
    tables |= {"answers": [answers[:1]], "ten_answers": [answers[:10]]}
    empty = "arms shares other_sets kinds costs parts skills sizes groups steps contrasts"
    tables |= dict.fromkeys(empty.split(), [pd.DataFrame()])
    if cells.empty:
        return tables
    cells, reported = label_rows(cells), select_reported(evidence)
    is_reported = evidence.runs.id.str.partition("@")[0].isin(reported.id)
    parts = evidence.runs[evidence.runs.part.notna() & is_reported]
    if not parts.empty:
        tables["parts"] = [tabulate_shares(label_rows(tabulate_cells(evidence, parts)))]
    kinds = select_arms(cells, figures.LADDER.split()).groupby([*CELL, "set"], sort=False)
    kinds = kinds[[*KINDS, "above chance"]].agg(lambda v: " / ".join(map("{:z.0%}".format, v)))
    means = label_rows(reported).groupby(CELL, sort=False)[[*COSTS]].mean()
    costs = pd.DataFrame({title: means[name].map(form) for name, (title, form) in COSTS.items()})
    rule = f"data == 'sft' & arm != 'study' & arm in {figures.HEADLINE}"
    main = evidence.final[evidence.final.base.str.endswith(MAIN_BASE)].query(rule)
    main = main[main.outcomes.astype(bool)].sort_values(["size", "epochs"], ascending=[False, True])
    paths = pd.concat(claims.find_paths(evidence, arm) for arm in PATH_ARMS).query("seed == 1")
    paths = paths.assign(title=paths.title + paths.step.map(", step {:,.0f}".format))
    several = reported[reported.groupby(["size", "cell"]).seed.transform("nunique") > 1]
    several = several.assign(title=several.title + several.seed.map(", seed {}".format))
    seeds = pd.concat([reported, several])
    groups = {"groups": (main.query("seed == 1"), "tune"), "skills": (seeds,), "steps": (paths,)}
    groups |= {"sizes": (reported.query("usual in @figures.HEADLINE"),)}
    for name, options in groups.items():
        table = tabulate_skills(evidence, *options).set_index("skill").loc[HEADS].T
        tables[name] = [table.rename_axis("trained, rate").reset_index().replace(SHORT, regex=True)]
    others = main[~main.id.isin(reported.id) & main.outcomes.map(lambda found: "unseen" in found)]
    if not others.empty:
        shares = label_rows(tabulate_cells(evidence, others)).query("set in @MAIN_SETS")
        tables["groups"].append(tabulate_shares(shares))
    tables["skills"].append(tabulate_skills(evidence, reported.query("usual in @figures.HEADLINE")))
    return tables | {
        "arms": [tabulate_sizes(select_arms(cells, figures.HEADLINE))],
        "shares": [tabulate_shares(cells[cells["set"].isin(MAIN_SETS)])],
        "other_sets": [tabulate_shares(cells[~cells["set"].isin(MAIN_SETS)])],
        "kinds": [kinds.reset_index()],
        "contrasts": [tabulate_contrasts(evidence, reported)],
        "costs": [costs.reset_index()],
    }


def fill_block(found: re.Match[str], tables: dict, titles: dict, place: str) -> str:
    """Return a block of a file made anew; `place` is the figures' folder as the file links it."""
    if (name := found[1]) not in tables:
        raise UserError(f"no block {name!r}; there are {', '.join(tables)}")
    parts = [f"![{titles[name]}]({place}/{name}.svg)"] if name in titles else []
    text = "\n\n".join([*parts, *map(to_table, tables[name])])
    return f"<!-- study:{name} -->\n{text}\n<!-- /study:{name} -->"


def make_report(root: Path, folder: Path) -> dict[Path, str]:
    """Return the text of every file of the report by its path."""
    evidence = load_evidence(folder)
    cells = tabulate_cells(evidence, select_reported(evidence))
    tables = make_tables(evidence, cells) | {"controls": [tabulate_controls()]}
    tables |= {"edition1": [tabulate_edition1()], "speed": tabulate_speed(root)}
    files, titles = {}, {}
    for name, draw in FIGURES.items():
        if found := draw(evidence, cells):
            titles[name], files[folder / "figures" / f"{name}.svg"] = found
    for path in filter(Path.is_file, map(root.joinpath, FILES)):
        place = os.path.relpath(folder / "figures", path.parent)
        fill = partial(fill_block, tables=tables, titles=titles, place=place)
        files[path] = BLOCK.sub(fill, path.read_text(encoding="utf-8"))
    return files


def main() -> None:
    """Write the files of the report."""
    make_parser(__doc__).parse_args()
    for path, text in make_report(REPO_DIR, RESULTS_DIR).items():
        path.parent.mkdir(parents=True, exist_ok=True)
        write_text(path, text)
        print(f"wrote {path.relative_to(REPO_DIR)}")


if __name__ == "__main__":
    run_script(main)
