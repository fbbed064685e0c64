"""The general Stiefel node: its solvers side by side, what going back costs, and how its memory grows."""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from functools import partial

import pytest
import torch
from torch import Tensor

from benchmarks.findings import Findings, cases
from benchmarks.processes import in_a_process, peak_mb
from benchmarks.report import Check, milliseconds
from benchmarks.timing import median_ratio, medians
from etflayers.functional import stiefel_argmin
from etflayers.geometry import centered_basis_apply, random_stiefel
from etflayers.solvers import RiemannianDescent, RiemannianNewton, StiefelSolver, TrustRegions
from etflayers.testing import relative_error

SHAPES, QUICK_SHAPES = ((64, 10), (512, 10)), ((16, 5),)
MEMORY_CLASSES, QUICK_MEMORY_CLASSES, MEMORY_DIM = (25, 50, 100, 200), (5, 10), 512
BACKWARD_BOUND, MEMORY_BOUND = 3.0, 1.5
POINT_LIMIT, GRADIENT_LIMIT, NORM_LIMIT = 1e-6, 1e-5, 1e-8
DRIFT = 0.01

OURS = "RiemannianNewton"
RATE = "RiemannianDescent (geoopt)"
PEER = "TrustRegions (pymanopt)"


def solver_of(name: str) -> StiefelSolver:
    if name == OURS:
        return RiemannianNewton()
    return TrustRegions() if name == PEER else RiemannianDescent(learning_rate=0.15)


def objective(q: Tensor, coordinates: Tensor, scales: Tensor) -> Tensor:
    """Squared distance of Q to the means' coordinates in a diagonal metric: quadratic on the manifold."""
    return (scales * (coordinates.mT - q)).square().sum((-2, -1))


def problem(shape: tuple[int, int]) -> tuple[Tensor, Tensor, Tensor]:
    """Coordinates of unit-scale class means (1, K-1, d), a metric (d, 1) and a start, in float64."""
    d, k = shape
    generator = torch.Generator().manual_seed(0)
    means = torch.randn(1, k, d, generator=generator, dtype=torch.float64) / d**0.5
    scales = torch.linspace(0.7, 1.3, d, dtype=torch.float64)[:, None]
    start = random_stiefel(d, k - 1, batch=(1,), generator=generator, dtype=torch.float64)
    return centered_basis_apply(means), scales, start


def drifted(coordinates: Tensor) -> Tensor:
    """The coordinates one training step later."""
    generator = torch.Generator().manual_seed(1)
    noise = torch.randn(coordinates.shape, generator=generator, dtype=torch.float64)
    return coordinates + DRIFT * noise * coordinates.norm() / noise.norm()


def gradient_error(shape: tuple[int, int]) -> float:
    """Directional derivative of the node against a central difference."""
    coordinates, scales, start = problem(shape)
    solve = partial(stiefel_argmin, objective, start=start, solver=RiemannianNewton(tolerance=1e-13))
    generator = torch.Generator().manual_seed(2)
    direction, cotangent = (
        torch.randn(s, generator=generator, dtype=torch.float64) for s in (coordinates.shape, start.shape)
    )
    direction, x = direction / direction.norm(), coordinates.clone().requires_grad_()
    (grad,) = torch.autograd.grad((solve(x, scales) * cotangent).sum(), x)
    step = 1e-5
    ahead, behind = (solve(coordinates + s * direction, scales) for s in (step, -step))
    expected = float(((ahead - behind) * cotangent).sum()) / (2 * step)
    return abs(float((grad * direction).sum()) - expected) / float(grad.norm())


def memory_here(shape: tuple[int, int]) -> float:
    """Megabytes that a forward and backward pass adds at its peak to a process that has run a small one."""
    torch.set_num_threads(1)

    def both(shape: tuple[int, int]) -> None:
        coordinates, scales, start = problem(shape)
        stiefel_argmin(objective, coordinates.requires_grad_(), scales, start=start).sum().backward()

    both((8, 4))
    before = peak_mb()
    both(shape)
    return peak_mb() - before


def memory(shape: tuple[int, int]) -> float:
    return float(in_a_process("benchmarks.bench_stiefel", *shape))


