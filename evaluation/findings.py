"""
What the study's results say: recovery with intervals, tuned rates, and each claim's verdict.

R = (L_base - L_arm) / (L_base - L_FFT) on the test conversations, those with an odd index, with the
95% interval of a two-level paired bootstrap: every draw takes seeds and conversations, the same for
all arms. A verdict follows from the rules in study.toml and from nothing else.
"""

from collections.abc import Iterable
from dataclasses import dataclass, replace

import numpy as np

from dataset.lm_dataset import DataError
from evaluation.intervals import CONFIDENCE, DRAWS, SEED, Interval, resampling_counts
from evaluation.records import SMALLEST_GAIN
from evaluation.study import Cell, cells_of, parse_cell, run_of, sweep_losses, tuned_rate

FULL = "fft"
FEW_PROMPTS = 8  # what the reproduced study judged by


@dataclass(frozen=True)
class Measured:
    """The runs of a cell that have a result."""

    cell: Cell  # with the rate that "tuned" stands for
    seeds: list[int]  # of the runs that completed
    failed: int  # runs that diverged or broke off
    nats: np.ndarray  # (seeds, conversations)
    tokens: np.ndarray  # (conversations,)
    text_nll: list[float]  # by seed; empty for a part of an update

    @property
    def nll(self) -> float:
        """Nats a response token of the test conversations, over all seeds."""
        return float(self.nats.mean(axis=0).sum() / self.tokens.sum())


def known_cell(study: dict, cell: Cell, results: dict[str, dict]) -> Cell | None:
    """The cell with its tuned rate put in, as far as it is known; None while it is not at all."""
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
    done = sorted((r for r in mine if has(r, known.part)), key=lambda result: result["seed"])
    if not done:
        return None
    data = study["variants"][known.variant]["data"]
    held_out = [result["held_out"][data] for result in done]
    nats = [
        result["parts"][known.part] if known.part else result["held_out"][data]["nats"]
        for result in done
    ]
    return Measured(
        known,
        [result["seed"] for result in done],
        sum("held_out" not in result for result in mine),
        np.array([of_run[1::2] for of_run in nats]),
        np.array(held_out[0]["tokens"][1::2]),
        [] if known.part else [result["text_nll"] for result in done],
    )


def has(result: dict, part: str) -> bool:
    """Whether a result has the measures of a whole run, or of a part of its update."""
    return part in result.get("parts", {}) if part else "held_out" in result


def is_of(result: dict, cell: Cell) -> bool:
    """Whether a result is of a run of this cell."""
    return result["arm"] is not None and result["id"] == run_of(cell, result["seed"]).id


def base_of(study: dict, cell: Cell, results: dict[str, dict]) -> tuple[np.ndarray, float] | None:
    """The base's nats of each test conversation, and its NLL of pretraining text."""
    result = results.get(run_of(cell, 0).base_id)
    if result is None or "held_out" not in result:
        return None
    data = study["variants"][cell.variant]["data"]
    return np.array(result["held_out"][data]["nats"][1::2]), result["text_nll"]


def check_controlled(results: dict[str, dict]) -> None:
    """Refuses results that must not be compared: gate P4 of the protocol.

    Arms of one variant must have read the same samples with the same template, masks and tokenizer
    (one token store, by its files' and tokenizer's hashes and its counts), and must have started
    from the weights that their base's result names.

    Raises:
        DataError: names a result that differs.
    """
    data: dict[tuple, dict] = {}
    for name, result in results.items():
        if result["arm"] is None or "held_out" not in result:
            continue
        base = results.get(f"{result['size']}-{result['base']}{result['base_seed']}")
        if base and base["weights"] != result["run"]["base_fingerprint"]:
            raise DataError(f"{name}: started from other weights than those of {base['id']}")
        key = (result["size"], result["variant"])
        known = data.setdefault(key, result)
        if result["run"]["train_data"] != known["run"]["train_data"]:
            raise DataError(f"{name}: was trained on other data than {known['id']}")


# ---------------------------------------------------------------- recovery


