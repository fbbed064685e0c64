"""The Stiefel manifold St(d, n): d x n matrices with orthonormal columns, n <= d.

d <-> dim, n <-> num_frames, Q <-> point, xi <-> tangent, Z <-> vector.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from etflayers.checks import require, require_floating
from etflayers.geometry.tolerance import Check, default_atol
from etflayers.precision import working_dtype

__all__ = ["is_stiefel", "project_stiefel", "project_tangent", "random_stiefel", "retract_stiefel"]


def _require_tall(name: str, matrix: Tensor) -> None:
    require(
        matrix.ndim >= 2 and matrix.shape[-2] >= matrix.shape[-1],
        f"{name} must have shape (..., d, n) with d >= n, got {tuple(matrix.shape)}: transpose it?",
    )
    require_floating(name, matrix.dtype)


def _orthonormal_columns(matrix: Tensor) -> Tensor:
    # QR leaves the signs of R's diagonal to the implementation. Making them positive makes the factor unique;
    # for a Gaussian matrix that uniqueness is what makes it Haar (Mezzadri 2007, arXiv math-ph/0609050).
    q: Tensor
    q, r = torch.linalg.qr(matrix)
    signs = torch.where(r.diagonal(dim1=-2, dim2=-1) < 0, -1.0, 1.0).to(matrix.dtype)
    return q * signs.unsqueeze(-2)


def random_stiefel(
    dim: int,
    num_frames: int,
    *,
    batch: tuple[int, ...] = (),
    generator: torch.Generator | None = None,
    device: torch.device | str | None = None,
    dtype: torch.dtype | None = None,
) -> Tensor:
    """A point of St(d, n) drawn from the Haar (rotation-invariant) distribution.

    Args:
        dim: d.
        num_frames: n <= d.
        batch: leading dimensions, independent draws.
        generator: source of random numbers.
        device: of the result.
        dtype: of the result, floating point; default ``torch.get_default_dtype()``.

    Returns:
        ``(*batch, d, n)``.

    Raises:
        InvalidArgumentError: n > d, n < 1 or a dtype that is not floating point.

    Reference:
        Mezzadri (2007), arXiv math-ph/0609050.

    >>> q = random_stiefel(5, 2, generator=torch.Generator().manual_seed(0))
    >>> is_stiefel(q).ok
    True
    """
    require(1 <= num_frames <= dim, f"num_frames must be in 1..dim = {dim}, got {num_frames}")
    dtype = dtype or torch.get_default_dtype()
    require_floating("dtype", dtype)
    compute = working_dtype(dtype)
    gaussian = torch.randn(*batch, dim, num_frames, generator=generator, device=device, dtype=compute)
    return _orthonormal_columns(gaussian).to(dtype)


def project_stiefel(matrix: Tensor) -> Tensor:
    """The nearest point of St(d, n) in Frobenius norm: the polar factor UV' of A = USV'.

    Args:
        matrix: ``(..., d, n)``, d >= n.

    Returns:
        ``(..., d, n)``.

    Raises:
        InvalidArgumentError: d < n or a dtype that is not floating point.

    >>> project_stiefel(torch.tensor([[3.0], [4.0]]))
    tensor([[0.6000],
            [0.8000]])
    """
    _require_tall("matrix", matrix)
    left, _, right = torch.linalg.svd(matrix.to(working_dtype(matrix.dtype)), full_matrices=False)
    projected: Tensor = left @ right
    return projected.to(matrix.dtype)


def project_tangent(point: Tensor, vector: Tensor) -> Tensor:
    """Orthogonal projection of Z onto the tangent space at Q: Z - Q sym(Q'Z).

    Args:
        point: Q in St(d, n), ``(..., d, n)``.
        vector: Z, same shape.

    Returns:
        ``(..., d, n)``, the tangent vector nearest to Z in Frobenius norm.

    Raises:
        InvalidArgumentError: the shapes disagree or d < n.

    Reference:
        Edelman, Arias, Smith (1998), arXiv physics/9806030.

    >>> q = torch.eye(3, 2)
    >>> xi = project_tangent(q, torch.ones(3, 2))
    >>> bool(torch.allclose(q.T @ xi, -(xi.T @ q)))
    True
    """
    _require_tall("point", point)
    require(
        vector.shape == point.shape,
        f"vector must have the shape of point {tuple(point.shape)}, got {tuple(vector.shape)}",
    )
    inner = point.mT @ vector
    return vector - point @ ((inner + inner.mT) / 2)


def retract_stiefel(point: Tensor, tangent: Tensor, *, method: Literal["polar", "qr"] = "polar") -> Tensor:
    """The manifold point that follows Q + xi to second order (polar) or first order (qr).

    Args:
        point: Q in St(d, n), ``(..., d, n)``.
        tangent: xi, a tangent vector at Q, same shape.
        method: ``"polar"``: nearest point to Q + xi; ``"qr"``: its orthonormal factor, cheaper.

    Returns:
        ``(..., d, n)``, a point of St(d, n).

    Raises:
        InvalidArgumentError: the shapes disagree, d < n or an unknown method.

    Reference:
        Absil, Mahony, Sepulchre (2008), Optimization Algorithms on Matrix Manifolds, section 4.1.

    >>> q = torch.eye(3, 2)
    >>> is_stiefel(retract_stiefel(q, project_tangent(q, torch.ones(3, 2)))).ok
    True
    """
    _require_tall("point", point)
    require(
        tangent.shape == point.shape,
        f"tangent must have the shape of point {tuple(point.shape)}, got {tuple(tangent.shape)}",
    )
    require(method in ("polar", "qr"), f"method must be 'polar' or 'qr', got {method!r}")
    moved = point + tangent
    return project_stiefel(moved) if method == "polar" else _orthonormal_columns(moved)


def is_stiefel(point: Tensor, *, atol: float | None = None) -> Check:
    """Whether the columns are orthonormal: Q'Q = I, entry by entry.

    Args:
        point: ``(..., d, n)``.
        atol: largest absolute deviation of an inner product; default by dtype.

    Returns:
        ``(ok, reason)``.

    >>> is_stiefel(2 * torch.eye(2))
    Check(ok=False, reason="Q'Q differs from the identity by up to 3 (atol 1e-05)")
    """
    require_floating("point", point.dtype)
    if point.ndim < 2 or point.shape[-2] < point.shape[-1]:
        return Check(False, f"shape {tuple(point.shape)} is not (..., d, n) with d >= n")
    atol = default_atol(point.dtype) if atol is None else atol
    columns = point.detach().double()
    if not bool(torch.isfinite(columns).all()):
        return Check(False, "the matrix holds NaN or infinity")
    identity = torch.eye(point.shape[-1], dtype=columns.dtype, device=columns.device)
    deviation = float((columns.mT @ columns - identity).abs().max())
    if deviation > atol:
        return Check(False, f"Q'Q differs from the identity by up to {deviation:.3g} (atol {atol:.3g})")
    return Check(True, "orthonormal columns")
