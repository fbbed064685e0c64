r"""The minimizer of a smooth objective on the Stiefel manifold, as a function of what the objective reads.

    Q(x) = argmin f(Q, x)   over   Q in St(d, n) = {d x n matrices with Q'Q = I},

a local minimizer: the one to which the solver is led from the start. How it is found and how the gradient
flows are arguments, and neither knows the other.

**What f reads.** Its inputs and, if it is an ``nn.Module``, its parameters. Both are handed over explicitly;
buffers come as copies, so that every evaluation sees the same function and leaves no trace. Anything else
that a plain function closes over is invisible to the derivative; if it requires a gradient, that is an error.
"""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from etflayers._torch import inside_transform, leave_to_eager
from etflayers.adjoints import Adjoint, LinearSolve, StiefelProblem, as_adjoint
from etflayers.checks import require, require_floating
from etflayers.errors import NonFiniteError
from etflayers.geometry import is_stiefel, project_stiefel
from etflayers.linalg import ConjugateGradients
from etflayers.precision import full_precision, working_dtype
from etflayers.solvers import (
    StiefelSolution,
    StiefelSolver,
    as_stiefel_solver,
    extreme_curvatures,
    local_model,
)
from etflayers.status import SolveWarning, Status

__all__ = ["CriticalPoint", "solve_stiefel", "stiefel_argmin"]


@dataclass(frozen=True)
class CriticalPoint:
    """A critical point, how it was reached and whether it is a minimum; one entry for each batch member.

    Attributes:
        point: Q, ``(B, d, n)``; NaN where the objective was not finite.
        value: f(Q), ``(B,)``.
        gradient_norm: Frobenius norm of the Riemannian gradient, ``(B,)``.
        smallest_curvature: estimate of the smallest eigenvalue of the Riemannian Hessian, ``(B,)``.
        largest_curvature: and of its largest.
        codes: :class:`~etflayers.status.Status` codes, ``(B,)`` int64.
        iterations: of the solver.
        linear_solve: how the backward pass went, once there was one; ``None`` without a linear system.
    """

    point: Tensor
    value: Tensor
    gradient_norm: Tensor
    smallest_curvature: Tensor
    largest_curvature: Tensor
    codes: Tensor
    iterations: int
    linear_solve: LinearSolve | None

    @property
    def status(self) -> Status:
        """The worst status in the batch (waits for the device)."""
        return Status(int(self.codes.max())) if self.codes.numel() else Status.CONVERGED

    @property
    def message(self) -> str:
        """What the worst status means and what to do about it."""
        return self.status.message


# Iterations that depend on values are nothing to compile: the graph breaks here.
@leave_to_eager
def stiefel_argmin(
    objective: Callable[..., Tensor],
    *inputs: Tensor,
    start: Tensor,
    solver: StiefelSolver | None = None,
    adjoint: Adjoint | None = None,
    linear_solver: ConjugateGradients | None = None,
    unrolled_steps: int = 100,
) -> Tensor:
    r"""Minimize ``f(Q, x)`` over Q with orthonormal columns, by a differentiable function of x.

    Differentiable in reverse mode, to any order, in every input and, if the objective is an ``nn.Module``, in
    every parameter. ``torch.func`` transforms and forward mode are not supported; ``torch.compile`` leaves
    the node to eager mode.

    Args:
        objective: ``(Q, *inputs)`` to ``(B,)`` in plain PyTorch, twice differentiable, deterministic, each
            value a function of its own member of the batch alone.
        inputs: tensors; those that belong to members of the batch lead with B.
        start: where the solver starts, ``(B, d, n)`` with orthonormal columns.
        solver: how the minimizer is found; default :class:`~etflayers.solvers.RiemannianNewton`.
        adjoint: how the gradient flows; default :class:`~etflayers.adjoints.Implicit`.
        linear_solver: how the linear system of :class:`~etflayers.adjoints.Implicit` is solved on the way
            back; default :class:`~etflayers.linalg.ConjugateGradients`.
        unrolled_steps: gradient steps that :class:`~etflayers.adjoints.Unrolled` differentiates.

    Returns:
        Q, ``(B, d, n)``, in the widest dtype of inputs and parameters (half precision is computed in
        float32).

    Raises:
        InvalidArgumentError: shapes or dtypes that do not fit, a start off the manifold, an objective that
            closes over a tensor that requires a gradient.
        NonFiniteError: the objective or its gradient is NaN or infinite.

    Warns:
        SolveWarning: the solver or, in the backward pass, the linear solve did not converge.

    Reference:
        Gould, Hartley, Campbell (2019), Deep declarative networks, arXiv 1909.04866.

    >>> matrix = torch.diag(torch.tensor([1.0, 2.0, 5.0])).requires_grad_()
    >>> def rayleigh_quotient(q, matrix):
    ...     return (q * (matrix @ q)).sum((-2, -1))
    >>> start = torch.full((1, 3, 1), 3**-0.5)
    >>> q = stiefel_argmin(rayleigh_quotient, matrix, start=start)
    >>> torch.allclose(q[0], torch.eye(3, 1), atol=1e-4)
    True
    """
    problem, result_dtype = _problem(objective, inputs, start, solver, linear_solver, unrolled_steps)
    point, solution = _attached(problem, adjoint), problem.solution
    status = Status(int(solution.codes.max()))
    if status is Status.NON_FINITE:
        raise NonFiniteError(f"objective: {status.message}")
    if status is not Status.CONVERGED:
        warnings.warn(
            f"stiefel_argmin: {status.message} (gradient norm {float(solution.gradient_norm.max()):.1e} "
            f"after {solution.iterations} iterations)",
            SolveWarning,
            stacklevel=2,
        )
    return point.to(result_dtype)


