"""All parameters of a model as one flat vector, and back."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from etflayers.checks import require, require_floating

__all__ = ["FlatLayout"]


@dataclass(frozen=True)
class FlatLayout:
    """Names and shapes of the parameters, in the order in which the flat vector holds them."""

    shapes: Mapping[str, torch.Size]

    @classmethod
    def of(cls, params: Mapping[str, Tensor], model: nn.Module, copies: int | None = None) -> FlatLayout:
        """The layout of ``params``, checked against the parameters of ``model``, or of stacked copies."""
        require(bool(params), "params is empty: there is nothing to train")
        known = dict(model.named_parameters(remove_duplicate=False))
        unknown = [name for name in params if name not in known]
        require(
            not unknown,
            f"params has names that are no parameters of the model: {unknown}; they are named as in "
            "model.named_parameters()",
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
