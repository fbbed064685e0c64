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
from dataclasses import dataclass, field, replace
from typing import Any, Literal, NamedTuple, Protocol

import torch
from torch import Tensor

from etflayers.checks import require, require_values
from etflayers.distill.compiled import CompileCache, CompiledProblem
from etflayers.distill.objective import Buffers
from etflayers.distill.problem import (
    Controls,
    InnerProblem,
    Mode,
    Pulled,
    State,
    Step,
    StepTaker,
    lacks_forward_mode,
    lacks_second_derivative,
)
from etflayers.distill.settings import Settings
from etflayers.errors import EtfLayersError, InvalidArgumentError

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
            step = problem.step(t, state, buffers, controls)
            loss, state, buffers = problem.advance(step, create_graph=t in window)
            losses.append(loss)
        return Trained(state[0], buffers, _stacked(losses, theta))

    def held(self, steps: int) -> int:
        """The graphs of all steps."""
        return steps


@dataclass(frozen=True)
class StepAdjoint:
    """Keep the state before each step, and re-derive the step going back: the memory of one step's graph.

    The state is the parameters, the optimizer's vectors and the buffers. The hypergradient is exact. To
    differentiate it again, use :class:`KeptGraph`.

    Args:
        mode: how second derivatives are taken: ``"reverse"`` over reverse, or ``"forward"`` over reverse. The
            latter does not exist for every operator; where it does not, a warning says so, and the steps are
            re-derived in reverse.
        checkpoint_every: keep the state of every so many steps only and run the steps between them again;
            ``"sqrt"`` for the root of their number. It pays where states weigh more than the graph of a step.
        compile: trace and compile the step and its derivative at the first call, for every t and for later
            calls with the same model, the same ``loss`` object and the same shapes. This takes minutes for a
            deep network; what is compiled lives in this object, and on disk in Inductor's cache. The step
            must not draw random numbers or branch on values.

    Raises:
        InvalidArgumentError: an unknown mode, or ``checkpoint_every`` < 1; when it is used, ``compile`` for a
            step that cannot be compiled.

    Reference:
        Maclaurin, Duvenaud, Adams (2015), arXiv 1502.03492; Chen, Xu, Zhang, Guestrin (2016), arXiv
        1604.06174.

    >>> StepAdjoint(checkpoint_every="sqrt").spacing(100)
    10
    """

    mode: Mode = "reverse"
    checkpoint_every: int | Literal["sqrt"] = 1
    compile: bool = False
    _cache: CompileCache = field(default_factory=CompileCache, init=False, repr=False, compare=False)

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
        captured: tuple[Tensor, ...] = ()
        if window and torch.is_grad_enabled():
            captured = problem.captures(problem.step(window.start, problem.start(theta), buffers, controls))
        require(
            not (captured and self.compile),
            "compile=True: loss, model or optimizer read tensors that require a gradient and are not given "
            f"to the loop (of shapes {[tuple(value.shape) for value in captured]}), to which compiled steps "
            "send none: detach them, or use StepAdjoint(compile=False)",
        )
        theta, losses, *values = _Steps.apply(  # type: ignore[no-untyped-call]
            self, problem, window, buffers, theta, *controls, *captured
        )
        return Trained(theta, dict(zip(buffers, values, strict=True)), losses)

    def taker(self, problem: InnerProblem) -> StepTaker:
        """What takes the steps of the problem: its own code, or the code compiled for it."""
        return CompiledProblem(problem, self._cache) if self.compile else problem

    def pull(self, taker: StepTaker, step: Step, cotangents: State, mode: Mode) -> tuple[Pulled, Mode]:
        """What :meth:`StepTaker.pull` returns, and the mode that worked."""
        try:
            return self._pull(taker, step, cotangents, mode)
        except (NotImplementedError, RuntimeError) as error:
            if isinstance(error, EtfLayersError) or not lacks_second_derivative(error):
                raise
            raise InvalidArgumentError(
                "model or loss use an operator whose backward pass PyTorch cannot differentiate, and the "
                f"hypergradient needs second derivatives: write it with other operators ({error})"
            ) from error

    def _pull(self, taker: StepTaker, step: Step, cotangents: State, mode: Mode) -> tuple[Pulled, Mode]:
        if mode == "forward":
            try:
                return taker.pull(step, cotangents, "forward"), "forward"
            except EtfLayersError:
                raise
            except (NotImplementedError, RuntimeError) as error:
                if not lacks_forward_mode(error) or lacks_second_derivative(error):
                    raise
                warnings.warn(
                    "forward over reverse is not possible here, so the steps are re-derived in reverse "
                    f"(StepAdjoint(mode='reverse') is silent): {str(error).splitlines()[0]}",
                    RuntimeWarning,
                    stacklevel=3,
                )
        return taker.pull(step, cotangents, "reverse"), "reverse"