@leave_to_eager
def solve_stiefel(
    objective: Callable[..., Tensor],
    *inputs: Tensor,
    start: Tensor,
    solver: StiefelSolver | None = None,
    adjoint: Adjoint | None = None,
    linear_solver: ConjugateGradients | None = None,
    unrolled_steps: int = 100,
) -> CriticalPoint:
    """The minimizer of :func:`stiefel_argmin` with a status instead of an exception, judged to second order.

    Args:
        objective: as in :func:`stiefel_argmin`.
        inputs: as in :func:`stiefel_argmin`.
        start: as in :func:`stiefel_argmin`.
        solver: as in :func:`stiefel_argmin`.
        adjoint: as in :func:`stiefel_argmin`.
        linear_solver: as in :func:`stiefel_argmin`.
        unrolled_steps: as in :func:`stiefel_argmin`.

    Returns:
        The solution record; its ``point`` is differentiable, its diagnostics are not.

    Raises:
        InvalidArgumentError: as in :func:`stiefel_argmin`.

    Reference:
        Gould, Hartley, Campbell (2019), Deep declarative networks, arXiv 1909.04866.

    >>> def height(q):
    ...     return q[:, 2, 0]
    >>> solve_stiefel(height, start=torch.tensor([[[0.6], [0.0], [0.8]]])).status
    <Status.CONVERGED: 0>
    >>> solve_stiefel(height, start=torch.tensor([[[0.0], [0.0], [1.0]]])).status  # the north pole
    <Status.SADDLE: 3>
    """
    problem, result_dtype = _problem(objective, inputs, start, solver, linear_solver, unrolled_steps)
    point, solution = _attached(problem, adjoint).to(result_dtype), problem.solution
    with full_precision(point), torch.inference_mode(False):
        model = local_model(problem.at_constants(), solution.point)
        smallest, largest = extreme_curvatures(model.hessian, solution.point)
    finite = solution.codes != Status.NON_FINITE
    return CriticalPoint(
        point=torch.where(finite[:, None, None], point, torch.nan),
        value=solution.value,
        gradient_norm=solution.gradient_norm,
        smallest_curvature=smallest,
        largest_curvature=largest,
        codes=_second_order_codes(solution, smallest, largest),
        iterations=solution.iterations,
        linear_solve=problem.record,
    )


def _second_order_codes(solution: StiefelSolution, smallest: Tensor, largest: Tensor) -> Tensor:
    _, dim, num_frames = solution.point.shape
    if dim == num_frames == 1:  # two points without a tangent: both are minima
        return solution.codes
    flat = torch.finfo(solution.point.dtype).eps ** 0.5 * torch.maximum(smallest.abs(), largest.abs())
    codes = torch.where(smallest > flat, int(Status.CONVERGED), int(Status.DEGENERATE))
    codes = torch.where(smallest < -flat, int(Status.SADDLE), codes)
    return torch.maximum(solution.codes, codes)


