"""The bound on a token's probability against known values."""

from pathlib import Path

import pytest
import torch

from model.checkpoint import load_model
from model.cli import UserError
from model.reachability import reachable_probability
from tests.model.small import make_model

BASES = Path(__file__).resolve().parents[2] / "evaluation/study/bases"


@pytest.mark.parametrize(("base", "bound"), [("xs-plain42", 0.141), ("xs-world-plain42", 0.139)])
def test_a_hidden_state_attains_the_published_bound(base: str, bound: float) -> None:
    """Another optimizer, on the sphere, finds a state with this probability and none above."""
    model = load_model(BASES / base)
    matrix = (model.lm_head.weight * model.model.norm.weight).detach()
    state = matrix[2].clone().requires_grad_()
    optimizer = torch.optim.LBFGS([state], max_iter=400, line_search_fn="strong_wolfe")

    def compute_loss() -> torch.Tensor:
        optimizer.zero_grad()
        logits = matrix @ (state * (len(state) ** 0.5 / state.norm()))
        loss = -logits.log_softmax(dim=0)[2]
        loss.backward()
        return loss

    optimizer.step(compute_loss)
    found = compute_loss().neg().exp().item()
    assert reachable_probability(model, 2) == pytest.approx(found, rel=2e-3)
    assert found == pytest.approx(bound, abs=5e-4)


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
