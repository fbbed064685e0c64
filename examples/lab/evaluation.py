"""What is measured of a model at the end of an epoch: in eval mode, over all of the training and test set."""

from __future__ import annotations

import math
import warnings
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torchmetrics.aggregation import MeanMetric
from torchmetrics.classification import MulticlassAccuracy

from etflayers import capture_features
from etflayers.errors import InvalidArgumentError, NonFiniteError
from etflayers.metrics import (
    ClassStatistics,
    CosineMargins,
    NeuralCollapse,
    classifier_inputs,
    read_classifier,
)
from lab.data import ImageData, Split
from lab.files import Row
from lab.heads import head_of
from lab.ranks import share_of_split

EVALUATION_BATCH = 500


class Measures(NamedTuple):
    """Loss, accuracy and every collapse metric of a split, and what they come from.

    Features ``(N, d)``, as the head reads them, and targets are this rank's share.
    """

    row: Row
    statistics: ClassStatistics
    margins: Tensor
    features: Tensor
    targets: Tensor


@torch.no_grad()
def measure(
    model: nn.Module,
    criterion: nn.Module,
    split: Split,
    data: ImageData,
    centers: ClassStatistics | None = None,
) -> Measures:
    """Measure a model on one of the splits of ``data``, over all ranks.

    Args:
        model: with one of the heads of this package.
        criterion: of logits and targets.
        split: what to measure on.
        data: gives the number of classes.
        centers: class statistics that NC4 compares with; default: those of the split itself.

    Raises:
        NonFiniteError: the loss is NaN or infinite, training has diverged.
    """
    mine, head = share_of_split(split), head_of(model)
    features, logits = _answers(model, mine, data)
    device, targets = logits.device, mine.targets
    mean_loss = MeanMetric(nan_strategy="disable").to(device)
    mean_loss.update(criterion(logits.float(), targets), len(targets))
    loss = float(mean_loss.compute())
    if not math.isfinite(loss):
        raise NonFiniteError(f"training has diverged (loss {loss}): take a smaller --lr")
    accuracy = MulticlassAccuracy(data.num_classes, average="micro").to(device)
    accuracy.update(logits, targets)
    row = {"loss": loss, "accuracy": float(accuracy.compute())}

    sizes = data.num_classes, features.shape[1]
    statistics = NeuralCollapse(*sizes, scatter="none").to(device)
    statistics.update(features, targets)
    own = statistics.statistics()
    margins = CosineMargins().to(device)
    margins.update(features, targets, read_classifier(head).weight)
    try:
        collapse = NeuralCollapse(*sizes, classifier=head, centers=own if centers is None else centers)
        collapse.to(device).update(features, targets, logits)
        # The accuracy has been measured above, where it always exists.
        row |= {name: float(value) for name, value in collapse.compute().items() if name != "accuracy"}
    except InvalidArgumentError as error:
        # Say so, and do not lose the run: a dead network, whose class means coincide, has no angles.
        warnings.warn(f"the collapse metrics do not exist in this state of the model: {error}", stacklevel=2)
    return Measures(row, own, margins.compute().cpu(), features, targets)


def _answers(model: nn.Module, split: Split, data: ImageData) -> tuple[Tensor, Tensor]:
    """Features and logits of a split in eval mode: they need less memory than its images."""
    training, head = model.training, head_of(model)
    model.eval()
    features, logits = [], []
    for images in split.images.split(EVALUATION_BATCH):
        with capture_features(model, head) as captured:
            logits.append(model(data.normalized(images)))
        features.append(classifier_inputs(head, captured[0]))
    model.train(training)
    return torch.cat(features), torch.cat(logits)
