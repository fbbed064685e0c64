"""Float32 error of frame and gradient against float64, by condition number, for each way to compute them."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial

import pytest
import torch
from torch import Tensor

from benchmarks.bench_nearest_etf import conditioned_means, forward_backward
from benchmarks.findings import Findings, cases
from benchmarks.report import Check
from etflayers import nearest_etf
from etflayers.errors import ConvergenceError, NonFiniteError
from etflayers.solvers import SVD, GramEigh, NewtonSchulz
from etflayers.testing import relative_error, svd_frame

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
# Upper bounds on the error of our gradient: by the largest kappa up to MANY classes, and beyond.
GRADIENT_BOUNDS, MANY, BOUND_BEYOND = ((1e2, 2e-6), (1e3, 5e-6)), 500, 5e-6
# Beyond this a result is wrong rather than rounded.
FRAME_LIMIT, GRADIENT_LIMIT = 1e-5, 1e-4


def errors_against(
    exact_frame: Tensor, exact_gradient: Tensor, frame_of: Callable[[Tensor], Tensor], means: Tensor
) -> tuple[float, float]:
    try:
        frame, gradient = forward_backward(frame_of, means)()
    except (NonFiniteError, ConvergenceError):
        return math.inf, math.inf
    return relative_error(frame, exact_frame), relative_error(gradient, exact_gradient)


def _cell(error: float) -> str:
    return f"{error:.0e}" if math.isfinite(error) else "refused"


@pytest.mark.bench
@cases("shape", full=SHAPES, quick=QUICK_SHAPES)
@pytest.mark.parametrize("kappa", KAPPAS)
def test_accuracy(findings: Findings, shape: tuple[int, int], kappa: float) -> None:
    means = conditioned_means(shape, kappa)
    exact = forward_backward(svd_frame, means.double())()
    found = findings.once(
        lambda: {name: errors_against(*exact, frame_of, means) for name, frame_of in FRAMES.items()}
    )
    title = f"{shape}, kappa {kappa:g}"
    for what, errors in (
        ("gradient", {name: gradient for name, (_, gradient) in found.items()}),
        ("frame", {name: frame for name, (frame, _) in found.items()}),
    ):
        findings.row(
            f"Error of the {what} in float32",
            ["(d, K)", "kappa", *FRAMES],
            [str(shape), f"{kappa:g}", *map(_cell, errors.values())],
            "Relative Frobenius error against a differentiated SVD in float64, at the same float32 means.",
        )
    frame, gradient = found[OURS]
    findings.require(
        Check(f"{title}: frame", frame, FRAME_LIMIT), Check(f"{title}: gradient", gradient, GRADIENT_LIMIT)
    )
    bounds = [bound for largest, bound in GRADIENT_BOUNDS if kappa <= largest and shape[1] <= MANY]
    bound = bounds[0] if bounds else BOUND_BEYOND
    findings.claim(f"{title}: float32 gradient error", gradient, "at most", bound, "")
