"""The second edition's plan: study.toml -> runs, with learning rates tuned on the way.

A run is one training: a base, or an arm from a base with a learning rate and a seed. The first seed
runs each rate of an arm's grid, which grows until the best rate lies inside. The rate with the
largest share of correct answers on the tuning half of the combinations wins. Among shares within
`tie` of it, the lower NLL without end tokens wins. Other seeds run the best rate (C9: all).
"""

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
        words += [f"from_{self.start}"] if self.start != "base" else []
        words += [self.data] if self.data != "sft" else []
        words += [f"e{self.epochs:g}"] + ([f"n{self.samples}"] if self.samples else [])
        return "-".join([*words, f"lr{self.learning_rate:g}", f"s{self.seed}"])


@dataclass(frozen=True)
class Sweep:
    """What is known of an arm's learning rates at a size."""

    reported: list[float]  # the best rate, or fixed ones; none while the best is unknown
    missing: list[float]  # must run to know the best
    shares: dict[float, float] = field(default_factory=dict)  # correct, by rate; nan: diverged
    leading: float | None = None  # the best of those that ran, while the best is unknown


def make_tuning_run(study: Study, size: str, arm: str, rate: float) -> Run:
    """Return the run by which a rate of an arm is judged."""
    shape, spec = study.sizes[size], study.arms[arm]
    epochs = spec.tuning_epochs.get(size, shape.tuning_epochs)
    run = Run(size, MAIN_BASE, arm, rate, shape.seeds[0], epochs, spec.data)
    return replace(run, start_id=run.base_id)


def tune_rate(study: Study, size: str, arm: str, done: pd.DataFrame) -> Sweep:
    """Choose the best rate of an arm's grid, or name the rates that must run first.

    `done` are runs of this edition, with `id`, `status`, `tune_correct` and `tune_nll`.
    """
    grid = sorted(study.arms[arm].rates.get(size, []))
    if not grid:
        return Sweep(study.arms[arm].fixed, [])
    ratio, steps = grid[1] / grid[0], range(1, MOST_EXTENSIONS + 1)
    below = [float(f"{grid[0] / ratio**step:.3g}") for step in steps]
    above = [float(f"{grid[-1] * ratio**step:.3g}") for step in steps]
    ids = {make_tuning_run(study, size, arm, r).id: r for r in sorted(grid + below + above)}
    ended = done[done.id.isin(ids) & (done.status != "failed")]
    table = ended.set_index(ended.id.map(ids))[["tune_correct", "tune_nll"]].sort_index()
    shares = table.tune_correct.astype(float)
    ties = table[shares.fillna(-1) >= shares.fillna(-1).max() - study.tie - 1e-9]
    best = float(ties.tune_nll.astype(float).fillna(float("inf")).idxmin()) if len(ties) else None
    missing = [rate for rate in grid if rate not in table.index]
    if not missing:
        beyond = {shares.index[0]: below, shares.index[-1]: above}.get(best, [])
        missing = [rate for rate in beyond if rate not in table.index][:1]
    known = {"reported": [], "leading": best} if missing else {"reported": [best]}
    return Sweep(**known, missing=missing, shares=shares.to_dict())


def tune_rates(study: Study, done: pd.DataFrame) -> dict[tuple[str, str], Sweep]:
    """Return what is known of the learning rates of all arms by (size, arm)."""
    return {(s, a): tune_rate(study, s, a, done) for a, s in product(study.arms, study.sizes)}


def plan_experiment(study: Study, experiment: Experiment, sweeps: dict) -> Iterator[Run]:
    """Yield an experiment's runs as far as their rates are known, those that tune first."""
    if experiment.rates:
        yield from plan_given_rates(study, experiment)
        return
    places = list(product(experiment.sizes, experiment.arms))
    for size, arm in places:
        for rate in (*sweeps[size, arm].missing, *sweeps[size, arm].shares):
            run = make_tuning_run(study, size, arm, rate)
            yield replace(run, checkpoints=experiment.checkpoints)
    for (size, arm), base, start in product(places, experiment.bases, experiment.starts):
        shape, data = study.sizes[size], experiment.data or study.arms[arm].data
        epochs, rates = experiment.epochs or shape.epochs, sweeps[size, arm].reported
        if experiment.grid and rates:
            rates = [r for r, share in sweeps[size, arm].shares.items() if share == share]
        for seed, rate in product(experiment.seeds or shape.seeds, rates):
            run = Run(size, base, arm, rate, seed, epochs, data, start, experiment.samples)
            run = replace(run, checkpoints=experiment.checkpoints, start_id=run.base_id)
            if start == "base":
                yield run
            elif first := sweeps[size, start].reported:
                yield replace(run, start_id=Run(size, base, start, *first, seed, shape.epochs).id)


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
            most = max(run.checkpoints, runs.get(run.id, run).checkpoints)
            runs[run.id] = replace(run, checkpoints=most)
    return list(runs.values())


def make_command(study: Study, run: Run, find: Callable[[str], Path], save_dir: Path) -> list[str]:
    """Return the script that trains a run, and its flags; `find` gives paths of data by name."""
    flags = {**study.common, "dtype": study.sizes[run.size].dtype, "save_dir": save_dir}
    flags["learning_rate"] = run.learning_rate
    if run.arm == "base":
        name, size = run.base.rstrip("0123456789"), study.sizes[run.size]
        flags.pop("show_answers")  # a base has none
        stage, seed = "pretrain", int(run.base[len(name) :])
        flags |= {**size.shape, **study.bases[name], "learning_rate": size.learning_rate}
        data = flags.pop("data", "pretrain")
        flags |= {"run_name": f"{run.id}-float32", "seed": seed, "data_path": find(data)}
        flags["tokenizer_path"] = find(flags["tokenizer_path"])
    else:
        arm = study.arms[run.arm]
        stage, name = arm.stage, "lora_name" if arm.stage == "lora" else "run_name"
        flags |= {**arm.flags, name: run.id, "from_weight": save_dir / run.start_id}
        flags |= {"seed": run.seed, "epochs": run.epochs, "data_path": find(run.data)}
        flags |= {"max_train_samples": run.samples} if run.samples else {}
        flags |= {"keep_checkpoints": run.checkpoints} if run.checkpoints else {}
    words = [f"trainer/train_{stage}.py"]
    for name, value in flags.items():
        values = value if isinstance(value, list) else [] if value is True else [value]
        words += [f"--{name}", *map(str, values)]
    return words
