"""The inner loss as a pure function of parameters, buffers and a batch."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call, vmap
from torch.nn.attention import SDPBackend, sdpa_kernel

from etflayers._torch import version
from etflayers.checks import require
from etflayers.distill.labels import class_indices
from etflayers.distill.layout import FlatLayout
from etflayers.errors import InvalidArgumentError
from etflayers.precision import autocast_dtype

__all__ = ["Buffers", "InnerLoss", "InnerObjective", "cross_entropy"]

Buffers = dict[str, Tensor]
# (model, images, labels) -> scalar; `model` is called like the module, with the parameters of the step.
InnerLoss = Callable[[Callable[..., Tensor], Tensor, Tensor], Tensor]


def cross_entropy(model: Callable[..., Tensor], images: Tensor, labels: Tensor) -> Tensor:
    """Mean cross-entropy of ``model(images)`` for hard labels ``(B,)`` or soft labels ``(B, K)``.

    Hard labels may be of any integer dtype; soft ones have that of the logits.

    >>> cross_entropy(nn.Identity(), torch.zeros(2, 4), torch.tensor([0, 3])).exp()
    tensor(4.)
    """
    logits = model(images)
    if not labels.dtype.is_floating_point:
        labels = class_indices("labels", labels)
        require(
            labels.ndim < logits.ndim,
            f"labels of an integer dtype must be class indices, got shape {tuple(labels.shape)} for outputs "
            f"{tuple(logits.shape)}: use .argmax(-1) for one-hot vectors, or their dtype",
        )
    return F.cross_entropy(logits, labels)


@dataclass(frozen=True)
class InnerObjective:
    """The loss with everything that a step does not change: model, constants and the precision.

    With ``copies`` the parameters and buffers are those of so many networks, stacked, and the loss is the sum
    of theirs. The networks do not see each other: the derivative of the sum for each one's parameters is that
    of its own loss, and update rules are elementwise. So all of them are trained as one, by vmap, and what
    walks back through the steps need not know.

    Buffers go in and come out: the model works on copies, and what comes out is no part of a graph, as in
    training by hand. Values of parameters that are not trained pass through with them. Autocast, and the
    training or eval mode of each module, are those of the place where the objective was made, also when a
    step is re-derived later, from within a backward pass.
    """

    model: nn.Module
    loss: InnerLoss
    layout: FlatLayout
    device: torch.device
    autocast: torch.dtype | None
    modes: tuple[bool, ...]
    copies: int | None = None

    @classmethod
    def here(
        cls,
        model: nn.Module,
        loss: InnerLoss,
        layout: FlatLayout,
        device: torch.device,
        copies: int | None = None,
    ) -> InnerObjective:
        """The objective under the autocast and in the modes that are in force now."""
        autocast = autocast_dtype(device.type)
        modes = tuple(module.training for module in model.modules())
        return cls(model, loss, layout, device, autocast, modes, copies)

    def __call__(
        self, theta: Tensor, buffers: Buffers, images: Tensor, labels: Tensor
    ) -> tuple[Tensor, Buffers]:
        """The loss, and the buffers after the model has run."""
        params = self.layout.unflatten(theta)
        before = version(theta)
        # Without a cache: what a cast remembers must not outlive the graph of its step.
        with (
            _in_modes(self.model, self.modes),
            _stateless(self.model),
            # The fused kernels of attention have no second derivative.
            sdpa_kernel(SDPBackend.MATH),
            torch.autocast(
                self.device.type, dtype=self.autocast, enabled=self.autocast is not None, cache_enabled=False
            ),
        ):
            try:
                if self.copies is None:
                    loss, buffers = self._of_one(params, buffers, images, labels)
                else:
                    each = vmap(self._of_one, in_dims=(0, 0, None, None), randomness="different")
                    losses, buffers = each(params, buffers, images, labels)
                    loss = losses.sum()
            finally:  # also if autograd has noticed first, in words that name no parameter
                require(
                    version(theta) == before,
                    "model changes its parameters in place while it runs, which cannot be differentiated: "
                    "compute the changed weights by torch.nn.utils.parametrize instead",
                )
        require(
            loss.requires_grad or not torch.is_grad_enabled(),
            "loss(model, images, labels) does not depend on the parameters that are trained: call `model` in "
            "it, outside torch.no_grad()",
        )
        return loss, {name: value.detach() for name, value in buffers.items()}

    def _of_one(
        self, params: Mapping[str, Tensor], buffers: Buffers, images: Tensor, labels: Tensor
    ) -> tuple[Tensor, Buffers]:
        """Loss and buffers of one network."""
        frozen = {name: value.detach() for name, value in self.model.named_parameters()}
        after = {n: value if n in frozen else value.clone() for n, value in buffers.items()}
        state = {**frozen, **params, **after}

        def model(*args: object, **kwargs: object) -> Tensor:
            output: Tensor = functional_call(self.model, state, args, kwargs)
            return output

        loss = self.loss(model, images, labels)
        _require_scalar_loss(loss)
        return loss, {name: state[name] for name in buffers}


def _require_scalar_loss(loss: object) -> None:
    if not isinstance(loss, Tensor) or loss.shape != ():
        shape = f"shape {tuple(loss.shape)}" if isinstance(loss, Tensor) else type(loss).__name__
        raise InvalidArgumentError(
            f"loss(model, images, labels) must return a scalar tensor, got {shape}: take the mean over the "
            "batch"
        )


@contextmanager
def _in_modes(model: nn.Module, modes: tuple[bool, ...]) -> Iterator[None]:
    """Each module in the mode given for it, and afterwards as it was."""
    modules = list(model.modules())
    before = [module.training for module in modules]
    for module, mode in zip(modules, modes, strict=True):
        module.training = mode
    try:
        yield
    finally:
        for module, mode in zip(modules, before, strict=True):
            module.training = mode


@contextmanager
def _stateless(model: nn.Module) -> Iterator[None]:
    """Raise if the model changes a tensor that is neither parameter nor buffer."""
    before = _plain_tensors(model)
    yield
    changed = [name for name, mark in _plain_tensors(model).items() if before.get(name) != mark]
    require(
        not changed,
        f"model changes the tensors {changed} while it runs, and a step that is re-derived would find them "
        "changed: register them with register_buffer, or do not keep them",
    )


def _plain_tensors(model: nn.Module) -> dict[str, tuple[int, int]]:
    return {
        f"{path}.{name}" if path else name: (id(value), version(value))
        for path, module in model.named_modules()
        for name, value in vars(module).items()
        if isinstance(value, Tensor)
    }
