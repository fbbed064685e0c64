r"""The nearest frame as a differentiable function of the linear form that it maximizes.

**Optimality.** The maximizer W of <W, M> over simplex ETFs satisfies (see ``solvers.state``)

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
A solver without an eigenbasis gives T itself, and the equation is solved by products. This module does not
know which: it asks the state that the solver returned. Directions absent from the data (tau below the rank
cutoff) determine nothing; dropping them gives the minimum-norm derivative.

**In few products.** Both terms of (*) that stand left of W combine into one K x K matrix X - T^+ dM_c W', so
(*) costs three products of size d x K x K, and the forward pass two (``kernels.polar``).

M <-> linear, W <-> frame, c^2 <-> square, dM <-> direction, dM_c <-> change, dM_c W' <-> inner,
T <-> symmetric, c^2 T^+ <-> inverse.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from etflayers._torch import allow_in_graph, apply_function, forward_mode, inside_transform
from etflayers.checks import reads_values, require
from etflayers.errors import NonFiniteError
from etflayers.geometry import centered, etf_radius
from etflayers.kernels.polar import FrameState, polar_adjoint
from etflayers.linalg import solve_sylvester
from etflayers.precision import full_precision
from etflayers.solvers import FrameSolver

__all__ = ["FrameProblem"]


@dataclass
class FrameProblem:
    """Find the simplex ETF W that maximizes <W, M>.

    Attributes:
        linear: M, ``(..., K, d)``, finite, float32 or float64.
        solver: how W is found.
        precision: of the data, where M has been computed from them in a wider dtype; ``None``: that of M.
    """

    linear: Tensor
    solver: FrameSolver
    precision: torch.dtype | None = None

    def implicit(self) -> Tensor:
        """W, ``(..., K, d)``, in the dtype of M, with the derivative (*)."""
        frame: Tensor = _nearest_frame(self.linear, self.solver, self.precision)
        return frame

    def unrolled(self) -> Tensor:
        """W with the derivative of the solver's operations.

        Raises:
            InvalidArgumentError: the solver records none.
        """
        linear = self.linear
        if linear.requires_grad and reads_values(linear):
            linear = linear.view_as(linear)  # the hook belongs to this use of the tensor, not to the caller's
            linear.register_hook(_require_finite_gradient)  # type: ignore[no-untyped-call]
        frame = self._solve(linear)
        require(
            (frame.requires_grad or not (linear.requires_grad and torch.is_grad_enabled()))
            and (_has_tangent(frame) or not _has_tangent(linear)),
            f"adjoint=Unrolled() has nothing to differentiate: {type(self.solver).__name__} records no "
            "operations; use adjoint=Implicit()",
        )
        return frame

    def detached(self) -> Tensor:
        """W, a constant."""
        with torch.no_grad():
            return self._solve(self.linear.detach())

    def _solve(self, linear: Tensor) -> Tensor:
        with full_precision(linear):
            return self.solver.solve(linear, self.precision).frame.to(linear.dtype)


def _require_finite_gradient(grad: Tensor | None) -> None:
    # An undefined gradient, which stands for zero, comes as None.
    if grad is not None and reads_values(grad) and not bool(torch.isfinite(grad).all()):
        raise NonFiniteError(
            "the unrolled gradient is not finite: a factorization cannot be differentiated where singular "
            "values coincide, as they do at neural collapse; use adjoint=Implicit()"
        )


def _has_tangent(tensor: Tensor) -> bool:
    return forward_mode() and torch.autograd.forward_ad.unpack_dual(tensor).tangent is not None  # type: ignore[no-untyped-call]


def _derivative(direction: Tensor, linear: Tensor, state: FrameState) -> Tensor:
    """dW of (*) for dM = ``direction`` (..., K, d), in its dtype."""
    with full_precision(direction):
        # Forward mode may run inside a backward pass that records no graph; its tangents still have to flow.
        if torch.is_grad_enabled() or forward_mode():
            d_frame = _differentiable(direction, linear, state)
        else:
            d_frame = polar_adjoint(direction, state)
        return d_frame.to(direction.dtype)


def _differentiable(direction: Tensor, linear: Tensor, state: FrameState) -> Tensor:
    """(*) as a function of M and W that can itself be differentiated, to any order."""
    num_classes, in_features = state.frame.shape[-2:]
    if in_features == 1:
        return torch.zeros_like(direction)  # two frames, -1 and 1, with nothing between them
    square = etf_radius(num_classes) ** 2
    spectrum = state.spectrum
    change, frame = centered(direction.to(state.dtype)), state.frame.to(state.dtype)
    product = centered(linear.to(state.dtype)) @ frame.mT
    symmetric = (product + product.mT) / 2
    inner = change @ frame.mT
    turned = solve_sylvester(symmetric, inner - inner.mT, spectrum) @ frame
    if in_features == num_classes - 1:
        # I - W'W / c^2 vanishes: computing it would only add rounding, divided by tau.
        return turned
    # c^2 T^+ is the X of T X + X T = 2 c^2 I: one primitive serves both terms.
    identity = torch.eye(num_classes, dtype=state.dtype, device=frame.device).expand_as(symmetric)
    inverse = solve_sylvester(symmetric, 2 * square * identity, spectrum)
    return turned + inverse @ (change - inner @ frame / square)


class _Form:
    """What makes a state of its tensors again; it is known once the solver has run.

    An output of the function below that is no tensor would be refused by ``torch.jit.trace``.
    """

    of: Callable[..., FrameState]

    def __repr__(self) -> str:
        return "_Form()"  # two traces of one model are compared as text


class _NearestFrame(torch.autograd.Function):
    """M -> W with the derivative (*).

    The other tensors of the state go out as well, so that they can be saved; they carry no gradient.
    """

    generate_vmap_rule = True

    @staticmethod
    def forward(
        linear: Tensor, solver: FrameSolver, precision: torch.dtype | None, form: _Form
    ) -> tuple[Tensor, ...]:
        with full_precision(linear):
            state = solver.solve(linear, precision)
            frame, *rest = state.tensors()
        form.of = state.form
        return (frame.to(linear.dtype), *rest)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        ctx.form = inputs[3].of
        ctx.mark_non_differentiable(*output[1:])
        # The vmap rule that PyTorch 2.6 generates takes no None for the gradient of an output without one.
        ctx.set_materialize_grads(inside_transform())
        ctx.save_for_backward(inputs[0], *output)
        ctx.save_for_forward(inputs[0], *output)

    @staticmethod
    def backward(ctx: Any, grad: Tensor | None, *_: Tensor | None) -> tuple[Tensor | None, None, None, None]:
        if grad is None:
            return None, None, None, None
        linear, *tensors = ctx.saved_tensors
        return _derivative(grad, linear, ctx.form(*tensors)), None, None, None

    @staticmethod
    def jvp(ctx: Any, tangent: Tensor, *_: None) -> tuple[Tensor | None, ...]:
        linear, *tensors = ctx.saved_tensors
        return (_derivative(tangent, linear, ctx.form(*tensors)), *(None for _ in tensors[1:]))


# As one node of the graph, torch.compile keeps both modes and the vmap rule of the function above; traced
# through, it would refuse the forward mode and lose the vmap rule.
@allow_in_graph
def _nearest_frame(linear: Tensor, solver: FrameSolver, precision: torch.dtype | None) -> Tensor:
    frame: Tensor = apply_function(_NearestFrame, linear, solver, precision, _Form())[0]
    return frame
