"""In which precision a factorization runs: never under autocast, never in half precision."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor

__all__ = ["full_precision", "working_dtype"]


def working_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype to compute in for inputs of ``dtype``: float32 for the half precisions, else itself."""
    return torch.float32 if dtype in (torch.float16, torch.bfloat16) else dtype


def full_precision(tensor: Tensor) -> AbstractContextManager[object]:
    """Switch autocast off on the device of ``tensor``, so that no product is rounded to half precision."""
    device = tensor.device.type
    return torch.autocast(device, enabled=False) if torch.is_autocast_enabled(device) else nullcontext()
