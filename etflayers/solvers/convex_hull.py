r"""The polar factor as the solution of a convex program.

A linear function has its maximum over a convex set at an extreme point. The extreme points of the unit ball
of the spectral norm are the matrices with orthonormal columns, so the ball is their convex hull, and

    maximize <A, X>  subject to  |X|_2 <= 1

has the polar factor of A as its solution, the only one if A has full rank.

A = EM <-> coordinates, X <-> factor.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from etflayers.checks import require_concrete, require_module
from etflayers.errors import ConvergenceError
from etflayers.geometry import centered_basis_apply, etf_from_coordinates
from etflayers.solvers.frame_solver import FrameOnlySolver

__all__ = ["ConvexHull"]


@dataclass(frozen=True)
class ConvexHull(FrameOnlySolver):
    """A semidefinite program solved by SCS (cvxpylayers): an oracle for small sizes and full rank.

    It shares neither a factorization nor a derivation with the other solvers. ``adjoint=Unrolled()`` gives
    the gradient of cvxpylayers, which differentiates the optimality conditions of the cone program.

    Args:
        tolerance: largest relative error in the optimality conditions.
        accuracy: to which SCS solves the program.
        max_steps: iterations of SCS.

    Raises:
        MissingDependencyError: cvxpylayers is not installed.
        ConvergenceError: SCS did not reach its accuracy.
        InvalidArgumentError: called under ``torch.compile`` or ``torch.func.vmap``.

    Reference:
        Agrawal, Amos, Barratt, Boyd, Diamond, Kolter (2019), arXiv 1910.12430.

    >>> ConvexHull().frame(torch.tensor([[3.0, 4.0], [0.0, 0.0]]))
    tensor([[ 0.6000,  0.8000],
            [-0.6000, -0.8000]], dtype=torch.float64)
    """

    accuracy: float = 1e-10
    max_steps: int = 100_000

    def frame(self, linear: Tensor) -> Tensor:
        """The frames for ``linear`` (``(..., K, d)``), in float64."""
        require_concrete(linear, "solver=ConvexHull()", "use solver=SVD() or the default there")
        diffcp = require_module("diffcp", extra="solvers")
        coordinates = centered_basis_apply(linear.double().cpu())
        shape = coordinates.shape
        coordinates = coordinates.reshape(shape[:-2].numel(), *shape[-2:])
        # The solver has an absolute tolerance.
        size = torch.linalg.matrix_norm(coordinates.detach(), keepdim=True).clamp_min(1e-300)
        options = {"solve_method": "SCS", "eps": self.accuracy, "max_iters": self.max_steps}
        if coordinates.requires_grad and torch.is_grad_enabled():
            options["mode"] = "dense"  # the iterative derivative is good to 1e-6 only
        try:
            (factor,) = _layer(*shape[-2:])(coordinates / size, solver_args=options)
        except diffcp.SolverError as error:
            raise ConvergenceError(
                f"{self!r} failed: {error}; raise max_steps or accuracy, or use solver=SVD() or the default"
            ) from error
        frame: Tensor = etf_from_coordinates(factor.reshape(shape))
        return frame.to(linear.device)


@lru_cache(maxsize=16)
def _layer(rows: int, columns: int) -> Any:
    """The program for a matrix of this shape: to translate it takes longer than to solve it."""
    cvxpy = require_module("cvxpy", extra="solvers")
    cvxpylayers = require_module("cvxpylayers.torch", extra="solvers")
    a, x = cvxpy.Parameter((rows, columns)), cvxpy.Variable((rows, columns))
    problem = cvxpy.Problem(cvxpy.Maximize(cvxpy.sum(cvxpy.multiply(a, x))), [cvxpy.sigma_max(x) <= 1])
    return cvxpylayers.CvxpyLayer(problem, parameters=[a], variables=[x])
