"""The suites of solvers: of the nearest frame, and of any objective on the Stiefel manifold.

M <-> means, W <-> frame, Q <-> point, f <-> objective.
"""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor

from etflayers.adjoints import Implicit
from etflayers.errors import NonFiniteError
from etflayers.functional import nearest_etf, stiefel_argmin
from etflayers.geometry import is_simplex_etf, is_stiefel, project_stiefel, random_stiefel
from etflayers.solvers import FrameSolver, StiefelSolver
from etflayers.status import Status
from etflayers.testing.oracles import means_with_condition, svd_frame
from etflayers.testing.suites.base import Function, Suite, assert_close, assert_refused

__all__ = ["FrameSolverSuite", "StiefelSolverSuite"]


class FrameSolverSuite(Suite):
    """Checks of a :class:`~etflayers.solvers.FrameSolver`; f is ``nearest_etf`` with it, x class means.

    Attributes:
        accuracy: how near the frame is to that of an SVD in float64, relatively.
    """

    accuracy: ClassVar[float] = 1e-7

    def make(self) -> FrameSolver | StiefelSolver:
        """The solver."""
        raise NotImplementedError

    def function(self, made: FrameSolver | StiefelSolver) -> Function:
        """The nearest frame, differentiated implicitly."""
        return lambda means: nearest_etf(means, solver=made, adjoint=Implicit())

    def point(self, dtype: torch.dtype = torch.float64, seed: int = 0) -> Tensor:
        """Means of four classes in six dimensions with condition number 3."""
        generator = torch.Generator().manual_seed(seed)
        return means_with_condition(4, 6, 3.0, generator=generator).to(dtype)

    def test_frame_is_the_nearest(self) -> None:
        """Equal to that of an SVD, with its gradient, for d > K, d = K and d = K - 1, and for two classes."""
        function = self.function(self.made())
        for size in ((4, 6), (5, 5), (5, 4), (2, 3)):
            means = means_with_condition(*size, 3.0, generator=torch.Generator().manual_seed(1))
            means.requires_grad_()
            frame, expected = function(means), svd_frame(means)
            assert_close(frame, expected, self.accuracy)
            cotangent = torch.randn(size, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
            (gradient,) = torch.autograd.grad(frame, means, cotangent)
            (exact,) = torch.autograd.grad(expected, means, cotangent)
            assert_close(gradient, exact, 10 * self.accuracy)

    def test_batch(self) -> None:
        """Members of a batch are problems of their own."""
        function = self.function(self.made())
        means = torch.stack([self.point(seed=seed) for seed in range(3)])
        assert_close(function(means), torch.stack([function(x) for x in means]), self.accuracy)

    def test_degenerate_input(self) -> None:
        """Coinciding means have an ETF, and a gradient that is finite."""
        function = self.function(self.made())
        coinciding = self.point()
        coinciding[1] = coinciding[0]
        for means in (torch.zeros(4, 6, dtype=torch.float64), coinciding):
            frame = function(means.requires_grad_())
            verdict = is_simplex_etf(frame, atol=self.accuracy)
            assert verdict.ok, verdict.reason
            (gradient,) = torch.autograd.grad(frame.sin().sum(), means)
            assert torch.isfinite(gradient).all(), "the gradient is not finite"

    def test_bad_input(self) -> None:
        """Means that are not finite are refused by name."""
        for value in (torch.nan, torch.inf):
            means = self.point()
            means[0, 0] = value
            assert_refused(lambda m=means: self.function(self.made())(m), NonFiniteError, "means")  # type: ignore[misc]


class StiefelSolverSuite(Suite):
    """Checks of a :class:`~etflayers.solvers.StiefelSolver`; f is ``stiefel_argmin`` with it on <Q, x>.

    Attributes:
        accuracy: how near the minimizer is to the exact one, absolutely.
    """

    unsupported: ClassVar = {
        "test_forward_mode": "the general Stiefel node has reverse mode only",
        "test_adjoint_identity": "the general Stiefel node has reverse mode only",
        "test_vmap": "the general Stiefel node has a batch dimension of its own",
        "test_compile": "torch.compile leaves an iteration that depends on values to eager mode",
    }
    accuracy: ClassVar[float] = 1e-6

    def make(self) -> StiefelSolver:
        """The solver."""
        raise NotImplementedError

    def function(self, made: StiefelSolver) -> Function:
        """The polar factor, which maximizes <Q, x>, from the polar factor of something else nearby."""
        start = project_stiefel(self.point() + 0.1 * self.point(seed=1))
        return lambda x: stiefel_argmin(_negative_inner, x, start=start.to(x.dtype), solver=made)

    def point(self, dtype: torch.dtype = torch.float64, seed: int = 0) -> Tensor:
        """Two matrices (4, 2)."""
        generator = torch.Generator().manual_seed(seed)
        return torch.randn(2, 4, 2, generator=generator, dtype=torch.float64).to(dtype)

    def test_finds_the_polar_factor(self) -> None:
        """Of a linear objective, in float64 by an SVD."""
        assert_close(self.function(self.made())(self.point()), project_stiefel(self.point()), self.accuracy)

    def test_finds_the_smallest_eigenvalues(self) -> None:
        """min tr(Q'AQN) for N = diag(2, 1) is the sum of the smallest eigenvalues, the least twice."""
        matrix = torch.diag(torch.arange(1.0, 6.0, dtype=torch.float64))
        weights = torch.tensor([2.0, 1.0], dtype=torch.float64)
        start = random_stiefel(
            5, 2, batch=(2,), dtype=torch.float64, generator=torch.Generator().manual_seed(3)
        )
        before = start.clone()
        found = self.made().minimize(lambda q: (q * (matrix @ q) * weights).sum((-2, -1)), start)
        assert torch.equal(start, before), "the solver wrote into its start"
        assert_close(found.value, torch.full((2,), 4.0), self.accuracy)
        verdict = is_stiefel(found.point)
        assert verdict.ok, verdict.reason
        assert (found.codes == Status.CONVERGED).all(), f"codes {found.codes.tolist()} of a minimizer"
        assert not found.point.requires_grad, "the minimizer carries a gradient"

    def test_degenerate_input(self) -> None:
        """Where every point is a minimizer the start is one."""
        start = project_stiefel(self.point())
        found = self.made().minimize(lambda q: (q * q).sum((-2, -1)), start)
        verdict = is_stiefel(found.point)
        assert verdict.ok, verdict.reason
        assert (found.codes == Status.CONVERGED).all(), f"codes {found.codes.tolist()} of a minimizer"

    def test_bad_input(self) -> None:
        """An objective that is not finite is not called solved."""
        start = project_stiefel(self.point())
        found = self.made().minimize(lambda q: q.sum((-2, -1)) * torch.nan, start)
        assert not (found.codes == Status.CONVERGED).any(), "NaN counts as converged"


def _negative_inner(point: Tensor, target: Tensor) -> Tensor:
    return -(point * target).sum((-2, -1))
