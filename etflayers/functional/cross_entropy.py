r"""Cross-entropy of simplex-ETF logits without the ``(B, K)`` matrices of logits and probabilities.

The logits of the canonical frame are centered features times c, ``z = s c (f_{1:K} - mean)``, and a softmax
does not see what is common to all logits. So the loss is that of the features,
``u = s c f_{1:K}``,

    l = log sum_k exp u_k - (1 - e) u_y - e mean_k u_k,

and its gradient ``s c (p - (1 - e) 1_y - e / K)`` sums to zero, as the gradient through the centering does.
Both take one pass over the features, and the backward pass needs two numbers a sample besides them: see
``kernels.cross_entropy``. Any other frame takes the logits a few rows at a time, and makes them again on the
way back.

A prior of the classes is one more feature, or a change of the features: see ``functional.priors``.

Soft targets are a ``(B, K)`` matrix themselves, and to save another one, of logits, would be half a saving:
their loss is PyTorch's, of all logits at once.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from etflayers.checks import require, require_floating
from etflayers.codes import SphericalCode
from etflayers.errors import InvalidArgumentError
from etflayers.functional.active import among_active
from etflayers.functional.class_means import ignored_targets, require_class_indices, require_same_device
from etflayers.functional.code_softmax import code_logsumexp
from etflayers.functional.logits import canonical_etf_logits
from etflayers.functional.priors import features_with_prior, linear_with_prior, log_prior, require_prior
from etflayers.functional.reduction import Reduction, reduced, require_reduction
from etflayers.functional.soft_targets import are_soft, require_soft_targets
from etflayers.geometry import centered_basis_adjoint, etf_radius, require_etf_dims
from etflayers.kernels import Impl
from etflayers.kernels.cross_entropy import (
    cross_entropy_uses_triton,
    linear_softmax_losses,
    softmax_losses,
)
from etflayers.precision import full_precision, linear_dtype, working_dtype

__all__ = ["code_cross_entropy", "etf_cross_entropy", "require_loss_options", "require_targets_of"]


def etf_cross_entropy(
    features: Tensor,
    targets: Tensor,
    num_classes: int,
    *,
    scale: float = 1.0,
    label_smoothing: float = 0.0,
    ignore_index: int = -100,
    reduction: Reduction = "mean",
    prior: Tensor | None = None,
    tau: float = 1.0,
    classes: Tensor | None = None,
    impl: Impl = "auto",
) -> Tensor:
    r"""Cross-entropy of the logits of the canonical simplex ETF, ``s c (f_{1:K} - mean(f_{1:K}))``.

    The same as ``F.cross_entropy(s * canonical_etf_logits(features, K), targets)`` and its gradient, in
    float32 or better, with memory for the features and their gradient alone (for d = K - 1, where the frame
    is a Householder reflection, and with a prior, the changed features too). Differentiable to any order and
    in both modes.

    Args:
        features: f, ``(..., d)`` with d >= K - 1. NaN gives a NaN loss, but for ignored samples.
        targets: y, ``(...)``, integers in [0, K) or ``ignore_index``; or soft targets, ``(..., K)``, floating
            point, not negative, with rows that sum to 1: their loss makes all logits.
        num_classes: K >= 2.
        scale: s > 0, the inverse temperature: that of the head.
        label_smoothing: e in [0, 1], the share of the target that is spread over all classes.
        ignore_index: target of the samples to leave out.
        reduction: ``"mean"`` over the samples that are not ignored, ``"sum"`` or ``"none"``.
        prior: pi, ``(K,)``, counts or probabilities of the classes: the loss is that of the logits plus
            tau log pi (:func:`~etflayers.functional.logit_adjustment`).
        tau: how much of the prior to add.
        classes: ``(A,)``, ascending: the classes to choose among, of which alone there are logits, and over
            which label smoothing spreads its share; default all K. Targets still count from 0 to K.
        impl: which path to take: see :func:`etflayers.kernels.describe`.

    Returns:
        A scalar, or ``(...)`` for ``"none"`` with 0 for ignored samples; float32 for half-precision features.
        If all samples are ignored the mean is 0 with a zero gradient (``F.cross_entropy`` returns NaN there).

    Raises:
        InvalidArgumentError: shapes, dtypes or options that do not fit, or targets out of range.

    >>> features = torch.tensor([[3.0, 0.0, 0.0, 7.0], [0.0, 1.0, 0.0, 0.0]])
    >>> etf_cross_entropy(features, torch.tensor([0, 0]), num_classes=3)
    tensor(0.8683)
    """
    require_floating("features", features.dtype)
    if features.ndim == 0:
        raise InvalidArgumentError("features must have shape (..., in_features), got a scalar")
    require_etf_dims(num_classes, features.shape[-1])
    require_loss_options(scale, label_smoothing, reduction)
    if prior is not None:
        added = log_prior(prior, num_classes, tau, like=features)
        features = features_with_prior(features, num_classes, added, scale)
    if classes is not None:
        targets, ignore_index = among_active(targets, classes, num_classes, ignore_index)
    count = num_classes if classes is None else len(classes)
    if are_soft(targets):
        require_soft_targets(targets, features.shape[:-1], count)
        logits = canonical_etf_logits(features, num_classes, scale=scale)
        logits = logits if classes is None else logits.index_select(-1, classes)
        return _soft_cross_entropy(logits, targets, label_smoothing, reduction)
    require_targets_of(features, targets)

    rows, labels = features.flatten(0, -2) if features.ndim != 1 else features[None], targets.flatten()
    factor = scale * etf_radius(num_classes)
    if classes is not None:
        rows = _columns(rows, num_classes).index_select(-1, classes)
    triton = cross_entropy_uses_triton(rows, count, impl)
    if triton:
        require_same_device(features, targets)
        # In int64, because uint8 would take ignore_index = -100 for class 156.
        ignored = labels.long() == ignore_index
    else:
        ignored = ignored_targets(labels, count, ignore_index)
    if classes is None:
        rows = _columns(rows, num_classes)
    losses = softmax_losses(rows, labels, count, factor, label_smoothing, ignore_index, triton)
    return reduced(losses, ignored, reduction).view(targets.shape if reduction == "none" else ())


def _columns(rows: Tensor, num_classes: int) -> Tensor:
    """Rows whose first K columns, times c, are the logits up to a number common to all of them."""
    if rows.shape[-1] >= num_classes:
        return rows
    return centered_basis_adjoint(rows.to(working_dtype(rows.dtype)).unsqueeze(-1)).squeeze(-1)


def code_cross_entropy(
    features: Tensor,
    frame: Tensor | SphericalCode,
    targets: Tensor,
    *,
    scale: float = 1.0,
    label_smoothing: float = 0.0,
    ignore_index: int = -100,
    reduction: Reduction = "mean",
    prior: Tensor | None = None,
    tau: float = 1.0,
    classes: Tensor | None = None,
    chunk_size: int | None = None,
    impl: Impl = "auto",
) -> Tensor:
    r"""Cross-entropy of the logits ``s W f`` of any frame, of which only a few rows exist at a time.

    The same as ``F.cross_entropy(s * F.linear(features, frame), targets)`` and its gradients in both, with
    logits that are computed once more in the backward pass instead of kept. The products have the dtype that
    ``F.linear`` would use, losses are float32 or better. Differentiable to any order and in both modes;
    derivatives other than the first in reverse mode do make all logits.

    PyTorch 2.13 has ``F.linear_cross_entropy`` for the same loss. Its chunked path computes both gradients in
    the forward pass, and has neither second derivatives nor ``torch.func``. This one has them, and a scale, a
    Triton kernel for the softmax, and older versions of PyTorch.

    Of a spherical code that has a formula, a few *classes* of all samples exist at a time, and there is no
    matrix W either; the computation is in float32 or better.

    Args:
        features: f, ``(..., d)``. NaN gives a NaN loss; in an ignored sample only a NaN gradient in the
            frame, 0 times NaN, as with ``F.linear``.
        frame: W, ``(K, d)``: any matrix; or a code, see :func:`etflayers.codes.find_code`.
        targets: as in :func:`etf_cross_entropy`.
        scale: as in :func:`etf_cross_entropy`.
        label_smoothing: as in :func:`etf_cross_entropy`.
        ignore_index: as in :func:`etf_cross_entropy`.
        reduction: as in :func:`etf_cross_entropy`.
        prior: as in :func:`etf_cross_entropy`. In half precision it is rounded as the products are. Of a
            code it makes the matrix of its words.
        tau: as in :func:`etf_cross_entropy`.
        classes: as in :func:`etf_cross_entropy`; the rows of the other classes get no gradient, and of a code
            the words of these classes are made as a matrix ``(A, d)``.
        chunk_size: samples whose logits exist at a time; ``None``: as many as keep the device busy. Not for a
            code, which has pieces of its own.
        impl: of the softmax of a chunk: see :func:`etflayers.kernels.describe`, operation
            ``"cross_entropy"``.

    Returns:
        As :func:`etf_cross_entropy`.

    Raises:
        InvalidArgumentError: shapes, dtypes or options that do not fit, or targets out of range.

    >>> frame = torch.tensor([[1.0, 0.0], [-1.0, 0.0]])
    >>> code_cross_entropy(torch.tensor([[0.5, 9.0]]), frame, torch.tensor([0]))
    tensor(0.3133)
    """
    require_floating("features", features.dtype)
    require_loss_options(scale, label_smoothing, reduction, chunk_size)
    if classes is not None:
        count = frame.num_classes if isinstance(frame, SphericalCode) else len(frame)
        targets, ignore_index = among_active(targets, classes, count, ignore_index)
        if isinstance(frame, SphericalCode):
            frame = frame.words(classes, dtype=working_dtype(features.dtype))
        else:
            frame = frame.index_select(0, classes)
        if prior is not None:
            require_prior(prior, count, tau)
            prior = prior.to(classes.device).index_select(0, classes)
    if isinstance(frame, SphericalCode) and prior is not None:
        # The pieces of a code have no room for a number of each class.
        frame = frame.dense(device=features.device, dtype=working_dtype(features.dtype))
    if isinstance(frame, SphericalCode):
        return _of_code(features, frame, targets, scale, label_smoothing, ignore_index, reduction)
    require_floating("frame", frame.dtype)
    if frame.ndim != 2 or frame.shape[0] < 1 or features.shape[-1:] != frame.shape[1:]:
        raise InvalidArgumentError(
            "features and frame must have shapes (..., in_features) and (num_classes, in_features), "
            f"got {tuple(features.shape)} and {tuple(frame.shape)}"
        )
    dtype = torch.promote_types(features.dtype, frame.dtype)
    dtype = linear_dtype(features.to(dtype))
    features, frame = features.to(dtype), frame.to(dtype)
    if prior is not None:
        added = log_prior(prior, frame.shape[0], tau, like=features)
        features, frame = linear_with_prior(features, frame, added, scale)
    if are_soft(targets):
        require_soft_targets(targets, features.shape[:-1], frame.shape[0])
        logits = scale * F.linear(features, frame)
        return _soft_cross_entropy(logits, targets, label_smoothing, reduction)
    require_targets_of(features, targets)

    rows, labels = features.flatten(0, -2) if features.ndim != 1 else features[None], targets.flatten()
    ignored = ignored_targets(labels, frame.shape[0], ignore_index)
    losses = linear_softmax_losses(
        rows,
        frame,
        labels,
        scale,
        label_smoothing,
        ignore_index,
        chunk_size,
        impl,
    )
    return reduced(losses, ignored, reduction).view(targets.shape if reduction == "none" else ())


def _of_code(
    features: Tensor,
    code: SphericalCode,
    targets: Tensor,
    scale: float,
    label_smoothing: float,
    ignore_index: int,
    reduction: Reduction,
) -> Tensor:
    """``L(u) - <u, (1 - e) w_y + e mean w>`` with u = s f: only L needs all words."""
    if are_soft(targets):
        require_soft_targets(targets, features.shape[:-1], code.num_classes)
        return _soft_cross_entropy(scale * code.logits(features), targets, label_smoothing, reduction)
    require_targets_of(features, targets)
    rows, labels = features.flatten(0, -2) if features.ndim != 1 else features[None], targets.flatten()
    ignored = ignored_targets(labels, code.num_classes, ignore_index)
    with full_precision(rows):
        rows = scale * rows.to(working_dtype(rows.dtype))
        own = code.words(torch.where(ignored, 0, labels.long()), dtype=rows.dtype)
        if label_smoothing > 0:
            shares = rows.new_full((code.num_classes,), 1 / code.num_classes)
            own = torch.lerp(own, code.piece_adjoint(shares, 0, code.pieces), label_smoothing)
        losses = code_logsumexp(rows, code) - (rows * own).sum(-1)
    losses = torch.where(ignored, 0, losses)
    return reduced(losses, ignored, reduction).view(targets.shape if reduction == "none" else ())


def require_loss_options(
    scale: float, label_smoothing: float, reduction: str, chunk_size: int | None = None
) -> None:
    """Raise unless the options of a cross-entropy are in their ranges."""
    require(0 < scale < float("inf"), f"scale must be positive and finite, got {scale}")
    require(0 <= label_smoothing <= 1, f"label_smoothing must be in [0, 1], got {label_smoothing}")
    require_reduction(reduction)
    require(chunk_size is None or chunk_size >= 1, f"chunk_size must be at least 1 or None, got {chunk_size}")


def require_targets_of(features: Tensor, targets: Tensor) -> None:
    """Raise unless ``targets`` are class indices ``(...)`` for features ``(..., d)``."""
    if targets.shape != features.shape[:-1]:
        raise InvalidArgumentError(
            f"targets must have the leading shape of features, {tuple(features.shape[:-1])}, "
            f"got {tuple(targets.shape)}"
        )
    require_class_indices(targets)


def _soft_cross_entropy(
    logits: Tensor, targets: Tensor, label_smoothing: float, reduction: Reduction
) -> Tensor:
    num_classes = logits.shape[-1]
    dtype = working_dtype(logits.dtype)
    loss = F.cross_entropy(
        logits.reshape(-1, num_classes).to(dtype),
        targets.reshape(-1, num_classes).to(dtype),
        label_smoothing=label_smoothing,
        reduction=reduction,
    )
    return loss.view(targets.shape[:-1] if reduction == "none" else ())
