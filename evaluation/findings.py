"""What the study's results say: each claim's verdict, what is forgotten, how few prompts mislead.

A verdict follows from the rules in study.toml and from nothing else. With few seeds a bootstrap
interval is too narrow in what comes from seeds (drawing three with replacement has 2/3 of their
variance), so a rule must hold for every single seed, too, and in the t-test of the seeds alone.
Answers that never end or are blank, bad ones, are drawn as conversations are: seeds and prompts.
"""

from dataclasses import dataclass, field, replace
from itertools import combinations

import numpy as np
from scipy import stats

from evaluation.intervals import CONFIDENCE, DRAWS, SEED, Interval, most_unseen, paired_bootstrap
from evaluation.records import SMALLEST_GAIN
from evaluation.recovery import (
    Row,
    base_of,
    common_seeds,
    count_diverged,
    counts_with_all,
    describe_cell,
    full_cell,
    full_of,
    gains_enough,
    interval_of,
    is_of,
    known_cell,
    measure_cell,
    of_seeds,
    recovery_draws,
    tell_ends,
    without_ends,
)
from evaluation.study import (
    Cell,
    Sweep,
    cells_of,
    is_interior,
    kind_of,
    parse_cell,
    rates_of,
    short_name,
    sweep_of,
    tuned_cells,
    tuning_cell,
)

FEWEST_SEEDS = 3  # that a verdict may rest on
NOT_RUN = "not run"
SIDES = ("supported", "refuted")
HYPOTHESIS = "H"  # what the names of claims begin with that are corrected for their number
GATES = ("P0", "P2", "P3")  # claims without which no hypothesis is concluded
BAD = ("runaway", "blank")  # answers that the protocol counts together
# Prompts with such an answer. With k of them e^-k of the draws have none, and with fewer than this
# more than the 2.5% beyond an interval's end: a ratio to them would have no upper end.
FEWEST_BAD = 4
FEW_PROMPTS = 8  # what the reproduced study judged by
DECODING = "t0.85p0.85"  # and how it sampled
FAULTS = ("runaway", "loop", "blank")  # of an answer, which it saw by eye


# ---------------------------------------------------------------- claims


@dataclass(frozen=True)
class Contrast:
    """What a condition bounds."""

    interval: Interval
    by_seed: list[float]
    draws: np.ndarray  # what the interval is of
    failed: int  # runs that diverged
    is_tuned: bool  # every tuned rate has worse neighbors on both sides, by all tuning seeds


@dataclass(frozen=True)
class Judged:
    """A claim with its verdict."""

    claim: dict  # of study.toml
    verdict: str  # supported, refuted, open with the reason, or `NOT_RUN`
    # What its conditions bound, by formula; empty if unknown. Arrays, which == cannot compare.
    contrasts: dict[str, Contrast] = field(compare=False)
    seeds: int = 0  # fewest of any condition
    p: float = 1.0  # of the side that the verdict takes; if open, the smaller of both sides'
    without_ends: list[str] = field(default_factory=list)  # what R is in each, without end tokens


def judge_claims(study: dict, size: str, results: dict[str, dict]) -> list[Judged]:
    """The verdict of every claim of the experiments of this size, in their order."""
    claims = [
        judge(study, experiment, claim, size, results)
        for experiment in study["experiments"]
        if size in experiment["sizes"]
        for claim in experiment["claims"]
    ]
    return corrected(claims)


def corrected(claims: list[Judged]) -> list[Judged]:
    """The claims, those open again that chance may explain, or that wait for a gate.

    The hypotheses (H...) are corrected for the number that is planned, so that a verdict does not
    hang on which of them were run first, and wait for `GATES`.
    """
    ps = [judged.p if judged.seeds >= FEWEST_SEEDS else 1.0 for judged in claims]
    family = [
        place for place, judged in enumerate(claims) if judged.claim["name"].startswith(HYPOTHESIS)
    ]
    for place, p in zip(family, holm([ps[place] for place in family]), strict=True):
        ps[place] = p
    certain = [
        replace(judged, verdict=f"open: p = {p:.3f}")
        if judged.verdict in SIDES and p > 1 - CONFIDENCE
        else judged
        for judged, p in zip(claims, ps, strict=True)
    ]
    passed = {judged.claim["name"] for judged in certain if judged.verdict == "supported"}
    waits = ", ".join(gate for gate in GATES if gate not in passed)
    return [
        replace(judged, verdict=f"open (gates not passed: {waits}): {judged.verdict}")
        if waits and judged.verdict in SIDES and judged.claim["name"].startswith(HYPOTHESIS)
        else judged
        for judged in certain
    ]


