"""The unit of class means against its definition in loops, and where the definition has no value."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from etflayers.functional import unit_spread

WEIGHTS = torch.tensor([1.0, 0.5, 0.0, 3.0, 2.0], dtype=torch.float64)


def means_of(*, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    return (torch.randn(5, 7, generator=generator, dtype=torch.float64) + 2).to(dtype)


def test_agrees_with_the_definition() -> None:
    rows, omega = means_of().numpy(), WEIGHTS.numpy()
    middle = sum(w * row for w, row in zip(omega, rows, strict=True)) / omega.sum()
    squares = [np.sum((w * (row - middle)) ** 2) for w, row in zip(omega, rows, strict=True) if w > 0]
    expected = (rows - middle) / np.sqrt(np.mean(squares))
    np.testing.assert_allclose(unit_spread(means_of(), WEIGHTS), expected, rtol=1e-13)


def test_a_class_without_weight_has_no_say() -> None:
    means, moved = means_of(), means_of()
    moved[2] -= 100
    others = WEIGHTS > 0
    torch.testing.assert_close(unit_spread(moved, WEIGHTS)[others], unit_spread(means, WEIGHTS)[others])


@pytest.mark.parametrize("factor", [2.0**-70, 2.0**70])  # squares of float32 vanish and overflow
def test_the_unit_of_the_means_does_not_matter(factor: float) -> None:
    means, weights = means_of(dtype=torch.float32), WEIGHTS.float()
    torch.testing.assert_close(unit_spread(factor * means, weights), unit_spread(means, weights))


def test_gradient_agrees_with_finite_differences() -> None:
    # That the largest entry is the unit inside must not show.
    assert torch.autograd.gradcheck(lambda x: unit_spread(x, WEIGHTS), means_of().requires_grad_())


@pytest.mark.parametrize("rounding", [None, 1e-4])
def test_differences_of_the_size_of_rounding_are_not_blown_up(rounding: float | None) -> None:
    """The spread is at least ``eps sqrt(d) max|X|``."""
    eps = torch.finfo(torch.float64).eps if rounding is None else rounding
    weights = torch.ones(2, dtype=torch.float64)
    # Two means 2 eps apart in one of 100 coordinates: each eps from the middle, a tenth of the floor.
    means = torch.ones(2, 100, dtype=torch.float64)
    means[0, 0] += 2 * eps
    found = unit_spread(means, weights, rounding=rounding)
    assert float(found[0, 0]) == pytest.approx(0.1, rel=0.01)
    torch.testing.assert_close(found[0], -found[1], rtol=0, atol=1e-12)


def test_means_that_coincide_and_weights_of_zero_give_zeros() -> None:
    for means in (torch.zeros(3, 4), torch.full((3, 4), 5.0)):
        assert not unit_spread(means, torch.ones(3)).any()
    assert unit_spread(means_of(), torch.zeros(5, dtype=torch.float64)).isfinite().all()
