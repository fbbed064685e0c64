r"""The derivative of the nearest frame from its optimality condition, not from the solver's steps.

**Optimality.** The maximizer W of <W, M> over simplex ETFs satisfies (see ``solvers.polar``)

    c^2 M_c = T W   with   T = M_c W' symmetric positive semi-definite,   and   W W' = c^2 C,

where M_c = CM are the centered rows and C is the projector orthogonal to 1. Differentiate and split
dW = X W + N with N W' = 0; the constraint makes X skew. Multiply c^2 dM_c = dT W + T dW by W' from the right,
divide by c^2 and subtract the transpose, which removes dT:

    T X + X T = dM_c W' - W dM_c',         N = c^2 T^+ dM_c (I - W'W / c^2),
    dW = X W + c^2 T^+ dM_c (I - W'W / c^2).                                                            (*)

**One map for both modes.** W is the gradient of a norm of M, its maximum of <W, M>, so (*) is a Hessian and
self-adjoint: the same function is the Jacobian-vector product and the vector-Jacobian product.

**Conditioning.** In the eigenbasis of T the Sylvester equation divides by tau_i + tau_j. At neural collapse
all tau agree, and this is perfectly conditioned, where differentiating an SVD divides by tau_i - tau_j = 0.
A solver without an eigenbasis gives T itself, and the equation is solved by products (``kernels.polar``).
Directions absent from the data (tau below the rank cutoff) determine nothing; dropping them gives the
minimum-norm derivative.

**In few products.** Both terms of (*) that stand left of W combine into one K x K matrix X - T^+ dM_c W', so
(*) costs three products of size d x K x K, and the forward pass two.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from etflayers._torch import allow_in_graph, forward_mode, inside_transform
from etflayers.adjoints.stationary import LinearSolve, ParametricObjective, implicit_point
from etflayers.adjoints.sylvester import Eigenbasis, Root, Spectrum, solve_sylvester
from etflayers.geometry import centered, etf_radius
from etflayers.kernels.dispatch import Impl
from etflayers.kernels.polar import absent_directions, polar_adjoint
from etflayers.precision import full_precision
from etflayers.solvers import FrameSolver

__all__ = ["Implicit"]


def _derivative(
    direction: Tensor, linear: Tensor, frame: Tensor, inverse: Tensor, *spectrum: Tensor, impl: Impl
) -> Tensor:
    """dW of (*) for dM = ``direction`` (..., K, d), in its dtype."""
    with full_precision(direction):
        # Forward mode may run inside a backward pass that records no graph; its tangents still have to flow.
        if torch.is_grad_enabled() or forward_mode():
            d_frame = _differentiable(direction, linear, frame, _spectrum(inverse, *spectrum))
        elif len(spectrum) == 1:
            d_frame = polar_adjoint(direction, frame, inverse, *spectrum, impl=impl)
        else:
            d_frame = _fused(direction, frame, inverse, *spectrum)
        return d_frame.to(direction.dtype)


def _spectrum(inverse: Tensor, *spectrum: Tensor) -> Spectrum:
    """What the solver's factors say of T: its eigenbasis and divisors, or T alone."""
    if len(spectrum) == 1:
        return Root(*spectrum, absent_directions(inverse, *spectrum))
    return Eigenbasis(*spectrum)


def _has_complement(frame: Tensor) -> bool:
    # For d = K - 1, I - W'W / c^2 vanishes: computing it would only add rounding, divided by tau.
    return frame.shape[-1] > frame.shape[-2] - 1


def _fused(direction: Tensor, frame: Tensor, inverse: Tensor, basis: Tensor, divisors: Tensor) -> Tensor:
    """(*) in three large products, with the solver's factors as constants."""
    change, frame = centered(direction.to(basis.dtype)), frame.to(basis.dtype)
    inner = change @ frame.mT
    z = basis.mT @ inner @ basis
    left = basis @ ((z - z.mT) * divisors) @ basis.mT
    if not _has_complement(frame):
        return left @ frame
    left = torch.sub(left, inverse @ inner, alpha=1 / etf_radius(frame.shape[-2]) ** 2)
    d_frame = left @ frame
    d_frame += inverse @ change
    return d_frame


