"""Float32 error of frame and gradient against float64, by condition number, for each way to compute them."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial

import pytest
import torch
from pytest_benchmark.fixture import BenchmarkFixture
from torch import Tensor

from benchmarks.bench_nearest_etf import forward_backward
from benchmarks.report import Check, Claim, Report, Table
from etflayers import nearest_etf
from etflayers.errors import ConvergenceError, NonFiniteError
from etflayers.solvers import SVD, GramEigh, NewtonSchulz
from etflayers.testing import means_with_condition, relative_error, svd_frame

KAPPAS = (1.01, 3.0, 6.0, 10.0, 1e2, 1e3)
# (in_features, num_classes)
SHAPES = ((512, 10), (512, 100), (512, 200), (2048, 1000))
QUICK_SHAPES = ((512, 10), (64, 40))

OURS = "etflayers"
FRAMES: dict[str, Callable[[Tensor], Tensor]] = {
    OURS: nearest_etf,
    "SVD()": partial(nearest_etf, solver=SVD()),
    "GramEigh()": partial(nearest_etf, solver=GramEigh()),
    "GramEigh(float32)": partial(nearest_etf, solver=GramEigh(torch.float32)),
    "NewtonSchulz()": partial(nearest_etf, solver=NewtonSchulz()),
    "differentiated SVD": svd_frame,
}
# Upper bounds on the error of our gradient, by the largest kappa at which they hold.
GRADIENT_BOUNDS = {10.0: 2e-6, 1e3: 1e-5}
# Beyond this a result is wrong rather than rounded.
FRAME_LIMIT, GRADIENT_LIMIT = 1e-5, 1e-4


def errors(frame_of: Callable[[Tensor], Tensor], means: Tensor) -> tuple[float, float]:
    """Relative error of frame and gradient; infinite where the solver refuses."""
    exact_frame, exact_gradient = forward_backward(svd_frame, means.double())()
    return errors_against(exact_frame, exact_gradient, frame_of, means)


def errors_against(
    exact_frame: Tensor, exact_gradient: Tensor, frame_of: Callable[[Tensor], Tensor], means: Tensor
) -> tuple[float, float]:
    try:
        frame, gradient = forward_backward(frame_of, means)()
    except (NonFiniteError, ConvergenceError):
        return math.inf, math.inf
    return relative_error(frame, exact_frame), relative_error(gradient, exact_gradient)


def conditioned_means(shape: tuple[int, int], kappa: float) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    return means_with_condition(shape[1], shape[0], kappa, generator=generator, dtype=torch.float32)


def _cell(error: float) -> str:
    return f"{error:.0e}" if math.isfinite(error) else "refused"


def run(quick: bool = False) -> Report:
    report = Report("accuracy")
    frame_rows, gradient_rows = [], []
    worst = dict.fromkeys(GRADIENT_BOUNDS, 0.0)
    for shape in QUICK_SHAPES if quick else SHAPES:
        d, k = shape
        for kappa in KAPPAS:
            means = conditioned_means(shape, kappa)
            exact = forward_backward(svd_frame, means.double())()
            found = {name: errors_against(*exact, frame_of, means) for name, frame_of in FRAMES.items()}
            title = f"({d}, {k}), kappa {kappa:g}"
            report.samples[title] = found
            frame_rows.append([f"({d}, {k})", f"{kappa:g}", *(_cell(frame) for frame, _ in found.values())])
            gradient_rows.append([f"({d}, {k})", f"{kappa:g}", *(_cell(grad) for _, grad in found.values())])
            frame, gradient = found[OURS]
            report.checks += [
                Check(f"{title}: frame", frame, FRAME_LIMIT),
                Check(f"{title}: gradient", gradient, GRADIENT_LIMIT),
            ]
            for limit in GRADIENT_BOUNDS:
                if kappa <= limit:
                    worst[limit] = max(worst[limit], gradient)
    report.claims.extend(
        Claim(f"float32 gradient error, kappa <= {limit:g}", worst[limit], "at most", bound, "")
        for limit, bound in GRADIENT_BOUNDS.items()
    )
    columns = ["(d, K)", "kappa", *FRAMES]
    note = "Relative Frobenius error against a differentiated SVD in float64, at the same float32 means."
    report.tables += [
        Table("Error of the gradient in float32", columns, gradient_rows, note),
        Table("Error of the frame in float32", columns, frame_rows, note),
    ]
    return report


@pytest.mark.bench
@pytest.mark.parametrize("kappa", KAPPAS)
@pytest.mark.parametrize("shape", SHAPES, ids=lambda shape: f"d{shape[0]}-K{shape[1]}")
def test_accuracy(benchmark: BenchmarkFixture, shape: tuple[int, int], kappa: float) -> None:
    means = conditioned_means(shape, kappa)
    frame, gradient = benchmark.pedantic(  # type: ignore[no-untyped-call]
        errors, args=(nearest_etf, means), rounds=1
    )
    benchmark.extra_info.update(frame_error=frame, gradient_error=gradient)
    assert frame <= FRAME_LIMIT
    assert gradient <= GRADIENT_LIMIT
