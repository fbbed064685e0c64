r"""Sums and means of the features of each class.

On a CPU they are one product with the one-hot matrix of the targets, on a GPU with Triton one kernel: see
``kernels.class_sums``.
"""

from __future__ import annotations

import torch
from torch import Tensor

from etflayers.checks import reads_values, require, require_floating, require_values
from etflayers.errors import InvalidArgumentError, NonFiniteError
from etflayers.functional.soft_targets import are_soft, require_soft_targets
from etflayers.kernels import Impl
from etflayers.kernels import class_sums as kernels
from etflayers.precision import full_precision, working_dtype

__all__ = [
    "class_means",
    "class_sums",
    "ignored_targets",
    "require_class_indices",
    "require_same_device",
    "require_target_for_each",
    "some_ignored",
]


def class_sums(
    features: Tensor, targets: Tensor, num_classes: int, *, ignore_index: int = -100, impl: Impl = "auto"
) -> tuple[Tensor, Tensor]:
    r"""Sum the features of each class: ``s_k = sum_{i: y_i = k} f_i`` and ``n_k = #{i: y_i = k}``.

    With soft targets P, ``s_k = sum_i P_ik f_i`` and ``n_k = sum_i P_ik``.

    Args:
        features: F, ``(B, d)``; every row finite, the ignored ones too (0 times NaN is NaN). The Triton
            kernel does not read ignored rows, and so does not complain of them.
        targets: y, ``(B,)``, integers in [0, K) or ``ignore_index``; or soft targets P, ``(B, K)``, floating
            point, not negative, with rows that sum to 1.
        num_classes: K.
        ignore_index: target of the rows to leave out; it may be one of the classes. Soft targets leave none
            out.
        impl: which path to take: see :func:`etflayers.kernels.describe`.

    Returns:
        The sums ``(K, d)``, in float32 for half-precision features and in their own dtype otherwise, and the
        counts ``(K,)``, int64; of soft targets n, in the dtype of the sums. Differentiable in both arguments.

    Raises:
        InvalidArgumentError: shapes or dtypes that do not fit, targets out of range, or soft targets that are
            no probabilities.
        NonFiniteError: NaN or infinity in the features, or features so large that sums overflow.

    >>> features = torch.tensor([[1.0, 0.0], [3.0, 0.0], [0.0, 5.0]])
    >>> class_sums(features, torch.tensor([0, 0, 2]), num_classes=3)
    (tensor([[4., 0.], [0., 0.], [0., 5.]]), tensor([2, 0, 1]))
    """
    require(num_classes >= 1, f"num_classes must be at least 1, got {num_classes}")
    require_floating("features", features.dtype)
    if features.ndim != 2:
        raise InvalidArgumentError(
            f"features must have shape (B, in_features), got {tuple(features.shape)}: "
            "flatten the leading dimensions"
        )
    if are_soft(targets):
        require_soft_targets(targets, features.shape[:-1], num_classes)
        _require_summable(features)
        dtype = working_dtype(features.dtype)
        with full_precision(features):
            return targets.to(dtype).mT @ features.to(dtype), targets.to(dtype).sum(0)
    require_target_for_each(features, targets)
    require_class_indices(targets)
    if kernels.sums_use_triton(features, num_classes, impl):
        require_same_device(features, targets)
        sums, counts = kernels.class_sums(features, targets, num_classes, ignore_index)
        return sums, counts
    ignored = some_ignored(targets, num_classes, ignore_index)
    _require_summable(features)
    return kernels.class_sums_reference(features, targets, num_classes, ignored)


def class_means(
    features: Tensor, targets: Tensor, num_classes: int, *, ignore_index: int = -100, impl: Impl = "auto"
) -> tuple[Tensor, Tensor]:
    r"""Average the features of each class: ``m_k = s_k / n_k``, and 0 where n_k = 0.

    Args:
        features: as in :func:`class_sums`.
        targets: as in :func:`class_sums`.
        num_classes: as in :func:`class_sums`.
        ignore_index: as in :func:`class_sums`.
        impl: as in :func:`class_sums`.

    Returns:
        The means ``(K, d)``, zero rows for absent classes, and the counts ``(K,)``, as in :func:`class_sums`.

    Raises:
        InvalidArgumentError: as in :func:`class_sums`.
        NonFiniteError: as in :func:`class_sums`.

    >>> features = torch.tensor([[1.0, 0.0], [3.0, 0.0], [0.0, 5.0]])
    >>> class_means(features, torch.tensor([0, 0, 2]), num_classes=3)
    (tensor([[2., 0.], [0., 0.], [0., 5.]]), tensor([2, 0, 1]))
    """
    sums, counts = class_sums(features, targets, num_classes, ignore_index=ignore_index, impl=impl)
    return sums / torch.where(counts > 0, counts, 1).unsqueeze(-1), counts


