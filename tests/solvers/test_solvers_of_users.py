"""Solvers as a user writes them, with public names alone; and what is told apart from a solver."""

import pytest
import torch

from etflayers import nearest_etf, simplex_etf
from etflayers.adjoints import Detached, Implicit, Unrolled
from etflayers.errors import ConvergenceError, InvalidArgumentError
from etflayers.functional import stiefel_argmin
from etflayers.geometry import project_stiefel, project_tangent, random_stiefel
from etflayers.solvers import (
    SVD,
    ByRegime,
    FrameSolver,
    GramEigh,
    GramRoot,
    Iterative,
    NewtonSchulz,
    RiemannianNewton,
    StiefelSolution,
    StiefelSolver,
    spectral_state,
    state_of,
)
from etflayers.status import Status
from etflayers.testing import means_with_condition, relative_error


class PlainDescent:
    """Projected gradient steps of one length: a Stiefel solver that inherits from nothing."""

    def __init__(self, steps=400, length=0.5):
        self.steps, self.length = steps, length

    def minimize(self, objective, start):
        point = start
        for step in range(self.steps + 1):
            point = point.detach().requires_grad_()
            value = objective(point)
            (euclidean,) = torch.autograd.grad(value.sum(), point)
            gradient = project_tangent(point.detach(), euclidean)
            if step < self.steps:
                point = project_stiefel(point.detach() - self.length * gradient)
        size = gradient.norm(dim=(-2, -1))
        codes = torch.where(size < 1e-7, int(Status.CONVERGED), int(Status.NOT_CONVERGED))
        return StiefelSolution(point.detach(), value.detach(), size, self.steps, codes)


class ByScipy:
    """scipy.linalg.polar: a frame solver that inherits from nothing."""

    def solve(self, linear, precision=None):
        linalg = pytest.importorskip("scipy.linalg")
        centered = (linear - linear.mean(-2, keepdim=True)).detach()
        _, root = linalg.polar(centered.numpy(), side="left")
        values, basis = torch.linalg.eigh(torch.from_numpy(root))
        radius = (len(linear) / (len(linear) - 1)) ** 0.5
        values, basis = radius * values[1:], basis[:, 1:]
        frame = basis @ torch.diag(radius**2 / values) @ basis.T @ centered
        return spectral_state(frame, basis, values, precision or linear.dtype)


class FrameAlone:
    """A solver that finds the frame and knows nothing else of it."""

    def solve(self, linear, precision=None):
        return state_of(SVD().solve(linear).frame, linear)


@pytest.mark.parametrize("solver", [PlainDescent(), ByScipy(), FrameAlone()], ids=lambda s: type(s).__name__)
def test_serves_the_nearest_frame_and_its_gradient(solver):
    means = means_with_condition(5, 8, 3.0).requires_grad_()
    cotangent = torch.randn(5, 8, dtype=torch.float64)
    frame, exact = nearest_etf(means, solver=solver), nearest_etf(means, solver=SVD())
    assert relative_error(frame, exact) < 1e-6
    (mine,), (theirs,) = (torch.autograd.grad(f, means, cotangent) for f in (frame, exact))
    assert relative_error(mine, theirs) < 1e-5
    assert not nearest_etf(means, solver=solver, adjoint=Detached()).requires_grad


def test_stopping_early_is_an_error_there_too():
    with pytest.raises(ConvergenceError, match="ended after 1 iterations"):
        nearest_etf(means_with_condition(5, 8, 3.0), solver=PlainDescent(steps=1))


def test_serves_a_general_objective():
    target = torch.randn(2, 4, 2, dtype=torch.float64, requires_grad=True)

    def negative_inner(q, target):
        return -(q * target).sum((-2, -1))

    mine, theirs = (
        stiefel_argmin(negative_inner, target, start=project_stiefel(target.detach()), solver=solver)
        for solver in (PlainDescent(steps=2000, length=0.3), None)
    )
    torch.testing.assert_close(mine, theirs, atol=1e-7, rtol=0)
    (a,), (b,) = (torch.autograd.grad(point.sin().sum(), target) for point in (mine, theirs))
    torch.testing.assert_close(a, b, atol=1e-6, rtol=0)


def test_the_two_kinds_do_not_overlap():
    for solver in (SVD(), ByRegime(), GramEigh(), GramRoot(), NewtonSchulz(), Iterative(), ByScipy()):
        assert isinstance(solver, FrameSolver)
        assert not isinstance(solver, StiefelSolver)
    for solver in (RiemannianNewton(), PlainDescent()):
        assert isinstance(solver, StiefelSolver)
        assert not isinstance(solver, FrameSolver)


@pytest.mark.parametrize(
    ("wrong", "received"),
    [("svd", "'svd'"), (SVD, "the class SVD"), (RiemannianNewton, "the class RiemannianNewton"), (3, "3")],
)
def test_what_is_no_solver_is_refused_at_once(wrong, received):
    remedy = rf"got {received}: pass an instance such as .*RiemannianNewton\(\), or None"
    with pytest.raises(InvalidArgumentError, match="solver must be a FrameSolver.*" + remedy):
        nearest_etf(torch.randn(4, 6), solver=wrong)
    start = random_stiefel(4, 2, batch=(1,))
    with pytest.raises(InvalidArgumentError, match="solver must be a StiefelSolver.*" + remedy):
        stiefel_argmin(lambda q: q.sum((-2, -1)), start=start, solver=wrong)


def test_a_frame_solver_minimizes_no_objective():
    start = random_stiefel(4, 2, batch=(1,))
    with pytest.raises(InvalidArgumentError, match=r"must be a StiefelSolver.*got SVD\(\)"):
        stiefel_argmin(lambda q: q.sum((-2, -1)), start=start, solver=SVD())


@pytest.mark.parametrize(
    ("wrong", "received"), [("implicit", "'implicit'"), (Implicit, "the class Implicit")]
)
def test_what_is_no_adjoint_is_refused_at_once(wrong, received):
    with pytest.raises(InvalidArgumentError, match=rf"adjoint must have a method attach.*got {received}"):
        nearest_etf(torch.randn(4, 6), adjoint=wrong)
    with pytest.raises(InvalidArgumentError, match="adjoint must have a method attach"):
        stiefel_argmin(lambda q: q.sum((-2, -1)), start=random_stiefel(4, 2, batch=(1,)), adjoint=wrong)


def test_an_adjoint_of_ones_own():
    class StraightThrough:
        """The value of the frame and the gradient of its linear form."""

        def attach(self, problem):
            return problem.detached() + problem.linear - problem.linear.detach()

    means = torch.randn(4, 6, dtype=torch.float64, requires_grad=True)
    cotangent = torch.randn(4, 6, dtype=torch.float64)
    frame = nearest_etf(means, adjoint=StraightThrough())
    torch.testing.assert_close(frame, nearest_etf(means))
    assert torch.equal(torch.autograd.grad(frame, means, cotangent)[0], cotangent)


def test_unrolling_a_solver_that_records_nothing_is_an_error_in_forward_mode_too():
    means = simplex_etf(3, 4, dtype=torch.float64) + 0.1
    with pytest.raises(InvalidArgumentError, match="GramRoot records no operations"):
        torch.func.jvp(lambda x: nearest_etf(x, solver=GramRoot(), adjoint=Unrolled()), (means,), (means,))
