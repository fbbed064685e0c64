"""The declarative layer: its output is the minimizer of an objective on the Stiefel manifold."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from etflayers.adjoints import Adjoint, as_adjoint
from etflayers.checks import require, require_floating
from etflayers.functional.stiefel import CriticalPoint, solve_stiefel, stiefel_argmin
from etflayers.geometry import project_stiefel, random_stiefel
from etflayers.linalg import ConjugateGradients
from etflayers.nn.distributed import overwrite
from etflayers.nn.keeps_precision import KeepsPrecision
from etflayers.precision import working_dtype
from etflayers.solvers import StiefelSolver, as_stiefel_solver

__all__ = ["StiefelNode"]


class StiefelNode(KeepsPrecision):
    r"""A layer that solves ``Q(x) = argmin f(Q, x)`` over ``Q'Q = I`` and differentiates the solution.

    The gradient reaches every input, and every parameter of an objective that is an ``nn.Module``. With the
    default adjoint it comes from the implicit function theorem: exact at a strict local minimum, whichever
    solver found it, and at the memory of a few points and one evaluation.

    **Warm start.** A training pass leaves its solution in the buffer ``start``, and the next pass starts
    there, member by member; where the size of the batch has changed, all members start from the first one's.
    Which of several local minima is found can therefore depend on what was solved before. In eval mode the
    buffer is read and not written: the same inputs give the same answer.

    **Checks.** ``forward`` warns where the solver did not reach a critical point, and the backward pass where
    its linear system shows that the point is no strict minimum. ``solve`` looks at second order before any
    gradient is asked for.

    Args:
        objective: ``(Q, *inputs)`` to ``(B,)`` in plain PyTorch, twice differentiable, deterministic, each
            value a function of its own member of the batch alone. Q is ``(B, dim, num_frames)``.
        dim: d.
        num_frames: n <= d.
        solver: how the minimizer is found; default :class:`~etflayers.solvers.RiemannianNewton`.
        adjoint: how the gradient flows; default :class:`~etflayers.adjoints.Implicit`.
        linear_solver: see :func:`~etflayers.functional.stiefel_argmin`.
        unrolled_steps: see :func:`~etflayers.functional.stiefel_argmin`.
        generator: random numbers of the first start, which is Haar distributed.
        device: of the buffer.
        dtype: of the buffer: float32 (also where a half precision is asked for) or float64. ``half()`` and
            ``bfloat16()`` leave it.

    Attributes:
        start: ``(B, d, n)``, where the next solve starts.

    Raises:
        InvalidArgumentError: n outside 1..d, or a dtype that is not floating point.

    Reference:
        Gould, Hartley, Campbell (2019), Deep declarative networks, arXiv 1909.04866.

    >>> def distance(q, target):
    ...     return (q - target).square().sum((-2, -1))
    >>> node = StiefelNode(distance, dim=4, num_frames=2)
    >>> target = torch.full((1, 4, 2), 0.1, requires_grad=True) + 3 * torch.eye(4, 2)
    >>> torch.allclose(node(target).mT @ node(target), torch.eye(2), atol=1e-5)
    True
    >>> node.solve(target).message
    'the minimizer is unique and was found'
    """

    start: Tensor

    def __init__(
        self,
        objective: Callable[..., Tensor],
        dim: int,
        num_frames: int,
        *,
        solver: StiefelSolver | None = None,
        adjoint: Adjoint | None = None,
        linear_solver: ConjugateGradients | None = None,
        unrolled_steps: int = 100,
        generator: torch.Generator | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        dtype = torch.get_default_dtype() if dtype is None else dtype
        require_floating("dtype", dtype)
        as_stiefel_solver(solver)
        as_adjoint(adjoint)
        self.objective = objective
        self.solver = solver
        self.adjoint = adjoint
        self.linear_solver = linear_solver
        self.unrolled_steps = unrolled_steps
        start = random_stiefel(
            dim, num_frames, batch=(1,), generator=generator, device=device, dtype=working_dtype(dtype)
        )
        self.register_buffer("start", start)

    def forward(self, *inputs: Tensor) -> Tensor:
        """The minimizer for the given inputs.

        Args:
            inputs: what the objective reads besides Q; the first leads with the batch dimension B, and so do
                the others that belong to members of the batch. Without inputs B is 1.

        Returns:
            Q, ``(B, d, n)``, in the widest dtype of inputs and parameters.

        Raises:
            InvalidArgumentError: see :func:`~etflayers.functional.stiefel_argmin`.
            NonFiniteError: the objective or its gradient is NaN or infinite.

        Warns:
            SolveWarning: the solver or, in the backward pass, the linear solve did not converge.
        """
        point: Tensor = stiefel_argmin(self.objective, *inputs, start=self._start(inputs), **self._options())
        self._remember(point)
        return point

    def solve(self, *inputs: Tensor) -> CriticalPoint:
        """As ``forward``, with a status to second order instead of warnings and exceptions.

        Args:
            inputs: as in ``forward``.

        Returns:
            The solution record; its ``point`` is differentiable, its diagnostics are not.

        Raises:
            InvalidArgumentError: see :func:`~etflayers.functional.stiefel_argmin`.
        """
        found: CriticalPoint = solve_stiefel(
            self.objective, *inputs, start=self._start(inputs), **self._options()
        )
        self._remember(found.point)
        return found

    def _options(self) -> dict[str, Any]:
        """How to solve and to differentiate, as arguments."""
        return {
            "solver": self.solver,
            "adjoint": self.adjoint,
            "linear_solver": self.linear_solver,
            "unrolled_steps": self.unrolled_steps,
        }

    def _start(self, inputs: tuple[Tensor, ...]) -> Tensor:
        require(
            not inputs or (isinstance(inputs[0], Tensor) and inputs[0].ndim >= 1 and len(inputs[0]) >= 1),
            "the first input must be a tensor that leads with the batch dimension, of size 1 or more: "
            "unsqueeze(0) a single problem",
        )
        batch = len(inputs[0]) if inputs else 1
        return self.start if batch == len(self.start) else self.start[:1].expand(batch, -1, -1)

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Draw a start anew from PyTorch's global generator, for a batch of one."""
        _, dim, num_frames = self.start.shape
        start = random_stiefel(dim, num_frames, batch=(1,), device=self.start.device, dtype=self.start.dtype)
        self.start = torch.empty_like(start)
        overwrite(self.start, start)

    @torch.no_grad()
    def _remember(self, point: Tensor) -> None:
        if not self.training:
            return
        # A new tensor, not a write into the old one: a graph of the pass before may still need that.
        exact = point.dtype == self.start.dtype
        point = point.detach().clone() if exact else project_stiefel(point.to(self.start.dtype))
        if bool(torch.isfinite(point).all()):
            self.start = point

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        stored = state_dict.get(f"{prefix}start")
        if stored is not None and stored.shape[-2:] == self.start.shape[-2:]:
            # The batch of the checkpoint need not be that of this node.
            self.start = self.start.new_empty(stored.shape)
        super()._load_from_state_dict(state_dict, prefix, *args)

    def extra_repr(self) -> str:
        """The arguments."""
        _, dim, num_frames = self.start.shape
        name = getattr(self.objective, "__name__", type(self.objective).__name__)
        named = "" if isinstance(self.objective, nn.Module) else f"{name}, "
        return f"{named}dim={dim}, num_frames={num_frames}"
