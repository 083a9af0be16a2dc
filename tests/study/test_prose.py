"""The files for readers: `make report` changes nothing, and their links lead somewhere."""

import re
from pathlib import Path

import pytest

from evaluation.study.report import make_report
from evaluation.study.settings import RESULTS_DIR
from model.files import REPO_DIR

NAMES = [
    "README.md",
    "WORKFLOW.md",
    "evaluation/REPORT.md",
    "evaluation/study/TABLES.md",
    "evaluation/study/LOG.md",
    "evaluation/study/PROTOCOL.md",
]
FENCE = re.compile(r"```.*?```", re.DOTALL)
LINK = re.compile(r"\]\(([^)\s]+)\)")


def read_plain(path: Path) -> str:
    """Return a file's text without its code."""
    text = FENCE.sub("", path.read_text(encoding="utf-8"))
    return re.sub(r"`[^`\n]*`", lambda match: match[0].strip("`"), text)


def list_anchors(path: Path) -> set[str]:
    """Return the anchors that GitHub gives to a file's headings."""
    anchors: set[str] = set()
    for title in re.findall(r"(?m)^#+ (.+)$", read_plain(path)):
        words = re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", title).lower()
        slug = re.sub(r"[^\w\- ]", "", words).replace(" ", "-")
        repeats = sum(anchor == slug or anchor.startswith(f"{slug}-") for anchor in anchors)
        anchors.add(f"{slug}-{repeats}" if slug in anchors else slug)
    return anchors


def test_make_report_changes_nothing() -> None:
    made = make_report(REPO_DIR, RESULTS_DIR)
    changed = [path.name for path, text in made.items() if path.read_text("utf-8") != text]
    assert changed == []
    drawn = {path for path in made if path.suffix == ".svg"}
    assert set(RESULTS_DIR.glob("figures/*.svg")) == drawn  # no figure of an earlier report


@pytest.mark.parametrize("name", NAMES)
def test_links_and_anchors_resolve(name: str) -> None:
    path = REPO_DIR / name
    if not path.is_file():
        pytest.skip(f"there is no {name}")
    broken = []
    for link in LINK.findall(read_plain(path)):
        if link.startswith(("http:", "https:", "mailto:")):
            continue
        file, _, anchor = link.partition("#")
        target = (path.parent / file).resolve() if file else path
        is_known = target.exists() and (not anchor or anchor in list_anchors(target))
        if not is_known:
            broken.append(link)
    assert broken == []
