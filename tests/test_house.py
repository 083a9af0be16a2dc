"""The architecture: which module may import what."""

import ast
import sys
from pathlib import Path

FLOORS = ("model", "dataset", "trainer", "evaluation", "eval_llm")  # each imports from those before
LIBRARIES = {  # of all floors but evaluation
    "accelerate",
    "datasets",
    "filelock",
    "gguf",  # export_gguf.py asks for it
    "jinja2",
    "numpy",
    "safetensors",
    "tokenizers",
    "torch",
    "tqdm",
    "transformers",
}

ROOT = Path(__file__).resolve().parents[1]
SOURCE = [*ROOT.glob("*.py"), *(path for floor in FLOORS for path in ROOT.glob(f"{floor}/**/*.py"))]


def list_imports(path: Path) -> set[str]:
    """Return the packages that a file imports from."""
    nodes = list(ast.walk(ast.parse(path.read_text(encoding="utf-8"))))
    names = [alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names]
    names += [node.module for node in nodes if isinstance(node, ast.ImportFrom)]
    return {name.partition(".")[0] for name in names}


def test_imports_run_one_way() -> None:
    """A floor imports from itself and the floors below it; only evaluation uses any library."""
    bad = []
    for path in SOURCE:
        place = path.relative_to(ROOT)
        floor = place.parts[0].removesuffix(".py")
        above = {*FLOORS[FLOORS.index(floor) + 1 :], "tests"}
        allowed = {*FLOORS, *LIBRARIES, *sys.stdlib_module_names} - above
        packages = list_imports(path)
        wrong = packages & above if floor == "evaluation" else packages - allowed
        bad += [f"{place}: imports {name}" for name in sorted(wrong)]
    assert bad == []


def test_no_script_hides_a_standard_module() -> None:
    """A script's folder comes first on sys.path, for the libraries' imports, too."""
    assert [path for path in SOURCE if path.stem in sys.stdlib_module_names] == []
