r"""The d (d - 1) roots of the lattice A_{d-1}: a class for each ordered pair of coordinates.

The words are ``(e_i - e_j) / sqrt 2`` for i != j. They lie in the d - 1 dimensions orthogonal to (1, ..., 1):
a width of n + 1 gives the n (n + 1) roots of A_n. Two words with a common first or a common last coordinate
have cosine 1/2, and no others are closer.

The class number is cyclic, so that a logit is a difference of the features and the features rotated: class
``(s - 1) d + i`` with s = 1, ..., d - 1 has ``j = i + s mod d``.

Symbols: d <-> in_features, i <-> first, j <-> last, s <-> 1 + number of the piece.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor
from torch.nn.functional import one_hot

from etflayers.checks import require
from etflayers.codes.code import SphericalCode

__all__ = ["RootCode"]


@dataclass(frozen=True)
class RootCode(SphericalCode):
    r"""The roots ``(e_i - e_j) / sqrt 2`` of A_{d-1} in d coordinates: up to d (d - 1) words, cosines to 1/2.

    The features have the full width d, one more than the dimension of the lattice; what all coordinates have
    in common has no influence. With all classes the predicted one is ``(argmax f, argmin f)``, found in O(d).
    A piece is the d words of one cyclic distance from i to j, so that a part of the classes uses all
    coordinates alike.

    Args:
        num_classes: K from 2 to d (d - 1).
        in_features: d >= 2, the number of coordinates.

    Raises:
        InvalidArgumentError: K is not in this range.

    Reference:
        Conway, Sloane (1999), Sphere Packings, Lattices and Groups, chapter 4; as labels: arXiv 2510.04090.

    >>> code = RootCode(6, 3)
    >>> code.dense() * 2**0.5
    tensor([[ 1., -1.,  0.],
            [ 0.,  1., -1.],
            [-1.,  0.,  1.],
            [ 1.,  0., -1.],
            [-1.,  1.,  0.],
            [ 0., -1.,  1.]])
    >>> code.predict(torch.tensor([5.0, 1.0, 2.0])), code.pair(torch.tensor(0))
    (tensor(0), (tensor(0), tensor(1)))
    """

    kind: ClassVar[str] = "roots"
    reason: ClassVar[str] = "a class for each ordered pair of coordinates, predicted in O(d)"

    def __post_init__(self) -> None:
        super().__post_init__()
        most = self.in_features * (self.in_features - 1)
        require(
            self.num_classes <= most,
            f"num_classes must be at most in_features * (in_features - 1) = {most} for roots, got "
            f"{self.num_classes}: widen the features, or take another kind of code",
        )

    @property
    def piece_size(self) -> int:
        """``d``, the words of one cyclic distance."""
        return self.in_features

    @property
    def dimension(self) -> int:
        """``d - 1``: all words are orthogonal to (1, ..., 1)."""
        return self.in_features - 1

    @property
    def largest_cosine(self) -> float:
        """1/2, where two words have a coordinate in common at the same end; else 0, or less."""
        d = self.in_features
        if self.num_classes > d > 2:
            return 0.5
        # One cyclic distance alone: neighbors (i, i+1) and (i+1, i+2) have -1/2, others 0.
        return -1.0 if d == 2 else -0.5 if d == 3 or self.num_classes == 2 else 0.0

    def pair(self, labels: Tensor) -> tuple[Tensor, Tensor]:
        """The coordinates (i, j) of classes: the largest and the smallest one of their words."""
        first = labels % self.in_features
        return first, (first + labels // self.in_features + 1) % self.in_features

    def predict(self, features: Tensor) -> Tensor:
        """The class of the largest logit: with all classes, of the largest and the smallest coordinate.

        Args:
            features: f, ``(..., d)``.

        Returns:
            ``(...)``, int64.
        """
        d = self.in_features
        if self.num_classes < d * (d - 1):
            return super().predict(features)
        rows = self._rows(features.detach())
        first = rows.argmax(-1)
        # Where all coordinates are equal the two coincide, and any class will do.
        distance = ((rows.argmin(-1) - first) % d).clamp_min(1)
        return (distance - 1) * d + first

    def _words(self, index: Tensor, dtype: torch.dtype) -> Tensor:
        first, last = (one_hot(place, self.in_features).to(dtype) for place in self.pair(index))
        return (first - last) * math.sqrt(0.5)

    def _products(self, rows: Tensor, start: int, stop: int) -> Tensor:
        d, device = self.in_features, rows.device
        distances = torch.arange(start + 1, stop + 1, device=device).unsqueeze(-1)
        rotated = rows[..., (torch.arange(d, device=device) + distances) % d]
        return ((rows.unsqueeze(-2) - rotated) * math.sqrt(0.5)).flatten(-2)

    def _adjoint(self, cotangent: Tensor, start: int, stop: int) -> Tensor:
        d, device = self.in_features, cotangent.device
        # Row s of the cotangent belongs to the words from i to i + s; coordinate j ends the one from j - s.
        distances = torch.arange(start + 1, stop + 1, device=device).unsqueeze(-1)
        places = (torch.arange(d, device=device) - distances) % d + (distances - start - 1) * d
        ending = cotangent[..., places]
        difference = cotangent.reshape(ending.shape) - ending
        return difference.sum(-2) * math.sqrt(0.5)
