"""A loss for labels that may be wrong: it does not ask for more than a probability of 1 - alpha."""

from __future__ import annotations

from torch import Tensor, nn

from etflayers.functional.label_relaxation import label_relaxation_loss, require_relaxation
from etflayers.functional.reduction import Reduction, require_reduction

__all__ = ["LabelRelaxationLoss"]


class LabelRelaxationLoss(nn.Module):
    r"""Divergence from what a label allows: 0 for ``p_y > 1 - a``, else ``KL((1 - a, a), (p_y, 1 - p_y))``.

    :func:`etflayers.functional.label_relaxation_loss` as a module.

    Args:
        alpha: in (0, 1), the probability that may go to other classes.
        ignore_index: target of the samples to leave out.
        reduction: ``"mean"`` over the samples that are not ignored, ``"sum"`` or ``"none"``.

    Raises:
        InvalidArgumentError: alpha outside (0, 1), an unknown reduction.

    Reference:
        Lienen, Hüllermeier (2021), From label smoothing to label relaxation, AAAI.

    >>> import torch
    >>> loss = LabelRelaxationLoss(alpha=0.1)
    >>> loss(torch.tensor([[3.0, 0.0]]), torch.tensor([0]))  # a probability of 0.95 is enough
    tensor(0.)
    """

    def __init__(
        self, alpha: float = 0.1, *, ignore_index: int = -100, reduction: Reduction = "mean"
    ) -> None:
        super().__init__()
        require_relaxation(alpha)
        require_reduction(reduction)
        self.alpha = alpha
        self.ignore_index = ignore_index
        self.reduction: Reduction = reduction

    def forward(self, logits: Tensor, targets: Tensor) -> Tensor:
        """The loss of ``logits`` ``(..., K)`` for class indices ``targets`` ``(...)``."""
        return label_relaxation_loss(
            logits, targets, alpha=self.alpha, ignore_index=self.ignore_index, reduction=self.reduction
        )

    def extra_repr(self) -> str:
        """The arguments."""
        return f"alpha={self.alpha}, ignore_index={self.ignore_index}, reduction={self.reduction!r}"
