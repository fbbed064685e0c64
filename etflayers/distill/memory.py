"""How much memory a hypergradient will need, found from two short runs."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import torch
from torch import Tensor

from etflayers.distill.adjoints import InnerAdjoint, StepAdjoint
from etflayers.distill.auto import AutoAdjoint
from etflayers.distill.inner_loop import UnrolledInnerLoop
from etflayers.distill.layout import trainable_parameters
from etflayers.distill.optimizers import hyperparameters
from etflayers.distill.peak_memory import PeakMemory, extrapolated

__all__ = ["memory_forecast"]


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
    steps = len(images) * loop.epochs if window is None else len(window)
    start = trainable_parameters(loop.model) if params is None else params
    candidates = [images, labels, lr, *hyperparameters(loop.optimizer).values(), *start.values()]
    variables = [value for value in candidates if isinstance(value, Tensor) and value.requires_grad]

    def of(adjoint: InnerAdjoint) -> int:
        run = UnrolledInnerLoop(
            loop.model, loss=loop.loss, optimizer=loop.optimizer, adjoint=adjoint, epochs=loop.epochs
        )

        def peak(steps: int) -> int:
            with PeakMemory() as memory:
                solution = run(
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

        return extrapolated(peak, steps, adjoint.held(steps))

    adjoint = loop.adjoint
    if isinstance(adjoint, AutoAdjoint):
        kept = of(adjoint.kept)
        if adjoint.fits(kept):
            return kept
        adjoint = adjoint.rederived
    if isinstance(adjoint, StepAdjoint) and adjoint.compile:
        # Compiled code makes its tensors unseen, and not more of them.
        adjoint = replace(adjoint, compile=False)
    return of(adjoint)