@pytest.mark.bench
@cases("shape", full=SHAPES, quick=QUICK_SHAPES)
def test_solvers(findings: Findings, shape: tuple[int, int]) -> None:
    coordinates, scales, start = problem(shape)
    here = partial(objective, coordinates=coordinates, scales=scales)
    best = RiemannianNewton(tolerance=1e-14).minimize(here, start)
    calls: dict[str, Callable[[], object]] = {}
    notes = {}
    for name in (OURS, RATE, PEER):
        calls[name] = partial(solver_of(name).minimize, here, start)
        found = solver_of(name).minimize(here, start)
        size = float(found.gradient_norm)
        notes[name] = [str(found.iterations), f"{size:.0e}"]
        findings.require(
            Check(f"{shape} {name}: point", relative_error(found.point, best.point), POINT_LIMIT),
            Check(f"{shape} {name}: gradient norm", size, NORM_LIMIT),
        )
    samples = findings.measure(f"{shape} forward", calls, seconds=10.0, min_rounds=3)
    for name, time in medians(samples).items():
        findings.row(
            "Forward pass of the general node by its solvers, cold start, float64",
            ["(d, K)", "solver", "ms", "times ours", "iterations", "gradient norm"],
            [str(shape), name, milliseconds(time), f"{median_ratio(samples, name, OURS):.1f}", *notes[name]],
            "Every solver stops by its default tolerance.",
        )


@pytest.mark.bench
@cases("shape", full=SHAPES, quick=QUICK_SHAPES)
def test_backward(findings: Findings, shape: tuple[int, int]) -> None:
    findings.require(Check(f"{shape}: gradient", gradient_error(shape), GRADIENT_LIMIT))
    coordinates, scales, start = problem(shape)
    warm = stiefel_argmin(objective, drifted(coordinates), scales, start=start)
    x = coordinates.requires_grad_()
    forward = partial(stiefel_argmin, objective, x, scales, start=warm)
    point = forward()
    cotangent = torch.randn(point.shape, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    calls = {
        "forward": forward,
        "backward": partial(torch.autograd.grad, point, x, cotangent, retain_graph=True),
    }
    samples = findings.measure(f"{shape} backward", calls, seconds=10.0)
    ratio, times = median_ratio(samples, "backward", "forward"), medians(samples)
    findings.row(
        "Forward and backward pass of the general node, float64",
        ["(d, K)", "forward, warm (ms)", "backward (ms)", "backward / forward"],
        [str(shape), milliseconds(times["forward"]), milliseconds(times["backward"]), f"{ratio:.2f}"],
        f"Warm start: the minimizer for class means that were {DRIFT:.0%} different.",
    )
    what = f"{shape}: backward over warm forward of the node"
    findings.claim(what, ratio, "at most", BACKWARD_BOUND, "x")


@pytest.mark.bench
@cases("classes", full=[MEMORY_CLASSES], quick=[QUICK_MEMORY_CLASSES])
def test_memory(findings: Findings, classes: tuple[int, ...]) -> None:
    found = findings.once(lambda: {k: memory((MEMORY_DIM, k)) for k in classes})
    matrices = {k: extra * 1024**2 / (8 * MEMORY_DIM * (k - 1)) for k, extra in found.items()}
    findings.keep("memory, MB", {f"K = {k}": [extra] for k, extra in found.items()})
    for k, extra in found.items():
        dense = 8 * (MEMORY_DIM * (k - 1)) ** 2 / 1024**2
        findings.row(
            f"Peak memory of forward + backward of the general node, d = {MEMORY_DIM}, float64",
            ["K", "MB", "in d x (K-1) matrices", "a dense Hessian would take (MB)"],
            [str(k), f"{extra:.1f}", f"{matrices[k]:.0f}", f"{dense:.0f}"],
            "A fresh process each.",
        )
    before, last = classes[-2:]
    what = f"memory per d x n matrix, K = {last} over K = {before}"
    findings.claim(what, matrices[last] / matrices[before], "at most", MEMORY_BOUND, "x")


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("shape", type=int, nargs=2)
    print(json.dumps(memory_here(tuple(parser.parse_args().shape))))
