"""Few classes on a CPU: the lines in NumPy against those in PyTorch, and when they are taken."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from etflayers import nearest_etf
from etflayers.adjoints import Unrolled
from etflayers.errors import NonFiniteError
from etflayers.geometry import is_simplex_etf
from etflayers.kernels import describe
from etflayers.kernels.polar import SpectralState, numpy, polar_adjoint, reference, small_polar
from etflayers.solvers import SVD, ByRegime
from etflayers.testing import adjoint_identity_error, means_with_condition, relative_error

SHAPES = [(2, 1), (2, 3), (5, 4), (10, 64), (31, 30), (31, 200)]


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The functions of the NumPy path that ran."""
    ran: list[str] = []
    for name in ("small_polar", "small_polar_adjoint"):
        original: Callable[..., Any] = getattr(numpy, name)

        def noted(*arguments: Any, name: str = name, original: Callable[..., Any] = original) -> Any:
            ran.append(name)
            return original(*arguments)

        monkeypatch.setattr(numpy, name, noted)
    return ran


@pytest.mark.parametrize(("num_classes", "in_features"), SHAPES)
@pytest.mark.parametrize("kappa", [1.0, 3.0, 1e3])
def test_frame_and_adjoint_are_those_of_pytorch(num_classes: int, in_features: int, kappa: float) -> None:
    kappa = kappa if num_classes > 2 else 1.0
    linear = means_with_condition(num_classes, in_features, kappa, dtype=torch.float64)
    found = small_polar(linear, torch.float32)
    assert found is not None
    exact = SVD().solve(linear)
    bound = 1e-15 * max(kappa, 10) ** 2
    assert relative_error(found.frame, exact.frame) < bound
    identity = torch.eye(num_classes, dtype=torch.float64)
    assert relative_error(found.pseudo_inverse(identity), exact.inverse) < bound * kappa
    assert found.solved.kappa == pytest.approx(kappa, rel=1e-6)
    direction = torch.randn(num_classes, in_features, dtype=torch.float64)
    with torch.no_grad():
        expected = reference.polar_adjoint(direction, exact)
        gap = torch.linalg.matrix_norm(polar_adjoint(direction, found) - expected)
        assert float(gap) <= bound * kappa * float(torch.linalg.matrix_norm(expected))


@pytest.mark.parametrize(("num_classes", "in_features"), SHAPES)
def test_the_adjoint_is_that_of_the_jacobian(num_classes: int, in_features: int) -> None:
    linear = torch.randn(num_classes, in_features, dtype=torch.float64)
    assert adjoint_identity_error(lambda x: nearest_etf(x.float()).double(), linear) < 1e-5


def test_it_is_taken_forward_and_back_and_described(calls: list[str]) -> None:
    means = torch.randn(10, 64, requires_grad=True)
    nearest_etf(means).sum().backward()
    assert calls == ["small_polar", "small_polar_adjoint"]
    options: dict[str, Any] = {"device": "cpu", "dtype": torch.float32, "in_features": 64}
    assert describe("polar", num_classes=10, **options).impl == "numpy"
    assert describe("polar", num_classes=32, **options).impl == "reference"
    assert describe("polar", num_classes=10, batch=3, **options).impl == "reference"
    assert describe("polar", num_classes=10, impl="reference", **options).impl == "reference"
    assert describe("polar", num_classes=30, **(options | {"in_features": 4096})).impl == "reference"


@pytest.mark.parametrize(
    "means",
    [
        torch.randn(32, 64),
        torch.randn(3, 10, 64),
        torch.randn(30, 4096),
    ],
    ids=["many classes", "a batch", "many features"],
)
def test_it_leaves_alone_what_is_large(means: Tensor, calls: list[str]) -> None:
    nearest_etf(means.requires_grad_()).sum().backward()
    assert not calls


def test_derivatives_of_derivatives_are_recorded(calls: list[str]) -> None:
    means = torch.randn(4, 6, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradgradcheck(nearest_etf, means)
    assert calls
    assert nearest_etf(means, adjoint=Unrolled()).requires_grad


def test_several_cotangents_at_once(calls: list[str]) -> None:
    means = torch.randn(4, 6, requires_grad=True)
    frame, cotangents = nearest_etf(means), torch.randn(3, 4, 6)
    (batched,) = torch.autograd.grad(frame, means, cotangents, is_grads_batched=True, retain_graph=True)
    assert calls == ["small_polar"]
    for grad, cotangent in zip(batched, cotangents, strict=True):
        torch.testing.assert_close(grad, torch.autograd.grad(frame, means, cotangent, retain_graph=True)[0])


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
def test_what_is_not_finite_is_named(value: float) -> None:
    means = torch.randn(4, 6)
    means[2, 3] = value
    with pytest.raises(NonFiniteError, match="means"):
        nearest_etf(means)
    assert small_polar(means, torch.float32) is None


def test_what_has_no_full_rank_takes_another_way() -> None:
    means = torch.randn(6, 8)
    means[3:] = means[3]
    for linear in (means, torch.zeros(6, 8), 1e-30 * torch.randn(6, 8)):
        found = small_polar(linear, torch.float32)
        assert found is None or found.solved.kappa > 1e5
        state = ByRegime().solve(linear)
        assert isinstance(state, SpectralState)
        assert is_simplex_etf(state.frame).ok


def test_float64_data_ask_for_more(calls: list[str]) -> None:
    linear = means_with_condition(5, 8, 100.0, dtype=torch.float64)
    state = ByRegime().solve(linear)
    assert relative_error(state.frame, SVD().solve(linear).frame) < 1e-14
    assert calls == ["small_polar"]  # which was not good enough
