import math
import sys

import pytest
import torch

from etflayers.errors import MissingDependencyError
from etflayers.geometry import is_stiefel, project_stiefel, random_stiefel
from etflayers.solvers import (
    RiemannianDescent,
    RiemannianNewton,
    TrustRegions,
    extreme_curvatures,
)
from etflayers.solvers.stiefel import local_model
from etflayers.status import Status

pytestmark = pytest.mark.usefixtures("one_thread")


SOLVERS = [RiemannianNewton(), RiemannianDescent(learning_rate=0.08), TrustRegions()]
by_name = {"ids": lambda solver: type(solver).__name__}


def spectrum(dim):
    """A symmetric matrix with the eigenvalues 1, 2, ..., d."""
    basis = random_stiefel(dim, dim, dtype=torch.float64)
    return (basis * torch.arange(1.0, dim + 1, dtype=torch.float64)) @ basis.mT


def brockett(matrix, num_frames):
    """tr(Q'AQN): its minimizer holds the eigenvectors of the smallest eigenvalues, in order, up to signs."""
    weights = torch.arange(num_frames, 0, -1, dtype=matrix.dtype)
    return lambda q: ((matrix @ q) * q * weights).sum((-2, -1))


@pytest.mark.parametrize("solver", SOLVERS, **by_name)
def test_finds_the_eigenvectors_of_a_batch(solver):
    matrix = spectrum(5)
    start = random_stiefel(5, 2, batch=(2,), dtype=torch.float64)
    solution = solver.minimize(brockett(matrix, 2), start)
    assert solution.codes.tolist() == [Status.CONVERGED] * 2
    assert is_stiefel(solution.point).ok
    assert float(solution.gradient_norm.max()) <= 1e-8
    expected = torch.linalg.eigh(matrix).eigenvectors[:, :2]
    overlap = (expected.mT @ solution.point).abs()
    torch.testing.assert_close(overlap, torch.eye(2, dtype=torch.float64).expand(2, 2, 2), atol=1e-7, rtol=0)
    # eigenvalues 1 and 2 with the weights 2 and 1
    torch.testing.assert_close(solution.value, torch.full((2,), 4.0, dtype=torch.float64))


@pytest.mark.parametrize("solver", SOLVERS, **by_name)
def test_float32_and_a_batch_of_one(solver):
    target = torch.randn(1, 6, 2)
    solution = solver.minimize(
        lambda q: (q - target).square().sum((-2, -1)), random_stiefel(6, 2, batch=(1,))
    )
    assert solution.point.dtype == torch.float32
    assert solution.codes.tolist() == [Status.CONVERGED]
    torch.testing.assert_close(solution.point, project_stiefel(target), atol=1e-4, rtol=0)


@pytest.mark.parametrize(
    "solver",
    [RiemannianNewton(max_iterations=1), RiemannianDescent(max_iterations=1), TrustRegions(max_iterations=1)],
    **by_name,
)
def test_out_of_iterations_is_reported(solver):
    start = random_stiefel(5, 2, batch=(2,), dtype=torch.float64)
    assert solver.minimize(brockett(spectrum(5), 2), start).codes.tolist() == [Status.NOT_CONVERGED] * 2


@pytest.mark.parametrize("solver", [RiemannianNewton(), RiemannianDescent(learning_rate=0.08)], **by_name)
def test_a_member_that_is_not_finite_leaves_the_others_alone(solver):
    poison = torch.tensor([1.0, math.nan], dtype=torch.float64)
    value = brockett(spectrum(5), 2)
    start = random_stiefel(5, 2, batch=(2,), dtype=torch.float64)
    solution = solver.minimize(lambda q: poison * value(q), start)
    assert solution.codes.tolist() == [Status.CONVERGED, Status.NON_FINITE]


@pytest.mark.parametrize("solver", SOLVERS, **by_name)
def test_the_warm_start_is_used(solver):
    start = random_stiefel(5, 2, batch=(1,), dtype=torch.float64)
    value = brockett(spectrum(5), 2)
    cold = solver.minimize(value, start)
    assert solver.minimize(value, cold.point).iterations < cold.iterations


def test_newton_passes_a_saddle():
    matrix = spectrum(4)
    eigenvectors = torch.linalg.eigh(matrix).eigenvectors
    near_saddle = project_stiefel(eigenvectors[:, 1:2] + 1e-6 * torch.randn(4, 1, dtype=torch.float64))[None]
    assert float(RiemannianNewton().minimize(brockett(matrix, 1), near_saddle).value) == pytest.approx(1.0)


def test_newton_has_the_members_of_a_batch_solved_independently():
    matrix = spectrum(5)
    start = random_stiefel(5, 2, batch=(4,), dtype=torch.float64)
    together = RiemannianNewton().minimize(brockett(matrix, 2), start).point
    alone = torch.cat([RiemannianNewton().minimize(brockett(matrix, 2), one[None]).point for one in start])
    torch.testing.assert_close(together, alone, atol=1e-7, rtol=0)


def test_the_hessian_is_the_second_derivative_along_a_geodesic():
    matrix, point = spectrum(5), random_stiefel(5, 2, dtype=torch.float64)
    value = brockett(matrix, 2)
    # exp(tS) Q is a geodesic of the embedded metric when the velocity SQ is orthogonal to Q.
    complement = torch.eye(5, dtype=torch.float64) - point @ point.mT
    velocity = complement @ torch.randn(5, 2, dtype=torch.float64)
    generator = velocity @ point.mT - point @ velocity.mT

    def along(t):
        return value((torch.linalg.matrix_exp(t * generator) @ point)[None])[0]

    t = torch.zeros((), dtype=torch.float64)
    expected = torch.func.grad(torch.func.grad(along))(t)
    hessian = local_model(value, point[None]).hessian(velocity[None])[0]
    assert float((velocity * hessian).sum()) == pytest.approx(float(expected), rel=1e-9)


def test_extreme_curvatures_are_the_eigenvalues_of_the_dense_hessian():
    matrix = spectrum(5)
    point = (
        RiemannianNewton()
        .minimize(brockett(matrix, 1), random_stiefel(5, 1, batch=(1,), dtype=torch.float64))
        .point
    )
    smallest, largest = extreme_curvatures(local_model(brockett(matrix, 1), point).hessian, point)
    # 2 (lambda_i - lambda_1) for a Rayleigh quotient
    assert float(smallest) == pytest.approx(2.0, abs=1e-7)
    assert float(largest) == pytest.approx(8.0, abs=1e-7)


@pytest.mark.parametrize(
    ("solver", "module"), [(RiemannianDescent(), "geoopt"), (TrustRegions(), "pymanopt")]
)
def test_a_missing_package_is_named_with_its_extra(solver, module, monkeypatch):
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(MissingDependencyError, match=rf"{module}.*etflayers\[solvers\]"):
        solver.minimize(brockett(spectrum(3), 1), random_stiefel(3, 1, batch=(1,), dtype=torch.float64))
