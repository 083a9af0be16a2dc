"""Shares, intervals and verdicts of made-up runs whose shares are known."""

from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from evaluation.study.analysis import (
    find_cell,
    load_evidence,
    parse_estimate,
    tabulate_nll,
    tabulate_shares,
)
from evaluation.study.claims import compare_frontiers, judge_claims
from evaluation.study.plan import Run, make_tuning_run
from evaluation.study.report import fill_blocks, make_report
from evaluation.study.results import append_run
from evaluation.study.settings import read_study
from model.files import UserError

STUDY = read_study()
PROMPTS = 60  # of each set, every third in the tuning half
SETS = ("combinations", "unseen", "wordings")


def write_prompts(folder: Path) -> pd.DataFrame:
    """Write prompts.csv: things with three prompts each."""
    rows = [
        {
            "id": f"{name}-{i}",
            "set": name,
            "half": "tune" if i % 3 == 0 else "test",
            "skill": f"skill {i % 2}",
            "thing": f"thing {i // 3}",
            "cluster": f"thing {i // 3}",
            "chance": 0.1,
        }
        for name in SETS
        for i in range(PROMPTS)
    ]
    table = pd.DataFrame(rows)
    table.to_csv(folder / "prompts.csv", index=False)
    return table


def spell_outcomes(share: float, seed: int, wrong: str = "f") -> str:
    """Return letters of which `share` are c, in an order that depends on the seed."""
    count = round(share * PROMPTS)
    letters = np.array(list("c" * count + wrong * (PROMPTS - count)))
    return "".join(np.random.default_rng(seed).permutation(letters))


def add_run(folder: Path, run: Run, share: float, step: int = 0, unseen: float | None = None):
    """Append a run with a share of correct answers to every set, under both decodings."""
    name = f"{run.id}@{step}" if step else run.id
    outcomes = {}
    for place, of_set in enumerate(SETS):
        wanted = unseen if of_set == "unseen" and unseen is not None else share
        draws = [spell_outcomes(wanted, 10 * run.seed + place + draw) for draw in range(4)]
        outcomes[of_set] = {"greedy": draws[0], "t0.85p0.85": " ".join(draws[1:])}
    line = {
        "id": name,
        "edition": 2,
        "size": run.size,
        "base": run.base_id if run.arm else None,
        "arm": run.arm or "base",
        "learning_rate": run.learning_rate,
        "seed": run.seed,
        "status": "completed",
        "epochs": run.epochs,
        "data": run.data,
        "start": run.start,
        "samples": run.samples,
        "step": step or 1000,
        "weights": "b",
        "base_fingerprint": "b",
        "train_data": {"tokens": 1},
        "cost": dict.fromkeys(
            ("trainable_parameters", "steps", "tokens", "flops", "train_seconds"), 1e6
        )
        | {"peak_memory_bytes": 1e9},
        "scalars": {"tune_correct": share, "tune_nll": 1.0, "nll_text": 3.0, "reachable_end": 0.9},
        "outcomes": outcomes,
    }
    nats, ends = [2.0 - share] * PROMPTS, [0.5] * PROMPTS
    nll = [
        {"edition": 2, "id": name, "set": name_of_set, "part": "", "nats": nats, "end_nats": ends}
        for name_of_set in SETS
    ]
    nll += [
        {"edition": 2, "id": "", "set": name_of_set, "part": "", "tokens": [3] * PROMPTS,
         "ends": [1] * PROMPTS}
        for name_of_set in SETS
    ]  # fmt: skip
    append_run(folder, line, nll)


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """Write the results of a made-up study at xs."""
    folder = tmp_path_factory.mktemp("results")
    write_prompts(folder)
    for name in ("edition1.csv", "bases.csv"):
        source = Path(__file__).parents[2] / "evaluation" / "study" / name
        (folder / name).write_text(source.read_text())
    add_run(folder, Run("xs", "wrapped42"), 0.0)
    for arm, shares in {
        "fft": (0.7, 0.9, 0.8),
        "all_r8": (0.4, 0.55, 0.5),
        "seed_tuned": (0.2, 0.4, 0.3),
    }.items():
        for rate, share in zip(STUDY.arms[arm].rates["xs"], shares, strict=True):
            add_run(folder, make_tuning_run(STUDY, "xs", arm, rate), share)
        best = STUDY.arms[arm].rates["xs"][1]
        for seed in (2, 3):
            add_run(folder, Run("xs", "wrapped42", arm, best, seed, 3.0), shares[1])
    for seed in (1, 2, 3):
        add_run(folder, Run("xs", "wrapped42", "seed", 1e-4, seed, 3.0), 0.0)
        for rate in (5e-7, 1e-6, 1e-5):
            add_run(folder, Run("xs", "wrapped42", "fft_script", rate, seed, 3.0), 0.0)
    return folder


def test_an_estimate_is_a_sum_of_cells() -> None:
    """Factors and signs belong to the term that follows; a rate may hold a minus sign."""
    assert parse_estimate("a - 0.5 b") == [(1.0, "a"), (-0.5, "b")]
    assert parse_estimate("fft_script*5e-07") == [(1.0, "fft_script*5e-07")]


def test_a_cell_is_found_at_its_best_rate(folder) -> None:
    """A tuned arm stands for its best rate with all seeds; an unknown arm is an error."""
    evidence = load_evidence(folder)
    cell = find_cell(evidence, "fft", "xs")
    assert cell.learning_rate.unique().tolist() == [1e-3]
    assert cell.seed.tolist() == [1, 2, 3]
    assert find_cell(evidence, "fft@plain42", "xs").empty
    with pytest.raises(ValueError, match="no cell"):
        find_cell(evidence, "no_arm", "xs")


