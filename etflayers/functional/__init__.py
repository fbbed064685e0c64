"""Pure functions: nearest ETFs, minimizers on the Stiefel manifold, class means, logits and losses."""

from typing import TYPE_CHECKING

from etflayers._imports import names_on_demand
from etflayers.collectives import ClassShard
from etflayers.functional.assignment import Arrangement, arrange_code, assign_labels
from etflayers.functional.batch_contrast import nonl_loss, ntce_loss
from etflayers.functional.class_means import class_means, class_sums
from etflayers.functional.cross_entropy import code_cross_entropy, etf_cross_entropy
from etflayers.functional.distances import huber_nearest_etf, mahalanobis_nearest_etf
from etflayers.functional.label_relaxation import label_relaxation_loss
from etflayers.functional.logits import canonical_etf_logits, directions
from etflayers.functional.losses import code_mse_loss, dot_regression_loss, lengths_from_counts
from etflayers.functional.nearest import NearestETFSolution, nearest_etf, solve_nearest_etf
from etflayers.functional.neighbor_entropy import neighbor_entropy_loss
from etflayers.functional.parallel_cross_entropy import (
    class_parallel_cross_entropy,
    class_parallel_etf_cross_entropy,
)
from etflayers.functional.priors import logit_adjustment
from etflayers.functional.projector import etf_projection
from etflayers.functional.reduction import Reduction
from etflayers.functional.sampled_cross_entropy import sampled_cross_entropy
from etflayers.functional.spread import unit_spread
from etflayers.functional.stiefel import CriticalPoint, solve_stiefel, stiefel_argmin

__all__ = [
    "Arrangement",
    "ClassShard",
    "CriticalPoint",
    "NearestETFSolution",
    "Reduction",
    "arrange_code",
    "assign_labels",
    "canonical_etf_logits",
    "class_means",
    "class_parallel_cross_entropy",
    "class_parallel_etf_cross_entropy",
    "class_sums",
    "code_cross_entropy",
    "code_mse_loss",
    "directions",
    "dot_regression_loss",
    "etf_cross_entropy",
    "etf_projection",
    "huber_nearest_etf",
    "label_relaxation_loss",
    "lengths_from_counts",
    "logit_adjustment",
    "mahalanobis_nearest_etf",
    "nearest_etf",
    "neighbor_entropy_loss",
    "nonl_loss",
    "ntce_loss",
    "sampled_cross_entropy",
    "solve_nearest_etf",
    "solve_stiefel",
    "stiefel_argmin",
    "unit_spread",
]

if not TYPE_CHECKING:
    # PyTorch 2.13 has a function of the old name, with other arguments.
    __getattr__, __dir__ = names_on_demand(
        __name__, moved={"linear_cross_entropy": f"{__name__}.code_cross_entropy"}
    )
