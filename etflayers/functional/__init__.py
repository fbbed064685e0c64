"""Pure functions: nearest ETFs, minimizers on the Stiefel manifold, class means, logits and losses."""

from etflayers.functional.class_means import class_means, class_sums
from etflayers.functional.cross_entropy import Reduction, etf_cross_entropy, linear_cross_entropy
from etflayers.functional.distances import huber_nearest_etf, mahalanobis_nearest_etf
from etflayers.functional.logits import canonical_etf_logits
from etflayers.functional.losses import dot_regression_loss
from etflayers.functional.nearest import NearestETFSolution, nearest_etf, solve_nearest_etf
from etflayers.functional.stiefel import CriticalPoint, solve_stiefel, stiefel_argmin

__all__ = [
    "CriticalPoint",
    "NearestETFSolution",
    "Reduction",
    "canonical_etf_logits",
    "class_means",
    "class_sums",
    "dot_regression_loss",
    "etf_cross_entropy",
    "huber_nearest_etf",
    "linear_cross_entropy",
    "mahalanobis_nearest_etf",
    "nearest_etf",
    "solve_nearest_etf",
    "solve_stiefel",
    "stiefel_argmin",
]
