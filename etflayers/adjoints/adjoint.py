"""Three ways to make a minimizer a differentiable function of its inputs, the same for every problem.

A problem knows how to find its minimizer and what each kind of derivative means for it; an adjoint chooses.
What only one problem can be told (how its linear systems are solved, how many steps are unrolled) is said to
the problem, so that an adjoint has no argument which means nothing for another one.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol, runtime_checkable

from torch import Tensor

from etflayers.checks import describe_argument
from etflayers.errors import InvalidArgumentError

__all__ = ["Adjoint", "Detached", "Implicit", "Problem", "Unrolled", "as_adjoint"]


class Problem(Protocol):
    """A minimization whose minimizer can be made a differentiable function of its inputs."""

    def implicit(self) -> Tensor:
        """The minimizer, differentiated by its optimality condition."""
        ...

    def unrolled(self) -> Tensor:
        """The minimizer, differentiated through the operations of an iteration or a factorization."""
        ...

    def detached(self) -> Tensor:
        """The minimizer, a constant."""
        ...


@runtime_checkable
class Adjoint(Protocol):
    """A way to make the minimizer of any problem a differentiable function of its inputs."""

    def attach(self, problem: Problem) -> Tensor:
        """The minimizer of the problem, with its derivative."""
        ...


@dataclass(frozen=True)
class Implicit(Adjoint):
    """Differentiate the optimality condition: exact, independent of the solver, stable at collapse.

    For the nearest ETF a closed form, twice and more differentiable, in reverse and forward mode; for
    rank-deficient means the derivative is the minimum-norm one. For a general objective on the Stiefel
    manifold the implicit function theorem, in reverse mode, to any order that the objective allows, with a
    linear system to solve on the way back. What is not solved well enough is said in a
    :class:`~etflayers.status.SolveWarning`.
    """

    def attach(self, problem: Problem) -> Tensor:
        """The minimizer of the problem, differentiated by its optimality condition."""
        return problem.implicit()


@dataclass(frozen=True)
class Unrolled(Adjoint):
    """Differentiate through the operations that the solver ran.

    With :class:`~etflayers.solvers.NewtonSchulz` that takes matrix products only and is accurate everywhere.
    With a factorization (SVD or eigendecomposition) it is a peer for checks and teaching, not for training:
    its derivative divides by differences of singular values, which vanish at neural collapse. A gradient that
    is not finite raises :class:`~etflayers.errors.NonFiniteError` (in eager mode on the CPU) instead of
    spreading. With :class:`~etflayers.solvers.ConvexHull` it is the derivative of cvxpylayers, once; with
    :class:`~etflayers.solvers.Iterative` and :class:`~etflayers.solvers.GramRoot`, which record no
    operations, an error.

    For a general objective the solver's steps cannot be differentiated; from its minimizer on, gradient steps
    are (``unrolled_steps`` of :func:`~etflayers.functional.stiefel_argmin`). They leave the point where it
    is, and their derivative approaches the exact one, of every order, as fast as gradient descent converges;
    each step keeps a graph.
    """

    def attach(self, problem: Problem) -> Tensor:
        """The minimizer of the problem, differentiated through operations."""
        return problem.unrolled()


@dataclass(frozen=True)
class Detached(Adjoint):
    """No derivative: the minimizer is a constant of the graph."""

    def attach(self, problem: Problem) -> Tensor:
        """The minimizer of the problem, a constant."""
        return problem.detached()


_IMPLICIT = Implicit()


def as_adjoint(adjoint: Adjoint | None) -> Adjoint:
    """The adjoint itself, or :class:`Implicit` for ``None``.

    Raises:
        InvalidArgumentError: it has no method ``attach``.
    """
    if adjoint is None:
        return _IMPLICIT
    if isinstance(adjoint, type) or not isinstance(adjoint, Adjoint):
        raise InvalidArgumentError(
            f"adjoint must have a method attach(problem), got {describe_argument(adjoint)}: pass Implicit(), "
            "Unrolled() or Detached(), or None for the default"
        )
    return adjoint
