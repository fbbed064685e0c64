"""Put an ETF head into a model, and targets into the head, without touching the model's code."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TypeVar

from torch import Tensor, nn

from etflayers.checks import require
from etflayers.nn.base import CodeHead

__all__ = ["provide_targets", "replace_classifier"]

Model = TypeVar("Model", bound=nn.Module)


def replace_classifier(
    model: Model, head: nn.Module | Callable[[int, int], nn.Module], *, name: str | None = None
) -> Model:
    """Replace the last linear layer of a model, in place, by an ETF head for the same features and classes.

    Last means last in the order of registration, which is the classifier in ResNets, in the models of
    torchvision and timm and in the classification models of transformers; elsewhere give its name. The head
    goes to the device of the layer and into its training mode.

    Args:
        model: any module that contains an ``nn.Linear``.
        head: a head with the ``in_features`` and ``num_classes`` of that layer, or a function of these two
            numbers that makes one, such as a head class.
        name: dotted name of the layer, as in ``model.named_modules()``.

    Returns:
        ``model``.

    Raises:
        InvalidArgumentError: no such layer, or a head of another size.

    >>> from etflayers.nn import FixedETFHead
    >>> model = nn.Sequential(nn.Flatten(), nn.Linear(784, 64), nn.ReLU(), nn.Linear(64, 10))
    >>> replace_classifier(model, FixedETFHead)[-1]
    FixedETFHead(in_features=64, num_classes=10, scale=1.0, normalize=False, rotation='haar')
    """
    places, linear = _find_linear(model, name)
    if not isinstance(head, nn.Module):
        head = head(linear.in_features, linear.out_features)
    offered = (getattr(head, "in_features", None), getattr(head, "num_classes", None))
    needed = (linear.in_features, linear.out_features)
    require(
        offered == needed,
        f"head has (in_features, num_classes) = {offered}, but {places[0]!r} of the model has {needed}: make "
        "the head with these numbers, or the model with the number of classes of the head",
    )
    head = head.to(linear.weight.device).train(linear.training)
    for place in places:
        parent, _, attribute = place.rpartition(".")
        setattr(model.get_submodule(parent), attribute, head)
    return model


def _find_linear(model: nn.Module, name: str | None) -> tuple[list[str], nn.Linear]:
    """All names of the linear layer ``name``, or of the last one, and the layer."""
    require(
        not isinstance(model, nn.Linear),
        "model is itself an nn.Linear, which cannot be replaced inside itself: use the head in its place",
    )
    # A layer may be registered under several names; all of them get the head.
    modules = dict(model.named_modules(remove_duplicate=False))
    linears = {place: module for place, module in modules.items() if isinstance(module, nn.Linear)}
    require(
        bool(linears), "model has no nn.Linear to replace: put the head in where the model makes its logits"
    )
    if name is None:
        name = next(reversed(linears))
    elif name not in linears:
        found = type(modules[name]).__name__ if name in modules else "nothing"
        require(
            False,
            f"name must be that of an nn.Linear in the model, one of {list(linears)}: {name!r} is {found}",
        )
    linear = linears[name]
    return [place for place, module in linears.items() if module is linear], linear


@contextmanager
def provide_targets(model: nn.Module, targets: Tensor) -> Iterator[None]:
    """Give targets to every head that needs them, in a model whose forward pass hands on features only.

    These are the heads whose ``accepts_targets`` is true: :class:`NearestETFHead`, and any
    :class:`~etflayers.nn.CodeHead` of your own that says so. The targets hold for the forward passes inside
    the ``with`` block, also if it is left by an exception. Targets given to a head directly win. They are no
    part of state_dict, copies or pickles.

    Args:
        model: contains at least one such head, or is one; also inside ``DistributedDataParallel`` or
            ``torch.compile``.
        targets: for the features that the head receives, ``(...)``: see :meth:`NearestETFHead.forward`.

    Raises:
        InvalidArgumentError: the model has no such head, or targets is no tensor.

    >>> import torch
    >>> from etflayers.nn import NearestETFHead
    >>> model = nn.Sequential(nn.Flatten(), NearestETFHead(4, 3))
    >>> with provide_targets(model, torch.arange(3)):
    ...     logits = model(torch.eye(3, 4))
    """
    heads = [m for m in model.modules() if isinstance(m, CodeHead) and m.accepts_targets]
    require(
        bool(heads),
        "model has no head that accepts targets, such as NearestETFHead: put one in with "
        "replace_classifier(model, head)",
    )
    require(
        isinstance(targets, Tensor),
        f"targets must be a tensor of class indices, got {type(targets).__name__}",
    )
    before = [head.provided_targets for head in heads]
    for head in heads:
        head.provided_targets = targets
    try:
        yield
    finally:
        for head, previous in zip(heads, before, strict=True):
            head.provided_targets = previous
