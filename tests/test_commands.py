"""Check that documented commands would run: each script's own parser reads their words."""

import ast
import importlib
import re
import shlex
import sys
from argparse import ArgumentParser
from pathlib import Path
from string import Template

import pytest
from torch.distributed.run import get_args_parser as make_torchrun_parser

from evaluation.probe.names import list_named_folders
from evaluation.probe.outputs import OUTPUT_DIR

ROOT = Path(__file__).resolve().parents[1]
FOLDERS = (".", "evaluation", "evaluation/study", "evaluation/examples/*", "model/trained/*")
PAGES = [page for folder in FOLDERS for page in ROOT.glob(f"{folder}/*.md")]
PAGES += [folder / "samples.md" for folder, _ in list_named_folders(OUTPUT_DIR)]
PAGES.remove(ROOT / "evaluation/study/minimind_issue.md")  # commands of another repository
SCRIPTS = [p for f in ("dataset", "trainer", "evaluation") for p in ROOT.glob(f"{f}/**/*.py")]
COMMAND = re.compile(r"(?<![\w/])(?:\.venv/bin/)?(?:python|torchrun) [^`\n]*?\w\.py\b[^`\n]*")
ASSIGNMENT = re.compile(r"""(?:^|; )(\w+)=("[^"]*"|[^\s"';]+)(?=;|$)""")
MAKE = re.compile(r'(?:^|`)(?:\w+=(?:"[^"]*"|\S+) )*make ([\w-]+)', re.MULTILINE)


def read_text(path: Path) -> str:
    """Read a page, or the docstring of a script; lines that a backslash continues are joined."""
    text = path.read_text(encoding="utf-8")
    if path.suffix == ".py":
        text = ast.get_docstring(ast.parse(text)) or ""
    return re.sub(r"\\\n\s*", " ", text)


def split_commands(line: str) -> list[list[str]]:
    """Split a line of shell into the words of its commands; comments are dropped."""
    lexer = shlex.shlex(line, posix=True, punctuation_chars=True)
    lexer.whitespace_split = True
    commands = [[]]
    for word in lexer:
        if set(word) <= set("();<>|&"):
            commands.append([])
        else:
            commands[-1].append(word)
    return commands


def calls_script(words: list[str]) -> bool:
    """Whether a command's words call a script of ours, and not a module such as pytest."""
    program = Path(words[0]).name if words else ""
    return program == "torchrun" or (program == "python" and words[1].endswith(".py"))


def find_commands(text: str) -> list[list[str]]:
    """Return the words of each command that calls a script, with the text's variables filled in."""
    variables, commands = {}, []
    for line in text.splitlines():
        for name, value in ASSIGNMENT.findall(line):
            variables[name] = Template(value.strip('"')).safe_substitute(variables)
        for match in COMMAND.findall(line):
            line_commands = split_commands(Template(match).safe_substitute(variables))
            commands += filter(calls_script, line_commands)
    return commands


TEXTS = {path: read_text(path) for path in (*PAGES, *SCRIPTS, ROOT / "eval_llm.py")}
COMMANDS = {shlex.join(words): words for text in TEXTS.values() for words in find_commands(text)}


class FlagsAreParsed(Exception):
    """Raised where a script has read its flags, so that it stops before it does anything."""


@pytest.mark.parametrize("command", COMMANDS)
def test_command_parses(
    command: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    program, script, *flags = COMMANDS[command]
    if Path(program).name == "torchrun":
        launch = make_torchrun_parser().parse_args([script, *flags])
        script, flags = launch.training_script, launch.training_script_args
    parse_args = ArgumentParser.parse_args

    def parse_and_stop(parser: ArgumentParser, *args: list[str] | None) -> None:
        parse_args(parser, *args)
        raise FlagsAreParsed

    monkeypatch.setattr(ArgumentParser, "parse_args", parse_and_stop)
    monkeypatch.setattr(sys, "argv", [script, *flags])
    module = importlib.import_module(script.removesuffix(".py").replace("/", "."))
    try:
        module.main()
    except SystemExit:
        pytest.fail(f"{command}\n{capsys.readouterr().err}")
    except FlagsAreParsed:
        return
    pytest.fail(f"{script}: ran without reading its flags")


def test_commands_are_found() -> None:
    lines = [
        'A="--epochs 2"',
        "B=x; C=$B/y",
        "OMP_NUM_THREADS=1 python a.py $A '$' # why",
        "python -m pytest a.py; python a.py --out $C & torchrun --nproc_per_node 2 a.py; wait",
    ]
    words = [["python", "a.py", "--epochs", "2", "$"], ["python", "a.py", "--out", "x/y"]]
    assert find_commands("\n".join(lines)) == [
        *words,
        ["torchrun", "--nproc_per_node", "2", "a.py"],
    ]
    assert not [command for command in COMMANDS if "$" in command]  # each variable has a value


@pytest.mark.parametrize("page", PAGES, ids=lambda path: f"{path.parent.name}/{path.name}")
def test_make_targets_exist(page: Path) -> None:
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    targets = re.findall(r"^([\w-]+):", makefile, re.MULTILINE)
    assert set(MAKE.findall(TEXTS[page])) <= set(targets)
