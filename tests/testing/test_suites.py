"""The library's own heads, solvers, adjoints, rules and losses, in the suites that users inherit."""

from __future__ import annotations

from typing import ClassVar

import pytest
import torch
from torch import Tensor, nn

from etflayers.adjoints import Detached, Implicit, Unrolled
from etflayers.geometry import simplex_etf
from etflayers.nn import (
    ClassMeanHead,
    CodeMSELoss,
    DotRegressionLoss,
    FixedCodeHead,
    FixedETFHead,
    HuberNearestETF,
    LabelRelaxationLoss,
    LearnedETFHead,
    MahalanobisNearestETF,
    NearestCodeHead,
    NearestETF,
    NearestETFHead,
    NONLLoss,
    NTCELoss,
    TransitHead,
    UnitRowHead,
)
from etflayers.solvers import SVD, ByRegime, GramEigh, GramRoot, RiemannianNewton
from etflayers.testing.suites import (
    AdjointSuite,
    FrameRuleSuite,
    FrameSolverSuite,
    HeadSuite,
    LossSuite,
    StiefelSolverSuite,
)

# What the general node, which finds these frames, does not do.
BY_THE_STIEFEL_NODE = StiefelSolverSuite.unsupported


class TestFixedETFHead(HeadSuite):
    def make(self) -> FixedETFHead:
        return FixedETFHead(6, 4, rotation="haar", scale=3.0)


class TestCanonicalETFHead(HeadSuite):
    def make(self) -> FixedETFHead:
        return FixedETFHead(6, 4, rotation="canonical")


class TestNearestETFHead(HeadSuite):
    def make(self) -> NearestETFHead:
        return NearestETFHead(6, 4, scale=2.0)


class TestNormalizedNearestETFHead(HeadSuite):
    def make(self) -> NearestETFHead:
        return NearestETFHead(6, 4, scale=2.0, normalize=True)


class TestLearnedETFHead(HeadSuite):
    def make(self) -> LearnedETFHead:
        return LearnedETFHead(6, 4)


class TestUnitRowHead(HeadSuite):
    def make(self) -> UnitRowHead:
        return UnitRowHead(3, 6, scale=2.0)


class TestNormalizedUnitRowHead(HeadSuite):
    def make(self) -> UnitRowHead:
        return UnitRowHead(6, 4, scale=5.0, normalize=True)


FRAME_FOLLOWS = dict.fromkeys(
    ("test_gradcheck", "test_gradgradcheck", "test_forward_mode"),
    "the frame is a constant of the derivative, and follows the features all the same",
)


class TestClassMeanHead(HeadSuite):
    unsupported: ClassVar = FRAME_FOLLOWS

    def make(self) -> ClassMeanHead:
        return ClassMeanHead(3, 6, scale=2.0)


class TestDifferentiatedClassMeanHead(HeadSuite):
    def make(self) -> ClassMeanHead:
        return ClassMeanHead(3, 6, scale=5.0, normalize=True, detach=False)


class TestTransitHead(HeadSuite):
    def make(self) -> TransitHead:
        head = TransitHead(simplex_etf(4, 6, rotation="haar", device="cpu"), scale=2.0)
        return head.depart([1, 3], torch.ones(2, 6, device="cpu")).transit(0.3)


class TestKerdockHead(HeadSuite):
    def make(self) -> FixedCodeHead:
        return FixedCodeHead(4, 21, scale=4.0)


class TestNormalizedOrthoplexHead(HeadSuite):
    def make(self) -> FixedCodeHead:
        return FixedCodeHead(4, 7, scale=4.0, normalize=True)


class TestRootHead(HeadSuite):
    def make(self) -> FixedCodeHead:
        return FixedCodeHead(5, 17, code="roots", scale=4.0)


class TestStoredCodeHead(HeadSuite):
    def make(self) -> FixedCodeHead:
        return FixedCodeHead(3, 6, code="optimized", scale=4.0)


