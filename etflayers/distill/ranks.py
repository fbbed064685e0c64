"""Hypergradients over the ranks of a process group: each rank trains from initial states of its own."""

from __future__ import annotations

from collections.abc import Iterable

import torch
import torch.distributed as dist
from torch import Tensor

from etflayers.checks import require

__all__ = ["average_gradients"]


@torch.no_grad()
def average_gradients(
    parameters: Iterable[Tensor], *, process_group: dist.ProcessGroup | None = None
) -> None:
    r"""Replace each gradient by its mean over the ranks: ``g <- (1/R) sum_r g_r``.

    With R ranks that each average over n initial states the result is the hypergradient of n R of them, and
    every rank takes the same outer step. Seed the generator of the initial states by the rank, and everything
    else alike. One collective for each dtype, over gloo or nccl. Without ``torch.distributed`` nothing
    changes.

    Args:
        parameters: the same ones in the same order on every rank. A missing gradient counts as zero.
        process_group: default: all ranks.

    Raises:
        InvalidArgumentError: gradients that are not dense.

    >>> images = torch.ones(3, requires_grad=True)
    >>> images.sum().backward()
    >>> average_gradients([images])
    >>> images.grad
    tensor([1., 1., 1.])
    """
    if not (dist.is_available() and dist.is_initialized()):
        return
    size = dist.get_world_size(process_group)
    groups: dict[tuple[torch.dtype, torch.device], list[Tensor]] = {}
    for parameter in parameters:
        if parameter.grad is None:
            parameter.grad = torch.zeros_like(parameter)
        require(
            parameter.grad.layout == torch.strided,
            f"gradients must be dense to be averaged over ranks, got {parameter.grad.layout}",
        )
        groups.setdefault((parameter.dtype, parameter.device), []).append(parameter.grad)
    for gradients in groups.values():
        flat = torch.cat([gradient.reshape(-1) for gradient in gradients])
        dist.all_reduce(flat, group=process_group)
        flat /= size
        parts = torch.split(flat, [gradient.numel() for gradient in gradients])
        for gradient, mean in zip(gradients, parts, strict=True):
            gradient.copy_(mean.view_as(gradient))
