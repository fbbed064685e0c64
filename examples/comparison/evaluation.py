"""What is measured of a model at the end of an epoch: in eval mode, over all of the training and test set."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from comparison.data import ImageData, Split
from comparison.heads import captured_features
from etflayers.errors import NonFiniteError
from etflayers.functional import class_sums
from etflayers.metrics import nc2

EVALUATION_BATCH = 500


@dataclass(frozen=True)
class Measures:
    """Mean loss, share of images classified correctly and class means of the features, ``(K, d)``."""

    loss: float
    accuracy: float
    class_means: Tensor


@torch.no_grad()
def evaluate(model: nn.Module, criterion: nn.Module, split: Split, data: ImageData) -> Measures:
    """Measure a model on one of the splits of ``data``.

    Raises:
        NonFiniteError: the loss is NaN or infinite, training has diverged.
    """
    training = model.training
    model.eval()
    loss = torch.zeros((), dtype=torch.float64, device=split.targets.device)
    correct = torch.zeros_like(loss)
    sums = torch.zeros((), dtype=torch.float64, device=split.targets.device)
    counts = torch.zeros_like(sums)
    for images, targets in zip(
        split.images.split(EVALUATION_BATCH), split.targets.split(EVALUATION_BATCH), strict=True
    ):
        with captured_features(model) as features:
            logits = model(data.normalised(images))
        loss += criterion(logits, targets).double() * len(targets)
        correct += (logits.argmax(-1) == targets).sum()
        batch_sums, batch_counts = class_sums(features[0].double(), targets, data.num_classes)
        sums, counts = sums + batch_sums, counts + batch_counts
    model.train(training)
    mean_loss = float(loss) / len(split)
    if not torch.isfinite(loss):
        raise NonFiniteError(f"training has diverged (loss {mean_loss}): take a smaller --lr")
    means = sums / counts.clamp(min=1).unsqueeze(-1)
    return Measures(mean_loss, float(correct) / len(split), means.cpu())


def etf_distance(class_means: Tensor) -> float:
    """Distance of the class means to their nearest simplex ETF, both as points of the unit sphere.

    ``|X/|X| - W/|W||`` with X the centred means and W the ETF nearest to them, in the Frobenius norm: it
    depends neither on the size of the features nor on their global mean. 0 at neural collapse, below
    sqrt(2) always; class means that coincide are at distance 1 of every ETF.
    """
    means = class_means.double()
    rows = means - means.mean(0)
    return float(nc2.etf_distance(rows)) if rows.any() else 1.0


def centred_cosines(rows: Tensor) -> Tensor:
    """Cosines ``(K, K)`` between rows less their mean: -1/(K-1) off the diagonal for a simplex ETF."""
    centred = rows.detach().double().cpu()
    centred = torch.nn.functional.normalize(centred - centred.mean(0), dim=-1)
    return centred @ centred.mT
