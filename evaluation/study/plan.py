"""The second edition's plan: study.toml -> runs, with learning rates tuned on the way.

A run is one training: a base, or an arm from a base with a learning rate and a seed. The first seed
takes an arm's grid of rates, which is extended until the best rate lies inside. The rate with the
largest share of correct answers on the tuning half of the combinations wins. Shares within
`tie` are told apart by NLL without end tokens. The other seeds take the best rate alone.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from itertools import product
from pathlib import Path

import pandas as pd

from evaluation.study.settings import MAIN_BASE, Experiment, Study

MOST_EXTENSIONS = 3  # of a grid, on each side
SCRIPTS = {"pretrain": "train_pretrain", "full_sft": "train_full_sft", "lora": "train_lora"}


@dataclass(frozen=True)
class Run:
    """One training run; a base has no arm, and its seed ends its name."""

    size: str
    base: str
    arm: str | None = None
    learning_rate: float = 0.0
    seed: int = 0
    epochs: float = 0.0
    data: str = "sft"
    start: str = "base"
    samples: int | None = None
    checkpoints: int = field(default=0, compare=False)
    start_id: str | None = field(default=None, compare=False)  # whose weights it starts from

    @property
    def base_id(self) -> str:
        """Name the base, as its folder and its line in runs.jsonl are named."""
        return f"{self.size}-world-{self.base}"

    @property
    def id(self) -> str:
        """Name the run, as its folder and its line in runs.jsonl are named."""
        if self.arm is None:
            return self.base_id
        words = [self.base_id, self.arm]
        words += [f"from_{self.start}"] if self.start != "base" else []
        words += [self.data] if self.data != "sft" else []
        words += [f"e{self.epochs:g}"] + ([f"n{self.samples}"] if self.samples else [])
        return "-".join([*words, f"lr{self.learning_rate:g}", f"s{self.seed}"])


@dataclass(frozen=True)
class Sweep:
    """What is known of an arm's learning rates at a size."""

    best: float | None  # None while runs are missing
    missing: list[float]
    is_interior: bool
    shares: dict[float, float]  # correct on the tuning half, by rate


def make_tuning_run(study: Study, size: str, arm: str, rate: float) -> Run:
    """Return the run by which a rate of an arm is judged."""
    shape = study.sizes[size]
    place = (shape.seeds[0], shape.tuning_epochs, study.arms[arm].data)
    run = Run(size, MAIN_BASE, arm, rate, *place)
    return replace(run, start_id=run.base_id)


def tune_rate(study: Study, size: str, arm: str, done: pd.DataFrame) -> Sweep:
    """Choose the best rate of an arm's grid, or name the rates that must run first.

    Args:
        done: runs of this edition, with `id`, `tune_correct` and `tune_nll`.
    """
    grid = sorted(study.arms[arm].rates[size])
    ratio = grid[1] / grid[0]
    found = done.set_index("id")[["tune_correct", "tune_nll"]]

    def look_up(rates: list[float]) -> dict[float, tuple[float, float]]:
        ids = {rate: make_tuning_run(study, size, arm, rate).id for rate in rates}
        return {rate: tuple(found.loc[name]) for rate, name in ids.items() if name in found.index}

    steps = range(1, MOST_EXTENSIONS + 1)
    below = [float(f"{grid[0] / ratio**step:.3g}") for step in steps]
    above = [float(f"{grid[-1] * ratio**step:.3g}") for step in steps]
    known = look_up(grid)
    if missing := [rate for rate in grid if rate not in known]:
        return Sweep(None, missing, False, {rate: known[rate][0] for rate in known})
    known |= look_up(below + above)
    table = pd.DataFrame(known, index=["share", "nll"]).T.fillna({"share": -1, "nll": float("inf")})
    best = float(table[table.share >= table.share.max() - study.tie].nll.idxmin())
    beyond = {min(known): below, max(known): above}.get(best, [])
    missing = [rate for rate in beyond if rate not in known][:1]
    return Sweep(None if missing else best, missing, not beyond, table.share.sort_index().to_dict())


def list_rates(study: Study, size: str, arm: str, done: pd.DataFrame) -> list[float]:
    """Return the rates at which an arm is reported; none while its best rate is unknown."""
    if study.arms[arm].fixed or size not in study.arms[arm].rates:
        return study.arms[arm].fixed
    best = tune_rate(study, size, arm, done).best
    return [] if best is None else [best]


def plan_experiment(study: Study, experiment: Experiment, done: pd.DataFrame) -> Iterator[Run]:
    """Yield an experiment's runs as far as their rates are known, those that tune first."""
    for size, arm in product(experiment.sizes, experiment.arms):
        if not study.arms[arm].fixed:
            known = tune_rate(study, size, arm, done).missing or study.arms[arm].rates[size]
            yield from (make_tuning_run(study, size, arm, rate) for rate in known)
    for size, base, arm, start in product(
        experiment.sizes, experiment.bases, experiment.arms, experiment.starts
    ):
        rates = list_rates(study, size, arm, done)
        if experiment.grid and rates:
            rates = study.arms[arm].rates[size]
        seeds = experiment.seeds or study.sizes[size].seeds
        for seed, rate in product(seeds, rates):
            run = Run(
                size,
                base,
                arm,
                rate,
                seed,
                experiment.epochs or study.sizes[size].epochs,
                experiment.data or study.arms[arm].data,
                start,
                experiment.samples,
                experiment.checkpoints,
            )
            first = list_rates(study, size, start, done) if start != "base" else []
            if first:
                origin = Run(size, base, start, first[0], seed, study.sizes[size].epochs)
                yield replace(run, start_id=origin.id)
            elif start == "base":
                yield replace(run, start_id=run.base_id)


def plan_runs(study: Study, done: pd.DataFrame) -> list[Run]:
    """Return all runs that are known now, each once: every base before the runs that need it.

    A run keeps checkpoints if any experiment asks for them.
    """
    runs: dict[str, Run] = {}
    for experiment in study.experiments:
        for run in plan_experiment(study, experiment, done):
            base = Run(run.size, run.base)
            runs.setdefault(base.id, base)
            kept = max(run.checkpoints, runs.get(run.id, run).checkpoints)
            runs[run.id] = replace(run, checkpoints=kept)
    return list(runs.values())


def make_flags(study: Study, run: Run, data: dict[str, Path], save_dir: Path) -> tuple[str, dict]:
    """Return the script of a run and its flags."""
    size = study.sizes[run.size]
    flags = study.common | {"save_dir": save_dir, "run_name": run.id}
    if run.arm is None:
        name = run.base.rstrip("0123456789")
        base, seed = study.bases[name], int(run.base[len(name) :])
        own = {"learning_rate": size.learning_rate, "epochs": base.epochs, "seed": seed}
        return SCRIPTS["pretrain"], flags | size.shape | base.flags | own | {
            "run_name": f"{run.id}-float32",
            "data_path": data["pretrain"],
        }
    arm = study.arms[run.arm]
    own = {
        "from_weight": save_dir / run.start_id,
        "learning_rate": run.learning_rate,
        "seed": run.seed,
    }
    own |= {"epochs": run.epochs, "data_path": data[run.data]}
    own |= {"max_train_samples": run.samples} if run.samples else {}
    own |= {"keep_checkpoints": run.checkpoints} if run.checkpoints else {}
    if arm.stage == "lora":
        own["lora_name"] = flags.pop("run_name")
    return SCRIPTS[arm.stage], flags | arm.flags | own
