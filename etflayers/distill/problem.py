r"""One step of the inner loop and its derivative, as pure functions of tensors.

**A step.** ``g = grad l(theta; x, y)``, then ``(theta+, s+) = U(theta, s, g; eta, hyperparameters)`` with the
elementwise rule U of the optimizer and its slots s.

**Its derivative, going back.** For cotangents (lambda, mu) of (theta+, s+), the rule alone sends back

    (lambda_theta, mu_s, v, d_eta, d_hyper) = U'(theta, s, g)^T (lambda, mu),      v the cotangent of g,

which is elementwise, and g sends v on through the second derivatives of the loss,

    theta gets  lambda_theta + H v,      x gets  d/dx <v, grad l>,      y gets  d/dy <v, grad l>.

The three products with v are the derivative of <v, grad l> (reverse over reverse), or, because second
derivatives are symmetric, that of (d/dtheta, d/dx, d/dy) l along theta' = v (forward over reverse). A tensor
that the loss closes over gets the same product as x and y.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Literal, NamedTuple, Protocol

import torch
from torch import Tensor
from torch.autograd import forward_ad

from etflayers.checks import require
from etflayers.distill.captures import captured_tensors, depends_on_others
from etflayers.distill.objective import Buffers, InnerObjective
from etflayers.distill.optimizers import InnerOptimizer

__all__ = [
    "Controls",
    "InnerProblem",
    "Mode",
    "Pulled",
    "State",
    "Step",
    "StepTaker",
    "Taken",
    "lacks_forward_mode",
    "lacks_second_derivative",
]

Mode = Literal["reverse", "forward"]
# The parameters as one vector, then the optimizer's slots, each of the same shape.
State = tuple[Tensor, ...]
# Images, labels, learning rates, then the optimizer's tensor fields; for all steps or for one.
Controls = tuple[Tensor, ...]
_NO_DERIVATIVE = re.compile(r"derivative for .*backward.* is not implemented")
_DATA, _PER_STEP = 2, 3  # the loss sees the first two; the first three differ from step to step


@dataclass(frozen=True)
class Step:
    """Where a step starts and what steers it.

    Attributes:
        t: its number, from 0; a tensor where the step is traced once for all t.
        state: parameters and slots before it.
        buffers: the model's buffers before it.
        controls: batch, rate and hyperparameters.
        needed: which of the controls the hypergradient is wanted for.
    """

    t: int | Tensor
    state: State
    buffers: Buffers
    controls: Controls
    needed: tuple[bool, ...] = ()

    @property
    def data(self) -> Controls:
        """What the loss sees: images and labels."""
        return self.controls[:_DATA]

    def variables(self) -> list[Tensor]:
        """The controls as leaves of a new graph, differentiable where that is needed."""
        pairs = zip(self.controls, self.needed, strict=True)
        return [value.detach().requires_grad_(need) for value, need in pairs]


class Taken(NamedTuple):
    """The loss before a step, and what the step leaves behind."""

    loss: Tensor
    state: State
    buffers: Buffers


class Pulled(NamedTuple):
    """The loss before a step that has been re-derived, and the cotangents of all that it starts from.

    Those of the controls are followed by those of the captured tensors.
    """

    loss: Tensor
    state: State
    controls: list[Tensor | None]


class StepTaker(Protocol):
    """Whatever takes a step and goes back through it."""

    def advance(self, step: Step) -> Taken:
        """Take the step, leaving no graph."""
        ...

    def pull(self, step: Step, cotangents: State, mode: Mode) -> Pulled:
        """Take the step again, and send the cotangents of the state after it to where it started from."""
        ...

    def tolerance(self, loss: Tensor) -> float:
        """How much a loss that is found twice may differ, relative to one plus its size."""
        ...


@dataclass(frozen=True)
class InnerProblem:
    """What is trained, on what loss, by which rule, and which batch, rate and random seed each step has.

    Attributes:
        objective: the inner loss.
        optimizer: the update rule, whose tensor fields are named in ``names``.
        names: of the tensors in the controls after the rates.
        seeds: one for each step.
        captured: tensors that a step that is re-derived sends cotangents to although it is not given them.
    """

    objective: InnerObjective
    optimizer: InnerOptimizer
    names: tuple[str, ...]
    seeds: tuple[int, ...]
    captured: tuple[Tensor, ...] = ()

    @property
    def num_controls(self) -> int:
        """Length of the controls."""
        return _PER_STEP + len(self.names)

    def start(self, theta: Tensor) -> State:
        """The state before the first step."""
        return (theta, *(torch.zeros_like(theta) for _ in range(self.optimizer.num_slots)))

    @staticmethod
    def step(
        t: int, state: State, buffers: Buffers, controls: Controls, needed: tuple[bool, ...] = ()
    ) -> Step:
        """Step t, with its own out of all controls: batches and rates are gone through in turn."""
        images, labels, rates, *rest = controls
        chosen = (images[t % len(images)], labels[t % len(labels)], rates[t % len(rates)], *rest)
        return Step(t, state, buffers, chosen, needed)

    @staticmethod
    def accumulate(totals: list[Tensor | None], parts: list[Tensor | None], t: int) -> None:
        """Add the cotangents of step t's controls to those of all controls: the adjoint of :meth:`step`."""
        for place, (total, part) in enumerate(zip(totals, parts, strict=True)):
            if total is not None and part is not None:
                (total[t % len(total)] if place < _PER_STEP else total).add_(part)

    @contextmanager
    def randomness(self, t: int | Tensor) -> Iterator[None]:
        """The random stream of step t, which is the same whenever the step runs."""
        if isinstance(t, Tensor):  # a step that is traced for all t must not draw
            yield
            return
        device = self.objective.device
        if device.type == "cpu":
            with torch.random.fork_rng([]):
                torch.default_generator.manual_seed(self.seeds[t])
                yield
        else:
            accelerator = torch.get_device_module(device)
            with torch.random.fork_rng([device.index], device_type=device.type):
                torch.default_generator.manual_seed(self.seeds[t])
                with accelerator.device(device):
                    accelerator.manual_seed(self.seeds[t])
                yield

    def advance(self, step: Step, *, create_graph: bool = False) -> Taken:
        """Take the step; without a graph, or as a differentiable function of all that it starts from."""
        if not create_graph:
            step = replace(
                step,
                state=tuple(value.detach() for value in step.state),
                controls=tuple(value.detach() for value in step.controls),
            )
        loss, gradient, buffers = self._gradient(step, step.state[0], step.data, create_graph=create_graph)
        with torch.set_grad_enabled(create_graph):
            return Taken(loss, self._update(step.t, step.state, gradient, step.controls), buffers)

    def captures(self, step: Step) -> tuple[Tensor, ...]:
        """What loss, model and rule read beside the step: see :func:`captured_tensors`."""

        def run() -> tuple[list[Tensor], State]:
            state = tuple(value.detach().requires_grad_() for value in step.state)
            controls = tuple(value.detach() for value in step.controls)
            with torch.enable_grad(), self.randomness(step.t):
                loss, _ = self.objective(state[0], step.buffers, *controls[:_DATA])
            # An elementwise rule reads the same tensors whatever the gradient is.
            with torch.enable_grad():
                after = self._update(step.t, state, torch.zeros_like(state[0]), controls)
            return [loss, *after], state

        return captured_tensors(run)

    def loss(self, step: Step) -> Tensor:
        """The loss before the step, alone."""
        with torch.no_grad(), self.randomness(step.t):
            return self.objective(step.state[0], step.buffers, *step.data)[0]

    def tolerance(self, loss: Tensor) -> float:
        """See :class:`StepTaker`: parallel sums round differently."""
        return float(torch.finfo(loss.dtype).eps ** 0.5)

    def pull(self, step: Step, cotangents: State, mode: Mode) -> Pulled:
        """See :class:`StepTaker`."""
        if mode == "forward":
            return self._forward_over_reverse(step, cotangents)
        return self._reverse_over_reverse(step, cotangents)

    def _gradient(
        self, step: Step, theta: Tensor, data: Controls, *, create_graph: bool
    ) -> tuple[Tensor, Tensor, Buffers]:
        """Loss, gradient and the buffers after the step."""
        with torch.enable_grad(), self.randomness(step.t):
            if not theta.requires_grad:
                theta = theta.detach().requires_grad_()
            loss, buffers = self.objective(theta, step.buffers, *data)
            (gradient,) = torch.autograd.grad(loss, theta, create_graph=create_graph)
        return loss.detach(), gradient, buffers

    def _update(self, t: int | Tensor, state: State, gradient: Tensor, controls: Controls) -> State:
        """The rule U at step t, of which the controls are."""
        _, _, rate, *values = controls
        optimizer = self.optimizer
        if values:
            optimizer = replace(optimizer, **dict(zip(self.names, values, strict=True)))  # type: ignore[type-var]
        theta, *slots = state
        theta, slots_after = optimizer.update(theta, gradient, tuple(slots), rate, t + 1)
        return (theta, *slots_after)

    def _reverse_over_reverse(self, step: Step, cotangents: State) -> Pulled:
        theta = step.state[0].detach().requires_grad_()
        data = tuple(step.variables()[:_DATA])
        loss, gradient, _ = self._gradient(step, theta, data, create_graph=True)
        state_back, direction, controls_back = self._pull_update(step, gradient, cotangents)
        inputs = self._inputs(theta, data)
        self._require_no_others(gradient, inputs)
        products: list[Tensor | None] = [None] * len(inputs)
        if gradient.requires_grad:  # else the loss is linear in everything
            products = list(torch.autograd.grad(gradient, inputs, direction, allow_unused=True))
        return _combined(step, loss, state_back, controls_back, products)

    def _forward_over_reverse(self, step: Step, cotangents: State) -> Pulled:
        # The direction v has to be known before the gradient is. An affine rule has the same v everywhere.
        guess = torch.zeros_like(step.state[0])
        if not self.optimizer.affine:
            _, guess, _ = self._gradient(step, step.state[0].detach(), step.data, create_graph=False)
        _, direction, _ = self._pull_update(step, guess, cotangents)
        data = step.variables()[:_DATA]
        with torch.enable_grad(), self.randomness(step.t), forward_ad.dual_level():
            # A copy, because the dual of a view carries a tangent of the size of its base.
            start = step.state[0].detach().clone().requires_grad_()
            theta = forward_ad.make_dual(start, direction)  # type: ignore[no-untyped-call]
            loss, _ = self.objective(theta, step.buffers, *data)
            inputs = self._inputs(theta, data)
            self._require_no_others(loss, [start, *inputs[1:]])
            first, *others = torch.autograd.grad(loss, inputs, allow_unused=True)
            gradient, curvature = _unpacked(first)
            products = [curvature, *(None if dual is None else _unpacked(dual)[1] for dual in others)]
            loss, _ = _unpacked(loss)
        state_back, _, controls_back = self._pull_update(step, gradient, cotangents)
        return _combined(step, loss, state_back, controls_back, products)

    def _inputs(self, theta: Tensor, data: Sequence[Tensor]) -> list[Tensor]:
        """What a product of second derivatives is taken for."""
        return [theta, *(value for value in data if value.requires_grad), *self.captured]

    def _require_no_others(self, end: Tensor, inputs: Sequence[Tensor]) -> None:
        """The tensors that a step reads are looked for once, when the loop begins."""
        require(
            not depends_on_others([end], inputs),
            "loss or model read a tensor that requires a gradient in some steps only, not in the first, and "
            "StepAdjoint would lose it: multiply it by zero there, or use adjoint=KeptGraph(), which carries "
            "every gradient",
        )

    def _pull_update(
        self, step: Step, gradient: Tensor, cotangents: State
    ) -> tuple[State, Tensor, list[Tensor | None]]:
        """Cotangents of the state, the gradient, the controls and the captures through the rule alone."""
        with torch.enable_grad():
            state = tuple(value.detach().requires_grad_() for value in step.state)
            gradient = gradient.detach().requires_grad_()
            controls = tuple(step.variables())
            after = self._update(step.t, state, gradient, controls)
            wanted = [value for value in controls[_DATA:] if value.requires_grad]
            inputs = [*state, gradient, *wanted, *self.captured]
            found = torch.autograd.grad(after, inputs, cotangents, allow_unused=True, materialize_grads=True)
        state_back, direction = found[: len(state)], found[len(state)]
        values = iter(found[len(state) + 1 :])
        controls_back = [next(values) if need else None for need in step.needed[_DATA:]]
        return state_back, direction, [*controls_back, *values]


