"""Up to 2 d words: the coordinate axes in both directions."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor
from torch.nn.functional import one_hot

from etflayers.checks import require
from etflayers.codes.code import AntipodalCode

__all__ = ["OrthoplexCode"]


@dataclass(frozen=True)
class OrthoplexCode(AntipodalCode):
    """The axes ``e_1, ..., e_d, -e_1, ..., -e_d``, or the first K of them: no cosine above 0.

    Logits are the features and their negatives. All classes are one piece; it is full for K = 2 d.

    Args:
        num_classes: K from 2 to 2 d.
        in_features: d.

    Raises:
        InvalidArgumentError: K is not in this range.

    Reference:
        Rankin (1955), The closest packing of spherical caps in n dimensions: for more than d + 1 words a
        largest cosine below 0 is impossible.

    >>> OrthoplexCode(3, 2).dense()
    tensor([[ 1.,  0.],
            [ 0.,  1.],
            [-1.,  0.]])
    """

    kind: ClassVar[str] = "orthoplex"
    reason: ClassVar[str] = "optimal for d + 1 < K <= 2 d, and no weight but signs"

    def __post_init__(self) -> None:
        super().__post_init__()
        require(
            self.num_classes <= 2 * self.in_features,
            f"num_classes must be at most 2 * in_features = {2 * self.in_features} for an orthoplex, got "
            f"{self.num_classes}: widen the features, or take another kind of code",
        )

    @property
    def piece_size(self) -> int:
        """``2 d``."""
        return 2 * self.in_features

    @property
    def largest_cosine(self) -> float:
        """0, or -1 for the two words on a line."""
        return -1.0 if self.in_features == 1 else 0.0

    def _words(self, index: Tensor, dtype: torch.dtype) -> Tensor:
        positive, negative = one_hot(index, 2 * self.in_features).chunk(2, dim=-1)
        return (positive - negative).to(dtype)

    def _halves(self, rows: Tensor, start: int, stop: int) -> Tensor:
        return rows.unsqueeze(0)

    def _halves_adjoint(self, cotangent: Tensor, start: int, stop: int) -> Tensor:
        return cotangent.squeeze(0)
