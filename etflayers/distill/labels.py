"""Class indices, of whatever integer dtype they come in."""

from __future__ import annotations

import torch
from torch import Tensor

from etflayers.errors import InvalidArgumentError

__all__ = ["class_indices"]


def class_indices(name: str, value: Tensor) -> Tensor:
    """The class indices in int64, which PyTorch compares and counts without surprises, or an error.

    >>> class_indices("targets", torch.tensor([0, 2], dtype=torch.uint16))
    tensor([0, 2])
    """
    if not isinstance(value, Tensor):
        raise InvalidArgumentError(
            f"{name} must be a tensor, got {type(value).__name__}: torch.as_tensor makes one of it"
        )
    if value.dtype.is_floating_point or value.dtype.is_complex or value.dtype == torch.bool:
        raise InvalidArgumentError(
            f"{name} must be integers (class indices), got {value.dtype}: use .long(), or "
            ".argmax(-1) for one-hot vectors"
        )
    return value.long()
