"""Modules whose own state stays in float32 or better, whatever the model around them is converted to."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from etflayers.precision import working_dtype

if TYPE_CHECKING:
    from typing_extensions import Self

__all__ = ["KeepsPrecision"]


class KeepsPrecision(nn.Module):
    """Averages and factorizations lose their meaning in 8 or 11 bits.

    So ``module.half()`` moves the tensors of this module, and of those inside it, at most; and what
    ``load_state_dict(..., assign=True)`` puts in their place in half precision is converted back.
    """

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        def converted(tensor: Tensor) -> Tensor:
            result = fn(tensor)
            return result if result.dtype == working_dtype(result.dtype) else tensor.to(result.device)

        super()._apply(converted, recurse)  # type: ignore[no-untyped-call]
        return self

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        super()._load_from_state_dict(state_dict, prefix, *args)
        for name, buffer in self._buffers.items():
            if buffer is not None:
                self._buffers[name] = buffer.to(working_dtype(buffer.dtype))
        for name, parameter in self._parameters.items():
            if parameter is not None and parameter.dtype != working_dtype(parameter.dtype):
                full = parameter.detach().to(working_dtype(parameter.dtype))
                self._parameters[name] = nn.Parameter(full, parameter.requires_grad)
