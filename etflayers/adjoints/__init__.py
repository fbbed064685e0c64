"""How a gradient flows through a minimizer. No solver code lives here."""

from collections.abc import Sequence
from typing import Protocol

from torch import Tensor

from etflayers.adjoints.implicit import Implicit
from etflayers.adjoints.stationary import LinearSolve, ParametricObjective
from etflayers.adjoints.unrolled import Detached, Unrolled
from etflayers.solvers import FrameSolver

__all__ = [
    "Adjoint",
    "Detached",
    "Implicit",
    "LinearSolve",
    "ParametricObjective",
    "StiefelAdjoint",
    "Unrolled",
]


class Adjoint(Protocol):
    """A way to make the nearest frame a differentiable function of the linear form it maximizes."""

    def __call__(self, linear: Tensor, solver: FrameSolver) -> Tensor:
        """The frame that maximizes <W, linear>, for ``linear`` of shape ``(..., K, d)``."""
        ...


class StiefelAdjoint(Protocol):
    """A way to make a minimizer on the Stiefel manifold a differentiable function of its inputs."""

    def attach(
        self, objective: ParametricObjective, point: Tensor, inputs: Sequence[Tensor]
    ) -> tuple[Tensor, LinearSolve | None]:
        """The minimizer ``point`` (``(B, d, n)``) with its derivative, and a record of the backward pass."""
        ...
