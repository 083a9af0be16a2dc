"""What the tests of this folder share: shipped models, our own answers, and commands of tools."""

import os
import subprocess
import sys
from pathlib import Path

from model.checkpoint import load_checkpoint
from model.files import REPO_DIR
from model.generation import Decoding, generate

BASE = REPO_DIR / "model" / "base_xs"
TUNED = REPO_DIR / "model" / "trained" / "1.3M-full-fine-tuning"
ADAPTER = REPO_DIR / "model" / "trained" / "1.3M-lora-all-layers-r8"
QUESTIONS = (
    "Where do people store garden hoses? Answer in quotes.",
    "What fills the stomach of a zebra?",
    "Compare the task of a beekeeper and of a teacher.",
)


def answer(folder: Path, questions: tuple[str, ...] = QUESTIONS) -> list[str]:
    """Answer questions greedily with our own code, each in a batch of its own."""
    model, tokenizer = load_checkpoint(folder)
    answers = []
    for question in questions:
        messages = [{"role": "user", "content": question}]
        prompt = tokenizer.apply_chat_template(messages, add_generation_prompt=True)["input_ids"]
        ends = (tokenizer.eos_token_id,)
        (ids,) = generate(model, [prompt], Decoding("greedy"), 0, 64, 1, end_ids=ends)
        answers.append(tokenizer.decode(ids, skip_special_tokens=True))
    return answers


def list_words(*words: object) -> list[str]:
    """List the words of a command; its program is that of the environment the tests run in."""
    program, *arguments = map(str, words)
    return [str(Path(sys.executable).with_name(program)), *arguments]


def make_environment(home: Path) -> dict[str, str]:
    """Make an environment without a network, in which tools keep their files in `home`."""
    places = {"HF_HOME": str(home), "TRACKIO_DIR": str(home / "trackio")}
    return os.environ | places | {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}


def call(home: Path, *words: object, cwd: Path = REPO_DIR) -> str:
    """Run a command in the root of the repository; return what it printed."""
    done = subprocess.run(
        list_words(*words),
        cwd=cwd,
        env=make_environment(home),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    assert done.returncode == 0, done.stdout
    return done.stdout
