r"""What label noise does to features: which wrong labels were memorized, and what that costs on test data.

Symbols: h <-> features, y <-> targets (the labels, with noise), o <-> originals (the true classes),
m_k <-> centers, m_jk <-> means[j, k].

A sample is *corrupted* where y != o. A network that has not memorized it puts its feature where test samples
of its true class are; one that has puts it elsewhere. **Memorization** is the sum of those distances. The
price is **dilation**: features of test samples, which nobody mislabeled, spread out as well.

Features of one label are a mixture: most have the label as their true class, some do not. So everything else
is a function of the moments of each pair (label, original). The moments of a label, or of a true class, are
those of a union of pairs, with the counts that the noise left and not those of the data set.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from etflayers.checks import require, require_finite, require_size, require_values
from etflayers.functional.class_means import (
    ignored_targets,
    require_class_indices,
    require_target_for_each,
)
from etflayers.metrics.moments import ClassMoments, require_features, update_moments, zero_moments
from etflayers.metrics.nc1 import covariance_trace_ratio
from etflayers.metrics.nc2 import row_lengths
from etflayers.metrics.nc4 import decisions_of
from etflayers.metrics.statistics import ClassStatistics, GlobalMean

__all__ = [
    "Dilation",
    "LabelAccuracies",
    "Memorization",
    "OriginMeans",
    "dilation",
    "label_accuracies",
    "memorization",
    "origin_means",
    "origin_means_of",
    "pairs_of",
]


class Memorization(NamedTuple):
    """How far corrupted samples are from the test samples of their true class, float64.

    Attributes:
        distances: of each corrupted sample, ``(M,)``, in the order of the samples.
        sums: of the distances of each true class, ``(K,)``.
        counts: corrupted samples of each true class, ``(K,)``.
    """

    distances: Tensor
    sums: Tensor
    counts: Tensor

    @property
    def total(self) -> Tensor:
        """The sum over all corrupted samples, as published."""
        return self.sums.sum()

    @property
    def class_means(self) -> Tensor:
        """The mean distance of each true class, ``(K,)``; 0 for a class without corrupted samples."""
        return self.sums / self.counts.clamp(min=1)


@torch.no_grad()
def memorization(
    features: Tensor,
    targets: Tensor,
    originals: Tensor,
    centers: ClassStatistics,
    *,
    ignore_index: int = -100,
) -> Memorization:
    r"""``sum |h - m_o|`` over the samples with ``y != o``, m_o the mean of the *test* features of class o.

    Args:
        features: h of training samples, ``(B, d)``.
        targets: y, ``(B,)``, the labels of the training, in any set of classes, or ``ignore_index``.
        originals: o, ``(B,)``, the true classes, in [0, K), or ``ignore_index``.
        centers: statistics of the test features, with all K classes; of any kind.
        ignore_index: target or original of the samples to leave out.

    Returns:
        The distance of each corrupted sample, and their sums and counts by true class.

    Raises:
        InvalidArgumentError: shapes or dtypes that do not fit, a class without a center.
        NonFiniteError: NaN or infinity in the features of a corrupted sample.

    Reference:
        Nguyen, Levie, Lienen, Kutyniok, Hüllermeier (2023), arXiv 2206.05530.

    >>> from etflayers.metrics import class_statistics
    >>> test = class_statistics(torch.tensor([[0.0], [4.0]]), torch.tensor([0, 1]), 2)
    >>> features, noisy, true = (
    ...     torch.tensor([[0.1], [3.0], [4.0]]),
    ...     torch.tensor([0, 1, 1]),
    ...     torch.tensor([0, 0, 1]),
    ... )
    >>> memorization(features, noisy, true, test).distances
    tensor([3.], dtype=torch.float64)
    """
    require_features(features, targets, centers.means.shape[1])
    require_target_for_each(features, originals)
    require_class_indices(targets)
    num_classes = require_all_classes(centers)
    ignored = ignored_targets(originals, num_classes, ignore_index) | (targets.long() == ignore_index)
    corrupted = (targets.long() != originals.long()) & ~ignored
    classes = originals.long()[corrupted]
    means = centers.means.to(features.device)
    distances = row_lengths(features.detach()[corrupted].double() - means[classes])
    require_finite(distances, "features must be finite: look for an overflow in what produced them")
    sums, counts = distances.new_zeros(2, num_classes)
    sums.index_add_(0, classes, distances)
    counts.index_add_(0, classes, torch.ones_like(distances))
    return Memorization(distances, sums, counts)


def require_all_classes(centers: ClassStatistics) -> int:
    """K, after checking that ``centers`` leave out no class below it."""
    found = centers.classes.tolist()
    require(
        found == list(range(len(found))),
        f"centers must have all classes 0 to K - 1, got {found[:8]}: measure them on test data that have a "
        "sample of each",
    )
    return len(found)


class Dilation(NamedTuple):
    """How far the features of one class spread on test data, float64 scalars.

    Attributes:
        nc1: the trace ratio ``tr(Sigma_W Sigma_B^+) / K``, in units of the distances between classes.
        trace: ``tr Sigma_W``, in units of the features.
    """

    nc1: Tensor
    trace: Tensor


def dilation(test: ClassStatistics, *, global_mean: GlobalMean = "classes") -> Dilation:
    r"""Variability within classes of *test* features: ``tr(Sigma_W Sigma_B^+) / K`` and ``tr Sigma_W``.

    Args:
        test: statistics of test features by their true class, such as ``NeuralCollapse.statistics()``.
        global_mean: ``"classes"`` or ``"samples"``, m in Sigma_B.

    Returns:
        Both measures.

    Raises:
        InvalidArgumentError: statistics accumulated with ``scatter="none"``.

    Reference:
        Nguyen, Levie, Lienen, Kutyniok, Hüllermeier (2023), arXiv 2206.05530.

    >>> from etflayers.metrics import class_statistics
    >>> features = torch.tensor([[1.0], [3.0], [-1.0], [-3.0]])
    >>> dilation(class_statistics(features, torch.tensor([0, 0, 1, 1]), 2)).trace
    tensor(1., dtype=torch.float64)
    """
    return Dilation(covariance_trace_ratio(test, global_mean=global_mean), test.within_trace)


class OriginMeans(NamedTuple):
    """Centroids of the features of each pair of a label and a true class, float64.

    Attributes:
        counts: samples with label j and true class k, ``(K, K)``.
        means: m_jk, ``(K, K, d)``; zero where there is no sample.
    """

    counts: Tensor
    means: Tensor

    @property
    def clean(self) -> Tensor:
        """The centroids m_kk of the samples whose label is right, ``(K, d)``."""
        return torch.diagonal(self.means, dim1=0, dim2=1).mT

    def bias(self) -> Tensor:
        """``<m_jk - m_kk, (m_jj - m_kk)/|m_jj - m_kk|>``: how far wrong labels j drag samples of class k.

        It is 0 where the network ignores these labels, and ``|m_jj - m_kk|`` where it has memorized them.

        Returns:
            ``(K, K)``; NaN where there is no such sample (so for j = k) or no direction: a clean class
            without samples, or two clean centroids that coincide.
        """
        clean, found = self.clean, self.counts.diagonal() > 0
        way = clean.unsqueeze(1) - clean.unsqueeze(0)
        lengths = row_lengths(way)
        along = ((self.means - clean.unsqueeze(0)) * way).sum(-1)
        exists = (self.counts > 0) & (lengths > 0) & found.unsqueeze(0) & found.unsqueeze(1)
        return torch.where(exists, along / torch.where(exists, lengths, 1), torch.nan)

    def mean_bias(self) -> Tensor:
        """The mean of :meth:`bias` over all corrupted samples; NaN if there is none for which it exists."""
        bias = self.bias()
        weights = torch.where(bias.isnan(), 0, self.counts)
        return (weights * bias.nan_to_num()).sum() / weights.sum()


def origin_means(
    features: Tensor, targets: Tensor, originals: Tensor, num_classes: int, *, ignore_index: int = -100
) -> OriginMeans:
    """Clean and corrupted centroids: the mean feature of each pair of a label and a true class.

    Args:
        features: h, ``(B, d)``.
        targets: y, ``(B,)``, integers in [0, K) or ``ignore_index``.
        originals: o, ``(B,)``, likewise.
        num_classes: K >= 2; there are K^2 d numbers.
        ignore_index: target or original of the samples to leave out.

    Returns:
        Counts and means.

    Raises:
        InvalidArgumentError: shapes or dtypes that do not fit, targets out of range.
        NonFiniteError: NaN or infinity in the features.

    Reference:
        Nguyen, Levie, Lienen, Kutyniok, Hüllermeier (2023), arXiv 2206.05530.

    >>> features, noisy, true = (
    ...     torch.tensor([[0.0], [3.0], [4.0]]),
    ...     torch.tensor([0, 1, 1]),
    ...     torch.tensor([0, 0, 1]),
    ... )
    >>> origin_means(features, noisy, true, 2).bias()  # of label 1 on class 0
    tensor([[nan, nan],
            [3., nan]], dtype=torch.float64)
    """
    pairs = pairs_of(targets, originals, num_classes, ignore_index)
    moments = zero_moments(num_classes**2, features.shape[-1], scatter="none", device=features.device)
    update_moments(moments, features, pairs, ignore_index=-1)
    return origin_means_of(moments, num_classes)


def origin_means_of(moments: ClassMoments, num_classes: int) -> OriginMeans:
    """The centroids from the moments of the K^2 pairs, numbered as by :func:`pairs_of`."""
    shape = (num_classes, num_classes)
    means = torch.where((moments.counts > 0).unsqueeze(-1), moments.means, 0)
    return OriginMeans(moments.counts.view(shape).clone(), means.view(*shape, -1))


def pairs_of(targets: Tensor, originals: Tensor, num_classes: int, ignore_index: int) -> Tensor:
    """``y K + o``, the number of the pair of each sample, ``(B,)``, and -1 for ignored ones."""
    require_size("num_classes", num_classes, at_least=2)
    ignored = ignored_targets(targets, num_classes, ignore_index)
    require_class_indices(originals, "originals")
    require(
        originals.shape == targets.shape,
        f"originals must have the shape of targets, {tuple(targets.shape)}, got {tuple(originals.shape)}",
    )
    origins = originals.long()
    left_out = origins == ignore_index
    require_values(
        (((origins >= 0) & (origins < num_classes)) | left_out).all(),
        f"originals must be class indices in [0, {num_classes}) or ignore_index={ignore_index}",
    )
    return torch.where(ignored | left_out, -1, targets.long() * num_classes + origins)


class LabelAccuracies(NamedTuple):
    """Shares of the samples for which the decision is a label, float64 scalars.

    Attributes:
        noisy: ``argmax(logits) = y``, the label of the training.
        clean: ``argmax(logits) = o``, the true class.
    """

    noisy: Tensor
    clean: Tensor


@torch.no_grad()
def label_accuracies(
    logits: Tensor, targets: Tensor, originals: Tensor, *, ignore_index: int = -100
) -> LabelAccuracies:
    """The share of decisions that agree with the noisy labels, and with the true classes.

    Args:
        logits: ``(B, K)``.
        targets: y, ``(B,)``, integers in [0, K) or ``ignore_index``.
        originals: o, ``(B,)``, likewise.
        ignore_index: target or original of the samples to leave out.

    Returns:
        Both accuracies.

    Raises:
        InvalidArgumentError: shapes or dtypes that do not fit, targets out of range, no sample.
        NonFiniteError: NaN or plus infinity in the logits.

    >>> label_accuracies(torch.eye(2)[[0, 1, 1]], torch.tensor([0, 1, 1]), torch.tensor([0, 0, 1])).noisy
    tensor(1., dtype=torch.float64)
    """
    require(logits.ndim == 2, f"logits must have shape (B, K), got {tuple(logits.shape)}")
    require_features(logits, targets, logits.shape[1])
    kept = pairs_of(targets, originals, logits.shape[1], ignore_index) >= 0
    decisions = decisions_of(logits[kept]) if bool(kept.any()) else logits.new_empty(0)
    require(len(decisions) > 0, "targets must hold at least one sample that is not ignored, got none")
    right = [(decisions == labels[kept]).double().mean() for labels in (targets, originals)]
    return LabelAccuracies(*right)
