"""Differentiable-optimisation layers around the simplex equiangular tight frame, for PyTorch."""

from etflayers.adjoints import Detached, Implicit, Unrolled
from etflayers.functional import NearestETFSolution, nearest_etf, solve_nearest_etf
from etflayers.geometry import simplex_etf
from etflayers.nn import (
    DotRegressionLoss,
    ETFHead,
    FeatureMovingAverage,
    FixedETFHead,
    LearnedETFHead,
    NearestETFHead,
    provide_targets,
    replace_classifier,
)
from etflayers.solvers import SVD, ByRegime, GramEigh
from etflayers.status import Status

__version__ = "0.1.0"

__all__ = [
    "SVD",
    "ByRegime",
    "Detached",
    "DotRegressionLoss",
    "ETFHead",
    "FeatureMovingAverage",
    "FixedETFHead",
    "GramEigh",
    "Implicit",
    "LearnedETFHead",
    "NearestETFHead",
    "NearestETFSolution",
    "Status",
    "Unrolled",
    "__version__",
    "nearest_etf",
    "provide_targets",
    "replace_classifier",
    "simplex_etf",
    "solve_nearest_etf",
]
