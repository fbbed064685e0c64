"""How much memory a computation holds at most, and how that grows with its steps."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any

from torch import Tensor

from etflayers._torch import TorchDispatchMode, tree_iter

__all__ = ["PeakMemory", "extrapolated"]

_START = 2  # the first step has nothing before it: from the second on, each adds the same


class PeakMemory(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Counts the bytes of the tensors made inside a ``with`` block that are alive at once, at most.

    Attributes:
        peak: bytes, on all devices together; without what an allocator rounds up and a kernel uses inside.
        alive: bytes at this moment.

    >>> import torch
    >>> with PeakMemory() as memory:
    ...     for _ in range(3):
    ...         value = torch.zeros(1000, dtype=torch.float64)
    >>> memory.peak
    16000
    """

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.peak = 0
        self._sizes: dict[int, int] = {}
        self.alive = 0

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Run the operator and count the storages it has made."""
        kwargs = kwargs or {}
        given = {
            id(value.untyped_storage()) for value in tree_iter((args, kwargs)) if isinstance(value, Tensor)
        }
        result = func(*args, **kwargs)
        for value in tree_iter(result):
            if isinstance(value, Tensor):
                storage = value.untyped_storage()
                if id(storage) not in given and id(storage) not in self._sizes:
                    self._sizes[id(storage)] = storage.nbytes()
                    self.alive += storage.nbytes()
                    weakref.finalize(storage, self._release, id(storage))
        self.peak = max(self.peak, self.alive)
        return result

    def _release(self, key: int) -> None:
        self.alive -= self._sizes.pop(key)


def extrapolated(peak: Callable[[int], int], steps: int, held: int) -> int:
    """``m(2) + (h - 2) (m(3) - m(2))``, the peak of many steps from runs of two and of three.

    Args:
        peak: m, the peak of a run of so many steps.
        steps: of the run that is asked about; if they are no more than two it is taken.
        held: h, how many steps' memory it holds at once.

    >>> extrapolated(lambda steps: 100 + 10 * steps, steps=50, held=50)
    600
    """
    if steps <= _START:
        return peak(steps)
    base = peak(_START)
    return base + (held - _START) * (peak(_START + 1) - base)
