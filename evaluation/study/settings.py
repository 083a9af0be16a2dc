"""The tables of study.toml, read and checked."""

import tomllib
from itertools import product
from pathlib import Path
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from model.cli import UserError

RESULTS_DIR = Path(__file__).parent  # of study.toml, runs.jsonl and prompts.csv
MAIN_BASE = "wrapped42"  # rates are tuned from it


class Table(BaseModel):
    """A table of study.toml; unknown keys are refused."""

    model_config = ConfigDict(extra="forbid", frozen=True)


class Size(Table):
    """Shape of a model, and how long its runs are."""

    shape: dict[str, int]
    dtype: Literal["auto", "float32", "bfloat16"]  # of matrix products
    learning_rate: float  # of pretraining
    epochs: float
    tuning_epochs: float
    seeds: list[int]


class Arm(Table):
    """What trains, and at which rates."""

    title: str
    stage: Literal["full_sft", "lora"]
    flags: dict = {}
    data: str = "sft"
    rates: dict[str, Annotated[list[float], Field(min_length=2)]] = {}  # each twice the one before
    tuning_epochs: dict[str, float] = {}  # instead of the size's
    fixed: list[float] = []


class Experiment(Table):
    """Arms that run under the same conditions."""

    id: str
    sizes: list[str]
    arms: list[str]
    bases: list[str] = [MAIN_BASE]
    starts: list[str] = ["base"]  # or an arm, whose tuned run is the start
    data: str | None = None  # instead of the arm's
    epochs: float | None = None
    seeds: list[int] | None = None
    samples: int | None = None
    checkpoints: int = 0
    grid: bool = False  # every rate of the grid with every seed
    round: int = 2  # 3: asked in more ways, with fresh prompts, see PROTOCOL_3.md
    ways: list[Literal["no_template", "on_fft"]] = []  # in which round 3 asks besides the usual one
    rates: list[float] | None = None  # instead of the arm's best rate


class Study(Table):
    """The whole of study.toml."""

    edition: int
    tie: float
    common: dict
    probe: dict  # how checkpoints are asked: options of the function `probe`
    sizes: dict[str, Size]
    bases: dict[str, dict]  # flags of pretraining; tokenizer_path names data of the study
    arms: dict[str, Arm]
    experiments: list[Experiment]


def read_study(folder: Path = RESULTS_DIR) -> Study:
    """Read and check study.toml of a folder."""
    path = folder / "study.toml"
    try:
        study = Study(**tomllib.loads(path.read_text(encoding="utf-8")))
    except (tomllib.TOMLDecodeError, ValidationError) as error:
        raise UserError(f"{path}: {error}; mend the file") from error
    for one in study.experiments:
        for size, name in product(one.sizes, one.arms):
            arm = study.arms.get(name)
            has_rates = arm and (one.rates or arm.fixed or size in arm.rates)
            if size not in study.sizes or not has_rates:
                raise UserError(f"{path}: {one.id!r}: no rates of arm {name!r} at size {size!r}")
    return study
