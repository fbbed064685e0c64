r"""d + 2 words to a dimension with cosines of at most ``1 / sqrt d``: Kerdock's set of orthonormal bases.

Let d = 2^m with m even, and F the field of 2^(m-1) elements with its trace Tr to GF(2) = {0, 1}. Number the
coordinates by v in V = F x GF(2). Each s in F gives a linear map of V,

    M_s(x, a) = (s^2 x + s Tr(s x) + s a, Tr(s x)),

and, with the pairing ((y, e), (u, c)) -> Tr(y u) + e c, an alternating bilinear form B_s(v, w) = (M_s v, w):
B_s(v, v) = 0. For s != t the form B_s + B_t has full rank m, as only forms in an even number of variables
can, and no larger set of forms has that property. In a basis of V let Q_s(v) = sum_{i<j} B_s(b_i, b_j) v_i
v_j, a quadratic form over GF(2). The words of basis s are

    w_{s,b}(v) = (-1)^(Q_s(v) + b.v) / sqrt d        for all b in GF(2)^m.

Two of one basis are orthogonal. For s != t the inner product of w_{s,b} and w_{t,c} is the mean over v of
(-1)^((Q_s + Q_t)(v) + (b+c).v); its square is 1/d, because Q_s + Q_t has the form B_s + B_t of full rank: a
bent function. With the coordinate axes, which have ``1 / sqrt d`` with all of these, there are d/2 + 1
orthonormal bases. The words with their negatives are K = d (d + 2), no two of them with a cosine above ``1 /
sqrt d``.

The logits of basis s are a Walsh-Hadamard transform of the features times the signs (-1)^Q_s: no weight but
signs. For 256 samples and all 66,048 classes in R^256 that takes 11 ms on one CPU thread, a few bases at a
time and without writing the logits of the negatives; a product with the matrix takes 90.

Symbols: d <-> in_features, m <-> ``_digits``, (-1)^Q_s(v) <-> ``_signs(d, ...)[s, v]``, b <-> place of a
word in its basis. An element of F is an integer whose binary digits are its coefficients in the powers of a
root of an irreducible polynomial, and s is the number of its basis; v has the digits of x first and a as
its highest one.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cache
from typing import ClassVar

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import one_hot

from etflayers._torch import assume_constant_result, is_concrete
from etflayers.checks import require
from etflayers.codes.code import AntipodalCode
from etflayers.kernels.hadamard import hadamard_transform

__all__ = ["KerdockCode"]

# Irreducible polynomials over GF(2) by their degree m - 1, written as binary numbers, e.g. x^3 + x + 1.
_IRREDUCIBLE = {1: 0b11, 3: 0b1011, 5: 0b100101, 7: 0b10000011, 9: 0b1000010001, 11: 0b100000000101}

# Up to here a product with all words of the bases, half a megabyte, takes less time than transforms: 0.4 ms
# in place of 2 for 256 samples and all 33 bases of R^64, on one CPU thread.
_LARGEST_STORED = 64

_constants: dict[tuple[str, int, torch.device, torch.dtype], Tensor] = {}


@dataclass(frozen=True)
class KerdockCode(AntipodalCode):
    r"""Kerdock's d/2 + 1 orthonormal bases of R^d and their negatives: K <= d (d + 2), cosines to 1/sqrt(d).

    =====  =========  ==============
    d      largest K  largest cosine
    =====  =========  ==============
    16     288        1/4
    64     4,224      1/8
    256    66,048     1/16
    1,024  1,050,624  1/32
    =====  =========  ==============

    A piece is one basis, d words and their negatives, and its logits are a fast Walsh-Hadamard transform. K
    classes have the first K words: as many whole bases as go into K, and the first words of one more. The
    signs are brought to a device when they are first used there: do that before capturing a CUDA graph.

    Args:
        num_classes: K from 2 to d (d + 2).
        in_features: d, a power of 4 from 4 to 4096.

    Raises:
        InvalidArgumentError: a d that is no such power, or a K that is not in this range.

    Reference:
        Kerdock (1972), A class of low-rate nonlinear binary codes; Calderbank, Cameron, Kantor, Seidel
        (1997), Z4-Kerdock codes, orthogonal spreads, and extremal Euclidean line-sets.

    >>> code = KerdockCode(288, 16)
    >>> code.pieces, code.piece_range(8), code.half_logits(torch.ones(1, 16), 0, 9).shape
    (9, (256, 288), torch.Size([9, 1, 16]))
    >>> code.describe()
    'kerdock: 288 unit vectors in R^16 with largest cosine 0.25, where none can have less than 0.2416; a
    fast Walsh-Hadamard transform for each 2 d classes, and no weight but signs.'
    """

    kind: ClassVar[str] = "kerdock"
    reason: ClassVar[str] = "a fast Walsh-Hadamard transform for each 2 d classes, and no weight but signs"

    def __post_init__(self) -> None:
        super().__post_init__()
        d = self.in_features
        require(
            _is_width(d),
            f"in_features must be a power of 4 from 4 to 4096 for a Kerdock code, got {d}: project the "
            "features, or take another kind of code",
        )
        require(
            self.num_classes <= d * (d + 2),
            f"num_classes must be at most in_features * (in_features + 2) = {d * (d + 2)} for a Kerdock "
            f"code, got {self.num_classes}: widen the features to {4 * d}",
        )

    @staticmethod
    def exists(num_classes: int, in_features: int) -> bool:
        """Whether there is a Kerdock code of these sizes."""
        return _is_width(in_features) and num_classes <= in_features * (in_features + 2)

    @property
    def piece_size(self) -> int:
        """``2 d``, a basis and its negatives."""
        return 2 * self.in_features

    @property
    def largest_cosine(self) -> float:
        """``1 / sqrt d``, or 0 where one basis is enough."""
        return self.in_features**-0.5 if self.num_classes > 2 * self.in_features else 0.0

    def _words(self, index: Tensor, dtype: torch.dtype) -> Tensor:
        d = self.in_features
        piece, place = index // (2 * d), index % (2 * d)
        signs = _signs(d, torch.empty((), device=index.device, dtype=dtype), 0, d // 2)
        coordinates = torch.arange(d, device=index.device)
        odd = _parity((place % d).unsqueeze(-1) & coordinates)
        words = signs[piece.clamp(max=d // 2 - 1)] * (1 - 2 * odd) / math.sqrt(d)
        words = torch.where((piece == d // 2).unsqueeze(-1), one_hot(place % d, d).to(dtype), words)
        return torch.where((place < d).unsqueeze(-1), words, -words)

    def _halves(self, rows: Tensor, start: int, stop: int) -> Tensor:
        d = self.in_features
        if d <= _LARGEST_STORED:
            flat = rows.reshape(-1, d) @ _stored_words(d, rows, start, stop).mT
            return flat.view(stop - start, *rows.shape)
        if start == d // 2:
            return rows.unsqueeze(0)
        halves = hadamard_transform(rows * self._basis_signs(rows, start, stop))
        return torch.cat((halves, rows.unsqueeze(0))) if self._has_axes(stop) else halves

    def _halves_adjoint(self, cotangent: Tensor, start: int, stop: int) -> Tensor:
        d = self.in_features
        if d <= _LARGEST_STORED:
            flat = cotangent.reshape(stop - start, -1, d) @ _stored_words(d, cotangent, start, stop)
            return flat.sum(0).view(cotangent.shape[1:])
        if start == d // 2:
            return cotangent.squeeze(0)
        transformed = hadamard_transform(cotangent[:-1] if self._has_axes(stop) else cotangent)
        total = (transformed * self._basis_signs(cotangent[0], start, stop)).sum(0)
        return total + cotangent[-1] if self._has_axes(stop) else total

    def _has_axes(self, stop: int) -> bool:
        """Whether the last piece before ``stop`` is the basis of coordinate axes."""
        return stop > self.in_features // 2

    def _basis_signs(self, like: Tensor, start: int, stop: int) -> Tensor:
        """(-1)^Q_s, ``(P, 1, ..., 1, d)``, to go with rows ``(..., d)``."""
        signs = _signs(self.in_features, like, start, min(stop, self.in_features // 2))
        return signs.view(-1, *[1] * (like.ndim - 1), self.in_features)


# --- Constants: made once for each device and dtype ---


def _signs(size: int, like: Tensor, start: int, stop: int) -> Tensor:
    """(-1)^Q_s(v) of some bases other than the axes, ``(P, d)``."""
    if _may_keep(like):
        return _constant("signs", size, like.device, like.dtype)[start:stop]
    return _make_signs(size, like.device, like.dtype, start, stop)


def _stored_words(size: int, like: Tensor, start: int, stop: int) -> Tensor:
    """The words of some bases without their negatives, ``(P, d, d)``."""
    if _may_keep(like):
        return _constant("words", size, like.device, like.dtype)[start:stop]
    return _make_words(size, like.device, like.dtype)[start:stop]


def _may_keep(like: Tensor) -> bool:
    """Whether a constant may stay from call to call: in a graph that others trace it has to be made."""
    return torch.compiler.is_dynamo_compiling() or is_concrete(like)


# Dynamo calls it while it traces, and makes the tensor an input of the graph.
@assume_constant_result
def _constant(name: str, size: int, device: torch.device, dtype: torch.dtype) -> Tensor:
    key = name, size, device, dtype
    if key not in _constants:
        with torch.inference_mode(False):
            if name == "words":
                _constants[key] = _make_words(size, device, dtype)
            else:
                _constants[key] = _make_signs(size, device, dtype, 0, size // 2)
    return _constants[key]


def _make_words(size: int, device: torch.device, dtype: torch.dtype) -> Tensor:
    axes = torch.eye(size, device=device, dtype=dtype)
    signs = _make_signs(size, device, dtype, 0, size // 2)
    return torch.cat((hadamard_transform(axes) * signs.unsqueeze(1), axes.unsqueeze(0)))


def _make_signs(size: int, device: torch.device, dtype: torch.dtype, start: int, stop: int) -> Tensor:
    numbers = torch.tensor(_packed_forms(size)[start:stop], device=device)
    digits = numbers.unsqueeze(-1) >> torch.arange(_packing(size), device=device) & 1
    return (1 - 2 * digits.flatten(1)).to(dtype)


# --- The forms, in integers ---


def _packing(size: int) -> int:
    return min(size, 32)


@cache
def _packed_forms(size: int) -> list[list[int]]:
    """Q_s(v) for each s and all v, 32 of them as the binary digits of one number."""
    forms, v = np.array(_forms(size)), np.arange(size)
    parity = np.array([number.bit_count() & 1 for number in range(size)])
    value = np.zeros((size // 2, size), dtype=np.int64)
    for digit in range(_digits(size)):
        value ^= (v >> digit & 1) * parity[forms[:, digit, None] & v]
    width = _packing(size)
    packed: list[list[int]] = (value.reshape(size // 2, -1, width) << np.arange(width)).sum(-1).tolist()
    return packed


def _parity(number: Tensor) -> Tensor:
    """Whether the binary digits of each number below 2^16 have an odd sum, as 0 or 1."""
    for shift in (8, 4, 2, 1):
        number = number ^ number >> shift
    return number & 1


def _forms(size: int) -> list[list[int]]:
    """The upper triangles of the forms B_s: for s and i the number with digits B_s(b_i, b_j), j > i."""
    digits = _digits(size)
    degree = digits - 1
    basis = [(1 << i, 0) for i in range(degree)] + [(0, 1)]
    # Tr(y u) is linear in u: a mask of the digits of u, for each y.
    masks = [
        sum(_trace(_product(y, 1 << i, degree), degree) << i for i in range(degree)) for y in range(size // 2)
    ]
    forms = []
    for s in range(size // 2):
        square, rows = _product(s, s, degree), []
        for i, (x, a) in enumerate(basis):
            trace = (masks[s] & x).bit_count() & 1
            y = _product(square, x, degree) ^ (s if trace ^ a else 0)
            row = masks[y] | trace << degree
            rows.append(row & -(2 << i))
        forms.append(rows)
    return forms


def _product(x: int, y: int, degree: int) -> int:
    """The product in F."""
    result = 0
    while y:
        if y & 1:
            result ^= x
        x <<= 1
        if x >> degree:
            x ^= _IRREDUCIBLE[degree]
        y >>= 1
    return result


def _trace(x: int, degree: int) -> int:
    """Tr x = x + x^2 + x^4 + ..., 0 or 1."""
    total = 0
    for _ in range(degree):
        total ^= x
        x = _product(x, x, degree)
    return total


def _is_width(size: int) -> bool:
    return size == 1 << _digits(size) and _digits(size) - 1 in _IRREDUCIBLE


def _digits(size: int) -> int:
    """m, for d = 2^m."""
    return size.bit_length() - 1
