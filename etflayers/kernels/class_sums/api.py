r"""Sums of the rows of each class, ``s_k = sum_{i: y_i = k} f_i``, their adjoint, and the average they feed.

The sum S is linear in the features. Its adjoint G gives every sample the row of its class, and is 0 for an
ignored one:

    <S f, g> = sum_k sum_{i: y_i = k} <f_i, g_k> = sum_i <f_i, g_{y_i}> = <f, G g>.

Each is the other's backward pass, so both can be differentiated to any order, in both modes.

The moving average ``m_k + a_k (s_k / n_k - m_k)`` has the step ``a_k`` that depends on counts alone; its
derivative in the features is ``S`` with row k multiplied by ``a_k / n_k``.

S <-> class_sums, G <-> _gather, a_k / n_k <-> steps.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from etflayers._torch import allow_in_graph, is_batched
from etflayers.kernels.class_sums.momentum import Momentum
from etflayers.kernels.class_sums.reference import class_sums_reference
from etflayers.kernels.dispatch import Call, Impl, register, use_triton

__all__ = ["averages_use_triton", "class_averages", "class_sums", "class_sums_reference", "sums_use_triton"]

_DTYPES = (torch.float32, torch.float16, torch.bfloat16)


def _supports(call: Call) -> str | None:
    if call.dtype not in _DTYPES:
        return f"the kernel takes float32, float16 and bfloat16, not {call.dtype}"
    if call.batch is not None and call.batch >= 2**31:
        return "the kernel counts samples in 32 bits"
    return None


register("class_sums", _supports)


def sums_use_triton(features: Tensor, num_classes: int, impl: Impl = "auto") -> bool:
    """Whether the sums of ``features`` ``(B, d)`` come from the kernel, which checks all values itself."""
    return use_triton(
        "class_sums",
        features,
        num_classes=num_classes,
        in_features=features.shape[-1],
        batch=features.shape[0],
        impl=impl,
    )


# torch.compile refuses functions with a forward mode; as one node of the graph they keep it.
@allow_in_graph
def class_sums(
    features: Tensor, targets: Tensor, num_classes: int, ignore_index: int
) -> tuple[Tensor, Tensor]:
    """Sums ``(K, d)`` float32 and counts ``(K,)`` by the Triton kernel, which asserts that values are valid.

    Args:
        features: ``(B, d)``, float32 or half precision.
        targets: ``(B,)``, integers in [0, K) or ``ignore_index``.
        num_classes: K.
        ignore_index: target of the rows to leave out, which are not even read.
    """
    sums, counts = _ClassSums.apply(features, targets, num_classes, ignore_index, True)  # type: ignore[no-untyped-call]
    return sums, counts


class _ClassSums(torch.autograd.Function):
    """S, and the counts."""

    @staticmethod
    def forward(
        features: Tensor, targets: Tensor, num_classes: int, ignore_index: int, checked: bool
    ) -> tuple[Tensor, Tensor]:
        from etflayers.kernels.class_sums import triton as kernels

        sums, counts = kernels.class_sums(features, targets, num_classes, ignore_index, checked)
        return sums, counts

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
        features, targets, ctx.num_classes, ctx.ignore_index, _ = inputs
        ctx.dtype = features.dtype
        ctx.save_for_backward(targets)
        ctx.save_for_forward(targets)
        ctx.mark_non_differentiable(output[1])
        ctx.set_materialize_grads(False)

    @staticmethod
    def backward(ctx: Any, grad: Tensor | None, _: None) -> tuple[Tensor | None, None, None, None, None]:
        (targets,) = ctx.saved_tensors
        if grad is not None:
            grad = _gather(grad, targets, ctx.ignore_index, ctx.dtype)
        return grad, None, None, None, None

    @staticmethod
    def jvp(ctx: Any, tangent: Tensor, *_: None) -> tuple[Tensor, None]:
        (targets,) = ctx.saved_tensors
        # Tangents may be infinite where features may not: loss scaling overflows on purpose.
        sums, _counts = _ClassSums.apply(tangent, targets, ctx.num_classes, ctx.ignore_index, False)  # type: ignore[no-untyped-call]
        return sums, None


def _gather(rows: Tensor, targets: Tensor, ignore_index: int, dtype: torch.dtype) -> Tensor:
    """G, also for several cotangents at once, which no kernel takes."""
    if is_batched(rows):
        targets = targets.long()
        ignored = targets == ignore_index
        return torch.where(ignored.unsqueeze(-1), 0, rows[torch.where(ignored, 0, targets)]).to(dtype)
    gathered: Tensor = _ClassGather.apply(rows, targets, ignore_index, dtype)  # type: ignore[no-untyped-call]
    return gathered


class _ClassGather(torch.autograd.Function):
    """G."""

    @staticmethod
    def forward(rows: Tensor, targets: Tensor, ignore_index: int, dtype: torch.dtype) -> Tensor:
        from etflayers.kernels.class_sums import triton as kernels

        gathered: Tensor = kernels.class_gather(rows, targets, ignore_index, dtype)
        return gathered

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        rows, targets, ctx.ignore_index, ctx.dtype = inputs
        ctx.num_classes = rows.shape[0]
        ctx.save_for_backward(targets)
        ctx.save_for_forward(targets)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None]:
        (targets,) = ctx.saved_tensors
        sums, _ = _ClassSums.apply(grad, targets, ctx.num_classes, ctx.ignore_index, False)  # type: ignore[no-untyped-call]
        return sums, None, None, None

    @staticmethod
    def jvp(ctx: Any, tangent: Tensor, *_: None) -> Tensor:
        (targets,) = ctx.saved_tensors
        gathered: Tensor = _ClassGather.apply(tangent, targets, ctx.ignore_index, ctx.dtype)  # type: ignore[no-untyped-call]
        return gathered


def averages_use_triton(features: Tensor, means: Tensor, impl: Impl = "auto") -> bool:
    """Whether the moving average ``means`` ``(K, d)`` is updated by the kernel."""
    return (
        means.dtype == torch.float32
        and means.device == features.device
        and not means.requires_grad
        and use_triton(
            "class_sums",
            features,
            num_classes=means.shape[0],
            in_features=means.shape[1],
            batch=features.shape[0],
            impl=impl,
        )
    )


@allow_in_graph
def class_averages(
    features: Tensor,
    targets: Tensor,
    means: Tensor,
    counts: Tensor,
    updates: Tensor,
    ignore_index: int,
    momentum: Momentum,
) -> tuple[Tensor, Tensor, Tensor]:
    """Class means, counts and updates after a batch by the Triton kernel, differentiable in ``features``.

    Args:
        features: ``(B, d)``, float32 or half precision.
        targets: ``(B,)``, integers in [0, K) or ``ignore_index``.
        means: ``(K, d)`` float32, a constant.
        counts: ``(K,)`` int64.
        updates: ``(K,)`` int64.
        ignore_index: target of the rows to leave out.
        momentum: a number in (0, 1], ``None`` (cumulative) or ``"2/(t+1)"`` (published).
    """
    schedule, number = "cumulative" if momentum is None else "published", 0.0
    if isinstance(momentum, (int, float)):
        schedule, number = "fixed", float(momentum)
    new = _ClassAverages.apply(features, targets, means, counts, updates, ignore_index, number, schedule)  # type: ignore[no-untyped-call]
    return new[0], new[1], new[2]


class _ClassAverages(torch.autograd.Function):
    @staticmethod
    def forward(
        features: Tensor,
        targets: Tensor,
        means: Tensor,
        counts: Tensor,
        updates: Tensor,
        ignore_index: int,
        momentum: float,
        schedule: str,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        from etflayers.kernels.class_sums import triton as kernels

        new: tuple[Tensor, Tensor, Tensor, Tensor] = kernels.class_averages(
            features, targets, means, counts, updates, ignore_index, momentum, schedule
        )
        return new

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        features, targets, ctx.ignore_index = inputs[0], inputs[1], inputs[5]
        ctx.dtype = features.dtype
        ctx.save_for_backward(targets, output[3])
        ctx.save_for_forward(targets, output[3])
        ctx.mark_non_differentiable(*output[1:])
        ctx.set_materialize_grads(False)

    @staticmethod
    def backward(ctx: Any, grad: Tensor | None, *_: None) -> tuple[Tensor | None, ...]:
        targets, steps = ctx.saved_tensors
        if grad is not None:
            grad = _gather(grad * steps.unsqueeze(-1), targets, ctx.ignore_index, ctx.dtype)
        return grad, None, None, None, None, None, None, None

    @staticmethod
    def jvp(ctx: Any, tangent: Tensor, *_: None) -> tuple[Tensor | None, ...]:
        targets, steps = ctx.saved_tensors
        sums, _counts = _ClassSums.apply(tangent, targets, steps.shape[0], ctx.ignore_index, False)  # type: ignore[no-untyped-call]
        return sums * steps.unsqueeze(-1), None, None, None
