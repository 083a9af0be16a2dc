"""What a matrix's update looks like: spectra, intruder dimensions, subspaces, amplification.

Pure functions on float64 tensors; W0 is the base's matrix (m, n), dW its update, W = W0 + dW.
`evaluation/update_analysis.py` applies them to checkpoints. Each function names its formula's
source; the nulls say what random directions alone would give.
"""

import math

import torch
from scipy.stats import beta
from torch import Tensor

INTRUDER_COS = 0.5  # Shuttleworth et al.'s epsilon
RANDOM_DRAWS = 5  # random updates that an intruder count is compared with
LARGEST_RANK = 64  # of the ranks that amplification and similarity are shown at


# ----------------------------------------------------------------------------- spectra


def svd(matrix: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """U (m, p), s (p,) descending, V^T (p, n) with p = min(m, n)."""
    return torch.linalg.svd(matrix, full_matrices=False)


def svd_of_update(delta: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """`svd` without the singular values that are zero in the tensor's precision."""
    u, s, vh = svd(delta)
    rank = int((s > s[0] * max(delta.shape) * torch.finfo(s.dtype).eps).sum())
    return u[:, :rank], s[:rank], vh[:rank]


def energy_rank(s: Tensor, share: float) -> int:
    """The smallest r whose r largest singular values hold `share` of the squared norm."""
    energy = s.square().cumsum(0)
    reached = energy >= (share - 1e-9) * energy[-1]  # rounding aside: 9 of 10 equal ones hold .9
    return int(reached.nonzero()[0]) + 1


def effective_rank(s: Tensor) -> float:
    """exp(-sum p ln p), p = s / sum s (Roy & Vetterli 2007, EUSIPCO)."""
    return torch.special.entr(s / s.sum()).sum().exp().item()


def stable_rank(s: Tensor) -> float:
    """||.||_F^2 / ||.||_2^2 (Rudelson & Vershynin 2007, J. ACM 54(4))."""
    return (s.square().sum() / s[0] ** 2).item()


def low_rank(delta: Tensor, rank: int) -> Tensor:
    """The best approximation of rank at most `rank` (Eckart & Young 1936).

    A vector counts as a matrix of one column.
    """
    u, s, vh = svd(delta.reshape(len(delta), -1))
    return ((u[:, :rank] * s[:rank]) @ vh[:rank]).reshape(delta.shape)


def random_low_rank(delta: Tensor, rank: int, generator: torch.Generator) -> Tensor:
    """A product of two Gaussian factors, scaled to the norm of `delta`.

    Its rank is `rank`, or the largest that the shape can have; a vector is one column.
    """
    rows, columns = delta.reshape(len(delta), -1).shape
    rank = min(rank, rows, columns)
    b = torch.randn(rows, rank, dtype=delta.dtype, generator=generator)
    a = torch.randn(rank, columns, dtype=delta.dtype, generator=generator)
    product = (b @ a).reshape(delta.shape)
    return product * (delta.norm() / product.norm())


def random_directions(s: Tensor, shape: torch.Size, generator: torch.Generator) -> Tensor:
    """A matrix (m, n) with singular values `s` and random singular vectors."""
    u, v = (
        torch.linalg.qr(torch.randn(size, len(s), dtype=s.dtype, generator=generator)).Q
        for size in shape
    )
    return (u * s) @ v.T


def ranks_to_show(rank: int) -> list[int]:
    """1, 2, 4... up to `rank` or 64, and `rank` itself if it is not above 64."""
    powers = [2**i for i in range(LARGEST_RANK.bit_length()) if 2**i <= rank]
    return powers if rank > LARGEST_RANK else sorted({*powers, rank})


# ----------------------------------------------------------------------------- intruders


def intruder_candidates(shape: torch.Size) -> int:
    """k = max(3, p / 50): how many top singular vectors are looked at; the paper's 10 at 512."""
    return max(3, min(shape) // 50)


def largest_cosines(u0: Tensor, tuned: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The top k left singular vectors of W against all those of W0.

    Args:
        u0: (m, p), those of W0.
        tuned: W (m, n).

    Returns:
        The largest |cos| of each (k,), the vectors (m, k), every singular value of W (p,).
    """
    u, s, _ = svd(tuned)
    top = u[:, : intruder_candidates(tuned.shape)]
    return (u0.T @ top).abs().amax(0), top, s


def chance_cosine(shape: torch.Size, tail: float) -> float:
    """What the largest |cos| of a random direction with p orthonormal ones in R^m rarely exceeds.

    One squared cosine is Beta(1/2, (m - 1) / 2). The union bound over the p gives the threshold
    that is exceeded with probability `tail` at most; for a tail of .05 it lies within .2% of the
    quantile: .308 at m = p = 128, .230 at 256, .171 at 512.
    """
    m, p = shape[0], min(shape)
    return math.sqrt(beta.isf(tail / p, 0.5, (m - 1) / 2))


def count_intruders(u0: Tensor, tuned: Tensor) -> int:
    """Intruders among the top k left singular vectors of W."""
    return int((largest_cosines(u0, tuned)[0] < INTRUDER_COS).sum())


def intruder_directions(w0: Tensor, delta: Tensor) -> Tensor:
    """The intruders as orthonormal columns (m, count)."""
    cosines, top, _ = largest_cosines(svd(w0)[0], w0 + delta)
    return top[:, cosines < INTRUDER_COS]


def describe_intruders(w0: Tensor, u0: Tensor, delta: Tensor, generator: torch.Generator) -> dict:
    """Intruder dimensions (Shuttleworth et al. 2024, arXiv 2410.21228), nulls and shares.

    A left singular vector of W among the top k is one if its |cos| with every left singular vector
    of W0 is below .5. `random` counts those of W0 plus an update with the same singular values,
    so of the same norm, in random directions; for the other keys see update_analysis.py.

    Args:
        u0: (m, p), left singular vectors of W0.
    """
    cosines, top, s = largest_cosines(u0, w0 + delta)
    found = cosines < INTRUDER_COS
    sizes = svd_of_update(delta)[1]
    random = [
        count_intruders(u0, w0 + random_directions(sizes, delta.shape, generator))
        for _ in range(RANDOM_DRAWS)
    ]
    along = top[:, found].T @ delta
    return {
        "k": len(cosines),
        "max_cos": cosines.tolist(),
        "null95": chance_cosine(delta.shape, 0.05),
        "count": int(found.sum()),
        "random": sum(random) / RANDOM_DRAWS,
        "weight_share": (s[: len(found)][found].square().sum() / s.square().sum()).item(),
        "update_share": (along.square().sum() / delta.square().sum()).item(),
    }


def intruders_at_equal_norm(w0: Tensor, first: Tensor, second: Tensor) -> dict:
    """Intruder counts of two updates, the larger scaled down to the norm of the smaller."""
    u0 = svd(w0)[0]
    size = torch.minimum(first.norm(), second.norm())
    tuned, other = (count_intruders(u0, w0 + d * (size / d.norm())) for d in (first, second))
    return {"frobenius": size.item(), "tuned": tuned, "other": other}


# ----------------------------------------------------------------------------- subspaces


def right_directions(matrix: Tensor) -> Tensor:
    """Right singular vectors with a nonzero singular value, as columns (n, rank)."""
    return svd_of_update(matrix)[2].T


def similarity(first: Tensor, second: Tensor, i: int, j: int) -> float:
    """phi = ||U_i^T U_j||_F^2 / min(i, j) (Hu et al. 2021, arXiv 2106.09685, section 7.2).

    U_i, U_j are the first i and j columns of `first` and `second`, each orthonormal.
    """
    return ((first[:, :i].T @ second[:, :j]).square().sum() / min(i, j)).item()


def excess_similarity(phi: float, i: int, j: int, dimension: int) -> float | None:
    """(phi - null) / (1 - null), null = max(i, j) / dimension; None where the null is 1.

    The null is the mean of phi for uniformly random subspaces: E ||U_i^T U_j||_F^2 = i j / n.
    """
    null = max(i, j) / dimension
    return None if null == 1 else (phi - null) / (1 - null)


def amplification(w0: Tensor, s0: Tensor, delta: Tensor) -> dict:
    """||dW_r||_F / ||U^T W0 V||_F for several r (Hu et al. 2021, arXiv 2106.09685, section 7.3).

    U and V are the top r left and right singular vectors of dW, and dW_r the part along them; at
    the rank of an adapter that is dW, as in the paper. The nulls put other directions into the
    denominator: random ones, with E ||U^T W0 V||_F^2 = r^2 ||W0||_F^2 / (m n), and W0's own top.

    Args:
        s0: singular values of W0.
    """
    u, s, vh = svd_of_update(delta)
    inside = u.T @ w0 @ vh.T
    ranks = ranks_to_show(len(s))
    updates = [s[:r].norm() for r in ranks]
    in_random = s0.norm() / math.sqrt(w0.numel())
    pairs = list(zip(ranks, updates, strict=True))
    return {
        "r": ranks,
        "factor": [(update / inside[:r, :r].norm()).item() for r, update in pairs],
        "random": [(update / (r * in_random)).item() for r, update in pairs],
        "top": [(update / s0[:r].norm()).item() for r, update in pairs],
    }
