"""``NeuralCollapse``: every metric in one pass over the data, as a ``torchmetrics.Metric``."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from etflayers.checks import require, require_flag, require_module
from etflayers.errors import InvalidArgumentError
from etflayers.functional import nearest_etf
from etflayers.functional.class_means import some_ignored
from etflayers.functional.logits import directions
from etflayers.metrics.centers import AboutCenters
from etflayers.metrics.classifier import Classifier, answers, classifier_inputs, read_classifier
from etflayers.metrics.gnc import generalized_measures
from etflayers.metrics.margins import margins_of
from etflayers.metrics.measures import collapse_measures
from etflayers.metrics.moments import (
    ClassMoments,
    Scatter,
    add_batch,
    merge_packed,
    moments_size,
    require_features,
    unpack_moments,
    update_moments,
)
from etflayers.metrics.nc4 import confidences_of, largest_logits
from etflayers.metrics.pictures import plot_measures
from etflayers.metrics.shell import ExactMetric, Shared
from etflayers.metrics.statistics import ClassStatistics, GlobalMean, Unseen, finish_moments

__all__ = ["NeuralCollapse"]


class NeuralCollapse(ExactMetric):
    """All neural-collapse metrics of a feature layer, and of the classifier on top of it, as a dictionary.

    One pass gives NC1, NC2, NC3, bias collapse, accuracy, calibration error and the mean cosine margin. The
    class means that NC4 compares with are known only at the end of a pass: give those of a first pass as
    ``centers``, over the training set or over the same data.

    Nothing is stored for a sample but its confidence, for the calibration error, and that only with a
    classifier. Ranks, and the batches of ``forward``, are merged exactly: the moments are a single state.

    Args:
        num_classes: K.
        in_features: d.
        classifier: a linear layer or head, read at each update and compute. It is not part of the metric's
            parameters or ``state_dict``; copies of the metric read the same one, pickles carry it.
        centers: statistics of a first pass, ``first.statistics()``; adds NC1 about
            these centers, without a d x d matrix, and NC4; needs a classifier.
        global_mean: ``"classes"`` (mean of the class means) or ``"samples"``; they differ under imbalance.
        scatter: ``"pooled"`` keeps the d x d within-class covariance of NC1 and VCI; ``"none"`` leaves those
            two out and costs about a quarter; ``"per_class"`` adds the numerical rank, for K d^2 numbers.
        unseen: whether classes without a sample are an ``"error"`` or ``"exclude"``.
        ignore_index: target of the samples to leave out.
        normalize: whether to measure the directions of the features, as generalized neural collapse does,
            and to add its measures; decisions stay those on the features. Centers are of directions, too.
        calibration_bins: of the expected calibration error.
        kwargs: of ``torchmetrics.Metric``.

    Raises:
        MissingDependencyError: torchmetrics is not installed.
        InvalidArgumentError: arguments that do not fit.

    >>> from etflayers import simplex_etf
    >>> frame = simplex_etf(3, 4)
    >>> metric = NeuralCollapse(num_classes=3, in_features=4)
    >>> metric.update(5 * frame.repeat(2, 1), torch.arange(3).repeat(2))
    >>> {name: round(value.item(), 6) for name, value in metric.compute().items() if "nc1" in name}
    {'nc1_trace': 0.0, 'nc1_trace_sum': 0.0, 'nc1_vci': 0.0, 'nc1_quotient': 0.0, 'nc1_cdnv': 0.0,
     'nc1_within_variance': 0.0}
    """

    is_differentiable = False
    higher_is_better = None
    full_state_update = False

    packed: Tensor
    samples: Tensor
    hits: Tensor
    disagreements: Tensor
    margins: Tensor
    deviations: Tensor
    confidences: list[Tensor]
    correct: list[Tensor]

    def __init__(
        self,
        num_classes: int,
        in_features: int,
        *,
        classifier: nn.Module | None = None,
        centers: ClassStatistics | None = None,
        global_mean: GlobalMean = "classes",
        scatter: Scatter = "pooled",
        unseen: Unseen = "error",
        ignore_index: int = -100,
        normalize: bool = False,
        calibration_bins: int = 15,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        size = moments_size(num_classes, in_features, scatter)
        require(
            global_mean in ("classes", "samples"),
            f"global_mean must be 'classes' or 'samples', got {global_mean!r}",
        )
        require(unseen in ("error", "exclude"), f"unseen must be 'error' or 'exclude', got {unseen!r}")
        require_flag("normalize", normalize)
        require(calibration_bins >= 1, f"calibration_bins must be at least 1, got {calibration_bins}")
        require(
            centers is None or classifier is not None,
            "centers need a classifier, whose decisions NC4 compares with the nearest center",
        )
        require(
            centers is None or isinstance(centers, ClassStatistics),
            f"centers must be ClassStatistics, first.statistics(), got {type(centers).__name__}",
        )
        if centers is not None and centers.means.shape[1] != in_features:
            raise InvalidArgumentError(
                f"centers must have means of shape (K, in_features) = (K, {in_features}), "
                f"got {tuple(centers.means.shape)}"
            )
        self.num_classes = num_classes
        self.in_features = in_features
        self.centers = centers
        self._about = None if centers is None else AboutCenters(centers, global_mean)
        self.global_mean = global_mean
        self.scatter = scatter
        self.unseen = unseen
        self.ignore_index = ignore_index
        self.normalize = normalize
        self.calibration_bins = calibration_bins
        self.measure_classifier(classifier)

        merge = partial(merge_packed, num_classes=num_classes, in_features=in_features, scatter=scatter)
        self.add_state("packed", torch.zeros(size, dtype=torch.float64), dist_reduce_fx=merge)
        for name in ("samples", "hits", "disagreements"):
            self.add_state(name, torch.zeros((), dtype=torch.int64), dist_reduce_fx="sum")
        for name in ("margins", "deviations"):
            self.add_state(name, torch.zeros((), dtype=torch.float64), dist_reduce_fx="sum")
        # Lists of float32, the dtype in which torchmetrics sends the empty list of a rank without samples.
        for name in ("confidences", "correct"):
            self.add_state(name, [], dist_reduce_fx="cat")

    def measure_classifier(self, classifier: nn.Module | None) -> None:
        """Read the weight of another classifier from now on, or of none."""
        self._classifier = Shared(classifier)
        self._read()

    @property
    def moments(self) -> ClassMoments:
        """What has been accumulated on this rank; views of the state."""
        return unpack_moments(self.packed, self.num_classes, self.in_features, self.scatter)

    def update(self, features: Tensor, targets: Tensor, logits: Tensor | None = None) -> None:
        """Add a batch.

        Args:
            features: ``(B, d)``, as the classifier receives them. Of a head with ``normalize=True`` their
                directions are measured, which are what it is linear in.
            targets: ``(B,)``, integers in [0, K) or ``ignore_index``.
            logits: ``(B, K)``, what the classifier answered; default: what its weight and bias give. Not
                used without a classifier.

        Raises:
            InvalidArgumentError: shapes or dtypes that do not fit, targets out of range.
            NonFiniteError: NaN or infinity in the features, NaN or plus infinity in the logits.
        """
        module = self._classifier.value
        require_features(features, targets, self.in_features)
        if logits is not None and logits.shape != (len(features), self.num_classes):
            raise InvalidArgumentError(
                f"logits must have shape (B, K) = ({len(features)}, {self.num_classes}), "
                f"got {tuple(logits.shape)}"
            )
        if module is None:
            measured = self._measured(features)
            update_moments(self.moments, measured, targets, ignore_index=self.ignore_index)
            return
        # What may be refused is computed before anything is changed.
        features, classes = classifier_inputs(module, features), targets.long()
        ignored = some_ignored(targets, self.num_classes, self.ignore_index)
        if ignored is not None:
            features, classes = features[~ignored], classes[~ignored]
            logits = None if logits is None else logits[~ignored]
        answered = answers(module, features)
        margins = margins_of(answered.projections, answered.lengths, classes)
        logits = answered.logits if logits is None else logits.detach()
        largest, decisions = largest_logits(logits)
        measured = self._measured(features)
        if self._about is not None:
            deviations, disagreements = self._about.compare(measured, classes, decisions)

        add_batch(self.moments, measured, classes, None)
        correct = decisions == classes
        self.samples.add_(len(classes))  # not +=, by which nn.Module would assign the state anew
        self.hits.add_(correct.sum())
        self.margins.add_(margins.sum(dtype=torch.float64))
        self.confidences.append(confidences_of(logits, largest))
        self.correct.append(correct.float())
        if self._about is not None:
            self.deviations.add_(deviations)
            self.disagreements.add_(disagreements)

    def compute(self) -> dict[str, Tensor]:
        """The metrics of all samples seen, float64 scalars by name.

        Raises:
            InvalidArgumentError: a class without samples, unless excluded.
        """
        classifier = self._read()
        statistics = finish_moments(self.moments, unseen=self.unseen)
        result = collapse_measures(statistics, classifier, global_mean=self.global_mean)
        if self.normalize:
            result |= generalized_measures(statistics, classifier)
        if classifier is None:
            return result
        samples = self.samples.double()
        result["accuracy"] = self.hits / samples
        result["calibration_error"] = self._calibration_error().double()
        result["margin_mean"] = self.margins / samples
        if self.centers is not None:
            trace = self.deviations / samples
            result["nc1_trace_about_centers"] = trace / len(self.centers.means)
            result["nc4_disagreement"] = self.disagreements / samples
        return result

    def plot(
        self, val: Mapping[str, Tensor] | Sequence[Mapping[str, Tensor]] | None = None, ax: Any = None
    ) -> Any:
        """Draw the measures by name, or how each develops.

        Args:
            val: a result of ``compute`` or ``forward``, or several in order; default: that of now.
            ax: axes of matplotlib to draw into; default: a new figure.

        Returns:
            The figure and the axes.

        Raises:
            MissingDependencyError: matplotlib is not installed.
        """
        return plot_measures(self.compute() if val is None else val, ax)

    def statistics(self) -> ClassStatistics:
        """Counts, means and covariances of the samples of all ranks: the ``centers`` of a second pass."""
        with self.sync_context(
            dist_sync_fn=self.dist_sync_fn, should_sync=self._to_sync, should_unsync=self._should_unsync
        ):
            return finish_moments(self.moments, unseen=self.unseen)

    def nearest_frame(self) -> Tensor:
        """The simplex ETF nearest to the class means; see ``frame_distance`` for its drift."""
        return nearest_etf(self.statistics().means)

    def _measured(self, features: Tensor) -> Tensor:
        return directions(features.detach()) if self.normalize else features

    def _calibration_error(self) -> Tensor:
        # Confidence and correctness of the decision are all that the multi-class error is made of.
        functional = require_module("torchmetrics.functional.classification", extra="metrics")
        confidences, correct = (
            torch.cat(list(state)) if isinstance(state, (list, tuple)) else state
            for state in (self.confidences, self.correct)
        )
        error: Tensor = functional.binary_calibration_error(
            confidences, correct.long(), n_bins=self.calibration_bins, norm="l1"
        )
        return error

    def _read(self) -> Classifier | None:
        module = self._classifier.value
        if module is None:
            return None
        classifier = read_classifier(module)
        expected = (self.num_classes, self.in_features)
        require(
            classifier.weight.shape == expected,
            f"classifier must have a weight of shape (num_classes, in_features) = {expected}, "
            f"got {tuple(classifier.weight.shape)}",
        )
        return classifier
