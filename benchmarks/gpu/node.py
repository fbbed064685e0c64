"""The nearest-ETF node, forward and backward, against differentiated factorizations."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial

import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.gpu.ceilings import ceilings
from benchmarks.gpu.timing import DEVICE, eager_seconds, graph_seconds, medians
from benchmarks.peers import tall_svd_frame
from benchmarks.report import Check, Claim, Report, Table, number
from etflayers import nearest_etf
from etflayers.kernels import describe
from etflayers.solvers import SVD, GramEigh, GramRoot
from etflayers.testing import means_with_condition, relative_error, svd_frame

Frame = Callable[[Tensor], Tensor]
FrameAndGradient = tuple[Tensor, Tensor]

# (batch or none, in_features, num_classes)
Shape = tuple[int | None, int, int]
SHAPES: tuple[Shape, ...] = ((None, 512, 10), (None, 512, 100), (None, 2048, 1000), (64, 512, 10))
QUICK_SHAPES: tuple[Shape, ...] = ((None, 32, 10), (None, 64, 40), (3, 32, 10))

OURS, PRODUCTS = "etflayers", "etflayers, by products"
CAPTURED: dict[str, Frame] = {
    OURS: nearest_etf,
    PRODUCTS: partial(nearest_etf, solver=GramRoot(impl="reference")),
}
# These read values on the host, and cannot be captured in a graph.
FACTORISED: dict[str, Frame] = {
    "SVD, closed adjoint": partial(nearest_etf, solver=SVD()),
    "eigh of the Gram matrix, closed adjoint": partial(nearest_etf, solver=GramEigh()),
    "differentiated SVD": svd_frame,
    "the same, transposed": tall_svd_frame,
}
DIFFERENTIATED = ("differentiated SVD", "the same, transposed")
LIMIT = 2e-6
# The gradient of an SVD divides by gaps between singular values.
FACTORISED_LIMIT = 1e-2
GRAPH_BOUND, EAGER_BOUND = 60.0, 250.0  # microseconds, at (512, 10)
SPEEDUP_BOUNDS: dict[Shape, float] = {(None, 512, 100): 5.0, (None, 2048, 1000): 10.0}
KAPPAS = (1.0, 5.0, 1e2, 1e3, 1e4)


def gaussian_means(shape: Shape) -> Tensor:
    batch, in_features, num_classes = shape
    size = (num_classes, in_features) if batch is None else (batch, num_classes, in_features)
    return torch.randn(size, generator=torch.Generator().manual_seed(0))


def forward_backward(frame_of: Frame, means: Tensor) -> Callable[[], FrameAndGradient]:
    """A call that maps ``means`` to the frame and to the gradient for a fixed random cotangent."""
    point = means.detach().clone().requires_grad_()
    cotangent = torch.randn(means.shape, generator=torch.Generator().manual_seed(1)).to(means)

    def call() -> FrameAndGradient:
        frame = frame_of(point)
        (gradient,) = torch.autograd.grad(frame, point, cotangent)
        return frame.detach(), gradient

    return call


def exactly(means: Tensor) -> FrameAndGradient:
    """By an SVD in float64 on the host."""
    return forward_backward(partial(nearest_etf, solver=SVD()), means.double())()


def errors(frame_of: Frame, means: Tensor, exact: FrameAndGradient) -> tuple[float, float]:
    """Relative errors of frame and gradient."""
    found = forward_backward(frame_of, means.to(DEVICE))()
    error, gradient_error = (
        relative_error(mine.cpu(), theirs) for mine, theirs in zip(found, exact, strict=True)
    )
    return error, gradient_error


@contextmanager
def no_sync() -> Iterator[None]:
    """Make each wait for the device an error."""
    if DEVICE == "cuda":
        torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        if DEVICE == "cuda":
            torch.cuda.set_sync_debug_mode("default")


def checks(title: str, means: Tensor) -> list[Check]:
    found, exact = [], exactly(means)
    for name, frame_of in (CAPTURED | FACTORISED).items():
        limit = LIMIT if name in CAPTURED else FACTORISED_LIMIT
        error, gradient_error = errors(frame_of, means, exact)
        found += [
            Check(f"{title} {name}: frame", error, limit),
            Check(f"{title} {name}: gradient", gradient_error, limit),
        ]
    for name, frame_of in CAPTURED.items():
        call = forward_backward(frame_of, means.to(DEVICE))
        call()
        with no_sync():
            try:
                call()
                waited = 0.0
            except RuntimeError:
                waited = 1.0
        found.append(Check(f"{title} {name}: waits for the device", waited, 0.0))
    return found


def operations(means: Tensor) -> int:
    """Floating-point operations of the path by products, forward and backward."""
    call = forward_backward(CAPTURED[PRODUCTS], means.to(DEVICE))
    with FlopCounterMode(display=False) as counter:
        call()
    return int(counter.get_total_flops())


def title_of(shape: Shape) -> str:
    batch, in_features, num_classes = shape
    return f"({in_features}, {num_classes})" if batch is None else f"{batch} x ({in_features}, {num_classes})"


def accuracy(report: Report, quick: bool) -> None:
    rows = []
    for num_classes, in_features in ((10, 64),) if quick else ((10, 512), (32, 512), (100, 512)):
        for kappa in KAPPAS:
            means = means_with_condition(
                num_classes,
                in_features,
                kappa,
                generator=torch.Generator().manual_seed(0),
                dtype=torch.float32,
            )
            exact = exactly(means)
            found = [error for name in CAPTURED for error in errors(CAPTURED[name], means, exact)]
            rows.append([f"({in_features}, {num_classes})", f"{kappa:g}", *(f"{e:.1e}" for e in found)])
            if kappa <= 5:
                what = f"error of frame and gradient, ({in_features}, {num_classes}), kappa {kappa:g}"
                report.claims.append(Claim(what, max(found), "at most", LIMIT, ""))
    columns = ["(d, K)", "kappa", *(f"{name}: {what}" for name in CAPTURED for what in ("frame", "gradient"))]
    report.tables.append(Table("Relative error of float32 data against an SVD in float64", columns, rows))


def run(quick: bool = False) -> Report:
    report = Report("node")
    accuracy(report, quick)
    rows = []
    for shape in QUICK_SHAPES if quick else SHAPES:
        title, means = title_of(shape), gaussian_means(shape)
        batch, in_features, num_classes = shape
        report.checks.extend(checks(title, means))
        device_means = means.to(DEVICE)
        captured = {name: forward_backward(frame, device_means) for name, frame in CAPTURED.items()}
        factorized = {name: forward_backward(frame, device_means) for name, frame in FACTORISED.items()}
        device = graph_seconds({name: [call] for name, call in captured.items()})
        # A factorization of a large matrix takes a second.
        eager = eager_seconds(captured) | eager_seconds(
            factorized, rounds=5 if num_classes > 100 or batch else 20, repeats=1, warm=1
        )
        report.samples[title] = {"graph": device, "eager": eager}
        in_graph, launched = medians(device), medians(eager)
        path = describe(
            "polar",
            device=DEVICE,
            dtype=torch.float32,
            num_classes=num_classes,
            in_features=in_features,
            batch=batch,
        )
        done = operations(means)
        ceiling = ceilings(quick).products["float64"]
        for name, seconds in launched.items():
            rate = ""
            if name == PRODUCTS:
                speed = done / in_graph[name]
                rate = f"{number(speed / 1e12)} of {number(ceiling / 1e12)}"
            rows.append(
                [
                    f"{title}: {name}" + (f" ({path.impl})" if name == OURS else ""),
                    number(1e6 * seconds),
                    number(1e6 * in_graph[name]) if name in in_graph else "",
                    number(min(launched[n] for n in DIFFERENTIATED) / seconds),
                    rate,
                ]
            )
        if quick:
            continue
        if shape == (None, 512, 10):
            report.claims += [
                Claim(f"{title}, in a CUDA graph", 1e6 * in_graph[OURS], "at most", GRAPH_BOUND, " us"),
                Claim(f"{title}, eager", 1e6 * launched[OURS], "at most", EAGER_BOUND, " us"),
            ]
        if shape in SPEEDUP_BOUNDS:
            speedup = min(launched[name] for name in DIFFERENTIATED) / launched[OURS]
            report.claims.append(
                Claim(
                    f"{title}, eager: faster than differentiated SVD",
                    speedup,
                    "at least",
                    SPEEDUP_BOUNDS[shape],
                    "x",
                )
            )
    report.tables.append(
        Table(
            "Nearest ETF, forward + backward",
            ["(d, K)", "eager, us", "in a CUDA graph, us", "faster than SVD, eager", "float64 TFLOP/s"],
            rows,
            "Gaussian class means; the SVD to beat is the faster of its two layouts. Factorizations wait for "
            "the host and cannot be captured. TFLOP/s in the graph, against the product of large matrices.",
        )
    )
    return report
