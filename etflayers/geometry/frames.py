r"""What a simplex equiangular tight frame (ETF) is, and the coordinates in which it is a Stiefel point.

K unit vectors in R^d form a simplex ETF when every two of them meet at the largest common angle, that is
when their Gram matrix is c^2 (I - 11'/K) with c = sqrt(K / (K - 1)). Let E be a (K-1) x K matrix with
orthonormal rows, orthogonal to 1. Then the frames are exactly W = c E'Q' with Q in St(d, K-1).

**E without a matrix.** The Householder reflector F = I - vv'/(K + sqrt K), v = 1 + sqrt(K) e_0, is orthogonal
and maps 1 to -sqrt(K) e_0, so its rows 1..K-1 are orthonormal and orthogonal to 1: they are E. Because EX
does not see a common translation of the rows, the first row may be subtracted before anything is summed,
which is what keeps float32 accurate when a large mean is common to all classes:

    Y = X[1:] - X[0],    EX = Y - (sum of the rows of Y) / (K + sqrt K),
    E'R = [-w ; R - w / (sqrt K + 1)],    w = (sum of the rows of R) / sqrt K.

Both cost O(Kd).

K <-> num_classes, d <-> in_features, c <-> etf_radius, W <-> frame, Q <-> rotation, X <-> rows,
EX or R <-> coordinates, C = I - 11'/K <-> centered.
"""

from __future__ import annotations

import math
from typing import Literal

import torch
from torch import Tensor

from etflayers.checks import require, require_floating
from etflayers.errors import InvalidArgumentError
from etflayers.geometry.stiefel import is_stiefel, random_stiefel
from etflayers.geometry.tolerance import Check, default_atol
from etflayers.precision import working_dtype

__all__ = [
    "centered",
    "centered_basis_adjoint",
    "centered_basis_apply",
    "centered_rows",
    "etf_from_coordinates",
    "etf_radius",
    "is_simplex_etf",
    "require_etf_dims",
    "require_rotation",
    "simplex_etf",
]


def require_etf_dims(num_classes: int, in_features: int) -> None:
    """Raise unless a simplex ETF of ``num_classes`` unit vectors exists in ``in_features`` dimensions."""
    if num_classes < 2:
        raise InvalidArgumentError(
            f"num_classes must be at least 2, got {num_classes}: a simplex needs two or more vertices"
        )
    if in_features < num_classes - 1:
        raise InvalidArgumentError(
            f"in_features must be at least num_classes - 1 = {num_classes - 1}, got {in_features}: a simplex "
            f"of {num_classes} classes has {num_classes - 1} dimensions; widen the features with a linear "
            "layer, or take a code for more classes than dimensions, such as etflayers.FixedCodeHead"
        )


def require_rotation(rotation: Tensor, num_classes: int, in_features: int) -> None:
    """Raise unless ``rotation`` is a floating-point Q in St(d, K-1), of shape ``(d, K-1)``."""
    rank = num_classes - 1
    require(
        rotation.shape == (in_features, rank),
        f"rotation must have shape (in_features, num_classes - 1) = ({in_features}, {rank}), "
        f"got {tuple(rotation.shape)}",
    )
    require_floating("rotation", rotation.dtype)
    on_manifold = is_stiefel(rotation)
    require(
        on_manifold.ok,
        f"rotation must have orthonormal columns, but {on_manifold.reason}: project it with "
        "etflayers.geometry.project_stiefel",
    )


def etf_radius(num_classes: int) -> float:
    """The factor c = sqrt(K / (K - 1)) between an orthonormal basis of the simplex and its unit vertices."""
    return math.sqrt(num_classes / (num_classes - 1))


def centered(rows: Tensor) -> Tensor:
    """The rows less their mean, CX.

    Args:
        rows: ``(..., K, d)``.

    Returns:
        ``(..., K, d)``, columns that sum to zero.
    """
    return torch.sub(rows, rows.sum(-2, keepdim=True), alpha=1 / rows.shape[-2])


