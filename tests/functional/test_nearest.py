import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from etflayers import nearest_etf, simplex_etf
from etflayers.errors import InvalidArgumentError, NonFiniteError
from etflayers.functional import solve_nearest_etf
from etflayers.geometry import is_simplex_etf
from etflayers.solvers import SVD, GramEigh
from etflayers.status import Status
from etflayers.testing import (
    means_with_condition,
    published_anchor_weight,
    relative_error,
    trust_regions_frame,
)

SHAPES = [(2, 1), (2, 5), (3, 2), (5, 5), (10, 9), (10, 64)]


def objective(means, frame, weights=None, anchor=None, proximity=0.0):
    """The definition, with the best translation found by weighted least squares."""
    weights = means.new_ones(means.shape[-2]) if weights is None else weights
    gap = means - frame
    translation = (weights[:, None] * gap).sum(-2, keepdim=True) / weights.sum()
    value = (weights[:, None] * (gap - translation) ** 2).sum((-2, -1))
    return value if anchor is None else value + proximity * ((frame - anchor) ** 2).sum((-2, -1))


@pytest.mark.parametrize(("num_classes", "in_features"), SHAPES)
def test_agrees_with_trust_regions_on_the_published_objective(num_classes, in_features):
    pytest.importorskip("pymanopt")
    means = torch.randn(num_classes, in_features, dtype=torch.float64)
    oracle = trust_regions_frame(means)
    frame = nearest_etf(means)
    torch.testing.assert_close(frame, oracle.frame, atol=1e-5, rtol=0)
    mine, theirs = objective(means, frame), objective(means, oracle.frame)
    assert abs(mine - theirs) <= 1e-8 * theirs


@pytest.mark.parametrize(("num_classes", "in_features"), SHAPES)
@pytest.mark.parametrize("delta", [1e-3, 0.7, 20.0])
def test_agrees_with_trust_regions_with_proximity(num_classes, in_features, delta):
    pytest.importorskip("pymanopt")
    means = torch.randn(num_classes, in_features, dtype=torch.float64)
    anchor = simplex_etf(num_classes, in_features, rotation="haar", dtype=torch.float64)
    oracle = trust_regions_frame(means, anchor=anchor, delta=delta)
    options = {"anchor": anchor, "proximity": published_anchor_weight(delta, num_classes)}
    frame = nearest_etf(means, **options)
    torch.testing.assert_close(frame, oracle.frame, atol=1e-5, rtol=0)
    mine, theirs = objective(means, frame, **options), objective(means, oracle.frame, **options)
    assert abs(mine - theirs) <= 1e-8 * theirs


@pytest.mark.parametrize(("num_classes", "in_features"), SHAPES)
def test_is_a_simplex_etf(num_classes, in_features):
    frame = nearest_etf(torch.randn(3, 2, num_classes, in_features, dtype=torch.float64))
    assert is_simplex_etf(frame, atol=1e-12).ok


@given(
    seed=st.integers(0, 2**31),
    num_classes=st.integers(2, 8),
    extra=st.integers(-1, 5),
    step=st.floats(1e-4, 3.0),
    weighted=st.booleans(),
    proximity=st.sampled_from([0.0, 0.3, 5.0]),
)
def test_no_other_frame_is_nearer(seed, num_classes, extra, step, weighted, proximity):
    generator = torch.Generator().manual_seed(seed)
    in_features = num_classes + extra
    options = {"generator": generator, "dtype": torch.float64}
    means = torch.randn(num_classes, in_features, **options)
    weights = torch.rand(num_classes, **options) if weighted else None
    anchor = simplex_etf(num_classes, in_features, rotation="haar", **options) if proximity else None
    problem = {"weights": weights, "anchor": anchor, "proximity": proximity}
    frame = nearest_etf(means, **problem)
    best = objective(means, frame, **problem)
    # A frame anywhere, and a rotated neighbor of the answer.
    skew = torch.randn(in_features, in_features, **options)
    neighbor = frame @ torch.linalg.matrix_exp(step * (skew - skew.T) / in_features)
    elsewhere = simplex_etf(num_classes, in_features, rotation="haar", **options)
    for other in (neighbor, elsewhere):
        assert best <= objective(means, other, **problem) + 1e-9


def test_a_simplex_is_its_own_nearest_frame():
    frame = simplex_etf(10, 16, rotation="haar", dtype=torch.float64)
    torch.testing.assert_close(nearest_etf(3 * frame + 7), frame)


