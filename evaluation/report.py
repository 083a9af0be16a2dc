r"""Makes the READMEs' tables, the figures and the page from committed results alone.

    python evaluation/report.py                  # or: make report
    python evaluation/report.py --add out/full_sft out/lora_all    # file these runs' records first
    python evaluation/report.py --root FOLDER    # another folder with README.md and evaluation/
    python evaluation/report.py --show_study out/again    # print another folder's study

    README.md                             what stands between <!-- report:NAME --> and its end;
                                          of reliability, from tests/stress_resume.json, and of
                                          speed, from evaluation/bench.json; and in its sentences
                                          what follows a claim's name, `(H1: supported, ...)`
    evaluation/results/README.md          likewise, single runs and sweeps of learning rates
    evaluation/results/study/README.md    the study's verdicts, cells and rates
    evaluation/figures/*.svg              made with matplotlib (plots.py)
    evaluation/model_outputs/index.html   the page to read and compare outputs on (page/)

The same results give the same bytes. Nothing is written unless all of it could be made. What the
results are and how they are joined is in records.py, what the measures are in metrics.py.
"""

import argparse
import math
import re
import shutil
import sys
import textwrap
from collections import Counter
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from urllib.parse import quote

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from dataset.command_line import REPO_DIR, Parser, SettingsError
from dataset.jsonl import DataError
from dataset.untrusted import shown
from evaluation.bench_tables import bench_lines
from evaluation.findings import Evidence, gather
from evaluation.outputs import inline, markdown_table
from evaluation.page.build import page_html
from evaluation.plots import figures
from evaluation.prompts import PROMPTS_FILE, by_language, read_prompts
from evaluation.records import (
    DECODING_LABELS,
    STUDY_FOLDER,
    Record,
    Recovery,
    best_run,
    families,
    measured_rates,
    method,
    peak_rate,
    rate_of_answers,
    read_keys,
    read_records,
    read_shown_rates,
    recoveries,
    short,
    sweeps,
    unfinished,
    validation_loss,
    where_best,
)
from evaluation.recovery import check_controlled, check_prompts
from evaluation.study import read_results, read_study
from evaluation.study_plots import study_figures
from evaluation.study_report import (
    DETAILS,
    NO_STUDY,
    citations,
    study_block,
    study_details,
    summary_block,
)
from model.files import write_text
from trainer.failures import run_script

RUNS = "evaluation/results/README.md"  # what is told of single runs
RUN_FILES = ("run.json", "metrics.jsonl")
BENCH_KEYS = ("git", "machine", "dtype", "batch_size", "data", "training", "generation")
BENCH_KEYS += ("startup", "tokenizing", "loader", "card_peak")
STRESS_KEYS = ("git", "seed", "kills", "survived", "cases", "memory_bytes_by_step")
RUN_COLUMNS = ("checkpoint", "trained", "on", "parameters", "learning rate", "steps", "NLL", "R")
SWEEP_COLUMNS = ("trained", "on", "steps", "validation NLL by rate", "best rate")
# What a sentence tells of a claim: after `(` or `; ` its name, and up to the next `;` or `)` what
# `citations` says of it.
CITATION = re.compile(r"(?<=[(;])(?P<name>\s*[PHEX][^().;:]*:\s+)(?P<told>[^();]*)")
VERDICT = re.compile(r"(supported|refuted|open|not run)(, [-+]?\d+\.\d+ \[[^]]*\])*")


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = Parser(__doc__)
    parser.add_argument(
        "--root",
        type=Path,
        default=REPO_DIR,
        help="folder that holds README.md and evaluation/ (default: this repository)",
    )
    parser.add_argument(
        "--add",
        type=Path,
        nargs="+",
        default=[],
        metavar="RUN",
        help="run folders whose run.json and metrics.jsonl are copied to evaluation/results/ first",
    )
    parser.add_argument(
        "--show_study",
        type=Path,
        metavar="FOLDER",
        help="print what this folder of run_study.py's results comes to, and write nothing",
    )
    args = parser.parse_args(argv)
    if args.show_study and not args.show_study.is_dir():
        parser.error(f"--show_study {args.show_study}: no such folder")
    if args.show_study and args.add:
        parser.error("--show_study writes nothing, and so files no run: leave out --add")
    for run in args.add:
        if not all((run / name).is_file() for name in RUN_FILES):
            raise SettingsError(f"--add {run}: lacks {' or '.join(RUN_FILES)}; train it first")
    return args


