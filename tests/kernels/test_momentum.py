"""The schedule of a running class mean, against its definition sample by sample and batch by batch."""

from __future__ import annotations

import math

import pytest
import torch

from etflayers.errors import InvalidArgumentError
from etflayers.kernels.class_sums import (
    Momentum,
    class_averages_reference,
    momentum_steps,
    require_momentum,
)
from etflayers.nn import FeatureMovingAverage

SCHEDULES: list[Momentum] = [0.3, 1.0, None, "2/(t+1)"]


def step_of(momentum: Momentum, in_batch: int, before: int, batches: int) -> float:
    """One class, in plain numbers."""
    if in_batch == 0:
        return 0.0
    if momentum is None:
        return in_batch / (in_batch + before)
    if isinstance(momentum, str):
        return max(2 / (batches + 1 + 1), 1e-4)
    return momentum if before > 0 else 1.0


@pytest.mark.parametrize("momentum", SCHEDULES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_steps_by_their_definition(momentum: Momentum, dtype: torch.dtype) -> None:
    batch, before, batches = [3, 0, 1, 2, 1], [9, 4, 0, 1, 10**6], [2, 1, 0, 1, 10**6]
    found = momentum_steps(momentum, *(torch.tensor(counts) for counts in (batch, before, batches)), dtype)
    expected = [step_of(momentum, *row) for row in zip(batch, before, batches, strict=True)]
    torch.testing.assert_close(found, torch.tensor(expected, dtype=dtype))


@pytest.mark.parametrize("momentum", SCHEDULES)
def test_the_reference_is_the_average_of_the_module(momentum: Momentum) -> None:
    module = FeatureMovingAverage(4, 3, momentum=momentum, dtype=torch.float64)
    state = (module.means.clone(), module.counts.clone(), module.updates.clone())
    for _ in range(4):
        features = torch.randn(7, 4, dtype=torch.float64)
        targets = torch.randint(3, (7,))
        ignored = torch.arange(7) == 2
        state = class_averages_reference(features, targets, *state, ignored, momentum)
        module(features, torch.where(ignored, -100, targets))
    for mine, theirs in zip(state, (module.means, module.counts, module.updates), strict=True):
        torch.testing.assert_close(mine, theirs)


def test_the_cumulative_one_is_the_mean_of_all_samples() -> None:
    features, targets = torch.randn(4, 6, 3, dtype=torch.float64), torch.randint(2, (4, 6))
    zeros = torch.zeros(2, dtype=torch.int64)
    state = (torch.zeros(2, 3, dtype=torch.float64), zeros, zeros)
    for f, y in zip(features, targets, strict=True):
        state = class_averages_reference(f, y, *state, torch.zeros(6, dtype=torch.bool), None)
    expected = [features[targets == k].mean(0) for k in range(2)]
    torch.testing.assert_close(state[0], torch.stack(expected))


@pytest.mark.parametrize("wrong", [0, -0.1, 1.1, math.nan, "2/t", True, [0.1]])
def test_what_is_no_momentum_is_refused(wrong: object) -> None:
    with pytest.raises(
        InvalidArgumentError, match=r"momentum must be a number in \(0, 1\], None or '2/\(t\+1\)'"
    ):
        require_momentum(wrong)  # type: ignore[arg-type]
    for right in SCHEDULES:
        require_momentum(right)
