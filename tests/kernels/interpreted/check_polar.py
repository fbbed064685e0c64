"""The polar kernels, interpreted, against an SVD in float64."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from triton.runtime.errors import InterpreterError

from etflayers import nearest_etf, simplex_etf
from etflayers.adjoints import Implicit
from etflayers.errors import InvalidArgumentError
from etflayers.geometry import is_simplex_etf
from etflayers.kernels.polar import RootState, polar, polar_adjoint
from etflayers.kernels.polar.triton import fused_polar, fused_polar_adjoint
from etflayers.solvers import SVD, GramRoot
from etflayers.testing import means_with_condition, relative_error

EPS = torch.finfo(torch.float32).eps


def exact_adjoint(direction: Tensor, linear: Tensor, frame: Tensor) -> Tensor:
    """By an eigenbasis, for the frame as it is: for rank-deficient M the derivative depends on the frame."""
    state = SVD().solve(linear)
    basis, reciprocals = state.spectrum
    frame, change = frame.double(), direction.double() - direction.double().mean(0)
    inner = change @ frame.mT
    turned = basis @ ((basis.mT @ (inner - inner.mT) @ basis) * reciprocals) @ basis.mT
    return turned @ frame + state.inverse @ (change - (1 - 1 / len(frame)) * inner @ frame)


def check(linear: Tensor) -> RootState:
    found = polar(linear, impl="triton")
    assert found.frame.dtype == linear.dtype
    # Not by entries: what is wrong by rounding is the direction of a row.
    assert is_simplex_etf(found.frame, atol=8 * EPS).ok
    centered = linear.double() - linear.double().mean(-2, keepdim=True)
    exact = SVD().solve(linear)
    # Along the directions that are present; beyond them any frame is as near.
    assert relative_error(found.inverse @ centered, exact.inverse @ centered) < EPS
    direction = torch.randn(linear.shape)
    gradient = polar_adjoint(direction, found)
    assert gradient.dtype == torch.float32
    assert relative_error(gradient, exact_adjoint(direction, linear, found.frame)) < EPS
    return found


@pytest.mark.parametrize(
    ("num_classes", "in_features", "kappa"),
    # Square, more than one block of columns, as ill-conditioned as data of deficient rank, the larger tiles.
    [(2, 5, 1.0), (5, 4, 5.0), (10, 40, 1e3), (7, 9, 1e5), (32, 33, 3.0)],
)
def test_full_rank(num_classes: int, in_features: int, kappa: float) -> None:
    linear = means_with_condition(num_classes, in_features, kappa, dtype=torch.float32)
    found = check(linear)
    # Correctly rounded, up to the error of the Gram matrix, however ill-conditioned.
    assert relative_error(found.frame, SVD().solve(linear).frame) < EPS


def test_at_neural_collapse() -> None:
    linear = 3 * simplex_etf(6, 9) + torch.randn(9)
    assert relative_error(check(linear).frame, SVD().solve(linear).frame) < EPS


@pytest.mark.parametrize("kind", ["unseen", "coinciding in few dimensions"])
def test_deficient_rank(kind: str) -> None:
    linear = torch.randn(5, 4 if kind.endswith("dimensions") else 7)
    linear[3:] = 0 if kind == "unseen" else linear[3]
    check(linear + 5)


def test_a_batch_with_all_means_equal() -> None:
    linear = torch.stack([torch.randn(3, 4), torch.full((3, 4), 3.3e5)])
    found = polar(linear, impl="triton")
    assert is_simplex_etf(found.frame, atol=8 * EPS).ok
    gradient = polar_adjoint(torch.randn(2, 3, 4), found)
    assert bool(gradient[0].any())
    assert not bool(gradient[1].any())


@pytest.mark.parametrize("factor", [1e-20, 1e37])
def test_range_of_float32(factor: float) -> None:
    check(factor * torch.randn(3, 4))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_only_rounded(dtype: torch.dtype) -> None:
    linear = torch.randn(3, 5).to(dtype)
    wide = polar(linear.float(), impl="triton")
    half = polar(linear, impl="triton")
    # The interpreter truncates where a GPU rounds.
    torch.testing.assert_close(half.frame.float(), wide.frame, rtol=torch.finfo(dtype).eps, atol=0)
    assert torch.equal(half.inverse, wide.inverse)


def test_forced_as_a_solver_and_differentiated_twice() -> None:
    linear = means_with_condition(3, 4, 3.0, dtype=torch.float32).requires_grad_()
    cotangent = torch.randn(3, 4)
    grads = []
    for solver in (GramRoot(impl="triton"), GramRoot(impl="reference")):
        frame = nearest_etf(linear, solver=solver, adjoint=Implicit())
        (first,) = torch.autograd.grad(frame, linear, cotangent, create_graph=True)
        (second,) = torch.autograd.grad(first.square().sum(), linear)
        grads.append((frame, first, second))
    for mine, theirs in zip(*grads, strict=True):
        assert relative_error(mine, theirs) < 4 * EPS


def test_a_wide_linear_form_of_narrow_data() -> None:
    # Not a sum of float32 numbers: rounding it first would leave four digits of the smallest direction.
    linear = means_with_condition(5, 8, 1e4)
    found, exact = polar(linear, precision=torch.float32, impl="triton"), SVD().solve(linear)
    assert found.frame.dtype == torch.float64
    assert relative_error(found.frame, exact.frame) < EPS
    direction = torch.randn(5, 8, dtype=torch.float64)
    gradient = polar_adjoint(direction, found)
    assert relative_error(gradient, exact_adjoint(direction, linear, exact.frame)) < EPS
    with pytest.raises(InvalidArgumentError, match=r"not torch\.float64"):
        polar(linear, impl="triton")


def test_nan_is_asserted_on() -> None:
    with pytest.raises((AssertionError, InterpreterError), match="NaN or infinity"):
        polar(torch.full((3, 4), torch.nan), impl="triton")


def test_the_operators_are_registered_as_pytorch_expects() -> None:
    linear = torch.randn(2, 3, 4)
    torch.library.opcheck(fused_polar, (linear,))
    torch.library.opcheck(fused_polar_adjoint, (torch.randn(2, 3, 4), *fused_polar(linear)))
