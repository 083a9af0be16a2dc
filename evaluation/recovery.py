"""What the study's runs recover of full fine-tuning's gain, and what they forget.

R = (L_base - L_arm) / (L_base - L_FFT) on the test conversations, those with an odd index, with the
95% interval of a two-level paired bootstrap: every draw takes seeds and conversations, the same for
all arms. Beside it stands R of the same responses without their end tokens: what of the gain is not
learning where to stop.
"""

from collections.abc import Iterable
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path

import numpy as np

from dataset.jsonl import DataError, file_sha256
from evaluation.intervals import DRAWS, SEED, Interval, percentile_interval, resampling_counts
from evaluation.records import SMALLEST_GAIN
from evaluation.study import FULL, TEST, Cell, base_id, run_of, tuned_rate


@dataclass(frozen=True)
class Measured:
    """The runs of a cell that have a result."""

    cell: Cell  # with the rate that "tuned" stands for
    seeds: list[int]  # of the runs that completed
    failed: int  # runs that diverged
    nats: np.ndarray  # (seeds, conversations)
    tokens: np.ndarray  # (conversations,)
    # Those of the end tokens among them; None for a part, and where a run did not tell them apart.
    end_nats: np.ndarray | None
    ends: np.ndarray | None
    text_nll: list[float]  # by seed; empty for a part of an update
    rates: list[dict]  # by decoding, of the seeds that were probed; of a whole run
    records: list[dict]  # what the training script recorded, by seed; of a whole run

    @property
    def nll(self) -> float:
        """Nats a response token of the test conversations, over all seeds."""
        return float(self.nats.mean(axis=0).sum() / self.tokens.sum())


def known_cell(study: dict, cell: Cell, results: dict[str, dict]) -> Cell | None:
    """The cell with its tuned rate put in, that of the first seed's grid before it is tuned.

    None before that grid is run.
    """
    if cell.rate != "tuned":
        return cell
    rate = tuned_rate(study, cell.arm, cell.size, results, all_seeds=False)
    return None if rate is None else replace(cell, rate=rate)


def measure_cell(study: dict, cell: Cell, results: dict[str, dict]) -> Measured | None:
    """What was measured of a cell; None where no run of it completed."""
    known = known_cell(study, cell, results)
    if known is None:
        return None
    mine = [result for result in results.values() if is_of(result, known)]
    done = sorted(
        (r for r in mine if has_measures(r, known.part)), key=lambda result: result["seed"]
    )
    if not done:
        return None
    data = study["variants"][known.variant]["data"]
    held_out = [result["held_out"][data] for result in done]
    whole = [found["nats"] for found in held_out]
    nats = [result["parts"][known.part] for result in done] if known.part else whole
    tells_ends = not known.part and all("ends" in found for found in held_out)
    return Measured(
        known,
        [result["seed"] for result in done],
        sum("held_out" not in result for result in mine),
        np.array([of_run[TEST] for of_run in nats]),
        np.array(held_out[0]["tokens"][TEST]),
        np.array([found["end_nats"][TEST] for found in held_out]) if tells_ends else None,
        np.array(held_out[0]["ends"][TEST]) if tells_ends else None,
        [] if known.part else [result["text_nll"] for result in done],
        [] if known.part else [r["probe"]["rates"] for r in done if "probe" in r],
        [] if known.part else [result["run"] for result in done],
    )


def has_measures(result: dict, part: str) -> bool:
    """Whether a result has the measures of a whole run, or of a part of its update."""
    return part in result.get("parts", {}) if part else "held_out" in result


def is_of(result: dict, cell: Cell) -> bool:
    """Whether a result is of a run of this cell."""
    return result["arm"] is not None and result["id"] == run_of(cell, result["seed"]).id


def count_diverged(study: dict, cell: Cell, results: dict[str, dict]) -> int:
    """How many runs of a cell diverged."""
    known = known_cell(study, cell, results)
    if known is None:
        return 0
    return sum(is_of(r, known) and "held_out" not in r for r in results.values())


@dataclass(frozen=True)
class Base:
    """What was measured of a base."""

    nats: np.ndarray  # (conversations,)
    end_nats: np.ndarray | None  # (conversations,) of the end tokens, if they were told apart
    text_nll: float

    @property
    def answer_nats(self) -> np.ndarray:
        """(conversations,) of all but the end tokens."""
        return self.nats - self.end_nats


