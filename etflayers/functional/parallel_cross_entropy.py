r"""Cross-entropy where every rank of a process group holds some of the classes, and none holds all logits.

With R ranks, each has the logits of its K / R classes for all samples. The loss of a sample needs of them a
maximum and three sums over the classes (``kernels.cross_entropy.shard``), so that two collectives of a few
numbers a sample join the ranks: one maximum, and one sum after all have moved to the common maximum. On the
way back each rank makes its logits again and has the gradient of its own weight without asking anyone. The
gradient in the features has a term from every class, and is a third collective, of the size of the features.

Logits ``(B, K)`` never exist on one rank, and those of the rank itself only some classes at a time.

Symbols: W_r <-> local_weight, b_r <-> local_bias, K_r <-> len(shard).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from etflayers._torch import leave_to_eager
from etflayers.checks import require, require_floating, require_values
from etflayers.collectives import (
    ClassShard,
    largest_over_ranks,
    local_part,
    require_first_derivative,
    sum_over_ranks,
    world_size,
)
from etflayers.errors import RanksDisagreeError
from etflayers.functional.active import among_active
from etflayers.functional.class_means import ignored_targets
from etflayers.functional.cross_entropy import require_loss_options
from etflayers.functional.reduction import Reduction, reduced
from etflayers.functional.soft_targets import are_soft
from etflayers.geometry import centered_basis_adjoint, etf_radius, require_etf_dims
from etflayers.kernels.cross_entropy.shard import class_parts, shard_gradient, shard_sums
from etflayers.precision import full_precision, linear_dtype, working_dtype

__all__ = ["class_parallel_cross_entropy", "class_parallel_etf_cross_entropy"]


def class_parallel_cross_entropy(
    features: Tensor,
    local_weight: Tensor,
    targets: Tensor,
    shard: ClassShard | None = None,
    *,
    local_bias: Tensor | None = None,
    scale: float = 1.0,
    label_smoothing: float = 0.0,
    ignore_index: int = -100,
    reduction: Reduction = "mean",
    chunk_size: int | None = None,
    classes: Tensor | None = None,
) -> Tensor:
    r"""Cross-entropy of the logits ``s (W f + b)``, where each rank holds the rows of W of its own classes.

    The same as ``F.cross_entropy(s * F.linear(features, W, b), targets)`` and its gradients, where rank r has
    the K_r rows W_r. Every rank of the group calls it, with the same features and the same targets, as in
    tensor parallelism: the samples are not divided among these ranks. (Over other ranks they may be: a mesh
    of two dimensions.) Every rank returns the same loss and gets the whole gradient in the features, so that
    what comes before them learns alike on all ranks; the gradient of its own rows needs no communication.

    Targets that differ between ranks are found, at the price of two more numbers in a collective. Shapes and
    features that differ are looked for when ``TORCH_DISTRIBUTED_DEBUG`` is ``INFO`` or ``DETAIL``. The usual
    reasons are a sampler that divides the data among these ranks, and dropout with a seed of each rank's own.

    First derivatives only, in reverse mode; ``torch.compile`` leaves the call to eager mode.

    Args:
        features: f, ``(..., d)``.
        local_weight: W_r, ``(K_r, d)``; or W as a ``DTensor`` with the placement ``Shard(0)``, as
            ``ColwiseParallel`` and :class:`~etflayers.nn.ClassParallel` make it.
        targets: y, ``(...)``, integers in [0, K), counted over the classes of all ranks, or ``ignore_index``.
        shard: which classes this rank has, K and the group; may be left out where the weight is a
            ``DTensor``.
        local_bias: b_r, ``(K_r,)``, or b as a ``DTensor``; ``None`` for zero.
        scale: s > 0, the inverse temperature.
        label_smoothing: e in [0, 1], the share of the target that is spread over all K classes.
        ignore_index: target of the samples to leave out.
        reduction: ``"mean"`` over the samples that are not ignored, ``"sum"`` or ``"none"``.
        chunk_size: classes of this rank whose logits exist at a time; ``None``: as many as keep the device
            busy.
        classes: ``(A,)``, ascending: the classes to choose among, the same on every rank, as in
            :func:`~etflayers.functional.code_cross_entropy`; a rank may have none of them. Default: all.

    Returns:
        A scalar, or ``(...)`` for ``"none"`` with 0 for ignored samples; float32 for half precision.
        If all samples are ignored the mean is 0 with a zero gradient.

    Raises:
        InvalidArgumentError: shapes, dtypes or options that do not fit, or targets out of range; on every
            rank, before any of them waits for another.
        RanksDisagreeError: the ranks have other targets than each other, or their classes are not all K.

    Reference:
        Shoeybi, Patwary, Puri, LeGresley, Casper, Catanzaro (2019), arXiv 1909.08053, section 3.

    >>> weight = torch.tensor([[1.0, 0.0], [-1.0, 0.0]])
    >>> shard = ClassShard.chunk(2)  # of a single process: all classes
    >>> class_parallel_cross_entropy(torch.tensor([[0.5, 9.0]]), weight[shard.rows], torch.tensor([0]), shard)
    tensor(0.3133)
    """
    require_floating("features", features.dtype)
    require_floating("local_weight", local_weight.dtype)
    if shard is None:
        shard = _shard_of(local_weight)
    weight, bias = local_part(local_weight), None if local_bias is None else local_part(local_bias)
    require(
        features.ndim >= 1 and weight.shape == (len(shard), features.shape[-1]),
        f"features and local_weight must have shapes (..., in_features) and ({len(shard)}, in_features) for "
        f"the classes {shard.start} to {shard.stop} of this rank, got {tuple(features.shape)} and "
        f"{tuple(weight.shape)}",
    )
    require(
        bias is None or bias.shape == (len(shard),),
        f"local_bias must have shape ({len(shard)},), one number for each class of this rank, "
        f"got {None if bias is None else tuple(bias.shape)}",
    )
    require_loss_options(scale, label_smoothing, reduction, chunk_size)
    if classes is not None:
        targets, ignore_index = _targets_among(targets, classes, shard, ignore_index)
        weight, bias, shard = _rows_among(weight, bias, classes, shard)
    dtype = linear_dtype(features.to(torch.promote_types(features.dtype, weight.dtype)))
    return _reduced_losses(
        features.to(dtype),
        weight.to(dtype),
        None if bias is None else bias.to(dtype),
        targets,
        shard,
        (scale, label_smoothing, chunk_size),
        ignore_index,
        reduction,
    )


def class_parallel_etf_cross_entropy(
    features: Tensor,
    targets: Tensor,
    shard: ClassShard,
    *,
    scale: float = 1.0,
    label_smoothing: float = 0.0,
    ignore_index: int = -100,
    reduction: Reduction = "mean",
    chunk_size: int | None = None,
    classes: Tensor | None = None,
) -> Tensor:
    r"""Cross-entropy of the canonical simplex ETF over the classes of all ranks: no rank has a weight.

    The logits are ``s c (f_{1:K} - mean(f_{1:K}))``, and a softmax does not see the mean. So a shard of the
    classes is a slice of the first K features. All else is as in :func:`class_parallel_cross_entropy`.

    Args:
        features: f, ``(..., d)`` with d >= K - 1, the same on every rank.
        targets: y, ``(...)``, integers in [0, K) or ``ignore_index``, the same on every rank.
        shard: which classes this rank has, K and the group.
        scale: as in :func:`class_parallel_cross_entropy`.
        label_smoothing: as in :func:`class_parallel_cross_entropy`.
        ignore_index: as in :func:`class_parallel_cross_entropy`.
        reduction: as in :func:`class_parallel_cross_entropy`.
        chunk_size: as in :func:`class_parallel_cross_entropy`.
        classes: as in :func:`class_parallel_cross_entropy`.

    Returns:
        As :func:`class_parallel_cross_entropy`.

    Raises:
        InvalidArgumentError: as :func:`class_parallel_cross_entropy`, or d < K - 1.
        RanksDisagreeError: as :func:`class_parallel_cross_entropy`.

    Reference:
        Shoeybi, Patwary, Puri, LeGresley, Casper, Catanzaro (2019), arXiv 1909.08053, section 3.

    >>> features = torch.tensor([[3.0, 0.0, 0.0, 7.0], [0.0, 1.0, 0.0, 0.0]])
    >>> class_parallel_etf_cross_entropy(features, torch.tensor([0, 0]), ClassShard.chunk(3))
    tensor(0.8683)
    """
    require_floating("features", features.dtype)
    require(features.ndim >= 1, "features must have shape (..., in_features), got a scalar")
    require_etf_dims(shard.num_classes, features.shape[-1])
    require_loss_options(scale, label_smoothing, reduction, chunk_size)
    if features.shape[-1] == shard.num_classes - 1:
        reflected = features.to(working_dtype(features.dtype)).unsqueeze(-1)
        features = centered_basis_adjoint(reflected).squeeze(-1)
    factor = scale * etf_radius(shard.num_classes)
    if classes is not None:
        targets, ignore_index = _targets_among(targets, classes, shard, ignore_index)
        features, shard = features.index_select(-1, classes), shard.among(classes)
    return _reduced_losses(
        features, None, None, targets, shard, (factor, label_smoothing, chunk_size), ignore_index, reduction
    )


def _targets_among(
    targets: Tensor, classes: Tensor, shard: ClassShard, ignore_index: int
) -> tuple[Tensor, int]:
    _refuse_soft(targets)
    return among_active(targets, classes, shard.num_classes, ignore_index)


def _rows_among(
    weight: Tensor, bias: Tensor | None, classes: Tensor, shard: ClassShard
) -> tuple[Tensor, Tensor | None, ClassShard]:
    """What this rank has of these classes."""
    part = shard.among(classes)
    own = classes[part.rows] - shard.start
    return weight.index_select(0, own), None if bias is None else bias.index_select(0, own), part


def _refuse_soft(targets: Tensor) -> None:
    require(
        not are_soft(targets),
        "targets must be integers (class indices): soft targets would be a matrix (B, K) of all classes, "
        "which no rank is to hold",
    )


def _reduced_losses(
    features: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    targets: Tensor,
    shard: ClassShard,
    options: tuple[float, float, int | None],
    ignore_index: int,
    reduction: Reduction,
) -> Tensor:
    _refuse_soft(targets)
    require(
        targets.shape == features.shape[:-1],
        f"targets must have the leading shape of features, {tuple(features.shape[:-1])}, "
        f"got {tuple(targets.shape)}",
    )
    labels = targets.flatten()
    ignored = ignored_targets(labels, shard.num_classes, ignore_index)
    rows = features.reshape(-1, features.shape[-1])
    losses = _losses(rows, weight, bias, labels.long(), ignored, shard, options)
    losses = reduced(losses, ignored, reduction)
    return losses.view(targets.shape) if reduction == "none" else losses


@leave_to_eager
def _losses(*arguments: Any) -> Tensor:
    losses: Tensor = _ClassParallelLosses.apply(*arguments)  # type: ignore[no-untyped-call]
    return losses


class _ClassParallelLosses(torch.autograd.Function):
    """With G the gradient in the products W_r f_i, that in W_r is G'F, and GW_r a part of that in F."""

    @staticmethod
    def forward(
        ctx: Any,
        features: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        targets: Tensor,
        ignored: Tensor,
        shard: ClassShard,
        options: tuple[float, float, int | None],
    ) -> Tensor:
        factor, smoothing, chunk_size = ctx.options = options
        dtype = working_dtype(features.dtype)
        with full_precision(features):
            logits = (
                (shard.start + part.start, z)
                for part, z in _logits(features, weight, bias, shard, chunk_size)
            )
            local = shard_sums(logits, targets, factor, dtype, deviations=smoothing > 0)
            if world_size(shard.process_group) > 1 and _debugging():
                _require_same_features(features, shard)
            shifts = _common_shifts(local.shifts, targets, shard)
            columns = [local.about(shifts, factor).exponentials, local.own]
            if smoothing > 0:
                columns.append(local.about(shifts, factor).deviations)
            exponentials, own, *deviations = _sums_over_ranks(columns, targets, ignored, shard)
            logs = exponentials.log()
            losses = logs - (1 - smoothing) * factor * (own - shifts)
            if smoothing > 0:
                losses = losses - smoothing * factor / shard.num_classes * deviations[0]
        ctx.shard = shard
        ctx.save_for_backward(features, weight, bias, targets, ignored, shifts, logs)
        return losses.masked_fill_(ignored, 0)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        require_first_derivative()
        features, weight, bias, targets, ignored, shifts, logs = ctx.saved_tensors
        factor, smoothing, chunk_size = ctx.options
        shard: ClassShard = ctx.shard
        needs_features, needs_weight, needs_bias = ctx.needs_input_grad[:3]
        # A sum over classes and ranks: in float32 for half precision.
        d_features = torch.zeros_like(features, dtype=shifts.dtype) if needs_features else None
        d_weight = torch.empty_like(weight) if needs_weight else None
        d_bias = torch.empty_like(bias) if needs_bias else None
        grad = grad.masked_fill(ignored, 0)
        with full_precision(features):
            for part, z in _logits(features, weight, bias, shard, chunk_size):
                first = shard.start + part.start
                change = shard_gradient(
                    z, first, targets, shifts, logs, grad, shard.num_classes, factor, smoothing
                )
                if d_features is not None and weight is None:
                    d_features[:, first : first + z.shape[-1]] = change
                elif d_features is not None:
                    d_features += change @ weight[part]
                if d_weight is not None:
                    d_weight[part] = change.mT @ features
                if d_bias is not None:
                    d_bias[part] = change.sum(0)
        if d_features is not None:
            d_features = sum_over_ranks(d_features, shard.process_group).to(features.dtype)
        return d_features, d_weight, d_bias, None, None, None, None


