"""Any unit vectors as a code, such as those that an optimization has found."""

from __future__ import annotations

from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from etflayers._torch import is_concrete
from etflayers.checks import require, require_finite
from etflayers.codes.code import SphericalCode
from etflayers.codes.measures import coherence, require_rows
from etflayers.geometry.tolerance import default_atol

__all__ = ["DenseCode"]

# Classes in a piece: many enough for a product of matrices to run at full speed.
_PIECE = 1024


class DenseCode(SphericalCode):
    """A code whose words are the rows of a given matrix; logits are products with it.

    Two such codes are equal only if they are the same object. A piece is 1024 classes.

    Args:
        rows: ``(K, d)``, unit rows, K >= 2; copied.
        kind: the name of such codes.
        reason: one clause on what the code is good for.

    Attributes:
        rows: the copy, not to be changed.

    Raises:
        InvalidArgumentError: no matrix of K >= 2 rows, or rows that are not of length 1.

    >>> code = DenseCode(torch.tensor([[1.0, 0.0], [0.6, 0.8]]))
    >>> round(code.largest_cosine, 4), code.logits(torch.tensor([0.0, 5.0]))
    (0.6, tensor([0., 4.]))
    """

    rows: Tensor

    def __init__(self, rows: Tensor, *, kind: str = "dense", reason: str = "given as a matrix") -> None:
        require_rows(rows)
        require_finite(rows, "rows hold NaN or infinity: a word must be a unit vector")
        lengths = torch.linalg.vector_norm(rows.detach().double(), dim=-1)
        off, atol = float((lengths - 1).abs().max()), default_atol(rows.dtype)
        require(
            off <= atol,
            f"rows must be unit vectors, but a length differs from 1 by {off:.3g}: divide by the lengths",
        )
        # The base is a frozen dataclass.
        for name, value in {
            "num_classes": rows.shape[0],
            "in_features": rows.shape[1],
            "rows": rows.detach().clone(),
            "kind": kind,
            "reason": reason,
            "_kept": {},
        }.items():
            object.__setattr__(self, name, value)

    __eq__ = object.__eq__
    __hash__ = object.__hash__

    def __repr__(self) -> str:
        return (
            f"DenseCode(num_classes={self.num_classes}, in_features={self.in_features}, kind={self.kind!r})"
        )

    def __getstate__(self) -> dict[str, Any]:
        """All but the copies of the rows on other devices."""
        return {**self.__dict__, "_kept": {}}

    @property
    def piece_size(self) -> int:
        """1024, or K where that is less."""
        return min(self.num_classes, _PIECE)

    @cached_property
    def largest_cosine(self) -> float:
        """Measured once, in float64."""
        return float(coherence(self.rows.double()))

    def _words(self, index: Tensor, dtype: torch.dtype) -> Tensor:
        return self._rows_like(index, dtype)[index]

    def _products(self, rows: Tensor, start: int, stop: int) -> Tensor:
        return rows @ self._rows_like(rows, rows.dtype)[start * self.piece_size : stop * self.piece_size].mT

    def _adjoint(self, cotangent: Tensor, start: int, stop: int) -> Tensor:
        width = self._width(start, stop)
        first = start * self.piece_size
        return cotangent[..., :width] @ self._rows_like(cotangent, cotangent.dtype)[first : first + width]

    def _rows_like(self, like: Tensor, dtype: torch.dtype) -> Tensor:
        """The rows on a device in a dtype, copied there once."""
        kept: dict[tuple[torch.device, torch.dtype], Tensor] = self.__dict__["_kept"]
        key = like.device, dtype
        if key in kept and (torch.compiler.is_dynamo_compiling() or is_concrete(like)):
            return kept[key]
        with torch.inference_mode(False):
            rows = self.rows.to(like.device, dtype)
        if is_concrete(like):
            kept[key] = rows
        return rows