def main(argv: list[str] | None = None) -> int:
    args = parse_args(argv)
    if args.show_study:
        show_study(args.root / "evaluation" / "study.toml", args.show_study)
        return 0
    for run in args.add:
        add_run(run, args.root / "evaluation" / "results")
    for path in write_changed(build(args.root)):
        print(f"wrote {path.relative_to(args.root)}")
    return 0


def add_run(run: Path, results: Path) -> None:
    """Copies the record and the curve of a run to the committed results."""
    folder = results / run.resolve().name
    folder.mkdir(parents=True, exist_ok=True)
    for name in RUN_FILES:
        shutil.copyfile(run / name, folder / name)


def build(root: Path) -> dict[Path, str]:
    """The text of every file that the report is made of, by path.

    Raises:
        DataError, CheckpointError: a result or the README cannot be used; the message names it.
    """
    evaluation = root / "evaluation"
    records = read_records(evaluation / "results", evaluation / "model_outputs")
    if not records:
        raise DataError(f"{evaluation}: holds no results; run eval_llm.py or mend --root")
    rates = measured_rates(records, read_shown_rates(evaluation / "calibration.json"))
    study = read_evidence(evaluation / "study.toml", evaluation / "results" / STUDY_FOLDER)
    study_drawn = study_figures(study) if study else {}
    drawn = figures(records, rates) | study_drawn
    stress = root / "tests" / "stress_resume.json"
    kills = read_keys(stress, STRESS_KEYS) if stress.is_file() else None
    bench = evaluation / "bench.json"
    speed = read_keys(bench, BENCH_KEYS) if bench.is_file() else None
    readme = root / "README.md"
    blocks = measured_blocks(kills, speed) | study_blocks(study, study_drawn)
    files = {readme: cite(filled(readme, blocks), citations(study) if study else {}, str(readme))}
    files[root / RUNS] = filled(root / RUNS, run_blocks(records, rates, list(drawn)))
    if study:
        files[root / DETAILS] = "\n".join(study_details(study)) + "\n"
    files |= {evaluation / "figures" / name: svg for name, svg in drawn.items()}
    return files | {evaluation / "model_outputs" / "index.html": page_html(records, rates)}


def read_evidence(study_file: Path, folder: Path) -> Evidence | None:
    """What a folder of the study's results comes to; None if it holds none."""
    results = read_results(folder)
    if not results:
        return None
    study = read_study(study_file)
    check_controlled(results)
    check_prompts(results, PROMPTS_FILE)
    return gather(study, results, by_language(read_prompts(PROMPTS_FILE)))


def study_blocks(evidence: Evidence | None, drawn: Iterable[str]) -> dict[str, list[str]]:
    """The study's parts of the README; `drawn` are the names of its figures."""
    if evidence is None:
        return {"summary": [NO_STUDY], "study": [NO_STUDY]}
    return {"summary": summary_block(evidence, drawn), "study": study_block(evidence, drawn)}


def show_study(study_file: Path, folder: Path) -> None:
    """Prints what a folder of the study's results comes to, without its figures."""
    evidence = read_evidence(study_file, folder)
    parts = study_blocks(evidence, ())
    details = study_details(evidence) if evidence else []
    for line in (*parts["summary"], "", *parts["study"], "", *details):
        print(shown(line))


def filled(path: Path, parts: dict[str, list[str]]) -> str:
    """The text of a file with its generated parts made anew."""
    text = path.read_text(encoding="utf-8")
    for name, lines in parts.items():
        text = replace_block(text, name, lines, str(path))
    return text