def _logits(
    features: Tensor, weight: Tensor | None, bias: Tensor | None, shard: ClassShard, chunk_size: int | None
) -> Iterator[tuple[slice, Tensor]]:
    """The logits ``(B, k)`` of some classes of this rank at a time, and where these are in the shard."""
    product = _product(features, weight, bias, shard)
    batch, width = features.shape
    for part in class_parts(batch, width, len(shard), features.device, chunk_size):
        yield part, product(part)


def _product(
    features: Tensor, weight: Tensor | None, bias: Tensor | None, shard: ClassShard
) -> Callable[[slice], Tensor]:
    if weight is None:
        own = features[:, shard.rows]
        return lambda part: own[:, part]
    if bias is None:
        return lambda part: features @ weight[part].mT
    return lambda part: torch.addmm(bias[part], features, weight[part].mT)


def _common_shifts(shifts: Tensor, targets: Tensor, shard: ClassShard) -> Tensor:
    """The largest shift over the ranks, and in the same collective a look whether all have the same targets.

    The largest of a number and the largest of its negative agree where it is one number. It is a sum of all
    targets, each times its place in the batch, in whole numbers that float32 holds.
    """
    place = torch.arange(1, len(targets) + 1, device=targets.device) % 8191
    key = ((targets % 8191 + 1) * place).sum() % 2**23
    both = torch.stack((key, -key)).to(shifts.dtype)
    largest = largest_over_ranks(torch.cat((shifts, both)), shard.process_group)
    require_values(
        largest[-2] == -largest[-1],
        "targets must be the same on every rank that shares the classes, and are not: give these ranks the "
        "same batches, in the same order (a DistributedSampler divides the data over the other dimension of "
        "a mesh)",
        RanksDisagreeError,
    )
    return largest[:-2]


