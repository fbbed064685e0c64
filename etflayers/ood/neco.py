r"""NECO: features of known classes lie in few directions, those of unknown ones do not.

Symbols: h <-> features, x <-> standardized, mu <-> mean, sigma <-> deviation, P <-> directions, whose rows
are orthonormal.

Collapsed features span the K - 1 dimensions of their class means. With features standardized by the training
set, ``x = (h - mu)/sigma`` entry by entry, and its leading principal directions P, the share of the length of
x within them,

    |P x| / |x|,

is near 1 for what the training set looks like, and smaller for what points elsewhere. The published score
multiplies it by the largest logit.
"""

from __future__ import annotations

import torch
from torch import Tensor

from etflayers.checks import require, require_flag, require_number, require_size
from etflayers.ood.detector import Detector

__all__ = ["NECO"]


class NECO(Detector):
    r"""``|P x| / |x| max_k logits_k``: what share of a feature is in the principal directions, times a logit.

    x is the feature standardized by the training set, in :meth:`fit` and in :meth:`score` alike. Larger is
    more in-distribution. Computed in float64.

    Args:
        dimension: number of principal directions, or, as a float in (0, 1), the share of the variance of the
            standardized training features that they have to exceed.
        max_logit: whether to multiply by the largest logit, as published for all networks but ResNets.

    Attributes:
        mean: mu, ``(d,)``, once fitted.
        deviation: sigma, ``(d,)``, with N in the denominator; 1 where all training features are equal.
        directions: P, ``(p, d)``.

    Raises:
        InvalidArgumentError: a dimension that is neither a number of directions nor a share.

    Reference:
        Ben Ammar, Belkhir, Popescu, Manzanera, Franchi (2023), arXiv 2310.06823.

    >>> known = torch.tensor([[1.0, 1.0], [-1.0, -1.0], [2.0, 2.1], [-2.0, -2.1]])
    >>> detector = NECO(dimension=1, max_logit=False).fit(known)
    >>> detector.score(torch.tensor([[3.0, 3.0], [3.0, -3.0]])).round(decimals=1)
    tensor([1., 0.], dtype=torch.float64)
    """

    mean: Tensor
    deviation: Tensor
    directions: Tensor

    def __init__(self, dimension: int | float = 0.9, *, max_logit: bool = True) -> None:
        if isinstance(dimension, float):
            require_number("dimension", dimension, positive=True)
            require(dimension < 1, f"dimension as a share of variance must be in (0, 1), got {dimension}")
        else:
            require_size("dimension", dimension)
        require_flag("max_logit", max_logit)
        self.dimension = dimension
        self.max_logit = max_logit

    def _fit(self, features: Tensor, targets: Tensor | None) -> None:
        width = features.shape[1]
        require(
            isinstance(self.dimension, float) or self.dimension <= width,
            f"dimension must be at most the width of the features, {width}, got {self.dimension}",
        )
        rows = features.double()
        mean = rows.mean(0)
        constant = rows.amax(0) == rows.amin(0)
        require(not bool(constant.all()), "features must not all be equal: they have no principal direction")
        deviation = torch.where(constant, 1, rows.std(0, correction=0))
        standardized = torch.where(constant, 0, (rows - mean) / deviation)
        variances, vectors = torch.linalg.eigh(standardized.mT @ standardized / len(rows))
        variances, vectors = variances.flip(0).clamp(min=0), vectors.flip(1)
        kept = self.dimension
        if isinstance(kept, float):
            shares = variances.cumsum(0) / variances.sum()
            kept = min(int((shares <= kept).sum()) + 1, width)
        self.mean, self.deviation, self.directions = mean, deviation, vectors[:, :kept].mT.contiguous()

    def _score(self, features: Tensor, logits: Tensor | None) -> Tensor:
        mean, deviation, directions = (
            tensor.to(features.device) for tensor in (self.mean, self.deviation, self.directions)
        )
        rows = (features.double() - mean) / deviation
        lengths = torch.linalg.vector_norm(rows, dim=-1)
        within: Tensor = torch.linalg.vector_norm(rows @ directions.mT, dim=-1)
        # The mean itself has no direction: none of its length, which is zero, is within.
        share: Tensor = within / torch.where(lengths > 0, lengths, 1)
        if not self.max_logit:
            return share
        require(logits is not None, "logits are needed by NECO: pass them, or make it with max_logit=False")
        assert logits is not None
        score: Tensor = share * logits.double().amax(-1)
        return score