def base_of(study: dict, cell: Cell, results: dict[str, dict]) -> Base | None:
    """What a cell's runs start from; None where it was not measured."""
    result = results.get(base_id(cell.size, cell.base, cell.base_seed))
    if result is None or "held_out" not in result:
        return None
    found = result["held_out"][study["variants"][cell.variant]["data"]]
    end_nats = np.array(found["end_nats"][TEST]) if "ends" in found else None
    return Base(np.array(found["nats"][TEST]), end_nats, result["text_nll"])


def check_controlled(results: dict[str, dict]) -> None:
    """Refuses results that must not be compared: gate P4 of the protocol.

    Arms of one data set must have read the same samples with the same template, masks and tokenizer
    (one token store, by its files' and tokenizer's hashes and its counts), whatever their variant,
    and must have started from the weights that their base's result names; those from bases of one
    kind, computed in the same type. Everything of one data set was measured on the same
    conversations.

    Raises:
        DataError: names a result that differs.
    """
    data: dict[tuple, dict] = {}
    types: dict[tuple, dict] = {}
    measured: dict[str, tuple[str, list[int]]] = {}
    for name, result in results.items():
        for held_out, found in result.get("held_out", {}).items():
            other, tokens = measured.setdefault(held_out, (name, found["tokens"]))
            if found["tokens"] != tokens:
                raise DataError(f"{name}: was measured on other conversations than {other}")
        if result["arm"] is None or "held_out" not in result:
            continue
        base = results.get(base_id(result["size"], result["base"], result["base_seed"]))
        if base and base["weights"] != result["run"]["base_fingerprint"]:
            raise DataError(f"{name}: started from other weights than those of {base['id']}")
        key = (result["size"], *result["held_out"])
        known = data.setdefault(key, result)
        if result["run"]["train_data"] != known["run"]["train_data"]:
            raise DataError(f"{name}: was trained on other data than {known['id']}")
        known = types.setdefault((*key, result["base"]), result)
        if result["run"]["settings"]["dtype"] != known["run"]["settings"]["dtype"]:
            raise DataError(f"{name}: was trained in another dtype than {known['id']}")


def check_prompts(results: dict[str, dict], path: Path) -> None:
    """Refuses answers to other prompts than those of a file, by whose text they are told apart.

    Raises:
        DataError: names a result that differs.
    """
    expected = file_sha256(path)
    for name, result in results.items():
        if "probe" in result and result["probe"]["prompts"]["sha256"] != expected:
            raise DataError(
                f"{name}: was asked other prompts than {path}; restore that file, and keep prompts "
                "of your own in another (eval_llm.py --prompts)"
            )


# ---------------------------------------------------------------- recovery


def mean_nll_draws(
    nats: np.ndarray, tokens: np.ndarray, seed_counts: np.ndarray, counts: np.ndarray
) -> np.ndarray:
    """NLL in nats a token in every draw: (draws,).

    Args:
        nats: (seeds, conversations).
        tokens: (conversations,).
        seed_counts: (draws, seeds) how often each is drawn.
        counts: (draws, conversations) likewise.
    """
    total = (seed_counts * (counts @ nats.T)).sum(axis=1)
    return total / (seed_counts.sum(axis=1) * (counts @ tokens))


def recovery_draws(
    base: np.ndarray, arms: list[Measured], full: Measured, draws: int = DRAWS
) -> list[np.ndarray]:
    """R of each arm, as estimated and then in every draw: (1 + draws,) each.

    Seeds and conversations are drawn once for all, so that differences between arms are paired.

    Args:
        base: (conversations,) nats.

    Raises:
        ValueError: no seed is common to all.
    """
    seeds = common_seeds(arms, full)
    if not seeds:
        raise ValueError("no seed is common to all arms")
    seed_counts = counts_with_all(len(seeds), draws, SEED)
    counts = counts_with_all(len(base), draws, SEED + 1)
    losses = [
        mean_nll_draws(rows_of(arm, seeds), full.tokens, seed_counts, counts)
        for arm in (full, *arms)
    ]
    once = np.ones((1 + draws, 1))
    start = mean_nll_draws(base[None], full.tokens, once, counts)
    return [(start - loss) / (start - losses[0]) for loss in losses[1:]]


