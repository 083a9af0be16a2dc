r"""Train ways of fine-tuning side by side on your own model and pairs, and say which to take.

    python evaluation/compare.py --from_weight out/full_sft --data_path mine.jsonl --dry_run
    python evaluation/compare.py --from_weight out/full_sft --data_path mine.jsonl
    python evaluation/compare.py --from_weight out/full_sft --data_path mine.jsonl --from_resume

Each method trains at three learning rates or more. One half of the held-out pairs chooses the rate,
the other half judges. out/compare/NAME/ then holds report.md and index.html, a page that needs no
network. Beside them are figures/, data/ (your pairs in three parts), runs/ (ordinary run folders
with logs) and measured/. Methods, the first four by default:

    lora-all-r8            LoRA on all linear layers, rank 8
    lora-all-high-rank     the same with half the base's width as its rank, at most 64
    full                   full fine-tuning
    full-frozen-embedding  full fine-tuning of all but the embedding
    lora-original          LoRA as MiniMind's scripts have it: on square matrices, scaling 1
    lora-all-r8-dora       lora-all-r8 with DoRA
"""

import argparse
import math
import shlex
import shutil
import signal
import sys
import time
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from filelock import FileLock, Timeout

from evaluation.comparison.measure import (
    DIVERGED,
    LEAST_PAIRS,
    Loss,
    Pairs,
    Yardstick,
    make_yardstick,
    split_pairs,
    write_pairs,
)
from evaluation.comparison.report import Facts, Result, format_rate, write_report
from evaluation.comparison.train import (
    FIRST_RATES,
    METHOD_NAMES,
    MOST_RATES,
    Comparison,
    Method,
    define_methods,
)
from evaluation.probe.prompts import read_prompts
from model.checkpoint import load_model, load_tokenizer, weights_fingerprint
from model.cli import POSITIVE, SIZE, UserError, escape_control, limit, make_parser, run_script
from model.files import REPO_DIR, file_sha256, read_json, write_json
from model.reachability import reachable_probability
from trainer.arguments import MAX_SEQ_LEN

LEAST_STEPS = 300  # by default, unless they are more than so many epochs
MOST_EPOCHS = 10


# ---------------------------------------------------------------- flags


def make_compare_parser() -> argparse.ArgumentParser:
    """Make the parser of the command line."""
    parser = make_parser(__doc__, usage="%(prog)s --from_weight BASE --data_path PAIRS [flags]")
    add = parser.add_argument_group("what is compared").add_argument
    add("--from_weight", required=True, help="the base: a folder or a hub id")
    add("--data_path", type=Path, nargs="+", required=True, help="your pairs, JSONL or JSONL.gz")
    held_out = "held-out pairs (a tenth of the data, at most 500)"
    add("--eval_data_path", type=Path, nargs="+", default=[], help=held_out)
    prompts = f".md or JSONL; {2 * LEAST_PAIRS} prompts with checks or more choose and judge"
    add("--prompts", type=Path, help=prompts)
    text = "text whose likelihood says what is forgotten (the base's own answers)"
    add("--text_data", type=Path, help=text)
    add("--wrap_documents", action="store_true", help="that text as train_pretrain.py wraps it")
    add("--methods", nargs="+", choices=METHOD_NAMES, default=METHOD_NAMES[:4], metavar="METHOD")
    add("--name", help="folder in out/compare (BASE-PAIRS)")
    add("--save_dir", type=Path, default=REPO_DIR / "out" / "compare", help="(out/compare)")
    add = parser.add_argument_group("how it runs").add_argument
    steps = f"of a run (an epoch, at least {LEAST_STEPS} steps, at most {MOST_EPOCHS} epochs)"
    add("--epochs", type=POSITIVE, help=steps)
    add("--max_steps", type=SIZE, help="optimizer steps, in place of --epochs")
    add("--batch_size", type=SIZE, default=32, help="pairs a step (32)")
    add("--max_seq_len", type=limit(int, 2), default=MAX_SEQ_LEN, help="tokens a pair (340)")
    add("--seed", type=limit(int, 0, 2**32 - 1), default=42, help="(42)")
    add("--jobs", type=SIZE, default=1, help="runs at once (1)")
    add("--dry_run", action="store_true", help="print the commands and the plan alone")
    add("--from_resume", action="store_true", help="continue; more --methods may join")
    return parser


def list_files(args: argparse.Namespace) -> dict[str, list[Path]]:
    """List the files that the flags name, by flag."""
    return {
        "--data_path": args.data_path,
        "--eval_data_path": args.eval_data_path,
        "--prompts": [args.prompts] if args.prompts else [],
        "--text_data": [args.text_data] if args.text_data else [],
    }