def holm(ps: list[float]) -> list[float]:
    """p-values corrected for their number by Holm's method (1979, Scand. J. Statist. 6, 65-70)."""
    adjusted, largest = [0.0] * len(ps), 0.0
    for rank, place in enumerate(sorted(range(len(ps)), key=ps.__getitem__)):
        largest = max(largest, min(1.0, (len(ps) - rank) * ps[place]))
        adjusted[place] = largest
    return adjusted


def judge(
    study: dict, experiment: dict, claim: dict, size: str, results: dict[str, dict]
) -> Judged:
    """Supported if all its conditions hold, in their whole interval and every seed; or refuted."""
    holds, ps, contrasts, without = {}, {}, {}, []
    for side in SIDES:
        holds[side], ps[side] = True, 0.0
        for condition in claim[side]:
            kind, names = kind_of(condition), cells_of(condition)
            cells = [parse_cell(name, experiment, size) for name in names]
            if kind == "bad_answers":
                explain, compare = why_no_answers, contrast_answers
            else:
                explain, compare = why_unknown, contrast
            if why := explain(study, cells, results):
                return Judged(claim, why, {})
            formula = named(kind, names)
            if formula not in contrasts:
                contrasts[formula] = compare(study, cells, results)
                if kind != "bad_answers":
                    without.append(without_end_tokens(study, cells, results))
            holds[side] &= is_met(condition, contrasts[formula])
            ps[side] = max(ps[side], p_value(condition, contrasts[formula]))
    side = next((side for side in SIDES if holds[side]), None)
    seeds = min(len(found.by_seed) for found in contrasts.values())
    if seeds < FEWEST_SEEDS:
        verdict = "open: too few seeds"
    elif not all(found.is_tuned for found in contrasts.values()):
        verdict = "open: a rate at the edge of its grid, or not run with every seed, neighbors too"
    else:
        verdict = side or "open"
    p = ps[side] if side else min(ps.values())
    return Judged(claim, verdict, contrasts, seeds, p, without)


def why_unknown(study: dict, cells: list[Cell], results: dict[str, dict]) -> str:
    """Why a contrast of these cells cannot be told; empty if it can."""
    arms = [measure_cell(study, cell, results) for cell in cells]
    for cell in (*cells, full_cell(study, cells[0])):
        diverged = count_diverged(study, cell, results)
        if diverged and measure_cell(study, cell, results) is None:
            return f"open: no run of {cell.arm} completed, {diverged} diverged"
    base, full = base_of(study, cells[0], results), full_of(study, cells[0], results)
    if base is None or full is None or any(arm is None for arm in arms):
        return NOT_RUN
    if not common_seeds(arms, full):
        return NOT_RUN
    if not gains_enough(base.nats, full):
        return f"open: full fine-tuning gains less than {SMALLEST_GAIN} nats"
    return ""


def without_end_tokens(study: dict, cells: list[Cell], results: dict[str, dict]) -> str:
    """A contrast of R without end tokens, or a dash where it cannot be told."""
    arms = [measure_cell(study, cell, results) for cell in cells]
    base, full = base_of(study, cells[0], results), full_of(study, cells[0], results)
    if not tell_ends(base, [*arms, full]):
        return "-"
    return stated(contrast(study, cells, results, with_ends=False))


def contrast(
    study: dict, cells: list[Cell], results: dict[str, dict], with_ends: bool = True
) -> Contrast:
    """R of one cell, or of the first minus the second, where nothing is unknown.

    Args:
        with_ends: of all response tokens; without, of those that do not end a message.
    """
    arms = [measure_cell(study, cell, results) for cell in cells]
    base, full = base_of(study, cells[0], results), full_of(study, cells[0], results)
    start = base.nats if with_ends else base.answer_nats
    if not with_ends:
        arms, full = [without_ends(arm) for arm in arms], without_ends(full)
    single = []
    for seed in common_seeds(arms, full):
        ours, reached = [of_seeds(arm, [seed]) for arm in arms], of_seeds(full, [seed])
        single.append(difference(recovery_draws(start, ours, reached, draws=0)))
    reference = full_cell(study, cells[0])
    trained = {replace(cell, part="") for cell in (*cells, reference)}  # each run counts once
    draws = difference(recovery_draws(start, arms, full))
    return Contrast(
        interval_of(draws),
        [float(of_one[0]) for of_one in single],
        draws[1:],
        sum(count_diverged(study, cell, results) for cell in trained),
        all(is_well_tuned(study, cell, results) for cell in (*cells, reference)),
    )


