"""Write tables, figures and numbers of README.md, REPORT.md, LOG.md and TABLES.md.

    python evaluation/study/report.py      # or: make report

They come from the committed results. A block stands between `<!-- study:NAME -->` and
`<!-- /study:NAME -->`: the figure of this name, if there is one (figures.py, round3_figures.py),
then its tables (short_tables.py, long_tables.py, round3_tables.py), then what their marks mean. A
number inside a sentence stands between `<!-- =NAME -->` and `<!-- /= -->` (values.py). A second
call changes nothing.
"""

import os
import re
import sys
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import pandas as pd

from evaluation.study import (  # noqa: F401  they register their blocks
    causes,
    long_tables,
    round3_figures,
    round3_tables,
    short_tables,
)
from evaluation.study.analysis import Evidence, load_evidence
from evaluation.study.blocks import BLOCKS
from evaluation.study.figures import FIGURES
from evaluation.study.names import FOOTNOTES, ONE_RUN
from evaluation.study.settings import RESULTS_DIR
from evaluation.study.values import find_value
from model.cli import UserError, make_parser, run_script
from model.files import REPO_DIR, write_text

FILES = (
    "README.md",
    "evaluation/REPORT.md",
    "evaluation/study/LOG.md",
    "evaluation/study/TABLES.md",
)
BLOCK = re.compile(r"<!-- study:(\w+) -->\n.*?<!-- /study:\1 -->", re.DOTALL)
VALUE = re.compile(r"(<!-- =([\w./-]+) -->).*?(<!-- /= -->)", re.DOTALL)
NOTHING = "Not run yet."


@dataclass(frozen=True)
class Report:
    """The evidence and the figures drawn from it: a title and SVG by name."""

    evidence: Evidence
    figures: dict[str, tuple[str, str]]

    def fill_text(self, text: str, figure_dir: str) -> str:
        """Return a file's text with all blocks and values made anew.

        `figure_dir` is the folder of the figures as the file links it.
        """
        with_blocks = BLOCK.sub(lambda match: self.fill_block(match[1], figure_dir), text)
        return VALUE.sub(
            lambda match: match[1] + find_value(self.evidence, match[2]) + match[3], with_blocks
        )

    def fill_block(self, name: str, figure_dir: str) -> str:
        """Return a block: figure, tables, and the footnotes that its tables need."""
        if name not in BLOCKS and name not in FIGURES:
            known = ", ".join(sorted({*BLOCKS, *FIGURES}))
            raise UserError(f"no block {name!r}; there are {known}")
        parts = []
        if name in self.figures:
            parts.append(f"![{self.figures[name][0]}]({figure_dir}/{name}.svg)")
        if name in BLOCKS:
            tables = [write_table(table) for table in BLOCKS[name](self.evidence)]
            parts += tables
            parts += list_footnotes("\n".join(tables))
        body = "\n\n".join(parts) or NOTHING
        return f"<!-- study:{name} -->\n{body}\n<!-- /study:{name} -->"


def write_table(table: pd.DataFrame) -> str:
    """Return a data frame as a Markdown table; a dash where nothing was measured."""
    if table.empty:
        return NOTHING
    filled = table.astype(object).where(table.notna(), "-")
    text = filled.to_markdown(index=False, disable_numparse=True)
    without_padding = re.sub(r" +\|", " |", text)
    return re.sub(r"-{3,}", "---", without_padding)


def list_footnotes(text: str) -> list[str]:
    """Return what the marks in tables mean, as one paragraph, if there are any."""
    notes = []
    for mark, note in FOOTNOTES.items():
        # A star is Markdown, too: **bold** and *emphasis* are no marks.
        pattern = r"%\*(?!\*)" if mark == ONE_RUN else mark
        if re.search(pattern, text):
            notes.append(note)
    return [" ".join(notes)] if notes else []


def make_report(root: Path, folder: Path) -> dict[Path, str]:
    """Return the text of every file of the report by its path."""
    evidence = load_evidence(folder)
    files = {}
    figures = {}
    for name, draw in FIGURES.items():
        drawn = draw(evidence)
        if drawn:
            figures[name] = drawn
            files[folder / "figures" / f"{name}.svg"] = drawn[1]
    report = Report(evidence, figures)
    for name in FILES:
        path = root / name
        if path.is_file():
            figure_dir = os.path.relpath(folder / "figures", path.parent)
            files[path] = report.fill_text(path.read_text(encoding="utf-8"), figure_dir)
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
