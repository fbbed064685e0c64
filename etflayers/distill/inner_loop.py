"""Train a model for some steps, differentiably in the data, the rates and the initial parameters."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from dataclasses import dataclass
from numbers import Real
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from etflayers._torch import inside_transform
from etflayers.checks import require, require_floating, require_values
from etflayers.distill.adjoints import InnerAdjoint, StepAdjoint
from etflayers.distill.auto import AutoAdjoint
from etflayers.distill.layout import FlatLayout, trainable_parameters, under_first_names
from etflayers.distill.objective import Buffers, InnerLoss, InnerObjective, cross_entropy
from etflayers.distill.optimizers import SGD, InnerOptimizer, hyperparameters, require_rule
from etflayers.distill.problem import InnerProblem
from etflayers.errors import NonFiniteError

__all__ = ["InnerSolution", "UnrolledInnerLoop", "unrolled_inner_loop"]


@dataclass(frozen=True)
class InnerSolution:
    """What the inner loop ends with.

    Attributes:
        params: the final parameters by name, differentiable.
        buffers: the final buffers by name; constants of the graph.
        losses: the inner loss before each step, ``(T,)``; no part of the graph.

    >>> solution = InnerSolution({"weight": torch.ones(2)}, {"mean": torch.zeros(2)}, torch.tensor([0.5]))
    >>> solution.state
    {'weight': tensor([1., 1.]), 'mean': tensor([0., 0.])}
    """

    params: dict[str, Tensor]
    buffers: Buffers
    losses: Tensor

    @property
    def state(self) -> dict[str, Tensor]:
        """Parameters and buffers together, for ``torch.func.functional_call(model, solution.state, ...)``."""
        return {**self.params, **self.buffers}


def unrolled_inner_loop(
    model: nn.Module,
    params: Mapping[str, Tensor],
    images: Tensor,
    labels: Tensor,
    *,
    lr: float | Tensor,
    epochs: int = 1,
    loss: InnerLoss = cross_entropy,
    optimizer: InnerOptimizer | None = None,
    adjoint: InnerAdjoint | Literal["auto"] | None = None,
    window: range | None = None,
    buffers: Mapping[str, Tensor] | None = None,
    generator: torch.Generator | None = None,
    initializations: int | None = None,
) -> InnerSolution:
    r"""The parameters ``theta_T`` of ``theta_{t+1} = U(theta_t, grad l(theta_t; x_t, y_t); eta_t)``.

    Differentiable in images, soft labels, learning rates, the optimizer's tensor fields (momentum, weight
    decay) and the initial parameters. The S batches are gone through in turn, ``epochs`` times, T = S epochs
    steps. The model itself is not changed. It runs in the mode it is in: in training mode a batch norm uses
    the statistics of the batch. Buffers are threaded from step to step and carry no gradient. Random numbers
    of the default generator, as dropout draws them, are replayed when a step is re-derived.

    Args:
        model: any module that keeps its state in parameters and buffers.
        params: the initial value of each parameter to train, by name; the others are constants. A tied weight
            may be given under one of its names or under all of them; it is trained as one.
        images: ``(S, B, ...)``, S batches.
        labels: ``(S, B)`` integers, or ``(S, B, ...)`` soft labels or whatever ``loss`` takes.
        lr: at least 0, a number, or a tensor ``()`` for all steps, ``(S,)`` for the steps of each epoch, or
            ``(T,)``.
        epochs: how often to go through the batches.
        loss: ``(model, images, labels) -> scalar`` for one batch, where ``model`` is called like the module.
            Augmentation, subsampling and targets for a head belong here.
        optimizer: the update rule; default :class:`SGD`.
        adjoint: how the derivative flows; ``"auto"`` for :class:`AutoAdjoint`; default :class:`StepAdjoint`.
        window: steps through which it flows, ``range(start, stop)``; training ends at ``stop``. Default all.
        buffers: the initial buffers, by name, and values for parameters that are not trained; what is not
            given is the model's.
        generator: source of the random seeds of the steps; default the global one.
        initializations: n, to train from n initial states at once by ``torch.func.vmap``: ``params``, and
            ``buffers`` if they are given, are then stacked, ``(n, ...)`` each, as by
            :func:`~etflayers.distill.stack_states`. Random numbers differ between the states.

    Returns:
        The final parameters and buffers, and the loss before each step; of n initial states stacked
        parameters and buffers, and the mean loss.

    Raises:
        InvalidArgumentError: shapes that do not fit, a loss that is not scalar, state changed in place.
        NonFiniteError: an inner loss or the final parameters are NaN or infinite.

    Reference:
        Wang, Zhu, Torralba, Efros (2018), arXiv 1811.10959; Maclaurin, Duvenaud, Adams (2015), arXiv
        1502.03492.

    >>> model = nn.Linear(2, 2)
    >>> images, labels = torch.randn(1, 4, 2, requires_grad=True), torch.tensor([[0, 0, 1, 1]])
    >>> rate = torch.tensor(0.5, requires_grad=True)
    >>> trained = unrolled_inner_loop(
    ...     model, dict(model.named_parameters()), images, labels, lr=rate, epochs=10
    ... )
    >>> outputs = torch.func.functional_call(model, trained.state, (torch.ones(1, 2),))
    >>> cross_entropy(lambda _: outputs, images, torch.tensor([0])).backward()
    >>> images.grad.shape, rate.grad.shape
    (torch.Size([1, 4, 2]), torch.Size([]))
    """
    require(
        not torch.is_inference_mode_enabled(),
        "torch.inference_mode() forbids the gradients that the inner loop takes: use torch.no_grad()",
    )
    optimizer = SGD() if optimizer is None else optimizer
    adjoint = _adjoint_of(adjoint)
    _require_parts(model, loss, optimizer, adjoint)
    require(
        initializations is None or (isinstance(initializations, int) and initializations >= 1),
        f"initializations must be None or an integer >= 1, got {initializations!r}",
    )
    params = under_first_names(params, model)
    layout = FlatLayout.of(params, model, initializations)
    theta = layout.flatten(params)
    steps = _checked_steps(images, labels, epochs)
    rates = _checked_rates(lr, theta, len(images), steps)
    window = _checked_window(window, steps)
    if not torch.is_grad_enabled():
        window = range(window.stop, window.stop)
    values = hyperparameters(optimizer)
    problem = InnerProblem(
        objective=InnerObjective.here(model, loss, layout, theta.device, initializations),
        optimizer=optimizer,
        names=tuple(values),
        seeds=_seeds(steps, generator),
    )
    trained = adjoint(
        problem,
        theta,
        _initial_buffers(model, buffers, initializations, layout),
        (images, labels, rates, *values.values()),
        window,
    )
    _require_finite_training(trained.losses, trained.theta)
    losses = trained.losses if initializations is None else trained.losses / initializations
    return InnerSolution(layout.unflatten(trained.theta), trained.buffers, losses)


class UnrolledInnerLoop(nn.Module):
    r"""Trains a model on the data it is given: ``theta_T(x, y, eta, theta_0)``, differentiable in each.

    The module form of :func:`unrolled_inner_loop`. The model's own parameters, those that require a gradient,
    are the default for theta_0; the hypergradient reaches them too.

    Args:
        model: see :func:`unrolled_inner_loop`.
        loss: see :func:`unrolled_inner_loop`.
        optimizer: see :func:`unrolled_inner_loop`.
        adjoint: see :func:`unrolled_inner_loop`.
        epochs: see :func:`unrolled_inner_loop`.

    Raises:
        InvalidArgumentError: ``epochs`` < 1; a model, loss, optimizer or adjoint of another kind.

    Reference:
        Wang, Zhu, Torralba, Efros (2018), arXiv 1811.10959.

    >>> loop = UnrolledInnerLoop(nn.Linear(2, 2), optimizer=SGD(momentum=0.9), epochs=5)
    >>> images, labels = torch.randn(1, 4, 2, requires_grad=True), torch.tensor([[0, 0, 1, 1]])
    >>> trained = loop(images, labels, lr=0.1)
    >>> trained.params["weight"].square().sum().backward()
    >>> images.grad.shape
    torch.Size([1, 4, 2])
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        loss: InnerLoss = cross_entropy,
        optimizer: InnerOptimizer | None = None,
        adjoint: InnerAdjoint | Literal["auto"] | None = None,
        epochs: int = 1,
    ) -> None:
        super().__init__()
        _require_epochs(epochs)
        self.model = model
        self.loss = loss
        self.optimizer = SGD() if optimizer is None else optimizer
        self.adjoint = _adjoint_of(adjoint)
        _require_parts(model, loss, self.optimizer, self.adjoint)
        self.epochs = epochs

    def forward(
        self,
        images: Tensor,
        labels: Tensor,
        *,
        lr: float | Tensor,
        params: Mapping[str, Tensor] | None = None,
        buffers: Mapping[str, Tensor] | None = None,
        window: range | None = None,
        generator: torch.Generator | None = None,
        initializations: int | None = None,
    ) -> InnerSolution:
        """Train from ``params``, by default the model's trainable ones: see :func:`unrolled_inner_loop`."""
        return unrolled_inner_loop(
            self.model,
            trainable_parameters(self.model) if params is None else params,
            images,
            labels,
            lr=lr,
            epochs=self.epochs,
            loss=self.loss,
            optimizer=self.optimizer,
            adjoint=self.adjoint,
            window=window,
            buffers=buffers,
            generator=generator,
            initializations=initializations,
        )

    def extra_repr(self) -> str:
        """The arguments."""
        return f"optimizer={self.optimizer}, adjoint={self.adjoint}, epochs={self.epochs}"


