"""``CosineMargins``: the margin of every sample, sorted, as a ``torchmetrics.Metric``."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from etflayers.checks import require
from etflayers.errors import InvalidArgumentError
from etflayers.metrics.margins import cosine_margins
from etflayers.metrics.pictures import plot_margins
from etflayers.metrics.shell import ExactMetric

__all__ = ["CosineMargins"]


class CosineMargins(ExactMetric):
    """The curve P_CM: ``cos(h, w_y) - max_{j != y} cos(h, w_j)`` of every sample, in ascending order.

    One float32 number is kept for each sample.

    Args:
        center: a global mean ``(d,)`` to take from the features; see
            :func:`~etflayers.metrics.cosine_margins`.
        ignore_index: target of the samples to leave out.
        kwargs: of ``torchmetrics.Metric``.

    Raises:
        MissingDependencyError: torchmetrics is not installed.

    Reference:
        Markou, Ajanthan, Gould (2024), arXiv 2411.01248.

    >>> metric = CosineMargins()
    >>> metric.update(torch.tensor([[1.0, 0.0], [1.0, 0.0]]), torch.tensor([0, 1]), torch.eye(2))
    >>> metric.compute()
    tensor([-1.,  1.])
    """

    is_differentiable = False
    higher_is_better = True
    full_state_update = False

    margins: list[Tensor]

    def __init__(self, *, center: Tensor | None = None, ignore_index: int = -100, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        if center is not None and center.ndim != 1:
            raise InvalidArgumentError(f"center must have shape (d,), got {tuple(center.shape)}")
        self.center = None if center is None else center.detach().clone()  # it may be a running mean
        self.ignore_index = ignore_index
        self.add_state("margins", [], dist_reduce_fx="cat")

    def update(self, features: Tensor, targets: Tensor, weight: Tensor) -> None:
        """Add a batch: features ``(B, d)``, targets ``(B,)`` and the weight of the classifier ``(K, d)``."""
        margins = cosine_margins(
            features, targets, weight, center=self.center, ignore_index=self.ignore_index
        )
        # float32 is also the dtype in which torchmetrics sends the empty list of a rank without samples.
        self.margins.append(margins.float())

    def compute(self) -> Tensor:
        """All margins, ``(N,)``, in ascending order."""
        margins = (
            self.margins
            if isinstance(self.margins, Tensor)
            else torch.cat(list(self.margins) or [torch.empty(0)])
        )
        require(margins.numel() > 0, "no sample has been seen: call update first")
        return margins.sort().values

    def plot(self, val: Tensor | Sequence[Tensor] | None = None, ax: Any = None) -> Any:
        """Draw the curve, or several.

        Args:
            val: a result of ``compute`` or ``forward``, or several; default: that of now.
            ax: axes of matplotlib to draw into; default: a new figure.

        Returns:
            The figure and the axes.

        Raises:
            MissingDependencyError: matplotlib is not installed.
        """
        return plot_margins(self.compute() if val is None else val, ax)
