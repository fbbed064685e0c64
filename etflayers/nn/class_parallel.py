"""The style that divides the classes of a head among ranks. It loads ``torch.distributed.tensor``."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import Shard, distribute_tensor
from torch.distributed.tensor.parallel import ColwiseParallel

from etflayers.checks import require
from etflayers.collectives import ClassShard, world_size
from etflayers.errors import InvalidArgumentError
from etflayers.nn.base import CodeHead
from etflayers.nn.nearest import NearestETFHead
from etflayers.nn.sharded import ShardedHead, sharded_kind

__all__ = ["ClassParallel"]


class ClassParallel(ColwiseParallel):
    r"""Divides the classes of a head among the ranks of a mesh: rank r makes the logits ``s (z - m) W_r'``.

    For ``torch.distributed.tensor.parallel.parallelize_module``, which changes the head in place. It is
    PyTorch's ``ColwiseParallel`` for the heads of this library, and for ``nn.Linear`` it is that itself, with
    ``use_local_output=False``. Every rank gets the same features and targets. What a rank then stores:

    - :class:`~etflayers.nn.UnitRowHead` and ``nn.Linear``: its rows of the parameter, a ``DTensor``.
    - :class:`~etflayers.nn.FixedETFHead`: nothing for the canonical frame, otherwise its rows of the buffer,
      which is a ``DTensor`` in a state dict.
    - Every other :class:`~etflayers.nn.CodeHead`, yours too: all that the frame comes from. Only its logits
      are divided. :class:`~etflayers.nn.NearestETFHead` needs the means of all classes for any row, and
      :class:`~etflayers.nn.LearnedETFHead` the whole matrix.

    The first rank's values become those of all. A forward pass gives logits as a ``DTensor`` that is sharded
    by class, for ``loss_parallel()`` of PyTorch; :class:`~etflayers.nn.ETFCrossEntropy` of the head, from
    features, needs no logits. For ``nn.Linear`` the function
    :func:`~etflayers.functional.class_parallel_cross_entropy` takes its weight and bias as they are.

    Of a head that knows classes to come (:meth:`~etflayers.nn.CodeHead.deactivate`, before or after, on all
    ranks) each rank has those of its own share, and may have none that is here.

    A mesh has another dimension for other samples: parallelize over ``mesh["classes"]``, then
    ``DistributedDataParallel(model, device_mesh=mesh["data"])``; make the optimizer afterwards.
    ``torch.distributed.checkpoint`` saves the head and loads it into another number of ranks, or into one.

    Raises:
        InvalidArgumentError: a module that is neither ``nn.Linear`` nor a ``CodeHead``, a head with a
            ``forward`` of its own, a mesh with several dimensions, or a ``NearestETFHead`` whose class means
            would count each sample once a rank.

    Reference:
        Shoeybi, Patwary, Puri, LeGresley, Casper, Catanzaro (2019), arXiv 1909.08053, section 3.

    >>> ClassParallel()
    ClassParallel()
    """

    def __init__(self) -> None:
        super().__init__(use_local_output=False)

    def _apply(self, module: nn.Module, device_mesh: DeviceMesh) -> nn.Module:
        require(
            device_mesh.ndim == 1,
            f"device_mesh must have one dimension, that of the classes, got {device_mesh.ndim}: choose one, "
            'mesh["classes"]',
        )
        if isinstance(module, nn.Linear):
            linear: nn.Module = super()._apply(module, device_mesh)
            return linear
        if not isinstance(module, CodeHead):
            raise InvalidArgumentError(f"module must be a CodeHead or nn.Linear, got {type(module).__name__}")
        require(not isinstance(module, ShardedHead), "the classes of this head have already been divided")
        kind = sharded_kind(module)
        if isinstance(module, NearestETFHead):
            _count_samples_once(module, device_mesh)
        _store(module, kind, device_mesh)
        name = f"ClassParallel{type(module).__name__}"
        module.__class__ = type(name, (kind, type(module)), {})
        assert isinstance(module, ShardedHead)
        module.class_shard = ClassShard.chunk(module.num_classes, device_mesh.get_group())
        module.class_mesh = device_mesh
        module.keep_rows()
        return module

    def __repr__(self) -> str:
        return "ClassParallel()"


@torch.no_grad()
def _store(head: CodeHead, kind: type[ShardedHead], mesh: DeviceMesh) -> None:
    """Leave a rank its rows of what is stored in shards, and the values of the first rank of all else."""
    for owner in head.modules():
        for name, parameter in list(owner.named_parameters(recurse=False)):
            if owner is head and name in kind.stored_rows:
                rows = distribute_tensor(parameter.detach(), mesh, [Shard(0)])
                setattr(head, name, nn.Parameter(rows, parameter.requires_grad))
            else:
                _take_from_first(parameter, mesh)
        for buffer in owner.buffers(recurse=False):
            _take_from_first(buffer, mesh)


def _take_from_first(tensor: Tensor, mesh: DeviceMesh) -> None:
    if tensor.is_meta:
        return
    group = mesh.get_group()
    value = tensor.detach().contiguous()
    dist.broadcast(value, src=dist.get_global_rank(group, 0), group=group)
    tensor.copy_(value)


def _count_samples_once(head: NearestETFHead, mesh: DeviceMesh) -> None:
    """Have the class means summed over no two ranks of the mesh, which all have the same samples."""
    averages = head.averages
    if not averages.synchronize:
        return
    if averages.process_group is None:
        require(
            mesh.size() == world_size(),
            "process_group of NearestETFHead must be that of the ranks with other samples, or its class "
            "means would count each sample once for every rank that shares the classes: set "
            'head.averages.process_group = mesh["data"].get_group() first, or synchronize=False',
        )
        averages.synchronize = False
        return
    ranks = set(dist.get_process_group_ranks(averages.process_group))
    shared = ranks & set(dist.get_process_group_ranks(mesh.get_group()))
    require(
        len(shared) == 1,
        f"process_group of NearestETFHead has the ranks {sorted(ranks)}, of which {sorted(shared)} share the "
        "classes and so have the same samples, which would be counted several times: give it the ranks with "
        'other samples, head.averages.process_group = mesh["data"].get_group()',
    )
