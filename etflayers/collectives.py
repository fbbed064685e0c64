r"""What the ranks of a process group compute together, and how gradients flow through it.

Two situations need two rules. Where each rank has samples of its own, the losses differ and their sum counts:
:func:`all_reduce_sum`. Where each rank has classes of its own, all ranks have the same samples and the same
loss, which counts once: :func:`summed_backward`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from etflayers.checks import require, require_size

__all__ = [
    "ClassShard",
    "all_reduce_sum",
    "largest_over_ranks",
    "local_part",
    "require_first_derivative",
    "sum_over_ranks",
    "summed_backward",
    "world_size",
]


def world_size(process_group: dist.ProcessGroup | None = None) -> int:
    """Number of ranks in the group; 1 where ``torch.distributed`` is not initialized."""
    if not (dist.is_available() and dist.is_initialized()):
        return 1
    return dist.get_world_size(process_group)


@dataclass(frozen=True)
class ClassShard:
    """The classes ``start <= k < stop`` of K that one rank of a process group holds; others hold the rest.

    Args:
        num_classes: K >= 1.
        start: first class of this rank.
        stop: the class after the last one; ``start`` for a rank without any.
        process_group: the ranks that share the classes; default: all.

    Raises:
        InvalidArgumentError: classes outside [0, K).

    >>> ClassShard(num_classes=10, start=4, stop=8).rows
    slice(4, 8, None)
    """

    num_classes: int
    start: int
    stop: int
    process_group: dist.ProcessGroup | None = None

    def __post_init__(self) -> None:
        require_size("num_classes", self.num_classes)
        require_size("start", self.start, at_least=0)
        require_size("stop", self.stop, at_least=0)
        require(
            self.start <= self.stop <= self.num_classes,
            f"start and stop must be 0 <= start <= stop <= num_classes = {self.num_classes}, "
            f"got {self.start} and {self.stop}",
        )

    @classmethod
    def chunk(cls, num_classes: int, process_group: dist.ProcessGroup | None = None) -> ClassShard:
        """The shard of this rank where all have one size, but for the last, as in ``DTensor``.

        The size is K divided by the number of ranks, rounded up, as in ``torch.chunk``. So the last ranks may
        have fewer classes, or none.

        >>> ClassShard.chunk(10)  # in a single process
        ClassShard(num_classes=10, start=0, stop=10, process_group=None)
        """
        require_size("num_classes", num_classes)
        ranks = world_size(process_group)
        rank = 0 if ranks == 1 else dist.get_rank(process_group)
        require(rank >= 0, "this rank is not in process_group, and so has no classes")
        size = -(-num_classes // ranks)
        start = min(rank * size, num_classes)
        return cls(num_classes, start, min(start + size, num_classes), process_group)

    @property
    def rows(self) -> slice:
        """Where the classes of this rank are in a tensor ``(K, ...)`` of all."""
        return slice(self.start, self.stop)

    def among(self, classes: Tensor) -> ClassShard:
        """The shard of this rank when only some classes count, which are numbered anew in their order.

        Two numbers are read from ``classes``, for which an accelerator is waited for.

        Args:
            classes: their numbers in [0, K), ``(A,)``, ascending.

        >>> ClassShard(num_classes=10, start=4, stop=8).among(torch.tensor([1, 4, 6, 9]))
        ClassShard(num_classes=4, start=1, stop=3, process_group=None)
        """
        edges = torch.searchsorted(classes, torch.tensor([self.start, self.stop], device=classes.device))
        start, stop = edges.tolist()
        return ClassShard(len(classes), start, stop, self.process_group)

    def __len__(self) -> int:
        return self.stop - self.start


def local_part(tensor: Tensor) -> Tensor:
    """The part of a ``DTensor`` that this rank holds; any other tensor is that part."""
    part: Tensor = tensor.to_local() if hasattr(tensor, "to_local") else tensor
    return part


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


def summed_backward(tensor: Tensor, process_group: dist.ProcessGroup | None = None) -> Tensor:
    r"""The tensor itself, which all ranks have alike, with a gradient that is summed over the ranks.

    The ranks compute one loss together, each the part of it that its classes have in it. So each has a part
    of the gradient, and the gradient is their sum, on every rank.

    Args:
        tensor: the same on every rank.
        process_group: default: all ranks.
    """
    if world_size(process_group) == 1:
        return tensor
    same: Tensor = _SummedBackward.apply(tensor, process_group)  # type: ignore[no-untyped-call]
    return same


class _SummedBackward(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, tensor: Tensor, process_group: dist.ProcessGroup | None) -> Tensor:
        ctx.process_group = process_group
        return tensor.view_as(tensor)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        require_first_derivative()
        return sum_over_ranks(grad.clone(memory_format=torch.contiguous_format), ctx.process_group), None


def require_first_derivative() -> None:
    """Raise in a backward pass that is itself to be differentiated: ranks would need a rule for that, too."""
    require(
        not torch.is_grad_enabled(),
        "create_graph must be False where classes are divided among ranks: that has first derivatives only",
    )


def sum_over_ranks(tensor: Tensor, process_group: dist.ProcessGroup | None = None) -> Tensor:
    """Sum a contiguous tensor over the ranks, in place and without a gradient; alone, it is its own sum."""
    if world_size(process_group) > 1:
        dist.all_reduce(tensor, group=process_group)
    return tensor


def largest_over_ranks(tensor: Tensor, process_group: dist.ProcessGroup | None = None) -> Tensor:
    """The largest of each entry over the ranks, as :func:`sum_over_ranks`."""
    if world_size(process_group) > 1:
        dist.all_reduce(tensor, op=dist.ReduceOp.MAX, group=process_group)
    return tensor
