"""Every metric of one state of the network, by name: the dictionaries that the metric shells hand out."""

from __future__ import annotations

from torch import Tensor

from etflayers.functional import nearest_etf
from etflayers.metrics.classifier import Classifier
from etflayers.metrics.nc1 import (
    class_distance_normalized_variance,
    covariance_trace_ratio,
    numerical_rank,
    variability_collapse_index,
    within_between_quotient,
)
from etflayers.metrics.nc2 import equiangularity, equinorm, etf_distance, frame_distance, gram_distance
from etflayers.metrics.nc3 import (
    duality_coherence_error,
    duality_cosine,
    duality_distance,
    duality_row_distance,
)
from etflayers.metrics.nc4 import bias_collapse
from etflayers.metrics.statistics import ClassStatistics, GlobalMean

__all__ = ["collapse_measures"]


def collapse_measures(
    statistics: ClassStatistics,
    classifier: Classifier | None = None,
    *,
    global_mean: GlobalMean = "classes",
) -> dict[str, Tensor]:
    """NC1 of the features, NC2 of their means; with a classifier NC2 of its weight, NC3 and bias collapse.

    A measure is there if it exists: traces of matrices need the within-class covariance, distances to the
    nearest ETF d >= K - 1, numerical ranks the covariance of each class. Names and formulas are listed in
    ``docs/understand/metrics.md``.

    Args:
        statistics: of the features, K classes.
        classifier: its weight and bias; rows of classes that statistics excludes are left out.
        global_mean: ``"classes"`` or ``"samples"``, in Sigma_B, in the centered means and in bias collapse.

    Returns:
        Float64 scalars.

    Raises:
        InvalidArgumentError: a quantity that does not exist, such as the angles of a zero vector.

    >>> import torch
    >>> from etflayers.metrics import class_statistics
    >>> features, targets = torch.tensor([[2.0, 0.0], [0.0, 1.0], [0.0, 1.0]]), torch.tensor([0, 1, 1])
    >>> measures = collapse_measures(class_statistics(features, targets, num_classes=2))
    >>> measures["nc1_trace"].item(), measures["nc2_equiangularity_mean_means"].item()
    (0.0, 0.0)
    """
    has_matrix = statistics.scatter.ndim > 1
    result = {}
    if has_matrix:
        result["nc1_trace"] = covariance_trace_ratio(statistics, global_mean=global_mean)
        result["nc1_trace_sum"] = result["nc1_trace"] * len(statistics.means)
        result["nc1_vci"] = variability_collapse_index(statistics, global_mean=global_mean)
    if statistics.scatter.ndim == 3:
        result["nc1_numerical_rank"] = numerical_rank(statistics).mean()
    result["nc1_quotient"] = within_between_quotient(statistics, global_mean=global_mean)
    result["nc1_cdnv"] = class_distance_normalized_variance(statistics)
    result["nc1_within_variance"] = statistics.variances.mean()

    means = statistics.centered_means(global_mean)
    frame = _etf(means)
    result |= _etf_measures(means, frame, "means")
    if classifier is None:
        return result
    classes = statistics.classes.to(classifier.weight.device)
    weight = classifier.weight[classes].to(means)
    bias = None if classifier.bias is None else classifier.bias[classes].to(means)
    weight_frame = _etf(weight)
    result |= _etf_measures(weight, weight_frame, "weights")
    result["nc3_distance"] = duality_distance(weight, means)
    result["nc3_distance_squared"] = result["nc3_distance"].square()
    result["nc3_coherence"] = duality_coherence_error(weight, means)
    result["nc3_cosine"] = duality_cosine(weight, means)
    result["nc3_row_distance"] = duality_row_distance(weight, means)
    if frame is not None and weight_frame is not None:
        result["nc3_etf_distance"] = frame_distance(weight_frame, frame)
    result["bias_collapse"] = bias_collapse(weight, statistics.global_mean(global_mean), bias)
    return result


def _etf(rows: Tensor) -> Tensor | None:
    num_classes, in_features = rows.shape
    return nearest_etf(rows) if in_features >= num_classes - 1 else None


def _etf_measures(rows: Tensor, frame: Tensor | None, of: str) -> dict[str, Tensor]:
    angles = equiangularity(rows)
    result = {
        f"nc2_equinorm_{of}": equinorm(rows),
        f"nc2_equiangularity_mean_{of}": angles.mean,
        f"nc2_equiangularity_max_{of}": angles.max,
        f"nc2_gram_{of}": gram_distance(rows),
    }
    if frame is not None:
        result[f"nc2_etf_distance_{of}"] = etf_distance(rows, frame)
    return result
