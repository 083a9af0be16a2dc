"""Spectra and intruder dimensions of a matrix's update.

Pure functions on float64 tensors. W0 is the base's matrix (m, n), dW its update, W = W0 + dW.
`update_analysis.py` applies them to checkpoints.
"""

import math

import torch
from scipy.stats import beta
from torch import Tensor

INTRUDER_COS = 0.5  # epsilon of Shuttleworth et al. 2024, arXiv 2410.21228
RANDOM_DRAWS = 5  # random updates that an intruder count is compared with


def find_left_vectors(matrix: Tensor) -> Tensor:
    """Return the left singular vectors, (m, min(m, n)), of the largest singular value first."""
    return torch.linalg.svd(matrix, full_matrices=False).U


def find_energy_rank(s: Tensor, share: float) -> int:
    """Return the smallest r whose r largest singular values hold `share` of the squared norm."""
    energy = s.square().cumsum(0)
    reached = energy >= (share - 1e-9) * energy[-1]  # 9 of 10 equal values hold 0.9, rounding aside
    return int(reached.nonzero()[0]) + 1


def find_effective_rank(s: Tensor) -> float:
    """Return exp(-sum p ln p) with p = s / sum s (Roy and Vetterli 2007, EUSIPCO)."""
    return torch.special.entr(s / s.sum()).sum().exp().item()


def find_stable_rank(s: Tensor) -> float:
    """Return the squared Frobenius norm over the squared spectral norm."""
    return (s.square().sum() / s[0] ** 2).item()


def cut_to_rank(delta: Tensor, rank: int) -> Tensor:
    """Return the best approximation of rank at most `rank`; a vector is one column."""
    u, s, vh = torch.linalg.svd(delta.reshape(len(delta), -1), full_matrices=False)
    return ((u[:, :rank] * s[:rank]) @ vh[:rank]).reshape(delta.shape)


def draw_low_rank(delta: Tensor, rank: int, generator: torch.Generator) -> Tensor:
    """Return a product of two Gaussian factors with the norm of `delta`.

    Its rank is `rank`, or the largest that the shape can have. A vector is one column.
    """
    rows, columns = delta.reshape(len(delta), -1).shape
    rank = min(rank, rows, columns)
    b = torch.randn(rows, rank, dtype=delta.dtype, generator=generator)
    a = torch.randn(rank, columns, dtype=delta.dtype, generator=generator)
    product = (b @ a).reshape(delta.shape)
    return product * (delta.norm() / product.norm())


def draw_directions(s: Tensor, shape: torch.Size, generator: torch.Generator) -> Tensor:
    """Return a matrix (m, n) with singular values `s` and random singular vectors."""
    u, v = (
        torch.linalg.qr(torch.randn(size, len(s), dtype=s.dtype, generator=generator)).Q
        for size in shape
    )
    return (u * s) @ v.T


def find_top_cosines(u0: Tensor, tuned: Tensor) -> Tensor:
    """Return the largest |cos| of each of W's top k left singular vectors with those of W0.

    k is max(3, min(m, n) / 50): the paper's 10 at width 512.
    """
    k = max(3, min(tuned.shape) // 50)
    return (u0.T @ find_left_vectors(tuned)[:, :k]).abs().amax(0)


def find_chance_cosine(shape: torch.Size, tail: float = 0.05) -> float:
    """Return what the largest |cos| of a random direction exceeds with probability `tail`.

    One squared cosine is Beta(1/2, (m - 1) / 2), and the union bound runs over min(m, n)
    directions: 0.308 for 128 x 128, 0.230 for 256, 0.171 for 512.
    """
    rows, count = shape[0], min(shape)
    return math.sqrt(beta.isf(tail / count, 0.5, (rows - 1) / 2))


def count_intruders(w0: Tensor, delta: Tensor, generator: torch.Generator) -> dict:
    """Count intruder dimensions, and those that random directions give.

    An intruder is one of W's top k left singular vectors whose |cos| with every left singular
    vector of W0 is below 0.5. The null has dW's singular values in random directions.
    """
    u0 = find_left_vectors(w0)
    s = torch.linalg.svdvals(delta)
    cosines = find_top_cosines(u0, w0 + delta)
    random = [
        (find_top_cosines(u0, w0 + draw_directions(s, delta.shape, generator)) < INTRUDER_COS).sum()
        for _ in range(RANDOM_DRAWS)
    ]
    return {
        "k": len(cosines),
        "max_cos": cosines.tolist(),
        "null95": find_chance_cosine(delta.shape),
        "count": int((cosines < INTRUDER_COS).sum()),
        "random": float(sum(random)) / RANDOM_DRAWS,
    }


def describe_matrix(w0: Tensor, delta: Tensor, generator: torch.Generator) -> dict:
    """Describe the update of one matrix: size, ranks, intruders, singular values."""
    s = torch.linalg.svdvals(delta)
    return {
        "shape": list(delta.shape),
        "frobenius": delta.norm().item(),
        "relative": (delta.norm() / w0.norm()).item(),
        "r90": find_energy_rank(s, 0.9),
        "effective_rank": find_effective_rank(s),
        "stable_rank": find_stable_rank(s),
        "intruders": count_intruders(w0, delta, generator),
        "singular_values": s.tolist(),
    }
