"""Kernels: what it means for two samples to be alike, as functions of two sets of samples.

A kernel is called with x, ``(n, ...)``, and y, ``(m, ...)``, and returns the matrix K(x_i, y_j), ``(n, m)``.
Every kernel here is positive semidefinite, and differentiable twice, also where a point of x lies on one of
y: a set that starts from real samples does so at its first step.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Protocol

import torch
from torch import Tensor, nn

from etflayers.checks import require, require_floating, require_number
from etflayers.precision import full_precision, working_dtype

__all__ = ["FeatureKernel", "Kernel", "LinearKernel", "RBFKernel", "sample_rows"]


class Kernel(Protocol):
    """A positive semidefinite function of two samples, evaluated on all pairs."""

    def __call__(self, x: Tensor, y: Tensor, /) -> Tensor:
        """K(x_i, y_j), ``(n, m)``, in float32 or better, of samples x, ``(n, ...)``, and y, ``(m, ...)``."""
        ...


def sample_rows(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    """Two sets of samples as rows ``(n, p)`` and ``(m, p)`` in their working precision, after checking them.

    Args:
        x: ``(n, ...)``.
        y: ``(m, ...)``, samples of the same shape and dtype.

    Returns:
        The flattened samples; half precision becomes float32.

    Raises:
        InvalidArgumentError: shapes or dtypes that do not fit.

    >>> [tuple(rows.shape) for rows in sample_rows(torch.zeros(3, 1, 2, 2), torch.zeros(5, 1, 2, 2))]
    [(3, 4), (5, 4)]
    """
    require_floating("x", x.dtype)
    require(
        x.dtype == y.dtype,
        f"x and y must have the same dtype, got {x.dtype} and {y.dtype}: convert one of them",
    )
    require(
        x.ndim >= 2 and y.ndim >= 2 and x.shape[1:] == y.shape[1:],
        f"x and y must hold samples of one shape, (n, ...) and (m, ...), "
        f"got {tuple(x.shape)} and {tuple(y.shape)}",
    )
    require(
        math.prod(x.shape[1:]) > 0,
        f"x and y must hold samples of at least one number, got {tuple(x.shape)}",
    )
    dtype = working_dtype(x.dtype)
    return x.flatten(1).to(dtype), y.flatten(1).to(dtype)


@dataclass(frozen=True)
class LinearKernel:
    r"""The inner product ``K(x, y) = <x, y> + b``: linear regression, with an offset where b > 0.

    Args:
        bias_variance: b >= 0, the prior variance of the offset.

    Raises:
        InvalidArgumentError: a negative or non-finite bias_variance; when called, samples that do not fit.

    >>> LinearKernel()(torch.tensor([[1.0, 2.0]]), torch.tensor([[3.0, 4.0], [0.0, 1.0]]))
    tensor([[11.,  2.]])
    """

    bias_variance: float = 0.0

    def __post_init__(self) -> None:
        require_number("bias_variance", self.bias_variance)

    def __call__(self, x: Tensor, y: Tensor, /) -> Tensor:
        """K(x_i, y_j), ``(n, m)``."""
        with full_precision(x):
            x, y = sample_rows(x, y)
            return x @ y.mT + self.bias_variance


@dataclass(frozen=True)
class RBFKernel:
    r"""The Gaussian ``K(x, y) = exp(-|x - y|^2 / (2 h^2))``.

    Args:
        bandwidth: h > 0, the distance at which samples stop being alike; for images of p pixels of unit
            variance distances are about ``sqrt(2p)``.

    Raises:
        InvalidArgumentError: a bandwidth that is not positive and finite; when called, samples that do not
            fit.

    >>> RBFKernel(bandwidth=1.0)(torch.tensor([[0.0]]), torch.tensor([[0.0], [1.0]]))
    tensor([[1.0000, 0.6065]])
    """

    bandwidth: float

    def __post_init__(self) -> None:
        require_number("bandwidth", self.bandwidth, positive=True)

    def __call__(self, x: Tensor, y: Tensor, /) -> Tensor:
        """K(x_i, y_j), ``(n, m)``."""
        with full_precision(x):
            x, y = sample_rows(x, y)
            # Distances do not change with the origin; one amid the samples keeps |x|^2 + |y|^2 - 2<x, y> from
            # cancelling. Rounding may leave a distance just below zero: clamping it would clamp its
            # derivative.
            origin = y.detach().mean(0)
            x, y = (x - origin) / self.bandwidth, (y - origin) / self.bandwidth
            halves = (x * x).sum(-1)[:, None] / 2 + (y * y).sum(-1) / 2
            return torch.exp(x @ y.mT - halves)


@dataclass(frozen=True)
class FeatureKernel:
    r"""A kernel of the features of a network, ``K(x, y) = k(phi(x), phi(y))``.

    The network has to give a sample the same features each time: put dropout in eval mode. Its parameters may
    require gradients; batches go through it whole.

    Args:
        module: phi, from samples ``(n, ...)`` to features ``(n, ...)``. It sees them in the dtype of its
            parameters, and under autocast if that is on.
        kernel: k, on the features.

    Raises:
        InvalidArgumentError: when called, features that are not one row for each sample.

    Reference:
        Zhou, Nezhadarya, Ba (2022), arXiv 2206.00719.

    >>> FeatureKernel(torch.nn.ReLU())(torch.tensor([[-1.0, 2.0]]), torch.tensor([[3.0, 4.0]]))
    tensor([[8.]])
    """

    module: nn.Module
    kernel: Kernel = field(default_factory=LinearKernel)

    def __call__(self, x: Tensor, y: Tensor, /) -> Tensor:
        """K(x_i, y_j), ``(n, m)``."""
        left = self._features(x)  # one pass for one set: its matrix is symmetric whatever the module does
        return self.kernel(left, left if y is x else self._features(y))

    def _features(self, samples: Tensor) -> Tensor:
        parameter = next(self.module.parameters(), samples)
        features: Tensor = self.module(samples.to(parameter.dtype))
        require(
            features.ndim >= 2 and len(features) == len(samples),
            f"module must return one row of features for each of {len(samples)} samples, "
            f"got shape {tuple(features.shape)}",
        )
        return features.to(samples.dtype)
