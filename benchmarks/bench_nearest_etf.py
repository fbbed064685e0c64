"""The node, forward and backward, against a differentiated SVD and against the floor of its own products."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import pytest
import torch
from pytest_benchmark.fixture import BenchmarkFixture
from torch import Tensor

from benchmarks.peers import five_products, tall_svd_frame
from benchmarks.report import Check, Claim, Report, Table, milliseconds
from benchmarks.timing import Samples, interleaved, median_ratio, medians
from etflayers import nearest_etf
from etflayers.solvers import SVD
from etflayers.testing import means_with_condition, relative_error, svd_frame

Shape = tuple[int, int]
FrameAndGradient = tuple[Tensor, Tensor]

SHAPES: tuple[Shape, ...] = ((16, 10), (512, 10), (512, 100), (512, 200), (2048, 1000))
QUICK_SHAPES: tuple[Shape, ...] = ((16, 10), (512, 10), (128, 40))
ILL_CONDITIONED: Shape = (512, 100)
# Lower bounds on the speed-up over a differentiated SVD, by (in_features, num_classes).
SPEEDUP_BOUNDS: dict[Shape, float] = {(512, 10): 1.35, (512, 100): 1.8, (512, 200): 1.8, (2048, 1000): 1.6}
FLOOR_BOUND, FLOOR_MIN_CLASSES = 2.5, 100

OURS, FLOOR = "etflayers", "floor: 5 products"
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


def measure(means: Tensor, seconds: float) -> Samples:
    """Interleaved samples of the rivals, of our forward pass alone and of the floor."""
    calls: dict[str, Callable[[], object]] = dict(rivals(means))
    point = means.detach().clone().requires_grad_()
    calls["etflayers, forward"] = lambda: nearest_etf(point)
    calls[FLOOR] = five_products(*means.shape)
    return interleaved(calls, seconds=seconds)


def faster_svd(samples: Samples) -> str:
    """The layout of the differentiated SVD that wins here: the peer to beat."""
    times = medians(samples)
    return min(("differentiated SVD", "the same, transposed"), key=times.__getitem__)


def run(quick: bool = False) -> Report:
    report = Report("nearest_etf")
    cases = [(f"({d}, {k})", (d, k), gaussian_means((d, k))) for d, k in (QUICK_SHAPES if quick else SHAPES)]
    if not quick:
        d, k = ILL_CONDITIONED
        generator = torch.Generator().manual_seed(0)
        means = means_with_condition(k, d, 100.0, generator=generator, dtype=torch.float32)
        cases.append((f"({d}, {k}), kappa 100", (0, 0), means))
    rows = []
    for title, shape, means in cases:
        report.checks.extend(checks(rivals(means), means, title))
        samples = measure(means, seconds=0.5 if quick else 12.0)
        report.samples[title] = samples
        times = medians(samples)
        speedup = median_ratio(samples, faster_svd(samples), OURS)
        over_floor = median_ratio(samples, OURS, FLOOR)
        rows.append([title, *map(milliseconds, times.values()), f"{speedup:.2f}", f"{over_floor:.2f}"])
        if shape in SPEEDUP_BOUNDS and not quick:
            report.claims.append(
                Claim(f"{title}: faster than SVD", speedup, "at least", SPEEDUP_BOUNDS[shape], "x")
            )
        if shape[1] >= FLOOR_MIN_CLASSES:
            report.claims.append(Claim(f"{title}: times the floor", over_floor, "at most", FLOOR_BOUND, "x"))
    report.tables.append(
        Table(
            "Nearest ETF, forward + backward (milliseconds)",
            ["(d, K)", *times, "faster than SVD", "times the floor"],
            rows,
            "Gaussian class means unless kappa is given; the SVD to beat is the faster of its two layouts.",
        )
    )
    return report


@pytest.mark.bench
@pytest.mark.parametrize("shape", SHAPES, ids=lambda shape: f"d{shape[0]}-K{shape[1]}")
@pytest.mark.parametrize("rival", FRAMES)
def test_forward_backward(benchmark: BenchmarkFixture, rival: str, shape: Shape) -> None:
    means = gaussian_means(shape)
    call = rivals(means)[rival]
    assert not [check for check in checks({rival: call}, means, str(shape)) if not check.passed]
    benchmark.group = f"nearest_etf (d, K) = {shape}"
    benchmark(call)
