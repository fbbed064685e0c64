"""Zero non-finite gradients, whatever the means: ties, exact simplices, duplicates, unseen classes."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from etflayers import nearest_etf, simplex_etf
from etflayers.functional import solve_nearest_etf
from etflayers.geometry import is_simplex_etf
from etflayers.status import Status

KINDS = ["generic", "exact simplex", "ties", "duplicated class", "all equal", "zero", "integers", "one seen"]


def draw_means(kind, num_classes, in_features, scale, offset, dtype, generator):
    options = {"generator": generator, "dtype": torch.float64}
    means = torch.randn(num_classes, in_features, **options)
    if kind == "exact simplex":
        means = simplex_etf(num_classes, in_features, rotation="haar", **options)
    elif kind == "ties":
        means = simplex_etf(num_classes, in_features, dtype=torch.float64)
        means[0] *= 2
    elif kind == "duplicated class":
        means[-1] = means[0]
    elif kind == "all equal":
        means[:] = means[0]
    elif kind == "zero":
        means[:] = 0
    elif kind == "integers":
        means = means.round()
    elif kind == "one seen":
        means[1:] = 0
    return ((means + offset) * scale).to(dtype)


@settings(max_examples=1200)
@given(
    kind=st.sampled_from(KINDS),
    num_classes=st.integers(2, 9),
    extra=st.integers(-1, 6),
    scale=st.sampled_from([1e-20, 1e-6, 1.0, 1e6, 1e20]),
    offset=st.sampled_from([0.0, 0.0, 1.0, 100.0]),
    dtype=st.sampled_from([torch.float32, torch.float64]),
    unseen=st.integers(0, 3),
    batched=st.booleans(),
    seed=st.integers(0, 2**31),
)
def test_frame_is_a_simplex_and_gradient_is_finite(
    kind, num_classes, extra, scale, offset, dtype, unseen, batched, seed
):
    generator = torch.Generator().manual_seed(seed)
    in_features = num_classes + extra
    means = draw_means(kind, num_classes, in_features, scale, offset, dtype, generator)
    if batched:
        means = torch.stack([means, torch.randn(num_classes, in_features, generator=generator).to(dtype)])
    means.requires_grad_()
    weights = None
    if unseen:
        weights = torch.ones(num_classes, dtype=dtype)
        weights[:unseen] = 0
        weights.requires_grad_()
    frame = nearest_etf(means, weights=weights)
    assert is_simplex_etf(frame).ok
    cotangent = torch.randn(frame.shape, generator=generator).to(dtype)
    inputs = [means] if weights is None else [means, weights]
    for grad in torch.autograd.grad(frame, inputs, cotangent):
        assert grad.isfinite().all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_gradient_at_rank_deficiency_is_the_minimum_norm_one(dtype):
    # Means confined to a plane of R^6: directions that leave the plane determine nothing and get no gradient;
    # within the plane the gradient is the limit of the full-rank one.
    num_classes, in_features = 4, 6
    means = torch.zeros(num_classes, in_features, dtype=dtype)
    means[:, :2] = torch.randn(num_classes, 2, dtype=dtype)
    assert solve_nearest_etf(means).status is Status.RANK_DEFICIENT
    means.requires_grad_()
    cotangent = torch.randn(num_classes, in_features, dtype=dtype)
    (grad,) = torch.autograd.grad(nearest_etf(means), means, cotangent)
    assert grad.isfinite().all()
    assert grad.abs().max() < 1e3
    # A cotangent that only asks about the absent directions, seen from the absent classes, moves nothing.
    left, _, right = torch.linalg.svd((means - means.mean(0)).detach())
    absent = left[:, 2:3] @ right[3:4]
    (nothing,) = torch.autograd.grad(nearest_etf(means), means, absent)
    assert nothing.abs().max() < 1e-5


def test_simple_zero_singular_value_is_differentiable_for_square_factors():
    # d = K - 1: one vanishing singular value leaves the polar factor smooth; no direction may be dropped.
    torch.manual_seed(3)
    means = torch.randn(3, 2, dtype=torch.float64)
    means[2] = (means[0] + means[1]) / 2  # collinear: rank 1 of 2
    means.requires_grad_()
    cotangent = torch.randn(3, 2, dtype=torch.float64)
    frame = nearest_etf(means)
    (grad,) = torch.autograd.grad(frame, means, cotangent)
    step, direction = 1e-6, torch.randn(3, 2, dtype=torch.float64)
    # The two sides of the zero have factors of opposite determinant; stay on the side that was returned.
    difference = [
        (cotangent * (nearest_etf(means.detach() + s * step * direction) - frame.detach())).sum() / (s * step)
        for s in (1, -1)
    ]
    expected = (grad * direction).sum()
    assert min(abs(float(d - expected)) for d in difference) < 1e-4 * float(expected.abs() + 1)
