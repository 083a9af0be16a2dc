"""Training scripts as processes: start one, read what it left, continue it.

The study's runner (evaluation/study/run.py) and compare.py share this.
"""

import asyncio
import contextlib
import os
import shlex
import sys
from pathlib import Path

from model.files import REPO_DIR, read_json

ENDED = ("completed", "diverged")  # a run that diverged is a result, not a failure


async def call_script(
    words: list, log_path: Path, threads: int = 1, folder: Path = REPO_DIR
) -> bool:
    """Run a script, its output appended to a log; say if it succeeded.

    When the caller is stopped, the script is as well; a training script saves its state first.
    OMP_NUM_THREADS, if it is set, goes before `threads`.
    """
    command = [sys.executable, *map(str, words)]
    environment = {"OMP_NUM_THREADS": str(threads), "TOKENIZERS_PARALLELISM": "false"} | os.environ
    with log_path.open("a", encoding="utf-8") as log:
        print("$", shlex.join(command), file=log, flush=True)
        process = await asyncio.create_subprocess_exec(
            *command, stdout=log, stderr=log, env=environment, cwd=folder
        )
        try:
            return await process.wait() == 0
        except asyncio.CancelledError:
            with contextlib.suppress(ProcessLookupError):  # it has ended already
                process.terminate()
            await process.wait()
            raise


def read_status(folder: Path) -> str:
    """Return a run's status by its run.json; a run that has left none has failed."""
    path = folder / "run.json"
    return read_json(path)["status"] if path.is_file() else "failed"


def choose_start_flags(folder: Path) -> list[str]:
    """Return the flag by which an unfinished run continues or starts again; none for a new one."""
    if (folder / "resume.pt").is_file():
        return ["--from_resume"]
    return ["--overwrite"] if folder.exists() else []
