"""Put heads into a model in place of its linear classifier, and linear layers back in place of heads."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Mapping
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from etflayers.checks import require
from etflayers.nn.base import CodeHead
from etflayers.nn.classifiers import find_for, places_of

__all__ = ["replace_classifier", "restore_linear"]

Model = TypeVar("Model", bound=nn.Module)

_LOG = logging.getLogger(__name__)


def replace_classifier(
    model: Model,
    head: nn.Module | Callable[[int, int], nn.Module],
    *,
    name: str | Iterable[str] | None = None,
    num_classes: int | None = None,
    example_inputs: Tensor | tuple[Any, ...] | Mapping[str, Any] | None = None,
) -> Model:
    """Replace the linear classifier of a model, in place, by an ETF head for the same features and classes.

    Which layer that is, :func:`~etflayers.nn.find_classifiers` says; give the same arguments to it to know
    beforehand. Where a model does not say which layer makes its logits, a head (not a function that makes
    one) goes to the only layer with as many outputs as it has classes. What has been replaced is logged
    (level INFO), and so are linear layers that have as many outputs and stay (level WARNING): auxiliary
    classifiers, which some models have for their training. The head goes to the device of the layer and into
    its training mode.

    Args:
        model: any module that contains an ``nn.Linear``.
        head: a head with the ``in_features`` and ``num_classes`` of that layer, or a function of these two
            numbers that makes one, such as a head class: it is called for each classifier of the model.
        name: dotted name of the layer, or names of several, as in ``model.named_modules()``.
        num_classes: outputs that the layer must have.
        example_inputs: a batch, to find the layer by running the model: one tensor, a tuple of positional or
            a mapping of keyword arguments.

    Returns:
        ``model``.

    Raises:
        InvalidArgumentError: no such layer, a head of another size, one head for several layers, or a model
            inside ``DistributedDataParallel``, which knows the parameters of the layer already.

    >>> from etflayers.nn import FixedETFHead
    >>> model = nn.Sequential(nn.Flatten(), nn.Linear(784, 64), nn.ReLU(), nn.Linear(64, 10))
    >>> replace_classifier(model, FixedETFHead)[-1]
    FixedETFHead(in_features=64, num_classes=10, scale=1.0, normalize=False, rotation='haar')
    """
    _require_unwrapped(model)
    linears = find_for(head, model, name=name, num_classes=num_classes, example_inputs=example_inputs)
    require(
        len(linears) == 1 or not isinstance(head, nn.Module),
        f"model has {len(linears)} classifiers, {list(linears)}: give a function that makes a head for each, "
        "such as a head class, or choose one by name=",
    )
    heads = []
    for place, linear in linears.items():
        needed = (linear.in_features, linear.out_features)
        new = head if isinstance(head, nn.Module) else head(*needed)
        offered = (getattr(new, "in_features", None), getattr(new, "num_classes", None))
        require(
            offered == needed,
            f"head has (in_features, num_classes) = {offered}, but {place!r} of the model has {needed}: make "
            "the head with these numbers, or the model with the number of classes of the head",
        )
        heads.append(new)
    for linear, new in zip(linears.values(), heads, strict=True):
        _put(model, linear, new.to(linear.weight.device).train(linear.training))
    for (place, linear), new in zip(linears.items(), heads, strict=True):
        _LOG.info("replaced %r, %s, by %s", place, linear, type(new).__name__)
    sizes = {linear.out_features for linear in linears.values()}
    # A head of somebody else's may be, or hold, a linear layer itself.
    placed = {module for new in heads for module in new.modules()}
    others = [
        place
        for place, module in model.named_modules()
        if isinstance(module, nn.Linear) and module.out_features in sizes and module not in placed
    ]
    if others:
        _LOG.warning(
            "replaced %s; linear layers with as many outputs stay: %s (if they are classifiers, too, give "
            "all by name=)",
            list(linears),
            others,
        )
    return model


def restore_linear(model: Model, *, dtype: torch.dtype | None = None) -> Model:
    """Replace every head of a model, in place, by the ``nn.Linear`` with the logits of its eval mode.

    The opposite of :func:`replace_classifier`: what serves, exports, compiles or quantizes models then finds
    nothing of this library in it. The layers are copies of the present state
    (:meth:`~etflayers.nn.CodeHead.to_linear`) that have forgotten what they were: trained further, they leave
    the ETF. A head with a center becomes a layer with a bias, also where the model had one without.

    Args:
        model: contains at least one :class:`~etflayers.nn.CodeHead`.
        dtype: of the layers; default: that of the other parameters of the model, as linear layers ask for it
            (heads that keep averages or factorize stay in float32 in a model in half precision).

    Returns:
        ``model``.

    Raises:
        InvalidArgumentError: no head, a head that is itself the model, or one with ``normalize=True``, whose
            logits are not linear in the features.

    >>> from etflayers.nn import FixedETFHead
    >>> restore_linear(nn.Sequential(nn.Linear(8, 4), nn.ReLU(), FixedETFHead(4, 3)))[-1]
    Linear(in_features=4, out_features=3, bias=False)
    """
    _require_unwrapped(model)
    heads = {place: module for place, module in model.named_modules() if isinstance(module, CodeHead)}
    require("" not in heads, "model is itself a head: head.to_linear() is the linear layer")
    require(bool(heads), "model has no head of this library to restore")
    normalized = [place for place, head in heads.items() if head.normalize]
    require(
        not normalized,
        f"heads with normalize=True, {normalized}: their logits are not linear in the features. Have the "
        "model divide the features by their lengths (torch.nn.functional.normalize) and put "
        "head.to_linear(normalized_inputs=True) in the place of the head",
    )
    if dtype is None:
        inside = {id(parameter) for head in heads.values() for parameter in head.parameters()}
        rest = (p.dtype for p in model.parameters() if id(p) not in inside and p.is_floating_point())
        dtype = next(rest, None)
    linears = [head.to_linear().to(dtype=dtype) for head in heads.values()]
    for head, linear in zip(heads.values(), linears, strict=True):
        _put(model, head, linear)
    _LOG.info("restored nn.Linear at %s", list(heads))
    return model


def _put(model: nn.Module, old: nn.Module, new: nn.Module) -> None:
    """Register ``new`` under every name that ``old`` has."""
    for place in places_of(model, old):
        parent, _, attribute = place.rpartition(".")
        setattr(model.get_submodule(parent), attribute, new)


def _require_unwrapped(model: nn.Module) -> None:
    require(
        not any(isinstance(module, nn.parallel.DistributedDataParallel) for module in model.modules()),
        "model is inside DistributedDataParallel, which has taken down its parameters: change the model "
        "first and wrap it then",
    )
