"""The polar factor as a convex program, and the gradient that cvxpylayers takes of it."""

import sys

import pytest
import torch

from etflayers import nearest_etf
from etflayers.adjoints import Unrolled
from etflayers.errors import ConvergenceError, InvalidArgumentError, MissingDependencyError
from etflayers.solvers import SVD, ConvexHull
from etflayers.solvers.convex_hull import _layer
from etflayers.testing import means_with_condition, relative_error

pytest.importorskip("cvxpylayers")


@pytest.mark.parametrize(("num_classes", "in_features"), [(2, 1), (2, 5), (5, 4), (6, 8), (10, 16)])
@pytest.mark.parametrize("scale", [1e-6, 1.0, 1e6])
def test_frame_agrees_with_the_svd(num_classes, in_features, scale):
    linear = scale * (means_with_condition(num_classes, in_features, 10.0) + 1)
    assert relative_error(ConvexHull().solve(linear).frame, SVD().solve(linear).frame) < 1e-7


@pytest.mark.parametrize(("num_classes", "in_features"), [(3, 2), (4, 6), (10, 12)])
def test_gradient_of_cvxpylayers_agrees_with_ours(num_classes, in_features):
    # Two derivations with nothing in common: the optimality conditions of a cone program, whose derivative
    # cvxpylayers takes by a linear system, and the Sylvester equation of the polar factor.
    means = means_with_condition(num_classes, in_features, 10.0).requires_grad_()
    cotangent = torch.randn(num_classes, in_features, dtype=torch.float64)
    theirs = nearest_etf(means, solver=ConvexHull(), adjoint=Unrolled())
    ours = nearest_etf(means)
    (their_grad,) = torch.autograd.grad(theirs, means, cotangent)
    (our_grad,) = torch.autograd.grad(ours, means, cotangent)
    assert relative_error(their_grad, our_grad) < 1e-6


def test_batch_is_solved_member_by_member():
    linear = torch.randn(2, 3, 4, 6, dtype=torch.float64)
    frames = ConvexHull().frame(linear)
    assert relative_error(frames, SVD().solve(linear).frame) < 1e-7


def test_too_few_steps_are_an_error():
    with pytest.raises(ConvergenceError, match=r"ConvexHull\(.*max_steps=5\) failed: .*raise max_steps"):
        nearest_etf(means_with_condition(6, 8, 100.0), solver=ConvexHull(max_steps=5))


def test_rank_deficient_means_are_an_error():
    # The solution set is then a face of the ball, in whose interior no point is a frame.
    with pytest.raises(ConvergenceError):
        nearest_etf(torch.zeros(4, 6, dtype=torch.float64), solver=ConvexHull())


@pytest.mark.parametrize("transform", [torch.func.vmap, torch.compile], ids=["vmap", "compile"])
def test_refuses_to_be_traced(transform):
    solve = transform(lambda x: nearest_etf(x, solver=ConvexHull()))
    with pytest.raises((InvalidArgumentError, RuntimeError), match=r"ConvexHull.* needs the values"):
        solve(torch.randn(3, 4, 6))


def test_names_the_extra_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "cvxpylayers.torch", None)  # as if it were not installed
    _layer.cache_clear()
    with pytest.raises(MissingDependencyError, match=r"etflayers\[solvers\]"):
        nearest_etf(torch.randn(4, 6), solver=ConvexHull())