def check_compare_args(args: argparse.Namespace) -> None:
    """Refuse values that cannot work, before anything is loaded; name the comparison."""
    if args.epochs and args.max_steps:
        raise UserError("--epochs and --max_steps: contradict each other; give one")
    if args.wrap_documents and not args.text_data:
        raise UserError("--wrap_documents: is of --text_data; drop it")
    if not args.from_weight:
        raise UserError("--from_weight: is empty; name a folder or a hub id")
    for flag, paths in list_files(args).items():
        for path in paths:
            if path.is_dir():
                raise UserError(f"{flag} {path}: is a folder; name a file in it")
            if not path.is_file():
                raise UserError(f"{flag} {path}: no such file; mend the path")
    stem = args.data_path[0].name.split(".")[0]
    args.name = args.name or f"{Path(resolve_base(args.from_weight)).name}-{stem}"
    if Path(args.name).name != args.name or args.name == ".." or not args.name.isprintable():
        raise UserError(f"--name {args.name!r}: must be a plain folder name")
    args.methods = list(dict.fromkeys(args.methods))


def count_steps(per_epoch: int, epochs: float | None, max_steps: int | None) -> int:
    """Return the steps of a run: an epoch, at least 300 steps, but at most 10 epochs."""
    if max_steps:
        return max_steps
    if epochs:
        return max(1, math.ceil(epochs * per_epoch))
    return min(max(per_epoch, LEAST_STEPS), MOST_EPOCHS * per_epoch)


# ---------------------------------------------------------------- the plan


def open_folder(folder: Path, settings: dict, from_resume: bool) -> dict:
    """Return the plan of an earlier call, or start one; refuse what is of another comparison.

    Before its first run a comparison can still change, because a dry run leaves a folder, too.
    """
    path = folder / "plan.json"
    has_runs = (folder / "runs").is_dir()
    is_planned = path.is_file()
    if from_resume and not is_planned:
        raise UserError(f"--from_resume: no {path}; drop it")
    if has_runs and not from_resume:
        raise UserError(f"{folder} exists: give another --name, or --from_resume to continue")
    if not is_planned and folder.is_dir() and any(folder.iterdir()):
        raise UserError(f"{folder}: holds other files; give another --name")
    plan = read_json(path) if is_planned else {"settings": None, "seconds": {}}
    if plan["settings"] == settings:
        return plan
    if has_runs:
        changed = [flag for flag in settings if plan["settings"].get(flag) != settings[flag]]
        what = f"{', '.join(changed)} changed"
        raise UserError(f"--from_resume: {what}; restore it, or give another --name")
    if is_planned:
        shutil.rmtree(folder / "measured", ignore_errors=True)
        (folder / "data" / "base_answers.jsonl").unlink(missing_ok=True)
    plan = {"settings": settings, "seconds": {}}
    folder.mkdir(parents=True, exist_ok=True)
    write_json(path, plan)
    return plan


def list_settings(args: argparse.Namespace, fingerprint: str, steps: int) -> dict:
    """List what must be the same in every call for one folder, by flag; files by their hashes."""
    settings = {"--from_weight": fingerprint, "--epochs or --max_steps": steps}
    for flag, paths in list_files(args).items():
        settings[flag] = [file_sha256(path) for path in paths]
    for name in ("seed", "batch_size", "max_seq_len", "wrap_documents"):
        settings[f"--{name}"] = vars(args)[name]
    return settings


def describe_comparison(
    pairs: Pairs, run_length: str, yardstick: Yardstick, is_too_few: bool, end_bound: float
) -> list[str]:
    """Say in sentences what trains, what judges, and how long a run is."""
    sentences = [
        f"{len(pairs.train):,} pairs train, {len(pairs.choose):,} held-out pairs choose the "
        f"learning rates, and {len(pairs.judge):,} others judge.",
        pairs.note,
        f"Each run takes {run_length}.",
    ]
    if yardstick.choosing:
        sentences.append("Correct answers to the checked prompts choose and judge, not NLL.")
    elif count := sum(prompt.check is not None for prompt in yardstick.asked):
        sentences.append(
            f"The prompts with checks, {count}, are shown and decide nothing; "
            f"{2 * LEAST_PAIRS} would."
        )
    if is_too_few:
        sentences.append(
            f"Fewer than {LEAST_PAIRS} pairs a half are too few to order the methods, so the "
            "numbers are a first look; --eval_data_path can hold out more."
        )
    sentences.append(
        "While the embedding is frozen, as in LoRA, the end token's probability can reach "
        f"{end_bound:.3f}."
    )
    if end_bound < 0.5:
        sentences.append("Sampled answers may then never end; --train_tokens may help.")
    return sentences