def test_shares_and_intervals(folder) -> None:
    """The share is that of the test half; chance of 10% is taken off; the interval holds it."""
    table = tabulate_shares(load_evidence(folder))
    row = table[(table.arm == "all_r8") & (table.decoding == "greedy")].iloc[0]
    letters = [spell_outcomes(0.55, 10 * seed) for seed in (1, 2, 3)]
    test = [letter for of_seed in letters for i, letter in enumerate(of_seed) if i % 3]
    expected = np.mean([letter == "c" for letter in test])
    assert row.share.value == pytest.approx(expected)
    assert row.share.low < expected < row.share.high
    assert row.above_chance == pytest.approx((expected - 0.1) / 0.9)


def test_verdicts(folder) -> None:
    """A rule needs the whole interval; a cell that was not run leaves the claim open."""
    claims, estimates = judge_claims(load_evidence(folder))
    verdicts = claims.set_index("claim").verdict
    assert verdicts["C2"] == "supported"  # 0% at each script rate
    assert verdicts["C3"] == "supported"  # 40% - 0%
    assert verdicts["C5"] == "not run"
    assert verdicts["C1"] == "open, not all run"
    difference = estimates.query("estimate == 'seed_tuned - seed' and decoding == 'greedy'").value
    assert difference.iloc[0].value == pytest.approx(0.4, abs=0.1)


def test_nll_leaves_end_tokens_out(folder) -> None:
    """2 - share nats of 3 tokens, of which the end token has 0.5."""
    table = tabulate_nll(load_evidence(folder))
    row = table[(table.arm == "fft") & (table["set"] == "unseen")].iloc[0]
    assert row.nll == pytest.approx((2 - 0.9 - 0.5) / 2)
    assert row.end_nll == pytest.approx(0.5)


def test_frontiers(folder, tmp_path) -> None:
    """LoRA that keeps 20 points more of unseen things is ahead at every level both reach."""
    write_prompts(tmp_path)
    for arm, kept in (("fft", 0.2), ("all_r8", 0.4)):
        run = make_tuning_run(STUDY, "xs", arm, 1e-3)
        for step, share in ((100, 0.3), (200, 0.6)):
            add_run(tmp_path, run, share, step, kept)
        add_run(tmp_path, run, 0.7, 0, kept)
    gaps = compare_frontiers(load_evidence(tmp_path), "xs", "greedy")
    assert len(gaps) >= 4
    assert all(gap.value == pytest.approx(0.2, abs=0.1) for gap in gaps.values())


def test_the_report_is_stable(folder, tmp_path) -> None:
    """Blocks are filled once, and a second report changes nothing."""
    names = ("headline", "edition1", "shares", "kinds", "rates", "nll", "costs", "claims",
             "estimates", "keeping", "endings")  # fmt: skip
    blocks = [f"<!-- study:{name} -->\n<!-- /study:{name} -->\n" for name in names]
    (tmp_path / "README.md").write_text("# Title\n" + "".join(blocks))
    first = make_report(tmp_path, folder)
    readme = first[tmp_path / "README.md"]
    (tmp_path / "README.md").write_text(readme)
    assert make_report(tmp_path, folder) == first
    assert "full fine-tuning" in readme
    assert "Not run yet" not in readme
    assert folder / "figures" / "headline.svg" in first


def test_a_report_before_the_first_run(tmp_path) -> None:
    """Without a run of the second edition the first edition's table stands alone."""
    for name in ("edition1.csv", "bases.csv"):
        source = Path(__file__).parents[2] / "evaluation" / "study" / name
        (tmp_path / name).write_text(source.read_text())
    markers = "<!-- study:{0} -->\n<!-- /study:{0} -->\n"
    text = "".join(markers.format(name) for name in ("headline", "edition1", "claims", "endings"))
    (tmp_path / "README.md").write_text(text)
    readme = make_report(tmp_path, tmp_path)[tmp_path / "README.md"]
    assert (
        "| the study's LoRA (q and o, r=8) | 1e-4 | 1% / 1% | 0.10 [0.09, 0.11] (0.10) |" in readme
    )
    assert readme.count("not run") >= 13


def test_a_block_without_a_table_is_refused() -> None:
    """A marker with a name that no template has is an error that names the file."""
    text = "<!-- study:nothing -->\n<!-- /study:nothing -->"
    with pytest.raises(UserError, match=r"README.md: no block 'nothing'"):
        fill_blocks(text, {"claims": ""}, "README.md")


def test_arms_must_start_alike(tmp_path) -> None:
    """A run from other weights than its base's is named (gate G3)."""
    write_prompts(tmp_path)
    add_run(tmp_path, Run("xs", "wrapped42"), 0.0)
    add_run(tmp_path, make_tuning_run(STUDY, "xs", "fft", 1e-3), 0.9)
    load_evidence(tmp_path)
    text = (tmp_path / "runs.jsonl").read_text()
    (tmp_path / "runs.jsonl").write_text(
        text.replace('"base_fingerprint": "b"', '"base_fingerprint": "c"')
    )
    with pytest.raises(UserError, match="fft-e3-lr0.001-s1: started from other weights"):
        load_evidence(tmp_path)
