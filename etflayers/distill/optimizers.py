r"""Inner optimizers as pure update rules, differentiable in all they are given.

A rule is elementwise and acts on one flat vector that holds all parameters, so that a step is a handful of
operations whatever the number of layers. Any field that is a tensor is a variable of the hypergradient.
"""

from __future__ import annotations

from dataclasses import dataclass, fields, is_dataclass
from typing import ClassVar, Protocol, runtime_checkable

import torch
from torch import Tensor

from etflayers.checks import require, require_values

__all__ = ["SGD", "Adam", "AdamW", "InnerOptimizer", "hyperparameters", "require_rule"]

Scalar = float | Tensor


@runtime_checkable
class InnerOptimizer(Protocol):
    """An elementwise update rule, a dataclass whose tensor fields are variables of the hypergradient.

    Attributes:
        num_slots: how many vectors of the size of the parameters the rule remembers; they start at zero.
        affine: whether the new parameters and slots are affine in the gradient.
    """

    @property
    def num_slots(self) -> int: ...  # noqa: D102

    @property
    def affine(self) -> bool: ...  # noqa: D102

    def update(
        self, params: Tensor, grads: Tensor, slots: tuple[Tensor, ...], lr: Tensor, step: int | Tensor
    ) -> tuple[Tensor, tuple[Tensor, ...]]:
        """The parameters and the slots after a step; ``step`` counts from 1. Nothing is changed in place."""
        ...


def hyperparameters(optimizer: InnerOptimizer) -> dict[str, Tensor]:
    """The fields of an optimizer that are tensors."""
    values = {field.name: getattr(optimizer, field.name) for field in fields(optimizer)}  # type: ignore[arg-type]
    return {name: value for name, value in values.items() if isinstance(value, Tensor)}


def require_rule(optimizer: object) -> None:
    """Raise unless ``optimizer`` is an update rule, as one of ``torch.optim`` or a class is not."""
    kind = optimizer if isinstance(optimizer, type) else type(optimizer)
    require(
        kind is not optimizer and is_dataclass(optimizer) and isinstance(optimizer, InnerOptimizer),
        "optimizer must be an update rule, such as etflayers.distill.SGD(momentum=0.9), Adam() or AdamW(); "
        "the learning rate goes to the loop as lr=. Got "
        + (f"the class {kind.__name__}" if kind is optimizer else f"an object of {kind}"),
    )


def _require_scalar(name: str, value: Scalar, *, below_one: bool) -> None:
    interval = "[0, 1)" if below_one else "[0, inf)"
    message = f"{name} must be a number in {interval}, or a tensor of shape () that holds one"
    bound = 1.0 if below_one else torch.inf
    if isinstance(value, Tensor):
        require(value.shape == (), f"{message}: got a tensor of shape {tuple(value.shape)}")
        require_values((value.detach() >= 0) & (value.detach() < bound), message)
    else:
        number = isinstance(value, float | int) and not isinstance(value, bool)
        require(number and 0 <= value < bound, f"{message}: got {value!r}")


@dataclass(frozen=True)
class SGD:
    r"""Gradient descent: ``b <- mu b + g + lambda theta``, ``theta <- theta - eta b``.

    With ``nesterov`` the step is along ``g + lambda theta + mu b`` with the new b. As ``torch.optim.SGD``.

    Args:
        momentum: mu in [0, 1), a number or a tensor ``()``.
        nesterov: whether to look ahead.
        weight_decay: lambda >= 0, a number or a tensor ``()``.

    Raises:
        InvalidArgumentError: a value out of its range, or Nesterov without momentum.

    Reference:
        Sutskever, Martens, Dahl, Hinton (2013), "On the importance of initialization and momentum".

    >>> theta, slots = torch.tensor([1.0]), (torch.tensor([0.0]),)
    >>> SGD(momentum=0.9).update(theta, torch.tensor([2.0]), slots, torch.tensor(0.1), 1)
    (tensor([0.8000]), (tensor([2.]),))
    """

    momentum: Scalar = 0.0
    nesterov: bool = False
    weight_decay: Scalar = 0.0

    affine: ClassVar[bool] = True

    def __post_init__(self) -> None:
        _require_scalar("momentum", self.momentum, below_one=True)
        _require_scalar("weight_decay", self.weight_decay, below_one=False)
        require(
            not self.nesterov or self.num_slots > 0,
            "nesterov=True looks ahead along the momentum, which is 0: pass momentum > 0",
        )

    @property
    def num_slots(self) -> int:
        """One vector, the momentum, or none without it."""
        return int(isinstance(self.momentum, Tensor) or self.momentum > 0)

    def update(
        self, params: Tensor, grads: Tensor, slots: tuple[Tensor, ...], lr: Tensor, step: int | Tensor
    ) -> tuple[Tensor, tuple[Tensor, ...]]:
        """See :class:`InnerOptimizer`."""
        direction = _decayed(grads, params, self.weight_decay)
        if not slots:
            return params - lr * direction, ()
        buffer = self.momentum * slots[0] + direction
        direction = direction + self.momentum * buffer if self.nesterov else buffer
        return params - lr * direction, (buffer,)


