"""Run the second edition's missing runs: train by the scripts, measure, append the results.

    python evaluation/study/run.py --dry_run                    # missing runs, as commands
    python evaluation/study/run.py --jobs 2 --only 'xs-*'       # names, with * and ?
    OMP_NUM_THREADS=2 python evaluation/study/run.py --only 'm26-*' --max_hours 2.5

Each training and each measurement is a process of its own, with 1 thread unless OMP_NUM_THREADS is
set. Weights, logs and NLL by sequence go to --save_dir, results to runs.jsonl beside study.toml. A
run that is stopped, by --max_hours or Ctrl-C, keeps its state, and the next call continues it.
Diverged and failed runs have lines, too; the next call repeats failed ones.
"""

import asyncio
import shlex
import shutil
import signal
import sys
import time
from dataclasses import asdict, dataclass, field
from fnmatch import fnmatch
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from dataset.world.generate import ensure_world, list_files
from evaluation.runs import ENDED, call_script, choose_start_flags, read_status
from evaluation.study.data import check_world, find_data
from evaluation.study.plan import Run, make_command, plan_runs
from evaluation.study.results import append_run, read_runs
from evaluation.study.settings import RESULTS_DIR, Study, read_study
from model.checkpoint import load_model, save_model, save_rounded
from model.cli import SIZE, UserError, make_parser, run_script
from model.files import REPO_DIR, read_json, write_json

ORIGIN = ("base_fingerprint", "train_data", "git", "machine")


