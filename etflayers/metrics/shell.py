"""What the metrics of this package hold to beyond the contract of ``torchmetrics.Metric``."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor

from etflayers.metrics.optional import Metric

__all__ = ["ExactMetric", "Shared"]

Value = TypeVar("Value")


class ExactMetric(Metric):
    """A metric whose state is never cast, never taken for that of another, and whole after an error."""

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        # A MetricCollection updates only one of the metrics whose states are equal after a first batch, and
        # what differs in settings (an ignore_index, a classifier) need not show there. NaN equals nothing.
        self.add_state("unequal", torch.tensor(torch.nan), dist_reduce_fx="sum")

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Add a batch and return the metrics of the batch alone; a batch that is refused is not added."""
        before = {name: _copied(value) for name, value in vars(self).items()}
        try:
            return super().forward(*args, **kwargs)
        except BaseException:
            vars(self).update(before)
            raise

    @contextmanager
    def sync_context(self, *args: Any, **kwargs: Any) -> Iterator[None]:
        """Within it the states are those of all ranks; afterwards, also after an error, those of this one."""
        try:
            with super().sync_context(*args, **kwargs):
                yield
        except BaseException:
            if self._is_synced:
                self.unsync()
            raise

    def _apply(self, fn: Callable[[Tensor], Tensor], *args: Any, **kwargs: Any) -> Any:
        """Move the states, but do not cast them when the module they are part of is cast."""

        def move(tensor: Tensor) -> Tensor:
            moved = fn(tensor)
            return moved if moved.dtype == tensor.dtype else tensor.to(moved.device)

        return super()._apply(move, *args, **kwargs)


class Shared(Generic[Value]):
    """Something that a metric reads and does not own: no submodule of it, and not copied with it.

    A copy reads the same object; only if a ``deepcopy`` has copied that before, as when a model is copied
    with the metrics in it, the copy of the metric reads the copy of the object.
    """

    def __init__(self, value: Value) -> None:
        self.value = value

    def __deepcopy__(self, memo: dict[int, Any]) -> Shared[Value]:
        return Shared(memo.get(id(self.value), self.value))


def _copied(value: Any) -> Any:
    if isinstance(value, list):
        return list(value)
    return value.clone() if isinstance(value, Tensor) else value