@dataclass(frozen=True)
class Adam:
    r"""Adam: ``theta <- theta - eta m^ / (sqrt(v^) + eps)`` with bias-corrected moments m^, v^.

    Weight decay is added to the gradient. As ``torch.optim.Adam``. Where the second moment is zero the
    derivative of its root is taken as zero: the first moment that it divides is zero too, so this is exact.

    Args:
        beta1: decay of the first moment, in [0, 1), a number or a tensor ``()``.
        beta2: decay of the second moment, in [0, 1), a number or a tensor ``()``.
        eps: added to the root of the second moment.
        weight_decay: >= 0, a number or a tensor ``()``.

    Raises:
        InvalidArgumentError: a value out of its range.

    Reference:
        Kingma, Ba (2014), arXiv 1412.6980.

    >>> zero = torch.zeros(1)
    >>> Adam().update(torch.tensor([1.0]), torch.tensor([2.0]), (zero, zero), torch.tensor(0.1), 1)[0]
    tensor([0.9000])
    """

    beta1: Scalar = 0.9
    beta2: Scalar = 0.999
    eps: float = 1e-8
    weight_decay: Scalar = 0.0

    num_slots: ClassVar[int] = 2
    affine: ClassVar[bool] = False

    def __post_init__(self) -> None:
        _require_scalar("beta1", self.beta1, below_one=True)
        _require_scalar("beta2", self.beta2, below_one=True)
        _require_scalar("weight_decay", self.weight_decay, below_one=False)
        require(0 < self.eps < torch.inf, f"eps must be a positive number, got {self.eps}")

    def update(
        self, params: Tensor, grads: Tensor, slots: tuple[Tensor, ...], lr: Tensor, step: int | Tensor
    ) -> tuple[Tensor, tuple[Tensor, ...]]:
        """See :class:`InnerOptimizer`."""
        return self._moved(params, _decayed(grads, params, self.weight_decay), slots, lr, step)

    def _moved(
        self, params: Tensor, grads: Tensor, slots: tuple[Tensor, ...], lr: Tensor, step: int | Tensor
    ) -> tuple[Tensor, tuple[Tensor, ...]]:
        first = self.beta1 * slots[0] + (1 - self.beta1) * grads
        second = self.beta2 * slots[1] + (1 - self.beta2) * grads * grads
        root = _safe_sqrt(second) / (1 - self.beta2**step) ** 0.5 + self.eps
        return params - lr / (1 - self.beta1**step) * first / root, (first, second)


@dataclass(frozen=True)
class AdamW(Adam):
    r"""Adam with decoupled weight decay: ``theta <- (1 - eta lambda) theta`` before Adam's step.

    As ``torch.optim.AdamW``.

    Args:
        beta1: see :class:`Adam`.
        beta2: see :class:`Adam`.
        eps: see :class:`Adam`.
        weight_decay: lambda >= 0, a number or a tensor ``()``.

    Raises:
        InvalidArgumentError: a value out of its range.

    Reference:
        Loshchilov, Hutter (2017), arXiv 1711.05101.

    >>> zero = torch.zeros(1)
    >>> AdamW().update(torch.tensor([1.0]), torch.tensor([2.0]), (zero, zero), torch.tensor(0.1), 1)[0]
    tensor([0.8990])
    """

    weight_decay: Scalar = 1e-2

    def update(
        self, params: Tensor, grads: Tensor, slots: tuple[Tensor, ...], lr: Tensor, step: int | Tensor
    ) -> tuple[Tensor, tuple[Tensor, ...]]:
        """See :class:`InnerOptimizer`."""
        return self._moved((1 - lr * self.weight_decay) * params, grads, slots, lr, step)


def _decayed(grads: Tensor, params: Tensor, weight_decay: Scalar) -> Tensor:
    if not isinstance(weight_decay, Tensor) and weight_decay == 0:
        return grads
    return grads + weight_decay * params


def _safe_sqrt(square: Tensor) -> Tensor:
    """The root, with derivative 0 instead of infinity at 0."""
    positive = square > 0
    return torch.where(positive, torch.where(positive, square, 1).sqrt(), 0)
