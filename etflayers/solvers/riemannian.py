"""Riemannian gradient descent by geoopt."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from etflayers.checks import require_module
from etflayers.precision import default_tolerance
from etflayers.solvers.stiefel import Objective, StiefelSolution, StiefelSolver, assess, local_model

__all__ = ["RiemannianDescent"]


@dataclass(frozen=True)
class RiemannianDescent(StiefelSolver):
    r"""Gradient steps with momentum (geoopt's ``RiemannianSGD``): a batch at once, on its own device.

    First order: one gradient a step and linear convergence, at a rate that depends on the step size; it does
    not leave saddle points. For objectives whose second derivatives are missing or too dear.

    Args:
        learning_rate: length of a step in units of the gradient; below 2 / (largest Hessian eigenvalue).
        momentum: share of the last step that is repeated.
        tolerance: stop where \|grad f\| <= tolerance (1 + \|G\|), G the Euclidean gradient;
            ``None``: eps^(3/4).
        max_iterations: gradient steps.

    Raises:
        MissingDependencyError: geoopt is not installed.

    >>> target = torch.eye(4, 2).expand(1, 4, 2)
    >>> start = torch.eye(4).roll(1, 0)[None, :, :2]
    >>> solution = RiemannianDescent().minimize(lambda q: -(q * target).sum((-2, -1)), start)
    >>> torch.allclose(solution.point, target, atol=1e-3)
    True
    """

    learning_rate: float = 0.1
    momentum: float = 0.8
    tolerance: float | None = None
    max_iterations: int = 10_000

    def minimize(self, objective: Objective, start: Tensor) -> StiefelSolution:
        """Minimize ``objective`` from ``start``, ``(B, d, n)`` with orthonormal columns."""
        geoopt = require_module("geoopt", extra="solvers")
        tolerance = default_tolerance(start.dtype) if self.tolerance is None else self.tolerance
        point = geoopt.ManifoldParameter(start.detach().clone(), manifold=geoopt.EuclideanStiefel())
        optimizer = geoopt.optim.RiemannianSGD([point], lr=self.learning_rate, momentum=self.momentum)
        iterations = 0
        model = local_model(objective, point.data)
        while iterations < self.max_iterations and bool((model.finite() & ~model.critical(tolerance)).any()):
            point.grad = torch.where(model.finite()[:, None, None], model.gradient, 0)
            optimizer.step()
            iterations += 1
            model = local_model(objective, point.data)
        return assess(model, point.data, iterations, tolerance)