@dataclass
class Runner:
    """Train and measure runs of a study, and file their results."""

    study: Study
    world: dict[str, Path]  # its files
    save_dir: Path
    results_dir: Path
    only: list[str]  # names of runs, with * and ?
    errors: list[str] = field(default_factory=list)  # of the runs that failed

    def find(self, name: str) -> Path:
        """Return the path of data by its name; what the study makes is written first."""
        return find_data(name, self.world, self.save_dir / "data")

    async def call(self, words: list, run_id: str) -> bool:
        """Run a script, its output appended to the run's log; say if it succeeded.

        When the runner is stopped, the script is as well; a training script saves its state first.
        """
        return await call_script(words, self.save_dir / f"{run_id}.log", folder=REPO_DIR)

    async def train(self, run: Run, folder: Path) -> dict:
        """Train from the saved state, if there is one, and return run.json.

        A base that ships in bases/ is copied, for its arms too. Another one trains beside its
        folder, into which its weights go rounded to bfloat16. Raise a UserError if training failed;
        a run that diverged is a result, not a failure.
        """
        shipped, base = self.results_dir / "bases" / run.base_id, self.save_dir / run.base_id
        if shipped.is_dir() and not base.exists():
            shutil.copytree(shipped, base)
        if run.arm == "base" and (shipped.is_dir() or run.round == 3):
            return read_json(base / "run.json")
        trained = folder.with_name(f"{run.id}-float32") if run.arm == "base" else folder
        path = trained / "run.json"
        if read_status(trained) not in ENDED:
            command = make_command(self.study, run, self.find, self.save_dir)
            await self.call([*command, *choose_start_flags(trained)], run.id)
        record = read_json(path) if path.is_file() else {"status": "failed"}
        if record["status"] not in ENDED:
            raise UserError(f"{run.id}: training failed; see {self.save_dir / run.id}.log")
        if run.round == 3 and record["status"] == "completed":
            save_rounded(folder, self.find_kept(run))
        if trained != folder and record["status"] == "completed":
            save_model(load_model(trained).bfloat16().float(), trained, folder)
            write_json(folder / path.name, record)
        return record

    def find_kept(self, run: Run) -> Path:
        """Return the folder of a round 3 run's weights in bfloat16, which are what is measured."""
        return self.save_dir / "kept" / run.id

    def find_full_sft(self, run: Run) -> Path:
        """Return the kept weights of full fine-tuning with this run's seed, which ran before it."""
        pattern = f"{run.base_id}-fft-e{run.epochs:g}-*-s{run.seed}"
        folders = sorted((self.save_dir / "kept").glob(pattern))
        if not folders:
            raise UserError(f"{run.id}: is also asked on the weights of {pattern}; run that first")
        return folders[0]

    def list_questions(self, run: Run) -> list[str | Path]:
        """Return the flags with which measure.py asks a run of round 3."""
        words: list[str | Path] = ["--round3"]
        if run.data == "medical":
            words += ["--sets", "combinations", "unseen", "medical"]
        if "no_template" in run.ways:
            words.append("--no_template")
        if "on_fft" in run.ways and self.study.arms[run.arm].stage == "lora":
            words += ["--full_sft", self.find_full_sft(run)]
        return words

    async def file(self, run: Run, folder: Path, record: dict, step: int | None = None) -> None:
        """Measure a checkpoint of a run, if it completed, and append its line."""
        name = f"{run.id}@{step}" if step else run.id
        settings = record["settings"]
        line = describe_run(self.study, run, record["status"])
        line |= {"id": name, "step": step or record.get("step")}
        line |= {key: settings[key] for key in ("learning_rate", "seed", "dtype", "device")}
        line["settings"] = {k: v for k, v in settings.items() if v is not None and v is not False}
        line["cost"] = {k: v for k, v in record.items() if isinstance(v, int | float)}
        line |= {key: record.get(key) for key in ORIGIN}
        if record["status"] == "completed":
            output = self.save_dir / "measured" / f"{name}.json"
            output.parent.mkdir(exist_ok=True)
            command = self.make_measure_command(run, folder, output, is_checkpoint=bool(step))
            if not await self.call(command, run.id):
                raise UserError(f"{name}: measuring failed; see {self.save_dir / run.id}.log")
            measured = read_json(output)
            line |= {key: measured[key] for key in ("weights", "scalars", "outcomes")}
        append_run(self.results_dir, line)

    def make_measure_command(
        self, run: Run, folder: Path, output: Path, is_checkpoint: bool
    ) -> list[str | Path]:
        """Return the words of measure.py for a run's weights in `folder`, or for a checkpoint's.

        A run of round 3 is measured on its kept weights, and asked the questions of that round.
        """
        size = self.study.sizes[run.size]
        place = folder
        questions: list[str | Path] = []
        if run.round == 3:
            is_base = run.arm == "base"
            place = self.save_dir / run.base_id if is_base else self.find_kept(run)
            questions = self.list_questions(run)
        elif is_checkpoint:
            second = "medical" if run.data == "medical" else "unseen"
            questions = ["--sets", "combinations", second]
        only_tunes = run.epochs == size.tuning_epochs != size.epochs
        if run.round == 2 and run.data == "sft" and only_tunes:
            questions.append("--only_tune")
        if run.round == 2 and run.data.startswith("facts"):
            questions += ["--facts", self.find(run.data)]
        words = ["evaluation/study/measure.py", place, "--output", output]
        words += ["--study_dir", self.results_dir, "--world", self.world["sft"].parent]
        return [*words, "--base", run.base, *questions]

    async def perform(self, run: Run) -> None:
        """Train a run, and file its kept checkpoints and itself; a failure is filed as well."""
        folder = self.save_dir / run.id
        try:
            record = await self.train(run, folder)
            ids = set(read_runs(self.results_dir, self.study.edition).id)
            for checkpoint in folder.glob("checkpoints/step_*"):
                step = int(checkpoint.name.removeprefix("step_"))
                is_new = step < record.get("steps", 0) and f"{run.id}@{step}" not in ids
                if is_new and record["status"] == "completed":
                    await self.file(run, checkpoint, record, step)
            await self.file(run, folder, record)
        except UserError as error:
            self.errors.append(str(error))
            line = describe_run(self.study, run, "failed") | {"error": str(error)}
            append_run(self.results_dir, line)

    def list_missing(self) -> tuple[list[Run], set[str | None]]:
        """Return the runs that --only names and that have not ended, and what they can start from.

        A run can start from nothing (None) or from a completed run's weights, if they are there.
        """
        done = read_runs(self.results_dir, self.study.edition)
        ended = set(done.id[done.status != "failed"])
        plan = []
        for run in plan_runs(self.study, done):
            if any(fnmatch(run.id, name) for name in self.only):
                plan.append(run)
        if not plan:
            raise UserError(f"--only {' '.join(self.only)}: no run has such a name; see --dry_run")
        missing = [run for run in plan if run.id not in ended]
        starts: set[str | None] = {None}
        for run_id in done.id[done.status == "completed"]:
            places = [self.save_dir / run_id, self.results_dir / "bases" / run_id]
            if any(place.is_dir() for place in places):
                starts.add(run_id)
        return missing, starts

    async def run_all(self, jobs: int) -> None:
        """Start runs, `jobs` at once and each once, until none is missing that can start."""
        started: set[str] = set()
        tasks: set[asyncio.Task] = set()
        try:
            while True:
                missing, starts = self.list_missing()
                ready = [r for r in missing if r.id not in started and r.start_id in starts]
                for run in ready[: jobs - len(tasks)]:
                    text = f"{time.strftime('%H:%M:%S')} {run.id} ({len(missing)} missing)"
                    print(text, flush=True)
                    started.add(run.id)
                    tasks.add(asyncio.create_task(self.perform(run)))
                if not tasks:
                    break
                ended, tasks = await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
                for task in ended:
                    task.result()  # raises what is no failure of a run
        finally:
            missing, starts = self.list_missing()
            print("missing:", ", ".join(run.id for run in missing) or "nothing")
            if lost := {run.start_id for run in missing} - starts:
                print(f"needed first, in {self.save_dir}: {', '.join(sorted(lost))}")


