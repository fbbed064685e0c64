"""How a solve ended, with a text that names the cause and the remedy."""

from __future__ import annotations

from enum import IntEnum

__all__ = ["SolveWarning", "Status"]


class SolveWarning(RuntimeWarning):
    """A minimizer or its derivative is uncertain; the message says why and what to do."""


class Status(IntEnum):
    """How a solve ended; larger is worse, so the status of a batch is the maximum of its codes.

    A general objective has local minimizers: there, unique means that no other one lies next to it.

    >>> Status.CONVERGED.message
    'the minimizer is unique and was found'
    """

    CONVERGED = 0
    RANK_DEFICIENT = 1
    DEGENERATE = 2
    SADDLE = 3
    NOT_CONVERGED = 4
    NON_FINITE = 5

    @property
    def message(self) -> str:
        """What happened and what to do about it."""
        return _MESSAGES[self]


_MESSAGES = {
    Status.CONVERGED: "the minimizer is unique and was found",
    Status.RANK_DEFICIENT: (
        "the centered class means span fewer than K - 1 directions (coinciding or unseen classes), so many "
        "frames are equally near: one of them was returned and its gradient is the minimum-norm one; give "
        "anchor= and proximity= > 0 to make the answer unique"
    ),
    Status.DEGENERATE: (
        "the Hessian at the minimizer is singular, so it is not isolated and its derivative is not defined "
        "in every direction: add a small proximal term, such as a multiple of -<Q, Q0>, to the objective"
    ),
    Status.SADDLE: (
        "the point is critical but the objective decreases to some side of it, so it is a saddle point or a "
        "maximum: start elsewhere, e.g. from etflayers.geometry.random_stiefel"
    ),
    Status.NOT_CONVERGED: (
        "the iteration stopped before its tolerance was reached, so the point or its derivative is only "
        "approximate: raise max_iterations, loosen tolerance, start nearer or compute in float64"
    ),
    Status.NON_FINITE: (
        "the class means, weights, anchor or the objective hold NaN or infinity: look for an overflow (a "
        "learning rate too high, fp16 features without loss scaling) in what produced them"
    ),
}
