"""Runs what `study.toml` lists and `results/study/` has no result of, by the stage scripts.

    python evaluation/run_study.py --dry_run           # what is left, with its commands and time
    python evaluation/run_study.py                     # all of it; what was stopped is continued
    python evaluation/run_study.py --jobs 2            # two runs at once, half of the cores each
    python evaluation/run_study.py --experiment H1     # what one question asks for
    python evaluation/run_study.py --only 'xs-plain42-fft-*'
    python evaluation/run_study.py --list | parallel -j 4        # or as the lines of a Slurm array:
                                                      # what can start now; call again after it
    python evaluation/run_study.py --shard 1/4         # the first of four machines

Each run trains under `out/study/<id>`, is measured by `eval_llm.py`, and leaves one JSON file (see
study.py). A second call does nothing. Base models that are published in `results/study/bases/` are
taken from there: made anew on another machine they would round differently, and results of one base
can't be mixed with another's. It needs the files that `dataset/prepare.py` writes; no network.
"""

import argparse
import fcntl
import fnmatch
import os
import shlex
import shutil
import subprocess
import sys
import time
import zlib
from collections import Counter
from collections.abc import Iterable
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from pathlib import Path
from statistics import median

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import numpy as np
from tqdm import tqdm

from dataset.command_line import REPO_DIR, Parser, SettingsError
from dataset.jsonl import read_jsonl
from dataset.prepare import DATA_DIR
from evaluation.outputs import CHECKS, FLAGS, RESULTS_DIR, as_json
from evaluation.study import (
    SCRIPTS,
    STUDY_FILE,
    Run,
    as_words,
    held_out_names,
    ids_for,
    lineage,
    nll_flags,
    planned_runs,
    read_results,
    read_study,
    text_flags,
    training_flags,
)
from model.checkpoint import load_model, weights_fingerprint
from model.files import CheckpointError, read_json, write_text
from trainer.arguments import OUT_DIR
from trainer.failures import run_script
from trainer.run_folder import PATHS, WITHOUT_EFFECT, remove_folder

STUDY_RESULTS = RESULTS_DIR / "study"
ENDED = ("completed", "diverged")  # what a result can tell of a run; others are run again
NAMES = {"run_name", "lora_name"}  # the flags that name a run
CURVE_EVERY = 5  # logged steps a point of a result's curve
UNKEPT = ("max_cos", "top")  # of what update_analysis.py says of intruders and amplification
HELD_OUT = ("nats", "tokens", "end_nats", "ends")  # of each conversation's response
FILED = (*CHECKS, *FLAGS)  # of each answer: 1, 0, or - where there is none


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    parser = Parser(__doc__)
    add = parser.add_argument
    add("--study", type=Path, default=STUDY_FILE, help="(default: evaluation/study.toml)")
    add("--size", default="xs", help="xs (default), s or base, see study.toml")
    add(
        "--only",
        nargs="+",
        default=["*"],
        metavar="ID",
        help="runs with such ids; * stands for any",
    )
    add("--experiment", nargs="+", metavar="ID", help="experiments of study.toml (default: all)")
    add("--shard", default="1/1", metavar="I/N", help="the I-th of N parts of the runs")
    add("--jobs", type=int, default=1, help="runs at once (default 1)")
    add("--list", action="store_true", help="print one command a run that is left, and stop")
    add("--dry_run", action="store_true", help="print what would be run, with estimates, and stop")
    add("--data_dir", type=Path, default=DATA_DIR, help="prepared data")
    add("--save_dir", type=Path, default=OUT_DIR / "study", help="run folders (default: out/study)")
    add(
        "--results_dir",
        type=Path,
        default=STUDY_RESULTS,
        help="(default: evaluation/results/study)",
    )
    args = parser.parse_args(argv)
    if args.jobs < 1:
        parser.error(f"--jobs {args.jobs}: must be 1 or more")
    if args.list and args.dry_run:
        parser.error("--list and --dry_run exclude each other")
    args.shard = parse_shard(args.shard)
    return args


def parse_shard(text: str) -> tuple[int, int]:
    """I and N of `I/N`."""
    index, slash, count = text.partition("/")
    if not (slash and index.isdecimal() and count.isdecimal() and 1 <= int(index) <= int(count)):
        raise SettingsError(f"--shard {text}: must be I/N, with I from 1 to N")
    return int(index), int(count)


