"""What finds the frame that maximizes a linear form: the protocol, and a base for finding it alone."""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor

from etflayers.kernels.polar import FrameState
from etflayers.solvers.state import FoundState

__all__ = ["FrameOnlySolver", "FrameSolver"]


@runtime_checkable
class FrameSolver(Protocol):
    """Anything that finds the simplex ETFs that maximize <W, M> for a batch of M."""

    def solve(self, linear: Tensor, precision: torch.dtype | None = None) -> FrameState:
        """The frames for a linear form, as a state that answers what a derivative asks.

        Args:
            linear: M, ``(..., K, d)``, d >= K - 1, float32 or float64.
            precision: of the data, where M has been computed from them in a wider dtype; ``None``: that of
                M.

        Returns:
            The state; its ``frame`` is W, in the dtype in which it was computed.
        """
        ...


@dataclass(frozen=True)
class FrameOnlySolver(FrameSolver):
    """Base of the solvers that find W without an eigenbasis of T: the state adds it when it is asked for.

    Args:
        tolerance: largest relative error in the optimality conditions of W.
    """

    tolerance: float = 1e-5

    def solve(self, linear: Tensor, precision: torch.dtype | None = None) -> FoundState:
        """The frames for ``linear`` (``(..., K, d)``); whoever asks more than the frame has it checked."""
        return FoundState(self.frame(linear), linear, precision or linear.dtype, self.tolerance)

    @abstractmethod
    def frame(self, linear: Tensor) -> Tensor:
        """The frames for ``linear`` (``(..., K, d)``)."""
