"""Losses that pull an output towards what belongs to its class: a length along the own vertex, or a code."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from etflayers.checks import require, require_flag, require_floating, require_values
from etflayers.errors import InvalidArgumentError
from etflayers.functional.class_means import ignored_targets
from etflayers.functional.priors import require_frequencies
from etflayers.functional.reduction import Reduction, reduced, require_reduction
from etflayers.functional.soft_targets import are_soft, require_soft_targets
from etflayers.precision import working_dtype

__all__ = [
    "code_mse_loss",
    "dot_regression_loss",
    "lengths_from_counts",
    "positive_lengths",
    "require_codes",
]


def code_mse_loss(
    outputs: Tensor,
    targets: Tensor,
    codes: Tensor | None = None,
    *,
    ignore_index: int = -100,
    reduction: Reduction = "mean",
) -> Tensor:
    r"""Half the squared distance of an output to the code of its class, ``|z - c_y|^2 / 2``, averaged.

    Without codes c_k is the k-th unit vector, and logits are regressed to one-hot targets: the loss for which
    the theory of neural collapse is most complete. With the frame of a head as codes, features are regressed
    to the vertex of their class.

    Args:
        outputs: z, ``(..., K)`` without codes, ``(..., d)`` with them.
        targets: y, ``(...)``, integers in [0, K) or ``ignore_index``.
        codes: C, ``(K, d)``, one row for each class; differentiable.
        ignore_index: target of the samples to leave out.
        reduction: ``"mean"`` over the samples that are not ignored, ``"sum"`` or ``"none"``. The mean is one
            over samples: ``F.mse_loss``, which averages over entries too, has 2/K times this value.

    Returns:
        A scalar, or ``(...)`` for ``"none"`` with 0 for ignored samples; float32 for half-precision outputs.
        If all samples are ignored the mean is 0 with a zero gradient.

    Raises:
        InvalidArgumentError: shapes, dtypes or a reduction that do not fit, targets out of range.

    Reference:
        Zhou, Li, Ding, You, Qu, Zhu (2022), arXiv 2203.01238; Han, Papyan, Donoho (2021), arXiv 2106.02073.

    >>> code_mse_loss(torch.tensor([[1.0, 2.0], [0.0, 0.0]]), torch.tensor([1, 0]), reduction="none")
    tensor([1.0000, 0.5000])
    """
    require_floating("outputs", outputs.dtype)
    require_reduction(reduction)
    require(outputs.ndim > 0, "outputs must have shape (..., num_classes) or (..., d), got a scalar")
    if codes is not None:
        require_codes(codes)
        require(
            codes.shape[1] == outputs.shape[-1],
            f"codes must have the width of outputs, shape (K, {outputs.shape[-1]}), got {tuple(codes.shape)}",
        )
    _require_targets_of(outputs, targets, "outputs")
    num_classes = outputs.shape[-1] if codes is None else len(codes)
    ignored = ignored_targets(targets, num_classes, ignore_index)

    dtype = working_dtype(outputs.dtype)
    own = torch.where(ignored, 0, targets.long())
    wanted = F.one_hot(own, num_classes) if codes is None else codes[own]
    # An ignored output is replaced before the arithmetic: see below.
    error = torch.where(ignored.unsqueeze(-1), 0, outputs.to(dtype) - wanted.to(dtype))
    return reduced(0.5 * error.square().sum(-1), ignored, reduction)


def dot_regression_loss(
    logits: Tensor,
    targets: Tensor,
    *,
    lengths: float | Tensor = 1.0,
    divide_by_length: bool = True,
    ignore_index: int = -100,
    reduction: Reduction = "mean",
) -> Tensor:
    r"""Regress the inner product with the own class vertex: ``(<w_y, h> - l_y)^2 / (2 l_y)``, averaged.

    ``l_y = sqrt(E_W E_{H,y})`` is the length sqrt(E_W) of the classifier vector times the length
    sqrt(E_{H,y}) that the features of class y are meant to have. Only the own class pulls; the other
    vertices, which the frame holds in place, need no push. The logits are plain inner products, without a
    bias. A head with ``scale=s`` has classifier vectors of length s: with ``scale=1`` the lengths are those
    of the features alone, otherwise multiply them by s.

    **Two published forms.** The paper divides by l_y. Its code divides by the length of the features alone,
    which are normalized, so that nothing is divided: ``(<w_y, h> - l_y)^2 / 2``. At length 1 both are the
    same. At other lengths they differ in what a class weighs: for features of length 1 and a classifier
    vector ``w_y = l_y u_y``, with u_y the unit vertex, the paper's is ``l_y (<u_y, h> - 1)^2 / 2`` and that
    of the code ``l_y^2 (<u_y, h> - 1)^2 / 2``. With the lengths of :func:`lengths_from_counts` the second
    gives all classes the same weight in an epoch; in the first, frequent classes still weigh more. A head
    has vectors of one length: multiply its logits by the lengths for this setting.

    **Soft targets** P, as mixup makes them, have the loss ``sum_k P_k loss_k``; of two labels a and b with
    shares r and 1 - r it is r times the loss for a and 1 - r times that for b.

    Args:
        logits: inner products, ``(..., K)``, classes last.
        targets: y, ``(...)``, integers in [0, K) or ``ignore_index``; or soft targets, ``(..., K)``, floating
            point, not negative, with rows that sum to 1.
        lengths: l > 0, a number or one for each class, ``(K,)``.
        divide_by_length: the form of the paper; ``False``: that of its code.
        ignore_index: target of the samples to leave out; soft targets leave none out.
        reduction: ``"mean"`` over the samples that are not ignored, ``"sum"`` or ``"none"``.

    Returns:
        A scalar, or ``(...)`` for ``"none"`` with 0 for ignored samples; float32 for half-precision logits.
        If all samples are ignored the mean is 0 with a zero gradient (``F.cross_entropy`` returns NaN there).

    Raises:
        InvalidArgumentError: shapes, dtypes or a reduction that do not fit, targets out of range, soft
            targets that are no probabilities, or lengths that are not positive and finite.

    Reference:
        Yang, Chen, Li, Xie, Lin, Tao (2022), arXiv 2203.09081.

    >>> logits = torch.tensor([[0.5, -0.5], [-2.0, 2.0]])
    >>> dot_regression_loss(logits, torch.tensor([0, 1]), reduction="none")
    tensor([0.1250, 0.5000])
    >>> dot_regression_loss(logits, torch.tensor([[1.0, 0.0], [0.5, 0.5]]), reduction="none")
    tensor([0.1250, 2.5000])
    """
    require_floating("logits", logits.dtype)
    require_reduction(reduction)
    require_flag("divide_by_length", divide_by_length)
    if logits.ndim == 0:
        raise InvalidArgumentError("logits must have shape (..., num_classes), got a scalar")
    num_classes = logits.shape[-1]
    lengths = positive_lengths(lengths)
    if isinstance(lengths, Tensor) and lengths.ndim > 0 and lengths.shape != (num_classes,):
        raise InvalidArgumentError(
            f"lengths must be a number or have shape (num_classes,) = ({num_classes},), "
            f"got {tuple(lengths.shape)}"
        )
    dtype = working_dtype(logits.dtype)
    length = torch.as_tensor(lengths, dtype=dtype, device=logits.device).expand(num_classes)
    if are_soft(targets):
        require_soft_targets(targets, logits.shape[:-1], num_classes)
        losses = _squared_gap(logits.to(dtype) - length, length, divide_by_length)
        kept = torch.zeros(logits.shape[:-1], dtype=torch.bool, device=logits.device)
        return reduced((targets.to(dtype) * losses).sum(-1), kept, reduction)
    _require_targets_of(logits, targets, "logits")
    ignored = ignored_targets(targets, num_classes, ignore_index)

    own = torch.where(ignored, 0, targets.long())
    product = logits.gather(-1, own.unsqueeze(-1)).squeeze(-1).to(dtype)
    # An ignored product is replaced before the arithmetic: masking its loss would still send back 0 times
    # NaN.
    gap = torch.where(ignored, 0, product - length[own])
    return reduced(_squared_gap(gap, length[own], divide_by_length), ignored, reduction)


def _squared_gap(gap: Tensor, length: Tensor, divide: bool) -> Tensor:
    return gap.square() / (2 * length) if divide else gap.square() / 2


def lengths_from_counts(counts: Tensor) -> Tensor:
    r"""Lengths that grow as a class gets rarer: ``l_k = sqrt(N / (K n_k))``, N the sum of all n.

    With them each class has the same part in ``sum_i l_{y_i}^2 = sum_k n_k l_k^2 = N``. They are those of the
    published code of dot regression, which takes them from the classes of a batch or of the training set.

    Args:
        counts: n > 0, ``(K,)``, numbers of samples.

    Returns:
        l, ``(K,)``, in the dtype of the counts if that is floating point, else PyTorch's default; all 1 for
        equal counts.

    Raises:
        InvalidArgumentError: counts that are not positive and finite.

    Reference:
        Yang, Chen, Li, Xie, Lin, Tao (2022), arXiv 2203.09081, by its code.

    >>> lengths_from_counts(torch.tensor([90, 10]))
    tensor([0.7454, 2.2361])
    """
    require_frequencies("counts", counts)
    numbers = counts if counts.is_floating_point() else counts.to(torch.get_default_dtype())
    return (numbers.mean() / numbers).sqrt()


def _require_targets_of(outputs: Tensor, targets: Tensor, name: str) -> None:
    if targets.shape != outputs.shape[:-1]:
        raise InvalidArgumentError(
            f"targets must have the shape of {name} without the last dimension, {tuple(outputs.shape[:-1])}, "
            f"got {tuple(targets.shape)}"
        )


def require_codes(codes: Tensor) -> None:
    """Raise unless ``codes`` has shape ``(K, d)`` with K >= 1 and a floating-point dtype."""
    require_floating("codes", codes.dtype)
    require(
        codes.ndim == 2 and len(codes) > 0,
        f"codes must have shape (K, d), one row for each class, got {tuple(codes.shape)}",
    )


def positive_lengths(lengths: float | Tensor) -> float | Tensor:
    """``lengths``, after checking that they are positive and finite."""
    if isinstance(lengths, Tensor):
        require_floating("lengths", lengths.dtype)
        values = lengths.detach()
        require_values(
            ((values > 0) & torch.isfinite(values)).all(),
            "lengths must be positive and finite: one for each class",
        )
    else:
        require(0 < lengths < float("inf"), f"lengths must be positive and finite, got {lengths}")
    return lengths
