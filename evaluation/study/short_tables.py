"""The tables of README.md and REPORT.md. Shares are of correct greedy answers to test prompts."""

import pandas as pd

from evaluation.probe.names import WITHOUT_TEMPLATE
from evaluation.probe.outputs import escape_markdown
from evaluation.study.analysis import (
    Evidence,
    estimate_gap,
    estimate_share,
    find_rates,
    select_usual,
)
from evaluation.study.blocks import (
    Tables,
    block,
    mark_share,
    percent,
    read_samples,
    write_gap,
    write_rate,
    write_t_interval,
)
from evaluation.study.names import (
    DECODINGS,
    GAP_LORAS,
    METHODS,
    ONE_RUN,
    OUTCOMES,
    SIZES,
    WIDTH_16,
    Method,
)
from evaluation.study.settings import RESULTS_DIR

# Models whose answers to the tuning half stand side by side, with the titles of their columns.
ANSWERED = {
    "25M-lora-original": "the original LoRA",
    "25M-lora-original-long": "the original LoRA, ten times its rate and 13 epochs",
    "25M-lora-all-layers-r8": "LoRA on all layers, rank 8",
    "25M-lora-all-layers-r8" + WITHOUT_TEMPLATE: "the same LoRA, asked without the template",
    "25M-full-fine-tuning": "full fine-tuning",
}
KNOWN = {"plain": "facts_combinations", "unseen": "facts_unseen"}  # what the base ranks first


# --------------------------------------------------------------------------- results and retention


@block("results")
def tabulate_results(evidence: Evidence) -> Tables:
    """Return composition by method (row) and size (column)."""
    rows = []
    for method in METHODS:
        row = {"correct answers, composition": method.title}
        for size, title in SIZES.items():
            row[title] = describe_method(evidence, method, size, "composition")
        rows.append(row)
    return [pd.DataFrame(rows)]


@block("retention")
def tabulate_retention(evidence: Evidence) -> Tables:
    """Return plain questions and unseen things by method (row) and size (column).

    The first row has the facts that the base ranks first without being asked a question. In
    brackets stands a share as a part of that.
    """
    known_row = {"correct answers": "known to the base"}
    rows = [{"correct answers": method.title} for method in METHODS]
    for outcome, column in KNOWN.items():
        prompts = evidence.choose_prompts(outcome)
        for size, title in SIZES.items():
            place = f"{OUTCOMES[outcome]}, {title}"
            known = evidence.find_cell("base", size)[column].mean()
            known_row[place] = None if pd.isna(known) else percent(known)
            for row, method in zip(rows, METHODS, strict=True):
                row[place] = describe_method(evidence, method, size, outcome)
                runs = evidence.find_cell(method.arms[size], size)
                estimate = estimate_share(runs, prompts, "greedy")
                if estimate and not pd.isna(known):
                    row[place] += f" ({percent(estimate.value / known)})"
    return [pd.DataFrame([known_row, *rows])]


def describe_method(evidence: Evidence, method: Method, size: str, outcome: str) -> str | None:
    """Write a method's share at a size; None where it did not run."""
    runs = evidence.find_cell(method.arms[size], size)
    return None if runs.empty else mark_share(evidence, runs, outcome)


@block("facts")
def tabulate_facts(evidence: Evidence) -> Tables:
    """Return the share of facts that are ranked first, by method (row) and size (column).

    No question is asked: the statement with the right value is likelier than with any other value.
    """
    rows = []
    for method in METHODS:
        row = {"facts ranked first": method.title}
        for kind in ("combinations", "unseen"):
            for size, title in SIZES.items():
                runs = evidence.find_cell(method.arms[size], size)
                share = runs[f"facts_{kind}"].mean()
                words = "new combinations" if kind == "combinations" else "unseen things"
                row[f"{words}, {title}"] = None if pd.isna(share) else percent(share)
        rows.append(row)
    return [pd.DataFrame(rows)]


# --------------------------------------------------------------------------------------------- gaps


