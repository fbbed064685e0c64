"""The conformance suites as a user inherits them, and what they say of code that is broken."""

from __future__ import annotations

import subprocess
import sys
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from etflayers import nearest_etf
from etflayers.errors import InvalidArgumentError
from etflayers.geometry import project_stiefel
from etflayers.nn import CodeHead
from etflayers.solvers import SVD, RiemannianNewton
from etflayers.testing.suites import (
    FrameRuleSuite,
    FrameSolverSuite,
    HeadSuite,
    LossSuite,
    ObjectiveSuite,
    StiefelSolverSuite,
)


class RandomCode(CodeHead):
    """More classes than dimensions: K random directions, and a scale that learns."""

    def __init__(self) -> None:
        super().__init__(3, 7, scale=nn.Parameter(torch.tensor(2.0)))
        self.register_buffer("words", torch.empty(7, 3))
        self.reset_parameters()

    @property
    def frame(self) -> Tensor:
        words: Tensor = self.words
        return words

    @torch.no_grad()
    def reset_parameters(self) -> None:
        self.scale.fill_(2.0)
        self.words.copy_(F.normalize(torch.randn_like(self.words), dim=-1))


class TestRandomCode(HeadSuite):
    def make(self) -> RandomCode:
        return RandomCode()


class Alignment(nn.Module):
    """f(Q, x) = |Q - x|^2 / 2 in a learned diagonal metric."""

    def __init__(self) -> None:
        super().__init__()
        self.metric = nn.Parameter(torch.tensor([1.0, 1.5, 2.0, 2.5]))

    def forward(self, point: Tensor, target: Tensor) -> Tensor:
        return (self.metric[:, None] * (point - target).square()).sum((-2, -1)) / 2


class ObjectiveCase(ObjectiveSuite):
    def make(self) -> Any:
        return Alignment()

    def inputs(self, dtype: torch.dtype = torch.float64) -> Tensor:
        generator = torch.Generator().manual_seed(0)
        return torch.randn(2, 4, 2, generator=generator, dtype=torch.float64).to(dtype)

    def start(self) -> Tensor:
        return project_stiefel(self.inputs())


class TestAlignment(ObjectiveCase):
    pass


def directions_only(means: Tensor, *, weights: Tensor, anchor: Tensor, proximity: float) -> Tensor:
    """The rule of docs/howto/heads.md, for torch.compile and vmap: no class counts more for its length."""
    seen = (weights > 0).to(means.dtype)[:, None]
    center = (seen * means).sum(0) / seen.sum().clamp(min=1)
    rows = seen * (means - center)
    rows = rows / (rows.square().sum(-1, keepdim=True) + 1e-6).sqrt()
    return nearest_etf(rows, weights=weights, anchor=anchor, proximity=proximity)


class TestDirectionsOnly(FrameRuleSuite):
    def make(self) -> Any:
        return directions_only


# --- broken code --------------------------------------------------------------------------------------------


class HalfGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        return grads[0] / 2


class WrongGradient(RandomCode):
    def inputs(self, features: Tensor) -> Tensor:
        return HalfGradient.apply(super().inputs(features))


class LongRows(RandomCode):
    @property
    def frame(self) -> Tensor:
        return 1.01 * super().frame


class ForgetsItsState(RandomCode):
    """Its words are a plain attribute, which no state dict knows."""

    def reset_parameters(self) -> None:
        self.plain = F.normalize(torch.randn(7, 3), dim=-1)

    @property
    def frame(self) -> Tensor:
        return self.plain.to(self.words.dtype)


class LearnsInEval(RandomCode):
    def forward(self, features: Tensor, targets: Tensor | None = None) -> Tensor:
        self.words = F.normalize(self.words + 0.1, dim=-1)
        return super().forward(features, targets)


class SwallowsBadInput(RandomCode):
    def inputs(self, features: Tensor) -> Tensor:
        return features[..., :3].to(self.words.dtype)


class NoReset(RandomCode):
    """Its reset leaves what ``to_empty`` found."""

    def __init__(self) -> None:
        super().__init__()
        super().reset_parameters()

    def reset_parameters(self) -> None:
        pass


