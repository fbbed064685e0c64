"""The nearest frame and its adjoint: what a solver returns, and the paths for a GPU and for few classes."""

from etflayers.kernels.polar.api import polar, polar_adjoint, small_polar
from etflayers.kernels.polar.state import FrameState, RootState, SmallState, SpectralState

__all__ = ["FrameState", "RootState", "SmallState", "SpectralState", "polar", "polar_adjoint", "small_polar"]
