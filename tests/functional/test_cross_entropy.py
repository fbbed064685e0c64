"""The memory-lean cross-entropies against ``F.cross_entropy`` of logits."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from etflayers.errors import InvalidArgumentError
from etflayers.functional import canonical_etf_logits, code_cross_entropy, etf_cross_entropy
from etflayers.kernels.cross_entropy import reference

IGNORE = -100
TARGETS = torch.tensor([0, 1, 2, 3, IGNORE, 1, 1, IGNORE, 0])
SIZES = [(7, 5), (5, 5), (4, 5), (1, 2)]  # d, K: more columns, as many, the reflection, the smallest


def features_of(width: int, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(9, width, generator=torch.Generator().manual_seed(0), dtype=torch.float64).to(dtype)


def frame_of(classes: int, width: int) -> Tensor:
    return torch.randn(classes, width, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


Losses = tuple[Callable[..., Tensor], Callable[..., Tensor], tuple[Tensor, ...]]


def both(form: str, width: int, classes: int, targets: Tensor, **options: Any) -> Losses:
    """The loss, the same by ``F.cross_entropy``, and their differentiable arguments."""
    features = features_of(width).requires_grad_()
    if form == "canonical":
        return (
            lambda f: etf_cross_entropy(f, targets, classes, scale=3.0, **options),
            lambda f: F.cross_entropy(3 * canonical_etf_logits(f, classes), targets, **options),
            (features,),
        )
    return (
        lambda f, w: code_cross_entropy(f, w, targets, scale=3.0, chunk_size=4, **options),
        lambda f, w: F.cross_entropy(3 * F.linear(f, w), targets, **options),
        (features, frame_of(classes, width).requires_grad_()),
    )


@pytest.mark.parametrize("form", ["canonical", "linear"])
@pytest.mark.parametrize(("width", "classes"), SIZES)
@pytest.mark.parametrize("smoothing", [0.0, 0.1, 1.0])
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_agrees_with_the_cross_entropy_of_logits(
    form: str, width: int, classes: int, smoothing: float, reduction: str
) -> None:
    targets = torch.where(classes <= TARGETS, 0, TARGETS)
    loss, plain, inputs = both(form, width, classes, targets, label_smoothing=smoothing, reduction=reduction)
    found, expected = loss(*inputs), plain(*inputs)
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-13)
    cotangent = torch.randn_like(found)
    torch.testing.assert_close(
        torch.autograd.grad(found, inputs, cotangent),
        torch.autograd.grad(expected, inputs, cotangent),
        rtol=1e-12,
        atol=1e-13,
    )


@pytest.mark.skipif(not hasattr(F, "linear_cross_entropy"), reason="came with PyTorch 2.13")
def test_agrees_with_the_loss_of_that_kind_in_pytorch() -> None:
    """The same numbers; what theirs cannot is what the docstring says, and the other tests of this file."""
    features, frame = features_of(5).requires_grad_(), frame_of(4, 5).requires_grad_()
    theirs = F.linear_cross_entropy(features, frame, TARGETS, label_smoothing=0.1)
    ours = code_cross_entropy(features, frame, TARGETS, label_smoothing=0.1)
    torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-13)
    torch.testing.assert_close(
        torch.autograd.grad(ours, (features, frame)),
        torch.autograd.grad(theirs, (features, frame)),
        rtol=1e-12,
        atol=1e-13,
    )


@pytest.mark.parametrize("form", ["canonical", "linear"])
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_derivatives_in_both_modes_to_second_order(form: str, reduction: str) -> None:
    loss, _, inputs = both(form, 5, 4, TARGETS, label_smoothing=0.1, reduction=reduction)
    assert torch.autograd.gradcheck(loss, inputs, check_forward_ad=True, check_batched_grad=True)
    assert torch.autograd.gradgradcheck(loss, inputs)


@pytest.mark.parametrize("form", ["canonical", "linear"])
def test_function_transforms_equal_a_loop(form: str) -> None:
    _, _, inputs = both(form, 5, 4, TARGETS)

    def one(f: Tensor, y: Tensor) -> Tensor:
        if form == "canonical":
            return etf_cross_entropy(f, y, 4)
        return code_cross_entropy(f, inputs[1].detach(), y)

    features = inputs[0].detach()
    mapped = torch.vmap(torch.func.grad(one))(features, TARGETS)
    looped = torch.stack([torch.func.grad(one)(f, y) for f, y in zip(features, TARGETS, strict=True)])
    torch.testing.assert_close(mapped, looped)
    hessian = torch.func.hessian(lambda f: one(f, TARGETS))(features)
    expected = torch.autograd.functional.hessian(lambda f: one(f, TARGETS), features)
    torch.testing.assert_close(hessian, expected)


def test_rows_in_parts_and_at_once_agree(monkeypatch: pytest.MonkeyPatch) -> None:
    features = features_of(6).requires_grad_()
    results = []
    for entries in (2**20, 8):
        monkeypatch.setattr(reference, "_CPU_ENTRIES", entries)
        loss = etf_cross_entropy(features, TARGETS, 4, label_smoothing=0.1)
        results.append((loss, torch.autograd.grad(loss, features)[0]))
    torch.testing.assert_close(results[0], results[1], rtol=1e-14, atol=0)


@pytest.mark.parametrize("form", ["canonical", "linear"])
def test_compiles_as_one_graph(form: str) -> None:
    loss, plain, inputs = both(form, 6, 4, TARGETS)
    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(
        torch.autograd.grad(compiled(*inputs), inputs), torch.autograd.grad(plain(*inputs), inputs)
    )


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_features_give_a_float32_loss(dtype: torch.dtype) -> None:
    features = features_of(6, dtype).requires_grad_()
    loss = etf_cross_entropy(features, TARGETS, 4, reduction="none")
    (gradient,) = torch.autograd.grad(loss.sum(), features)
    wide = features.detach().double().requires_grad_()
    exact = F.cross_entropy(canonical_etf_logits(wide, 4), TARGETS, reduction="none")
    (exact_gradient,) = torch.autograd.grad(exact.sum(), wide)
    assert loss.dtype == torch.float32
    # Only the gradient is rounded to half precision.
    torch.testing.assert_close(loss.double(), exact.detach(), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(gradient.double(), exact_gradient, rtol=torch.finfo(dtype).eps, atol=1e-6)


def test_a_large_common_mean_costs_no_digits() -> None:
    features = (64 * features_of(8)).round() / 64  # exact in float32, shifted or not
    targets = TARGETS
    shifted = (features + 2.0**12).float()
    exact = etf_cross_entropy(features, targets, 8, label_smoothing=0.1)
    found = etf_cross_entropy(shifted, targets, 8, label_smoothing=0.1)
    torch.testing.assert_close(found.double(), exact, rtol=1e-6, atol=0)


def test_linear_form_multiplies_in_the_dtype_of_autocast() -> None:
    features, frame = features_of(6, torch.float32), frame_of(4, 6).float()
    with torch.autocast("cpu", torch.bfloat16):
        loss = code_cross_entropy(features, frame, TARGETS, reduction="none")
        logits = F.linear(features, frame)
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss, F.cross_entropy(logits.float(), TARGETS, reduction="none"))


@pytest.mark.parametrize("form", ["canonical", "linear"])
def test_all_ignored_is_zero_with_a_zero_gradient(form: str) -> None:
    loss, _, inputs = both(form, 5, 4, torch.full((9,), IGNORE))
    value = loss(*inputs)
    assert value.item() == 0
    assert not any(bool(gradient.any()) for gradient in torch.autograd.grad(value, inputs))


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_nan_in_an_ignored_row_reaches_neither_loss_nor_gradient(smoothing: float) -> None:
    features = torch.tensor([[torch.nan] * 4, [0.5, 0.0, 0.0, 1.0]], requires_grad=True)
    loss = etf_cross_entropy(features, torch.tensor([IGNORE, 0]), 3, label_smoothing=smoothing)
    (gradient,) = torch.autograd.grad(loss, features)
    assert bool(torch.isfinite(loss))
    assert gradient[0].tolist() == [0.0] * 4
    assert bool(torch.isfinite(gradient[1]).all())


def test_leading_dimensions_and_none_at_all() -> None:
    features = features_of(6)
    cube = etf_cross_entropy(features.view(3, 3, 6), TARGETS.view(3, 3), 4, reduction="none")
    flat = etf_cross_entropy(features, TARGETS, 4, reduction="none")
    torch.testing.assert_close(cube, flat.view(3, 3))
    torch.testing.assert_close(etf_cross_entropy(features[1], TARGETS[1], 4), flat[1])
    torch.testing.assert_close(
        code_cross_entropy(features[1], frame_of(4, 6), TARGETS[1]),
        code_cross_entropy(features, frame_of(4, 6), TARGETS, reduction="none")[1],
    )


def test_an_empty_batch_has_loss_zero() -> None:
    features = torch.ones(0, 6, requires_grad=True)
    for loss in (
        etf_cross_entropy(features, TARGETS[:0], 4),
        code_cross_entropy(features, torch.ones(4, 6), TARGETS[:0]),
    ):
        assert loss.item() == 0
        assert torch.autograd.grad(loss, features)[0].shape == (0, 6)


@pytest.mark.parametrize(
    ("features", "targets", "options", "message"),
    [
        (torch.ones(()), TARGETS, {}, "got a scalar"),
        (torch.ones(9, 6).long(), TARGETS, {}, "features must have a real floating-point dtype"),
        (torch.ones(9, 2), TARGETS, {}, "in_features must be at least num_classes - 1 = 3, got 2"),
        (
            torch.ones(8, 6),
            TARGETS,
            {},
            r"targets must have the leading shape of features, \(8,\), got \(9,\)",
        ),
        (
            torch.ones(9, 6),
            TARGETS.view(3, 3),
            {},
            r"targets must have the leading shape of features, \(9,\), got \(3, 3\)",
        ),
        (torch.ones(9, 6), TARGETS.float(), {}, "targets must be integers"),
        (torch.ones(9, 6), TARGETS + 1, {}, r"in \[0, 4\).* got 4 \(3 of 9"),
        (torch.ones(9, 6), TARGETS, {"scale": 0.0}, "scale must be positive and finite, got 0.0"),
        (
            torch.ones(9, 6),
            TARGETS,
            {"label_smoothing": 1.5},
            r"label_smoothing must be in \[0, 1\], got 1.5",
        ),
        (torch.ones(9, 6), TARGETS, {"reduction": "max"}, "reduction must be .* got 'max'"),
    ],
)
def test_invalid_arguments_are_refused(
    features: Tensor, targets: Tensor, options: dict[str, Any], message: str
) -> None:
    with pytest.raises(InvalidArgumentError, match=message):
        etf_cross_entropy(features, targets, 4, **options)


def test_invalid_arguments_of_the_linear_form_are_refused() -> None:
    features = torch.ones(9, 6)
    with pytest.raises(InvalidArgumentError, match=r"got \(9, 6\) and \(4, 5\)"):
        code_cross_entropy(features, torch.ones(4, 5), TARGETS)
    with pytest.raises(InvalidArgumentError, match="chunk_size must be at least 1 or None, got 0"):
        code_cross_entropy(features, torch.ones(4, 6), TARGETS, chunk_size=0)
