"""Cross-entropy of classes that two ranks share, against ``loss_parallel`` of PyTorch on the same work.

Both have the weight as a ``DTensor`` of which each rank has half of the rows. The rival makes the logits of a
rank at once and keeps them for the way back; ours makes some at a time, and makes them again.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor
from torch.multiprocessing.spawn import spawn

from benchmarks.findings import Findings, cases
from benchmarks.processes import in_a_process, peak_mb
from benchmarks.report import Check
from benchmarks.timing import median_ratio, medians
from etflayers.functional import class_parallel_cross_entropy
from etflayers.testing import relative_error

OURS, PEER = "class_parallel_cross_entropy", "loss_parallel"
RIVALS = (OURS, PEER)
RANKS = 2
# Batch, width of the features, classes.
SHAPE, QUICK_SHAPE = (256, 256, 20_000), (8, 4, 10)
ERROR_LIMIT = 1e-5
Shape = tuple[int, int, int]


def problem(shape: Shape) -> tuple[Tensor, Tensor, Tensor]:
    """Features, weight and targets, the same on every rank."""
    batch, width, classes = shape
    generator = torch.Generator().manual_seed(0)
    features = torch.randn(batch, width, generator=generator)
    weight = torch.randn(classes, width, generator=generator) / width**0.5
    return features, weight, torch.randint(classes, (batch,), generator=generator)


def passes(shape: Shape) -> tuple[dict[str, Callable[[], tuple[Tensor, Tensor, Tensor]]], Callable[[], None]]:
    """A forward and a backward pass of each rival, and what forgets the gradients.

    A pass returns the loss and the gradients in the features and in the rows of this rank.
    """
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor
    from torch.distributed.tensor.parallel import loss_parallel

    mesh = init_device_mesh("cpu", (RANKS,))
    features, whole, targets = problem(shape)
    features.requires_grad_()
    weight: Any = distribute_tensor(whole, mesh, [Shard(0)]).requires_grad_()
    del whole

    def ours() -> Tensor:
        loss = class_parallel_cross_entropy(features, weight, targets)
        loss.backward()
        return loss.detach()

    def peer() -> Tensor:
        with loss_parallel():
            logits = F.linear(DTensor.from_local(features, mesh, [Replicate()], run_check=False), weight)
            loss: Any = F.cross_entropy(logits, targets)
            loss.backward()
        return loss.detach().to_local()

    def release() -> None:
        features.grad = weight.grad = None

    def with_gradients(step: Callable[[], Tensor]) -> Callable[[], tuple[Tensor, Tensor, Tensor]]:
        def call() -> tuple[Tensor, Tensor, Tensor]:
            release()
            loss = step()
            assert features.grad is not None
            return loss, features.grad, weight.grad.to_local()

        return call

    return {OURS: with_gradients(ours), PEER: with_gradients(peer)}, release


def measure_here(rank: int, folder: str, what: str, shape: Shape, seconds: float) -> None:
    """What the first of the ranks finds: the seconds of all rivals in turns, or the memory of one."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/init", rank=rank, world_size=RANKS)
    small, _ = passes(QUICK_SHAPE)
    for call in small.values():  # what the libraries allocate once
        call()
    rivals, release = passes(shape)
    found: dict[str, Any]
    if what == "time":
        rounds = torch.tensor(max(3, round(seconds / max(seconds_of(call) for call in rivals.values()) / 2)))
        dist.broadcast(rounds, src=0)
        samples: dict[str, list[float]] = {name: [] for name in rivals}
        for _ in range(int(rounds)):
            for name, call in rivals.items():
                samples[name].append(seconds_of(call))
        found = {"samples": samples}
    else:
        rivals[what]()  # or the division of the weight still holds some
        release()
        gc.collect()
        dist.barrier()
        forget_peak()
        before = peak_mb()
        loss, *grads = rivals[what]()
        found = {"extra": peak_mb() - before}
        if rank == 0:
            torch.save((loss, *grads), f"{folder}/gradients.pt")
    if rank == 0:
        Path(f"{folder}/found.json").write_text(json.dumps(found))
    dist.barrier()
    os._exit(0)  # gloo may still hold tensors, and if Python ends meanwhile PyTorch 2.13 aborts


