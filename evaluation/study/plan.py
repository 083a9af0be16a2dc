"""The second edition's plan: study.toml -> runs, with learning rates tuned on the way.

A run is one training: a base, or an arm from a base with a learning rate and a seed. The first seed
runs each rate of an arm's grid, which grows until the best rate lies inside, by at most 3 rates on
a side. The rate with the largest share of correct answers on the tuning half of the combinations
wins. Among shares within `tie` of it, the lower NLL without end tokens wins. Other seeds run the
best rate (C9: all).
"""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from itertools import product
from pathlib import Path

import pandas as pd

from evaluation.study.settings import MAIN_BASE, Experiment, Study

MOST_EXTENSIONS = 3  # of a grid, on each side


@dataclass(frozen=True)
class Run:
    """One training run; a base has the arm `base`, and its seed ends its name."""

    size: str
    base: str
    arm: str = "base"
    learning_rate: float = 0.0
    seed: int = 0
    epochs: float = 0.0
    data: str = "sft"
    start: str = "base"
    samples: int | None = None
    round: int = 2
    ways: tuple[str, ...] = field(default=(), compare=False)
    checkpoints: int = field(default=0, compare=False)
    start_id: str | None = field(default=None, compare=False)  # whose weights it starts from

    @property
    def base_id(self) -> str:
        """Name the base, as its folder and its line in runs.jsonl are named."""
        return f"{self.size}-world-{self.base}"

    @property
    def id(self) -> str:
        """Name the run, as its folder and its line in runs.jsonl are named."""
        if self.arm == "base":
            return f"{self.base_id}-round3" if self.round == 3 else self.base_id
        words = [self.base_id, self.arm]
        if self.start != "base":
            words.append(f"from_{self.start}")
        if self.data != "sft":
            words.append(self.data)
        words.append(f"e{self.epochs:g}")
        if self.samples:
            words.append(f"n{self.samples}")
        words.append(f"lr{self.learning_rate:g}")
        words.append(f"s{self.seed}")
        return "-".join(words)


@dataclass(frozen=True)
class Sweep:
    """What is known of an arm's learning rates at a size."""

    reported: list[float]  # the best rate, or fixed ones; none while the best is unknown
    missing: list[float]  # must run to know the best
    shares: dict[float, float] = field(default_factory=dict)  # correct, by rate; nan: diverged
    leading: float | None = None  # the best of those that ran, while the best is unknown
    is_at_edge: bool = False  # the best of those that ran is the lowest or the highest of them


def make_tuning_run(study: Study, size: str, arm: str, rate: float) -> Run:
    """Return the run by which a rate of an arm is judged."""
    shape = study.sizes[size]
    spec = study.arms[arm]
    epochs = spec.tuning_epochs.get(size, shape.tuning_epochs)
    run = Run(size, MAIN_BASE, arm, rate, shape.seeds[0], epochs, spec.data)
    return replace(run, start_id=run.base_id)


def extend_grid(grid: list[float]) -> tuple[list[float], list[float]]:
    """Return the rates that may follow below and above a grid, the nearest first."""
    ratio = grid[1] / grid[0]
    below = []
    above = []
    for step in range(1, MOST_EXTENSIONS + 1):
        lower = grid[0] / ratio**step
        higher = grid[-1] * ratio**step
        below.append(float(f"{lower:.3g}"))  # as it stands in the run's name
        above.append(float(f"{higher:.3g}"))
    return below, above


def choose_rate(table: pd.DataFrame, tie: float) -> float | None:
    """Return the best of the rates that ran; None if none did.

    `table` has a row a rate, its index, with `tune_correct`, a share, and `tune_nll`, in nats a
    token. A run that diverged has neither, so it loses to each that did not.
    """
    if table.empty:
        return None
    shares = table["tune_correct"].fillna(-1)
    is_tied = shares >= shares.max() - tie - 1e-9  # for the rounding of a difference of shares
    nll = table["tune_nll"][is_tied].fillna(float("inf"))
    return float(nll.idxmin())


def tune_rate(study: Study, size: str, arm: str, done: pd.DataFrame) -> Sweep:
    """Choose the best rate of an arm's grid, or name the rates that must run first.

    `done` are runs of this edition, with `id`, `status`, `tune_correct` and `tune_nll`.
    """
    grid = sorted(study.arms[arm].rates.get(size, []))
    if not grid:
        return Sweep(study.arms[arm].fixed, [])
    below, above = extend_grid(grid)
    rates = {}  # by the id of the run that tries them
    for rate in [*below, *grid, *above]:
        run = make_tuning_run(study, size, arm, rate)
        rates[run.id] = rate
    # A run that failed says nothing of its rate, and runs again.
    ended = done[done["id"].isin(rates) & (done["status"] != "failed")]
    # A row a rate, from low to high.
    table = ended.set_index(ended["id"].map(rates))[["tune_correct", "tune_nll"]]
    table = table.astype(float).sort_index()
    shares = table["tune_correct"].to_dict()
    best = choose_rate(table, study.tie)
    is_at_edge = best is not None and best in (table.index[0], table.index[-1])
    missing = [rate for rate in grid if rate not in table.index]
    if not missing and is_at_edge:
        # A best rate at an end of what ran may have a better one beyond.
        beyond = above if best == table.index[-1] else below
        missing = [rate for rate in beyond if rate not in table.index][:1]
    if missing:
        return Sweep([], missing, shares, leading=best, is_at_edge=is_at_edge)
    return Sweep([best], [], shares, is_at_edge=is_at_edge)


