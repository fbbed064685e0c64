"""Class indices, of whatever integer dtype they come in."""

from __future__ import annotations

from torch import Tensor

from etflayers.functional.class_means import require_class_indices

__all__ = ["class_indices"]


def class_indices(name: str, value: Tensor) -> Tensor:
    """The class indices in int64, which PyTorch compares and counts without surprises, or an error.

    >>> import torch
    >>> class_indices("targets", torch.tensor([0, 2], dtype=torch.uint16))
    tensor([0, 2])
    """
    require_class_indices(value, name)
    return value.long()
