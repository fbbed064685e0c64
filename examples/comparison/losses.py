"""What is minimized: a loss of the logits, and a decay of the features where asked."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from comparison.settings import Settings
from etflayers import DotRegressionLoss


class HalfSquaredError(nn.Module):
    """``1/2 |z - y|^2`` of logits z and one-hot targets y, averaged over the samples (arXiv 2203.01238)."""

    def forward(self, logits: Tensor, targets: Tensor) -> Tensor:
        one_hot = F.one_hot(targets, logits.shape[-1]).to(logits.dtype)
        return 0.5 * (logits - one_hot).square().sum(-1).mean()


def make_criterion(settings: Settings) -> nn.Module:
    """Cross-entropy, squared error, or dot regression towards logits as large as the scale of the head."""
    if settings.loss == "mse":
        return HalfSquaredError()
    if settings.loss == "dr":
        return DotRegressionLoss(settings.logit_scale)
    return nn.CrossEntropyLoss(label_smoothing=settings.label_smoothing)


def feature_penalty(features: Tensor, settings: Settings) -> Tensor:
    """``lambda/2`` times the mean of ``|h|^2``: the feature decay of the unconstrained-features model.

    On features as the backbone gives them: a head that normalizes them leaves their length to this term.
    """
    return 0.5 * settings.feature_decay * features.float().square().sum(-1).mean()


def total_loss(
    criterion: nn.Module, logits: Tensor, targets: Tensor, features: Tensor, settings: Settings
) -> Tensor:
    """The loss that training steps minimize."""
    loss: Tensor = criterion(logits, targets)
    if settings.feature_decay == 0:
        return loss
    with torch.autocast(features.device.type, enabled=False):
        return loss + feature_penalty(features, settings)