def probes_of(study: dict, cell: Cell, results: dict[str, dict]) -> dict[int, dict]:
    """How a cell's runs answered, by the seed of those that were asked."""
    known = known_cell(study, cell, results)
    if known is None:
        return {}
    return {r["seed"]: r["probe"] for r in results.values() if "probe" in r and is_of(r, known)}


def bad_answers(study: dict, cell: Cell, results: dict[str, dict]) -> dict[int, np.ndarray]:
    """By seed that was probed: how many of each prompt's answers never end or are blank."""
    probes = probes_of(study, cell, results)
    return {seed: sum(map(marked, probe["outcomes"].values())) for seed, probe in probes.items()}


def bad_shares(probes: list[dict], chosen: np.ndarray) -> dict[str, Interval]:
    """By decoding: the share of answers that never end or are blank, over seeds and prompts.

    Args:
        chosen: (prompts,) True for those that count.
    """
    return {
        name: share_interval(
            np.array([marked(probe["outcomes"][name])[chosen] for probe in probes])
        )
        for name in probes[0]["outcomes"]
    }


def share_interval(marks: np.ndarray) -> Interval:
    """Interval of the mean of (seeds, prompts) zeros and ones.

    Where all agree, which no draw can doubt, it is the exact one of a single seed.
    """
    found = paired_bootstrap(marks)
    unseen = most_unseen(marks.shape[1], CONFIDENCE)
    if not marks.any():
        return replace(found, high=unseen)
    return replace(found, low=1 - unseen) if marks.all() else found


def marked(outcomes: dict[str, str], faults: tuple[str, ...] = BAD) -> np.ndarray:
    """(prompts,): 1 where the answer under one decoding has one of the faults, else 0."""
    found = zip(*(outcomes[fault] for fault in faults), strict=True)
    return np.array([int("1" in marks) for marks in found])


def why_no_answers(study: dict, cells: list[Cell], results: dict[str, dict]) -> str:
    """Why a ratio of bad answers cannot be told; empty if it can."""
    first, second = (bad_answers(study, cell, results) for cell in cells)
    seeds = first.keys() & second.keys()
    if not seeds:
        return NOT_RUN
    if not all(second[seed].any() for seed in seeds):
        return f"open: a seed of {cells[1].arm} has no answer that never ends or is blank"
    if sum(second[seed] for seed in seeds).astype(bool).sum() < FEWEST_BAD:
        return f"open: too few answers of {cells[1].arm} never end or are blank"
    return ""


def contrast_answers(study: dict, cells: list[Cell], results: dict[str, dict]) -> Contrast:
    """The first cell's bad answers as a share of the second's, where nothing is unknown."""
    first, second = (bad_answers(study, cell, results) for cell in cells)
    seeds = sorted(first.keys() & second.keys())
    counts = [np.array([found[seed] for seed in seeds]) for found in (first, second)]
    seed_counts = counts_with_all(len(seeds), DRAWS, SEED)
    prompt_counts = counts_with_all(counts[0].shape[1], DRAWS, SEED + 1)
    ours, others = ((seed_counts * (prompt_counts @ bad.T)).sum(axis=1) for bad in counts)
    draws = np.divide(ours, others, out=np.full(len(ours), np.inf), where=others > 0)
    single = [float(ours.sum() / others.sum()) for ours, others in zip(*counts, strict=True)]
    failed = sum(count_diverged(study, cell, results) for cell in cells)
    is_tuned = all(is_well_tuned(study, cell, results) for cell in cells)
    return Contrast(interval_of(draws), single, draws[1:], failed, is_tuned)


def difference(draws: list[np.ndarray]) -> np.ndarray:
    """The first minus the second, or the only one."""
    return draws[0] - draws[1] if len(draws) == 2 else draws[0]


def is_well_tuned(study: dict, cell: Cell, results: dict[str, dict]) -> bool:
    """Whether a cell's tuned rate is inside its grid, by all tuning seeds; a given rate is so."""
    if cell.rate != "tuned":
        return True
    sweep = sweep_of(study, cell.arm, cell.size, results)
    return sweep is not None and sweep.is_whole and is_interior(sweep)


