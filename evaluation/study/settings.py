"""The tables of study.toml, read and checked."""

import tomllib
from itertools import product
from pathlib import Path
from typing import Literal

from pydantic import BaseModel, ConfigDict, ValidationError

from model.files import UserError

STUDY_FILE = Path(__file__).with_name("study.toml")
MAIN_BASE = "wrapped42"  # rates are tuned from it
DecodingName = Literal["greedy", "t0.85p0.85"]


class Table(BaseModel):
    """A table of study.toml; unknown keys are refused."""

    model_config = ConfigDict(extra="forbid", frozen=True)


class Size(Table):
    """Shape of a model, and how long its runs are."""

    shape: dict[str, int]
    learning_rate: float  # of pretraining
    epochs: float
    tuning_epochs: float
    seeds: list[int]


class Base(Table):
    """How a base is pretrained on the world's text."""

    flags: dict = {}
    epochs: float = 1
    published: dict[str, str] = {}  # folders of bases that are in the tree, by id


class Arm(Table):
    """What trains, and at which rates."""

    title: str
    stage: Literal["full_sft", "lora"]
    flags: dict = {}
    data: str = "sft"
    rates: dict[str, list[float]] = {}
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


class Condition(Table):
    """A bound on an estimate."""

    estimate: str
    sizes: list[str] | None = None  # instead of the claim's
    at_least: float = float("-inf")
    at_most: float = float("inf")


class Claim(Table):
    """A claim with the rule that decides it, and the prediction made before the runs."""

    name: str
    text: str
    prediction: str
    kind: Literal["difference", "size gap", "frontier", "capacity", "reachability"] = "difference"
    sizes: list[str] = ["xs"]
    decodings: list[DecodingName] = ["greedy", "t0.85p0.85"]
    set: str = "combinations"
    supported: list[Condition]
    refuted: list[Condition]


class ProbeSettings(Table):
    """How checkpoints are asked."""

    max_new_tokens: int
    batch_size: int
    draws: dict[DecodingName, int]


class Study(Table):
    """The whole of study.toml."""

    edition: int
    tie: float
    common: dict
    probe: ProbeSettings
    sizes: dict[str, Size]
    bases: dict[str, Base]
    arms: dict[str, Arm]
    experiments: list[Experiment]
    claims: list[Claim]


def read_study(path: Path = STUDY_FILE) -> Study:
    """Read and check study.toml."""
    try:
        study = Study(**tomllib.loads(path.read_text(encoding="utf-8")))
    except (tomllib.TOMLDecodeError, ValidationError) as error:
        raise UserError(f"{path}: {error}; mend the file") from error
    for experiment in study.experiments:
        for size, name in product(experiment.sizes, experiment.arms):
            if size not in study.sizes or name not in study.arms:
                raise UserError(f"{path}, {experiment.id!r}: no size {size!r} or arm {name!r}")
            if not study.arms[name].fixed and size not in study.arms[name].rates:
                raise UserError(f"{path}, {experiment.id!r}: {name!r} has no rates at {size!r}")
    return study