def require_target_for_each(features: Tensor, targets: Tensor) -> None:
    """Raise unless ``targets`` is a tensor of shape ``(B,)`` for features of shape ``(B, d)``."""
    _require_tensor(targets)
    if targets.shape != features.shape[:1]:
        raise InvalidArgumentError(
            f"targets must have shape (B,) = ({features.shape[0]},), one for each row of features, "
            f"got {tuple(targets.shape)}: convert one-hot targets with .argmax(-1)"
        )


def require_same_device(features: Tensor, targets: Tensor) -> None:
    """Raise unless both are on one device: a kernel would read foreign memory."""
    require(
        targets.device == features.device,
        f"targets must be on the device of features, {features.device}, got {targets.device}",
    )


def require_class_indices(targets: Tensor, name: str = "targets") -> None:
    """Raise unless ``targets`` is a tensor with an integer dtype."""
    _require_tensor(targets, name)
    dtype = targets.dtype
    require(
        not (dtype.is_floating_point or dtype.is_complex or dtype == torch.bool),
        f"{name} must be integers (class indices), got {dtype}: convert them with .long(), "
        "one-hot targets with .argmax(-1)",
    )


def _require_tensor(targets: object, name: str = "targets") -> None:
    require(
        isinstance(targets, Tensor),
        f"{name} must be a tensor, got {type(targets).__name__}: pass torch.as_tensor({name})",
    )


def ignored_targets(targets: Tensor, num_classes: int, ignore_index: int) -> Tensor:
    """Where ``targets`` equals ``ignore_index``, after checking that it holds nothing but that and classes.

    Args:
        targets: integers of any shape.
        num_classes: K.
        ignore_index: target of the samples to leave out.

    Returns:
        A boolean tensor of the shape of ``targets``.

    Raises:
        InvalidArgumentError: a dtype that is not an integer, or a value outside [0, K).
    """
    require_class_indices(targets)
    # In int64, because uint8 would take ignore_index = -100 for class 156.
    targets = targets.long()
    ignored = targets == ignore_index
    allowed = ((targets >= 0) & (targets < num_classes)) | ignored
    everything_allowed = allowed.all()
    received = ""
    if reads_values(everything_allowed) and not bool(everything_allowed):
        offenders = targets[~allowed]
        received = f", got {int(offenders[0])} ({offenders.numel()} of {targets.numel()} out of range)"
    require_values(
        everything_allowed,
        f"targets must be class indices in [0, {num_classes}) or ignore_index={ignore_index}{received}",
    )
    return ignored


def some_ignored(targets: Tensor, num_classes: int, ignore_index: int) -> Tensor | None:
    """:func:`ignored_targets`, or ``None`` where a look, at no cost, tells that nothing is ignored."""
    require_class_indices(targets)
    if reads_values(targets) and targets.numel() and not 0 <= ignore_index < num_classes:
        lowest, highest = torch.aminmax(targets.long())  # one operation where the comparisons below are ten
        if int(lowest) >= 0 and int(highest) < num_classes:
            return None
    ignored = ignored_targets(targets, num_classes, ignore_index)
    return None if reads_values(ignored) and not bool(ignored.any()) else ignored


def _require_summable(features: Tensor) -> None:
    if features.numel() == 0:
        return
    # One pass over the features: both extremes are NaN if any entry is. With 2B times the largest finite, no
    # sum of B rows can overflow, and no difference of two means.
    lowest, highest = torch.aminmax(features.detach())
    dtype, terms = working_dtype(features.dtype), 2 * features.shape[0]
    if reads_values(lowest) and max(-float(lowest), float(highest)) <= torch.finfo(dtype).max / terms:
        return
    largest = torch.maximum(-lowest, highest).to(dtype)
    summable = torch.isfinite(largest * terms)
    received = ""
    if reads_values(summable) and not bool(summable):
        broken = int((~torch.isfinite(features)).sum())
        received = (
            f", got {broken} NaN or infinite values among {features.numel()}"
            if broken
            else f", got values up to {float(largest):.3g}"
        )
    require_values(
        summable,
        f"features must be finite, and small enough to be summed over the batch{received}: look for an "
        "overflow (a learning rate too high, fp16 without loss scaling) in what produced them",
        NonFiniteError,
    )
