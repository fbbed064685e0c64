"""NTCE and NONL against loops over the published formulas, and what the formulas leave open."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from etflayers import simplex_etf
from etflayers.errors import InvalidArgumentError
from etflayers.functional import nonl_loss, ntce_loss

IGNORE = -100
TARGETS = torch.tensor([0, 1, 2, 3, IGNORE, 1, 1, IGNORE, 0])
LOSSES: dict[str, Callable[..., Tensor]] = {"ntce": ntce_loss, "nonl": nonl_loss}
both = pytest.mark.parametrize("name", LOSSES)


def problem(seed: int = 0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    features = torch.randn(9, 6, generator=generator, dtype=torch.float64)
    return features, torch.randn(4, 6, generator=generator, dtype=torch.float64)


def published(name: str, features: Tensor, weight: Tensor, targets: Tensor, tau: float) -> list[float]:
    """Sample by sample, with the exponentials as they are written."""

    def s(i: int, k: int) -> float:
        u, w = features[i], weight[k]
        return float(u @ w) / math.sqrt(float(u @ u) * float(w @ w)) / tau

    valid = [i for i, y in enumerate(targets.tolist()) if y != IGNORE]
    losses = [0.0] * len(targets)
    for i in valid:
        y = int(targets[i])
        others = [j for j in valid if name == "ntce" or int(targets[j]) != y]
        losses[i] = -math.log(math.exp(s(i, y)) / sum(math.exp(s(j, y)) for j in others))
    return losses


@both
@pytest.mark.parametrize("tau", [1.0, 0.2])
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_agrees_with_the_published_formula(name: str, tau: float, reduction: Any) -> None:
    features, weight = problem()
    found = LOSSES[name](features, weight, TARGETS, tau=tau, reduction=reduction)
    expected = torch.tensor(published(name, features, weight, TARGETS, tau), dtype=torch.float64)
    if reduction != "none":
        expected = expected.sum() / (7 if reduction == "mean" else 1)
    torch.testing.assert_close(found, expected, rtol=1e-11, atol=1e-12)


@both
def test_gradients_of_both_orders_and_modes(name: str) -> None:
    features, weight = problem()
    inputs = (features.requires_grad_(), weight.requires_grad_())

    def loss(f: Tensor, w: Tensor) -> Tensor:
        return LOSSES[name](f, w, TARGETS, tau=0.5)

    assert torch.autograd.gradcheck(loss, inputs, check_forward_ad=True)
    assert torch.autograd.gradgradcheck(loss, inputs)


@both
def test_no_length_has_an_influence(name: str) -> None:
    features, weight = problem()
    loss = LOSSES[name](features, weight, TARGETS, tau=0.3)
    sizes = torch.arange(1.0, 10.0)[:, None], torch.arange(1.0, 5.0)[:, None]
    scaled = LOSSES[name](sizes[0] * features, sizes[1] * weight, TARGETS, tau=0.3)
    torch.testing.assert_close(scaled, loss)


@both
def test_neural_collapse_is_a_critical_point(name: str) -> None:
    # Of balanced classes: by symmetry the gradient at u_i = w_y is along w_y, which has no effect.
    frame = simplex_etf(4, 6, rotation="haar", dtype=torch.float64)
    targets = torch.arange(4).repeat(3)
    features, weight = frame[targets].requires_grad_(), frame.clone().requires_grad_()
    value = LOSSES[name](features, weight, targets, tau=0.4)
    for gradient in torch.autograd.grad(value, (features, weight)):
        torch.testing.assert_close(gradient, torch.zeros_like(gradient), rtol=0, atol=1e-14)
    # And the loss is lower there than at 20 other places.
    for seed in range(20):
        generator = torch.Generator().manual_seed(seed)
        moved = features + 0.3 * torch.randn(12, 6, generator=generator, dtype=torch.float64)
        assert LOSSES[name](moved, weight, targets, tau=0.4) > value


@both
def test_a_batch_of_one_class_is_finite(name: str) -> None:
    features, weight = problem()
    features.requires_grad_()
    loss = LOSSES[name](features, weight, torch.full((9,), 2), tau=0.1)
    (gradient,) = torch.autograd.grad(loss, features)
    assert bool(torch.isfinite(gradient).all())
    if name == "nonl":
        assert loss == 0
        assert bool((gradient == 0).all())
    else:
        torch.testing.assert_close(
            loss.item(), sum(published(name, features.detach(), weight, torch.full((9,), 2), 0.1)) / 9
        )
    assert LOSSES[name](features[:1], weight, torch.tensor([1]), tau=0.1) == 0


@both
def test_a_small_temperature_does_not_overflow(name: str) -> None:
    # exp(1 / tau) = exp(10^4) is beyond float64; the loss is a difference of cosines over tau.
    features, weight = (t.float().requires_grad_() for t in problem())
    loss = LOSSES[name](features, weight, TARGETS, tau=1e-4)
    gradients = torch.autograd.grad(loss, (features, weight))
    assert bool(torch.isfinite(loss))
    assert all(bool(torch.isfinite(gradient).all()) for gradient in gradients)


@both
def test_ignored_samples_are_no_part_of_the_batch(name: str) -> None:
    features, weight = problem()
    kept = TARGETS != IGNORE
    expected = LOSSES[name](features[kept], weight, TARGETS[kept], tau=0.5)
    features[~kept] = torch.nan
    features.requires_grad_()
    loss = LOSSES[name](features, weight, TARGETS, tau=0.5)
    torch.testing.assert_close(loss, expected)
    (gradient,) = torch.autograd.grad(loss, features)
    assert bool(torch.isfinite(gradient).all())
    assert bool((gradient[~kept] == 0).all())
    # uint8 has no -100, and a class may be the one to ignore.
    assert torch.equal(LOSSES[name](features[kept], weight, TARGETS[kept].to(torch.uint8), tau=0.5), expected)
    as_class = torch.where(TARGETS == IGNORE, 3, TARGETS)
    without = torch.where(as_class == 3, IGNORE, as_class)
    torch.testing.assert_close(
        LOSSES[name](features, weight, as_class, tau=0.5, ignore_index=3),
        LOSSES[name](features, weight, without, tau=0.5),
    )


@both
@pytest.mark.parametrize("size", [0, 9])
def test_where_nothing_counts_the_loss_is_zero(name: str, size: int) -> None:
    features, weight = problem()
    features = features[:size].requires_grad_()
    loss = LOSSES[name](features, weight, torch.full((size,), IGNORE), tau=0.5)
    (gradient,) = torch.autograd.grad(loss, features)
    assert loss == 0
    assert bool((gradient == 0).all())


@both
def test_zero_features_and_rows_have_no_direction(name: str) -> None:
    features, weight = problem()
    features[0], weight[1] = 0, 0
    inputs = (features.requires_grad_(), weight.requires_grad_())
    loss = LOSSES[name](*inputs, TARGETS, tau=0.5)
    gradients = torch.autograd.grad(loss, inputs)
    assert bool(torch.isfinite(loss))
    assert bool((gradients[0][0] == 0).all() & (gradients[1][1] == 0).all())
    assert all(bool(torch.isfinite(gradient).all()) for gradient in gradients)


@both
def test_leading_dimensions_are_one_batch(name: str) -> None:
    features, weight = problem()
    cube = LOSSES[name](features.view(3, 3, 6), weight, TARGETS.view(3, 3), tau=0.5, reduction="none")
    flat = LOSSES[name](features, weight, TARGETS, tau=0.5, reduction="none")
    assert torch.equal(cube, flat.view(3, 3))


@both
def test_half_precision_and_autocast_give_a_float32_loss(name: str) -> None:
    features, weight = (t.bfloat16() for t in problem())
    exact = LOSSES[name](features.double(), weight.double(), TARGETS, tau=0.5)
    for found in (
        LOSSES[name](features, weight, TARGETS, tau=0.5),
        LOSSES[name](features, weight.float(), TARGETS, tau=0.5),
    ):
        assert found.dtype == torch.float32
        torch.testing.assert_close(found.double(), exact, rtol=0, atol=1e-6)
    with torch.autocast("cpu", torch.bfloat16):
        found = LOSSES[name](features.float(), weight.float(), TARGETS, tau=0.5)
    torch.testing.assert_close(found.double(), exact, rtol=0, atol=1e-6)


@both
@pytest.mark.parametrize(
    ("features", "weight", "targets", "options", "message"),
    [
        (torch.ones(2, 3).long(), torch.ones(4, 3), [0, 1], {}, "features must have a real floating-point"),
        (torch.ones(2, 3), torch.ones(4, 3).long(), [0, 1], {}, "weight must have a real floating-point"),
        (torch.ones(2, 3), torch.ones(4, 2), [0, 1], {}, r"got \(2, 3\) and \(4, 2\)"),
        (torch.ones(2, 3), torch.ones(3), [0, 1], {}, r"got \(2, 3\) and \(3,\)"),
        (torch.ones(2, 3), torch.ones(4, 3), [0], {}, r"targets must have the leading shape"),
        (torch.ones(2, 3), torch.ones(4, 3), [0, 4], {}, r"targets must be class indices in \[0, 4\)"),
        (torch.ones(2, 3), torch.ones(4, 3), [0.0, 1.0], {}, "targets must be integers"),
        (torch.ones(2, 3), torch.ones(4, 3), [0, 1], {"tau": 0.0}, "tau must be a finite number > 0, got 0"),
        (torch.ones(2, 3), torch.ones(4, 3), [0, 1], {"reduction": "avg"}, "reduction must be"),
    ],
)
def test_bad_input_is_named(
    name: str, features: Tensor, weight: Tensor, targets: Any, options: dict[str, Any], message: str
) -> None:
    with pytest.raises(InvalidArgumentError, match=message):
        LOSSES[name](features, weight, torch.tensor(targets), **{"tau": 0.5, **options})
