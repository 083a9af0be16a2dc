"""A made-up study, small enough to work out its shares by hand.

Combinations have 20 prompts: 4 of the tuning half, then 12 of composition and 4 plain questions of
the test half. Unseen things have 2 and 4. Fresh combinations have 6 of composition, 2 plain.
"""

import json
import shutil
from pathlib import Path

import pandas as pd

from evaluation.study.plan import Run
from evaluation.study.settings import MAIN_BASE, RESULTS_DIR, read_study

STUDY = read_study()
DRAWS = {"greedy": 1, "t0.85p0.85": 3}
COMPOSITION = 12
PLAIN = 4
UNSEEN = 4


def list_prompts(name: str, skills: dict[str, int], half: str) -> list[dict]:
    """Return rows of prompts.csv; each prompt is a cluster of its own."""
    rows = []
    for skill, count in skills.items():
        for number in range(count):
            place = f"{name}-{half}-{skill}-{number}"
            row = {"id": place, "set": name, "half": half, "skill": skill}
            rows.append(row | {"cluster": place, "chance": 0.0})
    return rows


def write_prompts(folder: Path) -> None:
    """Write study.toml and the tables of prompts."""
    shutil.copy(RESULTS_DIR / "study.toml", folder)
    rows = list_prompts("combinations", {"repeat": 4}, "tune")
    rows += list_prompts("combinations", {"repeat": COMPOSITION, "who": PLAIN}, "test")
    rows += list_prompts("unseen", {"where": 2}, "tune")
    rows += list_prompts("unseen", {"where": UNSEEN}, "test")
    pd.DataFrame(rows).to_csv(folder / "prompts.csv", index=False)
    fresh = list_prompts("fresh_combinations", {"repeat": 6, "who": 2}, "test")
    pd.DataFrame(fresh).to_csv(folder / "prompts_3.csv", index=False)


def spell(right: int, count: int) -> str:
    """Return the letters of answers of which the first ones are correct, the others wrong facts."""
    return "c" * right + "f" * (count - right)


def spell_combinations(tune: int, composition: int, plain: int) -> str:
    """Return the letters of all prompts on combinations, given how many of each kind are right."""
    test = spell(composition, COMPOSITION) + spell(plain, PLAIN)
    return spell(tune, 4) + test


def make_run(size: str, arm: str, rate: float, seed: int, epochs: float | None = None) -> Run:
    """Return a run of an arm on its own data from the main base."""
    epochs = epochs or STUDY.sizes[size].epochs
    return Run(size, MAIN_BASE, arm, rate, seed, epochs, STUDY.arms[arm].data)


def make_line(run: Run, outcomes: dict[str, str], **facts: float | str | dict) -> dict:
    """Return a line of runs.jsonl: the same outcomes in every draw, and facts at the top level."""
    is_base = run.arm == "base"
    spelled = {}
    for name, letters in outcomes.items():
        spelled[name] = {decoding: " ".join([letters] * n) for decoding, n in DRAWS.items()}
    combinations = outcomes.get("combinations", "ffff")
    line = {
        "id": run.id,
        "edition": 2,
        "status": "completed",
        "size": run.size,
        "base": run.base_id,
        "arm": run.arm,
        "learning_rate": run.learning_rate,
        "seed": run.seed,
        "epochs": run.epochs,
        "data": run.data,
        "start": run.start,
        "samples": run.samples,
        "step": 1000 * int(run.epochs or 1),
        "dtype": "float32",
        "weights": "of the base" if is_base else run.id,
        "base_fingerprint": None if is_base else "of the base",
        "train_data": {"tokens": 1},
        "cost": {
            "parameters": 1000,
            "trainable_parameters": 100,
            "labeled_tokens": 400,
            "steps": 1,
            "peak_memory_bytes": 1e6,
        },
        "scalars": {
            "tune_correct": combinations[:4].count("c") / 4,
            "tune_nll": 1.0,
            "test_nll": 1.0,
            "nll_text": 1.0,
            "facts_combinations": 0.5,
            "facts_unseen": 0.8,
        },
        "outcomes": spelled,
    }
    return line | facts


def write_lines(folder: Path, lines: list[dict]) -> None:
    """Write runs.jsonl and what belongs to it."""
    write_prompts(folder)
    text = "".join(json.dumps(line) + "\n" for line in lines)
    (folder / "runs.jsonl").write_text(text, encoding="utf-8")


def make_study() -> list[dict]:
    """Return the lines of a study at 1.3M: base, full fine-tuning, all-layer and original LoRA.

    Full fine-tuning has 9, 10 and 11 of 12 by seed, all-layer LoRA 6, 6 and 9, the original LoRA
    3 in its single run. All answer 1 plain question of 4 and 2 unseen things of 4.
    """
    unseen = spell(0, 2) + spell(2, UNSEEN)
    lines = [make_line(Run("xs", MAIN_BASE), list_outcomes(0, 0))]
    for rate, tune in ((5e-4, 2), (2e-3, 1)):
        lines.append(make_line(make_run("xs", "fft", rate, 1), list_outcomes(tune, 8)))
    for seed, right in ((1, 9), (2, 10), (3, 11)):
        lines.append(make_line(make_run("xs", "fft", 1e-3, seed), list_outcomes(4, right)))
    for rate in (1.5e-3, 6e-3):
        lines.append(make_line(make_run("xs", "all_r8", rate, 1), list_outcomes(1, 5)))
    for seed, right in ((1, 6), (2, 6), (3, 9)):
        lines.append(make_line(make_run("xs", "all_r8", 3e-3, seed), list_outcomes(3, right)))
    lines.append(make_line(make_run("xs", "study", 1e-4, 1), list_outcomes(0, 3)))
    for line in lines[1:]:
        line["outcomes"]["unseen"] = {name: " ".join([unseen] * n) for name, n in DRAWS.items()}
    return lines


def list_outcomes(tune: int, composition: int) -> dict[str, str]:
    """Return outcomes with some tuning prompts and compositions right, and 1 plain question."""
    return {
        "combinations": spell_combinations(tune, composition, 1),
        "unseen": spell(0, 2 + UNSEEN),
    }
