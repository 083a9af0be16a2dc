"""Committed results, read and joined: what `report.py` makes tables, figures and the page from.

    results/<name>/run.json               what a training run recorded
    results/<name>/metrics.jsonl          its curve
    results/<name>/update_analysis.json   what its update looks like, if that was analyzed
    model_outputs/<name>/results.json     rates, NLL and provenance of a probed checkpoint
    model_outputs/<name>/nll.json         NLL by sequence, or NLL alone if nothing was generated
    model_outputs/<name>/samples.jsonl    what it said
    model_outputs/<name>/rates_*.json     its rates on prompts whose text is not published
    calibration.json                      which measures are worth showing

A checkpoint is known by its folder's name, the same in both places. What was not done is not there
and is left out; what is there must be whole. A fine-tuned run is joined to its base by the name of
the folder in `--from_weight`: a pretraining run records no fingerprint of the weights it ends with.
"""

import math
from collections.abc import Iterable
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from statistics import fmean

import numpy as np

from dataset.jsonl import DataError, read_jsonl
from evaluation.intervals import Interval, ratio_interval
from evaluation.outputs import FLAGS
from model.files import read_json
from trainer.run_folder import WITHOUT_EFFECT

# Runs of `make demo`: not committed, so they are kept out of the report.
DEMO_PREFIX = "demo_"
STUDY_FOLDER = "study"  # in results/, of run_study.py: one file a run, and bases/
RUN_KEYS = ("status", "stage", "settings")
# Flags that came later, with what runs from before them did.
LATER_SETTINGS = {"lora": {"modules_to_save_lr_ratio": 1.0}}
TRAINING_KEYS = ("parameters", "trainable_parameters", "steps", "train_data")
# Stages of copies of a tuned checkpoint: with a part of its update, or with its adapter merged.
CHANGED = ("update_analysis", "merge_lora")
RESULT_KEYS = ("provenance", "nll", "decodings")
NLL_KEYS = ("provenance", "nll", "text_nll")
SAMPLE_KEYS = (
    *("id", "section", "decoding", "seed", "prompt", "prompt_translation", "output"),
    *("output_translation", "tokens", "check", "check_strict", "check_loose", *FLAGS),
)
SMALLEST_GAIN = 0.3  # nats that FFT must gain for recovery to mean something
# Rates that a reader is shown, by their key in results.json, in this order.
RATES = {
    "check_strict": "check passed",
    "runaway": "never ends",
    "loop": "loops",
    "blank": "blank",
    "off_topic": "off topic",
}
# Decodings that the README and its figures tell of, as people know them.
DECODING_LABELS = {"greedy": "greedy", "t0.85p0.85": "T=.85 top-p .85"}
# Settings that may differ within a sweep: the rate itself, and what does not change the result.
FREE_IN_SWEEP = WITHOUT_EFFECT | {"learning_rate", "run_name", "use_compile"}


@dataclass(frozen=True)
class Record:
    """Everything that is recorded about one checkpoint."""

    name: str
    run: dict | None = None
    curve: list[dict] = field(default_factory=list)
    update: dict | None = None
    results: dict | None = None
    samples: list[dict] = field(default_factory=list)
    rates_only: list[dict] = field(default_factory=list)

    @property
    def hidden(self) -> list[str]:
        """Measures that could not tell references from controls when its answers were probed."""
        return self.results.get("not_shown", []) if self.results else []

    @property
    def settings(self) -> dict:
        return self.run["settings"] if self.run else {}

    @property
    def stage(self) -> str | None:
        """`pretrain`, `full_sft`, `lora`, one of `CHANGED`, or None where no run is recorded."""
        return self.run["stage"] if self.run else None

    @property
    def status(self) -> str:
        """How the run ended: only a `completed` one is what its settings say."""
        return self.run["status"] if self.run else "no record of a run"

    @property
    def base(self) -> str | None:
        """Name of the checkpoint that it was trained from."""
        if self.stage in CHANGED:
            return self.settings["base"]
        start = self.settings.get("from_weight", "none")
        return None if start == "none" else Path(start).name

    @property
    def train_files(self) -> list[dict]:
        """Name and SHA-256 of each file that it was trained on."""
        return self.run["train_data"]["files"] if self.run and "train_data" in self.run else []

    @property
    def data(self) -> str:
        """Its training files' names, without endings, joined by `+`."""
        return " + ".join(file["name"].split(".")[0] for file in self.train_files)

    @property
    def nll(self) -> float | None:
        """Nats a response token on held-out conversations."""
        measured = self.results["nll"] if self.results else None
        return measured["nats_per_token"] if measured else None

    @property
    def text_nll(self) -> float | None:
        """Nats a token on held-out pretraining text: above its base's, what it forgot."""
        measured = self.results.get("text_nll") if self.results else None
        return measured["nats_per_token"] if measured else None

    @property
    def is_full_sft(self) -> bool:
        """Whether every parameter was fine-tuned, to the end."""
        whole = self.stage == "full_sft" and self.settings["trainable"] == "all"
        return whole and self.status == "completed"


