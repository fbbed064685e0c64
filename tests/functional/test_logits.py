"""Canonical logits against the product with the matrix they avoid."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from etflayers.errors import InvalidArgumentError
from etflayers.functional.logits import canonical_etf_logits, directions
from etflayers.geometry import simplex_etf

SIZES = [(k, d) for k in (2, 3, 10) for d in (k - 1, k, k + 7)]


@pytest.mark.parametrize(("num_classes", "in_features"), SIZES)
@pytest.mark.parametrize("leading", [(), (5,), (2, 3)])
def test_equals_the_product_with_the_frame_and_so_does_the_gradient(
    num_classes: int, in_features: int, leading: tuple[int, ...]
) -> None:
    generator = torch.Generator().manual_seed(0)
    features = torch.randn(
        *leading, in_features, generator=generator, dtype=torch.float64, requires_grad=True
    )
    cotangent = torch.randn(*leading, num_classes, generator=generator, dtype=torch.float64)
    frame = simplex_etf(num_classes, in_features, dtype=torch.float64)

    logits = canonical_etf_logits(features, num_classes)

    torch.testing.assert_close(logits, F.linear(features, frame), rtol=0, atol=1e-13)
    (grad,) = torch.autograd.grad(logits, features, cotangent)
    torch.testing.assert_close(grad, cotangent @ frame, rtol=0, atol=1e-13)
    torch.testing.assert_close(canonical_etf_logits(features, num_classes, scale=3.0), 3 * logits)


@pytest.mark.parametrize(("num_classes", "in_features"), SIZES)
def test_derivatives_in_both_modes_and_batched(num_classes: int, in_features: int) -> None:
    features = torch.randn(4, in_features, dtype=torch.float64, requires_grad=True)

    def logits(x: torch.Tensor) -> torch.Tensor:
        return canonical_etf_logits(x, num_classes, scale=2.0)

    assert torch.autograd.gradcheck(logits, features, check_forward_ad=True, check_batched_grad=True)
    assert torch.autograd.gradgradcheck(logits, features)
    torch.testing.assert_close(torch.vmap(logits)(features), logits(features))
    jacobian = torch.func.jacrev(logits)(features[0])
    torch.testing.assert_close(jacobian, torch.func.jacfwd(logits)(features[0]))
    frame = simplex_etf(num_classes, in_features, dtype=torch.float64)
    torch.testing.assert_close(jacobian, 2 * frame, rtol=0, atol=1e-13)


def test_a_direction_that_is_not_known_stays_unknown() -> None:
    rows = torch.tensor([[3.0, 4.0], [0.0, 0.0], [torch.nan, 1.0]], requires_grad=True)
    found = directions(rows)
    assert found[:2].tolist() == [[pytest.approx(0.6), pytest.approx(0.8)], [0.0, 0.0]]
    assert found[2].isnan().all()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_rounded_once_at_the_end(dtype: torch.dtype) -> None:
    # A common mean of 1000 must cancel before the result is rounded.
    features = (torch.randn(20, 12, generator=torch.Generator().manual_seed(0)) + 1000).to(dtype)

    logits = canonical_etf_logits(features, 10)

    exact = F.linear(features.double(), simplex_etf(10, 12, dtype=torch.float64))
    assert logits.dtype == dtype
    torch.testing.assert_close(logits.double(), exact, rtol=torch.finfo(dtype).eps, atol=1e-3)


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32, torch.float64])
def test_dtype_under_autocast_is_that_of_linear(dtype: torch.dtype) -> None:
    features = torch.ones(2, 5, dtype=dtype)
    with torch.autocast("cpu", torch.bfloat16):
        expected = F.linear(features, torch.ones(3, 5, dtype=dtype)).dtype
        assert canonical_etf_logits(features, 3).dtype == expected


@pytest.mark.parametrize(
    ("features", "message"),
    [
        (torch.ones(4, 1), "in_features must be at least num_classes - 1 = 2, got 1"),
        (torch.ones(()), "got a scalar"),
        (torch.ones(4, 5).long(), "features must have a real floating-point dtype"),
    ],
)
def test_bad_input_is_named(features: torch.Tensor, message: str) -> None:
    with pytest.raises(InvalidArgumentError, match=message):
        canonical_etf_logits(features, 3)
