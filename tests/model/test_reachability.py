"""The bound on a token's probability against known values."""

from pathlib import Path

import pytest
import torch

from model.checkpoint import load_model
from model.files import UserError
from model.reachability import reachable_probability
from tests.model.small import make_model

BASE = next(Path(__file__).resolve().parents[2].glob("evaluation/**/bases/xs-plain42"))


def test_published_value() -> None:
    assert reachable_probability(load_model(BASE), 2) == pytest.approx(0.141, abs=0.003)


def test_two_tokens_with_equal_rows_share_their_probability() -> None:
    model = make_model()
    with torch.no_grad():
        model.lm_head.weight[:8] *= 20
        model.lm_head.weight[5] = model.lm_head.weight[7]
    bounds = [reachable_probability(model, one) for one in (5, 7, 3)]
    assert bounds == pytest.approx([0.5, 0.5, 1], abs=2e-3)


def test_a_diverged_model_is_refused() -> None:
    model = make_model()
    torch.nn.init.constant_(model.model.norm.weight, float("nan"))
    with pytest.raises(UserError, match="not finite"):
        reachable_probability(model, 5)
