"""Training on several devices: one process each, which together take every step that one process would.

Each rank takes its share of every batch and of the data that are evaluated. Gradients are averaged by
``DistributedDataParallel``, class means and metrics by the library, batch statistics by the layers below: so
the numbers are those of one process, but for the order of sums.
"""

from __future__ import annotations

import os
import subprocess
import sys
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from typing import Any, NoReturn, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn

from etflayers.checks import require
from etflayers.collectives import all_reduce_sum
from lab.data import Split

Item = TypeVar("Item")
Rows = TypeVar("Rows", Tensor, list[Any])

PATIENCE = timedelta(days=1)
"""What one rank may do alone, while others wait for it: judge what all have trained."""


def rank() -> int:
    """The number of this process, 0 where there is only one."""
    return dist.get_rank() if dist.is_initialized() else 0


def world_size() -> int:
    """The number of processes."""
    return dist.get_world_size() if dist.is_initialized() else 1


def share(rows: Rows) -> Rows:
    """The rows of this rank: every n-th, so that shares differ by one row at most."""
    return rows[rank() :: world_size()]


def share_of_split(split: Split) -> Split:
    """The images of this rank."""
    return split if world_size() == 1 else Split(share(split.images), share(split.targets))


def gathered(item: Item) -> list[Item]:
    """What each rank has, in their order, on every rank."""
    if world_size() == 1:
        return [item]
    items: list[Item] = [item] * world_size()
    dist.all_gather_object(items, item)
    return items


def require_devices(devices: int, kind: torch.device) -> None:
    """Raise InvalidArgumentError where there are fewer CUDA devices; a CPU takes any number of ranks."""
    require(
        kind.type == "cpu" or devices <= torch.cuda.device_count(),
        f"--devices {devices}: PyTorch finds {torch.cuda.device_count()} CUDA devices here",
    )


def launched() -> bool:
    """Whether torchrun started this process."""
    return "LOCAL_RANK" in os.environ


def launch(script: str, arguments: Sequence[str], devices: int) -> None:
    """Run a script once for each device under torchrun; where that fails, end this process as it ended."""
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    # Threads as one process would have: torchrun itself asks for one in each.
    environment = {"OMP_NUM_THREADS": "1"} | os.environ
    command = [*torchrun, f"--nproc-per-node={devices}", script, *arguments]
    if status := subprocess.run(command, env=environment, check=False).returncode:
        sys.exit(status)


def end_with(main: Callable[[], int]) -> NoReturn:
    """End this process with the status of ``main()``; what torchrun started ends without Python's own end.

    A thread of gloo lets go of the tensors of the last exchange some time after it. Where it does so while
    Python comes to its end, PyTorch 2.13 aborts the process, which had done all it had to. One that has
    failed may stand still there, and the others would wait for it.
    """
    if not launched():
        sys.exit(main())
    try:
        status = main()
    except Exception:
        traceback.print_exc()
        status = 1
    try:
        sys.stdout.flush()
        sys.stderr.flush()
    finally:
        os._exit(status)


@contextmanager
def process_group(device: torch.device) -> Iterator[None]:
    """Join the ranks that torchrun started, by nccl on CUDA and gloo on the CPU, and leave together."""
    if not launched():
        yield
        return
    if device.type == "cuda":
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    dist.init_process_group("nccl" if device.type == "cuda" else "gloo", timeout=PATIENCE)
    yield
    # A rank that fails does not come here: it ends, and torchrun ends the others. Groups of gloo are not
    # destroyed, because their end may wait for a thread that itself waits for Python's lock; see `end_with`.
    dist.barrier()
    if device.type == "cuda":
        dist.destroy_process_group()


def distributed(model: nn.Module, device: torch.device) -> nn.Module:
    """The model to train with: the same module, its gradients and batch statistics shared by all ranks."""
    if world_size() == 1:
        return model
    device_ids = [torch.cuda.current_device()] if device.type == "cuda" else None
    return nn.parallel.DistributedDataParallel(model, device_ids=device_ids)


def with_shared_statistics(model: nn.Module, device: torch.device) -> nn.Module:
    """Let batch normalization see the batch of all ranks. Changes the model.

    Raises:
        InvalidArgumentError: on the CPU, a kind of batch normalization that is not ``nn.BatchNorm2d``.
    """
    if world_size() == 1:
        return model
    if device.type == "cuda":
        return nn.SyncBatchNorm.convert_sync_batchnorm(model)
    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            require(
                type(module) is nn.BatchNorm2d,
                f"--devices on a CPU knows nn.BatchNorm2d only, and the model has a {type(module).__name__}: "
                "take --model small or resnet18, or --device cuda",
            )
            module.__class__ = SharedBatchNorm2d  # the same parameters and buffers, another forward pass
    return model


class SharedBatchNorm2d(nn.BatchNorm2d):
    """``nn.BatchNorm2d`` over the batches of all ranks on a CPU, which ``nn.SyncBatchNorm`` does not know."""

    def forward(self, images: Tensor) -> Tensor:
        if not self.training:
            return super().forward(images)
        # The sum over ranks is differentiable, and only one rank adds to each share.
        empty = torch.zeros_like(images)
        shares = torch.stack([images if number == rank() else empty for number in range(world_size())])
        whole = super().forward(all_reduce_sum(shares).flatten(0, 1))
        return whole.unflatten(0, (world_size(), -1))[rank()]
