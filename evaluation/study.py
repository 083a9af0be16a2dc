"""The study as data: reads `study.toml`, lists its runs, and finds what is known of them.

A run is one training: a base, or an arm from a base with a rate and a seed. Its result is one JSON
file in `results/study/`, made by `run_study.py`:

    id, command, seconds      what was run
    run                       what the training script recorded (run.json): settings, data, cost
    curve                     [step, training loss], a part of the logged steps, the last too
    weights                   fingerprint of a base's weights, which its arms must have started from
    held_out                  by data: nats and tokens of each conversation's response, and nats
                              and number of the end tokens among them (not of the oldest runs)
    text_nll                  nats a token of held-out pretraining text
    parts                     by part of its update, the nats of each conversation, if asked for
    update                    shares and ranks of that update
    probe                     prompts, and by decoding the rates and each prompt's outcomes

A run that diverged has a result too, without the measures; one that broke off has none yet.
"""

import math
import tomllib
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import fmean

from dataset.command_line import SettingsError
from model.files import CheckpointError, read_json

STUDY_FILE = Path(__file__).with_name("study.toml")
FULL = "fft"  # the arm that recovery is a share of
# Learning rates are tuned on every other held-out conversation, and R is measured on the rest.
VALIDATION, TEST = slice(0, None, 2), slice(1, None, 2)
SCRIPTS = {"pretrain": "train_pretrain", "full_sft": "train_full_sft", "lora": "train_lora"}
# What an experiment may leave out.
DEFAULTS = {
    "sizes": ["xs"],
    "base": "plain",  # or a table by size
    "base_seed": 42,
    "variant": "main",
    "probe": False,
    "ladder": "",  # or "steps", "without"
    "few_prompts": False,
    "summary": False,  # one of the README's first tables
    "claims": [],
}
# What a rule may bound: R of a cell, what R of one is above another's, or how many answers of one
# never end or are blank, as a share of the other's.
CONDITIONS = ("recovery", "gain", "bad_answers")
TABLES = ("common", "measure", "probe", "data", "parts", "sizes", "bases", "arms", "tuning")
TABLES += ("variants", "experiments")
EXPERIMENT = ("id", "question", "cells", "seeds")
LADDERS = ("", "steps", "without")
RESULT = ("id", "size", "base", "arm", "seed", "status", "run", "seconds")  # what each has
CLAIM = ("name", "text", "not_shown", "supported", "refuted")


@dataclass(frozen=True)
class Cell:
    """Runs that differ by their seed alone."""

    size: str
    base: str
    base_seed: int
    arm: str
    rate: str  # as study.toml writes it, or "tuned"
    variant: str
    part: str = ""  # of the update; "": all of it


@dataclass(frozen=True)
class Run:
    """One training run; a base has no arm, and its seed is its pretraining's."""

    size: str
    base: str
    seed: int
    base_seed: int | None = None
    arm: str | None = None
    rate: str | None = None
    variant: str | None = None
    continues: str | None = None  # of a base, the one whose weights it starts from
    probe: bool = False  # with prompts, too
    parts: bool = False  # its update cut to parts, and these measured

    @property
    def id(self) -> str:
        """Its name, of the run folder and of the result."""
        if self.arm is None:
            return base_id(self.size, self.base, self.seed)
        variant = "" if self.variant == "main" else f"-{self.variant}"
        return f"{self.base_id}-{self.arm}{variant}-lr{self.rate}-s{self.seed}"

    @property
    def base_id(self) -> str | None:
        """The run that it starts from; None for random weights."""
        if self.arm is not None:
            return base_id(self.size, self.base, self.base_seed)
        return None if self.continues is None else base_id(self.size, self.continues, self.seed)


def base_id(size: str, base: str, seed: int) -> str:
    """The name of a base's run, by the seed of its pretraining."""
    return f"{size}-{base}{seed}"


# ---------------------------------------------------------------- reading


