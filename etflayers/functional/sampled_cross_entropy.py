r"""Cross-entropy over the classes of a batch and a random share of all others.

Symbols: K <-> num_classes, P <-> positive, S <-> classes, n <-> others / drawn.

Of the softmax over K classes a sample needs its own logit and the sum of the exponentials of all of them.
That sum can be estimated. P are the classes that occur in the batch, which are all kept. Of the others a set
of given size is drawn, each as likely as any other, so that one is in it with the probability 1/n, where
n = (number of others) / (number drawn). Then

    Z = sum_{j in P} exp z_j + sum_{j in S, not in P} n exp z_j = sum_{j in S} exp(z_j + c_j),

with c_j = log n outside of P and 0 in it, has the expectation ``sum_k exp z_k``: each other class contributes
n times its exponential, once in n draws. The correction is a number that is added to logits, so that the loss
is an ordinary cross-entropy of fewer classes. The logarithm of Z is not unbiased: log is concave, so the loss
is too small on average, and its gradient off, by an amount that vanishes as more classes are drawn.

Label smoothing has the mean of all logits in it, which the same weights estimate, without bias.

**No size depends on values.** How many classes a batch holds is known only on the device. It holds at most as
many as it has samples, B, so that ``B + ceil(rate K)`` rows have room for all of them and for the share of
others. Rows that repeated classes leave free are drawn, too; n counts what has been drawn.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from etflayers.checks import require, require_floating, require_number
from etflayers.errors import InvalidArgumentError
from etflayers.functional.active import among_active
from etflayers.functional.class_means import ignored_targets
from etflayers.functional.cross_entropy import require_loss_options, require_targets_of
from etflayers.functional.reduction import Reduction, reduced
from etflayers.functional.soft_targets import are_soft
from etflayers.precision import linear_dtype, working_dtype

__all__ = ["require_rate", "sampled_cross_entropy"]

_IGNORED = -100


def sampled_cross_entropy(
    features: Tensor,
    weight: Tensor,
    targets: Tensor,
    *,
    rate: float,
    scale: float = 1.0,
    label_smoothing: float = 0.0,
    ignore_index: int = -100,
    reduction: Reduction = "mean",
    classes: Tensor | None = None,
    generator: torch.Generator | None = None,
) -> Tensor:
    r"""Cross-entropy of the logits ``s W f`` over the classes of the batch and a random share of the others.

    ``log sum_{j in S} exp(s <w_j, f> + c_j) - s <w_y, f>``: S are all classes of the batch and others, drawn
    without replacement; c is 0 for the first and minus the logarithm of the probability to be drawn for the
    others. The sum is then an unbiased estimate of that over all classes; loss and gradient are biased by
    an amount that vanishes as the rate grows to 1, where they are those of ``F.cross_entropy``.

    Logits exist for ``B + ceil(rate K)`` classes at most, so that where ``rate K`` is much more than B,
    memory and time are about the rate times those of all logits. A gradient reaches the rows that were drawn;
    it is a dense ``(K, d)`` matrix all the same, zero in the other rows. The product has the dtype that
    ``F.linear`` would use, losses are float32 or better.

    Args:
        features: f, ``(..., d)``, B vectors in all.
        weight: W, ``(K, d)``: any matrix.
        targets: y, ``(...)``, integers in [0, K) or ``ignore_index``.
        rate: in (0, 1], share of the classes to draw beside those of the batch.
        scale: s > 0, the inverse temperature.
        label_smoothing: e in [0, 1], the share of the target that is spread over all K classes.
        ignore_index: target of the samples to leave out; their classes are not kept.
        reduction: ``"mean"`` over the samples that are not ignored, ``"sum"`` or ``"none"``.
        classes: ``(A,)``, ascending: the classes to choose among, of which the rate is a share; default all
            K. Targets still count from 0 to K.
        generator: random numbers, on the device of ``features``; default: PyTorch's global one.

    Returns:
        A scalar, or ``(...)`` for ``"none"`` with 0 for ignored samples; float32 for half-precision features.
        If all samples are ignored the mean is 0 with a zero gradient.

    Raises:
        InvalidArgumentError: shapes, dtypes or options that do not fit, soft targets, or targets out of
            range.

    Reference:
        An, Deng, Guo, Feng, Zhu, Yang, Liu (2022), arXiv 2203.15565 (which classes are kept); Bengio, Senécal
        (2008), Adaptive importance sampling to accelerate training of a neural probabilistic language model
        (the correction).

    >>> features, weight = torch.tensor([[2.0, 0.0], [0.0, 3.0]]), torch.eye(2).repeat(500, 1)
    >>> generator = torch.Generator().manual_seed(0)
    >>> sampled_cross_entropy(features, weight, torch.tensor([0, 1]), rate=0.2, generator=generator)
    tensor(6.2944)
    >>> torch.nn.functional.cross_entropy(features @ weight.T, torch.tensor([0, 1]))
    tensor(6.3024)
    """
    require_floating("features", features.dtype)
    require_floating("weight", weight.dtype)
    if weight.ndim != 2 or weight.shape[0] < 1 or features.shape[-1:] != weight.shape[1:]:
        raise InvalidArgumentError(
            "features and weight must have shapes (..., in_features) and (num_classes, in_features), "
            f"got {tuple(features.shape)} and {tuple(weight.shape)}"
        )
    require_loss_options(scale, label_smoothing, reduction)
    require_rate(rate)
    require(
        generator is None or generator.device.type == features.device.type,
        f"generator must be on the device of features, {features.device}, got one on "
        f"{generator.device if generator else None}",
    )
    require(
        not are_soft(targets),
        "targets must be class indices: of soft targets every class may be one of the batch, so that nothing "
        "is left to draw; take code_cross_entropy for them",
    )
    require_targets_of(features, targets)
    if classes is not None:
        targets, ignore_index = among_active(targets, classes, len(weight), ignore_index)
        weight = weight.index_select(0, classes)
    rows, labels = features.reshape(-1, features.shape[-1]), targets.reshape(-1)
    ignored = ignored_targets(labels, len(weight), ignore_index)
    dtype = torch.promote_types(features.dtype, weight.dtype)
    dtype = linear_dtype(features.to(dtype))
    drawn = _draw(labels, ignored, len(weight), rate, generator, working_dtype(dtype))

    chosen = weight.index_select(0, drawn.classes).to(dtype)
    # What is ignored may be NaN, and 0 times NaN a gradient.
    rows = torch.where(ignored.unsqueeze(-1), 0, rows * scale)
    logits = F.linear(rows.to(dtype), chosen).to(working_dtype(dtype))
    correction = drawn.weights.log()
    logits = logits.add_(correction)  # the largest tensor here, of which one copy is enough
    losses = F.cross_entropy(
        logits, torch.where(ignored, _IGNORED, drawn.places), ignore_index=_IGNORED, reduction="none"
    )
    if label_smoothing > 0:
        # From lse - z_y to lse - (1 - e) z_y - e (mean of all z).
        own = logits.gather(-1, drawn.places.unsqueeze(-1)).squeeze(-1)  # of which the correction is 0
        weights = drawn.weights / len(weight)
        mean = logits @ weights - correction @ weights
        losses = losses + torch.where(ignored, 0, label_smoothing * (own - mean))
    return reduced(losses, ignored, reduction).view(targets.shape if reduction == "none" else ())


class _Drawn(NamedTuple):
    """A draw of classes.

    Attributes:
        classes: S, ``(m,)``, in ascending order.
        weights: 1 for classes of the batch, n for the others, ``(m,)``.
        places: for each sample the place of its class in S, ``(B,)``; any for those that are ignored.
    """

    classes: Tensor
    weights: Tensor
    places: Tensor


@torch.no_grad()
def _draw(
    labels: Tensor,
    ignored: Tensor,
    num_classes: int,
    rate: float,
    generator: torch.Generator | None,
    dtype: torch.dtype,
) -> _Drawn:
    size = min(num_classes, len(labels) + math.ceil(rate * num_classes))
    labels = labels.long()
    # One more place, for samples without a class.
    positive = torch.zeros(num_classes + 1, dtype=torch.bool, device=labels.device)
    positive = positive.index_fill(0, torch.where(ignored, num_classes, labels), True)[:-1]
    # Others in a random order without ties, and the classes of the batch before all of them.
    order = torch.randperm(num_classes, generator=generator, device=labels.device)
    keys = torch.where(positive, num_classes, order)
    classes = torch.topk(keys, size, sorted=False).indices.sort().values
    kept = positive.sum().to(dtype)
    others, drawn = num_classes - kept, (size - kept).clamp(min=1)
    weights = torch.where(positive.index_select(0, classes), 1, others / drawn)
    places = torch.searchsorted(classes, labels.clamp(0, num_classes - 1)).clamp(max=size - 1)
    return _Drawn(classes, weights, places)


def require_rate(rate: float) -> None:
    """Raise unless ``rate`` is a number in (0, 1]."""
    require_number("rate", rate, positive=True)
    require(rate <= 1, f"rate must be a number in (0, 1], the share of classes to draw, got {rate}")