def _differentiable(direction: Tensor, linear: Tensor, frame: Tensor, spectrum: Spectrum) -> Tensor:
    """(*) as a function of M and W that can itself be differentiated, to any order."""
    square = etf_radius(frame.shape[-2]) ** 2
    dtype = spectrum[0].dtype
    change, frame = centered(direction.to(dtype)), frame.to(dtype)
    product = centered(linear.to(dtype)) @ frame.mT
    symmetric = (product + product.mT) / 2
    inner = change @ frame.mT
    turned = solve_sylvester(symmetric, inner - inner.mT, spectrum) @ frame
    if not _has_complement(frame):
        return turned
    # c^2 T^+ is the Y of T Y + Y T = 2 c^2 I: one primitive serves both terms.
    identity = torch.eye(frame.shape[-2], dtype=dtype, device=frame.device).expand_as(symmetric)
    inverse = solve_sylvester(symmetric, 2 * square * identity, spectrum)
    return turned + inverse @ (change - inner @ frame / square)


class _NearestFrame(torch.autograd.Function):
    """M -> W with the derivative (*). The solver's factors are further outputs, which carry no gradient."""

    generate_vmap_rule = True

    @staticmethod
    def forward(linear: Tensor, solver: FrameSolver) -> tuple[Tensor, ...]:
        with full_precision(linear):
            frame, *factors = solver(linear)
        return (frame.to(linear.dtype), *factors)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        ctx.mark_non_differentiable(*output[1:])
        ctx.set_materialize_grads(False)
        saved = (inputs[0], *output)
        ctx.save_for_backward(*saved)
        ctx.save_for_forward(*saved)
        ctx.impl = getattr(inputs[1], "impl", "auto")

    @staticmethod
    def backward(ctx: Any, grad: Tensor | None, *_: Tensor | None) -> tuple[Tensor | None, None]:
        return None if grad is None else _derivative(grad, *ctx.saved_tensors, impl=ctx.impl), None

    @staticmethod
    def jvp(ctx: Any, tangent: Tensor, _: None) -> tuple[Tensor | None, ...]:
        return (
            _derivative(tangent, *ctx.saved_tensors, impl=ctx.impl),
            *[None] * (len(ctx.saved_tensors) - 2),
        )


# As one node of the graph, torch.compile keeps both modes and the vmap rule of the function above; traced
# through, it would refuse the forward mode and lose the vmap rule.
@allow_in_graph
def _nearest_frame(linear: Tensor, solver: FrameSolver) -> Tensor:
    # What Function.apply itself calls after binding the arguments to the signature of `forward` by
    # introspection, which would take a fifth of the time of a small problem.
    direct = super(torch.autograd.Function, _NearestFrame).apply
    apply = _NearestFrame.apply if inside_transform() else direct
    frame: Tensor = apply(linear, solver)[0]  # type: ignore[no-untyped-call]
    return frame


@dataclass(frozen=True)
class Implicit:
    """Differentiate the optimality condition: exact, independent of the solver, stable at collapse.

    For the nearest ETF a closed form, twice and more differentiable, in reverse and forward mode; for
    rank-deficient means the derivative is the minimum-norm one. For a general objective (``attach``) the
    implicit function theorem, in reverse mode, to any order that the objective allows, with a linear system
    to solve on the way back. What is not solved well enough is said in a
    :class:`~etflayers.status.SolveWarning`.

    Args:
        tolerance: of that system: its relative residual; ``None``: eps^(3/4).
        max_iterations: of conjugate gradients.
    """

    tolerance: float | None = None
    max_iterations: int = 500

    def __call__(self, linear: Tensor, solver: FrameSolver) -> Tensor:
        """The frame that maximizes <W, linear>, for ``linear`` of shape ``(..., K, d)``."""
        frame: Tensor = _nearest_frame(linear, solver)
        return frame

    def attach(
        self, objective: ParametricObjective, point: Tensor, inputs: Sequence[Tensor]
    ) -> tuple[Tensor, LinearSolve]:
        """The minimizer ``point`` as a differentiable function of ``inputs``; the record of its backward."""
        return implicit_point(
            objective, point, inputs, tolerance=self.tolerance, max_iterations=self.max_iterations
        )
