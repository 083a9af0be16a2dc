"""Spectra and intruder dimensions against values worked out by hand."""

import math

import pytest
import torch

from evaluation.updates.spectra import (
    count_intruders,
    cut_to_rank,
    describe_matrix,
    draw_directions,
    draw_low_rank,
    find_chance_cosine,
    find_effective_rank,
    find_energy_rank,
    find_stable_rank,
)


def seeded() -> torch.Generator:
    """Return a generator that gives the same draws in each test."""
    return torch.Generator().manual_seed(0)


def test_ranks_of_known_spectra() -> None:
    """Equal values have full rank by all three measures, and 9 of 10 hold 90%."""
    equal = torch.ones(10, dtype=torch.float64)
    assert find_energy_rank(equal, 0.9) == 9
    assert find_effective_rank(equal) == pytest.approx(10)
    assert find_stable_rank(equal) == pytest.approx(10)
    two = torch.tensor([3.0, 1.0], dtype=torch.float64)  # squares 9 and 1
    assert find_energy_rank(two, 0.9) == 1
    assert find_stable_rank(two) == pytest.approx(10 / 9)
    entropy = -(0.75 * math.log(0.75) + 0.25 * math.log(0.25))
    assert find_effective_rank(two) == pytest.approx(math.exp(entropy))


def test_low_rank_keeps_the_largest_directions() -> None:
    """A diagonal is cut to its largest entries; a vector has rank 1."""
    matrix = torch.diag(torch.tensor([5.0, 3.0, 1.0], dtype=torch.float64))
    assert torch.allclose(
        cut_to_rank(matrix, 2), torch.diag(matrix.diag() * torch.tensor([1, 1, 0]))
    )
    vector = torch.randn(7, dtype=torch.float64, generator=seeded())
    assert torch.allclose(cut_to_rank(vector, 1), vector)


def test_random_update_has_rank_and_norm() -> None:
    """The control has the rank that was named and the norm of the update."""
    delta = torch.randn(12, 8, dtype=torch.float64, generator=seeded())
    random = draw_low_rank(delta, 3, seeded())
    assert torch.linalg.matrix_rank(random) == 3
    assert random.norm().item() == pytest.approx(delta.norm().item())
    turned = draw_directions(torch.linalg.svdvals(delta), delta.shape, seeded())
    assert torch.allclose(torch.linalg.svdvals(turned), torch.linalg.svdvals(delta))


def test_chance_cosine_of_square_matrices() -> None:
    """The null of the square matrices of the three widths."""
    for width, expected in ((128, 0.308), (256, 0.230), (512, 0.171)):
        assert find_chance_cosine(torch.Size([width, width])) == pytest.approx(expected, abs=5e-4)


def test_intruders() -> None:
    """A large update in a new direction intrudes, a scaled W0 does not."""
    w0 = torch.diag(torch.linspace(2, 1, 64, dtype=torch.float64))
    assert count_intruders(w0, w0.clone(), seeded())["count"] == 0
    flat = torch.full((64,), 1 / 8, dtype=torch.float64)  # cos 1/8 with each axis
    found = count_intruders(w0, 100 * torch.outer(flat, flat), seeded())
    assert found["count"] >= 1
    assert found["k"] == 3
    assert min(found["max_cos"]) < 0.5


def test_describe_matrix_is_complete() -> None:
    """Sizes are relative to the base; singular values descend."""
    w0 = torch.eye(8, dtype=torch.float64)
    row = describe_matrix(w0, 0.5 * w0, seeded())
    assert row["relative"] == pytest.approx(0.5)
    assert row["r90"] == 8
    assert row["shape"] == [8, 8]
    assert row["singular_values"] == pytest.approx([0.5] * 8)
