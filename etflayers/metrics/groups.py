r"""Measures of groups of classes: frequent and rare ones, old and new ones.

Collapse of a group is that of a data set that holds its classes only. Its K_g class means are then centered
about their own mean. Of the classifier, what all rows of the group have in common does not count either: it
adds the same number to all logits of the group, and no decision between its classes sees it. So

    w_k - mean_{j in g} w_j        and        b_k - mean_{j in g} b_j

are measured. If all classes have collapsed, then so have those of the group: some vertices of a simplex, less
their mean, are a smaller simplex, and weights dual to the means stay dual.

The opposite is *minority collapse*: the classifier rows of rare classes get the same direction, and cannot be
told apart. That is seen in the rows as they are.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from etflayers.checks import require, require_values
from etflayers.errors import InvalidArgumentError
from etflayers.functional.class_means import require_class_indices
from etflayers.metrics.classifier import Classifier
from etflayers.metrics.measures import collapse_measures
from etflayers.metrics.nc2 import float64_rows, unit_rows
from etflayers.metrics.statistics import ClassStatistics, GlobalMean

__all__ = ["by_group", "groups_from_counts", "minority_collapse", "require_groups", "select_classes"]


def groups_from_counts(
    counts: Tensor,
    *,
    thresholds: tuple[float, float] = (20, 100),
    quantiles: tuple[float, float] | None = None,
) -> dict[str, Tensor]:
    r"""Divide classes by their numbers of training samples: many if ``n > b``, few if ``n < a``, else medium.

    Args:
        counts: n >= 0, ``(K,)``.
        thresholds: a <= b; those of ImageNet-LT, the usual ones, are 20 and 100.
        quantiles: in [0, 1]; a and b are then these quantiles of the counts: ``(1 / 3, 2 / 3)`` makes three
            groups of about one size. Classes with equal counts stay together.

    Returns:
        The class indices of ``"many"``, ``"medium"`` and ``"few"``, each in ascending order; a group may be
        empty.

    Raises:
        InvalidArgumentError: counts that are negative or not finite, thresholds or quantiles out of order.

    Reference:
        Liu, Miao, Zhan, Wang, Gong, Yu (2019), arXiv 1904.05160.

    >>> groups_from_counts(torch.tensor([500, 100, 20, 5]))
    {'many': tensor([0]), 'medium': tensor([1, 2]), 'few': tensor([3])}
    """
    require(
        isinstance(counts, Tensor) and counts.ndim == 1 and len(counts) > 0 and counts.dtype != torch.bool,
        "counts must be a tensor with one number for each class, shape (K,), got "
        f"{tuple(counts.shape) if isinstance(counts, Tensor) else type(counts).__name__}",
    )
    numbers = counts.detach().double()
    require_values(
        ((numbers >= 0) & torch.isfinite(numbers)).all(), "counts must be numbers of samples, finite and >= 0"
    )
    name, limits = ("thresholds", thresholds) if quantiles is None else ("quantiles", quantiles)
    low, high = limits
    require(low <= high, f"{name} must be two numbers in ascending order, got {limits}")
    if quantiles is not None:
        require(low >= 0 and high <= 1, f"quantiles must be in [0, 1], got {quantiles}")
        low, high = torch.quantile(numbers, numbers.new_tensor(quantiles)).tolist()
    masks = {"many": numbers > high, "medium": (numbers >= low) & (numbers <= high), "few": numbers < low}
    return {group: mask.nonzero().flatten() for group, mask in masks.items()}


def select_classes(statistics: ClassStatistics, classes: Tensor) -> ClassStatistics:
    r"""The statistics of some of the classes, as if the data had no other.

    Args:
        statistics: of more classes. A *pooled* covariance cannot be divided among classes, and is left out;
            with ``scatter="per_class"`` everything stays.
        classes: indices; those that statistics has not seen are left out.

    Returns:
        Statistics with the classes that remain, in ascending order.

    Raises:
        InvalidArgumentError: indices that are not integers, or fewer than two classes that remain.

    >>> from etflayers.metrics import class_statistics
    >>> statistics = class_statistics(torch.eye(3), torch.arange(3), num_classes=3)
    >>> select_classes(statistics, torch.tensor([2, 0])).means
    tensor([[1., 0., 0.],
            [0., 0., 1.]], dtype=torch.float64)
    """
    require_class_indices(classes, "classes")
    kept = _seen(statistics, classes).nonzero().flatten()
    require(
        len(kept) >= 2,
        f"samples of at least two of the classes are needed, statistics has seen {len(kept)} of them",
    )
    scatter = statistics.scatter
    return ClassStatistics(
        statistics.classes[kept],
        statistics.counts[kept],
        statistics.means[kept],
        statistics.variances[kept],
        scatter[kept] if scatter.ndim == 3 else scatter.new_empty(0),
    )


def by_group(
    statistics: ClassStatistics,
    groups: Mapping[str, Tensor],
    *,
    classifier: Classifier | None = None,
    global_mean: GlobalMean = "classes",
) -> dict[str, dict[str, Tensor]]:
    r"""Every measure of neural collapse for each group of classes, and how far the group has merged.

    For each group: :func:`~etflayers.metrics.collapse_measures` of its classes (centered about the group, see
    above: ideal values are the ideal ones), and :func:`minority_collapse` of its class means (less the mean
    of all classes) and, with a classifier, of its rows as they are.

    Args:
        statistics: of all classes; with ``scatter="per_class"`` the groups have all measures.
        groups: class indices by name, as from :func:`groups_from_counts`.
        classifier: its weight and bias, for all classes.
        global_mean: ``"classes"`` or ``"samples"``, in the measures and for the means.

    Returns:
        Float64 scalars by name, by group. A group of which fewer than two classes have been seen has no
        angle, and is left out.

    Raises:
        InvalidArgumentError: groups that are no class indices, or a measure that does not exist, such as the
            angles of a zero vector.

    >>> from etflayers import simplex_etf
    >>> from etflayers.metrics import class_statistics
    >>> frame = simplex_etf(5, 5)
    >>> groups = {"base": torch.tensor([0, 1, 2]), "novel": torch.tensor([3, 4])}
    >>> measures = by_group(class_statistics(frame, torch.arange(5), 5), groups, classifier=Classifier(frame))
    >>> {name: round(found["nc2_gram_weights"].item(), 5) for name, found in measures.items()}
    {'base': 0.0, 'novel': 0.0}
    >>> measures["base"]["minority_collapse_weights"]  # -1 / (K - 1), apart
    tensor(-0.2500, dtype=torch.float64)
    """
    require_groups(groups, None if classifier is None else len(classifier.weight))
    centered = statistics.centered_means(global_mean)
    result = {}
    for name, classes in groups.items():
        seen = _seen(statistics, classes)
        if int(seen.sum()) < 2:
            continue
        part = select_classes(statistics, classes)
        own = None if classifier is None else _about_the_group(classifier, part.classes)
        found = collapse_measures(part, own, global_mean=global_mean)
        found["minority_collapse_means"] = minority_collapse(centered[seen])
        if classifier is not None:
            rows = classifier.weight[part.classes.to(classifier.weight.device)]
            found["minority_collapse_weights"] = minority_collapse(rows)
        result[name] = found
    return result


def minority_collapse(rows: Tensor) -> Tensor:
    r"""The mean of ``cos(x_i, x_j)`` over the pairs i < j: 1 where all have merged into one direction.

    Of K_g of the K vertices of a simplex ETF it is -1/(K - 1).

    Args:
        rows: X, ``(K_g, d)``, the classifier rows of a group of classes, or their means less the mean of all.

    Returns:
        A float64 scalar in [-1, 1].

    Raises:
        InvalidArgumentError: fewer than two rows, or one of them zero, which has no angle.
        NonFiniteError: NaN or infinity.

    Reference:
        Fang, He, Long, Su (2021), arXiv 2101.12699.

    >>> minority_collapse(torch.tensor([[1.0, 0.0], [3.0, 0.0], [0.0, 2.0]]))
    tensor(0.3333, dtype=torch.float64)
    """
    units = unit_rows("rows", float64_rows("rows", rows))
    count = len(units)
    # The square of a sum of unit vectors is their number and twice the sum of the cosines.
    return ((units.sum(0).square().sum() - count) / (count * (count - 1))).clamp(-1, 1)


def require_groups(groups: Mapping[str, Tensor], num_classes: int | None = None) -> None:
    """Raise unless ``groups`` has vectors of class indices by name, in [0, K) where K is known."""
    if not isinstance(groups, Mapping) or not groups:
        raise InvalidArgumentError(
            "groups must be class indices by name, such as {'base': torch.arange(60), ...} or what "
            f"groups_from_counts returns, got {groups!r}"
        )
    for name, classes in groups.items():
        require_class_indices(classes, f"groups[{name!r}]")
        require(classes.ndim == 1, f"groups[{name!r}] must have shape (classes,), got {tuple(classes.shape)}")
        fits = classes >= 0 if num_classes is None else (classes >= 0) & (classes < num_classes)
        upper = "" if num_classes is None else f" below {num_classes}"
        require_values(fits.all(), f"groups[{name!r}] must be class indices from 0 on{upper}")


def _seen(statistics: ClassStatistics, classes: Tensor) -> Tensor:
    """Which classes of the statistics are among ``classes``."""
    return torch.isin(statistics.classes, classes.to(statistics.classes))


def _about_the_group(classifier: Classifier, classes: Tensor) -> Classifier:
    """The classifier less what its rows in the group have in common; only those rows have a meaning then."""
    weight, bias = classifier.weight.double(), classifier.bias
    own = classes.to(weight.device)
    if bias is not None:
        bias = bias.double() - bias.double()[own].mean()
    return Classifier(weight - weight[own].mean(0), bias)
