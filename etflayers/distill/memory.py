"""How much memory a hypergradient will need, found from two short runs."""

from __future__ import annotations

import weakref
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from etflayers._torch import TorchDispatchMode, tree_iter
from etflayers.distill.adjoints import StepAdjoint
from etflayers.distill.inner_loop import UnrolledInnerLoop
from etflayers.distill.layout import trainable_parameters
from etflayers.distill.optimizers import hyperparameters

__all__ = ["PeakMemory", "memory_forecast"]

_START = 2  # the first step has nothing before it: from the second on, each adds the same


class PeakMemory(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Counts the bytes of the tensors made inside a ``with`` block that are alive at once, at most.

    Attributes:
        peak: bytes, on all devices together; without what an allocator rounds up and a kernel uses inside.
        alive: bytes at this moment.

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


def memory_forecast(
    loop: UnrolledInnerLoop,
    images: Tensor,
    labels: Tensor,
    *,
    lr: float | Tensor,
    params: Mapping[str, Tensor] | None = None,
    buffers: Mapping[str, Tensor] | None = None,
    window: range | None = None,
    initializations: int | None = None,
) -> int:
    r"""Peak bytes of a hypergradient, ``m(2) + (h - 2) (m(3) - m(2))`` from runs of two and three steps.

    The number h of steps whose memory is held at once is that of all steps for a kept graph, and that of the
    states that are kept where steps are re-derived; of compiled steps it is that of the same steps in eager
    mode, an upper bound. Counted are the tensors made by the inner loop and its
    backward pass, for the variables that require a gradient; the outer loss comes on top.

    Args:
        loop: the loop to run.
        images: as the loop takes them.
        labels: as the loop takes them.
        lr: as the loop takes it.
        params: as the loop takes them.
        buffers: as the loop takes them.
        window: as the loop takes it.
        initializations: as the loop takes them.

    Returns:
        Bytes.

    Raises:
        InvalidArgumentError: what the loop raises.

    >>> loop = UnrolledInnerLoop(torch.nn.Linear(512, 10), epochs=1000)
    >>> images, labels = torch.randn(1, 4, 512, requires_grad=True), torch.tensor([[0, 0, 1, 1]])
    >>> state = 4 * (512 * 10 + 10)
    >>> 1000 * state < memory_forecast(loop, images, labels, lr=0.1) < 1020 * state
    True
    """
    window = range(len(images) * loop.epochs) if window is None else window
    if isinstance(loop.adjoint, StepAdjoint) and loop.adjoint.compile:
        # Compiled code makes its tensors unseen, and not more of them.
        eager = replace(loop.adjoint, compile=False)
        loop = UnrolledInnerLoop(
            loop.model, loss=loop.loss, optimizer=loop.optimizer, adjoint=eager, epochs=loop.epochs
        )

    def peak(steps: int) -> int:
        with PeakMemory() as memory:
            solution = loop(
                images,
                labels,
                lr=lr,
                params=params,
                buffers=buffers,
                window=range(steps),
                initializations=initializations,
                generator=torch.Generator().manual_seed(0),  # the global one is the caller's
            )
            loss = torch.stack([value.square().sum() for value in solution.params.values()]).sum()
            torch.autograd.grad(loss, variables, allow_unused=True)
        return int(memory.peak)

    start = trainable_parameters(loop.model) if params is None else params
    candidates = [images, labels, lr, *hyperparameters(loop.optimizer).values(), *start.values()]
    variables = [value for value in candidates if isinstance(value, Tensor) and value.requires_grad]
    if len(window) <= _START:
        return peak(len(window))
    base = peak(_START)
    return base + (loop.adjoint.held(len(window)) - _START) * (peak(_START + 1) - base)