def centered_rows(
    rows: Tensor,
    dtype: torch.dtype,
    *,
    precision: torch.dtype | None = None,
    exact_zeros: bool = False,
    scaled: bool = True,
) -> tuple[Tensor, Tensor | None]:
    """CX in ``dtype``, divided by a scale so that its Gram matrix is finite and accurate.

    Args:
        rows: X, ``(..., K, d)``.
        dtype: to compute in.
        precision: of the data, where X has been computed from them in a wider dtype; ``None``: that of X.
        exact_zeros: whether rows that coincide have to give zeros instead of rounding.
        scaled: whether to divide; ``False`` for a caller that looks for overflow himself.

    Returns:
        The rows ``(..., K, d)``, and the scale ``(..., 1, 1)``, or ``None`` for 1.
    """
    precision = rows.dtype if precision is None else precision
    to_spare = dtype.itemsize > precision.itemsize
    wide = rows.to(torch.promote_types(rows.dtype, dtype))
    if exact_zeros or not to_spare:
        # No digits to spare: a large mean common to all rows must go before it is averaged.
        wide = wide - wide[..., :1, :]
    elif wide.dtype == rows.dtype:
        wide = wide.clone()
    # In place, on a tensor of our own by now: to touch fresh memory costs as much as the arithmetic.
    found = wide if wide.dtype == dtype else wide.to(dtype)
    # The mean as a product: a reduction over rows that lie apart in memory takes several times as long.
    found -= found.new_full((1, found.shape[-2]), 1 / found.shape[-2]) @ found
    if to_spare or not scaled:
        return found, None
    # No range to spare either: the Gram matrix of 1e20 overflows float32.
    fixed = found.detach()
    scale = torch.maximum(fixed.amax((-2, -1), keepdim=True), -fixed.amin((-2, -1), keepdim=True))
    scale = scale.clamp_min(torch.finfo(dtype).tiny)
    found /= scale
    return found, scale


def centered_basis_apply(rows: Tensor) -> Tensor:
    """Coordinates EX of K rows in the orthonormal basis E of the space orthogonal to 1.

    Args:
        rows: ``(..., K, d)``.

    Returns:
        ``(..., K-1, d)``, unchanged by a common translation of the rows.
    """
    num_classes = rows.shape[-2]
    differences = rows[..., 1:, :] - rows[..., :1, :]
    return differences - differences.sum(-2, keepdim=True) / (num_classes + math.sqrt(num_classes))


def centered_basis_adjoint(coordinates: Tensor) -> Tensor:
    """The K rows E'R, which sum to zero, with given coordinates R.

    Args:
        coordinates: ``(..., K-1, d)``.

    Returns:
        ``(..., K, d)``.
    """
    root = math.sqrt(coordinates.shape[-2] + 1)
    first = coordinates.sum(-2, keepdim=True) / root
    return torch.cat((-first, coordinates - first / (root + 1)), dim=-2)


def etf_from_coordinates(coordinates: Tensor) -> Tensor:
    """The frame ``W = c E'R`` with given coordinates R: a simplex ETF where R has orthonormal rows.

    Args:
        coordinates: R, ``(..., K-1, d)``; for a rotation Q in St(d, K-1) it is Q'.

    Returns:
        ``(..., K, d)``.
    """
    return etf_radius(coordinates.shape[-2] + 1) * centered_basis_adjoint(coordinates)


