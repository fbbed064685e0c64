"""How a solve ended, with a text that names the cause and the remedy."""

from __future__ import annotations

from enum import IntEnum

__all__ = ["Status"]


class Status(IntEnum):
    """How a solve ended; larger is worse, so the status of a batch is the maximum of its codes.

    >>> Status.CONVERGED.message
    'the minimiser is unique and was found'
    """

    CONVERGED = 0
    RANK_DEFICIENT = 1
    NON_FINITE = 2

    @property
    def message(self) -> str:
        """What happened and what to do about it."""
        return _MESSAGES[self]


_MESSAGES = {
    Status.CONVERGED: "the minimiser is unique and was found",
    Status.RANK_DEFICIENT: (
        "the centred class means span fewer than K - 1 directions (coinciding or unseen classes), so many "
        "frames are equally near: one of them was returned and its gradient is the minimum-norm one; give "
        "anchor= and proximity= > 0 to make the answer unique"
    ),
    Status.NON_FINITE: (
        "the class means, weights or anchor hold NaN or infinity: look for an overflow (a learning rate too "
        "high, fp16 features without loss scaling) in what produced them"
    ),
}
