"""How a gradient flows through a minimiser. No solver code lives here."""

from typing import Protocol

from torch import Tensor

from etflayers.adjoints.implicit import Implicit
from etflayers.adjoints.unrolled import Detached, Unrolled
from etflayers.solvers import FrameSolver

__all__ = ["Adjoint", "Detached", "Implicit", "Unrolled"]


class Adjoint(Protocol):
    """A way to make the nearest frame a differentiable function of the linear form it maximises."""

    def __call__(self, linear: Tensor, solver: FrameSolver) -> Tensor:
        """The frame that maximises <W, linear>, for ``linear`` of shape ``(..., K, d)``."""
        ...
