"""The frozen projector against the two matrices with which it is published."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from etflayers.errors import InvalidArgumentError
from etflayers.functional import etf_projection
from etflayers.nn import ETFProjector


def published(width: int, dtype: torch.dtype) -> nn.Module:
    """Two linear layers without bias, d -> 4d -> d, each with the weight c (eye - 1/d)."""
    layers = nn.Sequential(
        nn.Linear(width, 4 * width, bias=False), nn.ReLU(), nn.Linear(4 * width, width, bias=False)
    ).to(dtype)
    for layer in (layers[0], layers[2]):
        shape = layer.weight.shape
        matrix = (width / (width - 1)) ** 0.5 * (torch.eye(*shape, dtype=dtype) - 1 / width)
        layer.weight = nn.Parameter(matrix, requires_grad=False)
    return layers


def features(width: int, dtype: torch.dtype, kind: str) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    rows = torch.randn(3, 11, width, generator=generator, dtype=torch.float64).to(dtype)
    return {"any": rows, "after a ReLU": rows.relu() + torch.arange(width) ** 1.5 / 9, "negative": rows - 5}[
        kind
    ]


@pytest.mark.parametrize("width", [2, 3, 64])
@pytest.mark.parametrize("kind", ["any", "after a ReLU", "negative"])
def test_it_is_the_two_matrices(width: int, kind: str) -> None:
    """The oracle in float64; the layer in both precisions."""
    for dtype, tolerance in ((torch.float64, 1e-13), (torch.float32, 1e-6)):
        rows = features(width, dtype, kind).requires_grad_()
        expected = F.normalize(published(width, torch.float64)(rows.double()), dim=-1, eps=1e-8)
        found = ETFProjector(width)(rows)
        torch.testing.assert_close(found, expected.to(dtype), rtol=0, atol=tolerance)
        weights = torch.linspace(-1, 1, width, dtype=torch.float64)
        gradients = [
            torch.autograd.grad((out.double() @ weights).sum(), rows)[0] for out in (found, expected)
        ]
        torch.testing.assert_close(
            *gradients, rtol=0, atol=20 * (1 + float(gradients[1].abs().max())) * tolerance
        )


def test_derivatives_precision_and_what_has_no_direction() -> None:
    rows = features(5, torch.float64, "any")[0].requires_grad_()
    assert torch.autograd.gradcheck(etf_projection, rows, check_forward_ad=True)
    layer = ETFProjector(5)
    assert not layer.state_dict()
    assert not list(layer.parameters())
    half = layer(rows.detach().bfloat16())
    assert half.dtype == torch.float32
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(layer(rows.detach().float()), etf_projection(rows.detach().float()))
    zero = torch.zeros(2, 5, requires_grad=True)
    (gradient,) = torch.autograd.grad(layer(zero).sum(), zero)
    assert not layer(zero).any()
    assert not gradient.any()


def test_bad_arguments_are_named() -> None:
    with pytest.raises(InvalidArgumentError, match="in_features must be at least 2, got 1"):
        ETFProjector(1)
    with pytest.raises(InvalidArgumentError, match=r"\(..., in_features\) = \(..., 4\), got \(2, 3\)"):
        ETFProjector(4)(torch.zeros(2, 3))
    with pytest.raises(InvalidArgumentError, match="features must have a real floating-point dtype"):
        ETFProjector(4)(torch.zeros(2, 4).long())
    with pytest.raises(InvalidArgumentError, match=r"\(..., d\) with d >= 2, got \(3, 1\)"):
        etf_projection(torch.zeros(3, 1))
