r"""How the hypergradient flows back through the steps of the inner loop.

Both adjoints give the same numbers. :class:`KeptGraph` keeps the graph of all steps, which autograd walks
back: memory is T times that of a step. :class:`StepAdjoint` keeps only the state before each step and walks
back by hand: with cotangents of the state after step t, it re-derives the step from the state before it, adds
what the step sends to the data, and goes on with the cotangents of the state before. The graph of one step is
all that ever lives.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple, Protocol

import torch
from torch import Tensor

from etflayers.distill.objective import Buffers
from etflayers.distill.problem import Controls, InnerProblem, Mode, State
from etflayers.errors import EtfLayersError, require, require_values

__all__ = ["InnerAdjoint", "KeptGraph", "StepAdjoint", "Trained"]


class Trained(NamedTuple):
    """The parameters as one vector, the buffers and the losses ``(T,)`` after the last step."""

    theta: Tensor
    buffers: Buffers
    losses: Tensor


class InnerAdjoint(Protocol):
    """A way to run the steps of an inner loop so that their result can be differentiated."""

    def __call__(
        self, problem: InnerProblem, theta: Tensor, buffers: Buffers, controls: Controls, window: range
    ) -> Trained:
        """Run the steps up to ``window.stop``; the derivative flows through those in ``window``."""
        ...

    def held(self, steps: int) -> int:
        """How many steps' memory is held at once at most, for a window of so many steps."""
        ...


@dataclass(frozen=True)
class KeptGraph:
    """Keep the graph of every step: the plain reference, differentiable to any order, memory T times a step.

    >>> KeptGraph()
    KeptGraph()
    """

    def __call__(
        self, problem: InnerProblem, theta: Tensor, buffers: Buffers, controls: Controls, window: range
    ) -> Trained:
        """See :class:`InnerAdjoint`."""
        state = problem.start(theta)
        losses = []
        for t in range(window.stop):
            chosen = problem.select(controls, t)
            if t in window:
                images, labels, *_ = chosen
                loss, gradient, buffers = problem.gradient(
                    t, state[0], buffers, images, labels, create_graph=True
                )
                state = problem.update(t, state, gradient, chosen)
            else:
                loss, state, buffers = problem.advance(t, state, buffers, chosen)
            losses.append(loss)
        return Trained(state[0], buffers, _stacked(losses, theta))

    def held(self, steps: int) -> int:
        """The graphs of all steps."""
        return steps


@dataclass(frozen=True)
class StepAdjoint:
    """Keep the state before each step, and re-derive the step going back: the memory of one step's graph.

    The state is the parameters, the optimiser's vectors and the buffers. The hypergradient is exact. To
    differentiate it again, use :class:`KeptGraph`.

    Args:
        mode: how second derivatives are taken: ``"reverse"`` over reverse, or ``"forward"`` over reverse. The
            latter does not exist for every operator; where it does not, a warning says so, and the steps are
            re-derived in reverse.
        checkpoint_every: keep the state of every so many steps only and run the steps between them again;
            ``"sqrt"`` for the root of their number. It pays where states weigh more than the graph of a step.

    Raises:
        InvalidArgumentError: an unknown mode, or ``checkpoint_every`` < 1.

    Reference:
        Maclaurin, Duvenaud, Adams (2015), arXiv 1502.03492; Chen, Xu, Zhang, Guestrin (2016), arXiv
        1604.06174.

    >>> StepAdjoint(checkpoint_every="sqrt").spacing(100)
    10
    """

    mode: Mode = "reverse"
    checkpoint_every: int | Literal["sqrt"] = 1

    def __post_init__(self) -> None:
        require(
            self.mode in ("reverse", "forward"), f"mode must be 'reverse' or 'forward', got {self.mode!r}"
        )
        require(
            self.checkpoint_every == "sqrt"
            or (isinstance(self.checkpoint_every, int) and self.checkpoint_every >= 1),
            f"checkpoint_every must be 'sqrt' or an integer >= 1, got {self.checkpoint_every!r}",
        )

    def spacing(self, steps: int) -> int:
        """Number of steps between two states that are kept, for a window of so many steps."""
        if isinstance(self.checkpoint_every, int):
            return self.checkpoint_every
        return max(1, math.isqrt(steps))

    def held(self, steps: int) -> int:
        """The states that are kept, and those between two of them while their steps are re-derived."""
        spacing = self.spacing(steps)
        return math.ceil(steps / spacing) + min(spacing, steps) - 1

    def __call__(
        self, problem: InnerProblem, theta: Tensor, buffers: Buffers, controls: Controls, window: range
    ) -> Trained:
        """See :class:`InnerAdjoint`."""
        theta, losses, *values = _Steps.apply(self, problem, window, buffers, theta, *controls)  # type: ignore[no-untyped-call]
        return Trained(theta, dict(zip(buffers, values, strict=True)), losses)

    def pull(
        self,
        problem: InnerProblem,
        step: tuple[int, State, Buffers],
        controls: Controls,
        cotangents: State,
        needed: tuple[bool, ...],
        mode: Mode,
    ) -> tuple[Tensor, State, list[Tensor | None], Mode]:
        """What :meth:`InnerProblem.pull` returns, and the mode that worked."""
        if mode == "forward":
            try:
                return *problem.pull(*step, controls, cotangents, needed, "forward"), "forward"
            except EtfLayersError:
                raise
            except (NotImplementedError, RuntimeError) as error:
                if "forward" not in str(error).lower():
                    raise
                warnings.warn(
                    "forward over reverse is not possible here, so the steps are re-derived in reverse "
                    f"(StepAdjoint(mode='reverse') is silent): {str(error).splitlines()[0]}",
                    RuntimeWarning,
                    stacklevel=2,
                )
        return *problem.pull(*step, controls, cotangents, needed, "reverse"), "reverse"