# ----------------------------------------------------------------------------------------- reading


def read_records(results: Path, outputs: Path) -> list[Record]:
    """Every checkpoint with a folder in `results` or in `outputs`, by name.

    Raises:
        DataError, CheckpointError: a file is missing, broken or lacks a key; the message names it.
    """
    folders = [*subfolders(results), *subfolders(outputs)]
    names = sorted(
        {folder.name for folder in folders if not folder.name.startswith(DEMO_PREFIX)}
        - {STUDY_FOLDER}
    )
    return [read_record(name, results / name, outputs / name) for name in names]


def read_record(name: str, results: Path, outputs: Path) -> Record:
    """What the two folders of one checkpoint hold."""
    probe = read_probe(outputs)
    run = read_run(results)
    if run["run"] is None and probe["results"]:
        run["run"] = changed_copy(probe["results"])
    return Record(name, **run, **probe)


def changed_copy(results: dict) -> dict | None:
    """The record of a copy, which was made and not trained: its probe tells of it, no run does."""
    run = results["provenance"]["run"]
    return run if run and run["stage"] in CHANGED else None


def subfolders(folder: Path) -> list[Path]:
    """The folders in `folder`; none if it is not there."""
    return [path for path in folder.iterdir() if path.is_dir()] if folder.is_dir() else []


def read_run(folder: Path) -> dict:
    """`run`, `curve` and `update` of a results folder: those that are there."""
    run, curve, update = (
        folder / name for name in ("run.json", "metrics.jsonl", "update_analysis.json")
    )
    return {
        "run": read_run_record(run) if run.is_file() else None,
        "curve": read_lines(curve, ("step",)) if curve.is_file() else [],
        "update": read_keys(update, ("matrices",)) if update.is_file() else None,
    }


def read_run_record(path: Path) -> dict:
    """The content of run.json, which must tell what the report tells of such a run."""
    run = read_keys(path, RUN_KEYS)
    require_keys(run, () if run["stage"] in CHANGED else TRAINING_KEYS, str(path))
    run["settings"] = LATER_SETTINGS.get(run["stage"], {}) | run["settings"]
    return run


def read_probe(folder: Path) -> dict:
    """`results`, `samples` and `rates_only` of an outputs folder: those that are there."""
    results, nll, samples = (
        folder / name for name in ("results.json", "nll.json", "samples.jsonl")
    )
    found = read_keys(results, RESULT_KEYS) if results.is_file() else None
    if nll.is_file():
        found = with_nll(found, read_keys(nll, NLL_KEYS), nll)
    return {
        "results": found,
        "samples": read_lines(samples, SAMPLE_KEYS) if samples.is_file() else [],
        "rates_only": [
            read_keys(path, RESULT_KEYS) for path in sorted(folder.glob("rates_*.json"))
        ],
    }


def with_nll(results: dict | None, measured: dict, path: Path) -> dict:
    """`results` with the NLL of each sequence, or that it lacks; there may be nothing but NLL.

    Raises:
        DataError: the two are of different weights.
    """
    known = results or {"provenance": measured["provenance"], "decodings": {}}
    weights = [each["provenance"].get("weights_sha256") for each in (known, measured)]
    if weights[0] != weights[1]:
        raise DataError(f"{path}: measured on other weights than results.json; measure NLL again")
    names = ("nll", "text_nll")
    return known | {name: with_sequences(known.get(name), measured[name]) for name in names}


def with_sequences(known: dict | None, measured: dict | None) -> dict | None:
    """The NLL of nll.json, unless results.json has that of other data or has it alone."""
    if known is None:
        return measured
    same = measured is not None and known.items() <= measured.items()
    return measured if same else known


def read_shown_rates(calibration: Path) -> dict[str, str]:
    """Those of `RATES` that the calibration does not hide: all of them if there is none."""
    verdicts = read_keys(calibration, ("shown",))["shown"] if calibration.is_file() else {}
    return {key: label for key, label in RATES.items() if verdicts.get(key) is not False}


