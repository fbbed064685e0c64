"""The node, forward and backward, against a differentiated SVD and against the least that it has to do."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import pytest
import torch
from torch import Tensor

from benchmarks.findings import Findings, cases
from benchmarks.peers import five_products, five_products_and_eigh, tall_svd_frame
from benchmarks.report import Check, milliseconds
from benchmarks.timing import Samples, median_ratio, medians
from etflayers import nearest_etf
from etflayers.solvers import SVD
from etflayers.testing import means_with_condition, relative_error, svd_frame

Shape = tuple[int, int]
FrameAndGradient = tuple[Tensor, Tensor]

SHAPES: tuple[Shape, ...] = ((16, 10), (512, 10), (512, 100), (512, 200), (2048, 1000))
QUICK_SHAPES: tuple[Shape, ...] = ((16, 10), (512, 10), (128, 40))
ILL_CONDITIONED: Shape = (512, 100)
# Lower bounds on the speed-up over a differentiated SVD, by (in_features, num_classes).
SPEEDUP_BOUNDS: dict[Shape, float] = {(512, 10): 2.0, (512, 100): 2.0, (512, 200): 1.9, (2048, 1000): 2.1}
ILL_CONDITIONED_BOUND = 1.3
LIMIT_BOUND, LIMIT_MIN_CLASSES = 1.6, 100

OURS, FORWARD = "etflayers", "etflayers, forward"
FLOOR, LIMIT = "floor: 5 products", "5 products, 1 eigh"
FRAMES: dict[str, Callable[[Tensor], Tensor]] = {
    OURS: nearest_etf,
    "etflayers, SVD()": partial(nearest_etf, solver=SVD()),
    "differentiated SVD": svd_frame,
    "the same, transposed": tall_svd_frame,
}
# The gradient of an SVD divides by gaps between singular values, which for K = 1000 are about 1e-3.
FRAME_LIMIT = 1e-5
GRADIENT_LIMITS = {
    OURS: 1e-5,
    "etflayers, SVD()": 1e-5,
    "differentiated SVD": 1e-2,
    "the same, transposed": 1e-2,
}


def gaussian_means(shape: Shape) -> Tensor:
    return torch.randn(shape[1], shape[0], generator=torch.Generator().manual_seed(0))


def conditioned_means(shape: Shape, kappa: float) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    return means_with_condition(shape[1], shape[0], kappa, generator=generator, dtype=torch.float32)


def forward_backward(frame_of: Callable[[Tensor], Tensor], means: Tensor) -> Callable[[], FrameAndGradient]:
    """A call that maps ``means`` to the frame and to the gradient for a fixed random cotangent."""
    point = means.detach().clone().requires_grad_()
    cotangent = torch.randn(means.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64).to(
        means.dtype
    )

    def call() -> FrameAndGradient:
        frame = frame_of(point)
        (gradient,) = torch.autograd.grad(frame, point, cotangent)
        return frame.detach(), gradient

    return call


def rivals(means: Tensor) -> dict[str, Callable[[], FrameAndGradient]]:
    return {name: forward_backward(frame_of, means) for name, frame_of in FRAMES.items()}


def checks(calls: dict[str, Callable[[], FrameAndGradient]], means: Tensor, title: str) -> list[Check]:
    """Frame and gradient of every rival against the differentiated SVD in float64."""
    frame, gradient = forward_backward(svd_frame, means.double())()
    found = []
    for name, call in calls.items():
        ours, our_gradient = call()
        found += [
            Check(f"{title} {name}: frame", relative_error(ours, frame), FRAME_LIMIT),
            Check(f"{title} {name}: gradient", relative_error(our_gradient, gradient), GRADIENT_LIMITS[name]),
        ]
    return found


def timed(means: Tensor) -> dict[str, Callable[[], object]]:
    """The rivals, our forward pass alone and the floor."""
    calls: dict[str, Callable[[], object]] = dict(rivals(means))
    point = means.detach().clone().requires_grad_()
    calls[FORWARD] = lambda: nearest_etf(point)
    calls[FLOOR] = five_products(*means.shape)
    calls[LIMIT] = five_products_and_eigh(*means.shape)
    return calls


def faster_svd(samples: Samples) -> str:
    """The layout of the differentiated SVD that wins here: the peer to beat."""
    times = medians(samples)
    return min(("differentiated SVD", "the same, transposed"), key=times.__getitem__)


@pytest.mark.bench
@cases(
    "shape, kappa",
    full=[*((shape, None) for shape in SHAPES), (ILL_CONDITIONED, 10.0), (ILL_CONDITIONED, 100.0)],
    quick=((shape, None) for shape in QUICK_SHAPES),
)
def test_node(findings: Findings, shape: Shape, kappa: float | None) -> None:
    title = str(shape) if kappa is None else f"{shape}, kappa {kappa:g}"
    means = gaussian_means(shape) if kappa is None else conditioned_means(shape, kappa)
    findings.require(*checks(rivals(means), means, title))
    samples = findings.measure(title, timed(means), seconds=12.0)
    times = medians(samples)
    speedup = median_ratio(samples, faster_svd(samples), OURS)
    over_limit = median_ratio(samples, OURS, LIMIT)
    findings.row(
        "Nearest ETF, forward + backward (milliseconds)",
        ["(d, K)", *times, "faster than SVD", "times 5 products, 1 eigh"],
        [title, *map(milliseconds, times.values()), f"{speedup:.2f}", f"{over_limit:.2f}"],
        "Gaussian class means unless kappa is given; the SVD to beat is the faster of its two layouts. "
        "eigh is an eigenproblem of size K in float32.",
    )
    bound = SPEEDUP_BOUNDS.get(shape) if kappa is None else ILL_CONDITIONED_BOUND
    if bound is not None:
        findings.claim(f"{title}: faster than SVD", speedup, "at least", bound, "x")
    if shape[1] >= LIMIT_MIN_CLASSES and kappa is None:
        findings.claim(f"{title}: times 5 products, 1 eigh", over_limit, "at most", LIMIT_BOUND, "x")
