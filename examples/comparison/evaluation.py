"""What is measured of a model at the end of an epoch: in eval mode, over all of the training and test set."""

from __future__ import annotations

import math
import warnings
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchmetrics.aggregation import MeanMetric
from torchmetrics.classification import MulticlassAccuracy

from comparison.data import ImageData, Split
from comparison.heads import captured_features, head_of
from comparison.ranks import share_of_split
from etflayers.errors import InvalidArgumentError, NonFiniteError
from etflayers.metrics import ClassStatistics, CosineMargins, NeuralCollapse, read_classifier

EVALUATION_BATCH = 500

Row = dict[str, float]  # numbers by name; what does not exist in a state of the model is not there


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
        with captured_features(model) as captured:
            logits.append(model(data.normalized(images)))
        # A head that normalizes is linear in the normalized features.
        features.append(
            F.normalize(captured[0], dim=-1) if getattr(head, "normalize", False) else captured[0]
        )
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
    loss = float(_mean_loss(criterion, answer))
    if not math.isfinite(loss):
        raise NonFiniteError(f"training has diverged (loss {loss}): take a smaller --lr")
    accuracy = MulticlassAccuracy(data.num_classes, average="micro").to(answer.logits.device)
    accuracy.update(answer.logits, answer.targets)
    row = {"loss": loss, "accuracy": float(accuracy.compute())}

    in_features = answer.features.shape[1]
    statistics = NeuralCollapse(data.num_classes, in_features, scatter="none").to(answer.features.device)
    statistics.update(answer.features, answer.targets)
    own = statistics.statistics()
    margins = CosineMargins().to(answer.features.device)
    margins.update(answer.features, answer.targets, read_classifier(head_of(model)).weight)
    try:
        collapse = NeuralCollapse(
            data.num_classes,
            in_features,
            classifier=head_of(model),
            centers=own if centers is None else centers,
        ).to(answer.features.device)
        collapse.update(answer.features, answer.targets, answer.logits)
        values = collapse.compute()
        del values["accuracy"]  # measured above, where it always exists
        row |= {name: float(value) for name, value in values.items()}
    except InvalidArgumentError as error:
        # Say so, and do not lose the run: a dead network, whose class means coincide, has no angles.
        warnings.warn(f"the collapse metrics do not exist in this state of the model: {error}", stacklevel=2)
    return Measures(row, own, margins.compute().cpu(), answer)


def _mean_loss(criterion: nn.Module, answer: Answers) -> Tensor:
    mean = MeanMetric(nan_strategy="disable").to(answer.logits.device)
    with torch.no_grad():
        mean.update(criterion(answer.logits.float(), answer.targets), len(answer.targets))
    value: Tensor = mean.compute()
    return value


def centered_cosines(rows: Tensor) -> Tensor:
    """Cosines ``(K, K)`` between rows less their mean: -1/(K-1) off the diagonal for a simplex ETF."""
    centered = rows.detach().double().cpu()
    centered = F.normalize(centered - centered.mean(0), dim=-1)
    return centered @ centered.mT