def describe_run(study: Study, run: Run, status: str) -> dict:
    """Return the part of a line of runs.jsonl that the plan knows."""
    line = {"id": run.id, "edition": study.edition, "status": status} | asdict(run)
    line |= {"base": run.base_id, "data": run.data if run.arm != "base" else "pretrain"}
    hidden = ["checkpoints", "start_id", "ways"]
    hidden += ["round"] if run.round == 2 else []  # its lines were written without a round
    return {key: line[key] for key in line if key not in hidden}


def main() -> None:
    """Run the study, or print the commands that are missing."""
    parser = make_parser(__doc__)
    parser.add_argument("--study_dir", type=Path, default=RESULTS_DIR, help="of study.toml")
    parser.add_argument("--save_dir", type=Path, default=REPO_DIR / "out" / "study")
    parser.add_argument("--world", type=Path, help="folder of another world's files")
    parser.add_argument("--only", nargs="+", default=["*"], help="names of runs, with * and ?")
    parser.add_argument("--jobs", type=SIZE, default=1, help="runs at once")
    parser.add_argument("--max_hours", type=float, default=1e6, help="stop runs after this time")
    parser.add_argument("--dry_run", action="store_true", help="print the commands alone")
    args = parser.parse_args()
    study = read_study(args.study_dir)
    world = list_files(args.world.resolve()) if args.world else ensure_world()
    if not args.world:
        check_world(args.study_dir / "world.sha256")
    runner = Runner(study, world, args.save_dir.resolve(), args.study_dir.resolve(), args.only)
    runner.save_dir.mkdir(parents=True, exist_ok=True)
    if args.dry_run:
        missing, _ = runner.list_missing()
        place = args.study_dir / "bases"
        print(f"# {len(missing)} runs; bases that ship: cp -rL '{place}'/* '{args.save_dir}'")
        for run in missing:
            command = make_command(study, run, runner.find, args.save_dir)
            print(f"# {run.id}\n{shlex.join(['python', *command])}")
        return
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        asyncio.run(asyncio.wait_for(runner.run_all(args.jobs), 3600 * args.max_hours))
    except (TimeoutError, KeyboardInterrupt):
        print("stopped; the next call continues")
    if runner.errors:
        raise UserError("; ".join(runner.errors))


if __name__ == "__main__":
    run_script(main)