def time_all(
    comparison: Comparison, yardstick: Yardstick, plan: dict, rates: dict[str, list[float]]
) -> None:
    """Measure the base, and steps of each method; add to the plan what both take, in seconds."""
    seconds = plan["seconds"]
    path = comparison.folder / "plan.json"
    if "measuring" not in seconds:
        start = time.perf_counter()
        yardstick.write_base_answers(comparison.base)
        yardstick.measure("base", comparison.base)
        seconds["measuring"] = time.perf_counter() - start
        write_json(path, plan)
    for name in comparison.methods:
        if name not in seconds:
            timed = comparison.time_method(name, rates[name][0])
            if name not in comparison.failures:
                seconds[name] = timed
                write_json(path, plan)
    if not comparison.list_remaining():
        raise UserError("no method is left; the lines above say why")
    if not comparison.failures:  # a failure names a log in there
        shutil.rmtree(comparison.folder / "timing", ignore_errors=True)


def print_commands(comparison: Comparison, rates: dict[str, list[float]]) -> None:
    """Print the command of each run that is planned."""
    for name in comparison.list_remaining():
        for rate in rates[name]:
            run = comparison.find_run(name, rate)
            command = comparison.make_command(name, rate, run, comparison.steps)
            print(shlex.join(["python", *command]))


def print_plan(
    comparison: Comparison, seconds: dict[str, float | list[float]], rates: dict[str, list[float]]
) -> None:
    """Print what will be trained, and how long it takes."""
    total = 0.0
    extension = 0.0  # if the best rate of every method lies at an edge twice
    for name in comparison.list_remaining():
        step_seconds, other_seconds = seconds[name]
        minutes = (comparison.steps * step_seconds + other_seconds) / 60
        todo = [rate for rate in rates[name] if not comparison.has_ended(name, rate)]
        total += minutes * len(todo) / comparison.jobs + seconds["measuring"] / 60
        extension += minutes * (MOST_RATES - len(FIRST_RATES)) / comparison.jobs
        listed = ", ".join(format_rate(rate) for rate in todo) or "the first rates have run"
        cost = f"{1000 * step_seconds:.0f} ms a step, {minutes:.1f} minutes a run"
        print(f"  {comparison.methods[name].title}: {listed} ({cost})")
    unit = "minute" if round(total) == 1 else "minutes"
    most = f"{total + extension:.0f} if all rates are extended twice"
    print(f"about {total:.0f} {unit}, {most}")


# ---------------------------------------------------------------- results


def collect_results(
    comparison: Comparison, yardstick: Yardstick, losses: dict[str, dict[float, Loss]]
) -> dict[str, Result]:
    """Measure each method at its best rate."""
    results = {}
    for name, by_rate in losses.items():
        best = min(by_rate, key=by_rate.get)
        if by_rate[best] == DIVERGED:
            comparison.give_up(name, "it diverged at every learning rate")
            continue
        run = comparison.find_run(name, best)
        results[name] = Result(
            title=comparison.methods[name].title,
            color=comparison.methods[name].color,
            rate=best,
            nll_by_rate={rate: nll for rate, (_, nll) in by_rate.items()},
            record=read_json(run / "run.json"),
            size=sum(path.stat().st_size for path in run.glob("*.safetensors")),
            measured=yardstick.measure(run.name, run),
        )
    if not results:
        raise UserError("no method is left; the lines above say why")
    return results


def list_common_flags(args: argparse.Namespace) -> list[str]:
    """Return the flags that all runs share, and the training on all data after them."""
    names = ("seed", "batch_size", "max_seq_len")
    return [word for name in names for word in (f"--{name}", str(vars(args)[name]))]


def write_final_command(
    args: argparse.Namespace, method: Method, rate: float, epochs: float
) -> str:
    """Write the command that trains a method on all data, as often as its run saw them."""
    words = ["python", f"trainer/train_{method.stage}.py", *method.flags]
    words += ["--lora_name" if method.stage == "lora" else "--run_name", args.name]
    words += ["--from_weight", args.from_weight, "--data_path", *map(str, args.data_path)]
    words += ["--epochs", f"{epochs:.3g}", "--learning_rate", f"{rate:g}"]
    return shlex.join([*words, *list_common_flags(args)])


@dataclass
class Prepared:
    """What is known before the first run: what is compared, how, and how the report begins."""

    comparison: Comparison
    yardstick: Yardstick
    pairs: Pairs
    settings: dict  # that must be the same in every call for one folder
    rates: dict[str, list[float]]  # the first ones of each method
    epochs: float  # of a run
    has_checks: bool  # correct answers choose and judge, in place of likelihood
    is_too_few: bool  # the held-out pairs cannot order the methods
    sentences: list[str]


