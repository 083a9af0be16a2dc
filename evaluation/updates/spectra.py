"""Spectra and intruder dimensions: float64, W0 the base's matrix (m, n), W = W0 + dW the tuned."""

import torch
from torch import Tensor

INTRUDER_COS = 0.5  # epsilon of Shuttleworth et al. 2024, arXiv 2410.21228


def measure_ranks(s: Tensor) -> dict[str, float]:
    """Measure the rank of an update by its singular values, in 3 ways.

    r90 singular values hold 90% of the squared norm. The effective rank is exp(-sum p ln p) with
    p = s / sum s (Roy and Vetterli 2007, EUSIPCO). The stable rank is the squared Frobenius norm
    over the squared spectral norm.
    """
    energy = s.square().cumsum(0)
    return {
        "r90": int((energy < (0.9 - 1e-9) * energy[-1]).sum()) + 1,  # rounding aside
        "effective_rank": torch.special.entr(s / s.sum()).sum().exp().item(),
        "stable_rank": (energy[-1] / s[0] ** 2).item(),
    }


def cut_to_rank(delta: Tensor, rank: int) -> Tensor:
    """Return the best approximation of rank at most `rank`."""
    u, s, vh = torch.linalg.svd(delta, full_matrices=False)
    return (u[:, :rank] * s[:rank]) @ vh[:rank]


def draw_low_rank(delta: Tensor, rank: int, generator: torch.Generator) -> Tensor:
    """Return a product of two Gaussian factors, of at most this rank, with the norm of `delta`."""
    rows, columns = delta.shape
    b = torch.randn(rows, rank, dtype=delta.dtype, generator=generator)
    a = torch.randn(rank, columns, dtype=delta.dtype, generator=generator)
    product = b @ a
    return product * (delta.norm() / product.norm())


def count_intruders(w0: Tensor, delta: Tensor) -> dict:
    """Count intruder dimensions; `max_cos` has the cosines that decide.

    An intruder is one of W's top k left singular vectors, k = max(3, min(m, n) / 50), whose |cos|
    with every left singular vector of W0 is below 0.5. The paper has k = 10 at width 512.
    """
    count = min(delta.shape)
    k = min(count, max(3, count // 50))
    before, after = (torch.linalg.svd(w, full_matrices=False).U for w in (w0, w0 + delta))
    cosines = (before.T @ after[:, :k]).abs().amax(0)
    return {"k": k, "max_cos": cosines.tolist(), "count": int((cosines < INTRUDER_COS).sum())}


def describe_matrix(w0: Tensor, delta: Tensor) -> dict:
    """Describe the update of one matrix: size, ranks, intruders, singular values."""
    s = torch.linalg.svdvals(delta)
    return {
        "shape": list(delta.shape),
        "frobenius": delta.norm().item(),
        "relative": (delta.norm() / w0.norm()).item(),
        **measure_ranks(s),
        "intruders": count_intruders(w0, delta),
        "singular_values": s.tolist(),
    }
