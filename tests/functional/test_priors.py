"""Losses that know how often each class occurs, against the formula of all logits in float64."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from etflayers.codes import OrthoplexCode
from etflayers.errors import InvalidArgumentError
from etflayers.functional import (
    canonical_etf_logits,
    code_cross_entropy,
    etf_cross_entropy,
    logit_adjustment,
)
from tests.nn.test_cross_entropy import LargestTensor

IGNORE = -100
TARGETS = torch.tensor([0, 1, 2, 3, IGNORE, 1, 1, IGNORE, 0])
K, TAU, SCALE = 5, 0.7, 3.0
COUNTS = torch.tensor([500, 100, 20, 4, 1])
SOFT = torch.softmax(torch.arange(45.0, dtype=torch.float64).cos().view(9, K), -1)


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def formula(logits: Tensor, targets: Tensor, tau: float = TAU, **options: Any) -> Tensor:
    shares = COUNTS.double() / COUNTS.sum()
    return F.cross_entropy(logits + tau * torch.log(shares), targets, **options)


Loss = Callable[..., Tensor]
# Of each form: the arguments, the loss, and the logits without a prior.
FORMS: dict[str, tuple[tuple[Tensor, ...], Loss, Loss]] = {
    "matrix": (
        (draw(9, 6), draw(K, 6, seed=1)),
        lambda f, w, y, **o: code_cross_entropy(f, w, y, scale=SCALE, chunk_size=4, **o),
        lambda f, w: SCALE * f @ w.T,
    ),
    **{
        f"canonical, d = {d}": (
            (draw(9, d),),
            lambda f, y, **o: etf_cross_entropy(f, y, K, scale=SCALE, **o),
            lambda f: SCALE * canonical_etf_logits(f, K),
        )
        for d in (K - 1, K, K + 2)
    },
    "code": (
        (draw(9, 3),),
        lambda f, y, **o: code_cross_entropy(f, OrthoplexCode(K, 3), y, scale=SCALE, **o),
        lambda f: SCALE * f @ OrthoplexCode(K, 3).dense(dtype=torch.float64).T,
    ),
}


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("targets", [TARGETS, SOFT], ids=["indices", "soft"])
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_is_the_loss_of_all_logits_plus_the_prior(form: str, targets: Tensor, smoothing: float) -> None:
    arguments, loss, logits = FORMS[form]
    inputs = [argument.clone().requires_grad_() for argument in arguments]
    for reduction in ("mean", "sum", "none"):
        options: Any = {"label_smoothing": smoothing, "reduction": reduction}
        found = loss(*inputs, targets, prior=COUNTS, tau=TAU, **options)
        expected = formula(logits(*inputs), targets, **options)
        torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-10)
        torch.testing.assert_close(
            torch.autograd.grad(found.sum(), inputs),
            torch.autograd.grad(expected.sum(), inputs),
            rtol=1e-10,
            atol=1e-10,
        )


@pytest.mark.parametrize("form", FORMS)
def test_gradients_of_both_orders_and_modes(form: str) -> None:
    arguments, loss, _ = FORMS[form]
    inputs = tuple(argument.clone().requires_grad_() for argument in arguments)
    prior = COUNTS.double().requires_grad_()

    def value(*everything: Tensor) -> Tensor:
        return loss(*everything[:-1], TARGETS, prior=everything[-1], tau=TAU)

    assert torch.autograd.gradcheck(value, (*inputs, prior), check_forward_ad=True)
    assert torch.autograd.gradgradcheck(value, (*inputs, prior))


def test_the_adjustment_is_the_published_formula() -> None:
    logits = draw(4, 3, K).requires_grad_()
    counts = COUNTS.numpy()
    expected = logits.detach().numpy() + TAU * np.log(counts / counts.sum())
    np.testing.assert_allclose(logit_adjustment(logits, COUNTS, tau=TAU).detach(), expected, rtol=1e-14)
    assert torch.autograd.gradcheck(
        lambda z, n: logit_adjustment(z, n, tau=-1.0), (logits, COUNTS.double().requires_grad_())
    )


def test_with_tau_1_it_is_the_balanced_softmax() -> None:
    # Ren et al.: n_y exp z_y over the sum of n_k exp z_k.
    logits, targets = draw(9, K), torch.arange(9) % K
    weighted = COUNTS * logits.exp()
    expected = -(weighted.gather(-1, targets[:, None]).squeeze(-1) / weighted.sum(-1)).log().mean()
    torch.testing.assert_close(F.cross_entropy(logit_adjustment(logits, COUNTS), targets), expected)


def test_taken_out_again_nothing_is_left_but_a_constant() -> None:
    logits = draw(9, K)
    back = logit_adjustment(logit_adjustment(logits, COUNTS), COUNTS / 7, tau=-1.0)
    torch.testing.assert_close(back, logits)


@pytest.mark.parametrize("form", FORMS)
def test_equal_counts_change_nothing(form: str) -> None:
    arguments, loss, _ = FORMS[form]
    found = loss(*arguments, TARGETS, prior=torch.full((K,), 12), tau=2.0)
    torch.testing.assert_close(found, loss(*arguments, TARGETS), rtol=1e-12, atol=1e-12)


def test_the_bayes_classifier_of_balanced_data_minimizes_the_loss() -> None:
    # Two classes with densities 3/4, 1/4 and 1/4, 3/4 on two points, and nine times as many samples of the
    # first. The best logits z differ by log 3, as without imbalance; a plain loss would find log 3 + log 9.
    density = torch.tensor([[0.75, 0.25], [0.25, 0.75]], dtype=torch.float64)
    counts = torch.tensor([9.0, 1.0], dtype=torch.float64)
    joint = counts[:, None] * density / counts.sum()
    logits = density.log().mT.clone().requires_grad_()  # point, class
    adjusted = logit_adjustment(logits, counts).log_softmax(-1)
    (gradient,) = torch.autograd.grad(-(joint.mT * adjusted).sum(), logits)
    torch.testing.assert_close(gradient, torch.zeros_like(gradient), rtol=0, atol=1e-15)


@pytest.mark.parametrize("form", FORMS)
def test_half_precision_is_off_by_the_rounding_of_its_products(form: str) -> None:
    arguments, loss, logits = FORMS[form]
    half = [argument.bfloat16() for argument in arguments]
    found = loss(*half, TARGETS, prior=COUNTS, tau=TAU)
    exact = formula(logits(*(argument.double() for argument in half)), TARGETS)
    assert found.dtype == torch.float32
    # Products up to 7, and log pi / scale up to 2, each rounded to 8 bits.
    torch.testing.assert_close(found.double(), exact, rtol=0, atol=SCALE * 9 * 2**-9)


def test_an_ignored_sample_may_be_nan() -> None:
    for arguments, loss, _ in FORMS.values():
        features = arguments[0].clone()
        features[TARGETS == IGNORE] = torch.nan
        features.requires_grad_()
        found = loss(features, *arguments[1:], TARGETS, prior=COUNTS)
        (gradient,) = torch.autograd.grad(found, features)
        torch.testing.assert_close(found, loss(*arguments, TARGETS, prior=COUNTS))
        assert bool(torch.isfinite(gradient).all())


@pytest.mark.parametrize("kind", ["matrix", "code"])
def test_no_more_logits_exist_than_those_of_a_chunk(kind: str) -> None:
    samples, width, classes = 1000, 3, 6
    frame: Any = OrthoplexCode(classes, width) if kind == "code" else torch.randn(classes, width)
    features = torch.randn(samples, width, requires_grad=True)
    targets, prior = torch.arange(samples) % classes, torch.arange(1, classes + 1)
    with LargestTensor() as largest:
        torch.autograd.backward(code_cross_entropy(features, frame, targets, prior=prior, chunk_size=10))
    assert largest.entries == samples * (width + 1)  # the features and the 1; logits would be 6000


def test_the_canonical_frame_needs_features_of_other_values_and_nothing_larger() -> None:
    features = torch.randn(1000, 5, requires_grad=True)
    with LargestTensor() as largest:
        torch.autograd.backward(etf_cross_entropy(features, torch.arange(1000) % 5, 5, prior=COUNTS))
    assert largest.entries == features.numel()


def test_compiles_as_one_graph() -> None:
    arguments, loss, _ = FORMS["matrix"]
    compiled = torch.compile(
        lambda f, w: loss(f, w, TARGETS, prior=COUNTS), fullgraph=True, backend="aot_eager"
    )
    torch.testing.assert_close(compiled(*arguments), loss(*arguments, TARGETS, prior=COUNTS))


@pytest.mark.parametrize(
    ("prior", "tau", "message"),
    [
        (COUNTS[:4], 1.0, r"prior must have one number for each class, shape \(5,\), got \(4,\)"),
        (COUNTS.tolist(), 1.0, r"prior must be a tensor .* got list: pass torch.as_tensor\(counts\)"),
        (COUNTS > 3, 1.0, "prior must be a tensor .* got torch.bool"),
        (COUNTS - 1, 1.0, r"prior must be positive and finite.*counts.clamp\(min=1\)"),
        (-COUNTS, 1.0, "prior must be positive"),
        (COUNTS * torch.nan, 1.0, "prior must be positive"),
        (COUNTS / 0, 1.0, "prior must be positive and finite"),
        (COUNTS, torch.inf, "tau must be a finite number, got inf"),
        (COUNTS, "1", "tau must be a finite number, got '1'"),
        (COUNTS, True, "tau must be a finite number, got True"),
    ],
)
def test_a_bad_prior_is_named(prior: Any, tau: Any, message: str) -> None:
    for arguments, loss, _ in FORMS.values():
        with pytest.raises(InvalidArgumentError, match=message):
            loss(*arguments, TARGETS, prior=prior, tau=tau)
    with pytest.raises(InvalidArgumentError, match=message):
        logit_adjustment(torch.zeros(2, K), prior, tau=tau)


def test_bad_logits_are_named() -> None:
    with pytest.raises(InvalidArgumentError, match="logits must have a real floating-point dtype"):
        logit_adjustment(torch.zeros(2, K).long(), COUNTS)
    with pytest.raises(InvalidArgumentError, match="got a scalar"):
        logit_adjustment(torch.zeros(()), COUNTS)
