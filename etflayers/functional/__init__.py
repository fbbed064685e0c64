"""Pure functions: the nearest ETF, class means, logits and losses."""

from etflayers.functional.class_means import class_means, class_sums
from etflayers.functional.logits import canonical_etf_logits
from etflayers.functional.losses import dot_regression_loss
from etflayers.functional.nearest import NearestETFSolution, nearest_etf, solve_nearest_etf

__all__ = [
    "NearestETFSolution",
    "canonical_etf_logits",
    "class_means",
    "class_sums",
    "dot_regression_loss",
    "nearest_etf",
    "solve_nearest_etf",
]
