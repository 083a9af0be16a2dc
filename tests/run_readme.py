"""Run the commands of README.md, in their order, in a clone of this repository.

    make stress                               # all blocks, after stress_resume.py
    python tests/run_readme.py --blocks 2     # one of them, counted from 1

The commands in its tables are one more block, the last one, in which nothing trains for long.
The clone has what is committed, and the environment that this script runs in as its `.venv`. Each
command is printed with the seconds since its block began. The first one that fails ends the block,
and the script then ends with 1.
"""

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
BLOCK = re.compile(r"^```bash\n(.*?)^```", re.MULTILINE | re.DOTALL)
# bash runs a DEBUG trap before each command, but not inside of what a block sources.
OPENING = """set -e -o pipefail
trap 'echo "[$SECONDS s] $BASH_COMMAND"' DEBUG
"""
CELL = re.compile(r"`(python [^`]+)`")
# What README's table of checks asks the reader to have: the environment and an adapter.
TABLE_OPENING = """. .venv/bin/activate
python trainer/train_lora.py --lora_name lora --max_steps 20
"""


def read_blocks(page: Path) -> list[str]:
    """Return the page's blocks of bash without the lines that clone, then that of its tables."""
    blocks = []
    for block in BLOCK.findall(page.read_text(encoding="utf-8")):
        lines = block.splitlines(keepends=True)
        kept = [line for line in lines if not line.startswith("git clone ")]
        blocks.append("".join(kept))
    return [*blocks, read_table_block(page)]


def read_table_block(page: Path) -> str:
    """Return the commands in the cells of the page's tables as a block; trainings are short."""
    lines = []
    for row in page.read_text(encoding="utf-8").splitlines():
        for command in CELL.findall(row) if row.startswith("|") else []:
            is_training = command.startswith("python trainer/train_")
            lines.append(command.replace("\\|", "|") + " --max_steps 20" * is_training)
    return TABLE_OPENING + "\n".join(lines) + "\n"


def make_clone(folder: Path) -> None:
    """Clone the repository, with this environment and a file of pairs as a user may have it."""
    subprocess.run(["git", "clone", "--quiet", ROOT, folder], check=True)
    (folder / ".venv").symlink_to(sys.prefix)
    for path in folder.glob("requirements*.txt"):
        os.utime(path, (0, 0))  # a newer one would make `make` install into this environment
    pairs = [{"instruction": f"Write {i}.", "output": f"{i}!"} for i in range(60)]
    lines = [json.dumps(pair) for pair in pairs]
    (folder / "mine.jsonl").write_text("\n".join(lines), encoding="utf-8")


def main() -> int:
    """Run the blocks that the flags choose; return 1 if a command fails."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--blocks", type=int, nargs="+", help="numbers, from 1 (all)")
    args = parser.parse_args()
    if not (Path(sys.prefix) / "installed").is_file():
        parser.error(f"{sys.prefix} is not what `make install` makes; run .venv/bin/python")
    with tempfile.TemporaryDirectory(prefix="readme") as home:
        folder = Path(home) / "lora-study"
        make_clone(folder)
        blocks = read_blocks(folder / "README.md")
        numbers = range(1, len(blocks) + 1)
        if unknown := set(args.blocks or []).difference(numbers):
            parser.error(f"--blocks: README.md has {len(blocks)}, but no {min(unknown)}")
        for number, block in zip(numbers, blocks, strict=True):
            if args.blocks and number not in args.blocks:
                continue
            start = time.monotonic()
            words = ["bash", "-c", OPENING + block]
            done = subprocess.run(words, cwd=folder, stdin=subprocess.DEVNULL)
            result = "done" if done.returncode == 0 else f"failed with {done.returncode}"
            print(f"block {number}: {result} in {time.monotonic() - start:.0f} s", flush=True)
            if done.returncode != 0:
                return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