class _Trajectory:
    """The states before the steps of a window: some of them kept, the others found again."""

    def __init__(self, window: range, spacing: int) -> None:
        self.window = window
        self.kept = window[::spacing]
        self.vectors: Tensor | None = None
        self.buffers: list[Buffers] = []

    def record(self, t: int, state: State, buffers: Buffers) -> None:
        if t not in self.kept:
            return
        if self.vectors is None:  # one block: many small ones would fragment the heap between the graphs
            self.vectors = state[0].new_empty(len(self.kept), len(state), len(state[0]))
        torch.stack(state, out=self.vectors[self.kept.index(t)])
        self.buffers.append(buffers)

    def backwards(self, problem: InnerProblem, controls: Controls) -> Iterator[tuple[int, State, Buffers]]:
        """Step, state and buffers before it, from the last step to the first."""
        stop = self.window.stop
        for index in reversed(range(len(self.kept))):
            assert self.vectors is not None
            t = self.kept[index]
            segment = [(self.vectors[index].unbind(), self.buffers[index])]
            for s in range(t, stop - 1):
                _, state, buffers = problem.advance(s, *segment[-1], problem.select(controls, s))
                segment.append((state, buffers))
            for s in reversed(range(t, stop)):
                yield s, *segment.pop()
            stop = t


class _Steps(torch.autograd.Function):
    """All steps as one node of the graph."""

    @staticmethod
    def forward(
        ctx: Any,
        adjoint: StepAdjoint,
        problem: InnerProblem,
        window: range,
        buffers: Buffers,
        theta: Tensor,
        *controls: Tensor,
    ) -> tuple[Tensor, ...]:
        state, losses = problem.start(theta.detach()), []
        ctx.save_for_backward(*controls)
        controls = tuple(value.detach() for value in controls)
        ctx.adjoint, ctx.problem = adjoint, problem
        ctx.trajectory = _Trajectory(window, adjoint.spacing(len(window)))
        for t in range(window.stop):
            if any(ctx.needs_input_grad):
                ctx.trajectory.record(t, state, buffers)
            loss, state, buffers = problem.advance(t, state, buffers, problem.select(controls, t))
            losses.append(loss)
        ctx.losses = _stacked(losses, theta)
        # Copies: a buffer or a parameter that no step has changed would be an input handed back.
        outputs = (state[0].clone(), ctx.losses.clone(), *(value.clone() for value in buffers.values()))
        ctx.mark_non_differentiable(*outputs[1:])
        ctx.set_materialize_grads(False)
        return outputs

    @staticmethod
    def backward(ctx: Any, cotangent: Tensor | None, *_: Tensor | None) -> tuple[Tensor | None, ...]:
        require(
            not torch.is_grad_enabled(),
            "create_graph=True: StepAdjoint gives a hypergradient that cannot be differentiated again; use "
            "adjoint=KeptGraph() for that",
        )
        skipped, needed = (None,) * 4, ctx.needs_input_grad[5:]
        if cotangent is None:
            return (*skipped, None, *(None for _ in needed))
        problem, adjoint = ctx.problem, ctx.adjoint
        controls = tuple(value.detach() for value in ctx.saved_tensors)
        totals = [torch.zeros_like(c) if n else None for c, n in zip(controls, needed, strict=True)]
        cotangents = (cotangent, *(torch.zeros_like(cotangent) for _ in range(problem.optimizer.num_slots)))
        mode = adjoint.mode
        for t, state, buffers in ctx.trajectory.backwards(problem, controls):
            loss, cotangents, parts, mode = adjoint.pull(
                problem, (t, state, buffers), problem.select(controls, t), cotangents, needed, mode
            )
            _require_replayed(loss, ctx.losses[t], t)
            problem.accumulate(totals, parts, t)
        begins = ctx.trajectory.window.start == 0
        return (*skipped, cotangents[0] if begins and ctx.needs_input_grad[4] else None, *totals)


def _stacked(losses: list[Tensor], theta: Tensor) -> Tensor:
    return torch.stack(losses).detach() if losses else theta.detach().new_zeros(0)


def _require_replayed(loss: Tensor, recorded: Tensor, t: int) -> None:
    """A step that is re-derived has to be the step that was taken, up to the rounding of parallel sums."""
    tolerance = torch.finfo(loss.dtype).eps ** 0.5
    require_values(
        (loss - recorded).abs() <= tolerance * (1 + recorded.abs()),
        f"model or loss gave another value when step {t} was re-derived: keep what changes in buffers, and "
        "draw random numbers from the default generator, which is replayed",
    )
