"""The cross-entropy kernels without a GPU, and on one."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from etflayers.functional import canonical_etf_logits, code_cross_entropy, etf_cross_entropy


@pytest.mark.slow
def test_interpreted(run_checks: Callable[[str], None]) -> None:
    run_checks("interpreted/check_cross_entropy.py")


@pytest.mark.slow
def test_compiled(run_checks: Callable[[str], None]) -> None:
    run_checks("compiled/check_cross_entropy.py")


def problem(batch: int, width: int, classes: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    features = torch.randn(batch, width, device="cuda").to(dtype).requires_grad_()
    targets = torch.randint(classes, (batch,), device="cuda")
    targets[::9] = -100
    return features, targets


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize(
    ("batch", "width", "classes"), [(512, 512, 10), (100, 1500, 1000), (37, 20000, 20000)]
)
def test_loss_and_gradient_on_a_gpu(
    batch: int, width: int, classes: int, smoothing: float, dtype: torch.dtype
) -> None:
    features, targets = problem(batch, width, classes, dtype)

    def loss_and_gradient(rows: Tensor) -> tuple[Tensor, Tensor]:
        logits = 3 * canonical_etf_logits(rows, classes)
        loss = F.cross_entropy(logits, targets, label_smoothing=smoothing)
        return loss.detach(), torch.autograd.grad(loss, rows)[0]

    exact = loss_and_gradient(features.detach().double().requires_grad_())
    eager = loss_and_gradient(features.detach().float().requires_grad_())
    loss = etf_cross_entropy(features, targets, classes, scale=3.0, label_smoothing=smoothing)
    (gradient,) = torch.autograd.grad(loss, features)
    eps = torch.finfo(torch.float32).eps
    assert (loss - exact[0]).abs() <= 2 * (eager[0] - exact[0]).abs() + 4 * eps * exact[0]
    rounding = torch.finfo(dtype).eps * exact[1].abs().max()
    assert (gradient - exact[1]).abs().max() <= 2 * (eager[1] - exact[1]).abs().max() + rounding


@pytest.mark.gpu
def test_nothing_of_the_size_of_the_logits_is_kept() -> None:
    features, targets = problem(512, 8192, 8192, torch.float32)
    size = features.numel() * 4
    warm = etf_cross_entropy(features, targets, 8192)
    torch.autograd.grad(warm, features)
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    loss = etf_cross_entropy(features, targets, 8192)
    assert torch.cuda.max_memory_allocated() - before < size / 10
    torch.autograd.grad(loss, features)
    assert torch.cuda.max_memory_allocated() - before < 1.1 * size  # the gradient


@pytest.mark.gpu
def test_linear_form_compile_and_no_sync_on_a_gpu() -> None:
    features, targets = problem(256, 128, 50, torch.float32)
    frame = torch.randn(50, 128, device="cuda", requires_grad=True)

    def losses(f: Tensor, w: Tensor) -> Tensor:
        return etf_cross_entropy(f, targets, 50) + code_cross_entropy(f, w, targets, chunk_size=100)

    def plain(f: Tensor, w: Tensor) -> Tensor:
        return F.cross_entropy(canonical_etf_logits(f, 50), targets) + F.cross_entropy(f @ w.T, targets)

    expected = torch.autograd.grad(plain(features, frame), (features, frame))
    for function in (losses, torch.compile(losses, fullgraph=True)):
        found = torch.autograd.grad(function(features, frame), (features, frame))
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-6)
    torch.cuda.set_sync_debug_mode("error")
    try:
        torch.autograd.grad(losses(features, frame), (features, frame))
    finally:
        torch.cuda.set_sync_debug_mode("default")


INVALID = """
import torch
from etflayers.functional import etf_cross_entropy
etf_cross_entropy(torch.ones(8, 4, device="cuda"), torch.full((8,), 4, device="cuda"), 4)
torch.cuda.synchronize()
"""


@pytest.mark.gpu
def test_targets_out_of_range_are_asserted_on() -> None:
    # An assertion on the device ends the CUDA context, so it needs a process of its own.
    done = subprocess.run([sys.executable, "-c", INVALID], capture_output=True, text=True)
    assert done.returncode != 0
    assert "targets must be class indices" in done.stderr + done.stdout
