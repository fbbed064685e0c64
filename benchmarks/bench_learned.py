"""A learned ETF: the node as a parametrization, against Householder products as PyTorch ships them."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils.parametrizations import orthogonal

from benchmarks.findings import Findings, cases
from benchmarks.report import Check, milliseconds
from benchmarks.timing import median_ratio, medians
from etflayers import LearnedETFHead
from etflayers.geometry import centered_basis_adjoint, etf_radius, simplex_etf
from etflayers.testing import relative_error

Shape = tuple[int, int]
SHAPES: tuple[Shape, ...] = ((512, 10), (512, 100), (512, 200))
QUICK_SHAPES: tuple[Shape, ...] = ((64, 10),)
OURS, PEER = "LearnedETFHead", "parametrizations.orthogonal"
BOUND = 4.0  # times faster


class Householder(nn.Module):
    """W = c E'Q' with Q from PyTorch's own parametrization."""

    def __init__(self, in_features: int, num_classes: int) -> None:
        super().__init__()
        self.q = nn.Parameter(torch.empty(in_features, num_classes - 1))
        nn.init.orthogonal_(self.q)
        orthogonal(self, "q")

    @property
    def frame(self) -> Tensor:
        return etf_radius(self.q.shape[-1] + 1) * centered_basis_adjoint(self.q.mT)


def rivals(shape: Shape) -> dict[str, Callable[[], Tensor]]:
    """Calls that make the frame and send a random cotangent back to the parameter."""
    torch.manual_seed(0)
    in_features, num_classes = shape
    cotangent = torch.randn(num_classes, in_features)

    def call_of(module: LearnedETFHead | Householder) -> Callable[[], Tensor]:
        def call() -> Tensor:
            frame = module.frame
            torch.autograd.grad(frame, list(module.parameters()), cotangent)
            return frame.detach()

        return call

    return {OURS: call_of(LearnedETFHead(*shape)), PEER: call_of(Householder(*shape))}


@pytest.mark.bench
@cases("shape", full=SHAPES, quick=QUICK_SHAPES)
def test_frame_and_gradient(findings: Findings, shape: Shape) -> None:
    calls = rivals(shape)
    in_features, num_classes = shape
    gram = simplex_etf(num_classes, in_features) @ simplex_etf(num_classes, in_features).T
    for name, call in calls.items():
        frame = call()
        findings.require(Check(f"{shape} {name}: is an ETF", relative_error(frame @ frame.T, gram), 1e-5))
    samples = findings.measure(str(shape), calls, seconds=6.0)
    ratio = median_ratio(samples, PEER, OURS)
    findings.row(
        "A learned frame and its gradient (milliseconds)",
        ["(d, K)", OURS, PEER, "times faster"],
        [str(shape), *map(milliseconds, medians(samples).values()), f"{ratio:.1f}"],
        "Forward and backward, float32, from the parameter to the frame.",
    )
    findings.claim(f"{shape}: faster than Householder", ratio, "at least", BOUND, "x")