def mean_nll_draws(
    nats: np.ndarray, tokens: np.ndarray, of_seeds: np.ndarray, of_conversations: np.ndarray
) -> np.ndarray:
    """NLL in nats a token in every draw: (draws,).

    Args:
        nats: (seeds, conversations).
        tokens: (conversations,).
        of_seeds: (draws, seeds) how often each is drawn; `of_conversations` likewise.
    """
    total = (of_seeds * (of_conversations @ nats.T)).sum(axis=1)
    return total / (of_seeds.sum(axis=1) * (of_conversations @ tokens))


def recovery_draws(
    base: np.ndarray, arms: list[Measured], full: Measured, draws: int = DRAWS
) -> list[np.ndarray]:
    """R of each arm, as estimated and then in every draw: (1 + draws,) each.

    Seeds and conversations are drawn once for all, so that differences between arms are paired.

    Args:
        base: (conversations,) nats.

    Raises:
        ValueError: no seed is common to all, or full fine-tuning gains too little to share.
    """
    seeds = sorted(set(full.seeds).intersection(*(arm.seeds for arm in arms)))
    if not seeds:
        raise ValueError("no seed is common to all arms")
    of_seeds = with_all(resampling_counts(len(seeds), draws, SEED))
    of_conversations = with_all(resampling_counts(len(base), draws, SEED + 1))
    losses = [
        mean_nll_draws(rows_of(arm, seeds), full.tokens, of_seeds, of_conversations)
        for arm in (full, *arms)
    ]
    once = np.ones((1 + draws, 1))
    start = mean_nll_draws(base[None], full.tokens, once, of_conversations)
    gain = start - losses[0]
    if gain[0] < SMALLEST_GAIN:
        raise ValueError(f"full fine-tuning gains {gain[0]:.2f} nats: too little to share")
    return [(start - loss) / gain for loss in losses[1:]]


def with_all(counts: np.ndarray) -> np.ndarray:
    """The counts after a first row that takes each unit once: the estimate itself."""
    return np.vstack([np.ones(counts.shape[1]), counts])


def rows_of(arm: Measured, seeds: Iterable[int]) -> np.ndarray:
    """The nats of these seeds, in this order: (seeds, conversations)."""
    return arm.nats[[arm.seeds.index(seed) for seed in seeds]]


def interval_of(draws: np.ndarray) -> Interval:
    """The percentile interval of what :func:`recovery_draws` returns, or of a difference of it."""
    low, high = np.quantile(draws[1:], [(1 - CONFIDENCE) / 2, (1 + CONFIDENCE) / 2])
    return Interval(float(draws[0]), float(low), float(high))


@dataclass(frozen=True)
class Row:
    """A cell's line in a table."""

    measured: Measured
    recovery: Interval | None  # None for want of a base or of full fine-tuning
    forgetting: float | None  # nats a token of pretraining text, above the base's


def describe_cell(study: dict, cell: Cell, results: dict[str, dict]) -> Row | None:
    """A cell's measures; None where no run of it completed."""
    arm = measure_cell(study, cell, results)
    if arm is None:
        return None
    base, full = base_of(study, cell, results), full_of(study, cell, results)
    if base is None:
        return Row(arm, None, None)
    forgetting = float(np.mean(arm.text_nll) - base[1]) if arm.text_nll else None
    if full is None or not set(full.seeds) & set(arm.seeds):
        return Row(arm, None, forgetting)
    (draws,) = recovery_draws(base[0], [arm], full)
    return Row(arm, interval_of(draws), forgetting)


def full_of(study: dict, cell: Cell, results: dict[str, dict]) -> Measured | None:
    """The tuned full fine-tuning that a cell's recovery is a share of."""
    variant = study["variants"][cell.variant]["reference"]
    return measure_cell(
        study, replace(cell, arm=FULL, rate="tuned", variant=variant, part=""), results
    )


# ---------------------------------------------------------------- claims