@dataclass
class _Trajectory:
    """The states before the steps of a window: some of them kept, the others found again."""

    window: range
    spacing: int
    vectors: Tensor | None = None
    buffers: list[Buffers] = field(default_factory=list)

    @property
    def kept(self) -> range:
        """The steps whose states are kept."""
        return self.window[:: self.spacing]

    def record(self, t: int, state: State, buffers: Buffers) -> None:
        if t not in self.kept:
            return
        if self.vectors is None:  # one block: many small ones would fragment the heap between the graphs
            self.vectors = state[0].new_empty(len(self.kept), len(state), len(state[0]))
        torch.stack(state, out=self.vectors[self.kept.index(t)])
        self.buffers.append(buffers)

    def backwards(
        self, problem: InnerProblem, taker: StepTaker, controls: Controls, needed: tuple[bool, ...]
    ) -> Iterator[tuple[int, Step]]:
        """The steps with their numbers, from the last to the first."""
        stop = self.window.stop
        for index in reversed(range(len(self.kept))):
            assert self.vectors is not None
            t = self.kept[index]
            state, buffers = self.vectors[index].unbind(), self.buffers[index]
            segment = [problem.step(t, state, buffers, controls, needed)]
            for s in range(t + 1, stop):
                _, state, buffers = taker.advance(segment[-1])
                segment.append(problem.step(s, state, buffers, controls, needed))
            while segment:
                yield t + len(segment) - 1, segment.pop()
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
        *given: Tensor,
    ) -> tuple[Tensor, ...]:
        controls = tuple(value.detach() for value in given[: problem.num_controls])
        state, losses, names = problem.start(theta.detach()), [], tuple(buffers)
        ctx.adjoint, ctx.problem = adjoint, problem
        taker = adjoint.taker(problem)
        trajectory = _Trajectory(window, adjoint.spacing(len(window)))
        for t in range(window.stop):
            if any(ctx.needs_input_grad):
                trajectory.record(t, state, buffers)
            loss, state, buffers = taker.advance(problem.step(t, state, buffers, controls))
            losses.append(loss)
        recorded = _stacked(losses, theta)
        # Saved and not just kept: autograd drops what is saved together with the graph.
        values = [each[name] for each in trajectory.buffers for name in names]
        ctx.save_for_backward(*given, recorded, trajectory.vectors, *values)
        ctx.rest = len(given), window, trajectory.spacing, names, Settings.now()
        # Copies: a buffer or a parameter that no step has changed would be an input handed back.
        outputs = (state[0].clone(), recorded.clone(), *(value.clone() for value in buffers.values()))
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
        count, window, spacing, names, settings = ctx.rest
        saved = ctx.saved_tensors
        given, (recorded, vectors, *values) = saved[:count], saved[count:]
        trajectory = _Trajectory(window, spacing, vectors)
        rest = iter(values)
        trajectory.buffers = [{name: next(rest) for name in names} for _ in trajectory.kept]
        problem = replace(ctx.problem, captured=given[ctx.problem.num_controls :])
        taker = ctx.adjoint.taker(problem)
        controls = tuple(value.detach() for value in given[: problem.num_controls])
        totals = [torch.zeros_like(c) if n else None for c, n in zip(given, needed, strict=True)]
        cotangents = (cotangent, *(torch.zeros_like(cotangent) for _ in range(problem.optimizer.num_slots)))
        mode = ctx.adjoint.mode
        with settings.restored():
            for t, step in trajectory.backwards(problem, taker, controls, needed[: problem.num_controls]):
                (loss, cotangents, parts), mode = ctx.adjoint.pull(taker, step, cotangents, mode)
                _require_replayed(loss, recorded[t], t, taker.tolerance(loss))
                problem.accumulate(totals, parts, t)
        begins = window.start == 0
        return (*skipped, cotangents[0] if begins and ctx.needs_input_grad[4] else None, *totals)


def _stacked(losses: list[Tensor], theta: Tensor) -> Tensor:
    return torch.stack(losses).detach() if losses else theta.detach().new_zeros(0)


def _require_replayed(loss: Tensor, recorded: Tensor, t: int, tolerance: float) -> None:
    """A step that is re-derived has to be the step that was taken, up to rounding."""
    require_values(
        (loss - recorded).abs() <= tolerance * (1 + recorded.abs()),
        f"model or loss gave another value when step {t} was re-derived: keep what changes in buffers, and "
        "draw random numbers from the default generator, which is replayed",
    )