def read_study(path: Path = STUDY_FILE) -> dict:
    """The study's tables, the experiments with `DEFAULTS` filled in.

    Raises:
        SettingsError: broken TOML, or a name that no table has; the message says which.
    """
    try:
        study = tomllib.loads(path.read_text(encoding="utf-8"))
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise SettingsError(f"{path}: {error}") from error
    if missing := [table for table in TABLES if table not in study]:
        raise SettingsError(f"{path}: has no [{missing[0]}]")
    check_names(study["experiments"], path)
    study["experiments"] = [DEFAULTS | experiment for experiment in study["experiments"]]
    for size in study["sizes"]:
        if study["tuning"]["base"].get(size) not in study["bases"]:
            raise SettingsError(f"{path}: [tuning] names no base for {size!r} that [bases] has")
    check_bases(study, path)
    for experiment in study["experiments"]:
        try:
            check_experiment(study, experiment)
        except SettingsError as error:
            raise SettingsError(f"{path}, experiment {experiment['id']!r}: {error}") from error
    return study


def check_names(experiments: list[dict], path: Path) -> None:
    """Refuses experiments with keys that nobody reads, without one that is needed, or of one name.

    Raises:
        SettingsError: names the experiment, or the claim whose name another has.
    """
    for place, experiment in enumerate(experiments, start=1):
        where = f"{path}, experiment {experiment.get('id', place)!r}"
        if missing := [key for key in EXPERIMENT if key not in experiment]:
            raise SettingsError(f"{where}: has no {missing[0]}")
        if odd := sorted(experiment.keys() - {*EXPERIMENT, "rungs", *DEFAULTS}):
            raise SettingsError(f"{where}: {odd[0]} is no key of an experiment")
    claims = [claim for one in experiments for claim in one.get("claims", [])]
    named = [claim["name"] for claim in claims if "name" in claim]  # others are refused later
    for names in ([experiment["id"] for experiment in experiments], named):
        if twice := [name for name in names if names.count(name) > 1]:
            raise SettingsError(f"{path}: {twice[0]!r} is named twice")


def check_bases(study: dict, path: Path) -> None:
    """Refuses a base that continues one which does not stand above it."""
    above = []
    for name, base in study["bases"].items():
        if "continues" in base and base["continues"] not in above:
            raise SettingsError(
                f"{path}: base {name!r} continues {base['continues']!r}, which is not above it"
            )
        above.append(name)


def check_experiment(study: dict, experiment: dict) -> None:
    """Refuses names that no table has, and rules and ladders that cannot be read."""
    names = [(size, "sizes") for size in experiment["sizes"]]
    names += [(base_name(experiment, size), "bases") for size in experiment["sizes"]]
    texts = list(experiment["cells"])
    for claim in experiment["claims"]:
        if missing := [name for name in CLAIM if name not in claim]:
            raise SettingsError(f"a claim has no {missing[0]}")
        if set(claim["name"]) & set(".:;()"):
            raise SettingsError(f"claim {claim['name']!r}: no . : ; ( ) in a name that is cited")
        for condition in (*claim["supported"], *claim["refuted"]):
            check_condition(condition)
            texts += cells_of(condition)
            check_reference(study, experiment, condition)
    for text in texts:
        cell = parse_cell(text, experiment, experiment["sizes"][0])
        names += [(cell.arm, "arms"), (cell.variant, "variants")]
        if cell.rate == "sweep":
            check_sweep(study["tuning"], experiment, cell)
    for name, table in names:
        if name not in study[table]:
            raise SettingsError(f"{name!r} is not among {', '.join(study[table])}")
    if experiment["ladder"] not in LADDERS:
        raise SettingsError(f"ladder {experiment['ladder']!r}: choose among {LADDERS[1:]}")
    rungs = experiment.get("rungs", [])
    if experiment["ladder"] and len(rungs) != len(experiment["cells"]):
        raise SettingsError(f"{len(rungs)} rungs for {len(experiment['cells'])} cells")


