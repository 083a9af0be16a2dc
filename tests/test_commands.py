"""Check that the scripts and flags of documented commands exist."""

import importlib
import re
import sys
from collections import defaultdict
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
TEXTS = [*ROOT.glob("*.md"), *ROOT.glob("evaluation/*.md"), *ROOT.glob("evaluation/study/*.md")]
TEXTS += [p for f in ("dataset", "trainer", "evaluation") for p in ROOT.glob(f"{f}/**/*.py")]
COMMAND = re.compile(r"(?<![\w/])(?:python|torchrun --nproc_per_node 2) (\w[\w/]*\.py)([^`#\n]*)")


def find_commands() -> dict[str, set[str]]:
    """Return the flags that stand behind each script, in any text."""
    found = defaultdict(set)
    for path in (*TEXTS, ROOT / "eval_llm.py"):
        text = re.sub(r"\\\n\s*", " ", path.read_text(encoding="utf-8"))
        for script, words in COMMAND.findall(text):
            found[script].update(re.findall(r"--\w+", words))
    return found


@pytest.mark.parametrize("script", sorted(find_commands()))
def test_flags_exist(
    script: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    monkeypatch.setattr(sys, "argv", [script, "--help"])
    with pytest.raises(SystemExit):
        importlib.import_module(script.removesuffix(".py").replace("/", ".")).main()
    flags = set(re.findall(r"--\w+", capsys.readouterr().out))
    assert find_commands()[script] <= flags
