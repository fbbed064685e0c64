"""Riemannian trust regions in PyTorch: a batch of problems at once, on their own device."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from etflayers.geometry import retract_stiefel
from etflayers.linalg import conjugate_gradients, inner, norm
from etflayers.precision import default_tolerance
from etflayers.solvers.stiefel import (
    LocalModel,
    Objective,
    StiefelSolution,
    StiefelSolver,
    assess,
    local_model,
)

__all__ = ["RiemannianNewton"]


@dataclass(frozen=True)
class RiemannianNewton(StiefelSolver):
    r"""Newton steps by truncated conjugate gradients, each kept in a ball in which its model was found true.

    Second order: it passes saddle points by directions of negative curvature and converges quadratically.
    Each member of the batch has its own ball. For one problem about as fast as pymanopt's trust regions, for
    batches faster; without NumPy, on the device of the start.

    Args:
        tolerance: stop where \|grad f\| <= tolerance (1 + \|G\|), G the Euclidean gradient;
            ``None``: eps^(3/4).
        max_iterations: Newton steps.
        max_products: Hessian-vector products within one step.

    Reference:
        Absil, Baker, Gallivan (2007), Trust-region methods on Riemannian manifolds.

    >>> target = torch.eye(4, 2).expand(1, 4, 2)
    >>> start = torch.eye(4).roll(1, 0)[None, :, :2]
    >>> solution = RiemannianNewton().minimize(lambda q: -(q * target).sum((-2, -1)), start)
    >>> torch.allclose(solution.point, target, atol=1e-4)
    True
    """

    tolerance: float | None = None
    max_iterations: int = 100
    max_products: int = 200

    def minimize(self, objective: Objective, start: Tensor) -> StiefelSolution:
        """Minimize ``objective`` from ``start``, ``(B, d, n)`` with orthonormal columns."""
        tolerance = default_tolerance(start.dtype) if self.tolerance is None else self.tolerance
        point, model = start, local_model(objective, start)
        largest = start.shape[-1] ** 0.5  # the manifold lies on a sphere of this radius
        radius = torch.full_like(model.value, largest / 4)
        iterations = 0
        while iterations < self.max_iterations:
            active = model.finite() & ~model.critical(tolerance)
            if not bool(active.any()):
                break
            iterations += 1
            step, decrease = self._step(model, radius, active, tolerance)
            candidate = retract_stiefel(point, step)
            there = local_model(objective, candidate)
            # Near the minimizer the decrease drowns in the rounding of the values; the model is right there.
            noise = 1e3 * torch.finfo(start.dtype).eps * model.value.abs().clamp_min(1)
            quality = (model.value - there.value + noise) / (decrease + noise)
            at_boundary = norm(step) > 0.99 * radius
            radius = torch.where(quality > 0.25, radius, radius / 4)  # NaN shrinks, too
            radius = torch.where((quality > 0.75) & at_boundary, (2 * radius).clamp_max(largest), radius)
            accepted = active & (quality > 0.1)
            point = torch.where(accepted[:, None, None], candidate, point)
            model = there if bool((accepted | ~active).all()) else local_model(objective, point)
        return assess(model, point, iterations, tolerance)

    def _step(
        self, model: LocalModel, radius: Tensor, active: Tensor, tolerance: float
    ) -> tuple[Tensor, Tensor]:
        """A step within the ball and the decrease that the model promises for it."""
        size, scale = norm(model.gradient), 1 + model.slope
        # A residual proportional to the square of the gradient keeps Newton's order of convergence.
        stop = torch.maximum(size * (size / scale).clamp_max(0.1), 0.1 * tolerance * scale)
        newton = conjugate_gradients(
            model.hessian,
            torch.where(active[:, None, None], -model.gradient, 0),
            stop=torch.where(active, stop, torch.inf),
            max_iterations=self.max_products,
            radius=radius,
        )
        decrease = -inner(newton.solution, model.gradient + newton.image / 2)
        return newton.solution, decrease
