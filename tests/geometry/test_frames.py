import math

import pytest
import torch
from scipy import stats

from etflayers import simplex_etf
from etflayers.errors import InvalidArgumentError
from etflayers.geometry import (
    centered,
    centered_basis_adjoint,
    centered_basis_apply,
    is_simplex_etf,
    random_stiefel,
    require_etf_dims,
)

SHAPES = [(2, 1), (2, 7), (3, 2), (5, 4), (5, 5), (5, 6), (100, 99), (100, 128)]


def gram_of_simplex(num_classes, dtype=torch.float64):
    off = torch.full((num_classes, num_classes), -1 / (num_classes - 1), dtype=dtype)
    return off.fill_diagonal_(1)


@pytest.mark.parametrize(("num_classes", "in_features"), SHAPES)
@pytest.mark.parametrize("rotation", ["canonical", "haar"])
def test_rows_are_unit_and_equiangular(num_classes, in_features, rotation):
    frame = simplex_etf(num_classes, in_features, rotation=rotation, dtype=torch.float64)
    assert frame.shape == (num_classes, in_features)
    torch.testing.assert_close(frame @ frame.T, gram_of_simplex(num_classes), atol=1e-12, rtol=0)
    assert is_simplex_etf(frame).ok


@pytest.mark.parametrize("in_features", [4, 6])
def test_canonical_frame_is_the_centered_identity_and_zero_columns(in_features):
    k = 4
    expected = math.sqrt(k / (k - 1)) * (torch.eye(k) - 1 / k)
    frame = simplex_etf(k, in_features)
    torch.testing.assert_close(frame[:, :k], expected)
    assert torch.equal(frame[:, k:], torch.zeros(k, in_features - k))


def test_given_rotation_is_used_with_its_dtype():
    rotation = random_stiefel(7, 3, dtype=torch.float64)
    frame = simplex_etf(4, 7, rotation=rotation)
    assert frame.dtype == torch.float64
    assert is_simplex_etf(frame).ok
    # The frame spans the columns of the rotation and nothing else.
    torch.testing.assert_close(frame @ rotation @ rotation.T, frame)
    assert simplex_etf(4, 7, rotation=rotation, dtype=torch.float32).dtype == torch.float32


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
def test_every_floating_dtype_passes_its_own_tolerance(dtype):
    frame = simplex_etf(10, 16, rotation="haar", dtype=dtype)
    assert frame.dtype == dtype
    assert is_simplex_etf(frame).ok


def test_haar_rotation_is_uniform_on_the_sphere():
    # A row of a Haar frame is uniform on the sphere of R^d; in R^3 its coordinates are uniform on [-1, 1]
    # (Archimedes). QR without the sign correction fails this test.
    generator = torch.Generator().manual_seed(0)
    rows = torch.stack(
        [simplex_etf(3, 3, rotation="haar", generator=generator, dtype=torch.float64)[0] for _ in range(2000)]
    )
    for coordinate in rows.T:
        assert stats.kstest(coordinate.numpy(), "uniform", args=(-1, 2)).pvalue > 1e-3


def test_haar_rotation_reaches_both_orientations():
    generator = torch.Generator().manual_seed(0)
    determinants = [float(torch.linalg.det(random_stiefel(3, 3, generator=generator))) for _ in range(400)]
    positive = sum(d > 0 for d in determinants)
    assert stats.binomtest(positive, 400).pvalue > 1e-3


def test_generator_makes_the_frame_repeatable():
    draw = lambda: simplex_etf(5, 9, rotation="haar", generator=torch.Generator().manual_seed(7))  # noqa: E731
    assert torch.equal(draw(), draw())


@pytest.mark.parametrize("num_classes", [2, 3, 10, 101])
def test_centered_basis_is_orthonormal_and_orthogonal_to_one(num_classes):
    basis = centered_basis_apply(torch.eye(num_classes, dtype=torch.float64))
    identity = torch.eye(num_classes - 1, dtype=torch.float64)
    torch.testing.assert_close(basis @ basis.T, identity)
    assert basis.sum(1).abs().max() < 1e-13
    torch.testing.assert_close(centered_basis_adjoint(identity), basis.T)


