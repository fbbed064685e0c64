r"""The class centers of a first pass, and what a second pass measures about them.

NC1 takes the coordinates ``u = B (h - c_y)`` of each sample, where c is m rounded to the dtype of the
features and the rows b_j of B span the centers less their mean, ``a_k = m_k - m`` (see ``whitening``). The
nearest center depends on nothing else. In

    |h - m_k|^2 = |h - c_y|^2 + 2 <h - c_y, c_y - m_k> + |c_y - m_k|^2

all is the same for every k but minus twice the score

    <h - c_y, a_k> - |c_y - m_k|^2 / 2 = <u, t_k> - |c_y - m_k|^2 / 2,       t_kj = <b_j, a_k> / |b_j|^2,

because the b_j are orthogonal. A product with K x r numbers, r < K, replaces one with K x d.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from etflayers.checks import require_finite
from etflayers.metrics.nc4 import PreparedCenters, prepared_centers
from etflayers.metrics.statistics import ClassStatistics, GlobalMean
from etflayers.metrics.whitening import PreparedWhitening, Whitening, between_whitening
from etflayers.precision import full_precision, working_dtype

__all__ = ["AboutCenters", "CenterCoordinates", "center_coordinates"]


class CenterCoordinates(NamedTuple):
    """Class centers as the coordinates of a whitening compare with them.

    Attributes:
        rows: t, ``(K, r)``.
        halves: ``-|c_i - m_k|^2 / 2``, ``(K, K)``.
    """

    rows: Tensor
    halves: Tensor

    @torch.no_grad()
    def nearest(self, coordinates: Tensor, positions: Tensor) -> Tensor:
        """The position of the nearest center, ``(B,)`` int64, of samples in these coordinates, ``(B, r)``."""
        with full_precision(coordinates):
            scores = torch.addmm(self.halves.index_select(0, positions), coordinates, self.rows.mT)
        largest, nearest = scores.max(-1)
        require_finite(largest, "features must be finite: nothing is nearest to NaN or infinity")
        return nearest


def center_coordinates(whitening: Whitening, dtype: torch.dtype, device: torch.device) -> CenterCoordinates:
    """What all batches of this dtype share."""
    means, basis = whitening.means, whitening.basis
    middle = means.mean(0)
    around, rounded = means - middle, means.to(dtype).double() - middle
    rows = (around @ basis.mT) / basis.square().sum(-1)
    squares = around.square().sum(-1) + rounded.square().sum(-1, keepdim=True)
    halves = rounded @ around.mT - squares / 2
    return CenterCoordinates(rows.to(device, dtype), halves.to(device, dtype))


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
        self._prepared: tuple[PreparedWhitening, CenterCoordinates | PreparedCenters] | None = None

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
        positions = whitening.positions(targets)
        coordinates = whitening.coordinates(features, positions)
        if isinstance(centers, PreparedCenters):
            nearest = centers.nearest(features)
        else:
            nearest = centers.nearest(coordinates, positions)
        deviations = whitening.squared_lengths(coordinates, positions)
        return deviations.sum(), (decisions != whitening.classes.index_select(0, nearest)).sum()

    def _prepare(
        self, dtype: torch.dtype, device: torch.device
    ) -> tuple[PreparedWhitening, CenterCoordinates | PreparedCenters]:
        if self._prepared is None or self._place != (dtype, device):
            self._place = dtype, device
            num_classes, in_features = self.centers.means.shape
            centers: CenterCoordinates | PreparedCenters
            if num_classes <= in_features:
                centers = center_coordinates(self.whitening, dtype, device)
            else:  # as many coordinates as features, which would save nothing and keep K x K numbers
                centers = prepared_centers(self.centers.means, dtype, device)
            self._prepared = self.whitening.prepared(dtype, device), centers
        return self._prepared
