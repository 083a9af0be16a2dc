"""Write the tables and figures of README.md and evaluation/REPORT.md from the committed results.

    python evaluation/study/report.py      # or: make report

A block stands between `<!-- study:NAME -->` and `<!-- /study:NAME -->`; blocks.md.jinja has its
text. Files whose content does not change are not written.
"""

import re
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import pandas as pd
from jinja2 import Environment, FileSystemLoader, StrictUndefined

from dataset.checks import KINDS
from evaluation.study.analysis import (
    Estimate,
    Evidence,
    choose_prompts,
    list_cells,
    load_evidence,
    mark_answers,
    tabulate_nll,
    tabulate_shares,
)
from evaluation.study.claims import judge_claims, list_endings
from evaluation.study.edition1 import make_edition1_tables, make_headline1
from evaluation.study.figures import draw_figures
from evaluation.study.plan import tune_rate
from evaluation.study.results import RESULTS_DIR
from evaluation.study.settings import MAIN_BASE
from model.files import REPO_DIR, UserError, run_script, write_text

FILES = ("README.md", "evaluation/REPORT.md")
BLOCK = re.compile(r"<!-- study:(\w+) -->\n.*?<!-- /study:\1 -->", re.DOTALL)
DECODING_TITLES = {"greedy": "greedy", "t0.85p0.85": "T=0.85"}
SETS = ("combinations", "unseen", "wordings")
HEADLINE_ARMS = ("fft", "seed", "all_r8", "all_r8_vocabulary")


def to_table(frame: pd.DataFrame | None) -> str:
    """Return a data frame as a Markdown table; a dash where nothing was measured."""
    if frame is None or frame.empty:
        return "Not run yet."
    text = frame.fillna("-").to_markdown(index=False, disable_numparse=True)
    return re.sub(r"-{3,}", "---", re.sub(r" +\|", " |", text))  # without padding


def to_percent(found: Estimate) -> str:
    """Return a share with its interval in percent."""
    return f"{100 * found.value:.0f} [{100 * found.low:.0f}, {100 * found.high:.0f}]"


def name_cell(evidence: Evidence, cell: pd.Series) -> str:
    """Return an arm's title with what differs from the usual run."""
    title = evidence.study.arms[cell.arm].title
    base, size = cell.base.rpartition("-")[2], evidence.study.sizes[cell["size"]]
    extras = [f"{cell.epochs:g} epochs"] if cell.epochs != size.epochs else []
    extras += [f"{cell.samples:,.0f} pairs"] if pd.notna(cell.samples) else []
    extras += [f"from {base}"] if base != MAIN_BASE else []
    extras += [f"after {evidence.study.arms[cell.start].title}"] if cell.start != "base" else []
    extras += [cell.data] if cell.data not in ("sft", "sft_mixed") else []
    return ", ".join([title, *extras])


def make_share_tables(evidence: Evidence, shares: pd.DataFrame) -> dict[str, pd.DataFrame]:
    """Return, by size, a row a cell: correct answers by set and decoding."""
    tables = {}
    for size, of_size in shares.groupby("size", sort=False):
        chosen = of_size[of_size["set"].isin(SETS)].copy()
        chosen["trained"] = [name_cell(evidence, cell) for _, cell in chosen.iterrows()]
        chosen["rate"] = chosen.learning_rate.map("{:g}".format)
        chosen["column"] = chosen["set"] + ", " + chosen.decoding.map(DECODING_TITLES)
        chosen["text"] = chosen.share.map(to_percent)
        keys = ["trained", "rate", "seeds"]
        wide = chosen.pivot_table(
            index=keys, columns="column", values="text", aggfunc="first", sort=False
        )
        tables[size] = wide.reset_index()
    return tables


def make_headline(evidence: Evidence, shares: pd.DataFrame) -> pd.DataFrame | None:
    """Return the README's table: the main arms at each size, both decodings."""
    if shares.empty:
        return None
    usual = (shares.start == "base") & (shares.data == "sft") & shares.samples.isna()
    usual &= shares.epochs == shares["size"].map(lambda name: evidence.study.sizes[name].epochs)
    usual &= shares.base.str.endswith(MAIN_BASE) & shares.arm.isin(HEADLINE_ARMS)
    chosen = shares[usual & shares["set"].isin(("combinations", "unseen"))].copy()
    chosen["trained"] = [evidence.study.arms[arm].title for arm in chosen.arm]
    chosen["text"] = chosen.share.map(to_percent)
    chosen["column"] = (
        chosen["size"] + ": " + chosen["set"] + ", " + chosen.decoding.map(DECODING_TITLES)
    )
    wide = chosen.pivot_table(
        index="trained", columns="column", values="text", aggfunc="first", sort=False
    )
    return wide.reset_index()


def make_kind_table(evidence: Evidence) -> pd.DataFrame:
    """Return the kinds of answers to combinations, in percent: greedy / sampled."""
    rows = []
    for place, runs in list_cells(evidence):
        prompts = choose_prompts(evidence, "combinations")
        row = {"size": place["size"], "trained": name_cell(evidence, pd.Series(place))}
        for kind in KINDS:
            shares = (mark_answers(runs, prompts, name, kind).mean() for name in DECODING_TITLES)
            row[kind] = " / ".join(f"{100 * share:.0f}" for share in shares)
        rows.append(row)
    return pd.DataFrame(rows)