class _Objective:
    """The objective as a function of Q and of everything that it reads, in one precision."""

    def __init__(self, objective: Callable[..., Tensor], inputs: Sequence[Tensor]) -> None:
        for index, tensor in enumerate(inputs):
            require(
                isinstance(tensor, Tensor),
                f"inputs must be tensors, but number {index} is {type(tensor).__name__}: bind what is not a "
                "tensor to the objective with functools.partial",
            )
        self.objective = objective
        self.names: tuple[str, ...] = ()
        parameters: tuple[nn.Parameter, ...] = ()
        if isinstance(objective, nn.Module) and any(True for _ in objective.parameters()):
            self.names, parameters = zip(*objective.named_parameters(), strict=True)
        self.num_inputs = len(inputs)
        floating = [t.dtype for t in (*inputs, *parameters) if t.dtype.is_floating_point]
        self.dtype = functools.reduce(torch.promote_types, floating) if floating else None
        self.tensors = tuple(self._converted(t) for t in (*inputs, *parameters))

    def __call__(self, point: Tensor, *tensors: Tensor) -> Tensor:
        """The value of the objective, ``(B,)``, at Q with the given inputs and parameters."""
        inputs = tensors[: self.num_inputs]
        if not isinstance(self.objective, nn.Module):
            return self.objective(point, *inputs)
        own = dict(zip(self.names, tensors[self.num_inputs :], strict=True))
        buffers = {name: self._converted(b).clone() for name, b in self.objective.named_buffers()}
        value: Tensor = torch.func.functional_call(self.objective, {**buffers, **own}, (point, *inputs))
        return value

    def _converted(self, tensor: Tensor) -> Tensor:
        if self.dtype is None or not tensor.is_floating_point():
            return tensor
        return tensor.to(working_dtype(self.dtype))


def _problem(
    objective: Callable[..., Tensor],
    inputs: Sequence[Tensor],
    start: Tensor,
    solver: StiefelSolver | None,
    linear_solver: ConjugateGradients | None,
    unrolled_steps: int,
) -> tuple[StiefelProblem, torch.dtype]:
    """The problem, solved, after checking every argument; and the dtype of the result."""
    require(
        not inside_transform(),
        "the Stiefel node cannot run inside torch.func transforms (vmap, grad, jvp): use its batch dimension "
        "and torch.autograd.grad",
    )
    require(unrolled_steps >= 0, f"unrolled_steps must not be negative, got {unrolled_steps}")
    solver = as_stiefel_solver(solver)
    explicit = _Objective(objective, inputs)
    _check_start(start)
    result_dtype = start.dtype if explicit.dtype is None else explicit.dtype
    dtype = working_dtype(result_dtype)
    with full_precision(start), torch.inference_mode(False):
        begin = start.clone() if start.is_inference() else start.detach()
        begin = begin if begin.dtype == dtype else project_stiefel(begin.to(dtype))
        problem = StiefelProblem(
            explicit,
            explicit.tensors,
            begin,
            solver,
            linear_solver or ConjugateGradients(),
            unrolled_steps,
        )
        _check_objective(problem.at_constants(), begin)
        problem.solution  # noqa: B018
    return problem, result_dtype


def _attached(problem: StiefelProblem, adjoint: Adjoint | None) -> Tensor:
    """The minimizer, differentiable if any input asks for it."""
    adjoint = as_adjoint(adjoint)
    if not (torch.is_grad_enabled() and any(x.requires_grad for x in problem.inputs)):
        return problem.solution.point
    with full_precision(problem.start):
        return adjoint.attach(problem)


def _check_start(start: Tensor) -> None:
    require_floating("start", start.dtype)
    require(start.ndim == 3, f"start must have shape (batch, dim, num_frames), got {tuple(start.shape)}")
    on_manifold = is_stiefel(start)
    require(
        on_manifold.ok,
        f"start must have orthonormal columns, but {on_manifold.reason}: project it with "
        "etflayers.geometry.project_stiefel",
    )


def _check_objective(objective: Callable[[Tensor], Tensor], point: Tensor) -> None:
    with torch.enable_grad():
        value = objective(point)
    require(
        value.shape == point.shape[:1] and value.is_floating_point(),
        f"objective must return one value for each member of the batch, shape ({len(point)},), got "
        f"{tuple(value.shape)} of {value.dtype}: reduce over the last two dimensions of Q only",
    )
    require(
        not value.requires_grad,
        "objective closes over a tensor that requires a gradient, which the node could not give: pass the "
        "tensor as an input, or make the objective an nn.Module with that tensor as a parameter",
    )
