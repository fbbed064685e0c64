"""A function of a test in several processes that are joined by gloo, and what it returned in each of them."""

from __future__ import annotations

import faulthandler
import os
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

import pytest
import torch
import torch.distributed as dist
from torch.multiprocessing.spawn import spawn

T = TypeVar("T")

DEADLINE = 300.0
"""Seconds after which a rank that stands still prints the stacks of its threads and fails."""


def run_ranks(function: Callable[[int, Path], T], world: int, folder: Path) -> list[T]:
    """What ``function(rank, folder)`` returns in each of ``world`` processes; of a module, not of a test."""
    if not (dist.is_available() and dist.is_gloo_available()):
        pytest.skip("needs torch.distributed with gloo")
    spawn(_run_rank, args=(function, world, folder), nprocs=world)  # type: ignore[no-untyped-call]
    return [torch.load(_file(folder, rank), weights_only=False) for rank in range(world)]


def _run_rank(rank: int, function: Callable[[int, Path], object], world: int, folder: Path) -> None:
    faulthandler.dump_traceback_later(DEADLINE, exit=True)
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=world)
    torch.save(function(rank, folder), _file(folder, rank))
    dist.barrier()
    # Not through destroy_process_group and Python's own end. Once in thousands of times a process of PyTorch
    # 2.13 stood still, with Python's lock in hand, as a model under DDP and its process group ended.
    # Once in forty, on a busy machine, it aborted: a thread of gloo still held tensors while Python ended.
    os._exit(0)


def _file(folder: Path, rank: int) -> Path:
    return folder / f"rank{rank}.pt"
