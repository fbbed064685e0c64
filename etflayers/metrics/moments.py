r"""Streaming moments of the features of each class: one pass, mergeable, without cancellation.

Neural-collapse metrics need, for each class k, the count n_k, the mean m_k, the sum of squared deviations
and, pooled or by class, the scatter matrix ``sum (h - m_k)(h - m_k)'``. The mean is known only at the end,
and the textbook ``sum hh' - n mm'`` loses every digit when the mean is large. Deviations are therefore taken
from a *shift* c_k, the mean of the class in the batch where it first occurs, which is never far:

    r = h - c_k,    s_k = sum r,    q_k = sum |r|^2,    S = sum r r'.

**Change of shift.** With delta_k = c_k - c'_k, every r grows by delta_k, so

    s'_k = s_k + n_k delta_k,                   q'_k = q_k + <s_k + s'_k, delta_k>,
    S' = S + sum_k (a_k delta_k' + delta_k a_k'),      a_k = s_k + n_k delta_k / 2.

The shift ``c'_k = c_k + s_k / n_k`` is the mean and makes the sums central. Two sets of moments with the same
shift are added number by number: that is the merge, exact whatever the order.

**Precision.** A shift is a float32 number, so ``h - c`` of a float32 feature is rounded once, relative to
itself. Products run in the working precision of the features (float32 for half precisions) on these small
numbers; everything that is kept is float64. Only the upper block triangle of the pooled S is computed. The
scatter of single classes is computed in float64: its null space has to stay one.

"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from etflayers.checks import reads_values, require, require_finite, require_floating
from etflayers.errors import InvalidArgumentError
from etflayers.functional.class_means import require_target_for_each, some_ignored
from etflayers.precision import full_precision, working_dtype

__all__ = [
    "ClassMoments",
    "Scatter",
    "merge_moments",
    "recentered",
    "update_moments",
    "zero_moments",
]

Scatter = Literal["pooled", "per_class", "none"]

_BLOCK = 64  # columns at a time: small enough to skip most of the lower triangle, large enough for a product


class ClassMoments(NamedTuple):
    """Moments about a shift, all float64; views of one vector, so that they travel together.

    Attributes:
        counts: n, ``(K,)``.
        shift: c, ``(K, d)``, float32 numbers.
        sums: s, ``(K, d)``.
        squares: q, ``(K,)``.
        scatter: S, ``(d, d)`` pooled (upper block triangle; the rest is zero), ``(K, d, d)`` by class, or
            ``(0,)`` where it is not kept.
    """

    counts: Tensor
    shift: Tensor
    sums: Tensor
    squares: Tensor
    scatter: Tensor

    @property
    def means(self) -> Tensor:
        """The class means, ``(K, d)``; zero rows for classes not seen."""
        return self.shift + self.sums / self.counts.clamp(min=1).unsqueeze(-1)


def moments_size(num_classes: int, in_features: int, scatter: Scatter) -> int:
    """Number of float64 values that the moments take."""
    matrices = {"none": 0, "pooled": 1, "per_class": num_classes}
    require(
        scatter in matrices,
        f"scatter must be 'pooled', 'per_class' or 'none', got {scatter!r}: see update_moments",
    )
    require(num_classes >= 2, f"num_classes must be at least 2, got {num_classes}")
    require(in_features >= 1, f"in_features must be at least 1, got {in_features}")
    return 2 * num_classes * (1 + in_features) + matrices[scatter] * in_features**2


def unpack_moments(vector: Tensor, num_classes: int, in_features: int, scatter: Scatter) -> ClassMoments:
    """The moments as views of the vector that holds them."""
    k, d = num_classes, in_features
    counts, shift, sums, squares, matrices = torch.split(
        vector, [k, k * d, k * d, k, vector.numel() - 2 * k * (1 + d)]
    )
    shape = {"none": (0,), "pooled": (d, d), "per_class": (k, d, d)}[scatter]
    return ClassMoments(counts, shift.view(k, d), sums.view(k, d), squares, matrices.view(shape))


def zero_moments(
    num_classes: int,
    in_features: int,
    *,
    scatter: Scatter = "pooled",
    device: torch.device | str | None = None,
) -> ClassMoments:
    """The moments of no sample at all.

    Args:
        num_classes: K >= 2.
        in_features: d.
        scatter: ``"pooled"`` keeps one d x d matrix, ``"per_class"`` one for each class (for
            :func:`~etflayers.metrics.numerical_rank`; K d^2 numbers), ``"none"`` only traces, which is all
            that the quotient and the class-distance normalized variance need.
        device: of the moments.

    Returns:
        Moments to be updated in place.

    Raises:
        InvalidArgumentError: K < 2, d < 1 or an unknown ``scatter``.

    >>> zero_moments(3, 2).means
    tensor([[0., 0.],
            [0., 0.],
            [0., 0.]], dtype=torch.float64)
    """
    size = moments_size(num_classes, in_features, scatter)
    vector = torch.zeros(size, dtype=torch.float64, device=device)
    return unpack_moments(vector, num_classes, in_features, scatter)


@torch.no_grad()
def update_moments(
    moments: ClassMoments, features: Tensor, targets: Tensor, *, ignore_index: int = -100
) -> None:
    r"""Add ``sum r``, ``sum |r|^2`` and ``sum r r'``, r = h - c_y, over a batch, in place.

    Args:
        moments: changed in place, and not at all if an argument is refused.
        features: h, ``(B, d)``, finite where not ignored.
        targets: y, ``(B,)``, integers in [0, K) or ``ignore_index``.
        ignore_index: target of the samples to leave out.

    Raises:
        InvalidArgumentError: shapes or dtypes that do not fit, targets out of range.
        NonFiniteError: NaN, infinity, or features so large that their squares overflow.

    >>> moments = zero_moments(2, 1)
    >>> update_moments(moments, torch.tensor([[1.0], [3.0], [7.0]]), torch.tensor([0, 0, 1]))
    >>> moments.means
    tensor([[2.],
            [7.]], dtype=torch.float64)
    """
    num_classes, in_features = moments.shift.shape
    require_features(features, targets, in_features)
    ignored = some_ignored(targets, num_classes, ignore_index)
    add_batch(moments, features, targets.long(), ignored)


def add_batch(moments: ClassMoments, features: Tensor, classes: Tensor, ignored: Tensor | None) -> None:
    """:func:`update_moments` for who has checked shapes and targets.

    Args:
        moments: changed in place, and not at all if an argument is refused.
        features: h, ``(B, d)``, finite where not ignored.
        classes: y, ``(B,)`` int64, in [0, K) where not ignored.
        ignored: ``(B,)`` bool, or ``None`` where nothing is.

    Raises:
        NonFiniteError: NaN, infinity, or features so large that their squares overflow.
    """
    num_classes, in_features = moments.shift.shape
    by_class = moments.scatter.ndim == 3
    rows = features.detach().to(torch.float64 if by_class else working_dtype(features.dtype))
    index = classes if ignored is None else torch.where(ignored, 0, classes)
    ones = moments.counts.new_ones(len(rows)) if ignored is None else (~ignored).double()
    added = torch.zeros_like(moments.counts).index_add_(0, index, ones)

    # Of a large K a batch holds few classes: nothing below then makes K x d numbers, which takes seconds.
    many = num_classes > len(rows)
    shift = (moments.shift if many else moments.shift.to(rows.dtype)).index_select(0, index)
    started = None
    if _some_start(moments.counts, added):
        first = _batch_means(rows, index, ignored, added)
        new = ((moments.counts == 0) & (added > 0)).index_select(0, index)
        shift = torch.where(new.unsqueeze(-1), first, shift)
        started = shift.to(torch.float64, copy=True)
    residuals = _residuals(rows, shift.to(rows.dtype), ignored)
    squares = torch.linalg.vector_norm(residuals, dim=1).double().square_()
    # One number for each row tells whether its d numbers are finite.
    require_finite(
        squares,
        "features must be finite: look for an overflow (a learning rate too high, fp16 without loss scaling) "
        "in what produced them",
    )

    # Nothing has been changed up to here.
    if started is not None:
        moments.shift.index_copy_(0, index, started)  # the same for all samples of a class
    moments.counts.add_(added)
    moments.squares.index_add_(0, index, squares)
    # In the order of the samples on a CPU; on CUDA under torch.use_deterministic_algorithms(True) too.
    if many:
        moments.sums.index_add_(0, index, residuals.double())
    else:
        sums = rows.new_zeros(num_classes, in_features).index_add_(0, index, residuals)
        moments.sums.add_(sums)
    with full_precision(residuals):
        if moments.scatter.ndim == 2:
            _add_gram(moments.scatter, residuals)
        elif by_class:
            for k in torch.unique(index).tolist():
                members = residuals[index == k]
                moments.scatter[k].add_(members.mT @ members)


def recentered(moments: ClassMoments, shift: Tensor | None = None) -> ClassMoments:
    """The same moments about another shift, by default about the class means.

    Args:
        moments: left as they are.
        shift: c', ``(K, d)`` float64; of classes not seen it does not matter.

    Returns:
        New moments; the pooled scatter is complete (both triangles).
    """
    new = moments.means if shift is None else shift
    delta = moments.shift - new
    weighted = moments.counts.unsqueeze(-1) * delta
    sums = moments.sums + weighted
    squares = moments.squares + ((moments.sums + sums) * delta).sum(-1)
    half = moments.sums + weighted / 2
    scatter = moments.scatter
    if scatter.ndim == 2:
        cross = half.mT @ delta
        scatter = scatter.triu() + scatter.triu(1).mT + (cross + cross.mT)
    elif scatter.ndim == 3:
        cross = half.unsqueeze(-1) * delta.unsqueeze(-2)
        scatter = scatter + cross + cross.mT
    return ClassMoments(moments.counts, new, sums, squares.clamp(min=0), scatter)


def merge_moments(parts: Sequence[ClassMoments]) -> ClassMoments:
    """The moments of all samples from those of disjoint parts, about the common means.

    Args:
        parts: at least one, of equal shapes.

    Returns:
        New moments, not views of one vector.

    >>> parts = [zero_moments(2, 1), zero_moments(2, 1)]
    >>> update_moments(parts[0], torch.tensor([[1.0]]), torch.tensor([0]))
    >>> update_moments(parts[1], torch.tensor([[3.0]]), torch.tensor([0]))
    >>> merged = merge_moments(parts)
    >>> merged.means[0], merged.squares[0]
    (tensor([2.], dtype=torch.float64), tensor(2., dtype=torch.float64))
    """
    counts = torch.stack([part.counts for part in parts]).sum(0)
    # Not sums of features, which would cancel: the mean of class k is a weighted mean of means.
    share = [(part.counts / counts.clamp(min=1)).unsqueeze(-1) for part in parts]
    means = torch.stack([w * part.means for w, part in zip(share, parts, strict=True)]).sum(0)
    shift = means.float().double()
    moved = [recentered(part, shift) for part in parts]
    return ClassMoments(
        counts,
        shift,
        torch.stack([part.sums for part in moved]).sum(0),
        torch.stack([part.squares for part in moved]).sum(0),
        _upper(sum((part.scatter for part in moved[1:]), moved[0].scatter)),
    )


def merge_classes(moments: ClassMoments, groups: Tensor, num_groups: int) -> ClassMoments:
    """The moments of unions of classes, about the means of the unions.

    Args:
        moments: of K classes, with a pooled scatter or none.
        groups: the union that each class belongs to, ``(K,)``, in [0, num_groups).
        num_groups: G; a union may be empty.

    Returns:
        New moments of G classes, not views of one vector.

    >>> moments = zero_moments(3, 1)
    >>> update_moments(moments, torch.tensor([[1.0], [3.0], [7.0]]), torch.tensor([0, 1, 2]))
    >>> union = merge_classes(moments, torch.tensor([0, 0, 1]), 2)
    >>> union.means.flatten(), union.squares
    (tensor([2., 7.], dtype=torch.float64), tensor([2., 0.], dtype=torch.float64))
    """
    require(moments.scatter.ndim < 3, "scatter must be 'pooled' or 'none': unions of matrices are not kept")
    counts = moments.counts.new_zeros(num_groups).index_add_(0, groups, moments.counts)
    shares = (moments.counts / counts.clamp(min=1)[groups]).unsqueeze(-1)
    rows = moments.shift.new_zeros(num_groups, moments.shift.shape[1])
    shift = rows.index_add(0, groups, shares * moments.means)
    # About the mean of its union the moments of a class are those of a part of it, and add.
    moved = recentered(moments, shift[groups])
    return ClassMoments(
        counts,
        shift,
        rows.index_add(0, groups, moved.sums),
        torch.zeros_like(counts).index_add_(0, groups, moved.squares),
        _upper(moved.scatter),
    )


def merge_packed(vectors: Tensor, *, num_classes: int, in_features: int, scatter: Scatter) -> Tensor:
    """:func:`merge_moments` of the rows of ``(parts, size)``, packed again: a torchmetrics reduction."""
    parts = [unpack_moments(vector, num_classes, in_features, scatter) for vector in vectors]
    return torch.cat([field.reshape(-1) for field in merge_moments(parts)])


def require_features(features: Tensor, targets: Tensor, in_features: int) -> None:
    """Raise unless features are real floating-point ``(B, in_features)`` and targets ``(B,)``."""
    require_floating("features", features.dtype)
    if features.ndim != 2 or features.shape[1] != in_features:
        raise InvalidArgumentError(
            f"features must have shape (B, in_features) = (B, {in_features}), got {tuple(features.shape)}: "
            "flatten or average the other dimensions"
        )
    require_target_for_each(features, targets)


def _some_start(counts: Tensor, added: Tensor) -> bool:
    """Whether a class has its first samples here; true where only a wait for a device could tell."""
    if not reads_values(counts):
        return True
    # After the first batches all classes have been seen, and one operation tells.
    return not bool(counts.all()) and bool(((counts == 0) & (added > 0)).any())


def _residuals(rows: Tensor, shift: Tensor, ignored: Tensor | None) -> Tensor:
    """``h - c_y``, in the place of c_y; zero for ignored rows, which may hold anything, NaN too."""
    residuals = torch.sub(rows, shift, out=shift)
    return residuals if ignored is None else residuals.masked_fill_(ignored.unsqueeze(-1), 0)


def _batch_means(rows: Tensor, index: Tensor, ignored: Tensor | None, counts: Tensor) -> Tensor:
    """For each row the mean of its class in the batch as float32 numbers; anything for a class without rows.

    Taken about the first sample of the class: of identical samples it is then that sample, exactly.
    """
    position = torch.arange(len(rows), device=rows.device)
    if ignored is not None:
        position = torch.where(ignored, len(rows), position)
    first = index.new_full((len(counts),), len(rows)).scatter_reduce_(0, index, position, "amin")
    first = first.index_select(0, index).clamp(max=len(rows) - 1)
    shift = rows.index_select(0, first).float()
    residuals = _residuals(rows, shift.to(rows.dtype, copy=True), ignored).double()
    sums = torch.zeros_like(residuals).index_add_(0, first, residuals)
    members = counts.index_select(0, index).clamp(min=1).unsqueeze(-1)
    return (shift + sums.index_select(0, first) / members).float().to(rows.dtype)


def _add_gram(total: Tensor, rows: Tensor) -> None:
    """Add the upper block triangle of R'R, little more than half of the product."""
    for start in range(0, rows.shape[1], _BLOCK):
        columns = slice(start, start + _BLOCK)
        # Widened first: to a part of a matrix PyTorch adds numbers of another dtype more slowly on a CPU.
        total[columns, start:].add_((rows[:, columns].mT @ rows[:, start:]).double())


def _upper(scatter: Tensor) -> Tensor:
    return scatter.triu() if scatter.ndim == 2 else scatter