def check_sweep(tuning: dict, experiment: dict, cell: Cell) -> None:
    """Refuses a sweep of other runs than those that rates are tuned by."""
    place = {"base_seed": cell.base_seed, "variant": cell.variant}
    odd = [name for name, value in place.items() if value != tuning[name]]
    for size in experiment["sizes"]:
        own = {"base": base_name(experiment, size), "seeds": experiment["seeds"]}
        odd += [name for name, value in own.items() if value != tuning[name].get(size)]
    odd += [name for name, value in (("part", cell.part), ("probe", experiment["probe"])) if value]
    if odd:
        raise SettingsError(f"{cell.arm}@sweep has {odd[0]} other than [tuning]'s")


def check_condition(condition: dict) -> None:
    """Refuses a condition of a rule that is none of `CONDITIONS`, or sets no bound."""
    kinds = [kind for kind in CONDITIONS if kind in condition]
    bounds = [bound for bound in ("at_least", "at_most") if bound in condition]
    if len(kinds) != 1 or len(bounds) != 1 or len(condition) != 2:
        raise SettingsError(
            f"{condition} must have one of {', '.join(CONDITIONS)} and one of at_least, at_most"
        )
    (kind,) = kinds
    if kind != "recovery" and len(condition[kind]) != 2:
        raise SettingsError(f"{condition}: {kind} is of two cells")


def check_reference(study: dict, experiment: dict, condition: dict) -> None:
    """Refuses a difference of two recoveries that are shares of different gains."""
    if kind_of(condition) != "gain":
        return
    cells = [parse_cell(text, experiment, experiment["sizes"][0]) for text in cells_of(condition)]
    variants = [study["variants"].get(cell.variant, {}) for cell in cells]
    facts = [[variant.get(name) for name in ("data", "reference")] for variant in variants]
    if facts[0] != facts[1]:
        raise SettingsError(f"{condition}: its cells differ in data, or in what R is a share of")


def cells_of(condition: dict) -> list[str]:
    """The cells that a condition of a rule is about."""
    kind = kind_of(condition)
    return [condition[kind]] if kind == "recovery" else list(condition[kind])


def kind_of(condition: dict) -> str:
    """Which of `CONDITIONS` a condition is."""
    return next(kind for kind in CONDITIONS if kind in condition)


def parse_cell(text: str, experiment: dict, size: str) -> Cell:
    """The cell that `arm@rate`, `arm@rate/variant` or `arm@rate+part` names.

    Raises:
        SettingsError: it is no such text.
    """
    whole, _, part = text.partition("+")
    name, _, variant = whole.partition("/")
    arm, at, rate = name.partition("@")
    if not at or not (rate in ("sweep", "tuned") or is_number(rate)):
        raise SettingsError(f"{text!r} must be arm@rate, with a number, sweep or tuned")
    variant = variant or experiment["variant"]
    base = base_name(experiment, size)
    return Cell(size, base, experiment["base_seed"], arm, rate, variant, part)


def base_name(experiment: dict, size: str) -> str:
    """The base that an experiment's arms start from at a size.

    Raises:
        SettingsError: its table of bases has none for this size.
    """
    bases = experiment["base"]
    if isinstance(bases, str):
        return bases
    if size not in bases:
        raise SettingsError(f"base: names none for size {size!r}")
    return bases[size]


def tuned_cells(experiment: dict, size: str) -> list[Cell]:
    """The cells of an experiment, a sweep at its best rate."""
    cells = [parse_cell(text, experiment, size) for text in experiment["cells"]]
    return [replace(cell, rate="tuned") if cell.rate == "sweep" else cell for cell in cells]


def short_name(cell: Cell) -> str:
    """A cell without what is the same for most."""
    usual = (cell.base, cell.base_seed) == (DEFAULTS["base"], DEFAULTS["base_seed"])
    base = "" if usual else f"from {cell.base}{cell.base_seed}"
    return ", ".join(filter(None, (cell.arm, *variant_of(cell), cell.part, base)))


def variant_of(cell: Cell) -> list[str]:
    """A cell's variant, if it is not what most have."""
    return [] if cell.variant == DEFAULTS["variant"] else [cell.variant]


def titled(study: dict, cell: Cell) -> str:
    """A cell by its arm's title, in a table or figure of one base."""
    return ", ".join([study["arms"][cell.arm]["title"], *variant_of(cell)])