def _adjoint_of(adjoint: InnerAdjoint | Literal["auto"] | None) -> InnerAdjoint:
    if adjoint is None:
        return StepAdjoint()
    return AutoAdjoint() if adjoint == "auto" else adjoint


def _require_epochs(epochs: int) -> None:
    number = isinstance(epochs, int) and not isinstance(epochs, bool)
    require(number and epochs >= 1, f"epochs must be an integer >= 1, got {epochs!r}")


def _require_parts(model: object, loss: object, optimizer: object, adjoint: object) -> None:
    require(isinstance(model, nn.Module), f"model must be a torch.nn.Module, got {type(model).__name__}")
    require_rule(optimizer)
    require(
        callable(adjoint) and not isinstance(adjoint, type),
        f"adjoint must be 'auto', StepAdjoint(), KeptGraph() or another object like them, got {adjoint!r}",
    )
    require(
        callable(loss) and _takes_a_model(loss),
        "loss must be a function of (model, images, labels), such as lambda model, images, labels: "
        f"torch.nn.functional.cross_entropy(model(images), labels), got {loss!r}",
    )


def _takes_a_model(loss: object) -> bool:
    """Whether the loss takes three arguments, and is not one of PyTorch's, whose third is another."""
    try:
        inspect.signature(loss.forward if isinstance(loss, nn.Module) else loss).bind(None, None, None)  # type: ignore[arg-type]
    except TypeError:
        return False
    except ValueError:  # it has no signature to look at
        return True
    return getattr(loss, "__module__", None) != F.__name__


