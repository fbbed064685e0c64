r"""Label relaxation: a loss that is content with a probability of 1 - alpha for the label.

Symbols: z <-> logits, alpha <-> alpha, g <-> log_odds, t <-> enough, s <-> the sigmoid.

A label stands for every distribution that gives it at least 1 - alpha. The loss is the Kullback-Leibler
divergence of the prediction p from the nearest of those: zero for ``p_y >= 1 - alpha``, otherwise

    L = (1 - alpha) log((1 - alpha)/p_y) + alpha log(alpha/(1 - p_y)).

**Everything is a function of the log odds** ``g = log p_y - log(1 - p_y) = z_y - log sum_{j != y} exp z_j``:
``log p_y = log s(g)`` and ``log(1 - p_y) = log s(-g)``. So 1 - p_y is never formed, nothing cancels where p_y
is close to 1, and no logarithm is taken of a number that has vanished. The loss begins where g falls below
``t = log((1 - alpha)/alpha)``; its slope in g, ``p_y - (1 - alpha)``, is zero there.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from etflayers.checks import require, require_floating, require_number
from etflayers.errors import InvalidArgumentError
from etflayers.functional.class_means import ignored_targets
from etflayers.functional.reduction import Reduction, reduced, require_reduction
from etflayers.precision import working_dtype

__all__ = ["label_relaxation_loss", "require_relaxation"]


def label_relaxation_loss(
    logits: Tensor,
    targets: Tensor,
    *,
    alpha: float = 0.1,
    ignore_index: int = -100,
    reduction: Reduction = "mean",
) -> Tensor:
    r"""Divergence from what a label allows: 0 for ``p_y > 1 - a``, else ``KL((1 - a, a), (p_y, 1 - p_y))``.

    Label smoothing asks for the probability 1 - alpha and pulls confident samples back to it. Label
    relaxation asks for that much or more, and leaves open how the rest is distributed.

    Args:
        logits: z, ``(..., K)``, K >= 2, finite.
        targets: y, ``(...)``, integers in [0, K) or ``ignore_index``.
        alpha: in (0, 1), the probability that may go to other classes.
        ignore_index: target of the samples to leave out.
        reduction: ``"mean"`` over the samples that are not ignored, ``"sum"`` or ``"none"``.

    Returns:
        A scalar, or ``(...)`` for ``"none"`` with 0 for ignored samples; float32 for half-precision logits.
        Finite, with a finite gradient, however far apart the logits are. If all samples are ignored the mean
        is 0 with a zero gradient.

    Raises:
        InvalidArgumentError: alpha outside (0, 1), K < 2, shapes, dtypes or a reduction that do not fit,
            targets out of range.

    Reference:
        Lienen, Hüllermeier (2021), From label smoothing to label relaxation, AAAI.

    >>> logits = torch.tensor([[0.0, 0.0], [9.0, 0.0], [-1e4, 0.0]])
    >>> label_relaxation_loss(logits, torch.tensor([0, 0, 0]), reduction="none")
    tensor([3.6806e-01, 0.0000e+00, 8.9997e+03])
    """
    require_floating("logits", logits.dtype)
    require_relaxation(alpha)
    require_reduction(reduction)
    if logits.ndim == 0 or logits.shape[-1] < 2:
        raise InvalidArgumentError(f"logits must have shape (..., K) with K >= 2, got {tuple(logits.shape)}")
    if targets.shape != logits.shape[:-1]:
        raise InvalidArgumentError(
            f"targets must have the shape of logits without the last dimension, {tuple(logits.shape[:-1])}, "
            f"got {tuple(targets.shape)}"
        )
    ignored = ignored_targets(targets, logits.shape[-1], ignore_index)

    own = torch.where(ignored, 0, targets.long()).unsqueeze(-1)
    # Ignored logits are replaced before the arithmetic: masking their loss would still send back 0 times NaN.
    rows = torch.where(ignored.unsqueeze(-1), 0, logits.to(working_dtype(logits.dtype)))
    others = torch.logsumexp(rows.scatter(-1, own, -torch.inf), -1)
    log_odds = rows.gather(-1, own).squeeze(-1) - others
    log_rest, log_alpha = math.log1p(-alpha), math.log(alpha)
    enough = log_rest - log_alpha
    free = ignored | (log_odds >= enough)
    losses = (1 - alpha) * (log_rest - F.logsigmoid(log_odds)) + alpha * (log_alpha - F.logsigmoid(-log_odds))
    return reduced(torch.where(free, 0, losses), ignored, reduction)


def require_relaxation(alpha: float) -> None:
    """Raise unless ``alpha`` is a number in (0, 1)."""
    require_number("alpha", alpha)
    require(0 < alpha < 1, f"alpha must be in (0, 1), got {alpha}: with alpha = 0 it is F.cross_entropy")