# ---------------------------------------------------------------- what is left


def fetch_bases(args: argparse.Namespace) -> None:
    """Copies the published bases to where runs start from, all of each or nothing."""
    args.save_dir.mkdir(parents=True, exist_ok=True)
    with (args.save_dir / ".bases.lock").open("a") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # of processes that start together one copies
        for published in sorted((args.results_dir / "bases").glob("*")):
            place = args.save_dir / published.name
            if has_weights(place.name, args.save_dir):
                continue
            aside = place.with_name(f".{place.name}")
            remove_folder(aside)  # of a copy that was killed
            shutil.copytree(published, aside)
            remove_folder(place)  # of one that was begun here
            aside.rename(place)


def has_base(name: str, args: argparse.Namespace) -> bool:
    """Whether a base is in `save_dir`, or published and so soon there."""
    return has_weights(name, args.save_dir) or (args.results_dir / "bases" / name).is_dir()


def chosen_ids(study: dict, args: argparse.Namespace, results: dict[str, dict]) -> set[str] | None:
    """The runs of `--experiment`; None for all."""
    if not args.experiment:
        return None
    experiments = {one["id"]: one for one in study["experiments"] if args.size in one["sizes"]}
    for name in args.experiment:
        if name not in experiments:
            raise SettingsError(f"--experiment {name}: choose among {', '.join(experiments)}")
    return set().union(
        *(ids_for(study, experiments[name], args.size, results) for name in args.experiment)
    )


def runs_left(study: dict, args: argparse.Namespace) -> tuple[list[Run], list[str]]:
    """Runs without a result, after the bases that they need, and cells that wait for a rate."""
    results = read_results(args.results_dir)
    runs, waiting = planned_runs(study, args.size, results)
    chosen = chosen_ids(study, args, results)
    left = [
        run
        for run in runs
        if lacks(run, results.get(run.id))
        and is_mine(run, args)
        and (chosen is None or run.id in chosen)
    ]
    needed = {run.base_id for run in left}
    missing: list[Run] = []
    for run in reversed(runs):  # a base stands before those that continue it
        if run.id in needed and not has_base(run.id, args):
            missing.insert(0, run)
            needed.add(run.base_id)
    if args.shard[1] > 1 and missing:
        raise SettingsError(
            f"--shard: {missing[0].id} is not in {args.save_dir}; make it first, or copy it there: "
            f"--only {missing[0].id}"
        )
    return list(dict.fromkeys([*missing, *left])), waiting


def refuse_diverged_bases(left: list[Run], args: argparse.Namespace) -> None:
    """Refuses runs from a base of which nothing can start.

    Raises:
        SettingsError: names the base, and how to mend it.
    """
    results = read_results(args.results_dir)
    for name in sorted({run.base_id for run in left} & results.keys()):
        if results[name]["status"] != "completed":
            raise SettingsError(
                f"{name}: {results[name]['status']}, so nothing can start from it; mend it in "
                f"{args.study} and delete {args.results_dir / name}.json"
            )


def check_patterns(study: dict, args: argparse.Namespace) -> None:
    """Refuses a pattern of `--only` that no run has, as if all of its runs were done.

    Says so where a run that waits for a tuned rate may have it later.
    """
    results = read_results(args.results_dir)
    runs, waiting = planned_runs(study, args.size, results)
    for pattern in args.only:
        if not fnmatch.filter([*(run.id for run in runs), *results], pattern):
            told = f"--only {pattern}: no run of {args.size} is called so"
            if not waiting:
                raise SettingsError(f"{told}; --dry_run lists them")
            print(f"{told}, yet: {len(waiting)} cells wait for a rate", file=sys.stderr)


def lacks(run: Run, result: dict | None) -> bool:
    """Whether a run has no result, or one without the answers or parts that are asked for."""
    if result is None:
        return True
    if "held_out" not in result:
        return False  # it diverged, and would again
    return (run.probe and "probe" not in result) or (run.parts and "parts" not in result)


