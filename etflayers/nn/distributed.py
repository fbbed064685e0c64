"""First values that the ranks of a run have in common, and tensors that are sharded over them."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor

from etflayers.collectives import world_size

__all__ = ["gathered", "overwrite"]


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
