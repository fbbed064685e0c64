"""The nearest frame and its adjoint for up to 32 classes: one program for each problem.

The mathematics is that of ``kernels.polar.reference``, with what a program can do and a sequence of launches
cannot: it looks at its own values. The iteration is the cubic one, p(x) = x (3 - x^2) / 2 at a x with
a^2 = 3 / (1 + l + l^2), the best for singular values in [l, 1] (see ``solvers.newton_schulz``), in three
products instead of four; l is the better of what the steps so far guarantee and of what trace and Frobenius
norm of T tell (Wolkowicz and Styan 1980), so that means near collapse take few steps. As there, l is never
taken below 0.1, or some large values would be sent down to l.

One launch each way does the work. A second one on the way there completes frames of deficient rank; it
returns at once where there are none, and leaves the first one its registers.

All products are of float64 tiles, which go to the tensor cores of GPUs for data centers; 32 classes fit in
registers.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

__all__ = ["fused_polar", "fused_polar_adjoint"]

_LOW = tl.constexpr(0.1)
_NEAR = tl.constexpr(0.986)
_CUTOFF = tl.constexpr(1e-6)
# Root of the smallest float32 normal, to the power 3/4, over the cutoff, and that squared.
_FLOOR = tl.constexpr(9e-46)
# Sum of the squares of 1 - t over the eigenvalues t of T: each below 8e-4 if all directions are present,
# about 1 for one that is not.
_COMPLETE = tl.constexpr(0.1)
# eps |T^+|^2 above which the rounding of the Gram matrix shows in float32.
_ROUNDED = tl.constexpr(1e-9)
_FRAME_ERROR = tl.constexpr(1e-8)  # of W W'/c^2, squared and relative to K


@triton.jit
def _product(a, b, once):  # type: ignore[no-untyped-def]
    """a @ b; ``once`` is 1, but not to the compiler.

    A product that feeds another in the same block of code gets a layout in which each warp holds whole rows
    of its result, many times over for small matrices. In a block of its own it is spread over all warps, and
    32 x 32 products fit in registers.
    """
    result = tl.zeros((a.shape[0], b.shape[1]), tl.float64)
    for _ in range(once):
        result = tl.dot(a, b, result, input_precision="ieee", out_dtype=tl.float64)
    return result


@triton.jit
def _total(x):  # type: ignore[no-untyped-def]
    return tl.sum(tl.sum(x, 1), 0)


@triton.jit
def _bounds(matrix, identity, n):  # type: ignore[no-untyped-def]
    """Mean of n eigenvalues, and how far the extreme ones can lie from it, by trace and Frobenius norm."""
    mean = _total(matrix * identity) / n
    variance = tl.maximum(_total(matrix * matrix) / n - mean * mean, 0.0)
    return mean, tl.sqrt(variance * (n - 1))


@triton.jit
def _scale(low):  # type: ignore[no-untyped-def]
    """The factor a of a step for singular values in [low, 1], and what it makes of ``low``."""
    end = tl.maximum(low, _LOW)
    # Near 1, the step whose error is the square of the error before it.
    scale = tl.where(low < _NEAR, tl.sqrt(3.0 / (1.0 + end + end * end)), 1.0)
    return scale, 0.5 * scale * low * (3.0 - scale * scale * low * low)


@triton.jit  # type: ignore[untyped-decorator]
def _lowest(product, identity, SIZE: tl.constexpr):  # type: ignore[no-untyped-def]
    """A lower bound of the singular values whose squares are the eigenvalues of T."""
    mean, spread = _bounds(product, identity, SIZE)
    return tl.sqrt(tl.minimum(tl.maximum(mean - spread, 0.0), 1.0))


@triton.jit  # type: ignore[untyped-decorator]
def _inverse_root(gram, identity, once, SIZE: tl.constexpr):  # type: ignore[no-untyped-def]
    """Y, Z, T = ZY, the projector on the directions present, and whether some are absent."""
    root = gram
    inverse = identity
    product = gram
    present = identity
    deficient = tl.zeros((), tl.int32)
    low = tl.maximum(_lowest(product, identity, SIZE), _CUTOFF)
    left_over = 4
    while left_over > 0:
        # Not `low >= _NEAR`: with NaN that would never end.
        if tl.where(low < _NEAR, 0, left_over) == 4:
            left_over = 3
            if _total((identity - product) * (identity - product)) > _COMPLETE:
                # As in the reference.
                deficient += 1
                present = product
                for _ in range(4):
                    squared = _product(present, present, once)
                    present = 3.0 * squared - 2.0 * _product(squared, present, once)
                present = _product(tl.trans(present), present, once)
                root = _product(root, present, once)
                inverse = _product(_product(present, inverse, once), present, once)
                product = _product(inverse, root, once)
        scale, guaranteed = _scale(low)
        left_over -= tl.where(left_over < 4, 1, 0)
        step = 1.5 * scale * identity - 0.5 * scale * scale * scale * product
        root = _product(root, step, once)
        inverse = _product(step, inverse, once)
        product = _product(inverse, root, once)
        low = tl.maximum(_lowest(product, identity, SIZE), guaranteed)
    return root, inverse, product, present, deficient


@triton.jit
def _rest(gram, identity, valid, classes):  # type: ignore[no-untyped-def]
    """I - W W'/c^2, after a check that it is near 11'/K: W + (C - W W'/c^2) W / 2 is the better frame."""
    rest = tl.where(valid, identity - gram * (1.0 - 1.0 / classes), 0.0)
    off = tl.where(valid, rest - 1.0 / classes, 0.0)
    tl.device_assert(_total(off * off) < classes * _FRAME_ERROR, "the nearest simplex ETF was not found")
    return rest


@triton.jit
def _generic(rows, columns, num_classes, in_features):  # type: ignore[no-untyped-def]
    """Like random numbers in (-1/2, 1/2), as in the reference; zero outside."""
    row = rows.to(tl.float64) + 2.718281828459045
    column = columns.to(tl.float64) + 3.141592653589793
    x = (row * row)[:, None] * (column * column)[None, :]
    inside = (rows < num_classes)[:, None] & (columns < in_features)[None, :]
    return tl.where(inside, x - tl.floor(x) - 0.5, 0.0)


@triton.jit
def _store(matrix, block, rows, columns, num_classes, in_features):  # type: ignore[no-untyped-def]
    inside = (rows < num_classes)[:, None] & (columns < in_features)[None, :]
    place = rows[:, None].to(tl.int64) * in_features + columns[None, :]
    tl.store(matrix + place, block.to(tl.float32).to(matrix.dtype.element_ty), mask=inside)


@triton.jit
def _centered_block(matrix, rows, columns, num_classes, in_features):  # type: ignore[no-untyped-def]
    """C times a block of columns, in float64; zero outside."""
    inside = (rows < num_classes)[:, None] & (columns < in_features)[None, :]
    place = rows[:, None].to(tl.int64) * in_features + columns[None, :]
    block = tl.load(matrix + place, mask=inside, other=0.0).to(tl.float64)
    first = tl.load(matrix + columns, mask=columns < in_features, other=0.0).to(tl.float64)
    block = tl.where(inside, block - first[None, :], 0.0)
    return tl.where(inside, block - (tl.sum(block, 0) / num_classes)[None, :], 0.0)


@triton.jit  # type: ignore[untyped-decorator]
def polar_kernel(  # type: ignore[no-untyped-def]
    linear,
    frame,
    inverse_out,
    root_out,
    deficient_out,
    num_classes,
    in_features,
    SIZE: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """c^2 T^+ and T of one problem, W of the directions that are present, and whether some are not."""
    problem = tl.program_id(0).to(tl.int64)
    once = tl.minimum(num_classes, 1)
    linear += problem * num_classes * in_features
    frame += problem * num_classes * in_features
    inverse_out += problem * num_classes * num_classes
    root_out += problem * num_classes * num_classes
    rows = tl.arange(0, SIZE)
    offsets = tl.arange(0, COLUMNS)
    identity = tl.where(rows[:, None] == rows[None, :], 1.0, 0.0).to(tl.float64)
    valid = (rows < num_classes)[:, None] & (rows < num_classes)[None, :]
    classes = tl.zeros((), tl.float64) + num_classes
    square = classes / (classes - 1.0)
    radius = tl.sqrt(square)

    gram = tl.zeros((SIZE, SIZE), tl.float64)
    for start in range(0, in_features, COLUMNS):
        block = _centered_block(linear, rows, start + offsets, num_classes, in_features)
        gram += _product(block, tl.trans(block), once)

    # The null direction 1 and the rows beyond K get the mean of the other eigenvalues.
    mean, spread = _bounds(gram, identity, classes - 1.0)
    size = tl.maximum((mean + spread) * (1.0 + 1e-13), _FLOOR)
    filling = tl.where(mean > 0.0, mean / size, 1.0)
    gram = gram / size + tl.where(valid, filling / classes, filling * identity)
    root, inverse, product, present, deficient = _inverse_root(gram, identity, once, SIZE)
    error = _total((present - product) * (present - product))
    tl.device_assert(
        error < _FRAME_ERROR, "the nearest simplex ETF was not found: NaN or infinity in the means?"
    )
    size = tl.sqrt(size)
    # Where the rounding of the Gram matrix shows, one sweep more (but not in what is yet to be completed).
    rounded = (2e-16 * _total(inverse * inverse) > _ROUNDED) & (deficient == 0)
    root = tl.where(valid, root * (radius * size), 0.0)
    inverse = tl.where(valid, inverse * tl.where(mean > 0.0, radius / size, 0.0), 0.0)
    corner = rows[:, None] * num_classes + rows[None, :]
    tl.store(inverse_out + corner, inverse, mask=valid)
    tl.store(root_out + corner, root, mask=valid)
    tl.store(deficient_out + problem, deficient)

    left = inverse
    sweep = tl.where(rounded, 0, 1)
    while sweep < 2:
        gram = tl.zeros((SIZE, SIZE), tl.float64)
        for start in range(0, in_features, COLUMNS):
            columns = start + offsets
            block = _product(left, _centered_block(linear, rows, columns, num_classes, in_features), once)
            if sweep == 0:
                gram += _product(block, tl.trans(block), once)
            else:
                _store(frame, block, rows, columns, num_classes, in_features)
        if sweep == 0:
            left += 0.5 * _product(_rest(gram, identity, valid, classes), left, once)
        sweep += 1


@triton.jit  # type: ignore[untyped-decorator]
def polar_completion_kernel(  # type: ignore[no-untyped-def]
    linear,
    frame,
    inverse_in,
    root_in,
    deficient_in,
    num_classes,
    in_features,
    SIZE: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """The rows that W of one problem lacks; returns at once if it lacks none."""
    problem = tl.program_id(0).to(tl.int64)
    once = tl.minimum(num_classes, 1)
    if tl.load(deficient_in + problem) != 0:
        linear += problem * num_classes * in_features
        frame += problem * num_classes * in_features
        rows = tl.arange(0, SIZE)
        offsets = tl.arange(0, COLUMNS)
        identity = tl.where(rows[:, None] == rows[None, :], 1.0, 0.0).to(tl.float64)
        valid = (rows < num_classes)[:, None] & (rows < num_classes)[None, :]
        classes = tl.zeros((), tl.float64) + num_classes
        square = classes / (classes - 1.0)
        corner = problem * num_classes * num_classes + rows[:, None] * num_classes + rows[None, :]
        # W = left M_c + right N_0.
        left = tl.load(inverse_in + corner, mask=valid, other=0.0)
        absent = _product(left, tl.load(root_in + corner, mask=valid, other=0.0), once)
        absent = tl.where(valid, identity, 0.0) - absent / square
        # Without 1, which is among them if all means coincide.
        absent = tl.where(valid, absent - (tl.sum(absent, 0) / classes)[None, :], 0.0)

        overlap = tl.zeros((SIZE, SIZE), tl.float64)
        gram = tl.zeros((SIZE, SIZE), tl.float64)
        for start in range(0, in_features, COLUMNS):
            columns = start + offsets
            block = _product(left, _centered_block(linear, rows, columns, num_classes, in_features), once)
            generic = _generic(rows, columns, num_classes, in_features)
            overlap += _product(generic, tl.trans(block), once)
            gram += _product(generic, tl.trans(generic), once)
        size = tl.sqrt(_total(gram * gram))
        gram = (gram - _product(overlap, tl.trans(overlap), once) / square) / size
        gram = _product(_product(absent, gram, once), absent, once) + identity - absent
        inverse = _inverse_root(gram, identity, once, SIZE)[1]
        right = _product(inverse, absent, once) * tl.sqrt(square / size)
        left -= _product(_product(right, overlap, once), left, once) / square

        sweep = 0
        while sweep < 2:
            gram = tl.zeros((SIZE, SIZE), tl.float64)
            for start in range(0, in_features, COLUMNS):
                columns = start + offsets
                block = _product(left, _centered_block(linear, rows, columns, num_classes, in_features), once)
                block += _product(right, _generic(rows, columns, num_classes, in_features), once)
                if sweep == 0:
                    gram += _product(block, tl.trans(block), once)
                else:
                    _store(frame, block, rows, columns, num_classes, in_features)
            if sweep == 0:
                rest = _rest(gram, identity, valid, classes)
                left += 0.5 * _product(rest, left, once)
                right += 0.5 * _product(rest, right, once)
            sweep += 1


@triton.jit  # type: ignore[untyped-decorator]
def polar_adjoint_kernel(  # type: ignore[no-untyped-def]
    direction,
    frame,
    inverse_in,
    root_in,
    out,
    num_classes,
    in_features,
    SIZE: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """dW of one problem for dM = ``direction``."""
    problem = tl.program_id(0).to(tl.int64)
    once = tl.minimum(num_classes, 1)
    direction += problem * num_classes * in_features
    frame += problem * num_classes * in_features
    out += problem * num_classes * in_features
    inverse_in += problem * num_classes * num_classes
    root_in += problem * num_classes * num_classes
    rows = tl.arange(0, SIZE)
    offsets = tl.arange(0, COLUMNS)
    identity = tl.where(rows[:, None] == rows[None, :], 1.0, 0.0).to(tl.float64)
    valid = (rows < num_classes)[:, None] & (rows < num_classes)[None, :]
    classes = tl.zeros((), tl.float64) + num_classes

    inner = tl.zeros((SIZE, SIZE), tl.float64)
    for start in range(0, in_features, COLUMNS):
        columns = start + offsets
        inside = (rows < num_classes)[:, None] & (columns < in_features)[None, :]
        place = rows[:, None].to(tl.int64) * in_features + columns[None, :]
        change = _centered_block(direction, rows, columns, num_classes, in_features)
        block = tl.load(frame + place, mask=inside, other=0.0).to(tl.float64)
        inner += _product(change, tl.trans(block), once)

    corner = rows[:, None] * num_classes + rows[None, :]
    inverse = tl.load(inverse_in + corner, mask=valid, other=0.0)
    root = tl.load(root_in + corner, mask=valid, other=0.0)
    skew = inner - tl.trans(inner)
    absent = tl.where(valid, identity, 0.0) - _product(inverse, root, once) * (1.0 - 1.0 / classes)
    deficient = _total(absent * absent) > _COMPLETE
    # Kept through the iteration in place of two matrices: registers are what it has least of.
    mixed = _product(inverse, inner, once) * (1.0 - 1.0 / classes)
    if deficient:
        # Nothing between absent directions; the iteration halves what is between one and a present one.
        left = _product(absent, skew, once)
        skew += left - tl.trans(left) - 3.0 * _product(left, absent, once)

    # sign [[T, S], [0, -T]] = [[I, 2X], [0, -I]], by cubic steps.
    squared = _product(root, root, once)
    mean, spread = _bounds(squared, identity, classes)
    size = tl.sqrt(tl.maximum((mean + spread) * (1.0 + 1e-13), _FLOOR))
    filling = tl.maximum(tl.sqrt(mean) / size, 0.5)
    root = root / size + tl.where(valid, 0.0, filling * identity)
    skew = skew / size
    squared = _product(root, root, once)
    low = tl.maximum(_lowest(squared, identity, SIZE), 0.5 * _CUTOFF)
    # The steps from _NEAR to rounding.
    left_over = 3
    while left_over > 0:
        scale, guaranteed = _scale(low)
        left_over -= tl.where(low < _NEAR, 0, 1)
        cubed = 0.5 * scale * scale * scale
        left = _product(root, skew, once)
        step = 1.5 * scale * identity - cubed * squared
        skew = _product(skew, step, once) - cubed * _product(root, left + tl.trans(left), once)
        root = _product(root, step, once)
        squared = _product(root, root, once)
        low = tl.maximum(_lowest(squared, identity, SIZE), guaranteed)
    skew = 0.5 * skew
    inverse = tl.load(inverse_in + corner, mask=valid, other=0.0)
    if deficient:
        root = tl.load(root_in + corner, mask=valid, other=0.0)
        absent = tl.where(valid, identity, 0.0) - _product(inverse, root, once) * (1.0 - 1.0 / classes)
        skew -= _product(_product(absent, skew, once), absent, once)

    if in_features == num_classes - 1:
        # I - W'W / c^2 vanishes: computing it would only add rounding, divided by tau.
        inverse = tl.zeros((SIZE, SIZE), tl.float64)
        mixed = tl.zeros((SIZE, SIZE), tl.float64)
    left = skew - mixed
    for start in range(0, in_features, COLUMNS):
        columns = start + offsets
        inside = (rows < num_classes)[:, None] & (columns < in_features)[None, :]
        place = rows[:, None].to(tl.int64) * in_features + columns[None, :]
        change = _centered_block(direction, rows, columns, num_classes, in_features)
        block = tl.load(frame + place, mask=inside, other=0.0).to(tl.float64)
        result = _product(left, block, once) + _product(inverse, change, once)
        _store(out, result, rows, columns, num_classes, in_features)


def blocks(num_classes: int) -> dict[str, int]:
    """Sizes of the tiles, and the options of the launch, for a number of classes."""
    if num_classes <= 16:
        return {"SIZE": 16, "COLUMNS": 32, "num_warps": 4, "num_stages": 1}
    return {"SIZE": 32, "COLUMNS": 32, "num_warps": 8, "num_stages": 1}


# Assertions exist only in debug mode; its checks of integer overflow are not wanted.
_ASSERTING = {"debug": True, "sanitize_overflow": False}


@torch.library.custom_op("etflayers::polar", mutates_args=())
def fused_polar(linear: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """W ``(B, K, d)`` in the dtype of M, c^2 T^+ and T ``(B, K, K)`` float64, for M ``(B, K, d)``."""
    batch, num_classes, in_features = linear.shape
    linear = linear.contiguous()
    frame = torch.empty_like(linear)
    inverse, root = (linear.new_empty(batch, num_classes, num_classes, dtype=torch.float64) for _ in range(2))
    deficient = linear.new_empty(batch, dtype=torch.int32)
    arguments = (linear, frame, inverse, root, deficient, num_classes, in_features)
    with torch.cuda.device_of(linear):  # type: ignore[no-untyped-call]
        polar_kernel[(batch,)](*arguments, **blocks(num_classes), **_ASSERTING)
        polar_completion_kernel[(batch,)](*arguments, **blocks(num_classes), **_ASSERTING)
    return frame, inverse, root


@fused_polar.register_fake
def _(linear: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    batch, num_classes, _ = linear.shape
    inverse, root = (linear.new_empty(batch, num_classes, num_classes, dtype=torch.float64) for _ in range(2))
    return linear.new_empty(linear.shape), inverse, root


@torch.library.custom_op("etflayers::polar_adjoint", mutates_args=())
def fused_polar_adjoint(direction: Tensor, frame: Tensor, inverse: Tensor, root: Tensor) -> Tensor:
    """dW for dM = ``direction``, both ``(B, K, d)`` and of one dtype, with what ``fused_polar`` returned."""
    batch, num_classes, in_features = direction.shape
    out = direction.new_empty(direction.shape)
    factors = (tensor.contiguous() for tensor in (direction, frame, inverse, root))
    with torch.cuda.device_of(direction):  # type: ignore[no-untyped-call]
        polar_adjoint_kernel[(batch,)](*factors, out, num_classes, in_features, **blocks(num_classes))
    return out


@fused_polar_adjoint.register_fake
def _(direction: Tensor, frame: Tensor, inverse: Tensor, root: Tensor) -> Tensor:
    return direction.new_empty(direction.shape)