def lacks_forward_mode(error: Exception) -> bool:
    """Whether an operator has complained that it has no forward mode."""
    return isinstance(error, NotImplementedError | RuntimeError) and "forward" in str(error).lower()


def lacks_second_derivative(error: Exception) -> bool:
    """Whether an operator has complained that its backward pass cannot be differentiated."""
    return isinstance(error, NotImplementedError | RuntimeError) and bool(_NO_DERIVATIVE.search(str(error)))


def _unpacked(dual: Tensor) -> tuple[Tensor, Tensor | None]:
    """Value and tangent, without a graph."""
    value, tangent = forward_ad.unpack_dual(dual)  # type: ignore[no-untyped-call]
    return value.detach(), None if tangent is None else tangent.detach()


def _combined(
    step: Step,
    loss: Tensor,
    state_back: State,
    controls_back: list[Tensor | None],
    products: list[Tensor | None],
) -> Pulled:
    """The rule's cotangents with the products added: H v to the parameters, the others to their own."""
    curvature, *others = products
    theta_back, *slots_back = state_back
    if curvature is not None:
        theta_back = theta_back + curvature
    values = iter(others)
    data_back = [next(values) if need else None for need in step.needed[:_DATA]]
    rest = len(step.needed) - _DATA
    captured_back = [_sum(*pair) for pair in zip(controls_back[rest:], values, strict=True)]
    return Pulled(loss, (theta_back, *slots_back), [*data_back, *controls_back[:rest], *captured_back])


def _sum(first: Tensor | None, second: Tensor | None) -> Tensor | None:
    return first if second is None else second if first is None else first + second