def simplex_etf(
    num_classes: int,
    in_features: int,
    *,
    rotation: Literal["canonical", "haar"] | Tensor = "canonical",
    generator: torch.Generator | None = None,
    device: torch.device | str | None = None,
    dtype: torch.dtype | None = None,
) -> Tensor:
    r"""K unit vectors in R^d with pairwise inner products -1/(K-1).

    Args:
        num_classes: K >= 2.
        in_features: d >= K - 1.
        rotation: ``"canonical"``: ``c (I - 11'/K)`` followed by d - K zero columns (for d = K - 1 the
            Householder form ``c E'``); ``"haar"``: uniformly distributed over all rotations; or Q in
            St(d, K-1) of shape ``(d, K-1)``, for the frame ``c E'Q'``.
        generator: random numbers of the Haar rotation.
        device: of the result; taken from ``rotation`` when that is a tensor.
        dtype: of the result, floating point; default as for ``device``, else ``torch.get_default_dtype()``.

    Returns:
        ``(K, d)``, unit rows.

    Raises:
        InvalidArgumentError: K < 2, d < K - 1, a dtype that is not floating point, or a rotation that does
            not have orthonormal columns.

    Reference:
        Papyan, Han, Donoho (2020), arXiv 2008.08186.

    >>> simplex_etf(3, 2) @ simplex_etf(3, 2).T
    tensor([[ 1.0000, -0.5000, -0.5000],
            [-0.5000,  1.0000, -0.5000],
            [-0.5000, -0.5000,  1.0000]])
    """
    require_etf_dims(num_classes, in_features)
    rank = num_classes - 1
    if isinstance(rotation, Tensor):
        require_rotation(rotation, num_classes, in_features)
        dtype = dtype or rotation.dtype
    dtype = dtype or torch.get_default_dtype()
    require_floating("dtype", dtype)
    compute = working_dtype(dtype)
    if isinstance(rotation, Tensor):
        coordinates = rotation.to(device, compute).mT
    elif rotation == "haar":
        coordinates = random_stiefel(in_features, rank, generator=generator, device=device, dtype=compute).mT
    elif rotation == "canonical":
        basis = torch.eye(rank, min(num_classes, in_features), device=device, dtype=compute)
        if in_features >= num_classes:
            # Q' = [E 0] turns c E'Q' into the familiar c (I - 11'/K) followed by zero columns.
            basis = centered_basis_apply(torch.eye(num_classes, device=device, dtype=compute))
        coordinates = torch.nn.functional.pad(basis, (0, in_features - basis.shape[-1]))
    else:
        require(False, f"rotation must be 'canonical', 'haar' or a tensor, got {rotation!r}")
    return etf_from_coordinates(coordinates).to(dtype)


def is_simplex_etf(frame: Tensor, *, atol: float | None = None) -> Check:
    """Whether the Gram matrix of the rows is c^2 (I - 11'/K), entry by entry.

    Args:
        frame: ``(..., K, d)``.
        atol: largest absolute deviation of an inner product; default by dtype.

    Returns:
        ``(ok, reason)``; the reason says which property fails and by how much.

    >>> is_simplex_etf(torch.eye(3))
    Check(ok=False, reason='inner products of distinct rows differ from -1/(K-1) by up to 0.5 (atol 1e-05)')
    """
    require_floating("frame", frame.dtype)
    require(frame.ndim >= 2, f"frame must have shape (..., K, d), got {tuple(frame.shape)}")
    num_classes, in_features = frame.shape[-2:]
    if num_classes < 2 or in_features < num_classes - 1:
        return Check(False, f"no simplex ETF has {num_classes} rows in {in_features} dimensions")
    atol = default_atol(frame.dtype) if atol is None else atol
    rows = frame.detach().double()
    if not bool(torch.isfinite(rows).all()):
        return Check(False, "the frame holds NaN or infinity")
    gram = rows @ rows.mT
    norms = float((gram.diagonal(dim1=-2, dim2=-1) - 1).abs().max())
    if norms > atol:
        return Check(False, f"squared row norms differ from 1 by up to {norms:.3g} (atol {atol:.3g})")
    off_diagonal = ~torch.eye(num_classes, dtype=torch.bool, device=frame.device)
    angles = float((gram + 1 / (num_classes - 1))[..., off_diagonal].abs().max())
    if angles > atol:
        return Check(
            False,
            f"inner products of distinct rows differ from -1/(K-1) by up to {angles:.3g} (atol {atol:.3g})",
        )
    return Check(True, "simplex ETF")