def _checked_steps(images: Tensor, labels: Tensor, epochs: int) -> int:
    for name, value in {"images": images, "labels": labels}.items():
        require(isinstance(value, Tensor), f"{name} must be a tensor, got {type(value).__name__}")
    require(
        images.ndim >= 2 and len(images) > 0,
        f"images must have shape (S, B, ...), S >= 1 batches, got {tuple(images.shape)}: a single batch is "
        "images[None]",
    )
    require_floating("images", images.dtype)
    require(
        labels.shape[:2] == images.shape[:2],
        f"labels must have the shape (S, B, ...) = ({images.shape[0]}, {images.shape[1]}, ...) of images, "
        f"got {tuple(labels.shape)}: labels of a single batch are labels[None]",
    )
    _require_epochs(epochs)
    return len(images) * epochs


def _checked_rates(lr: float | Tensor, theta: Tensor, batches: int, steps: int) -> Tensor:
    require(isinstance(lr, Tensor | Real), f"lr must be a number or a tensor, got {type(lr).__name__}")
    rates = lr if isinstance(lr, Tensor) else theta.detach().new_tensor(lr)
    require_floating("lr", rates.dtype)
    require(
        rates.shape in {(), (batches,), (steps,)},
        f"lr must be a number or a tensor of shape (), (S,) = ({batches},) or (T,) = ({steps},), got "
        f"{tuple(rates.shape)}",
    )
    values = rates.detach()
    require_values(
        ((values >= 0) & values.isfinite()).all(),
        "lr must be finite and at least 0: rates that are learned stay positive if their logarithms are the "
        "variables, as in DistilledSet",
    )
    return rates.reshape(-1)


def _checked_window(window: range | None, steps: int) -> range:
    if window is None:
        return range(steps)
    require(
        window.step == 1 and 0 <= window.start <= window.stop <= steps,
        f"window must be a range(start, stop) of step 1 within range({steps}), got {window}",
    )
    return window


def _initial_buffers(
    model: nn.Module, given: Mapping[str, Tensor] | None, copies: int | None, layout: FlatLayout
) -> Buffers:
    stack = () if copies is None else (copies,)
    buffers = {name: value.expand((*stack, *value.shape)) for name, value in model.named_buffers()}
    constants = {name: value for name, value in model.named_parameters() if name not in layout.shapes}
    shapes = {
        name: (*stack, *value.shape) for name, value in {**dict(model.named_buffers()), **constants}.items()
    }
    for name, value in (given or {}).items():
        require(
            name in shapes and value.shape == shapes[name],
            f"buffers[{name!r}] is no buffer of the model and no parameter that is not trained, or not of "
            "its shape: they are named as in model.named_buffers() and model.named_parameters()",
        )
        buffers[name] = value
    return {name: value.detach().clone() for name, value in buffers.items()}


def _seeds(steps: int, generator: torch.Generator | None) -> tuple[int, ...]:
    device = "cpu" if generator is None else generator.device
    seeds: list[int] = torch.randint(2**62, (steps,), generator=generator, device=device).tolist()
    return tuple(seeds)


def _require_finite_training(losses: Tensor, theta: Tensor) -> None:
    """One look at the end; on an accelerator it waits for the device once, after all steps are queued."""
    if torch.compiler.is_compiling() or inside_transform():
        return
    with torch.no_grad():
        finite = torch.cat([losses.isfinite(), theta.isfinite().all()[None]]).tolist()
    if not all(finite):
        step = finite.index(False)
        what = f"the inner loss of step {step}" if step < len(losses) else "the final parameters"
        raise NonFiniteError(
            f"{what} (of {len(losses)} steps) is NaN or infinite: lower lr, or start from smaller images or "
            "parameters; if it is step 0, look for NaN in images, labels or params"
        )
