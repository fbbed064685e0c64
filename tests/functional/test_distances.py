"""Nearest ETFs in other distances, with weights and an anchor: closed forms in the limit, loops in numpy."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from etflayers.errors import InvalidArgumentError
from etflayers.functional import huber_nearest_etf, mahalanobis_nearest_etf, nearest_etf
from etflayers.geometry import is_simplex_etf, simplex_etf

K, D = 5, 7
WEIGHTS = torch.tensor([1.0, 0.0, 2.0, 0.5, 1.0], dtype=torch.float64)
PROXIMITY = 0.3


def rand(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


MEANS = rand(K, D, seed=1) + 3
ANCHOR = simplex_etf(K, D, rotation="haar", generator=torch.Generator().manual_seed(2), dtype=torch.float64)
FACTOR = torch.eye(D, dtype=torch.float64) + 0.3 * rand(D, D, seed=3)
OPTIONS: dict[str, Any] = {"weights": WEIGHTS, "anchor": ANCHOR, "proximity": PROXIMITY}


def weighted_size(means: Tensor, weights: Tensor) -> Tensor:
    center = (weights[:, None] * means).sum(0) / weights.sum()
    return ((weights * (means - center).square().sum(-1)).sum() / weights.sum()).sqrt()


def test_with_the_identity_as_metric_it_is_the_plain_problem() -> None:
    expected = nearest_etf(MEANS / weighted_size(MEANS, WEIGHTS), **OPTIONS)
    frame = mahalanobis_nearest_etf(MEANS, torch.eye(D, dtype=torch.float64), **OPTIONS)
    torch.testing.assert_close(frame, expected, rtol=0, atol=1e-8)


def test_with_a_high_threshold_it_is_the_plain_problem() -> None:
    seen = MEANS[WEIGHTS > 0]
    median = seen.median(0).values
    size = (seen - median).norm(dim=-1).median()
    expected = nearest_etf(MEANS / size, **OPTIONS)
    frame = huber_nearest_etf(MEANS, threshold=1e3, **OPTIONS)
    torch.testing.assert_close(frame, expected, rtol=0, atol=1e-8)


def mahalanobis(frame: Tensor) -> float:
    """sum_k omega_k |L'(x_k / r - w_k - t)|^2 + delta |W - A|^2 at the best t, by loops."""
    means, weights, factor = MEANS.numpy(), WEIGHTS.numpy(), FACTOR.numpy()
    size = float(weighted_size(MEANS, WEIGHTS))
    gaps = [means[k] / size - frame.numpy()[k] for k in range(K)]
    center = sum(weights[k] * gaps[k] for k in range(K)) / weights.sum()
    value = sum(weights[k] * np.square(factor.T @ (gaps[k] - center)).sum() for k in range(K))
    return float(value + PROXIMITY * np.square(frame.numpy() - ANCHOR.numpy()).sum())


def huber(frame: Tensor) -> float:
    """sum_k omega_k rho(x_k / r - w_k - t) + delta/2 |W - A|^2, t by many reweightings."""
    weights, tau = WEIGHTS.numpy(), 0.4
    seen = MEANS[WEIGHTS > 0]
    median = seen.median(0).values
    rows = ((MEANS - median) / (seen - median).norm(dim=-1).median()).numpy()
    gaps = rows - frame.numpy()
    center = np.zeros(D)
    for _ in range(200):
        lengths = np.linalg.norm(gaps - center, axis=1)
        shares = weights * np.minimum(1, tau / np.maximum(lengths, 1e-300))
        center = shares @ gaps / shares.sum()
    lengths = np.linalg.norm(gaps - center, axis=1)
    rho = np.where(lengths <= tau, lengths**2 / 2, tau * lengths - tau**2 / 2)
    return float(weights @ rho + PROXIMITY / 2 * np.square(frame.numpy() - ANCHOR.numpy()).sum())


