r"""The polar factor by a solver for any objective on the Stiefel manifold.

In the coordinates R = EM the frame W = c E'Q' maximizes <W, M> where Q in St(d, K-1) minimizes
f(Q) = -<Q, R'>. Its maxima and saddles are critical points as well; the only local minimum is the polar
factor, on the component of the manifold where the iteration runs. (For d = K - 1 there are two, rotations and
reflections.)

M <-> linear, R' <-> coordinates (scaled: target), Q <-> point.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from etflayers.checks import describe_argument, require_concrete
from etflayers.errors import ConvergenceError, InvalidArgumentError
from etflayers.geometry import centered_basis_apply, etf_from_coordinates
from etflayers.solvers.frame_solver import FrameOnlySolver, FrameSolver
from etflayers.solvers.newton import RiemannianNewton
from etflayers.solvers.stiefel import StiefelSolver
from etflayers.status import Status

__all__ = ["Iterative", "as_frame_solver", "as_stiefel_solver"]


@dataclass(frozen=True)
class Iterative(FrameOnlySolver):
    """A Stiefel solver at work on <W, M>, in float64: a peer of the closed form, for checks and comparisons.

    It starts from the orthonormal factor of a QR decomposition, which lies on the right component.

    Args:
        tolerance: largest relative error in the optimality conditions.
        solver: :class:`~etflayers.solvers.RiemannianNewton`, :class:`~etflayers.solvers.RiemannianDescent`,
            :class:`~etflayers.solvers.TrustRegions` or another
            :class:`~etflayers.solvers.StiefelSolver`.

    Raises:
        ConvergenceError: the solver stopped early or at a saddle point.
        InvalidArgumentError: called under ``torch.compile`` or ``torch.func.vmap``.

    >>> Iterative().solve(torch.tensor([[3.0, 4.0], [0.0, 0.0]])).frame
    tensor([[ 0.6000,  0.8000],
            [-0.6000, -0.8000]], dtype=torch.float64)
    """

    solver: StiefelSolver = field(default_factory=RiemannianNewton)

    def frame(self, linear: Tensor) -> Tensor:
        """The frames for ``linear`` (``(..., K, d)``), in float64; they carry no gradient."""
        require_concrete(linear, "solver=Iterative()", "use solver=SVD() or the default there")
        coordinates = centered_basis_apply(linear.detach().double()).mT
        shape = coordinates.shape
        coordinates = coordinates.reshape(shape[:-2].numel(), *shape[-2:])
        # The length of a step that fits depends on the scale of the objective.
        target = coordinates / torch.linalg.matrix_norm(coordinates, ord=2, keepdim=True)
        q, r = torch.linalg.qr(target)
        start = q * torch.where(r.diagonal(dim1=-2, dim2=-1) < 0, -1.0, 1.0).to(q).unsqueeze(-2)
        # An adjoint may have switched recording off, which a solver that calls autograd needs.
        with torch.enable_grad():
            solution = self.solver.minimize(lambda point: -(point * target).sum((-2, -1)), start)
        worst = Status(int(solution.codes.max())) if len(start) else Status.CONVERGED
        if worst is not Status.CONVERGED:
            raise ConvergenceError(
                f"solver={self!r} ended after {solution.iterations} iterations: {worst.message}"
            )
        frame: Tensor = etf_from_coordinates(solution.point.detach().mT)
        return frame.reshape(linear.shape)


def as_frame_solver(solver: FrameSolver | StiefelSolver | None, default: FrameSolver) -> FrameSolver:
    """The solver itself, :class:`Iterative` around one for any objective, or the default for ``None``.

    Raises:
        InvalidArgumentError: neither of these.

    >>> as_frame_solver(RiemannianNewton(), Iterative())
    Iterative(tolerance=1e-05, solver=RiemannianNewton(tolerance=None, max_iterations=100, max_products=200))
    """
    if solver is None:
        return default
    if not isinstance(solver, type):
        if isinstance(solver, FrameSolver):
            return solver
        if isinstance(solver, StiefelSolver):
            return Iterative(solver=solver)
    raise InvalidArgumentError(
        f"solver must be a FrameSolver, with a method solve(linear), or a StiefelSolver, with a method "
        f"minimize(objective, start), got {describe_argument(solver)}: pass an instance such as SVD() or "
        "RiemannianNewton(), or None for the default"
    )


def as_stiefel_solver(solver: StiefelSolver | None) -> StiefelSolver:
    """The solver itself, or :class:`RiemannianNewton` for ``None``.

    Raises:
        InvalidArgumentError: it has no method ``minimize``.
    """
    if solver is None:
        return RiemannianNewton()
    if isinstance(solver, type) or not isinstance(solver, StiefelSolver):
        raise InvalidArgumentError(
            "solver must be a StiefelSolver, with a method minimize(objective, start), got "
            f"{describe_argument(solver)}: pass an instance such as RiemannianNewton(), or None for the "
            "default"
        )
    return solver
