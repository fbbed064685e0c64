"""Every general solver with every adjoint; the derivative of a minimizer where there is no closed form."""

import pytest
import torch
from torch.autograd import gradcheck, gradgradcheck

from etflayers.adjoints import Detached, Implicit, Unrolled
from etflayers.functional import huber_nearest_etf, mahalanobis_nearest_etf, solve_stiefel, stiefel_argmin
from etflayers.geometry import random_stiefel
from etflayers.linalg import ConjugateGradients
from etflayers.solvers import RiemannianDescent, RiemannianNewton, TrustRegions
from etflayers.status import SolveWarning, Status
from etflayers.testing import relative_error

pytestmark = pytest.mark.usefixtures("one_thread")


SOLVERS = [RiemannianNewton(), RiemannianDescent(), TrustRegions()]
ADJOINTS = [Implicit(), Unrolled(), Detached()]
name_of = {"ids": lambda argument: type(argument).__name__}


def weighted_distance(q, target, weights):
    """|diag(sqrt(w)) (Q - T)|^2, quadratic on the manifold unless all weights agree."""
    return (weights[..., None] * (q - target).square()).sum((-2, -1))


def problem(batch=2, dim=4, num_frames=2):
    target = random_stiefel(dim, num_frames, batch=(batch,), dtype=torch.float64)
    target = (target + 0.3 * torch.randn_like(target)).requires_grad_()
    weights = torch.linspace(0.5, 1.5, dim, dtype=torch.float64).requires_grad_()
    start = random_stiefel(dim, num_frames, batch=(batch,), dtype=torch.float64)
    return (target, weights), start


def finite_difference(function, inputs, directions, step=1e-5):
    plus = function(*(x + step * v for x, v in zip(inputs, directions, strict=True)))
    minus = function(*(x - step * v for x, v in zip(inputs, directions, strict=True)))
    return float((plus - minus) / (2 * step))


@pytest.mark.parametrize("adjoint", ADJOINTS, **name_of)
@pytest.mark.parametrize("solver", SOLVERS, **name_of)
def test_every_solver_with_every_adjoint(solver, adjoint):
    inputs, start = problem()
    exact = stiefel_argmin(weighted_distance, *inputs, start=start, solver=RiemannianNewton(tolerance=1e-14))
    point = stiefel_argmin(
        weighted_distance, *inputs, start=start, solver=solver, adjoint=adjoint, unrolled_steps=200
    )
    assert relative_error(point, exact) < 1e-6
    if isinstance(adjoint, Detached):
        assert not point.requires_grad
        return
    cotangent = torch.randn_like(point)
    grads = torch.autograd.grad((point * cotangent).sum(), inputs)
    directions = [torch.randn_like(x) for x in inputs]

    @torch.no_grad()
    def scalar(*inputs):
        solved = stiefel_argmin(weighted_distance, *inputs, start=exact, solver=RiemannianNewton(1e-14))
        return (solved * cotangent).sum()

    expected = finite_difference(scalar, inputs, directions)
    found = sum(float((g * v).sum()) for g, v in zip(grads, directions, strict=True))
    assert found == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("adjoint", [Implicit(), Unrolled()], **name_of)
def test_first_and_second_derivative(adjoint):
    inputs, start = problem(batch=1, dim=3)
    start = stiefel_argmin(weighted_distance, *inputs, start=start).detach()

    def solve(*inputs):
        return stiefel_argmin(weighted_distance, *inputs, start=start, adjoint=adjoint)

    assert gradcheck(solve, inputs)
    assert gradgradcheck(solve, inputs, fast_mode=isinstance(adjoint, Unrolled))


def test_linear_objective_to_second_order():
    """The polar factor, whose derivatives the closed form also has."""
    target = torch.randn(1, 4, 2, dtype=torch.float64, requires_grad=True)
    start = random_stiefel(4, 2, batch=(1,), dtype=torch.float64)

    def solve(target):
        return stiefel_argmin(lambda q, x: -(q * x).sum((-2, -1)), target, start=start)

    assert gradcheck(solve, target)
    assert gradgradcheck(solve, target)


