"""Differentiable-optimization layers around the simplex equiangular tight frame, for PyTorch.

Here is what a model is built of: heads, their losses, the average that feeds them, and what puts them into a
model; the two functions behind them; and the types of their arguments, for annotations. Everything else is
in the package that it belongs to, e.g. ``etflayers.solvers``.
"""

from typing import TYPE_CHECKING

from etflayers._imports import names_on_demand
from etflayers.functional import Reduction, nearest_etf
from etflayers.geometry import simplex_etf
from etflayers.kernels import Impl
from etflayers.nn import (
    ClassMeanHead,
    CodeCrossEntropy,
    CodeHead,
    CodeMSELoss,
    DotRegressionLoss,
    ETFCrossEntropy,
    ETFHead,
    FeatureMovingAverage,
    FixedCodeHead,
    FixedETFHead,
    LearnedETFHead,
    Momentum,
    NearestCodeHead,
    NearestETFHead,
    NONLLoss,
    NTCELoss,
    SampledCrossEntropy,
    UnitRowHead,
    capture_features,
    capture_targets,
    provide_targets,
    replace_classifier,
    restore_linear,
)

__version__ = "0.2.0"

__all__ = [
    "ClassMeanHead",
    "CodeCrossEntropy",
    "CodeHead",
    "CodeMSELoss",
    "DotRegressionLoss",
    "ETFCrossEntropy",
    "ETFHead",
    "FeatureMovingAverage",
    "FixedCodeHead",
    "FixedETFHead",
    "Impl",
    "LearnedETFHead",
    "Momentum",
    "NONLLoss",
    "NTCELoss",
    "NearestCodeHead",
    "NearestETFHead",
    "Reduction",
    "SampledCrossEntropy",
    "UnitRowHead",
    "__version__",
    "capture_features",
    "capture_targets",
    "nearest_etf",
    "provide_targets",
    "replace_classifier",
    "restore_linear",
    "simplex_etf",
]

# What stood here in 0.1.0 or soon after.
_MOVED = {
    "adjoints": ("Detached", "Implicit", "Unrolled"),
    "functional": (
        "CriticalPoint",
        "NearestETFSolution",
        "huber_nearest_etf",
        "mahalanobis_nearest_etf",
        "solve_nearest_etf",
        "solve_stiefel",
        "stiefel_argmin",
    ),
    "nn": ("HuberNearestETF", "MahalanobisNearestETF", "StiefelNode"),
    "solvers": (
        "QRSVD",
        "SVD",
        "ByRegime",
        "ConvexHull",
        "GramEigh",
        "GramRoot",
        "Iterative",
        "NewtonSchulz",
        "RiemannianDescent",
        "RiemannianNewton",
        "TrustRegions",
    ),
    "status": ("SolveWarning", "Status"),
}

if not TYPE_CHECKING:
    __getattr__, __dir__ = names_on_demand(
        __name__,
        moved={name: f"{__name__}.{package}.{name}" for package, names in _MOVED.items() for name in names},
    )
