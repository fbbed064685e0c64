"""Losses in which a class chooses among the samples of a batch, as modules."""

from __future__ import annotations

from collections.abc import Callable
from typing import ClassVar

from torch import Tensor, nn

from etflayers.checks import require, require_number
from etflayers.functional.batch_contrast import nonl_loss, ntce_loss
from etflayers.functional.reduction import Reduction, require_reduction
from etflayers.nn.base import CodeHead

__all__ = ["NONLLoss", "NTCELoss"]


class _BatchContrast(nn.Module):
    """A loss of features and of the rows that classify them."""

    function: ClassVar[Callable[..., Tensor]]

    def __init__(self, tau: float, *, ignore_index: int = -100, reduction: Reduction = "mean") -> None:
        super().__init__()
        require_number("tau", tau, positive=True)
        require_reduction(reduction)
        self.tau = tau
        self.ignore_index = ignore_index
        self.reduction: Reduction = reduction

    def forward(self, features: Tensor, targets: Tensor, classifier: CodeHead | Tensor) -> Tensor:
        """The loss of a batch.

        Args:
            features: ``(..., d)``.
            targets: ``(...)``, integers in [0, K) or ``ignore_index``.
            classifier: a head, which learns in training as if it had been called, and whose scale is not
                used; or a weight ``(K, d)``, such as ``linear.weight``.

        Raises:
            InvalidArgumentError: shapes or dtypes that do not fit, targets out of range, a classifier that is
                neither.
        """
        require(
            isinstance(classifier, (CodeHead, Tensor)),
            f"classifier must be a CodeHead or a weight (K, d), got {type(classifier).__name__}: of a linear "
            "layer pass its .weight",
        )
        inputs, weight = features, classifier
        if isinstance(classifier, CodeHead):
            inputs, weight, center = classifier.logit_terms(features, targets)
            inputs = inputs if center is None else inputs - center
        return type(self).function(
            inputs,
            weight,
            targets,
            tau=self.tau,
            ignore_index=self.ignore_index,
            reduction=self.reduction,
        )

    def extra_repr(self) -> str:
        """The arguments."""
        return f"tau={self.tau}, ignore_index={self.ignore_index}, reduction={self.reduction!r}"


class NTCELoss(_BatchContrast):
    r"""``-log( exp S_{i,y_i} / sum_j exp S_{j,y_i} )`` over the batch, ``S_ik = cos(f_i, w_k) / tau``.

    :func:`etflayers.functional.ntce_loss` as a module.

    Args:
        tau: temperature > 0.
        ignore_index: target of the samples to leave out, also out of the sums; give the head the same.
        reduction: ``"mean"`` over the samples that are not ignored, ``"sum"`` or ``"none"``.

    Raises:
        InvalidArgumentError: tau that is not positive and finite, an unknown reduction.

    Reference:
        Koromilas, Giannakopoulos, Nicolaou, Panagakis (2026), Neural collapse by design, arXiv 2605.20302.

    >>> import torch
    >>> from etflayers import FixedETFHead
    >>> head = FixedETFHead(in_features=2, num_classes=3)
    >>> features, targets = head.frame, torch.arange(3)
    >>> NTCELoss(tau=0.5)(features, targets, head)  # log(1 + 2 exp(-3))
    tensor(0.0949)
    """

    function = staticmethod(ntce_loss)


class NONLLoss(_BatchContrast):
    r"""``-log( exp S_{i,y_i} / sum_{j: y_j != y_i} exp S_{j,y_i} )`` over the batch.

    :func:`etflayers.functional.nonl_loss` as a module; ``S_ik = cos(f_i, w_k) / tau``. It is 0, with a zero
    gradient, for a batch of one class.

    Args:
        tau: as in :class:`NTCELoss`.
        ignore_index: as in :class:`NTCELoss`.
        reduction: as in :class:`NTCELoss`.

    Raises:
        InvalidArgumentError: as in :class:`NTCELoss`.

    Reference:
        Koromilas, Giannakopoulos, Nicolaou, Panagakis (2026), Neural collapse by design, arXiv 2605.20302.

    >>> import torch
    >>> from etflayers import FixedETFHead
    >>> head = FixedETFHead(in_features=2, num_classes=3)
    >>> NONLLoss(tau=0.1)(head.frame, torch.arange(3), head)  # log 2 - (1 + 1/2) / 0.1
    tensor(-14.3069)
    """

    function = staticmethod(nonl_loss)
