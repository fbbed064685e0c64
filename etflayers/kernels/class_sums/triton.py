"""Class sums, their adjoint, and the moving-average update: one launch each.

**No scatter.** A program owns one class and a block of columns, and is the only one to write them: no
atomics, so the same input gives the same bits. It reads all targets, a few at a time, and only the rows of
its class. A row is thus read once over the whole launch.

**From a mask to rows.** Which of the targets at hand are of the class is a mask; its running sum numbers them
1, 2, ... and does not decrease. So the place of the j-th is how many of the running sums are below j: a short
list of rows is a (rows x targets) comparison, summed. No list in memory, no sorting.

**Checks.** Each program knows whether what it read was finite and small enough to be summed. A device-side
assertion at its end says so without another launch; it is what the eager path asks
:func:`~etflayers._torch.assert_async` for.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from etflayers.kernels.class_sums.momentum import SMALLEST_STEP

__all__ = ["class_averages", "class_gather", "class_sums"]

# The moving average, by its momentum.
NO_UPDATE = tl.constexpr(0)
FIXED = tl.constexpr(1)
CUMULATIVE = tl.constexpr(2)
PUBLISHED = tl.constexpr(3)
_SMALLEST_STEP = tl.constexpr(SMALLEST_STEP)
UPDATES = {"fixed": 1, "cumulative": 2, "published": 3}

_TARGETS = 512  # read at a time, at most
_WARPS = 4  # of the gather


@triton.jit  # type: ignore[untyped-decorator]
def class_sums_kernel(  # type: ignore[no-untyped-def]
    features,
    targets,
    sums,
    counts,
    old_means,
    old_counts,
    old_updates,
    new_updates,
    steps,
    row_stride,
    target_stride,
    batch,
    in_features,
    num_classes,
    ignore_index,
    largest,
    momentum,
    UPDATE: tl.constexpr,
    CHECKED: tl.constexpr,
    TARGETS: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """Sums (or, with UPDATE, new means) of one class in a block of columns."""
    owner = tl.program_id(0)
    columns = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    inside = columns < in_features
    total = tl.zeros((COLUMNS,), tl.float32)
    too_large = tl.zeros((COLUMNS,), tl.int32)
    out_of_range = tl.zeros((TARGETS,), tl.int32)
    count = tl.zeros((), tl.int32)
    for start in range(0, batch, TARGETS):
        index = start + tl.arange(0, TARGETS)
        target = tl.load(targets + index.to(tl.int64) * target_stride, mask=index < batch, other=0).to(
            tl.int64
        )
        kept = (index < batch) & (target != ignore_index)
        out_of_range |= (kept & ((target < 0) | (target >= num_classes))).to(tl.int32)
        mine = (kept & (target == owner)).to(tl.int32)
        number = tl.cumsum(mine, 0)
        found = tl.sum(mine, 0)
        for first in range(0, found, ROWS):
            wanted = first + 1 + tl.arange(0, ROWS)
            row = start + tl.sum((number[None, :] < wanted[:, None]).to(tl.int32), 1)
            block = tl.load(
                features + row.to(tl.int64)[:, None] * row_stride + columns[None, :],
                mask=(wanted <= found)[:, None] & inside[None, :],
                other=0.0,
            ).to(tl.float32)
            total += tl.sum(block, 0)
            # In this form NaN counts as too large.
            too_large |= tl.max(1 - (tl.abs(block) <= largest).to(tl.int32), 0)
        count += found
    if CHECKED:
        # Every program has read all targets.
        tl.device_assert(tl.max(out_of_range, 0) == 0, "targets must be class indices or ignore_index")
        tl.device_assert(
            tl.max(too_large, 0) == 0, "features must be finite, and small enough to be summed over the batch"
        )

    place = owner.to(tl.int64) * in_features + columns
    first_block = tl.program_id(1) == 0
    if UPDATE == NO_UPDATE:
        tl.store(sums + place, total, mask=inside)
        tl.store(counts + owner, count.to(tl.int64), mask=first_block)
    else:
        # m <- m + a (mean of the batch - m): see ``momentum`` for the step a.
        seen = tl.load(old_counts + owner)
        updates = tl.load(old_updates + owner)
        here = count.to(tl.float32)
        present = (count > 0).to(tl.float32)
        if UPDATE == FIXED:
            step = tl.where(seen > 0, momentum, 1.0) * present
        elif UPDATE == CUMULATIVE:
            step = tl.div_rn(here, tl.maximum(seen + count, 1).to(tl.float32))
        else:
            step = tl.maximum(tl.div_rn(2.0, (updates + 2).to(tl.float32)), _SMALLEST_STEP) * present
        divisor = tl.maximum(here, 1.0)
        old = tl.load(old_means + place, mask=inside, other=0.0)
        batch_mean = tl.div_rn(total, tl.zeros_like(total) + divisor)
        tl.store(sums + place, old + step * (batch_mean - old), mask=inside)
        tl.store(counts + owner, seen + count, mask=first_block)
        tl.store(new_updates + owner, updates + (count > 0), mask=first_block)
        tl.store(steps + owner, tl.div_rn(step, divisor), mask=first_block)


@triton.jit  # type: ignore[untyped-decorator]
def class_gather_kernel(  # type: ignore[no-untyped-def]
    rows,
    targets,
    gathered,
    target_stride,
    batch,
    in_features,
    num_classes,
    ignore_index,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """The row of its class for each sample, 0 for ignored ones."""
    sample = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    columns = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    there = sample < batch
    inside = there[:, None] & (columns < in_features)[None, :]
    target = tl.load(targets + sample.to(tl.int64) * target_stride, mask=there, other=0).to(tl.int64)
    # A target out of range was asserted on already; until the assertion is seen it must read no foreign
    # memory.
    kept = there & (target != ignore_index) & (target >= 0) & (target < num_classes)
    block = tl.load(
        rows + target[:, None] * in_features + columns[None, :], mask=inside & kept[:, None], other=0.0
    )
    place = gathered + sample.to(tl.int64)[:, None] * in_features + columns[None, :]
    tl.store(place, block.to(gathered.dtype.element_ty), mask=inside)


def sums_blocks(batch: int, in_features: int, num_classes: int) -> dict[str, int]:
    """Block sizes: enough programs to fill a GPU, lists of rows about as long as a class is likely to be."""
    columns = min(max(triton.next_power_of_2(in_features * num_classes // 256), 32), 1024)
    columns = min(columns, max(16, triton.next_power_of_2(in_features)))
    targets = min(max(triton.next_power_of_2(batch), 32), _TARGETS)
    rows = min(max(triton.next_power_of_2(min(batch, targets) // num_classes + 1), 8), 64)
    return {"TARGETS": targets, "ROWS": min(rows, 8192 // columns), "COLUMNS": columns}


def sums_warps(blocks: dict[str, int]) -> int:
    """Warps of a program: enough that the comparison of rows with targets stays in registers."""
    return 8 if blocks["ROWS"] * blocks["TARGETS"] > 8192 else 4


def gather_blocks(in_features: int) -> dict[str, int]:
    """Block sizes of the gather: about 2048 numbers a program."""
    columns = min(max(16, triton.next_power_of_2(in_features)), 512)
    return {"ROWS": 2048 // columns, "COLUMNS": columns}


def _launch_sums(
    features: Tensor,
    targets: Tensor,
    sums: Tensor,
    counts: Tensor,
    *state: Tensor | None,
    num_classes: int,
    ignore_index: int,
    momentum: float,
    update: int,
    checked: bool,
) -> None:
    batch, in_features = features.shape
    features = features if features.stride(1) == 1 else features.contiguous()
    blocks = sums_blocks(batch, in_features, num_classes)
    grid = (num_classes, triton.cdiv(in_features, blocks["COLUMNS"]))
    with torch.cuda.device_of(features):  # type: ignore[no-untyped-call]
        class_sums_kernel[grid](
            features,
            targets,
            sums,
            counts,
            *state,
            features.stride(0),
            targets.stride(0),
            batch,
            in_features,
            num_classes,
            ignore_index,
            torch.finfo(torch.float32).max / (2 * max(batch, 1)),
            momentum,
            UPDATE=update,
            CHECKED=checked,
            **blocks,
            num_warps=sums_warps(blocks),
            # Assertions exist only in debug mode; its checks of integer overflow are not wanted.
            debug=checked,
            sanitize_overflow=False,
        )


@torch.library.custom_op("etflayers::class_sums", mutates_args=())
def class_sums(
    features: Tensor, targets: Tensor, num_classes: int, ignore_index: int, checked: bool
) -> tuple[Tensor, Tensor]:
    """Sums ``(K, d)`` float32 and counts ``(K,)`` int64; ``checked``: whether to assert on values."""
    sums = features.new_empty(num_classes, features.shape[1], dtype=torch.float32)
    counts = features.new_empty(num_classes, dtype=torch.int64)
    _launch_sums(
        features,
        targets,
        sums,
        counts,
        None,
        None,
        None,
        None,
        None,
        num_classes=num_classes,
        ignore_index=ignore_index,
        momentum=0.0,
        update=0,
        checked=checked,
    )
    return sums, counts


@class_sums.register_fake
def _(
    features: Tensor, targets: Tensor, num_classes: int, ignore_index: int, checked: bool
) -> tuple[Tensor, Tensor]:
    sums = features.new_empty(num_classes, features.shape[1], dtype=torch.float32)
    return sums, features.new_empty(num_classes, dtype=torch.int64)


@torch.library.custom_op("etflayers::class_gather", mutates_args=())
def class_gather(rows: Tensor, targets: Tensor, ignore_index: int, dtype: torch.dtype) -> Tensor:
    """``(B, d)``: the row of ``rows`` ``(K, d)`` of the class of each sample, 0 for ignored ones."""
    num_classes, in_features = rows.shape
    batch = targets.shape[0]
    gathered = rows.new_empty(batch, in_features, dtype=dtype)
    blocks = gather_blocks(in_features)
    grid = (triton.cdiv(batch, blocks["ROWS"]), triton.cdiv(in_features, blocks["COLUMNS"]))
    if batch > 0:
        with torch.cuda.device_of(rows):  # type: ignore[no-untyped-call]
            class_gather_kernel[grid](
                rows.contiguous(),
                targets,
                gathered,
                targets.stride(0),
                batch,
                in_features,
                num_classes,
                ignore_index,
                **blocks,
                num_warps=_WARPS,
            )
    return gathered


@class_gather.register_fake
def _(rows: Tensor, targets: Tensor, ignore_index: int, dtype: torch.dtype) -> Tensor:
    return rows.new_empty(targets.shape[0], rows.shape[1], dtype=dtype)


@torch.library.custom_op("etflayers::class_averages", mutates_args=())
def class_averages(
    features: Tensor,
    targets: Tensor,
    means: Tensor,
    counts: Tensor,
    updates: Tensor,
    ignore_index: int,
    momentum: float,
    schedule: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """New means, counts and updates after a batch, and the weight of a sample in its mean, ``a_k / n_k``."""
    new_means, new_counts, new_updates = (
        torch.empty_like(old, memory_format=torch.contiguous_format) for old in (means, counts, updates)
    )
    steps = torch.empty_like(counts, dtype=torch.float32)
    _launch_sums(
        features,
        targets,
        new_means,
        new_counts,
        means.contiguous(),
        counts.contiguous(),
        updates.contiguous(),
        new_updates,
        steps,
        num_classes=means.shape[0],
        ignore_index=ignore_index,
        momentum=momentum,
        update=UPDATES[schedule],
        checked=True,
    )
    return new_means, new_counts, new_updates, steps


@class_averages.register_fake
def _(
    features: Tensor,
    targets: Tensor,
    means: Tensor,
    counts: Tensor,
    updates: Tensor,
    ignore_index: int,
    momentum: float,
    schedule: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    new_means, new_counts, new_updates = (
        torch.empty_like(old, memory_format=torch.contiguous_format) for old in (means, counts, updates)
    )
    return new_means, new_counts, new_updates, torch.empty_like(counts, dtype=torch.float32)
