"""How far images have collapsed in a network, as something that the images can be learned by."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor


def within_between(features: Tensor, targets: Tensor, num_classes: int) -> Tensor:
    """``tr(Sigma_W) / tr(Sigma_B)``: ``etflayers.metrics.within_between_quotient``, with a gradient.

    Args:
        features: ``(n, d)``.
        targets: ``(n,)``; a class that does not occur counts as none.
        num_classes: K.

    Reference:
        Tirer, Huang, Niles-Weed (2023), arXiv 2210.16658.
    """
    members = F.one_hot(targets, num_classes).to(features)
    counts = members.sum(0)
    occurs = (counts > 0).to(features)
    means = members.mT @ features / counts.clamp(min=1)[:, None]
    within = (features - means[targets]).square().sum() / len(features)
    centered = means - occurs @ means / occurs.sum()
    between = occurs @ centered.square().sum(1) / occurs.sum()
    return within / between
