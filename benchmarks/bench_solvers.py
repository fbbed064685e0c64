"""Every solver with every adjoint, on the same problems, beside PyTorch's and SciPy's own."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from functools import partial
from typing import NamedTuple

import numpy as np
import pytest
import torch
from scipy import linalg  # type: ignore[import-untyped]
from torch import Tensor

from benchmarks.bench_nearest_etf import FrameAndGradient, forward_backward
from benchmarks.findings import Findings, cases
from benchmarks.peers import tall_svd_frame
from benchmarks.report import Check, milliseconds
from benchmarks.timing import medians
from etflayers import nearest_etf
from etflayers.adjoints import Adjoint, Detached, Implicit, Unrolled
from etflayers.geometry import centered_basis_adjoint, centered_basis_apply, etf_radius
from etflayers.solvers import (
    QRSVD,
    SVD,
    ByRegime,
    ConvexHull,
    FrameSolver,
    GramEigh,
    Iterative,
    NewtonSchulz,
    RiemannianDescent,
    RiemannianNewton,
    TrustRegions,
)
from etflayers.testing import means_with_condition, relative_error, svd_frame

FORWARD, IMPLICIT, UNROLLED = "forward", "+ Implicit", "+ Unrolled"
ADJOINTS: dict[str, Adjoint] = {FORWARD: Detached(), IMPLICIT: Implicit(), UNROLLED: Unrolled()}
ANY_SIZE, ITERATIVE_SIZE, CONVEX_SIZE = math.inf, 6_000, 200  # in d x K
# The solver, the largest problem that it is made to solve and whether its operations can be differentiated.
SOLVERS: dict[str, tuple[FrameSolver, float, bool]] = {
    "ByRegime": (ByRegime(), ANY_SIZE, True),
    "GramEigh": (GramEigh(), ANY_SIZE, True),
    "SVD": (SVD(), ANY_SIZE, True),
    "QRSVD": (QRSVD(), ANY_SIZE, True),
    "NewtonSchulz": (NewtonSchulz(), ANY_SIZE, True),
    "RiemannianNewton": (Iterative(solver=RiemannianNewton()), ITERATIVE_SIZE, False),
    "RiemannianDescent (geoopt)": (
        Iterative(solver=RiemannianDescent(learning_rate=0.5)),
        ITERATIVE_SIZE,
        False,
    ),
    "TrustRegions (pymanopt)": (Iterative(solver=TrustRegions()), ITERATIVE_SIZE, False),
    "ConvexHull (cvxpylayers)": (ConvexHull(), CONVEX_SIZE, True),
}
PEERS: dict[str, Callable[[Tensor], Tensor]] = {
    "differentiated SVD": svd_frame,
    "the same, transposed": tall_svd_frame,
}
SCIPY = "scipy.linalg.polar"


class Case(NamedTuple):
    """A problem; its rivals are compared with each other and with nobody else."""

    in_features: int
    num_classes: int
    dtype: torch.dtype
    kappa: float

    def __str__(self) -> str:
        precision = str(self.dtype).removeprefix("torch.")
        return f"({self.in_features}, {self.num_classes}), {precision}, kappa {self.kappa:g}"

    def means(self) -> Tensor:
        return means_with_condition(
            self.num_classes,
            self.in_features,
            self.kappa,
            generator=torch.Generator().manual_seed(0),
            dtype=self.dtype,
        )


CASES = (
    Case(16, 10, torch.float32, 3.0),
    Case(16, 10, torch.float64, 3.0),
    Case(512, 10, torch.float32, 3.0),
    Case(512, 100, torch.float32, 3.0),
    Case(512, 100, torch.float64, 3.0),
    Case(2048, 100, torch.float64, 1e3),
    Case(512, 200, torch.float32, 1.05),
)
QUICK_CASES = (Case(8, 5, torch.float64, 3.0),)
# In float32 a gradient of PyTorch's SVD divides by gaps between singular values; the limits tell wrong from
# rounded, `accuracy` measures the rest.
FRAME_LIMITS = {torch.float32: 1e-5, torch.float64: 1e-6}
GRADIENT_LIMITS = {torch.float32: 1e-2, torch.float64: 1e-6}
DIFFERENCES_LIMIT = 1e-4


def scipy_frame(means: Tensor) -> Tensor:
    factor, _ = linalg.polar(centered_basis_apply(means).numpy())
    return etf_radius(len(means)) * centered_basis_adjoint(torch.from_numpy(np.ascontiguousarray(factor)))


def differences_error(gradient: Tensor, means: Tensor) -> float:
    """How far the oracle's derivative along its gradient is from central differences of SciPy's frame."""
    generator = torch.Generator().manual_seed(1)
    cotangent = torch.randn(means.shape, generator=generator, dtype=torch.float64)
    direction = gradient / gradient.norm()
    step = 1e-7
    change = scipy_frame(means + step * direction) - scipy_frame(means - step * direction)
    return abs(float((cotangent * change).sum()) / (2 * step) / float(gradient.norm()) - 1)


def rivals(case: Case) -> Iterator[tuple[str, str, Callable[[], FrameAndGradient]]]:
    """Solver, adjoint and the call to time; a call without a gradient answers with NaN in its place."""
    means = case.means()
    for name, (solver, largest, records) in SOLVERS.items():
        if means.numel() > largest:
            continue
        for kind, adjoint in ADJOINTS.items():
            if kind == UNROLLED and not records:
                continue
            frame_of = partial(nearest_etf, solver=solver, adjoint=adjoint)
            yield name, kind, (_forward if kind == FORWARD else forward_backward)(frame_of, means)
    for name, frame_of in PEERS.items():
        yield name, FORWARD, _forward(frame_of, means)
        yield name, UNROLLED, forward_backward(frame_of, means)
    yield SCIPY, FORWARD, _forward(scipy_frame, means)


def _forward(frame_of: Callable[[Tensor], Tensor], means: Tensor) -> Callable[[], FrameAndGradient]:
    return lambda: (frame_of(means), torch.full_like(means, torch.nan))


class Oracle(NamedTuple):
    """SciPy's frame and the gradient of a differentiated SVD, both in float64."""

    frame: Tensor
    gradient: Tensor

    @classmethod
    def of(cls, case: Case) -> Oracle:
        means = case.means().double()
        return cls(scipy_frame(means), forward_backward(svd_frame, means)()[1])

    def check(self, case: Case) -> Check:
        error = differences_error(self.gradient, case.means().double())
        return Check(f"{case} oracle: gradient against finite differences", error, DIFFERENCES_LIMIT)

    def checks(self, case: Case, name: str, kind: str, call: Callable[[], FrameAndGradient]) -> list[Check]:
        frame, gradient = call()
        title = f"{case} {name}, {kind}"
        found = [Check(f"{title}: frame", relative_error(frame, self.frame), FRAME_LIMITS[case.dtype])]
        if kind != FORWARD:
            error = relative_error(gradient, self.gradient)
            found.append(Check(f"{title}: gradient", error, GRADIENT_LIMITS[case.dtype]))
        return found


@pytest.mark.bench
@cases("case", full=CASES, quick=QUICK_CASES, ids=str)
def test_solvers(findings: Findings, case: Case) -> None:
    oracle = Oracle.of(case)
    findings.require(oracle.check(case))
    calls, errors = {}, {}
    for name, kind, call in rivals(case):
        found = oracle.checks(case, name, kind, call)
        findings.require(*found)
        errors[name, kind] = found[-1].error
        calls[f"{name}, {kind}"] = call
    times = medians(findings.measure(str(case), calls, seconds=10.0, min_rounds=3))

    def cells(name: str, kind: str) -> list[str]:
        if (name, kind) not in errors:
            return ["", ""]
        return [milliseconds(times[f"{name}, {kind}"]), f"{errors[name, kind]:.0e}"]

    for name in dict.fromkeys(name for name, _ in errors):
        findings.row(
            f"Solvers and adjoints, (d, K) = {case} (milliseconds)",
            ["solver", *(column for kind in ADJOINTS for column in (kind, "error"))],
            [name, *(cell for kind in ADJOINTS for cell in cells(name, kind))],
            "Errors against float64: of the frame (forward), of the gradient (with an adjoint). A time with "
            "an adjoint is that of forward and backward.",
        )