def full_name(study: dict, cell: Cell) -> str:
    """A cell as figures name it, by its arm's title."""
    return short_name(replace(cell, arm=study["arms"][cell.arm]["title"]))


def is_number(text: str) -> bool:
    """Whether a rate is a positive number."""
    try:
        return float(text) > 0
    except ValueError:
        return False


def read_results(folder: Path) -> dict[str, dict]:
    """Every result by its run's id.

    Raises:
        CheckpointError: a file is broken, or no result.
    """
    results = {path.stem: read_json(path) for path in sorted(folder.glob("*.json"))}
    for name, result in results.items():
        if missing := [key for key in RESULT if key not in result]:
            raise CheckpointError(
                f"{folder / name}.json: has no {missing[0]!r}, so it is no result of run_study.py"
            )
    return results


# ---------------------------------------------------------------- runs


def planned_runs(study: dict, size: str, results: dict[str, dict]) -> tuple[list[Run], list[str]]:
    """The runs of a size, each once, and the cells that will add runs once their rate is known.

    Bases come first, then the first seed of all experiments, then the second: so there is a whole
    picture early, which further seeds make sharper.
    """
    runs: dict[str, Run] = {}
    waiting = []
    for experiment in study["experiments"]:
        if size not in experiment["sizes"]:
            continue
        for text in experiment["cells"]:
            found = list(runs_of(study, experiment, text, size, results))
            cell = parse_cell(text, experiment, size)
            if has_more(study, cell, results) and not experiment["summary"]:
                waiting.append(f"{experiment['id']}: {text}")
            for run in found:
                known = runs.get(run.id)
                runs[run.id] = run if known is None else joined(run, known)
    trained = sorted(runs.values(), key=lambda run: run.seed)  # stable
    return [*planned_bases(study, size), *trained], sorted(set(waiting))


def joined(run: Run, known: Run) -> Run:
    """The same run, with all that either asks for.

    Raises:
        ValueError: they are two runs of one id.
    """
    if replace(run, probe=known.probe, parts=known.parts) != known:
        raise ValueError(f"{run.id} stands for {run} and for {known}")
    return replace(run, probe=run.probe or known.probe, parts=run.parts or known.parts)


def ids_for(study: dict, experiment: dict, size: str, results: dict[str, dict]) -> set[str]:
    """The runs that an experiment's table and verdicts rest on.

    With the sweeps that its tuned rates come from, and what its recoveries are a share of.
    """
    texts = [*experiment["cells"]]
    for claim in experiment["claims"]:
        for side in ("supported", "refuted"):
            texts += [text for one in claim[side] for text in cells_of(one)]
    cells = [parse_cell(text, experiment, size) for text in texts]
    references = {study["variants"][cell.variant]["reference"] for cell in cells}
    texts += [f"{FULL}@tuned/{variant}" for variant in sorted(references)]
    runs = [run for text in texts for run in runs_of(study, experiment, text, size, results)]
    arms = {cell.arm for cell in cells if cell.rate == "tuned"} | {FULL}
    runs += [run for arm in arms for run in tuning_runs(study, arm, size, results)]
    bases = [base for run in runs for base in lineage(study, size, run.base, run.base_seed)]
    return {run.id for run in runs} | {base.id for base in bases}


def planned_bases(study: dict, size: str) -> list[Run]:
    """The base models of a size, in the order of the experiments, after those they continue."""
    experiments = [one for one in study["experiments"] if size in one["sizes"]]
    lines = (lineage(study, size, base_name(one, size), one["base_seed"]) for one in experiments)
    return list(dict.fromkeys(base for line in lines for base in line))


def lineage(study: dict, size: str, base: str, seed: int) -> list[Run]:
    """A base after those that it continues, the one from random weights first."""
    before = study["bases"][base].get("continues")
    oldest = lineage(study, size, before, seed) if before else []
    return [*oldest, Run(size, base, seed, continues=before, probe=True)]


