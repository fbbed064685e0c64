"""What becomes of the losses of a batch."""

from __future__ import annotations

from typing import Literal

from torch import Tensor

from etflayers.checks import require

__all__ = ["Reduction", "reduced", "require_reduction"]

Reduction = Literal["mean", "sum", "none"]


def require_reduction(reduction: str) -> None:
    """Raise unless ``reduction`` is one of the three."""
    require(
        reduction in ("mean", "sum", "none"),
        f"reduction must be 'mean', 'sum' or 'none', got {reduction!r}",
    )


def reduced(losses: Tensor, ignored: Tensor, reduction: Reduction) -> Tensor:
    """``losses``, zero where ``ignored``: as they are, their sum, or their mean over the others.

    If all are ignored the mean is 0 with a zero gradient, where ``F.cross_entropy`` returns NaN.
    """
    if reduction == "none":
        return losses
    if reduction == "sum":
        return losses.sum()
    return losses.sum() / (~ignored).sum().clamp(min=1)
