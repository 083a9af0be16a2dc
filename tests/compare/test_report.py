"""The report's first sentence by made-up numbers, and what stands on the page."""

import pandas as pd
import pytest

from evaluation.comparison.page import render_html, render_markdown
from evaluation.comparison.report import (
    Facts,
    Gap,
    Result,
    average_losses,
    choose_method,
    find_edges,
    format_rate,
    format_size,
    subtract_losses,
    write_verdict,
)

BEST = Gap(0, 0, 0)
TITLES = {"lora": "rank-64 LoRA", "full": "full fine-tuning", "small": "rank-8 LoRA"}
RATES = {"lora": 2e-3, "full": 1e-3, "small": 3e-3}
BYTES = {"lora": 6.1e6, "full": 49e6, "small": 1e6}


def make_table(nll: dict[str, tuple[float, Gap]], key: str = "nll") -> pd.DataFrame:
    """Make a table of methods with these losses and gaps to the best."""
    table = pd.DataFrame(index=list(nll))
    table["title"] = table.index.map(TITLES)
    table["rate"] = table.index.map(RATES)
    table["bytes"] = table.index.map(BYTES)
    table["seconds"] = 60.0
    table[key] = [loss for loss, _ in nll.values()]
    table[f"{key}_gap"] = [gap for _, gap in nll.values()]
    return table


def say(
    table: pd.DataFrame,
    forgetting: Gap = BEST,
    key: str = "nll",
    is_too_few: bool = False,
    text: str | None = "wiki.jsonl",
) -> str:
    """Write the first sentence."""
    facts = Facts("title", [], key, is_too_few, text, {})
    taken, rival = choose_method(table, key, is_too_few)
    return write_verdict(table, facts, taken, rival, forgetting)


def test_a_small_method_as_good_as_the_best_is_taken() -> None:
    table = make_table(
        {
            "lora": (1.004, Gap(0.004, -0.002, 0.01)),
            "full": (1.0, BEST),
            "small": (1.2, Gap(0.2, 0.15, 0.25)),
        }
    )
    sentence = (
        "Take rank-64 LoRA at 2e-3: it is as good as full fine-tuning within 0.01 nats a token"
    )
    assert say(table) == f"{sentence}, and takes 6.1 MB in place of 49."
    less = say(table, Gap(-0.3, -0.4, -0.2))
    assert less == f"{sentence}, takes 6.1 MB in place of 49, and forgets less."
    assert say(table, Gap(0.3, 0.2, 0.4)).endswith(", and forgets more.")
    assert say(table, Gap(-0.3, -0.4, -0.2), text=None).endswith(", and stays nearer to the base.")


def test_the_best_is_taken_if_all_others_are_worse() -> None:
    table = make_table(
        {
            "small": (1.2, Gap(0.2, 0.15, 0.25)),
            "full": (1.0, BEST),
            "lora": (1.1, Gap(0.1, 0.05, 0.15)),
        }
    )
    assert say(table) == (
        "Take full fine-tuning at 1e-3: it is 0.1 nats a token (0.05 to 0.15) better than "
        "rank-64 LoRA, and takes 49 MB in place of 6.1."
    )


def test_the_best_that_is_also_the_cheapest_of_its_equals() -> None:
    table = make_table(
        {
            "lora": (1.0, BEST),
            "full": (1.01, Gap(0.01, -0.01, 0.03)),
            "small": (1.2, Gap(0.2, 0.15, 0.25)),
        }
    )
    assert "it is as good as full fine-tuning within 0.03 nats a token" in say(table)
    assert say(table).endswith(", and takes 6.1 MB in place of 49.")


def test_methods_that_do_not_differ_are_not_ordered() -> None:
    table = make_table({"full": (1.0, BEST), "small": (1.02, Gap(0.02, -0.01, 0.05))})
    assert say(table, Gap(-1, -2, -0.5)) == (
        "These do not differ on your data; take the cheapest, rank-8 LoRA at 3e-3 (1 MB)."
    )


def test_too_few_pairs_order_nothing() -> None:
    table = make_table({"small": (1.5, Gap(0.5, -0.1, 1.1)), "full": (1.0, BEST)})
    assert say(table, is_too_few=True) == (
        "Your held-out pairs are too few to order the methods; "
        "full fine-tuning at 1e-3 has the lowest NLL, which may be chance."
    )
    alone = say(table.loc[["full"]])
    assert "full fine-tuning at 1e-3" in alone
    assert "no other method" in alone


def test_correct_answers_are_told_in_points() -> None:
    gap = Gap(0.24, 0.19, 0.29)
    table = make_table({"full": (0.4, BEST), "small": (0.64, gap)}, key="wrong")
    assert "24 points (19 to 29) better than rank-8 LoRA" in say(table, key="wrong")


def test_numbers() -> None:
    assert [format_rate(rate) for rate in (0.0015, 3e-3, 1.25e-4)] == ["1.5e-3", "3e-3", "1.25e-4"]
    assert [format_size(size) for size in (49_200_000, 156_680)] == ["49", "0.16"]


def test_losses_are_paired_and_weighted_by_tokens() -> None:
    before = {"nll": {"nats": [2.0, 30.0], "tokens": [1, 10]}}
    after = {"nll": {"nats": [3.0, 20.0], "tokens": [1, 10]}}
    assert subtract_losses(after, before, "nll").mean == pytest.approx((1 - 10) / 11)
    ends = {"end_nats": [0.5, 5.0], "ends": [0, 5]}
    texts = [{"text": found["nll"] | ends} for found in (after, before)]
    assert subtract_losses(*texts, "text").mean == pytest.approx((1 - 10) / 6)


def test_wrong_answers_count_checked_prompts_alone() -> None:
    outcomes = ["correct", "other thing", None, "correct", "blank"]
    measured = {"samples": [{"outcome": outcome} for outcome in outcomes]}
    assert average_losses(measured, "wrong") == 0.5


def test_a_best_rate_at_the_edge_is_named() -> None:
    nll = {5e-4: 2.0, 1e-3: 1.0, 2e-3: 1.5}
    inside = Result("inner", "black", 1e-3, nll, record={}, size=0, measured={})
    edge = Result("outer", "black", 2e-3, nll, record={}, size=0, measured={})
    (sentence,) = find_edges({"a": inside, "b": edge})
    assert sentence.startswith("The best rate of outer, 2e-3, is at the edge")


def test_nothing_on_a_page_can_act() -> None:
    evil = "</pre><script>alert(1)</script> `*[x](http://evil)` \x1b[2J"
    sample = {"prompt": evil, "reference": evil, "output": evil, "outcome": None}
    sample |= {"blank": False, "loop": True, "endless": False}
    blocks = [("title", evil), ("verdict", evil), ("text", evil), ("code", evil)]
    blocks += [("answers", [(evil, sample)]), ("table", pd.DataFrame([{evil: evil}]))]
    html = render_html(blocks)
    assert "<script" not in html and "\x1b" not in html and "default-src 'none'" in html
    assert "<script" not in render_markdown(blocks[:3])
