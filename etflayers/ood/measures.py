"""How well scores tell known from unknown samples."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from etflayers.checks import require, require_floating, require_module, require_values
from etflayers.errors import NonFiniteError

__all__ = ["OODMetrics", "ood_metrics"]


class OODMetrics(NamedTuple):
    """Measures of detection.

    Attributes:
        auroc: the probability that a known sample has a higher score than an unknown one; ties count half.
            1 is perfect, 0.5 chance.
        fpr95: the share of unknown samples that pass for known at a threshold that 95 % of the known ones
            reach. 0 is perfect.
    """

    auroc: float
    fpr95: float


def ood_metrics(scores_in: Tensor, scores_out: Tensor) -> OODMetrics:
    """AUROC and FPR95 of scores that are larger for what is more in-distribution.

    Args:
        scores_in: of in-distribution samples, ``(N,)``.
        scores_out: of out-of-distribution samples, ``(M,)``.

    Returns:
        Both measures; they depend on the order of the scores only.

    Raises:
        InvalidArgumentError: no score, or scores of another shape.
        NonFiniteError: NaN, which has no order.
        MissingDependencyError: torchmetrics is not installed.

    >>> ood_metrics(torch.tensor([3.0, 4.0, 5.0]), torch.tensor([1.0, 2.0, 4.5]))  # doctest: +ELLIPSIS
    OODMetrics(auroc=0.777..., fpr95=0.333...)
    """
    for name, scores in (("scores_in", scores_in), ("scores_out", scores_out)):
        require_floating(name, scores.dtype)
        require(
            scores.ndim == 1 and len(scores) > 0,
            f"{name} must have shape (n,) with n >= 1, got {tuple(scores.shape)}",
        )
        require_values(~scores.isnan().any(), f"{name} must not hold NaN", NonFiniteError)
    functional = require_module("torchmetrics.functional.classification", extra="ood")
    scores = torch.cat([scores_in.detach().double(), scores_out.detach().double()])
    # torchmetrics takes a sigmoid of what is not in [0, 1], which ties all large scores. Ranks are in [0, 1].
    _, ranks = torch.unique(scores, return_inverse=True)
    ranks = ranks.double() / max(len(scores) - 1, 1)
    known = torch.cat([torch.ones_like(scores_in), torch.zeros_like(scores_out)]).long()
    false, true, _ = functional.binary_roc(ranks, known)
    area = functional.binary_auroc(ranks, known)
    return OODMetrics(float(area), float(false[true >= 0.95].min()))
