"""The tables of study.toml, read and checked."""

import re
import tomllib
from itertools import product
from pathlib import Path
from typing import Literal

from pydantic import BaseModel, ConfigDict, ValidationError, model_validator

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
    """A bound on an estimate: a sum of cells, such as `fft - 0.5 seed/10`."""

    estimate: str
    sizes: list[str] | None = None  # instead of the claim's
    scalar: str | None = None  # of the runs, instead of the share of correct answers
    log_odds: bool = False  # of the shares
    whole: bool = True  # the interval and each seed satisfy it; else the estimate alone
    at_least: float = float("-inf")
    at_most: float = float("inf")

    @property
    def title(self) -> str:
        """Name what is bounded."""
        return ", ".join(
            [self.estimate, *["log-odds"] * self.log_odds, *filter(None, [self.scalar])]
        )

    @property
    def terms(self) -> list[tuple[float, str]]:
        """Split the sum into factors and cells."""
        found = re.findall(r"(?:^|([+-]) )(?:([\d.]+) )?([a-z]\S*)", self.estimate)
        return [(float(f"{sign}{factor or 1}"), cell) for sign, factor, cell in found]


class Claim(Table):
    """A claim with the rule that decides it, and the prediction made before the runs."""

    name: str
    text: str
    prediction: str
    kind: Literal["share", "frontier", "reachability"] = "share"
    sizes: list[str] = ["xs"]
    decodings: list[DecodingName] = ["greedy", "t0.85p0.85"]
    middle_skills: bool = False  # those on which full fine-tuning has 40 to 95% at every size
    bases: list[str] = []  # of reachability: in the order of their shares of endless answers
    supported: list[Condition]
    refuted: list[Condition]
    refuted_by: Literal["all", "any"] = "all"  # of its conditions


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
    bases: dict[str, dict]  # flags of pretraining
    arms: dict[str, Arm]
    experiments: list[Experiment]
    claims: list[Claim]

    @model_validator(mode="after")
    def check_names(self) -> "Study":
        """Refuse sizes, arms and cells that do not exist, and arms without rates."""
        for one in self.experiments:
            for size, name in product(one.sizes, one.arms):
                if size not in self.sizes or name not in self.arms:
                    raise ValueError(f"{one.id!r}: no size {size!r} or arm {name!r}")
                if not self.arms[name].fixed and size not in self.arms[name].rates:
                    raise ValueError(f"{one.id!r}: {name!r} has no rates at {size!r}")
        for claim in self.claims:
            for _, cell in [t for c in claim.supported + claim.refuted for t in c.terms]:
                arm = re.match(r"\w+", cell)[0]
                if claim.kind == "share" and arm not in self.arms:
                    raise ValueError(f"{claim.name}: no arm {arm!r}")
        return self


def read_study(path: Path = STUDY_FILE) -> Study:
    """Read and check study.toml."""
    try:
        return Study(**tomllib.loads(path.read_text(encoding="utf-8")))
    except (tomllib.TOMLDecodeError, ValidationError) as error:
        raise UserError(f"{path}: {error}; mend the file") from error
