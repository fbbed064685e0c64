"""The nearest frame and its adjoint: by products or in one kernel, and in NumPy for few classes on a CPU.

``reference`` has the derivation. Which path a call takes is decided by device, precision and size.

M <-> linear, W <-> frame, G <-> direction.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from etflayers._torch import forward_mode, is_batched
from etflayers.checks import reads_values
from etflayers.kernels.dispatch import Call, Impl, register, use_triton
from etflayers.kernels.polar import numpy, reference
from etflayers.kernels.polar.state import FrameState, RootState, SmallState
from etflayers.precision import smallest_divisor

__all__ = ["LARGEST_FUSED", "polar", "polar_adjoint", "small_polar"]

# Below this many classes a PyTorch operation on a CPU takes as long as its launch.
LARGEST_SMALL = 31
LARGEST_FUSED = 32
# Another subclass of tensors may hold its values elsewhere.
_PLAIN = (Tensor, nn.Parameter)


def _supports(call: Call) -> str | None:
    if call.dtype not in (torch.float32, torch.float16, torch.bfloat16):
        return f"the kernel takes float32, float16 and bfloat16, not {call.dtype}"
    if call.num_classes > LARGEST_FUSED:
        return f"K = {call.num_classes} classes do not fit in one program (at most {LARGEST_FUSED})"
    return None


def _supports_numpy(call: Call) -> str | None:
    if call.num_classes > LARGEST_SMALL:
        return f"K = {call.num_classes} classes keep PyTorch busy (NumPy takes at most {LARGEST_SMALL})"
    if call.in_features is not None and call.num_classes**2 * call.in_features > numpy.MOST_WORK:
        return "in_features are so many that NumPy would start threads"
    return None if call.batch in (None, 1) else "NumPy takes one problem at a time"


register("polar", _supports, numpy=_supports_numpy)


def small_polar(linear: Tensor, precision: torch.dtype) -> SmallState | None:
    """The frame from NumPy, or ``None``: not for this call, or M_c has no full rank in float64.

    Args:
        linear: M, ``(..., K, d)``.
        precision: of the data from which it was made.

    >>> small_polar(torch.tensor([[3.0, 4.0], [0.0, 0.0]]), torch.float32).frame
    tensor([[ 0.6000,  0.8000],
            [-0.6000, -0.8000]], dtype=torch.float64)
    """
    num_classes, in_features = linear.shape[-2:]
    if num_classes > LARGEST_SMALL or num_classes * num_classes * in_features > numpy.MOST_WORK:
        return None
    if linear.ndim != 2 or not _taken_by_numpy(linear):
        return None
    solved = numpy.small_polar(linear.detach().double().numpy(), smallest_divisor(precision))
    return None if solved is None else SmallState(torch.from_numpy(solved.frame), solved)


def _taken_by_numpy(matrix: Tensor) -> bool:
    """Whether the values can be read, and nobody records what is made of them."""
    recorded = matrix.requires_grad and torch.is_grad_enabled()
    return not recorded and not forward_mode() and type(matrix) in _PLAIN and reads_values(matrix)


def polar(linear: Tensor, *, precision: torch.dtype | None = None, impl: Impl = "auto") -> RootState:
    """The simplex ETF that maximizes <W, M>, and its state, without a look at a value; any rank.

    Args:
        linear: M, ``(..., K, d)`` with d >= K - 1, finite.
        precision: of the data, where M has been computed from them in a wider dtype; ``None``: that of M.
        impl: path, see :func:`~etflayers.kernels.describe`.

    Returns:
        W and what its derivative asks, as constants; W in the dtype of the path: that of M (kernel, which
        rounds it to float32) or float64 (reference).

    Raises:
        InvalidArgumentError: ``impl="triton"`` where it cannot run.
        ConvergenceError: W is not a simplex ETF (M is not finite); on a device an asynchronous assertion.

    >>> polar(torch.tensor([[3.0, 4.0], [0.0, 0.0]])).frame
    tensor([[ 0.6000,  0.8000],
            [-0.6000, -0.8000]], dtype=torch.float64)
    """
    precision = linear.dtype if precision is None else precision
    # Where the iteration ends, its derivative is not yet that of the limit: polar_adjoint is.
    linear = linear.detach()
    if not _fused(linear, precision, impl):
        return reference.polar(linear, precision)._replace(impl=impl)
    from etflayers.kernels.polar.triton import fused_polar

    num_classes, in_features = linear.shape[-2:]
    frame, inverse, root = fused_polar(linear.reshape(-1, num_classes, in_features))
    square = (*linear.shape[:-1], num_classes)
    return RootState(
        frame.reshape(linear.shape), inverse.reshape(square), root.reshape(square), precision, impl
    )


def polar_adjoint(direction: Tensor, state: FrameState) -> Tensor:
    """dW for dM = ``direction``, which is also the cotangent of M for that of W: the map is self-adjoint.

    Args:
        direction: G, ``(..., K, d)``.
        state: of W, as a solver returns it or with W rounded to the dtype of the data. The kernel takes a
            :class:`RootState`.

    Returns:
        ``(..., K, d)``, in the dtype of the state from the reference, in that of G from the kernel.

    Raises:
        InvalidArgumentError: a state with ``impl="triton"`` where the kernel cannot run.

    >>> means = torch.tensor([[3.0, 4.0], [0.0, 0.0]])
    >>> polar_adjoint(torch.tensor([[4.0, -3.0], [0.0, 0.0]]), polar(means))
    tensor([[ 0.8000, -0.6000],
            [-0.8000,  0.6000]], dtype=torch.float64)
    """
    if isinstance(state, SmallState) and not is_batched(direction) and _taken_by_numpy(direction):
        return torch.from_numpy(numpy.small_polar_adjoint(direction.detach().double().numpy(), state.solved))
    if not (isinstance(state, RootState) and _fused(direction, state.precision, state.impl)):
        return reference.polar_adjoint(direction, state)
    from etflayers.kernels.polar.triton import fused_polar_adjoint

    batch, num_classes = direction.shape[:-2].numel(), direction.shape[-2]
    parts = (tensor.reshape(batch, num_classes, -1) for tensor in (direction, *state.tensors()))
    result: Tensor = fused_polar_adjoint(*parts).reshape(direction.shape)
    return result


def _fused(matrix: Tensor, precision: torch.dtype, impl: Impl) -> bool:
    """Whether a matrix ``(..., K, d)`` that stands for data of this precision goes to the kernel."""
    num_classes, in_features = matrix.shape[-2:]
    batch = matrix.shape[:-2].numel()
    return batch > 0 and use_triton(
        "polar",
        matrix,
        num_classes=num_classes,
        in_features=in_features,
        batch=batch,
        dtype=precision,
        impl=impl,
    )