def read_keys(path: Path, keys: Iterable[str]) -> dict:
    """The JSON object in `path`, which must have `keys`."""
    content = read_json(path)
    require_keys(content, keys, str(path))
    return content


def read_lines(path: Path, keys: Iterable[str]) -> list[dict]:
    """The JSON objects in `path`, a line each, which must have `keys`."""
    lines = []
    for where, line in read_jsonl(path):
        require_keys(line, keys, where)
        lines.append(line)
    return lines


def require_keys(content: dict, keys: Iterable[str], where: str) -> None:
    """Raises DataError, naming `where`, if `content` lacks one of `keys`."""
    missing = [key for key in keys if key not in content]
    if missing:
        raise DataError(f"{where}: lacks {', '.join(missing)}; make the file again")


def measured_rates(records: list[Record], shown: dict[str, str]) -> dict[str, str]:
    """Those of the `shown` rates that were measured on some checkpoint."""
    return {
        key: label
        for key, label in shown.items()
        if any(
            rate_of_answers(record, decoding, key)
            for record in records
            for decoding in DECODING_LABELS
        )
    }


def rate_of_answers(record: Record, decoding: str, key: str) -> dict | None:
    """A rate as results.json has it: `rate`, `k`, `n`, `low`, `high`; None if it has no answers."""
    measured = record.results["decodings"].get(decoding, {}) if record.results else {}
    rate = measured.get(key)
    return rate if rate and rate["n"] else None


# ----------------------------------------------------------------------------------------- joining


def recovery(base: float, tuned: float, full: float) -> float | None:
    """Share of full fine-tuning's gain that a method recovers: (base - tuned) / (base - full).

    The three are held-out response NLL in nats per token. None where full fine-tuning gains less
    than `SMALLEST_GAIN`: the share of next to nothing means nothing.
    """
    gain = round(base - full, 6)  # as precise as results.json, so that 4.0 - 3.7 counts as .3
    return (base - tuned) / gain if gain >= SMALLEST_GAIN else None


@dataclass(frozen=True)
class Recovery:
    """A `recovery` and its 95% interval over conversations; None where only their sum is known."""

    share: float
    interval: Interval | None


def same_measurement(*records: Record) -> bool:
    """Whether the NLL of all was measured, and on the same data cut at the same length."""
    measured = [c.results["nll"] for c in records if c.nll is not None]
    facts = [(nll["data"], nll["max_seq_len"]) for nll in measured]
    return len(measured) == len(records) and all(fact == facts[0] for fact in facts)


def full_reference(record: Record, records: list[Record]) -> Record | None:
    """The full fine-tuning that `record` is compared with.

    Of the completed ones from the same base on the same files whose outputs were probed: the one
    with the lowest validation loss. Where NLL is then reported on the same held-out files, the
    choice favors it a little; the study keeps the two apart.
    """
    rivals = [
        other
        for other in records
        if other.is_full_sft
        and other.nll is not None
        and (other.base, other.train_files) == (record.base, record.train_files)
    ]
    return min(rivals, key=validation_loss, default=None)


def validation_loss(record: Record) -> float:
    """The last validation loss of a run that completed; infinite where there is none."""
    loss = record.run.get("eval_loss") if record.status == "completed" else None
    return math.inf if loss is None else loss


def recoveries(records: list[Record]) -> dict[str, Recovery]:
    """Recovery by name, where it is defined.

    A changed copy is measured against the full fine-tuning that the run it was made of is.
    """
    by_name = {record.name: record for record in records}
    found = {}
    for record in records:
        trained = by_name.get(record.settings["tuned"]) if record.stage in CHANGED else record
        base = by_name.get(record.base)
        full = full_reference(trained, records) if trained else None
        if base and full and same_measurement(base, record, full):
            share = share_recovered(base, record, full)
            if share:
                found[record.name] = share
    return found


def share_recovered(base: Record, tuned: Record, full: Record) -> Recovery | None:
    """`recovery` of three records, with its interval where the NLL of each conversation is kept.

    All three are paired: a draw takes the same conversations for each, and their tokens cancel.
    """
    share = recovery(base.nll, tuned.nll, full.nll)
    nlls = [record.results["nll"] for record in (base, tuned, full)]
    if share is None:
        return None
    if tuned is full or not all("sequences" in nll for nll in nlls):  # 1 by definition has none
        return Recovery(share, None)
    of_base, of_tuned, of_full = (np.array(nll["sequences"])[:, 0] for nll in nlls)
    return Recovery(share, ratio_interval(of_base - of_tuned, of_base - of_full))