def make_rate_table(evidence: Evidence) -> pd.DataFrame:
    """Return the share correct on the tuning half by learning rate, the best rate in bold."""
    rows = []
    for name, arm in evidence.study.arms.items():
        for size in arm.rates:
            sweep = tune_rate(evidence.study, size, name, evidence.runs)
            cells = [f"{rate:g}: {100 * share:.0f}" for rate, share in sweep.shares.items()]
            bold = [
                f"**{c}**" if r == sweep.best else c
                for r, c in zip(sweep.shares, cells, strict=True)
            ]
            place = "inside" if sweep.is_interior else "at the edge" if sweep.best else "not tuned"
            if cells:
                row = {"size": size, "trained": arm.title, "rate: percent correct": ", ".join(bold)}
                rows.append(row | {"best rate": place})
    return pd.DataFrame(rows)


def make_nll_table(evidence: Evidence) -> pd.DataFrame:
    """Return NLL of references without end tokens and of end tokens, and of pretraining text."""
    table = tabulate_nll(evidence) if len(evidence.final) else pd.DataFrame()
    if table.empty:
        return table
    table = table[table["set"] == "combinations"]
    names = [name_cell(evidence, cell) for _, cell in table.iterrows()]
    columns = {"nll": "answer tokens", "end_nll": "end tokens", "text_nll": "pretraining text"}
    numbers = table[list(columns)].map("{:.3f}".format).rename(columns=columns)
    numbers.insert(0, "trained", names)
    numbers.insert(0, "size", table["size"])
    return numbers


def make_cost_table(evidence: Evidence) -> pd.DataFrame:
    """Return what a run of each cell costs, the mean over its seeds."""
    rows = []
    for place, runs in list_cells(evidence):
        cost = pd.DataFrame(runs.cost.tolist()).mean()
        rows.append(
            {
                "size": place["size"],
                "trained": name_cell(evidence, pd.Series(place)),
                "parameters": f"{cost.trainable_parameters:,.0f}",
                "steps": f"{cost.steps:,.0f}",
                "M tokens": f"{cost.tokens / 1e6:.1f}",
                "TFLOP": f"{cost.flops / 1e12:.0f}",
                "minutes": f"{cost.train_seconds / 60:.0f}",
                "peak GB": f"{cost.peak_memory_bytes / 1e9:.2f}",
            }
        )
    return pd.DataFrame(rows)


def make_tables(evidence: Evidence) -> dict:
    """Return every table of blocks.md.jinja by name."""
    shares = tabulate_shares(evidence)
    claims, estimates = judge_claims(evidence)
    estimates = estimates.dropna(subset="value").assign(value=lambda table: table.value.map(str))
    endings = list_endings(evidence)
    endings = endings[endings.edition == evidence.study.edition]  # edition1.py has the others
    return {
        "headline": make_headline(evidence, shares),
        "edition1": make_headline1(),
        "shares": {} if shares.empty else make_share_tables(evidence, shares),
        "kinds": make_kind_table(evidence),
        "rates": make_rate_table(evidence),
        "nll": make_nll_table(evidence),
        "costs": make_cost_table(evidence),
        "claims": claims,
        "estimates": estimates,
        "endings": endings.round({"bound": 3, "endless": 2}),
    }


def fill_blocks(text: str, blocks: dict[str, str], where: str) -> str:
    """Return a text with each of its marked blocks made anew."""

    def fill(found: re.Match[str]) -> str:
        name = found[1]
        if name not in blocks:
            raise UserError(f"{where}: no block {name!r}; blocks.md.jinja has {', '.join(blocks)}")
        return f"<!-- study:{name} -->\n{blocks[name]}\n<!-- /study:{name} -->"

    return BLOCK.sub(fill, text)


def make_report(root: Path, folder: Path) -> dict[Path, str]:
    """Return the text of every file of the report by its path."""
    evidence = load_evidence(folder)
    tables = make_tables(evidence)
    figures, titles = draw_figures(evidence)
    loader = FileSystemLoader(Path(__file__).parent)
    environment = Environment(loader=loader, undefined=StrictUndefined, trim_blocks=True)
    environment.filters["table"] = to_table
    template = environment.get_template("blocks.md.jinja")
    context = template.new_context(tables | {"titles": titles})
    blocks = {name: "".join(block(context)).strip() for name, block in template.blocks.items()}
    for name, frames in make_edition1_tables().items():
        figure = f"![{titles[name]}](study/figures/{name}.svg)" if titles.get(name) else ""
        blocks[name] = "\n\n".join(filter(None, [figure, *map(to_table, frames)]))
    files = {folder / "figures" / f"{name}.svg": svg for name, svg in figures.items()}
    for name in FILES:
        path = root / name
        if path.is_file():
            files[path] = fill_blocks(path.read_text(encoding="utf-8"), blocks, name)
    return files


def main() -> None:
    """Write the files of the report that change."""
    for path, text in make_report(REPO_DIR, RESULTS_DIR).items():
        if not path.is_file() or path.read_text(encoding="utf-8") != text:
            path.parent.mkdir(parents=True, exist_ok=True)
            write_text(path, text)
            print(f"wrote {path.relative_to(REPO_DIR)}")


if __name__ == "__main__":
    run_script(main)