def is_mine(run: Run, args: argparse.Namespace) -> bool:
    """Whether `--only` and `--shard` take this run."""
    index, count = args.shard
    named = any(fnmatch.fnmatchcase(run.id, pattern) for pattern in args.only)
    return named and zlib.crc32(run.id.encode()) % count == index - 1


def has_weights(run_id: str, save_dir: Path) -> bool:
    """Whether a run is complete in `save_dir`."""
    record = save_dir / run_id / "run.json"
    return record.is_file() and read_json(record)["status"] == "completed"


def estimated_seconds(run: Run, results: dict[str, dict]) -> float | None:
    """Median of what such runs took here or elsewhere; None if none did.

    Those of its size and variant, from whatever base; of a base, those of its kind.
    """
    alike = [
        result["seconds"]
        for result in results.values()
        if (result["size"], result["variant"]) == (run.size, run.variant)
        and (run.arm is not None or result["base"] == run.base)
    ]
    return median(alike) if alike else None


# ---------------------------------------------------------------- one run


def perform(run: Run, study: dict, args: argparse.Namespace) -> None:
    """Trains, measures and files one run.

    Raises:
        SettingsError: it broke off, or is a base made anew that differs from the one that there are
            results of; nothing is filed.
        CheckpointError: its base is broken.
    """
    stage, flags = training_flags(study, run, args.data_dir, args.save_dir)
    folder = args.save_dir / run.id
    if not has_weights(run.id, args.save_dir):
        if run.base_id is not None:
            check_start(run, weights_fingerprint(load_model(args.save_dir / run.base_id)), args)
        script = str(REPO_DIR / "trainer" / f"{SCRIPTS[stage]}.py")
        command = [sys.executable, script, *as_words(flags), *how_to_go_on(folder)]
        call(command, args, run.id, may_fail=True)
    record = read_json(folder / "run.json") if (folder / "run.json").is_file() else {}
    status = record.get("status", "not trained")
    if status not in ENDED:
        raise SettingsError(f"{run.id}: {status}; {args.save_dir / run.id}.log says why")
    check_settings(run, record["settings"], flags, args)
    if run.base_id is not None:
        check_start(run, record["base_fingerprint"], args)
    path = args.results_dir / f"{run.id}.json"
    known = read_json(path) if path.is_file() else {}
    start = time.monotonic()
    result = describe(run, record, study)
    if status == "completed":
        result |= measure(run, study, args)
    check_same_base(run, result, known, args)
    result["curve"] = thinned_curve(folder / "metrics.jsonl")
    # Of the training all that it took, though it may have been stopped; of the rest this call.
    result["seconds"] = round(time.monotonic() - start + record.get("train_seconds", 0.0), 1)
    args.results_dir.mkdir(parents=True, exist_ok=True)
    write_text(path, as_json(result))
    remove_folder(folder / "resume")  # thrice the weights, and nothing is left to continue


def check_settings(run: Run, settings: dict, flags: dict, args: argparse.Namespace) -> None:
    """Refuses to file what lies in `save_dir` as a run of other flags than it was trained with."""
    if name := changed_flag(settings, flags):
        raise SettingsError(
            f"{run.id}: {args.save_dir / run.id} was trained with --{name} {settings.get(name)}, "
            f"and {args.study} says {flags[name]}; delete that folder, or mend {args.study}"
        )


def changed_flag(settings: dict, flags: dict) -> str | None:
    """The first of a run's flags that its record tells otherwise, names and paths apart."""
    for name in sorted(flags.keys() - WITHOUT_EFFECT - PATHS - NAMES):
        value = float(flags[name]) if name == "learning_rate" else flags[name]
        if settings.get(name) != value:
            return name
    return None


def check_same_base(run: Run, result: dict, known: dict, args: argparse.Namespace) -> None:
    """Refuses a base made anew whose weights are not those that its arms' results started from.

    Another machine, or another number of threads, rounds differently.
    """
    if known.get("weights", result.get("weights")) != result.get("weights"):
        raise SettingsError(
            f"{run.id}: made anew, its weights differ from those of {args.results_dir}; restore "
            "them, or name another --results_dir for a study of its own"
        )


