"""Run the commands of README.md's blocks, in their order, in a clone of this repository.

    make stress                               # all blocks, after stress_resume.py
    python tests/run_readme.py --blocks 2   # one of them, counted from 1

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


def read_blocks(page: Path) -> list[str]:
    """Return the page's blocks of bash; the lines that clone are left out."""
    blocks = []
    for block in BLOCK.findall(page.read_text(encoding="utf-8")):
        lines = block.splitlines(keepends=True)
        kept = [line for line in lines if not line.startswith("git clone ")]
        blocks.append("".join(kept))
    return blocks


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
        for number, block in enumerate(read_blocks(folder / "README.md"), start=1):
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