def families(records: list[Record]) -> dict[str, list[Record]]:
    """Records by their base's name: the base, then from the highest NLL to the lowest, then others.

    Families are in the order of their base's size. A checkpoint without a base heads its own.
    """
    groups: dict[str, list[Record]] = {}
    for record in records:
        groups.setdefault(record.base or record.name, []).append(record)
    for members in groups.values():
        members.sort(key=lambda r: (r.base is not None, r.nll is None, -(r.nll or 0), r.name))
    return dict(sorted(groups.items(), key=lambda item: (family_size(item[1]), item[0])))


def family_size(members: list[Record]) -> int:
    """Parameters of the base, or of the first member that has a record of its run."""
    return next((r.run["parameters"] for r in members if r.run and "parameters" in r.run), 0)


def peak_rate(record: Record) -> float | None:
    """The peak learning rate; None where no run is recorded."""
    return record.settings.get("learning_rate")


def sweeps(records: list[Record]) -> list[list[Record]]:
    """Runs that differ in the learning rate alone, by rate; each sweep has two rates or more."""
    groups: dict[tuple, list[Record]] = {}
    for record in records:
        settings = record.settings
        held = {name: str(settings[name]) for name in settings.keys() - FREE_IN_SWEEP}
        key = (record.stage, str(record.train_files), *sorted(held.items()))
        groups.setdefault(key, []).append(record)
    found = [runs for runs in groups.values() if len({peak_rate(run) for run in runs}) > 1]
    for runs in found:
        runs.sort(key=peak_rate)
    return sorted(found, key=lambda runs: (runs[0].run["parameters"], runs[0].name))


def best_run(sweep: list[Record]) -> Record | None:
    """The run with the lowest validation loss; None where no run has one."""
    best = min(sweep, key=validation_loss)
    return best if math.isfinite(validation_loss(best)) else None


def where_best(sweep: list[Record], best: Record) -> str:
    """Whether both neighbors of the best rate are worse; else the grid ought to be extended."""
    rates = [peak_rate(run) for run in sweep]
    inside = min(rates) < peak_rate(best) < max(rates)
    return "inside the grid" if inside else "at the edge of the grid"


# ----------------------------------------------------------------------------------------- telling


def method(record: Record) -> str:
    """What was trained, in a few words: `FFT`, or `LoRA on square, r=8, alpha 8, gaussian init`."""
    settings = record.settings
    if record.stage == "pretrain":
        return "nothing: the base"
    if record.stage == "full_sft":
        parts = settings["trainable"]
        return "FFT" if parts == "all" else f"FFT of {parts.replace(',', ', ')}"
    if record.stage in CHANGED:
        return settings["change"]
    if record.stage != "lora":
        return "no record of how it was trained"
    words = [
        f"LoRA on {settings['lora_targets'].replace(',', ', ')}",
        f"r={settings['lora_rank']}",
        f"alpha {settings['lora_alpha']:g}",
    ]
    if settings["lora_init"] != "kaiming":
        words.append(f"{settings['lora_init']} init")
    if settings["use_rslora"]:
        words.append("rsLoRA")
    if settings["loraplus_lr_ratio"] != 1:
        words.append(f"LoRA+ {settings['loraplus_lr_ratio']:g}")
    if settings["train_tokens"]:
        words.append("rows of " + " ".join(settings["train_tokens"]))
    if settings["modules_to_save"]:
        words.append("and " + ", ".join(settings["modules_to_save"]))
    if settings["modules_to_save_lr_ratio"] != 1:
        words.append(f"these at {settings['modules_to_save_lr_ratio']:g} times the rate")
    return ", ".join(words)


def thin(rows: list[dict], key: str, points: int) -> list[tuple[int, float]]:
    """(step, value) of a curve as at most `points` means over equal stretches of its rows."""
    known = [(row["step"], row[key]) for row in rows if key in row]
    bounds = [len(known) * i // points for i in range(points + 1)]
    stretches = [known[start:end] for start, end in pairwise(bounds) if start < end]
    return [(part[-1][0], fmean(value for _, value in part)) for part in stretches]


def short(number: float) -> str:
    """A learning rate as people write it: `3e-3` instead of 0.003."""
    mantissa, exponent = f"{number:e}".split("e")
    return f"{float(mantissa):g}e{int(exponent)}"


def unfinished(record: Record) -> str:
    """` (diverged at step 40 of 932)` for a run that did not complete; empty for one that did."""
    if record.status == "completed" or record.run is None:
        return ""
    step, steps = record.run.get("step"), record.run["steps"]
    return (
        f" ({record.status})"
        if step is None
        else f" ({record.status} at step {step:,} of {steps:,})"
    )
