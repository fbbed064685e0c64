r"""Losses in which a class chooses among the samples of a batch, and not a sample among the classes.

Symbols: u <-> units, w <-> words, S <-> logits, tau <-> tau, y <-> labels, L <-> totals.

With unit features u_i, unit rows w_k and ``S_ik = <u_i, w_k> / tau``, a cross-entropy is a softmax over the
classes k. Here the softmax is over the samples j of the batch, in the column of the class y_i,

    NTCE:  -log( exp S_{i,y_i} / sum_j exp S_{j,y_i} ),
    NONL:  -log( exp S_{i,y_i} / sum_{j: y_j != y_i} exp S_{j,y_i} ).

The sum of NTCE contains the samples of the same class, which push each other away while the numerator pulls.
NONL leaves them out, so that what pulls (own class) and what pushes (other classes) are separate terms; it
has no lower bound of 0. In both, everything has length 1, so that no length can grow in place of an angle.

All sums belong to a column: ``L_k = log sum_j exp S_jk`` over the samples that count for class k is computed
once for each class, and l_i = L_{y_i} - S_{i,y_i}.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from etflayers.checks import require, require_floating, require_number
from etflayers.functional.class_means import ignored_targets
from etflayers.functional.cross_entropy import require_targets_of
from etflayers.functional.logits import directions
from etflayers.functional.reduction import Reduction, reduced, require_reduction
from etflayers.precision import full_precision, working_dtype

__all__ = ["nonl_loss", "ntce_loss"]


def ntce_loss(
    features: Tensor,
    weight: Tensor,
    targets: Tensor,
    *,
    tau: float,
    ignore_index: int = -100,
    reduction: Reduction = "mean",
) -> Tensor:
    r"""``-log( exp S_{i,y_i} / sum_j exp S_{j,y_i} )`` over the samples j of the batch, averaged over i.

    ``S_ik = cos(f_i, w_k) / tau``: features and rows are divided by their lengths in here. The batch are all
    samples that are not ignored; of several ranks each contrasts its own.

    Args:
        features: f, ``(..., d)``, B vectors in all; zero vectors count as orthogonal to all rows.
        weight: W, ``(K, d)``, any matrix, or the frame of a head.
        targets: y, ``(...)``, integers in [0, K) or ``ignore_index``.
        tau: temperature > 0; cosines are divided by it.
        ignore_index: target of the samples to leave out, also out of the sums.
        reduction: ``"mean"`` over the samples that are not ignored, ``"sum"`` or ``"none"``.

    Returns:
        A scalar >= 0, or ``(...)`` for ``"none"`` with 0 for ignored samples; float32 or better.
        If all samples are ignored the mean is 0 with a zero gradient.

    Raises:
        InvalidArgumentError: shapes, dtypes or options that do not fit, or targets out of range.

    Reference:
        Koromilas, Giannakopoulos, Nicolaou, Panagakis (2026), Neural collapse by design, arXiv 2605.20302.

    >>> features, weight = torch.tensor([[2.0, 0.0], [0.0, 1.0]]), torch.eye(2)
    >>> ntce_loss(features, weight, torch.tensor([0, 1]), tau=1.0)  # log(1 + exp(-1))
    tensor(0.3133)
    """
    return _contrast(features, weight, targets, tau, ignore_index, reduction, others_only=False)


def nonl_loss(
    features: Tensor,
    weight: Tensor,
    targets: Tensor,
    *,
    tau: float,
    ignore_index: int = -100,
    reduction: Reduction = "mean",
) -> Tensor:
    r"""``-log( exp S_{i,y_i} / sum_{j: y_j != y_i} exp S_{j,y_i} )`` over the batch, averaged over i.

    As :func:`ntce_loss`, but a class is contrasted with the samples of other classes only; the loss may be
    negative. Where the batch holds no other class, there is nothing to contrast with: the published quotient
    has a zero below it, and the loss here is 0 with a zero gradient.

    Args:
        features: as in :func:`ntce_loss`.
        weight: as in :func:`ntce_loss`.
        targets: as in :func:`ntce_loss`.
        tau: as in :func:`ntce_loss`.
        ignore_index: as in :func:`ntce_loss`.
        reduction: as in :func:`ntce_loss`.

    Returns:
        A scalar, or ``(...)`` for ``"none"``, as :func:`ntce_loss`.

    Raises:
        InvalidArgumentError: as :func:`ntce_loss`.

    Reference:
        Koromilas, Giannakopoulos, Nicolaou, Panagakis (2026), Neural collapse by design, arXiv 2605.20302.

    >>> features, weight = torch.tensor([[2.0, 0.0], [0.0, 1.0]]), torch.eye(2)
    >>> nonl_loss(features, weight, torch.tensor([0, 1]), tau=1.0)  # cosine 1 with the own, 0 with the other
    tensor(-1.)
    >>> nonl_loss(features, weight, torch.tensor([0, 0]), tau=1.0)
    tensor(0.)
    """
    return _contrast(features, weight, targets, tau, ignore_index, reduction, others_only=True)


def _contrast(
    features: Tensor,
    weight: Tensor,
    targets: Tensor,
    tau: float,
    ignore_index: int,
    reduction: Reduction,
    *,
    others_only: bool,
) -> Tensor:
    require_floating("features", features.dtype)
    require_floating("weight", weight.dtype)
    require(
        weight.ndim == 2 and len(weight) > 0 and features.shape[-1:] == weight.shape[1:],
        "features and weight must have shapes (..., in_features) and (num_classes, in_features), "
        f"got {tuple(features.shape)} and {tuple(weight.shape)}",
    )
    require_number("tau", tau, positive=True)
    require_reduction(reduction)
    require_targets_of(features, targets)
    rows, labels = features.reshape(-1, features.shape[-1]), targets.reshape(-1)
    ignored = ignored_targets(labels, len(weight), ignore_index)
    own = torch.where(ignored, 0, labels.long())

    dtype = working_dtype(torch.promote_types(features.dtype, weight.dtype))
    with full_precision(features):
        # What is ignored may be NaN, and 0 times NaN a gradient.
        units = directions(torch.where(ignored.unsqueeze(-1), 0, rows).to(dtype))
        logits = units @ directions(weight.to(dtype)).mT / tau
    left_out = ignored.unsqueeze(-1).expand_as(logits)
    if others_only:
        left_out = left_out | F.one_hot(own, len(weight)).bool()
    # The lowest number and not -inf, whose difference with itself is NaN where nothing counts for a class.
    totals = logits.masked_fill(left_out, torch.finfo(dtype).min).logsumexp(0)
    alone = left_out.all(0).index_select(0, own)  # without a sample to contrast with
    losses = totals.index_select(0, own) - logits.gather(-1, own.unsqueeze(-1)).squeeze(-1)
    losses = reduced(torch.where(ignored | alone, 0, losses), ignored, reduction)
    return losses.view(targets.shape) if reduction == "none" else losses
