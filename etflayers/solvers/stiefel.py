r"""Minimizing any smooth objective over the Stiefel manifold St(d, n): what its solvers share.

**The metric** is the one St(d, n) has as a subset of the d x n matrices. With the Euclidean gradient G of f
at Q and P_Q(Z) = Z - Q sym(Q'Z), the projection onto the tangent space,

    grad f = P_Q(G),        Hess f[xi] = P_Q(D^2 f[xi] - xi S),   S = sym(Q'G),

where -xi S is the curvature of the manifold: S holds the multipliers of the constraint Q'Q = I. (Absil,
Mahony, Trumpf 2013, An extrinsic look at the Riemannian Hessian.)

**Batches.** Each member of a batch is a problem of its own: the sum of the values has the gradient of each in
its place, so one backward pass serves all.

f <-> objective, Q <-> point, G <-> euclidean (its norm <-> slope), grad f <-> gradient, S <-> multipliers,
xi <-> tangent.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple, Protocol, runtime_checkable

import torch
from torch import Tensor

from etflayers.checks import require
from etflayers.geometry import project_tangent
from etflayers.linalg import norm
from etflayers.status import Status

__all__ = [
    "LocalModel",
    "Objective",
    "StiefelSolution",
    "StiefelSolver",
    "assess",
    "local_model",
]

Objective = Callable[[Tensor], Tensor]
"""Q, ``(B, d, n)``, to one value for each member of the batch, ``(B,)``, in plain PyTorch."""


class StiefelSolution(NamedTuple):
    """What a solver found, one entry for each member of the batch.

    Attributes:
        point: Q, ``(B, d, n)``, orthonormal columns.
        value: f(Q), ``(B,)``.
        gradient_norm: Frobenius norm of the Riemannian gradient at Q, ``(B,)``.
        iterations: spent on the batch.
        codes: :class:`~etflayers.status.Status` codes: converged, not converged or not finite, ``(B,)``.
    """

    point: Tensor
    value: Tensor
    gradient_norm: Tensor
    iterations: int
    codes: Tensor


@runtime_checkable
class StiefelSolver(Protocol):
    """Anything that finds a local minimizer of an objective on the Stiefel manifold, from a start."""

    def minimize(self, objective: Objective, start: Tensor) -> StiefelSolution:
        """Minimize ``objective`` from ``start``, ``(B, d, n)`` with orthonormal columns."""
        ...


class LocalModel(NamedTuple):
    """The objective to second order about a point: everything that a solver may know of it.

    Attributes:
        value: f(Q), ``(B,)``.
        gradient: Riemannian, ``(B, d, n)``.
        slope: Frobenius norm of the Euclidean gradient, ``(B,)``: the scale of the Riemannian one.
        hessian: the Riemannian Hessian, from tangent vectors to tangent vectors.
    """

    value: Tensor
    gradient: Tensor
    slope: Tensor
    hessian: Callable[[Tensor], Tensor]

    def finite(self) -> Tensor:
        """Which members of the batch have a finite value and gradient, ``(B,)``."""
        return torch.isfinite(self.value) & torch.isfinite(self.slope)

    def critical(self, tolerance: float) -> Tensor:
        """Where |grad f| <= tolerance (1 + |G|), ``(B,)``: absolute for small |G|, relative for large."""
        return norm(self.gradient) <= tolerance * (1 + self.slope)


def local_model(objective: Objective, point: Tensor) -> LocalModel:
    """The model of ``objective`` about ``point`` (``(B, d, n)``); its tensors carry no gradient."""
    with torch.enable_grad():
        point = point.detach().requires_grad_()
        value = objective(point)
        require(
            value.requires_grad,
            "objective must be a differentiable function of Q: keep detach(), item() and NumPy out of it",
        )
        (euclidean,) = torch.autograd.grad(value.sum(), point, create_graph=True, materialize_grads=True)
    base, slope = point.detach(), euclidean.detach()
    product = base.mT @ slope
    multipliers = (product + product.mT) / 2

    def hessian(tangent: Tensor) -> Tensor:
        curved = -tangent @ multipliers
        if euclidean.requires_grad:  # not so for a linear objective
            (second,) = torch.autograd.grad(
                euclidean, point, tangent, retain_graph=True, materialize_grads=True
            )
            curved += second
        return project_tangent(base, curved)

    # Near a critical point most of G is normal. The rounding error of one projection is normal, too, and
    # would be a direction in which the Hessian vanishes; a second projection removes it.
    gradient = project_tangent(base, slope - base @ multipliers)
    return LocalModel(value.detach(), gradient, norm(slope), hessian)


def assess(model: LocalModel, point: Tensor, iterations: int, tolerance: float) -> StiefelSolution:
    """The solution record of ``point``, judged by the objective's own gradient there."""
    codes = torch.where(model.critical(tolerance), int(Status.CONVERGED), int(Status.NOT_CONVERGED))
    codes = torch.where(model.finite(), codes, int(Status.NON_FINITE))
    return StiefelSolution(point.detach(), model.value, norm(model.gradient), iterations, codes)
