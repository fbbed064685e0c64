r"""What a spherical code can do: give its words, and take inner products with them a piece at a time.

A spherical code is a set of K unit vectors, the *words*, one for each class. It is good for classification if
its largest cosine, between two different words, is small: signed, because a word far on the other side
disturbs nobody. W is the K x d matrix of the words, and the logits of features f are ``W f``.

The classes lie in *pieces*: runs of equal length, in order, of which only the last may be shorter. A loss
that must not hold all B x K logits takes a few pieces at a time, there (``piece_logits``) and back
(``piece_adjoint``). In an *antipodal* code every full piece is m words followed by their negatives, so that
one product gives the logits of both: ``half_logits``.

Symbols: K <-> num_classes, d <-> in_features, W <-> dense(), f <-> features, m <-> half of piece_size.
"""

from __future__ import annotations

import operator
from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from etflayers.checks import require, require_floating, require_size, require_values
from etflayers.codes.bounds import coherence_bound
from etflayers.codes.largest import largest, largest_k
from etflayers.errors import InvalidArgumentError
from etflayers.precision import full_precision, linear_dtype, working_dtype

__all__ = ["AntipodalCode", "SphericalCode"]

# Logits that `predict` makes of a sample at a time.
_AT_A_TIME = 4096


@dataclass(frozen=True)
class SphericalCode(ABC):
    """K unit vectors in R^d, one for each class; an immutable value that can be compared and pickled.

    A subclass says what its words are (:meth:`_words`) and how inner products with whole pieces of them are
    taken, there and back (:meth:`_products`, :meth:`_adjoint`).

    Attributes:
        num_classes: K >= 2.
        in_features: d, the width of the features.
        kind: the name by which :func:`etflayers.codes.find_code` knows such codes.
        reason: one clause on what such a code is good for.
        antipodal: whether every full piece is m words followed by their negatives.
    """

    num_classes: int
    in_features: int

    kind: ClassVar[str]
    reason: ClassVar[str]
    antipodal: ClassVar[bool] = False

    def __post_init__(self) -> None:
        require_size("num_classes", self.num_classes, at_least=2)
        require_size("in_features", self.in_features)
        for name in ("num_classes", "in_features"):  # no integers of NumPy: some have fewer methods
            object.__setattr__(self, name, operator.index(getattr(self, name)))

    # --- what a subclass says ---

    @property
    @abstractmethod
    def piece_size(self) -> int:
        """Classes in a full piece."""

    @property
    @abstractmethod
    def largest_cosine(self) -> float:
        """The largest cosine between two different words."""

    @property
    def dimension(self) -> int:
        """Of the space that the words span at most: d, if a subclass does not know better."""
        return self.in_features

    @abstractmethod
    def _words(self, index: Tensor, dtype: torch.dtype) -> Tensor:
        """The words ``(..., d)`` of classes ``(...)`` in range, in float32 or better."""

    @abstractmethod
    def _products(self, rows: Tensor, start: int, stop: int) -> Tensor:
        """Inner products ``(..., n)`` of rows ``(..., d)`` with all words of pieces, the cut ones too."""

    @abstractmethod
    def _adjoint(self, cotangent: Tensor, start: int, stop: int) -> Tensor:
        """The transpose of :meth:`_products`, ``(..., n)`` to ``(..., d)``."""

    # --- words ---

    def words(self, index: Tensor, *, dtype: torch.dtype | None = None) -> Tensor:
        """The words of some classes, without those of the others.

        Args:
            index: numbers of classes, ``(...)``, integers in [0, K); the words are on its device.
            dtype: of the words, floating point; default ``torch.get_default_dtype()``.

        Returns:
            ``(..., d)``.

        Raises:
            InvalidArgumentError: no integers, or out of range.
        """
        require(
            not index.dtype.is_floating_point and not index.dtype.is_complex and index.dtype != torch.bool,
            f"index must have an integer dtype, got {index.dtype}",
        )
        index = index.long()
        if index.numel():
            require_values(
                (index >= 0).all() & (index < self.num_classes).all(),
                f"index must be in [0, {self.num_classes}), the numbers of the classes",
            )
        dtype = torch.get_default_dtype() if dtype is None else dtype
        require_floating("dtype", dtype)
        return self._words(index, working_dtype(dtype)).to(dtype)

    def dense(self, *, device: torch.device | str | None = None, dtype: torch.dtype | None = None) -> Tensor:
        """All words, W, as one ``(K, d)`` matrix; made anew at each call.

        Args:
            device: of the matrix.
            dtype: of the matrix, floating point; default ``torch.get_default_dtype()``.

        Returns:
            ``(K, d)``, unit rows.
        """
        dtype = torch.get_default_dtype() if dtype is None else dtype
        require_floating("dtype", dtype)
        matrix = torch.empty(self.num_classes, self.in_features, device=device, dtype=dtype)
        for piece in range(self.pieces):
            start, stop = self.piece_range(piece)
            index = torch.arange(start, stop, device=matrix.device)
            matrix[start:stop] = self._words(index, working_dtype(dtype))
        return matrix

    # --- inner products ---

    def logits(self, features: Tensor) -> Tensor:
        """Inner products with all words, ``W f``, computed in float32 or better; differentiable to any order.

        Args:
            features: f, ``(..., d)``.

        Returns:
            ``(..., K)`` in the dtype that ``F.linear(features, W)`` has.

        Raises:
            InvalidArgumentError: another width, or a dtype that is not floating point.
        """
        return self.piece_logits(features, 0, self.pieces).to(linear_dtype(features))

    def predict(self, features: Tensor) -> Tensor:
        """The class of the largest logit, the first of those that are equal, without holding all logits.

        Args:
            features: f, ``(..., d)``.

        Returns:
            ``(...)``, int64.
        """
        return largest(self._blocks(self._rows(features.detach())))

    def topk(self, features: Tensor, k: int) -> tuple[Tensor, Tensor]:
        """The k largest logits, descending, and their classes, without holding all logits.

        Args:
            features: f, ``(..., d)``.
            k: from 1 to K.

        Returns:
            Logits ``(..., k)``, float32 or better, and classes ``(..., k)``, int64.

        Raises:
            InvalidArgumentError: features of another width or dtype, or a k out of range.

        >>> from etflayers.codes import OrthoplexCode
        >>> OrthoplexCode(4, 2).topk(torch.tensor([3.0, -5.0]), 2)
        (tensor([5., 3.]), tensor([3, 0]))
        """
        require_size("k", k)
        require(k <= self.num_classes, f"k must be at most num_classes = {self.num_classes}, got {k}")
        return largest_k(self._blocks(self._rows(features.detach())), k)

    def _blocks(self, rows: Tensor) -> Iterator[Tensor]:
        """All logits of rows, in the order of the classes, those of some pieces at a time."""
        step = max(1, _AT_A_TIME // self.piece_size)
        for start in range(0, self.pieces, step):
            yield self.piece_logits(rows, start, min(start + step, self.pieces))

    # --- pieces ---

    @property
    def pieces(self) -> int:
        """How many pieces the classes lie in."""
        return -(-self.num_classes // self.piece_size)

    @property
    def full_pieces(self) -> int:
        """How many of the pieces, from the first on, have all their words: all of them, or all but one."""
        return self.num_classes // self.piece_size

    def piece_range(self, piece: int) -> tuple[int, int]:
        """The classes of a piece, ``(start, stop)``: those of number start, ..., stop - 1."""
        self._require_pieces(piece, piece + 1)
        return piece * self.piece_size, min((piece + 1) * self.piece_size, self.num_classes)

    def piece_logits(self, features: Tensor, start: int, stop: int) -> Tensor:
        """Inner products with the words of the pieces ``start``, ..., ``stop - 1``.

        Args:
            features: f, ``(..., d)``.
            start: number of the first piece.
            stop: number of the piece after the last one.

        Returns:
            ``(..., n)`` for the n classes of these pieces, in float32 or better.
        """
        self._require_pieces(start, stop)
        rows = self._rows(features)
        with full_precision(rows):
            return self._products(rows, start, stop)[..., : self._width(start, stop)]

    def piece_adjoint(self, cotangent: Tensor, start: int, stop: int) -> Tensor:
        """The sum of the words of some pieces with given weights: the transpose of :meth:`piece_logits`.

        Args:
            cotangent: ``(..., n)`` for the n classes of these pieces.
            start: number of the first piece.
            stop: number of the piece after the last one.

        Returns:
            ``(..., d)``, in float32 or better.
        """
        self._require_pieces(start, stop)
        width = self._width(start, stop)
        self._require_shape("cotangent", cotangent, cotangent.shape[-1:] == (width,), f"(..., {width})")
        weights = cotangent.to(working_dtype(cotangent.dtype))
        missing = (stop - start) * self.piece_size - width
        if missing:
            weights = torch.nn.functional.pad(weights, (0, missing))
        with full_precision(weights):
            return self._adjoint(weights, start, stop)

    def half_logits(self, features: Tensor, start: int, stop: int) -> Tensor:
        """Inner products with the first m words of each of some full pieces; the others have minus that.

        Args:
            features: f, ``(..., d)``.
            start: number of the first piece.
            stop: number of the piece after the last one, at most ``full_pieces``.

        Returns:
            ``(P, ..., m)`` for P pieces, in float32 or better.

        Raises:
            InvalidArgumentError: a code that is not antipodal, or a piece that is cut.
        """
        raise self._no_halves()

    def half_adjoint(self, cotangent: Tensor, start: int, stop: int) -> Tensor:
        """The transpose of :meth:`half_logits`.

        Args:
            cotangent: ``(P, ..., m)``.
            start: number of the first piece.
            stop: number of the piece after the last one, at most ``full_pieces``.

        Returns:
            ``(..., d)``, in float32 or better.

        Raises:
            InvalidArgumentError: a code that is not antipodal, or a piece that is cut.
        """
        raise self._no_halves()

    # --- what to say about it ---

    def describe(self) -> str:
        """One sentence: kind, sizes, largest cosine, the bound that no code is below, and what it is for."""
        bound = coherence_bound(self.num_classes, self.dimension)
        return (
            f"{self.kind}: {self.num_classes} unit vectors in R^{self.in_features} with largest cosine "
            f"{self.largest_cosine:.4g}, where none can have less than {bound:.4g}; {self.reason}."
        )

    # --- checks ---

    def _rows(self, features: Tensor) -> Tensor:
        self._require_shape(
            "features", features, features.shape[-1:] == (self.in_features,), f"(..., {self.in_features})"
        )
        return features.to(working_dtype(features.dtype))

    def _require_shape(self, name: str, tensor: Tensor, fits: bool, shape: str) -> None:
        require_floating(name, tensor.dtype)
        require(fits, f"{name} must have shape {shape}, got {tuple(tensor.shape)}")

    def _require_pieces(self, start: int, stop: int, *, full: bool = False) -> None:
        most = self.full_pieces if full else self.pieces
        what = "pieces with all their words" if full else "pieces"
        require(
            0 <= start < stop <= most,
            f"start and stop must be in order and within the {most} {what}, got {start} and {stop}",
        )

    def _width(self, start: int, stop: int) -> int:
        return min(stop * self.piece_size, self.num_classes) - start * self.piece_size

    def _no_halves(self) -> Exception:
        return InvalidArgumentError(
            f"a {self.kind} code is not antipodal and has no halves: use piece_logits and piece_adjoint"
        )


@dataclass(frozen=True)
class AntipodalCode(SphericalCode):
    """A code whose full pieces are m words followed by their negatives.

    A subclass says how inner products with the first halves are taken (:meth:`_halves`,
    :meth:`_halves_adjoint`); a piece that is cut has the first of its words.
    """

    antipodal: ClassVar[bool] = True

    @abstractmethod
    def _halves(self, rows: Tensor, start: int, stop: int) -> Tensor:
        """Inner products ``(P, ..., m)`` of rows ``(..., d)`` with the first m words of each of P pieces."""

    @abstractmethod
    def _halves_adjoint(self, cotangent: Tensor, start: int, stop: int) -> Tensor:
        """The transpose of :meth:`_halves`, ``(P, ..., m)`` to ``(..., d)``."""

    def half_logits(self, features: Tensor, start: int, stop: int) -> Tensor:  # noqa: D102
        self._require_pieces(start, stop, full=True)
        rows = self._rows(features)
        with full_precision(rows):
            return self._halves(rows, start, stop)

    def half_adjoint(self, cotangent: Tensor, start: int, stop: int) -> Tensor:  # noqa: D102
        self._require_pieces(start, stop, full=True)
        count, half = stop - start, self.piece_size // 2
        fits = cotangent.ndim >= 2 and cotangent.shape[0] == count and cotangent.shape[-1] == half
        self._require_shape("cotangent", cotangent, fits, f"({count}, ..., {half})")
        weights = cotangent.to(working_dtype(cotangent.dtype))
        with full_precision(weights):
            return self._halves_adjoint(weights, start, stop)

    def _products(self, rows: Tensor, start: int, stop: int) -> Tensor:
        halves = self._halves(rows, start, stop).movedim(0, -2)
        return torch.stack((halves, -halves), dim=-2).flatten(-3)

    def _adjoint(self, cotangent: Tensor, start: int, stop: int) -> Tensor:
        pairs = cotangent.reshape(*cotangent.shape[:-1], stop - start, 2, self.piece_size // 2)
        return self._halves_adjoint((pairs[..., 0, :] - pairs[..., 1, :]).movedim(-2, 0), start, stop)
