"""``LabelNoise``: what noisy labels did to a training set, in one pass, as a ``torchmetrics.Metric``."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor

from etflayers.checks import require, require_finite
from etflayers.errors import InvalidArgumentError
from etflayers.functional.class_means import require_target_for_each
from etflayers.metrics.moments import (
    ClassMoments,
    Scatter,
    merge_classes,
    merge_packed,
    moments_size,
    require_features,
    unpack_moments,
    update_moments,
)
from etflayers.metrics.nc1 import covariance_trace_ratio
from etflayers.metrics.nc2 import row_lengths
from etflayers.metrics.nc4 import decisions_of
from etflayers.metrics.noise import OriginMeans, memorization, origin_means_of, pairs_of, require_all_classes
from etflayers.metrics.shell import ExactMetric
from etflayers.metrics.statistics import ClassStatistics, GlobalMean, Unseen, finish_moments

__all__ = ["LabelNoise"]


class LabelNoise(ExactMetric):
    """NC1 by noisy and by true labels, memorization, bias of centroids and both accuracies, as a dictionary.

    Measure a training set whose true classes are known, in one pass. Nothing is stored for a sample: kept are
    the moments of the K^2 pairs of a label and a true class, ``2 K^2 d + d^2`` numbers, and sums. Ranks, and
    the batches of ``forward``, are merged exactly. Dilation is a matter of the test set:
    :func:`~etflayers.metrics.dilation` of the statistics of ``NeuralCollapse`` there.

    Args:
        num_classes: K, of labels; true classes are among them.
        in_features: d.
        centers: statistics of the *test* features by class, of the same network; adds memorization.
        global_mean: ``"classes"`` or ``"samples"``, in Sigma_B.
        unseen: whether a label without a sample, or a true class, is an ``"error"`` or ``"exclude"``.
        ignore_index: target or original of the samples to leave out.
        kwargs: of ``torchmetrics.Metric``.

    Raises:
        MissingDependencyError: torchmetrics is not installed.
        InvalidArgumentError: arguments that do not fit.

    Reference:
        Nguyen, Levie, Lienen, Kutyniok, Hüllermeier (2023), arXiv 2206.05530.

    >>> metric = LabelNoise(num_classes=2, in_features=1)
    >>> noisy, true = torch.tensor([0, 1, 1]), torch.tensor([0, 0, 1])
    >>> metric.update(torch.tensor([[0.0], [4.0], [4.0]]), noisy, true)
    >>> {name: round(value.item(), 3) for name, value in metric.compute().items()}  # all memorized
    {'noise_rate': 0.333, 'nc1_trace_noisy': 0.0, 'nc1_trace_clean': 1.333, 'corruption_bias': 4.0}
    """

    is_differentiable = False
    higher_is_better = None
    full_state_update = False

    packed: Tensor
    packed_logits: Tensor
    hits: Tensor
    judged: Tensor
    distances: Tensor
    corrupted: Tensor

    def __init__(
        self,
        num_classes: int,
        in_features: int,
        *,
        centers: ClassStatistics | None = None,
        global_mean: GlobalMean = "classes",
        unseen: Unseen = "error",
        ignore_index: int = -100,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        require(
            global_mean in ("classes", "samples"),
            f"global_mean must be 'classes' or 'samples', got {global_mean!r}",
        )
        require(unseen in ("error", "exclude"), f"unseen must be 'error' or 'exclude', got {unseen!r}")
        known = num_classes
        if centers is not None:
            known = require_all_classes(centers)
            if centers.means.shape[1] != in_features or known > num_classes:
                raise InvalidArgumentError(
                    f"centers must have means of shape (K, in_features) with K <= {num_classes} and "
                    f"in_features = {in_features}, got {tuple(centers.means.shape)}"
                )
        self.num_classes = num_classes
        self.in_features = in_features
        self.centers = centers
        self.global_mean = global_mean
        self.unseen = unseen
        self.ignore_index = ignore_index
        scatter: Scatter = "pooled"
        for name, classes, width in (
            ("packed", num_classes**2, in_features),
            ("packed_logits", num_classes, num_classes),
        ):
            size = moments_size(classes, width, scatter)
            merge = partial(merge_packed, num_classes=classes, in_features=width, scatter=scatter)
            self.add_state(name, torch.zeros(size, dtype=torch.float64), dist_reduce_fx=merge)
        # Decisions that agree with the noisy and with the true labels, and all that were made.
        self.add_state("hits", torch.zeros(2, dtype=torch.int64), dist_reduce_fx="sum")
        self.add_state("judged", torch.zeros((), dtype=torch.int64), dist_reduce_fx="sum")
        # Sums by true class.
        for name in ("distances", "corrupted"):
            self.add_state(name, torch.zeros(known, dtype=torch.float64), dist_reduce_fx="sum")

    @property
    def moments(self) -> ClassMoments:
        """Of the K^2 pairs ``y K + o``, as accumulated on this rank; views of the state."""
        return unpack_moments(self.packed, self.num_classes**2, self.in_features, "pooled")

    @property
    def logit_moments(self) -> ClassMoments:
        """Of the logits by noisy label; views of the state."""
        return unpack_moments(self.packed_logits, self.num_classes, self.num_classes, "pooled")

    def update(
        self, features: Tensor, targets: Tensor, originals: Tensor, logits: Tensor | None = None
    ) -> None:
        """Add a batch.

        Args:
            features: ``(B, d)``.
            targets: y, ``(B,)``, the noisy labels, in [0, K) or ``ignore_index``.
            originals: o, ``(B,)``, the true classes, likewise.
            logits: ``(B, K)``; adds the accuracies and NC1 of logits. Give them for all batches or for none.

        Raises:
            InvalidArgumentError: shapes or dtypes that do not fit, targets out of range.
            NonFiniteError: NaN or infinity in features or logits.
        """
        # What may be refused is computed before anything is changed.
        require_features(features, targets, self.in_features)
        require_target_for_each(features, originals)
        pairs = pairs_of(targets, originals, self.num_classes, self.ignore_index)
        kept = pairs >= 0
        remembered = None
        if self.centers is not None:
            remembered = memorization(
                features, targets, originals, self.centers, ignore_index=self.ignore_index
            )
        if logits is not None:
            require_features(logits, targets, self.num_classes)
            logits, labels = logits.detach()[kept], torch.stack([targets, originals]).long()[:, kept]
            require_finite(row_lengths(logits), "logits must be finite: look at what produced them")
            right = (decisions_of(logits) == labels).sum(1) if len(logits) else torch.zeros_like(self.hits)

        update_moments(self.moments, features, pairs, ignore_index=-1)
        if remembered is not None:
            self.distances += remembered.sums
            self.corrupted += remembered.counts
        if logits is not None:
            update_moments(self.logit_moments, logits, labels[0])
            self.hits += right
            self.judged += len(logits)

    def compute(self) -> dict[str, Tensor]:
        """The measures of all samples seen, float64 scalars by name; what does not exist is not there.

        Raises:
            InvalidArgumentError: a label or a true class without samples, unless excluded.
        """
        centroids = origin_means_of(self.moments, self.num_classes)
        samples = centroids.counts.sum()
        result = {
            "noise_rate": 1 - centroids.counts.trace() / samples,
            "nc1_trace_noisy": self._nc1(self._by_label()),
            "nc1_trace_clean": self._nc1(self._by_original()),
        }
        bias = centroids.mean_bias()
        if not bias.isnan():
            result["corruption_bias"] = bias
        if self.centers is not None:
            result["memorization"] = self.distances.sum()
            if self.corrupted.any():
                result["memorization_mean"] = self.distances.sum() / self.corrupted.sum()
        if self.judged > 0:
            require(
                bool(self.judged == samples),
                f"logits were given for {int(self.judged)} of {int(samples)} samples: give them in every "
                "update or in none",
            )
            result["nc1_trace_logits"] = self._nc1(self.logit_moments)
            noisy, clean = (self.hits / samples).unbind()
            result |= {"accuracy_noisy": noisy, "accuracy_clean": clean}
        return result

    def origin_means(self) -> OriginMeans:
        """The centroids of each pair of a label and a true class, over the samples of all ranks."""
        with self._all_ranks():
            return origin_means_of(self.moments, self.num_classes)

    def memorization_by_class(self) -> Tensor:
        """The sum of distances of the corrupted samples of each true class, ``(K,)``, over all ranks.

        Raises:
            InvalidArgumentError: a metric without ``centers``.
        """
        require(self.centers is not None, "memorization needs centers, the statistics of the test features")
        with self._all_ranks():
            return self.distances.clone()

    def _all_ranks(self) -> Any:
        return self.sync_context(
            dist_sync_fn=self.dist_sync_fn, should_sync=self._to_sync, should_unsync=self._should_unsync
        )

    def _nc1(self, moments: ClassMoments) -> Tensor:
        statistics = finish_moments(moments, unseen=self.unseen)
        return covariance_trace_ratio(statistics, global_mean=self.global_mean)

    def _by_label(self) -> ClassMoments:
        return merge_classes(self.moments, self._pairs() // self.num_classes, self.num_classes)

    def _by_original(self) -> ClassMoments:
        return merge_classes(self.moments, self._pairs() % self.num_classes, self.num_classes)

    def _pairs(self) -> Tensor:
        return torch.arange(self.num_classes**2, device=self.packed.device)
