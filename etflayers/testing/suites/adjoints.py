"""The suite of adjoints: how a gradient flows through a minimizer."""

from __future__ import annotations

import torch
from torch import Tensor

from etflayers.adjoints import Adjoint
from etflayers.functional import nearest_etf, stiefel_argmin
from etflayers.geometry import project_stiefel
from etflayers.testing.oracles import means_with_condition, svd_frame
from etflayers.testing.suites.base import Function, Suite, assert_close, assert_gradients

__all__ = ["AdjointSuite"]


class AdjointSuite(Suite):
    """Checks of an :class:`~etflayers.adjoints.Adjoint`; f is ``nearest_etf`` with it, x class means."""

    def make(self) -> Adjoint:
        """The adjoint."""
        raise NotImplementedError

    def function(self, made: Adjoint) -> Function:
        """The nearest frame."""
        return lambda means: nearest_etf(means, adjoint=made)

    def point(self, dtype: torch.dtype = torch.float64, seed: int = 0) -> Tensor:
        """Means of four classes in six dimensions with condition number 3."""
        generator = torch.Generator().manual_seed(seed)
        return means_with_condition(4, 6, 3.0, generator=generator).to(dtype)

    def test_leaves_the_minimizer_alone(self) -> None:
        """The value is the minimizer, whatever the derivative."""
        assert_close(self.function(self.made())(self.point()), svd_frame(self.point()), self.rtol)

    def test_general_objective(self) -> None:
        """The gradient of a minimizer on the Stiefel manifold is that of finite differences."""
        target = torch.randn(1, 4, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
        start = project_stiefel(target)

        def minimizer(x: Tensor) -> Tensor:
            return stiefel_argmin(
                lambda q, x: (q - x).square().sum((-2, -1)), x, start=start, adjoint=self.made()
            )

        assert_close(minimizer(target), start, self.rtol)
        assert_gradients(torch.autograd.gradcheck, minimizer, target)

    def test_degenerate_input(self) -> None:
        """Coinciding means have a gradient that is finite."""
        for means in (torch.zeros(4, 6, dtype=torch.float64), torch.eye(4, 6, dtype=torch.float64)):
            frame = self.function(self.made())(means.requires_grad_())
            (gradient,) = torch.autograd.grad(frame.sin().sum(), means)
            assert torch.isfinite(gradient).all(), "the gradient is not finite"