def cite(text: str, told: dict[str, str], where: str) -> str:
    """`text` with what its sentences tell of claims made anew, as in `(H1: open; P0: supported)`.

    Args:
        told: by a claim's name, its verdict and what was measured.

    Raises:
        DataError: a sentence names a claim that there is not, or says more of one.
    """

    def anew(found: re.Match[str]) -> str:
        name = " ".join(found["name"].split()).rstrip(":")
        words = " ".join(found["told"].split())
        if name in told and not VERDICT.fullmatch(words):
            raise DataError(f"{where}: after {name!r} stands {words!r}; put it after another ';'")
        if name not in told and VERDICT.fullmatch(words):
            raise DataError(f"{where}: study.toml has no claim {name!r}; mend its name")
        is_same = words == told.get(name, words)  # then lines stay as they are
        return found["name"] + (found["told"] if is_same else told[name])

    return CITATION.sub(anew, text)


def write_changed(files: dict[Path, str]) -> list[Path]:
    """Writes the files whose text is not what it was, and returns their paths."""
    changed = []
    for path, text in files.items():
        if not path.is_file() or path.read_text(encoding="utf-8") != text:
            path.parent.mkdir(parents=True, exist_ok=True)
            write_text(path, text)
            changed.append(path)
    return changed


# ------------------------------------------------------------------------------- generated parts


def measured_blocks(stress: dict | None, bench: dict | None) -> dict[str, list[str]]:
    """Markdown lines of what was measured of the code itself, for the README.

    Args:
        stress: what `make stress` wrote; None if it was not run.
        bench: what `make bench` wrote; None if it was not run.
    """
    return {
        "bench": ["`make bench` was not run yet."] if bench is None else bench_block(bench),
        "reliability": ["`make stress` was not run yet."]
        if stress is None
        else wrapped(reliability_text(stress)),
    }


def run_blocks(
    records: list[Record], rates: dict[str, str], drawn: Iterable[str]
) -> dict[str, list[str]]:
    """Markdown lines of single runs, for `RUNS`.

    Args:
        rates: the rates that are shown, with their labels.
        drawn: names of the figures that there are.
    """
    return {"runs": runs_block(records, rates, drawn), "sweeps": sweeps_block(records, drawn)}


def replace_block(text: str, name: str, lines: list[str], where: str) -> str:
    """`text` with `lines` in place of what stands between the markers called `name`.

    Raises:
        DataError: the markers do not stand there exactly once.
    """
    start, end = f"<!-- report:{name} -->", f"<!-- /report:{name} -->"
    pattern = re.compile(f"{re.escape(start)}.*?{re.escape(end)}", re.DOTALL)
    if len(pattern.findall(text)) != 1:
        raise DataError(f"{where}: put {start} and {end} once where the {name} go")
    block = "\n".join([start, *lines, end])
    return pattern.sub(lambda _: block, text)


def figure_line(name: str, drawn: Iterable[str], alt: str) -> list[str]:
    """The figure called `name`, if it was drawn."""
    return [f"![{alt}](../figures/{name})", ""] if name in drawn else []


def runs_block(records: list[Record], rates: dict[str, str], drawn: Iterable[str]) -> list[str]:
    """For every base: what was trained from it, how likely it finds answers, how it answers."""
    shares = recoveries(records)
    columns = (*RUN_COLUMNS, *rates.values())
    lines = []
    for base, members in families(records).items():
        probed = [record for record in members if record.results]
        if not probed:
            continue
        lines += [*wrapped(family_title(members[0])), ""]
        for note, alike in probed_alike(probed).items():
            rows = [run_row(record, shares, rates) for record in alike]
            lines += [*markdown_table(columns, rows), "", *wrapped(note), ""]
        lines += rates_only_lines(members, rates)
        lines += figure_line(f"rates_{base}.svg", drawn, f"Rates with 95% intervals, from {base}")
        lines += figure_line(f"curves_{base}.svg", drawn, f"Loss curves of runs from {base}")
        lines += figure_line(f"spectra_{base}.svg", drawn, f"Energy by rank of updates of {base}")
    return lines[:-1]


def rates_only_lines(members: list[Record], rates: dict[str, str]) -> list[str]:
    """A table with intervals for every set of prompts whose text is not published."""
    probes = [
        replace(record, results=results) for record in members for results in record.rates_only
    ]
    lines = []
    for note, alike in probed_alike(probes).items():
        keys = measured_rates(alike, rates)
        rows = [[inline(r.name), *(interval_cell(r, key) for key in keys)] for r in alike]
        lines += [*markdown_table(["checkpoint", *(rates[key] for key in keys)], rows), ""]
        lines += [*wrapped(f"{note} In brackets: 95% Wilson intervals over prompts."), ""]
    return lines


