"""Differentiate the solver's own operations, or nothing at all."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from etflayers.adjoints.stationary import ParametricObjective, unrolled_point
from etflayers.checks import reads_values, require
from etflayers.errors import NonFiniteError
from etflayers.precision import full_precision
from etflayers.solvers import FrameSolver

__all__ = ["Detached", "Unrolled"]


def _solve(linear: Tensor, solver: FrameSolver) -> Tensor:
    with full_precision(linear):
        return solver.frame(linear).to(linear.dtype)


def _require_finite_gradient(grad: Tensor | None) -> None:
    # An undefined gradient, which stands for zero, comes as None.
    if grad is not None and reads_values(grad) and not bool(torch.isfinite(grad).all()):
        raise NonFiniteError(
            "the unrolled gradient is not finite: a factorization cannot be differentiated where singular "
            "values coincide, as they do at neural collapse; use adjoint=Implicit()"
        )


@dataclass(frozen=True)
class Unrolled:
    """Differentiate through the operations that the solver ran.

    With :class:`~etflayers.solvers.NewtonSchulz` that takes matrix products only and is accurate everywhere.
    With a factorization (SVD or eigendecomposition) it is a peer for checks and teaching, not for training:
    its derivative divides by differences of singular values, which vanish at neural collapse. A gradient that
    is not finite raises :class:`~etflayers.errors.NonFiniteError` (in eager mode on the CPU) instead of
    spreading. With :class:`~etflayers.solvers.ConvexHull` it is the derivative of cvxpylayers, once; with
    :class:`~etflayers.solvers.Iterative`, which records no operations, an error.

    For a general objective (``attach``) the solver's steps cannot be differentiated; from its minimizer on,
    ``steps`` gradient steps are. They leave the point where it is, and their derivative approaches the exact
    one, of every order, as fast as gradient descent converges; each step keeps a graph.

    Args:
        steps: of gradient descent, for a general objective.
    """

    steps: int = 100

    def __call__(self, linear: Tensor, solver: FrameSolver) -> Tensor:
        """The frame that maximizes <W, linear>, for ``linear`` of shape ``(..., K, d)``."""
        if linear.requires_grad and reads_values(linear):
            linear = linear.view_as(linear)  # the hook belongs to this use of the tensor, not to the caller's
            linear.register_hook(_require_finite_gradient)  # type: ignore[no-untyped-call]
        frame = _solve(linear, solver)
        require(
            frame.requires_grad or not (linear.requires_grad and torch.is_grad_enabled()),
            f"adjoint=Unrolled() has nothing to differentiate: {type(solver).__name__} records no "
            "operations; use adjoint=Implicit()",
        )
        return frame

    def attach(
        self, objective: ParametricObjective, point: Tensor, inputs: Sequence[Tensor]
    ) -> tuple[Tensor, None]:
        """The minimizer ``point``, by ``steps`` differentiable steps from itself."""
        return unrolled_point(objective, point, inputs, steps=self.steps), None


@dataclass(frozen=True)
class Detached:
    """No derivative: the frame is a constant of the graph."""

    def __call__(self, linear: Tensor, solver: FrameSolver) -> Tensor:
        """The frame that maximizes <W, linear>, for ``linear`` of shape ``(..., K, d)``."""
        with torch.no_grad():
            return _solve(linear.detach(), solver)

    def attach(
        self, objective: ParametricObjective, point: Tensor, inputs: Sequence[Tensor]
    ) -> tuple[Tensor, None]:
        """``point`` itself."""
        return point, None