def runs_of(
    study: dict, experiment: dict, text: str, size: str, results: dict[str, dict]
) -> Iterator[Run]:
    """The runs of one of an experiment's cells; none while its tuned rate is unknown."""
    cell = parse_cell(text, experiment, size)
    if cell.rate == "sweep":
        yield from tuning_runs(study, cell.arm, size, results)
        return
    rate = cell.rate
    if rate == "tuned":
        rate = tuned_rate(study, cell.arm, size, results)
    if rate is not None:
        for seed in experiment["seeds"]:
            yield run_of(replace(cell, rate=rate), seed, experiment["probe"])


def has_more(study: dict, cell: Cell, results: dict[str, dict]) -> bool:
    """Whether runs of a cell are still unknown, since they depend on others."""
    if cell.rate == "sweep":
        return sweep_of(study, cell.arm, cell.size, results) is None
    return cell.rate == "tuned" and tuned_rate(study, cell.arm, cell.size, results) is None


def run_of(cell: Cell, seed: int, probe: bool = False) -> Run:
    """The run of a cell with this seed."""
    place = (cell.base_seed, cell.arm, cell.rate, cell.variant)
    return Run(cell.size, cell.base, seed, *place, probe=probe, parts=bool(cell.part))


# ---------------------------------------------------------------- tuned rates


@dataclass(frozen=True)
class Sweep:
    """What is known of an arm's learning rates, see `sweep_of`."""

    losses: dict[str, float]  # mean validation NLL by rate
    seeds: dict[str, int]  # how many tuning seeds each mean is over: all, or the first alone
    best: str
    near: list[str]  # the best and its neighbors, which take every seed
    is_whole: bool  # whether they all have it


def sweep_of(study: dict, arm: str, size: str, results: dict[str, dict]) -> Sweep | None:
    """The sweep of an arm, or None while the first tuning seed has not run the whole grid.

    The first seed says where to look: its best rate and the neighbors of that are run with every
    seed. Then the best is chosen among the rates that have every seed, and its neighbors are run
    with every seed, too, should it be another. So no mean over one set of seeds is ever weighed
    against a mean over another. A rate at which a seed diverged is infinitely bad.
    """
    seeds = study["tuning"]["seeds"][size]
    found: dict[str, list[float]] = {}
    for rate in rates_of(study, arm, size):
        ids = [tuning_run(study, arm, rate, size, seed).id for seed in seeds]
        if ids[0] not in results:
            return None
        known = ids if all(one in results for one in ids) else ids[:1]
        found[rate] = [validation_nll(results[one]) for one in known]
    losses = {rate: fmean(values) for rate, values in found.items()}
    whole = {rate for rate, values in found.items() if len(values) == len(seeds)}
    best = min(found, key=lambda rate: found[rate][0])
    if whole.issuperset(beside(losses, best)):
        best = min(whole, key=losses.__getitem__)
    near = beside(losses, best)
    counts = {rate: len(values) for rate, values in found.items()}
    return Sweep(losses, counts, best, near, whole.issuperset(near))


def beside(losses: dict[str, float], rate: str) -> list[str]:
    """A rate between its neighbors in the grid."""
    rates = sorted(losses, key=float)
    place = rates.index(rate)
    return rates[max(0, place - 1) : place + 2]


def tuning_runs(study: dict, arm: str, size: str, results: dict[str, dict]) -> list[Run]:
    """The runs of an arm's sweep, as far as they are known."""
    first, *others = study["tuning"]["seeds"][size]
    sweep = sweep_of(study, arm, size, results)
    near = sweep.near if sweep and math.isfinite(sweep.losses[sweep.best]) else []
    runs = [tuning_run(study, arm, rate, size, first) for rate in rates_of(study, arm, size)]
    return runs + [tuning_run(study, arm, rate, size, seed) for seed in others for rate in near]


def tuned_rate(
    study: dict, arm: str, size: str, results: dict[str, dict], all_seeds: bool = True
) -> str | None:
    """The rate of an arm's grid with the lowest mean validation NLL.

    Args:
        all_seeds: wait until it and its neighbors were run with every tuning seed. Without, the
            first seed's grid is enough, to report on a study that is still running.

    Returns:
        None while runs are missing, and where each rate diverged.
    """
    sweep = sweep_of(study, arm, size, results)
    if sweep is None or math.isinf(sweep.losses[sweep.best]):
        return None
    return sweep.best if sweep.is_whole or not all_seeds else None


