"""In which precision a factorization runs (no autocast, no half precision), and what that allows."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor

from etflayers._torch import assume_constant_result

__all__ = [
    "autocast_dtype",
    "default_tolerance",
    "full_precision",
    "linear_dtype",
    "smallest_divisor",
    "working_dtype",
]


def working_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype to compute in for inputs of ``dtype``: float32 for the half precisions, else itself."""
    return torch.float32 if dtype in (torch.float16, torch.bfloat16) else dtype


@assume_constant_result  # Dynamo of PyTorch 2.6 cannot look into it
def _has_autocast(device: str) -> bool:
    return torch.amp.is_autocast_available(device)


def autocast_dtype(device: str) -> torch.dtype | None:
    """The dtype that autocast has products computed in on a device of this type, where it is on.

    On a type without autocast, such as ``meta``, ``torch.is_autocast_enabled`` raises instead of answering.
    """
    if not _has_autocast(device) or not torch.is_autocast_enabled(device):
        return None
    return torch.get_autocast_dtype(device)


def linear_dtype(features: Tensor) -> torch.dtype:
    """The dtype that ``F.linear`` returns for ``features``: autocast's, where that is on, or their own."""
    dtype = autocast_dtype(features.device.type)
    # Autocast leaves float64 alone.
    return features.dtype if dtype is None or features.dtype == torch.float64 else dtype


def smallest_divisor(dtype: torch.dtype) -> float:
    """A number so small that a gradient divided by a smaller one overflows data of precision ``dtype``."""
    return float(torch.finfo(dtype).tiny ** 0.75)


def default_tolerance(dtype: torch.dtype) -> float:
    """How small a gradient, or the residual of a linear system, rounding lets us ask for: eps^(3/4).

    >>> f"{default_tolerance(torch.float64):.0e}, {default_tolerance(torch.float32):.0e}"
    '2e-12, 6e-06'
    """
    return float(torch.finfo(dtype).eps ** 0.75)


def full_precision(tensor: Tensor) -> AbstractContextManager[object]:
    """Switch autocast off on the device of ``tensor``, so that no product is rounded to half precision."""
    device = tensor.device.type
    return nullcontext() if autocast_dtype(device) is None else torch.autocast(device, enabled=False)
