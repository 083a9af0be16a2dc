"""README.md and REPORT.md: their size, and where the numbers of their prose come from."""

import math
import re

from evaluation.study.report import BLOCK, FILES, make_report
from evaluation.study.settings import RESULTS_DIR
from model.files import REPO_DIR

LIMITS = {"README.md": (250, 14_000), "evaluation/REPORT.md": (400, 30_000)}  # lines, bytes
SETTINGS = {"0.02", "0.85", "3.11", "95"}  # no results: the study's size, T, Python, intervals
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


def test_numbers_of_the_prose() -> None:
    """A number stands in a table of its section; where that has none, and in README, in any."""
    everywhere = set().union(*(split_prose(read(name))[1] for name in FILES))
    assert split_prose(read("README.md"))[0] <= everywhere
    for section in read("evaluation/REPORT.md").split("\n## "):
        numbers, generated = split_prose(section)
        assert numbers <= (generated or everywhere), section.partition("\n")[0]


def test_gaps_of_the_opening_lists() -> None:
    """What README and REPORT say first of LoRA's gaps, in points, is in the table of contrasts."""
    row, gaps = r"\| (\w+) \| fft - (\w+) \| (\S+) (.*)", {}
    for *place, texts in re.findall(row, read("evaluation/study/TABLES.md")):
        gaps[*place] = [round(100 * float(number)) for number in re.findall(r"-?\d\.\d\d", texts)]
    xs, s, m26 = (gaps[size, "all_r8", "greedy"] for size in ("xs", "s", "m26"))
    sampled = [gaps[size, "all_r8", "T=0.85"] for size in ("xs", "s", "m26")]
    ranks = [gaps[one] for one in gaps if one[1] != "all_r8" and one[2] == "T=0.85"]
    texts = [f"[{xs[0]} points]", f"(95%: {xs[1]} to {xs[2]})", f"{s[0]} ({s[1]} to {s[2]})"]
    texts += [f"{m26[0]} ({m26[1]} to {m26[2]})", f"{xs[6]}, {s[6]}, {m26[6]}"]
    for one, at in ((sampled, 0), (sampled, 6), (ranks, 0)):
        texts.append(", ".join(str(gap[at]) for gap in one))
    openings = [read(name).partition("\n## ")[0] for name in LIMITS]
    assert [text for text in texts if not all(text in one for one in openings)] == []
