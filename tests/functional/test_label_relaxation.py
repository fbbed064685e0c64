"""Label relaxation against the published formula, and where that formula has no number."""

from __future__ import annotations

from typing import Any

import mpmath
import pytest
import torch
from torch import Tensor

from etflayers.errors import InvalidArgumentError
from etflayers.functional import label_relaxation_loss
from etflayers.nn import LabelRelaxationLoss

ALPHAS = [1e-6, 0.1, 0.4, 0.9]


def published(logits: Tensor, targets: Tensor, alpha: float) -> Tensor:
    """The divergence from the nearest credible distribution, class by class, by autograd."""
    p = logits.softmax(-1)
    own = p.gather(-1, targets.unsqueeze(-1))
    nearest = (alpha * p / (1 - own)).scatter(-1, targets.unsqueeze(-1), 1 - alpha).detach()
    divergence = (nearest * (nearest / p).log()).sum(-1)
    return torch.where(own.squeeze(-1) > 1 - alpha, 0, divergence)


@pytest.fixture
def logits() -> Tensor:
    return 3 * torch.randn(40, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(0))


TARGETS = torch.arange(40) % 5


@pytest.mark.parametrize("alpha", ALPHAS)
def test_value_and_gradient_are_those_of_the_published_loss(logits: Tensor, alpha: float) -> None:
    logits.requires_grad_()
    expected = published(logits, TARGETS, alpha)
    found = label_relaxation_loss(logits, TARGETS, alpha=alpha, reduction="none")
    if alpha in (0.1, 0.4):
        assert 0 < (found == 0).sum() < len(found)  # both sides of the threshold
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-14)
    weights = torch.linspace(1, 2, 40, dtype=torch.float64)
    gradients = [torch.autograd.grad(weights @ values, logits)[0] for values in (found, expected)]
    torch.testing.assert_close(*gradients, rtol=1e-9, atol=1e-14)


@pytest.mark.parametrize("alpha", ALPHAS)
@pytest.mark.parametrize("gap", [-1e4, -95.0, -20.0, -1e-3, 0.0])
def test_any_gap_agrees_with_fifty_digits(alpha: float, gap: float) -> None:
    with mpmath.workdps(50 + 4400 * (gap < -1e3)):
        a, p = mpmath.mpf(alpha), 1 / (1 + mpmath.exp(-mpmath.mpf(gap)))
        value = float((1 - a) * mpmath.log((1 - a) / p) + a * mpmath.log(a / (1 - p))) if p < 1 - a else 0.0
        slope = float(p - (1 - a)) if p < 1 - a else 0.0
    logits = torch.tensor([[gap, 0.0]], dtype=torch.float64, requires_grad=True)
    found = label_relaxation_loss(logits, torch.tensor([0]), alpha=alpha)
    (gradient,) = torch.autograd.grad(found, logits)
    assert found.item() == pytest.approx(value, rel=1e-12, abs=1e-15)
    assert gradient[0].tolist() == pytest.approx([slope, -slope], rel=1e-9, abs=1e-15)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("gap", [95.0, -95.0, 1e4, -1e4])
def test_finite_where_the_published_form_is_not(dtype: torch.dtype, gap: float) -> None:
    logits = torch.tensor([[gap, 0.0, 0.0]], dtype=dtype)
    if gap < 0:
        assert not torch.isfinite(
            published(logits.float() * (1.1 if gap == -95 else 1), torch.tensor([0]), 0.1)
        )
    logits.requires_grad_()
    loss = label_relaxation_loss(logits, torch.tensor([0]))
    (gradient,) = torch.autograd.grad(loss, logits)
    assert loss.dtype == torch.float32
    assert gradient.dtype == dtype
    assert torch.isfinite(loss)
    assert torch.isfinite(gradient).all()
    assert (loss == 0) == (gap > 0)
    assert bool((gradient == 0).all()) == (gap > 0)


def test_a_probability_close_to_one_keeps_its_digits() -> None:
    """Just below the threshold 1 - 1e-9 in float32, where p_y is 1 and 1 - p_y zero."""
    alpha, gap = 1e-9, 18.0
    with mpmath.workdps(50):
        a, p = mpmath.mpf(alpha), 1 / (1 + mpmath.exp(-mpmath.mpf(gap)))
        value = float((1 - a) * mpmath.log((1 - a) / p) + a * mpmath.log(a / (1 - p)))
    found = label_relaxation_loss(torch.tensor([[gap, 0.0]]), torch.tensor([0]), alpha=alpha)
    assert 1 - torch.tensor(gap).sigmoid() == 0
    assert found.item() == pytest.approx(value, rel=1e-5)


@pytest.mark.parametrize("alpha", ALPHAS)
def test_derivatives_by_finite_differences(logits: Tensor, alpha: float) -> None:
    def losses(z: Tensor) -> Tensor:
        return label_relaxation_loss(z, TARGETS[:8], alpha=alpha, reduction="none")

    point = logits[:8].requires_grad_()
    assert torch.autograd.gradcheck(losses, point, check_forward_ad=True)
    assert torch.autograd.gradgradcheck(losses, point)


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_ignored_samples_count_nothing_and_may_hold_anything(logits: Tensor, reduction: Any) -> None:
    targets = TARGETS.clone()
    targets[::3] = 255
    kept = targets != 255
    spoilt = logits.clone()
    spoilt[::3] = torch.nan
    spoilt.requires_grad_()
    loss = LabelRelaxationLoss(0.2, ignore_index=255, reduction=reduction)(spoilt, targets.to(torch.uint8))
    alone = label_relaxation_loss(logits[kept], targets[kept], alpha=0.2, reduction=reduction)
    torch.testing.assert_close(loss[kept] if reduction == "none" else loss, alone)
    (gradient,) = torch.autograd.grad(loss.sum(), spoilt)
    assert (gradient[~kept] == 0).all()
    assert torch.isfinite(gradient).all()
    nothing = label_relaxation_loss(logits, torch.full((40,), -100), reduction=reduction)
    assert not nothing.any()


def test_leading_dimensions_and_autocast(logits: Tensor) -> None:
    flat = label_relaxation_loss(logits, TARGETS, reduction="none")
    shaped = label_relaxation_loss(logits.view(2, 20, 5), TARGETS.view(2, 20), reduction="none")
    assert torch.equal(shaped, flat.view(2, 20))
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(
            label_relaxation_loss(logits.float(), TARGETS).double(), flat.float().mean().double()
        )


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: LabelRelaxationLoss(0.0), r"alpha must be in \(0, 1\), got 0.0: .* F.cross_entropy"),
        (lambda: LabelRelaxationLoss(1.0), r"alpha must be in \(0, 1\), got 1.0"),
        (lambda: LabelRelaxationLoss(float("nan")), "alpha must be a finite number"),
        (lambda: LabelRelaxationLoss(0.1, reduction="max"), "reduction must be"),  # type: ignore[arg-type]
        (lambda: label_relaxation_loss(torch.zeros(3, 1), torch.zeros(3).long()), "K >= 2, got"),
        (
            lambda: label_relaxation_loss(torch.zeros(3, 2), torch.zeros(2).long()),
            "targets must have the shape",
        ),
        (
            lambda: label_relaxation_loss(torch.zeros(1, 2), torch.tensor([2])),
            "targets must be class indices",
        ),
        (
            lambda: label_relaxation_loss(torch.zeros(1, 2).long(), torch.tensor([0])),
            "logits must have a real",
        ),
    ],
)
def test_bad_arguments_are_named(call: Any, message: str) -> None:
    with pytest.raises(InvalidArgumentError, match=message):
        call()
