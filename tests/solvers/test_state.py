"""Every kind of state answers alike, and survives being taken apart for an autograd node."""

import pytest
import torch

from etflayers.functional.nearest import frame_of
from etflayers.solvers import QRSVD, SVD, ByRegime, GramEigh, GramRoot, NewtonSchulz
from etflayers.testing import means_with_condition, relative_error

SOLVERS = [SVD(), QRSVD(), GramEigh(), GramRoot(), NewtonSchulz(), ByRegime()]


@pytest.mark.parametrize("solver", SOLVERS, ids=lambda solver: type(solver).__name__)
@pytest.mark.parametrize("skew", [True, False])
def test_answers_are_those_of_an_svd(solver, skew):
    linear = torch.stack([means_with_condition(5, 8, kappa) for kappa in (1.0, 20.0)])
    state, exact = solver.solve(linear), SVD().solve(linear)
    rhs = torch.randn(2, 5, 5, dtype=torch.float64)
    rhs = rhs - rhs.mT if skew else rhs + rhs.mT
    rhs = rhs - rhs.mean(-1, keepdim=True)
    rhs = rhs - rhs.mean(-2, keepdim=True)
    rows = torch.randn(2, 5, 3, dtype=torch.float64)
    rows = rows - rows.mean(-2, keepdim=True)
    torch.testing.assert_close(state.frame, exact.frame)
    found = state.solve_sylvester(rhs, skew=skew)
    torch.testing.assert_close(found, exact.solve_sylvester(rhs))
    root = (linear - linear.mean(-2, keepdim=True)) @ exact.frame.mT
    torch.testing.assert_close(root @ found + found @ root, rhs)
    torch.testing.assert_close(state.pseudo_inverse(rows), 5 / 4 * torch.linalg.pinv(root, rtol=1e-9) @ rows)
    again = state.form(*state.tensors())
    assert torch.equal(again.frame, state.frame)
    assert torch.equal(again.solve_sylvester(rhs, skew=skew), found)
    assert torch.equal(again.pseudo_inverse(rows), state.pseudo_inverse(rows))


@pytest.mark.parametrize("solver", [*SOLVERS, None], ids=lambda solver: type(solver).__name__)
@pytest.mark.parametrize("num_classes", [5, 40])
def test_a_wide_linear_form_of_narrow_data(solver, num_classes):
    # An anchor of weight 1e-3, of which rounding the sum to float32 would leave four digits.
    linear = means_with_condition(num_classes, 64, 1e3).requires_grad_()
    cotangent = torch.randn(num_classes, 64, dtype=torch.float64)
    before = linear.detach().clone()
    frame = frame_of(linear, solver=solver, precision=torch.float32)
    assert frame.dtype == torch.float64
    exact = frame_of(linear, solver=SVD())
    assert relative_error(frame, exact) < 1e-8
    (mine,), (theirs,) = (torch.autograd.grad(f, linear, cotangent) for f in (frame, exact))
    assert relative_error(mine, theirs) < 1e-8
    assert torch.equal(linear.detach(), before)


@pytest.mark.parametrize("solver", [None, SVD(), GramRoot()], ids=lambda solver: type(solver).__name__)
def test_the_rounding_of_narrow_data_is_not_taken_for_rank(solver):
    # The third row is the mean of the others but for its rounding to float32, by which nobody may divide.
    means = torch.randn(4, 8)
    means[2] = (means[0] + means[1] + means[3]) / 3
    linear = means.double().requires_grad_()
    frame = frame_of(linear, solver=solver, precision=torch.float32)
    (grad,) = torch.autograd.grad(frame, linear, torch.randn(4, 8, dtype=torch.float64))
    assert float(grad.norm()) < 100
