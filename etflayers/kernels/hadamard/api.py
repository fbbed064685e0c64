r"""The orthonormal Walsh-Hadamard transform along the last dimension.

The entry (b, v) of the Hadamard matrix of order d = 2^m, in natural (Sylvester) order, is (-1)^(b.v), where
b.v is the number of ones that the binary digits of b and v have in common. It is symmetric, and divided by
sqrt(d) it is its own inverse. So the transform is its own adjoint: one function serves forward, backward and
tangents.

Split the digits of the index into the first and the last ones, v = i n + j. Then H_d = H_a (x) H_n with
d = a n, and the transform of a row, written as an a x n matrix X, is ``H_a X H_n``. That is d (a + n)
multiplications in place of the d log2(d) additions of butterflies, but in two passes over the memory instead
of log2(d), and as matrix products, which a CPU and a GPU do faster than anything else. Milliseconds on one
CPU thread with AVX-512, in float32, the butterflies with ``out=``:

    ============  ===========  ====  ================  ============
    rows x d      butterflies   H_d  H_a (x) H_n       copy of rows
    ============  ===========  ====  ================  ============
    2,304 x 16           0.20  0.01  0.27 (4 x 4)              0.01
    8,448 x 64            2.9  0.44  0.84 (8 x 8)              0.16
    33,024 x 256           93    41  34 (16 x 16)                13
    4,096 x 1024           32    52  4.6 (32 x 32)              1.3
    1,280 x 4096           48   259  12 (64 x 64)               2.9
    ============  ===========  ====  ================  ============

Hence one product up to d = 64, and two products with factors as equal as can be beyond. Other factors of 256
and 1024 are no faster (8 x 32: 33, 32 x 8: 44, 4 x 64: 40; 16 x 64: 6.2, 64 x 16: 6.5), nor are products that
transpose instead of batching (53 and 9.1). Of the 34 ms a third is the fresh memory of the result: a loss
that takes a few transforms at a time does not pay it.

Symbols: d <-> size, H_n / sqrt(n) <-> ``_matrix(n)``.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from etflayers._torch import allow_in_graph, apply_function, is_concrete
from etflayers.checks import require, require_floating
from etflayers.precision import full_precision, working_dtype

__all__ = ["hadamard_transform"]

_LARGEST_SINGLE = 64

_matrices: dict[tuple[int, torch.device, torch.dtype], Tensor] = {}


def hadamard_transform(x: Tensor) -> Tensor:
    r"""The orthonormal Walsh-Hadamard transform ``y_b = sum_v (-1)^(b.v) x_v / sqrt(d)`` of the last axis.

    The indices are in natural (Sylvester) order. The transform is its own inverse and its own adjoint;
    it is differentiable to any order and in both modes, and batches under ``torch.func.vmap``.

    Args:
        x: ``(..., d)``, d a power of two.

    Returns:
        ``(..., d)`` in the dtype of ``x``; half precisions are computed in float32 and rounded once.

    Raises:
        InvalidArgumentError: a scalar, a d that is no power of two, or a dtype that is not floating point.

    Reference:
        Fino, Algazi (1976), IEEE Transactions on Computers C-25(11).

    >>> hadamard_transform(torch.tensor([1.0, 0.0, 2.0, 0.0]))
    tensor([ 1.5000,  1.5000, -0.5000, -0.5000])
    """
    require_floating("x", x.dtype)
    size = x.shape[-1] if x.ndim else 0
    require(
        size > 0 and size & (size - 1) == 0,
        f"x must have a last dimension that is a power of two, got shape {tuple(x.shape)}: pad it with zeros",
    )
    return _transform(x.to(working_dtype(x.dtype))).to(x.dtype)


# torch.compile refuses functions with a forward mode; as one node of the graph they keep it.
@allow_in_graph
def _transform(rows: Tensor) -> Tensor:
    transformed: Tensor = apply_function(_Transform, rows)
    return transformed


class _Transform(torch.autograd.Function):
    """A symmetric linear map: the cotangent and the tangent take the way of the input."""

    @staticmethod
    def forward(rows: Tensor) -> Tensor:
        with full_precision(rows):
            return _products(rows)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        """Nothing to keep: the map is linear."""

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return _transform(grad)

    @staticmethod
    def jvp(ctx: Any, tangent: Tensor) -> Tensor:
        return _transform(tangent)

    @staticmethod
    def vmap(info: Any, in_dims: tuple[int | None], rows: Tensor) -> tuple[Tensor, int]:
        assert in_dims[0] is not None  # the only input, so it is the one that is batched
        return _transform(rows.movedim(in_dims[0], 0)), 0


def _products(rows: Tensor) -> Tensor:
    size = rows.shape[-1]
    if size <= _LARGEST_SINGLE:
        return rows @ _matrix(size, rows)
    digits = size.bit_length() - 1
    first, last = 1 << digits // 2, 1 << (digits - digits // 2)
    matrices = rows.reshape(-1, last) @ _matrix(last, rows)
    return (_matrix(first, rows) @ matrices.view(-1, first, last)).view(rows.shape)


def _matrix(order: int, like: Tensor) -> Tensor:
    """The orthonormal Hadamard matrix, made once for each device and dtype; anew in a graph being traced."""
    key = order, like.device, like.dtype
    if key in _matrices and is_concrete(like):
        return _matrices[key]
    with torch.inference_mode(False):
        matrix = torch.full((1, 1), order**-0.5, device=like.device, dtype=like.dtype)
        while matrix.shape[0] < order:
            matrix = torch.cat((torch.cat((matrix, matrix), 1), torch.cat((matrix, -matrix), 1)))
    if is_concrete(like) and not _capturing(like):
        _matrices[key] = matrix
    return matrix


def _capturing(like: Tensor) -> bool:
    """Whether a CUDA graph is being recorded, in which a new tensor has no values until it is replayed."""
    return like.is_cuda and torch.cuda.is_current_stream_capturing()