def is_met(condition: dict, found: Contrast) -> bool:
    """Whether the whole interval, and every seed, satisfies the condition's bound."""
    if "at_least" in condition:
        return min(found.interval.low, *found.by_seed) >= condition["at_least"]
    return max(found.interval.high, *found.by_seed) <= condition["at_most"]


def p_value(condition: dict, found: Contrast) -> float:
    """Two-sided, that the contrast is at the condition's bound and not on its right side.

    The larger one of twice the share of draws beyond the bound, never 0, and the t-test of the
    seeds, which knows how few they are.
    """
    if "at_least" in condition:
        bound = condition["at_least"]
        beyond = int((found.draws < bound).sum())
    else:
        bound = condition["at_most"]
        beyond = int((found.draws > bound).sum())
    p = min(1.0, 2 * (beyond + 1) / (len(found.draws) + 1))
    if len(found.by_seed) < 2 or np.ptp(found.by_seed) == 0:
        return p  # nothing to estimate a spread from
    return max(p, float(stats.ttest_1samp(found.by_seed, bound).pvalue))


def stated(found: Contrast) -> str:
    """A measured contrast with its interval."""
    interval = found.interval
    words = f"{interval.estimate:.3f} [{interval.low:.3f}, {interval.high:.3f}]"
    return words + (f", {found.failed} runs diverged" if found.failed else "")


def cited(judged: Judged) -> str:
    """A verdict with what its rule bounds, such as `supported, +0.290 [+0.273, +0.309]`.

    A sign marks a difference; a ratio of answers, or the R of one arm, has none. Why a claim is
    open, and what diverged, the table of claims tells.
    """
    word = NOT_RUN if judged.verdict == NOT_RUN else judged.verdict.partition(" ")[0].rstrip(":")
    values = []
    for condition in judged.claim["supported"] if judged.contrasts else ():
        kind, cells = kind_of(condition), cells_of(condition)
        found = judged.contrasts[named(kind, cells)].interval
        sign = "+" if kind != "bad_answers" and len(cells) == 2 else ""
        estimate, low, high = (
            f"{value:{sign}z.3f}" for value in (found.estimate, found.low, found.high)
        )
        values.append(f"{estimate} [{low}, {high}]")
    return ", ".join([word, *values])


def named(kind: str, cells: list[str]) -> str:
    """What a condition bounds, as a formula."""
    if kind == "bad_answers":
        return " / ".join(f"bad({cell})" for cell in cells)
    return " - ".join(f"R({cell})" for cell in cells)


def bound_of(condition: dict) -> str:
    """`>= 0.10` or `<= 0.10`."""
    if "at_least" in condition:
        return f">= {condition['at_least']:.2f}"
    return f"<= {condition['at_most']:.2f}"


# ---------------------------------------------------------------- rates, ladder, few prompts


@dataclass(frozen=True)
class Evidence:
    """What the study's tables and figures tell of."""

    study: dict
    results: dict[str, dict]
    rows: dict[Cell, Row | None]  # of every cell of an experiment, a sweep's at its best rate
    verdicts: dict[str, list[Judged]]  # by size of which some run has a result
    languages: dict[str, np.ndarray]  # which prompts are in each, (prompts,) bool


def gather(study: dict, results: dict[str, dict], languages: dict[str, np.ndarray]) -> Evidence:
    """Measures every cell once, though several tables and figures tell of it, and judges."""
    cells = {
        cell
        for experiment in study["experiments"]
        for size in experiment["sizes"]
        for cell in tuned_cells(experiment, size)
    }
    rows = {cell: describe_cell(study, cell, results) for cell in cells}
    found = {result["size"] for result in results.values()}
    sizes = [size for size in study["sizes"] if size in found]
    verdicts = {size: judge_claims(study, size, results) for size in sizes}
    return Evidence(study, results, rows, verdicts, languages)


@dataclass(frozen=True)
class Forgotten:
    """What an arm learned and forgot at one rate."""

    rate: str
    seeds: int
    failed: int  # runs that diverged
    nll: float  # nats a response token
    above: float  # nats a token of pretraining text, above the base's


def forgetting_by_arm(evidence: Evidence, size: str) -> dict[str, list[Forgotten]]:
    """What the arms of the summary forget at each rate that was run, by arm, from the lowest rate.

    Of the runs that rates were tuned by, whatever their recovery.
    """
    study, results = evidence.study, evidence.results
    chosen = [
        cell.arm
        for experiment in study["experiments"]
        if experiment["summary"] and size in experiment["sizes"]
        for cell in tuned_cells(experiment, size)
        if cell.rate == "tuned"
    ]
    found = {}
    for arm in dict.fromkeys(chosen):
        rates = sorted(rates_of(study, arm, size), key=float)
        cells = [tuning_cell(study, arm, rate, size) for rate in rates]
        points = [forgotten(study, cell, results) for cell in cells]
        if points := [point for point in points if point]:
            found[arm] = points
    return found


