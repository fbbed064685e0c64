r"""The extreme eigenvalues of a Riemannian Hessian, by Lanczos' method from products alone.

Lanczos builds an orthonormal basis of span(v, Hv, H^2 v, ...) in which H is tridiagonal; the eigenvalues of
that small matrix lie between those of H and approach the extreme ones first. As soon as the basis spans an
invariant subspace, it ends; the rest of the small matrix is then filled with a Rayleigh quotient, which lies
between its extreme eigenvalues and so changes neither.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from etflayers.geometry import project_tangent
from etflayers.solvers.stiefel import inner, norm

__all__ = ["extreme_curvatures"]


def extreme_curvatures(
    hessian: Callable[[Tensor], Tensor], point: Tensor, *, max_products: int = 50
) -> tuple[Tensor, Tensor]:
    """Estimates of the smallest and the largest eigenvalue of a Riemannian Hessian.

    They lie between the true ones, and are exact where the tangent space has at most ``max_products``
    dimensions.

    Args:
        hessian: from tangent vectors at the point to tangent vectors, ``(B, d, n)``.
        point: Q, ``(B, d, n)``.
        max_products: Hessian-vector products.

    Returns:
        Two tensors ``(B,)``; zero where the tangent space is ``{0}``, NaN where the Hessian is not finite.

    Reference:
        Lanczos (1950), An iteration method for the solution of the eigenvalue problem.

    >>> point = torch.eye(3, 1)[None]
    >>> scales = torch.tensor([[0.0], [-1.0], [2.0]])
    >>> smallest, largest = extreme_curvatures(lambda xi: scales * xi, point)
    >>> round(float(smallest), 4), round(float(largest), 4)
    (-1.0, 2.0)
    """
    batch, dim, num_frames = point.shape
    dimension = dim * num_frames - num_frames * (num_frames + 1) // 2
    if dimension == 0:
        return point.new_zeros(batch), point.new_zeros(batch)
    # Any start but an eigenvector will do; a fixed one makes the answer reproducible. Its seed is one that
    # nobody takes: a point that was found from the same random numbers can make it an eigenvector.
    generator = torch.Generator().manual_seed(0x57A27)
    start = torch.randn(dim, num_frames, generator=generator, dtype=torch.float64).to(point)
    vector = project_tangent(point, start.expand_as(point))
    vector = vector / norm(vector)[:, None, None]
    basis: list[Tensor] = []
    diagonal: list[Tensor] = []
    off_diagonal: list[Tensor] = []
    for _ in range(min(dimension, max_products)):
        basis.append(vector)
        image = hessian(vector)
        diagonal.append(inner(vector, image))
        size = norm(image)
        # Twice: what is left may be no larger than the rounding of the first pass. That has a normal part,
        # too, in which the Hessian would seem to be singular.
        for _ in range(2):
            image = project_tangent(point, image)
            for earlier in basis:
                image = image - inner(image, earlier)[:, None, None] * earlier
        length = norm(image)
        invariant = length <= torch.finfo(point.dtype).eps ** 0.5 * size
        off_diagonal.append(torch.where(invariant, 0, length))
        vector = image * torch.where(invariant, 0, 1 / torch.where(invariant, 1, length))[:, None, None]
        if bool(invariant.all()):
            break
    used = torch.stack([norm(v) > 0 for v in basis], dim=-1)
    alpha = torch.stack(diagonal, dim=-1)
    alpha = torch.where(used, alpha, alpha[:, :1])
    beta = torch.stack(off_diagonal[: len(basis)], dim=-1)[:, : len(basis) - 1]
    small = torch.diag_embed(alpha) + torch.diag_embed(beta, 1) + torch.diag_embed(beta, -1)
    finite = torch.isfinite(small).all(-1).all(-1)
    eigenvalues = torch.linalg.eigvalsh(torch.where(finite[:, None, None], small, 0).double()).to(point.dtype)
    eigenvalues = torch.where(finite[:, None], eigenvalues, torch.nan)
    return eigenvalues[:, 0], eigenvalues[:, -1]
