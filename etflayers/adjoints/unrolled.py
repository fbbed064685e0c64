"""Differentiate the solver's own operations, or nothing at all."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from etflayers.errors import NonFiniteError, reads_values
from etflayers.precision import full_precision
from etflayers.solvers import FrameSolver

__all__ = ["Detached", "Unrolled"]


def _solve(linear: Tensor, solver: FrameSolver) -> Tensor:
    with full_precision(linear):
        return solver(linear).frame.to(linear.dtype)


def _require_finite_gradient(grad: Tensor) -> None:
    if reads_values(grad) and not bool(torch.isfinite(grad).all()):
        raise NonFiniteError(
            "the unrolled gradient is not finite: a factorisation cannot be differentiated where singular "
            "values coincide, as they do at neural collapse; use adjoint=Implicit()"
        )


@dataclass(frozen=True)
class Unrolled:
    """Differentiate through the factorisation (SVD or eigendecomposition) that the solver ran.

    A peer for checks and teaching, not for training: the derivative of a factorisation divides by differences
    of singular values, which vanish at neural collapse. A gradient that is not finite raises
    :class:`~etflayers.errors.NonFiniteError` (in eager mode on the CPU) instead of spreading.
    """

    def __call__(self, linear: Tensor, solver: FrameSolver) -> Tensor:
        """The frame that maximises <W, linear>, for ``linear`` of shape ``(..., K, d)``."""
        if linear.requires_grad and reads_values(linear):
            linear = linear.view_as(linear)  # the hook belongs to this use of the tensor, not to the caller's
            linear.register_hook(_require_finite_gradient)  # type: ignore[no-untyped-call]
        return _solve(linear, solver)


@dataclass(frozen=True)
class Detached:
    """No derivative: the frame is a constant of the graph."""

    def __call__(self, linear: Tensor, solver: FrameSolver) -> Tensor:
        """The frame that maximises <W, linear>, for ``linear`` of shape ``(..., K, d)``."""
        with torch.no_grad():
            return _solve(linear.detach(), solver)