def interval_cell(record: Record, key: str) -> str:
    """A rate under each decoding that is shown, such as `43% [39, 48] / 25% [21, 29]`."""
    measured = [rate_of_answers(record, decoding, key) for decoding in DECODING_LABELS]
    return " / ".join(
        f"{100 * r['rate']:.0f}% [{100 * r['low']:.0f}, {100 * r['high']:.0f}]" if r else "-"
        for r in measured
    )


def wrapped(text: str) -> list[str]:
    """Lines of a paragraph."""
    return textwrap.wrap(text, width=100, break_long_words=False, break_on_hyphens=False)


def probed_alike(probed: list[Record]) -> dict[str, list[Record]]:
    """Checkpoints whose rates can be compared, by a note on how they were measured."""
    groups: dict[str, list[Record]] = {}
    for record in probed:
        groups.setdefault(probe_note(record), []).append(record)
    return groups


def probe_note(record: Record) -> str:
    """What the rates and the NLL of a checkpoint are measured on."""
    return " ".join(rates_note(record) + nll_note(record))


def rates_note(record: Record) -> list[str]:
    """A sentence on the answers, if any were asked for."""
    decodings = record.results["decodings"]
    if not decodings:
        return []
    prompts = record.results["provenance"]["prompts"]
    limit = record.results["provenance"]["generation"]["max_new_tokens"]
    told = " / ".join(name for decoding, name in DECODING_LABELS.items() if decoding in decodings)
    checked = rate_of_answers(record, "greedy", "check_strict")
    checks = f", {checked['n']} with a check" if checked else ""
    return [
        f"Rates are of {prompts['count']} prompts ({inline(prompts['file'])}, "
        f"{prompts['sha256'][:8]}{checks}), at most {limit} tokens, {told}."
    ]


def nll_note(record: Record) -> list[str]:
    """A sentence on the held-out conversations, if NLL was measured."""
    nll = record.results["nll"]
    if not nll:
        return []
    files = ", ".join(inline(file["name"]) for file in nll["data"])
    return [
        f"NLL is in nats a token, of the {nll['response_tokens']:,} response tokens in "
        f"{nll['conversations']:,} conversations of {files}."
    ]


def family_title(base: Record) -> str:
    """The base in a sentence: its shape, its size, what it read."""
    if base.stage != "pretrain":
        return f"**From {inline(base.name)}:**"
    shape, run = base.settings, base.run
    return (
        f"**From {inline(base.name)}**: d={shape['hidden_size']}, "
        f"{shape['num_hidden_layers']} layers, {run['parameters']:,} parameters, pretrained on "
        f"{run['tokens'] / 1e6:.1f}M tokens ({run['tokens'] / run['parameters']:.0f} a parameter) "
        f"of {inline(base.data)}{unfinished(base)}:"
    )


def run_row(record: Record, shares: dict[str, Recovery], rates: dict[str, str]) -> list[str]:
    """One row of `RUN_COLUMNS` and `rates`."""
    name = record.name
    outputs = f"../model_outputs/{quote(name)}/samples.md"
    trained = record.run if record.stage in ("full_sft", "lora") else {}
    return [
        f"[{inline(name)}]({outputs})" if record.samples else inline(name),
        inline(method(record)) + unfinished(record),
        inline(record.data) if trained else "-",
        whole(trained.get("trainable_parameters")),
        short(peak_rate(record)) if trained else "-",
        whole(trained.get("step")),
        "-" if record.nll is None else f"{record.nll:.3f}",
        recovery_cell(shares.get(name)),
        *(rates_cell(record, key) for key in rates),
    ]


def recovery_cell(found: Recovery | None) -> str:
    """R with its 95% interval, such as `0.53 [0.51, 0.55]`; `-` where it is not defined."""
    if found is None:
        return "-"
    interval = found.interval
    return f"{found.share:.2f}" + (
        f" [{interval.low:.2f}, {interval.high:.2f}]" if interval else ""
    )