@block("gaps")
def tabulate_gaps(evidence: Evidence) -> Tables:
    """Return the gaps of all-layer LoRA to full fine-tuning, then to that with a frozen embedding.

    A row is a size, a LoRA and a decoding. An outcome has two columns: the gap with the bootstrap's
    interval and, over three runs, the t interval.
    """
    return [list_gaps(evidence, "fft"), list_gaps(evidence, "fft_frozen")]


def list_gaps(evidence: Evidence, full: str) -> pd.DataFrame:
    """Return the gaps of an arm of full fine-tuning, a table of the block `gaps`."""
    rows = []
    for size, lora in list_gap_loras():
        above = evidence.find_cell(full, size)
        below = evidence.find_cell(lora, size)
        seeds = set(above.seed) & set(below.seed)
        if not seeds:
            continue
        rates = [describe_rate(evidence, size, lora), describe_rate(evidence, size, full)]
        for decoding, decoding_title in DECODINGS.items():
            row = {"size": SIZES[size], "all-layer LoRA": describe_rank(lora, size)}
            row["rates, LoRA / full"] = " / ".join(rates)
            row["runs"] = len(seeds)
            row["answers"] = decoding_title
            for outcome, title in OUTCOMES.items():
                prompts = evidence.choose_prompts(outcome)
                gap = estimate_gap(above, below, prompts, decoding)
                row[title] = write_gap(gap)
                row[f"{title}, t interval"] = write_t_interval(gap)
            rows.append(row)
    return pd.DataFrame(rows)


def list_gap_loras() -> list[tuple[str, str]]:
    """Return the sizes and arms of LoRAs whose gap to full fine-tuning is reported, each once."""
    pairs = []
    for size in SIZES:
        for arms in GAP_LORAS.values():
            pair = (size, arms.get(size))
            if pair[1] and pair not in pairs:
                pairs.append(pair)
    return pairs


def describe_rank(arm: str, size: str) -> str:
    """Write the rank of an all-layer LoRA, and whether it is a 16th of the width."""
    rank = arm.removeprefix("all_r")
    return f"rank {rank} (width/16)" if WIDTH_16[size] == arm else f"rank {rank}"


CAPACITY_ARMS = ["study_tuned", "square_r36", "all_r8", "all_r16", "all_r32", "all_r64"]


@block("capacity_gap")
def tabulate_capacity_gap(evidence: Evidence) -> Tables:
    """Return the gap to full fine-tuning beside adapter weights for each labeled token.

    A row is a LoRA at a size, those with the fewest weights first.
    """
    gaps = list_capacity_gaps(evidence)
    if gaps.empty:
        return [pd.DataFrame()]
    rows = []
    for place in gaps.sort_values("ratio", kind="stable").itertuples():
        rows.append(
            {
                "size": SIZES[place.size],
                "method": evidence.study.arms[place.arm].title,
                "rate": describe_rate(evidence, place.size, place.arm),
                "adapter weights": f"{place.weights:,.0f}",
                "weights for each labeled token": f"{place.ratio:.2f}",
                "behind full fine-tuning, composition, points": write_gap(place.gap),
                "runs": len(place.gap.by_seed),
            }
        )
    return [pd.DataFrame(rows)]


def list_capacity_gaps(evidence: Evidence) -> pd.DataFrame:
    """Return the gap of each LoRA in composition, `gap`, with its weights for each labeled token.

    A row is an arm at a size. The labeled tokens are those of one pass over the training pairs.
    """
    prompts = evidence.choose_prompts("composition")
    rows = []
    for size in SIZES:
        above = evidence.find_cell("fft", size)
        for arm in CAPACITY_ARMS:
            runs = evidence.find_cell(arm, size)
            gap = estimate_gap(above, runs, prompts, "greedy")
            if gap is None:
                continue
            first = runs.iloc[0]
            ratio = first.trainable_parameters * first.epochs / first.labeled_tokens
            row = {"size": size, "arm": arm, "weights": first.trainable_parameters}
            rows.append(row | {"ratio": ratio, "gap": gap})
    return pd.DataFrame(rows)


# ------------------------------------------------------------------------------------- rate x steps

