"""The suite of frame rules: what a head that keeps class means asks for its frame.

X <-> means, omega <-> weights, A <-> anchor.
"""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor

from etflayers.geometry import is_simplex_etf, simplex_etf
from etflayers.nn import NearestETFHead
from etflayers.nn.rules import FrameRule
from etflayers.testing.oracles import means_with_condition
from etflayers.testing.suites.base import Function, Suite

__all__ = ["FrameRuleSuite"]


class FrameRuleSuite(Suite):
    """Checks of a :class:`~etflayers.nn.FrameRule` for four classes in six dimensions; x are the means.

    Attributes:
        proximity: the weight of the anchor.
    """

    proximity: ClassVar[float] = 0.1

    def make(self) -> FrameRule:
        """The rule."""
        raise NotImplementedError

    def function(self, made: FrameRule) -> Function:
        """The frame for given means, all of them seen."""
        return lambda means: self.frame(made, means, torch.ones(4, dtype=means.dtype))

    def frame(self, made: FrameRule, means: Tensor, weights: Tensor) -> Tensor:
        """The frame for given means and weights."""
        anchor = simplex_etf(4, 6, dtype=means.dtype)
        return made(means, weights=weights, anchor=anchor, proximity=self.proximity)

    def point(self, dtype: torch.dtype = torch.float64, seed: int = 0) -> Tensor:
        """Means with condition number 3."""
        generator = torch.Generator().manual_seed(seed)
        return means_with_condition(4, 6, 3.0, generator=generator).to(dtype)

    def test_frame_is_a_simplex_etf(self) -> None:
        """Unit rows at equal angles, (K, d)."""
        frame = self.function(self.made())(self.point())
        assert frame.shape == (4, 6), f"frame of shape {tuple(frame.shape)}"
        verdict = is_simplex_etf(frame)
        assert verdict.ok, verdict.reason

    def test_degenerate_input(self) -> None:
        """Where no class, one or not every one has been seen there is a frame with a finite gradient."""
        for seen in (0, 1, 3):
            weights = (torch.arange(4) < seen).double()
            means = (self.point() * weights[:, None]).requires_grad_()
            frame = self.frame(self.made(), means, weights)
            verdict = is_simplex_etf(frame)
            assert verdict.ok, f"{seen} classes seen: {verdict.reason}"
            (gradient,) = torch.autograd.grad(frame.sin().sum(), means)
            assert torch.isfinite(gradient).all(), f"{seen} classes seen: the gradient is not finite"

    def test_serves_a_head(self) -> None:
        """A head with this rule takes a training pass with a class that is not seen."""
        head = NearestETFHead(6, 4, rule=self.made(), dtype=torch.float64, proximity=self.proximity)
        features = torch.randn(9, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
        logits = head(features.requires_grad_(), torch.arange(9) % 3)
        (gradient,) = torch.autograd.grad(logits.sin().sum(), features)
        assert torch.isfinite(gradient).all(), "the gradient is not finite"
