import pytest
import torch
from scipy import linalg

from etflayers.errors import InvalidArgumentError
from etflayers.geometry import (
    is_simplex_etf,
    is_stiefel,
    project_stiefel,
    project_tangent,
    random_stiefel,
    retract_stiefel,
)


def test_projection_is_the_polar_factor():
    matrix = torch.randn(3, 7, 4, dtype=torch.float64)
    for one, projected in zip(matrix, project_stiefel(matrix), strict=True):
        factor, _ = linalg.polar(one.numpy())
        torch.testing.assert_close(projected, torch.from_numpy(factor))


def test_projection_is_nearest():
    matrix = torch.randn(6, 3, dtype=torch.float64)
    best = (project_stiefel(matrix) - matrix).norm()
    others = random_stiefel(6, 3, batch=(500,), dtype=torch.float64)
    assert best <= (others - matrix).norm(dim=(-2, -1)).min()


def test_tangent_projection_is_idempotent_orthogonal_and_tangent():
    point = random_stiefel(7, 3, dtype=torch.float64)
    vector = torch.randn(7, 3, dtype=torch.float64)
    tangent = project_tangent(point, vector)
    torch.testing.assert_close(project_tangent(point, tangent), tangent)
    torch.testing.assert_close(point.T @ tangent, -(tangent.T @ point))
    other = project_tangent(point, torch.randn(7, 3, dtype=torch.float64))
    assert abs(float(((vector - tangent) * other).sum())) < 1e-12


@pytest.mark.parametrize(("method", "order"), [("polar", 3), ("qr", 2)])
def test_retraction_follows_the_geodesic(method, order):
    # Against the matrix exponential, on a square point where the geodesic is Q expm(t Q'xi).
    point = random_stiefel(4, 4, dtype=torch.float64)
    tangent = project_tangent(point, torch.randn(4, 4, dtype=torch.float64))

    def gap(step):
        geodesic = point @ torch.linalg.matrix_exp(step * point.T @ tangent)
        return float((retract_stiefel(point, step * tangent, method=method) - geodesic).norm())

    assert is_stiefel(retract_stiefel(point, tangent, method=method)).ok
    assert gap(1e-3) < 1.2 * gap(2e-3) / 2**order


def test_random_points_are_on_the_manifold_in_batches():
    points = random_stiefel(5, 2, batch=(4, 3), dtype=torch.float64)
    assert points.shape == (4, 3, 5, 2)
    assert is_stiefel(points).ok


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: random_stiefel(2, 3), "num_frames must be in 1..dim = 2, got 3"),
        (lambda: random_stiefel(2, 0), "num_frames must be in 1..dim = 2, got 0"),
        (lambda: random_stiefel(3, 2, dtype=torch.int64), "dtype must have a real floating-point dtype"),
        (lambda: project_tangent(torch.eye(3, 2), torch.ones(4, 3, 2)), r"vector must .* got \(4, 3, 2\)"),
        (lambda: retract_stiefel(torch.eye(3, 2), torch.ones(4, 3, 2)), r"tangent must .* got \(4, 3, 2\)"),
        (lambda: project_stiefel(torch.randn(2, 3)), "matrix must have shape"),
        (lambda: project_stiefel(torch.ones(3, 2, dtype=torch.int64)), "matrix must have a real floating"),
        (lambda: project_tangent(torch.eye(3, 2), torch.eye(3)), "vector must have the shape of point"),
        (lambda: retract_stiefel(torch.eye(3, 2), torch.eye(3)), "tangent must have the shape of point"),
        (lambda: retract_stiefel(torch.eye(3, 2), torch.eye(3, 2), method="exp"), "method must be"),
    ],
)
def test_bad_arguments_are_named(call, message):
    with pytest.raises(InvalidArgumentError, match=message):
        call()


@pytest.mark.parametrize(
    ("point", "reason"),
    [
        (torch.eye(2, 3), "shape (2, 3)"),
        (torch.ones(3), "shape (3,)"),
        (2 * torch.eye(3), "identity by up to 3 "),
        (0.5 * torch.eye(3), "identity by up to 0.75 "),
        (torch.full((3, 2), torch.inf), "NaN"),
    ],
)
def test_predicate_says_what_is_wrong(point, reason):
    check = is_stiefel(point)
    assert not check.ok
    assert reason in check.reason


def test_predicate_takes_a_tolerance():
    point = torch.diag(torch.tensor([1.0, 1.0, 1.05]))  # Q'Q differs from I by 0.1025
    assert is_stiefel(point, atol=0.11)
    assert not is_stiefel(point, atol=0.1)


def test_predicate_measures_in_float64_whatever_the_dtype():
    # The square of 1 + 2^-13 differs from 1 by 2^-12 + 2^-26, of which float32 would drop the last term.
    point = torch.tensor([[1 + 2**-13]], dtype=torch.float32)
    assert not is_stiefel(point, atol=2**-12)
    assert not is_simplex_etf(torch.cat((point, -point)), atol=2**-12)


@pytest.mark.parametrize(
    ("dtype", "deviation"),
    [(torch.float64, 1e-9), (torch.float32, 1e-3), (torch.float16, 0.1), (torch.bfloat16, 0.3)],
)
def test_predicate_refuses_what_rounding_to_a_dtype_does_not_explain(dtype, deviation):
    # Each deviation is tens of units in the last place or more; rounding a point leaves a few.
    assert is_stiefel(random_stiefel(100, 50, dtype=dtype))
    column = torch.tensor([[1 + deviation], [0]], dtype=dtype)
    assert not is_stiefel(column)
