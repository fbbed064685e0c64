"""What every neural-collapse metric is a function of: counts, means and scatter of the classes seen."""

from __future__ import annotations

from typing import Literal, NamedTuple

import torch
from torch import Tensor

from etflayers.checks import require
from etflayers.metrics.moments import ClassMoments, Scatter, recentered, update_moments, zero_moments

__all__ = ["ClassStatistics", "GlobalMean", "Unseen", "class_statistics", "finish_moments"]

GlobalMean = Literal["classes", "samples"]
Unseen = Literal["error", "exclude"]


class ClassStatistics(NamedTuple):
    """Statistics of the K classes that have been seen, all float64.

    Attributes:
        classes: their indices, ``(K,)`` int64.
        counts: n, ``(K,)``.
        means: m, ``(K, d)``.
        variances: E|h - m_k|^2 of each class, ``(K,)``.
        scatter: the within-class covariance ``Sigma_W = 1/N sum (h - m_y)(h - m_y)'``, ``(d, d)``; with
            ``scatter="per_class"`` the covariance of each class, ``(K, d, d)``; or ``(0,)``.
    """

    classes: Tensor
    counts: Tensor
    means: Tensor
    variances: Tensor
    scatter: Tensor

    @property
    def within(self) -> Tensor:
        """Sigma_W, ``(d, d)``: each sample counts once, so large classes count more."""
        require(
            self.scatter.ndim > 1,
            "scatter='none' keeps no within-class covariance: accumulate with scatter='pooled' for this",
        )
        if self.scatter.ndim == 2:
            return self.scatter
        pooled: Tensor = torch.tensordot(self.counts / self.counts.sum(), self.scatter, 1)
        return pooled

    @property
    def within_trace(self) -> Tensor:
        """Trace of Sigma_W, known also without the matrix."""
        return (self.counts * self.variances).sum() / self.counts.sum()

    def global_mean(self, of: GlobalMean = "classes") -> Tensor:
        """The mean of the class means, or of all samples, ``(d,)``.

        >>> features, targets = torch.tensor([[0.0], [0.0], [0.0], [4.0]]), torch.tensor([0, 0, 0, 1])
        >>> statistics = class_statistics(features, targets, num_classes=2)
        >>> statistics.global_mean("classes").item(), statistics.global_mean("samples").item()
        (2.0, 1.0)
        """
        require(of in ("classes", "samples"), f"global_mean must be 'classes' or 'samples', got {of!r}")
        weights = torch.ones_like(self.counts) if of == "classes" else self.counts
        # About one of the means, so that a large common mean does not cancel.
        return self.means[0] + (weights / weights.sum()) @ (self.means - self.means[0])

    def centered_means(self, global_mean: GlobalMean = "classes") -> Tensor:
        """The class means less the global mean, ``(K, d)``."""
        return self.means - self.global_mean(global_mean)


def finish_moments(moments: ClassMoments, *, unseen: Unseen = "error") -> ClassStatistics:
    """Turn sums into averages.

    Args:
        moments: of at least two classes with samples.
        unseen: ``"error"`` refuses moments in which a class has no sample; ``"exclude"`` leaves it out, and K
            is then the number of classes seen.

    Returns:
        The statistics.

    Raises:
        InvalidArgumentError: a class without samples, or fewer than two classes with samples.
    """
    require(unseen in ("error", "exclude"), f"unseen must be 'error' or 'exclude', got {unseen!r}")
    seen = moments.counts > 0
    missing = (~seen).nonzero().flatten().tolist()
    require(
        not missing or unseen == "exclude",
        f"{len(missing)} of {len(seen)} classes have no sample (the first: {missing[:5]}): the metrics of a "
        "class never seen do not exist; pass more data, or unseen='exclude' to leave these classes out",
    )
    classes = seen.nonzero().flatten()
    require(len(classes) >= 2, f"samples of at least two classes are needed, got {len(classes)}")
    central = recentered(moments)
    counts = central.counts[classes]
    scatter = central.scatter
    if scatter.ndim == 2:
        scatter = scatter / counts.sum()
    elif scatter.ndim == 3:
        scatter = scatter[classes] / counts[:, None, None]
    return ClassStatistics(
        classes, counts, central.shift[classes], central.squares[classes] / counts, scatter
    )


def class_statistics(
    features: Tensor,
    targets: Tensor,
    num_classes: int,
    *,
    scatter: Scatter = "pooled",
    unseen: Unseen = "error",
    ignore_index: int = -100,
) -> ClassStatistics:
    """The statistics of features that are all at hand.

    Args:
        features: ``(N, d)``.
        targets: ``(N,)``, integers in [0, K) or ``ignore_index``.
        num_classes: K.
        scatter: as in :func:`~etflayers.metrics.zero_moments`.
        unseen: as in :func:`~etflayers.metrics.finish_moments`.
        ignore_index: target of the samples to leave out.

    Returns:
        The statistics.

    Raises:
        InvalidArgumentError: arguments that do not fit; a class without samples.
        NonFiniteError: NaN or infinity in the features.

    >>> features = torch.tensor([[0.0, 0.0], [2.0, 0.0], [5.0, 5.0]])
    >>> class_statistics(features, torch.tensor([0, 0, 1]), num_classes=2).variances
    tensor([1., 0.], dtype=torch.float64)
    """
    moments = zero_moments(num_classes, features.shape[-1], scatter=scatter, device=features.device)
    update_moments(moments, features, targets, ignore_index=ignore_index)
    return finish_moments(moments, unseen=unseen)
