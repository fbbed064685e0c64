r"""How far a running class mean moves towards the mean of a batch: ``m_k <- m_k + a_k (batch mean - m_k)``.

With n_k samples of class k in the batch, N_k before it, and u_k batches that held the class before it,

    a_k = 0 where n_k = 0, and otherwise
    a number a:      a, but 1 the first time that the class occurs;
    None:            n_k / (N_k + n_k), which makes m_k the mean of all samples;
    "2/(t+1)":       2 / (t + 1) with t = u_k + 1, and never less than 1e-4, below which the mean would stop
                     following the features (Markou, Ajanthan, Gould 2024, arXiv 2411.01248).

Soft targets make n_k a mass, the sum of shares of samples. Where it is less than one sample, the first and
the last of these are multiplied by it (the second has n_k in it): a thousandth of a sample is no reason for
the step of a whole one.

n_k <-> batch_counts, N_k <-> counts, u_k <-> updates, a_k <-> momentum_steps.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from etflayers.checks import require

__all__ = ["PUBLISHED_SCHEDULE", "SMALLEST_STEP", "Momentum", "momentum_steps", "require_momentum"]

Momentum = float | Literal["2/(t+1)"] | None
"""A fixed step, the published schedule, or ``None`` for the cumulative mean."""

PUBLISHED_SCHEDULE: Literal["2/(t+1)"] = "2/(t+1)"
SMALLEST_STEP = 1e-4


def require_momentum(momentum: Momentum) -> None:
    """Raise unless ``momentum`` is a number in (0, 1], ``None`` or ``"2/(t+1)"``."""
    number = isinstance(momentum, (int, float)) and not isinstance(momentum, bool) and 0 < momentum <= 1
    require(
        number or momentum is None or momentum == PUBLISHED_SCHEDULE,
        f"momentum must be a number in (0, 1], None or {PUBLISHED_SCHEDULE!r}, got {momentum!r}",
    )


def momentum_steps(
    momentum: Momentum, batch_counts: Tensor, counts: Tensor, updates: Tensor, dtype: torch.dtype
) -> Tensor:
    """The steps a_k.

    Args:
        momentum: the schedule.
        batch_counts: n_k, ``(K,)``, samples of each class in the batch, or their mass.
        counts: N_k, ``(K,)``, samples before it.
        updates: u_k, ``(K,)``, batches with the class before it.
        dtype: of the steps.

    Returns:
        ``(K,)``, in [0, 1].

    >>> batch, before = torch.tensor([3, 1, 0]), torch.tensor([9, 0, 4])
    >>> momentum_steps(None, batch, before, before, torch.float32)
    tensor([0.2500, 1.0000, 0.0000])
    """
    if momentum is None:
        return batch_counts.to(dtype) / (counts + batch_counts).clamp(min=1)
    if isinstance(momentum, str):
        step = (2 / (updates.to(dtype) + 2)).clamp(min=SMALLEST_STEP)
    else:
        step = torch.full_like(counts, momentum, dtype=dtype)
    return torch.where(counts > 0, step * batch_counts.to(dtype).clamp(max=1), 1) * (batch_counts > 0)