def forgotten(study: dict, cell: Cell, results: dict[str, dict]) -> Forgotten | None:
    """What a cell's runs learned and forgot; None where none completed."""
    measured, base = measure_cell(study, cell, results), base_of(study, cell, results)
    if measured is None or base is None:
        return None
    above = float(np.mean(measured.text_nll) - base.text_nll)
    return Forgotten(cell.rate, len(measured.seeds), measured.failed, measured.nll, above)


def tuned_arms(study: dict, size: str, results: dict[str, dict]) -> dict[str, Sweep]:
    """The sweeps whose grid the first seed has run, by arm."""
    sweeps = {arm: sweep_of(study, arm, size, results) for arm in study["arms"]}
    return {arm: sweep for arm, sweep in sweeps.items() if sweep}


def wrong_winner_rate(
    better: np.ndarray, worse: np.ndarray, few: int = FEW_PROMPTS, draws: int = DRAWS
) -> tuple[float, float]:
    """How often a few prompts, judged once, name the worse of two arms, and how often neither.

    Args:
        better: (seeds, prompts) 1 where an answer of the better arm is fine, else 0; `worse`
            likewise, of the same prompts.
    """
    generator = np.random.default_rng(SEED)
    chosen = generator.random((draws, better.shape[1])).argsort(axis=1)[:, :few]
    seeds = generator.integers([better.shape[0], worse.shape[0]], size=(draws, 2))
    rows = np.arange(draws)
    first = better[seeds[:, 0]][rows[:, None], chosen].sum(axis=1)
    second = worse[seeds[:, 1]][rows[:, None], chosen].sum(axis=1)
    return float((second > first).mean()), float((second == first).mean())


def ladder_is_whole(
    study: dict, experiment: dict, cells: list[Cell], results: dict[str, dict]
) -> bool:
    """Whether every rung has its seeds, those counted that diverged, of full fine-tuning too."""
    seeds = len(experiment["seeds"])
    for cell in cells:
        arm, full = measure_cell(study, cell, results), full_of(study, cell, results)
        done = 0 if why_unknown(study, [cell], results) else len(common_seeds([arm], full))
        diverged = count_diverged(study, cell, results) + (full.failed if full else 0)
        if done + diverged < seeds:
            return False
    return True


@dataclass(frozen=True)
class Pair:
    """Two arms that few prompts are to tell apart."""

    better: str  # by R
    worse: str
    wrong: float  # how often the worse is named
    tied: float
    seeds: int  # fewest of both
    prompts: int


def few_prompt_rates(evidence: Evidence, size: str) -> list[Pair]:
    """How often few English prompts name the worse of two arms, for pairs that R tells apart."""
    study, results = evidence.study, evidence.results
    found: dict[Cell, np.ndarray] = {}
    for experiment in study["experiments"]:
        if experiment["few_prompts"] and size in experiment["sizes"]:
            for cell in tuned_cells(experiment, size):
                fine = fine_answers(probes_of(study, cell, results), evidence.languages["English"])
                if len(fine) and (row := evidence.rows[cell]) and row.recovery:
                    found[cell] = fine
    pairs = []
    for one, other in combinations(found, 2):
        if why_unknown(study, [one, other], results):
            continue
        interval = contrast(study, [one, other], results).interval
        if interval.low <= 0 <= interval.high:
            continue  # R does not say which is the better one
        better, worse = (one, other) if interval.low > 0 else (other, one)
        first, second = found[better], found[worse]
        wrong, tied = wrong_winner_rate(first, second)
        names = (short_name(known_cell(study, cell, results)) for cell in (better, worse))
        seeds = min(len(first), len(second))
        pairs.append(Pair(*names, wrong, tied, seeds, first.shape[1]))
    return pairs


def fine_answers(probes: dict[int, dict], chosen: np.ndarray) -> np.ndarray:
    """(seeds, prompts): 1 where an answer ends, does not loop and is not blank, else 0."""
    found = (probe["outcomes"][DECODING] for probe in probes.values())
    return np.array([1 - marked(outcomes, FAULTS)[chosen] for outcomes in found])