def check_start(run: Run, weights: str, args: argparse.Namespace) -> None:
    """Refuses a start from other weights, by their fingerprint, than its base's result names."""
    path = args.results_dir / f"{run.base_id}.json"
    if path.is_file() and weights != read_json(path)["weights"]:
        raise SettingsError(
            f"{run.id}: starts from another {run.base_id} than the one in {path}; delete it and "
            f"its base in {args.save_dir}, or name another --save_dir"
        )


def how_to_go_on(folder: Path) -> list[str]:
    """Continues what left a state; what left none begins anew."""
    if any((folder / name).is_dir() for name in ("resume", "resume.old")):
        return ["--from_resume"]
    return ["--overwrite"] if folder.exists() else []


def call(command: list[str], args: argparse.Namespace, name: str, may_fail: bool = False) -> None:
    """Runs a script, its output appended to `<save_dir>/<name>.log`.

    Raises:
        SettingsError: it failed, unless it may.
    """
    args.save_dir.mkdir(parents=True, exist_ok=True)
    log = args.save_dir / f"{name}.log"
    environment = os.environ.copy()
    if args.jobs > 1:
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
        environment["OMP_NUM_THREADS"] = str(max(1, cores // args.jobs))
    with log.open("a", encoding="utf-8") as file:
        file.write(f"$ {shlex.join(command)}\n")
        file.flush()
        done = subprocess.run(command, stdout=file, stderr=subprocess.STDOUT, env=environment)
    if done.returncode and not may_fail:
        raise SettingsError(f"{name}: {Path(command[1]).name} failed; {log} says why")


def describe(run: Run, record: dict, study: dict) -> dict:
    """What was run, as a command in the repository."""
    stage, flags = training_flags(study, run, Path("dataset/data"), Path("out/study"))
    return {
        "id": run.id,
        "size": run.size,
        "base": run.base,
        "base_seed": run.seed if run.arm is None else run.base_seed,
        "arm": run.arm,
        "rate": run.rate,
        "variant": run.variant,
        "seed": run.seed,
        "status": record["status"],
        "command": shlex.join(["python", f"trainer/{SCRIPTS[stage]}.py", *as_words(flags)]),
        "run": {name: value for name, value in record.items() if name != "adapted"},
    }


def measure(run: Run, study: dict, args: argparse.Namespace) -> dict:
    """Held-out NLL of a trained run, and its answers if it is to be probed."""
    folder = args.save_dir / run.id
    found = {"held_out": {}}
    if run.arm is None:
        found["weights"] = weights_fingerprint(load_model(folder))
    for data in held_out_names(study, run):
        output = args.save_dir / "measured" / data
        flags = nll_flags(study, data, args.data_dir) | text_flags(study, args.data_dir)
        ask([folder], flags | {"output_dir": output}, args, run.id)
        nll = read_json(output / run.id / "nll.json")
        columns = map(list, zip(*nll["nll"]["sequences"], strict=True))
        measured = dict(zip(HELD_OUT, columns, strict=True))
        for name in ("nats", "end_nats"):
            measured[name] = [round(nats, 3) for nats in measured[name]]
        found["held_out"][data] = measured
        found["text_nll"] = nll["text_nll"]["nats_per_token"]
    if run.probe:
        output = args.save_dir / "outputs"
        ask([folder], study["probe"] | {"output_dir": output}, args, run.id)
        found["probe"] = summarize_probe(output / run.id)
    if run.parts:
        found |= measure_parts(run, study, args)
    return found


def measure_parts(run: Run, study: dict, args: argparse.Namespace) -> dict:
    """NLL of the base with each part of the run's update, and what that update looks like."""
    script = str(REPO_DIR / "evaluation" / "update_analysis.py")
    ends = {"base": args.save_dir / run.base_id, "tuned": args.save_dir / run.id}
    place = args.save_dir / "parts" / run.id
    remove_folder(place)
    for flags in study["parts"]:
        words = as_words(ends | flags | {"output_dir": place / "weights"})
        call([sys.executable, script, *words], args, run.id)
    words = as_words(ends | {"output": place / "update.json"})
    call([sys.executable, script, *words], args, run.id)
    (data,) = held_out_names(study, run)
    made = sorted((place / "weights").iterdir())
    ask(made, nll_flags(study, data, args.data_dir) | {"output_dir": place / "nll"}, args, run.id)
    parts = {}
    for folder in made:
        sequences = read_json(place / "nll" / folder.name / "nll.json")["nll"]["sequences"]
        name = folder.name.removeprefix(f"{run.id}_")
        parts[name] = [round(nats, 3) for nats, *_ in sequences]
    update = read_json(place / "update.json")
    remove_folder(place)
    return {"parts": parts, "update": summarize_update(update)}


def summarize_update(update: dict) -> dict:
    """Where the update lies, and each matrix's spectrum, of what update_analysis.py wrote.

    `energy` is the share of the squared norm in the first 1, 2, 4... singular values.
    """
    facts = ("name", "kind", "shape", "relative", "r90", "effective_rank", "stable_rank")
    matrices = []
    for matrix in update["matrices"]:
        energy = np.cumsum(np.square(matrix["singular_values"]))
        ranks = [2**power for power in range(len(energy).bit_length())]
        kept = {fact: matrix[fact] for fact in facts}
        kept["energy"] = [round(float(energy[rank - 1] / energy[-1]), 5) for rank in ranks]
        for fact in ("intruders", "amplification"):
            kept[fact] = {k: v for k, v in matrix[fact].items() if k not in UNKEPT}
        matrices.append(kept)
    return {"shares": update["shares"], "matrices": matrices}


def ask(folders: list[Path], flags: dict, args: argparse.Namespace, name: str) -> None:
    """Calls eval_llm.py on checkpoints; `name` is the log's."""
    command = [sys.executable, str(REPO_DIR / "eval_llm.py")]
    for folder in folders:
        command += ["--model", str(folder)]
    call([*command, *as_words(flags)], args, name)


def summarize_probe(folder: Path) -> dict:
    """Rates by decoding, and each prompt's outcomes: 1, 0, or - where there is none."""
    results = read_json(folder / "results.json")
    samples = [sample for _, sample in read_jsonl(folder / "samples.jsonl")]
    outcomes = {
        decoding: {
            name: "".join(
                "-" if sample[name] is None else str(int(sample[name]))
                for sample in samples
                if sample["decoding"] == decoding
            )
            for name in FILED
        }
        for decoding in results["decodings"]
        if decoding != "references"
    }
    rates = {name: results["decodings"][name] for name in outcomes}
    return {"prompts": results["provenance"]["prompts"], "rates": rates, "outcomes": outcomes}


def thinned_curve(path: Path) -> list[list[float]]:
    """[step, training loss] of every few logged steps."""
    rows = [row for _, row in read_jsonl(path)] if path.is_file() else []
    logged = [[row["step"], round(row["loss"], 4)] for row in rows if "loss" in row]
    return logged[::-1][::CURVE_EVERY][::-1]  # counted from the end, which is worth keeping


# ---------------------------------------------------------------- all runs


def run_all(study: dict, args: argparse.Namespace) -> None:
    """Runs what is left, `--jobs` at once; rates that become known add runs on the way."""
    running: dict[Future, Run] = {}
    failed: dict[str, Exception] = {}
    left = runs_to_start(study, args, failed)
    with ThreadPoolExecutor(args.jobs) as pool, tqdm(total=len(left), desc="study") as bar:
        while left or running:
            for run in ready(left, list(running.values()), args)[: args.jobs - len(running)]:
                running[pool.submit(perform, run, study, args)] = run
            bar.set_postfix_str(", ".join(run.id for run in running.values()))
            done, _ = wait(running, return_when=FIRST_COMPLETED)
            for future in done:
                run = running.pop(future)
                try:
                    future.result()
                except (SettingsError, CheckpointError) as error:  # the others may well be run
                    failed[run.id] = error
                    bar.write(str(error), file=sys.stderr)
                bar.update()
            left = runs_to_start(study, args, failed)
            bar.total = bar.n + len(left)
    print_waiting(study, args)
    if failed:
        raise SettingsError(f"{len(failed)} runs broke off: {', '.join(failed)}; call again")
    refuse_diverged_bases(runs_left(study, args)[0], args)


def runs_to_start(study: dict, args: argparse.Namespace, failed: Iterable[str]) -> list[Run]:
    """The runs left, but for those that broke off, or diverged, or a base of theirs did."""
    results = read_results(args.results_dir).values()
    ended = {result["id"] for result in results if result["status"] != "completed"}.union(failed)
    return [run for run in runs_left(study, args)[0] if not ended & {run.id, *bases_of(study, run)}]


def bases_of(study: dict, run: Run) -> set[str]:
    """All bases that a run comes from: the one that it starts from, and those that it continues."""
    seed = run.seed if run.arm is None else run.base_seed
    return {base.id for base in lineage(study, run.size, run.base, seed)}


def ready(left: list[Run], running: list[Run], args: argparse.Namespace) -> list[Run]:
    """Those of the runs left that can start now: not running, and their base is there."""
    busy = {run.id for run in running}
    bases = {name for name in {run.base_id for run in left} if name not in busy}
    there = {name for name in bases if name is None or has_base(name, args)}
    return [run for run in left if run.id not in busy and run.base_id in there]


def print_waiting(study: dict, args: argparse.Namespace) -> None:
    """Prints, by experiment that is asked for, how many cells still wait for a tuned rate."""
    _, waiting = runs_left(study, args)
    counts = Counter(cell.partition(": ")[0] for cell in waiting)
    asked = args.experiment or (counts if args.only == ["*"] else ())
    told = [f"{name} ({count})" for name, count in counts.items() if name in asked]
    if told:
        print(f"cells that add more once a rate is known: {', '.join(told)}")


def check_data(study: dict, data_dir: Path) -> None:
    """Refuses to begin a study whose data are not all there."""
    if missing := missing_data(study, data_dir):
        raise SettingsError(
            f"{missing[0]}: no such file; make it with dataset/prepare.py, or mend --data_dir"
        )


def missing_data(study: dict, data_dir: Path) -> list[Path]:
    """The files of the study's data that are not there."""
    paths = {data_dir / name for names in study["data"].values() for name in names}
    return sorted(path for path in paths if not path.is_file())


def print_list(left: list[Run], args: argparse.Namespace) -> None:
    """One command for each run that can start now."""
    now = ready(left, [], args)
    if len(now) < len(left):
        print(f"{len(left) - len(now)} more wait for their base: call again", file=sys.stderr)
    paths = {"data_dir": args.data_dir, "save_dir": args.save_dir, "results_dir": args.results_dir}
    for run in now:
        flags = {"study": args.study, "size": args.size, "only": run.id} | paths
        print(shlex.join(["python", str(Path(__file__).resolve()), *as_words(flags)]))


def print_plan(left: list[Run], study: dict, args: argparse.Namespace) -> None:
    """The stage commands of what is left, with how long each may take."""
    results = read_results(args.results_dir)
    total, unknown = 0.0, 0
    for run in left:
        if has_base(run.id, args):
            print(f"# {run.id}: its weights are there, to be measured")
            continue
        seconds = estimated_seconds(run, results)
        stage, flags = training_flags(study, run, args.data_dir, args.save_dir)
        guess = "?" if seconds is None else f"{seconds / 60:.1f} min"
        print(f"# {run.id}: {guess}")
        print(shlex.join(["python", f"trainer/{SCRIPTS[stage]}.py", *as_words(flags)]))
        total += seconds or 0
        unknown += seconds is None
    print(f"{len(left)} runs left")
    if total:
        hours = total / 3600 / args.jobs
        print(f"about {hours:.1f} hours with --jobs {args.jobs}, by the runs that were finished")
    if unknown:
        print(f"{unknown} of these are of a kind that has not finished yet: time unknown")
    print_waiting(study, args)
    if left and (missing := missing_data(study, args.data_dir)):
        print(f"first make, with dataset/prepare.py: {', '.join(map(str, missing))}")


def main(argv: list[str] | None = None) -> int:
    args = parse_args(argv)
    study = read_study(args.study)
    if args.size not in study["sizes"]:
        raise SettingsError(f"--size {args.size}: choose among {', '.join(study['sizes'])}")
    check_patterns(study, args)
    left, _ = runs_left(study, args)
    if args.list or args.dry_run:
        refuse_diverged_bases(left, args)
    if left and not args.dry_run:
        check_data(study, args.data_dir)
    if args.list:
        print_list(left, args)
    elif args.dry_run:
        print_plan(left, study, args)
    else:
        fetch_bases(args)
        run_all(study, args)
    return 0


if __name__ == "__main__":
    run_script(main)
