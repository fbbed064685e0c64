"""General Stiefel solvers put to work on the polar factor, and the check that all answers pass."""

import pytest
import torch

from etflayers import nearest_etf, simplex_etf
from etflayers.errors import ConvergenceError, InvalidArgumentError
from etflayers.geometry import centered_basis_adjoint, centered_basis_apply, etf_radius
from etflayers.solvers import SVD, Iterative, RiemannianDescent, RiemannianNewton, TrustRegions, state_of
from etflayers.testing import means_with_condition, relative_error

SOLVERS = [RiemannianNewton(), RiemannianDescent(learning_rate=0.5), TrustRegions()]


@pytest.mark.parametrize("solver", SOLVERS, ids=lambda solver: type(solver).__name__)
@pytest.mark.parametrize("flip", [1.0, -1.0])
def test_rotations_and_reflections_are_both_found(solver, flip):
    # d = K - 1: the manifold has two components, and no iteration passes from one to the other.
    linear = means_with_condition(5, 4, 5.0)
    linear[:, 0] *= flip
    assert relative_error(Iterative(solver=solver).solve(linear).frame, SVD().solve(linear).frame) < 1e-6


@pytest.mark.parametrize("solver", SOLVERS, ids=lambda solver: type(solver).__name__)
def test_batches_and_scales(solver):
    linear = torch.randn(2, 3, 5, 7) * torch.tensor([1e-6, 1.0, 1e6])[:, None, None]
    assert relative_error(Iterative(solver=solver).solve(linear).frame, SVD().solve(linear).frame) < 1e-6


@pytest.mark.parametrize(
    "solver",
    [RiemannianDescent(max_iterations=2), RiemannianNewton(max_iterations=1), TrustRegions(max_iterations=1)],
    ids=lambda solver: type(solver).__name__,
)
def test_stopping_early_is_an_error(solver):
    with pytest.raises(ConvergenceError, match=r"solver=Iterative\(.* ended after . iterations: "):
        nearest_etf(means_with_condition(10, 20, 50.0), solver=Iterative(solver=solver))


def test_refuses_to_be_traced():
    with pytest.raises(InvalidArgumentError, match=r"solver=Iterative\(\) needs the values"):
        torch.func.vmap(lambda x: nearest_etf(x, solver=Iterative()))(torch.randn(3, 4, 6))


def saddle(linear, signs):
    """The critical point whose singular vectors are paired with these signs; all + is the maximizer."""
    left, _, right = torch.linalg.svd(centered_basis_apply(linear), full_matrices=False)
    return etf_radius(len(linear)) * centered_basis_adjoint((left * signs) @ right)


@pytest.mark.parametrize("signs", [[1, 1, -1], [-1, 1, 1], [-1, -1, -1]])
def test_a_state_is_refused_at_a_saddle_or_a_minimum(signs):
    linear = means_with_condition(4, 6, 10.0)
    with pytest.raises(ConvergenceError, match="not the nearest simplex ETF"):
        state_of(saddle(linear, torch.tensor(signs)), linear)


def test_a_state_is_refused_for_another_frame_and_for_no_frame():
    linear = means_with_condition(4, 6, 10.0)
    for wrong in (
        simplex_etf(4, 6, dtype=torch.float64),
        1.001 * SVD().solve(linear).frame,
        linear * torch.nan,
    ):
        with pytest.raises(ConvergenceError, match="not the nearest simplex ETF"):
            state_of(wrong, linear)


@pytest.mark.parametrize(("num_classes", "in_features"), [(2, 1), (5, 4), (5, 9), (40, 48)])
@pytest.mark.parametrize("rank", [None, 1])
def test_the_state_of_a_frame_is_that_of_the_svd(num_classes, in_features, rank):
    linear = torch.randn(num_classes, in_features, dtype=torch.float64)
    if rank is not None:
        linear = linear[:, :rank] @ torch.randn(rank, in_features, dtype=torch.float64)
    svd = SVD().solve(linear)
    found = state_of(svd.frame, linear)
    rhs = torch.randn(num_classes, num_classes, dtype=torch.float64)

    torch.testing.assert_close(found.inverse, svd.inverse)
    torch.testing.assert_close(found.solve_sylvester(rhs), svd.solve_sylvester(rhs))
