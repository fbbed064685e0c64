"""The nearest frame and its adjoint without a factorization."""

from etflayers.kernels.polar.api import polar, polar_adjoint
from etflayers.kernels.polar.state import FrameState, RootState

__all__ = ["FrameState", "RootState", "polar", "polar_adjoint"]
