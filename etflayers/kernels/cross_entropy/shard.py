r"""What a shard of the classes contributes to the losses of a batch, and its part of their gradient.

For logits ``a z_k`` with a factor a > 0, smoothing e and a target y, over all K classes,

    l = L - (1 - e) a (z_y - m) - e a mean_k(z_k - m),     L = log sum_k exp(a (z_k - m)),     m = max_k z_k.

The classes enter only through a maximum and three sums over k. So any set S of classes can be summed up by

    m_S = max z_k,   s_S = sum exp(a (z_k - m_S)),   t_S = sum (z_k - m_S),   o_S = z_y if y is in S, else 0,

and sets that have no class in common join, by way of any other shift m:

    s = sum_S s_S exp(a (m_S - m)),   t = sum_S (t_S + |S| (m_S - m)),   o = sum_S o_S.

The same rule joins the few classes whose logits exist at a time and the shards of the ranks. On the way back
the logits are made again: ``dl/dz_k = a (p_k - (1 - e) [k = y] - e / K)`` with ``p_k = exp(a (z_k - m) - L)``
needs from the other sets no more than m and L.

Symbols: m <-> shifts, s <-> exponentials, t <-> deviations, o <-> own, |S| <-> size, a <-> factor,
e <-> smoothing.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

import torch
from torch import Tensor

from etflayers.precision import working_dtype

__all__ = ["ShardSums", "class_parts", "shard_gradient", "shard_sums"]

# Logits that exist at a time, on a CPU and elsewhere: large enough to be efficient there.
_CPU_ENTRIES, _ENTRIES = 2**20, 2**25


class ShardSums(NamedTuple):
    """m_S, s_S, t_S and o_S of a set S of classes, ``(B,)`` each, and its size."""

    shifts: Tensor
    exponentials: Tensor
    deviations: Tensor
    own: Tensor
    size: int

    def about(self, shifts: Tensor, factor: float) -> ShardSums:
        """The same sums about other shifts m."""
        if self.size == 0:
            return self._replace(shifts=shifts)
        gap = self.shifts - shifts
        return ShardSums(
            shifts,
            self.exponentials * (factor * gap).exp(),
            self.deviations + self.size * gap,
            self.own,
            self.size,
        )


def class_parts(batch: int, width: int, count: int, device: torch.device, size: int | None) -> list[slice]:
    """The classes of a shard, in slices of which the logits exist at a time.

    They are slices of classes and not of samples, so that each row of the weight, which is the largest of all
    tensors here, is read once and its gradient written once. By default a slice of d classes is always
    allowed: its logits are no more than the features.

    Args:
        batch: B.
        width: d.
        count: number of classes in the shard.
        device: of the features.
        size: classes in a slice; ``None``: as many as keep the device busy.
    """
    if size is None:
        entries = _CPU_ENTRIES if device.type == "cpu" else _ENTRIES
        size = max(entries // max(batch, 1), width)
    return [slice(i, min(i + size, count)) for i in range(0, count, size)]


def shard_sums(
    logits: Iterable[tuple[int, Tensor]],
    targets: Tensor,
    factor: float,
    dtype: torch.dtype,
    *,
    deviations: bool,
) -> ShardSums:
    """Sum up the classes of a shard.

    Args:
        logits: z, some classes at a time: the first class and ``(B, k)``.
        targets: y, ``(B,)`` int64; one that is no class of the shard has no influence.
        factor: a.
        dtype: of the sums.
        deviations: whether t_S is needed, as it is with smoothing; otherwise it is 0.
    """
    nothing = torch.zeros(targets.shape, device=targets.device, dtype=dtype)
    lowest = torch.finfo(dtype).min  # and not -inf, whose difference with itself is NaN
    total = ShardSums(torch.full_like(nothing, lowest), nothing, nothing, nothing, 0)
    for first, part in logits:
        z = part.to(dtype)
        shifts = z.amax(-1).clamp(min=lowest)
        inside, index = _own(targets, first, z.shape[-1])
        own = torch.where(inside, z.gather(-1, index.unsqueeze(-1)).squeeze(-1), 0)
        gaps = z - shifts.unsqueeze(-1)
        sums = gaps.sum(-1) if deviations else nothing
        piece = ShardSums(shifts, gaps.mul_(factor).exp_().sum(-1), sums, own, z.shape[-1])
        total = _joined(total, piece, factor)
    return total


def _joined(first: ShardSums, second: ShardSums, factor: float) -> ShardSums:
    shifts = torch.maximum(first.shifts, second.shifts)
    a, b = first.about(shifts, factor), second.about(shifts, factor)
    return ShardSums(
        shifts,
        a.exponentials + b.exponentials,
        a.deviations + b.deviations,
        a.own + b.own,
        a.size + b.size,
    )


def shard_gradient(
    z: Tensor,
    first: int,
    targets: Tensor,
    shifts: Tensor,
    logs: Tensor,
    grad: Tensor,
    num_classes: int,
    factor: float,
    smoothing: float,
) -> Tensor:
    """The gradient ``(B, k)`` in the logits z of some classes, for a cotangent ``(B,)`` of the losses.

    Args:
        z: ``(B, k)``.
        first: the first of the k classes.
        targets: y, ``(B,)`` int64.
        shifts: m, ``(B,)``, over all classes.
        logs: L, ``(B,)``, over all classes.
        grad: 0 for the samples that are ignored.
        num_classes: K.
        factor: a.
        smoothing: e.
    """
    change = (
        (z.to(working_dtype(z.dtype)) - shifts.unsqueeze(-1)).mul_(factor).sub_(logs.unsqueeze(-1)).exp_()
    )
    if smoothing > 0:
        change -= smoothing / num_classes
    inside, index = _own(targets, first, z.shape[-1])
    change.scatter_add_(-1, index.unsqueeze(-1), (inside * (smoothing - 1.0)).to(change.dtype).unsqueeze(-1))
    change *= (factor * grad).unsqueeze(-1)
    # What is ignored has no gradient, whatever its features hold.
    return change.masked_fill_((grad == 0).unsqueeze(-1), 0).to(z.dtype)


def _own(targets: Tensor, first: int, count: int) -> tuple[Tensor, Tensor]:
    """Which targets are among the ``count`` classes from ``first`` on, and where (0 for the others)."""
    inside = (targets >= first) & (targets < first + count)
    return inside, torch.where(inside, targets - first, 0)