def resolve_base(name: str) -> str:
    """Return a base's folder by its whole path, since the scripts run elsewhere; a hub id stays."""
    return str(Path(name).resolve()) if Path(name).is_dir() else name


def prepare(args: argparse.Namespace) -> Prepared:
    """Read the base, the pairs and the prompts; write nothing into the comparison's folder."""
    base = resolve_base(args.from_weight)
    model = load_model(base)  # which refuses an adapter
    tokenizer = load_tokenizer(base, model.config.vocab_size)
    width = model.config.hidden_size
    methods = {name: define_methods(width)[name] for name in args.methods}
    rates = {name: method.list_first_rates(width) for name, method in methods.items()}
    pairs = split_pairs(args.data_path, args.eval_data_path)
    prompts = read_prompts(args.prompts) if args.prompts else []
    per_epoch = math.ceil(len(pairs.train) / args.batch_size)
    steps = count_steps(per_epoch, args.epochs, args.max_steps)
    epochs = steps / per_epoch

    folder = args.save_dir.resolve() / args.name
    yardstick = make_yardstick(args, folder, (model, tokenizer), pairs.judge, prompts)
    has_checks = bool(yardstick.choosing)
    is_too_few = not has_checks and len(pairs.judge) < LEAST_PAIRS
    unit = "epoch" if epochs == 1 else "epochs"
    run_length = f"{steps:,} steps of {args.batch_size} pairs, or {epochs:.2g} {unit}"
    end_bound = reachable_probability(model, tokenizer.eos_token_id)
    return Prepared(
        comparison=Comparison(folder, base, methods, list_common_flags(args), steps, args.jobs),
        yardstick=yardstick,
        pairs=pairs,
        settings=list_settings(args, weights_fingerprint(model), steps),
        rates=rates,
        epochs=epochs,
        has_checks=has_checks,
        is_too_few=is_too_few,
        sentences=describe_comparison(pairs, run_length, yardstick, is_too_few, end_bound),
    )


def main(argv: list[str] | None = None) -> None:
    """Compare by the flags on the command line, unless another process does so under this name."""
    args = make_compare_parser().parse_args(argv)
    check_compare_args(args)
    prepared = prepare(args)
    with lock_comparison(args.save_dir, args.name):
        compare(args, prepared)


def lock_comparison(save_dir: Path, name: str) -> AbstractContextManager:
    """Take the lock of a comparison until its context ends; it lies beside the folder."""
    save_dir.mkdir(parents=True, exist_ok=True)
    lock = FileLock(save_dir / f".{name}.lock")
    try:
        return lock.acquire(timeout=0)
    except Timeout as error:
        remedy = "wait for it, or give another --name"
        raise UserError(f"{save_dir / name}: another compare.py works there; {remedy}") from error


def compare(args: argparse.Namespace, prepared: Prepared) -> None:
    """Plan, train, measure and report."""
    comparison, yardstick = prepared.comparison, prepared.yardstick
    plan = open_folder(comparison.folder, prepared.settings, args.from_resume)
    write_pairs(prepared.pairs, comparison.folder / "data")
    print(escape_control("\n".join(prepared.sentences)))

    # A stop from outside saves the state as Ctrl-C does.
    handler = signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        time_all(comparison, yardstick, plan, prepared.rates)
        if args.dry_run:  # first the commands, because they are long
            print_commands(comparison, prepared.rates)
        print_plan(comparison, plan["seconds"], prepared.rates)
        if args.dry_run:
            return
        losses = comparison.tune(prepared.rates, yardstick.score)
        results = collect_results(comparison, yardstick, losses)
    except KeyboardInterrupt:
        print(f"stopped; the same command with --from_resume continues ({comparison.folder})")
        raise
    finally:
        signal.signal(signal.SIGTERM, handler)

    def write_command(name: str) -> str:
        """Write the command for a method at its best rate."""
        method = comparison.methods[name]
        return write_final_command(args, method, results[name].rate, prepared.epochs)

    facts = Facts(
        title=f"How to fine-tune {args.from_weight} on {args.data_path[0].name}",
        sentences=prepared.sentences,
        key="wrong" if prepared.has_checks else "nll",
        is_too_few=prepared.is_too_few,
        text=args.text_data.name if args.text_data else None,
        failures=comparison.failures,
    )
    base_measured = yardstick.measure("base", comparison.base)
    write_report(comparison.folder, facts, results, base_measured, write_command)


if __name__ == "__main__":
    run_script(main)
