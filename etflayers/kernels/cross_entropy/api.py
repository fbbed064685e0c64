r"""Cross-entropy of a scaled softmax without keeping its probabilities.

For rows f_i, a factor a > 0, smoothing e and targets y_i, over the first K columns,

    l_i = L_i - (1 - e) a (f_iy - m_i) - e a mean_k(f_ik - m_i),     L_i = log sum_k exp(a (f_ik - m_i)),
    dl_i / df_ik = a (p_ik - (1 - e) [k = y_i] - e / K),             p_ik = exp(a (f_ik - m_i) - L_i),

with m_i = max_k f_ik. So m and L, two numbers a row, are all that the backward pass needs besides the rows. A
common translation of a row leaves l unchanged, and rows of the gradient sum to zero: where logits are
centered features, no centering has to be done, neither forward nor backward. Subtracting m before multiplying
by a loses nothing to a large common mean.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from etflayers._torch import allow_in_graph, forward_mode, is_batched
from etflayers.kernels.cross_entropy import reference
from etflayers.kernels.dispatch import Call, Impl, register, use_triton
from etflayers.precision import full_precision, working_dtype

__all__ = ["cross_entropy_uses_triton", "linear_softmax_losses", "softmax_losses"]

_DTYPES = (torch.float32, torch.float16, torch.bfloat16)


def _supports(call: Call) -> str | None:
    if call.dtype not in _DTYPES:
        return f"the kernel takes float32, float16 and bfloat16, not {call.dtype}"
    if call.in_features is not None and call.in_features < call.num_classes:
        return "in_features = num_classes - 1 needs a reflection of the features first"
    if call.batch is not None and call.batch >= 2**31:
        return "the kernel counts samples in 32 bits"
    return None


register("cross_entropy", _supports)


def cross_entropy_uses_triton(rows: Tensor, num_classes: int, impl: Impl = "auto") -> bool:
    """Whether the losses of ``rows`` ``(B, d)`` come from the kernel, which checks the targets itself."""
    return use_triton(
        "cross_entropy",
        rows,
        num_classes=num_classes,
        in_features=rows.shape[-1],
        batch=rows.shape[0],
        impl=impl,
    )


# torch.compile refuses functions with a forward mode; as one node of the graph they keep it.
@allow_in_graph
def softmax_losses(
    rows: Tensor,
    targets: Tensor,
    num_classes: int,
    factor: float,
    smoothing: float,
    ignore_index: int,
    triton: bool,
) -> Tensor:
    r"""Losses ``l_i`` of the logits ``a f_i`` in the first K columns, differentiable in the rows.

    Args:
        rows: f, ``(B, d)`` with d >= K.
        targets: y, ``(B,)``, integers in [0, K) or ``ignore_index``.
        num_classes: K.
        factor: a > 0.
        smoothing: e in [0, 1].
        ignore_index: target of the rows whose loss and gradient are 0.
        triton: whether to run the kernels, which assert that the targets are valid.

    Returns:
        ``(B,)``, float32 or better.
    """
    losses: Tensor = _SoftmaxLosses.apply(
        rows, targets, num_classes, factor, smoothing, ignore_index, triton
    )[0]  # type: ignore[no-untyped-call]
    return losses


class _SoftmaxLosses(torch.autograd.Function):
    """The losses; m and L are further outputs, which carry no gradient."""

    generate_vmap_rule = True

    @staticmethod
    def forward(
        rows: Tensor,
        targets: Tensor,
        num_classes: int,
        factor: float,
        smoothing: float,
        ignore_index: int,
        triton: bool,
    ) -> tuple[Tensor, Tensor, Tensor]:
        return _losses(rows, targets, num_classes, factor, smoothing, ignore_index, triton)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        rows, targets, *ctx.options = inputs
        ctx.mark_non_differentiable(*output[1:])
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(rows, targets, *output[1:])
        ctx.save_for_forward(rows, targets)

    @staticmethod
    def backward(ctx: Any, grad: Tensor | None, *_: None) -> tuple[Tensor | None, ...]:
        rows, targets, shifts, logs = ctx.saved_tensors
        if grad is None:
            return (None,) * 7
        if _needs_formula(grad):
            gradient = reference.differentiable_gradient(rows, targets, grad, *ctx.options[:-1])
        else:
            gradient = _gradient(rows, targets, shifts, logs, grad, *ctx.options)
        return (gradient.to(rows.dtype), *(None,) * 6)

    @staticmethod
    def jvp(ctx: Any, tangent: Tensor, *_: None) -> tuple[Tensor | None, ...]:
        rows, targets = ctx.saved_tensors
        one = torch.ones((), dtype=working_dtype(rows.dtype), device=rows.device)
        gradient = reference.differentiable_gradient(
            rows, targets, one.expand(targets.shape), *ctx.options[:-1]
        )
        return (gradient * tangent).sum(-1), None, None


def _needs_formula(grad: Tensor) -> bool:
    """Whether the backward pass is itself differentiated or batched: in place it cannot be."""
    # Forward mode may run inside a backward pass that records no graph; its tangents still have to flow.
    return torch.is_grad_enabled() or forward_mode() or is_batched(grad)


def _losses(
    rows: Tensor,
    targets: Tensor,
    num_classes: int,
    factor: float,
    smoothing: float,
    ignore_index: int,
    triton: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """l, m and L: see the head of this module."""
    if triton:
        from etflayers.kernels.cross_entropy import triton as kernels

        found: tuple[Tensor, Tensor, Tensor] = kernels.softmax_losses(
            rows, targets, num_classes, factor, smoothing, ignore_index
        )
        return found
    return reference.losses(rows, targets, num_classes, factor, smoothing, ignore_index)


def _gradient(
    rows: Tensor,
    targets: Tensor,
    shifts: Tensor,
    logs: Tensor,
    grad: Tensor,
    num_classes: int,
    factor: float,
    smoothing: float,
    ignore_index: int,
    triton: bool,
) -> Tensor:
    """The gradient ``(B, d)`` for a cotangent ``(B,)`` of the losses, 0 in the columns from K on."""
    if triton:
        from etflayers.kernels.cross_entropy import triton as kernels

        found: Tensor = kernels.softmax_gradient(
            rows, targets, shifts, logs, grad, num_classes, factor, smoothing, ignore_index
        )
        return found
    return reference.gradient(rows, targets, shifts, logs, grad, num_classes, factor, smoothing, ignore_index)


@allow_in_graph
def linear_softmax_losses(
    features: Tensor,
    frame: Tensor,
    targets: Tensor,
    factor: float,
    smoothing: float,
    ignore_index: int,
    chunk_size: int | None,
    impl: Impl,
) -> Tensor:
    r"""Losses of the logits ``a W f_i``, made and forgotten a few rows at a time, forward and backward.

    Args:
        features: f, ``(B, d)``.
        frame: W, ``(K, d)``, of the same dtype.
        targets: y, ``(B,)``, integers in [0, K) or ``ignore_index``.
        factor: a > 0.
        smoothing: e in [0, 1].
        ignore_index: target of the rows whose loss and gradient are 0.
        chunk_size: rows at a time; ``None``: as many as fill a matrix product.
        impl: of the losses of a chunk.

    Returns:
        ``(B,)``, float32 or better.
    """
    losses: Tensor = _LinearSoftmaxLosses.apply(  # type: ignore[no-untyped-call]
        features, frame, targets, factor, smoothing, ignore_index, chunk_size, impl
    )[0]
    return losses


class _LinearSoftmaxLosses(torch.autograd.Function):
    r"""With G the gradient of the losses in the products W f_i, that in F is GW and that in W is G'F."""

    generate_vmap_rule = True

    @staticmethod
    def forward(
        features: Tensor,
        frame: Tensor,
        targets: Tensor,
        factor: float,
        smoothing: float,
        ignore_index: int,
        chunk_size: int | None,
        impl: Impl,
    ) -> tuple[Tensor, Tensor, Tensor]:
        num_classes = frame.shape[0]
        pieces = []
        with full_precision(features):
            for part in reference.parts(features, num_classes, chunk_size, at_least=reference.SAMPLES):
                products = features[part] @ frame.mT
                triton = cross_entropy_uses_triton(products, num_classes, impl)
                pieces.append(
                    _losses(products, targets[part], num_classes, factor, smoothing, ignore_index, triton)
                )
        losses, shifts, logs = (torch.cat(parts) for parts in zip(*pieces, strict=True))
        return losses, shifts, logs

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        features, frame, targets, *ctx.options, ctx.chunk_size, ctx.impl = inputs
        ctx.mark_non_differentiable(*output[1:])
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(features, frame, targets, *output[1:])
        ctx.save_for_forward(features, frame, targets)

    @staticmethod
    def backward(ctx: Any, grad: Tensor | None, *_: None) -> tuple[Tensor | None, ...]:
        features, frame, targets, shifts, logs = ctx.saved_tensors
        if grad is None:
            return (None,) * 8
        num_classes = frame.shape[0]
        needs_features, needs_frame = ctx.needs_input_grad[:2]
        with full_precision(features):
            if _needs_formula(grad):
                products = features @ frame.mT
                change = reference.differentiable_gradient(products, targets, grad, num_classes, *ctx.options)
                change = change.to(features.dtype)
                return change @ frame, change.mT @ features, *(None,) * 6
            d_features = torch.empty_like(features) if needs_features else None
            # A sum over the chunks: in float32 for half-precision frames.
            d_frame = torch.zeros_like(frame, dtype=working_dtype(frame.dtype)) if needs_frame else None
            factor, smoothing, ignore_index = ctx.options
            for part in reference.parts(features, num_classes, ctx.chunk_size, at_least=reference.SAMPLES):
                products = features[part] @ frame.mT
                change = _gradient(
                    products,
                    targets[part],
                    shifts[part],
                    logs[part],
                    grad[part],
                    num_classes,
                    factor,
                    smoothing,
                    ignore_index,
                    cross_entropy_uses_triton(products, num_classes, ctx.impl),
                )
                if d_features is not None:
                    d_features[part] = change @ frame
                if d_frame is not None:
                    d_frame += change.mT @ features[part]
        return d_features, None if d_frame is None else d_frame.to(frame.dtype), *(None,) * 6

    @staticmethod
    def jvp(
        ctx: Any, d_features: Tensor | None, d_frame: Tensor | None, *_: None
    ) -> tuple[Tensor | None, ...]:
        features, frame, targets = ctx.saved_tensors
        with full_precision(features):
            products = features @ frame.mT
            one = torch.ones((), dtype=working_dtype(products.dtype), device=products.device)
            change = reference.differentiable_gradient(
                products, targets, one.expand(targets.shape), frame.shape[0], *ctx.options
            )
            tangent = torch.zeros_like(products)
            if d_features is not None:
                tangent = tangent + d_features @ frame.mT
            if d_frame is not None:
                tangent = tangent + features @ d_frame.mT
        return (change * tangent).sum(-1), None, None
