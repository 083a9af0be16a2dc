"""Results of made-up runs whose shares of correct answers are known."""

import json
import re
import shutil
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pandas as pd

from evaluation.study.plan import Run, make_tuning_run
from evaluation.study.settings import MAIN_BASE, RESULTS_DIR, read_study

STUDY = read_study()
SETS = ("combinations", "unseen")
PROMPTS = 200  # of each set, every tenth in the tuning half
ORDER = np.random.default_rng(0).permutation(PROMPTS)  # in which prompts become correct
CELL = re.compile(
    r"(\w+)(?:\*([\d.e-]+))?(?:/(\d+))?(?:~(\d+))?(?:@(\w+))?(?:\^(\w+))?(?:#(\w+))?(?::(\w+))?"
)


def write_prompts(folder: Path) -> None:
    """Write study.toml and prompts.csv: things with two prompts each, in two skills."""
    shutil.copy(RESULTS_DIR / "study.toml", folder)
    table = pd.DataFrame([(name, i) for name in SETS for i in range(PROMPTS)], columns=["set", "i"])
    table["half"] = np.where(table.i % 10, "test", "tune")
    texts = {"id": table["set"] + "-", "skill": "skill ", "cluster": "thing "}
    numbers = {"id": table.i, "skill": table.i % 2, "cluster": table.i // 2}
    table = table.assign(**{key: texts[key] + numbers[key].astype(str) for key in texts})
    table.assign(chance=0.1).to_csv(folder / "prompts.csv", index=False)


def spell_outcomes(share: float, wrong: str = "f") -> str:
    """Return letters of which `share` are c; a larger share has the same and more."""
    return "".join(np.where(round(share * PROMPTS) > ORDER, "c", wrong))


def find_runs(cell: str) -> list[Run]:
    """Return the runs of a cell, one a seed, at the middle rate of its arm's grid."""
    arm, rate, epochs, samples, base, start, data, place = CELL.fullmatch(cell).groups()
    place, base = place or "xs", base or MAIN_BASE
    if arm == "base":
        return [Run(place, base)]
    size, settings = STUDY.sizes[place], STUDY.arms[arm]
    rates = settings.rates.get(place)
    rate = float(rate or (rates[1] if rates else settings.fixed[0]))
    rest = float(epochs or size.epochs), data or settings.data, start or "base"
    samples = int(samples) if samples else None
    return [Run(place, base, arm, rate, seed, *rest, samples) for seed in size.seeds]


def make_line(run: Run, outcomes: dict[str, str], step: int = 0, **scalars: float) -> dict:
    """Return a line of runs.jsonl, with the same outcomes under both decodings.

    The middle rate of a grid is the best on the tuning half, and lets the gates hold.
    """
    decodings = {"greedy": 1, "t0.85p0.85": 3}
    costs = ("parameters", "trainable_parameters", "step", "steps", "tokens", "flops")
    line = asdict(run) | {"base": run.base_id, "edition": 2, "status": "completed"}
    line |= {"id": f"{run.id}@{step}" if step else run.id, "step": step or 1000}
    line["train_data"] = {"tokens": 1, "tokenizer_sha256": run.base}
    line |= {"weights": "w", "base_fingerprint": "w"}
    line["cost"] = dict.fromkeys((*costs, "train_seconds", "peak_memory_bytes"), 1e9)
    grid = STUDY.arms[run.arm].rates.get(run.size, []) if run.arm != "base" else []
    best = 0.0 if run.arm == "base" else 0.9 if run.learning_rate in grid[1:2] else 0.5
    names = "tune_nll nll_text test_nll test_end_nll facts_combinations facts_unseen"
    line["scalars"] = {"tune_correct": best} | dict.fromkeys(names.split(), 1.0) | scalars
    line["outcomes"] = {
        name: {decoding: " ".join([text] * n) for decoding, n in decodings.items()}
        for name, text in outcomes.items()
    }
    return line


def write_runs(folder: Path, shares: dict[str, float | list | dict]) -> None:
    """Write prompts.csv and runs.jsonl.

    Args:
        shares: by cell, the share of correct answers; or pairs of shares of combinations and unseen
            things, of each checkpoint; or scalars (of each seed), `endless` is a share of answers.
    """
    write_prompts(folder)
    lines = []
    for cell, value in shares.items():
        for run in find_runs(cell):
            for rate in STUDY.arms[run.arm].rates.get(run.size, []) if run.arm != "base" else []:
                lines.append(make_line(make_tuning_run(STUDY, run.size, run.arm, rate), {}))
            if isinstance(value, list):
                for i, pair in enumerate(value, start=1):
                    texts = dict(zip(SETS, map(spell_outcomes, pair), strict=True))
                    lines.append(make_line(run, texts, 100 * i % (100 * len(value))))
            else:
                scalars = value if isinstance(value, dict) else {"endless": 1 - value}
                scalars = {k: np.broadcast_to(v, 3)[run.seed - 1] for k, v in scalars.items()}
                text = spell_outcomes(1 - scalars.get("endless", 1), "e")
                lines.append(make_line(run, dict.fromkeys(SETS, text), **scalars))
    lines.sort(key=lambda line: line["outcomes"] == {}, reverse=True)  # trials give way to runs
    last = {line["id"]: json.dumps(line) + "\n" for line in lines}
    (folder / "runs.jsonl").write_text("".join(last.values()))