ORIGINAL_RUNS = [  # method, peak rate, steps (estimated from hours and epochs), product, answers
    ("the original study's LoRA, 10 epochs", "1e-4", "300,000", "30", "said to fail"),
    (
        "the original study's full fine-tuning, at MiniMind's rate until March 2026",
        "5e-7 or 1e-6",
        "60,000",
        "0.03 to 0.06",
        "said to work",
    ),
    (
        "the original study's full fine-tuning, at MiniMind's rate since then",
        "1e-5",
        "60,000",
        "0.6",
        "said to work",
    ),
]
STEP_ROWS = [  # size, arm, learning rate, epochs
    ("m26", "study", 1e-4, 2),
    ("m26", "study_tuned", 1e-3, 13),
    ("m26", "study_tuned", 5e-3, 2),
    ("m26", "study_tuned", 5e-3, 3),
    ("s", "study", 1e-4, 3),
    ("s", "study_tuned", 5e-3, 3),
    ("s", "study_tuned", 1e-3, 13),
    ("xs", "study", 1e-4, 4),
    ("xs", "study", 1e-4, 10),
    ("xs", "study_tuned", 1e-2, 4),
    ("m26", "fft", 1e-5, 2),
    ("m26", "fft_batch8", 1e-5, 3.25),
    ("m26", "fft", 1e-4, 2),
    ("m26", "fft", 2e-4, 2),
    ("xs", "fft_script", 1e-5, 4),
    ("xs", "fft", 1e-3, 4),
]


@block("steps")
def tabulate_steps(evidence: Evidence) -> Tables:
    """Return peak rate x steps beside what was answered: the original study's runs, then ours."""
    rows = []
    for method, rate, steps, product, answers in ORIGINAL_RUNS:
        row = {"method": method, "size": "0.02B", "peak rate": rate, "steps": steps}
        row["rate x steps"] = product
        row["composition"] = answers
        rows.append(row)
    usual = select_usual(evidence)
    for size, arm, rate, epochs in STEP_ROWS:
        is_place = (usual["size"] == size) & (usual.arm == arm)
        is_length = (usual.learning_rate == rate) & (usual.epochs == epochs)
        runs = usual[is_place & is_length]
        if not runs.empty:
            rows.append(describe_steps(evidence, runs))
    return [pd.DataFrame(rows)]


@block("equal_products")
def tabulate_equal_products(evidence: Evidence) -> Tables:
    """Return pairs of our runs with an equal product of rate and steps. A row is a pair."""
    return [pair_equal_products(evidence, select_usual(evidence))]


def describe_steps(evidence: Evidence, runs: pd.DataFrame) -> dict[str, str | None]:
    """Return a row of the first table; some runs were asked the tuning half alone."""
    first = runs.iloc[0]
    star = ONE_RUN * (len(runs) == 1)
    row = {
        "method": name_method(evidence, first.arm),
        "size": SIZES[first["size"]],
        "peak rate": write_rate(first.learning_rate),
        "steps": f"{first.step:,.0f}",
        "rate x steps": f"{first.learning_rate * first.step:.2g}",
    }
    is_whole = "unseen" in first.outcomes
    for title, name in {"composition": "composition", "all 1,200": "combinations"}.items():
        prompts = evidence.choose_prompts(name)
        estimate = estimate_share(runs, prompts, "greedy") if is_whole else None
        row[title] = percent(estimate.value) + star if estimate else None
    row["tuning half"] = percent(runs.tune_correct.mean()) + star
    return row


def name_method(evidence: Evidence, arm: str) -> str:
    """Write what trains; the rate stands in a column of its own."""
    return evidence.study.arms[arm].title.removesuffix(", rate tuned")