@pytest.mark.parametrize("factor", [1e-20, 1e20])
@pytest.mark.parametrize("num_classes", [10, 40])
def test_scale_and_translation_do_not_matter(factor, num_classes):
    means = torch.randn(num_classes, 64)
    expected = nearest_etf(means)
    torch.testing.assert_close(nearest_etf(means * factor), expected, atol=3e-6, rtol=0)
    torch.testing.assert_close(nearest_etf(means.double() + 1e3), expected.double(), atol=3e-6, rtol=0)


def test_batch_equals_loop():
    means = torch.randn(2, 3, 5, 7, dtype=torch.float64)
    weights = torch.rand(3, 5, dtype=torch.float64)
    anchor = simplex_etf(5, 7, dtype=torch.float64)
    proximity = torch.rand(2, 3, dtype=torch.float64)
    frames = nearest_etf(means, weights=weights, anchor=anchor, proximity=proximity)
    for i in range(2):
        for j in range(3):
            one = nearest_etf(
                means[i, j], weights=weights[j], anchor=anchor, proximity=float(proximity[i, j])
            )
            torch.testing.assert_close(frames[i, j], one)


def test_equal_weights_change_nothing_and_a_zero_weight_removes_a_class():
    means = torch.randn(5, 7, dtype=torch.float64)
    torch.testing.assert_close(
        nearest_etf(means, weights=torch.full((5,), 0.2, dtype=torch.float64)), nearest_etf(means)
    )
    weights = torch.tensor([1.0, 1.0, 1.0, 1.0, 0.0], dtype=torch.float64)
    moved = means.clone()
    moved[4] += 100
    anchor = simplex_etf(5, 7, dtype=torch.float64)
    options = {"weights": weights, "anchor": anchor, "proximity": 0.1}
    torch.testing.assert_close(nearest_etf(means, **options), nearest_etf(moved, **options))


def test_large_proximity_returns_the_anchor():
    anchor = simplex_etf(4, 6, rotation="haar", dtype=torch.float64)
    means = torch.randn(4, 6, dtype=torch.float64)
    torch.testing.assert_close(nearest_etf(means, anchor=anchor, proximity=1e12), anchor)


def test_anchor_decides_where_means_coincide():
    anchor = simplex_etf(4, 6, rotation="haar", dtype=torch.float64)
    means = torch.ones(4, 6, dtype=torch.float64)
    torch.testing.assert_close(nearest_etf(means, anchor=anchor, proximity=1e-3), anchor)


def test_record_tells_status_spread_and_residual_for_each_member():
    means = torch.randn(4, 5, 6, dtype=torch.float64)
    means[1] = 0
    means[2, 3] = means[2, 0]
    means[3, 0, 0] = torch.nan
    solution = solve_nearest_etf(means)
    assert solution.codes.tolist() == [
        Status.CONVERGED,
        Status.RANK_DEFICIENT,
        Status.RANK_DEFICIENT,
        Status.NON_FINITE,
    ]
    assert solution.status is Status.NON_FINITE
    assert "NaN or infinity" in solution.message
    kappa = torch.linalg.cond(means[0] - means[0].mean(0), p=2)  # K x d, rank K - 1: largest over zero
    values = torch.linalg.svdvals(means[0] - means[0].mean(0))
    assert kappa > 1e10
    torch.testing.assert_close(solution.spread[0], values[0] / values[3])
    assert solution.spread[1:3].tolist() == [torch.inf, torch.inf]
    assert (solution.residual[:3] < 1e-12).all()
    assert solution.frame[3].isnan().all()
    assert is_simplex_etf(solution.frame[:3]).ok
    assert is_simplex_etf(solve_nearest_etf(means[:3]).frame).ok


def test_record_has_the_same_frame_and_gradient():
    means = torch.randn(5, 6, dtype=torch.float64, requires_grad=True)
    cotangent = torch.randn(5, 6, dtype=torch.float64)
    (mine,) = torch.autograd.grad(solve_nearest_etf(means).frame, means, cotangent)
    (theirs,) = torch.autograd.grad(nearest_etf(means), means, cotangent)
    torch.testing.assert_close(mine, theirs)


class Stubborn:
    """A solver that returns something else than what it found."""

    def __init__(self, instead):
        self.instead = instead

    def solve(self, linear, precision=None):
        state = SVD().solve(linear, precision)
        return state._replace(frame=self.instead(state.frame))


