"""Which code to take for K classes in d dimensions."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from etflayers.checks import describe_argument, require, require_size
from etflayers.codes.code import SphericalCode
from etflayers.codes.dense import DenseCode
from etflayers.codes.kerdock import KerdockCode
from etflayers.codes.optimized import optimized_rows, softmax_rows
from etflayers.codes.orthoplex import OrthoplexCode
from etflayers.codes.roots import RootCode
from etflayers.codes.simplex import SimplexCode
from etflayers.storage import read_tensors, write_tensors

__all__ = ["Kind", "find_code", "spherical_code"]

Kind = Literal["auto", "simplex", "orthoplex", "kerdock", "roots", "optimized", "softmax"]

_STRUCTURED: dict[str, type[SphericalCode]] = {
    code.kind: code for code in (SimplexCode, OrthoplexCode, KerdockCode, RootCode)
}
# Classes for which "auto" optimizes: a minute or a few on one CPU thread.
_MOST_OPTIMIZED = 4096
# What a file of words holds.
_ROWS, _RECORD = "rows", "spherical_code"


def find_code(
    num_classes: int,
    in_features: int,
    *,
    kind: Kind = "auto",
    generator: torch.Generator | None = None,
    cache: str | os.PathLike[str] | None = None,
) -> SphericalCode:
    r"""A spherical code of K unit vectors in R^d, as an object that has logits without a matrix where it can.

    ``"auto"`` takes the first that there is: the simplex (K <= d + 1) and the orthoplex (K <= 2 d), which no
    code beats; Kerdock's bases (d a power of 4, K <= d (d + 2)), whose cosines of 1 / sqrt(d) are near the
    bound for many classes and whose logits are fast transforms; an optimized matrix for up to 4096 classes,
    which takes seconds to minutes; and the roots (K <= d (d - 1)), with cosines to 1/2. For few classes more
    than 2 d an optimized matrix is better than Kerdock's and costs a product with a K x d matrix: say
    ``kind="optimized"``. ``describe()`` of the result says what it is.

    Args:
        num_classes: K >= 2.
        in_features: d >= 1.
        kind: ``"auto"``, a kind with a formula, or ``"optimized"``: small largest cosine by
            :func:`etflayers.codes.optimized_rows`, or ``"softmax"``: words far from the convex hull of the
            others by :func:`etflayers.codes.softmax_rows`.
        generator: random numbers of an optimization.
        cache: safetensors file of an optimized matrix: read if it exists, written if not. Codes by
            formula leave it alone.

    Returns:
        The code, which says why it was taken in ``describe()``.

    Raises:
        InvalidArgumentError: a kind that does not exist or not for these sizes, sizes for which ``"auto"``
            has none, or a cache with another code.
        MissingDependencyError: a cache without safetensors.
        OSError: the cache cannot be read or written.

    Reference:
        Jiang, Zhou, Wang, Qu, Mixon, You, Zhu (2023), arXiv 2310.05351.

    >>> [find_code(num_classes, 16).kind for num_classes in (17, 32, 288)]
    ['simplex', 'orthoplex', 'kerdock']
    >>> find_code(288, 16).describe()
    'kerdock: 288 unit vectors in R^16 with largest cosine 0.25, where none can have less than 0.2416; a
    fast Walsh-Hadamard transform for each 2 d classes, and no weight but signs.'
    """
    require_size("num_classes", num_classes, at_least=2)
    require_size("in_features", in_features)
    num_classes, in_features = int(num_classes), int(in_features)
    kinds = ("auto", *_STRUCTURED, "optimized", "softmax")
    require(kind in kinds, f"kind must be one of {', '.join(kinds)}, got {describe_argument(kind)}")
    if kind == "auto":
        kind = _automatic(num_classes, in_features)
    if kind in _STRUCTURED:
        return _STRUCTURED[kind](num_classes, in_features)
    find, reason = {
        "optimized": (optimized_rows, "its largest cosine was made small by a search"),
        "softmax": (softmax_rows, "its words were moved far from the convex hull of the others"),
    }[kind]
    asked: dict[str, object] = {"num_classes": num_classes, "in_features": in_features, "kind": kind}
    if cache is not None and Path(cache).exists():
        rows = _read(cache, asked)
    else:
        rows = find(num_classes, in_features, generator=generator)
        if cache is not None:
            write_tensors(cache, {_ROWS: rows}, {_RECORD: asked})
    return DenseCode(rows, kind=kind, reason=reason)


def spherical_code(
    num_classes: int,
    in_features: int,
    *,
    kind: Kind = "auto",
    generator: torch.Generator | None = None,
    cache: str | os.PathLike[str] | None = None,
    device: torch.device | str | None = None,
    dtype: torch.dtype | None = None,
) -> Tensor:
    """K unit vectors in R^d with a small largest cosine, as a matrix: the words of :func:`find_code`.

    Args:
        num_classes: K >= 2.
        in_features: d >= 1.
        kind: as in :func:`find_code`.
        generator: random numbers of an optimization.
        cache: as in :func:`find_code`.
        device: of the result.
        dtype: of the result, floating point; default ``torch.get_default_dtype()``.

    Returns:
        ``(K, d)``, unit rows.

    Raises:
        InvalidArgumentError: as in :func:`find_code`.
        MissingDependencyError: a cache without safetensors.
        OSError: the cache cannot be read or written.

    >>> spherical_code(4, 2)
    tensor([[ 1.,  0.],
            [ 0.,  1.],
            [-1.,  0.],
            [ 0., -1.]])
    """
    code = find_code(num_classes, in_features, kind=kind, generator=generator, cache=cache)
    return code.dense(device=device, dtype=dtype)


def _read(cache: str | os.PathLike[str], asked: dict[str, object]) -> Tensor:
    """The rows in a file, if it is the file of the code that was asked for."""
    tensors, record = read_tensors(cache)
    held = record.get(_RECORD)
    require(
        held == asked and _ROWS in tensors,
        f"cache={str(cache)!r} holds {held or 'no code'}, not {asked}: take another file",
    )
    rows = tensors[_ROWS]
    require(
        rows.shape == (asked["num_classes"], asked["in_features"]),
        f"cache={str(cache)!r} holds {tuple(rows.shape)} numbers, which are not {asked}: take another file",
    )
    return rows


def _automatic(num_classes: int, in_features: int) -> Kind:
    if num_classes <= in_features + 1:
        return "simplex"
    if num_classes <= 2 * in_features:
        return "orthoplex"
    if KerdockCode.exists(num_classes, in_features):
        return "kerdock"
    if num_classes <= _MOST_OPTIMIZED and in_features > 1:
        return "optimized"
    require(
        num_classes <= in_features * (in_features - 1),
        f"there is no code by formula for num_classes = {num_classes} and in_features = {in_features}, and "
        'to optimize so many words takes long: say kind="optimized" to do it, or project the features to a '
        "power of 4 with d (d + 2) >= num_classes",
    )
    return "roots"
