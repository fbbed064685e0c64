"""Oracles, peers and error measures, for the tests and the benchmarks of this library and of yours."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from etflayers.checks import require, require_module
from etflayers.geometry import (
    centered_basis_adjoint,
    centered_basis_apply,
    etf_radius,
    random_stiefel,
    require_etf_dims,
)

__all__ = [
    "OracleSolution",
    "adjoint_identity_error",
    "means_with_condition",
    "published_anchor_weight",
    "relative_error",
    "riemannian_descent_frame",
    "svd_frame",
    "trust_regions_frame",
]


class OracleSolution(NamedTuple):
    """What an iterative method found: the frame (K, d), its published objective and the iterations spent."""

    frame: Tensor
    objective: float
    iterations: int


def relative_error(value: Tensor, reference: Tensor) -> float:
    """Frobenius norm of the difference over that of the reference, in float64.

    >>> relative_error(torch.tensor([1.0, 1.0]), torch.tensor([1.0, 0.0]))
    1.0
    """
    reference = reference.detach().double()
    return float((value.detach().double() - reference).norm() / reference.norm())


def means_with_condition(
    num_classes: int,
    in_features: int,
    kappa: float,
    *,
    generator: torch.Generator | None = None,
    dtype: torch.dtype = torch.float64,
) -> Tensor:
    """Class means (K, d) whose centered singular values fall log-evenly from 1 to 1 / kappa.

    >>> means = means_with_condition(4, 6, 10.0)
    >>> round(float(torch.linalg.cond(centered_basis_apply(means))), 6)
    10.0
    """
    require_etf_dims(num_classes, in_features)
    rank = num_classes - 1
    options = {"generator": generator, "dtype": torch.float64}
    left = random_stiefel(rank, rank, **options)  # type: ignore[arg-type]
    right = random_stiefel(in_features, rank, **options)  # type: ignore[arg-type]
    values = torch.logspace(0, -math.log10(kappa), rank, dtype=torch.float64)
    return centered_basis_adjoint((left * values) @ right.mT).to(dtype)


def svd_frame(means: Tensor) -> Tensor:
    """The nearest frame by ``torch.linalg.svd`` and autograd alone: the plain reference of the fused node.

    Its gradient is exact for distinct singular values and not finite where they coincide.

    >>> from etflayers import nearest_etf
    >>> means = torch.randn(4, 6, dtype=torch.float64)
    >>> bool(torch.allclose(svd_frame(means), nearest_etf(means)))
    True
    """
    left, _, right = torch.linalg.svd(centered_basis_apply(means), full_matrices=False)
    return etf_radius(means.shape[-2]) * centered_basis_adjoint(left @ right)


def adjoint_identity_error(function: Callable[[Tensor], Tensor], point: Tensor) -> float:
    """Relative gap in <J'g, v> = <g, Jv> for random v and g: do both modes differentiate the same map?

    >>> adjoint_identity_error(torch.sin, torch.ones(3, dtype=torch.float64)) < 1e-12
    True
    """
    value, pullback = torch.func.vjp(function, point)  # type: ignore[misc]
    cotangent, tangent = torch.randn_like(value), torch.randn_like(point)
    (pulled,) = pullback(cotangent)
    _, pushed = torch.func.jvp(function, (point,), (tangent,))  # type: ignore[misc]
    left, right = float((pulled * tangent).sum().detach()), float((cotangent * pushed).sum().detach())
    scale = float((pulled.norm() * tangent.norm() + cotangent.norm() * pushed.norm()).detach())
    return abs(left - right) / scale if scale > 0 else 0.0


def published_anchor_weight(delta: float, num_classes: int) -> float:
    """The ``proximity`` of :func:`etflayers.nearest_etf` that equals delta of the published objective.

    The published linear form is 2/sqrt(K-1) Y M + delta P0 with P0 = W0'/c on the simplex, ours X + p W0.
    """
    return delta * math.sqrt(num_classes - 1) / (2 * etf_radius(num_classes))


class _PublishedProblem:
    """min over P in St(d, K) of |Y - P M / sqrt(K-1)|^2 + delta/2 |P - P0|^2, M = I - 11'/K, Y = means'.

    P has one column more than a simplex has dimensions. Without an anchor the direction P1 is free. With
    one, P0 has to say where P1 goes: into a spare coordinate, so that it does not disturb the frame.
    """

    def __init__(self, means: Tensor, anchor: Tensor | None, delta: float) -> None:
        k, d = means.shape
        # With an anchor, more rows than columns: O(K) has two components, and trust regions
        # would stay in that of their start.
        spare = max(k - d, 0) if anchor is None else max(k + 1 - d, 1)
        self.features = d
        self.scale = 1 / math.sqrt(k - 1)
        self.centering = np.eye(k) - 1 / k
        self.target = np.zeros((d + spare, k))
        self.target[:d] = means.detach().double().numpy().T
        self.delta = delta
        self.anchor = np.zeros_like(self.target)
        if anchor is not None:
            self.anchor[:d] = anchor.detach().double().numpy().T / etf_radius(k)
            self.anchor[d] = 1 / math.sqrt(k)

    def cost(self, p: np.ndarray) -> float:
        residual = self.target - self.scale * p @ self.centering
        return float((residual**2).sum() + self.delta / 2 * ((p - self.anchor) ** 2).sum())

    def gradient(self, p: np.ndarray) -> np.ndarray:
        residual = self.target - self.scale * p @ self.centering
        return -2 * self.scale * residual @ self.centering + self.delta * (p - self.anchor)

    def hessian(self, p: np.ndarray, direction: np.ndarray) -> np.ndarray:
        return 2 * self.scale**2 * direction @ self.centering + self.delta * direction

    def frame(self, p: np.ndarray) -> Tensor:
        rows = etf_radius(p.shape[1]) * (p @ self.centering).T
        return torch.from_numpy(np.ascontiguousarray(rows[:, : self.features]))


def trust_regions_frame(
    means: Tensor,
    *,
    anchor: Tensor | None = None,
    delta: float = 0.0,
    gradient_norm: float = 1e-10,
    seed: int = 0,
) -> OracleSolution:
    """The nearest ETF as published: Riemannian trust regions (pymanopt) on St(d, K) from a random start.

    Args:
        means: ``(K, d)``.
        anchor: a unit-row simplex ETF ``(K, d)``, or none.
        delta: weight of the published proximal term; see :func:`published_anchor_weight`.
        gradient_norm: stop when the Riemannian gradient is this small.
        seed: of the random start.

    Raises:
        MissingDependencyError: pymanopt is not installed.

    Reference:
        Markou, Ajanthan, Gould (2024), arXiv 2411.01248.
    """
    pymanopt = require_module("pymanopt", extra="solvers")
    manifolds = require_module("pymanopt.manifolds", extra="solvers")
    optimizers = require_module("pymanopt.optimizers", extra="solvers")
    published = _PublishedProblem(means, anchor, delta)
    rows, columns = published.target.shape
    manifold = manifolds.Stiefel(rows, columns)
    problem = pymanopt.Problem(
        manifold,
        pymanopt.function.numpy(manifold)(published.cost),
        euclidean_gradient=pymanopt.function.numpy(manifold)(published.gradient),
        euclidean_hessian=pymanopt.function.numpy(manifold)(published.hessian),
    )
    start = random_stiefel(
        rows, columns, generator=torch.Generator().manual_seed(seed), dtype=torch.float64
    ).numpy()
    optimizer = optimizers.TrustRegions(verbosity=0, min_gradient_norm=gradient_norm, max_iterations=500)
    result = optimizer.run(problem, initial_point=start)
    return OracleSolution(published.frame(result.point), float(result.cost), int(result.iterations))


def riemannian_descent_frame(
    means: Tensor,
    *,
    learning_rate: float = 0.5,
    gradient_norm: float = 1e-8,
    max_steps: int = 100_000,
    seed: int = 0,
) -> OracleSolution:
    """The nearest ETF by geoopt's Riemannian gradient descent on St(d, K) from a random start, in float64.

    Args:
        means: ``(K, d)``; they are scaled to unit Frobenius norm, as published, so that the step fits.
        learning_rate: of ``geoopt.optim.RiemannianSGD``.
        gradient_norm: stop when the Riemannian gradient is this small.
        max_steps: raise when more are needed.
        seed: of the random start.

    Raises:
        MissingDependencyError: geoopt is not installed.
        InvalidArgumentError: not converged within ``max_steps``.
    """
    geoopt = require_module("geoopt", extra="solvers")
    centered = means.detach().double() - means.detach().double().mean(0)
    published = _PublishedProblem(centered / centered.norm(), None, 0.0)
    target, centering = torch.from_numpy(published.target), torch.from_numpy(published.centering)
    start = random_stiefel(*target.shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    manifold = geoopt.EuclideanStiefel()
    point = geoopt.ManifoldParameter(start, manifold=manifold)
    optimizer = geoopt.optim.RiemannianSGD([point], lr=learning_rate)
    for step in range(max_steps):
        optimizer.zero_grad()
        cost = (target - published.scale * point @ centering).square().sum()
        cost.backward()
        if float(manifold.egrad2rgrad(point.data, point.grad).norm()) <= gradient_norm:
            return OracleSolution(published.frame(point.detach().numpy()), float(cost.detach()), step)
        optimizer.step()
    require(
        False,
        f"max_steps={max_steps} was too few for gradient_norm={gradient_norm}: raise it or the learning_rate",
    )
    raise AssertionError("unreachable")