@dataclass(frozen=True)
class Judged:
    """A claim with its verdict."""

    name: str
    text: str
    verdict: str  # supported, refuted, open, or not run
    evidence: list[str]  # each condition with its measured value
    seeds: int  # fewest of any condition


def judge_claims(study: dict, size: str, results: dict[str, dict]) -> list[Judged]:
    """The verdict of every claim of the experiments of this size, in their order."""
    return [
        judge(study, experiment, claim, size, results)
        for experiment in study["experiments"]
        if size in experiment["sizes"]
        for claim in experiment["claims"]
    ]


def judge(
    study: dict, experiment: dict, claim: dict, size: str, results: dict[str, dict]
) -> Judged:
    """Supported if all its conditions hold over their whole interval; refuted likewise."""
    evidence: dict[str, None] = {}
    holds = {}
    fewest = []
    for side in ("supported", "refuted"):
        found = []
        for condition in claim[side]:
            names = cells_of(condition, experiment["id"])
            cells = [parse_cell(name, experiment, size, experiment["id"]) for name in names]
            measured = contrast(study, cells, results)
            if measured is None:
                return Judged(claim["name"], claim["text"], "not run", [], 0)
            interval, seeds = measured
            fewest.append(seeds)
            found.append(is_met(condition, interval))
            evidence[told(names, interval)] = None
        holds[side] = all(found)
    verdict = next((side for side, met in holds.items() if met), "open")
    return Judged(claim["name"], claim["text"], verdict, list(evidence), min(fewest))


def contrast(
    study: dict, cells: list[Cell], results: dict[str, dict]
) -> tuple[Interval, int] | None:
    """R of one cell, or of the first minus the second, and how many seeds that rests on."""
    arms = [measure_cell(study, cell, results) for cell in cells]
    base, full = base_of(study, cells[0], results), full_of(study, cells[0], results)
    if base is None or full is None or any(arm is None for arm in arms):
        return None
    seeds = set(full.seeds).intersection(*(arm.seeds for arm in arms))
    if not seeds:
        return None
    draws = recovery_draws(base[0], arms, full)
    return interval_of(draws[0] - draws[1] if len(draws) == 2 else draws[0]), len(seeds)


def is_met(condition: dict, interval: Interval) -> bool:
    """Whether the whole interval satisfies the condition's bound."""
    if "at_least" in condition:
        return interval.low >= condition["at_least"]
    return interval.high <= condition["at_most"]


def told(cells: list[str], interval: Interval) -> str:
    """A measured contrast in words."""
    name = f"R({cells[0]})" + (f" - R({cells[1]})" if len(cells) == 2 else "")
    return f"{name} = {interval.estimate:.2f} [{interval.low:.2f}, {interval.high:.2f}]"


# ---------------------------------------------------------------- rates, ladder, few prompts


def tuned_arms(study: dict, size: str, results: dict[str, dict]) -> dict[str, dict[str, float]]:
    """By arm the mean validation NLL by rate, of the arms whose whole grid was run."""
    sweeps = {arm: sweep_losses(study, arm, size, results) for arm in study["arms"]}
    return {arm: losses for arm, losses in sweeps.items() if losses}


def wrong_winner_rate(
    better: np.ndarray, worse: np.ndarray, few: int = FEW_PROMPTS, draws: int = DRAWS
) -> tuple[float, float]:
    """How often a few prompts, judged once, name the worse of two arms, and how often neither.

    Args:
        better: (seeds, prompts) 1 where the arm that passes more checks over all prompts passed,
            else 0; `worse` likewise, of the same prompts.
    """
    generator = np.random.default_rng(SEED)
    chosen = generator.random((draws, better.shape[1])).argsort(axis=1)[:, :few]
    seeds = generator.integers([better.shape[0], worse.shape[0]], size=(draws, 2))
    rows = np.arange(draws)
    first = better[seeds[:, 0]][rows[:, None], chosen].sum(axis=1)
    second = worse[seeds[:, 1]][rows[:, None], chosen].sum(axis=1)
    return float((second > first).mean()), float((second == first).mean())
