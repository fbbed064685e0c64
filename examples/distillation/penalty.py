"""How far images have collapsed in a network, as something that the images can be learned by."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor


def within_between(features: Tensor, targets: Tensor, num_classes: int) -> Tensor:
    """``tr(Sigma_W) / tr(Sigma_B)``: ``etflayers.metrics.within_between_quotient``, with a gradient.

    Args:
        features: ``(n, d)``.
        targets: ``(n,)``, in which every class occurs.
        num_classes: K.

    Reference:
        Tirer, Huang, Niles-Weed (2023), arXiv 2210.16658.
    """
    members = F.one_hot(targets, num_classes).to(features)
    means = members.mT @ features / members.sum(0)[:, None]
    within = (features - means[targets]).square().sum() / len(features)
    between = (means - means.mean(0)).square().sum() / num_classes
    return within / between