def common_seeds(arms: list[Measured], full: Measured) -> list[int]:
    """The seeds that full fine-tuning and all arms were run with."""
    return sorted(set(full.seeds).intersection(*(arm.seeds for arm in arms)))


def of_seeds(arm: Measured, seeds: list[int]) -> Measured:
    """Some seeds' runs of a cell; their rates of answers stay those of all that were probed."""
    places = [arm.seeds.index(seed) for seed in seeds]
    return replace(
        arm,
        seeds=seeds,
        nats=arm.nats[places],
        end_nats=None if arm.end_nats is None else arm.end_nats[places],
        text_nll=[arm.text_nll[place] for place in places] if arm.text_nll else [],
        records=[arm.records[place] for place in places] if arm.records else [],
    )


def gains_enough(base: np.ndarray, full: Measured) -> bool:
    """Whether full fine-tuning gains so much that a share of it means something."""
    return base.sum() / full.tokens.sum() - full.nll >= SMALLEST_GAIN


@lru_cache(maxsize=16)
def counts_with_all(units: int, draws: int, seed: int) -> np.ndarray:
    """Counts of `resampling_counts` after a row of ones: the estimate itself."""
    return np.vstack([np.ones(units), resampling_counts(units, draws, seed)])


def rows_of(arm: Measured, seeds: Iterable[int]) -> np.ndarray:
    """The nats of these seeds, in this order: (seeds, conversations)."""
    return arm.nats[[arm.seeds.index(seed) for seed in seeds]]


def interval_of(draws: np.ndarray) -> Interval:
    """The percentile interval of what `recovery_draws` returns, or of a difference of it."""
    return percentile_interval(draws[0], draws[1:])


@dataclass(frozen=True)
class Row:
    """A cell's line in a table."""

    measured: Measured  # the seeds that full fine-tuning was run with, too, if any was
    recovery: Interval | None  # None without a base or full fine-tuning that gains enough
    answer_recovery: Interval | None  # of all but the end tokens, where they were told apart
    forgetting: float | None  # nats a token of pretraining text, above the base's


def describe_cell(study: dict, cell: Cell, results: dict[str, dict]) -> Row | None:
    """A cell's measures; None where no run of it completed."""
    arm = measure_cell(study, cell, results)
    if arm is None:
        return None
    base, full = base_of(study, cell, results), full_of(study, cell, results)
    if base is None:
        return Row(arm, None, None, None)
    seeds = common_seeds([arm], full) if full and gains_enough(base.nats, full) else []
    arm = of_seeds(arm, seeds) if seeds else arm
    forgetting = float(np.mean(arm.text_nll) - base.text_nll) if arm.text_nll else None
    if not seeds:
        return Row(arm, None, None, forgetting)
    answers = None
    if tell_ends(base, [arm, full]):
        answers = recovered(base.answer_nats, without_ends(arm), without_ends(full))
    return Row(arm, recovered(base.nats, arm, full), answers, forgetting)


def tell_ends(base: Base, arms: list[Measured]) -> bool:
    """Whether R without end tokens can be told: all were told apart, and the last gains enough."""
    if any(measured.end_nats is None for measured in (base, *arms)):
        return False
    return gains_enough(base.answer_nats, without_ends(arms[-1]))


def recovered(base: np.ndarray, arm: Measured, full: Measured) -> Interval:
    """R of one cell with its interval; of full fine-tuning itself, 1."""
    if arm.cell == full.cell:
        return Interval(1.0, 1.0, 1.0)
    (draws,) = recovery_draws(base, [arm], full)
    return interval_of(draws)


def without_ends(arm: Measured) -> Measured:
    """The same runs, measured on all response tokens but the end tokens."""
    return replace(arm, nats=arm.nats - arm.end_nats, tokens=arm.tokens - arm.ends)


def full_of(study: dict, cell: Cell, results: dict[str, dict]) -> Measured | None:
    """The tuned full fine-tuning that a cell's recovery is a share of."""
    return measure_cell(study, full_cell(study, cell), results)


def full_cell(study: dict, cell: Cell) -> Cell:
    """The cell of that full fine-tuning."""
    variant = study["variants"][cell.variant]["reference"]
    return replace(cell, arm=FULL, rate="tuned", variant=variant, part="")
