"""The extreme eigenvalues of a Riemannian Hessian: is a point a minimum, and how long is a safe step?"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from etflayers.geometry import project_tangent
from etflayers.linalg import extreme_eigenvalues

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
    return extreme_eigenvalues(
        hessian,
        project_tangent(point, start.expand_as(point)),
        steps=min(dimension, max_products),
        project=lambda vector: project_tangent(point, vector),
    )