def test_third_derivative():
    inputs, start = problem(batch=1, dim=3, num_frames=1)
    target, weights = inputs
    start = stiefel_argmin(weighted_distance, *inputs, start=start).detach()

    def first(target):
        point = stiefel_argmin(weighted_distance, target, weights.detach(), start=start)
        (grad,) = torch.autograd.grad(point.sin().sum(), target, create_graph=True)
        return grad

    assert gradgradcheck(first, target, fast_mode=True)


def test_mahalanobis_derivatives():
    means = torch.randn(3, 3, dtype=torch.float64, requires_grad=True)
    factor = (
        torch.eye(3, dtype=torch.float64) + 0.3 * torch.randn(3, 3, dtype=torch.float64)
    ).requires_grad_()
    assert gradcheck(mahalanobis_nearest_etf, (means, factor))
    assert gradgradcheck(mahalanobis_nearest_etf, (means, factor), fast_mode=True)


def test_huber_derivatives():
    means = torch.randn(3, 3, dtype=torch.float64, requires_grad=True)
    threshold = torch.tensor(0.3, dtype=torch.float64, requires_grad=True)

    def solve(means, threshold):
        return huber_nearest_etf(means, threshold=threshold)

    # By random directions: every evaluation is a solve.
    assert gradcheck(solve, (means, threshold), fast_mode=True)
    assert gradgradcheck(solve, (means, threshold), fast_mode=True)


def test_the_residual_of_the_backward_solve_is_reported():
    inputs, start = problem()
    found = solve_stiefel(weighted_distance, *inputs, start=start)
    assert found.linear_solve.residual is None
    found.point.sum().backward()
    assert float(found.linear_solve.residual.max()) < 1e-11
    assert found.linear_solve.iterations > 0
    assert found.linear_solve.codes.tolist() == [Status.CONVERGED] * 2


def test_too_few_iterations_of_the_backward_solve_warn():
    inputs, start = problem()
    once = ConjugateGradients(max_iterations=1)
    point = stiefel_argmin(weighted_distance, *inputs, start=start, linear_solver=once)
    with pytest.warns(SolveWarning, match="max_iterations"):
        point.sum().backward()


def rayleigh_quotient(q, matrix):
    return (q * (matrix @ q)).sum((-2, -1))


def test_the_gradient_at_a_saddle_warns():
    matrix = torch.diag(torch.tensor([1.0, 2.0, 2.5], dtype=torch.float64)).requires_grad_()
    saddle = torch.eye(3, dtype=torch.float64)[None, :, 1:2]
    found = solve_stiefel(rayleigh_quotient, matrix, start=saddle)
    assert found.status is Status.SADDLE
    with pytest.warns(SolveWarning, match="saddle"):
        found.point.sum().backward()
    assert found.linear_solve.codes.tolist() == [Status.SADDLE]


def test_a_singular_hessian_warns_unless_the_gradient_exists():
    # tr(Q'AQ) depends on the span of Q alone: every rotation of its columns is as good.
    matrix = torch.diag(torch.tensor([1.0, 2.0, 5.0, 6.0], dtype=torch.float64)).requires_grad_()
    start = random_stiefel(4, 2, batch=(1,), dtype=torch.float64)
    found = solve_stiefel(rayleigh_quotient, matrix, start=start)
    assert found.status is Status.DEGENERATE
    direction = torch.randn(4, 4, dtype=torch.float64)
    with pytest.warns(SolveWarning, match="singular"):
        torch.autograd.grad((found.point @ direction[:2, :2]).sum(), matrix, retain_graph=True)

    # What does not depend on the rotation has a derivative: that of the projector onto the span.
    def projector(matrix):
        q = stiefel_argmin(rayleigh_quotient, (matrix + matrix.mT) / 2, start=start)
        return (q @ q.mT * direction).sum()

    def reference(matrix):
        q = torch.linalg.eigh((matrix + matrix.mT) / 2).eigenvectors[:, :2]
        return (q @ q.mT * direction).sum()

    (grad,) = torch.autograd.grad(projector(matrix), matrix)
    (expected,) = torch.autograd.grad(reference(matrix), matrix)
    assert relative_error(grad, expected) < 1e-8


def test_unneeded_gradients_are_not_computed():
    (target, weights), start = problem()
    point = stiefel_argmin(weighted_distance, target.detach(), weights, start=start)
    point.sum().backward()
    assert target.grad is None
    assert weights.grad.isfinite().all()
