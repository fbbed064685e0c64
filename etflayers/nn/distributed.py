"""What the ranks of a process group share: sums that gradients flow through, and first values."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

__all__ = ["all_reduce_sum", "gathered", "overwrite", "world_size"]


def world_size(process_group: dist.ProcessGroup | None = None) -> int:
    """Number of ranks in the group; 1 where ``torch.distributed`` is not initialized."""
    if not (dist.is_available() and dist.is_initialized()):
        return 1
    return dist.get_world_size(process_group)


def all_reduce_sum(tensor: Tensor, process_group: dist.ProcessGroup | None = None) -> Tensor:
    r"""Sum a tensor over the ranks: ``s = sum_r t_r`` on every rank.

    Every loss ``L_r`` depends on every ``t_r`` through s, so the gradient of ``sum_r L_r`` with respect to
    ``t_r`` is ``sum_r dL_r/ds``: the backward pass is the same sum. Averaged over the ranks, as
    ``DistributedDataParallel`` does, it is the gradient of the mean of the losses.

    Args:
        tensor: of the same shape and dtype on every rank.
        process_group: default: all ranks.

    Returns:
        The sum, a new tensor.
    """
    total: Tensor = _AllReduceSum.apply(tensor, process_group)  # type: ignore[no-untyped-call]
    return total


class _AllReduceSum(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, tensor: Tensor, process_group: dist.ProcessGroup | None) -> Tensor:
        ctx.process_group = process_group
        total = tensor.clone(memory_format=torch.contiguous_format)
        dist.all_reduce(total, group=process_group)
        return total

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return all_reduce_sum(grad, ctx.process_group), None


@torch.no_grad()
def overwrite(tensor: Tensor, value: Tensor) -> None:
    """Write ``value``, a full tensor, into a parameter or buffer; where ranks hold it, that of the first.

    With ``torch.distributed`` initialized every rank has to take part, as in the random operations of
    ``DTensor``: ranks that draw from generators of their own would otherwise hold different frames. A
    parameter that is sharded over ranks gets its shard.
    """
    if hasattr(tensor, "device_mesh"):  # a DTensor, without the import
        from torch.distributed.tensor import distribute_tensor

        # Takes the value of the first rank for all.
        value = distribute_tensor(value, tensor.device_mesh, tensor.placements)  # type: ignore[attr-defined]
    elif world_size() > 1 and tensor.device.type != "meta":
        value = value.contiguous()
        dist.broadcast(value, src=0)
    tensor.copy_(value)


def gathered(tensor: Tensor) -> Tensor:
    """The full tensor of one that may be sharded over ranks."""
    full: Tensor = tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor
    return full