SOLVED: dict[str, tuple[Callable[[Tensor], float], Callable[..., Tensor]]] = {
    "mahalanobis": (mahalanobis, lambda means=MEANS, **o: mahalanobis_nearest_etf(means, FACTOR, **o)),
    "huber": (huber, lambda means=MEANS, **o: huber_nearest_etf(means, threshold=0.4, **o)),
}


@pytest.mark.parametrize("name", SOLVED)
def test_no_frame_nearby_is_better(name: str) -> None:
    value, solve = SOLVED[name]
    frame = solve(**OPTIONS)
    assert is_simplex_etf(frame, atol=1e-10)
    best = value(frame)
    for seed in range(20):
        for step in (1e-3, 1e-2, 0.1):
            other = nearest_etf(frame + step * rand(K, D, seed=seed))
            assert value(other) > best
    assert value(ANCHOR) > best + 0.1


@pytest.mark.parametrize("name", SOLVED)
def test_a_class_without_weight_is_ignored(name: str) -> None:
    _, solve = SOLVED[name]
    moved = MEANS.clone()
    moved[1] = 100.0
    torch.testing.assert_close(solve(moved, **OPTIONS), solve(**OPTIONS), rtol=0, atol=1e-8)


@pytest.mark.parametrize("name", SOLVED)
def test_the_gradient_in_the_means_agrees_with_finite_differences(name: str) -> None:
    _, solve = SOLVED[name]
    means = MEANS.clone().requires_grad_()
    cotangent, direction, step = rand(K, D, seed=8), rand(K, D, seed=9), 1e-6
    (grad,) = torch.autograd.grad((solve(means, **OPTIONS) * cotangent).sum(), means)
    ahead, behind = (solve(MEANS + sign * step * direction, **OPTIONS) for sign in (1, -1))
    slope = ((ahead - behind) * cotangent).sum() / (2 * step)
    torch.testing.assert_close((grad * direction).sum(), slope, rtol=1e-5, atol=1e-8)
    assert not grad[1].any()  # the class without weight


@pytest.mark.parametrize("name", SOLVED)
def test_batches_are_problems_of_their_own(name: str) -> None:
    _, solve = SOLVED[name]
    means = torch.stack((MEANS, rand(K, D, seed=5)))
    weights = torch.stack((WEIGHTS, torch.ones(K, dtype=torch.float64)))
    frames = solve(means, weights=weights, anchor=ANCHOR, proximity=PROXIMITY)
    for i in range(2):
        single = solve(means[i], weights=weights[i], anchor=ANCHOR, proximity=PROXIMITY)
        torch.testing.assert_close(frames[i], single, rtol=0, atol=1e-8)


@pytest.mark.parametrize("name", SOLVED)
def test_where_nothing_has_been_seen_the_anchor_decides(name: str) -> None:
    _, solve = SOLVED[name]
    for weights in (torch.zeros(K), torch.eye(K)[2]):
        frame = solve(torch.zeros(K, D, dtype=torch.float64), **{**OPTIONS, "weights": weights.double()})
        torch.testing.assert_close(frame, ANCHOR, rtol=0, atol=1e-8)


@pytest.mark.parametrize("name", SOLVED)
def test_bad_arguments_are_named(name: str) -> None:
    _, solve = SOLVED[name]
    for options, message in [
        ({"weights": -WEIGHTS}, "weights must not be negative"),
        ({"weights": WEIGHTS[:3]}, "weights must have shape"),
        ({"proximity": 0.1}, "anchor is needed with proximity=0.1"),
        ({"anchor": ANCHOR[:2], "proximity": 0.1}, "anchor must have shape"),
        ({"anchor": ANCHOR, "proximity": -1.0}, "proximity must be a finite number >= 0"),
    ]:
        with pytest.raises(InvalidArgumentError, match=message):
            solve(**options)
    with pytest.raises(InvalidArgumentError, match=r"means must differ .* or give anchor="):
        solve(torch.ones(K, D, dtype=torch.float64))
