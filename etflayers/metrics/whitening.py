r"""NC1 about given centers: a second pass that needs no d x d matrix.

With the class means and Sigma_B of a first pass at hand, tr(Sigma_W Sigma_B^+) is a mean over samples,

    tr(Sigma_W Sigma_B^+) = 1/N sum |B (h - m_y)|^2,      B = diag(1/s) V',   Sigma_B = V diag(s^2) V',

at the price of one product with a (K-1) x d matrix. Over other data than those of the first pass it is a
metric of its own: the spread of, say, test features about the centers of the training set.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from etflayers.checks import require_values
from etflayers.metrics.moments import require_features
from etflayers.metrics.nc1 import between_spectrum
from etflayers.metrics.nc2 import row_lengths
from etflayers.metrics.statistics import ClassStatistics, GlobalMean
from etflayers.precision import full_precision, working_dtype

__all__ = ["Whitening", "between_whitening"]


class Whitening(NamedTuple):
    """Coordinates in which the between-class covariance is the identity.

    Attributes:
        classes: indices of the K classes, ``(K,)``.
        means: their centers, ``(K, d)`` float64.
        basis: B, ``(r, d)`` float64, r <= K - 1.
    """

    classes: Tensor
    means: Tensor
    basis: Tensor

    @torch.no_grad()
    def squared_deviations(self, features: Tensor, targets: Tensor) -> Tensor:
        """``|B (h - m_y)|^2`` for each sample; their mean is tr(Sigma_W Sigma_B^+).

        Args:
            features: h, ``(B, d)``.
            targets: y, ``(B,)``, among ``classes``.

        Returns:
            ``(B,)`` float64.

        Raises:
            InvalidArgumentError: shapes or dtypes that do not fit, a target without a center.
        """
        require_features(features, targets, self.means.shape[1])
        prepared = self.prepared(working_dtype(features.dtype), features.device)
        return prepared.squared_deviations(features, targets.long())

    def prepared(self, dtype: torch.dtype, device: torch.device) -> PreparedWhitening:
        """What all batches of this dtype share."""
        shift = self.means.to(dtype)
        offsets = (self.means - shift) @ self.basis.mT
        fields = (self.classes, shift, self.basis.to(dtype), offsets.to(dtype))
        return PreparedWhitening(*(field.to(device) for field in fields))


class PreparedWhitening(NamedTuple):
    """A :class:`Whitening` in the precision of features.

    A center m need not be a number of their dtype. With c, which is m rounded to one,

        B (h - m) = B (h - c) - B (m - c).

    The difference h - c is rounded once, relative to itself, and the last term belongs to the center alone.

    Attributes:
        classes: ``(K,)``.
        shift: c, ``(K, d)``.
        basis: B, ``(r, d)``.
        offsets: ``B (m - c)``, ``(K, r)``, from float64.
    """

    classes: Tensor
    shift: Tensor
    basis: Tensor
    offsets: Tensor

    @torch.no_grad()
    def squared_deviations(self, features: Tensor, targets: Tensor) -> Tensor:
        """As :meth:`Whitening.squared_deviations`, of targets in int64."""
        positions = self.positions(targets)
        return self.squared_lengths(self.coordinates(features, positions), positions)

    def positions(self, targets: Tensor) -> Tensor:
        """Which of ``classes`` each target is, ``(B,)``; raises for a target without a center."""
        positions = torch.searchsorted(self.classes, targets).clamp(max=len(self.classes) - 1)
        require_values(
            (self.classes.index_select(0, positions) == targets).all(),
            "centers must hold every class in targets: measure them on data with all classes",
        )
        return positions

    def coordinates(self, features: Tensor, positions: Tensor) -> Tensor:
        """``B (h - c_y)``, ``(B, r)``, of features ``(B, d)`` and the positions of their classes."""
        residuals = self.shift.index_select(0, positions)
        torch.sub(features.detach().to(self.shift.dtype), residuals, out=residuals)
        with full_precision(features):
            return residuals @ self.basis.mT

    def squared_lengths(self, coordinates: Tensor, positions: Tensor) -> Tensor:
        """``|B (h - m_y)|^2``, ``(B,)`` float64, from :meth:`coordinates`."""
        offsets = self.offsets.index_select(0, positions)
        return row_lengths(torch.sub(coordinates, offsets, out=offsets)).double().square_()


def between_whitening(statistics: ClassStatistics, *, global_mean: GlobalMean = "classes") -> Whitening:
    """The whitening of the between-class covariance of a first pass.

    Args:
        statistics: of the first pass; of any kind, also with ``scatter="none"``.
        global_mean: ``"classes"`` or ``"samples"``, m in Sigma_B.

    Returns:
        The whitening.

    Reference:
        Papyan, Han, Donoho (2020), arXiv 2008.08186.

    >>> from etflayers.metrics import class_statistics, covariance_trace_ratio
    >>> features, targets = torch.tensor([[1.0], [3.0], [-1.0], [-3.0]]), torch.tensor([0, 0, 1, 1])
    >>> statistics = class_statistics(features, targets, num_classes=2)
    >>> between_whitening(statistics).squared_deviations(features, targets).mean() / 2
    tensor(0.1250, dtype=torch.float64)
    >>> covariance_trace_ratio(statistics)
    tensor(0.1250, dtype=torch.float64)
    """
    values, directions = between_spectrum(statistics, global_mean)
    return Whitening(statistics.classes, statistics.means, directions / values.unsqueeze(-1))