class TestNearestCodeHead(HeadSuite):
    unsupported: ClassVar = FRAME_FOLLOWS

    def make(self) -> NearestCodeHead:
        return NearestCodeHead(3, 6, code="optimized", scale=4.0)


class TestByRegime(FrameSolverSuite):
    def make(self) -> ByRegime:
        return ByRegime()


class TestSVD(FrameSolverSuite):
    def make(self) -> SVD:
        return SVD()


class TestGramEigh(FrameSolverSuite):
    unsupported: ClassVar = {"test_degenerate_input": "needs means of full rank, and says so"}

    def make(self) -> GramEigh:
        return GramEigh()


class TestGramRoot(FrameSolverSuite):
    def make(self) -> GramRoot:
        return GramRoot()


class TestRiemannianNewton(StiefelSolverSuite):
    def make(self) -> RiemannianNewton:
        return RiemannianNewton()


class TestImplicit(AdjointSuite):
    def make(self) -> Implicit:
        return Implicit()


class TestUnrolled(AdjointSuite):
    unsupported: ClassVar = {
        "test_degenerate_input": "it divides by differences of singular values, and says so where they vanish"
    }

    def make(self) -> Unrolled:
        return Unrolled()


class TestDetached(AdjointSuite):
    unsupported: ClassVar = dict.fromkeys(
        (
            "test_gradcheck",
            "test_gradgradcheck",
            "test_forward_mode",
            "test_compile",
            "test_general_objective",
            "test_degenerate_input",
            "test_time",
        ),
        "the minimizer is a constant: it has no derivative",
    )

    def make(self) -> Detached:
        return Detached()


@pytest.mark.slow  # gradgradcheck solves hundreds of problems
class TestMahalanobisNearestETF(FrameRuleSuite):
    unsupported = BY_THE_STIEFEL_NODE

    def make(self) -> MahalanobisNearestETF:
        return MahalanobisNearestETF(6)


@pytest.mark.slow  # gradgradcheck solves hundreds of problems
class TestHuberNearestETF(FrameRuleSuite):
    unsupported = BY_THE_STIEFEL_NODE

    def make(self) -> HuberNearestETF:
        return HuberNearestETF(threshold=0.4)


class TestNearestETF(FrameRuleSuite):
    def make(self) -> NearestETF:
        return NearestETF()


class TestDotRegressionLoss(LossSuite):
    def make(self) -> DotRegressionLoss:
        return DotRegressionLoss(torch.tensor([1.0, 2.0, 1.5, 1.0]))


class TestDotRegressionLossAsInItsCode(LossSuite):
    def make(self) -> DotRegressionLoss:
        return DotRegressionLoss(torch.tensor([1.0, 2.0, 1.5, 1.0]), divide_by_length=False)


class TestCodeMSELoss(LossSuite):
    def make(self) -> CodeMSELoss:
        return CodeMSELoss()


class TestMSELossOfOtherCodes(LossSuite):
    def make(self) -> CodeMSELoss:
        return CodeMSELoss(torch.linspace(-1, 1, 16).view(4, 4).cos())


class TestLabelRelaxationLoss(LossSuite):
    def make(self) -> LabelRelaxationLoss:
        return LabelRelaxationLoss(0.2)


class OfFixedRows(nn.Module):
    """A loss of features and rows, with the rows in it."""

    def __init__(self, loss: NTCELoss | NONLLoss) -> None:
        super().__init__()
        self.loss = loss
        self.register_buffer("rows", torch.linspace(-1, 1, 16).view(4, 4).cos())

    def forward(self, features: Tensor, targets: Tensor) -> Tensor:
        found: Tensor = self.loss(features, targets, self.rows)
        return found


class TestNTCELoss(LossSuite):
    def make(self) -> OfFixedRows:
        return OfFixedRows(NTCELoss(0.5))


class TestNONLLoss(LossSuite):
    def make(self) -> OfFixedRows:
        return OfFixedRows(NONLLoss(0.5))
