"""What is done to one batch of matrices everywhere: inner products, norms, a matrix from its eigenpairs."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["inner", "norm", "pair_sums", "spectral"]


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
