"""Spectra and intruder dimensions against values worked out by hand."""

import math

import pytest
import torch

from evaluation.updates import spectra

GENERATOR = torch.Generator().manual_seed(0)


def test_ranks_of_known_spectra() -> None:
    """Equal values have full rank by all three measures, and 9 of 10 hold 90%."""
    equal = spectra.measure_ranks(torch.ones(10, dtype=torch.float64))
    assert list(equal.values()) == pytest.approx([9, 10, 10])
    two = spectra.measure_ranks(torch.tensor([3.0, 1.0], dtype=torch.float64))  # squares 9 and 1
    entropy = -(0.75 * math.log(0.75) + 0.25 * math.log(0.25))
    assert list(two.values()) == pytest.approx([1, math.exp(entropy), 10 / 9])


def test_low_rank_keeps_the_largest_directions() -> None:
    """A diagonal is cut to its largest entries; a vector has rank 1."""
    entries = torch.tensor([5.0, 3.0, 1.0], dtype=torch.float64)
    cut = spectra.cut_to_rank(torch.diag(entries), 2)
    assert torch.allclose(cut, torch.diag(entries * torch.tensor([1, 1, 0])))
    vector = torch.randn(7, dtype=torch.float64, generator=GENERATOR)
    assert torch.allclose(spectra.cut_to_rank(vector, 1), vector)


def test_random_updates_have_rank_norm_and_spectrum() -> None:
    delta = torch.randn(12, 8, dtype=torch.float64, generator=GENERATOR)
    random = spectra.draw_low_rank(delta, 3, GENERATOR)
    assert torch.linalg.matrix_rank(random) == 3
    assert random.norm().item() == pytest.approx(delta.norm().item())
    turned = spectra.draw_directions(torch.linalg.svdvals(delta), delta.shape, GENERATOR)
    assert torch.allclose(torch.linalg.svdvals(turned), torch.linalg.svdvals(delta))


def test_intruders() -> None:
    """A large update in a new direction intrudes, a scaled W0 does not."""
    w0 = torch.diag(torch.linspace(2, 1, 128, dtype=torch.float64))
    scaled = spectra.count_intruders(w0, w0.clone(), GENERATOR)
    assert scaled["count"] == 0
    assert scaled["null95"] == pytest.approx(0.308, abs=5e-4)  # of 128 x 128
    flat = torch.full((128,), 128**-0.5, dtype=torch.float64)  # cos 0.09 with each axis
    found = spectra.count_intruders(w0, 100 * torch.outer(flat, flat), GENERATOR)
    assert found["count"] >= 1 and min(found["max_cos"]) < 0.5 and found["k"] == 3


def test_description_of_half_the_base() -> None:
    """Sizes are relative to the base; singular values descend."""
    w0 = torch.eye(8, dtype=torch.float64)
    row = spectra.describe_matrix(w0, 0.5 * w0, GENERATOR)
    assert (row["shape"], row["r90"], row["relative"]) == ([8, 8], 8, pytest.approx(0.5))
    assert row["singular_values"] == pytest.approx([0.5] * 8)