def whole(number: int | None) -> str:
    """A whole number; `-` where there is none."""
    return "-" if number is None else f"{number:,}"


def rates_cell(record: Record, key: str) -> str:
    """A rate under each of `DECODING_LABELS` in whole percent, such as `49% / 61%`."""
    measured = [rate_of_answers(record, decoding, key) for decoding in DECODING_LABELS]
    return " / ".join(f"{100 * rate['rate']:.0f}%" if rate else "-" for rate in measured)


# ------------------------------------------------------------------------------------------ sweeps


def sweeps_block(records: list[Record], drawn: Iterable[str]) -> list[str]:
    """A row for every sweep of learning rates, and the figures of them."""
    found = sweeps(records)
    if not found:
        return ["No sweep of learning rates yet.", ""]
    lines = [*markdown_table(SWEEP_COLUMNS, [sweep_row(runs) for runs in found]), ""]
    for base in families(records):
        name = f"learning_rates_{base}.svg"
        lines += figure_line(name, drawn, f"Validation NLL by learning rate, from {base}")
    return lines[:-1]


def sweep_row(runs: list[Record]) -> list[str]:
    """One row of `SWEEP_COLUMNS`; `runs` are in order of their rate."""
    best = best_run(runs)
    return [
        f"{inline(method(runs[0]))}, from {inline(runs[0].base or 'random weights')}",
        inline(runs[0].data),
        f"{runs[0].run['steps']:,}",
        ", ".join(sweep_cell(run, is_best=run is best) for run in runs),
        "-" if best is None else f"{short(peak_rate(best))}, {where_best(runs, best)}",
    ]


def sweep_cell(run: Record, is_best: bool) -> str:
    """A rate with its validation loss, or with how the run ended instead."""
    loss = validation_loss(run)
    cell = f"{short(peak_rate(run))}: {run.status if math.isinf(loss) else f'{loss:.3f}'}"
    return f"**{cell}**" if is_best else cell


# ------------------------------------------------------------------------------------------- speed


def bench_block(bench: dict) -> list[str]:
    """What `make bench` measured; its sentences become lines of the README's width."""
    lines = []
    for line in bench_lines(bench):
        lines += [line] if line.startswith("|") or not line else wrapped(line)
    return lines


# ------------------------------------------------------------------------------------- reliability


def reliability_text(stress: dict) -> str:
    """What `make stress` measured, in a few sentences."""
    at_random, aimed = (kills_by_phase(stress["cases"], kind) for kind in ("phases", "aimed"))
    kinds = f"{at_random.total()} at random moments"
    if aimed:
        kinds += f", {aimed.total()} aimed into a save"
    sentences = [
        f"`make stress`, at commit {stress['git'].get('commit', 'unknown')[:7]} with seed "
        f"{stress['seed']}: {stress['survived']} of {stress['kills']} SIGKILLs ({kinds}) were "
        f"survived bit for bit, in {len(stress['cases'])} combinations of stage, type, "
        "accumulation, dropout, data processes and training processes. Those at random fell into: "
        f"{listed(at_random)}."
    ]
    if aimed:
        sentences.append(f"Those aimed fell into: {listed(aimed)}.")
    failed = [case["name"] for case in stress["cases"] if case["exact_runs"] < case["runs"]]
    if failed:
        sentences.append(f"Not exact: {'; '.join(failed)}.")
    memory = {int(step): size for step, size in stress["memory_bytes_by_step"].items()}
    if memory:
        first, last = min(memory), max(memory)
        sentences.append(
            f"Resident memory was {memory[first] / 2**20:,.1f} MiB at step {first:,} of a run and "
            f"{memory[last] / 2**20:,.1f} MiB at step {last:,}."
        )
    return " ".join(sentences)


def kills_by_phase(cases: list[dict], kind: str) -> Counter[str]:
    """Kills of all cases by where they fell; those of a `kind`: "phases" (at random) or "aimed"."""
    fell = Counter[str]()
    for case in cases:
        fell.update(case[kind])
    return +fell


def listed(fell: Counter[str]) -> str:
    """Counts in a line."""
    return ", ".join(f"{phase} {count}" for phase, count in fell.items())


if __name__ == "__main__":
    run_script(main)