def test_centered_rows_are_the_rows_less_their_mean_and_what_the_basis_sees():
    rows = torch.randn(2, 5, 3, dtype=torch.float64) + 10
    torch.testing.assert_close(centered(rows), rows - rows.mean(-2, keepdim=True))
    torch.testing.assert_close(centered(rows), centered_basis_adjoint(centered_basis_apply(rows)))


def test_centered_basis_ignores_a_large_common_translation_in_float32():
    rows = torch.randn(6, 8)
    shifted = (rows * 1024).round() / 1024 + 4096  # both summands exact in float32
    exact = centered_basis_apply(shifted.double())
    error = (centered_basis_apply(shifted).double() - exact).abs().max()
    assert error < 1e-6  # summing 4096-sized rows would lose 5e-4


@pytest.mark.parametrize(
    ("arguments", "options", "message"),
    [
        ((1, 4), {}, "num_classes must be at least 2, got 1"),
        ((5, 3), {}, "in_features must be at least num_classes - 1 = 4, got 3"),
        ((3, 4), {"dtype": torch.int64}, "dtype must have a real floating-point dtype"),
        ((3, 4), {"dtype": torch.complex64}, "dtype must have a real floating-point dtype"),
        ((3, 4), {"rotation": "random"}, "rotation must be 'canonical', 'haar' or a tensor"),
        ((3, 4), {"rotation": torch.eye(4)}, r"rotation must have shape .* = \(4, 2\)"),
        ((3, 4), {"rotation": torch.eye(2, 4)}, r"rotation must have shape .* = \(4, 2\), got \(2, 4\)"),
        ((3, 4), {"rotation": torch.eye(4, 2).long()}, "rotation must have a real floating-point dtype"),
        ((3, 4), {"rotation": 2 * torch.eye(4, 2)}, "rotation must have orthonormal columns"),
    ],
)
def test_bad_arguments_are_named(arguments, options, message):
    with pytest.raises(InvalidArgumentError, match=message):
        simplex_etf(*arguments, **options)


def test_require_etf_dims_accepts_the_smallest_space():
    require_etf_dims(4, 3)


@pytest.mark.parametrize(
    ("frame", "reason"),
    [
        (2 * simplex_etf(3, 3), "row norms differ from 1 by up to 3 "),
        (0.5 * simplex_etf(3, 3), "row norms differ from 1 by up to 0.75 "),
        (torch.eye(3), "inner products"),
        (torch.eye(4, 2), "no simplex ETF has 4 rows in 2 dimensions"),
        (torch.ones(1, 3), "no simplex ETF has 1 rows in 3 dimensions"),
        (torch.full((3, 3), torch.nan), "NaN"),
    ],
)
def test_predicate_says_what_is_wrong(frame, reason):
    check = is_simplex_etf(frame)
    assert not check.ok
    assert reason in check.reason


def test_predicate_refuses_a_vector():
    with pytest.raises(InvalidArgumentError, match=r"frame must have shape \(..., K, d\), got \(3,\)"):
        is_simplex_etf(torch.ones(3))


def test_predicate_takes_batches():
    frames = torch.stack([simplex_etf(4, 6, rotation="haar") for _ in range(3)])
    assert is_simplex_etf(frames).ok
    frames[1, 0] *= 1.01
    assert not is_simplex_etf(frames).ok


def test_predicate_measures_an_angle_that_is_too_large_as_one_that_is_too_small():
    # Two pairs of four vertices pushed apart by x, which moves all other pairs together by x / 2.
    x = 1e-3
    pushed = torch.tensor([[0, -x, x / 2, x / 2], [-x, 0, x / 2, x / 2]] * 2, dtype=torch.float64)
    pushed[2:] = pushed[:2].roll(2, dims=1)
    values, vectors = torch.linalg.eigh(gram_of_simplex(4) + pushed)
    frame = vectors * values.clamp_min(0).sqrt()
    assert is_simplex_etf(frame, atol=1.01 * x)
    assert "by up to 0.001 (atol 0.00075)" in is_simplex_etf(frame, atol=0.75 * x).reason
