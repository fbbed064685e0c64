"""Neural-collapse metrics: pure functions of streaming class statistics, and torchmetrics shells around them.

The functions need PyTorch alone. ``NeuralCollapse``, ``CosineMargins``, ``GroupAccuracy``, ``LabelNoise``,
``SessionAccuracy``, ``NeuralCollapseProbe`` and ``NeuralCollapseCallback`` need torchmetrics
(``pip install 'etflayers[metrics]'``) when they are made. They load it, and the callback Lightning, when they
are first named: that takes as long as to import PyTorch.
"""

from typing import TYPE_CHECKING

from etflayers._imports import names_on_demand
from etflayers.metrics.accuracies import group_accuracy, session_measures
from etflayers.metrics.classifier import Classifier, classifier_inputs, read_classifier
from etflayers.metrics.descriptions import DESCRIPTIONS, NOISE_DESCRIPTIONS, Description
from etflayers.metrics.generalized import HypersphericalEnergy, hyperspherical_energy
from etflayers.metrics.gnc import OneVsRest, generalized_measures, largest_cosine, one_vs_rest
from etflayers.metrics.groups import by_group, groups_from_counts, minority_collapse, select_classes
from etflayers.metrics.margins import cosine_margins, own_cosines
from etflayers.metrics.measures import collapse_measures
from etflayers.metrics.moments import ClassMoments, merge_moments, update_moments, zero_moments
from etflayers.metrics.mse import MSEDecomposition, mse_decomposition
from etflayers.metrics.nc1 import (
    class_distance_normalized_variance,
    covariance_trace_ratio,
    numerical_rank,
    variability_collapse_index,
    within_between_quotient,
)
from etflayers.metrics.nc2 import (
    Equiangularity,
    equiangularity,
    equinorm,
    etf_distance,
    frame_distance,
    gram_distance,
    simplex_coherence_error,
)
from etflayers.metrics.nc3 import (
    duality_coherence_error,
    duality_cosine,
    duality_distance,
    duality_row_distance,
    equinorm_difference,
)
from etflayers.metrics.nc4 import bias_collapse, center_agreement, center_disagreement, nearest_center
from etflayers.metrics.nc5 import orthogonality_deviation
from etflayers.metrics.noise import (
    Dilation,
    LabelAccuracies,
    Memorization,
    OriginMeans,
    dilation,
    label_accuracies,
    memorization,
    origin_means,
)
from etflayers.metrics.pictures import plot_cosines, plot_tetrahedron
from etflayers.metrics.statistics import ClassStatistics, class_statistics, finish_moments
from etflayers.metrics.whitening import Whitening, between_whitening

if TYPE_CHECKING:
    from etflayers.metrics.callback import NeuralCollapseCallback
    from etflayers.metrics.collapse import NeuralCollapse
    from etflayers.metrics.curve import CosineMargins
    from etflayers.metrics.noise_metric import LabelNoise
    from etflayers.metrics.probe import NeuralCollapseProbe, spatial_mean
    from etflayers.metrics.sessions import GroupAccuracy, SessionAccuracy
else:
    __getattr__, __dir__ = names_on_demand(
        __name__,
        lazy={
            "CosineMargins": "etflayers.metrics.curve",
            "GroupAccuracy": "etflayers.metrics.sessions",
            "LabelNoise": "etflayers.metrics.noise_metric",
            "NeuralCollapse": "etflayers.metrics.collapse",
            "NeuralCollapseCallback": "etflayers.metrics.callback",
            "NeuralCollapseProbe": "etflayers.metrics.probe",
            "SessionAccuracy": "etflayers.metrics.sessions",
            "spatial_mean": "etflayers.metrics.probe",
        },
        moved={
            "centre_disagreement": "etflayers.metrics.center_disagreement",
            "nearest_centre": "etflayers.metrics.nearest_center",
        },
    )

__all__ = [
    "DESCRIPTIONS",
    "NOISE_DESCRIPTIONS",
    "ClassMoments",
    "ClassStatistics",
    "Classifier",
    "CosineMargins",
    "Description",
    "Dilation",
    "Equiangularity",
    "GroupAccuracy",
    "HypersphericalEnergy",
    "LabelAccuracies",
    "LabelNoise",
    "MSEDecomposition",
    "Memorization",
    "NeuralCollapse",
    "NeuralCollapseCallback",
    "NeuralCollapseProbe",
    "OneVsRest",
    "OriginMeans",
    "SessionAccuracy",
    "Whitening",
    "between_whitening",
    "bias_collapse",
    "by_group",
    "center_agreement",
    "center_disagreement",
    "class_distance_normalized_variance",
    "class_statistics",
    "classifier_inputs",
    "collapse_measures",
    "cosine_margins",
    "covariance_trace_ratio",
    "dilation",
    "duality_coherence_error",
    "duality_cosine",
    "duality_distance",
    "duality_row_distance",
    "equiangularity",
    "equinorm",
    "equinorm_difference",
    "etf_distance",
    "finish_moments",
    "frame_distance",
    "generalized_measures",
    "gram_distance",
    "group_accuracy",
    "groups_from_counts",
    "hyperspherical_energy",
    "label_accuracies",
    "largest_cosine",
    "memorization",
    "merge_moments",
    "minority_collapse",
    "mse_decomposition",
    "nearest_center",
    "numerical_rank",
    "one_vs_rest",
    "origin_means",
    "orthogonality_deviation",
    "own_cosines",
    "plot_cosines",
    "plot_tetrahedron",
    "read_classifier",
    "select_classes",
    "session_measures",
    "simplex_coherence_error",
    "spatial_mean",
    "update_moments",
    "variability_collapse_index",
    "within_between_quotient",
    "zero_moments",
]
