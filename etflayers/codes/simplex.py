"""Up to d + 1 words: the regular simplex, which no other code of that size is as good as."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor
from torch.nn.functional import one_hot

from etflayers.codes.code import SphericalCode
from etflayers.geometry import canonical_etf_adjoint, canonical_etf_logits, require_etf_dims

__all__ = ["SimplexCode"]


@dataclass(frozen=True)
class SimplexCode(SphericalCode):
    """The canonical simplex ETF: K <= d + 1 unit vectors with all cosines ``-1/(K-1)``.

    The words are ``etflayers.simplex_etf(K, d)`` and are never stored: logits take a slice, a mean and a
    scale. All classes are one piece.

    Args:
        num_classes: K >= 2.
        in_features: d >= K - 1.

    Raises:
        InvalidArgumentError: K < 2 or d < K - 1.

    Reference:
        Rankin (1955), The closest packing of spherical caps in n dimensions, for optimality.

    >>> code = SimplexCode(3, 2)
    >>> code.describe()
    'simplex: 3 unit vectors in R^2 with largest cosine -0.5, where none can have less than -0.5; optimal
    for K <= d + 1, and all pairs of classes are alike.'
    """

    kind: ClassVar[str] = "simplex"
    reason: ClassVar[str] = "optimal for K <= d + 1, and all pairs of classes are alike"

    def __post_init__(self) -> None:
        super().__post_init__()
        require_etf_dims(self.num_classes, self.in_features)

    @property
    def piece_size(self) -> int:
        """K: all classes are one piece, no wider than the features and one."""
        return self.num_classes

    @property
    def largest_cosine(self) -> float:
        """``-1/(K-1)``, the only cosine."""
        return -1 / (self.num_classes - 1)

    def _words(self, index: Tensor, dtype: torch.dtype) -> Tensor:
        return canonical_etf_adjoint(one_hot(index, self.num_classes).to(dtype), self.in_features)

    def _products(self, rows: Tensor, start: int, stop: int) -> Tensor:
        return canonical_etf_logits(rows, self.num_classes)

    def _adjoint(self, cotangent: Tensor, start: int, stop: int) -> Tensor:
        return canonical_etf_adjoint(cotangent, self.in_features)
