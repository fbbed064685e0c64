"""The features of a model whose own code returns logits only."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from torch import Tensor, nn

from etflayers.checks import require
from etflayers.hooks import on_input
from etflayers.nn.base import CodeHead
from etflayers.nn.classifiers import find_classifiers

__all__ = ["capture_features"]


@contextmanager
def capture_features(model: nn.Module, layer: str | nn.Module | None = None) -> Iterator[list[Tensor]]:
    r"""Collect what the classifier of a model receives: h of each forward pass, with its graph.

    For a loss or a measure of the features of a model that returns logits only. The list that the ``with``
    block gets grows by the first argument of each call of the layer inside of the block, in their order. What
    a head with ``normalize=True`` is given are features as the backbone makes them, not yet their directions.

    A hook does it, and compiled code does not call hooks that came after it: inside ``torch.compile`` nothing
    is collected.

    Args:
        model: any module.
        layer: whose input to collect: a module inside the model, or its dotted name. Default: the only
            :class:`~etflayers.nn.CodeHead` of the model or, if there is none, the classifier that
            :func:`~etflayers.nn.find_classifiers` finds.

    Returns:
        A context manager that gives the list: for each call a tensor, such as features ``(B, d)``.

    Raises:
        InvalidArgumentError: the model has no such layer, or several that could be meant.

    >>> import torch
    >>> model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 3))
    >>> with capture_features(model) as features:
    ...     logits = model(torch.randn(5, 4))
    >>> [tuple(rows.shape) for rows in features]
    [(5, 8)]
    """
    features: list[Tensor] = []
    with on_input(_layer_of(model, layer), features.append):
        yield features


def _layer_of(model: nn.Module, layer: str | nn.Module | None) -> nn.Module:
    modules: dict[str, nn.Module] = dict(model.named_modules(remove_duplicate=False))
    if isinstance(layer, str):
        require(layer in modules, f"layer must be a module of the model, one of {list(modules)}: {layer!r}")
        return modules[layer]
    if layer is not None:
        inside = any(module is layer for module in modules.values())
        require(inside, f"layer must be a module of the model, which does not contain this {layer}")
        return layer
    heads = {place: module for place, module in model.named_modules() if isinstance(module, CodeHead)}
    found: dict[str, nn.Module] = {**(heads or find_classifiers(model))}
    require(len(found) == 1, f"model has several classifiers, {list(found)}: choose one by layer=")
    return next(iter(found.values()))