def tune_rates(study: Study, done: pd.DataFrame) -> dict[tuple[str, str], Sweep]:
    """Return what is known of the learning rates of all arms by (size, arm)."""
    sweeps = {}
    for arm, size in product(study.arms, study.sizes):
        sweeps[size, arm] = tune_rate(study, size, arm, done)
    return sweeps


def plan_experiment(study: Study, experiment: Experiment, sweeps: dict) -> Iterator[Run]:
    """Yield an experiment's runs as far as their rates are known, those that tune first."""
    if experiment.rates:
        yield from plan_given_rates(study, experiment)
        return
    places = list(product(experiment.sizes, experiment.arms))
    for size, arm in places:
        sweep = sweeps[size, arm]
        for rate in (*sweep.missing, *sweep.shares):
            run = make_tuning_run(study, size, arm, rate)
            yield replace(run, checkpoints=experiment.checkpoints)
    for (size, arm), base, start in product(places, experiment.bases, experiment.starts):
        sweep = sweeps[size, arm]
        rates = sweep.reported
        if experiment.grid and rates:  # each rate whose run did not diverge
            rates = [rate for rate, share in sweep.shares.items() if not math.isnan(share)]
        shape = study.sizes[size]
        data = experiment.data or study.arms[arm].data
        epochs = experiment.epochs or shape.epochs
        for seed, rate in product(experiment.seeds or shape.seeds, rates):
            run = Run(size, base, arm, rate, seed, epochs, data, start, experiment.samples)
            start_id = name_start(study, run, sweeps)
            if start_id:
                yield replace(run, checkpoints=experiment.checkpoints, start_id=start_id)


def name_start(study: Study, run: Run, sweeps: dict) -> str | None:
    """Return the id of the run whose weights a run starts from; None while its rate is unknown."""
    if run.start == "base":
        return run.base_id
    rates = sweeps[run.size, run.start].reported
    if not rates:
        return None
    epochs = study.sizes[run.size].epochs
    return Run(run.size, run.base, run.start, *rates, run.seed, epochs).id


def plan_given_rates(study: Study, experiment: Experiment) -> Iterator[Run]:
    """Yield the runs of an experiment that names its learning rates, one after the other.

    In round 3 the base itself is a run, too: it is asked in the same ways as what trains from it.
    """
    for size, base, arm in product(experiment.sizes, experiment.bases, experiment.arms):
        shape = study.sizes[size]
        epochs = experiment.epochs or shape.epochs
        data = experiment.data or study.arms[arm].data
        if experiment.round == 3:
            run = Run(size, base, round=3, ways=("no_template",))
            yield replace(run, start_id=run.base_id)
        for seed, rate in product(experiment.seeds or shape.seeds, experiment.rates):
            run = Run(size, base, arm, rate, seed, epochs, data, round=experiment.round)
            yield replace(run, ways=tuple(experiment.ways), start_id=run.base_id)


def plan_runs(study: Study, done: pd.DataFrame) -> list[Run]:
    """Return all runs that are known now, each once: every base before the runs that need it.

    A run keeps checkpoints if any experiment asks for them.
    """
    runs: dict[str, Run] = {}
    sweeps = tune_rates(study, done)
    for experiment in study.experiments:
        for run in plan_experiment(study, experiment, sweeps):
            base = Run(run.size, run.base)
            runs.setdefault(base.id, base)
            planned = runs.get(run.id, run)
            most = max(run.checkpoints, planned.checkpoints)
            runs[run.id] = replace(run, checkpoints=most)
    return list(runs.values())


def make_command(study: Study, run: Run, find: Callable[[str], Path], save_dir: Path) -> list[str]:
    """Return the script that trains a run, and its flags; `find` gives paths of data by name."""
    flags = {
        **study.common,
        "dtype": study.sizes[run.size].dtype,
        "save_dir": save_dir,
        "learning_rate": run.learning_rate,
    }
    if run.arm == "base":
        stage = "pretrain"
        set_base_flags(flags, study, run, find)
    else:
        stage = study.arms[run.arm].stage
        set_arm_flags(flags, study, run, find, save_dir)
    words = [f"trainer/train_{stage}.py"]
    for name, value in flags.items():
        words.append(f"--{name}")
        if isinstance(value, list):
            words += map(str, value)
        elif value is not True:  # a switch has no value
            words.append(str(value))
    return words


def set_base_flags(flags: dict, study: Study, run: Run, find: Callable[[str], Path]) -> None:
    """Set the flags that pretrain a base."""
    kind = run.base.rstrip("0123456789")
    seed = int(run.base.removeprefix(kind))
    size = study.sizes[run.size]
    del flags["show_answers"]  # a base has none
    flags |= size.shape
    flags |= study.bases[kind]
    flags["learning_rate"] = size.learning_rate
    data = flags.pop("data", "pretrain")
    flags["run_name"] = f"{run.id}-float32"
    flags["seed"] = seed
    flags["data_path"] = find(data)
    flags["tokenizer_path"] = find(flags["tokenizer_path"])


def set_arm_flags(
    flags: dict, study: Study, run: Run, find: Callable[[str], Path], save_dir: Path
) -> None:
    """Set the flags that train an arm from the weights of another run."""
    arm = study.arms[run.arm]
    flags |= arm.flags
    flags["lora_name" if arm.stage == "lora" else "run_name"] = run.id
    flags["from_weight"] = save_dir / run.start_id
    flags["seed"] = run.seed
    flags["epochs"] = run.epochs
    flags["data_path"] = find(run.data)
    if run.samples:
        flags["max_train_samples"] = run.samples
    if run.checkpoints:
        flags["keep_checkpoints"] = run.checkpoints
