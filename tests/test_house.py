"""The architecture: which module may import what, how functions are named, how long all may be."""

import ast
import symtable
import sys
from collections import defaultdict
from pathlib import Path

import pytest

FLOORS = ("model", "dataset", "trainer", "evaluation", "eval_llm")  # each imports from those before
LIBRARIES = {"accelerate", "datasets", "filelock", "jinja2", "numpy", "safetensors", "tokenizers"}
LIBRARIES |= {"torch", "tqdm", "transformers"}  # of all floors but evaluation
IRREGULAR = "begun broken built chosen done drawn gone given grown held hidden hung kept known left"
IRREGULAR += " lost made said seen sent shown sold spent spoken sung taken told written"
VERBS = ("embed", "feed", "need", "seed")  # end in "ed", and are no participles
DOCUMENTED = 0.85  # share of the source's functions that have a docstring
# Lines at most, without the world and what came with it: never raise these numbers.
LINES = {"core": 2500, "source": 6200, "tests": 4800}
LATER = ("dataset/checks.py", "dataset/world", "model/reachability.py", "evaluation/study/data.py")
LATER += ("evaluation/probe/world", "tests/dataset/test_world.py", "tests/dataset/test_checks.py")
LATER += ("tests/study/test_data.py",)
TOOLS = ("prepare.py", "convert_minimind.py", "merge_lora.py", "train_tokenizer.py")  # not core

ROOT = Path(__file__).resolve().parents[1]
CODE = [*ROOT.glob("*.py"), *(p for f in (*FLOORS, "tests") for p in ROOT.glob(f"{f}/**/*.py"))]
TEXTS = {path.relative_to(ROOT).as_posix(): path.read_text() for path in sorted(CODE)}
SOURCE = {name: text for name, text in TEXTS.items() if not name.startswith("tests/")}


def find_functions(texts: dict[str, str]) -> list[tuple[str, ast.FunctionDef]]:
    """Return the functions and methods of files, with their places and names."""
    nodes = [(name, node) for name, text in texts.items() for node in ast.walk(ast.parse(text))]
    found = [(name, node) for name, node in nodes if isinstance(node, ast.FunctionDef)]
    return [(f"{name}:{node.lineno} {node.name}", node) for name, node in found]


def is_participle(name: str) -> bool:
    """Whether a function's name is one word such as `asked` or `shown`."""
    is_regular = name.endswith("ed") and "_" not in name and name not in VERBS
    return is_regular or name in IRREGULAR.split()


def test_imports_run_one_way() -> None:
    bad = []
    for path, text in SOURCE.items():
        floor = path.partition("/")[0].removesuffix(".py")
        below = FLOORS[: FLOORS.index(floor) + (path != "model/files.py")]
        nodes = list(ast.walk(ast.parse(text)))
        names = [a.name for node in nodes if isinstance(node, ast.Import) for a in node.names]
        names += [node.module for node in nodes if isinstance(node, ast.ImportFrom)]
        for name in names:
            package = name.partition(".")[0]
            is_library = floor == "evaluation" or package in LIBRARIES | sys.stdlib_module_names
            if package not in below if package in (*FLOORS, "tests") else not is_library:
                bad.append(f"{path}: imports {name}")
    assert not bad, "\n".join(bad)


def test_a_name_stands_in_one_module() -> None:
    """Of functions, classes and constants of the source, `main` excepted."""
    homes = defaultdict(list)
    for path, text in SOURCE.items():
        for symbol in symtable.symtable(text, path, "exec").get_symbols():
            if symbol.is_assigned() and not symbol.is_imported() and symbol.get_name() != "main":
                homes[symbol.get_name()].append(path)
    bad = [f"{name}: {', '.join(paths)}" for name, paths in homes.items() if len(paths) > 1]
    assert not bad, "\n".join(bad)


def test_no_function_is_named_by_a_bare_participle() -> None:
    assert all(map(is_participle, ("asked", "told", "shown", "bounded")))
    assert not any(map(is_participle, ("seed", "find_marked", "generate", "is_kept")))
    bad = [place for place, node in find_functions(TEXTS) if is_participle(node.name)]
    assert not bad, "\n".join(bad)


def test_functions_say_what_they_do() -> None:
    found = [(at, node) for at, node in find_functions(SOURCE) if not node.name.startswith("__")]
    bad = [place for place, node in found if ast.get_docstring(node) is None]
    assert len(bad) <= (1 - DOCUMENTED) * len(found), "\n".join(bad)


@pytest.mark.parametrize("part", LINES)
def test_line_budget(part: str) -> None:
    assets = {path.name: path.read_text() for path in ROOT.glob("evaluation/page/*.[!p]*")}
    core = [n for n in SOURCE if not (n.startswith("evaluation/") or n.endswith(TOOLS))]
    names = {"core": core, "source": [*SOURCE, *assets], "tests": TEXTS.keys() - SOURCE}[part]
    texts = [(TEXTS | assets)[name] for name in names if not name.startswith(LATER)]
    assert sum(text.count("\n") for text in texts) <= LINES[part]