def forget_peak() -> None:
    """Have the kernel count the peak from here: to divide the weight took more than the process has now."""
    references = Path("/proc/self/clear_refs")
    if references.exists():
        references.write_text("5")


def seconds_of(call: Callable[[], object]) -> float:
    dist.barrier()
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def error(folder: str, shape: Shape) -> float:
    """The largest relative error of what the first rank has found, in float64 and by one process."""
    features, weight, targets = problem(shape)
    leaves = [features.double().requires_grad_(), weight.double().requires_grad_()]
    expected = F.cross_entropy(F.linear(*leaves), targets)
    grads = torch.autograd.grad(expected, leaves)
    loss, d_features, d_rows = torch.load(f"{folder}/gradients.pt")
    pairs = ((loss, expected.detach()), (d_features, grads[0]), (d_rows, grads[1][: len(d_rows)]))
    return max(relative_error(found, right) for found, right in pairs)


def measure(what: str, shape: Shape, seconds: float) -> dict[str, Any]:
    """The same in fresh processes; with the error of the one rival that is asked for."""
    # Or glibc keeps large blocks that have been freed, and the peak would not see them used again.
    forgetful = {"MALLOC_MMAP_THRESHOLD_": str(2**16)}
    arguments = (what, *shape, "--seconds", seconds)
    found: dict[str, Any] = in_a_process("benchmarks.bench_class_parallel", *arguments, environment=forgetful)
    return found


@pytest.mark.bench
@cases("shape", full=[SHAPE], quick=[QUICK_SHAPE])
def test_class_parallel(findings: Findings, shape: Shape) -> None:
    memory = {rival: measure(rival, shape, 0) for rival in RIVALS}
    findings.require(
        *(Check(f"{rival}: loss and gradients", memory[rival]["error"], ERROR_LIMIT) for rival in RIVALS)
    )
    samples = findings.once(lambda: measure("time", shape, 0.3 if findings.quick else 30.0))["samples"]
    batch, width, classes = shape
    title = f"B = {batch}, d = {width}, K = {classes}"
    findings.keep(f"{title}, seconds", samples)
    findings.keep(f"{title}, MB", {rival: [memory[rival]["extra"]] for rival in RIVALS})
    middle = medians(samples)
    for rival in RIVALS:
        findings.row(
            f"Loss and gradients of {title} on {RANKS} gloo ranks, float32",
            ["", "forward + backward (ms)", "peak memory of a rank (MB)"],
            [rival, f"{1000 * middle[rival]:.0f}", f"{memory[rival]['extra']:.1f}"],
            "The two take turns in the same processes; memory is of fresh processes, without the weight.",
        )
    extra = {rival: max(memory[rival]["extra"], 1e-3) for rival in RIVALS}
    findings.claim(f"{title}: memory of {PEER}", extra[PEER] / extra[OURS], "at least", 1.5, "x")
    findings.claim(f"{title}: time of {PEER}", median_ratio(samples, PEER, OURS), "at least", 0.8, "x")


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("what", choices=("time", *RIVALS))
    parser.add_argument("shape", type=int, nargs=3)
    parser.add_argument("--seconds", type=float, default=10.0)
    given = parser.parse_args()
    asked: Shape = tuple(given.shape)
    with tempfile.TemporaryDirectory() as place:
        spawn(measure_here, args=(place, given.what, asked, given.seconds), nprocs=RANKS)  # type: ignore[no-untyped-call]
        result = json.loads(Path(place, "found.json").read_text())
        if given.what != "time":
            result["error"] = error(place, asked)
    print(json.dumps(result))