def _sums_over_ranks(
    columns: list[Tensor], targets: Tensor, ignored: Tensor, shard: ClassShard
) -> tuple[Tensor, ...]:
    """Sums over the ranks, and in the same collective a count of classes and of samples with one of them.

    From a million on, counts in float32 are compared up to rounding.
    """
    mine = (targets >= shard.start) & (targets < shard.stop) & ~ignored
    counts = torch.stack((torch.full_like(mine.sum(), len(shard)), mine.sum())).to(columns[0].dtype)
    summed = sum_over_ranks(torch.cat((*columns, counts)), shard.process_group)
    classes, samples = summed[-2:]
    require_values(
        ((classes - shard.num_classes).abs() <= 1e-6 * shard.num_classes)
        & ((samples - (~ignored).sum()).abs() <= 1e-6 * len(targets)),
        f"the shards of the ranks must be all {shard.num_classes} classes, each on one rank: they are not "
        "(ClassShard.chunk divides them)",
        RanksDisagreeError,
    )
    return summed[:-2].view(len(columns), -1).unbind()


def _debugging() -> bool:
    """Whether ``TORCH_DISTRIBUTED_DEBUG`` asks for checks that cost time."""
    return bool(dist.get_debug_level() != dist.DebugLevel.OFF)  # type: ignore[attr-defined]


