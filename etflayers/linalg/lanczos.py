r"""The extreme eigenvalues of a symmetric map on a space of matrices, by Lanczos' method from products alone.

Lanczos builds an orthonormal basis of span(v, Hv, H^2 v, ...) in which H is tridiagonal; the eigenvalues of
that small matrix lie between those of H and approach the extreme ones first. As soon as the basis spans an
invariant subspace, it ends; the rest of the small matrix is then filled with a Rayleigh quotient, which lies
between its extreme eigenvalues and so changes neither.

H <-> product, v <-> vector, the diagonals of the small matrix <-> alpha, beta.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from etflayers.linalg.matrices import inner, norm

__all__ = ["extreme_eigenvalues"]


def extreme_eigenvalues(
    product: Callable[[Tensor], Tensor],
    start: Tensor,
    *,
    steps: int,
    project: Callable[[Tensor], Tensor] | None = None,
) -> tuple[Tensor, Tensor]:
    """Estimates of the smallest and the largest eigenvalue; they lie between the true ones.

    Exact where ``steps`` is the dimension of the space.

    Args:
        product: the map, symmetric on the space.
        start: v, ``(B, d, n)``, in the space and not zero; anything but an eigenvector will do.
        steps: products, at most the dimension of the space.
        project: the orthogonal projection onto the space, to remove what rounding adds; ``None``: the space
            of all matrices.

    Returns:
        Two tensors ``(B,)``, NaN where the map is not finite.

    Reference:
        Lanczos (1950), An iteration method for the solution of the eigenvalue problem.

    >>> scales = torch.tensor([[1.0], [-1.0], [2.0]])
    >>> smallest, largest = extreme_eigenvalues(lambda v: scales * v, torch.ones(1, 3, 1), steps=3)
    >>> round(float(smallest), 4), round(float(largest), 4)
    (-1.0, 2.0)
    """
    vector = start / norm(start)[:, None, None]
    basis: list[Tensor] = []
    diagonal: list[Tensor] = []
    off_diagonal: list[Tensor] = []
    for _ in range(steps):
        basis.append(vector)
        image = product(vector)
        diagonal.append(inner(vector, image))
        size = norm(image)
        # Twice: what is left may be no larger than the rounding of the first pass. That has a part outside
        # the space, too, in which the map would seem to be singular.
        for _ in range(2):
            image = image if project is None else project(image)
            for earlier in basis:
                image = image - inner(image, earlier)[:, None, None] * earlier
        length = norm(image)
        invariant = length <= torch.finfo(start.dtype).eps ** 0.5 * size
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
    eigenvalues = torch.linalg.eigvalsh(torch.where(finite[:, None, None], small, 0).double()).to(start.dtype)
    eigenvalues = torch.where(finite[:, None], eigenvalues, torch.nan)
    return eigenvalues[:, 0], eigenvalues[:, -1]
