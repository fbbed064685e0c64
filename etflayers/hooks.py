"""Hooks on modules that more than one package needs."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import nn
from torch.utils.hooks import RemovableHandle

__all__ = ["on_input"]


def on_input(module: nn.Module, take: Callable[[Any], object]) -> RemovableHandle:
    """Call ``take`` with the first argument, by position or name, of each call of ``module``; else ``None``.

    >>> from torch import ones
    >>> seen: list[Any] = []
    >>> with on_input(layer := nn.Identity(), seen.append):
    ...     _ = layer(ones(2)), layer(input=3)
    >>> seen
    [tensor([1., 1.]), 3]
    """

    def hook(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        take(next(iter((*args, *kwargs.values())), None))

    return module.register_forward_pre_hook(hook, with_kwargs=True)