def pair_equal_products(evidence: Evidence, usual: pd.DataFrame) -> pd.DataFrame:
    """Return pairs of the first seed of one method, size and batch with equal rate x steps."""
    firsts = usual[usual.seed == 1]
    products = (firsts.learning_rate * firsts.step).map("{:.3g}".format)
    places = firsts.assign(product=products).groupby(["size", "arm", "product"], sort=False)
    rows = []
    for (size, arm, product), runs in places:
        by_length = list(runs.sort_values("step").itertuples())
        for fewer, more in zip(by_length[:-1], by_length[1:], strict=True):
            rows.append(
                {
                    "method": name_method(evidence, arm),
                    "size": SIZES[size],
                    "rate x steps": f"{float(product):.2g}",
                    "fewer steps": f"{write_rate(fewer.learning_rate)} x {fewer.step:,.0f}",
                    "tuning half": percent(fewer.tune_correct),
                    "more steps": f"{write_rate(more.learning_rate)} x {more.step:,.0f}",
                    "tuning half, more steps": percent(more.tune_correct),
                }
            )
    return pd.DataFrame(rows)


# -------------------------------------------------------------------------------------------- rates

COOKBOOK_RATE = 5e-5 * 10  # tinker-cookbook's formula for LoRA: times (2000 / width) ** exponent
COOKBOOK_WIDTH = 2000
COOKBOOK_EXPONENT = 0.781  # for Llama


@block("lora_rates")
def tabulate_lora_rates(evidence: Evidence) -> Tables:
    """Return the rate by tinker-cookbook's formula beside our tuned ones. A row is a size."""
    rows = []
    for size, title in SIZES.items():
        width = evidence.study.sizes[size].shape["hidden_size"]
        formula = COOKBOOK_RATE * (COOKBOOK_WIDTH / width) ** COOKBOOK_EXPONENT
        row = {"size": title, "width": str(width), "formula": f"{formula:.1e}".replace("e-0", "e-")}
        for name, arm in {
            "all-layer LoRA, rank 8": "all_r8",
            "all-layer LoRA, rank = width/16": WIDTH_16[size],
            "full fine-tuning": "fft",
        }.items():
            row[name] = describe_rate(evidence, size, arm)
        lora, full = [find_rates(evidence.sweeps[size, arm]) for arm in ("all_r8", "fft")]
        row["rank 8 / full"] = f"{lora[0] / full[0]:.0f}" if lora and full else None
        rows.append(row)
    return [pd.DataFrame(rows)]


def describe_rate(evidence: Evidence, size: str, arm: str) -> str | None:
    """Write the rate of an arm at a size with its marks; None where it did not run."""
    runs = evidence.find_cell(arm, size)
    if runs.empty:
        return None
    first = runs.iloc[0]
    return write_rate(first.learning_rate) + first["mark"]


# ----------------------------------------------------------------------------- verdicts and answers


@block("verdicts")
def tabulate_verdicts(evidence: Evidence) -> Tables:
    """Return the second edition's verdicts, frozen. A row is a condition or a claim."""
    table = pd.read_csv(RESULTS_DIR / "verdicts_2.csv", keep_default_na=False)
    titles = {
        "met_by_means": "met by means",
        "met_by_intervals": "met by whole intervals",
        "agrees_with_original": "agrees with the original study",
        "seeds": "runs",
    }
    return [table.rename(columns=titles)]


@block("answers")
def tabulate_answers(evidence: Evidence) -> Tables:
    """Return answers to the first three prompts of the tuning half."""
    return [collect_answers(evidence).head(3)]


@block("ten_answers")
def tabulate_ten_answers(evidence: Evidence) -> Tables:
    """Return answers to the first ten prompts of the tuning half."""
    return [collect_answers(evidence).head(10)]


def collect_answers(evidence: Evidence) -> pd.DataFrame:
    """Return kept answers to the tuning half, wrong ones with their kind.

    A row is a prompt, a column a model of `ANSWERED`.
    """
    columns = {}
    for name, title in ANSWERED.items():
        samples = read_samples(RESULTS_DIR / "answers" / f"{name}-probe_combinations_tune")
        if samples is None:
            continue
        greedy = samples[samples.decoding == "greedy"]
        is_wrong = greedy.outcome != "correct"
        kinds = " *(" + greedy.outcome + ")*"
        columns["prompt"] = greedy.prompt.map(escape_markdown)
        columns[title] = greedy.output.map(escape_markdown) + kinds.where(is_wrong, "")
    return pd.DataFrame(columns)
