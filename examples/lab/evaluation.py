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


class Answers(NamedTuple):
    """What a model makes of this rank's share of a split: features ``(N, d)`` as its head reads them."""

    features: Tensor
    logits: Tensor
    targets: Tensor


class Measures(NamedTuple):
    """Loss, accuracy and every collapse metric of a split, and what they come from."""

    row: Row
    statistics: ClassStatistics
    margins: Tensor
    answers: Answers


@torch.no_grad()
def answers(model: nn.Module, split: Split, data: ImageData) -> Answers:
    """Features and logits of a split in eval mode: they need less memory than its images."""
    training = model.training
    model.eval()
    head = head_of(model)
    features, logits = [], []
    mine = share_of_split(split)
    for images in mine.images.split(EVALUATION_BATCH):
        with capture_features(model, head) as captured:
            logits.append(model(data.normalized(images)))
        features.append(classifier_inputs(head, captured[0]))
    model.train(training)
    return Answers(torch.cat(features), torch.cat(logits), mine.targets)


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
    answer = answers(model, split, data)
    loss = _mean_loss(criterion, answer)
    if not math.isfinite(loss):
        raise NonFiniteError(f"training has diverged (loss {loss}): take a smaller --lr")
    accuracy = MulticlassAccuracy(data.num_classes, average="micro").to(answer.logits.device)
    accuracy.update(answer.logits, answer.targets)
    row = {"loss": loss, "accuracy": float(accuracy.compute())}

    sizes, device = (data.num_classes, answer.features.shape[1]), answer.features.device
    head = head_of(model)
    statistics = NeuralCollapse(*sizes, scatter="none").to(device)
    statistics.update(answer.features, answer.targets)
    own = statistics.statistics()
    margins = CosineMargins().to(device)
    margins.update(answer.features, answer.targets, read_classifier(head).weight)
    try:
        collapse = NeuralCollapse(*sizes, classifier=head, centers=own if centers is None else centers)
        collapse.to(device).update(answer.features, answer.targets, answer.logits)
        values = collapse.compute()
        del values["accuracy"]  # measured above, where it always exists
        row |= {name: float(value) for name, value in values.items()}
    except InvalidArgumentError as error:
        # Say so, and do not lose the run: a dead network, whose class means coincide, has no angles.
        warnings.warn(f"the collapse metrics do not exist in this state of the model: {error}", stacklevel=2)
    return Measures(row, own, margins.compute().cpu(), answer)


@torch.no_grad()
def _mean_loss(criterion: nn.Module, answer: Answers) -> float:
    mean = MeanMetric(nan_strategy="disable").to(answer.logits.device)
    mean.update(criterion(answer.logits.float(), answer.targets), len(answer.targets))
    return float(mean.compute())
