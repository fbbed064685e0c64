r"""NC4, the classifier decides by the nearest class center, and its bias undoes the global mean.

Both are called "NC4" in the literature; here each has its own name.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from etflayers.checks import require, require_finite, require_floating
from etflayers.errors import InvalidArgumentError
from etflayers.functional.class_means import ignored_targets, require_target_for_each
from etflayers.metrics.nc2 import float64_rows, row_lengths
from etflayers.precision import full_precision, working_dtype

__all__ = ["bias_collapse", "center_agreement", "center_disagreement", "nearest_center"]


@torch.no_grad()
def nearest_center(features: Tensor, centers: Tensor) -> Tensor:
    r"""``argmin_k |h - m_k|``, the class center nearest to each feature.

    ``|h - m_k|^2 = |h|^2 - 2 (<h, m_k> - |m_k|^2 / 2)``, about the mean of the centers, because a large
    common mean would take the digits that decide.

    Args:
        features: h, ``(B, d)``.
        centers: m, ``(K, d)``; from the training set or from a first pass over the same data.

    Returns:
        ``(B,)`` int64; the first of several that are equally near.

    Raises:
        InvalidArgumentError: shapes or dtypes that do not fit.
        NonFiniteError: NaN or infinity, which is near to nothing.

    Reference:
        Papyan, Han, Donoho (2020), arXiv 2008.08186.

    >>> nearest_center(torch.tensor([[0.9, 0.0], [0.0, 2.0]]), torch.eye(2))
    tensor([0, 1])
    """
    require_floating("features", features.dtype)
    if features.ndim != 2 or centers.shape[1:] != features.shape[1:]:
        raise InvalidArgumentError(
            "features and centers must have shapes (B, d) and (K, d), "
            f"got {tuple(features.shape)} and {tuple(centers.shape)}"
        )
    return prepared_centers(centers, working_dtype(features.dtype), features.device).nearest(features)


class PreparedCenters(NamedTuple):
    """Class centers as :func:`nearest_center` compares with them, in the precision of the features.

    Attributes:
        middle: their mean m, ``(d,)``.
        around: ``m_k - m``, ``(K, d)``.
        offsets: ``-|m_k - m|^2 / 2``, ``(K,)``.
    """

    middle: Tensor
    around: Tensor
    offsets: Tensor

    @torch.no_grad()
    def nearest(self, features: Tensor) -> Tensor:
        """:func:`nearest_center` of features ``(B, d)``."""
        with full_precision(features):
            around = features.detach().to(self.middle.dtype) - self.middle
            # Samples side by side: the maximum over classes then compares whole vectors.
            scores = torch.addmm(self.offsets.unsqueeze(-1), self.around, around.mT).mT
        # The rows of `around` sum to zero, so that infinity is in the largest score, too.
        largest, nearest = scores.max(-1)
        require_finite(largest, "features must be finite: nothing is nearest to NaN or infinity")
        return nearest


def prepared_centers(centers: Tensor, dtype: torch.dtype, device: torch.device) -> PreparedCenters:
    """What all batches of this dtype share."""
    rows = float64_rows("centers", centers)
    middle = rows.mean(0).to(dtype)
    around = (rows - middle.double()).to(dtype)
    return PreparedCenters(*(field.to(device) for field in (middle, around, around.square().sum(-1) / -2)))


def center_disagreement(features: Tensor, logits: Tensor, centers: Tensor) -> Tensor:
    r"""Share of the samples for which ``argmax_k logits_k`` is not the nearest class center.

    Args:
        features: h, ``(B, d)``.
        logits: ``(B, K)``, with the bias of the classifier.
        centers: m, ``(K, d)``.

    Returns:
        A float64 scalar in [0, 1].

    Raises:
        InvalidArgumentError: shapes or dtypes that do not fit.
        NonFiniteError: NaN in features, centers or logits.

    Reference:
        Papyan, Han, Donoho (2020), arXiv 2008.08186.
    """
    return 1 - _agrees(features, logits, centers).mean()


def center_agreement(
    features: Tensor, logits: Tensor, centers: Tensor, targets: Tensor, *, ignore_index: int = -100
) -> Tensor:
    r"""For each class the share of its samples for which ``argmax_k logits_k`` is the nearest class center.

    Args:
        features: h, ``(B, d)``.
        logits: ``(B, K)``, with the bias of the classifier.
        centers: m, ``(K, d)``.
        targets: y, ``(B,)``, integers in [0, K) or ``ignore_index``.
        ignore_index: target of the samples to leave out.

    Returns:
        ``(K,)`` float64; NaN for a class without samples.

    Raises:
        InvalidArgumentError: shapes or dtypes that do not fit, targets out of range.
        NonFiniteError: NaN in features, centers or logits.

    Reference:
        Papyan, Han, Donoho (2020), arXiv 2008.08186.

    >>> features = torch.tensor([[0.9, 0.0], [0.0, 2.0], [0.1, 0.3]])
    >>> center_agreement(features, features @ torch.ones(2, 2), torch.eye(2), torch.tensor([0, 1, 0]))
    tensor([0.5000, 0.0000], dtype=torch.float64)
    """
    require_target_for_each(features, targets)
    valid = ~ignored_targets(targets, len(centers), ignore_index)
    classes, agrees = targets.long()[valid], _agrees(features, logits, centers)[valid]
    sums, counts = agrees.new_zeros(2, len(centers))
    sums.index_add_(0, classes, agrees)
    counts.index_add_(0, classes, torch.ones_like(agrees))
    share: Tensor = sums / counts
    return share


def _agrees(features: Tensor, logits: Tensor, centers: Tensor) -> Tensor:
    """1 where the decision is the nearest center and else 0, ``(B,)`` float64."""
    require(
        logits.shape == (len(features), len(centers)),
        f"logits must have shape (B, K) = ({len(features)}, {len(centers)}), got {tuple(logits.shape)}",
    )
    return (decisions_of(logits) == nearest_center(features, centers)).double()


def decisions_of(logits: Tensor) -> Tensor:
    """``argmax_k logits_k``, ``(B,)``; a class may be excluded by minus infinity.

    Raises:
        InvalidArgumentError: logits that are not floating-point numbers.
        NonFiniteError: NaN, which ``argmax`` takes for the largest number, or plus infinity.
    """
    return largest_logits(logits)[1]


def largest_logits(logits: Tensor) -> tuple[Tensor, Tensor]:
    """``max_k logits_k`` and its class, ``(B,)`` each; raises as :func:`decisions_of`."""
    require_floating("logits", logits.dtype)
    largest, decisions = logits.max(-1)
    require_finite(largest, "logits must not hold NaN or plus infinity: look at what produced them")
    return largest, decisions


def confidences_of(logits: Tensor, largest: Tensor) -> Tensor:
    """``max_k softmax(logits)_k = 1 / sum_k exp(logits_k - max logits)``, ``(B,)`` float32."""
    behind = logits.float() - largest.float().unsqueeze(-1)
    # The sum is at least 1, and e^-80 adds nothing to it; one that underflows takes 20 times as long.
    return behind.clamp_(min=-80).exp_().sum(-1).reciprocal_()


def bias_collapse(weight: Tensor, global_mean: Tensor, bias: Tensor | None = None) -> Tensor:
    r"""``| W m + b |``: zero where the bias undoes the global mean of the features.

    Args:
        weight: W, ``(K, d)``.
        global_mean: m, ``(d,)``.
        bias: b, ``(K,)``; default 0.

    Returns:
        A float64 scalar >= 0.

    Raises:
        InvalidArgumentError: shapes that do not fit.

    Reference:
        Zhu, Ding, Zhou, Li, You, Sulam, Qu (2021), arXiv 2105.02375.

    >>> bias_collapse(torch.eye(2), torch.tensor([3.0, 4.0]))
    tensor(5., dtype=torch.float64)
    """
    weight = float64_rows("weight", weight)
    require(
        global_mean.shape == weight.shape[1:],
        f"global_mean must have shape (d,) = ({weight.shape[1]},), got {tuple(global_mean.shape)}",
    )
    logits = weight @ global_mean.detach().double()
    if bias is not None:
        require(
            bias.shape == logits.shape,
            f"bias must have shape (K,) = ({len(weight)},), got {tuple(bias.shape)}",
        )
        logits = logits + bias.detach().double()
    return row_lengths(logits)
