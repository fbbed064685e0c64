import math

import pytest
import torch

from etflayers import nearest_etf, simplex_etf
from etflayers.errors import InvalidArgumentError, NonFiniteError
from etflayers.functional import huber_nearest_etf, mahalanobis_nearest_etf, solve_stiefel, stiefel_argmin
from etflayers.geometry import (
    centered_basis_adjoint,
    centered_basis_apply,
    etf_radius,
    is_simplex_etf,
    is_stiefel,
    project_stiefel,
    random_stiefel,
)
from etflayers.solvers import RiemannianNewton
from etflayers.status import SolveWarning, Status
from etflayers.testing import relative_error

pytestmark = pytest.mark.usefixtures("one_thread")


def distance(q, target):
    return (q - target).square().sum((-2, -1))


def start_of(dim=4, num_frames=2, batch=1, dtype=torch.float64):
    return random_stiefel(dim, num_frames, batch=(batch,), dtype=dtype)


@pytest.mark.parametrize(("num_classes", "in_features"), [(2, 1), (2, 3), (4, 3), (5, 8), (10, 64)])
def test_the_linear_objective_is_the_nearest_etf_with_its_gradient(num_classes, in_features):
    means = torch.randn(2, num_classes, in_features, dtype=torch.float64, requires_grad=True)
    start = random_stiefel(in_features, num_classes - 1, batch=(2,), dtype=torch.float64)
    if in_features == num_classes - 1:
        # O(d) has two components, and no path leads from one to the other.
        start = (centered_basis_apply(nearest_etf(means)).mT / etf_radius(num_classes)).detach()

    def linear(q, means):
        return -(q * centered_basis_apply(means).mT).sum((-2, -1))

    rotation = stiefel_argmin(linear, means, start=start)
    frame = etf_radius(num_classes) * centered_basis_adjoint(rotation.mT)
    expected = nearest_etf(means)
    assert relative_error(frame, expected) < 1e-8
    cotangent = torch.randn_like(frame)
    (grad,) = torch.autograd.grad((frame * cotangent).sum(), means)
    (exact,) = torch.autograd.grad((expected * cotangent).sum(), means)
    assert float((grad - exact).norm()) <= 1e-8 * max(float(exact.norm()), 1)


def test_mahalanobis_with_the_identity_is_the_plain_nearest_etf():
    means = torch.randn(2, 3, 5, 8, dtype=torch.float64)
    frame = mahalanobis_nearest_etf(means, torch.eye(8, dtype=torch.float64))
    assert relative_error(frame, nearest_etf(means)) < 1e-10


def test_huber_with_a_threshold_that_nobody_reaches_is_the_plain_nearest_etf():
    means = torch.randn(2, 3, 5, 8, dtype=torch.float64)
    frame = huber_nearest_etf(means, threshold=1e3)
    assert relative_error(frame, nearest_etf(means)) < 1e-10


@pytest.mark.parametrize("nearest", ["mahalanobis", "huber"])
def test_nearest_etfs_are_critical_and_better_than_their_neighbors(nearest):
    # The losses by their definitions, with the translation minimized by a general-purpose routine.
    means = torch.randn(4, 5, dtype=torch.float64)
    factor = torch.randn(5, 5, dtype=torch.float64)
    if nearest == "mahalanobis":
        frame = mahalanobis_nearest_etf(means, factor)
        size = (means - means.mean(0)).square().sum(-1).mean().sqrt()

        def rho(gaps):
            return (gaps @ factor).square().sum(-1)
    else:
        frame = huber_nearest_etf(means, threshold=0.4)
        size = (means - means.median(0).values).norm(dim=-1).median()

        def rho(gaps):
            return torch.nn.functional.huber_loss(
                gaps.norm(dim=-1), gaps.new_zeros(4), reduction="none", delta=0.4
            )

    def loss(frame):
        center = torch.zeros(5, dtype=torch.float64, requires_grad=True)
        optimizer = torch.optim.LBFGS(
            [center], max_iter=200, tolerance_grad=1e-12, line_search_fn="strong_wolfe"
        )

        def closure():
            optimizer.zero_grad()
            value = rho(means / size - frame - center).sum()
            value.backward()
            return value

        optimizer.step(closure)
        return float(closure().detach())

    assert is_simplex_etf(frame).ok
    best = loss(frame)
    for _ in range(10):
        skew = torch.randn(5, 5, dtype=torch.float64)
        neighbor = frame @ torch.linalg.matrix_exp(1e-3 * (skew - skew.mT))
        assert loss(neighbor) > best


