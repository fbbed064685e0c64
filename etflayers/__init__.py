"""Differentiable-optimisation layers around the simplex equiangular tight frame, for PyTorch."""

from etflayers.adjoints import Detached, Implicit, Unrolled
from etflayers.functional import (
    CriticalPoint,
    NearestETFSolution,
    huber_nearest_etf,
    mahalanobis_nearest_etf,
    nearest_etf,
    solve_nearest_etf,
    solve_stiefel,
    stiefel_argmin,
)
from etflayers.geometry import simplex_etf
from etflayers.nn import (
    DotRegressionLoss,
    ETFHead,
    FeatureMovingAverage,
    FixedETFHead,
    HuberNearestETF,
    LearnedETFHead,
    MahalanobisNearestETF,
    NearestETFHead,
    StiefelNode,
    provide_targets,
    replace_classifier,
)
from etflayers.solvers import (
    QRSVD,
    SVD,
    ByRegime,
    ConvexHull,
    GramEigh,
    Iterative,
    NewtonSchulz,
    RiemannianDescent,
    RiemannianNewton,
    TrustRegions,
)
from etflayers.status import SolveWarning, Status

__version__ = "0.1.0"

__all__ = [
    "QRSVD",
    "SVD",
    "ByRegime",
    "ConvexHull",
    "CriticalPoint",
    "Detached",
    "DotRegressionLoss",
    "ETFHead",
    "FeatureMovingAverage",
    "FixedETFHead",
    "GramEigh",
    "HuberNearestETF",
    "Implicit",
    "Iterative",
    "LearnedETFHead",
    "MahalanobisNearestETF",
    "NearestETFHead",
    "NearestETFSolution",
    "NewtonSchulz",
    "RiemannianDescent",
    "RiemannianNewton",
    "SolveWarning",
    "Status",
    "StiefelNode",
    "TrustRegions",
    "Unrolled",
    "__version__",
    "huber_nearest_etf",
    "mahalanobis_nearest_etf",
    "nearest_etf",
    "provide_targets",
    "replace_classifier",
    "simplex_etf",
    "solve_nearest_etf",
    "solve_stiefel",
    "stiefel_argmin",
]
