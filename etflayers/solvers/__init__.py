"""How a minimiser is found. No gradient code lives here."""

from etflayers.solvers.polar import SVD, ByRegime, FrameFactors, FrameSolver, GramEigh, rank_cutoff

__all__ = ["SVD", "ByRegime", "FrameFactors", "FrameSolver", "GramEigh", "rank_cutoff"]
