r"""Soft targets: a probability of every class for each sample, as mixup, cutmix or a teacher gives them.

    P is (B, K) with P[i, k] >= 0 and sum_k P[i, k] = 1.        P <-> targets, K <-> num_classes

A class index y is the row that is 1 at y and 0 elsewhere, so that what is linear in that row keeps its
meaning: the sum of a class is ``s_k = sum_i P[i, k] f_i``, and the number of its samples becomes its mass,
``n_k = sum_i P[i, k]``.
"""

from __future__ import annotations

import torch
from torch import Tensor

from etflayers.checks import reads_values, require, require_values
from etflayers.precision import working_dtype

__all__ = ["are_soft", "require_soft_shape", "require_soft_targets"]


def are_soft(targets: object) -> bool:
    """Whether ``targets`` are probabilities, which is a matter of their dtype: class indices are integers."""
    return isinstance(targets, Tensor) and targets.dtype.is_floating_point


def require_soft_shape(targets: Tensor, leading: torch.Size, num_classes: int) -> None:
    """Raise unless ``targets`` have the shape ``(*leading, K)``; no value is looked at."""
    expected = (*leading, num_classes)
    require(
        targets.shape == expected,
        f"targets must be integers (class indices), got {targets.dtype} of shape {tuple(targets.shape)}: "
        "convert them with .long(); or probabilities of the classes, of shape (..., num_classes) = "
        f"{expected}",
    )


def require_soft_targets(targets: Tensor, leading: torch.Size, num_classes: int) -> None:
    """Raise unless ``targets`` are probabilities of shape ``(*leading, K)``.

    Args:
        targets: P.
        leading: shape of the features without their last dimension.
        num_classes: K.

    Raises:
        InvalidArgumentError: another shape, a row with NaN or a negative number, or a row whose sum is not 1
            up to the rounding of its dtype.
    """
    require_soft_shape(targets, leading, num_classes)
    if targets.numel() == 0:
        return
    rows = targets.detach().to(working_dtype(targets.dtype))
    # Entries rounded to this dtype are wrong by half of eps times themselves, and sum to 1 up to that.
    tolerance = 2 * torch.finfo(targets.dtype).eps + 1e-5
    lowest, off = rows.amin(), (rows.sum(-1) - 1).abs().amax()
    are_probabilities = (lowest >= 0) & (off <= tolerance)  # both false for NaN
    received = ""
    if reads_values(are_probabilities) and not bool(are_probabilities):
        received = (
            f", got entries from {float(lowest):.3g} on and sums that are off by up to {float(off):.3g}"
        )
    require_values(
        are_probabilities,
        "targets with a floating-point dtype must be probabilities, not negative and with rows that sum to "
        f"1{received}: several labels of one sample need their shares, for instance "
        "targets / targets.sum(-1, keepdim=True)",
    )
