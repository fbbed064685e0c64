r"""Class sums and running class means in plain PyTorch.

F <-> features, y <-> targets, s_k <-> sums, n_k <-> batch_counts, m_k <-> means.
"""

from __future__ import annotations

import torch
from torch import Tensor

from etflayers.kernels.class_sums.momentum import Momentum, momentum_steps
from etflayers.precision import full_precision, working_dtype

__all__ = ["class_averages_reference", "class_sums_reference"]


def class_sums_reference(
    features: Tensor, targets: Tensor, num_classes: int, ignored: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    r"""Sums and counts of each class as one product with the one-hot matrix of the targets.

    With T (B x K), ``T[i, k] = 1`` where sample i has class k, the sums are T'F and the counts 1'T. A product
    is deterministic where a scatter adds with float atomics in any order, and it reads no value on the host.
    A row that is ignored is a zero row of T and drops out by itself.

    With more classes than samples T would be the largest tensor of a training step, as large as all logits.
    On a CPU, where a scatter adds in the order of the samples, the rows are then scattered.

    Args:
        features: F, ``(B, d)``, finite.
        targets: ``(B,)``, integers.
        num_classes: K.
        ignored: ``(B,)`` bool, or ``None`` where nothing is.

    Returns:
        The sums ``(K, d)``, float32 or better, and the counts ``(K,)``, int64.
    """
    dtype = working_dtype(features.dtype)
    if num_classes > len(features) and features.device.type == "cpu":
        index, rows, ones = targets.long(), features.to(dtype), torch.ones(len(features), dtype=torch.int64)
        if ignored is not None:
            index, ones = torch.where(ignored, 0, index), (~ignored).long()
            rows = torch.where(ignored.unsqueeze(-1), 0, rows)
        counts = torch.zeros(num_classes, dtype=torch.int64).index_add(0, index, ones)
        return rows.new_zeros(num_classes, rows.shape[-1]).index_add(0, index, rows), counts
    classes = torch.arange(num_classes, device=features.device)
    labels = targets.long() if ignored is None else torch.where(ignored, -1, targets.long())
    members = labels.unsqueeze(-1) == classes
    with full_precision(features):
        sums = members.to(dtype).mT @ features.to(dtype)
    return sums, members.sum(0)


def class_averages_reference(
    features: Tensor,
    targets: Tensor,
    means: Tensor,
    counts: Tensor,
    updates: Tensor,
    ignored: Tensor,
    momentum: Momentum,
) -> tuple[Tensor, Tensor, Tensor]:
    """Class means, counts and updates after a batch, ``m_k + a_k (s_k / n_k - m_k)``.

    Args:
        features: ``(B, d)``, finite.
        targets: ``(B,)``, integers.
        means: m, ``(K, d)``.
        counts: ``(K,)`` int64, samples before the batch.
        updates: ``(K,)`` int64, batches with the class before this one.
        ignored: ``(B,)`` bool.
        momentum: of the average.

    Returns:
        The new means ``(K, d)``, counts and updates ``(K,)``.
    """
    sums, batch_counts = class_sums_reference(features, targets, means.shape[0], ignored)
    batch_means = sums / batch_counts.clamp(min=1).unsqueeze(-1)
    steps = momentum_steps(momentum, batch_counts, counts, updates, batch_means.dtype).unsqueeze(-1)
    return means + steps * (batch_means - means), counts + batch_counts, updates + (batch_counts > 0)
