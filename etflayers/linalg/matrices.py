"""What is done to a batch of matrices everywhere: inner products, norms, eigenvalues and what bounds them."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["inner", "norm", "pair_sums", "spectral", "spectral_bounds", "trace"]


def inner(a: Tensor, b: Tensor) -> Tensor:
    """<A, B> for each member of the batch, ``(B,)``."""
    product: Tensor = (a * b).sum((-2, -1))
    return product


def norm(a: Tensor) -> Tensor:
    """Frobenius norm of each member of the batch, ``(B,)``."""
    size: Tensor = torch.linalg.vector_norm(a, dim=(-2, -1))
    return size


def spectral(basis: Tensor, values: Tensor) -> Tensor:
    """The symmetric matrix with eigenvectors ``basis`` and eigenvalues ``values``.

    >>> spectral(torch.eye(2), torch.tensor([1.0, 2.0]))
    tensor([[1., 0.],
            [0., 2.]])
    """
    return (basis * values.unsqueeze(-2)) @ basis.mT


def pair_sums(values: Tensor) -> Tensor:
    """All sums of two values, ``(..., n, n)``.

    >>> pair_sums(torch.tensor([1.0, 2.0]))
    tensor([[2., 3.],
            [3., 4.]])
    """
    return values.unsqueeze(-1) + values.unsqueeze(-2)


def trace(matrix: Tensor) -> Tensor:
    """The trace of each member of the batch, ``(..., 1, 1)``."""
    return matrix.diagonal(dim1=-2, dim2=-1).sum(-1)[..., None, None]


def spectral_bounds(gram: Tensor) -> tuple[Tensor, Tensor]:
    r"""A lower bound of the eigenvalues and a safe upper one, without an eigenproblem.

    From the mean m and the standard deviation s of the n eigenvalues, which the trace and the Frobenius norm
    tell,

        m - s sqrt(n-1) <= lambda <= m + s sqrt(n-1)                         (Wolkowicz and Styan 1980),

    never worse than the trace, and sharp where all eigenvalues agree; the largest absolute row sum is another
    upper bound.

    Args:
        gram: ``(..., n, n)``, symmetric, positive semi-definite.

    Returns:
        The bounds, ``(..., 1, 1)`` each; the lower one is 0 if there is no better one.

    Reference:
        Wolkowicz, Styan (1980), Bounds for eigenvalues using traces.

    >>> lowest, highest = spectral_bounds(2 * torch.eye(3, dtype=torch.float64))
    >>> round(float(lowest), 6), round(float(highest), 6)
    (2.0, 2.0)
    """
    size = gram.shape[-1]
    identity = torch.eye(size, dtype=gram.dtype, device=gram.device)
    mean = trace(gram) / size
    variance = (gram - mean * identity).square().sum((-2, -1), keepdim=True) / size
    spread = ((size - 1) * variance).sqrt()
    row_sum = gram.abs().sum(-1, keepdim=True).amax(-2, keepdim=True)
    slack = 1 + 8 * size * torch.finfo(gram.dtype).eps
    return (mean - spread).clamp_min(0), torch.minimum(mean + spread, row_sum) * slack
