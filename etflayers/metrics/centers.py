"""The class centers of a first pass, and what a second pass measures about them."""

from __future__ import annotations

import torch
from torch import Tensor

from etflayers.metrics.nc4 import PreparedCenters, prepared_centers
from etflayers.metrics.statistics import ClassStatistics, GlobalMean
from etflayers.metrics.whitening import PreparedWhitening, between_whitening
from etflayers.precision import working_dtype

__all__ = ["AboutCenters"]


class AboutCenters:
    """NC1 about given centers and NC4 of one batch after another.

    What belongs to the centers alone is brought to the dtype and the device of the first batch, and stays
    there for all that follow.

    Args:
        centers: of the first pass.
        global_mean: m in Sigma_B.
    """

    def __init__(self, centers: ClassStatistics, global_mean: GlobalMean) -> None:
        self.centers = centers
        self.whitening = between_whitening(centers, global_mean=global_mean)
        self._place: tuple[torch.dtype, torch.device] | None = None
        self._prepared: tuple[PreparedWhitening, PreparedCenters] | None = None

    def compare(self, features: Tensor, targets: Tensor, decisions: Tensor) -> tuple[Tensor, Tensor]:
        """``sum |B (h - m_y)|^2``, and for how many samples the decision is not the nearest center.

        Args:
            features: h, ``(B, d)``.
            targets: y, ``(B,)`` int64.
            decisions: of the classifier, ``(B,)`` int64.

        Raises:
            InvalidArgumentError: a target without a center.
            NonFiniteError: NaN or infinity in the features.
        """
        whitening, centers = self._prepare(working_dtype(features.dtype), features.device)
        deviations = whitening.squared_deviations(features, targets)
        nearest = whitening.classes.index_select(0, centers.nearest(features))
        return deviations.sum(), (decisions != nearest).sum()

    def _prepare(self, dtype: torch.dtype, device: torch.device) -> tuple[PreparedWhitening, PreparedCenters]:
        if self._prepared is None or self._place != (dtype, device):
            self._place = dtype, device
            self._prepared = (
                self.whitening.prepared(dtype, device),
                prepared_centers(self.centers.means, dtype, device),
            )
        return self._prepared