def _require_same_features(features: Tensor, shard: ClassShard) -> None:
    """Raise on every rank unless all have the same features, up to rounding: this waits for the device."""
    sizes = torch.tensor(features.shape, device=features.device)
    sizes = largest_over_ranks(torch.cat((sizes, -sizes)), shard.process_group)
    if not bool((sizes[:2] == -sizes[2:]).all()):
        raise RanksDisagreeError(
            "features must have the same shape on every rank that shares the classes, "
            f"got {tuple(features.shape)} here"
        )
    rows = torch.nan_to_num(features.to(working_dtype(features.dtype)))
    largest = largest_over_ranks(torch.stack((rows, -rows)), shard.process_group)
    gap, size = (largest[0] + largest[1]).amax(), largest.amax()
    if not bool(gap <= 1e-2 * size):
        raise RanksDisagreeError(
            "features must be the same on every rank that shares the classes, and differ by up to "
            f"{float(gap):.3g}: dropout and other random layers need the same seed on these ranks"
        )


def _shard_of(weight: Tensor) -> ClassShard:
    """The classes of this rank in a ``DTensor`` with a row for each class."""
    require(
        hasattr(weight, "device_mesh"),
        "shard must say which classes local_weight holds, because it is no DTensor: "
        "ClassShard.chunk(num_classes, process_group)",
    )
    mesh: Any = weight.device_mesh  # type: ignore[attr-defined]
    placements: Any = weight.placements  # type: ignore[attr-defined]
    require(
        mesh.ndim == 1 and placements[0].is_shard(0),
        f"local_weight must be sharded by rows over one mesh dimension, (Shard(0),), got {placements}",
    )
    return ClassShard.chunk(weight.shape[0], mesh.get_group())
