"""The class-sum kernels without a GPU, and on one."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable

import pytest
import torch

from etflayers.errors import InvalidArgumentError
from etflayers.functional import class_means, class_sums
from etflayers.kernels import describe
from etflayers.nn import FeatureMovingAverage


@pytest.mark.slow
def test_interpreted(run_checks: Callable[[str], None]) -> None:
    run_checks("interpreted/check_class_sums.py")


@pytest.mark.slow
def test_compiled(run_checks: Callable[[str], None]) -> None:
    run_checks("compiled/check_class_sums.py")


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    ("batch", "width", "classes"), [(1024, 2048, 10), (500, 300, 100), (3000, 1024, 1000), (5, 3, 7)]
)
def test_sums_on_a_gpu(batch: int, width: int, classes: int, dtype: torch.dtype) -> None:
    features = torch.randn(batch, width, device="cuda").to(dtype).requires_grad_()
    targets = torch.randint(classes, (batch,), device="cuda")
    targets[::9] = -100
    assert describe("class_sums", device="cuda", dtype=dtype, num_classes=classes).impl == "triton"

    sums, counts = class_sums(features, targets, classes)

    exact, exact_counts = class_sums(features.detach().double(), targets, classes)
    eager, _ = class_sums(features.detach(), targets, classes, impl="reference")
    budget = 2 * (eager - exact).abs().max() + torch.finfo(torch.float32).eps * exact.abs().max()
    assert (sums - exact).abs().max() <= budget
    assert torch.equal(counts, exact_counts)
    for _ in range(3):
        assert torch.equal(class_sums(features, targets, classes)[0], sums)
    cotangent = torch.randn_like(sums)
    (gradient,) = torch.autograd.grad(sums, features, cotangent)
    kept = targets >= 0
    assert torch.equal(gradient[kept], cotangent[targets[kept]].to(dtype))
    assert not bool(gradient[~kept].any())


@pytest.mark.gpu
def test_one_class_with_all_rows_on_a_gpu() -> None:
    features = torch.randn(5000, 64, device="cuda")
    means, counts = class_means(features, torch.zeros(5000, dtype=torch.int64, device="cuda"), 2)
    torch.testing.assert_close(means[0], features.mean(0), rtol=1e-5, atol=1e-6)
    assert counts.tolist() == [5000, 0]


@pytest.mark.gpu
@pytest.mark.parametrize("momentum", [0.1, None, "2/(t+1)"])
def test_average_on_a_gpu_without_a_sync_and_in_a_graph(momentum: float | str | None) -> None:
    batches = torch.randn(4, 64, 32, device="cuda")
    targets = torch.randint(10, (4, 64), device="cuda")
    average = FeatureMovingAverage(32, 10, momentum=momentum, device="cuda")  # type: ignore[arg-type]
    expected = FeatureMovingAverage(32, 10, momentum=momentum, dtype=torch.float64)  # type: ignore[arg-type]
    features = batches[0].clone().requires_grad_()
    torch.autograd.grad(average(features, targets[0]).sum(), features)  # compiles the kernels

    graph = torch.cuda.CUDAGraph()
    static = targets[0].clone()
    with torch.cuda.graph(graph):
        means = average(features, static)
        (gradient,) = torch.autograd.grad(means.sum(), features)
    average.load_state_dict({name: torch.zeros_like(value) for name, value in average.state_dict().items()})
    for batch, labels in zip(batches, targets, strict=True):
        features.data.copy_(batch)
        static.copy_(labels)
        graph.replay()
        wide = batch.double().cpu().requires_grad_()
        exact = expected(wide, labels.cpu())
        torch.testing.assert_close(means.cpu().double(), exact.detach(), rtol=1e-5, atol=1e-6)
        (exact_gradient,) = torch.autograd.grad(exact.sum(), wide)
        torch.testing.assert_close(gradient.cpu().double(), exact_gradient, rtol=1e-5, atol=1e-7)

    torch.cuda.set_sync_debug_mode("error")
    try:
        torch.autograd.grad(average(features, static).sum(), features)
    finally:
        torch.cuda.set_sync_debug_mode("default")


INVALID = """
import torch
from etflayers.functional import class_sums
features, targets = torch.ones(8, 4, device="cuda"), torch.zeros(8, dtype=torch.int64, device="cuda")
{change}
class_sums(features, targets, 3)
torch.cuda.synchronize()
"""


@pytest.mark.gpu
@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("features[3, 1] = torch.nan", "features must be finite"),
        ("features[3, 1] = 1e38", "features must be finite"),
        ("targets[2] = 3", "targets must be class indices"),
    ],
)
def test_invalid_values_are_asserted_on(change: str, message: str) -> None:
    # An assertion on the device ends the CUDA context, so it needs a process of its own.
    done = subprocess.run(
        [sys.executable, "-c", INVALID.format(change=change)], capture_output=True, text=True
    )
    assert done.returncode != 0
    assert message in done.stderr + done.stdout


@pytest.mark.gpu
def test_targets_elsewhere_are_refused() -> None:
    with pytest.raises(InvalidArgumentError, match="targets must be on the device of features, cuda"):
        class_sums(torch.ones(2, 3, device="cuda"), torch.zeros(2, dtype=torch.int64), 2)
