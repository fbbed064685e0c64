"""The entropy of neighbors: by brute force and by finite differences; ranks are in tests/nn."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from etflayers.errors import InvalidArgumentError
from etflayers.functional import neighbor_entropy_loss
from etflayers.nn import EntropyRegularizer


def rows(size: int = 13, width: int = 3, dtype: torch.dtype = torch.float64) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randn(size, width, generator=generator, dtype=torch.float64).to(dtype)


def brute_force(features: Tensor) -> float:
    units = features.double().numpy()
    units = units / np.sqrt((units**2).sum(1, keepdims=True))
    logs = []
    for i, row in enumerate(units):
        others = [math.dist(row, other) for j, other in enumerate(units) if j != i]
        logs.append(math.log(min(others)))
    return -float(np.mean(logs))


@pytest.mark.parametrize("block_size", [1, 4, 13, 1024])
@pytest.mark.parametrize("width", [2, 3, 40])
def test_agrees_with_brute_force(block_size: int, width: int) -> None:
    features = rows(13, width)
    found = neighbor_entropy_loss(features, block_size=block_size)
    assert found.item() == pytest.approx(brute_force(features), rel=1e-12)
    assert torch.autograd.gradcheck(neighbor_entropy_loss, features.requires_grad_())


def test_neighbors_are_exact_where_products_have_lost_them() -> None:
    """In float32 at distances of 1e-4 and 2e-4: their squares are below the rounding of 2 - 2<z, z'>."""
    angles = torch.tensor([0.0, 2e-4, 3e-4, 1.0, 1.0001], dtype=torch.float64)
    features = torch.stack([angles.cos(), angles.sin()], dim=1)
    found = neighbor_entropy_loss(features.float())
    assert found.item() == pytest.approx(brute_force(features.float()), abs=2e-3)
    assert found.item() == pytest.approx(-np.log([2e-4, 1e-4, 1e-4, 1e-4, 1e-4]).mean(), abs=2e-3)


def test_duplicates_and_dead_features_are_finite() -> None:
    features = torch.ones(4, 3, dtype=torch.float64)
    features[3] = 0
    features.requires_grad_()
    loss = EntropyRegularizer(epsilon=1e-5)(features)
    (gradient,) = torch.autograd.grad(loss, features)
    # Three pairs of distance 0 count as epsilon; the dead feature is the origin, at distance 1.
    assert loss.item() == pytest.approx(-3 / 4 * math.log(1e-5))
    assert torch.isfinite(gradient).all()


def test_a_step_against_the_gradient_spreads_the_features() -> None:
    features = (rows(20, 4) * 0.1 + 1).requires_grad_()
    first = neighbor_entropy_loss(features)
    for _ in range(30):
        (gradient,) = torch.autograd.grad(neighbor_entropy_loss(features), features)
        features = (features - 0.05 * gradient).detach().requires_grad_()
    assert neighbor_entropy_loss(features) < first - 0.5


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_half_precision_and_autocast_compute_in_float32(dtype: torch.dtype) -> None:
    features = rows(dtype=dtype)
    expected = neighbor_entropy_loss(features.float())
    assert neighbor_entropy_loss(features).dtype == torch.float32
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(EntropyRegularizer()(features), expected)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (
            lambda: neighbor_entropy_loss(torch.ones(1, 3)),
            "two samples or more to have neighbors, got 1: leave",
        ),
        (lambda: neighbor_entropy_loss(torch.ones(0, 3)), "two samples or more to have neighbors, got 0"),
        (lambda: neighbor_entropy_loss(torch.ones(3)), r"shape \(B, d\), got \(3,\)"),
        (lambda: neighbor_entropy_loss(torch.ones(2, 3).long()), "features must have a real floating"),
        (lambda: EntropyRegularizer(epsilon=0), "epsilon must be a finite number > 0, got 0"),
        (lambda: EntropyRegularizer(block_size=0), "block_size must be at least 1, got 0"),
    ],
)
def test_bad_arguments_are_named(call: Any, message: str) -> None:
    with pytest.raises(InvalidArgumentError, match=message):
        call()
