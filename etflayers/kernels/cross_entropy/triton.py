"""Losses of a scaled softmax in one pass over the rows, and their gradient in another; one launch each.

The derivation stands in ``api``. The forward pass reads a few rows a program, block of
columns by block of columns, with a running maximum and the sum of exponentials relative to it; nothing of the
size of the rows is written.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

__all__ = ["softmax_gradient", "softmax_losses"]


@triton.jit  # type: ignore[untyped-decorator]
def losses_kernel(  # type: ignore[no-untyped-def]
    rows,
    targets,
    losses,
    shifts,
    logs,
    row_stride,
    target_stride,
    batch,
    num_classes,
    ignore_index,
    factor,
    smoothing,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """The loss l of each row, its maximum m and the logarithm L."""
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    there = row < batch
    target = tl.load(targets + row.to(tl.int64) * target_stride, mask=there, other=0).to(tl.int64)
    kept = there & (target != ignore_index)
    valid = (target >= 0) & (target < num_classes)
    tl.device_assert(
        tl.max((kept & (valid == 0)).to(tl.int32), 0) == 0, "targets must be class indices or ignore_index"
    )
    first = rows + row.to(tl.int64) * row_stride
    # Differences to the first entry: for the mean under smoothing, a large common mean drops out.
    base = tl.load(first, mask=kept, other=0.0).to(tl.float32)
    shift = tl.full((ROWS,), float("-inf"), tl.float32)
    total = tl.zeros((ROWS,), tl.float32)
    level = tl.zeros((ROWS,), tl.float32)
    for start in range(0, num_classes, COLUMNS):
        columns = start + tl.arange(0, COLUMNS)
        inside = (columns < num_classes)[None, :]
        block = tl.load(first[:, None] + columns[None, :], mask=kept[:, None] & inside, other=0.0).to(
            tl.float32
        )
        level += tl.sum(tl.where(inside, block - base[:, None], 0.0), 1)
        block = tl.where(inside, block, float("-inf"))
        higher = tl.maximum(shift, tl.max(block, 1))
        total *= tl.exp(factor * (shift - higher))
        total += tl.sum(tl.exp(factor * (block - higher[:, None])), 1)
        shift = higher
    log = tl.log(total)
    own = tl.load(first + target, mask=kept & valid, other=0.0).to(tl.float32)
    loss = log - (1 - smoothing) * factor * (own - shift)
    loss -= smoothing * factor * (level / num_classes - (shift - base))
    tl.store(losses + row, tl.where(kept, loss, 0.0), mask=there)
    tl.store(shifts + row, shift, mask=there)
    tl.store(logs + row, log, mask=there)


@triton.jit  # type: ignore[untyped-decorator]
def gradient_kernel(  # type: ignore[no-untyped-def]
    rows,
    targets,
    shifts,
    logs,
    grad,
    gradient,
    row_stride,
    target_stride,
    grad_stride,
    batch,
    in_features,
    num_classes,
    ignore_index,
    factor,
    smoothing,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """Gradient in the rows for a cotangent of the losses: 0 in ignored rows and in the columns from K on."""
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    columns = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    there = row < batch
    target = tl.load(targets + row.to(tl.int64) * target_stride, mask=there, other=0).to(tl.int64)
    kept = there & (target != ignore_index)
    shift = tl.load(shifts + row, mask=kept, other=0.0)
    log = tl.load(logs + row, mask=kept, other=0.0)
    scale = factor * tl.load(grad + row.to(tl.int64) * grad_stride, mask=kept, other=0.0).to(tl.float32)
    inside = kept[:, None] & (columns < num_classes)[None, :]
    first = rows + row.to(tl.int64) * row_stride
    block = tl.load(first[:, None] + columns[None, :], mask=inside, other=0.0).to(tl.float32)
    change = tl.exp(factor * (block - shift[:, None]) - log[:, None]) - smoothing / num_classes
    change -= tl.where(columns[None, :] == target[:, None], 1 - smoothing, 0.0)
    change = tl.where(inside, change * scale[:, None], 0.0)
    place = gradient + row.to(tl.int64)[:, None] * in_features + columns[None, :]
    tl.store(
        place, change.to(gradient.dtype.element_ty), mask=there[:, None] & (columns < in_features)[None, :]
    )


def losses_blocks(num_classes: int) -> dict[str, int]:
    """Block sizes of the forward pass: few rows, for parallelism; columns that fit in registers."""
    columns = min(max(16, triton.next_power_of_2(num_classes)), 4096)
    return {"ROWS": min(max(1, 1024 // columns), 16), "COLUMNS": columns}


def gradient_blocks(in_features: int) -> dict[str, int]:
    """Block sizes of the backward pass, which is elementwise."""
    columns = min(max(16, triton.next_power_of_2(in_features)), 2048)
    return {"ROWS": min(max(1, 1024 // columns), 16), "COLUMNS": columns}


def warps(blocks: dict[str, int]) -> int:
    """Warps of a program: 16 entries a thread, not more than 8 warps."""
    return min(max(blocks["ROWS"] * blocks["COLUMNS"] // 512, 1), 8)


def _contiguous_rows(rows: Tensor) -> Tensor:
    return rows if rows.stride(1) == 1 else rows.contiguous()


@torch.library.custom_op("etflayers::softmax_losses", mutates_args=())
def softmax_losses(
    rows: Tensor, targets: Tensor, num_classes: int, factor: float, smoothing: float, ignore_index: int
) -> tuple[Tensor, Tensor, Tensor]:
    """The loss, maximum and logarithm of each row, ``(B,)`` float32; asserts that targets are valid."""
    batch = rows.shape[0]
    rows = _contiguous_rows(rows)
    losses, shifts, logs = (rows.new_empty(batch, dtype=torch.float32) for _ in range(3))
    blocks = losses_blocks(num_classes)
    if batch > 0:
        with torch.cuda.device_of(rows):  # type: ignore[no-untyped-call]
            losses_kernel[(triton.cdiv(batch, blocks["ROWS"]),)](
                rows,
                targets,
                losses,
                shifts,
                logs,
                rows.stride(0),
                targets.stride(0),
                batch,
                num_classes,
                ignore_index,
                factor,
                smoothing,
                **blocks,
                num_warps=warps(blocks),
                # Assertions exist only in debug mode; its checks of integer overflow are not wanted.
                debug=True,
                sanitize_overflow=False,
            )
    return losses, shifts, logs


@softmax_losses.register_fake
def _(
    rows: Tensor, targets: Tensor, num_classes: int, factor: float, smoothing: float, ignore_index: int
) -> tuple[Tensor, Tensor, Tensor]:
    losses, shifts, logs = (rows.new_empty(rows.shape[0], dtype=torch.float32) for _ in range(3))
    return losses, shifts, logs


@torch.library.custom_op("etflayers::softmax_gradient", mutates_args=())
def softmax_gradient(
    rows: Tensor,
    targets: Tensor,
    shifts: Tensor,
    logs: Tensor,
    grad: Tensor,
    num_classes: int,
    factor: float,
    smoothing: float,
    ignore_index: int,
) -> Tensor:
    """The gradient ``(B, d)`` in the rows, in their dtype, for a cotangent ``(B,)`` of the losses."""
    batch, in_features = rows.shape
    rows = _contiguous_rows(rows)
    gradient = rows.new_empty(batch, in_features)
    blocks = gradient_blocks(in_features)
    if batch > 0:
        grid = (triton.cdiv(batch, blocks["ROWS"]), triton.cdiv(in_features, blocks["COLUMNS"]))
        with torch.cuda.device_of(rows):  # type: ignore[no-untyped-call]
            gradient_kernel[grid](
                rows,
                targets,
                shifts,
                logs,
                grad,
                gradient,
                rows.stride(0),
                targets.stride(0),
                grad.stride(0),
                batch,
                in_features,
                num_classes,
                ignore_index,
                factor,
                smoothing,
                **blocks,
                num_warps=warps(blocks),
            )
    return gradient


@softmax_gradient.register_fake
def _(
    rows: Tensor,
    targets: Tensor,
    shifts: Tensor,
    logs: Tensor,
    grad: Tensor,
    num_classes: int,
    factor: float,
    smoothing: float,
    ignore_index: int,
) -> Tensor:
    return rows.new_empty(rows.shape)