def rates_of(study: dict, arm: str, size: str) -> list[str]:
    """An arm's grid, at a size that may have its own."""
    own = study["tuning"].get("rates", {}).get(size, {})
    return own.get(arm, study["arms"][arm]["rates"])


def tuning_run(study: dict, arm: str, rate: str, size: str, seed: int) -> Run:
    """One run of the sweep that an arm's rate is chosen by."""
    return run_of(tuning_cell(study, arm, rate, size), seed)


def tuning_cell(study: dict, arm: str, rate: str, size: str) -> Cell:
    """An arm at a rate, as a size's rates are tuned."""
    tuning = study["tuning"]
    place = (size, tuning["base"][size], tuning["base_seed"])
    return Cell(*place, arm, rate, tuning["variant"])


def validation_nll(result: dict) -> float:
    """Nats a token of the conversations with an even index; infinite for a run that diverged."""
    if "held_out" not in result:
        return math.inf
    (measured,) = result["held_out"].values()
    return sum(measured["nats"][VALIDATION]) / sum(measured["tokens"][VALIDATION])


def is_interior(sweep: Sweep) -> bool:
    """Whether both neighbors of the best rate are in the grid and worse."""
    others = [sweep.losses[rate] for rate in sweep.near if rate != sweep.best]
    return len(others) == 2 and all(loss > sweep.losses[sweep.best] for loss in others)


# ---------------------------------------------------------------- commands


def training_flags(study: dict, run: Run, data_dir: Path, save_dir: Path) -> tuple[str, dict]:
    """The stage of a run and its script's flags."""
    base, size = study["bases"][run.base], study["sizes"][run.size]
    start = {"from_weight": save_dir / run.base_id} if run.base_id else {}
    if run.arm is None:
        flags = study["common"] | size | base["flags"] | files(study, "pretrain", data_dir)
        return "pretrain", flags | start | {
            "epochs": size["epochs"] * base["share"],
            "run_name": run.id,
            "save_dir": save_dir,
            "seed": run.seed,
        }
    arm, variant = study["arms"][run.arm], study["variants"][run.variant]
    name = "lora_name" if arm["stage"] == "lora" else "run_name"
    return arm["stage"], (
        study["common"]
        | arm.get("flags", {})
        | variant["flags"]
        | {"data_path": files(study, variant["data"], data_dir)["data_path"]}
        | {name: run.id, "save_dir": save_dir}
        | start
        | {
            "learning_rate": run.rate,
            "dtype": base["flags"].get("dtype", size["dtype"]),
            "seed": run.seed,
        }
    )


def files(study: dict, data: str, data_dir: Path) -> dict[str, list[Path]]:
    """Training and held-out files, as the flags of the training scripts."""
    return {
        "data_path": [data_dir / name for name in study["data"][data]],
        "eval_data_path": [data_dir / name for name in study["data"][f"{data}_valid"]],
    }


def held_out_names(study: dict, run: Run) -> list[str]:
    """The data that a run is measured on: its own; a base is the start of all."""
    if run.arm is None:
        return list(dict.fromkeys(variant["data"] for variant in study["variants"].values()))
    return [study["variants"][run.variant]["data"]]


def nll_flags(study: dict, data: str, data_dir: Path) -> dict:
    """The flags of eval_llm.py that measure NLL on `data` and ask nothing."""
    held_out = files(study, data, data_dir)["eval_data_path"]
    return study["measure"] | {"no_generation": True, "nll_data": held_out}


def text_flags(study: dict, data_dir: Path) -> dict:
    """The flag that measures NLL on pretraining text, too."""
    return {"text_nll_data": files(study, "pretrain", data_dir)["eval_data_path"]}


def as_words(flags: dict) -> list[str]:
    """Flags as words of a command line: a list takes several, true stands bare."""
    words = []
    for name, value in flags.items():
        words.append(f"--{name}")
        if value is not True:
            words += map(str, value) if isinstance(value, list) else [str(value)]
    return words
