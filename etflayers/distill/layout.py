"""All parameters of a model as one flat vector, and back."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from etflayers.checks import require, require_floating

__all__ = ["FlatLayout", "trainable_parameters", "under_first_names"]


def trainable_parameters(model: nn.Module) -> dict[str, Tensor]:
    """The parameters of a model that require a gradient, by name."""
    return {name: value for name, value in model.named_parameters() if value.requires_grad}


def under_first_names(params: Mapping[str, Tensor], model: nn.Module) -> dict[str, Tensor]:
    """``params`` with each tied weight once, under the name that ``model.named_parameters()`` gives it."""
    first = {id(value): name for name, value in model.named_parameters()}
    every = model.named_parameters(remove_duplicate=False)
    names = {name: first[id(value)] for name, value in every}
    once: dict[str, Tensor] = {}
    for name, value in params.items():
        key = names.get(name, name)
        require(
            once.setdefault(key, value) is value,
            f"params has two tensors for the tied parameter {key!r}, one of them as {name!r}: give it once",
        )
    return once


@dataclass(frozen=True)
class FlatLayout:
    """Names and shapes of the parameters, in the order in which the flat vector holds them."""

    shapes: Mapping[str, torch.Size]

    @classmethod
    def of(cls, params: Mapping[str, Tensor], model: nn.Module, copies: int | None = None) -> FlatLayout:
        """The layout of ``params``, checked against the parameters of ``model``, or of stacked copies."""
        require(
            bool(params),
            "params is empty, or no parameter of the model requires a gradient: there is nothing to train",
        )
        known = dict(model.named_parameters(remove_duplicate=False))
        unknown = [name for name in params if name not in known]
        require(
            not unknown,
            f"params has names that are no parameters of the model: {unknown}; they are named as in "
            "model.named_parameters()",
        )
        frozen = [name for name, value in params.items() if value is known[name] and not value.requires_grad]
        require(
            not frozen,
            f"params holds parameters of the model that are frozen (requires_grad=False): {frozen}; leave "
            "them out, or give copies of them (.detach()) to train them all the same",
        )
        stack = () if copies is None else (copies,)
        for name, value in params.items():
            shape = (*stack, *known[name].shape)
            require(
                value.shape == shape, f"params[{name!r}] must have shape {shape}, got {tuple(value.shape)}"
            )
            require_floating(f"params[{name!r}]", value.dtype)
        kinds = {(value.dtype, value.device) for value in params.values()}
        require(
            len(kinds) == 1,
            f"params must share one dtype and one device, got {sorted(map(str, kinds))}: the inner "
            "optimizer treats them as one vector",
        )
        return cls({name: value.shape for name, value in params.items()})

    def flatten(self, params: Mapping[str, Tensor]) -> Tensor:
        """The vector of all parameters, ``(P,)``."""
        return torch.cat([params[name].reshape(-1) for name in self.shapes])

    def unflatten(self, vector: Tensor) -> dict[str, Tensor]:
        """Views into the vector under the names of the parameters."""
        parts = torch.split(vector, [shape.numel() for shape in self.shapes.values()])
        named = zip(self.shapes.items(), parts, strict=True)
        return {name: part.view(shape) for (name, shape), part in named}
