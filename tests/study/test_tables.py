"""Tables, inline values and the report of made-up runs."""

from pathlib import Path

import pandas as pd
import pytest

from evaluation.study.analysis import Evidence, load_evidence
from evaluation.study.blocks import BLOCKS, write_rate
from evaluation.study.figures import FIGURES
from evaluation.study.report import list_footnotes, make_report, write_table
from evaluation.study.settings import RESULTS_DIR
from evaluation.study.values import find_value
from model.cli import UserError
from tests.study.synthetic import (
    list_outcomes,
    make_line,
    make_run,
    make_study,
    write_lines,
    write_prompts,
)

NAMES = [*BLOCKS, *FIGURES]
PAGE = "".join(f"<!-- study:{name} -->\n<!-- /study:{name} -->\n" for name in dict.fromkeys(NAMES))


@pytest.fixture
def evidence(tmp_path: Path) -> Evidence:
    """Return the evidence of the made-up study."""
    write_lines(tmp_path, make_study())
    return load_evidence(tmp_path)


def test_results_and_retention_by_hand(evidence: Evidence) -> None:
    """10 of 12 are 83%, 7 of 12 are 58%; a single run has a star; what did not run is missing."""
    (results,) = BLOCKS["results"](evidence)
    shares = results.set_index("correct answers, composition")["1.3M"]
    assert shares["full fine-tuning"] == "83%"
    assert shares["all-layer LoRA, rank 8"] == shares["all-layer LoRA, rank = width/16"] == "58%"
    assert shares["the original LoRA"] == "25%*"
    assert shares["before fine-tuning"] == "0%"
    assert pd.isna(shares["full fine-tuning, embedding frozen"])
    (retention,) = BLOCKS["retention"](evidence)
    rows = retention.set_index("correct answers")
    # The base ranks half of the facts of combinations first, and 80% of those of unseen things.
    assert rows.loc["known to the base", "plain questions, 1.3M"] == "50%"
    assert rows.loc["full fine-tuning", "plain questions, 1.3M"] == "25% (50%)"
    assert rows.loc["full fine-tuning", "unseen things, 1.3M"] == "50% (62%)"


def test_gaps_by_hand(evidence: Evidence) -> None:
    """3, 4 and 2 of 12 behind by seed: 25 points, and 4.303 x 8.33 / 1.732 to each side."""
    table, frozen = BLOCKS["gaps"](evidence)
    assert frozen.empty  # no full fine-tuning of this study has a frozen embedding
    greedy = table[table.answers == "greedy"].iloc[0]
    assert greedy["all-layer LoRA"] == "rank 8 (width/16)"
    assert greedy["rates, LoRA / full"] == "3e-3 / 1e-3"
    assert greedy["composition"].startswith("25 [")
    assert greedy["composition, t interval"] == "[4, 46]"
    assert greedy["plain questions"] == "0 [0, 0]"


def test_rates_and_steps_by_hand(tmp_path: Path) -> None:
    """The best rate is bold; runs of equal rate x steps are a pair."""
    lines = make_study()
    short = make_run("xs", "fft", 4e-3, 1, epochs=1)
    lines.append(make_line(short, list_outcomes(1, 5)))
    write_lines(tmp_path, lines)
    evidence = load_evidence(tmp_path)
    rates = BLOCKS["rates"](evidence)[0].set_index(["trained", "epochs"])["rate: correct"]
    assert rates["full fine-tuning", "4"] == "5e-4: 50%, **1e-3: 100%**, 2e-3: 25%"
    (steps,) = BLOCKS["steps"](evidence)
    (pairs,) = BLOCKS["equal_products"](evidence)
    row = steps[steps["peak rate"] == "1e-3"].iloc[0]
    assert (row["rate x steps"], row["composition"], row["tuning half"]) == ("4", "83%", "100%")
    assert row["all 1,200"] == "69%"  # 30 + 3 of 48
    (pair,) = pairs.to_dict("records")
    assert (pair["fewer steps"], pair["more steps"]) == ("4e-3 x 1,000", "1e-3 x 4,000")
    assert (pair["tuning half"], pair["tuning half, more steps"]) == ("25%", "100%")


def test_cookbook_rates_by_hand(evidence: Evidence) -> None:
    """5e-5 x 10 x (2000 / 128)^0.781 is 4.28e-3."""
    (table,) = BLOCKS["lora_rates"](evidence)
    row = table.iloc[0]
    assert (row["formula"], row["rank 8 / full"]) == ("4.3e-3", "3")


def test_rates_are_written_shortly() -> None:
    assert [write_rate(rate) for rate in (1e-3, 1.25e-4, 0.01)] == ["1e-3", "1.25e-4", "1e-2"]


def test_marks_are_explained_where_they_stand() -> None:
    """A star behind percent is one run; Markdown's stars are not."""
    (note,) = list_footnotes("| 37%* | 88%‡ |")
    assert note.startswith(r"\* One run") and "‡ The best" in note and "†" not in note
    assert list_footnotes("**1e-3: 88%** *(wrong fact)*") == []


def test_a_dash_stands_for_what_was_not_measured() -> None:
    table = pd.DataFrame({"a": ["x", None], "b": [None, "y"]})
    assert write_table(table) == "| a | b |\n|:---|:---|\n| x | - |\n| - | y |"
    assert write_table(table.iloc[:0]) == "Not run yet."


def test_inline_values_by_hand(evidence: Evidence) -> None:
    assert find_value(evidence, "share/composition/fft/1.3M") == "83"
    assert find_value(evidence, "share/all/r8/1.3M/sampled") == "50"  # 21 + 3 of 48
    assert find_value(evidence, "gap/composition/r8/1.3M") == "25"
    assert find_value(evidence, "t_interval/composition/width16/1.3M") == "4 to 46"
    assert find_value(evidence, "known/unseen/1.3M") == "80"
    for name in ("shares/fft", "share/composition/fft/2B", "share/composition/fft_frozen/1.3M"):
        with pytest.raises(UserError, match=f"no value '{name}'"):
            find_value(evidence, name)


def test_the_report_is_stable(tmp_path: Path) -> None:
    """Blocks and values are filled once, a second report changes nothing, names are checked."""
    write_lines(tmp_path, make_study())
    path = tmp_path / "README.md"
    path.write_text(PAGE + "It answers <!-- =share/composition/fft/1.3M -->0<!-- /= -->%.")
    first = make_report(tmp_path, tmp_path)
    assert first[path].endswith("<!-- =share/composition/fft/1.3M -->83<!-- /= -->%.")
    path.write_text(first[path])
    assert make_report(tmp_path, tmp_path) == first
    path.write_text("<!-- study:nothing -->\n<!-- /study:nothing -->")
    with pytest.raises(UserError, match="no block 'nothing'; there are .*results"):
        make_report(tmp_path, tmp_path)


def test_a_study_without_runs_has_a_report(tmp_path: Path) -> None:
    write_prompts(tmp_path)
    path = tmp_path / "README.md"
    path.write_text(PAGE)
    assert "Not run yet." in make_report(tmp_path, tmp_path)[path]


def test_frozen_verdicts_are_of_all_claims() -> None:
    """4 conditions and 13 claims; 10 are met by means, none of C3, C7 and C11."""
    table = pd.read_csv(RESULTS_DIR / "verdicts_2.csv", keep_default_na=False)
    claims = table[table.claim.str.startswith("C")].set_index("claim")
    assert claims.index.tolist() == [f"C{number}" for number in range(1, 14)]
    assert len(table) == 17
    assert set(claims.index[claims.met_by_means != "yes"]) == {"C3", "C7", "C11"}
