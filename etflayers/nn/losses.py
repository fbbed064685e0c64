"""Losses as modules."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor, nn

from etflayers.errors import require
from etflayers.functional.losses import dot_regression_loss, positive_lengths

__all__ = ["DotRegressionLoss"]

Reduction = Literal["mean", "sum", "none"]


class DotRegressionLoss(nn.Module):
    r"""Dot-regression loss ``(<w_y, h> - l_y)^2 / (2 l_y)`` with target lengths ``l_y``, averaged.

    :func:`etflayers.functional.dot_regression_loss` as a module. The setting of the paper is a fixed head
    with ``normalize=True``, ``scale=1`` and ``lengths=1``; with another scale s multiply the lengths by s.

    Args:
        lengths: l > 0, a number or one for each class, ``(K,)``, which becomes a buffer.
        ignore_index: target of the samples to leave out.
        reduction: ``"mean"`` over the samples that are not ignored, ``"sum"`` or ``"none"``.

    Raises:
        InvalidArgumentError: lengths that are not positive and finite, an unknown reduction.

    Reference:
        Yang, Chen, Li, Xie, Lin, Tao (2022), arXiv 2203.09081.

    >>> loss = DotRegressionLoss(lengths=torch.tensor([1.0, 2.0]))
    >>> loss(torch.tensor([[0.5, -0.5], [-2.0, 2.0]]), torch.tensor([0, 1]))
    tensor(0.0625)
    """

    def __init__(
        self, lengths: float | Tensor = 1.0, *, ignore_index: int = -100, reduction: Reduction = "mean"
    ) -> None:
        super().__init__()
        require(
            reduction in ("mean", "sum", "none"),
            f"reduction must be 'mean', 'sum' or 'none', got {reduction!r}",
        )
        self.lengths: float | Tensor
        if isinstance(lengths, Tensor):
            require(
                lengths.ndim == 1, f"lengths must be a number or have shape (K,), got {tuple(lengths.shape)}"
            )
            self.register_buffer("lengths", lengths.detach().clone())
        else:
            self.lengths = lengths
        positive_lengths(lengths)
        self.ignore_index = ignore_index
        self.reduction: Reduction = reduction

    def forward(self, logits: Tensor, targets: Tensor) -> Tensor:
        """The loss of ``logits`` ``(..., K)`` for class indices ``targets`` ``(...)``."""
        return dot_regression_loss(
            logits, targets, lengths=self.lengths, ignore_index=self.ignore_index, reduction=self.reduction
        )

    def extra_repr(self) -> str:
        """The arguments."""
        lengths = "per class" if isinstance(self.lengths, torch.Tensor) else self.lengths
        return f"lengths={lengths}, ignore_index={self.ignore_index}, reduction={self.reduction!r}"
