r"""One step of the inner loop and its derivative, as pure functions of tensors.

**A step.** ``g = grad l(theta; x, y)``, then ``(theta+, s+) = U(theta, s, g; eta, hyperparameters)`` with the
elementwise rule U of the optimiser and its slots s.

**Its derivative, going back.** For cotangents (lambda, mu) of (theta+, s+), the rule alone sends back

    (lambda_theta, mu_s, v, d_eta, d_hyper) = U'(theta, s, g)^T (lambda, mu),      v the cotangent of g,

which is elementwise, and g sends v on through the second derivatives of the loss,

    theta gets  lambda_theta + H v,      x gets  d/dx <v, grad l>,      y gets  d/dy <v, grad l>.

The three products with v are the derivative of <v, grad l> (reverse over reverse), or, because second
derivatives are symmetric, that of (d/dtheta, d/dx, d/dy) l along theta' = v (forward over reverse).
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor
from torch.autograd import forward_ad

from etflayers.distill.objective import Buffers, InnerObjective
from etflayers.distill.optimizers import InnerOptimizer

__all__ = ["Controls", "InnerProblem", "Mode", "State"]

Mode = Literal["reverse", "forward"]
# The parameters as one vector (P,), then the optimiser's slots, each (P,).
State = tuple[Tensor, ...]
# Images, labels, learning rates, then the optimiser's tensor fields; for all steps or for one.
Controls = tuple[Tensor, ...]
_DATA, _PER_STEP = 2, 3  # the loss sees the first two; the first three differ from step to step


@dataclass(frozen=True)
class InnerProblem:
    """What is trained, on what loss, by which rule, and which batch, rate and random seed each step has.

    Attributes:
        objective: the inner loss.
        optimizer: the update rule, whose tensor fields are named in ``names``.
        names: of the tensors in the controls after the rates.
        seeds: one for each step.
    """

    objective: InnerObjective
    optimizer: InnerOptimizer
    names: tuple[str, ...]
    seeds: tuple[int, ...]

    def start(self, theta: Tensor) -> State:
        """The state before the first step."""
        return (theta, *(torch.zeros_like(theta) for _ in range(self.optimizer.num_slots)))

    @staticmethod
    def select(controls: Controls, t: int) -> Controls:
        """The controls of step t: batches and rates are gone through in turn."""
        images, labels, rates, *rest = controls
        return images[t % len(images)], labels[t % len(labels)], rates[t % len(rates)], *rest

    @staticmethod
    def accumulate(totals: list[Tensor | None], parts: list[Tensor | None], t: int) -> None:
        """Add the cotangents of the controls of step t to those of all steps: the adjoint of ``select``."""
        for place, (total, part) in enumerate(zip(totals, parts, strict=True)):
            if total is not None and part is not None:
                (total[t % len(total)] if place < _PER_STEP else total).add_(part)

    @contextmanager
    def randomness(self, t: int) -> Iterator[None]:
        """The random stream of step t, which is the same whenever the step runs."""
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

    def gradient(
        self,
        t: int,
        theta: Tensor,
        buffers: Buffers,
        images: Tensor,
        labels: Tensor,
        *,
        create_graph: bool = False,
    ) -> tuple[Tensor, Tensor, Buffers]:
        """Loss, gradient and the buffers after step t."""
        with torch.enable_grad(), self.randomness(t):
            if not theta.requires_grad:
                theta = theta.detach().requires_grad_()
            loss, buffers = self.objective(theta, buffers, images, labels)
            (gradient,) = torch.autograd.grad(loss, theta, create_graph=create_graph)
        return loss.detach(), gradient, buffers

    def update(self, t: int, state: State, gradient: Tensor, controls: Controls) -> State:
        """The rule U at step t, of which the controls are."""
        _, _, rate, *values = controls
        optimizer = self.optimizer
        if values:
            optimizer = replace(optimizer, **dict(zip(self.names, values, strict=True)))  # type: ignore[type-var]
        theta, *slots = state
        theta, slots_after = optimizer.update(theta, gradient, tuple(slots), rate, t + 1)
        return (theta, *slots_after)

    def advance(
        self, t: int, state: State, buffers: Buffers, controls: Controls
    ) -> tuple[Tensor, State, Buffers]:
        """Loss, state and buffers after step t, leaving no graph."""
        with torch.no_grad():
            data = (value.detach() for value in controls[:_DATA])
            loss, gradient, buffers = self.gradient(t, state[0].detach(), buffers, *data)
            return loss, self.update(t, state, gradient, controls), buffers

    def pull(
        self,
        t: int,
        state: State,
        buffers: Buffers,
        controls: Controls,
        cotangents: State,
        needed: tuple[bool, ...],
        mode: Mode,
    ) -> tuple[Tensor, State, list[Tensor | None]]:
        """Loss, and the cotangents of the state and of the needed controls, of step t."""
        second_order = self._forward_over_reverse if mode == "forward" else self._reverse_over_reverse
        return second_order(t, state, buffers, controls, cotangents, needed)

    def _reverse_over_reverse(
        self,
        t: int,
        state: State,
        buffers: Buffers,
        controls: Controls,
        cotangents: State,
        needed: tuple[bool, ...],
    ) -> tuple[Tensor, State, list[Tensor | None]]:
        theta = state[0].detach().requires_grad_()
        data = _variables(controls[:_DATA], needed[:_DATA])
        loss, gradient, _ = self.gradient(t, theta, buffers, *data, create_graph=True)
        state_back, direction, controls_back = self._pull_update(
            t, state, gradient.detach(), controls, cotangents, needed
        )
        inputs = [theta, *(value for value in data if value.requires_grad)]
        products: list[Tensor | None] = [None] * len(inputs)
        if gradient.requires_grad:  # else the loss is linear in everything
            products = list(torch.autograd.grad(gradient, inputs, direction, allow_unused=True))
        return loss, *_combine(state_back, controls_back, products, needed)

    def _forward_over_reverse(
        self,
        t: int,
        state: State,
        buffers: Buffers,
        controls: Controls,
        cotangents: State,
        needed: tuple[bool, ...],
    ) -> tuple[Tensor, State, list[Tensor | None]]:
        # The direction v has to be known before the gradient is. An affine rule has the same v everywhere.
        if self.optimizer.affine:
            guess = torch.zeros_like(state[0])
        else:
            _, guess, _ = self.gradient(t, state[0].detach(), buffers, *controls[:_DATA])
        _, direction, _ = self._pull_update(t, state, guess, controls, cotangents, needed)
        data = _variables(controls[:_DATA], needed[:_DATA])
        with torch.enable_grad(), self.randomness(t), forward_ad.dual_level():
            # A copy, because the dual of a view carries a tangent of the size of its base.
            start = state[0].detach().clone().requires_grad_()
            theta = forward_ad.make_dual(start, direction)  # type: ignore[no-untyped-call]
            loss, _ = self.objective(theta, buffers, *data)
            inputs = [theta, *(value for value in data if value.requires_grad)]
            first, *others = torch.autograd.grad(loss, inputs, allow_unused=True)
            gradient, curvature = _unpacked(first)
            products = [curvature, *(None if dual is None else _unpacked(dual)[1] for dual in others)]
            loss, _ = _unpacked(loss)
        state_back, _, controls_back = self._pull_update(t, state, gradient, controls, cotangents, needed)
        return loss, *_combine(state_back, controls_back, products, needed)

    def _pull_update(
        self,
        t: int,
        state: State,
        gradient: Tensor,
        controls: Controls,
        cotangents: State,
        needed: tuple[bool, ...],
    ) -> tuple[State, Tensor, list[Tensor | None]]:
        """Cotangents of the state, the gradient and the controls through the rule alone."""
        with torch.enable_grad():
            state = tuple(value.detach().requires_grad_() for value in state)
            gradient = gradient.detach().requires_grad_()
            rest = _variables(controls[_DATA:], needed[_DATA:])
            after = self.update(t, state, gradient, (*controls[:_DATA], *rest))
            wanted = [value for value in rest if value.requires_grad]
            inputs = [*state, gradient, *wanted]
            found = torch.autograd.grad(after, inputs, cotangents, allow_unused=True, materialize_grads=True)
        state_back, direction = found[: len(state)], found[len(state)]
        values = iter(found[len(state) + 1 :])
        rest_back = [next(values) if value.requires_grad else None for value in rest]
        return state_back, direction, [None] * _DATA + rest_back


def _unpacked(dual: Tensor) -> tuple[Tensor, Tensor | None]:
    """Value and tangent, without a graph."""
    value, tangent = forward_ad.unpack_dual(dual)  # type: ignore[no-untyped-call]
    return value.detach(), None if tangent is None else tangent.detach()


def _variables(values: Controls, needed: tuple[bool, ...]) -> list[Tensor]:
    """Leaves of a new graph, differentiable where that is needed."""
    return [value.detach().requires_grad_(need) for value, need in zip(values, needed, strict=True)]


def _combine(
    state_back: State,
    controls_back: list[Tensor | None],
    products: list[Tensor | None],
    needed: tuple[bool, ...],
) -> tuple[State, list[Tensor | None]]:
    """The rule's cotangents with the products added: H v to the parameters, the others to the data."""
    curvature, *others = products
    theta_back, *slots_back = state_back
    if curvature is not None:
        theta_back = theta_back + curvature
    values = iter(others)
    data_back = [next(values) if need else None for need in needed[:_DATA]]
    return (theta_back, *slots_back), [*data_back, *controls_back[_DATA:]]
