r"""Generalized neural collapse: what NC1 to NC3 become where K classes have no simplex ETF in d dimensions.

With more than d + 1 classes the directions of means and weights cannot all be equally far from each other.
They approach a softmax code: K unit vectors of which even the one nearest to the hull of the others is as far
from it as possible. Everything is said of unit vectors: of the directions of the features, of *their* class
means and of the rows of the classifier. Nothing is centered. So the functions here take means of directions:
``class_statistics(directions(features), ...)``, or ``NeuralCollapse(..., normalize=True)``.
"""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

from etflayers.codes.measures import coherence, one_vs_rest_distance
from etflayers.metrics.classifier import Classifier
from etflayers.metrics.nc2 import float64_rows, unit_rows
from etflayers.metrics.nc3 import duality_cosine, duality_row_distance
from etflayers.metrics.statistics import ClassStatistics

__all__ = ["OneVsRest", "generalized_measures", "largest_cosine", "one_vs_rest"]


class OneVsRest(NamedTuple):
    """Smallest and mean distance of a direction from the convex hull of the others."""

    min: Tensor
    mean: Tensor


def largest_cosine(rows: Tensor) -> Tensor:
    r"""``max_{i != j} cos(x_i, x_j)``, with its sign: the two directions that are most alike.

    At a simplex ETF it is -1/(K - 1), at an orthoplex (K <= 2d) 0, and positive for any more classes.

    Args:
        rows: X, ``(K, d)``: class means of unit features, or weights. The K x K matrix is never stored.

    Returns:
        A float64 scalar in [-1, 1].

    Raises:
        InvalidArgumentError: not K >= 2 rows, or one of them zero, which has no angle.

    Reference:
        Jiang, Zhou, Wang, Qu, Mixon, You, Zhu (2023), arXiv 2310.05351.

    >>> import torch
    >>> largest_cosine(torch.tensor([[2.0, 0.0], [0.0, 1.0], [-1.0, 0.0], [0.0, -3.0]]))
    tensor(0., dtype=torch.float64)
    """
    return coherence(unit_rows("rows", float64_rows("rows", rows))).clamp(-1, 1)


def one_vs_rest(rows: Tensor) -> OneVsRest:
    r"""``min_k`` and mean of ``dist(u_k, conv{u_j: j != k})``, u the directions of the rows.

    Half the distance is the margin by which a hyperplane can separate one class from all others. A softmax
    code is one with the largest ``min``. The distances are exact (to about 1e-12, or 1e-6 near zero). A
    search that ends early, as after a few steps of Frank-Wolfe, has found another point of the hull, and its
    distance is too large.

    Args:
        rows: X, ``(K, d)``: class means of unit features, or weights.

    Returns:
        Two float64 scalars in [0, 2].

    Raises:
        InvalidArgumentError: not K >= 2 rows, or one of them zero, which has no direction.
        ConvergenceError: as :func:`etflayers.codes.one_vs_rest_distance`.

    Reference:
        Jiang, Zhou, Wang, Qu, Mixon, You, Zhu (2023), arXiv 2310.05351.

    >>> import torch
    >>> one_vs_rest(torch.tensor([[3.0, 0.0], [0.0, 1.0], [-1.0, 0.0], [0.0, -2.0]]))
    OneVsRest(min=tensor(1., dtype=torch.float64), mean=tensor(1., dtype=torch.float64))
    """
    distances = one_vs_rest_distance(unit_rows("rows", float64_rows("rows", rows)))
    return OneVsRest(distances.min(), distances.mean())


def generalized_measures(
    statistics: ClassStatistics, classifier: Classifier | None = None
) -> dict[str, Tensor]:
    """GNC2 of the class means; with a classifier GNC2 of its weight, and GNC3.

    GNC1 is ``nc1_trace`` (:func:`~etflayers.metrics.covariance_trace_ratio`) of the same statistics. Names
    and formulas are listed in ``docs/understand/metrics.md``.

    Args:
        statistics: of the *directions* of the features, K classes, any d.
        classifier: its weight; rows of classes that statistics excludes are left out.

    Returns:
        Float64 scalars.

    Raises:
        InvalidArgumentError: a mean or a row of the weight that is zero, which has no direction.

    Reference:
        Jiang, Zhou, Wang, Qu, Mixon, You, Zhu (2023), arXiv 2310.05351.

    >>> import torch
    >>> from etflayers.functional import directions
    >>> from etflayers.metrics import class_statistics
    >>> features = torch.tensor([[2.0, 0.0], [0.0, 1.0], [-1.0, 0.0], [0.0, -3.0]])
    >>> statistics = class_statistics(directions(features), torch.arange(4), num_classes=4)
    >>> generalized_measures(statistics, Classifier(5 * features))["gnc3_cosine"]
    tensor(1., dtype=torch.float64)
    """
    means = statistics.means
    result = _measures_of(means, "means")
    if classifier is None:
        return result
    weight = classifier.weight[statistics.classes.to(classifier.weight.device)].to(means)
    result |= _measures_of(weight, "weights")
    result["gnc3_cosine"] = duality_cosine(weight, means)
    result["gnc3_row_distance"] = duality_row_distance(weight, means)
    return result


def _measures_of(rows: Tensor, of: str) -> dict[str, Tensor]:
    distances = one_vs_rest(rows)
    return {
        f"gnc2_largest_cosine_{of}": largest_cosine(rows),
        f"gnc2_one_vs_rest_min_{of}": distances.min,
        f"gnc2_one_vs_rest_mean_{of}": distances.mean,
    }
