"""The landscape of the regularized model: one value of all minima, negative curvature elsewhere."""

from __future__ import annotations

import math
from functools import cache
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

from etflayers.errors import InvalidArgumentError
from etflayers.metrics import Classifier, class_statistics, collapse_measures
from etflayers.unconstrained import Landscape, convex_optimum, minimize

# Clarabel stops at a duality gap of 1e-8, absolute or relative: ten times that for infeasibility.
CONVEX = 1e-7


class Critical(NamedTuple):
    """A critical point, by the number of features it uses."""

    landscape: Landscape
    rank: int | None
    point: Tensor

    @property
    def gap(self) -> float:
        return float(self.landscape.value(self.point)) - optimum(self.landscape)


@cache
def optimum(landscape: Landscape) -> float:
    pytest.importorskip("cvxpy")
    return convex_optimum(landscape)


def found(landscape: Landscape, seed: int, rank: int | None = None) -> Critical:
    return Critical(landscape, rank, minimize(landscape, rank=rank, generator=seeded(seed)))


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@pytest.mark.usefixtures("one_thread")
@pytest.mark.parametrize("loss", ["ce", "mse"])
def test_every_start_reaches_the_convex_optimum(loss: Any) -> None:
    landscape = Landscape(loss=loss)
    minima = [found(landscape, seed) for seed in range(3)]
    for minimum in minima:
        assert abs(minimum.gap) < CONVEX
        assert landscape.gradient_norm(minimum.point) < 1e-8
        # The minima of f form a continuum, the rotations of one: zero is an eigenvalue, up to the gradient.
        assert abs(landscape.least_eigenvalue(minimum.point)) < 1e-7
        weight, features, bias = landscape.unflatten(minimum.point)
        statistics = class_statistics(features.mT, landscape.targets, landscape.num_classes)
        measures = collapse_measures(statistics, Classifier(weight, bias))
        for name in ("nc1_trace", "nc2_gram_means", "nc2_gram_weights", "nc3_distance"):
            assert measures[name] < 1e-5
    values = [float(landscape.value(minimum.point)) for minimum in minima]
    assert max(values) - min(values) < 1e-12


@pytest.mark.usefixtures("one_thread")
@pytest.mark.parametrize("loss", ["ce", "mse"])
def test_other_critical_points_have_negative_curvature(loss: Any) -> None:
    landscape = Landscape(loss=loss)
    for rank in range(3):
        saddle = found(landscape, 0, rank)
        assert landscape.gradient_norm(saddle.point) < 1e-8
        assert saddle.gap > 1e-2
        least = landscape.least_eigenvalue(saddle.point)
        assert least < -1e-3
        assert least == pytest.approx(landscape.unused_curvature(saddle.point), rel=1e-6)
        if rank == 0:
            # At zero the gradient of the loss is known: singular values 1 / (K sqrt n), whatever the loss.
            assert least == pytest.approx(0.01 - 1 / (4 * math.sqrt(3)), rel=1e-3)


def test_cross_entropy_optimum_is_that_of_a_scalar_problem() -> None:
    """Among Z = t (I - 11'/K) repeated n times f is ``log(1 + (K-1) e^-t) + sqrt(lw lh) t (K-1) sqrt n``."""
    optimize = pytest.importorskip("scipy.optimize")
    landscape = Landscape(num_classes=3, per_class=2, dim=4, weight_decay=0.02, feature_decay=0.005)
    slope = math.sqrt(0.02 * 0.005) * 2 * math.sqrt(2)
    best = optimize.minimize_scalar(
        lambda t: math.log1p(2 * math.exp(-t)) + slope * t, bounds=(0, 20), method="bounded"
    )
    assert float(landscape.value(minimize(landscape, generator=seeded(3)))) == pytest.approx(
        best.fun, abs=1e-9
    )


def test_restricted_start_stays_in_its_features() -> None:
    landscape = Landscape(num_classes=3, per_class=2, dim=4)
    point = minimize(landscape, rank=1, generator=seeded(0))
    weight, features, _ = landscape.unflatten(point)
    assert weight[:, :1].abs().max() > 0.1
    assert not weight[:, 1:].any()
    assert not features[1:].any()
    assert landscape.gradient_norm(point) < 1e-8


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"dim": 4}, "dim must be greater than K = 4"),
        ({"weight_decay": 1.0, "feature_decay": 1.0}, "or zero is the minimum"),
        ({"weight_decay": 0.0}, "weight_decay must be a finite number > 0"),
        ({"bias_decay": 0.0}, "bias_decay must be a finite number > 0"),
        ({"loss": "hinge"}, "loss must be 'ce' or 'mse', got 'hinge'"),
        ({"per_class": 0}, "per_class must be at least 1"),
    ],
)
def test_conditions_of_the_theorem(options: dict[str, Any], message: str) -> None:
    with pytest.raises(InvalidArgumentError, match=message):
        Landscape(**options)


def test_arguments_that_do_not_fit_are_named() -> None:
    landscape = Landscape(num_classes=3, per_class=1, dim=4)
    with pytest.raises(InvalidArgumentError, match=r"vector must have shape \(27,\), got \(3,\)"):
        landscape.value(torch.zeros(3))
    with pytest.raises(InvalidArgumentError, match="rank must be at most dim = 4, got 5"):
        minimize(landscape, rank=5)
