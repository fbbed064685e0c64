"""Losses that pull an output towards what belongs to its class: a length along the own vertex, or a code."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from etflayers.checks import require, require_floating, require_values
from etflayers.errors import InvalidArgumentError
from etflayers.functional.class_means import ignored_targets
from etflayers.functional.reduction import Reduction, reduced, require_reduction
from etflayers.precision import working_dtype

__all__ = ["code_mse_loss", "dot_regression_loss", "positive_lengths", "require_codes"]


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
    ignore_index: int = -100,
    reduction: Reduction = "mean",
) -> Tensor:
    r"""Regress the inner product with the own class vertex: ``(<w_y, h> - l_y)^2 / (2 l_y)``, averaged.

    ``l_y = sqrt(E_W E_{H,y})`` is the length sqrt(E_W) of the classifier vector times the length
    sqrt(E_{H,y}) that the features of class y are meant to have. Only the own class pulls; the other
    vertices, which the frame holds in place, need no push. The logits are plain inner products, without a
    bias. A head with ``scale=s`` has classifier vectors of length s: with ``scale=1`` the lengths are those
    of the features alone, otherwise multiply them by s.

    Args:
        logits: inner products, ``(..., K)``, classes last.
        targets: y, ``(...)``, integers in [0, K) or ``ignore_index``.
        lengths: l > 0, a number or one for each class, ``(K,)``.
        ignore_index: target of the samples to leave out.
        reduction: ``"mean"`` over the samples that are not ignored, ``"sum"`` or ``"none"``.

    Returns:
        A scalar, or ``(...)`` for ``"none"`` with 0 for ignored samples; float32 for half-precision logits.
        If all samples are ignored the mean is 0 with a zero gradient (``F.cross_entropy`` returns NaN there).

    Raises:
        InvalidArgumentError: shapes, dtypes or a reduction that do not fit, targets out of range, or
            lengths that are not positive and finite.

    Reference:
        Yang, Chen, Li, Xie, Lin, Tao (2022), arXiv 2203.09081.

    >>> logits = torch.tensor([[0.5, -0.5], [-2.0, 2.0]])
    >>> dot_regression_loss(logits, torch.tensor([0, 1]), reduction="none")
    tensor([0.1250, 0.5000])
    """
    require_floating("logits", logits.dtype)
    require_reduction(reduction)
    if logits.ndim == 0:
        raise InvalidArgumentError("logits must have shape (..., num_classes), got a scalar")
    _require_targets_of(logits, targets, "logits")
    num_classes = logits.shape[-1]
    lengths = positive_lengths(lengths)
    if isinstance(lengths, Tensor) and lengths.ndim > 0 and lengths.shape != (num_classes,):
        raise InvalidArgumentError(
            f"lengths must be a number or have shape (num_classes,) = ({num_classes},), "
            f"got {tuple(lengths.shape)}"
        )
    ignored = ignored_targets(targets, num_classes, ignore_index)

    dtype = working_dtype(logits.dtype)
    own = torch.where(ignored, 0, targets.long())
    length = torch.as_tensor(lengths, dtype=dtype, device=logits.device).expand(num_classes)[own]
    product = logits.gather(-1, own.unsqueeze(-1)).squeeze(-1).to(dtype)
    # An ignored product is replaced before the arithmetic: masking its loss would still send back 0 times
    # NaN.
    error = torch.where(ignored, 0, product - length)
    losses = error.square() / (2 * length)
    return reduced(losses, ignored, reduction)


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
