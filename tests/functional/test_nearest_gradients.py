import pytest
import torch
from torch.autograd import gradcheck, gradgradcheck

from etflayers import nearest_etf, simplex_etf
from etflayers.adjoints import Detached, Unrolled
from etflayers.errors import NonFiniteError
from etflayers.solvers import SVD
from etflayers.testing import adjoint_identity_error, means_with_condition, relative_error, svd_frame

SHAPES = [(2, 1), (2, 4), (3, 2), (4, 4), (5, 8)]


def full_problem(num_classes, in_features, batch=()):
    options = {"dtype": torch.float64, "requires_grad": True}
    return (
        torch.randn(*batch, num_classes, in_features, **options),
        (torch.rand(*batch, num_classes, dtype=torch.float64) + 0.1).requires_grad_(),
        torch.randn(*batch, num_classes, in_features, **options),
        (torch.rand(batch, dtype=torch.float64) + 0.1).requires_grad_(),
    )


def solve(means, weights, anchor, proximity):
    return nearest_etf(means, weights=weights, anchor=anchor, proximity=proximity)


@pytest.mark.parametrize(("num_classes", "in_features"), SHAPES)
def test_gradient_in_every_argument_and_both_modes(num_classes, in_features):
    assert gradcheck(
        solve,
        full_problem(num_classes, in_features),
        check_forward_ad=True,
        check_batched_grad=True,
        check_batched_forward_grad=True,
    )


@pytest.mark.parametrize(("num_classes", "in_features"), SHAPES)
def test_second_derivative_in_every_argument(num_classes, in_features):
    assert gradgradcheck(solve, full_problem(num_classes, in_features), check_fwd_over_rev=True)


def test_third_derivative():
    means = torch.randn(3, 4, dtype=torch.float64, requires_grad=True)

    def first(x):
        (grad,) = torch.autograd.grad(nearest_etf(x).sin().sum(), x, create_graph=True)
        return grad

    assert gradgradcheck(first, means)


def test_batched_gradient():
    assert gradcheck(solve, full_problem(3, 4, batch=(2,)), check_forward_ad=True)


@pytest.mark.parametrize(("num_classes", "in_features"), [*SHAPES, (40, 64), (100, 99)])
def test_adjoint_identity(num_classes, in_features):
    means = torch.randn(num_classes, in_features, dtype=torch.float64)
    assert adjoint_identity_error(nearest_etf, means) < 1e-9


@pytest.mark.parametrize("kappa", [1.0001, 3.0, 1e3])
def test_fused_and_recorded_backward_are_the_same_map(kappa):
    means = means_with_condition(5, 9, kappa).requires_grad_()
    cotangent = torch.randn(5, 9, dtype=torch.float64)
    (fused,) = torch.autograd.grad(nearest_etf(means), means, cotangent)
    (recorded,) = torch.autograd.grad(nearest_etf(means), means, cotangent, create_graph=True)
    assert relative_error(fused, recorded) < 1e-11


def test_forward_mode_over_an_unrecorded_backward():
    # torch.autograd.forward_ad with create_graph=False: the fused formula would drop the tangent silently.
    means, direction = torch.randn(2, 4, 6, dtype=torch.float64)
    cotangent = torch.randn(4, 6, dtype=torch.float64)
    with torch.autograd.forward_ad.dual_level():
        dual = torch.autograd.forward_ad.make_dual(means.clone().requires_grad_(), direction)
        (grad,) = torch.autograd.grad(nearest_etf(dual), dual, cotangent)
        tangent = torch.autograd.forward_ad.unpack_dual(grad).tangent

    def gradient(x):
        x = x.clone().requires_grad_()
        return torch.autograd.grad(nearest_etf(x), x, cotangent)[0]

    step = 1e-6
    expected = (gradient(means + step * direction) - gradient(means - step * direction)) / (2 * step)
    torch.testing.assert_close(tangent, expected, atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize(
    ("num_classes", "in_features"),
    [(10, 64), (10, 9), (32, 40), (100, 128), (127, 126), (150, 700), (200, 256), (400, 512)],
)
@pytest.mark.parametrize(
    ("kappa", "bound"),
    # On both sides of each kappa at which the default goes another way: 5, and 20 d / K, which is 19.8 for
    # (127, 126), 25.6 for (200, 256), and 93.3 for (150, 700).
    [(1.01, 2e-6), (4.95, 2e-6), (5.05, 2e-6), (19, 2e-6), (25, 2e-6), (26, 2e-6), (93, 2e-6), (1e3, 2e-6)],
)
def test_float32_gradient_against_float64(num_classes, in_features, kappa, bound):
    means = means_with_condition(num_classes, in_features, kappa, dtype=torch.float32).requires_grad_()
    exact = means.detach().double().requires_grad_()
    cotangent = torch.randn(num_classes, in_features)
    (grad,) = torch.autograd.grad(nearest_etf(means), means, cotangent)
    (reference,) = torch.autograd.grad(svd_frame(exact), exact, cotangent.double())
    assert relative_error(grad, reference) <= bound


def test_detached_has_no_gradient():
    means = torch.randn(4, 6, requires_grad=True)
    assert not nearest_etf(means, adjoint=Detached()).requires_grad


def test_unrolled_raises_instead_of_spreading_nan_at_collapse():
    means = simplex_etf(4, 4, dtype=torch.float64).requires_grad_()
    cotangent = torch.randn(4, 4, dtype=torch.float64)
    with pytest.raises(NonFiniteError, match=r"use adjoint=Implicit\(\)"):
        torch.autograd.grad(nearest_etf(means, solver=SVD(), adjoint=Unrolled()), means, cotangent)
    (grad,) = torch.autograd.grad(nearest_etf(means), means, cotangent)
    assert grad.isfinite().all()