@pytest.mark.parametrize("seed", range(3))
def test_huber_shrugs_off_corrupted_means(seed):
    generator = torch.Generator().manual_seed(seed)
    options = {"generator": generator, "dtype": torch.float64}
    frame = simplex_etf(10, 16, rotation="haar", **options)
    means = frame + 0.1 / 4 * torch.randn(10, 16, **options)
    means[:3] = 10 * torch.nn.functional.normalize(torch.randn(3, 16, **options), dim=-1)

    def error(found):
        # Of the classes that are not corrupted; a translation of all of them is free in both problems.
        gap = (found - frame)[3:]
        return float((gap - gap.mean(0)).norm())

    assert error(huber_nearest_etf(means)) < error(nearest_etf(means)) / 2


def test_the_riemannian_gradient_at_the_minimum_is_small():
    means = torch.randn(1, 5, 8, dtype=torch.float64)
    found = solve_stiefel(
        lambda q, x: (
            ((centered_basis_apply(x).mT - q) * torch.arange(1.0, 9)[:, None]).square().sum((-2, -1))
        ),
        means,
        start=start_of(8, 4),
    )
    assert found.status is Status.CONVERGED
    assert float(found.gradient_norm) <= 1e-8
    assert float(found.smallest_curvature) > 0


def test_a_start_in_a_narrower_dtype_is_first_brought_back_to_the_manifold():
    # Already the minimizer, so that no step of the solver makes up for the rounding of the start.
    start = start_of(dtype=torch.float32)
    found = solve_stiefel(distance, project_stiefel(start.double()), start=start)
    assert found.iterations == 0
    assert is_stiefel(found.point)


def test_out_of_iterations_warns_and_has_a_status():
    target, solver = torch.randn(1, 4, 2, dtype=torch.float64), RiemannianNewton(max_iterations=1)
    with pytest.warns(SolveWarning, match="raise max_iterations"):
        stiefel_argmin(distance, target, start=start_of(), solver=solver)
    assert solve_stiefel(distance, target, start=start_of(), solver=solver).status is Status.NOT_CONVERGED


def test_an_objective_that_is_not_finite_raises_and_has_a_status():
    target = torch.randn(2, 4, 2, dtype=torch.float64)
    target[1, 0, 0] = math.nan
    with pytest.raises(NonFiniteError, match="look for an overflow"):
        stiefel_argmin(distance, target, start=start_of(batch=2))
    found = solve_stiefel(distance, target, start=start_of(batch=2))
    assert found.codes.tolist() == [Status.CONVERGED, Status.NON_FINITE]
    assert found.point[0].isfinite().all()
    assert found.point[1].isnan().all()


def test_a_constant_objective_is_degenerate():
    found = solve_stiefel(lambda q: 0 * q.sum((-2, -1)), start=start_of())
    assert found.status is Status.DEGENERATE


def test_a_valley_is_degenerate_and_no_saddle():
    # Every unit vector of the plane of the smallest eigenvalue is a minimizer.
    matrix = torch.diag(torch.tensor([1.0, 1.0, 5.0], dtype=torch.float64))
    found = solve_stiefel(lambda q, a: (q * (a @ q)).sum((-2, -1)), matrix, start=start_of(3, 1))
    assert float(found.largest_curvature) == pytest.approx(8)
    assert found.status is Status.DEGENERATE


