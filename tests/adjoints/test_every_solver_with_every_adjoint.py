"""Every way to find the frame, crossed with every way to differentiate it."""

import pytest
import torch
from torch.autograd import gradcheck, gradgradcheck

from etflayers import nearest_etf, simplex_etf
from etflayers.adjoints import Detached, Implicit, Unrolled
from etflayers.errors import InvalidArgumentError
from etflayers.solvers import (
    QRSVD,
    SVD,
    ByRegime,
    ConvexHull,
    GramEigh,
    GramRoot,
    Iterative,
    NewtonSchulz,
    RiemannianDescent,
    TrustRegions,
)
from etflayers.testing import means_with_condition, relative_error, svd_frame

CLOSED_FORM = [SVD(), QRSVD(), GramEigh(), ByRegime(), NewtonSchulz()]
CONVEX = [ConvexHull()]
RECORDING = [*CLOSED_FORM, *CONVEX]
EXACT = [*CLOSED_FORM, GramRoot()]
ITERATIVE = [
    Iterative(),
    RiemannianDescent(learning_rate=0.5),
    TrustRegions(),
]
NOT_RECORDING = [*ITERATIVE, GramRoot()]
SHAPES = [(2, 4), (5, 4), (5, 9)]
LARGE = (20, 24)


def name(value):
    inner = getattr(value, "solver", value)
    return type(inner).__name__


def cases():
    for solver in [*RECORDING, *NOT_RECORDING]:
        for num_classes, in_features in SHAPES if solver in CONVEX else [*SHAPES, LARGE]:
            yield pytest.param(
                solver, num_classes, in_features, id=f"{name(solver)}-K{num_classes}-d{in_features}"
            )


def problem(num_classes, in_features, weighted):
    """Class means, the options of the node and the linear form that they amount to."""
    # Distinct singular values, or the derivative of a factorization would not exist.
    means = means_with_condition(num_classes, in_features, 8.0).requires_grad_()
    if not weighted:
        return means, {}, means
    weights = torch.rand(num_classes, dtype=torch.float64) + 0.1
    anchor = simplex_etf(num_classes, in_features, dtype=torch.float64)
    column = weights[:, None]
    linear = column * (means - (column * means).sum(0) / weights.sum()) + 0.3 * anchor
    return means, {"weights": weights, "anchor": anchor, "proximity": 0.3}, linear


@pytest.mark.parametrize("adjoint", [Implicit(), Unrolled(), Detached()], ids=name)
@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize(("solver", "num_classes", "in_features"), list(cases()))
def test_frame_and_gradient_agree_with_the_differentiated_svd(
    solver, num_classes, in_features, weighted, adjoint
):
    means, options, linear = problem(num_classes, in_features, weighted)
    reference = svd_frame(linear)
    if isinstance(adjoint, Unrolled) and solver in NOT_RECORDING:
        with pytest.raises(InvalidArgumentError, match=r"records no operations; use adjoint=Implicit\(\)"):
            nearest_etf(means, solver=solver, adjoint=adjoint, **options)
        return
    bound = 1e-11 if solver in EXACT else 1e-6  # rounding; the stopping rule
    frame = nearest_etf(means, solver=solver, adjoint=adjoint, **options)
    assert relative_error(frame, reference) < bound
    if isinstance(adjoint, Detached):
        assert not frame.requires_grad
        return
    cotangent = torch.randn(num_classes, in_features, dtype=torch.float64)
    (grad,) = torch.autograd.grad(frame, means, cotangent)
    (expected,) = torch.autograd.grad(reference, means, cotangent)
    assert relative_error(grad, expected) < bound


@pytest.mark.parametrize("adjoint", [Implicit(), Unrolled()], ids=name)
@pytest.mark.parametrize("solver", RECORDING, ids=name)
def test_gradient_agrees_with_finite_differences(solver, adjoint):
    means, options, _ = problem(3, 4, weighted=True)
    # The convex solver is only as smooth as its stopping rule is strict.
    assert gradcheck(
        lambda x: nearest_etf(x, solver=solver, adjoint=adjoint, **options), means, eps=1e-4, atol=1e-5
    )


@pytest.mark.parametrize(("solver", "adjoint"), [(s, Implicit()) for s in EXACT], ids=name)
def test_second_derivative(solver, adjoint):
    means, options, _ = problem(3, 4, weighted=True)
    assert gradgradcheck(lambda x: nearest_etf(x, solver=solver, adjoint=adjoint, **options), means)


@pytest.mark.parametrize("solver", [NewtonSchulz(), SVD(), GramEigh()], ids=name)
def test_second_derivative_of_unrolled_operations(solver):
    means, options, _ = problem(3, 4, weighted=True)
    assert gradgradcheck(lambda x: nearest_etf(x, solver=solver, adjoint=Unrolled(), **options), means)
