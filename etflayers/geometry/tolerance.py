"""What a geometric predicate answers, and how exact it asks a tensor of each precision to be."""

from __future__ import annotations

from typing import NamedTuple

import torch

__all__ = ["Check", "default_atol"]

_ATOL = {torch.float64: 1e-11, torch.float32: 1e-5, torch.float16: 1e-2, torch.bfloat16: 5e-2}


class Check(NamedTuple):
    """The answer of a predicate, true or false as the answer is, and the reason for it.

    >>> "yes" if Check(False, "a row has length 2") else "no"
    'no'
    """

    ok: bool
    reason: str

    def __bool__(self) -> bool:
        """The answer, where a tuple of two would always be true."""
        return self.ok


def default_atol(dtype: torch.dtype) -> float:
    """Largest deviation of an inner product of unit vectors that rounding to ``dtype`` explains."""
    return _ATOL[dtype]