def test_a_tensor_the_objective_hides_is_an_error_not_a_missing_gradient():
    hidden = torch.randn(1, 4, 2, dtype=torch.float64, requires_grad=True)
    with pytest.raises(InvalidArgumentError, match="closes over"):
        stiefel_argmin(lambda q: distance(q, hidden), start=start_of())


@pytest.mark.parametrize(
    ("objective", "start", "message"),
    [
        (lambda q: q.sum(), start_of(), "one value for each member"),
        (lambda q: q.sum((-2, -1)).long(), start_of(), "one value for each member"),
        (lambda q: q.detach().sum((-2, -1)), start_of(), "differentiable function of Q"),
        (lambda q: q.sum((-2, -1)), 2 * start_of(), "orthonormal"),
        (lambda q: q.sum((-2, -1)), start_of()[0], r"\(batch, dim, num_frames\)"),
    ],
)
def test_bad_arguments(objective, start, message):
    with pytest.raises(InvalidArgumentError, match=message):
        stiefel_argmin(objective, start=start)


def test_an_input_that_is_no_tensor():
    with pytest.raises(InvalidArgumentError, match=r"functools\.partial"):
        stiefel_argmin(distance, 3.0, start=start_of())


@pytest.mark.parametrize("threshold", [0.0, -1.0, math.nan, math.inf])
def test_a_threshold_that_is_not_positive(threshold):
    with pytest.raises(InvalidArgumentError, match="threshold"):
        huber_nearest_etf(torch.randn(3, 4), threshold=threshold)


@pytest.mark.parametrize("factor", [torch.eye(5), torch.ones(4), torch.ones(3, 4)])
def test_a_factor_that_does_not_fit_the_features(factor):
    with pytest.raises(InvalidArgumentError, match=r"factor must have shape \(in_features, m\) = \(4, m\)"):
        mahalanobis_nearest_etf(torch.randn(3, 4), factor)


def test_the_solver_is_used():
    means, solver = torch.randn(5, 8, dtype=torch.float64), RiemannianNewton(max_iterations=1)
    factor = torch.randn(8, 8, dtype=torch.float64)
    with pytest.warns(SolveWarning, match="raise max_iterations"):
        mahalanobis_nearest_etf(means, factor, solver=solver)
    with pytest.warns(SolveWarning, match="raise max_iterations"):
        huber_nearest_etf(means, solver=solver)


def test_means_without_a_size():
    for nearest in (huber_nearest_etf, lambda x: mahalanobis_nearest_etf(x, torch.eye(4))):
        with pytest.raises(InvalidArgumentError, match="differ"):
            nearest(torch.ones(3, 4))
        with pytest.raises(NonFiniteError, match="NaN"):
            nearest(torch.full((3, 4), math.nan))


def test_torch_func_transforms_are_refused():
    start = start_of()
    with pytest.raises(InvalidArgumentError, match="batch dimension"):
        torch.func.vmap(lambda x: stiefel_argmin(distance, x, start=start))(torch.randn(3, 1, 4, 2))


def test_inference_mode():
    with torch.inference_mode():
        frame = mahalanobis_nearest_etf(torch.randn(3, 4), torch.eye(4) + 0.1 * torch.randn(4, 4))
    assert is_simplex_etf(frame).ok


def test_autocast_and_half_precision():
    means, factor = torch.randn(4, 6), torch.eye(6) + 0.2 * torch.randn(6, 6)
    expected = mahalanobis_nearest_etf(means, factor)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        torch.testing.assert_close(mahalanobis_nearest_etf(means, factor), expected, atol=1e-5, rtol=0)
    half = mahalanobis_nearest_etf(means.bfloat16(), factor)
    assert half.dtype == torch.bfloat16
    torch.testing.assert_close(half.float(), expected, atol=0.05, rtol=0)