def test_record_keeps_the_gradients_of_members_apart():
    means = torch.randn(2, 5, 6, dtype=torch.float64)
    means[1, 0, 0] = torch.inf
    means.requires_grad_()
    cotangent = torch.randn(5, 6, dtype=torch.float64)
    (grad,) = torch.autograd.grad(solve_nearest_etf(means).frame[0], means, cotangent)
    (alone,) = torch.autograd.grad(nearest_etf(means[0]), means, cotangent)
    torch.testing.assert_close(grad[0], alone[0])
    assert not grad[1].any()


def test_residual_sees_a_frame_that_is_not_optimal_in_any_unit():
    solver = Stubborn(lambda frame: simplex_etf(5, 6, dtype=torch.float64))
    means = torch.randn(5, 6, dtype=torch.float64)
    residual = solve_nearest_etf(means, solver=solver).residual
    assert residual > 1e-2
    torch.testing.assert_close(solve_nearest_etf(1e3 * means, solver=solver).residual, residual)


def test_residual_sees_a_frame_that_is_too_long():
    # R = 1.1 times the polar factor: BR' stays symmetric, and |RR' - I| / sqrt(K - 1) = 1.1^2 - 1.
    means = torch.randn(5, 6, dtype=torch.float64)
    solution = solve_nearest_etf(means, solver=Stubborn(lambda frame: 1.1 * frame))
    assert float(solution.residual) == pytest.approx(0.21)


def test_means_far_from_a_simplex_are_not_deficient():
    solution = solve_nearest_etf(means_with_condition(5, 8, 1e10))
    assert solution.status is Status.CONVERGED
    assert float(solution.spread) == pytest.approx(1e10, rel=1e-4)


def test_a_large_mean_common_to_all_classes_does_not_cancel_digits_in_float32():
    means = torch.randn(5, 8).mul(1024).round() / 1024 + 4096  # both summands exact in float32
    weights = torch.tensor([1.0, 0.7, 0.3, 2.0, 0.1])
    exact = nearest_etf(means.double(), weights=weights.double())
    assert relative_error(nearest_etf(means, weights=weights), exact) < 1e-5


MEANS = torch.randn(4, 6)


@pytest.mark.parametrize(
    ("means", "options", "message"),
    [
        (torch.randn(6), {}, r"means must have shape \(.*\), one row .*, got \(6,\)"),
        (torch.randn(1, 6), {}, "num_classes must be at least 2, got 1"),
        (torch.randn(6, 4), {}, "in_features must be at least num_classes - 1 = 5, got 4"),
        (torch.ones(4, 6, dtype=torch.int64), {}, "means must have a real floating-point dtype"),
        (MEANS, {"weights": torch.ones(3)}, r"weights must have shape .* = \(..., 4\), got \(3,\)"),
        (MEANS, {"weights": -torch.ones(4)}, "weights must not be negative"),
        (MEANS, {"weights": torch.tensor([1.0, 1.0, 1.0, torch.nan])}, "weights must not be negative or NaN"),
        (MEANS, {"weights": torch.ones(4).long()}, "weights must have a real floating-point dtype"),
        (MEANS, {"proximity": 1.0}, "anchor is needed with proximity=1.0"),
        (MEANS, {"proximity": torch.tensor(1.0)}, "anchor is needed"),
        (MEANS, {"proximity": -1.0, "anchor": MEANS}, "proximity must be a finite number >= 0, got -1.0"),
        (MEANS, {"proximity": math.inf, "anchor": MEANS}, "proximity must be a finite number >= 0, got inf"),
        (MEANS, {"proximity": torch.tensor(-1.0), "anchor": MEANS}, "proximity must not be negative"),
        (MEANS, {"proximity": torch.tensor(1), "anchor": MEANS}, "proximity must have a real floating-point"),
        (MEANS, {"proximity": 1.0, "anchor": MEANS.long()}, "anchor must have a real floating-point dtype"),
        (MEANS, {"proximity": 1.0, "anchor": MEANS.T}, r"anchor must have shape .* got \(6, 4\)"),
    ],
)
def test_bad_arguments_are_named(means, options, message):
    with pytest.raises(InvalidArgumentError, match=message):
        nearest_etf(means, **options)


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
def test_non_finite_means_raise(value):
    means = torch.randn(4, 6)
    means[2, 3] = value
    with pytest.raises(NonFiniteError, match="NaN or infinity"):
        nearest_etf(means)


@pytest.mark.parametrize("solver", [SVD(), GramEigh()], ids=repr)
def test_solver_is_used(solver):
    means = torch.randn(5, 8, dtype=torch.float64)
    torch.testing.assert_close(nearest_etf(means, solver=solver), nearest_etf(means))
