r"""The derivative of a minimizer on the Stiefel manifold, from the condition that its gradient vanishes.

**First order.** For inputs x the minimizer Q satisfies grad f(Q, x) = 0. Differentiate: with the Riemannian
Hessian H at Q and the tangent projection P (see ``solvers.stiefel``),

    H dQ = -P (d_x G)[dx],      G the Euclidean gradient of f in Q.

H is symmetric and, at a strict minimum, positive definite on the tangent space. Going back from a cotangent Z
of Q, <Z, dQ> = -<v, (d_x G)[dx]> with

    H v = P Z,                  so x receives  -d_x <G(Q, x), v>,  v held constant.                       (*)

H is never formed: conjugate gradients need its products, two backward passes through f each. The memory is a
few d x n matrices and the graph of one gradient.

**Higher orders.** (*) is a function of Q, x and Z, so it can be differentiated again, once its linear solve
can. Extend H to all d x n matrices by A = P H P + (I - P), symmetric and positive definite with H; no
manifold is left to think of. Differentiate A v = Z:

    A dv = dZ - dA v,   so for a cotangent Y of v, with A z = Y:   Z gets z,   (Q, x) get -d <z, A(Q, x) v>,

which holds one such solve again, and so on to any order.

Q <-> point, x <-> inputs, f <-> objective, G <-> euclidean, v <-> tangent or solution, Z <-> grad or rhs.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from etflayers.geometry import project_tangent, retract_stiefel
from etflayers.linalg import ConjugateGradients, norm
from etflayers.precision import full_precision
from etflayers.solvers import StiefelSolution, StiefelSolver, extreme_curvatures, local_model
from etflayers.status import SolveWarning, Status

__all__ = ["LinearSolve", "ParametricObjective", "StiefelProblem"]

ParametricObjective = Callable[..., Tensor]
"""Q, ``(B, d, n)``, and the tensors on which the objective depends, to ``(B,)``."""


@dataclass
class LinearSolve:
    r"""How the latest backward pass solved H v = P Z; before the first one, nothing is known.

    Attributes:
        residual: \|H v - P Z\| / \|P Z\|, ``(B,)``.
        codes: :class:`~etflayers.status.Status` codes, ``(B,)``. Where the residual is above the tolerance, H
            was found to be indefinite (a saddle), singular (degenerate), or there were too few iterations.
        iterations: Hessian-vector products.
    """

    residual: Tensor | None = None
    codes: Tensor | None = None
    iterations: int = 0


@dataclass(frozen=True)
class _System:
    """The objective and how to solve its linear systems: what all orders of differentiation share."""

    objective: ParametricObjective
    linear_solver: ConjugateGradients
    record: LinearSolve

    def solve(self, rhs: Tensor, point: Tensor, inputs: Sequence[Tensor]) -> Tensor:
        """v with A v = ``rhs``."""
        model = local_model(lambda q: self.objective(q, *inputs), point)
        # Twice, because the rounding error of one projection would be a direction in which H vanishes.
        tangent = project_tangent(point, project_tangent(point, rhs))
        # Of a normal cotangent only rounding is left, in which a flat direction would be looked for in vain.
        rounding = 16 * torch.finfo(point.dtype).eps * norm(rhs)
        tangent = torch.where((norm(tangent) > rounding)[:, None, None], tangent, 0)
        tolerance, size = self.linear_solver.accuracy(point.dtype), norm(tangent)
        found = self.linear_solver.solve(model.hessian, tangent)
        residual = found.residual / torch.where(size > 0, size, 1)
        flat = torch.finfo(point.dtype).eps ** 0.5
        codes = torch.full_like(residual, Status.CONVERGED, dtype=torch.int64)
        codes[residual > tolerance] = Status.NOT_CONVERGED
        codes[(residual > tolerance) & (found.curvature < flat)] = Status.DEGENERATE
        codes[(residual > tolerance) & (found.curvature < -flat)] = Status.SADDLE
        codes[~torch.isfinite(residual)] = Status.NON_FINITE
        self.record.residual, self.record.codes, self.record.iterations = residual, codes, found.iterations
        status = Status(int(codes.max()))
        if status is not Status.CONVERGED:
            warnings.warn(
                f"the gradient of the minimizer is uncertain (its linear system was solved to "
                f"{float(residual.max()):.1e} instead of {tolerance:.1e}): {status.message}",
                SolveWarning,
                stacklevel=2,
            )
        return found.solution + (rhs - tangent)

    def gradient(self, point: Tensor, inputs: Sequence[Tensor]) -> Tensor:
        """G, as a function of the point and the inputs."""
        (euclidean,) = torch.autograd.grad(
            self.objective(point, *inputs).sum(), point, create_graph=True, materialize_grads=True
        )
        return euclidean

    def pairing(self, tangent: Tensor, point: Tensor, *inputs: Tensor) -> Tensor:
        """<G, v>."""
        return (self.gradient(point, inputs) * tangent).sum()

    def form(self, z: Tensor, v: Tensor, point: Tensor, *inputs: Tensor) -> Tensor:
        """<z, A v>."""
        euclidean = self.gradient(point, inputs)
        product = point.mT @ euclidean
        along = project_tangent(point, v)
        curved = -along @ ((product + product.mT) / 2)
        if euclidean.requires_grad:
            (second,) = torch.autograd.grad(
                euclidean, point, along, create_graph=True, materialize_grads=True
            )
            curved = curved + second
        return (project_tangent(point, z) * curved).sum() + (z * (v - along)).sum()


def _partial(
    scalar: Callable[..., Tensor], variables: Sequence[Tensor], wanted: Sequence[bool]
) -> list[Tensor | None]:
    """The derivatives of ``scalar(*variables)`` in the wanted variables, each by itself.

    The variables may be functions of each other; here they are independent, and nothing behind them is
    reached. The result can be differentiated again where a graph is being recorded.
    """
    recorded = torch.is_grad_enabled()
    with torch.enable_grad():
        own = [
            v.view_as(v) if recorded and v.requires_grad else v.detach().requires_grad_(v.is_floating_point())
            for v in variables
        ]
        value = scalar(*own)
        targets = [v for v, w in zip(own, wanted, strict=True) if w]
        found = iter(
            torch.autograd.grad(value, targets, create_graph=recorded, materialize_grads=True)
            if value.requires_grad and targets
            else [torch.zeros_like(v) for v in targets]
        )
    return [next(found) if w else None for w in wanted]


class _Solve(torch.autograd.Function):
    # v with A(Q, x) v = rhs, as a function of rhs, Q and x.

    @staticmethod
    def forward(ctx: Any, system: _System, rhs: Tensor, point: Tensor, *inputs: Tensor) -> Tensor:
        ctx.system = system
        solution = system.solve(rhs, point, inputs)
        ctx.save_for_backward(solution, point, *inputs)
        return solution

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        solution, *variables = ctx.saved_tensors
        with full_precision(grad):
            z = _solve(ctx.system, grad, *variables)
            changes = _partial(
                lambda *own: -ctx.system.form(z, solution, *own), variables, ctx.needs_input_grad[2:]
            )
        return None, z, *changes


def _solve(system: _System, rhs: Tensor, *variables: Tensor) -> Tensor:
    solution: Tensor = _Solve.apply(system, rhs, *variables)  # type: ignore[no-untyped-call]
    return solution


class _StationaryPoint(torch.autograd.Function):
    # x -> Q, with the derivative (*).

    @staticmethod
    def forward(ctx: Any, system: _System, point: Tensor, *inputs: Tensor) -> Tensor:
        ctx.system = system
        point = point.clone()
        ctx.save_for_backward(point, *inputs)
        return point

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        variables = ctx.saved_tensors
        with full_precision(grad):
            tangent = project_tangent(variables[0], _solve(ctx.system, grad, *variables))
            _, *changes = _partial(
                lambda *own: -ctx.system.pairing(tangent, *own),
                variables,
                (False, *ctx.needs_input_grad[2:]),
            )
        return None, None, *changes


@dataclass
class StiefelProblem:
    r"""Find a local minimizer Q of f(Q, x) over d x n matrices with orthonormal columns.

    Attributes:
        objective: f, ``(Q, *inputs)`` to ``(B,)``.
        inputs: x, the tensors on which Q depends.
        start: where the solver starts, ``(B, d, n)`` with orthonormal columns.
        solver: how Q is found.
        linear_solver: how the linear system of the implicit derivative is solved.
        unrolled_steps: gradient steps from the minimizer on, for the unrolled derivative. With steps of
            length t its error shrinks by \|I - t H\| each time.
        record: how the implicit derivative's systems were solved; ``None`` without one.
    """

    objective: ParametricObjective
    inputs: Sequence[Tensor]
    start: Tensor
    solver: StiefelSolver
    linear_solver: ConjugateGradients = field(default_factory=ConjugateGradients)
    unrolled_steps: int = 100
    record: LinearSolve | None = field(default=None, init=False)

    @cached_property
    def solution(self) -> StiefelSolution:
        """What the solver found, constants."""
        with torch.enable_grad():  # which a solver that calls autograd needs
            solution = self.solver.minimize(self.at_constants(), self.start)
        return solution._replace(point=solution.point.detach())

    def at_constants(self) -> Callable[[Tensor], Tensor]:
        """The objective as a function of Q alone."""
        # An inference tensor cannot enter a graph, not even as a constant; a copy of it can.
        constants = [x.clone() if x.is_inference() else x.detach() for x in self.inputs]
        return lambda point: self.objective(point, *constants)

    def implicit(self) -> Tensor:
        """Q with the derivative (*)."""
        self.record = LinearSolve()
        system = _System(self.objective, self.linear_solver, self.record)
        point: Tensor = _StationaryPoint.apply(system, self.solution.point, *self.inputs)  # type: ignore[no-untyped-call]
        return point

    def unrolled(self) -> Tensor:
        """Q followed by gradient steps, which are differentiated."""
        point = self.solution.point
        if not torch.is_grad_enabled():
            return point
        model = local_model(self.at_constants(), point)
        _, largest = extreme_curvatures(model.hessian, point)
        length = 1 / largest[:, None, None]  # the longest safe one
        point = point.detach().requires_grad_()
        for _ in range(self.unrolled_steps):
            value = self.objective(point, *self.inputs).sum()
            (euclidean,) = torch.autograd.grad(value, point, create_graph=True)
            # Not the polar retraction: the derivative of an SVD does not exist where singular values
            # coincide, and here all of them are 1.
            point = retract_stiefel(point, -length * project_tangent(point, euclidean), method="qr")
        return point

    def detached(self) -> Tensor:
        """Q, a constant."""
        return self.solution.point
