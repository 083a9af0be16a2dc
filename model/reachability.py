"""How probable a token can become while the embedding and the final norm are frozen.

With a tied embedding E and the gain g of the final RMSNorm frozen, logits are E (g * x) with
||x|| <= sqrt(D), whatever an adapter changes below. log P(token) is concave in x, so its maximum
over this ball is exact: a bound for any adapter, rank, learning rate or number of steps.

Tokens whose rows are nearly those of others share their probability: "stolen probability" (Demeter
et al. 2020, arXiv 2005.02433; "unargmaxable" tokens, Grivas et al. 2022, arXiv 2203.06462). The
bound matters for sampling, above all that of the token that ends an answer.
"""

import torch
from torch import Tensor

from model.cli import UserError
from model.model_minimind import MiniMindForCausalLM

TOLERANCE = 1e-3  # nats between the value found and the bound
MAX_STEPS = 5000


@torch.no_grad()
def reachable_probability(model: MiniMindForCausalLM, token: int) -> float:
    """Bound the probability that a token can get from any hidden state, to about 0.1%.

    Accelerated projected gradient ascent (Beck & Teboulle 2009) with a line search, started anew
    where it overshoots. A concave f is at most sqrt(D) * ||f'(x)|| - f'(x) * x above f(x) on the
    ball; the search ends when this gap is below `TOLERANCE`. It takes some 60 to 100 steps; if
    `MAX_STEPS` are not enough, the bound is still one, but a loose one.
    """
    matrix = model.lm_head.weight.double() * model.model.norm.weight.double()
    if not matrix.isfinite().all():
        raise UserError("embedding or norm is not finite (diverged): name another model")
    matrix = matrix - matrix.mean(dim=0)  # probabilities depend on differences of logits alone
    radius = matrix.shape[1] ** 0.5
    least = 1.0  # of the bounds so far
    x = torch.zeros_like(matrix[0])
    ahead = x  # where the momentum leads
    size = 1.0
    momentum = 1.0
    for _ in range(MAX_STEPS):
        log_probabilities = (matrix @ ahead).log_softmax(dim=0)
        gradient = matrix[token] - log_probabilities.exp() @ matrix
        gap = radius * gradient.norm() - gradient @ ahead
        bound = min(1.0, (log_probabilities[token] + gap).exp().item())
        if gap < TOLERANCE:
            return bound
        least = min(least, bound)
        new, size = climb(matrix, token, ahead, log_probabilities[token], gradient, size)
        size *= 1.1
        if gradient @ (new - x) < 0:  # overshot
            momentum = 1.0
            ahead = new
        else:
            following = (1 + (1 + 4 * momentum**2) ** 0.5) / 2
            ahead = new + (momentum - 1) / following * (new - x)
            ahead = into_ball(ahead, radius)  # else f(ahead) might be out of reach
            momentum = following
        x = new
    return least


def into_ball(x: Tensor, radius: float) -> Tensor:
    """Return the point of the ball that is nearest to `x`."""
    return x * (radius / x.norm()).clamp(max=1)


def climb(
    matrix: Tensor, token: int, start: Tensor, value: Tensor, gradient: Tensor, size: float
) -> tuple[Tensor, float]:
    """Step along the gradient, and halve the step until f is no less than its quadratic model says.

    `value` is f at `start`; return the point, and the step's size.
    """
    radius = matrix.shape[1] ** 0.5
    while True:
        new = into_ball(start + size * gradient, radius)
        moved = new - start
        needed = value + gradient @ moved - moved @ moved / (2 * size)
        if (matrix @ new).log_softmax(dim=0)[token] >= needed - 1e-12:
            return new, size
        size /= 2
