"""What the library is measured against, besides the oracles of ``etflayers.testing``."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from etflayers.geometry import centered_basis_adjoint, centered_basis_apply, etf_radius

__all__ = ["five_products", "five_products_and_eigh", "tall_svd_frame"]


def five_products(num_classes: int, in_features: int) -> Callable[[], Tensor]:
    """The floor: the five d x n x n products, n = K - 1, that no forward and backward pass can do without.

    They are the Gram matrix and the factor going forward, and three products going back.
    """
    rank = num_classes - 1
    left, right = torch.randn(rank, rank), torch.randn(rank, in_features)

    def call() -> Tensor:
        for _ in range(4):
            left @ right
        return left @ right

    return call


def five_products_and_eigh(num_classes: int, in_features: int) -> Callable[[], object]:
    """The floor and one eigenproblem of size K in float32, the least of a way through a factorization."""
    products = five_products(num_classes, in_features)
    root = torch.randn(num_classes, 2 * num_classes)
    gram = root @ root.mT

    def call() -> object:
        products()
        return torch.linalg.eigh(gram)

    return call


def tall_svd_frame(means: Tensor) -> Tensor:
    """``etflayers.testing.svd_frame`` on the transposed matrix, the layout in which LAPACK is faster."""
    left, _, right = torch.linalg.svd(centered_basis_apply(means).mT, full_matrices=False)
    return etf_radius(means.shape[-2]) * centered_basis_adjoint((left @ right).mT)