@pytest.mark.parametrize(
    ("head", "check", "message"),
    [
        (WrongGradient, "test_gradcheck", "Jacobian mismatch"),
        (LongRows, "test_frame_has_unit_rows", "off by"),
        (ForgetsItsState, "test_state_dict", "keep state in buffers"),
        (LearnsInEval, "test_eval_changes_nothing", "off by|not equal"),
        (SwallowsBadInput, "test_bad_input", "bad input was accepted"),
        (NoReset, "test_meta_and_reset", "not finite"),
    ],
)
def test_a_broken_head_fails(head: Any, check: str, message: str) -> None:
    class Case(HeadSuite):
        def make(self) -> CodeHead:
            broken: CodeHead = head()
            return broken

    with pytest.raises(AssertionError, match=message):
        getattr(Case(), check)()


def mixes_the_batch(point: Tensor, target: Tensor) -> Tensor:
    gaps = (point - target).square().sum((-2, -1))
    return gaps + gaps.mean()


def has_a_valley(point: Tensor, target: Tensor) -> Tensor:
    return ((point @ point.mT - target @ target.mT) ** 2).sum((-2, -1))


def wrong_in_q(point: Tensor, target: Tensor) -> Tensor:
    return (HalfGradient.apply(point) - target).square().sum((-2, -1))


@pytest.mark.parametrize(
    ("objective", "check", "message"),
    [
        (mixes_the_batch, "test_one_value_for_each_member", "off by"),
        (has_a_valley, "test_has_an_isolated_minimizer", "Hessian at the minimizer is singular"),
        (wrong_in_q, "test_gradcheck", "Jacobian mismatch"),
    ],
)
def test_a_broken_objective_fails(objective: Any, check: str, message: str) -> None:
    class Case(ObjectiveCase):
        def make(self) -> Any:
            return objective

    with pytest.raises(AssertionError, match=message):
        getattr(Case(), check)()


class Permuted(SVD):
    """Finds an ETF that is not the nearest one: its classes are in the reverse order."""

    def solve(self, linear: Tensor, precision: torch.dtype | None = None) -> Any:
        return super().solve(linear.flip(-2), precision)


class ClaimsToBeDone:
    """Returns its start as the minimizer."""

    def minimize(self, objective: Any, start: Tensor) -> Any:
        found = RiemannianNewton().minimize(objective, start)
        return found._replace(point=start, value=objective(start))


def test_broken_solvers_fail() -> None:
    class FrameCase(FrameSolverSuite):
        def make(self) -> Any:
            return Permuted()

    with pytest.raises(AssertionError, match="off by"):
        FrameCase().test_frame_is_the_nearest()

    class StiefelCase(StiefelSolverSuite):
        def make(self) -> Any:
            return ClaimsToBeDone()

    for check in ("test_finds_the_polar_factor", "test_finds_the_smallest_eigenvalues"):
        with pytest.raises(AssertionError, match="off by"):
            getattr(StiefelCase(), check)()


def test_a_broken_loss_fails() -> None:
    class Case(LossSuite):
        def make(self) -> Any:
            return lambda logits, targets: logits.log().sum()

    with pytest.raises(AssertionError, match="not finite"):
        Case().test_degenerate_input()
    with pytest.raises(AssertionError, match="bad input was accepted"):
        Case().test_bad_input()


def test_only_the_suites_need_pytest() -> None:
    code = (
        "import sys; sys.modules['pytest'] = None\n"
        "import etflayers.testing as t; t.svd_frame\n"
        "try:\n    import etflayers.testing.suites\n"
        "except ImportError as error:\n    print(error.name)"
    )
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert found.stdout.strip() == "pytest"


def test_unsupported_is_checked() -> None:
    with pytest.raises(InvalidArgumentError, match="'test_speed', which is no check of Wrong"):

        class Wrong(HeadSuite):
            unsupported = {"test_speed": "it is slow"}  # noqa: RUF012

    with pytest.raises(InvalidArgumentError, match="no reason why Silent cannot pass test_vmap"):

        class Silent(HeadSuite):
            unsupported = {"test_vmap": ""}  # noqa: RUF012

    class Said(HeadSuite):
        unsupported = {"test_vmap": "it has state"}  # noqa: RUF012

    (mark,) = Said.test_vmap.pytestmark  # type: ignore[attr-defined]
    assert mark.name == "xfail"
    assert mark.kwargs == {"reason": "it has state", "strict": True}
    assert not hasattr(HeadSuite.test_vmap, "pytestmark")
