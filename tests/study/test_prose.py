"""README.md and REPORT.md: their size, and where the numbers of their prose come from."""

import math
import re

from evaluation.study.report import BLOCK, FILES, make_report
from evaluation.study.settings import RESULTS_DIR
from model.files import REPO_DIR

LIMITS = {"README.md": (250, 14_000), "evaluation/REPORT.md": (400, 30_000)}  # lines, bytes
SETTINGS = {"0.02", "0.85", "3.11", "95"}  # no results: the study's size, T, Python, intervals
WEIGHTS = {128: 1_557_632, 256: 6_065_408, 512: 25_829_888}  # in all, by hidden size
SETTINGS |= {f"{count / 1e6:.1f}" for count in WEIGHTS.values()}
SETTINGS |= {f"{100 * 6400 * hidden / count:.0f}" for hidden, count in WEIGHTS.items()}  # embedding
OTHER = re.compile(r"```.*?```|`[^`\n]*`|\]\([^)]*\)|arXiv \S+|\d{4}\.\d{5}", re.DOTALL)
NUMBER = re.compile(r"\d+\.\d+|\d+(?=%)")  # decimals, and numbers of percent


def read(name: str) -> str:
    """Return a file's text."""
    return (REPO_DIR / name).read_text(encoding="utf-8")


def split_prose(text: str) -> tuple[set[str], set[str]]:
    """Return the numbers of the prose, and those of the generated blocks."""
    blocks = " ".join(found[0] for found in BLOCK.finditer(text))
    prose = OTHER.sub(" ", BLOCK.sub(" ", text))
    return set(NUMBER.findall(prose)) - SETTINGS, set(NUMBER.findall(blocks))


def test_files_are_short_and_their_blocks_of_the_committed_results() -> None:
    """Text for readers is short, and `make report` would change no file."""
    made = make_report(REPO_DIR, RESULTS_DIR)
    for name in FILES:
        text, (lines, size) = read(name), LIMITS.get(name, (math.inf, math.inf))
        assert text.count("\n") <= lines and len(text.encode()) <= size
        assert made[REPO_DIR / name] == text


def test_readme_numbers() -> None:
    """A number of the README stands in a generated table."""
    generated = set().union(*(split_prose(read(name))[1] for name in FILES))
    assert split_prose(read("README.md"))[0] <= generated


def test_report_numbers() -> None:
    """A number of the report stands in a table of its section, or of any where that has none."""
    text = read("evaluation/REPORT.md")
    everywhere = set().union(*(split_prose(read(name))[1] for name in FILES))
    for section in text.split("\n## "):
        numbers, generated = split_prose(section)
        assert numbers <= (generated or everywhere), section.partition("\n")[0]
