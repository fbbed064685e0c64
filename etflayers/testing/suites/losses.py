"""The suite of losses of logits, or of anything else that leads with the samples."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from etflayers.errors import InvalidArgumentError
from etflayers.testing.suites.base import Function, Suite, assert_close, assert_refused

__all__ = ["LossSuite"]


class LossSuite(Suite):
    """Checks of a loss ``(logits, targets)`` to a number; f is the loss, x the logits ``(B, K)``."""

    def make(self) -> Callable[[Tensor, Tensor], Tensor]:
        """The loss."""
        raise NotImplementedError

    def targets(self) -> Tensor:
        """Eight samples of four classes."""
        return torch.arange(8) % 4

    def point(self, dtype: torch.dtype = torch.float64, seed: int = 0) -> Tensor:
        """Logits of these samples."""
        generator = torch.Generator().manual_seed(seed)
        return torch.randn(8, 4, generator=generator, dtype=torch.float64).to(dtype)

    def function(self, made: Callable[[Tensor, Tensor], Tensor]) -> Function:
        """The loss of the logits."""
        return lambda logits: made(logits, self.targets())

    def test_is_one_number(self) -> None:
        """A scalar, which does not depend on the order of the samples."""
        made, order = self.made(), torch.randperm(8, generator=torch.Generator().manual_seed(0))
        value = made(self.point(), self.targets())
        assert value.shape == (), f"a loss of shape {tuple(value.shape)}"
        assert_close(made(self.point()[order], self.targets()[order]), value, self.rtol)

    def test_degenerate_input(self) -> None:
        """One sample, logits that are equal and logits that are large give a finite loss and gradient."""
        for logits in (self.point()[:1], 0 * self.point(), 1e4 * self.point()):
            logits = logits.requires_grad_()
            value = self.made()(logits, self.targets()[: len(logits)])
            (gradient,) = torch.autograd.grad(value, logits)
            assert torch.isfinite(value), "the loss is not finite"
            assert torch.isfinite(gradient).all(), "the gradient is not finite"

    def test_bad_input(self) -> None:
        """A target that is no class is refused by name."""
        assert_refused(lambda: self.made()(self.point(), self.targets() + 1), InvalidArgumentError, "targets")
